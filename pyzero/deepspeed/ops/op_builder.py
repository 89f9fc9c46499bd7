"""deepspeed.ops.op_builder: builders that report whether pyzero's ops can run, and build them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, ClassVar

import torch

from pyzero.ops import registry


class OpBuilder:
    """A builder of DeepSpeed's op NAME. `op` is pyzero's op in its place; empty if there is none."""

    NAME: ClassVar[str] = ""
    op: ClassVar[str] = ""
    device_type: ClassVar[str] = "cpu"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Return whether pyzero has the op, and this machine its device."""
        return bool(self.op) and (self.device_type == "cpu" or torch.cuda.is_available())

    def load(self, verbose: bool = True) -> ModuleType:
        """Build the best backend of the op, unless it is built already. Return the module pyzero.ops.

        Raises:
            NotImplementedError: pyzero has no op in its place.
        """
        if not self.op:
            raise NotImplementedError(f"pyzero has nothing in the place of DeepSpeed's {self.NAME}; leave it out")
        registry.pick(self.op, "auto", torch.device(self.device_type))
        return importlib.import_module("pyzero.ops")


class CPUAdamBuilder(OpBuilder):
    """Adam on a CPU."""

    NAME, op = "cpu_adam", "adam_"


class CPULionBuilder(OpBuilder):
    """Lion on a CPU."""

    NAME, op = "cpu_lion", "lion_"


class FusedAdamBuilder(OpBuilder):
    """Adam on a GPU."""

    NAME, op, device_type = "fused_adam", "adam_", "cuda"


class FusedLionBuilder(OpBuilder):
    """Lion on a GPU."""

    NAME, op, device_type = "fused_lion", "lion_", "cuda"


class UtilsBuilder(OpBuilder):
    """Packing of tensors into flat buffers."""

    NAME, op = "utils", "pack_"


ALL_OPS = {
    builder.NAME: builder()
    for builder in (CPUAdamBuilder, CPULionBuilder, FusedAdamBuilder, FusedLionBuilder, UtilsBuilder)
}


def __getattr__(name: str) -> Any:
    """Return a builder for any other op name. It reports that it cannot run."""
    if not name.endswith("Builder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (OpBuilder,), {"NAME": name.removesuffix("Builder"), "__doc__": "There is none."})
