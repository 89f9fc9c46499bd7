"""python -m benchmarks.numerics: how far FusedZeroAdamW and torch's AdamW are from AdamW in fp64, after many steps.

Every contender sees the same gradients, in the dtype of its weights, from two ranks and four micro-batches per step.
They are noise around means of -1 and 1, so that no sum is near 0: there Adam turns any rounding into a whole step. The
oracle averages and steps in fp64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import pyzero
from pyzero import ops

from .ranks import join, launch, leave

NUMEL = 2048
NUM_RANKS = 2
NUM_MICRO = 4
CHECKED_STEPS = (1, 10, 100, 1000)
LR, WEIGHT_DECAY = 1e-3, 1e-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Errors = list[float]  # the largest distance from the oracle after each of CHECKED_STEPS, divided by LR


def weights(dtype: torch.dtype) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)


def gradient(step: int, rank: int, micro: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed((step * NUM_RANKS + rank) * NUM_MICRO + micro)
    mean = torch.ones(NUMEL)
    mean[::2] = -1
    return (mean + 0.5 * torch.rand(NUMEL, generator=generator)).to(dtype)


def oracle(dtype: torch.dtype) -> Iterator[Tensor]:
    """The (NUMEL,) fp64 weights after each step."""
    master = weights(dtype).double()
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    for step in range(1, CHECKED_STEPS[-1] + 1):
        parts = [gradient(step, r, m, dtype).double() for r in range(NUM_RANKS) for m in range(NUM_MICRO)]
        ops.adam_(
            master,
            exp_avg,
            exp_avg_sq,
            torch.stack(parts).sum(0) / len(parts),
            lr=LR,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=WEIGHT_DECAY,
            step=step,
            decoupled_weight_decay=True,
            backend="reference",
        )
        yield master


def errors(dtype: torch.dtype, step: Callable[[int], Tensor]) -> Errors:
    """Errors of `step`: `step(n)` takes step n and returns the weights."""
    found = []
    for number, wanted in enumerate(oracle(dtype), 1):
        got = step(number)
        if number in CHECKED_STEPS:
            found.append(float((got.double() - wanted).abs().max()) / LR)
    return found


def by_pyzero(dtype: torch.dtype, options: dict[str, Any]) -> Errors:
    """Runs on each rank. The fp32 masters are compared."""
    param = Parameter(weights(dtype))
    optimizer = pyzero.FusedZeroAdamW([param], lr=LR, weight_decay=WEIGHT_DECAY, loss_scale=None, **options)

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        for micro in range(NUM_MICRO):
            (param * (gradient(number, dist.get_rank(), micro, dtype) / NUM_MICRO)).sum().backward()
        optimizer.step()
        return optimizer.full_master(param)

    return errors(dtype, step)


def by_torch(dtype: torch.dtype, has_masters: bool) -> Errors:
    """AdamW(fused=True) on the ranks' mean, summed in the dtype of the gradients, as DDP and `.grad` do."""
    param = Parameter(weights(dtype).float() if has_masters else weights(dtype))
    optimizer = torch.optim.AdamW([param], lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step(number: int) -> Tensor:
        by_rank = []
        for rank in range(NUM_RANKS):
            grad = gradient(number, rank, 0, dtype) / NUM_MICRO
            for micro in range(1, NUM_MICRO):
                grad += gradient(number, rank, micro, dtype) / NUM_MICRO
            by_rank.append(grad / NUM_RANKS)
        param.grad = (by_rank[0] + by_rank[1]).to(param.dtype)
        optimizer.step()
        return param.detach()

    return errors(dtype, step)


PYZERO = {
    "stage 1": {"stage": 1},
    "stage 1, sent in fp32": {"stage": 1, "grad_reduce_dtype": torch.float32},
    "stage 2": {"stage": 2},
    "stage 2, collective": {"stage": 2, "transport": "collective"},
}


def _rank() -> None:
    join()
    rows = [
        (dtype, f"FusedZeroAdamW, {name}", by_pyzero(DTYPES[dtype], options))
        for dtype in DTYPES
        for name, options in PYZERO.items()
        if dtype != "fp32" or "fp32" not in name
    ]
    leave({"rows": rows})


def measure() -> list[tuple[str, str, Errors]]:
    rows: list[tuple[str, str, Errors]] = launch("benchmarks.numerics", NUM_RANKS, {})["rows"]
    for dtype in DTYPES:
        rows.append((dtype, "AdamW(fused), fp32 masters", by_torch(DTYPES[dtype], has_masters=True)))
        if dtype == "bf16":
            rows.append((dtype, "AdamW(fused), no masters", by_torch(DTYPES[dtype], has_masters=False)))
    return sorted(rows, key=lambda row: list(DTYPES).index(row[0]))


def main() -> None:
    print("| weights | who | " + " | ".join(f"{step} steps" for step in CHECKED_STEPS) + " |")
    print("|---|---|" + "---|" * len(CHECKED_STEPS))
    for dtype, name, found in measure():
        print(f"| {dtype} | {name} | " + " | ".join(f"{error:.1e}" for error in found) + " |")


if __name__ == "__main__":
    _rank() if "RANK" in os.environ else main()
