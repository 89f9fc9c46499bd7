"""deepspeed.zero: contexts that scripts build and edit models in."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.deepspeed import comm
from pyzero.sharding import modules
from pyzero.sharding.local_param import is_dtensor, local_of, part_of
from pyzero.sharding.modules import ShardedPlace

log = logging.getLogger("pyzero")


class ZeroParamStatus(Enum):
    """Of a parameter's weights: here they are always AVAILABLE."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Init:
    """A context to build a model in. It is built whole; initialize() shards it in stage 3.

    Args:
        module: Ignored, as are all but `enabled`.
        *args: Ignored.
        enabled: Whether to say so.
        **kwargs: Ignored.
    """

    def __init__(self, module: nn.Module | None = None, *args: Any, enabled: bool = True, **kwargs: Any) -> None:
        if enabled:
            log.info("zero.Init: the model is built whole, as without it; initialize() shards it in stage 3")

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class GatheredParameters:
    """A context to read or edit whole weights in. What `modifier_rank` made of them is given to all on the way out.

    In stage 3 modules show whole weights in here (`layer.weight`), and the parameters themselves stay DTensors.

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
        self._enabled = enabled
        self._source = modifier_rank
        self._places: dict[Tensor, ShardedPlace] = {}

    def __enter__(self) -> GatheredParameters:
        if self._enabled and any(is_dtensor(param) for param in self._params):
            known = modules.find_fsdp_places()
            self._places = {param: known[param] for param in self._params if param in known}
            for owner in dict.fromkeys(place.owner for place in self._places.values()):
                owner.unshard()
        return self

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        source = self._source if self._enabled and error[0] is None and comm.get_world_size() > 1 else None
        wholes = {param: getattr(place.module, place.name) for param, place in self._places.items()}
        changed = [] if source is None else self._params
        values = [wholes.get(p, p).detach().clone(memory_format=torch.contiguous_format) for p in changed]
        for owner in dict.fromkeys(place.owner for place in self._places.values()):
            owner.reshard()
        for param, value in zip(changed, values, strict=True):
            comm.broadcast(local_of(value), src=source or 0)
            # Not by the collective: the optimizer notices what torch counts as a write.
            local_of(param).copy_(local_of(value) if is_dtensor(value) else part_of(value, param))


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing: fully_shard gathers what a module holds."""


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing."""
