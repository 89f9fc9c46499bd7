"""Find and convert tensors inside a module's inputs and outputs: tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors to a dtype, in tuples, lists and dicts too."""
    return _map(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_device(value: Any, device: torch.device, copy: bool = False) -> Any:
    """Move tensors to a device, in tuples, lists and dicts too. copy: Copy those that are there already."""
    return _map(value, lambda tensor: tensor.to(device, copy=copy))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: _map(item, function) for key, item in value.items()}
        return items if type(value) is dict else _like(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function) for item in value)
    return value


def _like(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict of the same class with these items. Its keys may be attributes too."""
    result = copy.copy(value)
    for key, item in items.items():
        result[key] = item
    return result


def check_loss(loss: Any) -> None:
    """Raise TypeError or ValueError if backward cannot start at this loss."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected a loss, a tensor, got {type(loss).__name__}; pass the one in it: output.loss")
    if loss.numel() != 1:
        raise ValueError(
            f"expected a loss of one element, got one of shape {tuple(loss.shape)}; pass loss.mean(), or call "
            f"engine.scale(tensor).backward(gradient)"
        )


def find(value: Any) -> Iterator[Tensor]:
    """Yield all tensors, in tuples, lists, dicts and dataclasses too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from find(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from find(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from find(getattr(value, field.name))
