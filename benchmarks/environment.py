"""The environment of a measurement: hardware, versions, load."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import pyzero
from pyzero.ops import build_spec, registry

from . import peers
from .options import Options

ROOT = Path(__file__).resolve().parent.parent


def environment(options: Options) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _cpu_model(),
        "cpus": build_spec.num_cpus(),
        "load_average": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "pyzero": pyzero.__version__,
        "backend": _backend(options.device),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "quick": options.quick,
        "peers": peers.versions(options),
        "absent": peers.absent(options),
    }


def in_words(found: dict[str, object]) -> str:
    def words(value: object) -> object:
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none" if isinstance(value, dict) else value

    return "\n".join(f"{key}: {words(value)}" for key, value in found.items() if value is not None)


def busy_warning() -> str | None:
    """A warning if other programs use the same cores."""
    load = os.getloadavg()[0]
    if load <= 0.5 * build_spec.num_cpus():
        return None
    return (
        f"warning: load average {load:.1f} on {build_spec.num_cpus()} CPUs. OpenMP threads wait "
        "for those that the system does not run, now in one contender, now in another: --threads 1 compares fairly."
    )


def _backend(device: str) -> str:
    """The backend that "auto" takes on the device. Without a compiler it is the reference, which is slow."""
    try:
        taken = registry.pick("adam_", "auto", torch.device(device))
    except (RuntimeError, ValueError) as error:
        return f"none ({error})"
    name = getattr(taken, "__name__", type(taken).__name__).rpartition(".")[2]
    return {"CpuBackend": "cpu", "CudaBackend": "cuda", "triton_kernels": "triton"}.get(name, name)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    """The first line that a program prints, or None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None
