"""The engine's data loaders, which give each rank its part of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from pyzero.deepspeed.config.schema import Batches, Config
from pyzero.deepspeed.utils import RepeatingLoader as RepeatingLoader


class Loader(DataLoader[Any]):
    """torch's DataLoader, with DeepSpeed's name for its sampler: `loader.data_sampler.set_epoch(epoch)`."""

    _running: Iterator[Any] | None = None  # the iterator of next(loader)

    def __iter__(self) -> Any:
        """Iterate as torch's DataLoader does. next(loader) restarts too."""
        self._running = None
        return super().__iter__()

    def __next__(self) -> Any:
        """Return the next batch of the loader itself, as DeepSpeed's loader does."""
        if self._running is None:
            self._running = super().__iter__()
        try:
            return next(self._running)
        except StopIteration:
            self._running = None
            raise

    @property
    def data_sampler(self) -> Any:
        """The loader's sampler."""
        return self.sampler


class EngineData:
    """The part of Engine that makes data loaders."""

    config: Config
    batches: Batches
    device: torch.device
    dp_rank: int
    dp_world_size: int
    collate_fn: Callable[[Any], Any] | None = None  # initialize()'s

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Loader:
        """Make a data loader of this rank's part of a dataset.

        Args:
            dataset: A dataset with a length.
            batch_size: Default: the micro-batch size.
            route: "train" shuffles; "eval" and "predict" do not.
            pin_memory: Pin memory, if the engine is on a GPU.
            data_sampler: Default: a sampler that gives each rank a part.
            collate_fn: Default: initialize()'s, or torch's.
            num_local_io_workers: Number of loader processes; default: none.
        """
        if data_sampler is None:
            shuffles = route == "train"
            data_sampler = DistributedSampler(dataset, self.dp_world_size, self.dp_rank, shuffle=shuffles)
        return Loader(
            dataset,
            batch_size=batch_size or self.batches.micro,
            sampler=data_sampler,
            collate_fn=collate_fn or self.collate_fn,
            drop_last=self.config.dataloader_drop_last,
            num_workers=num_local_io_workers or 0,
            pin_memory=pin_memory and self.device.type == "cuda",
        )
