"""deepspeed.runtime.fp16.loss_scaler: names of classes in DeepSpeed's checkpoints, for add_safe_globals()."""

from __future__ import annotations


class LossScalerBase:
    """A scale. Engines here scale by pyzero.LossScale, and hold none of these."""

    def __init__(self, cur_scale: float) -> None:
        self.cur_scale = cur_scale
        self.dynamic = False

    @property
    def loss_scale(self) -> float:
        """The scale."""
        return self.cur_scale


class LossScaler(LossScalerBase):
    """A fixed one."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """One that moves, in DeepSpeed."""
