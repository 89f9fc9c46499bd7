"""Adam in separate torch operations, each rounded once, in the order that every backend keeps."""

import math

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE, AdamArgs, AdamHyper
from pyzero.ops.reference.parts import each_grad
from pyzero.ops.reference.scalars import round_to, scalar

_MAX_STEP_BITS = 31


@torch.no_grad()
def adam_(args: AdamArgs) -> None:
    """See `pyzero.ops.adam_`."""
    for grad, part in each_grad(args):
        _update(part, grad)


def _update(args: AdamArgs, grad: Tensor) -> None:
    master, hyper, dtype = args.master, args.hyper, args.master.dtype
    step_size, inv_sqrt_bc2, decay = _constants(hyper, args.lr, args.step, dtype)
    keep = torch.zeros((), dtype=torch.bool, device=master.device)
    if args.found_inf is not None:
        keep = args.found_inf.reshape(()) != 0
    if args.segment_ids is not None:
        of_element = args.segment_ids.long().repeat_interleave(SEGMENT_GRANULE)[: master.numel()]
        step_size, inv_sqrt_bc2, decay = (x[of_element] for x in (step_size, inv_sqrt_bc2, decay))  # type: ignore[index]
        if args.active is not None:
            keep = keep | (args.active[of_element] == 0)

    g = grad.to(dtype) * scalar(args.grad_scale, dtype)
    if hyper.maximize:
        g = -g
    p = master
    if hyper.weight_decay != 0 and not hyper.decoupled_weight_decay:
        g = g + round_to(hyper.weight_decay, dtype) * p
    else:
        p = p * decay
    m = args.exp_avg + (g - args.exp_avg) * round_to(1.0 - hyper.beta1, dtype)
    v = args.exp_avg_sq * round_to(hyper.beta2, dtype) + (round_to(1.0 - hyper.beta2, dtype) * g) * g
    denominator = _sqrt(v) * inv_sqrt_bc2 + round_to(hyper.eps, dtype)
    p = p - (step_size * m) / denominator

    for old, new in ((master, p), (args.exp_avg, m), (args.exp_avg_sq, v)):
        old.copy_(torch.where(keep, old, new))
    for out in args.param_outs:
        out.copy_(torch.where(keep, out, master.to(out.dtype)))


def _sqrt(value: Tensor) -> Tensor:
    """Rounded correctly: torch's own fp32 sqrt on CPUs may be off by one unit (MKL), and fp64's, narrowed, is not."""
    return value.double().sqrt().to(value.dtype)


def _constants(
    hyper: AdamHyper, lr: float | Tensor, step: float | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """Step size, 1 / sqrt(bias correction 2) and decay factor: in fp64, rounded once at the end."""
    decoupled = hyper.decoupled_weight_decay and hyper.weight_decay != 0
    if isinstance(lr, Tensor):
        lr = lr.double()
    if isinstance(step, Tensor):
        bc1 = 1.0 - _pow_tensor(hyper.beta1, step)
        bc2 = 1.0 - _pow_tensor(hyper.beta2, step)
        inv_sqrt_bc2: float | Tensor = 1.0 / bc2.sqrt()
        step_size: float | Tensor = lr / bc1
    else:
        step_size = lr / (1.0 - _pow_number(hyper.beta1, int(step)))
        inv_sqrt_bc2 = 1.0 / math.sqrt(1.0 - _pow_number(hyper.beta2, int(step)))
    decay: float | Tensor = 1.0 - lr * hyper.weight_decay if decoupled else 1.0
    if isinstance(step, Tensor) and step.dim() == 1:
        decay = torch.as_tensor(decay, dtype=torch.float64, device=step.device).expand_as(step)
    return scalar(step_size, dtype), scalar(inv_sqrt_bc2, dtype), scalar(decay, dtype)


def _pow_number(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _pow_tensor(base: float, exponent: Tensor) -> Tensor:
    """The same products in the same order, for exponents that stay on their device."""
    bits = exponent.to(torch.int64)
    result = torch.ones_like(exponent, dtype=torch.float64)
    for bit in range(_MAX_STEP_BITS):
        result = torch.where((bits >> bit) & 1 == 1, result * base, result)
        base *= base
    return result
