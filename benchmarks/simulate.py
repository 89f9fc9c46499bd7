"""`python -m benchmarks simulate`: the cost model of docs/scaling.md on more ranks than there are.

Nothing here is measured. `python -m benchmarks scaling` compares the same model with 1 to 4 ranks of this host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .cost_model import H100, STRATEGIES, Cluster, Link, Step, Strategy, balanced_bytes, best_bucket, simulate

RANKS = tuple(2**power for power in range(3, 15))  # 8 to 16,384
_OURS = 3  # the first strategies, whose bucket size pyzero chooses


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks simulate", description=__doc__)
    parser.add_argument("--model-params", type=float, default=7e9, metavar="N")
    parser.add_argument("--tokens-per-rank", type=float, default=8192, metavar="T", help="of one step")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write simulation.md and simulation.png there")
    args = parser.parse_args(argv)
    for option in ("model_params", "tokens_per_rank"):
        number = getattr(args, option)
        if not 1 <= number < float("inf"):
            parser.error(f"expected --{option.replace('_', '-')} as a number from 1 on, got {number:g}")
    text = report(H100, args.model_params, args.tokens_per_rank)
    print(text)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "simulation.md").write_text(f"# Simulated, not measured\n\n{text}\n")
        except OSError as error:
            parser.error(f"got --out {args.out}, wanted a folder to write to ({error.strerror}); pass another")
        try:
            from . import pictures
        except ImportError as error:
            print(f"no picture ({error}): pip install matplotlib", file=sys.stderr)
            return 0
        print(pictures.simulation(args.out, H100, args.model_params, args.tokens_per_rank))
    return 0


def report(cluster: Cluster, num_params: float, tokens: float) -> str:
    def step(strategy: Strategy, ranks: int) -> Step:
        return simulate(strategy, cluster, ranks, num_params, tokens)

    head = (
        f"{cluster.name}: {num_params / 1e9:g}B bf16 parameters, {tokens:,.0f} tokens per rank and step, forward and "
        f"backward {step(STRATEGIES[0], RANKS[0]).compute_s * 1e3:.0f} ms. Assumed: inside a host "
        f"{_link(cluster.inside)}, between hosts {_link(cluster.across)} per rank; memory "
        f"{cluster.memory_bytes_per_s / 1e12:g} TB/s, {cluster.flops / 1e12:g} TFLOP/s."
    )
    parts = {
        "Milliseconds of a step beyond forward and backward, at default bucket sizes:": _table(
            lambda strategy, ranks: f"{step(strategy, ranks).exposed_s * 1e3:.0f}"
        ),
        "Bucket size at which latency takes as long as the bytes, MiB (smaller buckets are bound by latency):": _table(
            lambda strategy, ranks: f"{balanced_bytes(strategy.reduce, cluster, ranks) / 2**20:,.0f}",
            STRATEGIES[:_OURS],
        ),
        "Latency of all messages of a step, hidden or not, ms:": _table(
            lambda strategy, ranks: f"{step(strategy, ranks).latency_s * 1e3:.0f}"
        ),
        "Best bucket size, MiB, and with it the ms beyond forward and backward:": _table(
            lambda strategy, ranks: _best(strategy, cluster, ranks, num_params, tokens), STRATEGIES[:_OURS]
        ),
        "Bytes that a rank sends per parameter and step:": _table(
            lambda strategy, ranks: f"{strategy.volume(ranks):.2f}"
        ),
    }
    return "\n\n".join([head, *(f"{title}\n\n{text}" for title, text in parts.items())])


def _link(link: Link) -> str:
    return f"{link.alpha_s * 1e6:g} us and {link.bytes_per_s / 1e9:g} GB/s"


def _best(strategy: Strategy, cluster: Cluster, ranks: int, num_params: float, tokens: float) -> str:
    mib, step = best_bucket(strategy, cluster, ranks, num_params, tokens)
    return f"{mib:g}: {step.exposed_s * 1e3:.0f}"


def _table(cell: Callable[[Strategy, int], str], strategies: Sequence[Strategy] = STRATEGIES) -> str:
    shown = RANKS[::2] if RANKS[-1] in RANKS[::2] else (*RANKS[::2], RANKS[-1])
    lines = ["| | " + " | ".join(f"{ranks:,}" for ranks in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for strategy in strategies:
        lines.append(f"| {strategy.name} | " + " | ".join(cell(strategy, ranks) for ranks in shown) + " |")
    return "\n".join(lines)
