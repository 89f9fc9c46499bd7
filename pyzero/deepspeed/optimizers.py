"""Make one of pyzero's optimizers from the config, a torch optimizer, or a function that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyzero.arguments.groups import IGNORED, UNSUPPORTED
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.ops.lamb import FusedLamb
from pyzero.deepspeed.ops.lion import FusedLion
from pyzero.deepspeed.ops.optimizer_spec import OptimizerSpec
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.pipe.module import PipelineModule
from pyzero.optimizer import ZeroOptimizer
from pyzero.optimizers.adam import FusedZeroAdam
from pyzero.optimizers.lamb import ZeroLamb
from pyzero.optimizers.lion import FusedZeroLion
from pyzero.optimizers.muon import ZeroMuon
from pyzero.optimizers.sgd import FusedZeroSGD

_RULES: dict[str, Callable[..., ZeroOptimizer]] = {
    "Adam": FusedZeroAdam,
    "AdamW": FusedZeroAdam,
    "Lion": FusedZeroLion,
    "Lamb": ZeroLamb,
    "Muon": ZeroMuon,
    "SGD": FusedZeroSGD,
}
_NOT_MUONS = ("embed", "lm_head")  # matrices with these in their names are not hidden ones, as in DeepSpeed
_TORCH_MUON = getattr(torch.optim, "Muon", None)  # torch 2.9 and later


def make_optimizer(
    model: nn.Module, optimizer: Any, params: list[Any], config: Config, parallel: Parallelism
) -> ZeroOptimizer:
    """Return one of pyzero's optimizers over the parameters that the ranks of `parallel` hold.

    Args:
        model: The model that has the parameters.
        optimizer: initialize()'s: an optimizer, a function that makes one, or None for the config's.
        params: Parameters or groups for the function or for the config's optimizer.
        config: The script's config.
        parallel: Which ranks hold which parameters.

    Raises:
        TypeError: initialize() does not know the type of the optimizer.
        ValueError: There is no optimizer, it is over another model's parameters, or it has options that pyzero's lack.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise TypeError(
                f"expected an optimizer, or a function that makes one of parameters, got {type(optimizer).__name__}; "
                f"pass one of these"
            )
        optimizer = optimizer(params)
    if optimizer is not None:
        _check_held(model, [param for group in optimizer.param_groups for param in group["params"]])
    is_pipeline = isinstance(model, PipelineModule) and model.num_stages > 1
    if isinstance(optimizer, ZeroOptimizer):
        if is_pipeline and optimizer.model_parallel_rank is None:
            raise ValueError(
                "expected an optimizer that knows the other stages, got one without model_parallel_group; build it "
                "with process_group=model.mpu().get_data_parallel_group() and "
                "model_parallel_group=model.mpu().get_pipe_parallel_group(), or pass torch's AdamW"
            )
        return optimizer
    options = {**_options(config), **parallel.options()}
    if optimizer is not None:
        return _replace(optimizer, options)
    if config.optimizer is None:
        raise ValueError('expected an optimizer, got none; pass optimizer= or set "optimizer" in the config')
    _check_held(model, _tensors_of(params))
    if config.optimizer.rule == "Muon":
        params = _muon_groups(model, params, *config.optimizer.muon_groups())
    return _RULES[config.optimizer.rule](params, **config.optimizer.arguments(), **options)


def _replace(optimizer: Any, options: dict[str, Any]) -> ZeroOptimizer:
    """Return pyzero's optimizer in place of the caller's. Both have the same `param_groups`.

    The dicts in it are the caller's: a schedule that is not passed in, or an optimizer made from them, sets lr there.
    """
    ours = _class_for(optimizer)(groups_of(optimizer), **options)
    for index, (group, own) in enumerate(zip(optimizer.param_groups, ours.param_groups, strict=True)):
        group.clear()
        group.update(own)
        ours.param_groups[index] = group
    optimizer.param_groups = ours.param_groups
    optimizer._opt_called = True  # without it that schedule's step() warns
    return ours


def _options(config: Config) -> dict[str, Any]:
    """Return the arguments that all of pyzero's optimizers take."""
    options = config.zero_optimization.arguments(4 if config.weights_dtype() is None else 2)
    options["loss_scale"] = config.fp16.policy() if config.is_fp16 else "auto"
    if config.torch_autocast.enabled_dtype() == torch.float16:
        options["loss_scale"] = "dynamic"
    options["max_grad_norm"] = config.max_grad_norm()
    options["grad_reduce_dtype"] = config.grad_reduce_dtype()
    return options


def _class_for(optimizer: Optimizer) -> Callable[..., ZeroOptimizer]:
    if isinstance(optimizer, FusedLion):
        return FusedZeroLion
    if type(optimizer) is _TORCH_MUON:
        return ZeroMuon
    if isinstance(optimizer, SGD):
        return FusedZeroSGD
    return ZeroLamb if isinstance(optimizer, FusedLamb) else FusedZeroAdam


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer that initialize() knows, for one of pyzero's optimizers.

    Raises:
        TypeError: initialize() does not know the type of the optimizer.
        ValueError: The optimizer has an option that pyzero's lack, or state, which would be lost.
    """
    name = type(optimizer).__name__
    if type(optimizer) not in (Adam, AdamW, SGD, _TORCH_MUON) and not isinstance(optimizer, OptimizerSpec):
        raise TypeError(
            f"expected torch.optim.Adam, AdamW, SGD or Muon, FusedAdam, DeepSpeedCPUAdam, FusedLion or FusedLamb of "
            f"pyzero.deepspeed.ops, or one of pyzero's own, got {name}; pass one of these"
        )
    if optimizer.state:
        raise ValueError(
            f"expected a fresh {name}, got one that has taken steps; pass it to initialize() before training"
        )
    for option in UNSUPPORTED:
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"got {name}({option}=True), which pyzero does not support; leave it out")
    groups = []
    for group in optimizer.param_groups:
        copy = {key: value for key, value in group.items() if key not in (*UNSUPPORTED, *IGNORED)}
        if isinstance(optimizer, (Adam, AdamW)):  # AdamW is a subclass of Adam only in newer torch
            copy["decoupled_weight_decay"] = isinstance(optimizer, AdamW)
        groups.append(copy)
    return groups


def _muon_groups(
    model: nn.Module, params: list[Any], muon: dict[str, Any], adam: dict[str, Any]
) -> list[dict[str, Any]]:
    """Split each group into its hidden matrices, and the rest, which Adam trains. Hyper-parameters it sets are kept."""
    hidden = {
        param
        for name, param in model.named_parameters()
        if param.dim() >= 2 and not any(word in name.lower() for word in _NOT_MUONS)
    }
    loose = [item for item in params if not isinstance(item, dict)]
    groups = [*([{"params": loose}] if loose else []), *(item for item in params if isinstance(item, dict))]
    found = []
    for group in groups:
        tensors = _tensors_of([group])
        for use_muon, defaults in ((True, muon), (False, adam)):
            members = [param for param in tensors if (param in hidden) == use_muon]
            own = {name: group[name] for name in defaults if name in group}
            if members:
                found.append({**defaults, **own, "params": members, "use_muon": use_muon})
    return found


def _tensors_of(params: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in a list of parameters, (name, parameter) pairs or groups."""
    found: list[Tensor] = []
    for item in params:
        if isinstance(item, dict):
            found += _tensors_of([item["params"]] if isinstance(item["params"], Tensor) else item["params"])
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def _check_held(model: nn.Module, params: list[Tensor]) -> None:
    held = {id(param) for param in model.parameters()}
    strangers = sum(id(param) not in held for param in params)
    if strangers:
        raise ValueError(
            f"expected parameters of the model, got {strangers} of others among {len(params)}; pass those of "
            f"model.parameters() of the same model to the optimizer, or as model_parameters="
        )
