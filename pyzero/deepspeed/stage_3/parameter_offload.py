"""`engine.optimizer.parameter_offload`: what TRL's unwrap_model_for_generation takes DeepSpeed's hooks off by."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Hookless(nn.Module):
    """Stands for a model of which no parameter is held by a hook."""

    def ds_external_parameters(self) -> list[tuple[str, Tensor]]:
        """None."""
        return []


class ParameterOffload:
    """DeepSpeed's hooks on modules, of which there are none here: GatheredParameters alone keeps weights whole."""

    def __init__(self) -> None:
        self.module = _Hookless()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Do nothing."""

    _register_hooks_recursively = _register_deepspeed_module  # its older name
