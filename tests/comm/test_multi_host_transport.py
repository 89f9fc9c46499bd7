"""Ranks on several hosts: memory inside each, collectives between them, the bits of "exact", and the fewest bytes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import place
from models import assert_same
from ranks import ON_GPU
from torch import Tensor, nn
from transport_program import SMALL_BUCKETS, averaged_elsewhere, bits_of_exact, program

import pyzero
from pyzero.comm.group import Group

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ranks of a host share memory by futexes of Linux"),
    pytest.mark.skipif(ON_GPU, reason="ranks on GPUs exchange by collectives"),
]
HOSTS = [(0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 1, 0)]  # of each rank
OPTIONS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2, **SMALL_BUCKETS},
    {"stage": 2, "max_grad_norm": 0.5, "grad_reduce_dtype": torch.float32, **SMALL_BUCKETS},
]


def on_hosts(group: Any, hosts: tuple[int, ...], folder: Path, job: Any, *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        place(patch, hosts[group.rank()], folder)
        return job(group, *args)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_bits_of_exact(ranks, tmp_path, hosts, options):
    for dtype in (torch.bfloat16, torch.float32):
        exact = bits_of_exact(ranks, len(hosts), dtype, options)
        ours = ranks.run(len(hosts), on_hosts, hosts, tmp_path, program, dtype, "peer", options)
        for one, other in zip(exact, ours, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_bits_of_weights_where_gradients_are_not_reduced(ranks, tmp_path, hosts):
    exact = ranks.run(len(hosts), averaged_elsewhere, "exact")
    ours = ranks.run(len(hosts), on_hosts, hosts, tmp_path, averaged_elsewhere, "peer")
    for one, other in zip(exact, ours, strict=True):
        assert_same(one, other)


def sent_between_hosts(group: Any, stage: int) -> tuple[str, list[int], int]:
    """The transport of "auto"; elements that each all-to-all of a step sends; those of a bucket."""
    sent: list[int] = []
    begin = Group.begin_all_to_all

    def watch(self: Any, received: Tensor, out: Tensor, *numels: Any) -> Any:
        sent.append(out.numel())
        return begin(self, received, out, *numels)

    model = nn.Linear(64, 64, bias=False)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, stage=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "begin_all_to_all", watch)
        model(torch.ones(3, 64)).sum().backward()
        optimizer.step()
    return type(optimizer._transport).__name__, sent, 64 * 64


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_come_to_each_host_once(ranks, tmp_path, stage):
    for name, (gradients, weights), numel in ranks.run(4, on_hosts, (0, 0, 1, 1), tmp_path, sent_between_hosts, stage):
        assert name == "MultiHostTransport"
        assert gradients == numel // 2  # two of four slices go to the other host
        assert weights == numel // 4  # of each rank, once


def test_hosts_of_one_rank_each_have_no_memory_to_share(ranks, tmp_path):
    for error in ranks.run(2, on_hosts, (0, 1), tmp_path, refused):
        assert "each rank runs on another host" in error and "transport='auto'" in error


def refused(group: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        pyzero.FusedZeroAdamW(nn.Linear(3, 3).parameters(), process_group=group, transport="peer")
    return str(caught.value)
