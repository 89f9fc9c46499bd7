"""reduce_scatter_ of two bf16 slices, against the same in torch calls; gloo's reduce-scatter for information."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, Options, Row, check, compare, timed_row

_PEER = "torch copy_, add_, mul_"


def run(options: Options) -> list[Row]:
    rows = _case(2, options) + _case(8, options)
    if options.device == "cpu" and options.numel is None:
        rows += _gloo(options.size, options)
    return rows


def _case(num_ranks: int, options: Options) -> list[Row]:
    numel = options.size if num_ranks == 2 else options.size // 4
    slices = [peers.normal(numel, seed, options).bfloat16() for seed in range(1, 1 + num_ranks)]
    shard, theirs = (torch.zeros(numel, device=options.device) for _ in range(2))
    found_inf, sumsq = (torch.zeros(1, device=options.device) for _ in range(2))
    moved = 2 * num_ranks + 4  # the slices read, the shard written
    _torch(theirs, slices)
    contenders = []
    for suffix, backend in options.backends.items():
        reduce = functools.partial(ops.reduce_scatter_, shard, slices, scale=1 / num_ranks, backend=backend)
        with_norm = functools.partial(reduce, found_inf=found_inf, sumsq=sumsq)
        sumsq.zero_()
        with_norm()
        # A sum in fp32 and in the same order, divided by a power of two: the same bits.
        check("reduce_scatter_: shard", shard, theirs, rtol=0, atol=0)
        check("reduce_scatter_: sumsq", sumsq, theirs.double().square().sum().reshape(1), rtol=2**-22, atol=0)
        check("reduce_scatter_: found_inf", found_inf, torch.zeros_like(found_inf), rtol=0, atol=0)
        contenders.append(Contender("pyzero reduce_scatter_" + suffix, reduce, moved))
        contenders.append(Contender("same, with flag and norm" + suffix, with_norm, moved))
    contenders.append(Contender(_PEER, lambda: _torch(theirs, slices), moved))
    return compare("reduce_scatter", f"{num_ranks} bf16 slices", numel, contenders, options, peer=_PEER)


def _torch(shard: Tensor, slices: list[Tensor]) -> None:
    shard.copy_(slices[0])
    for piece in slices[1:]:
        shard.add_(piece)
    shard.mul_(1 / len(slices))


def _gloo(shard_numel: int, options: Options) -> list[Row]:
    """Communication and sum, two processes of one thread each: not the same job, so no ratio."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += [__name__, str(shard_numel), str(5 if options.quick else 15)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"the gloo ranks failed:\n{done.stderr[-2000:]}")
    samples = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return [timed_row("reduce_scatter", "2 processes, bf16", "gloo reduce_scatter (for information)", samples)]


def _gloo_rank(shard_numel: int, repeats: int) -> None:
    import time
    import warnings

    import torch.distributed as dist

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    bucket = torch.ones(2 * shard_numel, dtype=torch.bfloat16)
    shard = torch.empty(shard_numel, dtype=torch.bfloat16)
    samples = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.reduce_scatter_tensor(shard, bucket)
        samples.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps(samples[1:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    _gloo_rank(int(sys.argv[1]), int(sys.argv[2]))
