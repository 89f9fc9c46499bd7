"""deepspeed.runtime.fp16.loss_scaler: classes that DeepSpeed's checkpoints name, for torch's add_safe_globals()."""

from __future__ import annotations


class LossScalerBase:
    """A loss scale as in DeepSpeed's checkpoints. Engines use pyzero.LossScale instead."""

    def __init__(self, cur_scale: float) -> None:
        self.cur_scale = cur_scale
        self.dynamic = False

    @property
    def loss_scale(self) -> float:
        """The loss scale."""
        return self.cur_scale


class LossScaler(LossScalerBase):
    """DeepSpeed's static loss scale."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """DeepSpeed's dynamic loss scale. Here it never changes."""
