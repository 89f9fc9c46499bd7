"""The checks that every op makes before it writes anything. Their errors say got, wanted and remedy."""

import math
from array import array
from collections.abc import Iterable, Sequence
from operator import add, gt
from typing import Any

import torch
from torch import Tensor

from pyzero.ops.backend import Scalar
from pyzero.ops.rows import FLOAT_DTYPES as FLOAT_DTYPES
from pyzero.ops.rows import address_of

FLAG_DTYPES = (torch.float32,)
SUMSQ_DTYPES = (torch.float32, torch.float64)


def check_tensor(name: str, tensor: Any) -> None:
    """Raise TypeError unless it is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} as a tensor, got {_kind(tensor)}; pass a torch.Tensor")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def check_flat(name: str, tensor: Tensor, *, numel: int | None = None) -> None:
    """Raise unless it is a 1-D contiguous tensor, of `numel` elements if that is given."""
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"expected {name} to be a contiguous 1-D tensor, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; pass {name}.view(-1) of a contiguous tensor"
        )
    if numel is not None and tensor.numel() != numel:
        raise ValueError(
            f"expected {name} to have {numel} elements like the first argument, got {tensor.numel()}; "
            f"pass slices of equal length"
        )


def check_dtype(name: str, tensor: Tensor, wanted: Sequence[torch.dtype], remedy: str) -> None:
    """Raise unless it is a tensor whose dtype is one of the wanted ones."""
    check_tensor(name, tensor)
    if tensor.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"expected {name} in {names}, got {got}; {remedy}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless the tensor is on the op's device."""
    if tensor.device != device:
        raise ValueError(f"expected {name} on {device}, got {tensor.device}; move it with {name}.to({str(device)!r})")


def check_list(name: str, tensors: Any, wanted: str = "a list of tensors") -> None:
    """Raise TypeError if it is not a sequence, or one tensor, whose rows a loop would take for tensors."""
    if isinstance(tensors, (list, tuple)):
        return
    if isinstance(tensors, Tensor):
        raise TypeError(
            f"expected {name} as {wanted}, got a tensor of shape {tuple(tensors.shape)}; pass [tensor], or "
            f"its rows, list(tensor)"
        )
    if not isinstance(tensors, (Sequence, torch.nn.ParameterList)):
        raise TypeError(f"expected {name} as {wanted}, got {_kind(tensors)}; pass a list of torch.Tensor")


def check_gradients(
    name: str, tensors: Sequence[Tensor], device: torch.device, wanted: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Raise unless all are contiguous tensors on the device, in one of the dtypes."""
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, Tensor) and tensor.dtype in wanted and tensor.is_contiguous() and tensor.device == device:
            continue
        label = f"{name}[{index}]"
        check_dtype(label, tensor, wanted, "convert it with .float()")
        check_device(label, tensor, device)
        raise ValueError(
            f"expected {label} to be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"pass a contiguous copy, or its elements in memory order as a 1-D view"
        )


def as_number(name: str, value: Any, wanted: str = "a number", remedy: str = "pass one") -> float:
    """Return a number as float: -0.0 as 0.0, as Triton's interpreter has it, and one too large as an infinity."""
    if type(value) is float:
        return value + 0.0
    if not isinstance(value, str) and hasattr(value, "__float__"):
        try:
            return float(value) + 0.0
        except OverflowError:
            return math.copysign(math.inf, value > 0 or -1)
        except (TypeError, ValueError, RuntimeError):  # an array of several numbers
            pass
    raise TypeError(f"expected {name} as {wanted}, got {value!r}; {remedy}")


def as_flag(name: str, value: Any) -> bool:
    """Return a truth value as bool. A text is none."""
    if type(value) is bool:
        return value
    if not hasattr(value, "__bool__"):
        raise TypeError(f"expected {name} as True or False, got {value!r}; pass one of these")
    return bool(value)


def as_scalar(name: str, value: Scalar, device: torch.device) -> Scalar:
    """Return a Python number as float, or a tensor as a 0-D fp32 tensor on `device`, without a host read."""
    if not isinstance(value, Tensor):
        return as_number(name, value, "a number or a tensor of one element", "pass one of these")
    check_device(name, value, device)
    address_of(value)
    if value.dim() == 0 and value.dtype is torch.float32 and not value.requires_grad:
        return value  # the rest takes 3 us
    if value.numel() != 1:
        raise ValueError(
            f"expected {name} as a number or a tensor of one element, got shape {tuple(value.shape)}; "
            f"pass one value for all elements"
        )
    return value.detach().reshape(()).to(torch.float32)


def check_offsets(name: str, numel: int, counts: Sequence[int], offsets: Any) -> list[int]:
    """Return the offsets as ints. Raise unless tensors of `counts` elements fit there in a flat one of `numel`."""
    try:
        starts = array("q", offsets).tolist()
    except OverflowError:
        starts = list(offsets)  # one is out of range, and refused below
    except TypeError:
        raise TypeError(f"expected offsets as a list of whole numbers, got {offsets!r}; convert them") from None
    if len(starts) != len(counts):
        raise ValueError(f"expected {len(counts)} offsets, one per tensor, got {len(starts)}; pass one each")
    ends = [0, *map(add, starts, counts)]
    if any(map(gt, ends, starts)):
        index = list(map(gt, ends, starts)).index(True)
        raise ValueError(
            f"expected ascending offsets that do not overlap, got offsets[{index}]={starts[index]} below "
            f"{ends[index]}, where the tensor before ends; sort the tensors by offset"
        )
    if ends[-1] > numel:
        raise ValueError(f"expected {name} of at least {ends[-1]} elements, got {numel}; make it larger")
    return starts


def is_vector(tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> bool:
    """Whether it is a flat tensor of this dtype, `numel` and device. The checks above say what is wrong.

    Raise ValueError if only its memory is missing.
    """
    fits = (
        isinstance(tensor, Tensor)
        and tensor.dtype is dtype
        and tensor.dim() == 1
        and tensor.numel() == numel
        and tensor.is_contiguous()
        and tensor.device == device
    )
    if fits:
        address_of(tensor)
    return fits


def check_one(name: str, tensor: Tensor | None, dtypes: Sequence[torch.dtype], device: torch.device) -> int:
    """Return its address, 0 for None. Raise unless it has one element in memory, one of the dtypes, and the device."""
    if tensor is None:
        return 0
    if isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.numel() == 1 and tensor.device == device:
        return address_of(tensor)
    check_dtype(name, tensor, dtypes, "make it with torch.zeros(1)")
    check_device(name, tensor, device)
    raise ValueError(f"expected {name} to have 1 element, got shape {tuple(tensor.shape)}; make it with torch.zeros(1)")


def check_grad_stats(found_inf: Tensor | None, sumsq: Tensor | None, device: torch.device) -> None:
    """Check the two outputs of a pass over gradients."""
    flag = check_one("found_inf", found_inf, FLAG_DTYPES, device)
    total = check_one("sumsq", sumsq, SUMSQ_DTYPES, device)
    if found_inf is not None and sumsq is not None and abs(flag - total) < 8:
        check_disjoint([("found_inf", found_inf), ("sumsq", sumsq)])


def check_disjoint(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if two of them share memory."""
    spans = sorted(
        (start, start + tensor.numel() * tensor.element_size(), name)
        for name, tensor in named
        if tensor.numel() and (start := tensor.data_ptr())
    )
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ValueError(
                f"expected {first} and {second} not to overlap, got memory that they share; "
                f"pass each tensor once, or a clone"
            )
