"""Collects the content of a checkpoint, by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from pyzero.checkpoint.export import memory_identity
from pyzero.checkpoint.files import CheckpointError
from pyzero.optimizer import ZeroOptimizer
from pyzero.rank_state.notes import RULE, SCALER, ZERO
from pyzero.sharding.buckets import MASTER
from pyzero.sharding.fsdp import reshard
from pyzero.sharding.local_param import box_of, is_dtensor, local_of

EXCLUDED = "excluded"  # in common.pt: names of frozen parameters that were left out
PARTS = "parts"  # in common.pt: over how many model-parallel ranks layers split weights; 0: weights are whole


def names_of(model: nn.Module, optimizer: ZeroOptimizer) -> dict[Tensor, str]:
    """Return the names of the optimizer's parameters. They lack the prefixes that DDP and torch.compile add.

    These are the names that torch.distributed.checkpoint uses.

    The name of this rank's part of a split weight ends with the rank: `up.weight@1`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model as a module, got {type(model).__name__}; pass the model, not its state dict")
    reshard(model)
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    lacking = len(ours - set(model.parameters()))
    if lacking:
        raise ValueError(
            f"expected a model that holds the optimizer's parameters, got one without {lacking} of {len(ours)}; pass "
            f"the model that the optimizer was built over"
        )
    parts = _parts(model, optimizer)
    found = {p: next(iter(_fqns(model, name))) for name, p in model.named_parameters() if p in ours}
    return {param: parts.get(name, name) for param, name in found.items()}


def _fqns(model: nn.Module, name: str) -> set[str]:
    """Return the names of a parameter that torch.distributed.checkpoint uses, without prefixes of DDP and others."""
    from torch.distributed.checkpoint.state_dict import _get_fqns  # no public name gives what get_state_dict uses

    return _get_fqns(model, name)


def _parts(model: nn.Module, optimizer: ZeroOptimizer) -> dict[str, str]:
    """Return the names of weights that model-parallel layers split by hand, each with the name of this rank's part.

    Megatron's attribute `tensor_model_parallel` marks them. `model_parallel` also marks a pipeline stage's own weights.
    """
    rank = optimizer.model_parallel_rank
    if rank is None:
        return {}
    params = model.named_parameters(remove_duplicate=False)
    marked = (name for name, param in params if getattr(param, "tensor_model_parallel", False))
    return {fqn: f"{fqn}@{rank}" for name in marked for fqn in _fqns(model, name)}


def check_parts(model: nn.Module, optimizer: ZeroOptimizer, num_saved: int, folder: Path) -> None:
    """Check that the model's weights are split over as many ranks as a checkpoint's. num_saved: 0 if those are whole.

    Raises:
        CheckpointError: The numbers differ.
    """
    size = optimizer.model_parallel_size
    if num_saved and num_saved != size:
        raise CheckpointError(
            f"expected a model_parallel_group of {num_saved} ranks, as when {folder} was saved, got {size}: parts that "
            f"layers split by hand are not split anew; load it on {num_saved}, or split the model with torch's "
            f"parallelize_module, whose checkpoints load on any number"
        )
    if not num_saved and _parts(model, optimizer):
        raise CheckpointError(
            f"expected a checkpoint of weights in {size} parts, got one of whole weights in {folder}; load it without "
            f"model parallelism, or split the model with torch's parallelize_module"
        )


def _frozen(model: nn.Module, optimizer: ZeroOptimizer, trained: Collection[str]) -> set[str]:
    """Return the names of parameters that are not trained; of tied parameters, all names."""
    frozen = (name for name, param in model.named_parameters(remove_duplicate=False) if not param.requires_grad)
    parts = _parts(model, optimizer)
    return {parts.get(fqn, fqn) for name in frozen for fqn in _fqns(model, name)} - set(trained)


def _own_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that are not DTensors, and so may differ between ranks."""
    own = (name for name, buffer in model.named_buffers(remove_duplicate=False) if not is_dtensor(buffer))
    return {fqn for name in own for fqn in _fqns(model, name)}


def model_state(model: nn.Module, optimizer: ZeroOptimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the model's parameters and buffers by name, not copied, and the extra state of its modules.

    Raises:
        CheckpointError: A rank's part of a DTensor is several boxes.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model)
    suffix = _EXTRA_STATE_KEY_SUFFIX
    extra = {n: v for n, v in state.items() if not torch.is_tensor(v) or n.split(".")[-1] == suffix}
    parts = _parts(model, optimizer)
    tensors = {parts.get(name, name): value for name, value in state.items() if name not in extra}
    _check_boxes(tensors)
    return tensors, extra


def _check_boxes(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            try:
                box_of(tensor)
            except ValueError as error:
                raise CheckpointError(f"{name} fits no checkpoint: {error}") from None


def own_tensors(model: nn.Module, optimizer: ZeroOptimizer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a load writes for the names of `state`, from model_state: the model's own parameters and buffers.

    The tensors in `state` may be copies, if the model has a state_dict() of its own. It may have other names too. Those
    are left out if the tensors are made anew in each call, so that nothing can be loaded into them.
    """
    parts = _parts(model, optimizer)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {parts.get(fqn, fqn): tensor for name, tensor in named for fqn in _fqns(model, name)}
    own = {name: own[name] for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    others = state.keys() - own.keys()
    again = model_state(model, optimizer)[0] if others else {}
    return own | {name: state[name] for name in others if name in again and _is_in_place(again[name], state[name])}


def _is_in_place(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors, or their local tensors, are the same memory."""
    return memory_identity(local_of(tensor)) == memory_identity(local_of(other))


def set_extra_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Set the extra state of modules. state: By torch.distributed.checkpoint's names; it may lack some modules.

    load_state_dict is not used, because torch 2.6 requires every weight in it if DDP or torch.compile adds prefixes.
    """
    for name, module in model.named_modules(remove_duplicate=False) if state else ():
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            (fqn,) = _fqns(model, f"{name}.{_EXTRA_STATE_KEY_SUFFIX}".removeprefix("."))
            if fqn in state:
                module.set_extra_state(state[fqn])


@dataclass
class Content:
    """This rank's content of a checkpoint."""

    state: dict[str, Any]  # {"model": ..., "optim": ...}, as torch.distributed.checkpoint's get_state_dict() gives
    common: dict[str, Any]  # parameter groups by name, the model's extra state, lists of names; rank 0's is saved
    extra: dict[str, Any]
    part: Part | None = None  # this rank's, if other ranks have other parameters of the model
    buffers: Sequence[str] = ()  # names in "model" of tensors that may differ between ranks; the first rank's are saved


@dataclass
class Part:
    """The part of a model that one model-parallel rank has."""

    index: int  # of the rank among the model-parallel ranks
    owned: list[str]  # names of the parameters that this rank alone saves
    common: dict[str, Any]  # Content.common for this rank's parameters


def collect(model: nn.Module, optimizer: ZeroOptimizer, extra: dict[str, Any], excludes_frozen: bool) -> Content:
    """Return all that this rank saves, not copied. excludes_frozen: Leave out parameters that are not trained."""
    names = names_of(model, optimizer)
    tensors, others = model_state(model, optimizer)
    state = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [
        {
            **{key: value for key, value in group.items() if key not in (ZERO, RULE)},
            "params": [names[params[i]] for i in group["params"]],
        }
        for group in state["param_groups"]
    ]
    values = {names[params[i]]: dict(of_param) for i, of_param in state["state"].items()}
    for param, name in names.items():
        has_master = param.dtype == torch.float32 and name in values
        if has_master and name in tensors and _is_in_place(tensors[name], param):  # not a copy, which may be rounded
            del values[name][MASTER]  # an fp32 weight is its own master
    index = optimizer.model_parallel_rank
    owned = list(names.values())
    if index is not None:
        owned = [name for param, name in names.items() if optimizer._topology.owns(param)]
        lent = set(names.values()) - set(owned)
        values = {name: value for name, value in values.items() if name not in lent}
        tensors = {name: value for name, value in tensors.items() if name not in lent}
    excluded = _frozen(model, optimizer, values) if excludes_frozen else set()
    tensors = {name: value for name, value in tensors.items() if name not in excluded}
    _check_layouts(tensors)
    first: dict[tuple[object, ...], str] = {}
    tied = {n: first.setdefault(memory_identity(local_of(v)), n) for n, v in tensors.items() if local_of(v).numel()}
    common = {
        "param_groups": groups,
        "model": others,
        "tied": {a: b for a, b in tied.items() if a != b},
        EXCLUDED: sorted(excluded),
        RULE: optimizer.rule_name,
        PARTS: optimizer.model_parallel_size if _parts(model, optimizer) else 0,
    }
    part = None if index is None else Part(index, owned, common)
    state = {"model": {**tensors, **others}, "optim": {"state": values, "param_groups": groups}}
    return Content(state, common, extra, part, buffers=sorted(_own_buffers(model) & set(tensors)))


def _check_layouts(tensors: dict[str, Tensor]) -> None:
    local = {name: local_of(tensor) for name, tensor in tensors.items()}
    others = [f"{name} as {tensor.layout}" for name, tensor in local.items() if tensor.layout != torch.strided]
    others += [f"{name} as {tensor.dtype}" for name, tensor in local.items() if tensor.is_quantized]
    if others:
        raise CheckpointError(
            f"expected parameters and buffers of layout torch.strided, not quantized, got {', '.join(others)}; hold "
            f"each in a buffer that is not saved (register_buffer(..., persistent=False)), or build it when the model "
            f"is loaded"
        )


def join(parts: list[Part]) -> dict[str, Any]:
    """Return Content.common of the whole model, from every rank's part. Parts with the same index are equal.

    Raises:
        ValueError: Two parts own parameters with the same name, or none owns a parameter.
    """
    by_index = {part.index: part for part in reversed(parts)}
    owner: dict[str, int] = {}
    rule = parts[0].common[RULE]
    joined: dict[str, Any] = {"param_groups": [], "model": {}, "tied": {}, EXCLUDED: [], RULE: rule, PARTS: 0}
    for index, part in sorted(by_index.items()):
        for name in part.owned:
            if owner.setdefault(name, index) != index:
                raise ValueError(
                    f"expected names that tell the parameters of the model-parallel ranks apart, got {name} on ranks "
                    f"{owner[name]} and {index} of model_parallel_group; let a stage's module keep the names of the "
                    f"whole model, leave out .model_parallel where both have the same weight, and set "
                    f".tensor_model_parallel where each has a part of one"
                )
        joined["model"] |= part.common["model"]
        joined["tied"] |= part.common["tied"]
        joined[EXCLUDED] = sorted({*joined[EXCLUDED], *part.common[EXCLUDED]})
        joined[PARTS] = max(joined[PARTS], part.common[PARTS])
        for group in part.common["param_groups"]:
            mine = {key: value for key, value in group.items() if key != "param_names"}
            _add_group(
                joined["param_groups"], {**mine, "params": [n for n in group["params"] if owner.get(n) == index]}
            )
    for index, part in sorted(by_index.items()):
        lent = [name for group in part.common["param_groups"] for name in group["params"] if name not in owner]
        if lent:
            raise ValueError(
                f"expected each parameter marked .model_parallel where a part of the model alone has it, got {lent[0]} "
                f"without on rank {index} of model_parallel_group, and nowhere else; mark it. If it is a copy of an "
                f"earlier stage's weight (sum_tied_grads), let this stage keep the layer that the weight is named "
                f"after, as in head.weight = embedding.weight: the copies are saved once, under one name"
            )
    return joined


def _add_group(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """Merge a group into one with the same hyper-parameters, or append it."""
    for other in groups:
        if comparable(other) == comparable(group):
            other["params"] = other["params"] + group["params"]
            return
    groups.append(group)


def comparable(group: dict[str, Any]) -> str:
    """Return a text that is equal for groups with the same options. repr() of a tensor would show four digits."""
    options = {key: value for key, value in group.items() if key not in ("params", SCALER)}
    return repr({key: v.tolist() if isinstance(v, Tensor) else v for key, v in options.items()})
