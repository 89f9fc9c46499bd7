"""deepspeed.accelerator: one object that is torch.cuda where there is a GPU, and answers as much for the CPU."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyzero.deepspeed import launcher

# Of torch.cuda, by DeepSpeed's names; on a CPU they count nothing and do nothing.
_COUNTS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
)
_ACTIONS = (
    "empty_cache",
    "synchronize",
    "reset_peak_memory_stats",
    "set_device",
    "current_stream",
    "default_stream",
)
_OF_TORCH = ("get_rng_state", "set_rng_state", "initial_seed")  # which torch.cuda has, too


class Accelerator:
    """The device that this process computes on."""

    def __init__(self) -> None:
        self._has_gpu = torch.cuda.is_available()
        self._name = "cuda" if self._has_gpu else "cpu"

    def __getattr__(self, name: str) -> Any:
        """`memory_allocated`, `empty_cache` and their like."""
        if self.__dict__.get("_has_gpu") and hasattr(torch.cuda, name):
            return getattr(torch.cuda, name)
        if name in _COUNTS:
            return lambda *args, **kwargs: 0
        if name in _ACTIONS:
            return lambda *args, **kwargs: None
        if name in _OF_TORCH:
            return getattr(torch, name)
        raise AttributeError(f"the accelerator {self.__dict__.get('_name')} has no {name!r}; use torch's own")

    def is_available(self) -> bool:
        """True."""
        return True

    def device_name(self, device_index: int | None = None) -> str:
        """Such as "cuda", "cuda:1" or "cpu"."""
        return self._name if device_index is None or not self._has_gpu else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which that GPU is the current one."""
        return torch.cuda.device(device_index) if self._has_gpu else nullcontext()

    def device_count(self) -> int:
        """Of this host; 1 for the CPU."""
        return torch.cuda.device_count() if self._has_gpu else 1

    def current_device(self) -> int | str:
        """The GPU's index, or "cpu"."""
        return torch.cuda.current_device() if self._has_gpu else "cpu"

    def current_device_name(self) -> str:
        """Such as "cuda:0" or "cpu"."""
        return f"cuda:{torch.cuda.current_device()}" if self._has_gpu else "cpu"

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the GPU, or of this host."""
        if self._has_gpu:
            return int(torch.cuda.mem_get_info(device_index)[1])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes that nobody has taken."""
        if self._has_gpu:
            return int(torch.cuda.mem_get_info(device_index)[0])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def is_synchronized_device(self) -> bool:
        """Whether an op has ended when its call returns."""
        return not self._has_gpu

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which work goes to a stream of the GPU."""
        return torch.cuda.stream(stream) if self._has_gpu else nullcontext()

    def range_push(self, msg: str) -> None:
        """Begin a range of NVTX."""
        if self._has_gpu:
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self) -> None:
        """End it."""
        if self._has_gpu:
            torch.cuda.nvtx.range_pop()

    def communication_backend_name(self) -> str:
        """Of the process group: "nccl" or "gloo"."""
        return "nccl" if self._has_gpu else "gloo"

    def manual_seed(self, seed: int) -> Any:
        """torch's."""
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        """torch's."""
        return torch.cuda.manual_seed_all(seed) if self._has_gpu else torch.manual_seed(seed)

    def random(self) -> Any:
        """torch.random."""
        return torch.random

    def is_bf16_supported(self) -> bool:
        """As torch says."""
        return torch.cuda.is_bf16_supported() if self._has_gpu else True

    def is_fp16_supported(self) -> bool:
        """True."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """fp32, fp16, bf16."""
        return [torch.float32, torch.float16, torch.bfloat16]

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """torch's on a GPU; the tensor itself elsewhere."""
        return tensor.pin_memory() if self._has_gpu else tensor

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Whether it lies on this kind of device."""
        return tensor.device.type == self._name

    def local_device(self) -> torch.device:
        """Of this process, by LOCAL_RANK."""
        return launcher.device()


@functools.cache
def get_accelerator() -> Accelerator:
    """The accelerator of this process."""
    return Accelerator()
