"""Where the outermost backward ends, whatever backwards run inside it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

_PYTHON_BACKWARD = BackwardCFunction.apply.__code__


class BackwardEnd:
    """Calls `ended()` once at the end of each outermost backward in which `await_end()` was called.

    A reentrant checkpoint runs a backward of its own inside the outer one, and its end is not the outer one's. The node
    that runs it is found on the Python stack; the nodes behind that node run in the outer backward, and there a prehook
    queues the callback. (torch runs the callbacks of an inner backward with the inner one as current, so they cannot
    reach the outer.)
    """

    def __init__(self, ended: Callable[[], None], broken_off: Callable[[], None]) -> None:
        self._ended = weakref.WeakMethod(ended)
        self._broken_off = weakref.WeakMethod(broken_off)
        self._tasks: set[int] = set()  # graph tasks whose end, or whose parent's end, is being waited for
        self._outermost: int | None = None  # the task at whose end `ended` is called
        self._prehooks: list[Any] = []  # on the nodes of an outer backward

    @property
    def is_awaited(self) -> bool:
        """A backward runs, or was broken off, whose end is awaited."""
        return bool(self._tasks)

    def begin(self) -> None:
        """Called before a gradient arrives; calls `broken_off` where an error has ended the awaited backward."""
        if self._outermost is None or torch._C._current_graph_task_id() in self._tasks:
            return
        if _outermost_python_node() is None:
            call_if_alive(self._broken_off)

    def await_end(self) -> None:
        """Have `ended` called at the end of the outermost backward that is running."""
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        self._tasks.add(task)
        node = _outermost_python_node()
        if node is None:
            self._outermost = task
            torch.autograd.Variable._execution_engine.queue_callback(self._run)
            return
        nodes = [behind for behind, _ in node.next_functions if behind is not None]
        weak = weakref.WeakMethod(self.await_end)
        self._prehooks += [behind.register_prehook(lambda grads: call_if_alive(weak)) for behind in nodes]

    def _run(self) -> None:
        if self._outermost is not None:
            call_if_alive(self._ended)

    def forget(self) -> None:
        """Stop waiting."""
        self._tasks.clear()
        self._outermost = None
        while self._prehooks:
            self._prehooks.pop().remove()


def is_inner_backward() -> bool:
    """Whether the backward that runs was called in another one's, as of a reentrant checkpoint."""
    return _outermost_python_node() is not None


def _outermost_python_node() -> Any:
    """The outermost autograd node written in Python that is running on this thread, or None."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is _PYTHON_BACKWARD:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else found.f_locals["self"]


def call_if_alive(weak_method: weakref.WeakMethod[Callable[..., Any]], *args: Any) -> Any:
    """What the method returns, or None where its object is gone."""
    method = weak_method()
    return None if method is None else method(*args)
