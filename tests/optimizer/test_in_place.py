"""One rank reads gradients where they are: the same bits as when they are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero
from pyzero import ops
from pyzero.adam import AdamRule


def trained(
    reads_lists: bool, dtype: torch.dtype, group: Any = None, rank: int = 0, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    AdamRule.reads_lists = reads_lists
    try:
        model = build(dtype)
        params = list(model.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
        optimizer = pyzero.FusedZeroAdamW(
            groups, lr=1e-2, max_grad_norm=0.3, process_group=group, bucket_cap_mb=2e-3, reduce_grads=False, **options
        )
        for step in range(5):
            optimizer.backward(loss_of(model, micro_batch(step, rank)))
            change(params, step, rank)
            optimizer.step()
            optimizer.zero_grad()
        return params_of(model), [optimizer.full_state(param)["exp_avg_sq"] for param in params]
    finally:
        AdamRule.reads_lists = True


def change(params: list[Tensor], step: int, rank: int) -> None:
    """What gradients may look like."""
    grads = [param.grad for param in params]
    if step == 1:
        params[0].grad = None if rank == 0 else torch.zeros_like(grads[0])
    elif step == 2:  # an address that no vector instruction takes, and other strides
        params[0].grad = torch.zeros(grads[0].numel() + 1, dtype=grads[0].dtype)[1:].view_as(grads[0]).copy_(grads[0])
        params[1].grad = grads[1].t().contiguous().t() if grads[1].dim() == 2 else grads[1]
    elif step == 3:
        grads[2].view(-1)[-1] = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_packed(dtype):
    packed, in_place = (trained(reads_lists, dtype, loss_scale=64.0) for reads_lists in (False, True))
    assert_same(packed[0], in_place[0])
    assert_same(packed[1], in_place[1])


def on_two(group: Any, reads_lists: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients that somebody else has averaged: the same on both ranks, of which one may have none."""
    rank = group.rank()
    torch.manual_seed(0)
    AdamRule.reads_lists = reads_lists
    try:
        params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((200,), (64, 3), (7,), (130,))]
        optimizer = pyzero.FusedZeroAdamW(params, lr=1e-2, process_group=group, reduce_grads=False, max_grad_norm=1.0)
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = torch.randn(param.shape).bfloat16()
                if (index + step) % 4 == 0 and rank == 1:
                    param.grad = None
            optimizer.step()
        return params_of(nn.ParameterList(params)), [optimizer.full_master(param) for param in params]
    finally:
        AdamRule.reads_lists = True


def test_shards_of_averaged_gradients(ranks):
    packed, in_place = ranks.run(2, on_two, False), ranks.run(2, on_two, True)
    for one, other in zip(packed, in_place, strict=True):
        assert_same(one[0], other[0])
        assert_same(one[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_may_be_the_weight_itself(dtype):
    results = []
    for is_copied in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(100, dtype=dtype)) for _ in range(2)]
        optimizer = pyzero.FusedZeroAdamW(params, lr=1e-2)
        for param in params:
            param.grad = param.detach().clone() if is_copied else param.detach()
        optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert_same(*results)


@pytest.mark.parametrize(
    ("optimizer", "is_copied"), [("FusedZeroAdamW", False), ("FusedZeroLion", False), ("ZeroLamb", True)]
)
def test_gradients_are_not_copied(monkeypatch, optimizer, is_copied):
    numels: list[int] = []
    pack = ops.pack_
    monkeypatch.setattr(ops, "pack_", lambda b, ts, **kw: numels.extend(t.numel() for t in ts) or pack(b, ts, **kw))
    large, small = nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(10))
    zero = getattr(pyzero, optimizer)([small, large], lr=1e-2)
    small.grad, large.grad = torch.ones_like(small), torch.ones_like(large)
    zero.step()
    assert sum(numels) >= 100_010 if is_copied else not numels
    numels.clear()
    large.grad = torch.ones(100_001)[1:]  # at an address that no vector instruction takes
    small.grad = torch.ones_like(small)
    zero.step()
    assert is_copied or numels == [100_000]
