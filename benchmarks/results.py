"""The files of a run: results.json and results.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import environment
from .rows import AnyRow, MemoryRow, Row, table, verdict

_KINDS: dict[str, Any] = {"time": Row, "memory": MemoryRow}
JSON_NAME, TEXT_NAME = "results.json", "results.md"


def write(out: Path, found: dict[str, object], rows: Sequence[AnyRow], notes: Sequence[str]) -> None:
    """Write the rows so far, so that a run that is cut short leaves them."""
    out.mkdir(parents=True, exist_ok=True)
    kinds = {kind: name for name, kind in _KINDS.items()}
    records = [{"kind": kinds[type(row)], **asdict(row)} for row in rows]
    report = {"environment": found, "verdict": verdict(rows), "notes": list(notes), "rows": records}
    (out / JSON_NAME).write_text(json.dumps(report, indent=1) + "\n")
    (out / TEXT_NAME).write_text(_text(found, rows, notes))


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
        return report["environment"], rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected {path} to be written by `python -m benchmarks --out`, got {error!r}") from error
