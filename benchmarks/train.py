"""Forward, backward and step on several ranks of one host, beside DDP, FSDP2, ZeroRedundancyOptimizer and DeepSpeed.

The time of an iteration beyond forward and backward alone is communication and step. Separate rows compare it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
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
_TINY_GPT2 = GPT2(layers=2, width=32, heads=2, context=16, vocabulary=64, tokens=16)
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
    if options.numel is not None:
        rows += _time_in_parts(_TINY_GPT2, options)
    elif not options.quick and _fits(GPT2(), options):
        rows += _time_in_parts(GPT2(), options)
    return rows


def _time_in_parts(workload: Workload, options: Options) -> list[Row]:
    """Time a large model: ours first beside peers with masters, then beside those without. All of a part exist at once.

    The second part checks ours no more, because no peer there has masters.
    """
    rows = []
    for of, what in ((MASTERS, "with masters"), (PLAIN, "beside peers without masters")):
        peers_there = [name for name in chosen(options) if ENTRIES[name].peer and of in (name, ENTRIES[name].same_as)]
        rows += _time(workload, [OURS, *peers_there, COMPUTE], options, f", {what}", checks_ours=of == MASTERS)
    return rows


def _time(
    workload: Workload, names: list[str], options: Options, what: str = "", checks_ours: bool = True
) -> list[Row]:
    spec = dict(
        names=names,
        workload=to_json(workload),
        repeats=options.repeats if isinstance(workload, Linears) else min(options.repeats, _MOST_REPEATS),
        device=options.device,
        unchecked=[] if checks_ours else [OURS],
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
    for name in spec["names"]:
        with notes.trying(name):
            loops[name] = ENTRIES[name].make(from_json(spec["workload"]), device)
    return loops


def check(loops: dict[str, Loop], x: torch.Tensor, unchecked: Sequence[str] = ()) -> None:
    """Raise AssertionError on all ranks if weights differ between ranks, or have not moved as the peer's have.

    unchecked: Of these only the first.
    """
    moves = {}  # of those that others are compared with
    for name in sorted(loops, key=lambda name: ENTRIES[name].same_as is not None):
        loop, same_as = loops[name], ENTRIES[name].same_as
        before = loop.weights()
        for _ in range(_CHECKED_STEPS):
            loop.step(x)
        after = loop.weights()
        if not _alike(after):
            raise AssertionError(f"{name} left other weights on other ranks: its gradients are not reduced alike")
        move = after.float() - before.float()
        if same_as is None:
            moves[name] = move
        if same_as is None or name in unchecked:
            continue
        distance = float((move - moves[same_as]).norm() / moves[same_as].norm())
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
    check(loops, x, spec["unchecked"])
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
