"""What adam_ and lion_ check of a flat shard: the tensors side by side, and the segments that they are cut into."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE
from pyzero.ops.checks import check_device, check_disjoint, check_dtype, check_flat, is_vector
from pyzero.ops.rows import ALIGNED, ALIGNMENT_BYTES, APART, FLAT, FLOAT_DTYPES, checked_rows, rows_of


def shard_rows(
    names: Sequence[str], tensors: Sequence[Tensor], num_states: int, segment_ids: Tensor | None, backend: str
) -> bytes:
    """Rows of the checked tensors: `num_states` fp32 ones, the master first, then the gradient, then param_out or none.

    With `segment_ids` they must start where a vector may, so that none straddles two segments. The reference also
    computes in fp64, as an oracle: no rows then.
    """
    rules = FLAT | APART if segment_ids is None else FLAT | APART | ALIGNED
    rows = checked_rows(tensors, num_states, rules)
    if rows is None:
        rows = _explain(names, tensors, num_states, segment_ids, backend)
    if segment_ids is not None:
        _check_segment_ids(segment_ids, tensors[0])
    return rows


def check_per_segment(name: str, tensor: Tensor, num_segments: int, device: torch.device) -> None:
    """One fp32 value per segment."""
    if is_vector(tensor, torch.float32, num_segments, device):
        return
    check_dtype(name, tensor, (torch.float32,), "convert it with .float()")
    check_flat(name, tensor, numel=num_segments)
    check_device(name, tensor, device)


def _check_segment_ids(segment_ids: Tensor, master: Tensor) -> None:
    num_granules = -(-master.numel() // SEGMENT_GRANULE)
    if is_vector(segment_ids, torch.int32, num_granules, master.device):
        return
    check_dtype("segment_ids", segment_ids, (torch.int32,), "convert it with .to(torch.int32)")
    check_flat("segment_ids", segment_ids)
    check_device("segment_ids", segment_ids, master.device)
    raise ValueError(
        f"expected segment_ids to have one entry per {SEGMENT_GRANULE} elements, {num_granules}, "
        f"got {segment_ids.numel()}; slice it as the shard is sliced"
    )


def _explain(
    names: Sequence[str], tensors: Sequence[Tensor], num_states: int, segment_ids: Tensor | None, backend: str
) -> bytes:
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
    if segment_ids is not None and any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in tensors):
        raise ValueError(
            f"expected tensors that start at a multiple of {ALIGNMENT_BYTES} bytes with segment_ids, got one that "
            f"does not; start each shard at a multiple of {SEGMENT_GRANULE} elements"
        )
    return b"" if oracle else rows_of(tensors)
