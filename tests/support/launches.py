"""Counts the launches that a GPU would have: ops of a backend, and torch's operations that read or write values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyzero.comm.group import Group
from pyzero.ops import registry

# These launch nothing: they allocate, or pass on memory that the host has filled.
_NO_LAUNCH = ("empty", "new_empty", "lift_fresh", "detach", "alias", "set_", "resize_", "_local_scalar_dense")


class _TorchLaunches(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        is_launch = func.namespace == "aten" and not func.is_view and not name.startswith(_NO_LAUNCH)
        self._counts[name] += is_launch
        return func(*args, **(kwargs or {}))


class _CountingBackend:
    def __init__(self, backend: Any, counts: Counter[str]) -> None:
        self._backend = backend
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        self._counts[f"pyzero {name}"] += 1
        return getattr(self._backend, name)


def _uncounted(call: Any) -> Any:
    def uncounted(*args: Any) -> Any:
        with _disable_current_modes():
            return call(*args)

    return uncounted


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count the launches inside, by name, without messages between ranks."""
    counts: Counter[str] = Counter()
    pick = registry.pick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "pick", lambda *args: _CountingBackend(pick(*args), counts))
        patch.setattr(Group, "gather_with_host", _uncounted(Group.gather_with_host))
        with _TorchLaunches(counts):
            yield counts
    for name in [name for name, count in counts.items() if not count]:
        del counts[name]
