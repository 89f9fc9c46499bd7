"""The peer transport: the bits of "exact", what it does without room or without a host, and what it leaves behind."""

import contextlib
import gc
import logging
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from logs import logged
from models import DTYPES, assert_same, build, loss_of, micro_batch, params_of
from ranks import ON_GPU
from torch import Tensor, nn
from transport_program import SMALL_BUCKETS, averaged_elsewhere, bits_of_exact, program

import pyzero
from pyzero.comm import futex, make_transport, shared_memory, shared_memory_transport
from pyzero.comm.group import Group
from pyzero.comm.shared_pages import SharedPages
from pyzero.comm.transport import ExactTransport, Exchange
from pyzero.comm.work import Work
from pyzero.gradients.reduced import exchange

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the peer transport goes by futexes of Linux"),
    pytest.mark.skipif(ON_GPU, reason="the peer transport is of CPUs"),
]
ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = ("exact", "peer")


# ---- bits -----------------------------------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 1, **SMALL_BUCKETS},
    {"stage": 2, **SMALL_BUCKETS},
    {"stage": 2, "bucket_cap_mb": 1e-4, "overlap": False},
    {"stage": 2, "max_grad_norm": 0.5, "grad_reduce_dtype": torch.float32, **SMALL_BUCKETS},
]


# fp16, which travels as bf16 does, with the loss scale that it has by default: once in either stage.
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(dtype, options) for dtype in DTYPES for options in (OPTIONS[:2] if dtype == torch.float16 else OPTIONS)],
    ids=str,
)
def test_bits_of_exact(ranks, dtype, options):
    for size in (2, 3, 4):
        ours = ranks.run(size, program, dtype, "peer", options)
        for one, other in zip(bits_of_exact(ranks, size, dtype, options), ours, strict=True):
            assert_same(one, other)


def test_bits_of_weights_where_gradients_are_not_reduced(ranks):
    exact, ours = (ranks.run(3, averaged_elsewhere, transport) for transport in TRANSPORTS)
    for one, other in zip(exact, ours, strict=True):
        assert_same(one, other)


# ---- room -----------------------------------------------------------------------------------------------------------


def in_another_order(group: Any, transport: str, crossed: bool) -> tuple[list[Tensor], int]:
    """Two optimizers whose backwards come in another order on each rank; what had to wait for room."""
    torch.manual_seed(0)
    models = [nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]) for _ in range(2)]
    optimizers = [
        pyzero.FusedZeroAdamW(m.parameters(), lr=1e-2, process_group=group, transport=transport, bucket_cap_mb=6 / 1024)
        for m in models
    ]
    num_deferred = 0

    def counting(*args: Any) -> Any:
        nonlocal num_deferred
        num_deferred += 1
        return deferred(*args)

    deferred = shared_memory_transport.Deferred
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory_transport, "Deferred", counting)
        if crossed:
            patch.setattr(shared_memory_transport, "_ROOM_WAIT_S", 0.05)
            patch.setattr(exchange, "_BUCKET_WAIT_S", 0.05)
        for step in range(3):
            for index in (0, 1) if not crossed or group.rank() == 0 else (1, 0):
                optimizers[index].zero_grad()
                x = torch.full((4, 32), 1.0 + step + group.rank() + index)
                models[index](x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    return params_of(nn.ModuleList(models)), num_deferred


def test_backwards_of_two_optimizers_in_another_order(ranks):
    wanted = ranks.run(2, in_another_order, "exact", False)
    for crossed in (False, True):
        for (got, num_deferred), (same, _) in zip(ranks.run(2, in_another_order, "peer", crossed), wanted, strict=True):
            assert_same(got, same)
            assert (num_deferred > 0) == crossed


def in_another_order_beside_another_backend(group: Any, transport: str) -> int:
    """As `in_another_order`, in a group that has a backend for GPUs too."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers "fake")

    beside = dist.new_group([0, 1], timeout=timedelta(seconds=20), backend="cpu:gloo,cuda:fake")
    return in_another_order(beside, transport, crossed=True)[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_backwards_in_another_order_where_gpus_have_a_backend_too(ranks, transport):
    for num_deferred in ranks.run(2, in_another_order_beside_another_backend, transport):
        assert (num_deferred > 0) == (transport == "peer")


def slow_reader(group: Any) -> list[bool]:
    """Rank 0 has not read the first of two buckets when rank 1 packs the third, and again once it has."""
    import torch.distributed as dist

    numel, rank = 128, group.rank()
    transport = shared_memory_transport.SharedMemoryTransport(Group(group))
    transport.reserve([(4 * numel, 2 * numel)], 1)
    found = []

    def send(value: float) -> Exchange:
        buffer = transport.buffer(numel, torch.float32, torch.device("cpu"))
        found.append(buffer is transport._room)
        return transport.start(buffer.fill_(value + rank), f"a bucket of {value}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory_transport, "_ROOM_WAIT_S", 0.05)
        sent = [send(10.0), send(20.0)]
        for exchange in sent:
            exchange.work.wait()
        if rank == 1:
            sent[0].release()
            sent += [send(30.0), send(40.0)]
        dist.barrier(group)
        if rank == 0:
            for rank_of_slice in range(2):
                assert sent[0].slices[rank_of_slice].eq(10.0 + rank_of_slice).all()
            sent[0].release()
            sent += [send(30.0), send(40.0)]
        for index, value in ((1, 20.0), (2, 30.0), (3, 40.0)):
            sent[index].work.wait()
            for rank_of_slice in range(2):
                assert sent[index].slices[rank_of_slice].eq(value + rank_of_slice).all()
            sent[index].release()
    return found


def test_what_another_rank_has_not_read_is_not_written_over(ranks):
    first, second = ranks.run(2, slow_reader)
    assert first[:3] == [True] * 3  # rank 1 has read the first bucket; rank 0 itself not the second
    assert second == [True, True, False, False]


def interrupted(group: Any) -> None:
    """A KeyboardInterrupt between a number that is taken and the word to the others: no rank waits for ever."""
    import torch.distributed as dist

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for part in ("backward", "step"):
        model = build(torch.float32)
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport="peer")
        loss = loss_of(model, micro_batch(0, group.rank()))
        if part == "step":
            loss.backward()
            dist.barrier(group)  # a rank that has given up in step() ends the other's backward, too
        ends = (KeyboardInterrupt, pyzero.CollectiveError)  # the latter where the other rank has given up by then
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ends):
            patch.setattr(shared_memory.SharedMemory, "_advance", interrupt)
            loss.backward() if part == "backward" else optimizer.step()
        with pytest.raises(pyzero.CollectiveError, match="was interrupted|has given up"):
            optimizer.zero_grad()
            loss_of(model, micro_batch(1, group.rank())).backward()
            optimizer.step()


def test_an_interrupted_collective_is_the_last(ranks):
    ranks.run(2, interrupted)


def interrupted_in_a_gather(group: Any, cap: float) -> None:
    """A KeyboardInterrupt where a step mostly waits, on rank 1 alone, which then lacks weights of rank 0."""
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), process_group=group, transport="peer", bucket_cap_mb=cap, loss_scale=None
    )
    wait = Work.wait

    def interrupt(work: Work) -> None:
        if work._what == "the all-gather of weights":
            raise KeyboardInterrupt
        wait(work)

    ends = (KeyboardInterrupt, pyzero.CollectiveError)  # the latter on rank 0, where it still waits for rank 1
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(*ends):
        if group.rank() == 1:
            patch.setattr(Work, "wait", interrupt)
        loss_of(model, micro_batch(0, group.rank())).backward()
        optimizer.step()
    with pytest.raises(pyzero.CollectiveError, match="was interrupted|has given up"):
        optimizer.zero_grad()
        loss_of(model, micro_batch(1, group.rank())).backward()
        optimizer.step()


@pytest.mark.parametrize("cap", [25.0, 1e-3], ids=["one bucket", "several"])
def test_a_step_interrupted_while_weights_arrive_is_the_last(ranks, cap):
    ranks.run(2, interrupted_in_a_gather, cap)


def no_room(group: Any) -> None:
    """Rank 1 cannot share more memory, for a moment."""
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport="peer", loss_scale=None)
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="on rank 1: no memory can be shared"):
        if group.rank() == 1:
            patch.setattr(os, "posix_fallocate", fail)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2**20))]})
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(pyzero.CollectiveError, match="has failed|has given up"):
        loss_of(model, micro_batch(0, group.rank())).backward()
        optimizer.step()


def test_an_optimizer_without_room_for_a_new_group_says_so_from_then_on(ranks):
    ranks.run(2, no_room)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(0, 3))
def test_no_chunk_lies_on_one_that_has_not_been_read(sizes, num_resizes):
    ring, lying = shared_memory_transport.Ring(), []
    resize_at = {len(sizes) * (i + 1) // (num_resizes + 1) for i in range(num_resizes)}
    ring.resize(100)
    for index, num_bytes in enumerate(sizes):
        if index in resize_at:
            ring.resize(100 + 50 * len(lying))
            lying.clear()
            assert ring.next(num_bytes).after == index
        chunk = ring.next(num_bytes)
        if lying:
            assert chunk.after < index  # never the one before
        assert chunk == ring.next(num_bytes)
        ring.take(chunk)
        assert chunk.number == index + 1 and chunk.end - chunk.begin == num_bytes
        lying = [other for other in lying if other.number > chunk.after]  # all have read the others
        assert all(other.end <= chunk.begin or chunk.end <= other.begin for other in lying)
        lying.append(chunk)


def test_two_buckets_fit_at_a_time():
    ring = shared_memory_transport.Ring()
    ring.resize(2 * 128)
    chunks = []
    for num_bytes in (100, 128, 128, 60, 60, 60):
        chunks.append(ring.next(num_bytes))
        ring.take(chunks[-1])
    assert [(chunk.begin, chunk.after) for chunk in chunks] == [(0, 0), (128, 0), (0, 1), (128, 2), (188, 2), (0, 3)]


# ---- who may use it -------------------------------------------------------------------------------------------------


def foreign_boot(folder: Path) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(patch: pytest.MonkeyPatch) -> None:
        (folder / "boot_id").write_text("another\n")
        patch.setattr(shared_memory, "_BOOT_ID", str(folder / "boot_id"))

    return spoil


def refuses_memory(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(12, "Cannot allocate memory")

    patch.setattr(os, "memfd_create", refuse)


def refuses_a_ring(patch: pytest.MonkeyPatch) -> None:
    create, names = os.memfd_create, []

    def refuse(name: str, flags: int) -> int:
        names.append(name)
        if len(names) > 1:
            raise OSError(12, "Cannot allocate memory")
        return create(name, flags)

    patch.setattr(os, "memfd_create", refuse)


def says_another_process(patch: pytest.MonkeyPatch) -> None:
    make = shared_memory._Offer.make

    def lie(num_bytes: int) -> Any:
        return make(num_bytes)._replace(token=bytes(shared_memory._TOKEN_BYTES))

    patch.setattr(shared_memory._Offer, "make", staticmethod(lie))


def has_no_futex(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(futex, "unsupported_reason", lambda: "plan9 has no futex of Linux")


def has_an_old_libc(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "memfd_create")
    patch.delattr(os, "pidfd_open")


def chosen(group: Any, transport: str, fault: str, folder: str) -> tuple[str, str]:
    """What is chosen, or raised, where rank 1 has a fault; and what was logged, or said."""
    faults: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
        "host": foreign_boot(Path(folder)),
        "memory": refuses_memory,
        "ring": refuses_a_ring,
        "container": says_another_process,
        "system": has_no_futex,
        "libc": has_an_old_libc,
    }
    try:
        with logged(logging.INFO) as lines, pytest.MonkeyPatch.context() as patch:
            if group.rank() == 1:
                faults.get(fault, lambda patch: None)(patch)
            model = nn.Linear(3, 3)
            optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport=transport)
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            return type(optimizer._transport).__name__, " ".join(lines)
    except RuntimeError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("host", "each rank runs on another host"),
        ("memory", "Cannot allocate memory"),
        ("container", "runs in another container"),
        ("system", "on rank 1: plan9 has no futex"),
        ("libc", "has no attribute 'memfd_create'"),
    ],
)
def test_auto_takes_exact_and_peer_is_refused_where_memory_cannot_be_shared(ranks, tmp_path, fault, words):
    for size in (2,) if fault == "host" else (2, 3):
        for name, said in ranks.run(size, chosen, "auto", fault, str(tmp_path)):
            assert name == "ExactTransport" and "exact transport is used" in said and words in said
        for name, message in ranks.run(size, chosen, "peer", fault, str(tmp_path)):
            assert name == "HostError" and words in message and "transport='auto'" in message


def test_too_little_memory_for_the_ring_says_what_to_do(ranks, tmp_path):
    for name, message in ranks.run(2, chosen, "auto", "ring", str(tmp_path)):
        assert name == "HostError"
        assert "Cannot allocate memory" in message and "smaller bucket_cap_mb, or transport='exact'" in message


def test_auto_takes_peer_on_one_host(ranks, tmp_path):
    for name, _ in ranks.run(2, chosen, "auto", "none", str(tmp_path)):
        assert name == "SharedMemoryTransport"


def warned_of_threads(group: Any, num_threads: int, num_cpus: int) -> list[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with pytest.MonkeyPatch.context() as patch, logged() as lines:
            patch.setattr(make_transport.os, "cpu_count", lambda: num_cpus)
            make_transport.make_transport("peer", Group(group), torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    return lines


def test_more_threads_than_cpus_are_told_once_for_a_host(ranks):
    first, second = ranks.run(2, warned_of_threads, 4, 4)
    assert "2 ranks of 4 threads each share the 4 CPUs" in first[0]
    assert "OMP_NUM_THREADS=2" in first[0]
    assert second == []
    for num_threads, num_cpus in ((2, 4), (1, 1)):  # as many as CPUs; one each is the fewest
        assert ranks.run(2, warned_of_threads, num_threads, num_cpus) == [[], []]


def test_one_rank_needs_no_transport():
    for name in ("auto", "peer"):
        assert type(make_transport.make_transport(name, Group(), torch.device("cpu"))) is ExactTransport


def on_another_device(group: Any, name: str) -> str:
    return type(make_transport.make_transport("auto", Group(group), torch.device(name))).__name__


@pytest.mark.parametrize("name", ["cuda", "meta"])
def test_memory_of_gpus_is_shared_where_it_is_asked_for(ranks, name):
    assert ranks.run(2, on_another_device, name) == ["ExactTransport"] * 2


# ---- waiting --------------------------------------------------------------------------------------------------------


def alone(timeout_s: float) -> shared_memory.SharedMemory:
    """A host of this rank."""
    return shared_memory.SharedMemory(0, [0], lambda value: [value], timedelta(seconds=timeout_s))


def test_a_wait_sleeps_and_ends_in_time():
    ranks = alone(60.0)
    arrival = ranks.posted(1)
    began, used = time.monotonic(), time.process_time()
    with pytest.raises(RuntimeError, match="not there yet"):
        arrival.wait(timedelta(seconds=1))
    assert 0.9 < time.monotonic() - began < 10 and time.process_time() - used < 0.3
    assert not arrival.is_completed()
    ranks.post()
    arrival.wait(timedelta(0))
    assert arrival.is_completed()


def test_the_timeout_counts_from_the_start_and_is_final():
    ranks = alone(0.3)
    arrival = ranks.posted(1)
    time.sleep(0.3)
    with pytest.raises(RuntimeError, match="timed out waiting for rank 0"):
        arrival.wait(timedelta(seconds=60))
    assert arrival.is_completed()
    ranks.post()
    with pytest.raises(RuntimeError, match="timed out"):  # what has failed once stays so, and says why
        ranks.posted(1).wait()


def test_a_process_that_has_ended_is_noticed_long_before_the_timeout():
    ranks = alone(60.0)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        os._exit(0)
    ranks._process_watches[0] = shared_memory._ProcessWatch(pid)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 has ended"):
        ranks.posted(1).wait()
    os.waitpid(pid, 0)
    assert time.monotonic() - began < 10


def test_what_came_before_a_process_ended_counts():
    ranks = alone(60.0)
    ranks.post()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    ranks._process_watches[0] = shared_memory._ProcessWatch(pid)
    ranks.posted(1).wait()
    os.waitpid(pid, 0)


def test_a_counter_wakes_another_process_and_wraps_around():
    mapped, _ = shared_memory._share(lambda value: [value], [0], 4096)
    counter = futex.Counter(mapped[0].pages, 64)
    counter._word.value = 2**32 - 1
    assert counter.has_reached(2**32 - 1) and not counter.has_reached(2**32)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        counter.advance()
        os._exit(0)
    began = time.monotonic()
    while not counter.wait(2**32, 30.0):
        pass
    assert time.monotonic() - began < 10
    assert counter.has_reached(2**32) and counter.has_reached(2**32 - 1) and not counter.has_reached(2**32 + 1)
    os.waitpid(pid, 0)


# ---- what it leaves behind ------------------------------------------------------------------------------------------


def ours(kind: str) -> list[str]:
    """Names of descriptors, or mappings, that are ours."""
    if kind == "maps":
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pyzero" in line]
    return [path for path in map(str, Path("/proc/self/fd").iterdir()) if link_of(path).startswith("/memfd:pyzero")]


def link_of(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the listing's own
        return ""


def lives(group: Any) -> dict[str, Any]:
    names = set(os.listdir("/dev/shm"))
    gc.collect()
    before = len(ours("maps")), len(ours("fd")), len(os.listdir("/proc/self/fd"))
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport="peer", **SMALL_BUCKETS)
    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    while_alive = len(ours("maps"))
    modes = {os.stat(path).st_mode & 0o777 for path in ours("fd")}
    new_names = set(os.listdir("/dev/shm")) - names
    del optimizer
    gc.collect()
    after = len(ours("maps")), len(ours("fd")), len(os.listdir("/proc/self/fd"))
    return {"before": before, "while": while_alive, "modes": modes, "names": new_names, "after": after}


def test_memory_is_private_has_no_name_and_goes_with_the_optimizer(ranks):
    ranks.run(3, lives)  # the process group stays
    for found in ranks.run(3, lives):
        assert found["while"] - found["before"][0] == 2 * 3  # counters and ring of each rank
        assert found["modes"] == {0o600} and not found["names"]
        assert found["after"] == found["before"]


def forked(group: Any, after_backward: bool) -> tuple[int, list[Tensor], list[Tensor]]:
    """A child between two steps, or before one, which trains, and ends like any other process."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.1, process_group=group, transport="peer")

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(64)).sum().backward()

    backward()
    optimizer.step()
    if after_backward:
        backward()
    shared = optimizer._group.shared_memory._mapped[group.rank()].pages
    before, bytes_before = params_of(model), shared[:]
    pid = os.fork()
    if pid == 0:
        try:
            with torch.no_grad():
                model.weight.zero_()
            if not after_backward:
                backward()
            optimizer.step()
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    after = params_of(model)
    assert shared[:] == bytes_before
    if not after_backward:
        backward()
    optimizer.step()
    return os.waitstatus_to_exitcode(status), before, after


@pytest.mark.parametrize("after_backward", [False, True])
def test_a_forked_child_changes_nothing_and_may_not_step(ranks, after_backward):
    for code, before, after in ranks.run(2, forked, after_backward):
        assert code == 7
        assert_same(before, after)


SCRIPT = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from datetime import timedelta
import pyzero

def main(rank, store):
    torch.set_num_threads(1)
    store = f"file://{store}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = torch.nn.Linear(100, 100)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), transport="peer")
    for _ in range(2):
        model(torch.ones(100)).sum().backward()
        optimizer.step()
    if rank == 0:
        dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(main, (sys.argv[2],), nprocs=2, start_method=sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_end_without_a_word(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    names = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", str(script), method, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "pyzero" in line or "Error" in line or "leaked" in line]
    assert not {name for name in set(os.listdir("/dev/shm")) - names if "pyzero" in name}


def test_shared_pages_are_mapped_where_they_can_be_huge():
    num_bytes = (4 << 20) + mmap.PAGESIZE
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        written, read = (SharedPages(descriptor, num_bytes) for _ in range(2))
    finally:
        os.close(descriptor)
    assert written.tensor(0, 1, torch.uint8).data_ptr() % (2 << 20) == 0
    written.tensor(0, num_bytes // 4, torch.int32).copy_(torch.arange(num_bytes // 4))
    assert torch.equal(read.tensor(8, num_bytes // 4 - 2, torch.int32), torch.arange(2, num_bytes // 4))
    address = written.tensor(0, 1, torch.uint8).data_ptr()
    del written, read
    gc.collect()
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()
