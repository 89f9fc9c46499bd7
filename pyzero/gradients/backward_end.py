"""Finds the end of the outermost backward, even if other backwards run inside it."""

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

    A reentrant checkpoint runs its own backward inside the outer one, and that ends earlier. The node that runs the
    inner backward is found on the Python stack. The nodes behind that node run in the outer backward, and a prehook on
    them queues the callback. (Callbacks of an inner backward cannot reach the outer one, because torch makes the inner
    one current while they run.)
    """

    def __init__(self, ended: Callable[[], None], broken_off: Callable[[], None]) -> None:
        self._ended = weakref.WeakMethod(ended)
        self._broken_off = weakref.WeakMethod(broken_off)
        self._tasks: set[int] = set()  # graph tasks that wait for their own end, or for their parent's
        self._outermost: int | None = None  # its end calls `ended`
        self.is_unseen = False  # compiled autograd runs the backward, and calls nothing at its end
        self._prehooks: list[Any] = []  # on the nodes of an outer backward

    @property
    def is_awaited(self) -> bool:
        """Whether a backward's end is awaited: it runs, or was broken off."""
        return bool(self._tasks)

    def begin(self) -> None:
        """Called before each gradient. Await the end of the backward, which may have just begun.

        Call `broken_off` first if an error has ended the one that was awaited.
        """
        if torch._C._current_graph_task_id() in self._tasks:
            return
        if self._outermost is not None and _outermost_python_node() is None:
            call_if_alive(self._broken_off)
        self.await_end()

    def await_end(self) -> None:
        """Call `ended` at the end of the outermost running backward."""
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        self._tasks.add(task)
        self.is_unseen = _is_compiled()
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
    """Whether the running backward was called inside another one, as by a reentrant checkpoint."""
    return _outermost_python_node() is not None


def _is_compiled() -> bool:
    """Whether compiled autograd runs the running backward."""
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")  # an import takes a second
    return bool(getattr(compiled_autograd, "in_compiled_autograd_region", False))


def _outermost_python_node() -> Any:
    """Return the outermost autograd node written in Python that runs on this thread, or None."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is _PYTHON_BACKWARD:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else found.f_locals["self"]


def call_if_alive(weak_method: weakref.WeakMethod[Callable[..., Any]], *args: Any) -> Any:
    """Call the method and return its result, or return None if its object is gone."""
    method = weak_method()
    return None if method is None else method(*args)
