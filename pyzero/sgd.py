"""ZeroSGD: SGD with momentum, its state partitioned over ranks, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero.arguments import check_lr, check_not_negative
from pyzero.optimizer import ZeroOptimizer
from pyzero.state import with_step_counts
from pyzero.update_rule import Cut, RunShard, StateSlot, UpdateRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.optimizer import ZeroOptions


class SGDRule:
    """torch.optim.SGD's rule.

    Args:
        has_momentum: Keep a momentum buffer. Without, groups cannot have momentum.
    """

    cut = Cut.ANYWHERE
    reads_lists = False
    pushes = False

    def __init__(self, has_momentum: bool) -> None:
        self.name = "sgd_momentum" if has_momentum else "sgd"
        self.slots: tuple[StateSlot, ...] = (StateSlot("momentum_buffer"),) if has_momentum else ()

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        check_lr(group)
        check_not_negative("momentum", "momentum", group)
        check_not_negative("weight_decay", "weight_decay", group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening; got momentum={group['momentum']} and "
                f"dampening={group['dampening']}"
            )
        if bool(group["momentum"]) and not self.slots:
            raise ValueError(
                f"expected momentum 0 as when the group was added, got {group['momentum']}; there is no buffer for it: "
                f"build the optimizer with momentum"
            )

    def update(
        self,
        shard: RunShard,
        grad: Tensor,
        group: dict[str, Any],
        *,
        grad_scale: float | Tensor,
        found_inf: Tensor,
        used: Tensor,
        backend: str,
    ) -> None:
        """See UpdateRule. In the order of torch's operations."""
        p, lr = shard.master, group["lr"]
        applies = shard.spread(used * (found_inf == 0)).bool()
        move = grad.float() * grad_scale
        if group["maximize"]:
            move.neg_()
        if group["weight_decay"]:
            move.add_(p, alpha=group["weight_decay"])
        if self.slots:
            move = self._with_momentum(shard, move, group, applies)
        p_new = p.addcmul(move, lr, value=-1) if isinstance(lr, Tensor) else p.add(move, alpha=-lr)
        torch.where(applies, p_new, p, out=p)
        if shard.weights is not None:
            shard.weights.copy_(torch.where(applies, p.to(shard.weights.dtype), shard.weights))

    def _with_momentum(self, shard: RunShard, grad: Tensor, group: dict[str, Any], applies: Tensor) -> Tensor:
        """(n,) the step's direction; the buffer is written where the step applies."""
        buffer, momentum, dampening = shard.state["momentum_buffer"], group["momentum"], group["dampening"]
        new = (buffer * momentum).add_(grad, alpha=1.0 - dampening)
        if dampening:  # not of the first gradient
            new = torch.where(shard.spread(shard.steps) == 1, grad, new)
        torch.where(applies, new, buffer, out=buffer)
        return grad.add_(new, alpha=momentum) if group["nesterov"] else new


class ZeroSGD(ZeroOptimizer):
    """SGD with fp32 masters, and a momentum buffer for groups that have momentum when they are added.

    Args:
        params: See ZeroOptimizer.
        lr: Learning rate, a number or a 0-D tensor.
        momentum: Decay of the momentum; 0: none, and no state.
        dampening: Of the gradient in the momentum.
        weight_decay: Added to the gradient, times the weight.
        nesterov: Nesterov's momentum.
        maximize: Ascend.
        **options: Those of ZeroOptimizer: stage, process_group, max_grad_norm, loss_scale, ...

    Raises:
        ValueError: An argument out of range.
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
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        self._with_buffer, self._without_buffer = SGDRule(True), SGDRule(False)
        super().__init__(params, self._rule_of(defaults), defaults, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ZeroOptimizer. A torch.optim.SGD's is taken too."""
        super().load_state_dict(with_step_counts(state_dict))

    def _rule_of(self, group: dict[str, Any]) -> UpdateRule:
        return self._with_buffer if group["momentum"] else self._without_buffer
