"""SGD in separate torch operations, each rounded once, in the order that every backend keeps."""

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE, SgdArgs
from pyzero.ops.reference.parts import each_grad
from pyzero.ops.reference.scalars import round_to, scalar


@torch.no_grad()
def sgd_(args: SgdArgs) -> None:
    """See `pyzero.ops.sgd_`."""
    for grad, part in each_grad(args):
        _update(part, grad)


def _update(args: SgdArgs, grad: Tensor) -> None:
    master, buffer, hyper, dtype = args.master, args.momentum_buffer, args.hyper, args.master.dtype
    keep = torch.zeros((), dtype=torch.bool, device=master.device)
    is_first = torch.as_tensor(args.step == 1, device=master.device)  # None is not
    if args.found_inf is not None:
        keep = args.found_inf.reshape(()) != 0
    if args.segment_ids is not None:
        of_element = args.segment_ids.long().repeat_interleave(SEGMENT_GRANULE)[: master.numel()]
        if args.active is not None:
            keep = keep | (args.active[of_element] == 0)
        if args.step is not None:
            is_first = is_first[of_element]

    update = grad.to(dtype) * scalar(args.grad_scale, dtype)
    if hyper.maximize:
        update = -update
    if hyper.weight_decay != 0:
        update = update + round_to(hyper.weight_decay, dtype) * master
    if buffer is not None:
        momentum, g = round_to(hyper.momentum, dtype), update
        update = momentum * buffer + torch.where(is_first, g, round_to(1.0 - hyper.dampening, dtype) * g)
        buffer.copy_(torch.where(keep, buffer, update))
        if hyper.nesterov:
            update = g + momentum * update
    master.copy_(torch.where(keep, master, master - scalar(args.lr, dtype) * update))
    for out in args.param_outs:
        out.copy_(torch.where(keep, out, master.to(out.dtype)))
