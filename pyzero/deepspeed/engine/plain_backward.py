"""Change the gradients of a plain `loss.backward()` where they enter a module: at its outputs.

A hook on each output divides gradients that arrive from outside. Some gradients come from inside and were divided
already: one output may be computed from another (a loss from its logits), or an output may have gone back in as an
input. Their division is undone before the hook that would divide again. Outputs themselves are not changed. If an
output is a view and is edited in place, torch sends its gradient to its base, past the hook. A witness there notices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyzero.deepspeed.engine import tensors

_Edge = tuple[Any, int]  # an autograd node, and which of its outputs
_Undo = Callable[[Tensor], Tensor]

# In a node's metadata:
_BEHIND_OUTPUTS = "pyzero: outputs went into it"  # True or False, once it is known
_WATCHED = "pyzero: watched"  # the outputs of the node that have the hook


def reentering(value: Any) -> set[_Edge]:
    """Return the edges of a module's inputs that were computed from outputs of a watched module."""
    return {_edge(tensor) for tensor in tensors.find(value) if _is_behind_outputs(tensor.grad_fn)}


def watch(
    outputs: Any,
    inputs: set[_Edge],
    hook: Callable[[Tensor], Tensor | None],
    undo: _Undo | None,
    edited: Callable[[], None],
) -> None:
    """Call a hook for each gradient that comes into a module from outside.

    Args:
        outputs: The module's outputs: tensors in tuples, lists, dicts and dataclasses. Other values are ignored.
        inputs: `reentering` of the module's inputs. An input that comes out unchanged gets no hook.
        hook: Called with a gradient at an output.
        undo: Undoes the hook's change of a gradient; None if the hook makes none.
        edited: Called in a backward through an output that is a view and was edited in place, past the hook.
    """
    given = {_edge(t): t for t in tensors.find(outputs) if t.grad_fn is not None and _edge(t) not in inputs}
    again = {edge for edge in given if edge[1] in edge[0].metadata.get(_WATCHED, ())}  # kept by the module
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
    witness.data = witness.new_empty(0)  # frees the memory; the version is still shared with the tensor
    version = witness._version
    base.register_hook(lambda grad: edited() if witness._version != version else None)


def _edge(tensor: Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def _is_behind_outputs(start: Any) -> bool:
    """Whether a node was computed from watched outputs. Remembers the result for each node."""
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
                    other.metadata.pop(_BEHIND_OUTPUTS)  # unknown, because the search stops here
            return True
        if is_behind is None:
            node.metadata[_BEHIND_OUTPUTS] = False
            seen.append(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def _consumers(nodes: set[Any], ends: set[_Edge], wanted: set[_Edge]) -> dict[Any, list[int]]:
    """Return the nodes of a module's graph that send gradients along a wanted edge, each with the indices that do.

    A thread numbers nodes in the order in which it makes them, so the search stops at nodes before the first wanted
    one. It may miss nodes if a forward makes them in several threads.
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
