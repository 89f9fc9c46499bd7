"""Access to fully_shard's private records, in one file, so that a new torch can break only this file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class FsdpParamUse(NamedTuple):
    """Where a parameter that fully_shard has sharded is used."""

    owner: Any  # the module that gathers it
    module: nn.Module  # the module that holds it
    name: str  # in `module`
    record: Any  # torch's record


def _fsdp_records() -> Iterator[tuple[Any, Any]]:
    """Yield (module that gathers, torch's record) of each parameter that fully_shard has sharded.

    Reads torch's list of modules, because the collector does not list objects from before `gc.freeze()`.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule  # the import takes half a second

    for module in list(_module_state_mapping):
        if FSDPModule in type(module).__mro__:
            for record in fsdp_records(module):
                yield module, record


def fsdp_groups(module: Any) -> list[Any]:
    """Return torch's records of what one module of fully_shard gathers at once; empty for other modules."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; 2.11 has only one group
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group]


def find_fsdp_params() -> dict[Tensor, FsdpParamUse]:
    """Return where each parameter that fully_shard has sharded is used.

    Raises:
        RuntimeError: This torch keeps other records.
    """
    found = {
        record.sharded_param: FsdpParamUse(owner, record._module_info.module, record._module_info.param_name, record)
        for owner, record in _fsdp_records()
    }
    if not all(hasattr(use.record, "_sharded_param_data") for use in found.values()):
        raise RuntimeError(
            f"expected fully_shard to keep its shards in _sharded_param_data, as torch 2.11 to 2.15 do, got torch "
            f"{torch.__version__}, which does not; install one of these"
        )
    return found


def find_left_whole(params: Iterable[Tensor]) -> dict[int, tuple[Tensor, FsdpParamUse]]:
    """Return the parameters among these that fully_shard has gathered: by id, the shard of each and its use."""
    wanted = {id(param) for param in params}
    uses = find_fsdp_params() if "torch.distributed.fsdp" in sys.modules else {}
    found = ((id(getattr(use.record, "_unsharded_param", None)), (shard, use)) for shard, use in uses.items())
    return {number: of_shard for number, of_shard in found if number in wanted}


def fsdp_records(owner: Any) -> list[Any]:
    """Return torch's record of each parameter that one module of fully_shard gathers."""
    return [record for group in fsdp_groups(owner) for record in group.fsdp_params]


@contextmanager
def whole_state_dicts(owners: Iterable[Any]) -> Iterator[None]:
    """A context in which these modules' state dicts have copies of the whole weights that fully_shard has gathered.

    It removes torch's hook, which would reshard first. Nothing is sent, so one rank may use it alone.
    """
    handles: dict[Any, Any] = {}
    for owner in owners:
        for group in fsdp_groups(owner):
            handles.update(group._module_to_pre_save_state_dict_hook_handle)
    taken = {module: module._state_dict_pre_hooks.pop(handle.id) for module, handle in handles.items()}
    copies = [module.register_state_dict_post_hook(_copy_own) for module in taken]
    try:
        yield
    finally:
        for copy in copies:
            copy.remove()
        for module, hook in taken.items():
            module._state_dict_pre_hooks[handles[module].id] = hook


def _copy_own(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in module._parameters:
        if isinstance(state.get(prefix + name), Tensor):
            state[prefix + name] = state[prefix + name].clone()


@torch.no_grad()
def put_shards(model: nn.Module, shards: dict[str, Tensor]) -> None:
    """Set this rank's rows of parameters that fully_shard made of meta tensors. shards: By name, unpadded."""
    params = dict(model.named_parameters(remove_duplicate=False))
    of_param = {params[name]: local for name, local in shards.items()}
    for module in model.modules():
        for record in fsdp_records(module):
            old = record.sharded_param
            if old in of_param:
                device = torch.device("cpu") if record.offload_to_cpu else record.device
                local = record.to_sharded_dtensor(of_param[old].to(device))
                record._setattr_on_modules(nn.Parameter(local, requires_grad=old.requires_grad))
                record.reset_sharded_param()  # torch's method; it pads


def begin_forward(root: Any) -> bool:
    """Gather a module's weights as fully_shard does before its forward. Return whether this was done.

    In a forward or backward of the module it does nothing. torch is passed no inputs, so it does not reshard when their
    gradients come, because modules before this one may use the same weights in backward.
    """
    state = root._get_fsdp_state()
    if state._training_state.name != "IDLE":
        return False
    state._pre_forward(root, (None,), {})  # on a GPU, torch before 2.13 needs an argument, which it would move there
    return True


def end_forward(root: Any, output: Any) -> Any:
    """End the forward that `begin_forward` began. Return the output, with torch's hooks for the backward."""
    return root._get_fsdp_state()._post_forward(root, (), output)


def reshard(model: nn.Module) -> None:
    """Make fully_shard's modules hold shards again. After a forward without a backward some hold whole weights."""
    module: Any
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()


@contextmanager
def without_gradient_sync(model: nn.Module) -> Iterator[None]:
    """A context in which fully_shard's modules keep whole gradients. The next backward outside sends them."""
    quieted: list[Any] = [  # without modules that an enclosing context has quieted
        module for module in model.modules() if any(group.reduce_grads for group in fsdp_groups(module))
    ]
    for group in (group for module in quieted for group in fsdp_groups(module)):
        _mend_accumulation(group.fsdp_params)
    for module in quieted:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in quieted:
            module.set_requires_gradient_sync(True, recurse=False)


def _mend_accumulation(records: list[Any]) -> None:
    """Let the weights of one group be used in some of the backwards of an accumulation only.

    Under no_sync(), torch fails on a weight that no forward has gathered yet. After it, torch fails if some gradients
    of a group have been accumulated, in the dtype of the reduction, and others have just come.
    """

    def keep(record: Any) -> None:
        if hasattr(record, "_unsharded_param"):
            type(record).to_accumulated_grad_if_needed(record)

    def add(record: Any) -> None:
        type(record).accumulate_unsharded_grad_if_needed(record)
        if any(other.unsharded_accumulated_grad is not None for other in records):
            keep(record)

    for record in records:
        record.to_accumulated_grad_if_needed = partial(keep, record)
        record.accumulate_unsharded_grad_if_needed = partial(add, record)


def has_unsent_gradients(model: nn.Module) -> bool:
    """Whether fully_shard's modules keep whole gradients that have not been sent."""
    return any(_kept_gradients(model))


def drop_unsent_gradients(model: nn.Module) -> None:
    """Drop the whole gradients that fully_shard's modules keep."""
    for record in _kept_gradients(model):
        record.unsharded_param.grad = None
        if record.unsharded_accumulated_grad is not None:  # up to torch 2.14 not the same as .grad
            record.unsharded_accumulated_grad = None


def is_backward_broken(model: nn.Module) -> bool:
    """Whether an exception has broken off a backward of fully_shard's modules, which torch then takes to be running."""
    return torch._C._current_graph_task_id() == -1 and any(_broken_roots(model))


def end_broken_backward(model: nn.Module) -> None:
    """Make fully_shard's modules ready again after `is_backward_broken`. Drops the whole gradients that they keep."""
    if is_backward_broken(model):
        for root in _broken_roots(model):
            callback = root._get_fsdp_state()._root_post_backward_final_callback
            with without_gradient_sync(model):
                getattr(root, "reset_iter_state", callback)()  # torch 2.13
        drop_unsent_gradients(model)


def _broken_roots(model: nn.Module) -> Iterator[Any]:
    """Yield the roots of fully_shard's modules whose callback at the end of a backward has not run."""
    return (root for root in _roots(model) if root._get_fsdp_state()._state_ctx.post_backward_final_callback_queued)


def end_broken_forward(model: nn.Module) -> None:
    """Make fully_shard's modules ready again after a forward that has raised. They hold shards then."""
    if torch._C._current_graph_task_id() != -1:
        return  # in a backward, which goes on
    for root in _roots(model):
        state = root._get_fsdp_state()
        if hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()
            continue
        for one in state._state_ctx.all_states:
            for part in (one, *fsdp_groups(one._modules[0])):
                part._training_state = type(part._training_state).IDLE
        reshard(root)


def _roots(model: nn.Module) -> Iterator[Any]:
    """Yield the modules of fully_shard that are in no other one."""
    module: Any
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state") and module._get_fsdp_state()._is_root:
            yield module


def _kept_gradients(model: nn.Module) -> Iterator[Any]:
    for record in (record for module in model.modules() for record in fsdp_records(module)):
        if hasattr(record, "_unsharded_param"):  # gathered once
            if record.unsharded_accumulated_grad is not None or record.unsharded_param.grad is not None:
                yield record
