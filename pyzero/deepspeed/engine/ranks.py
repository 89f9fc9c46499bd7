"""The engine's ranks and groups, with DeepSpeed's names. deepspeed.utils.groups has them for a whole script."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed import comm, launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.parallel.mesh import Parallelism


class EngineRanks:
    """The part of Engine that reports its ranks and groups."""

    config: Config
    parallel: Parallelism

    @property
    def mp_world_size(self) -> int:
        """The number of ranks that split the layers of one model among them."""
        return self.parallel.tensor_place[1]

    def autotp_size(self) -> int:
        """Return the config's tensor_parallel.autotp_size; 0 without one."""
        return self.config.tensor_parallel.autotp_size

    def get_data_parallel_group(self) -> Any:
        """Return the group of ranks that see different data; None without a process group."""
        return launcher.handle_of(self.parallel.data_group) if comm.is_initialized() else None

    @property
    def data_parallel_group(self) -> Any:
        """The group of ranks that see different data; None without a process group."""
        return self.get_data_parallel_group()

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place among the ranks that see different data."""
        return self.parallel.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks that see different data."""
        return self.parallel.data_size

    def get_model_parallel_group(self) -> Any:
        """Return the group of ranks that split the layers of one model; None if layers are whole."""
        return self.parallel.tensor_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank's place among the ranks that split the layers of one model."""
        return self.parallel.tensor_place[0]

    def get_model_parallel_world_size(self) -> int:
        """Return the number of ranks that split the layers of one model."""
        return self.mp_world_size
