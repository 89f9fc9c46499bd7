"""Checks of parameters: their dtype and device, who reduces their gradients, and whether they share memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.ops.rows import FLOAT_DTYPES
from pyzero.sharding.local_param import LocalParam, local_of, user_param
from pyzero.sharding.spans import extent, repeats_elements, share_elements


def check_params(params: Any) -> None:
    """Raise TypeError if a model is given instead of its parameters."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"expected parameters or groups, got a model ({type(params).__name__}); pass model.parameters()"
        )


def check_trained(param: Tensor, name: str) -> None:
    """Check the memory and the dtype of a parameter that is to be trained. Frozen ones need no check.

    Raises:
        TypeError: It is a meta, sparse or inference tensor, or has another dtype.
        ValueError: Its elements share memory.
    """
    if param.is_meta:
        raise TypeError(
            f"expected parameters with values, got {name} on the meta device; call model.to_empty(device=...) and load "
            f"or initialise the weights before the optimizer is built"
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"expected dense parameters, got {name} in layout {str(param.layout).removeprefix('torch.')}; pass "
            f"torch.optim.SparseAdam those"
        )
    if param.is_inference():
        raise TypeError(
            f"expected parameters that autograd tracks, got {name} made under torch.inference_mode(); build the model "
            f"outside of it, or outside of it copy the parameter (nn.Parameter(p.clone()))"
        )
    if repeats_elements(local_of(param)):
        raise ValueError(
            f"expected parameters whose elements have memory of their own, got {name} of shape {tuple(param.shape)} "
            f"with strides {tuple(param.stride())}, as expand() gives them, which a step would tear apart; train the "
            f"tensor before the expand(), and expand it in forward, or pass a .clone()"
        )
    if param.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"expected parameters in float32, bfloat16 or float16, got {name} in "
            f"{str(param.dtype).removeprefix('torch.')}; convert it, freeze it or leave it out"
        )


def check_device(param: Tensor, device: torch.device) -> None:
    """Raise ValueError if the parameter is not on the device of the rank's other parameters."""
    if param.device != device:
        raise ValueError(
            f"expected all parameters of a rank on one device, got {device} and {param.device}; move the model with "
            f".to(), or build one optimizer per device"
        )


def check_whole(param: Tensor, index: int, rule: str, is_slice: bool) -> None:
    """Raise ValueError if a parameter is a part of a weight, and its update rule needs whole ones.

    is_slice: Whether it is marked as this rank's slice of a weight, as Megatron's are.
    """
    got = ""
    if isinstance(param, LocalParam) and not all(p.is_replicate() for p in param.dtensor.placements):
        got = f"as a DTensor of placements {param.dtensor.placements}"
    elif is_slice:
        got = "with tensor_model_parallel=True, of which other ranks of model_parallel_group have the rest"
    if got:
        raise ValueError(
            f"expected whole parameters for the rule {rule}, got parameter {index} {got}; keep the weights whole "
            f"(stage 2), or use FusedZeroAdamW or FusedZeroLion"
        )


def check_fsdp(params: Sequence[Tensor], ranks: Sequence[int], has_frozen: bool) -> None:
    """Check parameters whose gradients the optimizer averages. fully_shard averages those that it has sharded.

    Args:
        params: The parameters.
        ranks: The ranks that hold the same weights.
        has_frozen: Whether the same groups have frozen parameters that fully_shard has sharded.

    Raises:
        ValueError: Only a part of the parameters is sharded, or fully_shard averages over other ranks, or both would
            average.
    """
    sharded = [isinstance(param, LocalParam) and param.is_fsdp for param in params]
    if any(sharded) and len(ranks) > 1:
        mesh = params[sharded.index(True)].dtensor.device_mesh.mesh  # type: ignore[attr-defined]
        mesh_ranks = sorted(mesh.flatten().tolist())
        if not set(ranks) <= set(mesh_ranks):
            raise ValueError(
                f"expected fully_shard to average gradients over all ranks with the same weights, got it on a mesh of "
                f"ranks {mesh_ranks}, and ranks {list(ranks)} with the same; call fully_shard with a mesh of two "
                f"dimensions, replicas and shards, or pass the ranks of its mesh as process_group where these see the "
                f"same batches"
            )
        raise ValueError(
            f"expected gradients that nobody else reduces, got parameters of fully_shard, which averages them over "
            f"these {len(ranks)} ranks too; pass reduce_grads=False"
        )
    if (any(sharded) or has_frozen) and not all(sharded):
        which = "" if any(sharded) else "frozen parameters of "
        raise ValueError(
            f"expected fully_shard to average all gradients, got parameter {sharded.index(False)} beside {which}it, "
            f"which it does not know; shard it too, give it an optimizer of its own, or pass reduce_grads=False and "
            f"average it"
        )


def check_not_gathered(params: Iterable[Tensor], records: Iterable[Any]) -> None:
    """Raise ValueError if a parameter is a whole weight that fully_shard has gathered for a forward.

    records: torch's records of all parameters that fully_shard has sharded.
    """
    gathered = {getattr(record, "_unsharded_param", None) for record in records}
    for index, param in enumerate(params):
        if user_param(param) in gathered:
            raise ValueError(
                f"expected shards, got parameter {index} as fully_shard has gathered it, which a forward without a "
                f"backward leaves so; call reshard() on each module of fully_shard, then build the optimizer"
            )


def check_disjoint(named: dict[Tensor, str]) -> None:
    """Raise ValueError if two parameters share an element. They would no longer share it in flat buffers.

    Parameters that interleave in one memory share no element, and are accepted.
    """
    spans = []
    for whole, name in named.items():
        param = local_of(whole)
        begin = param.data_ptr() if param.layout == torch.strided else 0  # 0: it has no memory of its own
        if param.numel() and begin:
            spans.append((begin, begin + extent(param) * param.element_size(), name, param))
    spans.sort(key=lambda span: span[:3])
    beside: list[tuple[int, int, str, Tensor]] = []  # earlier ones that end after this one's begin
    for span in spans:
        beside = [earlier for earlier in beside if span[0] < earlier[1]]
        for _, _, one, param in beside:
            if share_elements(param, span[3]):
                raise shared_memory_error(one, span[2])
        beside.append(span)


def shared_memory_error(one: str, other: str) -> ValueError:
    """Make the error for two tensors of a model in the same memory. one, other: Their names."""
    return ValueError(
        f"expected parameters with memory of their own, got {one} and {other} over the same; tie them by one Parameter "
        f"object (b.weight = a.weight), make a row or a transpose of one in forward, or give one a copy (.clone())"
    )
