"""Writes and reads the tensors of a checkpoint by torch.distributed.checkpoint, with a CRC-32 for each item."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from pyzero import memory
from pyzero.checkpoint.checksummed_stream import ChecksummedStream
from pyzero.checkpoint.files import CheckpointError, Interrupted, Span

# torch's save() and load() call _save_state_dict and _load_state_dict. They also warn if there is only one rank, and a
# filter for that warning would apply to all threads.
_READERS = 2  # threads, because a CRC-32 takes twice as long as the copies after it
Crcs = dict[tuple[str, int], tuple[int, int]]  # (length, CRC-32) of each item, by its file and offset


class _ChecksummedFiles(FileSystem):
    def __init__(self, crcs: Crcs, progress: Callable[[int], object]) -> None:
        self._crcs = crcs
        self._progress = progress

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            found: dict[int, tuple[int, int]] = {}
            stream = ChecksummedStream(raw, found, self._progress)  # type: ignore[arg-type]
            try:
                yield stream
                stream.tell()
            except Exception:
                if stream.error is not None:
                    raise stream.error from None
                raise
            finally:
                stream.close()
            self._crcs.update({(Path(path).name, offset): row for offset, row in found.items()})


class _AliasPlanner(DefaultSavePlanner):
    """Gives each box its own storage over the same memory, because torch's writer copies parts of a larger storage."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = super().lookup_object(index)
        if not isinstance(value, Tensor) or value.is_conj():  # DLPack cannot describe a conjugate view
            return value
        return memory.alias(value.detach()) if value.is_contiguous() and value.numel() > 0 else value


class ChecksummedWriter(FileSystemWriter):
    """torch's writer, which also flushes each file and computes the CRC-32 of each item.

    Args:
        folder: The checkpoint's folder.
        crcs: The writer adds this rank's items.
        progress: See ChecksummedStream.
    """

    def __init__(self, folder: Path, crcs: Crcs, progress: Callable[[int], object]) -> None:
        super().__init__(folder, sync_files=True)
        self.fs = _ChecksummedFiles(crcs, progress)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Finish as torch does, on the first rank. Note the items' places in `metadata`, which torch 2.11 does not."""
        super().finish(metadata, results)
        metadata.storage_data = {row.index: row.storage_data for rows in results for row in rows}


class IndexedReader(FileSystemReader):
    """torch's reader, which uses index.json instead of torch's pickled index, and checks the CRC-32 of every item.

    Args:
        folder: The checkpoint's folder.
        index: From read_index().
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        super().__init__(folder)
        self._folder = folder
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors' shapes, dtypes and boxes, for torch's planner."""
        tensors: dict[str, Any] = {}
        places = {}
        for name, tensor in self._index["tensors"].items():
            chunks = []
            for offsets, sizes, *place in tensor["boxes"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, offsets)] = place
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each box to its targets, in file order. Threads read and check the next boxes meanwhile."""
        items: dict[Span, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(Span(*self.storage_data[item.storage_index]), []).append(item)
        waiting = iter(sorted(items))
        with ThreadPoolExecutor(_READERS) as readers:
            ahead = deque((span, readers.submit(span.read, self._folder)) for span in islice(waiting, _READERS + 1))
            while ahead:
                span, content = ahead.popleft()
                box = span.value_of(content.result(), self._folder)
                ahead.extend((after, readers.submit(after.read, self._folder)) for after in islice(waiting, 1))
                for item in items[span]:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(narrow_tensor_by_index(box, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def write(state: dict[str, Any], folder: Path, group: Any, crcs: Crcs, progress: Callable[[int], object]) -> Metadata:
    """Write every rank's part of a state dict. Return torch's metadata. Collective.

    Args:
        state: A state dict as get_state_dict() returns it.
        folder: The checkpoint's folder.
        group: The process group of the ranks; None: one rank.
        crcs: See ChecksummedWriter.
        progress: See ChecksummedWriter.
    """
    if group is not None and not dist.is_initialized():  # torch would save on each rank as if it were alone
        raise CheckpointError(
            "expected the process group until the save is done, got it destroyed; call result() of what "
            "async_save_checkpoint has returned before dist.destroy_process_group()"
        )
    with _raising_checkpoint_errors(f"the save to {folder}", group), _without_torchs_crc():
        writer = ChecksummedWriter(folder, crcs, progress)
        found: Metadata = _save_state_dict(
            state, storage_writer=writer, planner=_AliasPlanner(), process_group=group, no_dist=group is None
        )
    return found


def read(wanted: dict[str, Any], folder: Path, index: dict[str, Any]) -> None:
    """Fill this rank's tensors from a checkpoint. Not collective.

    Raises:
        CheckpointError: A file is missing, cut or damaged.
    """
    with _raising_checkpoint_errors(f"the load of {folder}"):
        _load_state_dict(wanted, storage_reader=IndexedReader(folder, index), no_dist=True)


@contextmanager
def _without_torchs_crc() -> Iterator[None]:
    """A context in which torch.save does not compute its own CRC-32, which torch.load ignores.

    In an older torch the switch acts on all threads. A save in the background then leaves it as it is.
    """
    before = get_crc32_options()
    is_on_elsewhere = contextvars.Context().run(get_crc32_options)
    set_crc32_options(False)
    if is_on_elsewhere and not contextvars.Context().run(get_crc32_options) and not _is_main_thread():
        set_crc32_options(before)
    try:
        yield
    finally:
        if get_crc32_options() != before:
            set_crc32_options(before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _raising_checkpoint_errors(what: str, group: Any = None) -> Iterator[None]:
    """A context in which a failure that torch reports becomes a CheckpointError.

    torch reports an interrupt as a failure too. This rank's own interrupt becomes Interrupted, for `run_on_all_ranks`.
    """
    try:
        yield
    except CheckpointException as error:  # a BaseException, which callers would not catch
        mine, _ = error.failures.get(0 if group is None else group.rank(), (None, None))
        if isinstance(mine, (KeyboardInterrupt, SystemExit)):
            raise Interrupted from mine
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise cause from None
        where = "" if group is None else f" on rank {rank}"
        raise CheckpointError(f"{what} failed{where}: {type(cause).__name__}: {cause}") from cause
