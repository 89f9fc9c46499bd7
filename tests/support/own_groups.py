"""The pool of ranks on process groups with a short timeout, for tests in which ranks could wait for each other."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ranks import NUM_WORKERS, Ranks

import pyzero

TIMEOUT_S = 15  # ends a test that hangs; the pool's timeout is longer
_groups: dict[int, list[Any]] = {}  # of this worker: generation -> groups of 1, 2 and 3 ranks


def make_groups(group: Any, generation: int, timeout_s: float) -> None:
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    _groups[generation] = [dist.new_group(list(range(size)), timeout=limit) for size in (1, 2, 3)]


def on_own_group(group: Any, generation: int, fn: Callable[..., Any], *args: Any) -> Any:
    return fn(_groups[generation][group.size() - 1], *args)


class OwnGroups:
    """The pool on process groups of its own. After a failed test it makes new ones."""

    _generations = itertools.count()

    def __init__(self, ranks: Ranks, timeout_s: float = TIMEOUT_S) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._generation = -1

    def __call__(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        if self._generation < 0:
            self._generation = next(self._generations)
            self._ranks.run(NUM_WORKERS, make_groups, self._generation, self._timeout_s)
        try:
            return self._ranks.run(size, on_own_group, self._generation, fn, *args)
        except AssertionError:
            self._generation = -1
            raise


def is_refused(action: Callable[[], Any]) -> bool:
    """Whether `action` raises a RuntimeError that is no CollectiveError."""
    try:
        action()
    except pyzero.CollectiveError:
        raise
    except RuntimeError:
        return True
    return False
