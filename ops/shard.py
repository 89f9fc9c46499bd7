"""The checks of adam_, lion_ and sgd_ for a flat shard: its tensors, its gradients, its segments."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyzero.ops.backend import MAX_PARAM_OUTS, SEGMENT_GRANULE, Scalar
from pyzero.ops.checks import (
    as_scalar,
    check_device,
    check_disjoint,
    check_dtype,
    check_flat,
    check_gradients,
    check_list,
    check_offsets,
    is_vector,
)
from pyzero.ops.rounding import ceil_div
from pyzero.ops.rows import (
    ALIGNED,
    ALIGNMENT_BYTES,
    APART,
    FLAT,
    FLOAT_DTYPES,
    checked_rows,
    native_shard_rows,
    rows_of,
)

LARGEST = torch.finfo(torch.float32).max  # of the numbers of an update, all of which are rounded to fp32
_MAX_STEP = 2**31 - 1  # all backends hold it as an int32

# By the id of a CPU's segment_ids that have been read: the tensor, its version then, and how many segments they fit.
_fitting: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def as_lr(lr: Scalar, device: torch.device) -> Scalar:
    """Return `as_scalar` of lr. Raise ValueError if it is a number that fp32 cannot hold."""
    lr = as_scalar("lr", lr, device)
    if type(lr) is float and not -LARGEST <= lr <= LARGEST:
        raise ValueError(f"expected lr as a finite number in fp32, got {lr}; correct it")
    return lr


def refuse_hyper(decays: dict[str, float], others: dict[str, float], signed: Sequence[str] = ()) -> None:
    """Raise for the update's number that is out of range: decays in [0, 1), others from 0, in fp32.

    signed: The names of others that may be below 0.
    """
    for name, value in {**decays, **others}.items():
        if name in decays and not 0.0 <= value < 1.0:
            raise ValueError(f"expected 0 <= {name} < 1, got {value}; correct it")
        if not (-LARGEST if name in signed else 0.0) <= value <= LARGEST:
            least = "" if name in signed else f"{name} >= 0, and "
            raise ValueError(f"expected {least or f'{name} '}finite in fp32, got {value}; correct it")


def as_list(param_out: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Return the tensors that an update writes its weights to."""
    if param_out is None:
        return ()
    if isinstance(param_out, Tensor):
        return (param_out,)
    check_list("param_out", param_out, "a tensor or a list of tensors")
    if len(param_out) > MAX_PARAM_OUTS:
        raise ValueError(
            f"expected up to {MAX_PARAM_OUTS} tensors as param_out, got {len(param_out)}; copy to the others"
        )
    return param_out


def read_shard(
    states: Sequence[str],
    shard: Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    grad_offsets: Sequence[int] | None,
    segment_ids: Tensor | None,
    backend: str,
) -> tuple[Sequence[Tensor], Sequence[int], bytes]:
    """Check a shard and its gradients. Return the gradients, their offsets, and rows of the shard and the gradients.

    shard: The fp32 `states`, master first, then `param_out`.

    With `segment_ids` or a list of gradients, all other tensors must be aligned for vectors, so that no vector
    straddles two segments. The reference can also compute in fp64, as an oracle; there are no rows then.
    """
    if isinstance(grad, Tensor):
        if grad_offsets is not None:
            raise ValueError("expected a list of gradients with grad_offsets, got a tensor; pass [grad], or no offsets")
        grads: Sequence[Tensor] = (grad,)
        offsets: Sequence[int] = (0,)
        tensors, num_states = (*shard, grad), len(states)
        rows = checked_rows(tensors, num_states, FLAT | APART if segment_ids is None else FLAT | APART | ALIGNED)
        if rows is None:
            names = (*_names(states, shard), "grad")
            rows = _explain(names, tensors, num_states, segment_ids is not None, backend)
    else:
        grads = grad
        offsets, rows = _read_list(states, shard, grads, grad_offsets, backend)
    if len(shard) > len(states) + 1:
        _check_one_dtype([tensor.dtype for tensor in shard[len(states) :]])
    if segment_ids is not None:
        _check_segment_ids(segment_ids, shard[0])
    return grads, offsets, rows


def _names(states: Sequence[str], shard: Sequence[Tensor]) -> Sequence[str]:
    """Return names of the shard's tensors, for messages."""
    num_outs = len(shard) - len(states)
    return (*states, "param_out") if num_outs == 1 else (*states, *(f"param_out[{i}]" for i in range(num_outs)))


def _check_one_dtype(found: Sequence[torch.dtype]) -> None:
    if len(set(found)) > 1:
        raise TypeError(f"expected param_out of one dtype, got {sorted(map(str, set(found)))}; convert them")


def _read_list(
    states: Sequence[str],
    shard: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int] | None,
    backend: str,
) -> tuple[Sequence[int], bytes]:
    check_list("grad", grads, "a tensor or a list of tensors")
    if offsets is None:
        raise ValueError(
            "expected grad_offsets with a list of gradients, got none; pass the element at which each begins"
        )
    num_states = len(states)
    found = native_shard_rows(shard, num_states, grads, offsets)
    if found is not None:
        return offsets, found
    names = _names(states, shard)
    if checked_rows(shard, num_states, FLAT | APART | ALIGNED) is None:
        _explain(names, shard, num_states, True, backend)
    rows = checked_rows((*shard, *grads), num_states, APART)
    if rows is None:
        rows = _explain_grads(names, shard, grads)
    kinds = {grad.dtype for grad in grads}
    if len(kinds) > 1:
        raise TypeError(f"expected gradients of one dtype, got {sorted(map(str, kinds))}; convert them, or pack_ them")
    offsets = check_offsets("a shard", shard[0].numel(), [grad.numel() for grad in grads], offsets)
    if any([offset % SEGMENT_GRANULE for offset in offsets]):
        raise ValueError(
            f"expected grad_offsets that are multiples of {SEGMENT_GRANULE}, got {offsets[:10]}; lay the shard "
            f"out so, or pack_ the gradients"
        )
    return offsets, rows


def _explain_grads(names: Sequence[str], shard: Sequence[Tensor], grads: Sequence[Tensor]) -> bytes:
    """Raise for what is wrong with the gradients. They may share memory with each other."""
    is_oracle = shard[0].dtype is torch.float64
    check_gradients("grad", grads, shard[0].device, (*FLOAT_DTYPES, torch.float64) if is_oracle else FLOAT_DTYPES)
    for index, grad in enumerate(grads):
        check_disjoint([*zip(names, shard, strict=False), (f"grad[{index}]", grad)])
    return b"" if is_oracle else rows_of((*shard, *grads))


def check_active(active: Tensor | None, segment_ids: Tensor | None, device: torch.device) -> None:
    """Raise unless `active` is fp32 and flat, with one value per segment."""
    if active is None:
        return
    if segment_ids is None:
        raise ValueError("expected segment_ids with active, got none; pass both or neither")
    _check_per_segment("active", active, device)
    _check_ids(segment_ids, active.numel())


def checked_step(step: Scalar, segment_ids: Tensor | None, active: Tensor | None, device: torch.device) -> Scalar:
    """Return a step count: a number or a 0-D tensor. With segments it has one value for each, as many as `active`."""
    if segment_ids is None:
        step = as_scalar("step", step, device)
    elif isinstance(step, Tensor):
        _check_per_segment("step", step, device)
        if active is None:
            _check_ids(segment_ids, step.numel())
        elif active.numel() != step.numel():
            check_flat("active", active, numel=step.numel())
    else:
        raise TypeError("expected step as a (num_segments,) fp32 tensor with segment_ids, got a number; pass a tensor")
    if not isinstance(step, Tensor) and not 1 <= step <= _MAX_STEP:
        remedy = "pass fewer than 2**31" if step > 1 else "add 1 before the call"
        raise ValueError(f"expected step to count from 1, got {step}; {remedy}")
    return step


def _check_per_segment(name: str, tensor: Tensor, device: torch.device) -> None:
    if is_vector(tensor, torch.float32, tensor.numel(), device):
        return
    check_dtype(name, tensor, (torch.float32,), "convert it with .float()")
    check_flat(name, tensor)
    check_device(name, tensor, device)


def _check_segment_ids(segment_ids: Tensor, master: Tensor) -> None:
    num_granules = ceil_div(master.numel(), SEGMENT_GRANULE)
    if is_vector(segment_ids, torch.int32, num_granules, master.device):
        return
    check_dtype("segment_ids", segment_ids, (torch.int32,), "convert it with .to(torch.int32)")
    check_flat("segment_ids", segment_ids)
    check_device("segment_ids", segment_ids, master.device)
    raise ValueError(
        f"expected segment_ids to have one entry per {SEGMENT_GRANULE} elements, {num_granules}, "
        f"got {segment_ids.numel()}; slice it as the shard is sliced"
    )


def _check_ids(segment_ids: Tensor, num_segments: int) -> None:
    """Raise if an id has no segment. Those on a GPU are not read, because the host would wait for it."""
    known = _fitting.get(id(segment_ids))
    if known and known[0]() is segment_ids and known[1] == segment_ids._version and known[2] <= num_segments:
        return
    if not segment_ids.numel():
        return
    if not num_segments:
        raise ValueError("expected a step count or a flag of each segment, got none; pass one for each")
    if segment_ids.device.type != "cpu":
        return
    ids = segment_ids.numpy()
    if ids.view(np.uint32).max() >= num_segments:  # a negative one is large
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"expected segment_ids from 0 to {num_segments - 1}, for {num_segments} segments, got {wrong}; correct "
            f"them, or pass a longer step and active"
        )
    if not segment_ids.is_inference():  # these have no version
        key = id(segment_ids)
        ref = weakref.ref(segment_ids, lambda _: _fitting.pop(key, None))
        _fitting[key] = ref, segment_ids._version, num_segments


def _explain(names: Sequence[str], tensors: Sequence[Tensor], num_states: int, is_aligned: bool, backend: str) -> bytes:
    master = tensors[0]
    oracle = backend == "reference" and isinstance(master, Tensor) and master.dtype == torch.float64
    state_dtypes = (torch.float64,) if oracle else (torch.float32,)
    value_dtypes = (*FLOAT_DTYPES, torch.float64) if oracle else FLOAT_DTYPES
    named = list(zip(names, tensors, strict=False))
    for index, (name, tensor) in enumerate(named):
        is_state = index < num_states
        remedy = f"pass {name}=x.float()" if is_state else "convert it with .float()"
        check_dtype(name, tensor, state_dtypes if is_state else value_dtypes, remedy)
        check_flat(name, tensor, numel=master.numel())
        check_device(name, tensor, master.device)
    check_disjoint(named)
    if is_aligned and any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in tensors):
        raise ValueError(
            f"expected tensors that start at a multiple of {ALIGNMENT_BYTES} bytes with segment_ids or a list of "
            f"gradients, got one that does not; start each shard at a multiple of {SEGMENT_GRANULE} elements"
        )
    return b"" if oracle else rows_of(tensors)
