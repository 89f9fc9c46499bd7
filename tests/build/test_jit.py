"""Building at first use: killed, raced, without a place to write, without compilers, with edited sources."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import toy_spec, write_toy

from pyzero import report
from pyzero.ops import build_spec, jit, native, registry
from pyzero.ops.jit import JitError
from pyzero.ops.registry import BackendUnavailableError

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parents[1] / "support"
CPU = torch.device("cpu")
TIMEOUT_S = 60

# Builds and imports the toy in a process of its own, with a compiler that counts its calls and may hang.
BUILD_TOY = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(SUPPORT)!r}]
from pathlib import Path
from toys import toy_spec
from pyzero.ops import jit
spec = toy_spec(Path(sys.argv[1]), compiler=(sys.argv[2],))
print(jit.import_file("_toy", jit.build(spec)).answer)
"""
COUNTING_COMPILER = """#!/bin/sh
case "$*" in *"/toy.cpp "*) echo call >> {log}; [ -z "$HANG" ] || sleep 30;; esac
exec c++ "$@"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no module built ahead of time, and nothing remembered from before."""
    monkeypatch.setenv("PYZERO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PYZERO_JIT", raising=False)
    monkeypatch.delenv("PYZERO_BACKEND", raising=False)
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: None)
    registry.forget()
    yield tmp_path / "cache"
    registry.forget()


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "csrc")


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "counting-c++"
    path.write_text(COUNTING_COMPILER.format(log=tmp_path / "calls"))
    path.chmod(0o755)
    return path


def start_build(csrc: Path, compiler: Path, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD_TOY, str(csrc), str(compiler)]
    environ = {**os.environ, **environ}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True)


def count_calls(compiler: Path) -> int:
    log = compiler.with_name("calls")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_builds_once_and_says_so(cache: Path, csrc: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = toy_spec(csrc)
    path = jit.build(spec, seconds=7)
    assert path.parent == cache and spec.build_hash() in path.name
    module = jit.import_file("_toy", path)
    stamp = build_spec.read_stamp(path)
    assert module.answer == 42 and stamp is not None and stamp.build_hash == spec.build_hash()
    assert [record.getMessage() for record in caplog.records] == ["building _toy with c++, once; about 7 s"]

    caplog.clear()
    assert jit.build(spec) == path
    assert not caplog.records
    assert not list(cache.glob("*.build"))


def test_four_racing_processes_compile_once(cache: Path, csrc: Path, compiler: Path) -> None:
    processes = [start_build(csrc, compiler) for _ in range(4)]
    assert [process.communicate(timeout=TIMEOUT_S)[0] for process in processes] == ["42\n"] * 4
    assert count_calls(compiler) == 1
    assert len(list(cache.glob("_toy-*.so"))) == 1


def test_a_killed_build_leaves_no_lock_and_no_half_module(cache: Path, csrc: Path, compiler: Path) -> None:
    killed = start_build(csrc, compiler, HANG="1")
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not count_calls(compiler) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)  # its compiler lives on, as an orphan
        killed.wait(TIMEOUT_S)
        assert not list(cache.glob("_toy-*.so")) and list(cache.glob("*.build"))

        after = start_build(csrc, compiler)
        assert after.communicate(timeout=20)[0] == "42\n"
        assert count_calls(compiler) == 2
        assert not list(cache.glob("*.build"))
    finally:
        os.killpg(killed.pid, signal.SIGKILL)


def test_a_process_that_hangs_in_a_build_is_told_of(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stopped process, or a compiler that waits for a file system: the others would wait without a word."""
    monkeypatch.setattr(jit, "_PATIENCE_S", 0.05)
    cache.mkdir()
    lock = jit.module_path(toy_spec(csrc), cache).with_suffix(".lock")
    with lock.open("a") as held:
        jit.fcntl.flock(held, jit.fcntl.LOCK_EX)
        waiting = threading.Thread(target=jit.build, args=(toy_spec(csrc),))
        waiting.start()
        deadline = time.monotonic() + TIMEOUT_S
        while "still waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    waiting.join(TIMEOUT_S)
    assert f"still waiting for another process to build {lock.stem}" in caplog.text
    assert jit.module_path(toy_spec(csrc), cache).exists()


def test_a_cache_that_cannot_be_written(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cache.write_text("a file where the folder should be: root may write to a read-only folder")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = jit.build(toy_spec(csrc))
    assert path.parent == tmp_path / "tmp" / f"pyzero-{os.getuid()}"
    assert "set PYZERO_CACHE_DIR" in caplog.text
    assert jit.build(toy_spec(csrc)) == path  # other processes of this user find it


def test_a_filled_cache_need_not_be_writable(cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jit.build(toy_spec(csrc))
    monkeypatch.setattr(jit, "_writable_folder", lambda: pytest.fail("asked for a place to write"))
    assert jit.build(toy_spec(csrc)) == path


def test_a_user_without_a_home(cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert jit.build(toy_spec(csrc)).parent == tmp_path / f"pyzero-{os.getuid()}"


def test_a_file_system_without_locks(cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jit.fcntl, "flock", no_locks)
    others = cache / f"{jit.module_path(toy_spec(csrc), cache).stem}.other.build"  # of another machine, under way
    others.mkdir(parents=True)
    assert jit.build(toy_spec(csrc)).exists() and others.exists()


@pytest.mark.parametrize("at", ["mkdtemp", "TemporaryFile"])
def test_a_full_disk_leaves_the_reference(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    tries = []

    def full(*_: object, **__: object) -> None:
        tries.append(at)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    if at == "TemporaryFile":
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        monkeypatch.setattr(tempfile, "tempdir", "/proc")
    for op in registry.OPS:
        assert registry.pick(op, "auto", CPU) is registry.pick(op, "reference", CPU)
    assert "No space left on device; set PYZERO_CACHE_DIR" in caplog.text
    assert len(tries) <= 2  # not with every op


@pytest.mark.parametrize("trap", ["a link", "a dangling link", "another owner", "writable by all"])
def test_never_loads_code_from_somebody_elses_folder(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trap: str
) -> None:
    cache.write_text("")
    theirs, expected = tmp_path / "theirs", tmp_path / "tmp" / f"pyzero-{os.getuid()}"
    theirs.mkdir()
    expected.parent.mkdir()
    if trap == "a link":
        expected.symlink_to(theirs)
    elif trap == "a dangling link":
        expected.symlink_to(tmp_path / "nowhere")
    elif trap == "another owner":
        expected.mkdir(mode=0o700)
        somebody = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: somebody)
        expected.rename(expected.with_name(f"pyzero-{os.getuid()}"))
    else:
        expected.mkdir()
        expected.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = jit.build(toy_spec(csrc))
    assert path.parent.name not in (f"pyzero-{os.getuid()}", theirs.name)
    assert path.parent.parent == tmp_path / "tmp"
    assert not list(theirs.iterdir())


def test_an_edited_source_is_built_anew(cache: Path, csrc: Path) -> None:
    first = jit.build(toy_spec(csrc))
    write_toy(csrc, answer="43")
    second = jit.build(toy_spec(csrc))
    assert first != second
    assert jit.import_file("_toy", second).answer == 43


def test_a_failed_build_has_the_output_and_the_remedy(cache: Path, csrc: Path) -> None:
    write_toy(csrc, answer="no_such_name")
    with pytest.raises(JitError, match=r"(?s)toy\.cpp.*no_such_name.*Remedy: if a disk is full, .*TMPDIR.*CXX"):
        jit.build(toy_spec(csrc))
    assert not list(cache.glob("*.build")) and not list(cache.glob("*.so"))


def test_a_broken_file_in_the_cache_is_named(cache: Path, csrc: Path) -> None:
    path = jit.build(toy_spec(csrc)).with_name("broken.so")
    path.write_bytes(b"not a module")
    with pytest.raises(JitError, match="broken.so.*remove the file"):
        jit.import_file("_toy", path)


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "not built ahead of time; expected a C++ compiler in CXX" in (native.unavailable_reason("cpu") or "")
    with pytest.raises(JitError, match="no-such-compiler, not found; correct it or unset it"):
        native.load("cpu")
    with pytest.raises(BackendUnavailableError, match="no-such-compiler, not found"):
        registry.pick("adam_", "cpu", CPU)

    for op in registry.OPS:
        assert registry.pick(op, "auto", CPU) is registry.pick(op, "reference", CPU)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "slow reference" in warnings[0].getMessage()
    assert "no-such-compiler, not found" in warnings[0].getMessage()


def test_no_nvcc(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "no nvcc" in (native.unavailable_reason("cuda") or "")
    with pytest.raises(JitError, match="no nvcc.*set CUDA_HOME"):
        native.load("cuda")
    with pytest.raises(BackendUnavailableError, match="runs on cuda tensors, not on cpu"):
        registry.pick("adam_", "cuda", CPU)


def test_no_pybind11_and_no_python_headers(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_spec.importlib.util, "find_spec", lambda name: None)
    assert "pip install pybind11" in (jit.unavailable_reason("cpu") or "")
    monkeypatch.setattr(build_spec.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "install Python's headers" in (jit.unavailable_reason("cpu") or "")


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYZERO_JIT", "0")
    with pytest.raises(JitError, match="PYZERO_JIT=0"):
        native.load("cpu")
    assert not cache.exists()


def test_auto_goes_on_after_a_failed_build(
    cache: Path, csrc: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy(csrc, answer="no_such_name")
    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc, compiler=(str(compiler),)))
    for op in registry.OPS:
        assert registry.pick(op, "auto", CPU) is registry.pick(op, "reference", CPU)
    assert "no_such_name" in caplog.text and "slow reference" in caplog.text
    assert count_calls(compiler) == 1, "a failed build is not tried again in one process"


def test_a_stale_module_is_named_and_not_used(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    stale = tmp_path / "_native_cpu.so"
    toy_spec(csrc).build(tmp_path / "build", stale)
    write_toy(csrc, answer="43")
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: stale)
    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc))
    assert native.load("cpu").answer == 43
    assert f"{stale} is stale" in caplog.text and "pip install again" in caplog.text

    registry.forget()
    monkeypatch.setenv("PYZERO_JIT", "0")
    with pytest.raises(BackendUnavailableError, match="is stale.*PYZERO_JIT=0"):
        registry.pick("adam_", "cpu", CPU)


def test_a_module_that_cannot_be_imported_is_named_and_built_anew(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As in a wheel built against libraries that this machine lacks."""
    foreign = tmp_path / "_native_cpu.so"
    wanted = build_spec.source_hash(build_spec.CSRC, build_spec.cpu_sources())
    foreign.write_text(f"pyzero-stamp:{wanted}:0::\0")
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: foreign if kind == "cpu" else None)
    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc))
    assert native.load("cpu").answer == 42
    assert f"cannot import {foreign}" in caplog.text

    registry.forget()
    monkeypatch.setenv("PYZERO_JIT", "0")
    with pytest.raises(BackendUnavailableError, match="cannot import.*PYZERO_JIT=0"):
        registry.pick("adam_", "cpu", CPU)
    registry.forget()
    text = "\n".join(report.lines())
    assert f"cpu, ahead of time: cannot import {foreign}" in text
    on_cpu = text.partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
    assert "auto takes reference; cuda no, cpu no" in on_cpu and "no cpu: cannot import" in on_cpu


def test_a_report_names_a_broken_file_in_the_cache(cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that cannot be imported because its file system is mounted noexec."""
    monkeypatch.setattr(jit, "make_spec", lambda kind: toy_spec(csrc))
    path = jit.module_path(toy_spec(csrc), cache)
    cache.mkdir()
    path.write_bytes(b"not a module")
    text = "\n".join(report.lines())
    assert f"cpu, at first use: cannot import {path}" in text
    on_cpu = text.partition("ops on cpu tensors")[2].partition("ops on cuda")[0]
    assert "auto takes reference; cuda no, cpu no" in on_cpu and "no cpu: what was built at first use cannot" in on_cpu


def test_a_module_without_code_for_the_gpu_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As pip builds it on a machine with a T4: a launch would fail, and Triton or a build at first use would not."""
    path = tmp_path / "_native_cuda.so"
    wanted = build_spec.source_hash(build_spec.CSRC, build_spec.cuda_sources())
    path.write_text(f"pyzero-stamp:{wanted}:0:80,90,100:\0")
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: path)
    assert native.unusable_reason("cuda") is None, "no GPU is here, whose it could lack"
    monkeypatch.setenv("PYZERO_JIT", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for gpu, words in (("75", "no kernels for sm_75, a GPU of this machine .built for 80, 90, 100."), ("89", None)):
        monkeypatch.setattr(jit, "present_cuda_archs", lambda gpu=gpu: (gpu,))
        reason = native.unavailable_reason("cuda")
        assert (reason is None) == (words is None) and re.search(words or "", reason or "")


@pytest.mark.parametrize(
    ("toolkit", "driver", "fits"), [("12.8", 12000, False), ("12.8", 12010, True), ("12.0", 12000, True)]
)
def test_kernels_with_long_parameters_are_not_run_by_a_driver_that_does_not_know_them(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toolkit: str, driver: int, fits: bool
) -> None:
    """By torch such a driver will do, and every launch that takes a list would fail."""
    path, csrc = tmp_path / "_native_cuda.so", write_toy(tmp_path / "csrc")
    wanted = build_spec.source_hash(build_spec.CSRC, build_spec.cuda_sources())
    path.write_text(f"pyzero-stamp:{wanted}:0:80,90,100:{toolkit}\0")
    monkeypatch.setattr(native, "ahead_of_time_path", lambda kind: path)
    monkeypatch.setattr(jit, "make_spec", lambda kind: replace(toy_spec(csrc), toolkit=toolkit))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(jit, "present_cuda_archs", lambda: ("90",))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    reason = registry.BACKENDS["cuda"].unavailable_reason("cuda")
    assert (reason is None) == fits
    if not fits:
        said = "kernels built by CUDA 12.8 need a driver for CUDA 12.1 (530), got one for CUDA 12.0; update the driver"
        assert reason.count(said) == 2, "of the module that pip built, and of one built at first use"
        with pytest.raises(BackendUnavailableError, match="need a driver for CUDA 12.1"):
            registry.pick("adam_", "cuda", torch.device("cuda"))


def test_the_real_module_fits_its_sources(tmp_path: Path) -> None:
    stamp = build_spec.read_stamp(Path(native.load("cpu").__file__ or ""))
    assert stamp is not None
    assert stamp.source_hash == build_spec.source_hash(build_spec.CSRC, build_spec.cpu_sources())


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry.forget()
    caplog.set_level(logging.INFO, logger="pyzero")
    for _ in range(2):
        registry.pick("pack_", "auto", CPU)
    assert [record.getMessage() for record in caplog.records if "pack_" in record.getMessage()] == [
        "pack_ on cpu tensors: backend cpu"
    ]


def test_an_unknown_backend_and_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected backend as one of auto, cuda, .*got 'gpu'"):
        registry.pick("adam_", "gpu", CPU)
    registry.forget()
    monkeypatch.setenv("PYZERO_BACKEND", "reference")
    assert registry.pick("adam_", "auto", CPU) is registry.pick("adam_", "reference", CPU)
    registry.forget()


def test_triton_on_cpu_tensors_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry.forget()
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        registry.pick("adam_", "triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.BACKENDS["triton"].unavailable_reason("cpu") is None
    assert "triton" not in [row.name for device in ("cpu", "cuda") for row in registry.ladder(device)]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert [row.name for row in registry.ladder("cuda")] == ["cuda", "triton", "reference"]
    assert [row.name for row in registry.ladder("cpu")] == ["cpu", "reference"]
