"""deepspeed.ops.adam: FusedAdam and DeepSpeedCPUAdam."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed.ops.optimizer_spec import OptimizerSpec


class FusedAdam(OptimizerSpec):
    """DeepSpeed's FusedAdam, with its arguments and defaults: AdamW unless adam_w_mode is false."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            bias_correction=bias_correction,
            decoupled_weight_decay=adam_w_mode,
        )
        super().__init__(params, defaults)


class DeepSpeedCPUAdam(FusedAdam):
    """DeepSpeed's DeepSpeedCPUAdam, with its order of arguments. It runs on the device of the weights."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
