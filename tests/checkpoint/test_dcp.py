"""torch.distributed.checkpoint over the optimizer's state, as its documentation shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from resume import (
    OPTIMIZERS,
    SAVED_AT,
    STEPS,
    Model,
    assert_equal,
    build,
    make,
    outcome,
    train,
    uninterrupted,
)
from torch.distributed.checkpoint import state_dict as dcp_state


def saved(group: Any, kind: str, dtype: torch.dtype, how: str, path: Path) -> None:
    model = build(dtype, 0)
    optimizer = make(kind, model, group, bucket_cap_mb=4e-4)
    train(optimizer, model, range(SAVED_AT), group)
    state = states(model, optimizer, how)
    if how != "async":
        dcp.save(state, checkpoint_id=path, process_group=group)
        return
    saving = dcp.async_save(state, checkpoint_id=path, process_group=group)
    train(optimizer, model, range(SAVED_AT, STEPS), group)  # what is written meanwhile is not saved
    saving.result()


def states(model: Model, optimizer: Any, how: str) -> dict[str, Any]:
    if how == "state_dict()":
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=how == "flat", cpu_offload=how == "cpu_offload")
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optim": optimizer_state}


def resumed(group: Any, kind: str, dtype: torch.dtype, how: str, path: Path, until: int = STEPS) -> list[Any]:
    """Over a model that has other weights."""
    model = build(dtype, 1)
    optimizer = make(kind, model, group, bucket_cap_mb=1e-3)
    state = states(model, optimizer, how)
    dcp.load(state, checkpoint_id=path, process_group=group)
    if how == "state_dict()":
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])
    else:
        options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        dcp_state.set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
        )
    train(optimizer, model, range(SAVED_AT, until), group)
    return outcome(optimizer, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_goes_on_bit_for_bit(ranks, tmp_path, size, kind, dtype):
    ranks.run(size, saved, kind, dtype, "get_state_dict", tmp_path)
    wanted = ranks.run(size, uninterrupted, kind, dtype)[0]
    assert wanted[0][1] == 1  # a step was skipped before the save
    for other in (1, 2, 3, 4):
        for got in ranks.run(other, resumed, kind, dtype, "get_state_dict", tmp_path):
            assert_equal(got, wanted)


@pytest.mark.parametrize("how", ["state_dict()", "async", "cpu_offload"])
def test_ways_to_save(ranks, tmp_path, how):
    if how == "async" and torch.__version__ < "2.7":
        pytest.skip("async_save() of torch 2.6 writes what lies in host memory as it is by then")
    ranks.run(3, saved, "adamw", torch.bfloat16, how, tmp_path)
    wanted = ranks.run(3, uninterrupted, "adamw", torch.bfloat16)[0]
    for got in ranks.run(2, resumed, "adamw", torch.bfloat16, how, tmp_path):
        assert_equal(got, wanted)


def test_flattened_state_lacks_the_loss_scale_alone(ranks, tmp_path):
    """torch's helpers hand over what groups in use have, when names are flattened; a warning says that it is gone."""
    loaded = []
    for how in ("flat", "get_state_dict"):
        ranks.run(3, saved, "adamw", torch.bfloat16, how, tmp_path / how)
        loaded.append(ranks.run(2, resumed, "adamw", torch.bfloat16, how, tmp_path / how, SAVED_AT)[0])
    (flat_counters, flat, flat_weights), (wanted_counters, wanted, weights) = loaded
    assert flat_counters == [16.0, 0] != wanted_counters  # as built
    assert_equal([flat["state"], flat_weights], [wanted["state"], weights])
