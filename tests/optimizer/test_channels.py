"""Process groups of an optimizer's own: what torch is asked for, where the default group is NCCL's."""

from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyzero
from pyzero import optimizer
from pyzero.comm import channels, process

LIMIT = timedelta(seconds=20)


@pytest.fixture
def world(tmp_path: Path):
    """A default group of this process alone, made without naming a backend, as torchrun scripts do."""
    dist.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_without_a_named_backend_is_like_one_with_it(world, monkeypatch):
    assert dist.get_backend(world) == "undefined"
    assert channels.timeout_of(world) is not None
    found = channels.new_group([0], world, None, 0)
    assert dist.get_backend_config(found) == "cpu:gloo"
    asked = []
    monkeypatch.setattr(channels.dist, "get_backend_config", lambda group: "cuda:nccl")  # of "undefined" on a GPU
    monkeypatch.setattr(channels.dist, "new_group", lambda ranks, **how: asked.append(how["backend"]))
    channels.new_group([0], world, None, 0)
    assert asked == ["cpu:gloo,cuda:nccl"]


def test_a_smaller_group_is_not_split_off_by_members_alone(world, monkeypatch):
    """ncclCommSplit, which torch takes where a device is bound, hangs until all ranks of the default group call it."""
    bound, seen = torch.device("cuda", 0), []
    monkeypatch.setattr(channels.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(channels.dist, "new_group", lambda ranks, **how: seen.append(world.bound_device_id))
    world.bound_device_id = bound
    channels.new_group([0], world, None, 0)
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
    process.take_device()
    assert not taken, "the caller may have chosen one"
    monkeypatch.setenv("LOCAL_RANK", "3")
    process.take_device()
    assert taken == [process.device()] == [torch.device("cuda", index)]


def test_initialize_takes_it_whoever_made_the_group(world, monkeypatch):
    """As DeepSpeed does: scripts go on with `.cuda()`."""
    taken = []
    monkeypatch.setattr(process, "take_device", lambda: taken.append(dist.is_initialized()))
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
