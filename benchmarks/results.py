"""The files of a run: results.json and results.md."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import environment
from .rows import AnyRow, MemoryRow, Row, table, verdict

_KINDS: dict[str, Any] = {"time": Row, "memory": MemoryRow}
JSON_NAME, TEXT_NAME = "results.json", "results.md"
PICTURES = ("roofline.png", "train.png", "memory.png", "parameters.png", "ranks.png")
_NUMBERS = {Row: ("median_s", "p20_s", "p80_s"), MemoryRow: ("num_ranks", "rest_bytes", "peak_bytes")}


def write(out: Path, found: dict[str, object], rows: Sequence[AnyRow], notes: Sequence[str]) -> None:
    """Write the rows so far, so that a run that is cut short leaves them. An earlier run's pictures are removed."""
    out.mkdir(parents=True, exist_ok=True)
    kinds = {kind: name for name, kind in _KINDS.items()}
    records = [{"kind": kinds[type(row)], **asdict(row)} for row in rows]
    report = {"environment": found, "verdict": verdict(rows), "notes": list(notes), "rows": records}
    for picture in PICTURES:
        (out / picture).unlink(missing_ok=True)
    for name, text in ((JSON_NAME, json.dumps(report, indent=1) + "\n"), (TEXT_NAME, _text(found, rows, notes))):
        (out / f"{name}.new").write_text(text)
        os.replace(out / f"{name}.new", out / name)


def _text(found: dict[str, object], rows: Sequence[AnyRow], notes: Sequence[str]) -> str:
    parts = [environment.in_words(found).replace("\n", "  \n"), verdict(rows) or "", *(f"- {note}" for note in notes)]
    for bench in dict.fromkeys(row.bench for row in rows):
        parts.append(f"## {bench}\n\n{table([row for row in rows if row.bench == bench])}")
    return "# Benchmark results\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def read(path: Path) -> tuple[dict[str, Any], list[AnyRow]]:
    """Environment and rows of a results.json, or of the folder that holds one.

    Raises:
        OSError, ValueError: The file cannot be read, or is no results.json.
    """
    path = path / JSON_NAME if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        rows = [_KINDS[record.pop("kind")](**record) for record in report["rows"]]
        for row in rows:
            for name in _NUMBERS[type(row)]:
                float(getattr(row, name))
        return dict(report["environment"]), rows
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected {path} to be written by `python -m benchmarks --out`, got {error!r}") from error
