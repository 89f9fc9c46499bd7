"""Autograd hooks: before and after each parameter's gradient, and at the end of the outermost backward."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from pyzero.sharding.local_param import LocalParam, user_param

_ParamHook = Callable[[Tensor], None]
_Factor = Callable[[Tensor], Tensor | None]

_hooked: MutableMapping[Tensor, list[weakref.ref[Any]]] = WeakIdKeyDictionary()  # by parameter: its GradientHooks
_scaled: dict[int, weakref.ref[_Note]] = {}  # by id: notes of the scaled backwards that run


class _Note:
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
        _scaled.pop(id(self), None)
        if self._ended is not None:
            self._ended()


def note_scale(owner: Any, ended: Callable[[], None] | None = None) -> None:
    """Called in a backward whose gradients carry the owner's loss scale.

    ended: Called once it has ended or was broken off, maybe on another thread: must not raise, nor communicate.
    """
    note = _Note(owner, ended)
    _scaled[id(note)] = weakref.ref(note)
    torch.autograd.Variable._execution_engine.queue_callback(note)


def forget_scale(owner: Any) -> None:
    """Called once the owner's backwards have ended."""
    for key, ref in [*_scaled.items()]:
        note = ref()
        if note is not None and note.owner() is owner:
            _scaled.pop(key, None)


def scales_of_backward() -> list[Any]:
    """Whose loss scales gradients carry that arrive now: of several where the scaled losses share a backward."""
    notes = [note for ref in [*_scaled.values()] if (note := ref()) is not None]
    task = torch._C._current_graph_task_id()
    if notes and task not in [note.task for note in notes] and _outermost_python_node() is not None:
        mine = _caller_thread()  # in a backward inside another, as of a checkpoint
        notes = [note for note in notes if mine is None or note.thread in (None, mine)]
        task = notes[-1].task if notes else task
    owners = [owner for note in notes if note.task == task and (owner := note.owner()) is not None]
    return [*dict.fromkeys(owners)]


def is_inner_backward() -> bool:
    """Whether the backward that runs was called in another one's, as of a reentrant checkpoint."""
    return _outermost_python_node() is not None


def _caller_thread() -> int | None:
    """The thread that runs a backward of its own, or None: one of torch's, as for a GPU, serves all backwards."""
    mine = threading.get_ident()
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    return mine if any(thread.ident == mine for thread in threads) else None


class GradientHooks:
    """Calls `before(param)` before backward adds a gradient to `.grad`, and `after(param)` after it.

    Where a function gives None for a gradient backward adds nothing: `without(param)` alone is called.
    torch.autograd.grad adds to no `.grad` and calls none. The hooks keep nothing but the parameters alive.

    torch drops a parameter's AccumulateGrad node, and what hooks it, where the parameter is converted or moved to
    another kind of device, and back: `missed(param)` is then called in place of `before`, once, with the gradient in
    `.grad` already.

    Attributes:
        factor: Asked before `before` in a backward that carries somebody's loss scale: what the gradient of a parameter
            is to be multiplied by, or None.
        own: Not asked while this is set, of a backward of the optimizer's own.
    """

    factor: weakref.WeakMethod[_Factor] | None = None

    def __init__(self, before: _ParamHook, after: _ParamHook, without: _ParamHook, missed: _ParamHook) -> None:
        self._before = weakref.WeakMethod(before)
        self._after = weakref.WeakMethod(after)
        self._without = weakref.WeakMethod(without)
        self._missed = weakref.WeakMethod(missed)
        self.own = _Own()
        self._handles: list[Any] = []
        # By parameter: its AccumulateGrad node, which it holds only weakly itself.
        self._nodes: MutableMapping[Tensor, tuple[Any, _Arrival]] = WeakIdKeyDictionary()

    def add(self, params: Iterable[Tensor]) -> None:
        """Hook these parameters too."""
        follow: weakref.WeakMethod[Callable[[Tensor], bool]] = weakref.WeakMethod(self.follow_nodes)
        factor: weakref.WeakMethod[_Factor] = weakref.WeakMethod(self._factor_of)
        with torch.inference_mode(False):  # in inference mode there are no autograd nodes
            for param in params:
                leaf, arrival = user_param(param), _Arrival()
                _hooked[leaf] = [*(ref for ref in _hooked.get(leaf, ()) if ref() is not None), weakref.ref(self)]
                after = _after_hook(self._after, self._missed, factor, follow, param, arrival)
                with _trained(leaf):
                    self._hook_node(param, _accumulator(leaf), arrival)
                    self._handles.append(leaf.register_post_accumulate_grad_hook(after))

    def _hook_node(self, param: Tensor, node: Any, arrival: _Arrival) -> None:
        self._nodes[param] = node, arrival
        factor: weakref.WeakMethod[_Factor] = weakref.WeakMethod(self._factor_of)
        self._handles.append(
            node.register_prehook(_before_hook(self._before, self._without, factor, self.own, param, arrival))
        )

    def has(self, param: Tensor) -> bool:
        """Whether a parameter has these hooks, maybe as another optimizer's LocalParam."""
        return any(ref() is self for ref in _hooked.get(user_param(param), ()))

    def is_latest(self, param: Tensor) -> bool:
        """Whether, of all hooks of a parameter that are still there, these were added last, or there are none."""
        alive = [hooks for ref in _hooked.get(user_param(param), ()) if (hooks := ref()) is not None]
        return not alive or alive[-1] is self

    def _factor_of(self, param: Tensor) -> Tensor | None:
        factor = self.factor and self.factor()
        return factor(param) if factor and not self.own.runs else None

    def _factor_of_unfrozen(self, param: Tensor) -> Tensor | None:
        return None if self.has(param) else self._factor_of(param)

    def follow_nodes(self, param: Tensor) -> bool:
        """Whether torch has replaced this parameter's node; all nodes that it has replaced are hooked then."""
        if self._nodes[param][0] is _accumulator(user_param(param)):
            return False
        for other, (known, arrival) in [*self._nodes.items()]:
            with _trained(leaf := user_param(other)):
                node = _accumulator(leaf)
            if node is not known:
                self._hook_node(other, node, arrival)
        return True

    def watch(self, params: Iterable[Tensor], arrived: Callable[[], None]) -> None:
        """Call `arrived()` after each gradient of these, which are frozen now.

        Until they are added, a gradient that carries another optimizer's loss scale raises RuntimeError.
        """
        hook = _watch_hook(weakref.WeakMethod(arrived), weakref.WeakMethod(self._factor_of_unfrozen))
        for param in params:
            if can_be_trained(param):
                param.requires_grad_(True)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                param.requires_grad_(False)

    def remove(self) -> None:
        """Call nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()

    def __del__(self) -> None:
        self.remove()


def can_be_trained(param: Tensor) -> bool:
    """Whether a frozen parameter can be anything else."""
    return param.is_floating_point() and not param.is_inference()


@contextmanager
def _trained(leaf: Tensor) -> Iterator[None]:
    """A context in which a frozen parameter is none: torch shows the nodes of no others, and hooks none."""
    is_trained = leaf.requires_grad
    leaf.requires_grad_(True)
    try:
        yield
    finally:
        leaf.requires_grad_(is_trained)


def _accumulator(leaf: Tensor) -> Any:
    """The AccumulateGrad node. torch finds it through a view, which DTensor refuses where an empty one is split."""
    with torch.enable_grad():  # in a hook there is none
        if leaf.numel():
            return get_gradient_edge(leaf).node
        return leaf.clone().grad_fn.next_functions[0][0]  # type: ignore[union-attr]


class _Own:
    """Whether a scaled backward of the optimizer's own runs: known without a call for each gradient."""

    runs = False


class _Arrival:
    """What the hook before tells the one after: whether there is a gradient, for torch calls both without one, too."""

    has_grad: bool | None = None  # None: the hook before was not called


def _before_hook(
    before: weakref.WeakMethod[_ParamHook],
    without: weakref.WeakMethod[_ParamHook],
    factor_of: weakref.WeakMethod[_Factor],
    own: _Own,
    param: Tensor,
    arrival: _Arrival,
) -> Callable[[Any], None]:
    weak_param = weakref.ref(param)  # the node lives as long as the parameter, and this lives on the node

    def before_hook(grads: Any) -> Any:
        alive, factor = weak_param(), None
        has_grad = grads[0] is not None
        if alive is not None and not has_grad:
            _call_eagerly(without, alive)
        elif alive is not None:
            factor = _call_eagerly(factor_of, alive) if _scaled and not own.runs else None
            _call_eagerly(before, alive)
            if isinstance(alive, LocalParam):
                alive.park()
        arrival.has_grad = has_grad
        if factor is None:
            return None
        return ((grads[0].float() * factor.to(grads[0].device)).to(grads[0].dtype),)  # 16 bits may not hold the factor

    return before_hook


def _after_hook(
    after: weakref.WeakMethod[_ParamHook],
    missed: weakref.WeakMethod[_ParamHook],
    factor_of: weakref.WeakMethod[_Factor],
    follow: weakref.WeakMethod[Callable[[Tensor], bool]],
    param: Tensor,
    arrival: _Arrival,
) -> _ParamHook:
    weak_param = weakref.ref(param)

    def after_hook(leaf: Tensor) -> None:
        alive = weak_param()
        has_grad, arrival.has_grad = arrival.has_grad, None
        if alive is None or has_grad is False:
            return
        is_fsdp = isinstance(alive, LocalParam) and alive.is_fsdp  # their gradients come without the hook before
        if has_grad is None and not is_fsdp and _call_eagerly(follow, alive):
            if _scaled and _call_eagerly(factor_of, alive) is not None:
                raise RuntimeError(
                    "expected a first backward of their own for parameters that were converted or moved and back, got "
                    "one that carries another optimizer's loss scale; clear their gradients and run it again"
                )
            _call_eagerly(missed, alive)
        if isinstance(alive, LocalParam):
            alive.unpark()
        _call_eagerly(after, alive)

    return after_hook


def _watch_hook(arrived: weakref.WeakMethod[Callable[[], None]], factor_of: weakref.WeakMethod[_Factor]) -> _ParamHook:
    def watch_hook(leaf: Tensor) -> None:
        if _scaled and _call_eagerly(factor_of, leaf) is not None:
            raise RuntimeError(
                "expected a first backward of their own for parameters that are no longer frozen, got one that carries "
                "another optimizer's loss scale; clear their gradients, and run a backward and a step of their own "
                "optimizer's loss first"
            )
        _call_eagerly(arrived)

    return watch_hook


def _call(weak_method: weakref.WeakMethod[Callable[..., Any]], *args: Any) -> Any:
    method = weak_method()
    return None if method is None else method(*args)


_call_from_compiled = torch._disable_dynamo(_call)  # type: ignore[attr-defined]


def _call_eagerly(weak_method: weakref.WeakMethod[Callable[..., Any]], *args: Any) -> Any:
    """Compiled autograd traces hooks; ours communicate."""
    return (_call_from_compiled if torch.compiler.is_compiling() else _call)(weak_method, *args)


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
            _call(self._broken_off)

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
        self._prehooks += [behind.register_prehook(lambda grads: _call(weak)) for behind in nodes]

    def _run(self) -> None:
        if self._outermost is not None:
            _call(self._ended)

    def forget(self) -> None:
        """Stop waiting."""
        self._tasks.clear()
        self._outermost = None
        while self._prehooks:
            self._prehooks.pop().remove()


_PYTHON_BACKWARD = BackwardCFunction.apply.__code__


def _outermost_python_node() -> Any:
    """The outermost autograd node written in Python that is running on this thread, or None."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is _PYTHON_BACKWARD:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else found.f_locals["self"]
