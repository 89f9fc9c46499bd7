"""What is left of a run: a curve per optimizer (CSV), one picture of them, a table of bytes. Whole files or none."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SMOOTHING = 0.95


@dataclass(frozen=True)
class Result:
    """One training run."""

    optimizer: str
    settings: dict[str, Any]  # what must agree for two curves to be comparable
    losses: list[float]  # nats per byte, training, mean over ranks; one per step
    held_out_loss: float  # nats per byte
    seconds: float
    weight_bytes: int  # on each rank
    state_bytes: int  # masters and moments, on the rank that holds most


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader or a Ctrl-C finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(result: Result, folder: Path) -> None:
    """<optimizer>.json, from which `load` reads, and <optimizer>.csv of step and loss."""
    rows = "".join(f"{step},{loss:.6f}\n" for step, loss in enumerate(result.losses, 1))
    write_whole(folder / f"{result.optimizer}.csv", f"step,loss\n{rows}".encode())
    write_whole(folder / f"{result.optimizer}.json", json.dumps(asdict(result)).encode())


def load(optimizer: str, folder: Path, settings: dict[str, Any]) -> Result | None:
    """An earlier run of that optimizer with the same settings, if there is one."""
    path = folder / f"{optimizer}.json"
    if not path.is_file():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if result.settings == settings else None


def _smoothed(losses: list[float]) -> list[float]:
    """Running mean, its start corrected for (the same as Adam's)."""
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smooth.append(mean / (1 - _SMOOTHING**step))
    return smooth


def plot(results: list[Result], path: Path) -> bool:
    """The curves as PNG. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for result in results:
        label = f"{result.optimizer}: held-out {result.held_out_loss:.3f}"
        axes.plot(_smoothed(result.losses), label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss, nats per byte (running mean)")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
    return True


def memory_table(num_params: int, num_ranks: int, measured: list[Result]) -> str:
    """Bytes per rank, measured where a run is at hand. Plain AdamW over 16-bit weights is computed, not run."""
    rows = [("plain AdamW, bf16 weights + fp32 masters (computed)", 2 * num_params, 12 * num_params)]
    rows += [(f"{result.optimizer} (measured)", result.weight_bytes, result.state_bytes) for result in measured]
    title = f"bytes per rank, {num_ranks} rank(s)"
    header = f"{title:<52} {'weights':>10} {'optimizer':>10} {'sum':>10} {'state/param':>12}"
    lines = [header, "-" * len(header)]
    for name, weights, state in rows:
        mib = [f"{value / 2**20:7.2f}MiB" for value in (weights, state, weights + state)]
        lines.append(f"{name:<52} {mib[0]:>10} {mib[1]:>10} {mib[2]:>10} {state / num_params:>10.2f} B")
    return "\n".join(lines)
