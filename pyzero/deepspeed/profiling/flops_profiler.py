"""deepspeed.profiling.flops_profiler: a model's floating-point operations by module, by torch's FlopCounterMode.

It counts matrix products, convolutions and attention, but not element-wise operations, of which DeepSpeed counts some.
Counts are this rank's, except that a layer that several ranks split counts for all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.sections import FlopsProfilerSection

log = logging.getLogger("pyzero")

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


class FlopsProfiler:
    """Counts operations between start_profile() and stop_profile(), including those of a backward.

    Args:
        model: The model whose modules the table lists.
        ds_engine: Ignored.
        recompute_fwd_factor: Ignored.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self._mode: FlopCounterMode | None = None
        self._hooks: list[Any] = []
        self._started: list[float] = []
        self._counts: dict[str, int] = {}
        self._seconds = 0.0

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Clear the counts and start to count.

        Raises:
            ValueError: There is an ignore_list.
        """
        if ignore_list:
            raise ValueError(
                "got modules to ignore, wanted none: operations are counted where they run; leave them out"
            )
        self.end_profile()
        self._mode = FlopCounterMode(display=False)
        self._mode.__enter__()
        self._hooks = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        ]

    def _before(self, *args: Any) -> None:
        self._started.append(_now())

    def _after(self, *args: Any) -> None:
        self._seconds += _now() - self._started.pop()

    def stop_profile(self) -> None:
        """Stop counting, and keep the counts."""
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._counts = {name: sum(ops.values()) for name, ops in self._mode.get_flop_counts().items()}
        self._mode, self._hooks = None, []

    def reset_profile(self) -> None:
        """Clear the counts."""
        self._counts = {}
        self._seconds = 0.0
        self._started.clear()

    def end_profile(self) -> None:
        """Stop counting, and clear the counts."""
        self.stop_profile()
        self.reset_profile()

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Return the number of floating-point operations. A multiply-add counts as two."""
        flops = self._counts.get("Global", 0)
        return flops_to_string(flops) if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Return the number of multiply-adds."""
        macs = self._counts.get("Global", 0) // 2
        return macs_to_string(macs) if as_string else macs

    def get_total_params(self, as_string: bool = False) -> Any:
        """Return the number of elements of the model's parameters."""
        num = sum(param.numel() for param in self.model.parameters())
        return params_to_string(num) if as_string else num

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Return the seconds spent in the model's forward."""
        return duration_to_string(self._seconds) if as_string else self._seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print the table, or write it to a file.

        Args:
            profile_step: Step number for the heading.
            module_depth: Depth to which modules are listed; -1: all.
            top_modules: Ignored; all modules of a depth are listed.
            detailed: False prints only the totals.
            output_file: File to write; default: standard output.
        """
        text = self.table(profile_step, module_depth if detailed else 0)
        if output_file:
            Path(output_file).write_text(f"{text}\n")
        else:
            print(text)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Print the table."""
        self.print_model_profile(module_depth=module_depth, top_modules=top_modules)

    def table(self, profile_step: int = 1, module_depth: int = -1) -> str:
        """Return a readable table of the totals, and of the operations of each module."""
        root, seconds = type(self.model).__name__, self._seconds
        rows = {
            "parameters": self.get_total_params(as_string=True),
            "multiply-adds": self.get_total_macs(as_string=True),
            "floating-point operations": self.get_total_flops(as_string=True),
            "seconds in forward": f"{seconds:.3g}",
            "operations per second": flops_to_string(self.get_total_flops() / seconds) if seconds else "",
        }
        lines = [f"flops profile of {root} at step {profile_step}"]
        lines += [f"  {name:<28}{value:>16}" for name, value in rows.items()]
        for name, flops in self._counts.items():
            depth = name.count(".")
            if name != "Global" and (module_depth < 0 or depth <= module_depth) and depth > 0:
                lines.append(f"  {'  ' * (depth - 1)}{name.partition('.')[2]:<46}{flops_to_string(flops):>16}")
        return "\n".join(lines)


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Return (floating-point operations, multiply-adds, parameters) of one forward.

    Args:
        model: A model, already on its device and in train or eval mode.
        input_shape: Shape of a tensor of ones to pass as the only argument, instead of args.
        args: Arguments of the forward.
        kwargs: Keyword arguments of the forward.
        print_profile: Print the table, or write it to output_file.
        detailed: See print_model_profile.
        module_depth: See print_model_profile.
        top_modules: See print_model_profile.
        warm_up: Forwards before the one that is counted.
        as_string: False returns numbers.
        output_file: File for the table; default: standard output.
        ignore_modules: Not supported.
        mode: Method to call: "forward" or "generate".

    Raises:
        ValueError: There is neither input_shape nor arguments, or there are modules to ignore.
    """
    if input_shape is None and not args and not kwargs:
        raise ValueError("expected input_shape, args or kwargs of the forward, got none; pass one of these")
    given = list(args or ())
    if input_shape is not None:
        like = next(model.parameters(), torch.empty(0))
        given = [torch.ones(tuple(input_shape), dtype=like.dtype, device=like.device)]
    call: Any = model if mode == "forward" else model.generate
    for _ in range(warm_up):
        call(*given, **(kwargs or {}))
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_modules)
    try:
        call(*given, **(kwargs or {}))
    finally:
        profiler.stop_profile()
    if print_profile:
        profiler.print_model_profile(1, module_depth, top_modules, detailed, output_file)
    return profiler.get_total_flops(as_string), profiler.get_total_macs(as_string), profiler.get_total_params(as_string)


class StepProfile:
    """The config's flops_profiler: counts the first forward after `profile_step` steps on rank 0, and reports it."""

    def __init__(self, section: FlopsProfilerSection, model: nn.Module, is_first: bool) -> None:
        self._section = section
        self._model = model
        self._waits = section.enabled and section.profile_step >= 0 and is_first

    @contextmanager
    def around(self, steps: int) -> Iterator[None]:
        """A context around each forward. steps: Optimizer steps before this forward."""
        if not self._waits or steps < self._section.profile_step:
            yield
            return
        self._waits = False
        profiler = FlopsProfiler(self._model)
        profiler.start_profile()
        try:
            yield
        finally:
            profiler.stop_profile()
        depth = self._section.module_depth if self._section.detailed else 0
        if self._section.output_file:
            profiler.print_model_profile(steps, depth, output_file=self._section.output_file)
        else:
            log.info("%s", profiler.table(steps, depth))


def _now() -> float:
    """Return the time; on a GPU, after waiting for it."""
    if launcher.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """Format a number with a unit, as "1.50 M". units: "T", "G", "M", "K" or ""; default: the largest that fits."""
    fits = next(((size, name) for size, name in _UNITS if abs(num) >= size), (1.0, ""))
    size, name = fits if units is None else next(((s, n) for s, n in _UNITS if n == units), (1.0, ""))
    return f"{num / size:.{precision}f} {name}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """Format floating-point operations, as "1.50 MFLOPS"."""
    return f"{number_to_string(flops, None if units is None else units.removesuffix('FLOPS'), precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """Format multiply-adds, as "1.50 MMACs"."""
    return f"{number_to_string(macs, None if units is None else units.removesuffix('MACs'), precision)}MACs"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """Format a number of parameters, as "1.50 M"."""
    return number_to_string(params_num, units, precision).rstrip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """Format seconds, as "1.50 ms"."""
    sizes = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    unit = units or next((name for name, size in sizes.items() if duration >= size), "us")
    return f"{duration / sizes[unit]:.{precision}f} {unit}"
