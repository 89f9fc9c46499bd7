"""unscale_ on every backend: the reference's bits, the flag, the sum of squares, what it must leave alone."""

import itertools
import math

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size, use_threads
from bits import DTYPES, PLACES, Guarded, assert_same, check_sumsq, edges, mixed, name, tame, wild
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import SUMSQ
from torch import Tensor

from pyzero import ops

ALL = (*FUSED, REFERENCE)
SIZES = (0, 1, 7, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 8191, 8192, 8193, 32767, 32768, 32769)
MIXED = (300, 0, 1, 513, 64, 0, 2049, 5)


def run(
    values: list[Tensor], scale: float, target: Target, *, shift: int = 0, on_device: bool = False, flag: float = 0.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(tensors, found_inf, sumsq) after the call, on the CPU; canaries are checked here."""
    held = [Guarded(value, target.device, (shift * (i + 1)) % 9) for i, value in enumerate(values)]
    found_inf = Guarded(torch.tensor([flag]), target.device)
    sumsq = Guarded(torch.zeros(1, dtype=torch.float64), target.device)
    inv_scale = torch.tensor(scale, device=target.device) if on_device else scale
    ops.unscale_(
        [guard.tensor for guard in held],
        inv_scale,
        found_inf=found_inf.tensor,
        sumsq=sumsq.tensor,
        backend=target.backend,
    )
    for i, guard in enumerate((*held, found_inf, sumsq)):
        guard.check(f"buffer {i} of {len(held)} tensors, found_inf and sumsq")
    return [guard.tensor.cpu() for guard in held], found_inf.tensor.cpu(), sumsq.tensor.cpu()


def check(values: list[Tensor], scale: float, target: Target, *, shift: int = 0, on_device: bool = False) -> None:
    got, flag, sumsq = run(values, scale, target, shift=shift, on_device=on_device)
    wanted, wanted_flag, _ = run(values, scale, REFERENCE)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_same(a, b, f"tensor {i} of {len(got)}, scale {scale}, shift {shift}")
    assert flag.item() == wanted_flag.item()
    check_sumsq(sumsq, got)


@pytest.mark.parametrize("on_device", (False, True), ids=("number", "tensor"))
@pytest.mark.parametrize("scale", (2.0**-16, 0.1, 1.0, -3.0, 2.0**20, 0.0))
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, scale: float, on_device: bool) -> None:
    with target.ready():
        check(mixed(MIXED), scale, target, on_device=on_device)


@pytest.mark.parametrize("target", params(FUSED))
def test_a_number_has_no_negative_zero(target: Target) -> None:
    """Triton's interpreter knows none."""
    with target.ready():
        check(mixed(MIXED), -0.0, target)


@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        for make in (wild, tame):
            check([make(numel, dtype, 5) for dtype in DTYPES], 0.3, target)


@pytest.mark.parametrize("shift", (1, 2, 3, 4, 5, 8))
@pytest.mark.parametrize("target", params(ALL))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        check(mixed(MIXED), 0.3, target, shift=shift)


@pytest.mark.parametrize("target", params(ALL))
def test_hundreds_of_tensors(target: Target) -> None:
    """More than one launch of the CUDA kernel carries (741), empty ones in between."""
    num_tensors = 200 if target.backend == "triton" and target.is_emulated else 800
    with target.ready():
        check(mixed(tuple(i * 37 % 90 for i in range(num_tensors)), tame), 0.3, target, shift=1)


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("target", params(FUSED))
def test_any_list(target: Target, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 3000)), max_size=12))
    shift = data.draw(st.integers(0, 8))
    with target.ready():
        if sizes:
            check(mixed(tuple(sizes)), 0.3, target, shift=shift)


# ---- what the reference itself owes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(target: Target, dtype: torch.dtype) -> None:
    with target.ready():
        got, flag, sumsq = run([torch.tensor([8.0, -4.0]).to(dtype), torch.tensor([2.0]).to(dtype)], 0.25, target)
    assert [tensor.tolist() for tensor in got] == [[2.0, -1.0], [0.5]]
    assert (flag.item(), sumsq.item()) == (0.0, 5.25)


@pytest.mark.parametrize("target", params(ALL))
def test_rounds_to_nearest_even_by_hand(target: Target) -> None:
    """Products half-way between two 16-bit values, or beyond fp16's largest, 65504."""
    cases = [
        (torch.float16, [65504.0, 40000.0, -40000.0], 2.0, [math.inf, math.inf, -math.inf]),
        # fp16's subnormals are multiples of 2^-24: 0.5 units go to 0, 1.5 to 2, 2.5 to 2
        (torch.float16, [2.0**-24, 3 * 2.0**-24, 5 * 2.0**-24], 0.5, [0.0, 2.0**-23, 2.0**-23]),
        # 1.51171875 lies between 1.5078125 (odd) and 1.515625; 1.53515625 between 1.53125 and 1.5390625 (odd)
        (torch.bfloat16, [1.0078125, 1.0234375], 1.5, [1.515625, 1.53125]),
    ]
    with target.ready():
        for dtype, values, scale, wanted in cases:
            got, _, _ = run([torch.tensor(values).to(dtype)], scale, target)
            assert got[0].tolist() == wanted


@pytest.mark.parametrize("bad", (-math.inf, math.nan))
@pytest.mark.parametrize("target", params(ALL))
def test_found_inf_wherever_it_is(target: Target, bad: float) -> None:
    with target.ready():
        for dtype in DTYPES:
            for numel, at in ((1, 0), (65, 64), (2049, 2048), (2049, 1000)):
                values = [tame(40, dtype, 0), tame(numel, dtype, 1)]
                values[1][at] = bad
                _, flag, _ = run(values, 0.5, target)
                assert flag.item() == 1.0
                _, flag, _ = run(values, 1.0, target)
                assert flag.item() == 1.0


@pytest.mark.parametrize("scale", (1.0, 0.5))
@pytest.mark.parametrize("target", params(ALL))
def test_found_inf_without_a_sum(target: Target, scale: float) -> None:
    """The kernels then test bits, where a sum would tell."""
    with target.ready():
        for dtype, at in itertools.product(DTYPES, PLACES):
            for value, wanted in edges(dtype):
                tensor = tame(1001, dtype, 0).to(target.device)
                tensor[at] = value
                found_inf = torch.zeros(1, device=target.device)
                ops.unscale_([tensor], scale, found_inf=found_inf, backend=target.backend)
                assert found_inf.item() == wanted, (dtype, at, value)


@pytest.mark.parametrize("target", params(ALL))
def test_found_inf_is_set_by_overflow_of_the_product_and_never_cleared(target: Target) -> None:
    with target.ready():
        for dtype, large in ((torch.float16, 60000.0), (torch.bfloat16, 3e38), (torch.float32, 3e38)):
            values = [torch.full((9,), large).to(dtype)]
            assert run(values, 0.5, target)[1].item() == 0.0
            assert run(values, 2.0, target)[1].item() == 1.0
            assert run([tame(9, dtype, 0)], 0.5, target, flag=1.0)[1].item() == 1.0


@pytest.mark.parametrize("target", params(ALL))
def test_finite_values_leave_the_flag_as_it_is(target: Target) -> None:
    """As after a sum over ranks: only 0 and not 0 count, and nothing writes to it."""
    with target.ready():
        for flag in (2.0, -0.0, math.inf, math.nan):
            for bad, wanted in ((1.0, flag), (math.nan, 1.0)):
                _, got, _ = run([torch.tensor([1.0, bad])], 0.5, target, flag=flag)
                assert_same(got, torch.tensor([wanted]), f"a flag of {flag}, with {bad}")


@pytest.mark.parametrize("target", params(ALL))
def test_squares_that_overflow_fp32_are_no_inf(target: Target) -> None:
    with target.ready():
        for scale in (0.5, 1.0):
            got, flag, sumsq = run([torch.full((3000,), 3e38)], scale, target)
            assert flag.item() == 0.0
            check_sumsq(sumsq, got)
            assert math.isfinite(sumsq.item())


@pytest.mark.parametrize("target", params(ALL))
def test_number_one_only_reads(target: Target) -> None:
    """Bit for bit, NaN payloads included, which a write would not keep."""
    values = mixed(MIXED)
    with target.ready():
        got, flag, sumsq = run(values, 1.0, target)
    for a, b in zip(got, values, strict=True):
        assert_same(a, b, "a tensor that was only to be read", nan_is_nan=False)
    assert flag.item() == 1.0
    assert math.isnan(sumsq.item())


@pytest.mark.parametrize("target", params(ALL))
def test_same_tensor_twice_may_be_read(target: Target) -> None:
    with target.ready():
        once = torch.ones(10, device=target.device)
        sumsq = torch.zeros(1, device=target.device)
        ops.unscale_([once, once], 1.0, found_inf=None, sumsq=sumsq, backend=target.backend)
        assert sumsq.item() == 20.0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=name)
@pytest.mark.parametrize("target", params(ALL))
def test_sumsq_is_added_and_repeats(target: Target, dtype: torch.dtype) -> None:
    values = mixed((5000, 3, 9000), tame)
    results = []
    with target.ready():
        for _ in range(3):
            tensors = [value.to(target.device) for value in values]
            sumsq = torch.full((1,), 7.0, dtype=dtype, device=target.device)
            for _ in range(2):
                ops.unscale_(tensors, 1.0, found_inf=None, sumsq=sumsq, backend=target.backend)
            results.append(sumsq.cpu())
    wanted = 7.0 + 2 * math.fsum(x * x for value in values for x in value.double().tolist())
    assert abs(results[0].item() - wanted) <= SUMSQ[dtype].relative(15_000, 2) * wanted
    assert len({result.item() for result in results}) == 1


def test_sumsq_is_the_same_for_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = mixed((100_001, 3, 70_000, 40_000), tame), set()
    for num_threads in (1, 2, 3, 7):
        use_threads(monkeypatch, num_threads)
        seen.add(run(values, 0.3, FUSED[0])[2].item())
    assert len(seen) == 1


@pytest.mark.parametrize("target", params(ALL))
def test_reports_are_optional(target: Target) -> None:
    with target.ready():
        for scale in (1.0, 0.5):
            tensor = torch.full((70,), 2.0, device=target.device)
            ops.unscale_([tensor], scale, found_inf=None, backend=target.backend)
            assert (tensor == 2.0 * scale).all()
        ops.unscale_([], 0.5, found_inf=None, backend=target.backend)


@pytest.mark.parametrize("target", params(ALL))
def test_any_shape(target: Target) -> None:
    with target.ready():
        tensors = [torch.ones(shape, device=target.device) for shape in ((), (3, 4), (2, 1, 5), (0, 3))]
        ops.unscale_(tensors, 0.5, found_inf=None, backend=target.backend)
        assert all((tensor == 0.5).all() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("target", params(tuple(t for t in FUSED if t.name in ("cpu-baseline", "cuda"))))
def test_more_than_two_to_the_31_elements(target: Target, pytestconfig: pytest.Config) -> None:
    """One bf16 tensor of 4.3 GB: run by `pytest -m slow`, not by default."""
    if "slow" not in pytestconfig.option.markexpr:
        pytest.skip("takes 4.3 GB and some ten seconds: pytest -m slow runs it")
    numel = 2**31 + 5
    with target.ready():
        tensor = torch.zeros(numel, dtype=torch.bfloat16, device=target.device)
        places = [0, 2**31 - 1, 2**31, numel - 1]
        tensor[places] = 3.0
        found_inf, sumsq = (torch.zeros(1, device=target.device) for _ in range(2))
        ops.unscale_([tensor], 0.5, found_inf=found_inf, sumsq=sumsq, backend=target.backend)
        assert tensor[places].tolist() == [1.5] * 4
        assert (found_inf.item(), sumsq.item()) == (0.0, 9.0)
        tensor[-1] = math.inf
        ops.unscale_([tensor], 1.0, found_inf=found_inf, backend=target.backend)
        assert found_inf.item() == 1.0
