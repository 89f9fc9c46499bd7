"""Skipped steps, told to the user without waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("pyzero")

_SKIPPED, _IN_A_ROW, _SCALE, _SUSPECT = range(4)


class SkipWatch:
    """Warns of each skipped step, and ends the run after too many in a row.

    What it needs to know is copied to the host behind the step. On a CPU it is there at once; on a GPU it is looked at
    in a later step, when it has arrived. A captured CUDA graph is replayed without it.

    Args:
        device: Where the loss scale lives.
        limit: Skips in a row that are an error; None for any number.
        speaks: Whether this rank warns.
    """

    def __init__(self, device: torch.device, limit: int | None, speaks: bool) -> None:
        self._limit = limit
        self._speaks = speaks
        self._num_told = 0  # skipped steps that were warned of
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros(4, dtype=torch.float64, pin_memory=self._on_gpu)
        self._arrived = torch.cuda.Event() if self._on_gpu else None
        self._under_way = False

    def start_from(self, num_skipped: int) -> None:
        """Steps skipped before this run are no news."""
        self._num_told = num_skipped

    def after_step(self, state: Tensor, suspect: Tensor, describe: Callable[[float], str]) -> bool:
        """Copy, look at what has arrived, tell. Returns whether the last step known of was skipped.

        Args:
            state: (5,) fp32, see pyzero.ops.loss_scale.
            suspect: (1,) fp64, of Verdict.
            describe: Says which parameter and rank a code of Bucket.suspect means.

        Raises:
            RuntimeError: Too many steps in a row were skipped. They changed nothing.
        """
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return False
        row = torch.cat([state[3:5], state[:1]]).double()
        if self._arrived is None:
            torch.cat([row, suspect], out=self._host)
            return self._judge(describe)
        skipping = False
        if self._under_way and self._arrived.query():
            self._under_way = False
            skipping = self._judge(describe)
        if not self._under_way:
            self._host.copy_(torch.cat([row, suspect]), non_blocking=True)
            self._arrived.record()
            self._under_way = True
        return skipping

    def _judge(self, describe: Callable[[float], str]) -> bool:
        values = self._host.numpy()
        num_skipped, in_a_row, scale, suspect = (float(values[i]) for i in (_SKIPPED, _IN_A_ROW, _SCALE, _SUSPECT))
        if num_skipped > self._num_told and self._speaks:
            counts = f"{num_skipped:.0f} skipped so far, {in_a_row:.0f} in a row, loss scale now {scale:g}"
            log.warning("step skipped, nothing changed: inf or NaN in %s (%s)", describe(suspect), counts)
        self._num_told = max(self._num_told, int(num_skipped))
        if self._limit is not None and in_a_row >= self._limit:
            raise RuntimeError(
                f"expected finite gradients, got inf or NaN in {in_a_row:.0f} steps in a row, last in "
                f"{describe(suspect)}, with the loss scale now at {scale:g}; look at the loss and the inputs of that "
                f"step (a NaN loss, a division by 0, a learning rate too high), run it under "
                f"torch.autograd.detect_anomaly(), or raise max_consecutive_skips"
            )
        return in_a_row > 0
