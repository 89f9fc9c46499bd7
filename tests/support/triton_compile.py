"""Compiles what real launches of the Triton backend would compile, for the GPUs named in the arguments. Prints JSON.

test_triton_compile.py runs it in a separate process, because TRITON_INTERPRET must be unset when triton is imported.
The ops are called on CPU tensors with a stand-in driver, and each launch becomes a `warmup`. Triton's own launcher
chooses the types and the 16-byte alignments from the arguments, and nothing runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pyzero.ops import triton_kernels
from pyzero.ops.backend import (
    AdamArgs,
    AdamHyper,
    LionArgs,
    LionHyper,
    LossScaleArgs,
    LossScalePolicy,
    PackArgs,
    ReduceScatterArgs,
    SgdArgs,
    SgdHyper,
    StepScalarsArgs,
    UnscaleArgs,
)
from pyzero.ops.rows import rows_of
from pyzero.ops.triton_kernels import adam, common, loss_scale, reduce_scatter, scaled_copy, shard_grads, step_scalars

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
N = 1 << 20
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class AbsentGPU:
    """The part of triton's active driver that a launch asks before it compiles."""

    def __init__(self, index: int, target: GPUTarget) -> None:
        self.index, self.target = index, target

    def get_current_device(self) -> int:
        return self.index  # each target has an index of its own, because compiled kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def flat(dtype: torch.dtype, shift: int = 0, n: int = N) -> torch.Tensor:
    """n elements, `shift` elements past a 16-byte boundary."""
    return torch.zeros(n + shift, dtype=dtype)[shift:]


def grads_of(dtype: torch.dtype, shift: int, as_list: bool) -> tuple[list[torch.Tensor], list[int]]:
    """One gradient over the whole shard, or two of half its size."""
    if not as_list:
        return [flat(dtype, shift)], [0]
    return [flat(dtype, shift, N // 2), flat(dtype, shift, N // 2)], [0, N // 2]


def with_rows(
    states: list[torch.Tensor], outs: list[torch.Tensor], grads: list[torch.Tensor], offsets: list[int]
) -> list[Any]:
    """The first arguments of AdamArgs, LionArgs and SgdArgs."""
    return [*states, outs, grads, offsets, rows_of([*states, *outs, *grads])]


def run_adam(
    grad: torch.dtype,
    out: torch.dtype | None,
    *,
    segments: bool = False,
    shift: int = 0,
    as_list: bool = False,
    num_outs: int = 1,
) -> None:
    outs = [] if out is None else [flat(out, shift) for _ in range(num_outs)]
    tensors = with_rows([flat(F32, shift) for _ in range(3)], outs, *grads_of(grad, shift, as_list))
    hyper = AdamHyper(0.9, 0.999, 1e-8, 0.1, segments, False)
    if not segments:
        triton_kernels.adam_(AdamArgs(*tensors, hyper, 1e-3, 1, 1.0, None, None, None))
        return
    ids, one = flat(torch.int32, n=N // 64), torch.ones(())
    numbers = (one, flat(F32, n=8), one)
    triton_kernels.adam_(AdamArgs(*tensors, hyper, *numbers, flat(F32, n=1), ids, flat(F32, n=8)))


def run_lion(grad: torch.dtype, out: torch.dtype | None, *, segments: bool = False, as_list: bool = False) -> None:
    outs = [] if out is None else [flat(out)]
    tensors = with_rows([flat(F32), flat(F32)], outs, *grads_of(grad, 0, as_list))
    hyper = LionHyper(0.9, 0.99, 0.1, False)
    if not segments:
        triton_kernels.lion_(LionArgs(*tensors, hyper, 1e-3, 1.0, None, None, None))
        return
    ids, one = flat(torch.int32, n=N // 64), torch.ones(())
    triton_kernels.lion_(LionArgs(*tensors, hyper, one, one, flat(F32, n=1), ids, flat(F32, n=8)))


def run_sgd(
    grad: torch.dtype, out: torch.dtype, *, buffer: bool = True, segments: bool = False, as_list: bool = False
) -> None:
    states: list[Any] = [flat(F32), *([flat(F32)] if buffer else [])]
    tensors = with_rows(states, [flat(out)], *grads_of(grad, 0, as_list))
    if not buffer:
        tensors.insert(1, None)
    momentum, weight_decay = (0.9, 0.1) if buffer else (0.0, 0.0)
    hyper = SgdHyper(momentum, 0.1 if segments else 0.0, weight_decay, not segments, False)
    if not segments:
        triton_kernels.sgd_(SgdArgs(*tensors, hyper, 1e-3, None, 1.0, None, None, None))
        return
    ids, one = flat(torch.int32, n=N // 64), torch.ones(())
    triton_kernels.sgd_(SgdArgs(*tensors, hyper, one, flat(F32, n=8), one, flat(F32, n=1), ids, flat(F32, n=8)))


def run_unscale(dtype: torch.dtype, scale: Any, shift: int = 0) -> None:
    tensors = [flat(dtype, shift)]
    triton_kernels.unscale_(UnscaleArgs(tensors, rows_of(tensors), scale, flat(F32, n=1), flat(F32, n=1)))


def run_pack(source: torch.dtype, bucket: torch.dtype) -> None:
    into, *tensors = flat(bucket), flat(source)
    triton_kernels.pack_(PackArgs(into, tensors, rows_of([into, *tensors]), [0], torch.ones(())))


def run_reduce_scatter(dtype: torch.dtype, num_ranks: int, *, accumulate: bool, shift: int = 0) -> None:
    shard, *slices = flat(F32), *(flat(dtype, shift) for _ in range(num_ranks))
    sums = torch.zeros(1, dtype=torch.float64)
    rows = rows_of([shard, *slices])
    triton_kernels.reduce_scatter_(ReduceScatterArgs(shard, slices, rows, 1.0, accumulate, flat(F32, n=1), sums))


def run_loss_scale() -> None:
    policy = LossScalePolicy(2.0, 0.5, 2000, 1.0, float("inf"), 2, 0, False)
    triton_kernels.loss_scale_update_(LossScaleArgs(flat(F32, n=5), flat(F32, n=1), policy))


def run_step_scalars(scale: Any) -> None:
    tensors = flat(F32, n=4), torch.zeros(2, 3, dtype=torch.float64)
    triton_kernels.step_scalars_(StepScalarsArgs(*tensors, 1.0, scale, scale, flat(F32, n=300), flat(F32, n=300)))


CASES: dict[str, Callable[[], None]] = {
    "adam-bf16-bf16": partial(run_adam, BF16, BF16),
    "adam-f32": partial(run_adam, F32, None),
    "adam-f16-f16-segments": partial(run_adam, F16, F16, segments=True),
    "adam-bf16-bf16-peers": partial(run_adam, BF16, BF16, segments=True, num_outs=4),
    "adam-bf16-bf16-list": partial(run_adam, BF16, BF16, segments=True, as_list=True),
    "lion-bf16-bf16": partial(run_lion, BF16, BF16),
    "lion-bf16-bf16-list": partial(run_lion, BF16, BF16, segments=True, as_list=True),
    "lion-f16-f16-segments": partial(run_lion, F16, F16, segments=True),
    "sgd-bf16-bf16": partial(run_sgd, BF16, BF16),
    "sgd-bf16-bf16-list": partial(run_sgd, BF16, BF16, segments=True, as_list=True),
    "sgd-f16-f16-segments": partial(run_sgd, F16, F16, segments=True),
    "sgd-bf16-bf16-no-buffer": partial(run_sgd, BF16, BF16, buffer=False),
    "unscale-bf16": partial(run_unscale, BF16, 0.5),
    "unscale-f32": partial(run_unscale, F32, torch.ones(())),
    "unscale-f16-reads": partial(run_unscale, F16, 1.0),
    "pack-f32-bf16": partial(run_pack, F32, BF16),
    "reduce_scatter-bf16-2": partial(run_reduce_scatter, BF16, 2, accumulate=True),
    "reduce_scatter-f32-8": partial(run_reduce_scatter, F32, 8, accumulate=False),
    "loss_scale": run_loss_scale,
    "step_scalars": partial(run_step_scalars, torch.ones(())),
}
# These show that the checks can fail: views off the 16-byte grid here, and contraction in main().
WITH_COUNTEREXAMPLES = ("sm_90", "gfx942")
UNALIGNED: dict[str, Callable[[], None]] = {
    "adam-unaligned": partial(run_adam, BF16, BF16, shift=1),
    "unscale-unaligned": partial(run_unscale, BF16, 0.5, shift=1),
    "reduce_scatter-unaligned": partial(run_reduce_scatter, BF16, 2, accumulate=True, shift=1),
}
THREADS = 128  # per program, on every target


def nvidia_facts(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        sass = subprocess.run([tool, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    ops = Counter(re.findall(r"\b(LDG\.E\.128|STG\.E\.128|LDL|STL)\b", sass))
    return {
        "wide_loads": ops["LDG.E.128"],
        "wide_stores": ops["STG.E.128"],
        "spills": ops["LDL"] + ops["STL"],
        "flushes": ptx.count(".ftz"),
        "approximations": len(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\S*f32", ptx)),
        "contractions": len(re.findall(r"\b(?:fma|mad)\.\S*f32", ptx)),
        "double_contractions": len(re.findall(r"\bfma\.rn\.f64", ptx)),
        "divisions": ptx.count("div.rn.f32"),
        "square_roots": ptx.count("sqrt.rn.f32"),
    }


def amd_facts(kernel: Any) -> dict[str, int]:
    asm = kernel.asm["amdgcn"]
    divisions = len(re.findall(r"\bv_div_fixup_f32", asm))
    square_roots, inverse_roots = len(re.findall(r"\bv_sqrt_f32", asm)), len(re.findall(r"\bv_rsq_f32", asm))
    fused = len(re.findall(r"\bv_(?:fma|fmac|mad|mac)_f32", asm)) + 2 * len(re.findall(r"\bv_pk_fma_f32", asm))
    return {
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", asm)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", asm)),
        "spills": len(re.findall(r"\bscratch_(?:load|store)", asm))
        + sum(int(count) for count in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", asm)),
        "flushes": len(re.findall(r"amdhsa_float_denorm_mode_(?:32|16_64) [012]", asm)),
        # Reciprocals that begin no division. An unrefined root makes "contractions" negative.
        "approximations": len(re.findall(r"\bv_rcp_f32", asm)) - divisions,
        # AMD has no exact division or square root: LLVM refines a first guess, in 5 fused steps for a quotient and
        # 2 for a root (5 if it starts from v_rsq, as in triton 3.6).
        "contractions": fused - 5 * divisions - 2 * square_roots - 5 * inverse_roots,
        "double_contractions": 0,  # cannot be distinguished from the steps of an fp64 division
        "divisions": divisions,
        "square_roots": square_roots + inverse_roots,
    }


def facts_of(kernel: Any, target: GPUTarget, constants: dict[str, Any]) -> dict[str, Any]:
    found = nvidia_facts(kernel) if target.backend == "cuda" else amd_facts(kernel)
    return {"kernel": kernel.name, "block": constants.get("BLOCK", 0), **found}


def compile_launches(
    run: Callable[[], None], target: GPUTarget, beside: ThreadPoolExecutor, *, fuse: bool = False
) -> list[Future[dict[str, Any]]]:
    """Facts about every kernel that `run` would launch. Disassembly runs in parallel with the next compilation."""
    facts = []

    def warm_up(kernel: Any, num_programs: int, on: torch.Tensor, *args: Any, **constants: Any) -> None:
        constants.setdefault("num_warps", THREADS // target.warp_size)  # the NUM_WARPS of that target
        compiled = kernel.warmup(*args, grid=(num_programs,), **constants, enable_fp_fusion=fuse)
        facts.append(beside.submit(facts_of, compiled, target, constants))

    for module in (adam, common, loss_scale, reduce_scatter, scaled_copy, shard_grads, step_scalars):
        module.launch = warm_up  # type: ignore[attr-defined]
    run()
    return facts


def main() -> None:
    result: dict[str, dict[str, list[Future[dict[str, Any]]]]] = {}
    with ThreadPoolExecutor(2) as beside:
        for index, name in enumerate(sys.argv[1:]):
            target = TARGETS[name]
            driver.set_active(AbsentGPU(index, target))
            facts = {case: compile_launches(run, target, beside) for case, run in CASES.items()}
            if name in WITH_COUNTEREXAMPLES:
                facts.update({case: compile_launches(run, target, beside) for case, run in UNALIGNED.items()})
                facts["adam-fused"] = compile_launches(CASES["adam-bf16-bf16"], target, beside, fuse=True)
            result[name] = facts
    json.dump(result, sys.stdout, default=Future.result)


if __name__ == "__main__":
    main()
