"""make gpu, without a GPU: a failure or a hang stops nothing, the report tells all, and the kernels' check can fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_drive
import gpu_smoke
import pytest
from gpu_check import Step

from pyzero import ops

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    return (sys.executable, "-c", code)


HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_steps_go_on_after_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "GRACE_S", 1.0)
    steps = [
        Step("hangs", python(HANGS), 5.0),
        Step("fails", python("import sys; print('why'); print('reason | here'); sys.exit(3)"), 60),
        Step("absent", ("no-such-tool",), 60, needs="no-such-tool not found"),
        Step("passes", python("import os; print(os.environ['WORD'])"), 60, (("WORD", "well"),)),
        Step("shows", python("print('4000 GB/s'); print('done')"), 60, shows=True),
    ]
    results = gpu_check.run(steps, tmp_path / "out", 120, {"gpu": "none"})

    assert [result.status for result in results] == ["timed out", "failed", "no tool", "passed", "passed"]
    assert [result.exit_code for result in results] == [None, 3, None, 0, 0]
    assert [result.note for result in results][1:] == ["reason | here", "no-such-tool not found", "well", "done"]
    assert 5 <= results[0].seconds < 40
    assert gpu_check.exit_code(results) == 1 and gpu_check.exit_code(results[2:]) == 0
    assert gpu_check.exit_code(results[:1]) == 1
    if sys.platform == "linux":
        assert not is_alive(int(results[0].note)), "the child of a step that hung"

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["environment"] == {"gpu": "none"}
    assert [step["name"] for step in report["steps"]] == ["hangs", "fails", "absent", "passes", "shows"]
    table = (tmp_path / "out" / "report.md").read_text()
    assert "- gpu: none" in table and "| fails | failed | 3 |" in table and "reason \\| here" in table
    assert "## shows\n\n    4000 GB/s\n" in table and "## passes" not in table
    assert "well" in (tmp_path / "out" / "passes.log").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hangs", "fails", "why", "absent", "passes", "shows", "4000"]


def test_a_step_that_takes_too_long_may_still_say_what_it_knows(tmp_path):
    """As pytest does, whose failures are printed last."""
    code = (  # whoever starts the tests in the background of a shell has SIGINT ignored
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: time.sleep(600)\nexcept KeyboardInterrupt: print('2 failed, 30 passed')"
    )
    results = gpu_check.run([Step("interrupted", python(code), 5.0)], tmp_path, 60, {})
    assert (results[0].status, results[0].note) == ("timed out", "2 failed, 30 passed")


def test_the_time_limit_is_for_all_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_S", 1.0)
    monkeypatch.setattr(gpu_check, "LEAST_S", 2.0)
    start = time.monotonic()
    steps = [Step("slow", python("import time; time.sleep(600)"), 500), Step("late", python("print(1)"), 500)]
    results = gpu_check.run(steps, tmp_path, 3.0, {})
    assert time.monotonic() - start < 30
    assert [result.status for result in results] == ["timed out", "not reached"]
    assert gpu_check.exit_code(results[1:]) == 1, "what was not run has not passed"


@pytest.mark.parametrize("is_amd", [False, True], ids=["nvidia", "amd"])
def test_the_steps(is_amd, tmp_path):
    steps = {step.name: step for step in gpu_check.steps_for(False, is_amd, tmp_path)}
    quick = gpu_check.steps_for(True, is_amd, tmp_path)
    assert {step.name for step in quick} < set(steps)
    assert dict(steps["tests"].environ)["PYZERO_REQUIRE"] == ("triton" if is_amd else "cuda,triton")
    assert ("cuda" in steps["kernels"].command) != is_amd
    assert (steps["memcheck"].needs is not None) or not is_amd
    words = steps["tests"].command
    assert words[words.index("-m", 3) + 1] == "cuda and not slow"
    assert str(ROOT / "tests" / "ops") in words and str(ROOT / "tests" / "engine") not in words


def test_what_comes_first_in_eight_minutes(tmp_path):
    """What no GPU may have run yet, and how fast lists are, ahead of what takes minutes; all of it could time out."""
    steps = gpu_check.steps_for(True, False, tmp_path)
    names = [step.name for step in steps]
    assert names[: names.index("tests")] == ["kernels", "lists", *gpu_drive.CASES]
    assert set(gpu_check.DRIVES) == set(gpu_drive.CASES)
    assert sum(step.limit_s for step in steps[: names.index("tests")]) < gpu_check.QUICK_LIMIT_S


@pytest.mark.parametrize("case", gpu_drive.CASES)
def test_drives_on_cpus(ranks, case):
    for line in ranks.run(2 + 2, gpu_drive.drive, case):  # the world of the workers
        assert re.fullmatch(rf"{case}: same losses; a step: (.+ [\d.]+ ms(, )?){{2,3}}", line)


def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(ROOT / "tests" / "support" / "gpu_check.py")]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "sees no GPU" in done.stdout


def test_the_kernels_are_checked(monkeypatch, capsys):
    assert gpu_smoke.main(["cpu"], device="cpu") == 0
    assert capsys.readouterr().out.count("same bits") == len(gpu_smoke.OPS)

    right = ops.unscale_

    def wrong(tensors, inv_scale, *, backend, **kwargs):
        right(tensors, inv_scale, backend=backend, **kwargs)
        if backend == "cpu":
            tensors[3][0] += 1

    monkeypatch.setattr(ops, "unscale_", wrong)
    assert gpu_smoke.main(["cpu"], device="cpu") == 1
    assert "cpu unscale: DIFFERS" in capsys.readouterr().out
