"""ZeroMuon: Muon with its state partitioned over ranks, matrix by matrix, and AdamW for the other parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero.arguments.hyper_parameters import as_number, check_lr, check_not_negative, check_there
from pyzero.optimizer import ZeroOptimizer
from pyzero.optimizers.adam import AdamRule
from pyzero.state_dict import with_step_counts
from pyzero.update_rule import Cut, RunShard, StateSlot, UpdateRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyzero.arguments.options import ZeroOptions

_ADJUSTMENTS = (None, "original", "match_rms_adamw")
_MOST_ITERATIONS = 99  # torch's limit

# Defaults of a group with use_muon=False: torch.optim.AdamW's.
_ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "decoupled_weight_decay": True,
    "maximize": False,
    "bias_correction": True,
}


class MuonRule:
    """The rule of torch.optim.Muon: a step along the orthogonalised momentum (Jordan et al. 2024, Liu et al. 2025).

    The rank that holds a matrix orthogonalises all of it, in bf16, by Newton-Schulz iterations.
    """

    name = "muon"
    slots: tuple[StateSlot, ...] = (StateSlot("momentum_buffer"),)
    cut = Cut.WHOLE
    reads_lists = False
    writes_peer_weights = False

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        _check_use(group, True)
        check_there(group, "nesterov")
        check_lr(group)
        check_not_negative("weight_decay", "weight_decay", group)
        check_not_negative("epsilon", "eps", group)
        if not 0.0 <= as_number("momentum", group["momentum"]) <= 1.0:
            raise ValueError(f"expected momentum in [0, 1], got {group['momentum']}; 0.95 is the usual one")
        if not (isinstance(group["ns_steps"], int) and 0 <= group["ns_steps"] <= _MOST_ITERATIONS):
            raise ValueError(f"expected ns_steps up to {_MOST_ITERATIONS}, got {group['ns_steps']}; 5 is the usual one")
        coefficients = group["ns_coefficients"]
        if isinstance(coefficients, str) or not hasattr(coefficients, "__len__") or len(coefficients) != 3:
            raise ValueError(f"expected three ns_coefficients, got {coefficients!r}; pass (a, b, c), or leave them out")
        for coefficient in coefficients:
            as_number("each of ns_coefficients", coefficient)
        if group["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(
                f"expected adjust_lr_fn None, 'original' or 'match_rms_adamw', got {group['adjust_lr_fn']!r}; pass one "
                f"of these"
            )
        for index, param in enumerate(group.get("params", ())):
            if param.dim() < 2:
                raise ValueError(
                    f"expected matrices for Muon, got parameter {index} of shape {tuple(param.shape)}; put it into a "
                    f"group with use_muon=False, which AdamW trains"
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
        lr, momentum = group["lr"], group["momentum"]
        is_clean = found_inf.reshape(()) == 0
        for part in shard.parts:
            p, buf = part.view(shard.master), part.view(shard.state["momentum_buffer"])
            if not p.numel():
                continue
            g = part.view(grad).float() * grad_scale
            buf_new = buf.lerp(g, 1.0 - momentum)
            direction = g.lerp(buf_new, momentum) if group["nesterov"] else buf_new
            whole = direction.flatten(1)  # of a convolution: (out, in * kernel)
            move = _orthogonalised(whole, group["ns_coefficients"], group["ns_steps"], group["eps"]).reshape(p.shape)
            rate = lr * _lr_ratio(group["adjust_lr_fn"], whole.shape)
            p_new = p * (1.0 - lr * group["weight_decay"]) - rate * move.float()

            applies = is_clean & (used[part.position] != 0)
            p.copy_(torch.where(applies, p_new, p))
            buf.copy_(torch.where(applies, buf_new, buf))
            if shard.weights is not None:
                weights = part.view(shard.weights)
                weights.copy_(torch.where(applies, p.to(weights.dtype), weights))


def _check_use(group: dict[str, Any], use_muon: bool) -> None:
    if bool(group["use_muon"]) is not use_muon:
        raise ValueError(
            f"expected use_muon={use_muon} as when the group was added, got {group['use_muon']!r}; Muon's and AdamW's "
            f"state differ: build another optimizer"
        )


def _orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float) -> Tensor:
    """Return (rows, columns) bf16 with singular values near 1, by quintic Newton-Schulz over the smaller side."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _lr_ratio(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":  # Liu et al. 2025, arXiv 2502.16982
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class _AdamWRule(AdamRule):
    """AdamW for the groups with use_muon=False."""

    def check(self, group: dict[str, Any]) -> None:
        """See UpdateRule."""
        _check_use(group, False)
        super().check(group)


class ZeroMuon(ZeroOptimizer):
    """Muon with fp32 masters for hidden matrices, and fused AdamW for other groups. Each matrix is whole on one rank.

    AdamW trains the groups with `use_muon=False`: put embeddings, the output layer, norms and biases there. These
    groups take `lr`, `betas`, `eps` and `weight_decay`. Their defaults are torch.optim.AdamW's, not the arguments
    below. Each rank orthogonalises the matrices that it holds, so W ranks divide that work. Buckets are larger than
    with Adam: they have room for the largest matrix on each rank.

    Args:
        params: See ZeroOptimizer. Muon's parameters have 2 or more dimensions; those after the first count as columns.
        lr: Learning rate, a number or a 0-D tensor.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the momentum.
        nesterov: Use Nesterov momentum.
        ns_coefficients: Coefficients of the Newton-Schulz iteration.
        eps: Lower bound of the norm that a matrix is divided by.
        ns_steps: Number of Newton-Schulz iterations.
        adjust_lr_fn: "original" or None multiplies lr by sqrt(max(1, rows / columns)). "match_rms_adamw" multiplies it
            by 0.2 sqrt(max(rows, columns)), so that learning rates for AdamW fit.
        **options: What all optimizers of pyzero take: stage, process_group, model_parallel_group, max_grad_norm,
            loss_scale, bucket_cap_mb, overlap, grad_reduce_dtype, reduce_grads, init_sync, cpu_offload,
            max_consecutive_skips, transport, backend. `help(pyzero.ZeroOptimizer)` explains them.

    Raises:
        ValueError: An argument is out of range, or a group of Muon's has a vector.
        TypeError, CollectiveError: See ZeroOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[ZeroOptions],
    ) -> None:
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            use_muon=True,
        )
        self._adamw_rule = _AdamWRule()
        super().__init__(params, MuonRule(), defaults, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ZeroOptimizer. AdamW trains a group with use_muon=False."""
        is_group = isinstance(param_group, dict)  # torch refuses anything else
        if is_group and not param_group.get("use_muon", True):
            for name, value in _ADAMW_DEFAULTS.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def _is_of_rule(self, group_index: int, options: dict[str, Any]) -> bool:
        """See ZeroOptimizer."""
        if "dampening" in options and "ns_steps" not in options:  # from torch.optim.SGD: its buffer has the same name
            return False
        return super()._is_of_rule(group_index, options)

    def _complete_torch_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return with_step_counts(state_dict)

    def _rule_of(self, group: dict[str, Any]) -> UpdateRule:
        return self._rule if group["use_muon"] else self._adamw_rule
