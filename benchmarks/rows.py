"""The rows of measurements, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

_NOISY = 0.3  # of the median: a wider spread from p20 to p80 is noise of the machine


@dataclass(frozen=True)
class Row:
    """Times of one contender."""

    bench: str
    case: str
    name: str
    numel: int
    median_s: float
    p20_s: float
    p80_s: float
    peer: str | None = None  # key of peers.PEERS; None: ours, or a measure of the machine
    bytes_per_element: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None  # GB/s relative to a copy (read + write) in the same run
    times_ours: float | None = None  # this median divided by that of ours in the same case; 1 for ours
    is_decided: bool | None = None  # its p20-p80 and ours do not overlap
    host_s: float | None = None  # on a GPU: time until the host can continue; the times above are the GPU's alone
    hides_host: bool | None = None  # on a GPU: False if they include the host's time
    phases: dict[str, float] | None = None  # median seconds of each phase
    predicted_s: float | None = None  # by the cost model of docs/scaling.md
    samples_s: Sequence[float] | None = None  # in the order in which they were taken; older files have none

    HEAD: ClassVar[tuple[str, ...]] = (
        "case",
        "who",
        "median ms",
        "p20-p80 ms",
        "host ms",
        "B/elem",
        "GB/s",
        "% of copy",
        "x ours",
        "predicted ms",
    )

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is too wide to judge."""
        return self.p80_s - self.p20_s > _NOISY * self.median_s

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.times_ours is None else f"{self.times_ours:.2f}" + "?" * (self.is_decided is False)
        return (
            self.case,
            self.name,
            _ms(self.median_s) + "+" * (self.hides_host is False),
            f"{_ms(self.p20_s)}-{_ms(self.p80_s)}" + " noisy" * self.is_noisy,
            "" if self.host_s is None else _ms(self.host_s),
            _number(self.bytes_per_element, "g"),
            _number(self.gb_per_s, ".1f"),
            _number(self.percent_of_copy, ".0f"),
            ratio,
            "" if self.predicted_s is None else _ms(self.predicted_s),
        )


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one contender on the rank that has the most."""

    bench: str
    case: str
    name: str
    numel: int  # parameters
    num_ranks: int
    rest_bytes: int  # after step() and zero_grad()
    peak_bytes: int  # at any moment of forward, backward and step
    peer: str | None = None
    estimated_rest_bytes: int | None = None  # by pyzero.estimate
    estimated_peak_bytes: int | None = None

    HEAD: ClassVar[tuple[str, ...]] = (
        "case",
        "who",
        "ranks",
        "at rest MiB",
        "estimate",
        "peak MiB",
        "estimate",
        "at rest B/param",
        "peak B/param",
    )

    def cells(self) -> tuple[str, ...]:
        return (
            self.case,
            self.name,
            str(self.num_ranks),
            _mib(self.rest_bytes),
            _mib(self.estimated_rest_bytes),
            _mib(self.peak_bytes),
            _mib(self.estimated_peak_bytes),
            f"{self.rest_bytes / self.numel:.2f}",
            f"{self.peak_bytes / self.numel:.2f}",
        )


AnyRow = Row | MemoryRow


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The sample nearest to that fraction of the sorted list, counted from the least (0) to the largest (1)."""
    return sorted(samples)[round(fraction * (len(samples) - 1))]


def timed_row(bench: str, case: str, name: str, samples: Sequence[float], numel: int = 0, **more: object) -> Row:
    """The row of these samples."""
    low, high = quantile(samples, 0.2), quantile(samples, 0.8)
    return Row(bench, case, name, numel, statistics.median(samples), low, high, samples_s=list(samples), **more)


def is_apart(one: Row, other: Row) -> bool:
    """Whether the p20-p80 of two do not overlap."""
    return one.p80_s < other.p20_s or other.p80_s < one.p20_s


def verdict(rows: Sequence[AnyRow]) -> str | None:
    """The warning if a run is too noisy to judge, or None."""
    timed = [row for row in rows if isinstance(row, Row)]
    noisy = [row for row in timed if row.is_noisy]
    if 3 * len(noisy) <= len(timed):
        return None
    return (
        f"TOO NOISY TO JUDGE: of {len(noisy)} of {len(timed)} rows p20-p80 is wider than {_NOISY:.0%} of the median; "
        "run again on an idle machine"
    )


def table(rows: Sequence[AnyRow]) -> str:
    """Rows of one kind as a Markdown table. `+`: GPU time includes the host's. `?`: p20-p80 overlaps with ours."""
    lines = [type(rows[0]).HEAD, *(row.cells() for row in rows)]
    filled = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    lines = [tuple(line[column] for column in filled) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(filled))]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def _ms(seconds: float) -> str:
    """Milliseconds to a hundredth, or below one to a hundredth of a microsecond."""
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-3 else f"{seconds * 1e3:.5f}"
