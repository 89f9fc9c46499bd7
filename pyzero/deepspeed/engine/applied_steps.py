"""How the engine learns which optimizer steps were applied, so that the schedule moves on these alone."""

from __future__ import annotations

import torch
from torch import Tensor


class AppliedSteps:
    """Asks whether steps were applied, of the last step or of the one before.

    On a GPU the answer about the last step waits until the device has run it. The one about the step before does not
    keep the device idle: meanwhile it runs the backward that the host has queued since.

    Args:
        is_late: Whether to ask about the step before.
    """

    def __init__(self, is_late: bool) -> None:
        self._is_late = is_late
        self._found_inf: Tensor | None = None  # of the step before, on its way to the host
        self._arrived: torch.cuda.Event | None = None

    def ask(self, found_inf: Tensor) -> bool:
        """Return whether the step was applied, the last one or the one before. If there was none before, return True.

        Args:
            found_inf: (1,) fp32, the last step's overflow flag.
        """
        if not self._is_late:
            return not bool(found_inf)
        before, arrived = self._found_inf, self._arrived
        on_host = torch.empty(1, dtype=torch.float32, device="cpu", pin_memory=found_inf.is_cuda)
        self._found_inf = on_host.copy_(found_inf, non_blocking=True)
        if found_inf.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(found_inf.device))
        if arrived is not None:
            arrived.synchronize()
        return before is None or not bool(before)
