"""Process groups of an optimizer's own: what torch is asked for, where the default group is NCCL's."""

import gc
import pickle
import re
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyzero
from pyzero import memory, optimizer
from pyzero.comm import process_group_pool, transport
from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.deepspeed import launcher

PYZERO = Path(pyzero.__file__).parent
LIMIT = timedelta(seconds=20)


@pytest.fixture
def world(tmp_path: Path):
    """A default group of this process alone, made without naming a backend, as torchrun scripts do."""
    dist.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_without_a_named_backend_is_like_one_with_it(world, monkeypatch):
    assert dist.get_backend(world) == "undefined"
    assert process_group_pool.timeout_of(world) is not None
    found = process_group_pool.new_group([0], world, None, 0)
    assert dist.get_backend_config(found) == "cpu:gloo"
    asked = []
    # Of "undefined" on a GPU.
    monkeypatch.setattr(process_group_pool.dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(process_group_pool.dist, "new_group", lambda ranks, **how: asked.append(how["backend"]))
    process_group_pool.new_group([0], world, None, 0)
    assert asked == ["cpu:gloo,cuda:nccl"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("NCCL error, unhandled\n\nLast error:\n  no memory\n", "NCCL error, unhandled; Last error:; no memory"),
        ("no key 0\nException raised from wait (most recent call first):\nframe #0: main", "no key 0"),
        ("", "RuntimeError"),
    ],
)
def test_a_collective_that_failed_says_all_of_the_reason(text, told):
    place = {"__name__": "torch.distributed.distributed_c10d", "text": text}
    with pytest.raises(pyzero.CollectiveError, match=f"^a test failed on rank 0 of 1: {told}. Every rank"):
        Group(is_alone=True).launch("a test", lambda: exec("raise RuntimeError(text)", place))


def test_a_smaller_group_is_not_split_off_by_members_alone(world, monkeypatch):
    """ncclCommSplit, which torch takes where a device is bound, hangs until all ranks of the default group call it."""
    bound, seen = torch.device("cuda", 0), []
    monkeypatch.setattr(process_group_pool.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(process_group_pool.dist, "new_group", lambda ranks, **how: seen.append(world.bound_device_id))
    world.bound_device_id = bound
    process_group_pool.new_group([0], world, None, 0)
    assert seen == [None] and world.bound_device_id == bound


def test_ranks_first_talk_from_the_gpu_of_their_parameters(monkeypatch):
    """NCCL sends objects from the current GPU, which is the first one on every rank that did not call set_device()."""
    seen, talk = [], optimizer.make_topology

    @contextmanager
    def placed(device: torch.device):
        seen.append(device.type)
        yield
        seen.append("left")

    monkeypatch.setattr(optimizer, "on_device", placed)
    monkeypatch.setattr(optimizer, "make_topology", lambda *args: (seen.append("talks"), talk(*args))[1])
    pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))])
    assert seen == ["cpu", "talks", "left"]


@pytest.mark.parametrize(("num_visible", "index"), [(8, 3), (1, 0), (2, 1)])
def test_a_rank_takes_the_gpu_that_it_sees(monkeypatch, num_visible, index):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launcher.take_device()
    assert not taken, "the caller may have chosen one"
    monkeypatch.setenv("LOCAL_RANK", "3")
    launcher.take_device()
    assert taken == [launcher.device()] == [torch.device("cuda", index)]


def test_initialize_takes_it_whoever_made_the_group(world, monkeypatch):
    """As DeepSpeed does: scripts go on with `.cuda()`."""
    taken = []
    monkeypatch.setattr(launcher, "take_device", lambda: taken.append(dist.is_initialized()))
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}
    pyzero.initialize(model=nn.Linear(2, 2), config=config)
    assert taken == [True]


def built_on_two(group: Any) -> float:
    """Two of four ranks build an optimizer, then all make a group, which torch names by its own count."""
    pair = dist.new_group([0, 1], timeout=LIMIT)
    if dist.get_rank() < 2:
        pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=pair)
    everyone = dist.new_group(timeout=LIMIT)
    total = torch.ones(1)
    dist.all_reduce(total, group=everyone)
    return float(total)


def test_an_optimizer_of_some_ranks_leaves_the_names_of_later_groups_alike(ranks):
    assert ranks.run(4, built_on_two) == [4.0] * 4  # else torch 2.14 gives it several names


def test_a_gloo_that_finds_no_host_says_what_to_set(world, monkeypatch):
    def fail(ranks: list[int], **how: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [/x/gloo/transport/tcp/pair.cc:144] no error\nframe #0")

    monkeypatch.setattr(process_group_pool.dist, "new_group", fail)
    with pytest.raises(RuntimeError, match=r"Gloo connectFullMesh failed.*set GLOO_SOCKET_IFNAME to the network"):
        process_group_pool.new_group([0], world, None, 0)


def test_views_are_exported_from_the_gpu_that_they_lie_on(monkeypatch):
    """torch refuses it on another, and a script may have moved its model to cuda:1 without set_device()."""
    current: list[torch.device] = []

    @contextmanager
    def on_device(device: torch.device):
        current.append(device)
        yield
        current.clear()

    def export(tensor: Tensor) -> Tensor:
        assert current == [tensor.device]
        return torch.utils.dlpack.from_dlpack(tensor)

    monkeypatch.setattr(memory, "on_device", on_device)
    monkeypatch.setattr(memory, "from_dlpack", export)
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param])
    param.data = torch.zeros(3)
    optimizer.refresh_fp32_params()
    others = [*(PYZERO / "sharding").glob("*.py"), *(PYZERO / "checkpoint").glob("*.py")]
    assert others and not [path for path in others if "from_dlpack" in path.read_text()]


def test_buckets_on_a_gpu_are_packed_into_memory_of_the_side_stream(monkeypatch):
    """The current stream writes there behind all that the side stream was given: who runs ahead takes no more."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream):
        done.append(f"enter {stream.name}")
        yield
        done.append(f"leave {stream.name}")

    def empty(*args: Any) -> Tensor:
        done.append("allocate")
        return torch.empty(3)

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(transport.memory, "empty", empty)
    exact = transport.ExactTransport(Group(is_alone=True))
    exact.buffer(3, torch.float32, torch.device("cuda"), Stream("side"))  # type: ignore[arg-type]
    assert done == ["enter side", "allocate", "leave side", "current waits for side"]


def test_what_hosts_tell_each_other_beside_nccl_is_watched(ranks):
    for said in ranks.run(2, wait_for_another):
        assert "the ranks wait for different collectives" in said


def wait_for_another(process_group: Any) -> str:
    """As with NCCL, whose waits return before the result is there: those of host tensors do not."""
    group = Group(process_group)
    group._blocks = False
    names = ("one message", "another one")
    row = torch.zeros(1 + 10 * group.rank, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.comm.work._ASKS_AFTER_S", 0.3)
        try:
            if group.rank == 0:
                group.start(names[0], dist.broadcast, row, src=dist.get_global_rank(group.handle, 1)).wait()
            else:
                group.start(names[1], dist.broadcast, row, src=dist.get_global_rank(group.handle, 0)).wait()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def broken_off_while_others_wait(process_group: Any, place: str) -> str:
    """One rank is interrupted before it takes part in what the other waits for."""
    group = Group(process_group)
    group._timeout = timedelta(minutes=10)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    owner, name = (pickle, "dumps") if place == "objects" else (torch, "tensor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.comm.work._ASKS_AFTER_S", 0.3)
        if group.rank == 1:
            patch.setattr(owner, name, interrupted)
        try:
            if place == "objects":
                group.gather_objects({"of": group.rank})
            else:
                with group.lockstep(what="a step"):
                    group.gather_rows(torch.tensor([1.0]))
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("place", ["objects", "a step"])
def test_who_waits_for_a_rank_that_has_broken_off_is_told(ranks, place):
    waiting, broken = ranks.run(2, broken_off_while_others_wait, place)
    assert broken.startswith("KeyboardInterrupt")
    assert re.search("^CollectiveError.*: rank 1 sends nothing more, for .* broken off by KeyboardInterrupt", waiting)


def two_groups(process_group: Any) -> tuple[Group, Group]:
    """Groups of the same ranks whose collectives fail after 4 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group_pool, "timeout_of", lambda group: timedelta(seconds=4))
        return Group(process_group), Group(process_group)


def waits_in_other_orders(process_group: Any) -> str:
    """What a rank is told that waits in one group while the other rank waits in another one."""
    groups, rank = two_groups(process_group), dist.get_rank()
    groups[rank].where = f"in step {7 + rank}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.comm.work._ASKS_AFTER_S", 0.3)
        with pytest.raises(CollectiveError) as raised:
            groups[rank].gather_rows(torch.tensor([1.0]), "the norm")
    return str(raised.value)


def test_ranks_that_use_two_optimizers_in_other_orders_are_told(ranks):
    for rank, told in enumerate(ranks.run(2, waits_in_other_orders)):
        assert f"; rank {1 - rank}, in step {8 - rank}, waits in another process group, for the norm" in told


def wait_that_is_over(process_group: Any) -> str:
    """What rank 0 says of rank 1, which has waited for it in another group, but no longer does."""
    first, second = two_groups(process_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.comm.work._ASKS_AFTER_S", 0.3)
        if dist.get_rank() == 0:
            time.sleep(0.8)
        first.gather_rows(torch.tensor([1.0]), "the norm")
        if dist.get_rank() == 1:
            time.sleep(5.0)
            return ""
        with pytest.raises(CollectiveError) as raised:
            second.gather_rows(torch.tensor([1.0]), "the norm")
    return str(raised.value)


def test_a_wait_that_is_over_is_not_told(ranks):
    said, _ = ranks.run(2, wait_that_is_over)
    assert "the norm failed on rank 0 of 2" in said and "waits in" not in said


def kept_after_an_interrupted_wait(process_group: Any) -> bool:
    """Whether the group is kept, whose destruction would wait for the collective that rank 0 has begun."""
    group, kept = Group(process_group), []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.comm.work._ASKS_AFTER_S", 0.3)
        patch.setattr(process_group_pool, "keep_forever", kept.append)
        if group.rank == 1:
            time.sleep(1.0)
            group.gather_rows(torch.tensor([1.0]))
            return True
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                group.gather_rows(torch.tensor([1.0]))
        finally:
            signal.signal(signal.SIGALRM, before)
    return kept == [group.handle]


def test_a_process_that_ends_after_a_ctrl_c_does_not_wait_for_the_others(ranks):
    assert ranks.run(2, kept_after_an_interrupted_wait) == [True, True]


def objects_of_any_size(process_group: Any) -> list[Any]:
    return Group(process_group).gather_objects({"rank": dist.get_rank(), "values": [*range(1000 * dist.get_rank())]})


def test_python_objects_of_all_ranks_come_whole(ranks):
    for found in ranks.run(3, objects_of_any_size):
        assert found == [{"rank": rank, "values": [*range(1000 * rank)]} for rank in range(3)]


def test_without_a_local_rank_the_current_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(launcher.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(launcher.torch.cuda, "current_device", lambda: 5)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launcher.device() == torch.device("cuda", 5)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launcher.device() == torch.device("cuda", 3)


def test_a_group_for_hosts_takes_no_communicator_of_nccl(world, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(process_group_pool.dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(process_group_pool.dist, "new_group", lambda ranks, **how: asked.append(how["backend"]))
    for on_host in (False, True):
        process_group_pool.new_group([0], world, None, 0, on_host)
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]


def names_of_groups(group: Any) -> list[str]:
    """Of an optimizer and of its checkpoints, in turn, and again when both are gone."""
    found = []
    for _ in range(2):
        optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=group)
        for each in (optimizer._group, optimizer._checkpoint_group()):
            found.append(each.handle.group_name)
        del optimizer, each
        gc.collect()
    return found


def test_checkpoints_use_process_groups_of_their_own_again(ranks):
    for one, other, *again in ranks.run(2, names_of_groups):
        assert again == [one, other] and one != other


def names_over_parents(group: Any) -> list[str]:
    """Of optimizers' groups, one after another, each over a process group of the caller's that is then destroyed."""
    found = []
    for _ in range(2):
        parent = dist.new_group(timeout=LIMIT)
        optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=parent)
        found.append(optimizer._group.handle.group_name)
        del optimizer
        dist.barrier(parent)
        dist.destroy_process_group(parent)
    return found


def test_a_process_group_in_the_place_of_a_destroyed_one_takes_its_channels(ranks):
    """As in a notebook or a test suite: each would leave three threads and five files open."""
    for one, other in ranks.run(4, names_over_parents):
        assert one == other


def name_after_others_went(group: Any) -> str:
    """Of an optimizer's group, after two others have gone in another order on each rank."""
    parent = dist.new_group([0, 1], timeout=timedelta(seconds=5))  # of a timeout of its own, so that no others are free
    others = [pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=parent) for _ in range(2)]
    while others:
        others.pop(-group.rank())
        gc.collect()
    optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=parent)
    return str(optimizer._group.handle.group_name)


def test_ranks_take_the_same_group_whichever_went_first(ranks):
    one, other = ranks.run(2, name_after_others_went)
    assert one == other


def built_after_a_group_went(group: Any) -> int:
    """A process group is destroyed between two optimizers of a part of the ranks."""
    pair, passing = dist.new_group([0, 1], timeout=LIMIT), dist.new_group(timeout=LIMIT)
    if dist.get_rank() > 1:
        return 0
    first = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=pair)
    dist.destroy_process_group(passing)
    second = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=pair)
    return len({optimizer._group.handle.group_name for optimizer in (first, second)})


def test_groups_have_names_of_their_own_when_others_were_destroyed(ranks):
    assert ranks.run(4, built_after_a_group_went) == [2, 2, 0, 0]  # torch counts those that are left


def groups_around_an_interrupt(group: Any) -> int:
    """A KeyboardInterrupt while a process group for checkpoints is agreed on; then another optimizer."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    names = set()
    for is_interrupted in (True, False):
        optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], process_group=group)
        names.add(optimizer._group.handle.group_name)
        with pytest.MonkeyPatch.context() as patch:
            if is_interrupted:
                patch.setattr(process_group_pool, "gather_objects", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    optimizer._checkpoint_group()
        del optimizer
        gc.collect()
    return len(names)


def test_a_group_in_which_ranks_were_broken_off_is_not_used_again(ranks):
    """The next optimizer's first collective would fail, or meet what is left of the other rank's."""
    assert ranks.run(2, groups_around_an_interrupt) == [2, 2]
