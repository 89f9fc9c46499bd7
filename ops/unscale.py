"""unscale_: multiply a list of gradients in place, check them, and add up their squares, in one pass."""

from collections.abc import Sequence

from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import Scalar, UnscaleArgs
from pyzero.ops.checks import as_scalar, check_disjoint, check_grad_stats, check_gradients, check_list, check_tensor
from pyzero.ops.rows import APART, checked_rows, rows_of


def unscale_(
    tensors: Sequence[Tensor],
    inv_scale: Scalar,
    *,
    found_inf: Tensor | None,
    sumsq: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Multiply every tensor by `inv_scale` in place, in one launch for the whole list.

    With the number 1.0 the pass only reads: it checks and sums squares, and moves half the bytes.

    Args:
        tensors: Contiguous fp32, bf16 or fp16 tensors of any shape on one device. May be empty.
        inv_scale: 1 / loss scale, a number or a 0-D tensor on the same device.
        found_inf: 1-element fp32 tensor, set to 1 if a stored value is inf or NaN, and never cleared; or None.
        sumsq: 1-element fp32 or fp64 tensor. The sum of squares of the stored values is added to it. The sum is taken
            in fp64 in a fixed order, so it is the same from run to run. Or None.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or a tensor is passed instead of a list.
        ValueError: A tensor is not contiguous, lies on another device, or, unless the pass only reads, overlaps
            another; or there is no such backend.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    check_list("tensors", tensors)
    if not len(tensors):
        registry.check_name(backend)
        return
    reads_only = not isinstance(inv_scale, Tensor) and inv_scale == 1.0
    rows = checked_rows(tensors, rules=0 if reads_only else APART)
    if rows is None:
        rows = _explain(tensors, reads_only)
    device = tensors[0].device
    check_grad_stats(found_inf, sumsq, device)
    args = UnscaleArgs(
        tensors=tensors,
        rows=rows,
        inv_scale=as_scalar("inv_scale", inv_scale, device),
        found_inf=found_inf,
        sumsq=sumsq,
    )
    registry.pick("unscale_", backend, device).unscale_(args)


def _explain(tensors: Sequence[Tensor], reads_only: bool) -> bytes:
    check_tensor("tensors[0]", tensors[0])
    check_gradients("tensors", tensors, tensors[0].device)
    if not reads_only:
        check_disjoint((f"tensors[{index}]", tensor) for index, tensor in enumerate(tensors))
    return rows_of(tensors)
