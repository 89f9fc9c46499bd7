"""A checkpoint on disk: which files, how they are checked, and how one takes the place of another.

    DIRECTORY/latest              the name of the last complete checkpoint, one line
    DIRECTORY/step_1000/
        index.json                every tensor: dtype, shape, and where its boxes lie, with a CRC-32 each
        __0_0.distcp, ...         the boxes, as torch.distributed.checkpoint writes them, a file per rank
        .metadata                 torch's own index, for dcp.load(); never read here, for it is a pickle
        common.pt                 parameter groups, loss scale, step
        rank_00000.pt, ...        what each rank handed in beside them

A folder is written under another name, with every file and folder flushed, and renamed when it is complete; `latest`
moves after that. So a crash at any moment leaves the checkpoint before. No file here is unpickled: index.json is data,
and tensors and .pt files go through torch.load(weights_only=True), after their CRC-32 was found right.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

log = logging.getLogger("pyzero")

INDEX, LATEST, COMMON = "index.json", "latest", "common.pt"
FORMAT = 1
_THREADED_CRC_BYTES = 2**16  # from here on a CRC-32 takes longer than to ask another thread for it
_UNFINISHED = ".unfinished_"
_FOLDER = re.compile(r"step_\d+(\.\d+)?")
_FILE = re.compile(r"[\w.]+")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The one before it, and what was to be loaded into, are untouched."""


class Interrupted(Exception):
    """Its cause is a KeyboardInterrupt or SystemExit, which is raised once the other ranks have heard of it."""


def rank_file(rank: int) -> str:
    """The name of the file with what a rank handed in."""
    return f"rank_{rank:05d}.pt"


# ---- writing --------------------------------------------------------------------------------------------------------


class ChecksummedStream:
    """A binary stream that takes the CRC-32 of each item of a checkpoint: of what is written between two tell() calls.

    Args:
        raw: The file to write to.
        crcs: Filled: (length, CRC-32) by the item's offset in the file.
        progress: Called with numbers of bytes written.
    """

    def __init__(self, raw: BinaryIO, crcs: dict[int, tuple[int, int]], progress: Callable[[int], object]) -> None:
        self._raw = raw
        self._crcs = crcs
        self._progress = progress
        self._begin = self._crc = self._length = 0
        self._small = bytearray()  # written, and not yet in the file: torch.save writes a tensor in 40 calls
        self._crc_thread = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        """As a file's."""
        num_bytes = memoryview(data).nbytes
        self._length += num_bytes
        if num_bytes < _THREADED_CRC_BYTES:
            self._small += data
            return num_bytes
        self._put_small()
        crc = self._crc_of(data)  # both let go of the interpreter
        self._raw.write(data)
        self._crc = crc.result()
        self._progress(num_bytes)
        return num_bytes

    def _crc_of(self, data: Any) -> Future[int]:
        try:
            return self._crc_thread.submit(zlib.crc32, data, self._crc)
        except RuntimeError:  # of an interpreter that ends, and waits for an asynchronous save
            done: Future[int] = Future()
            done.set_result(zlib.crc32(data, self._crc))
            return done

    def _put_small(self) -> None:
        self._crc = zlib.crc32(self._small, self._crc)
        self._raw.write(self._small)
        self._progress(len(self._small))
        self._small.clear()

    def tell(self) -> int:
        """As a file's; ends an item, and begins the next."""
        self._put_small()
        if self._length:
            self._crcs[self._begin] = (self._length, self._crc)
        self._begin, self._crc, self._length = self._begin + self._length, 0, 0
        return self._begin

    def flush(self) -> None:
        """Nothing: torch asks for it after each item, and `fileno` does it."""

    def fileno(self) -> int:
        """As a file's: for fsync."""
        self._put_small()
        self._raw.flush()
        return self._raw.fileno()

    def close(self) -> None:
        """Whoever opened the file closes it."""
        self._crc_thread.shutdown()


def length_and_crc(content: bytes) -> tuple[int, int]:
    """The content's length and CRC-32."""
    return len(content), zlib.crc32(content)


def write_file(path: Path, content: bytes) -> None:
    """Write and flush a new file."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_bytes(value: Any, what: str) -> bytes:
    """Pickle by torch.save, and check that torch.load(weights_only=True) reads it.

    Raises:
        TypeError: It holds objects that cannot be loaded without running code.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:  # of pickle and of torch, many kinds
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise TypeError(
            f"expected tensors, numbers, strings, None, and lists, tuples and dicts of them in {what}, got more: "
            f"{reason.strip()}; pass plain data, as state_dict() of a scheduler gives"
        ) from error
    return file.getvalue()


def begin(directory: Path, step: int) -> Path:
    """An empty folder to write step `step` into, under a name that no reader looks at."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        flush_folder(directory.parent)
    for left in directory.glob(f"{_UNFINISHED}*"):  # a save, or a removal, that was killed
        _delete(left)
    names, number = {path.name for path in directory.iterdir()}, 0
    name = f"step_{step}"
    while name in names:  # it stays until this one is complete
        number += 1
        name = f"step_{step}.{number}"
    folder = directory / f"{_UNFINISHED}{name}"
    folder.mkdir()
    return folder


def name_of(folder: Path) -> str:
    """The name that an unfinished folder will have."""
    return folder.name.removeprefix(_UNFINISHED)


def commit(folder: Path, index: dict[str, Any], keep: int | None) -> Path:
    """The folder is complete: write its index, give it its name, and make it the latest. Returns it.

    keep: How many to leave, the newest; None: all but those of the same step.

    Raises:
        CheckpointError: Parts of a tensor are missing.
    """
    directory, name = folder.parent, name_of(folder)
    for tensor_name, tensor in index["tensors"].items():
        try:
            _check_boxes(tensor_name, tensor["shape"], [(box[0], box[1]) for box in tensor["boxes"]])
        except ValueError as error:  # as where a rank saved as if it were alone
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
        except OSError as error:  # the new one is there, which is what was asked for
            log.warning("%s could not be removed: %s", old, error.strerror)
    return complete


def _keep_in_order(index: Path, others: list[Path]) -> None:
    """Have it be the newest by its time, also where the clock was set back since the last save."""
    newest = max((other.stat().st_mtime_ns for other in others), default=0)
    if index.stat().st_mtime_ns <= newest:
        with suppress(OSError):  # a file system that does not know it
            os.utime(index, ns=(newest + 1, newest + 1))


def write_latest(directory: Path, text: str) -> None:
    """Replace `latest`, so that a crash at any moment leaves the old one or the new one, whole."""
    pointer = directory / f".{LATEST}"
    write_file(pointer, text.encode())
    pointer.replace(directory / LATEST)
    flush_folder(directory)


def remove(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that what a crash leaves of it is not taken for one."""
    doomed = folder.parent / f"{_UNFINISHED}{folder.name}"
    folder.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder; of a link, to a checkpoint that was moved elsewhere, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _complete(directory: Path) -> list[Path]:
    """Complete checkpoints, the first saved first. Not by step: a run may go back to an earlier one, and on from it."""
    found = [p for p in directory.iterdir() if _FOLDER.fullmatch(p.name) and (p / INDEX).is_file()]
    return sorted(found, key=lambda path: ((path / INDEX).stat().st_mtime_ns, _numbers(path.name)))


def _numbers(name: str) -> list[int]:
    """Of step_1000.1: 1000 and 1."""
    return [int(number) for number in name.removeprefix("step_").split(".")]


# ---- reading --------------------------------------------------------------------------------------------------------


def find(directory: Path) -> Path | None:
    """The folder of the latest checkpoint in a directory, or the directory itself where it is one; None without any.

    One alone is the latest: `latest` may be missing after a crash of the first save.

    Raises:
        CheckpointError: `latest` is damaged, or what it names is gone; or it is missing, beside several.
    """
    if (directory / INDEX).is_file():
        return directory
    if not directory.is_dir():
        return None
    others = [path.name for path in _complete(directory)]
    if not (directory / LATEST).is_file():
        if len(others) > 1:
            raise CheckpointError(
                f"expected {directory / LATEST} to name one of {', '.join(others)}, got no such file; load one by its "
                f"path, or write its name there"
            )
        return directory / others[0] if others else None
    name = (directory / LATEST).read_text(errors="replace").strip()
    if not _FOLDER.fullmatch(name) or name not in others:
        raise CheckpointError(
            f"expected {directory / LATEST} to name a checkpoint beside it, got {name[:80]!r}; load one of these by "
            f"its path: {', '.join(others) or 'there is none'}"
        )
    return directory / name


def read_index(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's index and check it: CRC-32, names inside the folder, tensors without gaps, sizes of files.

    Raises:
        CheckpointError: It is damaged, or of another format.
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
    """The name, or ValueError where it leads out of the folder."""
    if not _FILE.fullmatch(name) or name.startswith(".."):
        raise ValueError(f"it names {name!r}, which is no file beside it")
    return name


def _check_boxes(name: str, shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> None:
    """Check that the boxes lie inside the tensor, and have as many elements as it has."""
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
    """What torch.save has written to a part of a file."""

    name: str
    offset: int
    length: int
    crc: int

    def read(self, folder: Path) -> bytes:
        """Read and check its bytes, in any thread; the interpreter's lock is released meanwhile.

        Raises:
            CheckpointError: The file is missing or cut, or its bytes are not what was written.
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
        """Unpickle its bytes.

        Raises:
            CheckpointError: They hold more than tensors and plain data.
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
    """Open a file of a checkpoint; failures name it."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_remedy(path.parent)}") from error


def load_file(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """Read and unpickle a whole .pt file.

    Raises:
        CheckpointError: See Span.
    """
    span = Span(name, 0, *index["files"][name])
    return span.value_of(span.read(folder), folder)


def _remedy(folder: Path) -> str:
    """The end of an error message: which other checkpoint to load."""
    others = [path.name for path in _complete(folder.parent) if path != folder] if folder.parent.is_dir() else []
    return f"load another by its path: {', '.join(others)}" if others else "there is no other checkpoint beside it"
