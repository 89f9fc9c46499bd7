"""Runs steps of a save or a load so that they fail on all ranks if they fail on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pyzero.checkpoint.files import CheckpointError, Interrupted
from pyzero.comm.group import Group

_T = TypeVar("_T")
_S = TypeVar("_S")


def run_on_all_ranks(group: Group, what: str, act: Callable[[], _T]) -> _T:
    """Call `act` on every rank. Return this rank's result. If it fails or is interrupted on one, all ranks raise."""
    result, _ = _run(group, what, act, lambda result: None)
    return result


def gather_from_all_ranks(group: Group, what: str, act: Callable[[], _T]) -> list[_T]:
    """Call `act` on every rank. Return all results, which must be small. All ranks raise as in run_on_all_ranks."""
    _, results = _run(group, what, act, lambda result: result)
    return results


def _run(group: Group, what: str, act: Callable[[], _T], told_of: Callable[[_T], _S]) -> tuple[_T, list[_S]]:
    """Run `act`. Return this rank's result, and `told_of` every rank's result. `what` names the step in errors."""
    problem: Exception | None = None
    interrupt: BaseException | None = None
    try:
        result = act()
    except Interrupted as error:
        interrupt = error.__cause__
    except Exception as error:  # of any kind, because the other ranks wait to be told
        problem = error
    except BaseException as error:
        interrupt = error
    try:
        if interrupt is not None and group.is_broken:  # it ended a collective, so the others cannot be told by one
            raise interrupt
        told = interrupt or problem
        mine = (None, told_of(result)) if told is None else (f"{type(told).__name__}: {told}", None)
        rows = group.gather_objects(mine, f"the agreement on {what}")
        for rank, (text, _) in enumerate(rows):
            if interrupt is not None:
                raise interrupt
            if text is not None:
                if isinstance(problem, (CheckpointError, TypeError, ValueError)):
                    raise problem
                raise CheckpointError(f"{what} failed on rank {rank} of {group.size}: {text}") from problem
        return result, [theirs for _, theirs in rows]
    finally:
        told = interrupt = problem = None  # their tracebacks keep this frame and its callers alive
