"""Shards and buckets of 4 MiB and more are written around the caches by the CPU: same bits, nothing past the end."""

import pytest
import torch

from pyzero import ops

THRESHOLD = (4 << 20) // 4  # elements; kStreamBytes in csrc/cpu/dispatch.cpp


@pytest.mark.parametrize("numel", [THRESHOLD - 1, THRESHOLD, THRESHOLD + 1, THRESHOLD + 515])
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("accumulate", [False, True], ids=["replace", "accumulate"])
def test_large_shards(numel, offset, accumulate):
    generator = torch.Generator().manual_seed(numel + offset)
    slices = [torch.randn(numel, generator=generator).bfloat16() for _ in range(2)]
    found = {}
    for backend in ("cpu", "reference"):
        around = torch.full((offset + numel + 9,), 7.0)
        shard = around[offset : offset + numel]
        sumsq = torch.zeros(1, dtype=torch.float64)
        ops.reduce_scatter_(shard, slices, scale=1 / 3, accumulate=accumulate, sumsq=sumsq, backend=backend)
        found[backend] = around, sumsq

    ours, wanted = found["cpu"], found["reference"]
    assert torch.equal(ours[0].view(torch.int32), wanted[0].view(torch.int32))
    # two fp64 sums of a million squares in different orders
    torch.testing.assert_close(ours[1], wanted[1], rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("extra", [-1, 0, 70_001])
def test_large_buckets(dtype, offset, extra):
    """Pieces of a few bytes, of more than one chunk, and of a chunk and a vector's part, between gaps that stay."""
    numel = (4 << 20) // dtype.itemsize + extra
    sizes = [3, 2048, 2049, 32768 + 7, 500_001, 100]
    starts = [0, 64, 2176, 4288, 40_000, 600_000]
    tensors = [torch.randn(size + 1, generator=torch.Generator().manual_seed(size)).to(dtype)[1:] for size in sizes]
    found = {}
    for backend in ("cpu", "reference"):
        around = torch.full((offset + numel + 9,), 7.0, dtype=dtype)
        ops.pack_(around[offset : offset + numel], tensors, offsets=starts, backend=backend)
        found[backend] = around
    assert torch.equal(found["cpu"], found["reference"])
    for start, size, tensor in zip(starts, sizes, tensors, strict=True):
        assert torch.equal(found["cpu"][offset + start : offset + start + size], tensor)
