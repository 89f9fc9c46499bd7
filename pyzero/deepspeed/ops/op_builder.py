"""deepspeed.ops.op_builder: what scripts ask of it, whether an op can run and that it be built, of pyzero's own ops."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, ClassVar

import torch

from pyzero.ops import registry


class OpBuilder:
    """One op of DeepSpeed's name, in whose place pyzero's runs; none where `op` is empty."""

    NAME: ClassVar[str] = ""
    op: ClassVar[str] = ""
    device_type: ClassVar[str] = "cpu"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether there is one for the device: on a CPU always, on a GPU where there is one."""
        return bool(self.op) and (self.device_type == "cpu" or torch.cuda.is_available())

    def load(self, verbose: bool = True) -> ModuleType:
        """pyzero.ops, with the best backend of this op there is, built now where it is not yet.

        Raises:
            NotImplementedError: There is nothing in its place.
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
    """Buckets, flat."""

    NAME, op = "utils", "pack_"


ALL_OPS = {
    builder.NAME: builder()
    for builder in (CPUAdamBuilder, CPULionBuilder, FusedAdamBuilder, FusedLionBuilder, UtilsBuilder)
}


def __getattr__(name: str) -> Any:
    """Of another op: a builder that says it cannot."""
    if not name.endswith("Builder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (OpBuilder,), {"NAME": name.removesuffix("Builder"), "__doc__": "There is none."})
