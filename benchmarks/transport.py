"""The three things that ranks of one host send in a step, by transport: gradients, weights, the step's message."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero import ops
from pyzero.comm.group import Group
from pyzero.comm.make_transport import make_transport
from pyzero.comm.transport import Transport
from pyzero.ops.rounding import ceil_div, round_up

from .harness import relative
from .options import Options
from .ranks import join, launch, leave
from .rows import Row, timed_row
from .timing import CpuTimer, in_turns

_NAMES = ("peer", "exact", "collective")  # the others are compared with the first
_GLOO = "gloo reduce_scatter, bf16"
_BUCKET_NUMEL = 25 * 2**20 // 2  # bf16; 25 MiB, the default of the optimizers on a CPU
_NUM_PARAMS = 150
_HOST_NUMBERS = 8 + ceil_div(_NUM_PARAMS, 48)  # of the step's message: a host's report, and a bit per parameter
_REDUCE = "reduce-scatter of a bucket, packed and summed"

Call = Callable[[], object]


def run(options: Options) -> list[Row]:
    granule = 64 * options.ranks
    numel = round_up(options.numel or _BUCKET_NUMEL, granule)
    found: dict[str, dict[str, list[float]]] = launch(
        __name__, options.ranks, {"numel": numel, "repeats": options.repeats, "gloo": options.wants("ddp")}
    )
    rows = []
    for job, samples in found.items():
        case = f"{options.ranks} ranks, {job}"
        rows += relative(
            [
                timed_row("transport", case, name, times, numel, peer="ddp" if name == _GLOO else None)
                for name, times in samples.items()
            ]
        )
    return rows


def _jobs(name: str, group: Group, numel: int) -> dict[str, tuple[Call, Tensor]]:
    """Name -> (call, the tensor that holds its result)."""
    transport = make_transport(name, group, torch.device("cpu"))
    transport.reserve([(2 * numel, 2 * numel // group.size)], _NUM_PARAMS)
    grad = _gradient(group.rank, numel)
    shard, flat = torch.zeros(numel // group.size), torch.zeros(numel, dtype=torch.bfloat16)
    mine = flat.view(group.size, -1)[group.rank].fill_(group.rank + 1)
    row = torch.full((3,), float(group.rank), dtype=torch.float64)
    rows = torch.zeros(group.size, 3, dtype=torch.float64)
    return {
        _REDUCE: (lambda: _reduce(transport, grad, shard), shard),
        "the same, until there is something to sum": (lambda: _send(transport, numel), shard),
        "all-gather of its weights": (lambda: transport.gather(flat, mine).wait(), flat),
        "the step's message": (lambda: rows.copy_(group.gather_with_host([1.0] * _HOST_NUMBERS, row)[1]), rows),
    }


def _gradient(rank: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).bfloat16()


def _send(transport: Transport, numel: int) -> None:
    exchange = transport.start(transport.buffer(numel, torch.bfloat16, torch.device("cpu")), "an unpacked bucket")
    exchange.work.wait()
    exchange.release()


def _reduce(transport: Transport, grad: Tensor, shard: Tensor) -> None:
    send = transport.buffer(grad.numel(), grad.dtype, grad.device)
    ops.pack_(send, [grad], offsets=[0])
    exchange = transport.start(send, "the reduce-scatter of a bucket")
    exchange.work.wait()
    ops.reduce_scatter_(shard, exchange.slices, scale=1.0 / transport.group.size)
    exchange.release()


def _gloo(numel: int) -> tuple[Call, Tensor]:
    """gloo's reduce-scatter of a packed bucket, divided in advance. It sums in bf16."""
    bucket = _gradient(dist.get_rank(), numel) / dist.get_world_size()
    shard = torch.empty(numel // dist.get_world_size(), dtype=torch.bfloat16)
    return lambda: dist.reduce_scatter_tensor(shard, bucket), shard


def _rank() -> None:
    spec, _ = join()
    numel = spec["numel"]
    jobs = {name: _jobs(name, Group(), numel) for name in _NAMES}
    found = {}
    for job in jobs["exact"]:
        calls = {name: jobs[name][job] for name in _NAMES}
        if job == _REDUCE and spec["gloo"]:
            calls[_GLOO] = _gloo(numel)
        for call, _ in calls.values():
            call()
        for name, (_, result) in calls.items():
            tolerance = 2**-7 if name in ("collective", _GLOO) else 0  # these sum in bf16
            torch.testing.assert_close(result.float(), calls["exact"][1].float(), rtol=tolerance, atol=tolerance)
        timers = {name: CpuTimer(call, dist.barrier) for name, (call, _) in calls.items()}
        found[job] = in_turns({name: timer.sample for name, timer in timers.items()}, spec["repeats"], job)
    leave(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch warns about its own collectives
    _rank()
