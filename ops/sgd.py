"""sgd_: one fused pass of SGD, with or without momentum, over a flat shard."""

from collections.abc import Sequence

from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import Scalar, SgdArgs, SgdHyper
from pyzero.ops.checks import FLAG_DTYPES, as_flag, as_number, as_scalar, check_one
from pyzero.ops.shard import LARGEST, as_list, as_lr, check_active, checked_step, read_shard, refuse_hyper

_STATES = ("master", "momentum_buffer")


def sgd_(
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor | Sequence[Tensor],
    *,
    lr: Scalar,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    step: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    found_inf: Tensor | None = None,
    param_out: Tensor | Sequence[Tensor] | None = None,
    segment_ids: Tensor | None = None,
    active: Tensor | None = None,
    grad_offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Update `master` and `momentum_buffer` in place by one step of SGD, in fp32.

    The formula is torch.optim.SGD's: `g = grad + weight_decay * master`. The buffer becomes
    `momentum * buffer + (1 - dampening) * g`; in the first step, where torch's begins as `g`, `g` is not dampened.
    `master` moves by `lr` against the buffer, with `nesterov` against `g + momentum * buffer`, and without a buffer
    against `g`. Every backend gives the same bits.

    Args:
        master: (numel,) fp32 weights. The reference backend also takes fp64, and then computes in fp64.
        momentum_buffer: (numel,) fp32, zero at first. None: no momentum, and `dampening` has no effect.
        grad: (numel,) fp32, bf16 or fp16, only read. Or a list, as in adam_.
        lr: Learning rate, a number or a 0-D tensor on the same device.
        momentum: Decay of the buffer.
        dampening: Dampening of the gradient in the buffer.
        weight_decay: L2 penalty.
        nesterov: Use Nesterov momentum.
        maximize: Ascend instead of descend.
        step: Step count, from 1, as in adam_. Needed with dampening.
        grad_scale: Factor for the gradient, applied in registers, as in adam_. A number or a 0-D tensor.
        found_inf: 1-element fp32 tensor. If it is not zero, nothing is written.
        param_out: (numel,) bf16, fp16 or fp32. Receives the updated weights, rounded to nearest even. Or up to 16 such
            tensors of one dtype, as in adam_.
        segment_ids: (ceil(numel / 64),) int32. Element i belongs to segment `segment_ids[i // 64]`. All other tensors
            must then start at a multiple of 16 bytes. Matters with dampening, or if some segment is not active.
        active: (num_segments,) fp32. Elements of a segment with 0 are left alone. Needs `segment_ids`.
        grad_offsets: Where each tensor of a list begins, as in adam_.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or a number is not a number.
        ValueError: A number is out of range; shapes, devices or alignment do not fit; tensors overlap; there is
            momentum without a buffer, or dampening without a step count.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    momentum, dampening = as_number("momentum", momentum), as_number("dampening", dampening)
    weight_decay = as_number("weight_decay", weight_decay)
    is_dampened = momentum_buffer is not None and dampening != 0
    if momentum_buffer is None and momentum != 0:
        raise ValueError(f"expected momentum 0 without momentum_buffer, got {momentum}; pass torch.zeros_like(master)")
    if is_dampened and step is None:
        raise ValueError(f"expected step with dampening {dampening}, got none; pass the step count, from 1")
    if not (0.0 <= momentum <= LARGEST and -LARGEST <= dampening <= LARGEST and 0.0 <= weight_decay <= LARGEST):
        numbers = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        refuse_hyper({}, numbers, signed=("dampening",))
    flags = as_flag("nesterov", nesterov), as_flag("maximize", maximize)
    hyper = SgdHyper(momentum, dampening, weight_decay, *flags)
    outs = as_list(param_out)
    states = (master,) if momentum_buffer is None else (master, momentum_buffer)
    shard = (*states, *outs)
    grads, offsets, rows = read_shard(_STATES[: len(states)], shard, grad, grad_offsets, segment_ids, backend)
    device = master.device
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    check_active(active, segment_ids, device)
    if step is not None:
        step = checked_step(step, segment_ids, active, device)

    args = SgdArgs(
        master=master,
        momentum_buffer=momentum_buffer,
        param_outs=outs,
        grads=grads,
        offsets=offsets,
        rows=rows,
        hyper=hyper,
        lr=as_lr(lr, device),
        step=step if is_dampened else None,
        grad_scale=as_scalar("grad_scale", grad_scale, device),
        found_inf=found_inf,
        segment_ids=segment_ids,
        active=active,
    )
    registry.pick("sgd_", backend, device).sgd_(args)
