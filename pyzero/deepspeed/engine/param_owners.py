"""Finds the optimizer of a parameter, because DeepSpeed's functions get only the parameter."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import find_left_whole

_owners: MutableMapping[Tensor, weakref.ref[ZeroOptimizer]] = WeakIdKeyDictionary()


def register(optimizer: ZeroOptimizer) -> None:
    """Make an optimizer's parameters known, as long as both live."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            _owners[param] = weakref.ref(optimizer)


def owner_of(param: Tensor) -> tuple[ZeroOptimizer, Tensor]:
    """Return the optimizer that trains a parameter, and the parameter as that optimizer knows it.

    If a stage-3 forward left a weight gathered, reshard it first, because the optimizer knows its shard.

    Raises:
        ValueError: No optimizer of an engine trains it.
    """
    if param not in _owners:
        for shard, use in find_left_whole([param]).values():
            use.owner.reshard()
            param = shard
    reference = _owners.get(param)
    found = None if reference is None else reference()
    if found is None:
        raise ValueError(
            f"expected a parameter of an engine of initialize(), got a tensor of shape {tuple(param.shape)} that is "
            f"none; pass one of engine.module.parameters()"
        )
    return found, param
