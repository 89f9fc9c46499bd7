"""How long a call keeps the GPU, and, apart from that, the host."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

_FLUSH_NUMEL = 128 << 20  # fp32: 512 MiB, several times any L2
_HOST_SAMPLES = 5
_LEAST_SLEEP_S = 1e-4
_MAX_DOUBLINGS = 3
_CALIBRATION_CYCLES = 20_000_000


class GpuTimer:
    """Samples of one call. The L2 is cold before each, and holds no dirty lines that would be written back inside it.

    The call is enqueued while the GPU still sleeps, so that what is measured is the GPU alone, however slow the host.
    Where that fails, because the call waits for the GPU or has more launches than the queue holds (1,024, then the
    host blocks), `hides_host` is False and the samples include what the host costs.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.hides_host = True
        call()  # builds, allocates
        torch.cuda.synchronize()
        self.host_s = statistics.median(self._host_sample() for _ in range(_HOST_SAMPLES))
        self._sleep_s = 2 * self.host_s + _LEAST_SLEEP_S

    def sample(self) -> float:
        """Seconds between the GPU's start of the call and its end."""
        for _ in range(_MAX_DOUBLINGS if self.hides_host else 0):
            seconds, host_s = self._timed(self._sleep_s)
            if host_s < self._sleep_s:
                return seconds
            self._sleep_s *= 2
        self.hides_host = False
        return self._timed(0.0)[0]

    def _timed(self, sleep_s: float) -> tuple[float, float]:
        """(GPU seconds, host seconds), the GPU asleep for the first `sleep_s` of the latter."""
        _flush_l2()
        if sleep_s:
            torch.cuda._sleep(int(sleep_s * _cycles_per_s()))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        host_start = time.perf_counter()
        self._call()
        host_s = time.perf_counter() - host_start
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, host_s

    def _host_sample(self) -> float:
        """Seconds until the host may go on, the GPU idle before."""
        start = time.perf_counter()
        self._call()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed


def _flush_l2() -> None:
    """By reading: what is written stays in the L2 and is written back when the next call wants the room."""
    _more_than_l2().sum()


@functools.cache
def _more_than_l2() -> Tensor:
    return torch.zeros(_FLUSH_NUMEL, device="cuda")


@functools.cache
def _cycles_per_s() -> float:
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # the clock rises
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return _CALIBRATION_CYCLES / start.elapsed_time(end) * 1e3
