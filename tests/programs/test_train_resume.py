"""make train's --save-every and --resume: a run that is killed goes on on other ranks, by hand or by torchrun."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from example_runs import ROOT, TINY, TORCHRUN, TRAIN_GPT, children_of, environ, run

BATCH, CONTEXT, STEPS, SAVED_AT, KILLED_AT = 4, 32, 8, 4, 6  # of TINY the first two
WAIT_S = 300  # some 20 s on two idle cores
OPTIONS = (*TINY, "--no-baseline", "--dtype", "fp32", "--lr", "1e-2")

# On other ranks the losses of 4 rows of 32 bytes are added up in another order, and so are gradients: each sum is off
# by at most its number of terms times fp32's rounding, and so is what a step changes. Measured: 1e-7.
REL = BATCH * CONTEXT * 2**-24


def launched(num_ranks):
    return (sys.executable, TRAIN_GPT) if num_ranks == 1 else (*TORCHRUN[:-1], num_ranks, TRAIN_GPT)


def curve(out):
    return json.loads((out / "FusedZeroAdamW.json").read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(bytes(range(32, 127)) * 50)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """A run on two ranks, in the folder whole, and the same one killed after a step that was not saved, in killed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [*launched(2), *OPTIONS, "--data", text, "--steps", STEPS]
    run(*command, "--out", folder / "whole")
    command += ["--out", folder / "killed", "--save-every", SAVED_AT, "--kill-at", KILLED_AT]
    killed = subprocess.run([str(word) for word in command], env=environ(), capture_output=True, text=True)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert os.listdir(folder / "killed") == ["checkpoints"]
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_goes_on(runs, text, tmp_path, num_ranks):
    out = tmp_path / "runs"
    shutil.copytree(runs / "killed", out)
    command = [*launched(num_ranks), *OPTIONS, "--data", text, "--steps", STEPS, "--out", out]
    printed = run(*command, "--save-every", SAVED_AT, "--resume", "--over", runs / "whole")
    assert f"resumed after step {SAVED_AT}, on {num_ranks} rank(s)" in printed
    assert re.search(rf"{SAVED_AT * BATCH * CONTEXT}/1.02k", printed), printed  # where the progress bar starts
    assert (out / "resume.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoints" / "latest").read_text() == f"step_{STEPS}\n"
    got, wanted = curve(out), curve(runs / "whole")
    assert got["parts"] == [[0, 2], [SAVED_AT, num_ranks]] and wanted["parts"] == [[0, 2]]
    assert got["losses"][:SAVED_AT] == wanted["losses"][:SAVED_AT] and len(got["losses"]) == STEPS
    assert got["losses"] == pytest.approx(wanted["losses"], rel=0.0 if num_ranks == 2 else REL, abs=0.0)
    assert got["losses"][-1] < 0.95 * got["losses"][0]


def test_another_run_is_not_gone_on_with(runs, text, monkeypatch):
    words = [*OPTIONS, "--data", text, "--steps", STEPS + 1, "--out", runs / "killed", "--resume"]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, words)])
    with pytest.raises(SystemExit, match=f"pass --steps {STEPS}, or another --out"):
        runpy.run_path(str(TRAIN_GPT), run_name="__main__")


def agent(is_host, endpoint, steps, out, text, log):
    """torchrun of one host with one process: the elastic line of docs/checkpoints.md, in haste."""
    document = (ROOT / "docs" / "checkpoints.md").read_text()
    words = re.search(r"^    torchrun (--nnodes 1:2 .*)$", document, re.MULTILINE)[1]
    words = words.replace("$HOST:29400", endpoint).split()
    words[words.index("examples/train_gpt.py")] = str(TRAIN_GPT)
    hurry = f"is_host={is_host},last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"
    options = [*OPTIONS, "--data", text, "--out", out, "--steps", steps, "--save-every", 10]
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-conf", hurry, *words, *options]
    with open(log, "wb") as file:
        return subprocess.Popen([str(word) for word in command], env=environ(), stdout=file, stderr=file)


def kill(agent):
    """It and its worker."""
    if agent.poll() is None:
        for pid in (agent.pid, *children_of(agent.pid)):
            os.kill(pid, signal.SIGKILL)
        agent.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find the processes")
def test_torchrun_goes_on_with_what_is_left(text, tmp_path):
    """Two agents, as on two hosts; the second one and its worker are killed, as by a power cut."""
    steps, out, logs = 200, tmp_path / "runs", [tmp_path / "first", tmp_path / "second"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    first, second = (agent(host, endpoint, steps, out, text, log) for host, log in zip((1, 0), logs, strict=True))
    try:
        deadline = time.monotonic() + WAIT_S
        while not (out / "checkpoints" / "latest").is_file():
            assert first.poll() is None and time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.05)
        kill(second)
        assert first.wait(WAIT_S) == 0, logs[0].read_text()
    finally:
        kill(first)
        kill(second)
    done = int(re.search(r"resumed after step (\d+), on 1 rank\(s\)", logs[0].read_text())[1])
    result = curve(out)
    assert result["parts"] == [[0, 2], [done, 1]] and len(result["losses"]) == steps
    assert result["losses"][-1] < 0.5 * result["losses"][0]
