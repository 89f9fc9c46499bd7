"""The bytes of memory that a step reads and writes, by kernel: in symbols, and counted in a real step.

A model has N parameters, a rank's shard n = N / ranks. Weights and gradients are bf16; masters and moments are fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyzero.ops import registry


@dataclass(frozen=True)
class Pass:
    """One kernel's bytes: `whole` per parameter of the model, and `shard` per parameter of this rank's shard."""

    kernel: str
    what: str
    whole: float = 0
    shard: float = 0

    def at(self, num_ranks: int) -> float:
        return self.whole + self.shard / num_ranks

    def symbols(self) -> str:
        terms = [f"{count:g}{letter}" for count, letter in ((self.whole, "N"), (self.shard, "n")) if count]
        return " + ".join(terms)


ALONE = (
    Pass("unscale_", "gradients read for flag and norm; none written", 2),
    Pass("adam_", "gradients, masters, moments read; masters, moments, weights written", 28),
)
SHARDED = (
    Pass("pack_", "gradients into the bucket that is sent", 4),
    Pass("reduce_scatter_", "every rank's slice read, the fp32 mean written, flag and norm with it", 2, 4),
    Pass("adam_", "fp32 gradients, masters, moments read; masters, moments, weights written", 0, 30),
)
COPIES = Pass(
    "copies",
    "updated weights, between ranks of one host: out of the shard, into the others, by `pack_` (on GPUs `adam_`, 2N)",
    4,
)
DEEPSPEED = Pass("DeepSpeed ZeRO-2, fp16", "DeepSpeed's elementwise passes, without its collectives", 12, 114)


def kernels(num_ranks: int) -> tuple[Pass, ...]:
    return ALONE if num_ranks == 1 else SHARDED


def total(passes: Sequence[Pass], name: str = "all kernels", what: str = "") -> Pass:
    return Pass(name, what, sum(item.whole for item in passes), sum(item.shard for item in passes))


def table() -> str:
    """The ledger as Markdown, for docs/design.md."""
    alone = [(item, item.symbols(), "") for item in (*ALONE, total(ALONE, "**one rank**"))]
    sharded = [(item, "", item.symbols()) for item in (*SHARDED, total(SHARDED, "**W ranks**"), COPIES, DEEPSPEED)]
    lines = [
        "| kernel | reads and writes | one rank | W ranks | W = 2 | W = 8 |",
        "|---|---|---|---|---|---|",
        *(f"| {_code(item)} |{_cell(item.what)}| {one} | | | |" for item, one, _ in alone),
        *(
            f"| {_code(item)} |{_cell(item.what)}| | {many} | {item.at(2):g} | {item.at(8):g} |"
            for item, _, many in sharded
        ),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return f" {text} " if text else " "


def _code(item: Pass) -> str:
    return f"`{item.kernel}`" if item.kernel.endswith("_") else item.kernel


# ---- counted --------------------------------------------------------------------------------------------------------


def _num_bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _adam(args: Any) -> int:
    state = (args.master, args.exp_avg, args.exp_avg_sq)
    return 2 * _num_bytes(state) + _num_bytes((*args.grads, *args.param_outs))


def _unscale(args: Any) -> int:
    only_reads = isinstance(args.inv_scale, float) and args.inv_scale == 1.0
    return (1 if only_reads else 2) * _num_bytes(args.tensors)


def _pack(args: Any) -> int:
    return _num_bytes(args.tensors) + sum(tensor.numel() for tensor in args.tensors) * args.bucket.itemsize


def _reduce_scatter(args: Any) -> int:
    return _num_bytes(args.slices) + _num_bytes((args.shard,)) * (2 if args.accumulate else 1)


def _small(args: Any) -> int:
    return _num_bytes([value for value in args if isinstance(value, Tensor)])


_COUNTS = {"adam_": _adam, "unscale_": _unscale, "pack_": _pack, "reduce_scatter_": _reduce_scatter}


class _CountingBackend:
    """Passes calls on to a backend, and counts their bytes."""

    def __init__(self, backend: Any, counts: Counter[str]) -> None:
        self._backend = backend
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        run = getattr(self._backend, name)

        def counted(args: Any) -> None:
            self._counts[name] += _COUNTS.get(name, _small)(args)
            run(args)

        return counted


@contextmanager
def counted_ops() -> Iterator[Counter[str]]:
    """Bytes that the ops inside read and write, by op, counted from the arguments of their backends."""
    counts: Counter[str] = Counter()
    pick = registry.pick
    registry.pick = lambda *args: _CountingBackend(pick(*args), counts)  # type: ignore[assignment, return-value]
    try:
        yield counts
    finally:
        registry.pick = pick


class CountedTorch(TorchDispatchMode):
    """Bytes that torch's own operations inside read and write: their arguments and results. Omits collectives."""

    # These allocate memory, or make another view of it.
    _NOTHING = ("empty", "new_empty", "lift_fresh", "detach", "alias", "set_", "resize_", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "aten" and not func.is_view and not name.startswith(self._NOTHING):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, found))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            self.counts[name] += _num_bytes(list(tensors.values()))
        return found
