"""Stage 3: apply torch's fully_shard to a model's blocks."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.deepspeed import launcher
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.stage_3.root_weights import gather_for_parts
from pyzero.deepspeed.stage_3.sharded_param import ShardedParam
from pyzero.sharding.blocks import blocks_of
from pyzero.sharding.fsdp import fsdp_groups, fsdp_records, put_shards
from pyzero.sharding.local_param import local_of

log = logging.getLogger("pyzero")


def shard(
    model: nn.Module,
    parallel: Parallelism,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    offload: bool = False,
) -> dict[Tensor, Tensor]:
    """Apply fully_shard to a model over the data-parallel ranks. Return a dict from each parameter to its replacement.

    With a 16-bit dtype, the shards are fp32 and are gathered in 16 bits. They serve as masters: a shard holds 4 bytes
    per parameter, where weights and masters would be 6. Gradients are averaged and accumulated in fp32.

    A model that is sharded already, by an earlier initialize() or by the caller, is left unchanged.

    Args:
        model: A model on its device. It gets rank 0's weights. Weights that zero.Init sharded are not gathered.
        parallel: Gives the data-parallel ranks.
        dtype: Dtype that the model computes in; None: the model's own.
        reduce_dtype: Dtype in which gradients are sent; None: fp32 if dtype is given, else the model's own.
        offload: Keep shards, and with them the optimizer, in host memory.

    Raises:
        ValueError: zero.Init sharded over other ranks; or offload is set and the group cannot send from host memory; or
            the model is sharded over other ranks or for another dtype; or a parameter is 0-D.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise RuntimeError(
            f"expected a torch whose fully_shard takes ignored_params for stage 3, got torch {torch.__version__}; "
            f"install torch 2.11 or newer, or take stage 2"
        )
    group = Group(parallel.data_group)
    if is_sharded(model):
        _check_as_wanted(model, group, dtype)
        return {}
    _check_can_be_sharded(model, group)
    everything = (*model.parameters(), *model.buffers())
    group.broadcast_all([local_of(tensor.detach()) for tensor in everything if not isinstance(tensor, ShardedParam)])
    before = dict(model.named_parameters(remove_duplicate=False))
    whole = {param for param in model.parameters() if not param.is_floating_point()}
    if dtype is not None:
        _widen(model)
    reduce_dtype = reduce_dtype or (torch.float32 if dtype else None)
    # Inputs and outputs are not cast: a loss or a residual stream in fp32 stays in fp32, as in other stages.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    mesh = parallel.data_mesh or DeviceMesh.from_group(launcher.handle_of(parallel.data_group), launcher.device().type)
    blocks = blocks_of(model)
    if offload:
        _check_sends_from_host(mesh)
    # Not pinned: fully_shard would pin copies of shards, and the optimizer's buckets would no longer hold them.
    place = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    rows = _take_rows(model)
    for block in (*blocks, model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place, ignored_params=whole)
    put_shards(model, {name: rows[id(param)] for name, param in before.items() if id(param) in rows})
    gather_for_parts(model)
    if group.rank == 0:
        log.info("config: stage 3: fully_shard on %d blocks and the rest, over %d ranks", len(blocks), group.size)
    after = dict(model.named_parameters(remove_duplicate=False))
    return {before[name]: after[name] for name in before}


def is_sharded(model: nn.Module) -> bool:
    """Return whether fully_shard was applied to the model or a part of it."""
    return any(fsdp_records(module) for module in model.modules())


def _check_can_be_sharded(model: nn.Module, group: Group) -> None:
    for param in model.parameters():
        if isinstance(param, ShardedParam) and param.rows.group.members() != group.members():
            raise ValueError(
                f"expected weights that zero.Init has sharded over the data-parallel ranks {group.members()}, got "
                f"{param.rows.group.members()}; pass it the same group as data_parallel_group=, or mpu="
            )
    named = model.named_parameters(remove_duplicate=False)
    scalars = [name for name, param in named if param.is_floating_point() and param.dim() == 0]
    if scalars:
        raise ValueError(
            f"expected parameters of one dimension or more in stage 3, got the 0-D {', '.join(scalars)}, of which "
            f"fully_shard can cut no rows; make it nn.Parameter(torch.ones(1)) in the model, or set stage 2"
        )


def _check_as_wanted(model: nn.Module, group: Group, dtype: torch.dtype | None) -> None:
    for known in (known for module in model.modules() for known in fsdp_groups(module)):
        over = Group(known.mesh_info.shard_process_group).members()
        param_dtype = known.fsdp_params[0].mp_policy.param_dtype
        if param_dtype != dtype or over != group.members():
            raise ValueError(
                f"expected a model that is not sharded, or over ranks {group.members()} to compute in {dtype or 'its'} "
                f"dtype, got one over {over}, {param_dtype or 'its dtype'}; pass the config that it was sharded by, or "
                f"build it anew"
            )


def _check_sends_from_host(mesh: Any) -> None:
    config = process.backends_of(mesh.get_group())
    if "cpu" not in config:
        raise ValueError(
            f"expected a process group that sends from memory of the host, for zero_optimization.offload_param, got "
            f"backends {config}; call init_process_group('cpu:gloo,cuda:nccl') before initialize()"
        )


def _take_rows(model: nn.Module) -> dict[int, Tensor]:
    """Return this rank's rows of zero.Init's parameters, by id. Replace these parameters by meta tensors."""
    rows: dict[int, Tensor] = {}
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if isinstance(param, ShardedParam):
                if id(param) not in rows:
                    meta = torch.empty(param.shape, dtype=param.dtype, device="meta")
                    empty[id(param)] = nn.Parameter(meta, requires_grad=param.requires_grad)
                    rows[id(param)] = param.take_rows()
                setattr(module, name, empty[id(param)])
    return rows


def _widen(model: nn.Module) -> None:
    """Convert weights to fp32, which keeps their values. Buffers stay as they are."""
    buffers = set(map(id, model.buffers()))
    model._apply(lambda tensor: tensor.float() if tensor.is_floating_point() and id(tensor) not in buffers else tensor)
