"""What goes into a checkpoint, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from pyzero.buckets import MASTER
from pyzero.local_param import local_of
from pyzero.modules import reshard
from pyzero.optimizer import ZeroOptimizer
from pyzero.rank_state import ZERO


def names_of(model: nn.Module, optimizer: ZeroOptimizer) -> dict[Tensor, str]:
    """The optimizer's parameters, by torch.distributed.checkpoint's names: without what DDP and torch.compile add."""
    reshard(model)
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    lacking = len(ours - set(model.parameters()))
    if lacking:
        raise ValueError(
            f"expected a model that holds the optimizer's parameters, got one without {lacking} of {len(ours)}; pass "
            f"the model that the optimizer was built over"
        )
    from torch.distributed.checkpoint.state_dict import _get_fqns  # no public name gives what get_state_dict uses

    return {p: next(iter(_get_fqns(model, name))) for name, p in model.named_parameters() if p in ours}


def model_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By name: parameters and buffers, whose memory is the model's; and what get_extra_state() of modules returns."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model)
    suffix = _EXTRA_STATE_KEY_SUFFIX
    extra = {n: v for n, v in state.items() if not torch.is_tensor(v) or n.split(".")[-1] == suffix}
    return {name: value for name, value in state.items() if name not in extra}, extra


def set_extra_state(model: nn.Module, state: dict[str, Any]) -> None:
    """By torch.distributed.checkpoint's names, to the modules that the model has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if state:
        set_model_state_dict(model, state, options=StateDictOptions(strict=False))


@dataclass
class Content:
    """What goes into a checkpoint from this rank."""

    state: dict[str, Any]  # {"model": ..., "optim": ...}, as torch.distributed.checkpoint's get_state_dict() gives
    common: dict[str, Any]  # parameter groups by name, what the model has beside tensors, tied names; rank 0's counts
    extra: dict[str, Any]


def collect(model: nn.Module, optimizer: ZeroOptimizer, extra: dict[str, Any]) -> Content:
    """All by name, in the memory where it lies."""
    names = names_of(model, optimizer)
    state = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [
        {**{k: v for k, v in group.items() if k != ZERO}, "params": [names[params[i]] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {names[params[i]]: dict(of_param) for i, of_param in state["state"].items()}
    for param, name in names.items():
        if param.dtype == torch.float32 and name in values:
            del values[name][MASTER]  # the weight itself
    tensors, others = model_state(model)
    first: dict[int, str] = {}
    tied = {n: first.setdefault(local_of(v).data_ptr(), n) for n, v in tensors.items() if local_of(v).numel()}
    common = {"param_groups": groups, "model": others, "tied": {a: b for a, b in tied.items() if a != b}}
    return Content({"model": {**tensors, **others}, "optim": {"state": values, "param_groups": groups}}, common, extra)
