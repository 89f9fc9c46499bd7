"""deepspeed.runtime.pipe.topology: the places of ranks in a grid, and the process groups of a pipeline."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from pyzero.comm import process
from pyzero.deepspeed import launcher


class ProcessTopology:
    """Ranks as points of a grid. The last axis varies fastest.

    Args:
        axes: Names of the axes.
        dims: Lengths of the axes.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]  # DeepSpeed's name

    def get_axis_names(self) -> list[str]:
        """Return the names of the axes, the fastest last."""
        return self.axes

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """Return a rank's place on the axes that are not omitted, for file names."""
        place = self.get_coord(rank)._asdict()
        return outer_sep.join(f"{axis}{inner_sep}{at:02d}" for axis, at in place.items() if axis not in omit_axes)

    def get_dim(self, axis: str) -> int:
        """Return the length of an axis; 0 if there is no axis of this name."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def world_size(self) -> int:
        """Return the number of ranks."""
        return math.prod(self.dims)

    def get_coord(self, rank: int) -> Any:
        """Return the place of a rank as a named tuple."""
        place = {}
        for axis, length in zip(reversed(self.axes), reversed(self.dims), strict=True):
            rank, place[axis] = divmod(rank, length)
        return self.ProcessCoord(**place)

    def get_rank(self, **coord: int) -> int:
        """Return the rank at a place. Give the coordinate on every axis."""
        rank = 0
        for axis, length in zip(self.axes, self.dims, strict=True):
            rank = rank * length + coord[axis]
        return rank

    def filter_match(self, **coord: int) -> list[int]:
        """Return the ranks with these coordinates on these axes."""
        return [
            rank
            for rank in range(self.world_size())
            if all(getattr(self.get_coord(rank), axis) == at for axis, at in coord.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Return the ranks with this coordinate on an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Return lists of ranks that differ only on this axis."""
        lists: dict[Any, list[int]] = {}
        for rank in range(self.world_size()):
            lists.setdefault(self.get_coord(rank)._replace(**{axis: 0}), []).append(rank)
        return list(lists.values())


class PipeDataParallelTopology(ProcessTopology):
    """A grid of stages and replicas. The replicas of a stage are consecutive ranks."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """A grid of stages, replicas and tensor-parallel ranks. PipelineModule requires one tensor-parallel rank."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """This rank's place and groups, with the names of DeepSpeed's `mpu`. Collective: all ranks make an equal one.

    Raises:
        ValueError: The topology has another number of ranks, or tensor parallelism.
    """

    def __init__(self, topology: ProcessTopology) -> None:
        self._topo = topology
        self.global_rank, size = process.rank_and_size()
        if topology.world_size() != size:
            raise ValueError(
                f"expected a topology of the {size} ranks there are, got {topology.dims} of {topology.axes}; start as "
                f"many processes, call pyzero.deepspeed.init_distributed() first, or let num_stages divide them"
            )
        others = {axis: n for axis, n in zip(topology.axes, topology.dims, strict=True) if axis not in ("pipe", "data")}
        if any(n > 1 for n in others.values()):
            raise ValueError(
                f"expected a topology of pipe and data, got {others} beside them; split the layers of a stage with "
                f"torch's parallelize_module and torch.distributed.pipelining, see docs/parallel.md"
            )
        place = topology.get_coord(self.global_rank)
        self.stage_id: int = place.pipe
        self.data_parallel_id: int = place.data
        self.pipe_parallel_size, self.data_parallel_size = topology.get_dim("pipe"), topology.get_dim("data")
        self.model_parallel_size = self.slice_parallel_size = 1
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == self.pipe_parallel_size - 1
        self._dp = launcher.subgroup(topology.get_axis_comm_lists("data")) if size > 1 else None
        self._pp = launcher.subgroup(topology.get_axis_comm_lists("pipe")) if size > 1 else None

    def stage_to_global(self, stage_id: int, data: int | None = None) -> int:
        """Return the rank of a stage in this pipeline, or in that of replica `data`."""
        place = self._topo.get_coord(self.global_rank)._asdict() | {"pipe": stage_id}
        return self._topo.get_rank(**(place if data is None else place | {"data": data}))

    def topology(self) -> ProcessTopology:
        """Return the topology of all ranks."""
        return self._topo

    def get_global_rank(self) -> int:
        """Return this process's rank in the default group."""
        return self.global_rank

    def get_data_parallel_rank(self) -> int:
        """Return the index of this rank's replica."""
        return self.data_parallel_id

    get_data_parallel_id = get_data_parallel_rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the ranks that hold the same stage."""
        return self._topo.filter_match(pipe=self.stage_id)

    def get_data_parallel_world_size(self) -> int:
        """Return the number of replicas."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        """Return the group of ranks that hold the same stage; None if there is one process."""
        return self._dp

    def get_pipe_parallel_rank(self) -> int:
        """Return the index of this rank's stage."""
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        """Return the group of this pipeline's ranks; None if there is one process."""
        return self._pp

    get_stage_id = get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    # As in DeepSpeed, the ranks that hold parts of one model. Here these are its stages.
    get_model_parallel_rank = get_pipe_parallel_rank
    get_model_parallel_world_size = get_pipe_parallel_world_size
    get_model_parallel_group = get_pipe_parallel_group

    def get_slice_parallel_rank(self) -> int:
        """Return 0, because there is no tensor parallelism."""
        return 0

    def get_slice_parallel_world_size(self) -> int:
        """Return 1, because there is no tensor parallelism."""
        return 1

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
