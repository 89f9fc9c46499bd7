"""deepspeed.ops.lamb: FusedLamb."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed.ops.optimizer_spec import OptimizerSpec


class FusedLamb(OptimizerSpec):
    """DeepSpeed's FusedLamb, with its arguments and defaults.

    Raises:
        ValueError: eps_inside_sqrt, max_grad_norm or amsgrad is set, which are not supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        refused = {"eps_inside_sqrt": eps_inside_sqrt, "max_grad_norm": max_grad_norm, "amsgrad": amsgrad}
        for name, value in refused.items():
            if value:
                raise ValueError(f"got {name}={value}, which is not supported; leave it out (the config clips)")
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            max_coeff=max_coeff,
            min_coeff=min_coeff,
        )
        super().__init__(params, defaults)
