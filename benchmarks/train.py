"""Forward, backward and step on several ranks of one host, beside DDP, FSDP2, ZeroRedundancyOptimizer and DeepSpeed.

The time of an iteration beyond forward and backward alone is communication and step. Separate rows compare it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import peers
from .harness import relative
from .options import Options
from .ranks import join, launch, leave, refuse_more_than_gpus
from .rows import Row, timed_row
from .timing import flush_cache, in_turns
from .train_loops import COMPUTE, ENTRIES, MASTERS, OURS, PLAIN, Loop, Marks
from .workloads import GPT2, LAYERS, Linears, Workload, from_json, num_params, to_json

_WIDTH = {"cpu": 1024, "cuda": 4096}  # of Linears
_BYTES = 75  # of memory per parameter and rank, for the contenders of a part of a large model
_MOST_REPEATS = 11  # of a large model
_MEMORY = Path("/proc/meminfo")
_CHECKED_STEPS = 3
# The distance between two moves (weights after the steps minus those before), divided by the length of the peer's move.
# Adam's first steps are the signs of the gradients. If one averages in bf16 and the other in fp32, some 2^-10 of the
# signs differ: the distance was at most 0.024 (2 and 3 ranks, widths of 8 to 256). Without the other ranks' gradients a
# quarter of the signs or more differ: the distance was at least 0.29 from a width of 17 on.
_CHECK_MOVE = 0.1


def run(options: Options) -> list[Row]:
    if options.device == "cuda":
        refuse_more_than_gpus(options.ranks)
    width = _WIDTH[options.device] if options.numel is None else max(8, int((options.numel / LAYERS) ** 0.5))
    rows = _time(Linears(width), chosen(options), options)
    if options.numel is None and not options.quick and _fits(GPT2(), options):
        rows += time_in_parts(GPT2(), options)
    return rows


def time_in_parts(workload: Workload, options: Options) -> list[Row]:
    """Time a large model: ours beside peers with masters, then beside those without. All of a part exist at once."""
    rows = []
    names = chosen(options)
    for of, what in ((MASTERS, "with masters"), (PLAIN, "beside peers without masters")):
        peers_there = [name for name in names if ENTRIES[name].peer and of in (name, ENTRIES[name].same_as)]
        if of == MASTERS or any(options.wants(ENTRIES[name].peer) for name in peers_there):
            rows += _time(workload, [OURS, *peers_there, COMPUTE], options, f", {what}")
    return rows


def _time(workload: Workload, names: list[str], options: Options, what: str = "") -> list[Row]:
    spec = dict(
        names=names,
        untimed=[name for name in names if not options.wants(ENTRIES[name].peer)],
        workload=to_json(workload),
        repeats=options.repeats if isinstance(workload, Linears) else min(options.repeats, _MOST_REPEATS),
        device=options.device,
    )
    found = launch(__name__, options.ranks, spec)
    options.notes.extend(found["notes"])
    phases: dict[str, list[dict[str, float]]] = found["phases"]
    samples = {name: [sum(parts.values()) for parts in rounds] for name, rounds in phases.items()}
    case = f"{options.ranks} ranks, {workload.title}, bf16{what}"
    beyond = {
        name: [max(a - b, 0.0) for a, b in zip(times, samples[COMPUTE], strict=True)]
        for name, times in samples.items()
        if name != COMPUTE
    }
    numel = num_params(workload)
    rows = [dataclasses.replace(row, phases=_medians(phases[row.name])) for row in _rows(case, numel, samples)]
    return rows + _rows(f"{case}, beyond compute", numel, beyond)


def chosen(options: Options) -> list[str]:
    """Ours, the peers that are installed and wanted, those that ours is checked against, and compute alone."""
    return [
        name
        for name, entry in ENTRIES.items()
        if (entry.peer is None or name in (MASTERS, PLAIN) or peers.is_there(entry.peer, options))
        and not (entry.cpu_only and options.device == "cuda")
    ]


def _fits(workload: Workload, options: Options) -> bool:
    """Whether there is memory for all contenders of a part. A note says if not. Only Linux tells."""
    if options.device == "cuda" or not _MEMORY.exists():
        return True
    free = next(int(line.split()[1]) << 10 for line in _MEMORY.read_text().splitlines() if "MemAvailable" in line)
    wanted = _BYTES * num_params(workload) * options.ranks
    if free < wanted:
        options.notes.append(
            f"{workload.title}: not timed, for contenders take {wanted / 2**30:.0f} GiB of memory, and "
            f"{free / 2**30:.0f} GiB are free"
        )
    return free >= wanted


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(parts[phase] for parts in rounds) for phase in rounds[0]}


def _rows(case: str, numel: int, samples: dict[str, list[float]]) -> list[Row]:
    return relative(
        [timed_row("train", case, name, times, numel, peer=ENTRIES[name].peer) for name, times in samples.items()]
    )


# ---- in a rank ------------------------------------------------------------------------------------------------------


def make_loops(spec: dict[str, Any], device: torch.device, notes: Options) -> dict[str, Loop]:
    loops = {}

    def make(name: str) -> None:
        loops[name] = ENTRIES[name].make(from_json(spec["workload"]), device)

    for name in spec["names"]:
        if not _succeeds(name, functools.partial(make, name), device, notes):
            loops.pop(name, None)
    return loops


def _succeeds(name: str, call: Callable[[], None], device: torch.device, notes: Options) -> bool:
    """Call it on all ranks. If a peer fails on any, note it. Ours and the peers that ours is checked against raise."""
    if ENTRIES[name].peer is None or name in (MASTERS, PLAIN):
        call()
        return True
    failed = torch.ones(1, device=device)
    with notes.trying(name):
        call()
        failed.zero_()
    failed_here = bool(failed)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed and not failed_here:
        notes.notes.append(f"{name}: not timed, it failed on another rank")
    return not failed


def check(loops: dict[str, Loop], x: torch.Tensor, notes: Options) -> None:
    """Raise AssertionError on all ranks if weights differ between ranks, or have not moved as the peer's have.

    A peer of which this is true is noted instead, and is no longer in `loops`.
    """
    ends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # weights before and after the steps

    def move(name: str) -> None:
        before = loops[name].weights()
        for _ in range(_CHECKED_STEPS):
            loops[name].step(x)
        ends[name] = before, loops[name].weights()

    for name in sorted(loops, key=lambda name: ENTRIES[name].same_as is not None):
        calls = (functools.partial(move, name), functools.partial(_compare, name, ends))
        if not all(_succeeds(name, call, x.device, notes) for call in calls):  # no rank compares if one has failed
            del loops[name]
        if ENTRIES[name].same_as is not None:
            ends.pop(name, None)  # of a large model, all would take much memory


def _compare(name: str, ends: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    same_as = ENTRIES[name].same_as
    if not _alike(ends[name][1]):
        raise AssertionError(f"{name} left other weights on other ranks: its gradients are not reduced alike")
    if same_as not in ends:  # it is one of those that others are compared with, or ours in the second part
        return
    move, peers_move = (after.float() - before.float() for before, after in (ends[name], ends[same_as]))
    distance = float((move - peers_move).norm() / peers_move.norm())
    if not distance <= _CHECK_MOVE:  # nan if nothing moved
        raise AssertionError(
            f"{name} moved the weights otherwise than the peer {same_as}: "
            f"a distance of {distance:.3g} of its move, wanted {_CHECK_MOVE} at most"
        )


def _alike(weights: torch.Tensor) -> bool:
    """Whether all ranks have the bits of rank 0."""
    first = weights.clone()
    dist.broadcast(first, 0)
    differs = torch.tensor([not torch.equal(first, weights)], dtype=torch.int32, device=weights.device)
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    return not differs.item()


def _rank() -> None:
    spec, device = join()
    notes = Options()
    loops = make_loops(spec, device, notes)
    x = from_json(spec["workload"]).inputs().to(device)
    check(loops, x, notes)
    for name in spec["untimed"]:
        del loops[name]
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in loops}

    def sample(name: str) -> float:
        if device.type == "cpu":
            flush_cache()
        dist.barrier()
        marks = Marks(device)
        loops[name].step(x, marks.mark)
        phases[name].append(marks.seconds())
        return 0.0

    in_turns({name: lambda name=name: sample(name) for name in loops}, spec["repeats"], "train")
    leave({"phases": {name: rounds[1:] for name, rounds in phases.items()}, "notes": notes.notes})


if __name__ == "__main__":
    _rank()
