"""Steps of a save or a load that fail on all ranks where they fail on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pyzero.checkpoint.files import CheckpointError, Interrupted
from pyzero.comm.group import Group

_T = TypeVar("_T")


def run_on_all_ranks(group: Group, what: str, act: Callable[[], _T]) -> _T:
    """Run it on every rank; where it fails on one, or is interrupted, all ranks raise."""
    problem: Exception | None = None
    interrupt: BaseException | None = None
    try:
        result = act()
    except Interrupted as error:
        interrupt = error.__cause__
    except Exception as error:  # of any kind: the other ranks wait to hear of it
        problem = error
    except BaseException as error:
        interrupt = error
    told = interrupt or problem
    failed = None if told is None else f"{type(told).__name__}: {told}"
    for rank, text in enumerate(group.gather_objects(failed, f"the agreement on {what}")):
        if interrupt is not None:
            raise interrupt
        if text is not None:
            if isinstance(problem, (CheckpointError, TypeError, ValueError)):
                raise problem
            raise CheckpointError(f"{what} failed on rank {rank} of {group.size}: {text}") from problem
    return result
