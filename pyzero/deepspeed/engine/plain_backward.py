"""A plain `loss.backward()` through a module: known by where it enters, at the module's outputs.

A hook on each output divides what arrives from outside. A gradient from inside, of an output that another is made of (a
loss and its logits), or that leaves for outputs which were given back in, was divided already: it is undone before
the hook that would divide again. Outputs are handed out as they are; of one that is a view torch takes an edit in place
to its base, past the hook, so that a witness there tells of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyzero.deepspeed.engine import tensors

_Edge = tuple[Any, int]  # an autograd node, and which of its outputs
_Undo = Callable[[Tensor], Tensor]

# In a node's metadata:
_BEHIND_OUTPUTS = "pyzero: outputs went into it"  # True or False, once that is known
_WATCHED = "pyzero: watched"  # which of its outputs have the hook


def reentering(value: Any) -> set[_Edge]:
    """Of the tensors that go into a module, those that outputs of a watched module went into."""
    return {_edge(tensor) for tensor in tensors.find(value) if _is_behind_outputs(tensor.grad_fn)}


def watch(
    outputs: Any,
    inputs: set[_Edge],
    hook: Callable[[Tensor], Tensor | None],
    undo: _Undo | None,
    edited: Callable[[], None],
) -> None:
    """Have a hook called for each gradient that comes into a module from outside.

    Args:
        outputs: What the module gave: tensors in tuples, lists, dicts and dataclasses, and what else there is.
        inputs: `reentering` of what it was given. One that comes out as it is gets no hook.
        hook: Of a gradient at an output.
        undo: What takes back the hook's change of a gradient, where it makes one.
        edited: Called in a backward through a view that was edited in place since, whose gradients go past the hook.
    """
    given = {_edge(t): t for t in tensors.find(outputs) if t.grad_fn is not None and _edge(t) not in inputs}
    again = {
        (node, number) for node, number in given if number in node.metadata.get(_WATCHED, ())
    }  # kept by the module
    found = {edge: tensor for edge, tensor in given.items() if edge not in again}
    for (node, number), tensor in found.items():
        node.metadata.setdefault(_WATCHED, set()).add(number)
        node.metadata[_BEHIND_OUTPUTS] = True
        tensor.register_hook(hook)
        base = tensor._base
        if base is not None and base.grad_fn is not None and _edge(base) not in given and type(tensor) is Tensor:
            _tell_of_edits(tensor, base, edited)
    ends = inputs | again
    if undo is not None and found and len(found) + len(ends) > 1:
        for node, indices in _consumers({node for node, _ in found}, ends, {*found, *ends}).items():
            node.register_hook(_undoing(indices, undo))


def _tell_of_edits(tensor: Tensor, base: Tensor, edited: Callable[[], None]) -> None:
    witness = tensor.detach()
    witness.data = witness.new_empty(0)  # without the memory; it goes on sharing the tensor's version
    version = witness._version
    base.register_hook(lambda grad: edited() if witness._version != version else None)


def _edge(tensor: Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def _is_behind_outputs(start: Any) -> bool:
    """Whether outputs went into a node. What was looked at once is not looked at again."""
    waiting: list[Any] = [start]
    seen: list[Any] = []
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        is_behind = node.metadata.get(_BEHIND_OUTPUTS)
        if is_behind:
            start.metadata[_BEHIND_OUTPUTS] = True
            for other in seen:
                if other is not start:
                    other.metadata.pop(_BEHIND_OUTPUTS)  # not known: the search has not come to its end
            return True
        if is_behind is None:
            node.metadata[_BEHIND_OUTPUTS] = False
            seen.append(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def _consumers(nodes: set[Any], ends: set[_Edge], wanted: set[_Edge]) -> dict[Any, list[int]]:
    """The nodes of a module's graph whose gradients go along a wanted edge, and which of these do.

    A thread numbers nodes as it makes them, so that none behind the first wanted one has to be looked at. Those that a
    forward makes in several threads may not be found.
    """
    first = min(node._sequence_nr() for node, _ in wanted)
    found: dict[Any, list[int]] = {}
    seen, waiting = {*nodes}, [*nodes]
    while waiting:
        node = waiting.pop()
        for index, (behind, number) in enumerate(node.next_functions):
            if (behind, number) in wanted:
                found.setdefault(node, []).append(index)
            is_inside = behind is not None and behind not in seen and (behind, number) not in ends
            if is_inside and behind._sequence_nr() > first:
                seen.add(behind)
                waiting.append(behind)
    return found


def _undoing(indices: list[int], undo: _Undo) -> Callable[[Any, Any], tuple[Tensor | None, ...]]:
    def undo_some(grads: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        changed = list(grads)
        for index in indices:
            grad = grads[index]
            changed[index] = None if grad is None else undo(grad)
        return tuple(changed)

    return undo_some
