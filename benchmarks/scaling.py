"""The time of a step by parameters and by ranks of this host, beside the prediction of docs/scaling.md's cost model.

The model is given the times of a copy, of an empty step and of one rank, and the sockets' rate from the run on two
ranks. It predicts the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import pyzero

from . import ledger, models, peers
from .cost_model import Host
from .harness import Contender, compare
from .options import Options
from .ranks import join, launch, leave
from .rows import Row, timed_row
from .step import MAX_NORM
from .timing import CpuTimer, in_turns

_COUNTS = (10, 100, 1000, 10_000)  # numbers of parameters
_COUNTED_NUMEL = 1 << 22
_RANKS = (1, 2, 3, 4)
_TINY = 1 << 16  # elements; their bytes take no time, so that latency is measured
_SIZES = {True: (1 << 22, 1 << 24), False: (1 << 22, 1 << 24, 1 << 26)}  # by quick
_PARAM_NUMEL = 1 << 20
_TINY_PARAM_NUMEL = 1 << 10
_COPY_NUMEL = 1 << 24
_SOCKETS_FROM = 2  # ranks of the run that gives the model the sockets' rate
_TRANSPORTS = ("peer", "exact")
_REPEATS = {True: 7, False: 15}  # by quick


def run(options: Options) -> list[Row]:
    return _by_count(options) + _by_ranks(options)


def _by_count(options: Options) -> list[Row]:
    """One rank, with the same number of elements in more and more parameters."""
    numel = options.numel or _COUNTED_NUMEL
    models.check_step(options)
    rows = []
    for count in _COUNTS[:2] if options.numel else _COUNTS:
        shapes = [max(numel // count, 1)] * count
        ours = models.zero("auto")(*models.inputs(shapes, torch.bfloat16, options))
        contenders = [Contender("pyzero FusedZeroAdamW", ours, 30)]
        for name, (key, make) in peers.mixed_peers(options, MAX_NORM).items():
            with options.trying(name):
                peer = make(*models.inputs(shapes, torch.bfloat16, options))
                contenders.append(Contender(name, peer.step, 30, key))
        case = f"{count:,} parameters, bf16 and masters"
        rows += compare("scaling", case, sum(shapes), contenders, options, with_copy=False)
    return rows


def _by_ranks(options: Options) -> list[Row]:
    sizes = (_TINY, 2 * _TINY) if options.numel else (_TINY, *_SIZES[options.quick])
    spec = dict(sizes=sizes, copy_numel=options.numel or _COPY_NUMEL)
    spec["repeats"] = options.repeats if options.numel else _REPEATS[options.quick]
    found: dict[int, dict[str, list[float]]] = {
        num_ranks: launch(__name__, num_ranks, spec) for num_ranks in (_RANKS[:2] if options.numel else _RANKS)
    }
    host = _calibrate(found, spec)
    rows = []
    for num_ranks, samples in found.items():
        for name, times in samples.items():
            if name == _COPY:
                continue
            transport, numel = name.split()[0], int(name.split()[1])
            case = f"{num_ranks} ranks, {numel:,} elements"
            row = timed_row("scaling", case, f"step, {transport}", times, numel)
            predicted = host.step_s(num_ranks, numel, transport) if numel > _TINY else None
            rows.append(dataclasses.replace(row, predicted_s=predicted))
    return rows


_COPY = "copy"


def _calibrate(found: dict[int, dict[str, list[float]]], spec: dict[str, Any]) -> Host:
    medians = {
        num_ranks: {name: statistics.median(times) for name, times in samples.items()}
        for num_ranks, samples in found.items()
    }
    copies = {num_ranks: 8 * spec["copy_numel"] / times[_COPY] for num_ranks, times in medians.items()}
    alphas = {(ranks, kind): times[_key(kind, _TINY)] for ranks, times in medians.items() for kind in _kinds(ranks)}
    largest = max(spec["sizes"])
    alone = medians[1][_key("peer", largest)] - alphas[1, "peer"]
    share = ledger.total(ledger.ALONE).at(1) * largest / alone / copies[1]
    host = Host(copies, share, alphas, socket_bytes_per_s=float("inf"))
    beyond = medians[_SOCKETS_FROM][_key("exact", largest)] - host.step_s(_SOCKETS_FROM, largest, "exact")
    sent = host.sent_bytes(_SOCKETS_FROM, largest)
    return dataclasses.replace(host, socket_bytes_per_s=sent / beyond if beyond > 0 else float("inf"))


def _kinds(num_ranks: int) -> tuple[str, ...]:
    """The transports to time. One rank sends nothing, so that one suffices."""
    return _TRANSPORTS if num_ranks > 1 else _TRANSPORTS[:1]


def _key(transport: str, numel: int) -> str:
    return f"{transport} {numel}"


# ---- in a rank ------------------------------------------------------------------------------------------------------


class _Step:
    """A stage-1 step on assigned gradients: step() contains the whole exchange and update."""

    def __init__(self, numel: int, transport: str) -> None:
        part = _PARAM_NUMEL if numel > _TINY else _TINY_PARAM_NUMEL
        generator = torch.Generator().manual_seed(dist.get_rank())
        self._grads: list[Tensor] = [
            torch.randn(piece, generator=generator).bfloat16() for piece in [min(part, numel)] * max(numel // part, 1)
        ]
        self._params = [Parameter(torch.ones_like(grad)) for grad in self._grads]
        self._optimizer = pyzero.FusedZeroAdamW(self._params, stage=1, transport=transport, max_grad_norm=MAX_NORM)

    def ready(self) -> None:
        self._optimizer.zero_grad()
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad
        dist.barrier()

    def step(self) -> None:
        self._optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([param.detach() for param in self._params])


def _check(steps: dict[str, _Step]) -> None:
    """Check that the transports agree in every bit."""
    for step in steps.values():
        step.ready()
        step.step()
    first, *others = steps.values()
    for other in others:
        torch.testing.assert_close(first.weights(), other.weights(), rtol=0, atol=0)


def _rank() -> None:
    spec, _ = join()
    samplers: dict[str, Callable[[], float]] = {}
    for numel in spec["sizes"]:
        steps = {_key(kind, numel): _Step(numel, kind) for kind in _kinds(dist.get_world_size())}
        _check(steps)
        samplers |= {name: CpuTimer(step.step, step.ready).sample for name, step in steps.items()}
    source = torch.randn(spec["copy_numel"])
    copy = functools.partial(torch.empty_like(source).copy_, source)
    samplers[_COPY] = CpuTimer(copy, dist.barrier).sample
    leave(in_turns(samplers, spec["repeats"], "scaling"))


if __name__ == "__main__":
    _rank()
