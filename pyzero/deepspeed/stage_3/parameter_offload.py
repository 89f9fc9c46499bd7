"""`engine.optimizer.parameter_offload`, which TRL's unwrap_model_for_generation uses to remove DeepSpeed's hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Hookless(nn.Module):
    """Stands for a model without parameters that hooks hold."""

    def ds_external_parameters(self) -> list[tuple[str, Tensor]]:
        """Return an empty list, because no parameter is external."""
        return []


class ParameterOffload:
    """An object without hooks: here, only GatheredParameters keeps weights whole."""

    def __init__(self) -> None:
        self.module = _Hookless()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Do nothing."""

    _register_hooks_recursively = _register_deepspeed_module  # its older name
