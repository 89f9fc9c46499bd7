"""deepspeed.zero: contexts that scripts build and edit models in. Weights are whole on each rank, so they do little."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.deepspeed import comm

log = logging.getLogger("pyzero")


class ZeroParamStatus(Enum):
    """Of a parameter's weights: here they are always AVAILABLE."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Init:
    """A context to build a model in. DeepSpeed partitions its weights there in stage 3; here they stay whole.

    Args:
        module: Ignored, as are all but `enabled`.
        *args: Ignored.
        enabled: Whether to say so.
        **kwargs: Ignored.
    """

    def __init__(self, module: nn.Module | None = None, *args: Any, enabled: bool = True, **kwargs: Any) -> None:
        if enabled:
            log.info("zero.Init: weights stay whole on each rank; the model is built as it would be without it")

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class GatheredParameters:
    """A context to read or edit whole weights in. What `modifier_rank` made of them is given to all on the way out.

    Args:
        params: A parameter, several, or a module's.
        modifier_rank: Of the default group; None: they are only read, and nothing is sent.
        fwd_module: Ignored.
        enabled: False does nothing.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._params = [params] if isinstance(params, Tensor) else list(params)
        self._source = modifier_rank if enabled else None

    def __enter__(self) -> GatheredParameters:
        return self

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        if self._source is None or error[0] is not None or comm.get_world_size() == 1:
            return
        for param in self._params:
            value = param.detach().clone(memory_format=torch.contiguous_format)
            comm.broadcast(value, src=self._source)
            param.copy_(value)  # not by the collective: the optimizer notices what torch counts as a write


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing: weights are whole on each rank."""


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing."""
