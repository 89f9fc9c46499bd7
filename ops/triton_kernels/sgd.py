"""SGD with momentum (torch.optim.SGD) over a flat shard, and the 16-bit weights with it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import SgdArgs
from .common import as_f32, load_f32, load_scalar
from .shard_grads import launch_over_grads, read_row, store_weights

BLOCK = 1024  # elements; one or two fp32 streams of 8 per thread and the gradients are 3 to 6 16-byte loads in flight


@triton.jit
def _sgd_block(
    master, momentum_buffer, grad, param_out,  # advanced to the block's first element
    peers, base,  # see store_weights
    offsets, load_mask, store_mask, is_first, grad_scale, lr, momentum, one_minus_dampening, weight_decay,
    NESTEROV: tl.constexpr, NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    p = tl.load(master + offsets, mask=load_mask)
    if momentum_buffer is not None:
        m = tl.load(momentum_buffer + offsets, mask=load_mask)
    g = load_f32(grad + offsets, load_mask)

    g = g * grad_scale
    if weight_decay is not None:
        g = g + weight_decay * p
    if momentum_buffer is not None:
        m = momentum * m + tl.where(is_first, 1.0, one_minus_dampening) * g
        tl.store(momentum_buffer + offsets, m, mask=store_mask)
        if NESTEROV:
            g = g + momentum * m
        else:
            g = m
    p = p - lr * g

    tl.store(master + offsets, p, mask=store_mask)
    if param_out is not None:
        store_weights(param_out, peers, base, offsets, p, store_mask, NUM_PEERS, PEERS_ALIGNED)


@triton.jit
def _update(
    master, momentum_buffer, param_out, peers, grad,  # grad: advanced to the block's first element
    base, left,  # the block's first element in the shard, and how many there are from it on
    grad_scale, negate, lr, step_tensor, momentum, one_minus_dampening, weight_decay, segment_ids, active,
    NESTEROV: tl.constexpr, IS_FIRST: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, LR_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK // SEGMENT)[:, None]
    offsets = rows * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    # The same for a whole row, so that a masked store is still 16 bytes wide.
    keep = rows >= 0
    is_first = tl.full((BLOCK // SEGMENT, 1), IS_FIRST, tl.int1)
    segment = tl.zeros((BLOCK // SEGMENT, 1), tl.int32)
    if segment_ids is not None:
        segment = tl.load(segment_ids + base // SEGMENT + rows, mask=rows * SEGMENT < left, other=0)
    if active is not None:
        keep = tl.load(active + segment) != 0.0
    if step_tensor is not None:
        is_first = tl.load(step_tensor + segment) == 1.0
    scale = load_scalar(grad_scale, SCALE_IS_TENSOR) * as_f32(negate)
    rate = load_scalar(lr, LR_IS_TENSOR)
    momentum = as_f32(momentum)
    one_minus_dampening = as_f32(one_minus_dampening)
    if weight_decay is not None:
        weight_decay = as_f32(weight_decay)

    master += base
    if momentum_buffer is not None:
        momentum_buffer += base
    if param_out is not None:
        param_out += base
    if left < BLOCK:
        inside = offsets < left
        _sgd_block(master, momentum_buffer, grad, param_out, peers, base, offsets, inside, inside & keep, is_first,
                   scale, rate, momentum, one_minus_dampening, weight_decay, NESTEROV, NUM_PEERS,
                   PEERS_ALIGNED)  # fmt: skip
    else:
        _sgd_block(master, momentum_buffer, grad, param_out, peers, base, offsets, None,
                   None if active is None else keep, is_first, scale, rate, momentum, one_minus_dampening,
                   weight_decay, NESTEROV, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def sgd_kernel(
    master,  # fp32 (n,), read and written
    momentum_buffer,  # the same, or None
    param_out,  # fp32, bf16 or fp16 (n,), written, or None
    peers,  # int64 (NUM_PEERS,) or None: addresses of more such tensors
    grad,  # fp32, bf16 or fp16 (n,)
    n,
    found_inf,  # fp32 (1,) or None
    grad_scale, negate, lr,
    step_tensor,  # fp32 (num_segments,) or None; used instead of IS_FIRST
    momentum, one_minus_dampening,
    weight_decay,  # or None: none
    segment_ids,  # int32 (ceil(n/64),) or None
    active,  # fp32 (num_segments,) or None
    NESTEROV: tl.constexpr, IS_FIRST: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, LR_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK elements, as rows of one segment entry each.

    Bytes per element: read 8 + grad, write 8 + param_out; 20 in fp32 alone, 20 with both in 16 bits; 8 less without a
    momentum buffer.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    base = tl.program_id(0).to(tl.int64) * BLOCK
    _update(master, momentum_buffer, param_out, peers, grad + base, base, n - base, grad_scale, negate, lr,
            step_tensor, momentum, one_minus_dampening, weight_decay, segment_ids, active,
            NESTEROV, IS_FIRST, SCALE_IS_TENSOR, LR_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit
def sgd_list_kernel(
    master, momentum_buffer, param_out, peers,
    table,  # int64 (num_programs, COLUMNS): address of the gradient, its first element in the shard, numel
    found_inf, grad_scale, negate, lr, step_tensor, momentum, one_minus_dampening, weight_decay, segment_ids, active,
    NESTEROV: tl.constexpr, IS_FIRST: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, LR_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,  # element type; all addresses are multiples of 16 bytes
):  # fmt: skip
    """The same where gradients lie apart: one program per row."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    grad, base, left = read_row(table, GRAD, ALIGNED, SEGMENT)
    while left > 0:
        _update(master, momentum_buffer, param_out, peers, grad, base, left, grad_scale, negate, lr, step_tensor,
                momentum, one_minus_dampening, weight_decay, segment_ids, active, NESTEROV, IS_FIRST,
                SCALE_IS_TENSOR, LR_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip
        grad += BLOCK
        base += BLOCK
        left -= BLOCK


def sgd_(args: SgdArgs) -> None:
    """Update a flat shard in place."""
    hyper, lr, step = args.hyper, args.lr, args.step
    launch_over_grads(
        sgd_kernel, sgd_list_kernel, args, (args.master, args.momentum_buffer),
        lr, step if isinstance(step, Tensor) else None, float(hyper.momentum), 1.0 - hyper.dampening,
        float(hyper.weight_decay) if hyper.weight_decay != 0 else None,
        NESTEROV=bool(hyper.nesterov), IS_FIRST=not isinstance(step, Tensor) and step == 1,
        LR_IS_TENSOR=isinstance(lr, Tensor), BLOCK=BLOCK,
    )  # fmt: skip
