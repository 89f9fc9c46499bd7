"""pytest plugin in the peer's process: every test's outcome, into the JSON file that PEER_OUTCOMES names."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

_WORST = ("passed", "not run yet", "skipped", "failed")
_outcomes: dict[str, tuple[str, str]] = {}  # test id -> (outcome, last line of what it said)


def _note(name: str, outcome: str, text: str) -> None:
    before = _outcomes.get(name, ("passed", ""))
    if _WORST.index(outcome) >= _WORST.index(before[0]):
        _outcomes[name] = (outcome, text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    pattern = os.environ.get("PEER_NOT_YET")
    for item in list(items) if pattern else ():
        if re.search(pattern, item.nodeid):
            items.remove(item)
            _note(item.nodeid.rpartition("/")[2], "not run yet", "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report.nodeid.rpartition("/")[2], report.outcome, _last_line(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid.rpartition("/")[2], "failed", _last_line(report))


def pytest_sessionfinish() -> None:
    Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1))


def _last_line(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = [line[2:].strip() for line in str(report.longrepr or "").splitlines() if line.startswith("E  ")]
    return (lines or [""])[0][:300]
