"""The bytes that a step's kernels read and write are those of docs/design.md, and torch adds no pass of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyzero
from benchmarks import ledger

DESIGN = Path(__file__).resolve().parents[2] / "docs" / "design.md"
WIDTH, LAYERS = 512, 4
NUMEL = LAYERS * WIDTH * WIDTH
SMALL = 0.01  # of N bytes: flags, rows, step counts, maps of granules


def traffic(group: Any, stage: int, transport: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by op in the third backward and step, and by torch's operation in that step()."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]).bfloat16()
    options = dict(stage=stage, transport=transport, bucket_cap_mb=0.6, max_grad_norm=1e-3, process_group=group)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), **options)
    for _ in range(3):
        optimizer.zero_grad()
        with ledger.counted_ops() as ops:
            model(torch.randn(4, WIDTH).bfloat16()).float().square().mean().backward()
            with ledger.CountedTorch() as torchs:
                optimizer.step()
    return dict(ops), dict(torchs.counts)


@pytest.mark.parametrize("transport", ["peer", "exact"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_bytes_per_parameter(ranks, size, stage, transport):
    copies = ledger.COPIES.at(size) if size > 1 and transport == "peer" else 0  # pack_'s, too
    for ops, torchs in ranks.run(size, traffic, stage, transport):
        for item in ledger.kernels(size):
            wanted = item.at(size) + (copies if item.kernel == "pack_" else 0)
            assert ops.pop(item.kernel) / NUMEL == pytest.approx(wanted, rel=SMALL), item
        assert sum(ops.values()) < SMALL * NUMEL, ops
        assert sum(torchs.values()) < SMALL * NUMEL, torchs


def test_the_table_of_the_docs():
    assert ledger.table() in DESIGN.read_text()


def test_sums():
    assert ledger.total(ledger.ALONE).symbols() == "30N"
    assert ledger.total(ledger.SHARDED).symbols() == "6N + 34n"
    assert ledger.total(ledger.SHARDED).at(2) == 6 + 17 and ledger.DEEPSPEED.at(2) == 12 + 57
