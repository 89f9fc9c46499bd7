"""`python -m pyzero report`: says what is there, builds nothing, and exits with 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import toy_spec, write_toy

from pyzero import report
from pyzero.ops import build_spec, jit, native, registry

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {blocked!r} else find(name, *rest)
sys.path.insert(0, {root!r})
from pyzero.__main__ import main
sys.exit(main(["report"]))
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYZERO_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "pyzero", "report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"torch {torch.__version__}" in done.stdout
    for op in registry.OPS:
        assert done.stdout.count(f"  {op}:") == 2, "once per device type"
    assert not (tmp_path / "cache").exists(), "a report builds nothing"


def test_a_path_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    environ = {**os.environ, "PYZERO_CACHE_DIR": str(tmp_path / "ü"), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "pyzero", "report"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and f"{tmp_path}/\\xfc/_native_cpu" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at exit", "at a line"])
@pytest.mark.parametrize("command", ["report", "estimate --model-params 7e9", "--help"])
def test_a_reader_that_leaves_early(command: str, unbuffered: str) -> None:
    """As in `python -m pyzero report | head -3`; here the reader is gone before the first line: every write fails."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyzero", *command.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    argparse_wrote_it = command == "--help" and unbuffered  # it passes over a write that fails
    assert done.returncode == (0 if argparse_wrote_it else 128 + 13), "a shell's status of a command that SIGPIPE ended"


def test_with_nothing_installed_but_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    script = BLOCKED.format(blocked={"pydantic", "pybind11", "triton", "tqdm", "transformers"}, root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "C++: expected a C++ compiler in CXX, got no-such-compiler, not found; correct it or unset it" in done.stdout
    assert "CUDA: no nvcc" in done.stdout
    assert "auto takes" in done.stdout


def test_without_torch(tmp_path: Path) -> None:
    script = BLOCKED.format(blocked={"torch"}, root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install torch" in done.stdout


def test_a_stale_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy_spec(write_toy(tmp_path / "csrc"))
    module = tmp_path / "_native_cpu.so"
    spec.build(tmp_path / "build", module)
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: module if kind == "cpu" else None)
    wanted = build_spec.source_hash(build_spec.CSRC, build_spec.cpu_sources())
    assert f"{module} is stale (sources {spec.source_hash()}, wanted {wanted})" in "\n".join(report.lines())


def test_a_failed_build_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that says its version and builds nothing; then one that works."""
    csrc, compiler = write_toy(tmp_path / "csrc"), tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho no room in the inn\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PYZERO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYZERO_JIT", "1")
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: None)
    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc, (str(compiler),)))
    registry.forget()
    assert "cpu, at first use: would be built" in "\n".join(report.lines())
    for _ in range(2):  # nothing keeps a start from trying again
        with pytest.raises(jit.JitError, match="no room in the inn"):
            jit.load("cpu")
        text = "\n".join(report.lines())
        assert "cpu, at first use: the last build failed, and each start tries again" in text
        assert f"    {compiler} -fPIC" in text and "    no room in the inn" in text
        on_cpu = text.partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
        assert "auto takes reference; cuda no, cpu no" in on_cpu
        assert "no cpu: the last build failed: see native modules" in on_cpu

    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc))
    jit.build(toy_spec(csrc))
    assert "cpu, at first use: built" in "\n".join(report.lines())
    assert not list((tmp_path / "cache").glob("*.failed"))
    registry.forget()


def test_another_pyzero_behind_the_clones_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyzero").mkdir()
    (tmp_path / "pyzero" / "__init__.py").write_text("")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""}
    command = [sys.executable, "-m", "pyzero", "report"]
    first, second = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True).stdout.splitlines()[
        :2
    ]
    assert first.endswith(f" in {ROOT / 'pyzero'}")
    assert second.startswith(f"another pyzero is installed in {tmp_path / 'pyzero'}; the above is used")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path / "nowhere")])
    assert "another pyzero" not in "\n".join(report.lines())


def test_what_auto_takes_is_what_pick_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for builds, taken in (("1", "cpu"), ("0", "reference")):
        monkeypatch.setenv("PYZERO_JIT", builds)
        monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: None)
        registry.forget()
        text = "\n".join(report.lines())
        assert f"auto takes {taken}; " in text.partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
        picked = registry.pick("adam_", "auto", torch.device("cpu"))
        assert (picked is registry.pick("adam_", "reference", torch.device("cpu"))) == (taken == "reference")
    registry.forget()


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda", "cpuu"])
def test_auto_is_what_the_variable_says(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYZERO_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    registry.forget()
    text = "\n".join(report.lines()).partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
    try:
        picked = registry.pick("adam_", "auto", torch.device("cpu"))
    except (ValueError, registry.BackendUnavailableError) as error:
        assert "auto takes" not in text and "auto fails; " in text
        (line,) = (line for line in text.splitlines() if "no auto: " in line)
        assert line.partition("no auto: ")[2].removeprefix(f"{backend}: ") in str(error)
    else:
        assert picked is registry.pick("adam_", backend, torch.device("cpu"))
        assert f"(auto tries {backend}, as PYZERO_BACKEND says)" in text and f"auto takes {backend}; " in text
    registry.forget()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PYZERO_JIT", "yes", "expected PYZERO_JIT as one of 1, 0, got yes; correct it or unset it"),
        ("PYZERO_CUDA_ARCHS", "hopper", "expected PYZERO_CUDA_ARCHS as in 80;90, got 'hopper' in it; correct it"),
        ("PYZERO_BACKEND", "cpuu", "expected PYZERO_BACKEND as one of auto, cuda, cpu, triton, reference, got cpuu; "),
        ("PYZERO_BUILD", "all of it", "expected PYZERO_BUILD as one of auto, none, cpu, cuda, all, got all of it; "),
        ("PYZERO_NUM_THREADS", "0", "expected PYZERO_NUM_THREADS as a number from 1, got 0; correct it or unset it"),
        ("MAX_JOBS", "all", "expected MAX_JOBS as a number from 1, got all; correct it or unset it"),
        ("CXX", "'c++", "expected CXX as a command, got 'c++ (No closing quotation); correct it or unset it"),
    ],
)
@pytest.mark.parametrize("is_built", [True, False])
def test_a_value_that_no_variable_can_have_is_a_line(
    name: str, value: str, said: str, is_built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvcc").touch()
    monkeypatch.setattr(build_spec, "find_nvcc", lambda home: (str(tmp_path / "nvcc"),))
    monkeypatch.setattr(build_spec, "compiler_version", lambda command: "release 13.0")
    monkeypatch.setenv("PYZERO_JIT", "1")
    monkeypatch.setenv(name, value)
    if not is_built:
        monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: None)
    registry.forget()
    text = "\n".join(report.lines())
    assert said in text.partition("\nenvironment variables\n")[2].partition("\n\n")[0]
    on_cpu = text.partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
    fails = name in ("PYZERO_BACKEND", "PYZERO_NUM_THREADS") or (not is_built and name in ("PYZERO_JIT", "CXX"))
    assert ("auto fails" in on_cpu) == fails
    if fails:
        with pytest.raises(ValueError, match=name):
            registry.pick("adam_", "auto", torch.device("cpu"))
    monkeypatch.undo()
    registry.forget()


def test_without_wrong_values_nothing_is_said_of_variables() -> None:
    assert "environment variables" not in "\n".join(report.lines())
