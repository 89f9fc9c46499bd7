"""What ranks write about their waits: few questions, a difference and a rank that gave up seen by all, a dead store."""

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from pyzero.comm import wait_records
from pyzero.comm.wait_records import WaitRecord, WaitRecords

PATIENCE_S = 0.05
NORM, WEIGHTS = WaitRecord(7, "the norm", "in step 3"), WaitRecord(7, "the weights", "in step 3")


class Store:
    """A HashStore that counts questions, and answers none while it is stalled."""

    def __init__(self) -> None:
        self._store, self.num_questions = dist.HashStore(), 0
        self.runs = threading.Event()
        self.runs.set()

    def __getattr__(self, name: str) -> Any:
        def asked(*args: Any) -> Any:
            self.num_questions += 1
            assert self.runs.wait(20.0)
            return getattr(self._store, name)(*args)

        return asked


@pytest.fixture
def store(monkeypatch):
    store = Store()
    yield store
    store.runs.set()


def records_of(store: Any, size: int) -> list[WaitRecords]:
    return [WaitRecords(store, rank, dist.HashStore(), range(size), "a group") for rank in range(size)]


def test_ranks_that_wait_for_the_same_ask_little(store):
    everyone = records_of(store, 64)
    for number in (7, 8):
        for records in everyone:
            assert not records.exchange(NORM._replace(number=number))
    assert store.num_questions < 5 * 2 * 64


def test_a_difference_is_seen_by_all(store):
    first, second, third = records_of(store, 3)
    assert not first.exchange(NORM)
    everything = {0: NORM, 1: WEIGHTS}
    assert second.exchange(WEIGHTS) == everything
    assert first.exchange(NORM) == everything
    assert third.exchange(NORM) == everything | {2: NORM}


@pytest.mark.parametrize("number", [6, 8])
def test_a_rank_that_is_late_is_no_difference(store, number):
    first, second = records_of(store, 2)
    for _ in range(2):
        assert not first.exchange(NORM)
        assert not second.exchange(WEIGHTS._replace(number=number))


def test_a_rank_that_gave_up_is_seen_by_all(store):
    first, second, third = records_of(store, 3)
    assert not third.exchange(NORM)
    first.give_up("a step was broken off", "in step 3")
    for records in (second, third):
        seen = records.exchange(NORM)
        assert seen[0].gave_up and seen[0].what == "a step was broken off"
        assert not any(record.gave_up for rank, record in seen.items() if rank)


def test_a_stalled_store_is_not_waited_for_and_its_late_answer_counts(store, monkeypatch):
    first, second = records_of(store, 2)
    assert not first.exchange(NORM)
    monkeypatch.setattr(wait_records, "_PATIENCE_S", PATIENCE_S)
    store.runs.clear()
    begin = time.monotonic()
    for _ in range(3):
        assert not second.exchange(WEIGHTS)
    assert 3 * PATIENCE_S <= time.monotonic() - begin < 10.0
    assert sum(thread.name == "pyzero-store" for thread in threading.enumerate()) == 1
    monkeypatch.undo()
    store.runs.set()
    assert second.exchange(WEIGHTS) == {0: NORM, 1: WEIGHTS}


def test_a_store_that_fails_raises():
    class Failing:
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Broken pipe")

    [records] = records_of(Failing(), 1)
    records.give_up("a step was broken off", "in step 3")
    with pytest.raises(RuntimeError, match="the store of the process group failed: Broken pipe"):
        records.exchange(NORM)
