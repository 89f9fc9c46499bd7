"""A loss divided by the number of accumulation steps, whatever its backward is called with.

Where `engine.backward` and `engine.scale` divide the loss itself, nothing else is to be done. A plain `loss.backward()`
is known by where it enters a module: each output that forward hands out goes through a node that divides, and inside
the module no gradient does. Where outputs go into a module again, a node ahead of it multiplies back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyzero.deepspeed.engine import tensors

_Function = Callable[[Tensor], Tensor]


class _Backward:
    """The one that runs, where its loss was divided: by which engine. It may go through several."""

    _owner: object = None  # in `divided()`
    _root: tuple[int, object] = (-1, None)  # torch's number of the last that began at a tensor of `begins_divided`

    @classmethod
    def owner(cls) -> object:
        """None: its loss is not divided."""
        task, owner = cls._root
        if cls._owner is not None:
            return cls._owner
        return owner if torch._C._current_graph_task_id() == task else None

    @classmethod
    @contextmanager
    def of(cls, owner: object) -> Iterator[None]:
        before, cls._owner = cls._owner, owner
        try:
            yield
        finally:
            cls._owner = before

    @classmethod
    def begin(cls, owner: object) -> None:
        cls._root = torch._C._current_graph_task_id(), owner


def divided(owner: object) -> AbstractContextManager[None]:
    """Around the backward of a loss that the owner has divided."""
    return _Backward.of(owner)


def begins_divided(loss: Tensor, owner: object) -> Tensor:
    """The loss, which the owner has divided, and of which the caller runs backward."""
    if loss.requires_grad:
        loss.register_hook(lambda grad: _Backward.begin(owner))
    return loss


def outputs(value: Any, num_steps: Callable[[], int], check: Callable[[object], None]) -> Any:
    """What a module's forward gave, as it is to be handed out.

    Args:
        value: Tensors in tuples, lists, dicts and dataclasses, and what else there is. It is not written.
        num_steps: What to divide by.
        check: Called in a backward with who has divided its loss, or None; may raise.
    """

    def divide(grad: Tensor) -> Tensor:
        owner = _Backward.owner()
        check(owner)
        return grad / num_steps() if owner is None else grad

    return tensors.map_outputs(value, lambda tensor: _entry(tensor, divide))


def inputs(value: Any, num_steps: Callable[[], int]) -> Any:
    """What goes into a module's forward: of outputs, the gradients are as outside of it."""

    def multiply(grad: Tensor) -> Tensor:
        return grad * num_steps() if _Backward.owner() is None else grad

    if not any(_is_of_outputs(tensor) for tensor in tensors.find(value)):
        return value
    return tensors.map_outputs(value, lambda tensor: _entry(tensor, multiply) if _is_of_outputs(tensor) else tensor)


def _is_of_outputs(tensor: Tensor) -> bool:
    """Whether outputs went into its computation."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, _Entry._backward_cls):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _entry(tensor: Tensor, function: _Function) -> Tensor:
    entry: Tensor = _Entry.apply(tensor, function)  # type: ignore[no-untyped-call]
    return entry


class _Entry(torch.autograd.Function):
    """The tensor itself, whose gradient goes through a function. An edit in place is one of the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: _Function) -> Tensor:
        ctx.function = function
        return tensor.detach()  # not a view here, which could not be edited; with the tensor's version

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.function(grad), None
