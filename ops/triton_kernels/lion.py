"""Lion (Chen et al. 2023) over a flat shard, and the 16-bit weights with it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import LionArgs
from .common import as_f32, as_f64, load_f32, load_scalar
from .shard_grads import launch_over_grads, read_row, store_weights

BLOCK = 1024  # elements; two fp32 streams of 8 per thread and the gradients are 5 or 6 16-byte loads in flight


@triton.jit
def _lion_block(
    master, exp_avg, grad, param_out,  # advanced to the block's first element
    peers, base,  # see store_weights
    offsets, load_mask, store_mask, grad_scale, lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    p = tl.load(master + offsets, mask=load_mask)
    m = tl.load(exp_avg + offsets, mask=load_mask)
    g = load_f32(grad + offsets, load_mask)

    g = g * grad_scale
    blend = beta1 * m + one_minus_beta1 * g
    # blend - blend is 0 for 0, and NaN for NaN
    direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, blend - blend))
    p = p * decay - lr * direction
    m = beta2 * m + one_minus_beta2 * g

    tl.store(master + offsets, p, mask=store_mask)
    tl.store(exp_avg + offsets, m, mask=store_mask)
    if param_out is not None:
        store_weights(param_out, peers, base, offsets, p, store_mask, NUM_PEERS, PEERS_ALIGNED)


@triton.jit
def _update(
    master, exp_avg, param_out, peers, grad,  # grad: advanced to the block's first element
    base, left,  # the block's first element in the shard, and how many there are from it on
    grad_scale, negate, lr, lr_tensor, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
    segment_ids, active,
    SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK // SEGMENT)[:, None]
    offsets = rows * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    # The same for a whole row, so that a masked store is still 16 bytes wide.
    keep = rows >= 0
    if active is not None:
        segment = tl.load(segment_ids + base // SEGMENT + rows, mask=rows * SEGMENT < left, other=0)
        keep = tl.load(active + segment) != 0.0
    if lr_tensor is None:
        rate = as_f64(lr)
    else:
        rate = tl.load(lr_tensor).to(tl.float64)
    decay = (1.0 - rate * as_f64(weight_decay)).to(tl.float32)
    rate = rate.to(tl.float32)
    scale = load_scalar(grad_scale, SCALE_IS_TENSOR) * as_f32(negate)
    beta1 = as_f32(beta1)
    one_minus_beta1 = as_f32(one_minus_beta1)
    beta2 = as_f32(beta2)
    one_minus_beta2 = as_f32(one_minus_beta2)

    master += base
    exp_avg += base
    if param_out is not None:
        param_out += base
    if left < BLOCK:
        inside = offsets < left
        _lion_block(master, exp_avg, grad, param_out, peers, base, offsets, inside, inside & keep, scale, rate, decay,
                    beta1, one_minus_beta1, beta2, one_minus_beta2, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip
    else:
        _lion_block(master, exp_avg, grad, param_out, peers, base, offsets, None,
                    None if active is None else keep, scale, rate, decay, beta1, one_minus_beta1, beta2,
                    one_minus_beta2, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def lion_kernel(
    master, exp_avg,  # fp32 (n,), read and written
    param_out,  # fp32, bf16 or fp16 (n,), written, or None
    peers,  # int64 (NUM_PEERS,) or None: addresses of more such tensors
    grad,  # fp32, bf16 or fp16 (n,)
    n,
    found_inf,  # fp32 (1,) or None
    grad_scale, negate,
    lr: tl.float64,
    lr_tensor,  # fp32 0-D or None; used instead of lr
    weight_decay: tl.float64,
    beta1, one_minus_beta1, beta2, one_minus_beta2,
    segment_ids,  # int32 (ceil(n/64),) or None
    active,  # fp32 (num_segments,) or None
    SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK elements, as rows of one segment entry each.

    Bytes per element: read 8 + grad, write 8 + param_out; 20 in fp32 alone, 20 with both in 16 bits.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    base = tl.program_id(0).to(tl.int64) * BLOCK
    _update(master, exp_avg, param_out, peers, grad + base, base, n - base, grad_scale, negate, lr, lr_tensor,
            weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, segment_ids, active,
            SCALE_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit
def lion_list_kernel(
    master, exp_avg, param_out, peers,
    table,  # int64 (num_programs, COLUMNS): address of the gradient, its first element in the shard, numel
    found_inf, grad_scale, negate, lr: tl.float64, lr_tensor, weight_decay: tl.float64,
    beta1, one_minus_beta1, beta2, one_minus_beta2, segment_ids, active,
    SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,  # element type; all addresses are multiples of 16 bytes
):  # fmt: skip
    """The same where gradients lie apart: one program per row."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    grad, base, left = read_row(table, GRAD, ALIGNED, SEGMENT)
    while left > 0:
        _update(master, exp_avg, param_out, peers, grad, base, left, grad_scale, negate, lr, lr_tensor, weight_decay,
                beta1, one_minus_beta1, beta2, one_minus_beta2, segment_ids, active,
                SCALE_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip
        grad += BLOCK
        base += BLOCK
        left -= BLOCK


def lion_(args: LionArgs) -> None:
    """Update a flat shard in place."""
    hyper, lr = args.hyper, args.lr
    number, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    launch_over_grads(
        lion_kernel, lion_list_kernel, args, (args.master, args.exp_avg),
        number, tensor, float(hyper.weight_decay), hyper.beta1, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2,
        BLOCK=BLOCK,
    )  # fmt: skip
