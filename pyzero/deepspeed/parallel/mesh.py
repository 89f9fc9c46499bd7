"""Who computes what: the ranks that see different data, and those that hold other parts of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyzero.comm import process

_DATA_NAMES = ("dp", "data", "data_parallel", "dp_shard", "fsdp", "zero")


@dataclass(frozen=True)
class Parallelism:
    """The groups of an engine; None is the default group, or no other parts."""

    data: Any  # process group, or one dimension of a mesh
    model: Any
    rank: int  # among those that see different data
    size: int
    mesh: Any = None  # of one dimension over them, where the caller has one
    tensor: Any = None  # and over `model`
    is_pipeline: bool = False  # the parts in `model` are stages, of whole layers
    counts_parts: bool = False  # train_batch_size does, where the config alone splits the model, as DeepSpeed's

    @property
    def num_counted(self) -> int:
        """Ranks that train_batch_size is divided by."""
        return self.size * self.part[1] if self.counts_parts else self.size

    @property
    def parts(self) -> Any:
        """The process group that splits layers; None: they are whole."""
        return None if self.is_pipeline else self.model

    @property
    def part(self) -> tuple[int, int]:
        """(rank, size) of that group; (0, 1) without."""
        return (0, 1) if self.parts is None else process.place_in(self.parts)

    def options(self) -> dict[str, Any]:
        """Of the optimizer."""
        return {"process_group": self.data, "model_parallel_group": self.model}


def parallelism_of(mesh: Any, mpu: Any) -> Parallelism:
    """From a mesh of one or two dimensions, from DeepSpeed's mpu, or all ranks.

    Raises:
        ValueError: Both are given, or the mesh has more dimensions, or mpu is none.
    """
    if mesh is not None and mpu is not None:
        raise ValueError("got mesh and mpu, wanted one of them: each says which ranks see different data")
    if mesh is not None:
        return _of_mesh(mesh)
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
    is_alone = model is None or process.place_in(model)[1] == 1
    return Parallelism(data, None if is_alone else model, *process.place_in(data))


def _of_mesh(mesh: Any) -> Parallelism:
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
