"""torch.distributed.checkpoint and its helpers with an optimizer over DTensor parameters."""

import copy
from pathlib import Path
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_case import build, contents
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.state_dict import StateDictOptions

from pyzero.comm.group import Group

SAVED_AT, STEPS = 3, 5
HOWS = ["get_state_dict", "flat", "cpu_offload", "state_dict()", "async", "full", "rank 0"]
CASES = [
    *(("fully_shard", 2, how) for how in HOWS[:-1]),  # from rank 0 torch broadcasts over the default group's four
    *(("both", 4, how) for how in HOWS if how not in ("state_dict()", "cpu_offload")),  # as of "fully_shard"
    *(("tensor", 4, how) for how in ("get_state_dict", "async")),
]


def share_of(group: Any, kind: str) -> tuple[int, int]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return (rank // 2, size // 2) if kind in ("tensor", "both") else (rank, size)


def options_of(how: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=how == "flat",
        cpu_offload=how in ("cpu_offload", "full", "rank 0"),
        full_state_dict=how in ("full", "rank 0"),
        broadcast_from_rank0=how == "rank 0",
    )


def states(model: Any, optimizer: Any, how: str) -> dict[str, Any]:
    if how == "state_dict()":
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}
    options = options_of(how)
    return {
        "model": dcp_state.get_model_state_dict(model, options=options),
        "optim": dcp_state.get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(group: Any, kind: str, dtype: torch.dtype, how: str, folder: Path) -> tuple[Any, Any, Any]:
    """Return (contents at the save, contents at the end, whole state dicts)."""
    model, optimizer = build(group, kind, dtype)
    case.train(model, optimizer, group, range(SAVED_AT), share_of(group, kind))
    optimizer.zero_grad()
    held, saved = {}, copy.deepcopy(contents(model, optimizer))  # contents of replicated tensors are not copies
    state = states(model, optimizer, how)
    if how in ("full", "rank 0"):
        held = copy.deepcopy(state)  # torch returns step counts without a copy
    elif how == "async":
        beside = Group(group)  # before torch 2.14, group names depend on how many groups a rank has made
        saving = dcp.async_save(
            state, checkpoint_id=folder, process_group=beside.handle
        )  # fully_shard communicates in `group`
    else:
        dcp.save(state, checkpoint_id=folder, process_group=group)
    case.train(model, optimizer, group, range(SAVED_AT, STEPS), share_of(group, kind))
    if how == "async":
        saving.result()
    return saved, contents(model, optimizer), held


def load(group: Any, kind: str, dtype: torch.dtype, how: str, folder: Path, held: Any) -> tuple[Any, Any]:
    model, optimizer = build(group, kind, dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    if how in ("full", "rank 0"):
        state = held if how == "full" or dist.get_rank() == 0 else {"model": {}, "optim": {}}
    else:
        state = states(model, optimizer, how)
        dcp.load(state, checkpoint_id=folder, process_group=group)
    if how == "state_dict()":
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])
    else:
        options = options_of(how)
        dcp_state.set_model_state_dict(model, state["model"], options=options)
        dcp_state.set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
    saved = copy.deepcopy(contents(model, optimizer))
    case.train(model, optimizer, group, range(SAVED_AT, STEPS), share_of(group, kind))
    return saved, contents(model, optimizer)


@pytest.mark.parametrize(("kind", "size", "how"), CASES)
def test_goes_on_bit_for_bit(ranks, tmp_path, kind, size, how):
    dtype = torch.float32 if size == 2 else torch.bfloat16
    wanted = ranks.run(size, save, kind, dtype, how, tmp_path)
    held = wanted[0][2]
    for (saved, after), (wanted_saved, wanted_after, _) in zip(
        ranks.run(size, load, kind, dtype, how, tmp_path, held), wanted, strict=True
    ):
        assert not [n for n in saved if not torch.equal(saved[n], wanted_saved[n])]
        assert not [n for n in after if not torch.equal(after[n], wanted_after[n])]
