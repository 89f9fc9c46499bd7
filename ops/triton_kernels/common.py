"""What the kernels share: exact conversions, per-block statistics, and how a kernel is launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyzero.ops.rounding import ceil_div

BLOCK = 2048  # elements: 4 warps with 16 each, that is 2 (16-bit) to 4 (fp32) 16-byte loads in flight per thread
NUM_WARPS = 2 if torch.version.hip else 4  # 128 threads: an AMD wave has 64
# A program takes whole chunks, so that the fp64 partial sums stay few. A constant, not a property of the device:
# the order of summation, and with it the bits of sumsq, is then the same on every GPU.
MAX_PROGRAMS = 4096
ALIGN_BYTES = 16
ELEMENT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def as_f32(value):
    """A float argument as fp32. Compiled, it already is; interpreted, it is still a Python double."""
    return tl.full((), value, tl.float32)


@triton.jit
def as_f64(value):
    """A double argument as fp64 (see as_f32)."""
    return tl.full((), value, tl.float64)


@triton.jit
def load_scalar(value, IS_TENSOR: tl.constexpr):
    """An fp32 scalar that came as a number or as a 0-D tensor."""
    if IS_TENSOR:
        return tl.load(value)
    else:
        return as_f32(value)


@triton.jit
def load_f32(ptrs, mask):
    """Load fp32, bf16 or fp16 as fp32.

    bf16 is widened in integers: a shift is exact, and Triton's interpreter flushes bf16 subnormals.
    """
    if ptrs.dtype.element_ty == tl.bfloat16:
        bits = tl.load(ptrs.to(tl.pointer_type(tl.uint16)), mask=mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(ptrs, mask=mask).to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round fp32 to dtype, ties to even; bf16 comes back as its bits (uint16).

    bf16 is rounded in integers because Triton's interpreter rounds ties up and loses the carry into the exponent.
    A NaN would round to an infinity or wrap, so it is replaced. The price, counted in sm_90 code for unscale_ in bf16:
    13 instructions per element instead of 7, where an H200 can issue about 25 while the element's 4 bytes move.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    else:
        return x.to(dtype)


@triton.jit
def widen(stored, dtype: tl.constexpr):
    """What round_to returned, as fp32."""
    if dtype == tl.bfloat16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def store_rounded(ptrs, stored, mask):
    """Store what round_to returned."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        tl.store(ptrs.to(tl.pointer_type(tl.uint16)), stored, mask=mask)
    else:
        tl.store(ptrs, stored, mask=mask)


@triton.jit
def update_stats(largest, squares, x, CHECK: tl.constexpr, SUMSQ: tl.constexpr):
    """Fold x (fp32, BLOCK) into the largest magnitude (as bits; inf and NaN are the largest) and the fp64 squares."""
    if CHECK:
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if SUMSQ:
        wide = x.to(tl.float64)
        squares = tl.fma(wide, wide, squares)  # the product of two fp32 is exact in fp64: fused or not, same bits
    return largest, squares


@triton.jit
def store_stats(largest, squares, found_inf, partials, CHECK: tl.constexpr, SUMSQ: tl.constexpr):
    """Set found_inf to 1 (never clear it), and leave this program's sum of squares in its own slot."""
    if CHECK:
        # Racing programs all store the same value.
        tl.store(found_inf, 1.0, mask=tl.max(largest, axis=0) >= _INF_BITS)
    if SUMSQ:
        tl.store(partials + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["num_partials"])
def finish_sumsq_kernel(sumsq, partials, num_partials, BLOCK: tl.constexpr):
    """sumsq += the partial sums, in one program and one fixed order: an atomic would add in any order."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    # `while`, here and in the kernels: triton 3.6's interpreter cannot take a loaded value in range() with numpy 2.4.
    start = num_partials * 0
    while start < num_partials:
        total += tl.load(partials + start + offsets, mask=start + offsets < num_partials, other=0.0)
        start += BLOCK
    tl.store(sumsq, (tl.load(sumsq).to(tl.float64) + tl.sum(total, axis=0)).to(sumsq.dtype.element_ty))


def finish_sumsq(sumsq: Tensor, partials: Tensor) -> None:
    """Add the partials (fp64, one per program) to sumsq (1 element, fp32 or fp64)."""
    launch(finish_sumsq_kernel, 1, sumsq, sumsq, partials, partials.numel(), BLOCK=1024)


def new_partials(sumsq: Tensor | None, num_programs: int) -> Tensor | None:
    """Workspace for one fp64 sum per program, where sums are wanted."""
    if sumsq is None:
        return None
    return torch.empty(num_programs, dtype=torch.float64, device=sumsq.device)


def chunk_numel(numel: int) -> int:
    """Elements per program: whole blocks, few enough programs."""
    num_blocks = ceil_div(numel, BLOCK)
    return BLOCK * max(1, ceil_div(num_blocks, MAX_PROGRAMS))


def is_aligned(*addresses: int) -> bool:
    """Whether 16-byte accesses may start at every one of these addresses."""
    return all(address % ALIGN_BYTES == 0 for address in addresses)


def is_interpreted() -> bool:
    """Whether the kernels here run in Triton's interpreter (TRITON_INTERPRET=1 when they were defined)."""
    return not isinstance(finish_sumsq_kernel, triton.JITFunction)


def launch(kernel: Any, num_programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device and current stream of `on`, without contraction of a*b+c into fma."""
    if on.device.type == "cpu" and not is_interpreted():
        raise RuntimeError(
            "expected GPU tensors, got CPU tensors: triton was imported without TRITON_INTERPRET=1; "
            "set it before the process starts, or pass backend='cpu'"
        )
    constants.setdefault("num_warps", NUM_WARPS)
    with _device_of(on):
        kernel[(num_programs,)](*args, **constants, enable_fp_fusion=False)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if is_interpreted():
        import numpy as np

        return np.errstate(all="ignore")  # infinities and NaN are data here, not mistakes
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
