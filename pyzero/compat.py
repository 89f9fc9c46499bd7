"""compat.install() makes `import deepspeed` mean pyzero.deepspeed, for scripts that cannot be edited."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_OURS = "pyzero.deepspeed"

# deepspeed.X -> pyzero.deepspeed.Y; "" is a package that only contains others.
_MODULES = {
    "": _OURS,
    "accelerator": f"{_OURS}.accelerator",
    "accelerator.real_accelerator": f"{_OURS}.accelerator",
    "checkpoint": "",
    "checkpoint.constants": f"{_OURS}.checkpoint_constants",
    "checkpoint.utils": f"{_OURS}.utils",
    "checkpointing": f"{_OURS}.checkpointing",
    "comm": f"{_OURS}.comm",
    "comm.comm": f"{_OURS}.comm",
    "constants": f"{_OURS}.constants",
    "module_inject": "",
    "module_inject.layers": f"{_OURS}.parallel.tensor_parallel",
    "monitor": "",
    "monitor.monitor": f"{_OURS}.monitor",
    "ops": f"{_OURS}.ops",
    "ops.adam": f"{_OURS}.ops.adam",
    "ops.adam.cpu_adam": f"{_OURS}.ops.adam",
    "ops.adam.fused_adam": f"{_OURS}.ops.adam",
    "ops.lamb": f"{_OURS}.ops.lamb",
    "ops.lion": f"{_OURS}.ops.lion",
    "ops.op_builder": f"{_OURS}.ops.op_builder",
    "pipe": f"{_OURS}.pipe",
    "profiling": "",
    "profiling.flops_profiler": f"{_OURS}.profiling.flops_profiler",
    "profiling.flops_profiler.profiler": f"{_OURS}.profiling.flops_profiler",
    "runtime": "",
    "runtime.activation_checkpointing": "",
    "runtime.activation_checkpointing.checkpointing": f"{_OURS}.checkpointing",
    "runtime.base_optimizer": "pyzero.optimizer",
    "runtime.config": f"{_OURS}.config.deepspeed_config",
    "runtime.dataloader": f"{_OURS}.engine.data",
    "runtime.engine": f"{_OURS}.engine.engine",
    "runtime.fp16": "",
    "runtime.fp16.loss_scaler": f"{_OURS}.loss_scaler",
    "runtime.lr_schedules": f"{_OURS}.schedules",
    "runtime.pipe": f"{_OURS}.pipe",
    "runtime.pipe.engine": f"{_OURS}.pipe.engine",
    "runtime.pipe.module": f"{_OURS}.pipe",
    "runtime.pipe.topology": f"{_OURS}.pipe.topology",
    "runtime.utils": f"{_OURS}.utils",
    "runtime.zero": f"{_OURS}.zero",
    "runtime.zero.config": f"{_OURS}.zero",
    "runtime.zero.offload_config": f"{_OURS}.offload_config",
    "runtime.zero.partition_parameters": f"{_OURS}.zero",
    "runtime.zero.stage3": f"{_OURS}.estimates",
    "runtime.zero.stage_1_and_2": f"{_OURS}.estimates",
    "runtime.zero.tensor_fragment": f"{_OURS}.utils",
    "runtime.zero.utils": f"{_OURS}.zero",
    "utils": f"{_OURS}.utils",
    "utils.groups": f"{_OURS}.parallel.groups",
    "utils.logging": f"{_OURS}.utils",
    "utils.tensor_fragment": f"{_OURS}.utils",
    "utils.timer": f"{_OURS}.timers",
    "utils.torch": f"{_OURS}.utils",
    "utils.zero_to_fp32": f"{_OURS}.zero_to_fp32",
    "zero": f"{_OURS}.zero",
}
_OTHER_NAMES = {
    "runtime.base_optimizer": {"DeepSpeedOptimizer": "ZeroOptimizer", "ZeROOptimizer": "ZeroOptimizer"},
    "runtime.dataloader": {"DeepSpeedDataLoader": "Loader"},
    "runtime.engine": {"DeepSpeedEngine": "Engine"},
}


class _Facade(ModuleType):
    """A module with DeepSpeed's name and the attributes of one of pyzero's modules."""

    def __init__(self, name: str, below: str, target: str) -> None:
        super().__init__(name, f"Stands in for {name}: see {target or 'the modules below it'}.")
        self.__path__: list[str] = []  # a package; only _Finder finds modules in it
        self._below = below
        self._target = importlib.import_module(target) if target else None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__version__":
            child = f"{self._below}.{name}".lstrip(".")
            if child in _MODULES:
                return importlib.import_module(f"deepspeed.{child}")
            if self._target is not None:
                own = _OTHER_NAMES.get(self._below, {}).get(name, name)
                return getattr(self._target, own)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Metadata(Distribution):
    """Metadata of a package deepspeed: transformers and accelerate ask for its version before they import it."""

    def read_text(self, filename: str) -> str | None:
        """Return the package's name and version."""
        version = importlib.import_module(_OURS).__version__
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\nSummary: pyzero stands in\n",
            "top_level.txt": "deepspeed\n",
        }.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Return a path beside this file, because the package has no files."""
        return Path(__file__).parent / path


class _Finder(DistributionFinder, Loader):
    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """Yield the metadata if the caller asks for all distributions, or for deepspeed."""
        if context is None or context.name in (None, "deepspeed"):
            yield _Metadata()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the stand-in for a module of DeepSpeed; None for other packages.

        Raises:
            ModuleNotFoundError: pyzero has no stand-in for this module of DeepSpeed.
        """
        package, _, below = fullname.partition(".")
        if package != "deepspeed":
            return None
        if below not in _MODULES:
            raise ModuleNotFoundError(
                f"pyzero stands in for deepspeed, and has nothing for {fullname}; docs/deepspeed.md says what there is",
                name=fullname,
            )
        return ModuleSpec(fullname, self, origin=_MODULES[below], is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        below = spec.name.partition(".")[2]
        return _Facade(spec.name, below, _MODULES[below])

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, because the module is ready."""


def install() -> None:
    """Make `import deepspeed`, and imports from it, mean pyzero.deepspeed in this process.

    A second call does nothing.

    Raises:
        RuntimeError: The real deepspeed was imported before.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "deepspeed" in sys.modules:
        where = getattr(sys.modules["deepspeed"], "__file__", None)
        raise RuntimeError(
            f"expected pyzero.compat.install() before the first `import deepspeed`, got one from {where}; call "
            f"install() at the very top of the script"
        )
    sys.meta_path.insert(0, _Finder())
