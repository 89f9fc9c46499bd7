"""Weights as one safetensors file, streamed: what is converted or loaded is in memory one tensor at a time.

The format: 8 bytes with the length of the header, the header in JSON, the bytes of all tensors. The safetensors package
writes it from a dict that holds every tensor as it is to be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pyzero.checkpoint.files import flush_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_METADATA = "__metadata__"  # in the header, beside the tensors' names


def export_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    tied: Mapping[str, str] | None = None,
    load: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a model's weights and buffers by name to a file that transformers' `from_pretrained` loads.

    The file appears whole or not at all: what was at `path` stays until the new one is on the disk.

    Args:
        tensors: By name, as of `model.state_dict()` or of fp32 masters. With `load` those on the meta device will do.
        path: Of the file.
        dtype: Floating-point tensors are converted to it; None: each is written as it is.
        tied: Names that are not written, and the name that is in place of each. Default: a tensor that lies in the same
            memory as one before it is not written; loading ties it again.
        load: Called once per name when its tensor is written, and returns it: so one after the other is in memory.

    Raises:
        ValueError: A dtype that the format lacks, values too large for `dtype`, a name of `tied` that is not there,
            or a loaded tensor of another shape.
        OSError: The file could not be written.
    """
    names = _names(tensors, _shared(tensors) if tied is None else tied)
    dtypes = {name: _dtype_of(name, tensors[name], dtype) for name in names}
    names.sort(key=lambda name: (-dtypes[name].itemsize, name))  # the package's order, so that each is aligned
    header = _header({name: (dtypes[name], tensors[name].shape) for name in names})
    with atomic_file(Path(path)) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in names:
            tensor = tensors[name] if load is None else _loaded(name, tensors[name], load)
            file.write(_bytes(name, tensor, dtypes[name]))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is written and on the disk, or leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file = open(temporary, "xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to show
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are one that came before, and its name."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        if (before := first.setdefault(memory_identity(tensor), name)) != name:
            shared[name] = before
    return shared


def memory_identity(tensor: Tensor) -> tuple[object, ...]:
    """What tied tensors have in common; another view of the same memory, as a transposed one, has another."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _names(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> list[str]:
    names = [name for name in tensors if name not in tied]
    lost = {name: kept for name, kept in tied.items() if kept not in names}
    if lost:
        raise ValueError(f"expected tied names to stand for ones that are written, got {lost}; correct tied=")
    if _METADATA in names:
        raise ValueError(f"got a tensor named {_METADATA}, which the format uses itself; rename it")
    return names


def _dtype_of(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    chosen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if chosen not in _CODES:
        raise ValueError(f"expected a dtype that safetensors has, got {name} in {chosen}; convert it, or leave it out")
    return chosen


def _header(tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> bytes:
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}  # without which transformers refuses the file
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the data begins at a multiple of 8


def _loaded(name: str, wanted: Tensor, load: Callable[[str], Tensor]) -> Tensor:
    tensor = load(name)
    if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(
            f"expected {name} of shape {tuple(wanted.shape)} in {wanted.dtype}, got {tuple(tensor.shape)} in "
            f"{tensor.dtype}; load what was announced"
        )
    return tensor


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    tensor = tensor.detach().cpu()
    converted = tensor.to(dtype).contiguous()
    may_overflow = dtype != tensor.dtype and torch.finfo(dtype).max < 1e30  # bf16 ends where fp32 does
    if may_overflow and bool(converted.isinf().any()) and not torch.equal(converted.isinf(), tensor.isinf()):
        raise ValueError(f"expected values that {dtype} holds, got larger ones in {name}; export in bf16 or fp32")
    return converted.reshape(-1).view(torch.uint8).numpy().data
