"""Read and write a parameter's whole tensors, although their values lie in shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyzero.base import ZeroBase
from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.gradients.grad_stats import GlobalGradStats
from pyzero.sharding.buckets import MASTER, STEP, Bucket
from pyzero.sharding.gather import gather_param, widen
from pyzero.sharding.local_param import LocalParam, local_of, part_of, whole_of
from pyzero.sharding.param_buckets import Location
from pyzero.sharding.state_checks import check_step, check_values
from pyzero.streams import on_device


class FullAccess(ZeroBase):
    """`full_*` and `set_full_*` of ZeroOptimizer. All ranks make the same calls; reading is collective."""

    _tied_groups: dict[Any, Group]

    def full_master(self, param: Tensor) -> Tensor:
        """Return a copy of a parameter's fp32 master, in its shape and memory order, the same on every rank.

        Raises:
            ValueError: It is not a parameter of this optimizer.
            CollectiveError: Another rank reads another tensor. All ranks raise it, in the other reads too.
        """
        self._place_unfrozen()
        location = self._find(param)
        if location is None:
            whole: Tensor = whole_of(param.detach())
            return whole.float().clone()
        self._follow_alike("the master", *location, is_whole=True)
        return self._gather(MASTER, *location)

    def full_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return copies of "step" (0-D), "master" and the rule's slots ("exp_avg", ...), in the parameter's shape.

        A slot with one value per 64 elements is flat. The dict of a frozen parameter is empty. Raises as `full_master`.
        """
        self._place_unfrozen()
        location = self._find(param)
        if location is None:
            return {}
        self._follow_alike("the state", *location, is_whole=True)
        bucket, position = location
        return {STEP: bucket.steps[position].clone(), **{n: self._gather(n, *location) for n in bucket.state_names}}

    @torch.no_grad()
    def full_grad(self, param: Tensor) -> Tensor | None:
        """Return the gradient that the next step() uses: averaged over ranks, unscaled, fp32; None if no rank has one.

        It is clipped if clip_grad_norm_ was called; `max_grad_norm` acts in step() only. Finishes the reduction. Raises
        as `full_master`.
        """
        self._place_unfrozen("full_grad")
        location = self._find(param)
        if location is None:
            return None
        return self._whole_grad(*location, self._collect("full_grad"))

    def _whole_grad(self, bucket: Bucket, position: int, stats: GlobalGradStats) -> Tensor | None:
        local = self._local_grad(bucket, position, stats, is_whole=True)
        return None if local is None else widen(bucket, MASTER, position, local).clone()

    def _local_grad(
        self, bucket: Bucket, position: int, stats: GlobalGradStats, is_whole: bool = False
    ) -> Tensor | None:
        if not stats.used[bucket.numbers[position]]:
            return None
        self._group.check_alike(*self._spelled("the gradient", bucket, position, is_whole))
        flat = self._gradients.whole(bucket, position)
        for factor in (stats.unscale, self._gradients.factor()):
            if factor is not None:
                flat = flat * factor
        return bucket.shaped(flat, position)

    @torch.no_grad()
    def sum_tied_grads(self, tied: Iterable[tuple[Tensor, Any]]) -> None:
        """Sum the gradients of a weight over its copies on several pipeline stages, and give each copy the sum.

        Call it between backward and clipping or step(), on every rank of process_group and model_parallel_group, even
        without such a weight: it is collective over all of them. A weight that has no gradient on any stage gets none.
        Reads the device.

        Args:
            tied: (parameter, process group of the ranks that hold its copies in this pipeline), in the same order on
                these ranks. No copy but the first stage's has the attribute `model_parallel`.
        """
        self._place_unfrozen("sum_tied_grads")
        stats = self._collect("sum_tied_grads")
        sums = []
        for param, group in tied:
            if not param.requires_grad:
                continue
            bucket, position = self._find_trained(param)
            grad = self._whole_grad(bucket, position, stats)
            # The last element says whether there is a gradient.
            flat = torch.zeros(param.numel() + 1, dtype=torch.float32, device=param.device)
            if grad is not None:
                flat[:-1].view(param.shape).copy_(grad)
                flat[-1] = 1.0
            if group not in self._tied_groups:
                with on_device(param.device):
                    self._tied_groups[group] = Group(group)
            self._tied_groups[group].sum(flat, "the sum of tied gradients")
            if flat[-1]:
                part = part_of(flat[:-1].view(param.shape), param)
                sums.append((bucket, position, bucket.flat_of(part, position)))
        for bucket, position, flat in sums:
            self._gradients.replace(bucket, position, flat)

    def set_full_master(self, param: Tensor, value: Tensor) -> None:
        """Write a master and its weights. value: in the parameter's shape, the same on every rank.

        Raises:
            ValueError: It is not a parameter of this optimizer, or the value has another shape.
        """
        self.set_full_state(param, {MASTER: value})

    @torch.no_grad()
    def set_full_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Write some or all of the tensors that `full_state` returns.

        Raises:
            ValueError: Not a parameter of this optimizer, an unknown name, or another shape. Nothing is written.
        """
        bucket, position = self._find_trained(param)
        self._check_state(bucket, position, state, param.shape)
        own = {n: v if n == STEP or bucket.is_flat(n) else part_of(v, param) for n, v in state.items()}
        self._write_state(bucket, position, own)

    def _check_state(self, bucket: Bucket, position: int, state: dict[str, Any], shape: torch.Size) -> None:
        known = (STEP, *bucket.state_names)
        for name, value in state.items():
            if name not in known:
                raise ValueError(f"expected names of {', '.join(known)}, got {name!r}; leave it out")
            if name == STEP:
                check_step(STEP, value)
            else:
                _check_shape(name, value, bucket.whole_shape(name, position) if bucket.is_flat(name) else shape)

    def _write_state(self, bucket: Bucket, position: int, own: dict[str, Any]) -> None:
        """Write tensors in the local tensor's shape. A flat slot and the step have their own."""
        flat = {n: v if n == STEP or bucket.is_flat(n) else bucket.flat_of(v, position) for n, v in own.items()}
        bucket.write_state(position, flat)
        if MASTER in own:
            bucket.params[position].data.copy_(own[MASTER])
            bucket.flat_params.note_written(position)

    @torch.no_grad()
    def set_full_grad(self, param: Tensor, value: Tensor) -> None:
        """Write the gradient that the next step() uses, averaged and unscaled. A later backward adds to it.

        value: in the parameter's shape, the same on every rank. Collective, because it finishes the reduction first.
        Raises as `set_full_master`.
        """
        bucket, position = self._find_trained(param)
        _check_shape("the gradient", value, param.shape)
        self._collect("set_full_grad")
        self._gradients.replace(bucket, position, bucket.flat_of(part_of(value, param).float(), position))

    # ---- this rank's part of a DTensor ------------------------------------------------------------------------------

    def local_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return this rank's part of a DTensor's state: copies in the shape of `param.to_local()`, without the step.

        All ranks that hold the same part make the same call. With fully_shard, each part is on one rank. A frozen
        parameter has only its master. Raises as `full_master`.
        """
        self._place_unfrozen()
        location = self._find(param)
        if location is None:
            return {MASTER: local_of(param.detach()).float().clone()}
        self._follow_alike("the state", *location)
        return {name: self._gather_local(name, *location) for name in location.bucket.state_names}

    @torch.no_grad()
    def local_grad(self, param: Tensor) -> Tensor | None:
        """Return this rank's part of a DTensor's `full_grad`. Collective."""
        self._place_unfrozen("local_grad")
        location = self._find(param)
        local = None if location is None else self._local_grad(*location, self._collect("local_grad"))
        return None if local is None else local.clone()

    @torch.no_grad()
    def set_local_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Write some or all of the tensors that `local_state` returns, and the step. Raises as `set_full_state`."""
        bucket, position = self._find_trained(param)
        self._check_state(bucket, position, state, bucket.params[position].shape)
        self._write_state(bucket, position, state)

    @torch.no_grad()
    def set_local_grad(self, param: Tensor, value: Tensor) -> None:
        """Write this rank's part of the gradient that the next step() uses, as `set_full_grad` does."""
        bucket, position = self._find_trained(param)
        _check_shape("the gradient", value, bucket.params[position].shape)
        self._collect("set_local_grad")
        self._gradients.replace(bucket, position, bucket.flat_of(value.float(), position))

    # ---- where it lies ----------------------------------------------------------------------------------------------

    def _find(self, param: Tensor) -> Location | None:
        """Return where a parameter lies; None if it is frozen."""
        if param in self._param_buckets.locations:
            return self._param_buckets.locations[param]
        if any(candidate is param for group in self._param_groups for candidate in group["params"]):
            return None
        raise ValueError(
            f"expected a parameter of this optimizer, got a tensor of shape {tuple(param.shape)} that is none; "
            f"pass one that the optimizer was built with"
        )

    def _find_trained(self, param: Tensor) -> Location:
        location = self._find(param)
        if location is None:
            raise ValueError("expected a parameter in training, got a frozen one; unfreeze it and take a step first")
        return location

    def _mesh_groups(self) -> list[Group]:
        """Return the groups of ranks that hold other parts of DTensors."""
        return [dim.group for dim in self._topology.model_dims if dim.is_of_mesh]

    def _follow_alike(self, what: str, bucket: Bucket, position: int, is_whole: bool = False) -> None:
        """Have the masters follow the weights, and check that ranks read alike. Called before state is read."""
        self._follow(*self._spelled(what, bucket, position, is_whole))

    def _spelled(self, what: str, bucket: Bucket, position: int, is_whole: bool) -> tuple[str, Sequence[Group]]:
        """Return what Group.check_alike compares: parts of two parameters would be mixed. is_whole: Of a DTensor."""
        mesh_groups = self._mesh_groups() if is_whole and isinstance(bucket.params[position], LocalParam) else []
        return f"{what} of parameter {bucket.numbers[position]}", mesh_groups

    def _follow(self, what: str, mesh_groups: Sequence[Group]) -> None:
        """Have the masters follow the weights. If this rank fails, all ranks raise."""
        try:
            self._param_buckets.follow_weights()
        except (TypeError, ValueError):
            with suppress(CollectiveError):  # the other ranks raise it
                self._group.check_alike("nothing: it has an error", mesh_groups)
            raise
        self._group.check_alike(what, mesh_groups)

    def _gather(self, name: str, bucket: Bucket, position: int) -> Tensor:
        local = self._gather_local(name, bucket, position)
        return local if bucket.is_flat(name) else widen(bucket, name, position, local)

    def _gather_local(self, name: str, bucket: Bucket, position: int) -> Tensor:
        flat = gather_param(self._group, bucket, position, bucket.sharded(name), bucket.elements_per_value(name))
        return flat if bucket.is_flat(name) else bucket.shaped(flat, position)


def _check_shape(name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} as a tensor, got {type(value).__name__}; pass torch.as_tensor(value)")
    check_values(name, value)
    if value.shape != shape:
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}; pass the whole tensor")
