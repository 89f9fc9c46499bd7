"""Finds the ranks that share an optimizer's state and those with other parts of the model, by arguments or DTensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.comm.process import process_group_of
from pyzero.sharding.local_param import is_dtensor, user_param

_Ranks = tuple[int, ...]


class _Dim(NamedTuple):
    """One dimension of a mesh, as this rank sees it."""

    ranks: _Ranks
    process_group: Any
    placement: Any


class ModelDim(NamedTuple):
    """A dimension along which the model is split. Its ranks hold different parts of split parameters, and the rest."""

    group: Group
    ranks: _Ranks
    is_of_mesh: bool  # DTensors say what is split over it. If False, an attribute of the parameter does


@dataclass(frozen=True)
class Topology:
    """The ranks of one optimizer.

    Attributes:
        data: The ranks that hold the same weights, and share state and gradients.
        model_dims: The dimensions along which other ranks hold other parts of the model.
        everyone: The process group of all ranks that hold a part of the DTensors; None: the ranks of `data`.
    """

    data: Group
    model_dims: tuple[ModelDim, ...]
    everyone: Any = None

    @property
    def same_params(self) -> bool:
        """Whether all ranks have the same parameters by number, whole ones or their parts as DTensors."""
        return all(dim.is_of_mesh for dim in self.model_dims)

    @property
    def model_groups(self) -> list[Group]:
        """The groups of ranks that hold other parts of the model, one for each dimension."""
        return [dim.group for dim in self.model_dims]

    @property
    def num_ranks(self) -> int:
        """The number of ranks that hold this model, or a part of it."""
        return math.prod(group.size for group in (self.data, *self.model_groups))

    def rank_and_size(self) -> tuple[int, int]:
        """Return this process's rank among all ranks that hold a part of the DTensors, and their number."""
        if self.everyone is None:
            return self.data.rank, self.data.size
        return dist.get_rank(self.everyone), dist.get_world_size(self.everyone)

    @property
    def unmeshed(self) -> Group | None:
        """The ranks of model_parallel_group, if they hold parts of the model that are not DTensors; else None."""
        return next((dim.group for dim in self.model_dims if not dim.is_of_mesh and dim.group.size > 1), None)

    def owns(self, param: Tensor) -> bool:
        """Whether this rank of `unmeshed` saves the parameter: it is the first one, or holds a part of its own."""
        return all(dim.is_of_mesh or dim.group.rank == 0 or _is_split(param, dim) for dim in self.model_dims)

    def check_meshes(self, params: Iterable[Tensor]) -> None:
        """Check parameters that join later.

        Raises:
            ValueError: A DTensor's mesh has a dimension that no earlier parameter had, and may be split over it.
        """
        known = {dim.ranks for dim in self.model_dims if dim.is_of_mesh}
        for own in (dim for param in params if is_dtensor(param) for dim in _dims_of(param)):
            is_shared = own.placement.is_replicate() and self.data.size > 1 and own.ranks == _ranks_of(self.data.handle)
            if own.ranks not in known and not is_shared:
                raise ValueError(
                    f"expected DTensors on mesh dimensions that the optimizer was built over, got one over ranks "
                    f"{list(own.ranks)}, along which it takes all weights for the same; pass those parameters when it "
                    f"is built, or build an optimizer for each mesh"
                )

    def make_group_of_all(self) -> Group:
        """Return all ranks that hold a part of the model, over a separate process group for host memory. Collective.

        Raises:
            ValueError: No known group contains all ranks of the DTensors' meshes.
        """
        if self.everyone is not None:
            return Group(self.everyone, on_host=True)
        group = self.data
        if self.unmeshed is not None:
            for dim in self.model_dims:
                group = group.spread_over(dim.group)
        elif any(dim.is_of_mesh for dim in self.model_dims):
            raise ValueError(
                "expected a process group of all ranks that hold a part of the model, got DTensors on meshes that "
                "reach a part of the ranks; slice them from one mesh of all ranks"
            )
        return group if group.handle is None or group is not self.data else Group(group.handle, on_host=True)

    def is_slice(self, param: Tensor) -> bool:
        """Whether a plain parameter is this rank's slice of a weight (Megatron's), and other ranks have the rest."""
        return self.unmeshed is not None and bool(getattr(user_param(param), "tensor_model_parallel", False))

    def in_norm(self, param: Tensor) -> bool:
        """Whether a parameter counts for the norm on this rank. One that is not split over ranks counts only once."""
        return all(dim.group.rank == 0 or _is_split(user_param(param), dim) for dim in self.model_dims)


def make_topology(params: Iterable[Tensor], process_group: Any, model_parallel_group: Any) -> Topology:
    """Make the topology that the optimizer's arguments and the meshes of its DTensors describe. Collective.

    Raises:
        ValueError: The DTensors' meshes do not say which ranks hold the same weights.
    """
    dtensors = [param for param in params if is_dtensor(param)]
    model_parallel = [] if model_parallel_group is None else [process_group_of(model_parallel_group)]
    if not dtensors:
        data = Group(process_group)
        return Topology(data, tuple(ModelDim(Group(handle), (), False) for handle in model_parallel))
    of_mesh = [dim for param in dtensors for dim in _dims_of(param)]
    found = {dim.ranks: dim.process_group for dim in of_mesh}
    split = {dim.ranks for dim in of_mesh if not dim.placement.is_replicate()}
    asked_model = {_ranks_of(handle): handle for handle in model_parallel}
    asked = process_group_of(process_group)
    data_handle = _data_group(dtensors, {**asked_model, **found}, split, asked)
    data = Group(is_alone=True) if data_handle is None else Group(data_handle)
    handles = {**found, **asked_model}
    if data_handle is not None:
        handles.pop(_ranks_of(data_handle), None)
    shared = [] if data_handle is None else [_ranks_of(data_handle)]
    wholes = [handle for handle in (asked, dist.group.WORLD) if handle is not None]
    everyone = next((handle for handle in wholes if _covers([*handles, *shared], _ranks_of(handle))), None)
    dims = tuple(ModelDim(Group(handle), ranks, ranks in found) for ranks, handle in handles.items())
    return Topology(data, dims, everyone if handles and handles.keys() == found.keys() - set(shared) else None)


def _ranks_of(process_group: Any) -> _Ranks:
    return tuple(dist.get_process_group_ranks(process_group))


def _dims_of(dtensor: Any) -> Iterator[_Dim]:
    """Yield the dimensions of a DTensor's mesh that have more than one rank."""
    mesh = dtensor.device_mesh
    for index, placement in enumerate(dtensor.placements):
        if mesh.size(index) > 1:
            handle = mesh.get_group(index)
            yield _Dim(_ranks_of(handle), handle, placement)


def _is_split(param: Any, dim: ModelDim) -> bool:
    if not dim.is_of_mesh:
        return bool(getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False))
    return is_dtensor(param) and any(
        own.ranks == dim.ranks and not own.placement.is_replicate() for own in _dims_of(param)
    )


def _data_group(dtensors: list[Any], model: dict[_Ranks, Any], split: set[_Ranks], asked: Any) -> Any:
    """Return the process group of the ranks that hold the same local tensors as this one. None: only this one.

    asked: The process_group argument. If nothing is split over it and it is orthogonal to the meshes, return it.
    Otherwise it names all ranks that take part. If the meshes cover these, return None. If not, the mesh that they were
    sliced from has one more dimension with which they do; return that dimension.
    """
    everyone = _ranks_of(dist.group.WORLD if asked is None else asked)
    if asked is not None and everyone not in split:
        if _are_orthogonal([*(ranks for ranks in model if ranks != everyone), everyone]):
            return asked
    if asked is not None and everyone in split and not _covers(model, everyone):  # one dimension of several
        everyone = _ranks_of(dist.group.WORLD)
    if not _are_orthogonal(model):
        raise ValueError(
            f"expected DTensors on meshes whose dimensions cross each other, got dimensions of ranks "
            f"{_spell(model)}; slice all meshes from one (mesh['dp'], mesh['tp']), or build an optimizer for each"
        )
    if _covers(model, everyone):
        return None
    crossing = {ranks: handle for ranks, handle in _root_dims(dtensors) if _covers([*model, ranks], everyone)}
    if len(crossing) != 1:
        raise ValueError(
            f"expected DTensors whose meshes tell which ranks hold the same weights, got dimensions of ranks "
            f"{_spell(model)} among {len(everyone)} ranks; pass those ranks as process_group (mesh['dp']), or slice "
            f"the mesh from one that has all ranks"
        )
    return next(iter(crossing.values()))


def _root_dims(dtensors: list[Any]) -> Iterator[tuple[_Ranks, Any]]:
    """Yield the dimensions of the meshes that the DTensors' meshes were sliced from."""
    for root in dict.fromkeys(_root_of(param.device_mesh) for param in dtensors):
        for index in range(root.ndim):
            if root.size(index) > 1:
                handle = root.get_group(index)
                yield _ranks_of(handle), handle


def _root_of(mesh: Any) -> Any:
    """Return the mesh that this one was sliced from, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed import device_mesh  # of torch 2.6

    return getattr(device_mesh, "_mesh_resources").get_root_mesh(mesh)  # noqa: B009  newer torch lacks it


def _are_orthogonal(dims: Iterable[_Ranks]) -> bool:
    """Whether any two of the dimensions have only this rank in common."""
    seen: set[int] = set()
    rank = dist.get_rank()
    for ranks in dims:
        others = set(ranks) - {rank}
        if seen & others:
            return False
        seen |= others
    return True


def _covers(dims: Iterable[_Ranks], everyone: _Ranks) -> bool:
    """Whether moving along the dimensions reaches exactly these ranks."""
    dims = list(dims)
    is_right_size = math.prod(map(len, dims)) == len(everyone)
    return is_right_size and _are_orthogonal(dims) and all(set(ranks) <= set(everyone) for ranks in dims)


def _spell(dims: Iterable[_Ranks]) -> str:
    return " and ".join(str(list(ranks)) for ranks in dims) or "[]"
