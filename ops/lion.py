"""lion_: one fused pass of Lion over a flat shard."""

from collections.abc import Sequence

from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import LionArgs, LionHyper, Scalar
from pyzero.ops.checks import FLAG_DTYPES, as_flag, as_number, as_scalar, check_one
from pyzero.ops.shard import LARGEST, as_list, as_lr, check_active, read_shard, refuse_hyper

_STATES = ("master", "exp_avg")


def lion_(
    master: Tensor,
    exp_avg: Tensor,
    grad: Tensor | Sequence[Tensor],
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Scalar = 1.0,
    found_inf: Tensor | None = None,
    param_out: Tensor | Sequence[Tensor] | None = None,
    segment_ids: Tensor | None = None,
    active: Tensor | None = None,
    grad_offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Update `master` and `exp_avg` in place by one step of Lion, in fp32.

    The formula is that of Chen et al. (arXiv 2302.06675), with decoupled weight decay. `master` is multiplied by
    `1 - lr * weight_decay`, and then moves by `lr` against the sign of `beta1 * exp_avg + (1 - beta1) * grad`; it does
    not move if that is 0. `exp_avg` becomes `beta2 * exp_avg + (1 - beta2) * grad`. Every backend gives the same bits.

    Args:
        master: (numel,) fp32 weights. The reference backend also takes fp64, and then computes in fp64.
        exp_avg: (numel,) fp32 moment.
        grad: (numel,) fp32, bf16 or fp16, only read. Or a list, as in adam_.
        lr: Learning rate, a number or a 0-D tensor on the same device.
        beta1: Weight of the moment in the update.
        beta2: Decay of the moment.
        weight_decay: Decoupled decay.
        maximize: Ascend instead of descend.
        grad_scale: Factor for the gradient, applied in registers, as in adam_. A number or a 0-D tensor.
        found_inf: 1-element fp32 tensor. If it is not zero, nothing is written. Without it a NaN gradient makes NaN.
        param_out: (numel,) bf16, fp16 or fp32. Receives the updated weights, rounded to nearest even. Or up to 16 such
            tensors of one dtype, as in adam_.
        segment_ids: (ceil(numel / 64),) int32. Element i belongs to segment `segment_ids[i // 64]`. All other tensors
            must then start at a multiple of 16 bytes. Matters only if some segment is not active.
        active: (num_segments,) fp32. Elements of a segment with 0 are left alone. Needs `segment_ids`.
        grad_offsets: Where each tensor of a list begins, as in adam_.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or a number is not a number.
        ValueError: A number is out of range; shapes, devices or alignment do not fit; or tensors overlap.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    beta1, beta2 = as_number("beta1", beta1), as_number("beta2", beta2)
    weight_decay = as_number("weight_decay", weight_decay)
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and 0.0 <= weight_decay <= LARGEST):
        refuse_hyper({"beta1": beta1, "beta2": beta2}, {"weight_decay": weight_decay})
    hyper = LionHyper(beta1, beta2, weight_decay, as_flag("maximize", maximize))
    outs = as_list(param_out)
    grads, offsets, rows = read_shard(_STATES, (master, exp_avg, *outs), grad, grad_offsets, segment_ids, backend)
    device = master.device
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    check_active(active, segment_ids, device)

    args = LionArgs(
        master=master,
        exp_avg=exp_avg,
        param_outs=outs,
        grads=grads,
        offsets=offsets,
        rows=rows,
        hyper=hyper,
        lr=as_lr(lr, device),
        grad_scale=as_scalar("grad_scale", grad_scale, device),
        found_inf=found_inf,
        segment_ids=segment_ids,
        active=active,
    )
    registry.pick("lion_", backend, device).lion_(args)
