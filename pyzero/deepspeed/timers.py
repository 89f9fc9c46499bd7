"""Timers of the phases of a step, for wall_clock_breakdown, and DeepSpeed's timers for scripts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyzero.deepspeed import comm

log = logging.getLogger("pyzero")


class PhaseTimers:
    """Sums milliseconds per phase until `report`. On a GPU it uses events, and only `report` waits for them."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._on_gpu = device.type == "cuda"
        self._ms: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context that times what runs in it."""
        if not self.enabled:
            yield
            return
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(name, 1e3 * (time.perf_counter() - started))
        self._calls[name] = self._calls.get(name, 0) + 1

    def _add(self, name: str, milliseconds: float) -> None:
        self._ms[name] = self._ms.get(name, 0.0) + milliseconds

    def report(self) -> str:
        """Return a line with the number of calls of each phase and their mean milliseconds. Clear the timers."""
        for name, begin, end in self._events:
            end.synchronize()
            self._add(name, begin.elapsed_time(end))
        parts = [f"{name} {ms / self._calls[name]:.2f} ms x {self._calls[name]}" for name, ms in self._ms.items()]
        self._ms, self._calls, self._events = {}, {}, []
        return "time (ms): " + ", ".join(parts) if parts else "time (ms): nothing yet"


class Timer:
    """A stopwatch that waits for the GPU when it starts and stops."""

    def __init__(self) -> None:
        self.started = False
        self._begin = self._seconds = 0.0

    def start(self) -> None:
        """Start the timer.

        Raises:
            RuntimeError: The timer runs already.
        """
        if self.started:
            raise RuntimeError("expected a timer that is stopped, got start() of one that runs; call stop() before")
        _wait_for_gpu()
        self.started, self._begin = True, time.perf_counter()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Stop the timer, and add the time since `start` to the sum. reset: Replace the sum instead.

        Raises:
            RuntimeError: The timer does not run.
        """
        if not self.started:
            raise RuntimeError("expected a timer that runs, got stop() of one that is stopped; call start() before")
        _wait_for_gpu()
        passed = time.perf_counter() - self._begin
        self.started, self._seconds = False, passed if reset else self._seconds + passed

    def reset(self) -> None:
        """Stop the timer, and clear the sum."""
        self.started, self._seconds = False, 0.0

    def elapsed(self, reset: bool = True) -> float:
        """Return the summed milliseconds between start() and stop(). reset: Clear the sum. A running timer goes on."""
        was_started = self.started
        if was_started:
            self.stop()
        found = 1e3 * self._seconds
        if reset:
            self.reset()
        if was_started:
            self.start()
        return found


class SynchronizedWallClockTimer:
    """Timers by name: `timers("forward").start()`."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        """Return the timer of this name. Make it if there is none."""
        return self.timers.setdefault(name, Timer())

    def has_timer(self, name: str) -> bool:
        """Return whether there is a timer of this name."""
        return name in self.timers

    def get_timers(self) -> dict[str, Timer]:
        """Return all timers by name."""
        return self.timers

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Iterable[int] | None = None,
    ) -> None:
        """Log one line with each timer's milliseconds / normalizer, on these ranks; default: rank 0."""
        parts = [f"{n}: {self(n).elapsed(reset) / normalizer:.2f}" for n in names if n in self.timers]
        if comm.get_rank() in (ranks or (0,)):
            log.info("time (ms) | %s", " | ".join(parts))


class ThroughputTimer:
    """Measures samples per second over the steps between start() and stop().

    Args:
        config: An object with `enabled` and `synchronized`, which makes start() and stop() wait for the GPU.
        batch_size: Samples per global step.
        start_step: Number of first global steps that are not counted.
        steps_per_output: Global steps from one log line to the next; None: no log.
        monitor_memory: Not supported.
        logging_fn: Called with each log line; default: log.info.

    Raises:
        ValueError: monitor_memory is set.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], object] | None = None,
    ) -> None:
        if monitor_memory:
            raise ValueError("got monitor_memory=True, which is not supported; log psutil.virtual_memory() yourself")
        self.config, self.batch_size = config, 1 if batch_size is None else batch_size
        self.start_step, self.steps_per_output = start_step, steps_per_output
        self.logging = logging_fn or log.info
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = self.step_elapsed_time = 0.0
        self.started = False
        self._begin: float | None = None  # None: this step is not counted

    def update_epoch_count(self) -> None:
        """Begin another epoch."""
        self.epoch_count, self.micro_step_count = self.epoch_count + 1, 0

    def start(self) -> None:
        """Begin a step."""
        if not self.config.enabled:
            return
        self.started = True
        self._begin = self._now() if self.global_step_count >= self.start_step else None

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End the step, and log the speed if it is due.

        global_step: This was the last micro-batch of a global step. report_speed: False omits the log line.
        """
        if not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        self.global_step_count += int(global_step)
        if self._begin is None:
            return
        passed = self._now() - self._begin
        self.total_elapsed_time += passed
        self.step_elapsed_time += passed
        if not global_step:
            return
        if report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
            now = self.batch_size / max(self.step_elapsed_time, 1e-9)
            self.logging(
                f"epoch={self.epoch_count}, micro_step={self.micro_step_count}, global_step={self.global_step_count}, "
                f"samples/s: {self.avg_samples_per_sec():.3f} on average, {now:.3f} now"
            )
        self.step_elapsed_time = 0.0

    def avg_samples_per_sec(self) -> float:
        """Return the mean samples per second of all counted steps; -inf if there are none."""
        steps = self.global_step_count - self.start_step
        return self.batch_size * steps / max(self.total_elapsed_time, 1e-9) if steps > 0 else float("-inf")

    def _now(self) -> float:
        if self.config.synchronized:
            _wait_for_gpu()
        return time.perf_counter()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
