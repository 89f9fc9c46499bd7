"""The ranks that see different data, and the ranks that hold other parts of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyzero.comm import process
from pyzero.deepspeed import launcher

_DATA_NAMES = ("dp", "data", "data_parallel", "dp_shard", "fsdp", "zero")


@dataclass(frozen=True)
class Parallelism:
    """The data-parallel and model-parallel ranks of one engine."""

    data_group: Any  # ranks that see different data: a process group, or a dimension of a mesh; None: the default group
    model_group: Any  # process group of the ranks that hold other parts of the model; None: there are none
    data_rank: int  # this rank's place in data_group
    data_size: int
    data_mesh: Any = None  # one-dimensional mesh over data_group, if the caller has one
    tensor_mesh: Any = None  # one-dimensional mesh over model_group, if the caller has one
    is_pipeline: bool = False  # model_group's ranks hold other layers, each whole
    batch_counts_tensor_ranks: bool = False  # as in DeepSpeed, if only the config splits it

    @property
    def num_batch_ranks(self) -> int:
        """The number of ranks that share train_batch_size."""
        return self.data_size * self.tensor_place[1] if self.batch_counts_tensor_ranks else self.data_size

    @property
    def tensor_group(self) -> Any:
        """The process group of the ranks that split layers; None if layers are whole."""
        return None if self.is_pipeline else self.model_group

    @property
    def tensor_place(self) -> tuple[int, int]:
        """(rank, size) in tensor_group; (0, 1) without one."""
        return (0, 1) if self.tensor_group is None else launcher.rank_and_size_in(self.tensor_group)

    def options(self) -> dict[str, Any]:
        """Return the optimizer's arguments."""
        return {"process_group": self.data_group, "model_parallel_group": self.model_group}


def parallelism_of(mesh: Any, mpu: Any) -> Parallelism:
    """Make a Parallelism from a mesh of one or two dimensions, from DeepSpeed's mpu, or over all ranks.

    Raises:
        ValueError: Both are given, the mesh has more or unnamed dimensions, or mpu lacks get_data_parallel_group().
    """
    if mesh is not None and mpu is not None:
        raise ValueError("got mesh and mpu, wanted one of them: each says which ranks see different data")
    if mesh is not None:
        return _parallelism_of_mesh(mesh)
    if mpu is None:
        rank, size = process.rank_and_size()
        return Parallelism(None, None, rank, size)
    if not hasattr(mpu, "get_data_parallel_group"):
        raise ValueError(
            f"expected mpu with get_data_parallel_group() and get_model_parallel_group(), got {type(mpu).__name__}; "
            f"pass such an object, or a DeviceMesh as mesh="
        )
    names = ("get_model_parallel_group", "get_tensor_model_parallel_group")
    model = next((getattr(mpu, name)() for name in names if hasattr(mpu, name)), None)
    data = mpu.get_data_parallel_group()
    is_alone = model is None or launcher.rank_and_size_in(model)[1] == 1
    return Parallelism(data, None if is_alone else model, *launcher.rank_and_size_in(data))


def _parallelism_of_mesh(mesh: Any) -> Parallelism:
    if mesh.ndim > 2:
        raise ValueError(
            f"expected a mesh of one or two dimensions, got {mesh.ndim}; pass the data and the tensor dimension, as in "
            f"mesh['dp', 'tp']"
        )
    names = mesh.mesh_dim_names or ()
    place = next((i for i, name in enumerate(names) if name in _DATA_NAMES), 0)
    others = [i for i in range(mesh.ndim) if i != place and mesh.size(i) > 1]
    if mesh.ndim == 2 and not names:
        raise ValueError("expected names of a mesh's two dimensions, got none; pass mesh_dim_names=('dp', 'tp')")
    model = mesh.get_group(others[0]) if others else None
    data = mesh[names[place]] if mesh.ndim == 2 else mesh
    tensor = mesh[names[others[0]]] if others else None
    return Parallelism(mesh.get_group(place), model, mesh.get_local_rank(place), mesh.size(place), data, tensor)
