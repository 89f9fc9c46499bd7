"""deepspeed.ops.lion: FusedLion and DeepSpeedCPULion."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed.ops.optimizer_spec import OptimizerSpec


class FusedLion(OptimizerSpec):
    """DeepSpeed's FusedLion, with its arguments and defaults."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay))


class DeepSpeedCPULion(FusedLion):
    """DeepSpeed's DeepSpeedCPULion. It runs on the device of the weights."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay)
