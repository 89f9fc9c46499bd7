"""ZeroLamb against its formula in fp64, on one and more ranks; a skipped step; what lies whole on one rank."""

from typing import Any

import pytest
import torch
from models import DTYPES, assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero

HYPER = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)


def reference(
    params: list[Tensor], grads: list[list[Tensor]], bias_correction: bool, hyper: dict[str, Any]
) -> list[Tensor]:
    """Weights after a step on each list of gradients, in fp64, written from the paper and DeepSpeed's description."""
    beta1, beta2 = hyper["betas"]
    state = [
        (p.double().clone(), torch.zeros_like(p, dtype=torch.float64), torch.zeros_like(p, dtype=torch.float64))
        for p in params
    ]
    for step, of_step in enumerate(grads, 1):
        for index, grad in enumerate(of_step):
            p, m, v = state[index]
            m = m * beta1 + grad.double() * (1 - beta1)
            v = v * beta2 + grad.double() ** 2 * (1 - beta2)
            u = m / (v.sqrt() + hyper["eps"]) + hyper["weight_decay"] * p
            rate = hyper["lr"]
            if bias_correction:
                rate *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            trust = 1.0
            if p.norm() > 0 and u.norm() > 0:
                trust = min(max(float(p.norm() / u.norm()), 0.01), 10.0)
            state[index] = (p - rate * trust * u, m, v)
    return [p for p, _, _ in state]


def test_by_hand():
    """|p| = 2, u = 1 in all four elements, |u| = 2: a step of lr, on beta = 0 and no decay."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.ZeroLamb([param], lr=0.25, betas=(0.0, 0.0), eps=0.0)
    param.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert torch.equal(param, torch.full((4,), 0.75))


def test_the_ratio_is_clamped():
    param = nn.Parameter(torch.full((4,), 100.0))
    optimizer = pyzero.ZeroLamb([param], lr=0.25, betas=(0.0, 0.0), eps=0.0, max_coeff=2.0)
    param.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(param, torch.full((4,), 99.5))


def test_the_ratio_is_clamped_from_below():
    """|p| = 2^-9 and |u| = 2 give a ratio of 2^-10. It counts as 1/2, so a weight moves by lr / 2."""
    param = nn.Parameter(torch.full((4,), 2.0**-10))
    optimizer = pyzero.ZeroLamb([param], lr=0.25, betas=(0.0, 0.0), eps=0.0, min_coeff=0.5)
    param.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(param, torch.full((4,), 2.0**-10 - 0.125))


def train(
    group: Any, dtype: torch.dtype, stage: int, bias_correction: bool
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """(weights at first, gradients of each step, masters after them); micro-batches are shared out over the ranks."""
    rank, size = group.rank(), group.size()
    model = build(dtype)
    before = params_of(model)
    optimizer = pyzero.ZeroLamb(
        model.parameters(),
        **HYPER,
        process_group=group,
        stage=stage,
        bucket_cap_mb=1e-3,
        loss_scale=None,
        bias_correction=bias_correction,
    )
    grads = []
    for step in range(4):
        optimizer.zero_grad()
        for index in range(rank, 12, size):
            (loss_of(model, micro_batch(step, index)) * size / 12).backward()
        grads.append([optimizer.full_grad(param) for param in model.parameters()])
        optimizer.step()
    return before, grads, [optimizer.full_master(param) for param in model.parameters()]


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_against_fp64(ranks, size, stage, dtype, bias_correction):
    for before, grads, masters in ranks.run(size, train, dtype, stage, bias_correction):
        wanted = reference(before, grads, bias_correction, HYPER)
        for master, value in zip(masters, wanted, strict=True):
            # A norm over 1,500 elements in fp32 is right to some 2^-20, and a weight moves by at most 10 lr |u|.
            torch.testing.assert_close(master.double(), value, rtol=2e-5, atol=2e-6)


def test_a_skipped_step_changes_nothing():
    model = build(torch.float16)
    optimizer = pyzero.ZeroLamb(model.parameters(), **HYPER)
    before = params_of(model)
    loss = loss_of(model, micro_batch(0, 0))
    optimizer.backward(loss * float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(params_of(model), before)
    states = [optimizer.full_state(param) for param in model.parameters()]
    assert all(not state[name].any() for state in states for name in ("step", "exp_avg", "exp_avg_sq"))


def test_a_parameter_without_a_gradient_stays():
    params = [nn.Parameter(torch.ones(70)) for _ in range(2)]
    optimizer = pyzero.ZeroLamb(params, lr=1.0)
    params[0].sum().backward()
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(70)) and torch.equal(params[1], torch.ones(70))


def test_refusals():
    with pytest.raises(ValueError, match="min_coeff <= max_coeff"):
        pyzero.ZeroLamb([nn.Parameter(torch.ones(1))], min_coeff=2.0, max_coeff=1.0)
