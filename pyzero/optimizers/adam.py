"""FusedZeroAdam and FusedZeroAdamW: Adam with its state partitioned over ranks, on the fused op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero import ops
from pyzero.arguments.hyper_parameters import check_betas, check_lr, check_not_negative, check_there
from pyzero.optimizer import ZeroOptimizer
from pyzero.update_rule import Cut, GradList, RunShard, StateSlot, grad_and_offsets

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.arguments.options import ZeroOptions


# At this step count, beta^step is below 2^-54 for every beta up to _LARGEST_BETA, so that 1 - beta^step is exactly 1.
# All backends represent the count exactly: it fits into an int32 and into fp32.
_LATE = 2.0**30
_LARGEST_BETA = 1.0 - 2.0**-24


class AdamRule:
    """The rule of torch.optim.Adam and AdamW; see pyzero.ops.adam_."""

    name = "adam"
    slots: tuple[StateSlot, ...] = (StateSlot("exp_avg"), StateSlot("exp_avg_sq"))
    cut = Cut.ANYWHERE
    reads_lists = True
    writes_peer_weights = True

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        check_there(group, "decoupled_weight_decay", "maximize")
        check_lr(group)
        check_not_negative("epsilon", "eps", group)
        check_betas(group)
        check_not_negative("weight_decay", "weight_decay", group)
        if not group["bias_correction"] and max(group["betas"]) > _LARGEST_BETA:
            raise ValueError(
                f"expected betas up to {_LARGEST_BETA} without bias correction, got {group['betas']}; lower them"
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
        ops.adam_(
            shard.master,
            shard.state["exp_avg"],
            shard.state["exp_avg_sq"],
            grads,
            lr=group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=shard.steps if group["bias_correction"] else torch.full_like(shard.steps, _LATE),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            param_out=shard.weights_out,
            segment_ids=shard.segment_ids,
            active=used,
            grad_offsets=offsets,
            backend=backend,
        )


class FusedZeroAdam(ZeroOptimizer):
    """torch.optim.Adam with fp32 masters. Masters and moments are partitioned over the ranks of a process group.

    Args:
        params: Parameters, named parameters or groups, as for torch.optim, in bf16, fp16 or fp32.
        lr: Learning rate, a number or a 0-D tensor.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty; decoupled in FusedZeroAdamW.
        amsgrad: Refused, and so is `differentiable`. `foreach`, `capturable` and `fused` have no effect.
        maximize: Maximize the loss.
        decoupled_weight_decay: Decouple the weight decay, as AdamW does; default: the class's.
        bias_correction: False uses the moments without bias correction.
        **options: What all optimizers of pyzero take: stage, process_group, model_parallel_group, max_grad_norm,
            loss_scale, bucket_cap_mb, overlap, grad_reduce_dtype, reduce_grads, init_sync, cpu_offload,
            max_consecutive_skips, transport, backend. `help(pyzero.ZeroOptimizer)` explains them.

    Raises:
        ValueError: An argument is out of range.
        TypeError, CollectiveError: See ZeroOptimizer.
    """

    _decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool | None = None,
        bias_correction: bool = True,
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            decoupled_weight_decay=self._decoupled if decoupled_weight_decay is None else decoupled_weight_decay,
            bias_correction=bias_correction,
            amsgrad=amsgrad,  # these have no effect here, but torch's optimizers look for them in checkpoints
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, AdamRule(), defaults, **options)


class FusedZeroAdamW(FusedZeroAdam):
    """torch.optim.AdamW with fp32 masters. Masters and moments are partitioned over the ranks of a process group.

    It replaces torch.optim.AdamW and DistributedDataParallel: keep the model unwrapped, and the loop as it is.

    Args:
        params: Parameters, named parameters or groups, as for torch.optim, in bf16, fp16 or fp32.
        lr: Learning rate, a number or a 0-D tensor.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay: weights shrink by lr * weight_decay in each step.
        amsgrad: Refused, and so is `differentiable`. `foreach`, `capturable` and `fused` have no effect.
        maximize: Maximize the loss.
        decoupled_weight_decay: False makes the weight decay Adam's L2 penalty.
        bias_correction: False uses the moments without bias correction.
        **options: What all optimizers of pyzero take: stage, process_group, model_parallel_group, max_grad_norm,
            loss_scale, bucket_cap_mb, overlap, grad_reduce_dtype, reduce_grads, init_sync, cpu_offload,
            max_consecutive_skips, transport, backend. `help(pyzero.ZeroOptimizer)` explains them.

    Raises:
        ValueError: An argument is out of range.
        TypeError, CollectiveError: See ZeroOptimizer.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool | None = None,
        bias_correction: bool = True,
        **options: Unpack[ZeroOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            bias_correction=bias_correction,
            **options,
        )
