"""Whole tensors of a parameter whose state lies in shards: gathered to read, cut to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero.buckets import Bucket
from pyzero.reduction import gather_param

if TYPE_CHECKING:
    from pyzero.comm import Group
    from pyzero.grad_stats import GlobalGradStats
    from pyzero.gradients import Gradients

_SHARDED = ("master", "exp_avg", "exp_avg_sq")


class FullAccess:
    """`full_*` and `set_full_*` of FusedZeroAdam. All ranks call them alike; reading is collective."""

    _buckets: list[Bucket]
    _group: Group
    _gradients: Gradients

    def _collect(self, purpose: str) -> GlobalGradStats:
        raise NotImplementedError

    def _place_unfrozen(self) -> None:
        raise NotImplementedError

    def _sync_masters_from_weights(self) -> None:
        raise NotImplementedError

    def _state_was_written(self) -> None:
        raise NotImplementedError

    def full_master(self, param: Tensor) -> Tensor:
        """The fp32 master of a parameter, in its shape and memory order: a copy, the same on every rank.

        Raises:
            ValueError: Not a parameter of this optimizer.
        """
        self._place_unfrozen()
        place = self._find(param)
        if place is None:
            return param.detach().float().clone()
        self._sync_masters_from_weights()
        return self._gather("master", *place)

    def full_state(self, param: Tensor) -> dict[str, Tensor]:
        """Copies of "step" (0-D), "exp_avg", "exp_avg_sq" and "master", fp32, in the parameter's shape.

        A frozen parameter has none. Raises ValueError as `full_master`.
        """
        self._place_unfrozen()
        place = self._find(param)
        if place is None:
            return {}
        self._sync_masters_from_weights()
        bucket, position = place
        return {"step": bucket.steps[position].clone(), **{name: self._gather(name, *place) for name in _SHARDED}}

    @torch.no_grad()
    def full_grad(self, param: Tensor) -> Tensor | None:
        """The gradient that the next step() takes: averaged over ranks and unscaled, fp32.

        None where no rank has one. What clip_grad_norm_ has done to it shows; `max_grad_norm` acts in step() only.
        Finishes the reduction. Raises ValueError as `full_master`.
        """
        self._place_unfrozen()
        place = self._find(param)
        if place is None:
            return None
        bucket, position = place
        stats = self._collect("full_grad")
        if not stats.used[bucket.numbers[position]]:
            return None
        flat = self._gradients.whole(bucket, position)
        for factor in (stats.unscale, self._gradients.factor()):
            if factor is not None:
                flat = flat * factor
        whole = torch.empty_like(param, dtype=torch.float32)
        bucket.flat_of(whole, position).copy_(flat)
        return whole

    def set_full_master(self, param: Tensor, value: Tensor) -> None:
        """Write a master, and the weights with it. value: of the parameter's shape, the same on every rank.

        Raises:
            ValueError: Not a parameter of this optimizer, or another shape.
        """
        self.set_full_state(param, {"master": value})

    @torch.no_grad()
    def set_full_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Write those of "step", "exp_avg", "exp_avg_sq" and "master" that are given; see `full_state`.

        Raises:
            ValueError: Not a parameter of this optimizer, an unknown name, or another shape; nothing is written then.
        """
        bucket, position = self._find_trained(param)
        for name, value in state.items():
            if name not in (*_SHARDED, "step"):
                raise ValueError(f"expected names of {', '.join(('step', *_SHARDED))}, got {name!r}; correct it")
            if name in _SHARDED:
                _check_shape(name, value, param)
        if "step" in state:
            bucket.steps[position] = state["step"]
        here, there = bucket.own_part(position)
        for name in _SHARDED:
            if name in state:
                getattr(bucket, name)[here].copy_(bucket.flat_of(state[name], position)[there])
        if "master" in state:
            param.copy_(state["master"])
            bucket.weight_was_written(position)
        self._state_was_written()

    @torch.no_grad()
    def set_full_grad(self, param: Tensor, value: Tensor) -> None:
        """Write the gradient that the next step() takes, averaged and unscaled; a later backward adds to it.

        value: of the parameter's shape, the same on every rank. Finishes the reduction first, so it is collective.
        Raises ValueError as `set_full_master`.
        """
        bucket, position = self._find_trained(param)
        _check_shape("the gradient", value, param)
        self._collect("set_full_grad")
        self._gradients.replace(bucket, position, bucket.flat_of(value.float(), position))

    def _find(self, param: Tensor) -> tuple[Bucket, int] | None:
        """Where a parameter lies; None for one that is frozen."""
        for bucket in self._buckets:
            for position, candidate in enumerate(bucket.params):
                if candidate is param:
                    return bucket, position
        groups = self.param_groups  # type: ignore[attr-defined]
        if any(candidate is param for group in groups for candidate in group["params"]):
            return None
        raise ValueError(
            f"expected a parameter of this optimizer, got a tensor of shape {tuple(param.shape)} that is none; "
            f"pass one that the optimizer was built with"
        )

    def _find_trained(self, param: Tensor) -> tuple[Bucket, int]:
        place = self._find(param)
        if place is None:
            raise ValueError("expected a parameter in training, got a frozen one; unfreeze it and take a step first")
        return place

    def _gather(self, name: str, bucket: Bucket, position: int) -> Tensor:
        flat = gather_param(self._group, bucket, position, getattr(bucket, name))
        return bucket.shaped(flat, position).clone()


def _check_shape(name: str, value: Tensor, param: Tensor) -> None:
    if value.shape != param.shape:
        raise ValueError(
            f"expected {name} of shape {tuple(param.shape)}, got {tuple(value.shape)}; pass the whole tensor"
        )
