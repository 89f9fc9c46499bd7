"""Checks of hyper-parameters in parameter groups, and a checksum by which ranks compare them."""

from __future__ import annotations

import math
import numbers
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def as_number(name: str, value: Any) -> float:
    """Return an option as a float. Raise TypeError if it is not a number. Text such as "0.1" is not one either.

    Raise ValueError if it is beyond the largest float.
    """
    if type(value) is float:  # the usual case, and each step calls this
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"expected {name} as a number, got a tensor on {value.device}, for which each step would wait; pass "
            f"float(value)"
        )
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"expected {name} as a number that a float can hold, got {value!r:.40}; lower it") from None
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as a number, got {value!r}; pass one, or leave {name} out") from None
    if isinstance(value, str):
        yaml = ", and in YAML write 1.0e-3, for it takes 1e-3 for text" * ("e" in value.lower())
        raise TypeError(f"expected {name} as a number, got the text {value!r}; pass {number!r}{yaml}")
    return number


def check_lr(group: dict[str, Any]) -> None:
    """Raise ValueError, with torch's message, if lr is negative or not finite. A tensor on a GPU is not read."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements; pass a number or a 0-D tensor")
        if lr.device.type != "cpu":
            return
    if not 0.0 <= as_number("lr", lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}; expected lr >= 0, and finite")


def check_betas(group: dict[str, Any]) -> None:
    """Raise ValueError, with torch's message, unless there are two betas, each at least 0 and below 1."""
    betas = group["betas"]
    if isinstance(betas, str) or not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two, as in betas=(0.9, 0.999)")
    for index, (name, beta) in enumerate(zip(("betas[0]", "betas[1]"), betas, strict=True)):
        if not 0.0 <= as_number(name, beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; expected 0 <= beta < 1")


def check_not_negative(what: str, name: str, group: dict[str, Any]) -> None:
    """Raise ValueError if group[name] is negative or not finite. what: Names the option in torch's message."""
    if not 0.0 <= as_number(name, group[name]) < math.inf:
        raise ValueError(f"Invalid {what} value: {group[name]}; expected {name} >= 0, and finite")


def check_there(group: dict[str, Any], *names: str) -> None:
    """Raise KeyError if the group lacks one of these names. Without this check an update would fail half-way."""
    for name in names:
        group[name]


class HyperParameters:
    """A checksum by which ranks compare their parameter groups. It is computed again only if a value has changed.

    Args:
        names: The hyper-parameters to compare.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._values: list[Any] = []
        self._checksum = 0

    def checksum(self, groups: Sequence[dict[str, Any]]) -> int:
        """Return the checksum of the values in all groups, as fp32. Leave out tensors on a GPU: the host would wait."""
        values = [_comparable(value) for group in groups for value in map(group.get, self._names)]
        if values != self._values:
            self._values, self._checksum = values, zlib.crc32(repr(values).encode())
        return self._checksum


_FP32 = struct.Struct("f")


def _comparable(value: Any) -> Any:
    """Return a value whose repr() is equal on ranks that step alike. For other types, return the type's name."""
    if isinstance(value, (float, int)):
        try:
            return _FP32.pack(value + 0.0)  # -0.0 becomes 0.0
        except OverflowError:
            return value if isinstance(value, float) else repr(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, Tensor):
        return _comparable(value.item()) if value.device.type == "cpu" and value.numel() == 1 else None
    if value is None or isinstance(value, str):
        return value
    return _comparable(float(value)) if isinstance(value, numbers.Real) else type(value).__name__
