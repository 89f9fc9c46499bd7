"""What two ranks of one host send in a step, by transport: a bucket's gradients, its weights, the message."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero import ops
from pyzero.comm import Group, Transport
from pyzero.transports import make_transport

from .harness import Options, Row, quantile
from .ranks import NUM_RANKS, launch

_PEER = "exact"  # gloo's all-to-all, and gloo's all-gather
_TRANSPORTS = (_PEER, "collective", "peer")
_BUCKET_NUMEL = 25 * 2**20 // 2  # bf16, as FusedZeroAdam's default
_NUM_PARAMS = 150
_GRANULE = 64 * NUM_RANKS

Call = Callable[[], object]


def run(options: Options) -> list[Row]:
    numel = -(-(options.numel or _BUCKET_NUMEL) // _GRANULE) * _GRANULE
    found: dict[str, dict[str, list[float]]] = launch(__name__, numel, options.repeats)
    rows = []
    for job, samples in found.items():
        medians = {name: quantile(times, 0.5) for name, times in samples.items()}
        rows += [
            Row(
                "transport",
                f"{NUM_RANKS} ranks, {job}",
                f"pyzero {name}",
                numel,
                medians[name],
                quantile(times, 0.2),
                quantile(times, 0.8),
                speedup=medians[_PEER] / medians[name],
            )
            for name, times in samples.items()
        ]
    return rows


def _jobs(name: str, group: Group, numel: int) -> dict[str, tuple[Call, Tensor]]:
    """By name: a call, and where its result lies."""
    transport = make_transport(name, group, torch.device("cpu"))
    transport.reserve([(2 * numel, 2 * numel // group.size)], _NUM_PARAMS)
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(group.rank)).bfloat16()
    shard, flat = torch.zeros(numel // group.size), torch.zeros(numel, dtype=torch.bfloat16)
    mine = flat.view(group.size, -1)[group.rank].fill_(group.rank + 1)
    row = torch.full((3,), float(group.rank), dtype=torch.float64)
    rows = torch.zeros(group.size, 3, dtype=torch.float64)
    return {
        "reduce-scatter of a bucket, packed and summed": (lambda: _reduce(transport, grad, shard), shard),
        "the same, until there is something to sum": (lambda: _send(transport, numel), shard),
        "all-gather of its weights": (lambda: transport.gather(flat, mine).wait(), flat),
        "the step's message": (lambda: rows.copy_(group.gather_with_host([1.0] * _NUM_PARAMS, row)[1]), rows),
    }


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


def _rank(numel: int, repeats: int) -> None:
    dist.init_process_group("gloo")
    jobs = {name: _jobs(name, Group(), numel) for name in _TRANSPORTS}
    for job in jobs[_PEER]:
        for name in _TRANSPORTS:
            call, result = jobs[name][job]
            call()
            rtol = 2**-7 if name == "collective" else 0  # it sums in bf16
            torch.testing.assert_close(result, jobs[_PEER][job][1], rtol=rtol, atol=rtol)
    found: dict[str, dict[str, list[float]]] = {job: {name: [] for name in _TRANSPORTS} for job in jobs[_PEER]}
    for _ in range(repeats):
        for job in found:
            for name in _TRANSPORTS:
                dist.barrier()
                start = time.perf_counter()
                jobs[name][job][0]()
                found[job][name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]))
