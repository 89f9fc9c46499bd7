"""Finds the optimizer of a parameter, because DeepSpeed's functions get only the parameter."""

from __future__ import annotations

import weakref

from torch import Tensor

from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import find_left_whole

# The latest first. No dict by parameter: torch cannot convert a DTensor that has weak references.
_optimizers: list[weakref.ref[ZeroOptimizer]] = []


def register(optimizer: ZeroOptimizer) -> None:
    """Make an optimizer's parameters known, as long as it lives."""
    others = [other for other in _optimizers if other() not in (None, optimizer)]
    _optimizers[:] = [weakref.ref(optimizer), *others]


def owner_of(param: Tensor) -> tuple[ZeroOptimizer, Tensor]:
    """Return the optimizer that trains a parameter, and the parameter as that optimizer knows it.

    If a stage-3 forward left a weight gathered, reshard it first, because the optimizer knows its shard.

    Raises:
        ValueError: No optimizer of an engine trains it.
    """
    found = find_owner(param)
    if found is None:
        for shard, use in find_left_whole([param]).values():
            use.owner.reshard()
            param, found = shard, find_owner(shard)
    if found is None:
        raise ValueError(
            f"expected a parameter of an engine of initialize(), got a tensor of shape {tuple(param.shape)} that is "
            f"none; pass one of engine.module.parameters()"
        )
    return found, param


def find_owner(param: Tensor) -> ZeroOptimizer | None:
    """Return the optimizer that trains a parameter, or None. It does not know gathered ones."""
    for reference in _optimizers:
        optimizer = reference()
        groups = [] if optimizer is None else optimizer.param_groups
        if any(known is param for group in groups for known in group["params"]):
            return optimizer
    return None
