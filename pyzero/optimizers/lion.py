"""FusedZeroLion: Lion with its state partitioned over ranks, on the fused op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyzero import ops
from pyzero.arguments.hyper_parameters import check_betas, check_lr, check_not_negative, check_there
from pyzero.optimizer import ZeroOptimizer
from pyzero.update_rule import Cut, GradList, RunShard, StateSlot, grad_and_offsets

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.arguments.options import ZeroOptions


class LionRule:
    """The rule of Lion (Chen et al. 2023, arXiv 2302.06675); see pyzero.ops.lion_."""

    name = "lion"
    slots: tuple[StateSlot, ...] = (StateSlot("exp_avg"),)
    cut = Cut.ANYWHERE
    reads_lists = True
    writes_peer_weights = True

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        check_there(group, "maximize")
        check_lr(group)
        check_betas(group)
        check_not_negative("weight_decay", "weight_decay", group)

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
        ops.lion_(
            shard.master,
            shard.state["exp_avg"],
            grads,
            lr=group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            param_out=shard.weights_out,
            segment_ids=shard.segment_ids,
            active=used,
            grad_offsets=offsets,
            backend=backend,
        )


class FusedZeroLion(ZeroOptimizer):
    """Lion with fp32 masters. It keeps one moment, and moves every element by the same size, lr, up or down.

    Usual are a learning rate 3 to 10 times smaller than Adam's, and a weight decay larger by the same factor.

    Args:
        params: Parameters, named parameters or groups, as for torch.optim, in bf16, fp16 or fp32.
        lr: Learning rate, a number or a 0-D tensor.
        betas: Weight of the moment in the direction, and decay of the moment.
        weight_decay: Decoupled weight decay.
        maximize: Maximize the loss.
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
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, LionRule(), defaults, **options)
