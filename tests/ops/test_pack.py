"""pack_ on every backend: the reference's bits, gaps and what lies outside left alone."""

import itertools
import math

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size
from bits import DTYPES, Guarded, assert_same, mixed, name, tame, wild
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyzero import ops

ALL = (*FUSED, REFERENCE)
SIZES = (0, 1, 7, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 8191, 8192, 8193, 32767, 32768, 32769)
MIXED = (300, 0, 1, 513, 64, 0, 2049, 5)


def run(
    bucket: Tensor, values: list[Tensor], offsets: list[int] | None, scale: float, target: Target, **how: int
) -> Tensor:
    """The bucket after the call, on the CPU; canaries and inputs are checked here."""
    shift = how.get("shift", 0)
    held = [Guarded(value, target.device, (shift * (i + 1)) % 9) for i, value in enumerate(values)]
    into = Guarded(bucket, target.device, how.get("bucket_shift", 0))
    ops.pack_(
        into.tensor,
        [guard.tensor for guard in held],
        offsets=offsets,
        scale=torch.tensor(scale, device=target.device) if how.get("on_device") else scale,
        backend=target.backend,
    )
    for i, guard in enumerate((*held, into)):
        guard.check(f"buffer {i} of {len(held)} tensors and bucket")
    for i, (guard, value) in enumerate(zip(held, values, strict=True)):
        assert_same(guard.tensor, value, f"tensor {i}, which is only read", nan_is_nan=False)
    return into.tensor.cpu()


def check(
    values: list[Tensor], dtype: torch.dtype, target: Target, *, scale: float = 0.3, gap: int = 0, **how: int
) -> None:
    """`gap`: elements before each tensor and at the end."""
    sizes = [value.numel() for value in values]
    offsets = [gap + start + i * gap for i, start in enumerate(itertools.accumulate([0, *sizes[:-1]]))] if sizes else []
    bucket = wild(sum(sizes) + gap * (len(sizes) + 1), dtype, 99)
    given = offsets if gap else None
    got = run(bucket, values, given, scale, target, **how)
    wanted = run(bucket, values, given, scale, REFERENCE)
    what = f"{len(values)} tensors into {name(dtype)}, scale {scale}, gap {gap}, {how}"
    is_gap = torch.ones(bucket.numel(), dtype=torch.bool)
    for offset, size in zip(offsets, sizes, strict=True):
        is_gap[offset : offset + size] = False
    assert_same(got, wanted, what)
    assert_same(got[is_gap], bucket[is_gap], f"gaps of {what}", nan_is_nan=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, dtype: torch.dtype) -> None:
    with target.ready():
        for scale, gap, on_device in itertools.product((1.0, 0.3, -(2.0**20)), (0, 3), (False, True)):
            check(mixed(MIXED), dtype, target, scale=scale, gap=gap, on_device=on_device)


@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        for dtype, source in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
            check([wild(numel, source, 5)], dtype, target)
        check([tame(numel, torch.bfloat16, 6), tame(numel, torch.float32, 7)], torch.float32, target, gap=1)


@pytest.mark.parametrize("shift", (0, 1, 3, 4))
@pytest.mark.parametrize("target", params(ALL))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        for dtype, bucket_shift in itertools.product(DTYPES, (1, 3, 4)):
            check(mixed(MIXED), dtype, target, shift=shift, bucket_shift=bucket_shift)


@pytest.mark.parametrize("target", params(ALL))
def test_hundreds_of_tensors(target: Target) -> None:
    num_tensors = 200 if target.backend == "triton" and target.is_emulated else 800
    with target.ready():
        check(mixed(tuple(i * 37 % 90 for i in range(num_tensors)), tame), torch.bfloat16, target, gap=2)


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("target", params(FUSED))
def test_any_list(target: Target, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 3000)), max_size=12))
    how = {"shift": data.draw(st.integers(0, 8)), "bucket_shift": data.draw(st.integers(0, 8))}
    dtype, gap = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 9))
    with target.ready():
        check(mixed(tuple(sizes)), dtype, target, gap=gap, **how)


@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(target: Target) -> None:
    with target.ready():
        bucket = torch.full((6,), 9.0, dtype=torch.bfloat16, device=target.device)
        tensors = [torch.tensor([[2.0], [4.0]]).half(), torch.tensor(257.0)]
        tensors = [tensor.to(target.device) for tensor in tensors]
        ops.pack_(bucket, tensors, offsets=[1, 4], scale=0.5, backend=target.backend)
    assert bucket.tolist() == [9.0, 1.0, 2.0, 9.0, 128.0, 9.0]  # 128.5 is half-way: to the even 128


@pytest.mark.parametrize("target", params(ALL))
def test_overflow_in_the_cast(target: Target) -> None:
    with target.ready():
        values = [tame(100, torch.float32, 0), torch.tensor([65519.0, 65520.0])]
        got = run(torch.zeros(102).half(), values, None, 1.0, target)
        assert got[-2:].tolist() == [65504.0, math.inf]


@pytest.mark.parametrize("target", params(ALL))
def test_nothing_to_pack(target: Target) -> None:
    with target.ready():
        bucket = torch.ones(3, device=target.device)
        ops.pack_(bucket, [], backend=target.backend)
        ops.pack_(bucket, [torch.ones(0, device=target.device)], offsets=[3], scale=5.0, backend=target.backend)
        assert bucket.tolist() == [1.0] * 3
