"""The alternatives that a torch user has today, each at its best setting."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .options import Options

Optimize = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
Maker = Callable[[Tensor, Tensor], tuple[Parameter, torch.optim.Optimizer]]

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 1e-2, 0.9
LION_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Peer:
    """A library that --peers can name."""

    module: str
    distribution: str
    needs_gpu: bool = False


PEERS = {
    "torch-fused": Peer("torch", "torch"),
    "torch-foreach": Peer("torch", "torch"),
    "ddp": Peer("torch", "torch"),
    "fsdp2": Peer("torch", "torch"),
    "zero-redundancy": Peer("torch", "torch"),
    "deepspeed": Peer("deepspeed", "deepspeed"),
    "apex": Peer("apex", "apex", needs_gpu=True),
    "transformer-engine": Peer("transformer_engine", "transformer-engine", needs_gpu=True),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes", needs_gpu=True),
}


def absent(options: Options) -> dict[str, str]:
    """The peers that cannot be timed here, and why."""
    found = {}
    for key, peer in PEERS.items():
        if importlib.util.find_spec(peer.module) is None:
            found[key] = "(not installed)"
        elif peer.needs_gpu and options.device != "cuda":
            found[key] = "(needs a GPU)"
    return found


def is_there(key: str, options: Options) -> bool:
    return key not in absent(options) and options.wants(key)


def versions(options: Options) -> dict[str, str]:
    """Versions of the libraries that are timed."""
    found = {}
    for key, peer in PEERS.items():
        if is_there(key, options):
            try:
                found[key] = importlib.metadata.version(peer.distribution)
            except importlib.metadata.PackageNotFoundError:  # apex is often built in place
                found[key] = "of unknown version"
    return found


def normal(numel: int, seed: int, options: Options, std: float = 1.0) -> Tensor:
    """(numel,) fp32 values on the device. The same seed gives the same values."""
    generator = torch.Generator(options.device).manual_seed(seed)
    return torch.randn(numel, generator=generator, device=options.device).mul_(std)


def split(flat: Tensor, num_tensors: int) -> list[Tensor]:
    """Copies of the parts, each allocated by itself, as gradients are."""
    return [piece.clone() for piece in flat.tensor_split(num_tensors)]


def adamw(params: Any, kind: str = "fused") -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **{kind: True})


def sgd(params: Any, kind: str = "fused") -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **{kind: True})


# ---- fp32 optimizers ------------------------------------------------------------------------------------------------


def _deepspeed(name: str, device: str) -> Optimize:
    """DeepSpeed's Adam or Lion. `name` is in lower case."""
    kind = ("DeepSpeedCPU" if device == "cpu" else "Fused") + name.capitalize()
    more: dict[str, Any] = {"betas": LION_BETAS}  # its default is Adam's
    if name == "adam":
        more = {"adamw_mode" if device == "cpu" else "adam_w_mode": True}
    make = getattr(importlib.import_module(f"deepspeed.ops.{name}"), kind)
    return lambda params: make(params, lr=LR, weight_decay=WEIGHT_DECAY, **more)


def _apex(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    module = importlib.import_module("apex.optimizers")
    return module.FusedAdam(params, lr=LR, weight_decay=WEIGHT_DECAY, adam_w_mode=True)


def _transformer_engine(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    module = importlib.import_module("transformer_engine.pytorch.optimizers")
    return module.FusedAdam(params, lr=LR, weight_decay=WEIGHT_DECAY, adam_w_mode=True)


def _bitsandbytes(name: str) -> Optimize:
    module = importlib.import_module("bitsandbytes.optim")
    return lambda params: getattr(module, name)(params, lr=LR, weight_decay=WEIGHT_DECAY)


def adamw_peers(options: Options) -> dict[str, tuple[str, Maker]]:
    """Name -> (key, maker of (parameter, optimizer)) of AdamW in fp32. torch's fused AdamW comes first."""
    every: dict[str, tuple[str, Optimize]] = {
        "torch AdamW(fused=True)": ("torch-fused", adamw),
        "torch AdamW(foreach=True)": ("torch-foreach", lambda params: adamw(params, "foreach")),
        "DeepSpeed Adam": ("deepspeed", lambda params: _deepspeed("adam", options.device)(params)),
        "apex FusedAdam": ("apex", _apex),
        "TransformerEngine FusedAdam": ("transformer-engine", _transformer_engine),
        "bitsandbytes AdamW32bit": ("bitsandbytes", lambda params: _bitsandbytes("AdamW32bit")(params)),
    }
    return _those_there(every, options)


def lion_peers(options: Options) -> dict[str, tuple[str, Maker]]:
    """The same for Lion. torch has none, so one written by hand comes first."""
    every: dict[str, tuple[str, Optimize]] = {
        "torch foreach, by hand": ("torch-foreach", ForeachLion),
        "DeepSpeed Lion": ("deepspeed", lambda params: _deepspeed("lion", options.device)(params)),
        "bitsandbytes Lion32bit": ("bitsandbytes", lambda params: _bitsandbytes("Lion32bit")(params)),
    }
    return _those_there(every, options)


def sgd_peers(options: Options) -> dict[str, tuple[str, Maker]]:
    """The same for torch.optim.SGD with momentum."""
    every: dict[str, tuple[str, Optimize]] = {
        "torch SGD(fused=True)": ("torch-fused", sgd),
        "torch SGD(foreach=True)": ("torch-foreach", lambda params: sgd(params, "foreach")),
    }
    return _those_there(every, options)


def _those_there(every: dict[str, tuple[str, Optimize]], options: Options) -> dict[str, tuple[str, Maker]]:
    """Keep the peers that run here, and always the first: ours is checked against it."""
    keys = [name for index, (name, (key, _)) in enumerate(every.items()) if not index or is_there(key, options)]
    return {name: (every[name][0], _maker(every[name][1])) for name in keys}


def _maker(make: Optimize) -> Maker:
    def made(weights: Tensor, grad: Tensor) -> tuple[Parameter, torch.optim.Optimizer]:
        param = Parameter(weights.clone())
        param.grad = grad.clone()
        return param, make([param])

    return made


class ForeachLion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023) in torch's foreach calls."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, dict(lr=LR, betas=LION_BETAS, weight_decay=WEIGHT_DECAY))
        self._weights = list(params)
        self._exp_avgs = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        grads = [param.grad for param in self._weights]
        updates = torch._foreach_mul(self._exp_avgs, 0.9)
        torch._foreach_add_(updates, grads, alpha=0.1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(self._weights, 1 - LR * WEIGHT_DECAY)
        torch._foreach_add_(self._weights, updates, alpha=-LR)
        torch._foreach_mul_(self._exp_avgs, 0.99)
        torch._foreach_add_(self._exp_avgs, grads, alpha=0.01)


# ---- the mixed-precision step ---------------------------------------------------------------------------------------


class MixedStep:
    """Mixed precision by hand: 16-bit weights and gradients, fp32 masters.

    A step casts the gradients up, unscales and checks them, clips, runs AdamW and copies the weights back, all in
    foreach calls. `folded` is the faster variant without an unscale pass: flag, inverse scale and clip coefficient go
    into fused AdamW, as GradScaler passes the first two. Without `checks` there is no unscale pass and no flag, as in
    bf16 without a GradScaler: an inf in a gradient gets into the weights.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        max_norm: float,
        folded: bool,
        kind: str = "fused",
        checks: bool = True,
    ) -> None:
        self.weights = list(weights)
        self.grads = list(grads)
        self.masters = [Parameter(weight.float()) for weight in weights]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.master_grads = [master.grad for master in self.masters]
        self.max_norm = max_norm
        self.folded = folded
        self.checks = checks
        self.optimizer = adamw(self.masters, kind)
        device = self.weights[0].device
        self.found_inf = torch.zeros((), device=device)
        self.inv_scale = torch.ones((), device=device)
        self.norm = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.master_grads, self.grads)
        if self.folded:
            self._folded()
        elif self.checks:
            self._checked()
        else:
            self.norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm, foreach=True)
            self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)

    def _checked(self) -> None:
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(self.master_grads, self.found_inf, self.inv_scale)
        self.norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm, foreach=True)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = self.found_inf
            self.optimizer.step()
        elif not self.found_inf.item():  # as GradScaler does if the optimizer takes no flag
            self.optimizer.step()

    def _folded(self) -> None:
        self.norm = torch.nn.utils.get_total_norm(self.master_grads, foreach=True)
        self.optimizer.found_inf = (~torch.isfinite(self.norm)).float()
        self.optimizer.grad_scale = (self.norm + 1e-6).div(self.max_norm).clamp(min=1.0)
        self.optimizer.step()


class LibraryStep:
    """apex's or TransformerEngine's fused Adam, which keeps the masters itself. torch clips."""

    def __init__(self, module: str, weights: Sequence[Tensor], grads: Sequence[Tensor], max_norm: float) -> None:
        self.weights = [Parameter(weight) for weight in weights]
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad  # torch clips it in place: later steps find a norm of max_norm, and do the same work
        self.max_norm = max_norm
        make = importlib.import_module(module).FusedAdam
        more = {"capturable": True} if module.startswith("apex") else {}  # apex keeps masters only if capturable
        self.optimizer = make(
            self.weights, lr=LR, weight_decay=WEIGHT_DECAY, adam_w_mode=True, master_weights=True, **more
        )

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm, foreach=True)
        self.optimizer.step()


_FUSED, _FOLDED, _FOREACH = "torch foreach, fused AdamW", "same, clip folded into AdamW", "torch foreach, AdamW"
_UNCHECKED = "clip_grad_norm_, AdamW(fused) on masters, copy back"
_LIBRARIES = {
    "apex FusedAdam, masters": ("apex", "apex.optimizers"),
    "TransformerEngine FusedAdam, masters": ("transformer-engine", "transformer_engine.pytorch.optimizers"),
}


def mixed_peers(options: Options, max_norm: float) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Name -> (key, maker). The maker takes lists of weights and gradients; its result has `step` and `weights`."""
    made: dict[str, tuple[str, Callable[..., Any]]] = {
        _FUSED: ("torch-fused", lambda weights, grads: MixedStep(weights, grads, max_norm, False)),
        _FOLDED: ("torch-fused", lambda weights, grads: MixedStep(weights, grads, max_norm, True)),
        _UNCHECKED: ("torch-fused", lambda weights, grads: MixedStep(weights, grads, max_norm, False, checks=False)),
        _FOREACH: ("torch-foreach", lambda weights, grads: MixedStep(weights, grads, max_norm, False, "foreach")),
    }
    for name, (key, module) in _LIBRARIES.items():
        if is_there(key, options):
            made[name] = (key, lambda w, g, module=module: LibraryStep(module, w, g, max_norm))
    return made
