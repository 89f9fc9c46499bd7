"""What a ZeroOptimizer reports between steps: about the last step, and about how it was built."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from torch import Tensor

from pyzero.base import ZeroBase
from pyzero.gradients import nonfinite
from pyzero.sharding.local_param import is_dtensor, user_param


class LastStep(NamedTuple):
    """The numbers of the last step."""

    found_inf: Tensor  # (1,) fp32
    norm: Tensor  # 0-D fp32, before any clipping
    factored_norm: Tensor  # 0-D fp32, with the factors of clip_grad_norm_ and of the caller
    clip: Tensor  # 0-D fp32, the factor of max_grad_norm; 1 if it did not clip


class Status(ZeroBase):
    """The part of ZeroOptimizer that reports on the last step, and on how the optimizer was built."""

    _last: LastStep | None

    # ---- the last step ----------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """0-D tensor: the global 2-norm in the last step, before clipping; None before the first step."""
        return None if self._last is None else self._last.norm.clone()  # the next step overwrites it

    @property
    def clipped_grad_norm(self) -> Tensor | None:
        """0-D tensor: the global 2-norm in the last step, after clipping; None before the first step."""
        return None if self._last is None else self._last.factored_norm * self._last.clip

    @property
    def was_step_applied(self) -> bool:
        """Whether the last step() changed anything. Reads the device."""
        return self._last is not None and not bool(self._last.found_inf)

    @property
    def overflow(self) -> bool:
        """Whether the last step() was skipped: DeepSpeed's name, which accelerate looks for. Reads the device."""
        return self._last is not None and bool(self._last.found_inf)

    @property
    def _global_grad_norm(self) -> Tensor | float:
        """DeepSpeed's name for `grad_norm`, which scripts log; 0.0 before the first step."""
        return 0.0 if self._last is None else self._last.norm.clone()

    @property
    def cur_scale(self) -> float:
        """DeepSpeed's name for `loss_scale`. Reads the device."""
        return self.loss_scale

    @cur_scale.setter
    def cur_scale(self, value: float) -> None:
        self.loss_scale = value

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1.0 without scaling. It cannot be set. Reads the device."""
        return float(self._scaler.scale)

    @loss_scale.setter
    def loss_scale(self, value: float) -> NoReturn:
        raise AttributeError(
            f"expected a loss scale that is chosen before training, got {value!r} set on the optimizer, when gradients "
            f"may carry the present one; set fp16.initial_scale_power or fp16.loss_scale in the config, or pass "
            f"loss_scale= to the optimizer"
        )

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether there is a loss scale that changes with overflows: DeepSpeed's name."""
        return self._scaler.is_dynamic

    @property
    def clip_grad(self) -> float:
        """DeepSpeed's name for `max_grad_norm`; 0.0 without one. It cannot be set."""
        return float(self._options["max_grad_norm"] or 0.0)

    @clip_grad.setter
    def clip_grad(self, value: float) -> NoReturn:
        raise AttributeError(
            f"expected a norm to clip to that all ranks have agreed on, got {value!r} set on the optimizer; set "
            f"gradient_clipping in the config, or pass max_grad_norm= to the optimizer; for a norm that changes, call "
            f"optimizer.clip_grad_norm_(max_norm) before each step"
        )

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far. Reads the device."""
        return int(self._scaler.num_skipped)

    def _describe(self, code: float) -> str:
        """Put into words which gradient a code of pyzero/gradients/nonfinite.py means."""
        number, rank = nonfinite.decode(code, self._stats_exchange.names.num_ranks)
        if number is None:
            if self.model_parallel_rank is not None:
                return "a gradient of another rank of model_parallel_group, or the sum of gradients over replicas"
            if self._device.type == "cpu" and self._group.size > 1:  # each rank's own gradients were found finite
                return "the sum of the gradients over ranks"
            return "a gradient, whose parameter is looked for from the next step on"
        param, name = user_param(self._param_buckets.params[number]), self._name_of(number)
        where = "" if rank is None else f" in the part of rank {rank}" if is_dtensor(param) else f" on rank {rank}"
        return f"the gradient of {name}, shape {tuple(param.shape)},{where}".removesuffix(",")

    def _name_of(self, number: int) -> str:
        """Return a parameter's name for messages, by its number."""
        param = user_param(self._param_buckets.params[number])
        group_index = self._param_buckets.specs[number].run.group_index
        members = self._param_groups[group_index]["params"]
        return self._name(group_index, next(i for i, candidate in enumerate(members) if candidate is param))

    # ---- how it was built -------------------------------------------------------------------------------------------

    @property
    def rule_name(self) -> str:
        """The update rule's name. Adam and AdamW have the same one."""
        return self._rule.name

    def _takes_rule(self, name: str | None) -> bool:
        """Whether this optimizer can load state that was saved under this rule's name. None: saved by torch."""
        return name in (None, self.rule_name)

    @property
    def scales_loss(self) -> bool:
        """Whether there is a loss scale. `backward` applies it."""
        return self._scaler.enabled

    @property
    def is_scaled_backward(self) -> bool:
        """Whether a backward is running whose gradients carry the loss scale."""
        return self._scaled_backward.is_running

    @property
    def reduces_grads(self) -> bool:
        """Whether it averages gradients over its ranks. False with one rank, or with `reduce_grads=False`."""
        return self._gradients.reduces

    @property
    def model_parallel_rank(self) -> int | None:
        """This rank's index among the ranks of `model_parallel_group`; None without other ranks there."""
        others = self._topology.unmeshed
        return None if others is None else others.rank

    @property
    def model_parallel_size(self) -> int:
        """The number of ranks of `model_parallel_group`; 1 without such a group."""
        others = self._topology.unmeshed
        return 1 if others is None else others.size

    def state_bytes(self) -> int:
        """Return the bytes of masters and the rule's state on this rank."""
        return sum(tensor.nbytes for bucket in self._buckets for tensor in bucket.state_tensors())
