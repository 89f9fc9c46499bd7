"""How long a call takes on the GPU, and how long it occupies the host."""

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
    """Samples of one call. Before each, the L2 is cold and holds no dirty lines that the call would have to write back.

    The call is enqueued while the GPU sleeps, so that a sample is the time of the GPU alone, however slow the host is.
    This fails if the call waits for the GPU, or has more launches than the queue holds (at 1,024 the host blocks). Then
    `hides_host` is False and the samples include the host's time.
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
        """(GPU seconds, host seconds). The GPU sleeps for the first `sleep_s` of the host's."""
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
        """Seconds until the host can continue, with the GPU idle before."""
        start = time.perf_counter()
        self._call()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed


def _flush_l2() -> None:
    """Flush by reading: written lines would stay in the L2, and be written back during the next call."""
    _more_than_l2().sum()


@functools.cache
def _more_than_l2() -> Tensor:
    return torch.zeros(_FLUSH_NUMEL, device="cuda")


@functools.cache
def _cycles_per_s() -> float:
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # raises the clock
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return _CALIBRATION_CYCLES / start.elapsed_time(end) * 1e3
