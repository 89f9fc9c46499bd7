"""make gpu, make gpu-quick: checks the kernels on this GPU, with the packages that this Python has.

It builds and checks every kernel, times gradients that lie apart, and trains on two ranks that share the GPU. It runs
the tests that need a GPU, the benchmarks and compute-sanitizer. Each step has a time limit, and runs even if others
failed. It writes report.md, report.json and a log per step to $OUT or build/gpu. It installs nothing, needs no network,
and uses only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S, QUICK_LIMIT_S = 1450.0, 460.0
# With less time left no step is started: importing torch takes half of it.
LEAST_S = 15.0
GRACE_S = 10.0  # for an interrupted step to report: pytest prints its failures
TAIL_LINES, SHOWN_LINES, MAX_COLUMNS = 15, 40, 160  # of a log in the report
MAX_WORKERS = 8  # workers of pytest-xdist; each holds a CUDA context
MAX_POOLS = 4  # pools of four ranks; each rank holds a CUDA context, too
DRIVES = ("offload_param", "tensor_parallel", "cpu_offload", "sharded_offload", "muon")  # cases of gpu_drive.py
PASSED, FAILED, TIMED_OUT, NOT_REACHED, NO_TOOL = "passed", "failed", "timed out", "not reached", "no tool"

_PROBE = """
import importlib.util, json, platform, torch
from torch.utils import collect_env
gpu = torch.cuda.is_available()
names = [name for name in ("triton", "numpy", "pytest", "hypothesis") if importlib.util.find_spec(name)]
versions = {name: importlib.import_module(name).__version__ for name in names}
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else None,
    "gpus": torch.cuda.device_count(),
    "driver": collect_env.get_nvidia_driver_version(collect_env.run) if gpu else None,
    "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "python": platform.python_version(), **versions,
}))
"""


@dataclass(frozen=True)
class Step:
    """One command. `environ` is added to this process's environment."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environ: tuple[tuple[str, str], ...] = ()
    needs: str | None = None  # a missing tool
    shows: bool = False  # the report has its figures even if it passes


@dataclass(frozen=True)
class Result:
    """The result of a step. `exit_code` is None if the step has not run or was killed."""

    name: str
    status: str
    exit_code: int | None = None
    seconds: float = 0.0
    note: str = ""  # the last line of its log, or why it did not run
    tail: tuple[str, ...] = ()  # further lines, if it failed or shows figures


def run(steps: Sequence[Step], out: Path, limit_s: float, environment: Mapping[str, object]) -> list[Result]:
    """Run the steps in turn until the time is up. The report is written after each, so that a killed run leaves one."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit_s
    results: list[Result] = []
    for step in steps:
        left = deadline - time.monotonic()
        if step.needs is not None:
            results.append(Result(step.name, NO_TOOL, note=step.needs))
        elif left < min(LEAST_S, step.limit_s):
            results.append(Result(step.name, NOT_REACHED, note=f"{max(left, 0):.0f} s were left of {limit_s:g}"))
        else:
            results.append(_run_one(step, out / f"{step.name}.log", min(step.limit_s, left)))
        print("\n    ".join((_line(results[-1]), *results[-1].tail)), flush=True)
        write_report(out, environment, results)
    return results


def _run_one(step: Step, log: Path, limit_s: float) -> Result:
    start = time.monotonic()
    with log.open("wb") as file:
        num_bytes = file.write(f"{shlex.join(step.command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **dict(step.environ)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be killed with it
        )
        try:
            exit_code: int | None = process.wait(limit_s)
            status = PASSED if exit_code == 0 else FAILED
        except subprocess.TimeoutExpired:
            exit_code, status = None, TIMED_OUT
        finally:
            _end(process)
    lines = [line[:MAX_COLUMNS] for line in log.read_bytes()[num_bytes:].decode(errors="replace").strip().splitlines()]
    num_lines = SHOWN_LINES if step.shows else 0 if status == PASSED else TAIL_LINES
    tail = tuple(lines[-num_lines:-1]) if num_lines else ()
    seconds = round(time.monotonic() - start, 1)
    return Result(step.name, status, exit_code, seconds, lines[-1] if lines else "", tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill all of the step's session, even if the step has ended but a child of it has not."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _line(result: Result) -> str:
    return f"{result.name:12s} {result.status:11s} {result.seconds:7.1f} s  {result.note}"


def write_report(out: Path, environment: Mapping[str, object], results: Sequence[Result]) -> None:
    report = {"environment": environment, "steps": [asdict(result) for result in results]}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["# GPU report", "", *(f"- {key}: {value}" for key, value in environment.items()), ""]
    lines += ["| step | status | exit code | seconds | last line |", "|---|---|---|---|---|"]
    for result in results:
        code = "" if result.exit_code is None else result.exit_code
        note = result.note.replace("|", "\\|")
        lines.append(f"| {result.name} | {result.status} | {code} | {result.seconds:.1f} | {note} |")
    for result in results:
        lines += ["", f"## {result.name}", "", *(f"    {line}" for line in result.tail)] if result.tail else []
    (out / "report.md").write_text("\n".join(lines) + "\n")


def exit_code(results: Sequence[Result]) -> int:
    """1 if a step failed, took too long or was not reached. A tool that is not installed is only reported."""
    return int(any(result.status not in (PASSED, NO_TOOL) for result in results))


# ---- the steps ------------------------------------------------------------------------------------------------------


def steps_for(quick: bool, is_amd: bool, out: Path) -> list[Step]:
    """The steps. The most important come first, because the time may not suffice for all."""
    backends = ("triton",) if is_amd else ("cuda", "triton")
    support = Path(__file__).parent
    python, smoke, drive = sys.executable, str(support / "gpu_smoke.py"), str(support / "gpu_drive.py")
    environ = (
        ("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))),
        ("PYTHONUNBUFFERED", "1"),
        ("PYZERO_REQUIRE", ",".join(backends)),
        # Caches are kept between runs. They are not in $OUT, which may be copied over a network.
        ("PYZERO_CACHE_DIR", os.environ.get("PYZERO_CACHE_DIR") or str(ROOT / "build" / "gpu-cache" / "pyzero")),
        ("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR") or str(ROOT / "build" / "gpu-cache" / "triton")),
    )
    bench = (python, "-m", "benchmarks", "--device", "cuda", "--out", str(out / "benchmarks"))
    lists = (python, "-m", "benchmarks", "adam", "lion", "sgd", "--device", "cuda", "--quick", "--peers", "none")
    steps = [
        Step("kernels", (python, smoke, *backends), 180, environ),
        Step("lists", lists, 90, environ, shows=True),
        *(Step(case, (python, drive, case), 36, environ) for case in DRIVES),
        Step("tests", _pytest("cuda and not slow"), 240 if quick else 600, environ),
        Step("ranks", _pytest_ranks(), 120 if quick else 300, (*environ, ("PYZERO_TEST_DEVICE", "cuda"))),
        _sanitizer("memcheck", (python, smoke, "cuda"), is_amd, environ),
        _sanitizer("racecheck", (python, smoke, "cuda"), is_amd, environ),
        Step("benchmarks", (*bench, "--quick") if quick else bench, 120 if quick else 360, environ),
    ]
    return steps if quick else [*steps, Step("slow-tests", _pytest("cuda and slow"), 180, environ)]


def _pytest_ranks() -> tuple[str, ...]:
    """Tests on several gloo ranks, all of whose tensors are on the one GPU."""
    subjects = {
        "comm": ("symmetric_memory_transport",),
        "gradients": (
            "accumulation",
            "broken_off",
            "grad_edits",
            "hooks",
            "norm",
            "scaled_backward",
            "skips",
            "torch_clip",
        ),
        "optimizer": ("access", "bucket_order", "update_rule", "zero_lion"),
    }
    files = (ROOT / "tests" / folder / f"test_{name}.py" for folder, names in subjects.items() for name in names)
    paths = [str(file) for file in files]
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_workers(MAX_POOLS), *paths)


def _workers(most: int) -> tuple[str, ...]:
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(min(len(os.sched_getaffinity(0)), most)))


def _pytest(marker: str) -> tuple[str, ...]:
    """pytest on the folders whose tests may need a GPU. Other folders import packages that a GPU machine may lack."""
    others = ("build", "engine", "programs", "tools", "support", "__pycache__")
    folders = [path for path in sorted((ROOT / "tests").iterdir()) if path.is_dir() and path.name not in others]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--durations",
        "10",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
    ]
    return (*command, *_workers(MAX_WORKERS), "-m", marker, *map(str, folders))


def _sanitizer(tool: str, command: tuple[str, ...], is_amd: bool, environ: tuple[tuple[str, str], ...]) -> Step:
    """compute-sanitizer without torch's caching allocator, whose blocks are larger than the tensors in them."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    missing = "an AMD GPU has no compute-sanitizer" if is_amd else None if found else "compute-sanitizer not found"
    words = (found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command)
    return Step(tool, words, 150, (*environ, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")), missing)


def probe() -> dict[str, object]:
    """GPU and versions. A separate process finds them, so that this one holds no GPU."""
    done = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{sys.executable} has no torch that can be imported:\n{done.stderr[-1000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in under 8 minutes in place of 25")
    parser.add_argument("--limit-s", type=float, help="seconds for all steps; those that do not fit are not started")
    args = parser.parse_args()
    environment = probe()
    if environment["gpu"] is None:
        print(f"torch {environment['torch']} of {sys.executable} sees no GPU; set PYTHON to one whose torch does")
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    limit_s = args.limit_s or (QUICK_LIMIT_S if args.quick else LIMIT_S)
    print(", ".join(f"{key}: {value}" for key, value in environment.items()), flush=True)
    results = run(steps_for(args.quick, environment["hip"] is not None, out), out, limit_s, environment)
    print(f"report: {out / 'report.md'}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
