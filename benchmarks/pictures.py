"""Pictures of a run: roofline, step by phase, memory by ranks, cost by parameters and by ranks, simulation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .cost_model import STRATEGIES, Cluster, best_bucket, simulate
from .harness import MACHINE
from .results import PICTURES
from .rows import AnyRow, MemoryRow, Row, verdict

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend comes first

_OURS_COLOR, _THEIRS_COLOR = "#c0392b", "#7f8c8d"
_COLORS = ("C0", "C1", "C2", "C4", "C5", "C7", "C8", "C9")  # of peers; without red
_PHASES = {"forward": "#bdc3c7", "backward": "#5d8aa8", "step": "#c0392b"}
_WIDTH, _HEIGHT = 7.0, 3.6  # inches; at _DPI each file stays below 100 kB
_DPI = 110
_MARKERS = "osD^vP*X"


def draw(out: Path, rows: Sequence[AnyRow]) -> list[Path]:
    """Draw the pictures for which there are rows."""
    timed = [row for row in rows if isinstance(row, Row)]
    made: list[tuple[Callable[[Any, Any], None], Sequence[AnyRow]]] = [
        (_roofline, [row for row in timed if row.gb_per_s and row.bench in _KERNELS]),
        (_train, _first_case([row for row in timed if row.phases])),
        (_memory, [row for row in rows if isinstance(row, MemoryRow)]),
        (_parameters, [row for row in timed if row.bench == "scaling" and " ranks" not in row.case]),
        (_ranks, [row for row in timed if row.bench == "scaling" and row.predicted_s]),
    ]
    return [_figure(out / name, *one) for name, one in zip(PICTURES, made, strict=True) if one[1]]


def _first_case(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.case == rows[0].case]


_KERNELS = ("adam", "lion", "sgd", "unscale", "reduce_scatter", "pack", "step")


def _figure(path: Path, plot: Callable[[Any, Any], None], what: Any) -> Path:
    figure, axes = plt.subplots(figsize=(_WIDTH, _HEIGHT))
    plot(axes, what)
    if what is not None and verdict(what) is not None:
        axes.set_title(f"{axes.get_title(loc='left')} (TOO NOISY TO JUDGE)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    return path


def _roofline(axes: Any, rows: Sequence[Row]) -> None:
    """Bytes per second against bytes per element. Memory bounds all these kernels, so the roof is that of memory."""
    for name, style in zip(MACHINE, ("--", "-"), strict=True):
        speeds = [row.gb_per_s or 0.0 for row in rows if row.name == name]
        if speeds:
            roof = statistics.median(speeds)
            axes.axhline(roof, color="black", linewidth=1, linestyle=style, label=f"{name}: {roof:.0f} GB/s")
    shown: dict[tuple[str, bool], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.name not in MACHINE and row.bytes_per_element and row.gb_per_s:
            xs, ys = shown.setdefault((row.bench, row.peer is None), ([], []))
            xs.append(row.bytes_per_element)
            ys.append(row.gb_per_s)
    benches = list(dict.fromkeys(bench for bench, _ in shown))
    for (bench, is_ours), (xs, ys) in shown.items():
        label = f"{bench}, {'pyzero' if is_ours else 'peers'}"
        color = _OURS_COLOR if is_ours else _THEIRS_COLOR
        axes.scatter(xs, ys, marker=_MARKERS[benches.index(bench)], color=color, s=28, label=label, alpha=0.8)
    axes.set(yscale="log", xlabel="bytes per element that the job needs", ylabel="GB/s of needed bytes")
    axes.set_title("Kernels against the memory's roof", loc="left", fontsize=10)
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _train(axes: Any, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: -row.median_s)
    left = [0.0] * len(ordered)
    for phase, color in _PHASES.items():
        widths = [1e3 * (row.phases or {}).get(phase, 0.0) for row in ordered]
        axes.barh(range(len(ordered)), widths, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(ordered)), [row.name for row in ordered], fontsize=7)
    for tick, row in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color(_OURS_COLOR if row.name.startswith("FusedZero") else "black")
    axes.set(xlabel="ms per iteration; backward holds the exchange of gradients where it overlaps")
    axes.set_title(rows[0].case, loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="upper right")


def _memory(axes: Any, rows: Sequence[MemoryRow]) -> None:
    for index, name in enumerate(dict.fromkeys(row.name for row in rows)):
        mine = sorted((row for row in rows if row.name == name), key=lambda row: row.num_ranks)
        ranks = [row.num_ranks for row in mine]
        style = (
            dict(color=_OURS_COLOR, linewidth=2) if mine[0].peer is None else dict(color=_COLORS[index], linewidth=1)
        )
        axes.plot(ranks, [row.rest_bytes / row.numel for row in mine], marker="o", markersize=4, label=name, **style)
        axes.plot(ranks, [row.peak_bytes / row.numel for row in mine], marker="^", markersize=4, linestyle=":", **style)
        if mine[0].estimated_rest_bytes is not None:
            wanted = [(row.estimated_rest_bytes or 0) / row.numel for row in mine]
            axes.plot(ranks, wanted, color="black", linewidth=0.8, linestyle="--", label="pyzero estimate, at rest")
    axes.set(xlabel="ranks", ylabel="bytes per parameter on a rank", ylim=(0, None))
    axes.set_xticks(sorted({row.num_ranks for row in rows}))
    axes.set_title(f"Memory at rest (solid) and at the peak (dotted), {rows[0].case}", loc="left", fontsize=10)
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _parameters(axes: Any, rows: Sequence[Row]) -> None:
    for index, name in enumerate(dict.fromkeys(row.name for row in rows)):
        mine = [(int(row.case.split()[0].replace(",", "")), 1e3 * row.median_s) for row in rows if row.name == name]
        color = _OURS_COLOR if name.startswith("pyzero") else _COLORS[index]
        axes.plot(*zip(*sorted(mine), strict=True), marker="o", markersize=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ms per step")
    axes.set_title(f"One step of {rows[0].numel / 2**20:.0f}M bf16 elements, one rank", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def _ranks(axes: Any, rows: Sequence[Row]) -> None:
    """Measured and predicted times by number of ranks, at the largest size."""
    largest = max(row.numel for row in rows)
    for color, name in zip((_OURS_COLOR, "C0"), ("step, peer", "step, exact"), strict=True):
        mine = [row for row in rows if row.numel == largest and row.name == name]
        ranks = [int(row.case.split()[0]) for row in mine]
        spread = [[1e3 * (row.median_s - row.p20_s), 1e3 * (row.p80_s - row.median_s)] for row in mine]
        times = [1e3 * row.median_s for row in mine]
        axes.errorbar(ranks, times, list(zip(*spread, strict=True)), marker="o", color=color, label=f"{name}, measured")
        axes.plot(ranks, [1e3 * (row.predicted_s or 0) for row in mine], color=color, linestyle="--", label="model")
    axes.set(xlabel="ranks", ylabel="ms per step, exchange included", ylim=(0, None))
    axes.set_xticks(sorted({int(row.case.split()[0]) for row in rows}))
    axes.set_title(f"{largest / 2**20:.0f}M bf16 elements on the cores of one host", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def simulation(out: Path, cluster: Cluster, num_params: float, tokens: float) -> Path:
    """The simulated time beyond compute, by number of ranks."""
    from .simulate import RANKS

    def plot(axes: Any, _: object) -> None:
        for index, strategy in enumerate(STRATEGIES):
            steps = [simulate(strategy, cluster, ranks, num_params, tokens) for ranks in RANKS]
            is_ours = strategy.name.startswith("pyzero")
            style = dict(linewidth=2 if is_ours else 1, color=_COLORS[index])
            axes.plot(RANKS, [1e3 * step.exposed_s for step in steps], label=strategy.name, **style)
            if is_ours:
                best = [best_bucket(strategy, cluster, ranks, num_params, tokens)[1] for ranks in RANKS]
                label = f"{strategy.name}, best bucket"
                axes.plot(RANKS, [1e3 * step.exposed_s for step in best], linestyle="--", label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms per step beyond forward and backward")
        title = f"Simulated: {num_params / 1e9:g}B parameters, {tokens:,.0f} tokens per GPU, {cluster.name}"
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _figure(out / "simulation.png", plot, None)
