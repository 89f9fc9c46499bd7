"""Checks ours and the peers, and times them and a plain copy in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options
from .rows import Row, is_apart, timed_row
from .timing import in_turns, make_timer

_COPY = "copy (torch, fp32)"
_IN_PLACE = "in place (torch mul_, fp32)"  # on a CPU, a copy may first read the lines that it overwrites; this does not
MACHINE = (_COPY, _IN_PLACE)
_COPY_NUMEL = {"cpu": 48 << 20, "cuda": 512 << 20}  # fp32; several times the last-level cache
_COPY_BYTES = 8  # per element


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    call: Callable[[], object]
    bytes_per_element: float | None = None  # the memory traffic that the job needs; None: not counted
    peer: str | None = None  # key of peers.PEERS; None: ours


def compare(
    bench: str,
    case: str,
    numel: int,
    contenders: Sequence[Contender],
    options: Options,
    with_copy: bool = True,
) -> list[Row]:
    """Time the wanted contenders in turns. The others are compared with the first of ours."""
    wanted = [contender for contender in contenders if options.wants(contender.peer)]
    everyone = [*wanted, *_machine(options)] if with_copy else wanted
    timers = {contender.name: make_timer(contender.call, options.device) for contender in everyone}
    times = in_turns({name: timer.sample for name, timer in timers.items()}, options.repeats, f"{bench}, {case}")
    rows = []
    for contender in everyone:
        name, moved = contender.name, contender.bytes_per_element
        elements = _copy_numel(options) if name in MACHINE else numel
        timer = timers[name]
        more = dict(peer=contender.peer, bytes_per_element=moved, host_s=timer.host_s, hides_host=timer.hides_host)
        row = timed_row(bench, case, name, times[name], elements, **more)
        rows.append(dataclasses.replace(row, gb_per_s=moved * elements / row.median_s / 1e9) if moved else row)
    machine = rows[len(wanted) :]
    return [*relative(rows[: len(wanted)], machine[0] if machine else None), *machine]


def relative(rows: Sequence[Row], copy: Row | None = None) -> list[Row]:
    """The rows of one case, with ratios to the first row and to a copy."""
    ours = rows[0]
    return [
        dataclasses.replace(
            row,
            times_ours=row.median_s / ours.median_s if ours.median_s else None,
            is_decided=row is ours or is_apart(row, ours),
            percent_of_copy=100 * row.gb_per_s / copy.gb_per_s
            if copy is not None and copy.gb_per_s and row.gb_per_s
            else None,
        )
        for row in rows
    ]


def check(what: str, got: Tensor, wanted: Tensor, *, rtol: float, atol: float) -> None:
    """Raise AssertionError if ours and the peer disagree: a wrong kernel is not worth timing."""
    torch.testing.assert_close(
        got.float(), wanted.float(), rtol=rtol, atol=atol, msg=lambda text: f"{what} differs from the peer: {text}"
    )


def _copy_numel(options: Options) -> int:
    return options.numel or _COPY_NUMEL[options.device]


def _machine(options: Options) -> list[Contender]:
    """Contenders that measure how fast memory is."""
    source = torch.randn(_copy_numel(options), device=options.device)  # a GPU uses less power to move constants
    target = torch.zeros_like(source)
    return [
        Contender(_COPY, lambda: target.copy_(source), _COPY_BYTES),
        Contender(_IN_PLACE, lambda: source.mul_(1.0), _COPY_BYTES),
    ]
