"""deepspeed.zero: contexts in which scripts build and edit models."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyzero.deepspeed import comm
from pyzero.deepspeed.stage_3.init import Init as Init
from pyzero.deepspeed.stage_3.kept_views import is_gathered, keep_views
from pyzero.deepspeed.stage_3.sharded_param import ShardedParam, ZeroParamStatus, gathered
from pyzero.sharding import fsdp
from pyzero.sharding.fsdp import FsdpParamUse
from pyzero.sharding.local_param import is_dtensor, local_of, part_of, whole_of


class ZeroStageEnum(int, Enum):
    """DeepSpeed's names of the stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


def is_zero_param(parameter: Any) -> bool:
    """Return whether it is a parameter that stage 3 or zero.Init shards."""
    return isinstance(parameter, Tensor) and hasattr(parameter, "ds_id")


def zero_wrapper_for_fp_tensor_constructor(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the function itself.

    transformers replaces this function so that DeepSpeed leaves torch.arange alone.
    """
    return function


# ---- whole weights ---------------------------------------------------------------------------------------------------


@cache
def _gathered(kind: type) -> type:
    """Return a subclass of a parameter's class. Ops on a parameter of this subclass act on the whole weight."""

    def on_whole(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_forward(args):
            args, kwargs = tree_map_only(made, _shown, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    made = type(f"Gathered{kind.__name__}", (kind,), {"__slots__": (), "__torch_function__": classmethod(on_whole)})
    return made


def _is_shown(param: Any) -> bool:
    """Return whether a context shows this parameter whole."""
    return hasattr(param, "gathered_in") or hasattr(param, "whole")


def _is_forward(args: Any) -> bool:
    """Return whether a split layer is computing.

    It then has other DTensors as arguments, which cannot be mixed with a whole weight.
    """
    return any(is_dtensor(arg) and not _is_shown(arg) for arg in args)


def _shown(param: Any) -> Any:
    """Return the whole weight.

    In stage 3 it is the module's attribute, which is the parameter itself if a forward has resharded it. Below stage 3
    it is the gathered copy of a weight that tensor parallelism split.
    """
    if hasattr(param, "whole"):
        return param.whole
    return getattr(param.gathered_in.module, param.gathered_in.name)


class GatheredParameters:
    """A context in which to read or edit whole weights. On exit, all ranks take the values of `modifier_rank`.

    In stage 3, both the parameters and the modules (`layer.weight`) show whole weights in the context, in the dtype
    that the model computes in. Keep copies: a whole weight that is kept after the context is out of date, or refuses to
    be read. A module's `state_dict()` holds copies and communicates nothing, so one rank may call it.
    `load_state_dict()` takes shards even here, because torch reshards first.

    A weight that tensor parallelism splits is whole below stage 3; a forward in the context computes with its value
    before edits. In stage 3 it stays split, and all of its ranks must make the same edit.

    Args:
        params: A parameter or several.
        modifier_rank: Rank in the default group, or in the group that zero.Init was given. None: weights are only read,
            and nothing is sent on exit.
        fwd_module: Ignored.
        enabled: False does nothing.

    Raises:
        ValueError: On exit: only some ranks of a split weight edited it. Nothing is changed.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._params = [params] if isinstance(params, Tensor) else [param for param in params if param is not None]
        self._enabled = enabled
        self._source = modifier_rank
        self._uses: dict[Any, FsdpParamUse] = {}  # parameters that no outer context has gathered
        self._owners: list[Any] = []  # modules that gather them, unless an outer context uses them
        self._built: list[Any] = []  # parameters of zero.Init, before initialize()
        self._cut: list[Any] = []  # DTensors of tensor parallelism alone
        self._stack = ExitStack()
        self._parts: dict[Any, tuple[Tensor, int]] = {}  # split weight -> (this rank's part, its version) before edits

    def __enter__(self) -> GatheredParameters:
        if self._enabled:
            self._params = _sharded(self._params)
            self._built = [param for param in self._params if isinstance(param, ShardedParam)]
            self._stack.enter_context(gathered(self._built, self._source))
        if self._enabled and any(is_dtensor(param) for param in self._params):
            known = fsdp.find_fsdp_params()
            fresh = [param for param in dict.fromkeys(self._params) if not _is_shown(param)]
            self._uses = {param: known[param] for param in fresh if param in known}
            taken = {param.gathered_in.owner for param in known if hasattr(param, "gathered_in")}
            self._show_shards(taken)
            self._cut = [param for param in fresh if param not in known and is_dtensor(param)]
            self._show_cut()
            if self._source is not None:
                for param in filter(_is_split, map(_in_context, self._params)):
                    self._parts[param] = local_of(param.detach()).clone(), _version(param)
        return self

    def _show_shards(self, taken: Collection[Any]) -> None:
        """Show whole weights of fully_shard. taken: Modules whose weights an outer context has gathered."""
        owners = dict.fromkeys(use.owner for use in self._uses.values())
        self._owners = [owner for owner in owners if owner not in taken]
        for owner in self._owners:
            owner.unshard()
            keep_views(owner)
        self._stack.enter_context(fsdp.whole_state_dicts(self._owners))
        for param, use in self._uses.items():
            param.gathered_in = use
            use.record.init_dtype_attrs = _know_dtypes
            param.ds_status = ZeroParamStatus.AVAILABLE
            param.__class__ = _gathered(type(param))  # type: ignore[arg-type]

    def _hide_shards(self) -> None:
        for param, use in self._uses.items():
            _hide(param)
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
            del param.gathered_in, use.record.init_dtype_attrs
        for owner in self._owners:
            owner.reshard()

    def _show_cut(self) -> None:
        """Show whole weights that tensor parallelism split."""
        for param in self._cut:
            whole = whole_of(param.detach()).clone(memory_format=torch.contiguous_format)
            param.whole = nn.Parameter(whole, requires_grad=param.requires_grad)
            param.__class__ = _gathered(type(param))  # type: ignore[arg-type]

    def _hide_cut(self, keeps_edits: bool) -> None:
        for param in self._cut:
            whole = param.whole
            _hide(param)
            del param.whole
            if keeps_edits:
                _write(local_of(param), part_of(whole, param))

    def _find_edited_apart(self, source: int) -> list[int] | None:
        """Return the ranks that edited a split weight, if other ranks of it did not. Collective."""
        edited = [
            _version(param) != version or not torch.equal(local_of(param.detach()), part)
            for param, (part, version) in self._parts.items()
        ]
        holders = [param.device_mesh.mesh.flatten().tolist() for param in self._parts]
        rows: list[Any] = [None] * comm.get_world_size()
        comm.all_gather_object(rows, (edited, holders))
        for index, ranks in enumerate(rows[source][1]):
            found = [rank for rank in ranks if rows[rank][0][index]]
            if 0 < len(found) < len(ranks):
                return found
        return None

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        built = {id(param) for param in self._built}
        self._stack.__exit__(*error)
        source = self._source if self._enabled and error[0] is None and comm.get_world_size() > 1 else None
        apart = self._find_edited_apart(source) if source is not None and self._parts else None
        if apart is not None:
            for param, (part, _) in self._parts.items():
                local_of(param.detach()).copy_(part)
            source = None
        self._parts = {}
        changed = [param for param in self._params if source is not None and id(param) not in built]
        values = [whole_of(param.detach()).clone(memory_format=torch.contiguous_format) for param in changed]
        self._hide_shards()
        self._hide_cut(keeps_edits=error[0] is None)
        for param, value in zip(changed, values, strict=True):
            _broadcast(value, source or 0, param)
            if hasattr(param, "whole"):  # an outer context shows it
                param.whole.copy_(value)
            _write(local_of(param), part_of(value, param))
        if apart is not None:
            raise ValueError(
                f"expected an edit by all ranks of a weight that tensor parallelism splits, got one by "
                f"{', '.join(f'rank {rank}' for rank in apart)} alone, of a part; make it on every rank, or call "
                f"pyzero.deepspeed.utils.safe_set_full_fp32_param(param, value)"
            )


def _sharded(params: list[Tensor]) -> list[Tensor]:
    """Replace weights that a forward left whole by their shards, which the context gathers anew."""
    whole = fsdp.find_left_whole(params)
    for owner in dict.fromkeys(use.owner for _, use in whole.values()):
        if not is_gathered(owner):
            owner.reshard()
    return [whole[id(param)][0] if id(param) in whole else param for param in params]


def _hide(param: Any) -> None:
    """Turn a parameter back into this rank's part. Keep requires_grad as it was set in the context."""
    requires_grad = param.requires_grad
    param.__class__ = type(param).__base__
    param.requires_grad_(requires_grad)


def _know_dtypes(policy: Any) -> None:
    """Replace fully_shard's init_dtype_attrs.

    It would read the shard's dtype, and get that of the whole weight inside the context.
    """


def _in_context(param: Any) -> Any:
    """Return the tensor that ops on a parameter act on inside the context."""
    return _shown(param) if _is_shown(param) else param


def _is_split(param: Any) -> bool:
    return is_dtensor(param) and not all(placement.is_replicate() for placement in param.placements)


def _version(param: Any) -> int:
    """Count writes, both to a DTensor and to its local tensor."""
    return int(param._version + local_of(param.detach())._version)


def _broadcast(value: Tensor, source: int, param: Any) -> None:
    if hasattr(param, "rows"):  # a parameter of zero.Init that an outer context shows whole
        param.rows.group.broadcast(value, "zero: the broadcast of a gathered weight", source)
    else:
        comm.broadcast(value, src=source)


def _write(local: Tensor, value: Tensor) -> None:
    """Write the elements that changed. An fp32 shard keeps its low bits where the 16-bit value is the same.

    The collective does not write into the shard, because the optimizer notices only what torch counts as a write.
    """
    local.copy_(torch.where(local.to(value.dtype) == value, local, value.to(local.dtype)))


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Declare that a module uses a parameter of another module. Call it before initialize().

    Stage 3 then gathers this parameter with the root's.
    """
    parameter.is_external = True  # type: ignore[attr-defined]


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Undo `register_external_parameter`."""
    parameter.is_external = False  # type: ignore[attr-defined]
