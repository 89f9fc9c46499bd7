"""A fragment of a tensor as boxes, and what may be done with it; without a checkpoint."""

from __future__ import annotations

import copy
import io
import itertools
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from resume import build, make, step
from torch.distributed.checkpoint import planner_helpers, utils
from torch.distributed.checkpoint.metadata import MetadataIndex

from pyzero.rank_state.sharded_state import Fragment, ShardedState, boxes_of

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2), (1, 1, 3)]


def slices(offsets: Any, sizes: Any) -> tuple[slice, ...]:
    return tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_hold_the_elements_in_order(shape):
    whole = torch.arange(prod(shape)).reshape(shape)
    for low, high in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        boxes = list(boxes_of(shape, low, high))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        held = [whole[slices(*box)].reshape(-1) for box in boxes]
        assert torch.equal(torch.cat([torch.arange(0), *held]), torch.arange(low, high))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_follow_the_memory_order(shape):
    for order in itertools.permutations(range(len(shape))):
        whole = torch.arange(prod(shape)).reshape(shape).permute(order)
        for low, high in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
            fragment = Fragment(whole.shape, whole.stride(), low, high, "", lambda part: part)
            for box, view in fragment.views(torch.arange(low, high)):
                assert torch.equal(view, whole[slices(*box)])


def test_a_worked_case():
    """Elements 5 to 17 of (4, 5): the second row, the third, and two of the fourth."""
    assert list(boxes_of((4, 5), 5, 17)) == [((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(boxes_of((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]


def of_two_ranks(group: Any) -> list[str]:
    model = build(torch.bfloat16, 0)
    optimizer = make("adamw", model, group)
    step(optimizer, model, 0, group.rank(), group.size())
    state = optimizer.state_dict()["state"][0]["exp_avg"]
    live = optimizer.state[next(model.parameters())]["exp_avg"]
    assert isinstance(state, ShardedState) and state.shape == (17, 9) and state.dtype == torch.float32
    assert torch.equal(state.full_tensor(), optimizer.full_state(next(model.parameters()))["exp_avg"])
    for other in (copy.deepcopy(state), state.clone(), state.to(torch.float64), state.detach(), state.cpu()):
        assert isinstance(other, ShardedState) and torch.equal(other.to_local(), live.to(other.dtype))
    assert state.to_local().data_ptr() == live.data_ptr() != state.clone().to_local().data_ptr()
    file = io.BytesIO()
    torch.save(state, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert type(loaded) is torch.Tensor and torch.equal(loaded, live)
    refused = []
    for do in (
        lambda: torch.add(state, 1),
        lambda: state.norm(),
        lambda: state.mul_(2.0),
        lambda: torch.equal(state, state),
        lambda: state.redistribute(placements=[torch.distributed.tensor.Shard(0)]),
        lambda: ForkingPickler.dumps(state),
    ):
        try:
            do()
        except (TypeError, ValueError) as error:
            refused.append(str(error))
    return refused


def test_state_of_two_ranks(ranks):
    for refused in ranks.run(2, of_two_ranks):
        assert len(refused) == 6
        assert all("call full_tensor() on all ranks" in text for text in refused[:4])
        assert "expected placements of [Replicate()]" in refused[4]
        assert "AsyncCheckpointerType.THREAD" in refused[5]


class Recorder:
    """Not a tensor: has only what torch is believed to look for."""

    def __create_write_items__(self, fqn: str, obj: Any) -> list[str]:
        return [f"write {fqn}"]

    def __create_chunk_list__(self) -> list[str]:
        return ["chunk"]

    def __get_tensor_shard__(self, index: MetadataIndex) -> str:
        return f"shard at {tuple(index.offset)}"


def test_torch_still_looks_for_the_private_protocol():
    """torch.distributed.checkpoint calls these three methods of whatever has them; it documents none."""
    recorder: Any = Recorder()
    hint = f"torch {torch.__version__} changed how its checkpoints ask a tensor for its shards: see sharded_state.py"
    assert planner_helpers._create_write_items("name", recorder) == ["write name"], hint
    assert planner_helpers._create_chunk_list(recorder) == ["chunk"], hint
    assert utils.find_tensor_shard(recorder, MetadataIndex("name", (1, 2))) == "shard at (1, 2)", hint
