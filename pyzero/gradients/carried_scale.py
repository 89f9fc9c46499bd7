"""Tracks which optimizer's loss scale the gradients of a backward carry."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from pyzero.gradients.backward_end import is_inner_backward

scaled_backwards: dict[int, weakref.ref[CarriedScale]] = {}  # by id: the scaled backwards that run


class CarriedScale:
    """The owner of the loss scale that the gradients of a graph task carry.

    It is a callback of the task. torch drops callbacks with their task, whether they were called or not.
    """

    def __init__(self, owner: Any, ended: Callable[[], None] | None) -> None:
        self.task = torch._C._current_graph_task_id()
        self.thread = _caller_thread()
        self.owner = weakref.ref(owner)
        self._ended = ended

    def __call__(self) -> None:
        """Do nothing at the end."""

    def __del__(self) -> None:
        scaled_backwards.pop(id(self), None)
        if self._ended is not None:
            self._ended()


def mark_backward_scaled(owner: Any, ended: Callable[[], None] | None = None) -> None:
    """Mark the running backward: its gradients carry the owner's loss scale.

    ended: Called once the backward has ended or was broken off, maybe on another thread. Must not raise or communicate.
    """
    mark = CarriedScale(owner, ended)
    scaled_backwards[id(mark)] = weakref.ref(mark)
    torch.autograd.Variable._execution_engine.queue_callback(mark)


def forget_scale(owner: Any) -> None:
    """Remove the owner's marks, after its backwards have ended."""
    for key, ref in [*scaled_backwards.items()]:
        mark = ref()
        if mark is not None and mark.owner() is owner:
            scaled_backwards.pop(key, None)


def scale_owners_of_backward() -> list[Any]:
    """Return the owners of the loss scales that arriving gradients carry: several if scaled losses share a backward."""
    marks = [mark for ref in [*scaled_backwards.values()] if (mark := ref()) is not None]
    task = torch._C._current_graph_task_id()
    if marks and task not in [mark.task for mark in marks] and is_inner_backward():
        mine = _caller_thread()  # in an inner backward, such as a checkpoint's
        marks = [mark for mark in marks if mine is None or mark.thread in (None, mine)]
        task = marks[-1].task if marks else task
    owners = [owner for mark in marks if mark.task == task and (owner := mark.owner()) is not None]
    return [*dict.fromkeys(owners)]


def _caller_thread() -> int | None:
    """Return this thread if it runs its own backward. None for torch's threads, as for a GPU: they serve all."""
    mine = threading.get_ident()
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    return mine if any(thread.ident == mine for thread in threads) else None
