"""adam_: one fused pass of Adam or AdamW over a flat shard."""

from collections.abc import Sequence

from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import AdamArgs, AdamHyper, Scalar
from pyzero.ops.checks import FLAG_DTYPES, as_flag, as_number, as_scalar, check_one
from pyzero.ops.shard import LARGEST, as_list, as_lr, check_active, checked_step, read_shard, refuse_hyper

_STATES = ("master", "exp_avg", "exp_avg_sq")


def adam_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor | Sequence[Tensor],
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Scalar = 1.0,
    found_inf: Tensor | None = None,
    param_out: Tensor | Sequence[Tensor] | None = None,
    segment_ids: Tensor | None = None,
    active: Tensor | None = None,
    grad_offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Update `master`, `exp_avg` and `exp_avg_sq` in place by one step of Adam, in fp32.

    The formula is torch.optim.Adam's (Kingma & Ba, arXiv 1412.6980), or AdamW's (Loshchilov & Hutter,
    arXiv 1711.05101) with `decoupled_weight_decay`. Every backend gives the same bits.

    Args:
        master: (numel,) fp32 weights. The reference backend also takes fp64, and then computes in fp64.
        exp_avg: (numel,) fp32 first moment.
        exp_avg_sq: (numel,) fp32 second moment.
        grad: (numel,) fp32, bf16 or fp16, only read. Or a list of contiguous tensors of one of these dtypes and any
            shape, each read in place. Elements without a gradient are left alone.
        lr: Learning rate, a number or a 0-D tensor on the same device.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, or decoupled decay.
        step: Step count, from 1: a number or a 0-D tensor; with `segment_ids`, (num_segments,) fp32.
        decoupled_weight_decay: Use AdamW's decay instead of Adam's.
        maximize: Ascend instead of descend.
        grad_scale: Factor for the gradient, applied in registers: clip coefficient, 1 / loss scale. A number or a 0-D
            tensor.
        found_inf: 1-element fp32 tensor. If it is not zero, nothing is written.
        param_out: (numel,) bf16, fp16 or fp32. Receives the updated weights, rounded to nearest even. Or up to 16 such
            tensors of one dtype that all receive them: this rank's weights, and those of peers in memory that this
            device can write.
        segment_ids: (ceil(numel / 64),) int32. Element i belongs to segment `segment_ids[i // 64]`. All other tensors
            must then start at a multiple of 16 bytes.
        active: (num_segments,) fp32. Elements of a segment with 0 are left alone. Needs `segment_ids`.
        grad_offsets: Where each tensor of a list begins in `master`, in elements: ascending multiples of 64. Needs a
            list, and all tensors but the gradients must start at a multiple of 16 bytes.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or a number is not a number.
        ValueError: A number is out of range; shapes, devices or alignment do not fit; or tensors overlap.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    beta1, beta2 = as_number("beta1", beta1), as_number("beta2", beta2)
    eps, weight_decay = as_number("eps", eps), as_number("weight_decay", weight_decay)
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and 0.0 <= eps <= LARGEST and 0.0 <= weight_decay <= LARGEST):
        refuse_hyper({"beta1": beta1, "beta2": beta2}, {"eps": eps, "weight_decay": weight_decay})
    decoupled = as_flag("decoupled_weight_decay", decoupled_weight_decay)
    hyper = AdamHyper(beta1, beta2, eps, weight_decay, decoupled, as_flag("maximize", maximize))
    outs = as_list(param_out)
    shard = (master, exp_avg, exp_avg_sq, *outs)
    grads, offsets, rows = read_shard(_STATES, shard, grad, grad_offsets, segment_ids, backend)
    device = master.device
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    check_active(active, segment_ids, device)
    step = checked_step(step, segment_ids, active, device)

    args = AdamArgs(
        master=master,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        param_outs=outs,
        grads=grads,
        offsets=offsets,
        rows=rows,
        hyper=hyper,
        lr=as_lr(lr, device),
        step=step,
        grad_scale=as_scalar("grad_scale", grad_scale, device),
        found_inf=found_inf,
        segment_ids=segment_ids,
        active=active,
    )
    registry.pick("adam_", backend, device).adam_(args)
