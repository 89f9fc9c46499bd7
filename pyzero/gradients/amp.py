"""torch.amp.GradScaler over sharded gradients, which it cannot see: one stand-in parameter answers for all."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_READER = "_unscale_grads_"  # the method of GradScaler and its subclasses that reads the gradients of param_groups
_LIGHTNING = "_optimizer_handles_unscaling"  # its function that reads `_step_supports_amp_scaling`


def grad_scaler_is_asking() -> bool:
    """Whether the code that called the caller is GradScaler, looking for gradients to check and unscale."""
    return sys._getframe(2).f_code.co_name == _READER


def lightning_is_asking() -> bool:
    """Whether the code that called the caller is Lightning's, which refuses to clip for optimizers that unscale."""
    return sys._getframe(2).f_code.co_name == _LIGHTNING


class GradScalerProxy:
    """The parameter that GradScaler finds in place of all: its gradient is 1, or inf where any rank's has overflowed.

    GradScaler unscales and checks it. So the overflow flag is the same on every rank, and the factor by which the
    proxy's gradient was multiplied is to be applied to the real gradients: `take_factor()`.
    """

    def __init__(self, device: torch.device) -> None:
        self._param = Parameter(torch.zeros(2, dtype=torch.float32, device=device))
        self.was_asked = False  # since the last step

    def groups(self, found_inf: Tensor) -> list[dict[str, Any]]:
        """Parameter groups for GradScaler to read; found_inf: (1,) fp32."""
        self.was_asked = True
        flag = torch.ones_like(self._param[:1]).masked_fill_(found_inf != 0, math.inf)
        self._param.grad = torch.cat([flag, torch.ones_like(flag)])  # what is checked, and what stays finite
        return [{"params": [self._param]}]

    def take_factor(self) -> Tensor | None:
        """0-D: the factor that GradScaler applied since `groups()`, handed out once; None where it did not ask."""
        grad, self._param.grad = self._param.grad, None
        return None if grad is None else grad[1]

    def clear(self) -> None:
        """Called after a step, and when gradients are cleared."""
        self._param.grad = None
        self.was_asked = False


def inverse_of(grad_scale: Tensor | None) -> Tensor | None:
    """0-D: 1 / `grad_scale`, which GradScaler sets on the optimizer for a step that it did not unscale; or None."""
    return None if grad_scale is None else grad_scale.double().reciprocal().to(torch.float32).reshape(())
