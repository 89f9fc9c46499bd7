"""The timer of all benches: caches are cold, contenders take turns, and every second round runs backwards."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from .gpu_timer import GpuTimer

# After a parallel loop, torch's OpenMP threads spin for a while on the cores that the next contender needs.
_SETTLE_S = 0.005
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_CACHE_BYTES = 32 << 20  # if the system does not tell

Call = Callable[[], object]


class Timer(Protocol):
    """Samples of one call."""

    host_s: float | None  # on a GPU: seconds until the host can continue
    hides_host: bool | None  # on a GPU: False if the samples include the host's time

    def sample(self) -> float:
        """The seconds of one call."""


class CpuTimer:
    """Samples of one call, whose data is not in the last-level cache. `ready` runs just before the call."""

    host_s = hides_host = None

    def __init__(self, call: Call, ready: Call | None = None) -> None:
        self._call = call
        self._ready = ready

    def sample(self) -> float:
        flush_cache()
        time.sleep(_SETTLE_S)
        if self._ready is not None:
            self._ready()
        return clock(self._call)


def clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_timer(call: Call, device: str) -> Timer:
    return GpuTimer(call) if device == "cuda" else CpuTimer(call)


def in_turns(samplers: Mapping[str, Callable[[], float]], repeats: int, what: str) -> dict[str, list[float]]:
    """Samples of each, in rounds, so that drift of the machine affects all alike. The first round is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    with _bar((repeats + 1) * len(samplers), what) as bar:
        for repeat in range(repeats + 1):
            for name in list(samplers)[:: -1 if repeat % 2 else 1]:
                elapsed = samplers[name]()
                bar.update()
                if repeat > 0:
                    times[name].append(elapsed)
    return times


def _bar(total: int, what: str) -> Any:
    """The progress bar: tqdm's on a terminal. A rank prints ticks, and the process that launched it shows the bar."""
    return Ticks(total) if "RANK" in os.environ else tqdm(total=total, desc=what, leave=False, disable=None)


class Ticks:
    """Progress of rank 0 as lines of its output."""

    _LINE = re.compile(r"benchmark ticks: (\d+) of (\d+)$")  # libraries print lines of their own

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def __enter__(self) -> Ticks:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        pass

    def update(self) -> None:
        self._done += 1
        if os.environ["RANK"] == "0":
            print(f"benchmark ticks: {self._done} of {self._total}", flush=True)

    @classmethod
    def read(cls, line: str) -> tuple[int, int] | None:
        """Ticks done and in all, or None if the line is something else."""
        found = cls._LINE.search(line)
        return (int(found[1]), int(found[2])) if found else None


def flush_cache() -> None:
    """Flush by reading twice the last level's size: written lines would be written back during the next call."""
    _more_than_cache().sum()


@functools.cache
def _more_than_cache() -> Tensor:
    return torch.zeros(2 * _cache_bytes() // 4)


def _cache_bytes() -> int:
    """Bytes of the last level, which the system gives as in "32768K"."""
    text = _CACHE.read_text().strip() if _CACHE.exists() else ""
    return int(text[:-1]) << 10 if text.endswith("K") else _CACHE_BYTES
