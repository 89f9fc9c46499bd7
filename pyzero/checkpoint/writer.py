"""Writes one checkpoint to disk."""

from __future__ import annotations

import logging
import operator
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyzero.checkpoint import files
from pyzero.checkpoint.agreement import run_on_all_ranks
from pyzero.checkpoint.content import Content, join
from pyzero.checkpoint.files import CheckpointError
from pyzero.comm.group import Group

log = logging.getLogger("pyzero")

_SHOW_PROGRESS_AFTER_S = 5.0


class Writer:
    """Writes one checkpoint. The constructor collects the content, and `run` writes it. Both are collective.

    Args:
        group: The ranks that write the checkpoint together.
        directory: See save_checkpoint.
        step: See save_checkpoint.
        keep: See save_checkpoint.
        collect: Returns this rank's content. The constructor calls it.
    """

    def __init__(
        self,
        group: Group,
        directory: str | os.PathLike[str],
        step: int,
        keep: int | None,
        collect: Callable[[], Content],
    ) -> None:
        self._group = group
        self._step = step
        self._keep = keep
        self._what = f"the save to {directory}"
        run_on_all_ranks(group, self._what, lambda: self._take(directory, collect))
        rows = group.gather_objects((self._step, self._buffers), self._what)
        steps = [step for step, _ in rows]
        if len(set(steps)) > 1:
            raise ValueError(f"expected the same step on every rank, got {steps}; pass how many steps were taken")
        of_ranks_before = {name for _, names in rows[: group.rank] for name in names}
        for name in of_ranks_before.intersection(self._buffers):
            del self._state["model"][name]  # without this, torch's planner would save some of them from other ranks
        if self._part is not None:
            parts = group.gather_objects(self._part, self._what)
            run_on_all_ranks(group, self._what, lambda: self._keep_common(join(parts)))

    def _take(self, directory: str | os.PathLike[str], collect: Callable[[], Content]) -> None:
        self._directory = Path(directory).absolute()  # the working directory may change before the write
        if not _is_whole(self._step, 0):
            raise ValueError(f"expected step as a whole number from 0 on, got {self._step!r}; pass how many were taken")
        self._step = operator.index(self._step)
        if self._keep is not None and not _is_whole(self._keep, 1):
            raise ValueError(
                f"expected keep as a whole number from 1 on, or None, got {self._keep!r}; pass how many checkpoints to "
                f"leave"
            )
        content = collect()
        self._state, self._part, self._buffers = content.state, content.part, content.buffers
        self._contents = {files.rank_file(self._group.rank): files.to_bytes(content.extra, "extra")}
        if self._part is None:
            self._keep_common(content.common)

    def _keep_common(self, common: dict[str, Any]) -> None:
        self._in_common = [f"model.{name}" for name in common["model"]]
        if self._group.rank == 0:
            self._contents[files.COMMON] = files.to_bytes(common, "the parameter groups and the model")

    def run(self, before: Callable[[], object] = lambda: None) -> Path:
        """Write the checkpoint, and return its folder. before: Called first, to wait for earlier work."""
        is_first = self._group.rank == 0
        run_on_all_ranks(self._group, self._what, before)
        began = run_on_all_ranks(
            self._group, self._what, lambda: files.begin(self._directory, self._step) if is_first else None
        )
        folder: Path = self._group.gather_objects(began, self._what)[0]
        try:
            run_on_all_ranks(self._group, self._what, lambda: self._write(folder))
            metadata = run_on_all_ranks(self._group, self._what, lambda: self._write_tensors(folder))
            rows = self._group.gather_objects((self._sums, self._crcs), self._what)
            run_on_all_ranks(
                self._group,
                self._what,
                lambda: files.commit(folder, self._index(metadata, rows), self._keep) if is_first else None,
            )
        except CheckpointError:
            if is_first:
                shutil.rmtree(folder, ignore_errors=True)  # frees space on a full disk
            raise
        complete = folder.with_name(files.name_of(folder))
        if is_first:
            log.info("step %d is saved in %s", self._step, complete)
        return complete

    def _write(self, folder: Path) -> None:
        """Write this rank's .pt files."""
        if not folder.is_dir():
            raise CheckpointError(
                f"expected a directory that all ranks share, got {folder.parent}, in which rank {self._group.rank} "
                f"does not see what rank 0 has written; pass a path on a shared file system"
            )
        for name, content in self._contents.items():
            files.write_file(folder / name, content)
        self._sums = {name: files.length_and_crc(content) for name, content in self._contents.items()}

    def _write_tensors(self, folder: Path) -> Any:
        from pyzero.checkpoint import storage  # the import takes half a second

        self._crcs: storage.Crcs = {}
        # torch tells the others of errors; an interrupt of this rank's wait for them ends its collective.
        with self._progress() as progress, self._group.lockstep(what="a save", but=Exception):
            return storage.write(self._state, folder, self._group.handle, self._crcs, progress)

    def _index(self, metadata: Any, rows: list[tuple[dict[str, Any], dict[tuple[str, int], tuple[int, int]]]]) -> Any:
        crcs = {place: row for _, of_rank in rows for place, row in of_rank.items()}
        sizes: dict[str, int] = {}
        for (name, offset), (length, _) in crcs.items():
            if not name.startswith("."):
                sizes[name] = max(sizes.get(name, 0), offset + length)
        return {
            "format": files.FORMAT,
            "step": self._step,
            "num_ranks": self._group.size,
            "torch": torch.__version__,
            "files": {name: row for sums, _ in rows for name, row in sums.items()},
            "sizes": sizes,
            "tensors": _describe(metadata, crcs, self._in_common),
        }

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int], object]]:
        """A context with a progress bar of this rank's bytes. It appears on the first rank, if the save takes long."""
        hidden = self._group.rank != 0
        with tqdm(
            desc=f"step {self._step}", unit="B", unit_scale=True, delay=_SHOW_PROGRESS_AFTER_S, disable=hidden
        ) as bar:
            yield bar.update


def _describe(
    metadata: Any, crcs: dict[tuple[str, int], tuple[int, int]], in_common: Collection[str]
) -> dict[str, Any]:
    """Return the index's entry of each tensor, with [offsets, sizes, file, offset in it, length, CRC-32] per box.

    Args:
        metadata: torch's, from `storage.write`.
        crcs: (length, CRC-32) by file and offset.
        in_common: Names to leave out, besides the parameter groups: load_checkpoint reads these from common.pt, and
            only torch's own loaders read them from the .distcp files.
    """
    tensors: dict[str, Any] = {}
    of_torch = tuple(f"{name}." for name in (*in_common, "optim.param_groups"))
    places = {
        (index.fqn, tuple(index.offset)): where
        for index, where in metadata.storage_data.items()
        if index.offset is not None
    }
    for name, tensor in metadata.state_dict_metadata.items():
        if not hasattr(tensor, "chunks") or f"{name}.".startswith(of_torch):
            continue
        boxes = []
        for chunk in tensor.chunks:
            where = places[name, tuple(chunk.offsets)]
            length, crc = crcs[where.relative_path, where.offset]
            boxes.append([[*chunk.offsets], [*chunk.sizes], where.relative_path, where.offset, length, crc])
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": [*tensor.size], "boxes": boxes}
    return tensors


def _is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number, of any type that can be an index, and at least `least`."""
    return hasattr(value, "__index__") and operator.index(value) >= least
