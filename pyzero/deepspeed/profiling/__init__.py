"""DeepSpeed's profilers by name."""

from pyzero.deepspeed.profiling import flops_profiler

__all__ = ["flops_profiler"]
