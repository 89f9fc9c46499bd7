"""Times of the phases of a step: wall_clock_breakdown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimers:
    """Milliseconds by phase, summed until `report`. On a GPU its own time, by events that only `report` waits for."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._on_gpu = device.type == "cuda"
        self._ms: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done in here."""
        if not self.enabled:
            yield
            return
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._add(name, 1e3 * (time.perf_counter() - started))

    def _add(self, name: str, milliseconds: float) -> None:
        self._ms[name] = self._ms.get(name, 0.0) + milliseconds

    def report(self) -> str:
        """One line: mean milliseconds per call of each phase, and calls. Starts anew."""
        for name, begin, end in self._events:
            end.synchronize()
            self._add(name, begin.elapsed_time(end))
        parts = [f"{name} {ms / self._calls[name]:.2f} ms x {self._calls[name]}" for name, ms in self._ms.items()]
        self._ms, self._calls, self._events = {}, {}, []
        return "time (ms): " + ", ".join(parts) if parts else "time (ms): nothing yet"
