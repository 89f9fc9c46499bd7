"""Checks of the optimizers' arguments, parameter groups and parameters; errors say got, wanted, remedy."""

from __future__ import annotations

import difflib
import math
import numbers
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from pyzero.ops.checks import FLOAT_DTYPES
from pyzero.ops.env import BACKEND_CHOICES
from pyzero.sharding.local_param import LocalParam, local_of, user_param
from pyzero.sharding.spans import extent, repeats_elements, share_elements

if TYPE_CHECKING:
    from pyzero.loss_scale.scaler import LossScale

UNSUPPORTED = ("amsgrad", "differentiable")
IGNORED = ("foreach", "capturable", "fused")  # any value gives the same result here
RESERVED = ("zero", "scaler", "rule", "master_steps")  # keys of a saved group that are pyzero's own notes
_SCHEDULERS_KEYS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
_MISSPELT = 0.8  # difflib's ratio from which on a name is taken for another's misspelling
# What other libraries and papers call options.
OTHER_NAMES = {
    "LR": "lr",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
    "beta_1": "betas",
    "beta_2": "betas",
}


class ZeroOptions(TypedDict, total=False):
    """Keyword arguments of ZeroOptimizer that all rules share."""

    stage: int
    process_group: Any
    model_parallel_group: Any
    max_grad_norm: float | None
    loss_scale: str | float | LossScale | None
    bucket_cap_mb: float | None
    overlap: bool
    grad_reduce_dtype: torch.dtype | None
    reduce_grads: bool
    init_sync: bool
    cpu_offload: bool
    max_consecutive_skips: int | None
    transport: str
    backend: str


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raise for options of torch.optim.Adam that would change the result and are not supported."""
    for name in UNSUPPORTED:
        if options.get(name):
            raise ValueError(f"got {name}={options[name]!r}, which is not supported; leave it out")


def check_arguments(
    stage: int,
    max_grad_norm: float | None,
    bucket_cap_mb: float | None,
    grad_reduce_dtype: torch.dtype | None,
    max_consecutive_skips: int | None,
    backend: str,
) -> None:
    """Check ZeroOptimizer's own arguments."""
    if stage not in (1, 2):
        remedy = "call torch's fully_shard(model) for stage 3, and pass its parameters" if stage in (3, "3") else ""
        raise ValueError(f"expected stage 1 or 2, got {stage!r}; {remedy or 'pass stage=2'}")
    if backend not in BACKEND_CHOICES:
        raise ValueError(f"expected backend as one of {', '.join(BACKEND_CHOICES)}, got {backend!r}; pass one of these")
    if max_grad_norm is not None and not as_number("max_grad_norm", max_grad_norm) > 0:
        raise ValueError(f"expected max_grad_norm above 0, got {max_grad_norm}; pass None not to clip")
    check_bucket_cap(bucket_cap_mb)
    if grad_reduce_dtype is not None and grad_reduce_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"expected grad_reduce_dtype as torch.float32, torch.bfloat16 or torch.float16, got {grad_reduce_dtype!r}; "
            f"pass one of these, or None to send gradients in their own dtype"
        )
    if max_consecutive_skips is not None and as_number("max_consecutive_skips", max_consecutive_skips) < 1:
        raise ValueError(
            f"expected max_consecutive_skips from 1, got {max_consecutive_skips}; pass None for any number of skips"
        )


def check_bucket_cap(bucket_cap_mb: float | None) -> None:
    """Above 0, and finite."""
    if bucket_cap_mb is None:
        return
    if not 0 < as_number("bucket_cap_mb", bucket_cap_mb) < math.inf:
        raise ValueError(f"expected bucket_cap_mb above 0, got {bucket_cap_mb}; pass None for the default, 25 on CPUs")


def check_group(group: dict[str, Any], given: Iterable[str], options: Iterable[str]) -> None:
    """Check the names of a group's options, and that its parameters are ones that buckets can hold.

    given: The caller's names, without the defaults.
    """
    known = {*options, *UNSUPPORTED, *IGNORED}
    given = {*given}
    for name in RESERVED:
        if name in given:
            raise ValueError(
                f"expected other names than {', '.join(RESERVED)} in a parameter group, which state dicts use for "
                f"notes of pyzero's, got {name!r}; give yours another name"
            )
    for name in given - known - {"params", "param_names"}:  # a loop may keep values of its own there
        if name in ZeroOptions.__annotations__:
            raise ValueError(f"got {name} in a parameter group, which all groups share; pass it to the optimizer")
        meant = _meant_option(name, known, given)
        if meant is not None:
            raise ValueError(f"got {name!r} in a parameter group, expected {meant!r}; correct the name")
    refuse_unsupported(group)
    for index, param in enumerate(group["params"]):
        if any(placement.is_partial() for placement in getattr(param, "placements", ())):
            raise TypeError(
                f"expected DTensors that are sharded or replicated, got parameter {index} of the group as partial "
                f"sums; redistribute it first"
            )
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            raise TypeError(
                f"expected whole parameters, alike on every rank, got parameter {index} of the group as this rank's "
                f"part of one, of FullyShardedDataParallel; pass torch.optim.AdamW(fused=True) those, or build the "
                f"optimizer over the bare model, which it shards by itself"
            )
        if param.requires_grad:
            check_trained(param, f"parameter {index} of the group")


def _meant_option(name: str, known: set[str], given: set[str]) -> str | None:
    """The option that a name is meant to be; None of a name of the caller's own, as weight_decay_mult is."""
    other = OTHER_NAMES.get(name)
    if other in known:
        return other
    close = next(iter(difflib.get_close_matches(name, known, 1, _MISSPELT)), None)
    if close is None or close in given or name in _SCHEDULERS_KEYS:
        return None
    is_longer = len(name) > len(close) + 1 and (name.startswith(f"{close}_") or name.endswith(f"_{close}"))
    return None if is_longer else close


class HyperParameters:
    """What ranks compare of their parameter groups: one number, computed anew where a value has changed."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._values: list[Any] = []
        self._checksum = 0

    def checksum(self, groups: Sequence[dict[str, Any]]) -> int:
        """Of the values in all groups, as fp32; without tensors on a GPU, which the host would wait for."""
        values = [_comparable(value) for group in groups for value in map(group.get, self._names)]
        if values != self._values:
            self._values, self._checksum = values, zlib.crc32(repr(values).encode())
        return self._checksum


_FP32 = struct.Struct("f")


def _comparable(value: Any) -> Any:
    """Equal, and printed alike, where ranks step alike. Of what is neither number, text nor a sequence, the type."""
    if isinstance(value, (float, int)):
        try:
            return _FP32.pack(value + 0.0)  # -0.0 becomes 0.0
        except OverflowError:
            return value if isinstance(value, float) else repr(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, Tensor):
        return _comparable(value.item()) if value.device.type == "cpu" and value.numel() == 1 else None
    if value is None or isinstance(value, str):
        return value
    return _comparable(float(value)) if isinstance(value, numbers.Real) else type(value).__name__


def check_trained(param: Tensor, name: str) -> None:
    """Check the memory and the dtype of a parameter that is to be trained; a frozen one may have any."""
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


def check_fsdp(params: Sequence[Tensor], ranks: Sequence[int], has_frozen: bool) -> None:
    """Check parameters whose gradients the optimizer is to average: fully_shard averages those that it has sharded.

    ranks: Those that hold the same weights.
    has_frozen: Whether fully_shard has frozen ones in the same groups, whose mesh says who holds what.
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
    """Check that no parameter is what fully_shard has gathered for a forward. records: torch's own of its shards."""
    gathered = {getattr(record, "_unsharded_param", None) for record in records}
    for index, param in enumerate(params):
        if user_param(param) in gathered:
            raise ValueError(
                f"expected shards, got parameter {index} as fully_shard has gathered it, which a forward without a "
                f"backward leaves so; call reshard() on each module of fully_shard, then build the optimizer"
            )


def check_whole(param: Tensor, index: int, rule: str) -> None:
    """Check a parameter of an update rule that needs it whole."""
    if isinstance(param, LocalParam) and not all(p.is_replicate() for p in param.dtensor.placements):
        raise ValueError(
            f"expected whole parameters for the rule {rule}, got parameter {index} as a DTensor of placements "
            f"{param.dtensor.placements}; keep the weights whole (stage 2), or use FusedZeroAdamW or FusedZeroLion"
        )


def check_no_grad(group: dict[str, Any]) -> None:
    """Check a group that joins an optimizer with a loss scale: no one knows whether its gradients carry that."""
    for index, param in enumerate(group["params"]):
        if param.grad is not None:
            raise ValueError(
                f"expected no gradients in a group that is added to an optimizer with a loss scale, got .grad in "
                f"parameter {index}; add the group before backward, or set p.grad = None"
            )


def as_number(name: str, value: Any) -> float:
    """An option as a float. TypeError where it is none: text too, which float() reads and an update does not."""
    if type(value) is float:  # the usual case, asked in each step
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as a number, got {value!r}; pass one, or leave {name} out") from None
    if isinstance(value, str):
        yaml = ", and in YAML write 1.0e-3, for it takes 1e-3 for text" * ("e" in value.lower())
        raise TypeError(f"expected {name} as a number, got the text {value!r}; pass {number!r}{yaml}")
    return number


def check_params(params: Any) -> None:
    """A model is none: torch would say no more than that it cannot be iterated over."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"expected parameters or groups, got a model ({type(params).__name__}); pass model.parameters()"
        )


def check_lr(group: dict[str, Any]) -> None:
    """lr is at least 0; the message is torch's, as in the next two. A tensor on a GPU is not read."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements; pass a number or a 0-D tensor")
        if lr.device.type != "cpu":
            return
    if not 0.0 <= as_number("lr", lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}; expected lr >= 0, and finite")


def check_betas(group: dict[str, Any]) -> None:
    """There are two, each at least 0, and below 1."""
    betas = group["betas"]
    if isinstance(betas, str) or not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two, as in betas=(0.9, 0.999)")
    for index, (name, beta) in enumerate(zip(("betas[0]", "betas[1]"), betas, strict=True)):
        if not 0.0 <= as_number(name, beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; expected 0 <= beta < 1")


def check_not_negative(what: str, name: str, group: dict[str, Any]) -> None:
    """group[name] is at least 0."""
    if not 0.0 <= as_number(name, group[name]) < math.inf:
        raise ValueError(f"Invalid {what} value: {group[name]}; expected {name} >= 0, and finite")


def check_device(param: Tensor, device: torch.device) -> None:
    """All parameters of one rank lie on one device."""
    if param.device != device:
        raise ValueError(
            f"expected all parameters of a rank on one device, got {device} and {param.device}; move the model with "
            f".to(), or build one optimizer per device"
        )


def check_disjoint(named: dict[Tensor, str]) -> None:
    """Two parameters over one memory would come apart when they move into flat buffers; interleaved ones share none."""
    spans = []
    for whole, name in named.items():
        param = local_of(whole)
        begin = param.data_ptr() if param.layout == torch.strided else 0  # 0 of what has no memory of its own
        if param.numel() and begin:
            spans.append((begin, begin + extent(param) * param.element_size(), name, param))
    spans.sort(key=lambda span: span[:3])
    beside: list[tuple[int, int, str, Tensor]] = []  # earlier ones that may reach as far
    for span in spans:
        beside = [earlier for earlier in beside if span[0] < earlier[1]]
        for _, _, one, param in beside:
            if share_elements(param, span[3]):
                raise shared_memory_error(one, span[2])
        beside.append(span)


def shared_memory_error(one: str, other: str) -> ValueError:
    """The error for two tensors of a model over one memory, by their names."""
    return ValueError(
        f"expected parameters with memory of their own, got {one} and {other} over the same; tie them by one Parameter "
        f"object (b.weight = a.weight), make a row or a transpose of one in forward, or give one a copy (.clone())"
    )
