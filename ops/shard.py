"""What adam_ and lion_ check of a flat shard: the tensors side by side, and the segments that they are cut into."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE
from pyzero.ops.checks import check_device, check_disjoint, check_dtype, check_flat
from pyzero.ops.rows import FLOAT_DTYPES, addresses, rows_of

_ALIGNMENT_BYTES = 16


def shard_rows(names: Sequence[str], tensors: Sequence[Tensor], num_states: int, backend: str) -> bytes:
    """Rows of the checked tensors: `num_states` fp32 ones, the master first, then the gradient, then param_out or none.

    The reference also computes in fp64, as an oracle: no rows then.
    """
    master = tensors[0]
    oracle = backend == "reference" and master.dtype == torch.float64
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
    return b"" if oracle else rows_of(tensors)


def check_segment_ids(segment_ids: Tensor, master: Tensor, rows: bytes) -> None:
    """One int32 per granule, and rows of tensors that start where a vector may: none straddles two segments."""
    num_granules = -(-master.numel() // SEGMENT_GRANULE)
    check_dtype("segment_ids", segment_ids, (torch.int32,), "convert it with .to(torch.int32)")
    check_flat("segment_ids", segment_ids)
    check_device("segment_ids", segment_ids, master.device)
    if segment_ids.numel() != num_granules:
        raise ValueError(
            f"expected segment_ids to have one entry per {SEGMENT_GRANULE} elements, {num_granules}, "
            f"got {segment_ids.numel()}; slice it as the shard is sliced"
        )
    if any(address % _ALIGNMENT_BYTES for address in addresses(rows)):
        raise ValueError(
            f"expected tensors that start at a multiple of {_ALIGNMENT_BYTES} bytes with segment_ids, got one that "
            f"does not; start each shard at a multiple of {SEGMENT_GRANULE} elements"
        )


def check_per_segment(name: str, tensor: Tensor, device: torch.device, num_segments: int | None = None) -> None:
    """One fp32 value per segment."""
    check_dtype(name, tensor, (torch.float32,), "convert it with .float()")
    check_flat(name, tensor, numel=num_segments)
    check_device(name, tensor, device)
