"""reduce_scatter_ on every backend: the reference's bits, the order of the sum, the flag and the sum of squares."""

import itertools
import math

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size, use_threads
from bits import DTYPES, PLACES, Guarded, assert_same, check_sumsq, edges, name, tame, wild
from torch import Tensor

from pyzero import ops

ALL = (*FUSED, REFERENCE)
SIZES = (0, 1, 7, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4097, 32767, 32768, 32769)


def run(
    shard: Tensor, slices: list[Tensor], target: Target, *, scale: float = 0.3, accumulate: bool = False, **how: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(shard, found_inf, sumsq) after the call, on the CPU; canaries and inputs are checked here."""
    held = [Guarded(piece, target.device, how.get("shift", 0) * (i + 1) % 9) for i, piece in enumerate(slices)]
    into = Guarded(shard, target.device, how.get("shard_shift", 0))
    found_inf = Guarded(torch.zeros(1), target.device)
    sumsq = Guarded(torch.zeros(1, dtype=torch.float64), target.device)
    ops.reduce_scatter_(
        into.tensor,
        [guard.tensor for guard in held],
        scale=torch.tensor(scale, device=target.device) if how.get("on_device") else scale,
        accumulate=accumulate,
        found_inf=found_inf.tensor,
        sumsq=sumsq.tensor,
        backend=target.backend,
    )
    for i, guard in enumerate((*held, into, found_inf, sumsq)):
        guard.check(f"buffer {i} of {len(held)} slices, shard, found_inf and sumsq")
    for i, (guard, value) in enumerate(zip(held, slices, strict=True)):
        assert_same(guard.tensor, value, f"slice {i}, which is only read", nan_is_nan=False)
    return into.tensor.cpu(), found_inf.tensor.cpu(), sumsq.tensor.cpu()


def check(
    numel: int, ranks: int, dtype: torch.dtype, target: Target, make=wild, accumulate: bool = False, **how: float
) -> None:
    shard = make(numel, torch.float32, 50)
    slices = [make(numel, dtype, rank) for rank in range(ranks)]
    got, flag, sumsq = run(shard, slices, target, accumulate=accumulate, **how)
    wanted, wanted_flag, _ = run(shard, slices, REFERENCE, accumulate=accumulate)
    what = f"{ranks} slices of {numel} {name(dtype)}, accumulate {accumulate}, {how}"
    assert_same(got, wanted, what)
    assert flag.item() == wanted_flag.item(), what
    check_sumsq(sumsq, [got])


@pytest.mark.parametrize("ranks", (1, 2, 3, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, dtype: torch.dtype, ranks: int) -> None:
    with target.ready():
        for accumulate, on_device, make in itertools.product((False, True), (False, True), (wild, tame)):
            check(700, ranks, dtype, target, make, accumulate, on_device=on_device)


@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        check(numel, 3, torch.bfloat16, target)
        check(numel, 2, torch.float32, target, tame, accumulate=True)


@pytest.mark.parametrize("shift", (0, 1, 3, 4))
@pytest.mark.parametrize("target", params(ALL))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        for dtype, shard_shift in itertools.product(DTYPES, (1, 2, 3)):
            check(1037, 3, dtype, target, shift=shift, shard_shift=shard_shift)


@pytest.mark.parametrize("target", params(ALL))
def test_many_ranks(target: Target) -> None:
    """More slices than a kernel's parameters hold pointers for, perhaps."""
    with target.ready():
        check(70, 300, torch.bfloat16, target, tame)


@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(target: Target) -> None:
    with target.ready():
        slices = [torch.tensor(values).bfloat16() for values in ([1.0, 2.0], [3.0, 4.0], [5.0, -6.0])]
        got, flag, sumsq = run(torch.tensor([10.0, 20.0]), slices, target, scale=0.5, accumulate=True)
        assert (got.tolist(), flag.item(), sumsq.item()) == ([14.5, 20.0], 0.0, 14.5**2 + 400)
        got, flag, sumsq = run(torch.tensor([math.nan, math.nan]), slices, target, scale=0.5)
        assert (got.tolist(), flag.item(), sumsq.item()) == ([4.5, 0.0], 0.0, 4.5**2)


@pytest.mark.parametrize("target", params(ALL))
def test_sums_in_rank_order(target: Target) -> None:
    """2^24 + 1 is a tie in fp32 and goes back to 2^24, 2^24 + 2 does not: the order shows."""
    with target.ready():
        small_last = [torch.full((9,), value) for value in (2.0**24, 1.0, 1.0)]
        assert (run(torch.zeros(9), small_last, target, scale=1.0)[0] == 2.0**24).all()
        assert (run(torch.zeros(9), small_last[::-1], target, scale=1.0)[0] == 2.0**24 + 2).all()


@pytest.mark.parametrize("target", params(ALL))
def test_found_inf_from_every_side(target: Target) -> None:
    with target.ready():
        fine = [tame(2050, torch.float16, rank) for rank in range(3)]
        zeros = torch.zeros(2050)
        assert run(zeros, fine, target)[1].item() == 0.0
        for rank, at in itertools.product(range(3), (0, 1023, 2049)):
            slices = [piece.clone() for piece in fine]
            slices[rank][at] = math.inf
            assert run(zeros, slices, target)[1].item() == 1.0
        shard = zeros.clone()
        shard[2049] = math.nan
        assert run(shard, fine, target, accumulate=True)[1].item() == 1.0
        assert run(shard, fine, target)[1].item() == 0.0
        opposite = [torch.full((5,), math.inf), torch.full((5,), -math.inf)]
        assert run(zeros[:5], opposite, target)[1].item() == 1.0
        large = [torch.full((5,), 3e38)] * 2
        assert run(zeros[:5], large, target, scale=0.1)[1].item() == 1.0  # the sum overflows before it is scaled


@pytest.mark.parametrize("target", params(ALL))
def test_squares_that_overflow_fp32_are_no_inf(target: Target) -> None:
    with target.ready():
        got, flag, sumsq = run(torch.zeros(3000), [torch.full((3000,), 3e38)], target, scale=0.5)
        assert flag.item() == 0.0
        assert math.isfinite(sumsq.item())
        check_sumsq(sumsq, [got])


@pytest.mark.parametrize("target", params(ALL))
def test_flag_is_not_cleared_and_sumsq_is_added_to(target: Target) -> None:
    with target.ready():
        for dtype in (torch.float32, torch.float64):
            flag = torch.ones(1, device=target.device)
            sumsq = torch.full((1,), 7.0, dtype=dtype, device=target.device)
            shard = torch.zeros(100, device=target.device)
            pieces = [torch.ones(100, device=target.device)] * 2
            ops.reduce_scatter_(shard, pieces, found_inf=flag, sumsq=sumsq, backend=target.backend)
            ops.reduce_scatter_(shard, pieces, accumulate=True, backend=target.backend)
            assert (flag.item(), sumsq.item(), shard[0].item()) == (1.0, 407.0, 4.0)


def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    slices, seen = [tame(100_001, torch.bfloat16, rank) for rank in range(2)], set()
    wanted = run(torch.zeros(100_001), slices, REFERENCE)[0]
    for num_threads in (1, 2, 3, 7):
        use_threads(monkeypatch, num_threads)
        got, _, sumsq = run(torch.zeros(100_001), slices, FUSED[0])
        assert_same(got, wanted, f"{num_threads} threads")
        seen.add(sumsq.item())
    assert len(seen) == 1


@pytest.mark.parametrize("accumulate", (False, True))
@pytest.mark.parametrize("target", params(ALL))
def test_found_inf_without_a_sum(target: Target, accumulate: bool) -> None:
    """The kernels then test bits, where a sum would tell."""
    with target.ready():
        for ranks, at in itertools.product((1, 2, 3, 8), PLACES):
            for value, wanted in edges(torch.bfloat16):
                shard, *slices = torch.zeros(ranks + 1, 1001).to(target.device)
                slices[-1][at] = value
                slices = [piece.bfloat16() for piece in slices]
                found_inf = torch.zeros(1, device=target.device)
                ops.reduce_scatter_(shard, slices, accumulate=accumulate, found_inf=found_inf, backend=target.backend)
                assert found_inf.item() == wanted, (ranks, at, value)
