"""A whole optimizer step at the shapes of models; on a GPU its own time and the host's in two columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

import pyzero

from . import peers
from .adam import LR
from .harness import Contender, Options, Row, check, compare
from .step import CHECK, CHECK_BF16, CHECK_NORM, CHECKED_STEPS, MAX_NORM, flat

Shapes = list[int]  # elements of each parameter
Step = Callable[[], object]
_CLIPPED_BYTES = 4  # of fp32 gradients, read once more for the norm


def _gpt2(layers: int, width: int) -> Shapes:
    """Vocabulary of 50,257, context of 1,024."""
    block = [width, width, 3 * width**2, 3 * width, width**2, width]
    block += [width, width, 4 * width**2, 4 * width, 4 * width**2, width]
    return [50_257 * width, 1024 * width, *(block * layers), width, width]


_MODELS = {
    "1,000 x 64": [64] * 1000,
    "1,000 x 4,096": [4096] * 1000,
    "gpt2-124M": _gpt2(12, 768),
    "gpt2-1.5B": _gpt2(48, 1600),
}


def _present(options: Options) -> list[str]:
    names = list(_MODELS)[:3] if options.device == "cpu" else list(_MODELS)[1:]
    return names[:2] if options.quick else names


def run(options: Options) -> list[Row]:
    _check(options)
    rows = []
    for name in _present(options):
        shapes = _MODELS[name]
        if options.numel is not None:
            shapes = [max(1, numel * options.numel // sum(shapes)) for numel in shapes]
        rows += _case(f"{name}, bf16 and masters", shapes, torch.bfloat16, options)
        rows += _case(f"{name}, fp32", shapes, torch.float32, options)
    return rows


def _case(case: str, shapes: Shapes, dtype: torch.dtype, options: Options) -> list[Row]:
    """One contender at a time: a large model's do not fit beside each other."""
    made = _bf16_makers(options) if dtype == torch.bfloat16 else _fp32_makers(options)
    rows = []
    for name, (make, moved) in made.items():
        contender = Contender(name, make(*_inputs(shapes, dtype, options)), moved)
        rows += compare("models", case, sum(shapes), [contender], options, with_copy=False)
        del contender
        if options.device == "cuda":
            torch.cuda.empty_cache()
    peer = rows[-1].median_s  # the last of the makers
    return [dataclasses.replace(row, speedup=peer / row.median_s) for row in rows]


def _inputs(shapes: Shapes, dtype: torch.dtype, options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients of a norm far above the one clipped to."""
    weights = [peers.normal(numel, 2 * index, options).to(dtype) for index, numel in enumerate(shapes)]
    grads = [peers.normal(numel, 2 * index + 1, options, std=0.1).to(dtype) for index, numel in enumerate(shapes)]
    return weights, grads


Maker = Callable[[list[Tensor], list[Tensor]], Step]


def _bf16_makers(options: Options) -> dict[str, tuple[Maker, float]]:
    """Check, norm, clip, fp32 masters, bf16 weights out; name -> (maker, bytes per element)."""
    made: dict[str, tuple[Maker, float]] = {
        "pyzero FusedZeroAdamW" + suffix: (_zero(backend), 2 + 28) for suffix, backend in options.backends.items()
    }
    if options.device == "cuda":
        made["same, a CUDA graph"] = (lambda *inputs: _captured(_zero("auto")(*inputs)), 2 + 28)
    for name, folded in (("torch foreach, fused AdamW, clip folded", True), ("torch foreach, fused AdamW", False)):
        made[name] = (lambda *inputs, folded=folded: peers.MixedStep(*inputs, MAX_NORM, folded).step, 2 + 28)
    return made


def _fp32_makers(options: Options) -> dict[str, tuple[Maker, float]]:
    made: dict[str, tuple[Maker, float]] = {"pyzero FusedZeroAdamW": (_zero("auto"), 28 + _CLIPPED_BYTES)}
    for kind in ("foreach", "fused"):
        for clips in (False, True):
            name = f"torch{' clip,' * clips} AdamW({kind}=True)"
            made[name] = (_torch(kind, clips), 28 + _CLIPPED_BYTES * clips)
    return made


def _params(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Parameter]:
    params = [Parameter(weight) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _zero(backend: str) -> Maker:
    def make(weights: list[Tensor], grads: list[Tensor]) -> Step:
        params = _params(weights, grads)
        weights.clear()  # the optimizer moves them into its buckets
        return pyzero.FusedZeroAdamW(params, lr=LR, weight_decay=1e-2, max_grad_norm=MAX_NORM, backend=backend).step

    return make


def _torch(kind: str, clips: bool) -> Maker:
    def make(weights: list[Tensor], grads: list[Tensor]) -> Step:
        params = _params(weights, grads)
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=1e-2, **{kind: True})

        def step() -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()

        return step

    return make


def _captured(step: Step) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept: Step = step) -> None:
        graph.replay()

    return replay


def _check(options: Options) -> None:
    """The contenders agree after some steps, at a small size."""
    shapes = [3, 64, 4096, 1000] * 5
    weights, grads = _inputs(shapes, torch.bfloat16, options)
    for backend in options.backends.values():
        ours = _params([weight.clone() for weight in weights], grads)
        optimizer = pyzero.FusedZeroAdamW(ours, lr=LR, weight_decay=1e-2, max_grad_norm=MAX_NORM, backend=backend)
        theirs = peers.MixedStep([weight.clone() for weight in weights], grads, MAX_NORM, folded=False)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
            theirs.step()
        check("FusedZeroAdamW, bf16: norm", optimizer.grad_norm, theirs.norm, **CHECK_NORM)
        check("FusedZeroAdamW, bf16: weights", flat(ours), flat(theirs.weights), **CHECK_BF16)

    weights, grads = _inputs(shapes, torch.float32, options)
    ours, clipped = (_params([w.clone() for w in weights], [g.clone() for g in grads]) for _ in range(2))
    optimizer = pyzero.FusedZeroAdamW(ours, lr=LR, weight_decay=1e-2, max_grad_norm=MAX_NORM)
    peer = peers.adamw(clipped)
    for _ in range(CHECKED_STEPS):
        optimizer.step()
        torch._foreach_copy_([param.grad for param in clipped], grads)  # torch clips in place
        torch.nn.utils.clip_grad_norm_(clipped, MAX_NORM, foreach=True)
        peer.step()
    check("FusedZeroAdamW, fp32: weights", flat(ours), flat(clipped), **CHECK)
