"""Bytes on each rank, at rest and at the peak, on 1 to 4 ranks: FusedZeroAdamW, pyzero.estimate's figures, and peers.

On a CPU these are the process's resident bytes, where pages that ranks share count once over all ranks. On a GPU they
are the allocator's. They include activations of 16 rows, and for ours the gradient shards' memory and up to 64 MiB of
pages kept for the next buffers (docs/measured.md).
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pyzero.estimate import estimate

from .options import Options
from .ranks import join, launch, leave
from .rows import MemoryRow
from .train import chosen
from .train_loops import COMPUTE, ENTRIES, OURS
from .workloads import LAYERS, Linears, Workload, from_json, num_params, to_json

_WIDTH = {"cpu": 2048, "cuda": 4096}
_TINY = Linears(64)
_MOST_RANKS = 4
_WARM_UP_STEPS, _STEPS = 2, 1
# malloc returns every large block to the system at once, as an allocator without a cache does.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def run(options: Options) -> list[MemoryRow]:
    width = _WIDTH[options.device]
    if options.numel is not None:
        width = max(_TINY.width, int((options.numel / LAYERS) ** 0.5))
    workload = Linears(width)
    most = min(_MOST_RANKS, torch.cuda.device_count()) if options.device == "cuda" else _MOST_RANKS
    sizes = range(1, most + 1) if options.numel is None else (1, options.ranks)
    rows = []
    for num_ranks in sizes:
        # Only one of ours: a second one would reuse the pages that the first one keeps, without counting them.
        peers = [name for name in chosen(options) if ENTRIES[name].peer is not None]
        names = [OURS, *(name for name in peers if options.wants(ENTRIES[name].peer))]
        spec = dict(names=names, workload=to_json(workload), device=options.device)
        found = launch(__name__, num_ranks, spec, _MALLOC)
        options.notes.extend(f"{num_ranks} ranks: {note}" for note in found["notes"])
        rows += [_row(name, workload, num_ranks, *both, options) for name, both in found["bytes"].items()]
    return rows


def _row(name: str, workload: Workload, num_ranks: int, rest: int, peak: int, options: Options) -> MemoryRow:
    case = f"{workload.title}, bf16"
    numel = num_params(workload)
    if name != OURS:
        return MemoryRow("memory", case, name, numel, num_ranks, rest, peak, ENTRIES[name].peer)
    with torch.device("meta"):
        model = workload.model().bfloat16()
    transport = "auto" if options.device == "cpu" else "exact"
    wanted = estimate(model, num_ranks=num_ranks, transport=transport)
    at_rest = wanted.idle + wanted.kept  # in whole pages
    return MemoryRow("memory", case, name, numel, num_ranks, rest, peak, None, at_rest, max(wanted.peak, at_rest))


# ---- in a rank ------------------------------------------------------------------------------------------------------


class _Resident:
    """Resident bytes of this process."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _read(name: str) -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self", name).read_text().splitlines()]
        return {line[0]: int(line[1]) << 10 for line in lines if line[-1] == "kB"}

    def _now(self) -> dict[str, int]:
        return {**self._read("status"), **self._read("smaps_rollup")}

    def rest(self) -> int:
        now = self._now()
        return sum(now[name] - self._before[name] for name in ("RssAnon:", "Pss_Shmem:"))

    def start_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak(self) -> int:
        now = self._now()
        counted_twice = now["RssShmem:"] - now["Pss_Shmem:"]
        before = self._before["RssAnon:"] + self._before["Pss_Shmem:"]
        return now["VmHWM:"] - now["RssFile:"] - counted_twice - before


class _Allocated:
    """Bytes of torch's allocator on this GPU."""

    def __init__(self) -> None:
        torch.cuda.empty_cache()
        self._before = torch.cuda.memory_allocated()

    def rest(self) -> int:
        return torch.cuda.memory_allocated() - self._before

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def _measure(name: str, spec: dict[str, Any], device: torch.device) -> tuple[int, int]:
    gc.collect()
    meter = _Resident() if device.type == "cpu" else _Allocated()
    workload = from_json(spec["workload"])
    loop = ENTRIES[name].make(workload, device)
    x = workload.inputs().to(device)
    for _ in range(_WARM_UP_STEPS):
        loop.step(x)
    gc.collect()
    dist.barrier()
    rest = meter.rest()
    meter.start_peak()
    for _ in range(_STEPS):
        loop.step(x)
    both = torch.tensor([rest, meter.peak()], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return int(both[0]), int(both[1])


def _rank() -> None:
    spec, device = join()
    notes, found = Options(), {}
    for name in [COMPUTE, *spec["names"]]:  # before measuring: libraries load and keep memory
        with Options().trying(name):
            ENTRIES[name].make(_TINY, device).step(_TINY.inputs().to(device))
    for name in spec["names"]:
        with nullcontext() if ENTRIES[name].peer is None else notes.trying(name):
            found[name] = _measure(name, spec, device)
    leave({"bytes": found, "notes": notes.notes})


if __name__ == "__main__":
    _rank()
