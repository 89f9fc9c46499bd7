"""FusedZeroLion against Lion in fp64, on several ranks; what it shares with Adam's optimizers is tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero
from pyzero.estimate import estimate
from pyzero.optimizers.lion import LionRule

SHAPES = ((17, 9), (70,), (), (3, 64))
GROUPS = ({"lr": 2.0**-4, "betas": (0.75, 0.5), "weight_decay": 0.0}, {"lr": 2.0**-5, "weight_decay": 0.25})
DEFAULT = {"lr": 1.0, "betas": (0.5, 0.75), "weight_decay": 0.0}
STEPS = 5


def build(dtype: torch.dtype) -> nn.ParameterList:
    torch.manual_seed(1)
    values = [torch.randint(-8, 9, shape, device="cpu").to(torch.get_default_device(), dtype) for shape in SHAPES]
    return nn.ParameterList(map(nn.Parameter, values))


def gradient(index: int, step: int, rank: int) -> Tensor:
    """Sums over three ranks, and moments of halves and quarters, are exact in fp32; no direction is near 0."""
    generator = torch.Generator().manual_seed(1000 * index + 10 * step + rank)
    size = torch.randint(1, 4, SHAPES[index], generator=generator, device="cpu") * 3.0
    seed = torch.Generator().manual_seed(7 * step + index)
    sign = torch.randint(0, 2, SHAPES[index], generator=seed, device="cpu") * 2.0 - 1.0
    return (size * sign).to(torch.get_default_device())


def trained(group: Any, dtype: torch.dtype, stage: int, clip: float | None) -> list[dict[str, Tensor]]:
    model = build(dtype)
    groups = [{"params": list(model)[i::2], **options} for i, options in enumerate(GROUPS)]
    scale = 1024.0 if dtype == torch.float16 else None
    optimizer = pyzero.FusedZeroLion(
        groups, **DEFAULT, process_group=group, stage=stage, max_grad_norm=clip, loss_scale=scale
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        grads = [gradient(index, step, group.rank()) for index in range(len(SHAPES))]
        if step == 3:
            grads[1].view(-1)[5] = float("inf") if group.rank() == 0 else 1.0
        optimizer.backward(sum((param.float() * grad).sum() for param, grad in zip(model, grads, strict=True)))
        optimizer.step()
    assert optimizer.skipped_steps == 1
    for param in model:
        assert set(optimizer.state[param]) == {"step", "exp_avg", "master"}
        assert torch.equal(param, optimizer.full_master(param).to(dtype))
    return [{name: value.cpu() for name, value in optimizer.full_state(param).items()} for param in model]


def lion(size: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """In fp64."""
    found = []
    for index, param in enumerate(build(dtype)):
        options = {**DEFAULT, **GROUPS[index % 2]}
        master, exp_avg = param.detach().double(), torch.zeros(SHAPES[index], dtype=torch.float64)
        beta1, beta2 = options["betas"]
        for step in (0, 1, 2, 4):  # 3 is skipped
            grad = torch.stack([gradient(index, step, rank) for rank in range(size)]).double().mean(0)
            master *= 1 - options["lr"] * options["weight_decay"]
            master -= options["lr"] * torch.sign(beta1 * exp_avg + (1 - beta1) * grad)
            exp_avg = beta2 * exp_avg + (1 - beta2) * grad
        found.append({"master": master, "exp_avg": exp_avg})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_lion(ranks, size, stage, dtype):
    for states in ranks.run(size, trained, dtype, stage, None):
        for state, wanted in zip(states, lion(size, dtype), strict=True):
            assert state["step"] == STEPS - 1
            torch.testing.assert_close(state["exp_avg"].double(), wanted["exp_avg"], rtol=2**-23 * STEPS, atol=0)
            torch.testing.assert_close(state["master"].double(), wanted["master"], rtol=0, atol=2**-20)


def test_a_clip_shows_in_the_moment(ranks):
    alone = ranks.run(1, trained, torch.float32, 2, 1.0)[0]
    for state, free in zip(alone, ranks.run(1, trained, torch.float32, 2, None)[0], strict=True):
        assert state["exp_avg"].abs().max() < free["exp_avg"].abs().max()
        assert not torch.equal(state["exp_avg"], free["exp_avg"])


def test_state_is_two_thirds_of_adams():
    params = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))]
    assert pyzero.FusedZeroLion(params).state_bytes() == 8 * 4096
    assert estimate(params, rule=LionRule()).state == estimate(params).state - 4 * 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pyzero.FusedZeroLion([nn.Parameter(torch.zeros(3))], **options)


def test_eps_is_unknown():
    with pytest.raises(TypeError, match="eps"):
        pyzero.FusedZeroLion([nn.Parameter(torch.zeros(3))], eps=1e-8)
