"""reduce_scatter_ of bf16 slices against the same sum in torch calls. `transport` measures buckets between ranks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_PEER = "torch copy_, add_, mul_"


def run(options: Options) -> list[Row]:
    return _case(2, options) + _case(8, options)


def _case(num_ranks: int, options: Options) -> list[Row]:
    numel = options.size if num_ranks == 2 else options.size // 4
    slices = [peers.normal(numel, seed, options).bfloat16() for seed in range(1, 1 + num_ranks)]
    shard, theirs = (torch.zeros(numel, device=options.device) for _ in range(2))
    found_inf, sumsq = (torch.zeros(1, device=options.device) for _ in range(2))
    moved = 2 * num_ranks + 4  # reads the slices and writes the shard
    _torch(theirs, slices)
    contenders = []
    for suffix, backend in options.backends.items():
        reduce = functools.partial(ops.reduce_scatter_, shard, slices, scale=1 / num_ranks, backend=backend)
        with_norm = functools.partial(reduce, found_inf=found_inf, sumsq=sumsq)
        sumsq.zero_()
        with_norm()
        # The bits are equal: both sum in fp32 in the same order, and divide by a power of two.
        check("reduce_scatter_: shard", shard, theirs, rtol=0, atol=0)
        check("reduce_scatter_: sumsq", sumsq, theirs.double().square().sum().reshape(1), rtol=2**-22, atol=0)
        check("reduce_scatter_: found_inf", found_inf, torch.zeros_like(found_inf), rtol=0, atol=0)
        contenders.append(Contender("pyzero reduce_scatter_" + suffix, reduce, moved))
        contenders.append(Contender("same, with flag and norm" + suffix, with_norm, moved))
    contenders.append(Contender(_PEER, lambda: _torch(theirs, slices), moved, "torch-foreach"))
    return compare("reduce_scatter", f"{num_ranks} bf16 slices", numel, contenders, options)


def _torch(shard: Tensor, slices: list[Tensor]) -> None:
    shard.copy_(slices[0])
    for piece in slices[1:]:
        shard.add_(piece)
    shard.mul_(1 / len(slices))
