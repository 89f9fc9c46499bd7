"""Timing, rows and tables. Ours, the peer and a plain copy take turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import pyzero
from pyzero.ops import build_spec, registry

from .gpu_timer import GpuTimer

_COPY_NUMEL = {"cpu": 48 << 20, "cuda": 512 << 20}  # fp32; several times the last-level cache
_NUMEL = {"cpu": (16_000_000, 50_000_000), "cuda": (1 << 26, 1 << 28)}  # of the ops' tensors: quick, full
# After a parallel loop torch's OpenMP threads spin for a while, on the cores that the next contender wants.
_SETTLE_S = 0.005


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    device: str = "cpu"
    quick: bool = False
    numel: int | None = None  # overrides each bench's size (tests)

    @property
    def size(self) -> int:
        """Elements of an op's tensors."""
        quick, full = _NUMEL[self.device]
        return self.numel or (quick if self.quick else full)

    @property
    def backends(self) -> dict[str, str]:
        """Of the ops: what to add to a contender's name -> backend. On a GPU the one that auto takes, and Triton."""
        found = {"": "auto"}
        if self.device == "cuda" and all(_is_there(name) for name in ("cuda", "triton")):
            found[", triton"] = "triton"
        return found

    @property
    def repeats(self) -> int:
        return 3 if self.numel else 11 if self.quick else 31


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    call: Callable[[], object]
    bytes_per_element: float | None = None  # of memory traffic that the job needs; None: not counted


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    bench: str
    case: str
    name: str
    numel: int
    median_s: float
    p20_s: float
    p80_s: float
    bytes_per_element: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None  # GB/s over those of a copy (read + write) in the same run
    speedup: float | None = None  # median of the peer over this median; 1 for the peer
    host_s: float | None = None  # on a GPU: until the host may go on; the times above are the GPU's alone
    hides_host: bool | None = None  # on a GPU: False where they are not


def compare(
    bench: str,
    case: str,
    numel: int,
    contenders: Sequence[Contender],
    options: Options,
    peer: str | None = None,
    with_copy: bool = True,
) -> list[Row]:
    """Time the contenders in turns. `peer` names the one that the others are measured against."""
    everyone = [*contenders, _copy(options)] if with_copy else list(contenders)
    timers = {contender.name: _timer(contender.call, options) for contender in everyone}
    times: dict[str, list[float]] = {contender.name: [] for contender in everyone}
    for repeat in range(options.repeats + 1):
        for contender in everyone:
            elapsed = timers[contender.name].sample()
            if repeat > 0:  # the first round warms up
                times[contender.name].append(elapsed)

    medians = {name: statistics.median(samples) for name, samples in times.items()}
    copy = everyone[-1]
    copy_gb_per_s = 8 * _copy_numel(options) / medians[copy.name] / 1e9 if with_copy else None
    rows = []
    for contender in everyone:
        median, moved = medians[contender.name], contender.bytes_per_element
        elements = _copy_numel(options) if with_copy and contender is copy else numel
        speed = moved * elements / median / 1e9 if moved else None
        timer = timers[contender.name]
        rows.append(
            Row(
                bench,
                case,
                contender.name,
                elements,
                median,
                quantile(times[contender.name], 0.2),
                quantile(times[contender.name], 0.8),
                moved,
                speed,
                100 * speed / copy_gb_per_s if speed and copy_gb_per_s else None,
                medians[peer] / median if peer is not None and not (with_copy and contender is copy) else None,
                timer.host_s,
                timer.hides_host,
            )
        )
    return rows


class _CpuTimer:
    """Samples of one call on the CPU."""

    host_s = hides_host = None

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def sample(self) -> float:
        return _time_cpu(self._call)


def _timer(call: Callable[[], object], options: Options) -> GpuTimer | _CpuTimer:
    return GpuTimer(call) if options.device == "cuda" else _CpuTimer(call)


def _is_there(backend: str) -> bool:
    return registry.BACKENDS[backend].unavailable_reason("cuda") is None


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The sample at that fraction of the sorted list."""
    ordered = sorted(samples)
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def timed_row(bench: str, case: str, name: str, samples: Sequence[float]) -> Row:
    """A row of times alone."""
    return Row(bench, case, name, 0, statistics.median(samples), quantile(samples, 0.2), quantile(samples, 0.8))


def check(what: str, got: Tensor, wanted: Tensor, *, rtol: float, atol: float) -> None:
    """Raise AssertionError where ours and the peer disagree: a wrong kernel is not worth timing."""
    torch.testing.assert_close(
        got.float(), wanted.float(), rtol=rtol, atol=atol, msg=lambda text: f"{what} differs from the peer: {text}"
    )


def _copy_numel(options: Options) -> int:
    return options.numel or _COPY_NUMEL[options.device]


def _copy(options: Options) -> Contender:
    source = torch.randn(_copy_numel(options), device=options.device)  # a GPU moves constants with less power
    target = torch.zeros_like(source)
    return Contender("copy (torch, fp32)", lambda: target.copy_(source), 8)


def _time_cpu(call: Callable[[], object]) -> float:
    time.sleep(_SETTLE_S)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- output -------------------------------------------------------------------------------------------------------

_HEAD = ("case", "who", "median ms", "p20-p80 ms", "host ms", "B/elem", "GB/s", "% of copy", "speed-up")
_HOST = _HEAD.index("host ms")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; on a GPU with the host's time, and + where the GPU's includes it."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    if all(row.host_s is None for row in rows):
        cells = [(*line[:_HOST], *line[_HOST + 1 :]) for line in cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row.case,
        row.name,
        _ms(row.median_s) + "+" * (row.hides_host is False),
        f"{_ms(row.p20_s)}-{_ms(row.p80_s)}",
        "" if row.host_s is None else _ms(row.host_s),
        number(row.bytes_per_element, "g"),
        number(row.gb_per_s, ".1f"),
        number(row.percent_of_copy, ".0f"),
        number(row.speedup, ".2f") + "x" * (row.speedup is not None),
    )


def _ms(seconds: float) -> str:
    """Hundredths of a millisecond, or of a microsecond where it is less than one."""
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-3 else f"{seconds * 1e3:.5f}"


def environment(options: Options) -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _cpu_model(),
        "cpus": build_spec.num_cpus(),
        "load_average": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "pyzero": pyzero.__version__,
        "python": platform.python_version(),
        "quick": options.quick,
    }


def busy_warning() -> str | None:
    """What to say where other programs want the same cores."""
    load = os.getloadavg()[0]
    if load <= 0.5 * build_spec.num_cpus():
        return None
    return (
        f"warning: load average {load:.1f} on {build_spec.num_cpus()} CPUs. Ratios flatter pyzero then: torch's OpenMP "
        "threads spin for those that are not running, pyzero's take the work instead. --threads 1 compares fairly."
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.machine())


def write_json(path: Path, options: Options, rows: Sequence[Row]) -> None:
    """The environment and the rows."""
    report = {"environment": environment(options), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n")
