"""`engine.optimizer.optimizer`: scripts read its groups and state, and put torch's schedules over it."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from pyzero.deepspeed import launcher
from pyzero.deepspeed.loss_scaler import OptimizersLossScaler
from pyzero.optimizer import ZeroOptimizer


class InnerOptimizer(Optimizer):
    """Stands for the torch optimizer that DeepSpeed's ZeRO optimizers hold.

    It has the groups, the state and the hooks of the one outside, which it does not keep alive. It has no `optimizer`:
    scripts unwrap until there is none.
    """

    def __init__(self, outer: ZeroOptimizer) -> None:
        # Not Optimizer's __init__: what it would make is the outer one's, by __getattr__.
        self._outer = weakref.ref(outer)
        self._opt_called = True  # without it a schedule's step() warns

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the optimizer outside, such as `param_groups`, `state` or `defaults`."""
        outer = None if name in ("_outer", "optimizer") else self._outer()
        if outer is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(outer, name)

    def get_lr(self) -> float:
        """Return the learning rate of the first group."""
        return float(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Call the outer one's."""
        return self.__getattr__("state_dict")()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Call the outer one's."""
        self.__getattr__("load_state_dict")(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Call the outer one's."""
        self.__getattr__("add_param_group")(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call the outer one's."""
        self.__getattr__("zero_grad")(set_to_none)

    def step(self, closure: Any = None) -> NoReturn:
        """Refuse, because the engine takes the steps.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("expected steps of the engine, got step() of the optimizer inside; call engine.step()")


def refuse_offload(device: torch.device) -> None:
    """Raise NotImplementedError if states are on a GPU. On a CPU they lie in host memory already."""
    if device.type != "cpu":
        raise NotImplementedError(
            f"got offload_states() on {device}, which is not supported: states stay where they are; set "
            f"zero_optimization.offload_optimizer.device to cpu, which keeps them in memory of the host, and leave the "
            f"call out"
        )


def _offload_states(*args: Any, **kwargs: Any) -> None:
    """Do as `engine.offload_states` does."""
    refuse_offload(launcher.device())


def add_names(optimizer: Any) -> None:
    """Give an engine's optimizer the names by which scripts reach what DeepSpeed's optimizers hold."""
    inner = InnerOptimizer(optimizer)
    optimizer.optimizer = inner
    optimizer.get_lr = inner.get_lr
    optimizer.loss_scaler = OptimizersLossScaler(optimizer)
    optimizer.offload_states = optimizer.reload_states = _offload_states
