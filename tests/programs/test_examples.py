"""The examples, as a user starts them; a run that is interrupted leaves no process and no part of a file."""

import ast
import csv
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example_runs import ROOT, TINY, TORCHRUN, TRAIN_GPT, children_of, environ, run

import pyzero
from pyzero.optimizer import ZeroOptimizer

DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "examples"))
from gpt import report  # noqa: E402


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 100)
    return path


def test_train_gpt(tmp_path, text):
    out = tmp_path / "runs"
    printed = run(*TORCHRUN, TRAIN_GPT, *TINY, "--data", text, "--out", out, "--steps", "40", "--lr", "1e-2")
    assert sorted(path.name for path in out.iterdir()) == [
        "AdamW.csv",
        "AdamW.json",
        "FusedZeroAdamW.csv",
        "FusedZeroAdamW.json",
        "loss.png",
    ]
    curves = {}
    for name in ("AdamW", "FusedZeroAdamW"):
        with open(out / f"{name}.csv") as file:
            curves[name] = [float(row["loss"]) for row in csv.DictReader(file)]
        assert len(curves[name]) == 40 and curves[name][-1] < 0.7 * curves[name][0]
    # The same seed and the same bytes: they differ by bf16's rounding of the weights alone, 2^-9 of a loss of log(256).
    assert curves["AdamW"][0] == pytest.approx(curves["FusedZeroAdamW"][0], rel=2**-9)
    for words in ("held-out loss", "sample:", "bytes per rank, 2 rank(s)", "FusedZeroAdamW (measured)"):
        assert words in printed
    settings = report.Result(**__import__("json").loads((out / "AdamW.json").read_text())).settings
    zero, adamw = (report.load(name, out, settings) for name in ("FusedZeroAdamW", "AdamW"))
    num_params = adamw.weight_bytes // 4
    assert zero.weight_bytes == 2 * num_params
    assert 6 * num_params <= zero.state_bytes < 6.5 * num_params  # 12 bytes each, over two ranks, and padding
    assert 8 * num_params <= adamw.state_bytes < 8.1 * num_params


def test_train_gpt_alone(tmp_path, text):
    out = tmp_path / "runs"
    printed = run(
        sys.executable,
        TRAIN_GPT,
        *TINY,
        "--data",
        text,
        "--out",
        out,
        "--steps",
        "3",
        "--dtype",
        "fp16",
        "--no-baseline",
    )
    assert "FusedZeroAdamW: held-out loss" in printed and "AdamW.json" not in os.listdir(out)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find the processes")
def test_interrupt_leaves_nothing(tmp_path, text):
    out, printed = tmp_path / "runs", tmp_path / "printed"
    command = [*TORCHRUN, TRAIN_GPT, *TINY, "--data", text, "--out", out, "--steps", "1000000"]
    with open(printed, "wb") as file:
        process = subprocess.Popen([str(word) for word in command], env=environ(), stdout=file, stderr=file)
        workers = []
        try:
            deadline = time.monotonic() + 120
            while b"loss=" not in printed.read_bytes():  # steps are being taken
                assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
                time.sleep(0.2)
            workers = children_of(process.pid)
            assert len(workers) >= 2
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.returncode != 0
            assert not any(alive(pid) for pid in workers)
            assert not out.exists() or not list(out.iterdir())
        finally:
            for pid in (process.pid, *workers):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "curve.csv"
    report.write_whole(path, b"old")

    def interrupted(source, target):
        assert Path(source).read_bytes() == b"new content"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["alone", "torchrun"])
def test_deepspeed_script(launcher):
    printed = run(*launcher, ROOT / "examples" / "deepspeed_script.py")
    words = next(line for line in printed.splitlines() if line.startswith("loss:")).split()
    assert float(words[3]) < 0.5 * float(words[1]), printed


def test_deepspeed_script_differs_by_its_import_alone():
    lines = (ROOT / "examples" / "deepspeed_script.py").read_text().splitlines()
    assert [line for line in lines if "pyzero" in line] == [
        "import pyzero.deepspeed as deepspeed  # the line that differs: `import deepspeed`"
    ]


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["alone", "torchrun"])
def test_minimal_learns(launcher):
    printed = run(*launcher, ROOT / "examples" / "minimal.py")
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 4 and losses[-1] < 0.1 * losses[0], printed


def test_readme_shows_the_minimal_program():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0] == (ROOT / "examples" / "minimal.py").read_text()
    assert "\n    torchrun --nproc-per-node 2 examples/minimal.py\n" in readme


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_exist(name):
    words = re.findall(r"`([\w/.-]+/[\w.-]*)`", (ROOT / name).read_text())
    written_by_make = ("build/", ".venv")
    wanted = [word for word in words if "NAME" not in word and not word.startswith(written_by_make)]
    assert len(wanted) > 5
    assert [word for word in wanted if not (ROOT / word).exists()] == []


def anchors_of(document):
    """Those that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_links_in_documents_lead_to_files_and_headings(name):
    document = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text())
    if name == "README.md":
        assert len(links) > 20
    targets = [(document.parent / path if path else document, anchor) for path, anchor in links]
    assert [path for path, _ in targets if not path.exists()] == []
    assert [(path, anchor) for path, anchor in targets if anchor and anchor not in anchors_of(path)] == []


def test_the_table_of_options_is_the_optimizers():
    options = inspect.signature(ZeroOptimizer).parameters.values()
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    defaults = {option.name: option.default for option in options if option.kind == option.KEYWORD_ONLY}
    assert [name for name, _ in rows] == [*defaults]
    adams = pyzero.FusedZeroAdam, pyzero.FusedZeroAdamW
    for kind in (*adams, pyzero.FusedZeroLion, pyzero.FusedZeroSGD, pyzero.ZeroLamb, pyzero.ZeroMuon):
        assert all(re.search(rf"\b{name}\b", kind.__doc__ or "") for name in defaults), kind
    for name, told in rows:
        assert name == "process_group" or ast.literal_eval(told) == defaults[name], name
