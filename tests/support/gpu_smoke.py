"""python tests/support/gpu_smoke.py cuda triton: runs every kernel of these backends once, and compares its bits.

The reference gives the wanted bits. Backends are built if need be. It is small enough for compute-sanitizer. Sizes are
ragged, to reach every tail.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyzero import ops
from pyzero.ops.loss_scale import loss_scale_state

NUMEL = 10_243
LIST_NUMEL = 64 * 600
HYPER = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled_weight_decay=True)
Inputs = Callable[[int], Tensor]  # (numel,) fp32 on the device under test; the same values on every device


def normals(device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return lambda numel: torch.randn(numel, generator=generator).to(device)


def ragged(normal: Inputs) -> list[Tensor]:
    """More tensors than one launch takes, in two dtypes. Some are empty, and some have odd lengths."""
    tensors = [normal(37 * index % 501) for index in range(700)]
    return [tensor.bfloat16() if index % 3 else tensor for index, tensor in enumerate(tensors)]


def list_of(normal: Inputs, dtype: torch.dtype) -> dict[str, object]:
    """More gradients of a shard than one launch takes. Some are empty, and some start one element off alignment."""
    grads = [normal(37 * index % 65 + index % 2).to(dtype)[index % 2 :] for index in range(LIST_NUMEL // 64)]
    return {"grad": grads, "grad_offsets": [64 * index for index in range(len(grads))]}


def grad_stats(device: str) -> dict[str, Tensor]:
    return {
        "found_inf": torch.zeros(1, device=device),
        "sumsq": torch.zeros(1, dtype=torch.float64, device=device),
    }


def adam(device: str, backend: str) -> list[Tensor]:
    normal = normals(device)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = [normal(NUMEL), normal(NUMEL), normal(NUMEL).square()]
        out = torch.empty(NUMEL, dtype=dtype, device=device)
        grad = normal(NUMEL).to(dtype)
        ops.adam_(*state, grad, step=3, param_out=out, backend=backend, **HYPER)
        scale = torch.full((), 0.25, device=device)
        found_inf = torch.zeros(1, device=device)
        # One element off alignment: no 16-byte access is possible.
        apart = [tensor[1:] for tensor in state]
        ops.adam_(*apart, grad[1:], step=4, grad_scale=scale, found_inf=found_inf, backend=backend, **HYPER)
        segments = (torch.arange(-(-NUMEL // 64), device=device) // 7).to(torch.int32)
        steps = torch.arange(1, int(segments[-1]) + 2, device=device).float()
        chosen = {"segment_ids": segments, "active": (steps % 5 != 0).float()}
        ops.adam_(*state, grad, step=steps, param_out=out, backend=backend, **chosen, **HYPER)
        shard = [normal(LIST_NUMEL), normal(LIST_NUMEL), normal(LIST_NUMEL).square(), normal(LIST_NUMEL).to(dtype)]
        ops.adam_(*shard[:3], step=5, param_out=shard[3], backend=backend, **list_of(normal, dtype), **HYPER)
        outs = [out, *(torch.empty_like(out) for _ in range(3))]
        ops.adam_(*state, grad, step=6, param_out=outs, backend=backend, **HYPER)
        results += [*state, *outs, *shard]
    return results


def lion(device: str, backend: str) -> list[Tensor]:
    normal = normals(device)
    hyper = dict(lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01, backend=backend)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state, grad = [normal(NUMEL), normal(NUMEL)], normal(NUMEL).to(dtype)
        out = torch.empty(NUMEL, dtype=dtype, device=device)
        ops.lion_(*state, grad, param_out=out, **hyper)
        ops.lion_(*(tensor[1:] for tensor in state), grad[1:], grad_scale=torch.full((), 0.25, device=device), **hyper)
        segments = (torch.arange(-(-NUMEL // 64), device=device) // 7).to(torch.int32)
        active = (torch.arange(int(segments[-1]) + 1, device=device) % 5 != 0).float()
        ops.lion_(*state, grad, param_out=out, segment_ids=segments, active=active, **hyper)
        shard = [normal(LIST_NUMEL), normal(LIST_NUMEL), normal(LIST_NUMEL).to(dtype)]
        ops.lion_(*shard[:2], param_out=shard[2], **list_of(normal, dtype), **hyper)
        outs = [out, *(torch.empty_like(out) for _ in range(3))]
        ops.lion_(*state, grad, param_out=outs, **hyper)
        results += [*state, *outs, *shard]
    return results


def sgd(device: str, backend: str) -> list[Tensor]:
    normal = normals(device)
    hyper = dict(lr=1e-3, weight_decay=0.01, backend=backend)
    momentum = dict(momentum=0.9, dampening=0.1, **hyper)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state, grad, plain = [normal(NUMEL), normal(NUMEL)], normal(NUMEL).to(dtype), normal(NUMEL)
        out = torch.empty(NUMEL, dtype=dtype, device=device)
        ops.sgd_(*state, grad, param_out=out, step=1, **momentum)
        apart, scale = [tensor[1:] for tensor in state], torch.full((), 0.25, device=device)
        ops.sgd_(*apart, grad[1:], momentum=0.9, nesterov=True, grad_scale=scale, **hyper)
        segments = (torch.arange(-(-NUMEL // 64), device=device) // 7).to(torch.int32)
        steps = torch.arange(1, int(segments[-1]) + 2, device=device).float()
        chosen = {"segment_ids": segments, "active": (steps % 5 != 0).float()}
        ops.sgd_(*state, grad, param_out=out, step=steps % 3 + 1, **chosen, **momentum)
        shard = [normal(LIST_NUMEL), normal(LIST_NUMEL), normal(LIST_NUMEL).to(dtype)]
        ops.sgd_(*shard[:2], param_out=shard[2], step=2, **list_of(normal, dtype), **momentum)
        outs = [out, *(torch.empty_like(out) for _ in range(3))]
        ops.sgd_(plain, None, grad, param_out=outs, **hyper)
        ops.sgd_(plain[1:], None, grad[1:], **hyper)
        ops.sgd_(shard[0], None, param_out=shard[2], **list_of(normal, dtype), **hyper)
        results += [*state, plain, *outs, *shard]
    return results


def unscale(device: str, backend: str) -> list[Tensor]:
    tensors, found = ragged(normals(device)), grad_stats(device)
    ops.unscale_(tensors, 1.0, **found, backend=backend)
    ops.unscale_(tensors, torch.full((), 0.25, device=device), **found, backend=backend)
    tensors[-1][0] = float("inf")
    flag = torch.zeros(1, device=device)
    ops.unscale_(tensors, 0.5, found_inf=flag, backend=backend)
    return [*tensors, *found.values(), flag]


def pack(device: str, backend: str) -> list[Tensor]:
    tensors = ragged(normals(device))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        bucket = torch.zeros(sum(map(len, tensors)) + 5, dtype=dtype, device=device)
        ops.pack_(bucket, tensors, backend=backend)
        ops.pack_(bucket, tensors, scale=0.25, backend=backend)
        results.append(bucket)
    return results


def reduce_scatter(device: str, backend: str) -> list[Tensor]:
    normal = normals(device)
    results = []
    for num_ranks in (1, 2, 3, 8):
        slices = [normal(NUMEL).bfloat16() for _ in range(num_ranks)]
        shard, found = normal(NUMEL), grad_stats(device)
        ops.reduce_scatter_(shard, slices, scale=1 / num_ranks, backend=backend)
        ops.reduce_scatter_(shard, slices, scale=0.5, accumulate=True, **found, backend=backend)
        apart = torch.zeros(NUMEL - 1, device=device)
        ops.reduce_scatter_(apart, [piece[1:] for piece in slices], backend=backend)
        results += [shard, apart, *found.values()]
    return results


def loss_scale(device: str, backend: str) -> list[Tensor]:
    state = loss_scale_state(16.0, 2, device)
    for overflow in (1, 0, 1, 1, 0, 0, 0, 0, 1, 0):
        flag = torch.full((1,), float(overflow), device=device)
        ops.loss_scale_update_(state, flag, growth_interval=3, hysteresis=2, backend=backend)
    return [state]


def step_scalars(device: str, backend: str) -> list[Tensor]:
    results = []
    for flag in (0.0, 1.0):
        stats = torch.tensor([[0.0, 9.0, 0.0], [flag, 7.0, 0.0]], dtype=torch.float64, device=device)
        out, steps = torch.zeros(4, device=device), torch.zeros(1000, device=device)
        inverse = torch.full((), 0.25, device=device)
        ops.step_scalars_(
            out, stats, steps=steps, used=torch.ones_like(steps), max_norm=0.5, unscale=inverse, backend=backend
        )
        results += [out, steps]
    return results


OPS = (adam, lion, sgd, unscale, pack, reduce_scatter, loss_scale, step_scalars)


def differs(got: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether bits differ. fp64 sums get a tolerance, because each backend adds in its own order."""
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.dtype == torch.float64:
            if not torch.allclose(ours.cpu(), theirs, rtol=2**-40, atol=0):
                return True
        elif not torch.equal(ours.cpu(), theirs):
            return True
    return False


def main(backends: list[str], device: str = "cuda") -> int:
    num_wrong = 0
    for backend in backends:
        for op in OPS:
            start = time.monotonic()
            is_wrong = differs(op(device, backend), op("cpu", "reference"))
            num_wrong += is_wrong
            verdict = "DIFFERS" if is_wrong else "same bits"
            print(f"{backend} {op.__name__}: {verdict}, {time.monotonic() - start:.1f} s", flush=True)
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
