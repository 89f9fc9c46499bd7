"""Training that takes every path through a transport, for tests that two transports give the same bits."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from models import build, loss_of, micro_batch, params_of
from ranks import Ranks
from torch import Tensor, nn

import pyzero

SMALL_BUCKETS = {"bucket_cap_mb": 2e-3}


class Mixed(nn.Module):
    """Two dtypes, a layer that some backwards do not use, and one that none uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = build(dtype)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 65))  # fp32, whatever `dtype` is
        self.sometimes = nn.Linear(65, 65, dtype=dtype)
        self.never = nn.Linear(3, 3, dtype=dtype)

    def loss(self, batch: Tensor, uses_all: bool) -> Tensor:
        x = self.scale.to(self.sometimes.weight.dtype)
        extra = self.sometimes(x) if uses_all else x
        return loss_of(self.net, batch) + extra.float().square().mean()


def program(group: Any, dtype: torch.dtype, transport: str, options: dict[str, Any]) -> list[Tensor]:
    """All kinds of backward, an added group, an overflow, a clip, a read and a checkpoint."""
    torch.manual_seed(0)
    model, late, rank = Mixed(dtype), nn.Linear(65, 7, dtype=dtype), group.rank()
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport=transport, loss_scale=4.0, **options
    )
    for step in range(6):
        optimizer.zero_grad()
        for micro in range(3):
            with optimizer.no_sync() if micro == 0 else nullcontext():
                loss = model.loss(micro_batch(step, 3 * rank + micro), uses_all=(step + micro + rank) % 2 == 0)
                if step > 2:
                    loss = loss + late(model.scale.to(dtype)).float().square().mean()
                if step == 1 and micro == 2 and rank == 0:
                    loss = loss * float("inf")
                optimizer.backward(loss)
        if step == 2:
            optimizer.zero_grad()
            optimizer.add_param_group({"params": late.parameters(), "lr": 1e-3})
            continue
        if step == 3:
            optimizer.clip_grad_norm_(0.25)
        if step == 4:
            optimizer.full_grad(model.scale)
        optimizer.step()
        if step == 4:
            optimizer.load_state_dict(optimizer.full_state_dict())
    assert optimizer.skipped_steps == 1
    masters = [optimizer.full_master(param) for param in model.parameters()]
    return [*params_of(model), *params_of(late), *masters, optimizer.grad_norm]


@cache
def _bits_of_exact(ranks: Ranks, size: int, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> list[Any]:
    return ranks.run(size, program, dtype, "exact", dict(options))


def bits_of_exact(ranks: Ranks, size: int, dtype: torch.dtype, options: dict[str, Any]) -> list[list[Tensor]]:
    """The program's result with "exact" on each rank. It runs once for all comparisons."""
    return _bits_of_exact(ranks, size, dtype, tuple(options.items()))


def averaged_elsewhere(group: Any, transport: str) -> list[Tensor]:
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport=transport, reduce_grads=False, **SMALL_BUCKETS
    )
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
    return params_of(model)
