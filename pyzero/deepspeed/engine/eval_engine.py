"""The engine of a model that is not trained, such as a reference model or a reward model."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine.engine import Engine
from pyzero.deepspeed.parallel.mesh import Parallelism


class EvalEngine(Engine):
    """The engine that `initialize` returns without an optimizer or a scheduler. Its `optimizer` is None."""

    is_scaled = False

    def __init__(self, module: nn.Module, config: Config, parallel: Parallelism, made_group: bool) -> None:
        nothing: Any = None
        super().__init__(module, nothing, None, config, parallel, made_group)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to train, and to save or load training state.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "expected an engine with an optimizer, got one without; pass optimizer= to initialize(), or set "
            '"optimizer" in the config'
        )

    backward = scale = step = no_sync = coalesce_grad_reduction = zero_grad = _refuse
    save_checkpoint = load_checkpoint = get_fp32_state_dict = was_step_applied = get_global_grad_norm = _refuse
    skipped_steps = cur_scale = property(_refuse)

    def _watches_backward(self) -> bool:
        """Return False, because gradients pass through this model to one that is trained."""
        return False

    def get_lr(self) -> list[float]:
        """Return an empty list."""
        return []

    def get_mom(self) -> list[Any]:
        """Return an empty list."""
        return []
