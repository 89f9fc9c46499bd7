"""`python -m benchmarks compare OLD NEW`: lists where NEW is slower or larger; the exit status is then 1."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from . import backward, checkpoint, harness, results, train_loops
from .rows import AnyRow, MemoryRow, Row, verdict

_MORE_TIME = 1.1  # two runs of the same code differ by up to this
_MORE_BYTES = 1.03
_SAME_MACHINE = ("device", "cpus", "threads", "torch", "quick", "backend")
# Rows that are neither ours nor a peer's; in older files, too
_MACHINE = frozenset((*harness.MACHINE, *checkpoint.MACHINE, train_loops.COMPUTE, backward.PLAIN))

Key = tuple[object, ...]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="a folder of --out, or its results.json")
    parser.add_argument("new", type=Path, metavar="NEW")
    args = parser.parse_args(argv)
    try:
        (old_found, old_rows), (new_found, new_rows) = results.read(args.old), results.read(args.new)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks compare: {error}", file=sys.stderr)
        return 2
    for key in _SAME_MACHINE:
        if key in old_found and key in new_found and old_found[key] != new_found[key]:
            print(f"warning: {key} was {old_found[key]}, is {new_found[key]}", file=sys.stderr)
    for path, rows in ((args.old, old_rows), (args.new, new_rows)):
        if noisy := verdict(rows):
            print(f"warning: {path}: {noisy}", file=sys.stderr)
    found, num_compared, missing = regressions(old_rows, new_rows)
    print("\n".join([*found, *(f"not in NEW: {text}" for text in missing)]))
    print(f"{len(found)} regressions in {num_compared} rows of ours")
    if not num_compared:
        print("python -m benchmarks compare: no row of ours is in both: run the same benches", file=sys.stderr)
        return 2
    return 1 if found else 0


def regressions(old: Sequence[AnyRow], new: Sequence[AnyRow]) -> tuple[list[str], int, list[str]]:
    """(regressions in words, number of compared rows, missing rows). Only rows of ours are compared."""
    before, after = ({_key(row): row for row in rows} for rows in (old, new))
    ours = [key for key, row in before.items() if _is_ours(row)]
    both = [(before[key], after[key]) for key in ours if key in after]
    found = [text for pair in both if (text := _worse(*pair, _drift(pair[0], before, after)))]
    return found, len(both), [_words(before[key]) for key in ours if key not in after]


def _is_ours(row: AnyRow) -> bool:
    return row.peer is None and row.name not in _MACHINE


def _key(row: AnyRow) -> Key:
    return (row.bench, row.case, row.name, row.numel, row.num_ranks if isinstance(row, MemoryRow) else "")


def _drift(row: AnyRow, before: dict[Key, AnyRow], after: dict[Key, AnyRow]) -> float:
    """How much slower the machine is, at least 1: the median ratio of the others' times in the same case."""
    ratios = [
        after[key].median_s / theirs.median_s
        for key, theirs in before.items()
        if isinstance(theirs, Row) and not _is_ours(theirs) and (theirs.bench, theirs.case) == (row.bench, row.case)
        if key in after and theirs.median_s
    ]
    return max(statistics.median(ratios), 1.0) if ratios else 1.0


def _worse(old: AnyRow, new: AnyRow, drift: float) -> str | None:
    """The regression in words, or None. Times whose p20-p80 overlap count as equal."""
    if isinstance(old, MemoryRow):
        for what in ("rest_bytes", "peak_bytes"):
            was, now = getattr(old, what), getattr(new, what)
            if now > was * _MORE_BYTES:
                return f"{_words(old)}: {what} {was / 2**20:.1f} -> {now / 2**20:.1f} MiB"
        return None
    limit = old.median_s * drift * _MORE_TIME
    if new.median_s <= limit or new.p20_s <= old.p80_s * drift:
        return None
    text = f"{_words(old)}: {old.median_s * 1e3:.3f} -> {new.median_s * 1e3:.3f} ms"
    text += f", {new.median_s / old.median_s:.2f}x" if old.median_s else ""
    return text + f" (others {drift:.2f}x)" * (drift > 1)


def _words(row: AnyRow) -> str:
    ranks = f", {row.num_ranks} ranks" if isinstance(row, MemoryRow) else ""
    return f"{row.bench} | {row.case}{ranks} | {row.name}"
