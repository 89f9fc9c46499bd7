"""The peers' own tests on this package, against the list of where it is to differ (suites.py).

    python -m pytest tests/peers --torch-tests=pytorch/test --deepspeed-tests=DeepSpeed/tests

The folders are of an unpacked source package; nothing of them is kept here. Each suite runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from suites import ROWS, SUITES, Difference, Suite, judge

HERE = Path(__file__).resolve().parent
NEEDS = {"torch": "expecttest", "deepspeed": "hjson"}  # the suites import them
TIMEOUT_S = 1800


def run(suite: Suite, root: Path, out: Path) -> dict[str, tuple[str, str]]:
    """The outcome of each test of a suite, by its id."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE, root))),
        "PEER_ROOT": str(root),
        "PEER_NOT_YET": suite.not_yet,
        "PEER_OUTCOMES": str(out / "outcomes.json"),
    }
    options = ["-q", "--noconftest", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider"]
    plugins = ["-p", "outcomes", "-p", suite.plugin, "--import-mode=importlib"]
    only = ["-k", suite.only] if suite.only else []
    command = [sys.executable, "-m", "pytest", *options, *plugins, str(root / suite.path), *only]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if not (out / "outcomes.json").exists():
        raise AssertionError(f"the suite did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {name: tuple(pair) for name, pair in json.loads((out / "outcomes.json").read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: f"{suite.peer}-{suite.name}".replace(" ", "-"))
def test_suite(suite, request, tmp_path):
    root = request.config.getoption(f"--{suite.peer}-tests", default=None)
    if root is None:
        pytest.skip(f"--{suite.peer}-tests names no folder of {suite.peer}'s own tests")
    if importlib.util.find_spec(NEEDS[suite.peer]) is None:
        pytest.skip(f"{NEEDS[suite.peer]}, which {suite.peer}'s own tests import, is not installed")
    if not (Path(root) / suite.path).exists():
        pytest.skip(f"{root} has no {suite.path}")
    outcomes = run(suite, Path(root).resolve(), tmp_path)
    counts = {
        kind: sum(outcome == kind for outcome, _ in outcomes.values()) for kind in ("passed", "failed", "skipped")
    }
    left_out = sum(outcome == "not run yet" for outcome, _ in outcomes.values())
    row = [f"{suite.peer}, {suite.name}", counts["passed"], counts["failed"], counts["skipped"], left_out]
    request.config.stash[ROWS].append(f"| {' | '.join(map(str, row))} |")
    unlisted, stale = judge(outcomes, suite.differences)
    assert not unlisted, "fail, and are not listed in suites.py:\n" + "\n".join(unlisted)
    assert not stale, "are listed in suites.py, and do not fail:\n" + "\n".join(stale)
    assert counts["passed"], "no test ran"


def test_a_list_that_is_not_true_is_told():
    outcomes = {"a": ("failed", "why"), "b": ("passed", ""), "c": ("failed", "x"), "d": ("skipped", "")}
    assert judge(outcomes, (Difference("a|c", ""),)) == ([], [])
    assert judge(outcomes, (Difference("a", ""),)) == (["c: x"], [])
    assert judge(outcomes, (Difference("a|b|c|d", ""),)) == ([], ["b"])
    assert judge(outcomes, (Difference("a", ""), Difference("c", ""), Difference("gone", ""))) == ([], ["gone"])
