"""python -m benchmarks.profile_step [--out FILE]: a trace of one training step, for Perfetto or chrome://tracing.

It trains a small GPT in bf16 with FusedZeroAdamW, stage 2, on one GPU if there is one, else on two gloo ranks on the
CPU. Rank 0 writes the trace. Beside torch's events it has pyzero::collect, ::reduce_scatter, ::adam and ::all_gather.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import pyzero

from .ranks import join, launch, leave
from .workloads import GPT2

_NUM_RANKS = 2
_MODEL = GPT2(layers=4, width=256, heads=4, context=256, vocabulary=512, tokens=256)
_WARM_UP_STEPS = 3  # these build kernels, plan the buckets again and fill the allocator


def trace(out: Path, device: torch.device, rank: int) -> None:
    """Rank 0 writes one step; the others take part in it."""
    torch.manual_seed(0)
    model = _MODEL.model().to(device, torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    tokens = torch.randint(_MODEL.vocabulary, (1, _MODEL.tokens + 1), device=device)

    def step() -> None:
        with record_function("forward"):
            loss = model(tokens)
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            optimizer.step()
        with record_function("zero_grad"):
            optimizer.zero_grad()

    for _ in range(_WARM_UP_STEPS):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(out))


def _rank() -> None:
    spec, device = join()
    trace(Path(spec["out"]), device, dist.get_rank())
    leave({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/profile.json"), metavar="FILE")
    out = parser.parse_args().out.absolute()
    if torch.cuda.is_available():
        trace(out, torch.device("cuda"), rank=0)
    else:
        launch("benchmarks.profile_step", _NUM_RANKS, {"out": str(out)})
    print(f"{out}: open it in https://ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    _rank() if "RANK" in os.environ else main()
