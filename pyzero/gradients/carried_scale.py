"""Whose loss scale the gradients of a backward carry."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from pyzero.gradients.backward_end import is_inner_backward

scaled_backwards: dict[int, weakref.ref[CarriedScale]] = {}  # by id: of the scaled backwards that run


class CarriedScale:
    """Whose loss scale the gradients of a graph task carry.

    It is a callback of the task, and torch drops those with their task, whether they were called or not.
    """

    def __init__(self, owner: Any, ended: Callable[[], None] | None) -> None:
        self.task = torch._C._current_graph_task_id()
        self.thread = _caller_thread()
        self.owner = weakref.ref(owner)
        self._ended = ended

    def __call__(self) -> None:
        """Nothing is to be done at the end."""

    def __del__(self) -> None:
        scaled_backwards.pop(id(self), None)
        if self._ended is not None:
            self._ended()


def mark_backward_scaled(owner: Any, ended: Callable[[], None] | None = None) -> None:
    """Called in a backward whose gradients carry the owner's loss scale.

    ended: Called once it has ended or was broken off, maybe on another thread: must not raise, nor communicate.
    """
    mark = CarriedScale(owner, ended)
    scaled_backwards[id(mark)] = weakref.ref(mark)
    torch.autograd.Variable._execution_engine.queue_callback(mark)


def forget_scale(owner: Any) -> None:
    """Called once the owner's backwards have ended."""
    for key, ref in [*scaled_backwards.items()]:
        mark = ref()
        if mark is not None and mark.owner() is owner:
            scaled_backwards.pop(key, None)


def scale_owners_of_backward() -> list[Any]:
    """Whose loss scales gradients carry that arrive now: of several where the scaled losses share a backward."""
    marks = [mark for ref in [*scaled_backwards.values()] if (mark := ref()) is not None]
    task = torch._C._current_graph_task_id()
    if marks and task not in [mark.task for mark in marks] and is_inner_backward():
        mine = _caller_thread()  # in a backward inside another, as of a checkpoint
        marks = [mark for mark in marks if mine is None or mark.thread in (None, mine)]
        task = marks[-1].task if marks else task
    owners = [owner for mark in marks if mark.task == task and (owner := mark.owner()) is not None]
    return [*dict.fromkeys(owners)]


def _caller_thread() -> int | None:
    """The thread that runs a backward of its own, or None: one of torch's, as for a GPU, serves all backwards."""
    mine = threading.get_ident()
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    return mine if any(thread.ident == mine for thread in threads) else None
