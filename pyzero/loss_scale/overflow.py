"""Reports skipped steps to the user without waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pyzero.gradients.grad_stats import GlobalGradStats
from pyzero.gradients.nonfinite import NOT_FOUND
from pyzero.gradients.stats_rows import HostView, values_of
from pyzero.ops.loss_scale import IN_A_ROW, SCALE, SKIPPED, STATE_SLOTS

log = logging.getLogger("pyzero")


class OverflowMonitor:
    """Warns of skipped steps, and raises after too many.

    Of many skipped steps in a row it warns of the 1st, 2nd, 5th, 10th, 20th, ..., and of the first with a known
    parameter.

    On a CPU it reads the scaler's state directly. On a GPU it starts a copy to the host after the step, and a later
    step looks at the copy once it has arrived. It does not monitor replays of a captured CUDA graph.

    Args:
        device: Device of the loss scale.
        limit: Raise after this many skips in a row; None: never.
        warns: Whether this rank logs the warnings.
    """

    def __init__(self, device: torch.device, limit: int | None, warns: bool) -> None:
        self._limit = limit
        self._warns = warns
        self._num_warned_of = 0  # skipped steps
        self._warns_from = 0  # skips in a row
        self._is_named = False  # whether the last warning named a parameter
        self._is_scaled = False  # whether gradients carried the loss scale in the step that was copied last
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._state = torch.zeros(len(STATE_SLOTS), dtype=torch.float32, device="cpu", pin_memory=self._on_gpu)
        self._first_bad = torch.zeros(1, dtype=torch.float64, device="cpu", pin_memory=self._on_gpu)
        self._view = HostView()
        self._values = values_of(self._state)
        self._arrived = torch.cuda.Event() if self._on_gpu else None
        self._under_way = False  # a copy to the host was started, and not yet read
        self.num_in_a_row = 0  # skips, as far as this host knows

    def start_from(self, num_skipped: int) -> None:
        """Do not warn of steps that were skipped before this run. Count skips in a row from 0."""
        self._num_warned_of = num_skipped
        self._warns_from = 0
        self.num_in_a_row = 0
        self._under_way = False

    def after_step(
        self, state: Tensor, stats: GlobalGradStats, describe: Callable[[float], str], is_scaled: bool
    ) -> None:
        """Look at the state, or at the copy of an earlier one that has arrived, and warn.

        Args:
            state: (5,) fp32, see pyzero.ops.loss_scale.
            stats: Statistics of the step's gradients.
            describe: Puts a code of pyzero/gradients/nonfinite.py (a parameter and a rank) into words.
            is_scaled: Whether the step's gradients carried the loss scale. The warning then gives it.
        """
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        if self._arrived is None:
            self._values = self._view.of(state)
            self._is_scaled = is_scaled
            if self._values[SKIPPED] > self._num_warned_of:
                self._first_bad.copy_(stats.first_bad)
            self._warn(describe)
            return
        if self._under_way and self._arrived.query():
            self._under_way = False
            self._warn(describe)
        if not self._under_way:
            self._state.copy_(state, non_blocking=True)
            self._is_scaled = is_scaled
            self._first_bad.copy_(stats.first_bad, non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(self._device))  # it may not be the current device
            self._under_way = True

    def _warn(self, describe: Callable[[float], str]) -> None:
        num_skipped = int(self._values[SKIPPED])
        self.num_in_a_row = int(self._values[IN_A_ROW])
        num_new = num_skipped - self._num_warned_of
        if num_new <= 0:
            return
        has_begun = self.num_in_a_row <= num_new  # the row of skips began after the last look
        is_named = float(values_of(self._first_bad)[0]) != NOT_FOUND
        has_news = has_begun or (is_named and not self._is_named) or self.num_in_a_row >= self._warns_from
        if has_news:
            self._warns_from = _round_above(self.num_in_a_row)
            self._is_named = is_named
            if self._warns:
                counts = f"{num_skipped} skipped so far, {self.num_in_a_row} in a row{self._scale_now()}"
                where = describe(float(values_of(self._first_bad)[0]))
                log.warning("step skipped, nothing changed: inf or NaN in %s (%s)", where, counts)
        self._num_warned_of = num_skipped

    def _scale_now(self) -> str:
        return f", loss scale now {float(self._values[SCALE]):g}" if self._is_scaled else ""

    def check(self, num_in_a_row: int, describe: Callable[[float], str]) -> None:
        """Raise if too many steps in a row were skipped.

        num_in_a_row: The largest count that any rank knows of, so that all ranks raise in the same step.

        Raises:
            RuntimeError: There were too many. The skipped steps changed nothing.
        """
        if self._limit is not None and num_in_a_row >= self._limit:
            self.num_in_a_row = 0  # if the caller goes on, later skips count anew
            where = describe(float(values_of(self._first_bad)[0]))
            raise RuntimeError(
                f"expected finite gradients, got inf or NaN in {num_in_a_row} steps in a row, last in "
                f"{where}{self._scale_now()}; look at "
                f"the loss and the inputs of that step (a NaN loss, a division by 0, a learning rate too high), run it "
                f"under torch.autograd.detect_anomaly(), or raise max_consecutive_skips"
            )


def _round_above(count: int) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ... above a count."""
    power: int = 10 ** (len(str(count)) - 1)
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit > count)
