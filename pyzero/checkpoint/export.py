"""Write weights to one safetensors file, with one converted or loaded tensor in memory at a time.

The format: 8 bytes with the length of the header, the header in JSON, the bytes of all tensors. The safetensors package
is not used, because it needs all converted tensors in memory at once.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pyzero.checkpoint.files import flush_folder

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

    The file appears whole or not at all. A file that was at `path` stays until the new one is on disk.

    Args:
        tensors: Tensors by name, such as `model.state_dict()` or fp32 masters. With `load` they may be on the meta
            device.
        path: The file.
        dtype: Convert floating-point tensors to it. None: write each in its own dtype.
        tied: Names that are not written, each with the written name that replaces it. Default: a tensor in the same
            memory as one before it is not written, and loading the model ties it again.
        load: Returns the tensor of a name. It is called when that tensor is written, so one is in memory at a time.

    Raises:
        ValueError: The format lacks a dtype, values are too large for `dtype`, a tied name's replacement is not
            written, or a loaded tensor has another shape or dtype.
        OSError: The file could not be written.
    """
    names = _names(tensors, _shared(tensors) if tied is None else tied)
    dtypes = {name: _dtype_of(name, tensors[name], dtype) for name in names}
    names.sort(key=lambda name: (-dtypes[name].itemsize, name))  # the package's order; it aligns each tensor
    header = _header({name: (dtypes[name], tensors[name].shape) for name in names})
    with atomic_file(Path(path)) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in names:
            tensor = tensors[name] if load is None else _loaded(name, tensors[name], load)
            file.write(_bytes(name, tensor, dtypes[name]))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is written and on disk. On an error it leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # one that a kill has left is not met again
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
    """Return the names of tensors that repeat an earlier one, each with the earlier name."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        if (before := first.setdefault(memory_identity(tensor), name)) != name:
            shared[name] = before
    return shared


def memory_identity(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tied tensors. Other views of the same memory, such as a transpose, differ."""
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
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}  # transformers refuses a file without it
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
    may_overflow = dtype != tensor.dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if may_overflow and _has_overflowed(tensor, converted):
        raise ValueError(f"expected values that {dtype} holds, got larger ones in {name}; export in {tensor.dtype}")
    return converted.reshape(-1).view(torch.uint8).numpy().data


def _has_overflowed(tensor: Tensor, converted: Tensor) -> bool:
    if converted.dtype == torch.float8_e4m3fn:  # it has no inf, and torch makes larger values its largest
        return bool((tensor.abs() > torch.finfo(converted.dtype).max).any())
    readable = converted.float() if converted.dtype.itemsize == 1 else converted  # torch asks no float8 for inf
    return not torch.equal(readable.isfinite(), tensor.isfinite())
