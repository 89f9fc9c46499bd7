"""A child that a rank forks: what it calls by mistake is refused at once, and changes nothing for the ranks."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero

REFUSED, DONE, OTHER_ERROR = 7, 0, 1
CALLS = ("backward", "step", "clip", "full", "save", "build", "interrupt")


def outcome_in_child(call: Callable[[], object]) -> int:
    """Return how a forked child ends that calls `call`: a code from above, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # ends a child that hangs
        try:
            call()
        except (RuntimeError, KeyboardInterrupt) as error:
            os._exit(REFUSED if "fork" in str(error) else OTHER_ERROR)
        except BaseException:
            os._exit(OTHER_ERROR)
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupted(optimizer: pyzero.FusedZeroAdamW) -> None:
    with optimizer._group.lockstep():
        raise KeyboardInterrupt("in the fork")


def trained(group: Any, transport: str, names: tuple[str, ...], folder: Path) -> tuple[list[int], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=0.1, process_group=group, transport=transport, bucket_cap_mb=0.001
    )

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(16) + group.rank()).square().sum().backward()

    calls: dict[str, Callable[[], object]] = {
        "backward": backward,
        "step": optimizer.step,
        "clip": lambda: optimizer.clip_grad_norm_(1.0),
        "full": lambda: optimizer.full_grad(model[0].weight),
        "save": lambda: pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=1),
        "build": lambda: pyzero.FusedZeroAdamW(nn.Linear(2, 2).parameters(), process_group=group),
        "interrupt": lambda: interrupted(optimizer),
    }
    backward()
    optimizer.step()
    backward()
    outcomes = [outcome_in_child(calls[name]) for name in names if group.rank() == 0]
    assert not optimizer._group._wait_records._store.check(["trouble"])
    for _ in range(2):
        optimizer.step()
        backward()
    return outcomes, [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("transport", ["exact", "collective", "peer"])
def test_what_a_forked_child_calls_is_refused_and_changes_nothing(ranks, tmp_path, transport):
    (outcomes, forked), _ = ranks.run(2, trained, transport, CALLS, tmp_path)
    assert dict(zip(CALLS, outcomes, strict=True)) == dict.fromkeys(CALLS, REFUSED)
    assert not [*tmp_path.iterdir()]
    (_, alone), _ = ranks.run(2, trained, transport, (), tmp_path)
    for ours, theirs in zip(forked, alone, strict=True):
        assert torch.equal(ours, theirs)
