"""State between this optimizer and torch's own: whole, through a checkpoint, and with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from resume import SAVED_AT, STEPS, assert_equal, build, make, outcome, train, uninterrupted
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import pyzero

# ---- whole -----------------------------------------------------------------------------------------------------------

FULL = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole(group: Any) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    model = build(torch.bfloat16, 0)
    optimizer = make("adamw", model, group, bucket_cap_mb=4e-4)
    train(optimizer, model, range(SAVED_AT), group)
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer, options=FULL)
    return model_state, optimizer_state, [optimizer.full_master(param) for param in model.parameters()]


def resumed_from_whole(group: Any, state: tuple[Any, ...], from_rank_0: bool) -> list[Any]:
    model = build(torch.bfloat16, 1)
    optimizer = make("adamw", model, group)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
    model_state, optimizer_state = state[:2] if not from_rank_0 or group.rank() == 0 else ({}, {})
    dcp_state.set_model_state_dict(model, model_state, options=options)
    dcp_state.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    train(optimizer, model, range(SAVED_AT, STEPS), group)
    return outcome(optimizer, model)


@pytest.mark.parametrize("size", [1, 3])
def test_full_state_dict_is_whole_on_rank_0(ranks, size):
    (model_state, state, masters), *others = ranks.run(size, whole)
    assert all(not theirs for _, theirs, _ in others)
    names = [name for name in model_state if name != "calls"]
    assert state["state"].keys() == set(names)
    for name, master in zip(names, masters, strict=True):
        assert torch.equal(state["state"][name]["master"], master)
        assert state["state"][name]["exp_avg"].shape == model_state[name].shape


# torch broadcasts over the default group, which has four ranks.
@pytest.mark.parametrize(("size", "from_rank_0"), [(1, False), (2, False), (4, False), (4, True)])
def test_full_state_dict_resumes(ranks, size, from_rank_0):
    state = ranks.run(3, whole)[0]
    wanted = ranks.run(3, uninterrupted, "adamw", torch.bfloat16)[0]
    for got in ranks.run(size, resumed_from_whole, state, from_rank_0):
        assert_equal(got, wanted)


# ---- torch's AdamW and FSDP2 -----------------------------------------------------------------------------------------

HYPER = {"lr": 2.0**-5, "weight_decay": 0.125}


def make_mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def grad_step(model: nn.Module, optimizer: Any, number: int) -> None:
    """The same on every rank."""
    inputs = torch.randint(-2, 3, (4, 7), generator=torch.Generator().manual_seed(number)).float()
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def their_run(group: Any, path: Path, sharded: bool) -> dict[str, Any]:
    """Three steps of torch's AdamW, saved; returns what the three after them give."""
    model = make_mlp(0)
    if sharded:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    for number in range(SAVED_AT):
        grad_step(model, optimizer, number)
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=path, process_group=group)
    for number in range(SAVED_AT, STEPS):
        grad_step(model, optimizer, number)
    return dcp_state.get_model_state_dict(model, options=dcp_state.StateDictOptions(full_state_dict=True))


def our_resume(group: Any, path: Path, dtype: torch.dtype) -> dict[str, Any]:
    model = make_mlp(1).to(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1.0, process_group=group)
    state = dict(zip(("model", "optim"), dcp_state.get_state_dict(model, optimizer), strict=True))
    partial = DefaultLoadPlanner(allow_partial_load=True)  # torch's AdamW has no masters
    dcp.load(state, checkpoint_id=path, process_group=group, planner=partial)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    masters = {name: optimizer.full_master(param) for name, param in model.named_parameters()}
    for number in range(SAVED_AT, STEPS) if dtype == torch.float32 else ():
        grad_step(model, optimizer, number)
    return (
        masters
        if dtype != torch.float32
        else {name: param.detach().clone() for name, param in model.state_dict().items()}
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["AdamW", "FSDP2"])
def test_a_checkpoint_of_torch_goes_on(ranks, tmp_path, sharded):
    wanted = ranks.run(2 if sharded else 1, their_run, tmp_path, sharded)[0]
    for size in (1, 3):
        for got in ranks.run(size, our_resume, tmp_path, torch.float32):
            for name, value in wanted.items():
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_masters_that_a_checkpoint_lacks_follow_the_weights(ranks, tmp_path):
    ranks.run(1, their_run, tmp_path, False)
    model = make_mlp(1).bfloat16()
    dcp.load({"model": (state := model.state_dict())}, checkpoint_id=tmp_path)
    for size in (1, 2):
        for got in ranks.run(size, our_resume, tmp_path, torch.bfloat16):
            for name, value in state.items():
                assert torch.equal(got[name], value.float())


def our_run(group: Any, path: Path) -> dict[str, Any]:
    model = make_mlp(0)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, **HYPER)
    for number in range(SAVED_AT):
        grad_step(model, optimizer, number)
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=path, process_group=group)
    return {name: optimizer.full_state(param) for name, param in model.named_parameters()}


def their_resume(group: Any, path: Path) -> dict[str, Any]:
    model = make_mlp(1)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    state = dict(zip(("model", "optim"), dcp_state.get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=path, process_group=group)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return {
        name: {key: value.full_tensor() if key != "step" else value for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }


def test_fsdp2_takes_a_checkpoint_of_ours(ranks, tmp_path):
    wanted = ranks.run(3, our_run, tmp_path)[0]
    for got in ranks.run(2, their_resume, tmp_path):
        for name, state in got.items():
            for key, value in state.items():
                assert torch.equal(value, wanted[name][key]), (name, key)
