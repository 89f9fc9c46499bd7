"""Lion in separate torch operations, each rounded once, in the order that every backend keeps."""

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE, LionArgs
from pyzero.ops.reference.parts import each_grad
from pyzero.ops.reference.scalars import round_to, scalar


@torch.no_grad()
def lion_(args: LionArgs) -> None:
    """See `pyzero.ops.lion_`."""
    for grad, part in each_grad(args):
        _update(part, grad)


def _update(args: LionArgs, grad: Tensor) -> None:
    master, hyper, dtype = args.master, args.hyper, args.master.dtype
    keep = torch.zeros((), dtype=torch.bool, device=master.device)
    if args.found_inf is not None:
        keep = args.found_inf.reshape(()) != 0
    if args.segment_ids is not None and args.active is not None:
        idle = args.active == 0
        keep = keep | idle[args.segment_ids.long()].repeat_interleave(SEGMENT_GRANULE)[: master.numel()]

    lr = args.lr.double() if isinstance(args.lr, Tensor) else args.lr
    g = grad.to(dtype) * scalar(args.grad_scale, dtype)
    if hyper.maximize:
        g = -g
    blend = round_to(hyper.beta1, dtype) * args.exp_avg + round_to(1.0 - hyper.beta1, dtype) * g
    direction = torch.where(blend.isnan(), blend, blend.sign())
    p = master * scalar(1.0 - lr * hyper.weight_decay, dtype) - scalar(lr, dtype) * direction
    m = round_to(hyper.beta2, dtype) * args.exp_avg + round_to(1.0 - hyper.beta2, dtype) * g

    for old, new in ((master, p), (args.exp_avg, m)):
        old.copy_(torch.where(keep, old, new))
    for out in args.param_outs:
        out.copy_(torch.where(keep, out, master.to(out.dtype)))
