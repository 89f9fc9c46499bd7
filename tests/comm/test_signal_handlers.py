"""A signal handler raises while a rank waits for another one: the error stays, and the other rank is told."""

import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

import pyzero
from pyzero.comm import work
from pyzero.comm.process import is_of_signal_handler

AFTER_S = 0.3  # the signal comes
LATE_S = 1.0  # rank 1 comes


class StepTimeout(RuntimeError):
    """Of a watchdog."""


def interrupt(number: int, frame: Any) -> None:
    raise StepTimeout("the step takes too long")


def wait_for_a_late_rank(group: Any, transport: str) -> str:
    weight = nn.Parameter(torch.ones(64))
    optimizer = pyzero.FusedZeroAdamW([weight], process_group=group, transport=transport)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weight.sum().backward()
    if group.rank() == 1:
        time.sleep(LATE_S)
    else:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, AFTER_S)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "_ASKS_AFTER_S", 1.0)
            optimizer.step()
    except RuntimeError as error:
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return "finished"


@pytest.mark.parametrize("transport", ["exact", "peer", "collective"])
def test_it_is_raised_on_its_rank_and_the_other_one_is_told(ranks, transport):
    assert ranks.run(2, wait_for_a_late_rank, transport) == ["StepTimeout", "CollectiveError"]


@pytest.mark.parametrize(
    ("module", "is_handler"),
    [
        ("__main__", True),
        ("torch.utils.data._utils.signal_handling", True),  # a DataLoader's worker has died
        ("torch.distributed.distributed_c10d", False),
        ("pyzero.comm.work", False),
    ],
)
def test_who_raised(module, is_handler):
    with pytest.raises(RuntimeError) as raised:
        exec("raise RuntimeError", {"__name__": module})
    assert is_of_signal_handler(raised.value) is is_handler
