"""The config's tensor_parallel: a mesh with a data and a tensor dimension. torch splits the model over the latter."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyzero.comm.group import Group
from pyzero.deepspeed import comm, launcher
from pyzero.deepspeed.config.tensor_parallel_section import TensorParallelSection
from pyzero.deepspeed.parallel import groups
from pyzero.deepspeed.parallel.mesh import Parallelism, parallelism_of
from pyzero.deepspeed.parallel.tp_plan import Cut, check_sizes, plan_of, shared_by
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.local_param import is_dtensor, is_same_part, local_of

log = logging.getLogger("pyzero")

_LARGEST_COMPARED = 1 << 24  # elements; larger gradients are not gathered to compare them

_asked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # models passed to tp_model_init, and their sizes
_split: WeakSet[nn.Module] = WeakSet()  # models that initialize() split
_meshes: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()  # default group -> size -> mesh


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: torch.dtype | None = None, config: Any = None, **kwargs: Any
) -> nn.Module:
    """Make initialize() split this model over tp_size ranks, as `tensor_parallel.autotp_size` does. Collective.

    Args:
        model: The model, or a part of the one that initialize() gets.
        tp_size: Number of ranks that share a layer.
        dtype: Dtype to which the weights are converted; None: they stay.
        config: Ignored; pass it to initialize().
        **kwargs: Ignored.

    Returns:
        The model.

    Raises:
        ValueError: The number of ranks is no multiple of tp_size.
    """
    launcher.join_early()
    if tp_size > 1:
        groups.set_current(parallelism_of(_mesh_over(tp_size), None))
        _asked[model] = tp_size
    return model.to(dtype=dtype)


def set_autotp_mode(training: bool = False, **kwargs: Any) -> None:
    """Do nothing, because initialize() splits the model after it is built."""


def size_for(model: nn.Module, section: TensorParallelSection) -> int:
    """Return the number of ranks that share a layer, from the config, or from tp_model_init() for the model or a part.

    Raises:
        ValueError: There are two sizes.
    """
    sizes = {_asked[module] for module in model.modules() if module in _asked} | {section.size()} - {1}
    if len(sizes) > 1:
        raise ValueError(
            f"got {' and '.join(map(str, sorted(sizes)))} tensor-parallel ranks from tp_model_init() and "
            f"tensor_parallel.autotp_size, wanted one size; give both the same"
        )
    return next(iter(sizes), 1)


def parallelism_with(size: int, mesh: Any, mpu: Any) -> Parallelism:
    """Make a Parallelism with a tensor dimension of this size, over all ranks or from the caller's mesh or mpu.

    Raises:
        ValueError: The number of ranks is no multiple of size, or the caller's groups have another size.
    """
    if mesh is not None or mpu is not None:
        parallel = parallelism_of(mesh, mpu)
        found = 1 if parallel.model_group is None else launcher.rank_and_size_in(parallel.model_group)[1]
        if found != size:
            raise ValueError(
                f"expected {'mesh' if mpu is None else 'mpu'} with {size} tensor-parallel ranks, as "
                f"tensor_parallel.autotp_size says, got {found}; make them agree"
            )
        return parallelism_of(_mesh_of(parallel) if mesh is None else mesh, None)
    return replace(parallelism_of(_mesh_over(size), None), batch_counts_tensor_ranks=True)


def _mesh_over(size: int) -> Any:
    """Return a mesh over all ranks, in which consecutive ranks share a layer.

    There is one mesh per size, because its groups are never freed.
    """
    from torch.distributed.device_mesh import init_device_mesh  # the import takes half a second

    num_ranks = comm.get_world_size()
    if num_ranks % size:
        raise ValueError(
            f"expected a multiple of {size} ranks, as tensor_parallel.autotp_size says, got {num_ranks}; start the "
            f"script by torchrun --nproc-per-node {size}, or change it"
        )
    made = _meshes.setdefault(comm.get_world_group(), {})
    if size not in made:
        made[size] = init_device_mesh(launcher.device().type, (num_ranks // size, size), mesh_dim_names=("dp", "tp"))
    return made[size]


def _mesh_of(parallel: Parallelism) -> Any:
    """Return a mesh of an mpu's groups, which must cover all ranks. Collective."""
    from torch.distributed.device_mesh import DeviceMesh

    places: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(places, (parallel.data_rank, launcher.rank_and_size_in(parallel.model_group)[0]))
    ranks = [rank for _, rank in sorted((place, rank) for rank, place in enumerate(places))]
    if len(set(places)) < len(places) or len(ranks) % parallel.data_size:
        raise ValueError(
            "expected mpu with data and tensor-parallel groups that have all ranks together, got others; split the "
            "model by yourself, and leave out tensor_parallel"
        )
    table = torch.tensor(ranks, device="cpu").reshape(parallel.data_size, -1)
    handles = [launcher.handle_of(parallel.data_group), parallel.model_group]
    return DeviceMesh.from_group(handles, launcher.device().type, table, mesh_dim_names=("dp", "tp"))


# ---- the split -------------------------------------------------------------------------------------------------------


def split(
    model: nn.Module, parallel: Parallelism, section: TensorParallelSection, given: Mapping[str, Any] | None
) -> None:
    """Split a model over its tensor-parallel ranks, and move it to their devices. Collective.

    All ranks take the first one's weights, and its random number state, for dropout. Split parameters become DTensors,
    others stay. The first forward checks that the ranks have the same inputs. A model that has DTensors is left
    unchanged.

    Raises:
        ValueError, TypeError: See tp_plan.
    """
    if any(is_dtensor(param) for param in model.parameters()):
        return
    cuts = plan_of(model, section, given)
    mesh = parallel.tensor_mesh
    check_sizes(model, cuts, mesh.size())
    _apply(model, cuts, mesh)
    _split.add(model)
    model.to(launcher.device())
    group = Group(parallel.model_group)
    everything = (*model.parameters(), *model.buffers())
    group.broadcast_all([local_of(tensor.detach()) for tensor in everything if is_same_part(tensor, group.members())])
    _share_random_numbers(parallel.model_group)
    _check_first_inputs(model, group)
    if comm.get_rank() == 0:
        counted = "; train_batch_size counts all of them" if parallel.batch_counts_tensor_ranks else ""
        log.info("config: tensor_parallel: %d layers split over %d ranks each%s", len(cuts), mesh.size(), counted)


def is_split(model: nn.Module) -> bool:
    """Return whether `split` was applied to the model or a part of it."""
    return any(module in _split for module in model.modules())


def _apply(model: nn.Module, cuts: list[Cut], mesh: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    shared = shared_by(model)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    for cut in cuts:
        parallelize_module(cut.module, mesh, _style_of(cut.style) if isinstance(cut.style, str) else cut.style)
    for places in shared.values():
        (first, name), *others = places
        for module, other in others:
            module._parameters[other] = first._parameters[name]
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)


def _style_of(name: str) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if name == "colwise":
        return ColwiseParallel()
    if name == "rowwise":
        return RowwiseParallel()
    if name in ("colwise_rep", "colwise_gather_output", "embedding_colwise"):
        return ColwiseParallel(output_layouts=Replicate())
    if name in ("rowwise_rep", "rowwise_split_input", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    # A norm of each head acts on this rank's heads: of the dimensions (..., heads, width), heads is split. All ranks
    # have the norm's weight whole, and each computes a partial sum of its gradient.
    return SequenceParallel(sequence_dim=-2, use_local_output=True)


def _share_random_numbers(handle: Any) -> None:
    """Give all ranks the first one's random number state.

    Dropout must drop the same elements in what the ranks of a layer all compute.
    """
    on_gpu = launcher.device().type == "cuda"
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]
    comm.broadcast_object_list(states, comm.get_global_rank(handle, 0), handle)
    torch.set_rng_state(states[0])
    if on_gpu:
        torch.cuda.set_rng_state(states[1])


def _check_first_inputs(model: nn.Module, group: Group) -> None:
    """Make the first forward check that all ranks of a layer have the same inputs.

    A data loader over all ranks gives each rank another sample, and the layer would mix parts of these.
    """

    def compare(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        hook.remove()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not is_dtensor(leaf)]
        mine = [(tuple(tensor.shape), _digest(tensor)) for tensor in tensors]
        if any(other != mine for other in group.gather_objects(mine, "the comparison of first inputs")):
            raise ValueError(
                f"expected the same inputs on the {group.size} tensor-parallel ranks of a model, got different ones; "
                f"take the data loader of initialize(training_data=), or DistributedSampler(dataset, "
                f"engine.dp_world_size, engine.dp_rank)"
            )

    hook = model.register_forward_pre_hook(compare, with_kwargs=True)


def check_first_gradients(model: nn.Module, optimizer: ZeroOptimizer, parallel: Parallelism) -> None:
    """Make the first step compare the gradients of weights that every rank has whole.

    They are equal if the layer's inputs are the same on all ranks. On split activations, each rank has only a part of
    the sum.
    """
    trained = {param for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
    whole = {
        name: param
        for name, param in model.named_parameters()
        if param in trained and param.numel() <= _LARGEST_COMPARED and _is_whole(param, parallel.tensor_mesh)
    }
    group = Group(parallel.model_group)

    @torch.no_grad()
    def compare(optimizer: Any, *args: Any) -> None:
        grads = (optimizer.full_grad(param) for param in whole.values())
        mine = [0.0 if grad is None else float(grad.norm()) for grad in grads]
        rows = group.gather_objects(mine, "the comparison of first gradients")
        largest = max((norm for row in rows for norm in row), default=0.0)
        if whole and not 0.0 < largest < math.inf or any(math.isnan(norm) for row in rows for norm in row):
            return  # this step is skipped, or has no gradients of these weights
        handle.remove()
        for name, *norms in zip(whole, *rows, strict=True):
            if max(norms) - min(norms) > 1e-2 * max(norms) + 1e-5 * largest:  # smaller differences are rounding
                raise ValueError(
                    f"expected the same gradient of {name} on the {group.size} tensor-parallel ranks, which have it "
                    f"whole, got norms of {', '.join(f'{norm:.3g}' for norm in norms)}: it acts on what is split; give "
                    f"its layer a style in initialize(tp_plan=), as 'replicated_with_grad_allreduce' of a norm of each "
                    f"head"
                )

    handle = optimizer.register_step_pre_hook(compare)


def _is_whole(param: Tensor, mesh: Any) -> bool:
    """Return whether a weight is neither split over the mesh nor a DTensor on it.

    In stage 3, split weights are on a mesh of two dimensions.
    """
    if not is_dtensor(param):
        return True
    own: Any = param.device_mesh  # type: ignore[attr-defined]
    return bool(own.ndim == 1 and own != mesh)


def _digest(tensor: Tensor) -> int:
    return zlib.crc32(bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
