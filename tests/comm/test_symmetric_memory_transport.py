"""The peer transport of GPUs: the bits of "exact". On CPUs its memory is that of the host, and there are no streams."""

import contextlib
import gc
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import DTYPES, assert_same, build, loss_of, micro_batch, params_of
from peer_memory import HostMemory, through_peers
from ranks import ON_GPU
from torch import Tensor, nn
from transport_program import SMALL_BUCKETS, bits_of_exact, program

import pyzero
from pyzero.comm import make_transport, symmetric_memory_transport
from pyzero.comm.group import Group
from pyzero.comm.symmetric_memory_transport import SymmetricBytes, SymmetricMemoryTransport

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks of a host share memory by futexes of Linux")
OPTIONS: list[dict[str, Any]] = [
    {"stage": 1, **SMALL_BUCKETS},
    {"stage": 2, **SMALL_BUCKETS},
    {"stage": 2, "max_grad_norm": 0.5, "grad_reduce_dtype": torch.float32, "bucket_cap_mb": 1e-4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_exact(ranks, dtype, options):
    for size in (2,) if ON_GPU else (2, 4):
        ours = ranks.run(size, through_peers, program, dtype, "peer", options)
        for one, other in zip(bits_of_exact(ranks, size, dtype, options), ours, strict=True):
            assert_same(one, other)


def trained(group: Any, kind: str, transport: str) -> tuple[list[Tensor], int, int]:
    """Weights after a few steps, one of them skipped; how often weights were copied, and how many buckets there are."""
    model = build(torch.bfloat16)
    matrices = {id(param) for param in model.parameters() if param.dim() == 2}
    groups = [{"params": [p for p in model.parameters() if (id(p) in matrices) == is_matrix]} for is_matrix in (1, 0)]
    if kind == "ZeroMuon":
        groups[1]["use_muon"] = False
    options = {"process_group": group, "transport": transport, "loss_scale": 4.0, **SMALL_BUCKETS}
    optimizer = getattr(pyzero, kind)(groups, lr=1e-2, **options)
    copies = []
    if transport == "peer":
        copy = optimizer._transport._copy
        optimizer._transport._copy = lambda *args: copies.append(1) or copy(*args)
    for step in range(4):
        loss = loss_of(model, micro_batch(step, group.rank()))
        optimizer.backward(loss * float("inf") if step == 2 and group.rank() == 1 else loss)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    return params_of(model), len(copies), len(optimizer._buckets)


@pytest.mark.parametrize("kind", ["FusedZeroAdam", "FusedZeroLion", "FusedZeroSGD", "ZeroLamb", "ZeroMuon"])
def test_a_rule_writes_peer_weights_or_has_them_copied(ranks, kind):
    exact = ranks.run(2, trained, kind, "exact")
    ours = ranks.run(2, through_peers, trained, kind, "peer")
    for (wanted, _, num_buckets), (got, num_copies, _) in zip(exact, ours, strict=True):
        assert_same(wanted, got)
        assert num_buckets >= 2
        if kind == "ZeroMuon":  # its Adam writes them
            assert 0 < num_copies < 4 * num_buckets
        else:
            assert num_copies == (4 * num_buckets if kind == "ZeroLamb" else 0)


def slots_used(group: Any) -> tuple[str, list[int], list[bool]]:
    """The transport, the slots in the order in which they were written, and whether each was free then."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    options = {"process_group": group, "transport": "peer", "bucket_cap_mb": 2e-3}
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), **options)
    transport = optimizer._transport
    slots, frees, unread = [], [], set()
    post, mark = transport._post, transport._mark_read

    def posting() -> int:
        number = post()
        slots.append(number % symmetric_memory_transport._NUM_SLOTS)
        frees.append(number - symmetric_memory_transport._NUM_SLOTS not in unread)
        unread.add(number)
        return number

    def marking(number: int) -> None:
        unread.discard(number)
        mark(number)

    transport._post, transport._mark_read = posting, marking
    for _ in range(2):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return type(transport).__name__, slots, frees


def test_two_slots_take_turns_and_are_read_before_they_are_written_again(ranks):
    for name, slots, frees in ranks.run(2, through_peers, slots_used):
        assert name == "SymmetricMemoryTransport"
        assert slots == [place % 2 for place in range(len(slots))] and len(slots) > 8
        assert all(frees)


class Broken(Exception):
    pass


def layers_and_optimizer(group: Any, **options: Any) -> tuple[nn.Sequential, Any, list[tuple[str, int]]]:
    """A bucket for each layer, and what each barrier of gradients was for, from now on."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    options = {"process_group": group, "transport": "peer", "bucket_cap_mb": 1e-3, **options}
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), **options)
    transport, seen = optimizer._transport, []
    post, mark = transport._post, transport._mark_read
    transport._post = lambda: seen.append(("post", post())) or seen[-1][1]
    transport._mark_read = lambda number: seen.append(("read", number)) or mark(number)
    return model, optimizer, seen


def batch(group: Any, number: int) -> Tensor:
    return torch.full((2, 16), 1.0 + group.rank() + number)


def broken_backward(group: Any) -> tuple[list[tuple[str, int]], list[Tensor]]:
    """Rank 1's first backward ends in its middle."""
    model, optimizer, seen = layers_and_optimizer(group)

    def interrupt(grad: Tensor) -> None:
        raise Broken

    for micro in range(2):
        half = model[:3](batch(group, micro))
        if micro == 0 and group.rank() == 1:
            half.register_hook(interrupt)
        with contextlib.suppress(Broken):
            model[3:](half).sum().backward()
    optimizer.step()
    return seen, params_of(model)


def unequal_use(group: Any, overlap: bool) -> tuple[list[tuple[str, int]], list[Tensor]]:
    """Gradients are cleared behind the optimizer's back, and rank 1 then leaves out a parameter, or a layer."""
    model, optimizer, seen = layers_and_optimizer(group, overlap=overlap)
    for step in range(3):
        x = model[:3](batch(group, step))
        if step == 0 or group.rank() == 0:
            x = model[3:](x)
        elif overlap:
            x = nn.functional.linear(model[3:5](x), model[5].weight)
        else:
            x = model[5](model[3](x))
        x.sum().backward()
        optimizer.step()
        model.zero_grad()
    return seen, params_of(model)


@pytest.mark.parametrize(
    "job",
    [(broken_backward,), (unequal_use, True), (unequal_use, False)],
    ids=["broken backward", "unused parameter", "unused layer, no overlap"],
)
def test_barriers_meet_in_pairs(ranks, job):
    """On all ranks in one order: they pair up by count."""
    (first, weights), (second, others) = ranks.run(2, through_peers, *job)
    assert first == second and len(first) >= 24
    assert_same(weights, others)


def barriers_of_a_step(group: Any, kind: str) -> list[str]:
    """The barriers of a step over one bucket, and its writes of weights, in the order in which this rank queues them.

    On GPUs the barriers alone order the ranks' streams. Here the hosts wait for each other before the update too.
    """
    layer = nn.Linear(16, 16)
    optimizer = getattr(pyzero, kind)(layer.parameters(), process_group=group, transport="peer", stage=1)
    transport, seen = optimizer._transport, []

    def told(what: str, call: Any) -> Any:
        return lambda *args: seen.append(what) or call(*args)

    transport._memory = replace(transport._memory, barrier=told("barrier", transport._memory.barrier))
    transport._copy = told("copy", transport._copy)
    optimizer._updater.update = told("update", optimizer._updater.update)
    layer(batch(group, 0)).sum().backward()
    optimizer.step()
    return seen


@pytest.mark.parametrize("kind", ["FusedZeroAdam", "ZeroLamb"])
def test_weights_are_written_between_two_barriers(ranks, kind):
    """The first: no rank reads the old weights any more. The second: all have been written."""
    of_gradients, copies = ["barrier"] * 2, ["copy"] * (kind == "ZeroLamb")
    for seen in ranks.run(2, through_peers, barriers_of_a_step, kind):
        assert seen == [*of_gradients, "barrier", "update", *copies, "barrier"]


def broken_update(group: Any) -> tuple[str, str]:
    """What a backward and a step say where an update was broken off."""
    model, optimizer, _ = layers_and_optimizer(group)
    model(batch(group, 0)).sum().backward()
    update, optimizer._updater.update = optimizer._updater.update, None
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer._updater.update = update
    with pytest.raises(pyzero.CollectiveError) as in_backward:
        model(batch(group, 1)).sum().backward()
    with pytest.raises(pyzero.CollectiveError) as in_step:
        optimizer.step()
    return str(in_backward.value), str(in_step.value)


def test_an_update_that_was_broken_off_is_told(ranks):
    for in_backward, in_step in ranks.run(2, through_peers, broken_update):
        for message in (in_backward, in_step):
            assert "was interrupted, before" in message


def weights_left(group: Any) -> bool:
    """Whether weights outlive their optimizer, and another one over them."""
    model, optimizer, _ = layers_and_optimizer(group)
    model(batch(group, 0)).sum().backward()
    optimizer.step()
    kept = [param.data for param in model.parameters()]
    before = params_of(model)
    del optimizer
    gc.collect()
    same = all(map(torch.equal, before, params_of(model)))
    other = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport="peer")
    model.zero_grad()
    model(batch(group, 1)).sum().backward()
    other.step()
    return same and all(map(torch.equal, before, kept)) and not torch.equal(before[0], params_of(model)[0])


def test_weights_outlive_the_optimizer(ranks):
    assert all(ranks.run(2, through_peers, weights_left))


class Failing(HostMemory):
    """Out of memory on one rank, or no link there."""

    def __init__(self, group: Group, fails_on: int, at: str) -> None:
        super().__init__(group)
        self.fails_at = at if group.rank == fails_on else None
        self.num_shared = 3 if self.fails_at == "count" else 2

    def empty(self, num_bytes: int) -> Tensor:
        if self.fails_at == "empty":
            raise RuntimeError("no link between these devices\nand a trace")
        return super().empty(num_bytes)

    def share(self, own: Tensor) -> SymmetricBytes:
        assert self.fails_at not in ("empty", "count"), "nobody may wait for this rank"
        if self.fails_at == "share":
            raise RuntimeError("no link between these devices\nand a trace")
        return SymmetricBytes([own] * 2, lambda: None)


def refused(group: Any, fails_on: int, at: str) -> str:
    def made(ranks: Group, device: torch.device) -> SymmetricMemoryTransport:
        return SymmetricMemoryTransport(ranks, device, Failing(ranks, fails_on, at))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_transport, "_through_memory", made)
        with pytest.raises(RuntimeError) as caught:
            pyzero.FusedZeroAdamW(nn.Linear(3, 3).parameters(), process_group=group, transport="peer")
    return str(caught.value)


@pytest.mark.parametrize("at", ["empty", "share", "count"])
def test_ranks_that_share_no_memory_are_told_alike(ranks, at):
    first, second = ranks.run(2, refused, 1, at)
    assert first == second
    if at == "count":
        assert "taken part in [2, 3] allocations of symmetric memory" in first
    else:
        assert "on rank 1" in first and "no link between these devices" in first and "a trace" not in first
    assert "transport='auto'" in first
