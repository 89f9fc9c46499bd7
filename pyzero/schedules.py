"""DeepSpeed's warmup schedules as torch schedulers."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyzero.config import SchedulerSection

_DEFAULT_WARMUP_STEPS = 1000
_DEFAULT_DECAY_MAX_LR = 0.001


class Warmup(LRScheduler):
    """WarmupLR, and WarmupDecayLR where `decay_steps` is given, with DeepSpeed's numbers.

    The first optimizer step and the second both run at the minimum: DeepSpeed's schedule counts from -1.

    Args:
        optimizer: Whose groups to drive.
        min_lr: Rate at the start.
        max_lr: Rate after the warmup; None for each group's own.
        warmup_steps: Optimizer steps.
        warmup_type: "log" or "linear".
        decay_steps: Optimizer steps, warmup included, after which the rate is 0; None to stay at the maximum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        min_lr: float = 0.0,
        max_lr: float | None = None,
        warmup_steps: int = _DEFAULT_WARMUP_STEPS,
        warmup_type: str = "log",
        decay_steps: int | None = None,
    ) -> None:
        self.min_lr = min_lr
        self.max_lrs = [group["lr"] if max_lr is None else max_lr for group in optimizer.param_groups]
        self.warmup_steps = max(2, warmup_steps)
        self.warmup_type = warmup_type
        self.decay_steps = decay_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The rate of each group for the coming step."""
        fraction = self._fraction(self.last_epoch - 1)
        return [self.min_lr + (max_lr - self.min_lr) * fraction for max_lr in self.max_lrs]

    def _fraction(self, step: int) -> float:
        """Of the way from the minimum to the maximum."""
        if step < 0:
            return 0.0
        if step < self.warmup_steps:
            if self.warmup_type == "linear":
                return step / self.warmup_steps
            return math.log(step + 1) / math.log(self.warmup_steps)
        if self.decay_steps is None:
            return 1.0
        return max(0.0, (self.decay_steps - step) / max(1, self.decay_steps - self.warmup_steps))


def from_config(section: SchedulerSection, optimizer: Optimizer) -> Warmup:
    """The schedule that a DeepSpeed config asks for; its defaults are DeepSpeed's."""
    params = section.params
    decays = section.type == "WarmupDecayLR"
    max_lr = params.warmup_max_lr
    if max_lr is None and decays:
        max_lr = _DEFAULT_DECAY_MAX_LR
    return Warmup(
        optimizer,
        min_lr=0.0 if params.warmup_min_lr == "auto" else params.warmup_min_lr,
        max_lr=None if max_lr == "auto" else max_lr,
        warmup_steps=_DEFAULT_WARMUP_STEPS if params.warmup_num_steps == "auto" else params.warmup_num_steps,
        warmup_type=params.warmup_type,
        decay_steps=params.total_num_steps if decays else None,
    )
