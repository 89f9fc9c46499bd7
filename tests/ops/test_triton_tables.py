"""The address tables that let one Triton launch walk a list of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from pyzero.ops.triton_kernels import address_table, common  # noqa: E402

CPU = torch.device("cpu")
UPLOAD = address_table.Upload(CPU)


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    address_table._cache.clear()
    yield
    address_table._cache.clear()


@pytest.mark.parametrize("numel", [1, common.BLOCK, common.BLOCK * common.MAX_PROGRAMS + 1, 3 * 2**31 + 7])
def test_rows_cover_each_span_once(numel: int) -> None:
    (table,) = address_table.address_tables([(1 << 40, 1 << 50, numel), (64, 128, 0)], 2, 4, UPLOAD)
    source, dest, count = table.rows.unbind(1)
    assert table.aligned and int(count.sum()) == numel and int(count.min()) > 0
    starts = count.cumsum(0) - count
    assert torch.equal(source, (1 << 40) + 2 * starts)
    assert torch.equal(dest, (1 << 50) + 4 * starts)
    assert table.num_rows <= common.MAX_PROGRAMS
    assert bool((source % 16 == 0).all()), "a chunk must not start off the 16-byte grid of its tensor"


def test_unaligned_spans_have_a_table_of_their_own() -> None:
    spans = [(0, 0, 8), (2, 0, 8), (0, 4, 8), (32, 48, 8)]
    aligned, rest = address_table.address_tables(spans, 2, 2, UPLOAD)
    assert (aligned.aligned, rest.aligned) == (True, False)
    assert aligned.rows.tolist() == [list(spans[0]), list(spans[3])]
    assert rest.rows.tolist() == [list(spans[1]), list(spans[2])]


def test_nothing_to_do_makes_no_table() -> None:
    assert address_table.address_tables([], 2, 2, UPLOAD) == []
    assert address_table.address_tables([(0, 0, 0)], 2, 2, UPLOAD) == []


def test_same_list_same_table() -> None:
    """Steps that see the same gradients copy nothing to the device."""
    first = address_table.pointer_table((16, 32), CPU)
    assert address_table.pointer_table((16, 32), CPU) is first
    assert address_table.pointer_table((32, 16), CPU) is not first
    assert first.tolist() == [16, 32]


@pytest.mark.parametrize("when", range(1, 8))
def test_another_thread_may_drop_a_table_at_any_point(when: int) -> None:
    """Here the key itself does so, at each place where the cache looks it up."""

    class Meddler:
        lookups = 0

        def __hash__(self) -> int:
            self.lookups += 1
            if self.lookups == when:
                address_table._cache.clear()
            return 1

    key = Meddler()
    for _ in range(2):
        assert address_table.cached(key, lambda upload: "table", CPU) == "table"


def test_cache_is_bounded_and_drops_the_oldest() -> None:
    first = address_table.pointer_table((0,), CPU)
    for address in range(1, address_table._CAPACITY):
        address_table.pointer_table((address,), CPU)
    assert address_table.pointer_table((0,), CPU) is first  # now the newest
    address_table.pointer_table((-1,), CPU)
    assert len(address_table._cache) == address_table._CAPACITY
    assert address_table.pointer_table((0,), CPU) is first


def test_a_table_that_a_graph_fills_serves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied in a capture is there when that graph has replayed: not for the next graph, nor eagerly."""
    capturing = True
    monkeypatch.setattr(address_table, "is_interpreted", lambda: False)
    monkeypatch.setattr(address_table, "current_stream", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(address_table, "_captured", [])
    gpu = torch.device("cuda", 0)

    def table() -> object:
        return address_table.cached((16, 32), lambda upload: object(), gpu)

    first, second = table(), table()
    capturing = False
    eager = table()
    assert len({id(first), id(second), id(eager)}) == 3
    assert table() is eager
    capturing = True
    assert table() is eager, "what was copied before the capture is there"
    assert [kept.value for kept in address_table._captured] == [first, second, eager], "addresses stay good"


def test_interpreter_refuses_addresses_it_cannot_follow() -> None:
    if not common.is_interpreted():
        pytest.skip("triton runs compiled here: nothing for the interpreter to refuse")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        address_table.pointer_table((16,), torch.device("cuda", 0))
