"""State that was saved of weights in one memory order, loaded into weights in another, or of another shape."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from resume import assert_equal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pyzero

WAYS = ("state_dict", "full_state_dict", "checkpoint", "dcp")


def build(dtype: torch.dtype, formats: str) -> nn.ModuleDict:
    """formats: "rows", or "others": channels_last and transposed, of which the order of `thin` is the same."""
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(4, 6, 3), "thin": nn.Conv2d(1, 4, 3), "plain": nn.Linear(5, 7), "cube": nn.Linear(3, 8)}
    model = nn.ModuleDict(parts).to(dtype)
    if formats == "others":
        model = model.to(memory_format=torch.channels_last)
        model["plain"].weight.data = model["plain"].weight.data.t().contiguous().t()
    return model


def step(model: nn.ModuleDict, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    for index, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(10 * number + index)
        param.grad = None
        (param.float() * torch.randint(-4, 5, param.shape, generator=generator)).sum().backward()
    optimizer.step()


def everything(model: nn.ModuleDict, optimizer: Any) -> list[Any]:
    return [[param.detach().clone(), optimizer.full_state(param)] for param in model.parameters()]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def resume(group: Any, path: Path, way: str, dtype: torch.dtype, formats: tuple[str, str]) -> Any:
    """Weights and state after a load, and after one more step, with what they should be."""

    def make(which: str) -> Any:
        model = build(dtype, which)
        return model, pyzero.FusedZeroAdamW(model.parameters(), lr=0.1, process_group=group, bucket_cap_mb=2e-4)

    model, optimizer = make(formats[0])
    for number in range(2):
        step(model, optimizer, number)
    optimizer.zero_grad()
    other, resumed = make(formats[1])
    if way == "checkpoint":
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2)
        pyzero.load_checkpoint(path, model=other, optimizer=resumed)
    elif way == "dcp":
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path, process_group=group)
        of_model, of_optimizer = get_state_dict(other, resumed)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path, process_group=group)
        set_state_dict(other, resumed, model_state_dict=of_model, optim_state_dict=of_optimizer)
    else:
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(through_a_file(getattr(optimizer, way)()))
    found = [everything(other, resumed), everything(model, optimizer)]
    strides = [param.stride() for param in other.parameters()]
    assert strides == [param.stride() for param in build(dtype, formats[1]).parameters()]
    for of in ((other, resumed), (model, optimizer)):
        step(*of, 2)
        found.append(everything(*of))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formats", [("others", "rows"), ("rows", "others"), ("others", "others")], ids="-".join)
@pytest.mark.parametrize("size", [1, 3])
def test_another_memory_format_goes_on_bit_for_bit(ranks, tmp_path, size, way, dtype, formats):
    for got, wanted, later, wanted_later in ranks.run(size, resume, tmp_path / "saved", way, dtype, formats):
        assert_equal(got, wanted)
        assert_equal(later, wanted_later)


def into_another_shape(group: Any, shapes: tuple[Any, Any], only: int | None) -> str:
    """What is said, where all is as before then. only: The rank that has the file of another model; None: each."""
    saved, mine = (pyzero.FusedZeroAdamW([nn.Parameter(torch.ones(s))], process_group=group) for s in shapes)
    theirs = through_a_file(saved.state_dict())
    own = through_a_file(mine.state_dict())
    param = mine.param_groups[0]["params"][0]
    before = param.detach().clone(), mine.full_state(param)
    try:
        mine.load_state_dict(theirs if only in (None, group.rank()) else own)
        said = "loaded"
    except ValueError as error:
        said = str(error)
    assert_equal((param.detach(), mine.full_state(param)), before)
    return said


@pytest.mark.parametrize("only", [None, 1])
@pytest.mark.parametrize("shapes", [((8, 16), (16, 8)), ((128,), (8, 16)), ((8, 16), (128,))], ids=str)
def test_another_shape_of_as_many_elements_is_refused_on_all_ranks(ranks, shapes, only):
    wanted = f"expected the state of parameter 0 of shape {shapes[1]}, got it of shape {shapes[0]}; build the model"
    for said in ranks.run(2, into_another_shape, shapes, only):
        assert wanted in said


def test_another_shape_of_as_many_elements_is_refused_on_one_rank(ranks):
    for shapes in (((8, 16), (16, 8)), ((128,), (8, 16)), ((8, 16), (128,))):
        (said,) = ranks.run(1, into_another_shape, shapes, None)
        assert "parameter 0" in said and str(shapes[0]) in said and str(shapes[1]) in said


def without_shapes(group: Any) -> list[Any]:
    """What a state dict gives that was saved before shapes were."""
    model = build(torch.bfloat16, "others")
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    step(model, optimizer, 0)
    state = through_a_file(optimizer.state_dict())
    zero = json.loads(state["param_groups"][0]["zero"])
    del zero["tensors"]
    state["param_groups"][0]["zero"] = json.dumps(zero)
    other = build(torch.bfloat16, "others")
    resumed = pyzero.FusedZeroAdamW(other.parameters(), process_group=group)
    resumed.load_state_dict(state)
    return [everything(other, resumed), everything(model, optimizer)]


def test_files_without_shapes_load_as_they_did(ranks):
    for got, wanted in ranks.run(2, without_shapes):
        assert_equal(got, wanted)


def formats_that_differ(group: Any) -> str:
    """One rank lacks the master of a weight whose order is another now; state is untouched."""
    model, other = build(torch.bfloat16, "others"), build(torch.bfloat16, "rows")
    optimizer, resumed = (pyzero.FusedZeroAdamW(m.parameters(), process_group=group) for m in (model, other))
    step(model, optimizer, 0)
    state = through_a_file(optimizer.state_dict())
    if group.rank() == 1:
        del state["state"][0]["master"]
    before = everything(other, resumed)
    with pytest.raises(ValueError, match="in whose order its state was saved") as raised:
        resumed.load_state_dict(state)
    assert_equal(everything(other, resumed), before)
    return str(raised.value)


def test_what_cannot_be_put_in_another_order_is_refused_on_all_ranks(ranks):
    first, second = ranks.run(2, formats_that_differ)
    assert "nothing was loaded, for rank 1 could not" in first and "build the model in the memory format" in second


def of_another_part(group: Any, placement: int | None) -> str:
    """The file of the tensor-parallel rank beside this one; or this rank's own of another split."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def make(dim: int) -> Any:
        param = nn.Parameter(distribute_tensor(torch.arange(32.0).view(8, 4), mesh["tp"], [Shard(dim)]))
        return param, pyzero.FusedZeroAdamW([param], process_group=mesh["dp"])

    _, optimizer = make(0)
    state = through_a_file(optimizer.state_dict())
    if placement is None:
        files: list[Any] = [None, None]
        dist.all_gather_object(files, state, group=mesh["tp"].get_group())
        state = files[1 - mesh["tp"].get_local_rank()]
    param, resumed = make(placement or 0)
    try:
        resumed.load_state_dict(state)
    except ValueError as error:
        assert torch.equal(param.full_tensor(), torch.arange(32.0).view(8, 4))
        return str(error)
    return "loaded"


def test_another_part_of_a_split_weight_is_refused(ranks):
    for rank, said in enumerate(ranks.run(4, of_another_part, None)):
        mine, theirs = ((0, 0), (4, 0)) if rank % 2 == 0 else ((4, 0), (0, 0))
        assert f"of shape (4, 4) at {mine} of its DTensor, got it of shape (4, 4) at {theirs} of its DTensor" in said
    for said in ranks.run(4, of_another_part, 1):
        assert "expected the state of parameter 0 of shape (8, 2) at" in said
    assert ranks.run(4, of_another_part, 0) == ["loaded"] * 4
