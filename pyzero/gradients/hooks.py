"""Autograd hooks before and after each parameter's gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from pyzero.gradients.carried_scale import scaled_backwards
from pyzero.sharding.local_param import LocalParam, user_param

_Factor = Callable[[Tensor], Tensor | None]

_hooked: MutableMapping[Tensor, list[weakref.ref[Any]]] = WeakIdKeyDictionary()  # by parameter: the GradientHooks


class GradientListener(Protocol):
    """The methods that GradientHooks call in a backward. torch.autograd.grad adds to no `.grad` and calls none."""

    def before_gradient(self, param: Tensor) -> None:
        """Called before backward adds a gradient to `.grad`."""

    def after_gradient(self, param: Tensor) -> None:
        """Called after backward has added a gradient to `.grad`."""

    def without_gradient(self, param: Tensor) -> None:
        """Called instead of before_gradient and after_gradient if an autograd function returns None, not a gradient."""

    def missed_gradient(self, param: Tensor) -> None:
        """Called once instead of `before_gradient`, when the gradient is in `.grad` already.

        If a parameter is converted or moved to another kind of device, and back, torch drops its AccumulateGrad node
        with its hooks.
        """

    def after_unfrozen(self) -> None:
        """Called after each gradient of a parameter that was frozen when it was watched."""


class GradientHooks:
    """The hooks of one listener on its parameters. They keep only the parameters alive.

    Attributes:
        rescale: Called before `before_gradient` in a backward that carries a loss scale. Returns the factor for the
            parameter's gradient, or None.
        own_backward: While it is set, a backward of the optimizer's own runs, and `rescale` is not called.
    """

    rescale: weakref.WeakMethod[_Factor] | None = None

    def __init__(self, listener: GradientListener) -> None:
        self._listener = weakref.ref(listener)
        self.own_backward = _OwnBackward()
        self._handles: list[Any] = []
        # By parameter: its AccumulateGrad node. The parameter itself holds it only weakly.
        self._nodes: MutableMapping[Tensor, tuple[Any, _Arrival]] = WeakIdKeyDictionary()

    def add(self, params: Iterable[Tensor]) -> None:
        """Hook these parameters too."""
        with torch.inference_mode(False):  # in inference mode there are no autograd nodes
            for param in params:
                leaf, arrival = user_param(param), _Arrival()
                _hooked[leaf] = [*(ref for ref in _hooked.get(leaf, ()) if ref() is not None), weakref.ref(self)]
                with trained(leaf):
                    self._hook_node(param, _accumulator(leaf), arrival)
                    after = _after_hook(self, self._listener, param, arrival)
                    self._handles.append(leaf.register_post_accumulate_grad_hook(after))

    def _hook_node(self, param: Tensor, node: Any, arrival: _Arrival) -> None:
        self._nodes[param] = node, arrival
        self._handles.append(node.register_prehook(_before_hook(self, self._listener, param, arrival)))

    def has(self, param: Tensor) -> bool:
        """Whether a parameter has these hooks. A DTensor also has those of every LocalParam that stands for it."""
        return any(ref() is self for ref in _hooked.get(user_param(param), ()))

    def is_latest(self, param: Tensor) -> bool:
        """Whether no other living GradientHooks were added to the parameter after these."""
        alive = [hooks for ref in _hooked.get(user_param(param), ()) if (hooks := ref()) is not None]
        return not alive or alive[-1] is self

    def factor_of(self, param: Tensor) -> Tensor | None:
        """Return what `rescale` returns, or None in a backward of the optimizer's own."""
        rescale = self.rescale and self.rescale()
        return rescale(param) if rescale and not self.own_backward.runs else None

    def factor_of_unfrozen(self, param: Tensor) -> Tensor | None:
        """Return `factor_of` for a watched parameter; None if it has been added since it was watched."""
        return None if self.has(param) else self.factor_of(param)

    def follow_nodes(self, param: Tensor) -> bool:
        """Whether torch has replaced this parameter's node. If so, hook all nodes that it has replaced."""
        if self._nodes[param][0] is _accumulator(user_param(param)):
            return False
        for other, (known, arrival) in [*self._nodes.items()]:
            with trained(leaf := user_param(other)):
                node = _accumulator(leaf)
            if node is not known:
                self._hook_node(other, node, arrival)
        return True

    def watch(self, params: Iterable[Tensor]) -> None:
        """Call `after_unfrozen()` after each gradient of these parameters, which are frozen now.

        Until they are added, a gradient that carries another optimizer's loss scale raises RuntimeError.
        """
        hook = _watch_hook(self, self._listener)
        for param in params:
            if can_be_trained(param):
                with trained(param):
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Call nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()

    def __del__(self) -> None:
        self.remove()


def can_be_trained(param: Tensor) -> bool:
    """Whether a frozen parameter can be trained at all."""
    return param.is_floating_point() and not param.is_inference()


@contextmanager
def trained(*params: Tensor) -> Iterator[None]:
    """A context in which parameters require grad. torch shows and hooks only the nodes of such parameters."""
    frozen = [param for param in params if not param.requires_grad]
    for param in frozen:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


def _accumulator(leaf: Tensor) -> Any:
    """Return the AccumulateGrad node. torch finds it through a view, but cannot view an empty, split DTensor."""
    with torch.enable_grad():  # a hook runs without it
        if leaf.numel():
            return get_gradient_edge(leaf).node
        return leaf.clone().grad_fn.next_functions[0][0]  # type: ignore[union-attr]


class _OwnBackward:
    """Whether a scaled backward of the optimizer's own runs. An attribute costs less than a call per gradient."""

    runs = False


class _Arrival:
    """Tells `after_hook` whether `before_hook` saw a gradient. torch calls both even without a gradient."""

    has_grad: bool | None = None  # None: `before_hook` was not called


def _before_hook(
    hooks: GradientHooks, weak_listener: weakref.ref[GradientListener], param: Tensor, arrival: _Arrival
) -> Callable[[Any], Any]:
    # Weak: this hook lives on the node, which lives as long as the parameter.
    weak_hooks, weak_param, own_backward = weakref.ref(hooks), weakref.ref(param), hooks.own_backward

    def before_hook(grads: Any) -> Any:
        alive, factor = weak_param(), None
        has_grad = grads[0] is not None
        if alive is not None and not has_grad:
            _call_eagerly(weak_listener, "without_gradient", alive)
        elif alive is not None:
            if scaled_backwards and not own_backward.runs:
                factor = _call_eagerly(weak_hooks, "factor_of", alive)
            _call_eagerly(weak_listener, "before_gradient", alive)
            if isinstance(alive, LocalParam):
                alive.park()
        arrival.has_grad = has_grad
        if factor is None:
            return None
        return ((grads[0].float() * factor.to(grads[0].device)).to(grads[0].dtype),)  # 16 bits may not hold the factor

    return before_hook


def _after_hook(
    hooks: GradientHooks, weak_listener: weakref.ref[GradientListener], param: Tensor, arrival: _Arrival
) -> Callable[[Tensor], None]:
    weak_hooks, weak_param = weakref.ref(hooks), weakref.ref(param)

    def after_hook(leaf: Tensor) -> None:
        alive = weak_param()
        has_grad, arrival.has_grad = arrival.has_grad, None
        if alive is None or has_grad is False:
            return
        is_fsdp = isinstance(alive, LocalParam) and alive.is_fsdp  # their gradients come without the hook before
        if has_grad is None and not is_fsdp and _call_eagerly(weak_hooks, "follow_nodes", alive):
            if scaled_backwards and _call_eagerly(weak_hooks, "factor_of", alive) is not None:
                raise RuntimeError(
                    "expected a first backward of their own for parameters that were converted or moved and back, got "
                    "one that carries another optimizer's loss scale; clear their gradients and run it again"
                )
            _call_eagerly(weak_listener, "missed_gradient", alive)
        if isinstance(alive, LocalParam):
            alive.unpark()
        _call_eagerly(weak_listener, "after_gradient", alive)

    return after_hook


def _watch_hook(hooks: GradientHooks, weak_listener: weakref.ref[GradientListener]) -> Callable[[Tensor], None]:
    weak_hooks = weakref.ref(hooks)

    def watch_hook(leaf: Tensor) -> None:
        if scaled_backwards and _call_eagerly(weak_hooks, "factor_of_unfrozen", leaf) is not None:
            raise RuntimeError(
                "expected a first backward of their own for parameters that are no longer frozen, got one that carries "
                "another optimizer's loss scale; clear their gradients, and run a backward and a step of their own "
                "optimizer's loss first"
            )
        _call_eagerly(weak_listener, "after_unfrozen")

    return watch_hook


def _call(listener: Any, method: str, *args: Any) -> Any:
    return getattr(listener, method)(*args)


_call_from_compiled = torch._disable_dynamo(_call)  # type: ignore[attr-defined]


def _call_eagerly(weak: weakref.ref[Any], method: str, *args: Any) -> Any:
    """Call a method of an object and return its result, or return None if the object is gone.

    Outside of compiled autograd, which traces hooks, because these hooks communicate.
    """
    alive = weak()
    if alive is None:
        return None
    return (_call_from_compiled if torch.compiler.is_compiling() else _call)(alive, method, *args)
