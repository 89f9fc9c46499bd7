"""step_scalars_: the numbers that all elements of a step share, and the step counts, in one launch."""

import torch
from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import Scalar, StepScalarsArgs
from pyzero.ops.checks import (
    FLAG_DTYPES,
    as_number,
    as_scalar,
    check_device,
    check_disjoint,
    check_dtype,
    check_flat,
    check_tensor,
)
from pyzero.ops.rows import APART, address_of, checked_rows

STATS_COLUMNS = 3  # overflow flag, sum of squares, code of the first bad parameter
NUM_SCALARS = 4


def step_scalars_(
    out: Tensor,
    stats: Tensor,
    *,
    steps: Tensor,
    used: Tensor,
    max_norm: float | None = None,
    unscale: Scalar = 1.0,
    factor: Scalar = 1.0,
    backend: str = "auto",
) -> None:
    """Write `out`, and count the step of the parameters that have a gradient, without a host read.

    `out` is: overflow flag; gradient norm, `sqrt(sum of squares) * unscale * |factor|`; clip coefficient,
    `min(1, max_norm / (norm + 1e-6))` as in torch.nn.utils.clip_grad_norm_, or 1; and the factor for the gradients,
    `clip * factor * unscale`. Every backend gives the same bits.

    Args:
        out: (4,) fp32.
        stats: (n, 3) fp64, n >= 1: overflow flag (0 is none), sum of squares, and a column that is not read.
        steps: (num_params,) fp32. `used` is added to it, unless a flag is set.
        used: (num_params,) fp32, 1 for a parameter with a gradient, else 0.
        max_norm: Clip to this norm, from 0; None: do not clip.
        unscale: 1 / loss scale, a number or a 0-D tensor on the same device. It multiplies the norm in fp64.
        factor: Another factor for the gradients, in fp32; a number or a 0-D tensor on the same device.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or max_norm is not a number.
        ValueError: Shapes or devices do not fit, tensors overlap, or max_norm is below 0 or NaN.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    check_dtype("stats", stats, (torch.float64,), "make it with dtype=torch.float64")
    if stats.dim() != 2 or stats.shape[1] != STATS_COLUMNS or not stats.shape[0] or not stats.is_contiguous():
        raise ValueError(
            f"expected contiguous stats of shape (n, {STATS_COLUMNS}), got shape {tuple(stats.shape)} with strides "
            f"{stats.stride()}; stack one row per rank"
        )
    device = stats.device
    address_of(stats)
    max_norm = None if max_norm is None else as_number("max_norm", max_norm, "a number or None")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"expected max_norm from 0, got {max_norm}; pass None not to clip")
    check_tensor("steps", steps)
    num_params = steps.numel()
    fits = checked_rows((out, steps, used), 3, APART) is not None and steps.device == device
    if not fits or out.shape != (NUM_SCALARS,) or steps.dim() != 1 or steps.shape != used.shape:
        _explain(("out", out, NUM_SCALARS), ("steps", steps, num_params), ("used", used, num_params), device=device)
    args = StepScalarsArgs(
        out=out,
        stats=stats,
        max_norm=max_norm,
        unscale=as_scalar("unscale", unscale, device),
        factor=as_scalar("factor", factor, device),
        steps=steps,
        used=used,
    )
    registry.pick("step_scalars_", backend, device).step_scalars_(args)


def _explain(*named: tuple[str, Tensor, int], device: torch.device) -> None:
    """Raise for what is wrong with flat fp32 tensors of these lengths on the device, which must not overlap."""
    for name, tensor, numel in named:
        check_dtype(name, tensor, FLAG_DTYPES, "make it with dtype=torch.float32")
        check_flat(name, tensor, numel=numel)
        check_device(name, tensor, device)
        address_of(tensor)
    check_disjoint((name, tensor) for name, tensor, _ in named)
