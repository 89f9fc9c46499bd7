"""Copies of an optimizer on one rank, by copy.deepcopy and pickle: their content, and how to rebuild an optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from multiprocessing import context
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyzero.comm.process import rank_and_size
from pyzero.sharding.buckets import MASTER
from pyzero.sharding.local_param import local_of, user_param

if TYPE_CHECKING:
    from pyzero.optimizer import ZeroOptimizer


def contents(optimizer: ZeroOptimizer, num_ranks: int, trained: list[Tensor]) -> dict[str, Any]:
    """Return what a copy is built from: groups with the parameters, the trained parameters, and the state as bytes.

    Args:
        optimizer: The optimizer to copy.
        num_ranks: Number of ranks that hold its state.
        trained: The parameters that have state; some may be frozen by now.

    Raises:
        TypeError: A copy would be wrong. The message says what to do instead.
    """
    name = type(optimizer).__name__
    if num_ranks > 1 or rank_and_size()[1] > 1:
        raise TypeError(
            f"expected {name} to be pickled or deep-copied on one rank, got several, whose process group a copy would "
            f"lose; save state_dict(), build another over the copied model, and load it"
        )
    if context.get_spawning_popen() is not None:
        raise TypeError(
            f"expected arguments that can be shared with a new process, got {name}, which moves parameters out of "
            f"shared memory; pass the model and state_dict(), and build another in the process"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(param.grad is not None and not isinstance(param, nn.Parameter) for param in params):
        raise TypeError(
            f"expected parameters without .grad, or torch.nn.Parameters, whose copies have none, got plain tensors "
            f"with gradients, whose loss scale and clipping {name} cannot copy; call zero_grad() first"
        )
    state = io.BytesIO()
    torch.save(optimizer.full_state_dict(), state)
    return {
        "groups": [_as_given(optimizer, index) for index in range(len(optimizer.param_groups))],
        "trained": [user_param(param) for param in trained],
        "state": state.getvalue(),
    }


def _as_given(optimizer: ZeroOptimizer, index: int) -> dict[str, Any]:
    """Return a group as an optimizer takes it, with (name, parameter) pairs. The state has the group's other keys."""
    group = optimizer.param_groups[index]
    params = group["params"]
    if "param_names" in group:  # parameters that were appended may have none of their own
        params = [(optimizer._name(index, position), param) for position, param in enumerate(params)]
    options = {key: group[key] for key in optimizer.defaults if key in group}
    return {"params": params, **options, **optimizer._options_for_rule(index)}


def give_memory(params: Iterable[Tensor]) -> None:
    """Move parameters to other memory. The unpickler's tensors share theirs, and the optimizer would warn of that."""
    for param in params:
        param.data = param.data.clone()


def restore(optimizer: ZeroOptimizer, state: bytes) -> None:
    """Load the state into a copy.

    Raises:
        TypeError: The unpickler has not read the parameters' values yet.
    """
    state_dict = torch.load(io.BytesIO(state), weights_only=False)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, values in state_dict["state"].items():
        weight = local_of(params[number].detach()).cpu()
        if not torch.equal(local_of(values[MASTER]).to(weight.dtype).nan_to_num(), weight.nan_to_num()):
            raise TypeError(
                "expected parameters that are read before their optimizer, got other values than were saved with it, "
                "as torch.save(..., _use_new_zipfile_serialization=False) reads them last; save in torch's present "
                "format, or state_dict()"
            )
    optimizer.load_state_dict(state_dict)
