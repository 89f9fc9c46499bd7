"""What is left of a run: a curve per optimizer (CSV), one picture of them, a table of bytes. Whole files or none."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass, field
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
    parts: list[list[int]] = field(default_factory=list)  # [first step, number of ranks], one per start


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
    """An earlier run of that optimizer with these settings, if there is one."""
    path = folder / f"{optimizer}.json"
    if not path.is_file():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if settings.items() <= result.settings.items() else None


def _smoothed(losses: list[float]) -> list[float]:
    """Running mean, its start corrected for (the same as Adam's)."""
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smooth.append(mean / (1 - _SMOOTHING**step))
    return smooth


def _pyplot() -> Any:
    """matplotlib's, drawing to files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _write_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


def plot(results: list[Result], path: Path) -> bool:
    """The curves as PNG. False where matplotlib is not installed."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for result in results:
        label = f"{result.optimizer}: held-out {result.held_out_loss:.3f}"
        axes.plot(_smoothed(result.losses), label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss, nats per byte (running mean)")
    axes.legend()
    axes.grid(alpha=0.3)
    _write_figure(figure, path)
    pyplot.close(figure)
    return True


def plot_qualities(curves: dict[str, dict[int, float]], quality: str, path: Path) -> None:
    """A held-out quality by step, of each optimizer, to `path` as PNG where matplotlib is, and to .json beside it."""
    write_whole(path.with_suffix(".json"), json.dumps(curves).encode())
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, (label, curve) in enumerate(curves.items()):
        style = {"linewidth": 1.4} if number == 0 else {"linewidth": 6, "alpha": 0.3, "zorder": 1}
        axes.plot(list(curve), list(curve.values()), label=f"{label}: {list(curve.values())[-1]:.3f}", **style)
    axes.set(xlabel="step", ylabel=quality)
    axes.legend()
    axes.grid(alpha=0.3)
    _write_figure(figure, path)
    pyplot.close(figure)


def plot_over(resumed: Result, whole: Result, path: Path) -> bool:
    """A run in parts over one in one piece, and below how far each step's loss is off. False without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="tight")
    above.plot(_smoothed(whole.losses), color="0.8", linewidth=6, label=f"uninterrupted {_on(whole.parts[0][1])}")
    smooth = _smoothed(resumed.losses)
    off = [mine - other for mine, other in zip(resumed.losses, whole.losses, strict=True)]
    ends = [first for first, _ in resumed.parts[1:]] + [len(smooth)]
    for number, ((first, num_ranks), end) in enumerate(zip(resumed.parts, ends, strict=True)):
        steps, color = range(first, end), f"C{number}"
        label = f"{'resumed' if number else 'started'} {_on(num_ranks)}"
        above.plot(steps, smooth[first:end], color=color, linewidth=1.4, label=label)
        below.plot(steps, off[first:end], color=color, linewidth=0.8)
        for axes in (above, below) if number else ():
            axes.axvline(first, color="0.5", linestyle=":", linewidth=1)
    above.set(ylabel="training loss, nats per byte (running mean)")
    below.set(xlabel="step", ylabel="difference")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    _write_figure(figure, path)
    pyplot.close(figure)
    return True


def _on(num_ranks: int) -> str:
    return f"on {num_ranks} rank{'s' * (num_ranks != 1)}"


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
