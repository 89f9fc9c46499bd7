"""What a torch user writes today, at its best setting."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .harness import Options

Maker = Callable[[Tensor, Tensor], tuple[Parameter, torch.optim.Optimizer]]


def normal(numel: int, seed: int, options: Options, std: float = 1.0) -> Tensor:
    """(numel,) fp32 on the device, the same every time."""
    generator = torch.Generator(options.device).manual_seed(seed)
    return torch.randn(numel, generator=generator, device=options.device).mul_(std)


def split(flat: Tensor, num_tensors: int) -> list[Tensor]:
    """Copies of the parts, each where an allocator puts it, as gradients lie."""
    return [piece.clone() for piece in flat.tensor_split(num_tensors)]


def adamw(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-2, fused=True)


def adamw_peers(options: Options) -> dict[str, Maker]:
    """Name -> maker of (parameter, optimizer); torch first, DeepSpeed's where it is installed."""
    makers: dict[str, Maker] = {"torch AdamW(fused=True)": _maker(adamw)}
    if importlib.util.find_spec("deepspeed") is not None:
        makers["deepspeed"] = _maker(_deepspeed(options))
    return makers


def _maker(make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]) -> Maker:
    def made(weights: Tensor, grad: Tensor) -> tuple[Parameter, torch.optim.Optimizer]:
        param = Parameter(weights.clone())
        param.grad = grad.clone()
        return param, make([param])

    return made


def _deepspeed(options: Options) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if options.device == "cuda":
        return lambda params: FusedAdam(params, lr=1e-3, weight_decay=1e-2, adam_w_mode=True)
    return lambda params: DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=1e-2, adamw_mode=True)


class MixedStep:
    """Mixed precision by hand: 16-bit weights and gradients, fp32 masters.

    Cast the gradients up, unscale and check them, clip, fused AdamW, copy the weights back; every call a foreach one.
    `folded` is the better-informed variant: no unscale pass, the inverse scale and the flag go into fused AdamW as
    GradScaler does it, and the clip coefficient with them.
    """

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], max_norm: float, folded: bool) -> None:
        self.weights = list(weights)
        self.grads = list(grads)
        self.masters = [Parameter(weight.float()) for weight in weights]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.master_grads = [master.grad for master in self.masters]
        self.max_norm = max_norm
        self.folded = folded
        self.optimizer = adamw(self.masters)
        device = self.weights[0].device
        self.found_inf = torch.zeros((), device=device)
        self.inv_scale = torch.ones((), device=device)
        self.norm = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.master_grads, self.grads)
        self.found_inf.zero_()
        if self.folded:
            self._folded()
        else:
            self._plain()
        torch._foreach_copy_(self.weights, self.masters)

    def _plain(self) -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(self.master_grads, self.found_inf, self.inv_scale)
        self.norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm, foreach=True)
        self.optimizer.found_inf = self.found_inf
        self.optimizer.step()

    def _folded(self) -> None:
        self.norm = torch.nn.utils.get_total_norm(self.master_grads, foreach=True)
        self.optimizer.found_inf = (~torch.isfinite(self.norm)).float()
        self.optimizer.grad_scale = (self.norm + 1e-6).div(self.max_norm).clamp(min=1.0)
        self.optimizer.step()
