"""Which optimizer has a parameter: DeepSpeed's scripts ask with the parameter alone."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyzero.optimizer import ZeroOptimizer

_owners: MutableMapping[Tensor, weakref.ref[ZeroOptimizer]] = WeakIdKeyDictionary()


def register(optimizer: ZeroOptimizer) -> None:
    """Its parameters are found from now on, as long as both live."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            _owners[param] = weakref.ref(optimizer)


def owner_of(param: Tensor) -> ZeroOptimizer:
    """The optimizer of the engine that a parameter is trained by.

    Raises:
        ValueError: There is none.
    """
    reference = _owners.get(param)
    found = None if reference is None else reference()
    if found is None:
        raise ValueError(
            f"expected a parameter of an engine of initialize(), got a tensor of shape {tuple(param.shape)} that is "
            f"none; pass one of engine.module.parameters()"
        )
    return found
