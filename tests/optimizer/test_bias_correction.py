"""Adam without bias correction: the moments as they are, exactly, on every backend."""

from typing import Any

import backends
import pytest
import torch
from torch import Tensor, nn

import pyzero
from pyzero import ops
from pyzero.optimizers.adam import _LARGEST_BETA, _LATE

GRADS = [torch.tensor([4.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 3.0, -0.25, 8.0]), torch.tensor([-2.0, 0.0, 0.1, 1.0])]


def reference(value: Tensor, lr: float, beta1: float, beta2: float, eps: float, decay: float) -> Tensor:
    """In fp64: m and v are not divided by 1 - beta^t."""
    p, m, v = value.double(), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for grad in GRADS:
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        p = p * (1 - lr * decay) - lr * m / (v.sqrt() + eps)
    return p


def train(group: Any, stage: int, settings: dict[str, Any]) -> Tensor:
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroAdamW([param], **settings, bias_correction=False, process_group=group, stage=stage)
    for grad in GRADS:
        optimizer.zero_grad()
        (param * grad).sum().backward()
        optimizer.step()
    return optimizer.full_master(param)


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_against_the_formula(ranks, size, stage):
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    wanted = reference(torch.ones(4), 0.01, 0.9, 0.95, 1e-6, 0.1)
    for found in ranks.run(size, train, stage, settings):
        # Weights near 1 that move by less than 0.05 in each of three steps, a few roundings in each.
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3 * 4 * 2**-24)


@pytest.mark.parametrize("target", backends.params((backends.REFERENCE, *backends.FUSED)))
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, _LARGEST_BETA])
def test_late_is_exactly_never(target, beta):
    """1 - beta^_LATE is 1 in every backend: a weight moves by m / sqrt(v), of moments from before a gradient of 0."""
    with target.ready():
        master, exp_avg, exp_avg_sq, grad = (torch.full((64,), x, device=target.device) for x in (0.0, 1.0, 4.0, 0.0))
        for step in (_LATE, torch.full((1,), _LATE, device=target.device)):
            for tensor, value in ((master, 0.0), (exp_avg, 1.0), (exp_avg_sq, 4.0)):
                tensor.fill_(value)
            segments = (
                {}
                if isinstance(step, float)
                else {"segment_ids": torch.zeros(1, dtype=torch.int32, device=target.device)}
            )
            ops.adam_(
                master,
                exp_avg,
                exp_avg_sq,
                grad,
                lr=1.0,
                beta1=0.5,
                beta2=beta,
                eps=0.0,
                weight_decay=0.0,
                step=step,
                backend=target.backend,
                **segments,
            )
            v = torch.tensor(4.0) * torch.tensor(beta, dtype=torch.float32)
            wanted = -(torch.tensor(0.5) / v.double().sqrt().float())  # torch's fp32 sqrt may be off by a unit
            assert torch.equal(master.cpu(), wanted.expand(64))


def test_a_beta_too_near_1_is_refused():
    param = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="without bias correction.*lower them"):
        pyzero.FusedZeroAdam([param], betas=(0.9, 1 - 2.0**-25), bias_correction=False)
    pyzero.FusedZeroAdam([param], betas=(0.9, 1 - 2.0**-25))


def test_by_the_config():
    settings = {"lr": 0.25, "betas": [0.5, 0.9375], "eps": 0.0, "bias_correction": False}
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    config = {"train_batch_size": 1, "optimizer": {"type": "Adam", "params": settings}}
    engine, *_ = pyzero.initialize(model=model, config=config)
    engine.backward(engine(torch.full((1, 1), 4.0)).sum())  # m = 2, sqrt(v) = 1
    engine.step()
    assert model.weight.item() == 1 - 0.25 * 2
