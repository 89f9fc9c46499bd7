"""Bit equality, canaries, and hostile data."""

import math

import torch
from tolerances import SUMSQ
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_CANARY = 0x5A5A
_PAD = 64  # elements on either side: whole cache lines, so that only the shift determines the alignment


def name(dtype: torch.dtype | None) -> str:
    """The name in a test's id: float32, bfloat16, none."""
    return str(dtype).removeprefix("torch.").lower()


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.dtype])


def assert_same(got: Tensor, wanted: Tensor, what: str, *, nan_is_nan: bool = True) -> None:
    """Assert that the bits are equal. With `nan_is_nan`, any NaN equals any other."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{what}: {got.dtype} {got.shape}"
    differs = as_bits(got) != as_bits(wanted)
    if nan_is_nan:
        differs &= ~(got.cpu().isnan() & wanted.cpu().isnan())
    if differs.any():
        first = int(differs.reshape(-1).nonzero()[0])
        pair = [tensor.detach().cpu().reshape(-1)[first].item() for tensor in (got, wanted)]
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} differ, "
            f"first [{first}]: got {pair[0]!r}, wanted {pair[1]!r}"
        )


class Guarded:
    """A copy of `values` on a device, `shift` elements off alignment, with canaries on both sides."""

    def __init__(self, values: Tensor, device: str = "cpu", shift: int = 0) -> None:
        start, stop = _PAD + shift, _PAD + shift + values.numel()
        whole = torch.full((stop + _PAD,), _CANARY, dtype=_INTEGERS[values.dtype], device=device)
        self._around = whole[:start], whole[stop:]
        self.tensor = whole.view(values.dtype)[start:stop]
        self.tensor.copy_(values.reshape(-1))

    def check(self, what: str) -> None:
        """Assert that nothing was written outside."""
        for side, canaries in zip(("before", "past"), self._around, strict=True):
            assert (canaries == _CANARY).all(), f"{what}: written {side} its bounds"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tame(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Gradients like a user's: normal and finite."""
    return torch.randn(numel, generator=_generator(seed)).to(dtype)


_SPECIALS = torch.tensor(
    [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38]
    + [65504.0, 65519.996, 65520.0, -65536.0, 6e-8, 2.98e-8, 2.9802322e-8, 6.097e-5, 3.3895314e38, 3.3961775e38]
)


def wild(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Two thirds are normal. Others: random bit patterns (subnormals, inf, NaN), ties in 16 bits, special values."""
    generator = _generator(seed)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (numel,), generator=generator)

    if dtype != torch.float32:
        anything = integers(-(2**15), 2**15).to(torch.int16).view(dtype)
        return torch.where(integers(0, 3) == 0, anything, torch.randn(numel, generator=generator).to(dtype))

    normal = torch.randn(numel, generator=generator)
    anything = integers(-(2**31), 2**31).to(torch.int32)
    bf16_tie = ((anything & -0x10000) | 0x8000).view(torch.float32)
    fp16_tie = ((normal.view(torch.int32) & -0x2000) | 0x1000).view(torch.float32)
    fp16_subnormal_tie = (integers(-1024, 1024) + 0.5).float() * 2.0**-24
    special = _SPECIALS[integers(0, len(_SPECIALS))]
    kinds = torch.stack([anything.view(torch.float32), bf16_tie, fp16_tie, fp16_subnormal_tie, special] + [normal] * 10)
    return kinds.gather(0, integers(0, len(kinds))[None])[0].contiguous()


PLACES = (0, 1, 2, 5, 7, 8, 255, 256, 700, 1000)  # in 1,001 elements: lanes of a vector, several vectors, the tail


def mixed(sizes: tuple[int, ...], make=wild) -> list[Tensor]:
    return [make(numel, DTYPES[i % 3], i) for i, numel in enumerate(sizes)]


def check_sumsq(sumsq: Tensor, stored: list[Tensor], calls: int = 1) -> None:
    """Compare with Python's exact sum of the stored values."""
    values = [value for tensor in stored for value in tensor.double().tolist()]
    if not all(map(math.isfinite, values)):
        assert not math.isfinite(sumsq.item())
        return
    wanted = math.fsum(value * value for value in values)
    limit = SUMSQ[sumsq.dtype].relative(len(values), calls) * wanted
    assert abs(sumsq.item() - wanted) <= limit, (sumsq.item(), wanted)


def edges(dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    """(value, found_inf) of the values that are not finite, and of the largest finite ones."""
    largest = torch.finfo(dtype).max
    return (math.inf, 1.0), (-math.inf, 1.0), (math.nan, 1.0), (largest, 0.0), (-largest, 0.0)
