"""A rank that is killed, stalls or raises: the others end in time and say what failed; nothing is left.

The training is tests/support/fault_worker.py; all cases of a transport run at once, and each test looks at one.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_worker import BAD_RANK, BAD_STEP, GIVE_UP_S, NUM_RANKS, NUM_RETRIES, TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
MARGIN_S = 10  # for an error to travel and an interpreter to exit on a busy machine; less than two timeouts in all

REDUCE_SCATTER = r"the reduce-scatter of gradient bucket \d"
CASES = {  # how, where, stage[, what the script does then]: the collective that the other ranks must name
    "killed-backward-1": REDUCE_SCATTER,
    "killed-backward-2": REDUCE_SCATTER,
    "killed-step-1": "the all-gather of weights",
    "killed-step-2": "the all-gather of weights",
    "stalled-backward-1": REDUCE_SCATTER,
    "stalled-backward-2": REDUCE_SCATTER,
    "stalled-between-2": "the all-gather of overflow flag and norm",
    "stalled-step-1": "the all-gather of weights",
    "stalled-step-2": "the all-gather of weights",
    "raised-forward-1": REDUCE_SCATTER,
    "raised-forward-2": REDUCE_SCATTER,
    "killed-step-2-retried": "the all-gather of weights",
    "stalled-backward-2-retried": REDUCE_SCATTER,
    "raised-backward-1-tidied": REDUCE_SCATTER,
    "stalled-step-2-tidied": "the all-gather of weights",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc and /dev/shm of Linux")


class Rank(NamedTuple):
    """How one rank ended."""

    code: int
    seconds: float  # since rank 1 failed
    printed: list[str]
    error: str


class Outcome(NamedTuple):
    """Of all cases."""

    ranks: dict[str, list[Rank | None]]  # by case; None for one that had to be killed
    left_in_memory: set[str]  # names in /dev/shm
    left_alive: bool


def mapped_names() -> set[str]:
    """What living processes have of /dev/shm."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            names.update(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
        except (OSError, UnicodeDecodeError):
            continue  # it ended, or belongs to somebody else
    return names


def last_error(printed: str) -> str:
    """The last line of a traceback; a library may tell of leaks after it."""
    return [line for line in printed.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]+Error: ", line)][-1]


def group_lives(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


def read_ranks(folder: Path, ends: list[Any]) -> list[Rank | None]:
    failed_at = float((folder / "failed_at").read_text())
    return [
        end
        and Rank(
            code=end[0],
            seconds=end[1] - failed_at,
            printed=(folder / f"{rank}.out").read_text().split(),
            error=(folder / f"{rank}.err").read_text(),
        )
        for rank, end in enumerate(ends)
    ]


@pytest.fixture(scope="module", params=["exact", "rooted", "collective", "peer", "hosts"])
def outcome(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    before = set(os.listdir(SHARED_MEMORY))
    command = [sys.executable, str(ROOT / "tests" / "support" / "fault_worker.py"), str(root)]
    command += [f"{request.param}-{name}" for name in CASES]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=4 * GIVE_UP_S)
        left_alive = group_lives(process.pid)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0
    ranks = {name.partition("-")[2]: read_ranks(root / name, ends) for name, ends in json.loads(printed).items()}
    # What is mapped belongs to a process that runs, so to none of ours; and no rank makes multiprocessing's semaphores.
    left = {name for name in os.listdir(SHARED_MEMORY) if not name.startswith("sem.mp-")} - before - mapped_names()
    return Outcome(ranks, left, left_alive)


@pytest.mark.parametrize("name", CASES)
def test_the_other_ranks_end_in_time_and_say_why(outcome, name):
    how, _, _, *then = name.split("-")
    retries = ["refused"] * (NUM_RETRIES if then == ["retried"] else 0)
    reasons = []
    for rank in range(NUM_RANKS):
        end = outcome.ranks[name][rank]
        assert end is not None, f"rank {rank} did not end"
        if rank == BAD_RANK:
            continue
        assert end.code == 1, end.error
        assert end.printed == ["stepped"] * BAD_STEP + retries
        last_line = last_error(end.error)
        assert re.search(rf"CollectiveError: {CASES[name]} failed on rank {rank} of {NUM_RANKS}: ", last_line)
        assert f"within {TIMEOUT_S} s" in last_line
        reasons.append(last_line.split("Every rank must")[0])
        assert end.seconds < TIMEOUT_S + MARGIN_S
    # Who is second may have seen the first one go.
    assert how != "stalled" or any(re.search("[Tt]imed out|timeout", reason) for reason in reasons)


@pytest.mark.parametrize("name", CASES)
def test_the_rank_that_failed(outcome, name):
    how, _, _, *then = name.split("-")
    end = outcome.ranks[name][BAD_RANK]
    assert end is not None
    assert end.printed[:BAD_STEP] == ["stepped"] * BAD_STEP
    if how == "killed":
        assert end.code == -signal.SIGKILL
        assert end.printed == ["stepped"] * BAD_STEP
    elif how == "raised":
        assert end.code == 1 and "ArithmeticError: a bug of rank 1" in last_error(end.error)
    else:  # it went on once the others had given up: not with weights of its own
        assert end.code == 1 and "CollectiveError" in last_error(end.error)
        assert end.printed == ["stepped"] * BAD_STEP + ["refused"] * (NUM_RETRIES if then == ["retried"] else 0)


def test_nothing_is_left(outcome):
    assert not outcome.left_alive
    assert not outcome.left_in_memory
