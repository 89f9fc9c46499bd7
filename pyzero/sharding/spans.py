"""Where the elements of tensors lie in memory, and whether two share a place."""

import torch
from torch import Tensor


def extent(tensor: Tensor) -> int:
    """Return the number of elements from the tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def share_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors with overlapping spans of memory have bytes in common. True if element sizes differ."""
    size = one.element_size()
    are_dense = (extent(one), extent(other)) == (one.numel(), other.numel())
    if are_dense or size != other.element_size() or (one.data_ptr() - other.data_ptr()) % size:
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def repeats_elements(tensor: Tensor) -> bool:
    """Whether two elements of a tensor lie in one place, as in an expanded tensor."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:  # rows may interleave if one begins before the last ends
            return tensor.numel() > 0 and (stride == 0 or _addresses(tensor).unique().numel() < tensor.numel())
        reach += (size - 1) * stride
    return False


def _addresses(tensor: Tensor) -> Tensor:
    """Return the addresses of a tensor's elements: (numel,)."""
    found = torch.tensor([tensor.data_ptr()], device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + torch.arange(size, device="cpu") * (stride * tensor.element_size())).flatten()
    return found
