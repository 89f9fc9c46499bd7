"""The files of a checkpoint: their names and content, how they are checked, and how a new one replaces an old one.

    DIRECTORY/latest              the name of the last complete checkpoint, in one line
    DIRECTORY/step_1000/
        index.json                every tensor: its dtype, its shape, the place of each of its boxes, and their CRC-32s
        __0_0.distcp, ...         the boxes, as torch.distributed.checkpoint writes them, one file per rank
        .metadata                 torch's own index, for dcp.load(). pyzero does not read it, because it is a pickle
        common.pt                 parameter groups, loss scale, the model's extra state, lists of names
        rank_00000.pt, ...        the `extra` values that each rank passed to save_checkpoint

A folder is written under a temporary name. Every file and folder is flushed. When the folder is complete it is renamed,
and `latest` is replaced after that. So a crash at any moment leaves the checkpoint before it. Reading runs no code from
a file: index.json is JSON, and tensors and .pt files are read by torch.load(weights_only=True) once their CRC-32 has
been checked.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

log = logging.getLogger("pyzero")

INDEX, LATEST, COMMON = "index.json", "latest", "common.pt"
FORMAT = 1
_UNFINISHED = ".unfinished_"
_FOLDER = re.compile(r"step_\d+(\.\d+)?")
_FILE = re.compile(r"[\w.]+")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. Earlier checkpoints, the model and the optimizer are unchanged."""


class Interrupted(Exception):
    """Wraps a KeyboardInterrupt or SystemExit, its `__cause__`, which is raised after the other ranks are told."""


def rank_file(rank: int) -> str:
    """Return the name of the file with the `extra` values of a rank."""
    return f"rank_{rank:05d}.pt"


# ---- writing --------------------------------------------------------------------------------------------------------


def length_and_crc(content: bytes) -> tuple[int, int]:
    """Return the content's length and CRC-32."""
    return len(content), zlib.crc32(content)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, and flush it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_bytes(value: Any, what: str) -> bytes:
    """Return a value as torch.save writes it. Check that torch.load(weights_only=True) reads it.

    what: Names the value in the error.

    Raises:
        TypeError: The value contains objects that cannot be loaded without running code.
    """
    try:
        try:
            return _to_safe_bytes(value)
        except Exception:
            return _to_safe_bytes(_with_plain_numbers(value))
    except Exception as error:  # pickle and torch raise many kinds
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise TypeError(
            f"expected tensors, numbers, strings, None, and lists, tuples and dicts of them in {what}, got more: "
            f"{reason.strip()}; pass plain data, as state_dict() of a scheduler gives"
        ) from error


def _to_safe_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return file.getvalue()


def _with_plain_numbers(value: Any) -> Any:
    """Replace numpy's numbers, as a schedule may compute them, by Python's, in nested dicts, lists and tuples too."""
    if type(value) in (dict, OrderedDict):
        return type(value)((_with_plain_numbers(key), _with_plain_numbers(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_with_plain_numbers, value))
    return value.item() if isinstance(value, np.generic) else value


def begin(directory: Path, step: int) -> Path:
    """Make an empty folder for the checkpoint of a step, and return it. Its temporary name hides it from readers."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        flush_folder(directory.parent)
    for left in directory.glob(f"{_UNFINISHED}*"):  # by a save or a removal that was killed
        _delete(left)
    names, number = {path.name for path in directory.iterdir()}, 0
    name = f"step_{step}"
    while name in names:  # the old one stays until the new one is complete
        number += 1
        name = f"step_{step}.{number}"
    folder = directory / f"{_UNFINISHED}{name}"
    folder.mkdir()
    return folder


def name_of(folder: Path) -> str:
    """Return the name that an unfinished folder gets when it is complete."""
    return folder.name.removeprefix(_UNFINISHED)


def commit(folder: Path, index: dict[str, Any], keep: int | None) -> Path:
    """Complete a folder: write its index, rename it, make it the latest, remove old checkpoints. Return its new path.

    Other checkpoints of the same step are always removed.

    keep: How many checkpoints remain, the newest ones; None: those of all other steps remain.

    Raises:
        CheckpointError: Parts of a tensor are missing.
    """
    directory, name = folder.parent, name_of(folder)
    for tensor_name, tensor in index["tensors"].items():
        try:
            _check_boxes(tensor_name, tensor["shape"], [(box[0], box[1]) for box in tensor["boxes"]])
        except ValueError as error:  # for example if a rank saved as if it were alone
            raise CheckpointError(f"{folder} is not complete: {error}; the checkpoint before it stays") from error
    body = json.dumps(index)
    write_file(folder / INDEX, json.dumps({"crc32": zlib.crc32(body.encode()), "index": body}).encode())
    _keep_in_order(folder / INDEX, [path / INDEX for path in _complete(directory)])
    flush_folder(folder)
    complete = directory / name
    folder.rename(complete)
    flush_folder(directory)
    write_latest(directory, f"{name}\n")
    same = [path for path in _complete(directory) if path != complete and path.name.split(".")[0] == name.split(".")[0]]
    older = [path for path in _complete(directory) if path != complete and path not in same]
    for old in same + ([] if keep is None else older[: max(len(older) - (keep - 1), 0)]):
        try:
            remove(old)
        except OSError as error:  # the new checkpoint is complete, so the save has succeeded
            log.warning("%s could not be removed: %s", old, error.strerror)
    return complete


def _keep_in_order(index: Path, others: list[Path]) -> None:
    """Make the index the newest by its modification time, even if the clock was set back since the last save."""
    newest = max((other.stat().st_mtime_ns for other in others), default=0)
    if index.stat().st_mtime_ns <= newest:
        with suppress(OSError):  # some file systems cannot set times
            os.utime(index, ns=(newest + 1, newest + 1))


def write_latest(directory: Path, text: str) -> None:
    """Replace the file `latest`. A crash at any moment leaves either the old file or the new one, whole."""
    pointer = directory / f".{LATEST}"
    write_file(pointer, text.encode())
    pointer.replace(directory / LATEST)
    flush_folder(directory)


def remove(folder: Path) -> None:
    """Remove a checkpoint. Rename it first, so that after a crash its rest is not taken for a checkpoint."""
    doomed = folder.parent / f"{_UNFINISHED}{folder.name}"
    folder.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder. If it is a link to a checkpoint that was moved elsewhere, delete only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _complete(directory: Path) -> list[Path]:
    """Return the complete checkpoints in the order of saving. Steps may differ from it: a run may resume earlier."""
    found = []
    for path in directory.iterdir():
        if _FOLDER.fullmatch(path.name) and (path / INDEX).is_file():
            with suppress(FileNotFoundError):  # another job may have removed it
                found.append(((path / INDEX).stat().st_mtime_ns, _numbers(path.name), path))
    return [path for _, _, path in sorted(found)]


def _holds_checkpoints(directory: Path, name: str) -> bool:
    """Return whether `latest` names a folder in the directory that has a `latest` itself, as an engine's tag is."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return False
    with suppress(OSError, ValueError):  # a name that is too long, or has a NUL
        return (directory / path / LATEST).is_file()
    return False


def _numbers(name: str) -> list[int]:
    """Return the numbers in a folder's name: [1000, 1] for step_1000.1."""
    return [int(number) for number in name.removeprefix("step_").split(".")]


# ---- reading --------------------------------------------------------------------------------------------------------


def find(directory: Path) -> Path | None:
    """Return the latest checkpoint in a directory, or the directory itself if it is one. None if there is none.

    Without the file `latest`, a single checkpoint is the latest: a crash may have prevented it in the first save.

    Raises:
        CheckpointError: `latest` is damaged, or names a checkpoint that is gone; or it is missing, and there are
            several checkpoints.
    """
    if (directory / INDEX).is_file():
        return directory
    if not directory.is_dir():
        return None
    if not (directory / LATEST).is_file():
        others = [path.name for path in _complete(directory)]
        if len(others) > 1:
            raise CheckpointError(
                f"expected {directory / LATEST} to name one of {', '.join(others)}, got no such file; load one by its "
                f"path, or write its name there"
            )
        return directory / others[0] if others else None
    name = None
    while name != (name := (directory / LATEST).read_text(errors="replace").strip()):  # again, for it may be replaced
        if name in (path.name for path in _complete(directory)):
            return directory / name
    wrong = f"expected {directory / LATEST} to name a checkpoint beside it, got {name[:80]!r}"
    if _holds_checkpoints(directory, name):
        raise CheckpointError(
            f"{wrong}, which is itself a folder of checkpoints, as an engine saves them; pass {directory / name}"
        )
    others = [path.name for path in _complete(directory)]
    raise CheckpointError(f"{wrong}; load one of these by its path: {', '.join(others) or 'there is none'}")


def read_index(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's index. Check its CRC-32, that names stay in the folder, boxes of tensors, sizes of files.

    Raises:
        CheckpointError: The index is damaged or has another format, or a file is missing or cut.
    """
    path = folder / INDEX
    try:
        outer = json.loads(path.read_bytes())
        body = outer["index"]
        if zlib.crc32(body.encode()) != outer["crc32"]:
            raise ValueError("its CRC-32 is another")
        index: dict[str, Any] = json.loads(body)
        if index["format"] != FORMAT:
            raise ValueError(f"it has format {index['format']}, expected {FORMAT}; update pyzero")
        names = [*index["files"], *(box[2] for tensor in index["tensors"].values() for box in tensor["boxes"])]
        for name in names:
            _inside(name)
        for name, tensor in index["tensors"].items():
            if not isinstance(getattr(torch, tensor["dtype"]), torch.dtype):
                raise ValueError(f"{name} has dtype {tensor['dtype']!r}")
            _check_boxes(name, tensor["shape"], [(box[0], box[1]) for box in tensor["boxes"]])
        sizes = {_inside(name): int(size) for name, size in index["sizes"].items()}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {_remedy(folder)}") from error
    for name, size in sizes.items():
        with _reading(folder / name) as file:
            if (got := os.fstat(file.fileno()).st_size) != size:
                raise CheckpointError(f"{folder / name} is cut: expected {size} bytes, got {got}; {_remedy(folder)}")
    return index


def _inside(name: str) -> str:
    """Return the name of a file. Raise ValueError if it leads out of the folder."""
    if not _FILE.fullmatch(name) or name.startswith(".."):
        raise ValueError(f"it names {name!r}, which is no file beside it")
    return name


def _check_boxes(name: str, shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> None:
    """Raise ValueError if a box is not inside the tensor, or the boxes have more or fewer elements than the tensor."""
    count = 0
    for offsets, sizes in boxes:
        inside = all(
            0 <= low and 0 <= size and low + size <= most for low, size, most in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"{name} has a box outside of its shape {shape}")
        count += torch.Size(sizes).numel()
    if count != torch.Size(shape).numel():
        raise ValueError(f"{name} has {count} elements, expected {torch.Size(shape).numel()}")


@dataclass(frozen=True, order=True)
class Span:
    """A part of a file, written by one call of torch.save."""

    name: str
    offset: int
    length: int
    crc: int

    def read(self, folder: Path) -> bytes:
        """Read the bytes and check their CRC-32. May run in any thread, and releases the interpreter's lock.

        Raises:
            CheckpointError: The file is missing or cut, or its bytes are not those that were written.
        """
        path = folder / self.name
        with _reading(path) as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) != self.length:
            raise CheckpointError(f"{path} is cut: expected {self.length} bytes, got {len(content)}; {_remedy(folder)}")
        if zlib.crc32(content) != self.crc:
            raise CheckpointError(f"{path} is damaged: its CRC-32 is not what was written; {_remedy(folder)}")
        return content

    def value_of(self, content: bytes, folder: Path) -> Any:
        """Unpickle the bytes that `read` returned.

        Raises:
            CheckpointError: They contain more than tensors and plain data.
        """
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{folder / self.name} holds more than tensors and plain data, which may run code, and is not loaded: "
                f"{reason}"
            ) from error


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """A context with an open file of a checkpoint. An OSError in it becomes a CheckpointError that names the file."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_remedy(path.parent)}") from error


def load_file(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """Return the content of a .pt file. index: From `read_index`.

    Raises:
        CheckpointError: See Span.
    """
    span = Span(name, 0, *index["files"][name])
    return span.value_of(span.read(folder), folder)


def _remedy(folder: Path) -> str:
    """Return the end of an error message, which says what other checkpoint can be loaded."""
    others = [path.name for path in _complete(folder.parent) if path != folder] if folder.parent.is_dir() else []
    return f"load another by its path: {', '.join(others)}" if others else "there is no other checkpoint beside it"
