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

_BYTES = 2 + 2 + 4  # two slices read, the shard written
_PEER = "torch copy_, add_, mul_"


def run(options: Options) -> list[Row]:
    numel = options.size(quick=16_000_000, full=50_000_000)
    slices = [peers.normal(numel, seed, options).bfloat16() for seed in (1, 2)]
    shard, theirs = (torch.zeros(numel, device=options.device) for _ in range(2))
    found_inf, sumsq = (torch.zeros(1, device=options.device) for _ in range(2))
    reduce = functools.partial(ops.reduce_scatter_, shard, slices, scale=0.5)

    reduce(found_inf=found_inf, sumsq=sumsq)
    _torch(theirs, slices)
    # Two slices: a sum in fp32 and an exact halving, so the same bits.
    check("reduce_scatter_: shard", shard, theirs, rtol=0, atol=0)
    check("reduce_scatter_: sumsq", sumsq, theirs.double().square().sum().reshape(1), rtol=2**-22, atol=0)
    check("reduce_scatter_: found_inf", found_inf, torch.zeros_like(found_inf), rtol=0, atol=0)

    contenders = [
        Contender("pyzero reduce_scatter_", reduce, _BYTES),
        Contender("same, with flag and norm", lambda: reduce(found_inf=found_inf, sumsq=sumsq), _BYTES),
        Contender(_PEER, lambda: _torch(theirs, slices), _BYTES),
    ]
    rows = compare("reduce_scatter", "2 bf16 slices", numel, contenders, options, peer=_PEER)
    if options.device == "cpu" and options.numel is None:
        rows += _gloo(numel, options)
    return rows


def _torch(shard: Tensor, slices: list[Tensor]) -> None:
    shard.copy_(slices[0]).add_(slices[1]).mul_(0.5)


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
