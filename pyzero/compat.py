"""`import deepspeed` for scripts that cannot be edited: compat.install() makes it mean pyzero.deepspeed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OURS = "pyzero.deepspeed"

# deepspeed.X -> pyzero.deepspeed.Y; "" is a package that holds others alone.
_MODULES = {
    "": _OURS,
    "accelerator": f"{_OURS}.accelerator",
    "accelerator.real_accelerator": f"{_OURS}.accelerator",
    "checkpointing": f"{_OURS}.checkpointing",
    "comm": f"{_OURS}.comm",
    "comm.comm": f"{_OURS}.comm",
    "ops": f"{_OURS}.ops",
    "ops.adam": f"{_OURS}.ops.adam",
    "ops.adam.cpu_adam": f"{_OURS}.ops.adam",
    "ops.adam.fused_adam": f"{_OURS}.ops.adam",
    "ops.lamb": f"{_OURS}.ops.lamb",
    "ops.lion": f"{_OURS}.ops.lion",
    "runtime": "",
    "runtime.activation_checkpointing": "",
    "runtime.activation_checkpointing.checkpointing": f"{_OURS}.checkpointing",
    "runtime.config": f"{_OURS}.config_view",
    "runtime.dataloader": f"{_OURS}.utils",
    "runtime.engine": f"{_OURS}.engine",
    "runtime.lr_schedules": f"{_OURS}.schedules",
    "runtime.utils": f"{_OURS}.utils",
    "runtime.zero": f"{_OURS}.zero",
    "runtime.zero.partition_parameters": f"{_OURS}.zero",
    "runtime.zero.tensor_fragment": f"{_OURS}.utils",
    "utils": f"{_OURS}.utils",
    "utils.logging": f"{_OURS}.utils",
    "zero": f"{_OURS}.zero",
}
_OTHER_NAMES = {"runtime.engine": {"DeepSpeedEngine": "Engine"}}


class _Facade(ModuleType):
    """A module of DeepSpeed's name, whose attributes are those of one of ours."""

    def __init__(self, name: str, below: str, target: str) -> None:
        super().__init__(name, f"Stands in for {name}: see {target or 'the modules below it'}.")
        self.__path__: list[str] = []  # a package, in which nothing is found but by the finder
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


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Ours, of what is DeepSpeed's.

        Raises:
            ModuleNotFoundError: DeepSpeed may have it, and pyzero has nothing in its place.
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
        """Nothing: it is ready."""


def install() -> None:
    """From now on `import deepspeed`, and what scripts import of it, mean pyzero.deepspeed in this process.

    Called twice it does nothing more.

    Raises:
        RuntimeError: The real deepspeed has been imported already.
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
