"""Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019) over a flat shard, and the 16-bit weights with it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyzero.ops.rounding import ceil_div

from ..backend import AdamArgs, AdamHyper, Scalar
from .common import as_f32, as_f64, launch, load_f32, load_scalar
from .shard_grads import launch_over_grads, read_row, store_weights

BLOCK = 1024  # elements; four fp32 streams of 8 per thread are 8 16-byte loads in flight, and 62 registers
NUM_CONSTANTS: tl.constexpr = tl.constexpr(3)  # step_size, inv_sqrt_bc2, decay


@triton.jit
def _pow_int(base, exponent):
    # By squaring, as every backend does: pow() promises no bits. 31 rounds cover every int32.
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in range(31):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize=["num_segments", "step"])
def adam_constants_kernel(
    table,  # fp32 (num_segments, NUM_CONSTANTS), written
    lr: tl.float64,
    lr_tensor,  # fp32 0-D or None; used instead of lr
    step,
    step_tensor,  # fp32 (num_segments,) or None; used instead of step
    num_segments,
    beta1: tl.float64,
    beta2: tl.float64,
    weight_decay: tl.float64,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step-wide constants where lr or step lives on the device: in fp64, each rounded once."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = segment < num_segments
    if step_tensor is None:
        count = tl.zeros((BLOCK,), tl.int32) + step
    else:
        count = tl.load(step_tensor + segment, mask=mask, other=1.0).to(tl.int32)
    if lr_tensor is None:
        rate = as_f64(lr)
    else:
        rate = tl.load(lr_tensor).to(tl.float64)

    step_size = rate / (1.0 - _pow_int(as_f64(beta1), count))
    inv_sqrt_bc2 = 1.0 / tl.sqrt(1.0 - _pow_int(as_f64(beta2), count))
    decay = tl.full((BLOCK,), 1.0, tl.float64)
    if DECAYS:
        decay = decay - rate * as_f64(weight_decay)

    row = table + segment * NUM_CONSTANTS
    tl.store(row, step_size.to(tl.float32), mask=mask)
    tl.store(row + 1, inv_sqrt_bc2.to(tl.float32), mask=mask)
    tl.store(row + 2, decay.to(tl.float32), mask=mask)


@triton.jit
def _adam_block(
    master, exp_avg, exp_avg_sq, grad, param_out,  # advanced to the block's first element
    peers, base,  # see store_weights
    offsets, load_mask, store_mask, grad_scale, step_size, inv_sqrt_bc2, decay,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, COUPLED: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    p = tl.load(master + offsets, mask=load_mask)
    m = tl.load(exp_avg + offsets, mask=load_mask)
    v = tl.load(exp_avg_sq + offsets, mask=load_mask)
    g = load_f32(grad + offsets, load_mask)

    g = g * grad_scale
    if COUPLED:
        g = g + weight_decay * p
    else:
        p = p * decay
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (one_minus_beta2 * g) * g
    p = p - tl.div_rn(step_size * m, tl.sqrt_rn(v) * inv_sqrt_bc2 + eps)

    tl.store(master + offsets, p, mask=store_mask)
    tl.store(exp_avg + offsets, m, mask=store_mask)
    tl.store(exp_avg_sq + offsets, v, mask=store_mask)
    if param_out is not None:
        store_weights(param_out, peers, base, offsets, p, store_mask, NUM_PEERS, PEERS_ALIGNED)


@triton.jit
def _update(
    master, exp_avg, exp_avg_sq, param_out, peers, grad,  # grad: advanced to the block's first element
    base, left,  # the block's first element in the shard, and how many there are from it on
    grad_scale, negate, constants, step_size, inv_sqrt_bc2, decay,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, segment_ids, active,
    COUPLED: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK // SEGMENT)[:, None]
    offsets = rows * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    # The same for a whole row, so that a masked store is still 16 bytes wide.
    keep = rows >= 0
    segment = tl.zeros((BLOCK // SEGMENT, 1), tl.int32)
    if segment_ids is not None:
        segment = tl.load(segment_ids + base // SEGMENT + rows, mask=rows * SEGMENT < left, other=0)
    if active is not None:
        keep = tl.load(active + segment) != 0.0
    # One assignment a line: the interpreter cannot take a tuple of them.
    if constants is None:
        step_size = as_f32(step_size)
        inv_sqrt_bc2 = as_f32(inv_sqrt_bc2)
        decay = as_f32(decay)
    else:
        row = constants + segment * NUM_CONSTANTS
        step_size = tl.load(row)
        inv_sqrt_bc2 = tl.load(row + 1)
        decay = tl.load(row + 2)
    scale = load_scalar(grad_scale, SCALE_IS_TENSOR) * as_f32(negate)
    one_minus_beta1 = as_f32(one_minus_beta1)
    beta2 = as_f32(beta2)
    one_minus_beta2 = as_f32(one_minus_beta2)
    eps = as_f32(eps)
    weight_decay = as_f32(weight_decay)

    master += base
    exp_avg += base
    exp_avg_sq += base
    if param_out is not None:
        param_out += base
    if left < BLOCK:
        inside = offsets < left
        _adam_block(master, exp_avg, exp_avg_sq, grad, param_out, peers, base, offsets, inside, inside & keep, scale,
                    step_size, inv_sqrt_bc2, decay, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
                    COUPLED, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip
    else:
        _adam_block(master, exp_avg, exp_avg_sq, grad, param_out, peers, base, offsets, None,
                    None if active is None else keep, scale, step_size, inv_sqrt_bc2, decay, one_minus_beta1, beta2,
                    one_minus_beta2, eps, weight_decay, COUPLED, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def adam_kernel(
    master, exp_avg, exp_avg_sq,  # fp32 (n,), read and written
    param_out,  # fp32, bf16 or fp16 (n,), written, or None
    peers,  # int64 (NUM_PEERS,) or None: addresses of more such tensors
    grad,  # fp32, bf16 or fp16 (n,)
    n,
    found_inf,  # fp32 (1,) or None
    grad_scale, negate,
    constants,  # fp32 (num_segments, NUM_CONSTANTS), or None: then the next three are the constants
    step_size, inv_sqrt_bc2, decay,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    segment_ids,  # int32 (ceil(n/64),) or None
    active,  # fp32 (num_segments,) or None
    COUPLED: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK elements, as rows of one segment entry each.

    Bytes per element: read 12 + grad, write 12 + param_out; 28 in fp32 alone, 28 with both in 16 bits.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    base = tl.program_id(0).to(tl.int64) * BLOCK
    _update(master, exp_avg, exp_avg_sq, param_out, peers, grad + base, base, n - base, grad_scale, negate, constants,
            step_size, inv_sqrt_bc2, decay, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, segment_ids,
            active, COUPLED, SCALE_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip


@triton.jit
def adam_list_kernel(
    master, exp_avg, exp_avg_sq, param_out, peers,
    table,  # int64 (num_programs, COLUMNS): address of the gradient, its first element in the shard, numel
    found_inf, grad_scale, negate, constants, step_size, inv_sqrt_bc2, decay,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, segment_ids, active,
    COUPLED: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,  # element type; all addresses are multiples of 16 bytes
):  # fmt: skip
    """The same where gradients lie apart: one program per row."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    grad, base, left = read_row(table, GRAD, ALIGNED, SEGMENT)
    while left > 0:
        _update(master, exp_avg, exp_avg_sq, param_out, peers, grad, base, left, grad_scale, negate, constants,
                step_size, inv_sqrt_bc2, decay, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, segment_ids,
                active, COUPLED, SCALE_IS_TENSOR, BLOCK, SEGMENT, NUM_PEERS, PEERS_ALIGNED)  # fmt: skip
        grad += BLOCK
        base += BLOCK
        left -= BLOCK


def _pow(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _host_constants(hyper: AdamHyper, lr: float, step: int, decays: bool) -> tuple[float, float, float]:
    step_size = lr / (1.0 - _pow(hyper.beta1, step))
    inv_sqrt_bc2 = 1.0 / math.sqrt(1.0 - _pow(hyper.beta2, step))
    return step_size, inv_sqrt_bc2, 1.0 - lr * hyper.weight_decay if decays else 1.0


def _device_constants(
    master: Tensor, hyper: AdamHyper, lr: Scalar, step: Scalar, decays: bool
) -> Tensor:  # fp32 (num_segments, NUM_CONSTANTS)
    lr_tensor = lr if isinstance(lr, Tensor) else None
    step_tensor = step if isinstance(step, Tensor) else None
    num_segments = 1 if step_tensor is None else step_tensor.numel()
    table = torch.empty(num_segments, NUM_CONSTANTS.value, dtype=torch.float32, device=master.device)
    block = 128
    launch(
        adam_constants_kernel, ceil_div(num_segments, block), master,
        table, 0.0 if isinstance(lr, Tensor) else lr, lr_tensor, 1 if step_tensor is not None else int(step),
        step_tensor, num_segments, hyper.beta1, hyper.beta2, hyper.weight_decay,
        DECAYS=decays, BLOCK=block,
    )  # fmt: skip
    return table


def adam_(args: AdamArgs) -> None:
    """Update a flat shard in place."""
    hyper = args.hyper
    coupled = hyper.weight_decay != 0.0 and not hyper.decoupled_weight_decay
    decays = hyper.weight_decay != 0.0 and hyper.decoupled_weight_decay
    constants: Tensor | None = None
    host: tuple[Any, Any, Any] = (1.0, 1.0, 1.0)
    if isinstance(args.lr, Tensor) or isinstance(args.step, Tensor):
        constants = _device_constants(args.master, hyper, args.lr, args.step, decays)
    else:
        host = _host_constants(hyper, args.lr, int(args.step), decays)
    launch_over_grads(
        adam_kernel, adam_list_kernel, args, (args.master, args.exp_avg, args.exp_avg_sq),
        constants, *host, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2, hyper.eps, hyper.weight_decay,
        COUPLED=coupled, BLOCK=BLOCK,
    )  # fmt: skip
