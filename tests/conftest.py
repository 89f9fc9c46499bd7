"""Fixtures that all tests share, and what a skip owes: a reason, and no skip where PYZERO_REQUIRE forbids it."""

import gc
import os
import re
from collections.abc import Generator, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with torch: its idle threads would spin against the ranks

import pytest
import torch
from own_groups import OwnGroups
from ranks import Ranks

from pyzero.ops import env

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.fixture(scope="session")
def _pool() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks(_pool: Ranks) -> Ranks:
    """Four gloo workers for all tests; see tests/support/ranks.py."""
    return _pool


@pytest.fixture(scope="module")
def run(ranks: Ranks) -> OwnGroups:
    """`ranks.run` with process groups of the call's own."""
    return OwnGroups(ranks)


@pytest.fixture(scope="module", autouse=True)
def _renew(_pool: Ranks, request: pytest.FixtureRequest) -> None:
    _pool.renew(request.path.parent)
    gc.collect()
    gc.freeze()  # as in the ranks: the search for modules at construction looks at this module's objects alone


def forbidden_skip(reason: str) -> str | None:
    """Why a skip with this reason is a failure, or None."""
    if not reason or reason == "unconditional skip":
        return "a skip names its reason; this one does not"
    for backend in env.required():
        if re.search(rf"\b{re.escape(backend)}\b", reason, re.IGNORECASE):
            return f"PYZERO_REQUIRE forbids this skip: {reason}"
    return None


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    if why := forbidden_skip(report.longrepr[2].removeprefix("Skipped: ").removeprefix("Skipped").strip()):
        report.outcome = "failed"
        report.longrepr = why


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _judge(report)
    return report
