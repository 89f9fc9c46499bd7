"""ZeroLamb: LAMB with its state partitioned over ranks, parameter by parameter, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero.arguments.hyper_parameters import as_number, check_betas, check_lr, check_not_negative, check_there
from pyzero.optimizer import ZeroOptimizer
from pyzero.update_rule import Cut, RunShard, StateSlot

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.arguments.options import ZeroOptions


class LambRule:
    """The rule of LAMB (You et al. 2019, arXiv 1904.00962), in the variant of DeepSpeed's FusedLamb.

    A parameter moves by lr * clamp(|p| / |u|) * u with u = m / (sqrt(v) + eps) + weight_decay * p. lr contains the bias
    correction of the moments.
    """

    name = "lamb"
    slots: tuple[StateSlot, ...] = (StateSlot("exp_avg"), StateSlot("exp_avg_sq"))
    cut = Cut.WHOLE  # the rule takes norms of whole parameters
    reads_lists = False
    writes_peer_weights = False

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        check_there(group, "bias_correction")
        check_lr(group)
        check_betas(group)
        check_not_negative("epsilon", "eps", group)
        check_not_negative("weight_decay", "weight_decay", group)
        if not 0.0 <= as_number("min_coeff", group["min_coeff"]) <= as_number("max_coeff", group["max_coeff"]):
            raise ValueError(
                f"expected 0 <= min_coeff <= max_coeff, got {group['min_coeff']} and {group['max_coeff']}; correct them"
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
        """See UpdateRule."""
        if not shard.parts:
            return
        beta1, beta2 = (float(beta) for beta in group["betas"])
        p, m, v = shard.master, shard.state["exp_avg"], shard.state["exp_avg_sq"]
        g = grad.float() * grad_scale
        m_new = beta1 * m + (1.0 - beta1) * g
        v_new = beta2 * v + (1.0 - beta2) * g * g
        u = m_new / (v_new.sqrt() + group["eps"]) + group["weight_decay"] * p
        moves = self._step_sizes(shard, group, beta1, beta2) * self._coefficients(shard, p, u, group, len(used))
        p_new = p - shard.spread(moves.float()) * u

        applies = shard.spread(used * (found_inf == 0)).bool()
        for old, new in ((p, p_new), (m, m_new), (v, v_new)):
            old.copy_(torch.where(applies, new, old))
        if shard.weights is not None:
            shard.weights.copy_(torch.where(applies, p.to(shard.weights.dtype), shard.weights))

    def _step_sizes(self, shard: RunShard, group: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        """Return the learning rates with bias correction: (num_params,) fp64."""
        steps = shard.steps.double()
        lr: Tensor = torch.full((), 1.0, dtype=torch.float64, device=steps.device) * group["lr"]
        if not group["bias_correction"]:
            return lr.expand_as(steps)
        return lr * (1.0 - beta2**steps).sqrt() / (1.0 - beta1**steps)

    def _coefficients(self, shard: RunShard, p: Tensor, u: Tensor, group: dict[str, Any], num_params: int) -> Tensor:
        """Return the trust ratios: (num_params,) fp64. A ratio is 1 if a norm is 0."""
        parts = [part for part in shard.parts if part.end > part.begin]
        nothing = torch.ones((), dtype=torch.float64, device=p.device)
        if not parts:
            return nothing.expand(num_params)
        p_norms, u_norms = (
            torch.stack(torch._foreach_norm([flat[part.begin : part.end] for part in parts])).double()
            for flat in (p, u)
        )
        ratios = (p_norms / u_norms).clamp(group["min_coeff"], group["max_coeff"])
        ratios = torch.where((p_norms != 0) & (u_norms != 0), ratios, 1.0)
        by_position = dict(zip([part.position for part in parts], ratios.unbind(), strict=True))
        # Stacked: to write them by index, the host would copy the indices to the GPU and wait.
        return torch.stack([by_position.get(position, nothing) for position in range(num_params)])


class ZeroLamb(ZeroOptimizer):
    """LAMB with fp32 masters, for large batches. The whole state of a parameter lies on one rank.

    Args:
        params: Parameters, named parameters or groups, as for torch.optim, in bf16, fp16 or fp32.
        lr: Learning rate, a number or a 0-D tensor.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Added to the update, times the weight, before its norm is taken.
        bias_correction: Correct the moments' bias, in the learning rate.
        max_coeff: The largest trust ratio.
        min_coeff: The smallest trust ratio.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            max_coeff=max_coeff,
            min_coeff=min_coeff,
        )
        super().__init__(params, LambRule(), defaults, **options)
