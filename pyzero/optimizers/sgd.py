"""FusedZeroSGD: SGD with momentum and with its state partitioned over ranks, on the fused op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyzero import ops
from pyzero.arguments.hyper_parameters import as_number, check_lr, check_not_negative, check_there
from pyzero.optimizer import ZeroOptimizer
from pyzero.state_dict import with_step_counts
from pyzero.update_rule import Cut, GradList, RunShard, StateSlot, UpdateRule, grad_and_offsets

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.arguments.options import ZeroOptions


class SGDRule:
    """The rule of torch.optim.SGD; see pyzero.ops.sgd_.

    Args:
        has_momentum: Keep a momentum buffer. Without one, groups cannot have momentum.
    """

    cut = Cut.ANYWHERE
    reads_lists = True
    writes_peer_weights = True

    def __init__(self, has_momentum: bool) -> None:
        self.name = "sgd_momentum" if has_momentum else "sgd"
        self.slots: tuple[StateSlot, ...] = (StateSlot("momentum_buffer"),) if has_momentum else ()

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        check_there(group, "maximize")
        check_lr(group)
        check_not_negative("momentum", "momentum", group)
        check_not_negative("weight_decay", "weight_decay", group)
        as_number("dampening", group["dampening"])  # any number, as in torch
        if group["nesterov"] and (not self.slots or group["dampening"] != 0):  # momentum may become 0 for a while
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening; got momentum={group['momentum']} and "
                f"dampening={group['dampening']}"
            )
        if bool(group["momentum"]) and not self.slots:
            raise ValueError(
                f"expected momentum 0 as when the group was added, got {group['momentum']}; there is no buffer for it: "
                f"build the optimizer with momentum, or pass cycle_momentum=False to a scheduler that sets it"
            )

    def update(
        self,
        shard: RunShard,
        grad: Tensor | GradList,
        group: dict[str, Any],
        *,
        grad_scale: float | Tensor,
        found_inf: Tensor,
        used: Tensor,
        backend: str,
    ) -> None:
        """See UpdateRule."""
        grads, offsets = grad_and_offsets(grad)
        ops.sgd_(
            shard.master,
            shard.state["momentum_buffer"] if group["momentum"] else None,  # without momentum torch leaves it alone
            grads,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            step=shard.steps,
            grad_scale=grad_scale,
            found_inf=found_inf,
            param_out=shard.weights_out,
            segment_ids=shard.segment_ids,
            active=used,
            grad_offsets=offsets,
            backend=backend,
        )


class FusedZeroSGD(ZeroOptimizer):
    """SGD with fp32 masters, and a momentum buffer for groups that have momentum when they are added.

    Args:
        params: Parameters, named parameters or groups, as for torch.optim, in bf16, fp16 or fp32.
        lr: Learning rate, a number or a 0-D tensor.
        momentum: Decay of the momentum. 0: no momentum, and no state.
        dampening: Dampening of the gradient in the momentum, except in a parameter's first step (step count 1).
        weight_decay: Added to the gradient, times the weight.
        nesterov: Use Nesterov momentum.
        maximize: Maximize the loss.
        differentiable: Refused. `foreach` and `fused` have no effect.
        **options: What all optimizers of pyzero take: stage, process_group, model_parallel_group, max_grad_norm,
            loss_scale, bucket_cap_mb, overlap, grad_reduce_dtype, reduce_grads, init_sync, cpu_offload,
            max_consecutive_skips, transport, backend. `help(pyzero.ZeroOptimizer)` explains them.

    Raises:
        ValueError: An argument is out of range.
        TypeError, CollectiveError: See ZeroOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,  # these have no effect here, but torch's optimizers look for them in checkpoints
            differentiable=differentiable,
            fused=fused,
        )
        self._with_buffer, self._without_buffer = SGDRule(True), SGDRule(False)
        super().__init__(params, self._rule_of(defaults), defaults, **options)

    def _options_for_rule(self, group_index: int) -> dict[str, Any]:
        """See ZeroOptimizer. The momentum of a group with a buffer may be 0 now; the copy takes that from the state."""
        return {"momentum": 1.0} if self._rules[group_index] is self._with_buffer else {}

    def _is_of_rule(self, group_index: int, options: dict[str, Any]) -> bool:
        """See ZeroOptimizer. A group with a buffer may have been saved while its momentum was 0."""
        if "ns_steps" in options:  # from torch.optim.Muon: its buffer has the same name
            return False
        return self._rules[group_index] is self._with_buffer or super()._is_of_rule(group_index, options)

    def _takes_rule(self, name: str | None) -> bool:
        """See `StateDicts`. State saved with or without momentum fits, because groups may differ in it."""
        return name in (self._with_buffer.name, self._without_buffer.name) or super()._takes_rule(name)

    def _complete_torch_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return with_step_counts(state_dict)

    def _rule_of(self, group: dict[str, Any]) -> UpdateRule:
        return self._with_buffer if group["momentum"] else self._without_buffer
