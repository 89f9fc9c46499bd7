"""Tensors as plain numbers: read and checked alike in Python and from C."""

import itertools
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backends import read_rows_by
from torch import Tensor

from pyzero.ops import native, rows
from pyzero.ops.rows import ALIGNED, APART, FIRST_APART, FLAT, ONE_DTYPE

Reader = Callable[[Sequence[Any], int, int], bytes | None]


class Subclass(Tensor):
    @classmethod
    def __torch_dispatch__(cls, *call: object) -> None:
        raise NotImplementedError


_BASE = torch.zeros(1000)
_HALF = torch.zeros(1000, dtype=torch.float16)
GOOD = [
    _BASE[:10],
    _HALF[3:9],
    torch.zeros(3, 4).bfloat16(),
    torch.zeros(()),
    torch.zeros(2, 0, 5),
    torch.zeros(4, 3)[::2][:1],  # one row: contiguous, whatever its stride
    torch.nn.Parameter(torch.ones(4)),
    torch.zeros(4, requires_grad=True) * 2,
]
BAD = {
    "fp64": torch.zeros(4).double(),
    "int": torch.zeros(4).int(),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "strided": torch.zeros(8)[::2],
    "transposed": torch.zeros(2, 3).t(),
    "expanded": torch.zeros(1).expand(4),
    "meta": torch.zeros(4, device="meta"),
    "sparse": torch.zeros(4).to_sparse(),
    "no tensor": 5.0,
    "subclass": torch.zeros(4).as_subclass(Subclass),
    "no storage": Tensor._make_wrapper_subclass(Subclass, (4,)),
}
ONLY_NATIVE = ("sparse", "no tensor", "subclass", "no storage")


@pytest.fixture(params=("python", "native"))
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reader:
    read_rows_by(request.param, monkeypatch)
    return rows._native.rows_of if rows._native else rows.read_in_python


def test_by_hand(read: Reader) -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2).half(), torch.zeros(0).bfloat16()]
    numbers = [tensors[0].data_ptr(), 3, 0, tensors[1].data_ptr(), 4, 2, 0, 0, 1]
    packed = struct.pack("9q", *numbers)
    assert rows.rows_of(tensors) == packed == read(tensors, 0, 0)
    assert (rows.addresses(packed), rows.numels(packed)) == (numbers[0::3], [3, 4, 0])
    assert rows.dtypes(packed) == [tensor.dtype for tensor in tensors]


def test_any_list(read: Reader) -> None:
    for count in range(4):
        for tensors in itertools.permutations(GOOD, count):
            assert read(tensors, 0, 0) == rows.rows_of(tensors)
    assert read([], 0, 0) == b""
    assert read(GOOD * 50, 0, 0) == rows.rows_of(GOOD * 50)


@pytest.mark.parametrize("bad", BAD)
def test_one_is_not_as_wanted(read: Reader, bad: str) -> None:
    if read is rows.read_in_python and bad in ONLY_NATIVE:
        pytest.skip("python reads it, or raises")
    for at in (0, 3, len(GOOD)):
        assert read([*GOOD[:at], BAD[bad], *GOOD[at:]], 0, 0) is None


def test_what_c_leaves_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows_by("native", monkeypatch)
    subclass = [BAD["subclass"], _BASE]
    assert rows.checked_rows(subclass) == rows.rows_of(subclass)
    assert rows.checked_rows(deque(GOOD)) == rows.rows_of(GOOD)
    with pytest.raises(ValueError, match="values in memory, got Subclass without"):
        rows.checked_rows([_BASE, BAD["no storage"]])
    freed = torch.ones(8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="whose storage was freed; .*compute it anew"):
        rows.checked_rows([_BASE, freed])


F32, F16, BF16 = _BASE, _HALF, torch.zeros(1000).bfloat16()


@pytest.mark.parametrize(
    ("num_fp32", "rules", "good", "bad"),
    [
        (1, 0, [F32, F16], [F16, F32]),
        (2, 0, [F32, F32, F16], [F32, F16, F32]),
        (0, FLAT, [F32[:5], F16[:5]], [F32[:5], F16[:6]]),
        (0, FLAT, [F32[:6], F16[:6]], [F32[:6], F16[:6].view(2, 3)]),
        (0, FLAT, [F32[:0], F16[:0]], [torch.zeros(0, 1), F16[:0]]),
        (0, APART, [F32[8:], F16, F32[:8]], [F32[8:], F16, F32[:9]]),
        (0, APART, [F32[5:5], F32], [F32[500:501], F32]),
        (0, APART, [F16[4:8], F16[:4], F16[8:]], [F16[4:9], F16[:4], F16[8:]]),
        (0, FIRST_APART, [F32[:8], F32[8:], F32[8:]], [F32[:8], F32[8:], F32[7:]]),
        (0, FIRST_APART, [F32[8:], F32[:8], F32[3:3]], [F32[8:], F32[:9]]),
        (0, ONE_DTYPE, [F32, F16, F16], [F16, F16, BF16]),
        (0, ALIGNED, [F32, F32[4:], F16[8:]], [F32, F32[4:], F16[4:]]),
        (1, FLAT | APART, [F32[:4], F16[:4]], [F32[:4], F32[2:6]]),
    ],
)
def test_rules(read: Reader, num_fp32: int, rules: int, good: list[Tensor], bad: list[Tensor]) -> None:
    assert read(good, num_fp32, rules) == rows.rows_of(good)
    assert read(tuple(good), num_fp32, rules) == rows.rows_of(good)
    assert read(bad, num_fp32, rules) is None
    assert read(bad, 0, 0) == rows.rows_of(bad), "refused for another reason"


def test_spans_apart_are_told_from_others(read: Reader) -> None:
    """The search that the sorted starts and ends stand in for, over all triples of short spans."""
    spans = [(start, stop) for start in range(4) for stop in range(start, 5)]
    for triple in itertools.product(spans, repeat=3):
        covered = [i for start, stop in triple for i in range(start, stop)]
        tensors = [_BASE[start:stop] for start, stop in triple]
        assert (read(tensors, 0, APART) is not None) == (len(covered) == len(set(covered)))


_SHARD = (torch.zeros(256), torch.zeros(256), torch.zeros(256).half())
_GRADS = [torch.zeros(8, 8), torch.zeros(3), torch.zeros(0), torch.zeros(64)]
_PLACES = [0, 64, 128, 192]
_FREED = torch.zeros(3)
_FREED.untyped_storage().resize_(0)


def test_a_shard_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows_by("native", monkeypatch)
    assert rows.native_shard_rows(_SHARD, 2, _GRADS, _PLACES) == rows.rows_of([*_SHARD, *_GRADS])
    assert rows.native_shard_rows(_SHARD[:1], 1, _GRADS[3:], [192]) == rows.rows_of([_SHARD[0], _GRADS[3]])


@pytest.mark.parametrize(
    ("shard", "grads", "offsets"),
    [
        ((*_SHARD[:2], torch.zeros(255)), _GRADS, _PLACES),
        ((_SHARD[0], _SHARD[2]), _GRADS, _PLACES),  # a state in fp16
        ((torch.zeros(257)[1:], _SHARD[1]), _GRADS, _PLACES),  # no vector starts there
        ((_SHARD[0], _SHARD[0]), _GRADS, _PLACES),
        ((*_SHARD[:2], _SHARD[0][:].view(256)), _GRADS, _PLACES),
        (tuple(tensor.view(16, 16) for tensor in _SHARD), _GRADS, _PLACES),
        (_SHARD, [_GRADS[0], _SHARD[1][:3], *_GRADS[2:]], _PLACES),
        (_SHARD, [_GRADS[0], _GRADS[1].half(), *_GRADS[2:]], _PLACES),
        (_SHARD, [_GRADS[0], torch.zeros(6)[::2], *_GRADS[2:]], _PLACES),
        (_SHARD, [_GRADS[0], _FREED, *_GRADS[2:]], _PLACES),
        (_SHARD, [_GRADS[0], torch.zeros(3, device="meta"), *_GRADS[2:]], _PLACES),
        (_SHARD, _GRADS, _PLACES[:3]),
        (_SHARD, _GRADS, [0, 0, 128, 192]),
        (_SHARD, _GRADS, [0, 128, 64, 192]),
        (_SHARD, _GRADS, [0, 65, 128, 192]),
        (_SHARD, _GRADS, [0, 64, 128, 256]),
        (_SHARD, _GRADS, [-64, 64, 128, 192]),
        (_SHARD, _GRADS, ["0", 64, 128, 192]),
        (_SHARD, _GRADS, tuple(_PLACES)),
        (_SHARD, [], []),
        ((), _GRADS, _PLACES),
    ],
)
def test_a_shard_or_a_gradient_is_not_as_wanted(
    monkeypatch: pytest.MonkeyPatch, shard: tuple[Tensor, ...], grads: list[Tensor], offsets: list[int]
) -> None:
    read_rows_by("native", monkeypatch)
    assert rows.native_shard_rows(shard, 2, grads, offsets) is None


_SQUARE = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (_BASE[:8], _BASE[8:16]),
        (_BASE[:8], _BASE[:9]),
        (_BASE[:8], _BASE[:8].view(2, 4)),
        (_BASE[:8].view(4, 2), _BASE[:8].view(2, 4)),
        (_SQUARE, _SQUARE.t()),
        (_HALF, _HALF.view(torch.bfloat16)),
        (_BASE, _BASE.view(torch.int32)),
        (torch.zeros(0, 3), torch.zeros(3, 0)),
        (torch.zeros(3, device="meta"), torch.zeros(3, device="meta").half()),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}, {tensor.stride()}, {tensor.dtype}",
)
@pytest.mark.parametrize("beside", [[], GOOD, [BAD["subclass"]]], ids=["alone", "beside", "subclass"])
def test_layouts_differ_where_one_does(read: Reader, before: Tensor, after: Tensor, beside: list[Tensor]) -> None:
    def of(tensor: Tensor) -> object:
        return rows.layouts_of([*beside, tensor, *beside])

    assert (rows._native is None) == (read is rows.read_in_python)
    assert of(before) == of(before.detach())
    assert of(before) != of(after)
    assert of(torch.nn.Parameter(_BASE)) == of(_BASE)


def test_a_torch_without_exchange_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_native", None)
    assert not native.load("cpu").use_exchange_api(object, object)
    assert native.load("cpu").use_exchange_api(Tensor, torch.nn.Parameter)
