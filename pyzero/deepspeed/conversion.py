"""The model's conversion to the config's dtypes and this rank's device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.parallel import tensor_parallel
from pyzero.deepspeed.stage_3.shard import is_sharded


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
