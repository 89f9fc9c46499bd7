"""deepspeed.utils.groups: the groups of initialize() or tp_model_init(); before these, all ranks are data-parallel."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed import comm, launcher
from pyzero.deepspeed.parallel.mesh import Parallelism

_split: list[tuple[Any, Parallelism]] = []  # at most one: (default group, its split model's)


def set_current(parallel: Parallelism) -> None:
    """Set what the getters below report.

    A model that is not split changes nothing, because a script may train one beside a split one.
    """
    if parallel.tensor_group is not None:
        _split[:] = [(comm.get_world_group(), parallel)]


def _current() -> Parallelism:
    if _split and _split[0][0] is comm.get_world_group():
        return _split[0][1]
    return Parallelism(None, None, comm.get_rank(), comm.get_world_size())


def get_data_parallel_group() -> Any:
    """Return the group of ranks that see different data; None without a process group."""
    return launcher.handle_of(_current().data_group) if comm.is_initialized() else None


def get_data_parallel_rank() -> int:
    """Return this rank's place among the ranks that see different data."""
    return _current().data_rank


def get_data_parallel_world_size() -> int:
    """Return the number of ranks that see different data."""
    return _current().data_size


def get_model_parallel_group() -> Any:
    """Return the group of ranks that split the layers of one model; None if layers are whole."""
    return _current().tensor_group


def get_model_parallel_rank() -> int:
    """Return this rank's place among the ranks that split the layers of one model."""
    return _current().tensor_place[0]


def get_model_parallel_world_size() -> int:
    """Return the number of ranks that split the layers of one model."""
    return _current().tensor_place[1]


def get_tensor_model_parallel_src_rank() -> int:
    """Return the default-group rank of the first of the ranks that split the layers of one model."""
    group = get_model_parallel_group()
    return comm.get_rank() if group is None else comm.get_global_rank(group, 0)


get_tensor_model_parallel_group = get_model_parallel_group
get_tensor_model_parallel_rank = get_model_parallel_rank
get_tensor_model_parallel_world_size = get_model_parallel_world_size


def __getattr__(name: str) -> Any:
    """Return a getter by its name with an underscore in front, which DeepSpeed has too."""
    plain = name.removeprefix("_")
    if plain != name and plain.startswith("get_") and plain in globals():
        return globals()[plain]
    raise AttributeError(
        f"deepspeed.utils.groups has no {name!r} here: ranks see different data, or split layers; there are no expert "
        f"and no sequence groups"
    )
