"""A whole optimizer step at the shapes of models. On a GPU, its time and the host's have a column each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

import pyzero

from . import peers
from .harness import Contender, check, compare, relative
from .options import Options
from .rows import Row
from .step import CHECK, CHECK_BF16, CHECK_NORM, CHECKED_STEPS, MAX_NORM, flat

Shapes = list[int]  # elements of each parameter
Step = Callable[[], object]
_CHECKED_BYTES = 4  # fp32 gradients are read once more for the norm, or to find inf


def _gpt2(layers: int, width: int) -> Shapes:
    """Parameter sizes of a GPT-2 with a vocabulary of 50,257 and a context of 1,024."""
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
    return ["1,000 x 4,096"] if options.quick else names


def run(options: Options) -> list[Row]:
    check_step(options)
    rows = []
    for name in _present(options):
        shapes = _MODELS[name]
        if options.numel is not None:
            shapes = [max(1, numel * options.numel // sum(shapes)) for numel in shapes]
        rows += _case(f"{name}, bf16 and masters", shapes, torch.bfloat16, options)
        rows += _case(f"{name}, fp32", shapes, torch.float32, options)
    return rows


def _case(case: str, shapes: Shapes, dtype: torch.dtype, options: Options) -> list[Row]:
    """On a GPU one contender exists at a time, because several of a large model do not fit."""
    made = _bf16_makers(options) if dtype == torch.bfloat16 else _fp32_makers()
    contenders = (
        Contender(name, make(*inputs(shapes, dtype, options)), moved, peer)
        for name, (make, moved, peer) in made.items()
        if options.wants(peer)
    )
    if options.device == "cpu":
        return compare("models", case, sum(shapes), list(contenders), options, with_copy=False)
    rows = []
    for contender in contenders:
        rows += compare("models", case, sum(shapes), [contender], options, with_copy=False)
        del contender
        torch.cuda.empty_cache()
    return relative(rows)


def inputs(shapes: Shapes, dtype: torch.dtype, options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and gradients whose norm is far above the one that they are clipped to."""
    weights = [peers.normal(numel, 2 * index, options).to(dtype) for index, numel in enumerate(shapes)]
    grads = [peers.normal(numel, 2 * index + 1, options, std=0.1).to(dtype) for index, numel in enumerate(shapes)]
    return weights, grads


Maker = Callable[[list[Tensor], list[Tensor]], Step]
Made = dict[str, tuple[Maker, float, str | None]]  # by name: maker, bytes per element, key of peers.PEERS


def _bf16_makers(options: Options) -> Made:
    """Contenders that check, take the norm, clip, update fp32 masters and write bf16 weights."""
    made: Made = {
        "pyzero FusedZeroAdamW" + suffix: (zero(backend), 2 + 28, None) for suffix, backend in options.backends.items()
    }
    if options.device == "cuda":
        made["same, a CUDA graph"] = (lambda *inputs: _captured(zero("auto")(*inputs)), 2 + 28, None)
    for name, (key, make) in peers.mixed_peers(options, MAX_NORM).items():
        made[name] = (lambda *inputs, make=make: make(*inputs).step, 2 + 28, key)
    return made


def _fp32_makers() -> Made:
    made: Made = {
        "pyzero FusedZeroAdamW": (zero("auto"), 28 + _CHECKED_BYTES, None),
        "same, no clip": (zero("auto", max_grad_norm=None), 28 + _CHECKED_BYTES, None),
    }
    for kind in ("fused", "foreach"):
        for clips in (False, True):
            name = f"torch{' clip,' * clips} AdamW({kind}=True)"
            made[name] = (_torch(kind, clips), 28 + _CHECKED_BYTES * clips, f"torch-{kind}")
    made["torch clip folded into AdamW(fused=True)"] = (_folded, 28 + _CHECKED_BYTES, "torch-fused")
    return made


def _params(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Parameter]:
    params = [Parameter(weight) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def zero(backend: str, max_grad_norm: float | None = MAX_NORM) -> Maker:
    def make(weights: list[Tensor], grads: list[Tensor]) -> Step:
        params = _params(weights, grads)
        weights.clear()  # the optimizer moves them into its buckets
        return pyzero.FusedZeroAdamW(
            params, lr=peers.LR, weight_decay=peers.WEIGHT_DECAY, max_grad_norm=max_grad_norm, backend=backend
        ).step

    return make


def _torch(kind: str, clips: bool) -> Maker:
    def make(weights: list[Tensor], grads: list[Tensor]) -> Step:
        params = _params(weights, grads)
        optimizer = peers.adamw(params, kind)

        def step() -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()

        return step

    return make


def _folded(weights: list[Tensor], grads: list[Tensor]) -> Step:
    """The clip and the check for inf go into fused AdamW, as in the folded variant of peers.MixedStep."""
    params = _params(weights, grads)
    optimizer = peers.adamw(params)

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([param.grad for param in params], foreach=True)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.grad_scale = (norm + 1e-6).div(MAX_NORM).clamp(min=1.0)
        optimizer.step()

    return step


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


def check_step(options: Options) -> None:
    """Check that the contenders agree after some steps, at a small size."""
    shapes = [3, 64, 4096, 1000] * 5
    weights, grads = inputs(shapes, torch.bfloat16, options)
    for backend in options.backends.values():
        ours = _params([weight.clone() for weight in weights], grads)
        optimizer = pyzero.FusedZeroAdamW(
            ours, lr=peers.LR, weight_decay=peers.WEIGHT_DECAY, max_grad_norm=MAX_NORM, backend=backend
        )
        theirs = peers.MixedStep([weight.clone() for weight in weights], grads, MAX_NORM, folded=False)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
            theirs.step()
        check("FusedZeroAdamW, bf16: norm", optimizer.grad_norm, theirs.norm, **CHECK_NORM)
        check("FusedZeroAdamW, bf16: weights", flat(ours), flat(theirs.weights), **CHECK_BF16)

    weights, grads = inputs(shapes, torch.float32, options)
    folded = [weight.clone() for weight in weights]
    step = _folded(folded, [grad.clone() for grad in grads])
    for _ in range(CHECKED_STEPS):
        step()
    for max_norm in (MAX_NORM, None):
        ours, theirs = (_params([w.clone() for w in weights], [g.clone() for g in grads]) for _ in range(2))
        optimizer = pyzero.FusedZeroAdamW(ours, lr=peers.LR, weight_decay=peers.WEIGHT_DECAY, max_grad_norm=max_norm)
        peer = peers.adamw(theirs)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
            torch._foreach_copy_([param.grad for param in theirs], grads)  # torch clips in place
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(theirs, max_norm, foreach=True)
            peer.step()
        check(f"FusedZeroAdamW, fp32, clipped to {max_norm}: weights", flat(ours), flat(theirs), **CHECK)
        if max_norm is not None:
            check("FusedZeroAdamW, fp32, against a folded clip: weights", flat(ours), flat(folded), **CHECK)
