"""The model's conversion to the config's dtypes and this rank's device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine.param_owners import find_owner
from pyzero.deepspeed.parallel import tensor_parallel
from pyzero.deepspeed.stage_3.shard import is_sharded
from pyzero.sharding.fsdp import find_left_whole, reshard
from pyzero.sharding.local_param import is_dtensor


def convert(model: nn.Module, config: Config, moves: bool) -> None:
    """Convert the model to the wanted dtypes and this rank's device, in place, so that optimizers keep its parameters.

    moves: False leaves it on its device, because it is split before it has to fit on this one.
    """
    if config.zero_optimization.stage == 3 and is_sharded(model):
        return  # its shards have another dtype than it computes in
    device, dtypes = launcher.device() if moves else None, _dtypes(model, config)
    if all(_lies_as(tensor, device, dtypes[id(tensor)]) for tensor in (*model.parameters(), *model.buffers())):
        return  # torch cannot convert a DTensor that an engine holds, not even to the same dtype
    if tensor_parallel.is_split(model):
        raise ValueError(
            f"expected a model of whole weights to convert to {config.weights_dtype()}, got one that initialize() has "
            f"split before; pass it a config of the same fp16 and bf16, or build the model anew"
        )
    before = [id(param) for param in model.parameters()]
    model._apply(lambda tensor: _converted(tensor, device, dtypes.get(id(tensor), config.weights_dtype())))
    assert before == [id(param) for param in model.parameters()]


def _dtypes(model: nn.Module, config: Config) -> dict[int, torch.dtype | None]:
    """Return the dtype of each parameter and buffer, by id. None: it stays. Buffers stay unless the config gives one.

    A BatchNorm's buffers follow its weights, because torch requires one dtype for both.
    """
    dtype = config.weights_dtype()
    of_buffers = None if dtype is None else config.data_types.buffers_dtype()
    dtypes: dict[int, torch.dtype | None] = dict.fromkeys(map(id, model.buffers()), of_buffers)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.weight is not None:
            dtypes.update(dict.fromkeys(map(id, module.buffers()), dtype))
    return {**dtypes, **dict.fromkeys(map(id, model.parameters()), dtype)}


def _converted(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _lies_as(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    return device in (None, tensor.device) and (dtype in (None, tensor.dtype) or not tensor.is_floating_point())


# ---- after initialize() ----------------------------------------------------------------------------------------------


def guard(model: nn.Module, config: Config) -> None:
    """Make later conversions (`engine.to()`, `module.float()`) of a model of DTensors keep what the engine holds.

    torch would replace each DTensor's content and drop its attributes, even if neither dtype nor device changes.
    """
    if not any(map(is_dtensor, model.parameters())):
        return
    dtypes = {config.weights_dtype()}  # in stage 3 weights are shards in fp32, and are gathered in this dtype
    devices = {launcher.device()} if config.zero_optimization.offloads_params() else set()
    module: Any
    for module in model.modules():
        module._apply = partial(_apply, module, dtypes, devices)


def _apply(
    module: nn.Module, dtypes: set[Any], devices: set[Any], fn: Callable[[Any], Any], recurse: bool = True
) -> Any:
    """Replace Module._apply: trained weights stay, and what would change them is an error. Buffers are converted.

    dtypes, devices: Those to which weights may be "converted", beside those that they have.
    """
    parts = [*module.modules()] if recurse else [module]
    shown = [param for part in parts for param in part._parameters.values() if param is not None]
    shards = {number: shard for number, (shard, _) in find_left_whole(shown).items()}
    params = [shards.get(id(param), param) for param in shown]
    if all(find_owner(param) is None for param in params):
        return _apply_as_torch(module, fn, recurse)
    for param in params:
        after = fn(torch.empty(0, dtype=param.dtype, device=param.device))
        if after.dtype not in dtypes | {param.dtype} or after.device not in devices | {param.device}:
            raise TypeError(
                f"expected weights of an engine to stay in {param.dtype} on {param.device}, got a conversion to "
                f"{after.dtype} on {after.device}; convert the model before initialize(), or set fp16 or bf16 in the "
                f"config"
            )
    for part in parts:
        part._buffers.update({name: fn(buffer) for name, buffer in part._buffers.items() if buffer is not None})
    return module


def _apply_as_torch(module: nn.Module, fn: Callable[[Any], Any], recurse: bool) -> Any:
    """Run torch's own Module._apply, which keeps DTensors as objects, and keep their attributes (ds_id) too."""
    reshard(module)
    before = [(param, vars(param).copy()) for param in module.parameters(recurse) if is_dtensor(param)]
    type(module)._apply(module, fn, recurse)
    for param, attributes in before:
        vars(param).update({**attributes, **vars(param)})
    return module
