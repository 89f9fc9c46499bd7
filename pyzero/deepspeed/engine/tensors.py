"""Tensors inside what a module takes and gives: tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors to dtype, in tuples, lists and dicts too."""
    return _map(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors to a device, in tuples, lists and dicts too."""
    return _map(value, lambda tensor: tensor.to(device))


def find(value: Any) -> Iterator[Tensor]:
    """Tensors, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from find(item)


def _map(value: Any, function: Callable[[Tensor], Tensor], dataclasses_too: bool = False) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: _map(item, function, dataclasses_too) for key, item in value.items()}
        return items if type(value) is dict else _like(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function, dataclasses_too) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function, dataclasses_too) for item in value)
    if dataclasses_too and dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            item = _map(getattr(value, field.name), function, dataclasses_too)
            object.__setattr__(result, field.name, item)  # it may be frozen
        return result
    return value


def _like(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """One of the same class, whose keys may be attributes too."""
    result = copy.copy(value)
    for key, item in items.items():
        result[key] = item
    return result


def check_loss(loss: Any) -> None:
    """Raise TypeError or ValueError where backward cannot start at it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected a loss, a tensor, got {type(loss).__name__}; pass the one in it: output.loss")
    if loss.numel() != 1:
        raise ValueError(
            f"expected a loss of one element, got one of shape {tuple(loss.shape)}; pass loss.mean(), or call "
            f"engine.scale(tensor).backward(gradient)"
        )


def map_outputs(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a module gave, with other tensors in place of those in a graph, also in dataclasses.

    One that is there twice stays one.
    """
    replaced: dict[int, Tensor] = {}

    def replace(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is None:
            return tensor
        if id(tensor) not in replaced:
            replaced[id(tensor)] = function(tensor)
        return replaced[id(tensor)]

    return _map(value, replace, dataclasses_too=True)
