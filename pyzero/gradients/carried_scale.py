"""Tracks which optimizer's loss scale the gradients of a backward carry."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyzero.gradients.backward_end import is_inner_backward

scaled_backwards: dict[int, weakref.ref[CarriedScale]] = {}  # by id: the scaled backwards that run


class CarriedScale:
    """The owner of the loss scale that the gradients of a graph task carry.

    It is a callback of the task. torch drops callbacks with their task, whether they were called or not.

    Attributes:
        is_of_all: Whether all gradients of the task carry the scale.
    """

    def __init__(self, owner: Any, ended: Callable[[], None] | None, is_of_all: bool) -> None:
        self._ended = None  # until all is there: an interrupt here also calls __del__
        self.task = torch._C._current_graph_task_id()
        self.thread = caller_thread()
        self.owner = weakref.ref(owner)
        self.is_of_all = is_of_all
        self._loss_node = torch._C._current_autograd_node()
        self._ended = ended

    @cached_property
    def leaves(self) -> list[Tensor] | None:
        """The leaves that the scaled loss reaches, but for those inside reentrant checkpoints. None: unknown."""
        return None if self._loss_node is None else _leaves_behind(self._loss_node)

    def __call__(self) -> None:
        """Do nothing at the end."""

    def __del__(self) -> None:
        scaled_backwards.pop(id(self), None)
        if self._ended is not None:
            self._ended()


def mark_backward_scaled(owner: Any, ended: Callable[[], None] | None = None, is_of_all: bool = False) -> None:
    """Mark the running backward: gradients of the loss whose hook calls this carry the owner's loss scale.

    Args:
        owner: Whose loss scale it is.
        ended: Called once the backward has ended or was broken off, maybe on another thread. Must not raise or
            communicate.
        is_of_all: Whether the backward has no other loss.
    """
    mark = CarriedScale(owner, ended, is_of_all)
    scaled_backwards[id(mark)] = weakref.ref(mark)
    torch.autograd.Variable._execution_engine.queue_callback(mark)


def forget_scale(owner: Any) -> None:
    """Remove the owner's marks, after its backwards have ended."""
    for mark in _live_marks():
        if mark.owner() is owner:
            scaled_backwards.pop(id(mark), None)


def runs_on_another_thread(owner: Any) -> bool:
    """Whether a backward with the owner's loss scale runs on another thread. False where torch's threads run it."""
    mine = caller_thread()
    threads = {mark.thread for mark in _live_marks() if mark.owner() is owner}
    return mine is not None and bool(threads - {None, mine})


def _live_marks() -> list[CarriedScale]:
    return [mark for ref in [*scaled_backwards.values()] if (mark := ref()) is not None]


def scales_of_backward() -> list[CarriedScale]:
    """Return the marks of the running backward: of several owners if their scaled losses share it."""
    marks = _live_marks()
    task = torch._C._current_graph_task_id()
    if marks and task not in [mark.task for mark in marks] and is_inner_backward():
        mine = caller_thread()  # in an inner backward, such as a checkpoint's
        marks = [mark for mark in marks if mine is None or mark.thread in (None, mine)]
        task = marks[-1].task if marks else task
    return [mark for mark in marks if mark.task == task and mark.owner() is not None]


def scale_owners_of_backward() -> list[Any]:
    """Return the owners of the loss scales that arriving gradients carry."""
    owners = [mark.owner() for mark in scales_of_backward()]
    return [*dict.fromkeys(owner for owner in owners if owner is not None)]


def _leaves_behind(node: Any) -> list[Tensor]:
    leaves, seen, waiting = [], {node}, [node]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return leaves


def caller_thread() -> int | None:
    """Return this thread if it runs its own backward. None for torch's threads, as for a GPU: they serve all."""
    mine = threading.get_ident()
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    return mine if any(thread.ident == mine for thread in threads) else None
