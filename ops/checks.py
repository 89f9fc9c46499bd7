"""The checks that every op makes before it writes anything. Their errors say got, wanted and remedy."""

from collections.abc import Iterable, Sequence
from operator import add, gt

import torch
from torch import Tensor

from pyzero.ops.backend import Scalar
from pyzero.ops.rows import FLOAT_DTYPES as FLOAT_DTYPES

FLAG_DTYPES = (torch.float32,)
SUMSQ_DTYPES = (torch.float32, torch.float64)


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
    """Raise unless the dtype is one of the wanted ones."""
    if tensor.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"expected {name} in {names}, got {got}; {remedy}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless the tensor is on the op's device."""
    if tensor.device != device:
        raise ValueError(f"expected {name} on {device}, got {tensor.device}; move it with {name}.to({str(device)!r})")


def check_list(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise TypeError if it is one tensor instead of a list: a loop would take its rows for tensors."""
    if isinstance(tensors, Tensor):
        raise TypeError(
            f"expected {name} as a list of tensors, got a tensor of shape {tuple(tensors.shape)}; pass [tensor], or "
            f"its rows, list(tensor)"
        )


def check_gradients(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raise unless all are contiguous fp32, bf16 or fp16 tensors on the device."""
    for index, tensor in enumerate(tensors):
        if tensor.dtype in FLOAT_DTYPES and tensor.is_contiguous() and tensor.device == device:
            continue
        label = f"{name}[{index}]"
        check_dtype(label, tensor, FLOAT_DTYPES, "convert it with .float()")
        check_device(label, tensor, device)
        raise ValueError(
            f"expected {label} to be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"pass a contiguous copy, or its elements in memory order as a 1-D view"
        )


def as_scalar(name: str, value: Scalar, device: torch.device) -> Scalar:
    """Return a Python number as float, or a tensor as a 0-D fp32 tensor on `device`, without a host read."""
    if type(value) is float:
        return value
    if not isinstance(value, Tensor):
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"expected {name} as a number or a tensor of one element, got {value!r}; pass one of these")
        return float(value)
    check_device(name, value, device)
    if value.dim() == 0 and value.dtype is torch.float32 and not value.requires_grad:
        return value  # the rest takes 3 us
    if value.numel() != 1:
        raise ValueError(
            f"expected {name} as a number or a tensor of one element, got shape {tuple(value.shape)}; "
            f"pass one value for all elements"
        )
    return value.detach().reshape(()).to(torch.float32)


def check_offsets(name: str, numel: int, counts: Sequence[int], offsets: Sequence[int]) -> None:
    """Raise unless tensors of `counts` elements fit at these offsets in a flat one of `numel`, in order."""
    if len(offsets) != len(counts):
        raise ValueError(f"expected {len(counts)} offsets, one per tensor, got {len(offsets)}; pass one each")
    ends = [0, *map(add, offsets, counts)]
    if any(map(gt, ends, offsets)):
        index = list(map(gt, ends, offsets)).index(True)
        raise ValueError(
            f"expected ascending offsets that do not overlap, got offsets[{index}]={offsets[index]} below "
            f"{ends[index]}, where the tensor before ends; sort the tensors by offset"
        )
    if ends[-1] > numel:
        raise ValueError(f"expected {name} of at least {ends[-1]} elements, got {numel}; make it larger")


def is_vector(tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> bool:
    """Whether it is a flat tensor of this dtype, `numel` and device. The checks above say what is wrong."""
    return (
        tensor.dtype is dtype
        and tensor.dim() == 1
        and tensor.numel() == numel
        and tensor.is_contiguous()
        and tensor.device == device
    )


def check_one(name: str, tensor: Tensor | None, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raise unless it is None, or a tensor of one element, of one of the dtypes, on the device."""
    if tensor is None or (tensor.dtype in dtypes and tensor.numel() == 1 and tensor.device == device):
        return
    check_dtype(name, tensor, dtypes, "make it with torch.zeros(1)")
    check_device(name, tensor, device)
    raise ValueError(f"expected {name} to have 1 element, got shape {tuple(tensor.shape)}; make it with torch.zeros(1)")


def check_grad_stats(found_inf: Tensor | None, sumsq: Tensor | None, device: torch.device) -> None:
    """Check the two outputs of a pass over gradients."""
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    check_one("sumsq", sumsq, SUMSQ_DTYPES, device)


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
