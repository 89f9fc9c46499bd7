"""The update rules of test_state_machine.py's programs: hyper-parameters, state, and one step in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import ADAM, UNIT
from torch import Tensor

import pyzero

FP32 = UNIT[torch.float32]
EPS = 1e-8
_ADAM = (
    dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1),
    dict(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0),
    dict(lr=2e-2, betas=(0.9, 0.99), weight_decay=0.01),
)
_SGD = (
    dict(lr=1e-2, momentum=0.9, dampening=0.0, nesterov=True, weight_decay=0.1),
    dict(lr=3e-3, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0),
    dict(lr=2e-2, momentum=0.5, dampening=0.25, nesterov=False, weight_decay=0.01),
)
_MUON = dict(lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, use_muon=True)
_ADAMW_OF_MUON = {**_ADAM[1], "maximize": False, "decoupled_weight_decay": True, "use_muon": False}
GROUPS: dict[str, tuple[dict[str, Any], ...]] = {  # for even parameters, odd ones, and those added later
    "adam": tuple({**options, "maximize": False, "decoupled_weight_decay": False} for options in _ADAM),
    "adamw": tuple({**options, "maximize": False, "decoupled_weight_decay": True} for options in _ADAM),
    "lion": tuple({**options, "maximize": False} for options in _ADAM),
    "lamb": _ADAM,
    "sgd": tuple({**options, "maximize": False} for options in _SGD),
    "muon": (_MUON, _ADAMW_OF_MUON, {**_MUON, "nesterov": False, "weight_decay": 0.0}),
}


@dataclass
class Slot:
    """A parameter's state in the model: the optimizer's state after the last step."""

    master: Tensor
    state: dict[str, Tensor]  # by the rule's names
    step: int = 0


def slots_of(rule: str, options: dict[str, Any]) -> tuple[str, ...]:
    """Names of a parameter's state, from the initial options of its group."""
    if rule == "sgd":
        return ("momentum_buffer",) if options["momentum"] else ()
    if rule == "lion":
        return ("exp_avg",)
    return ("momentum_buffer",) if options.get("use_muon") else ("exp_avg", "exp_avg_sq")


def is_matrix_rule(options: dict[str, Any]) -> bool:
    return bool(options.get("use_muon"))


def make(rule: str, groups: list[dict[str, Any]], **options: Any) -> pyzero.optimizer.ZeroOptimizer:
    """An optimizer with this rule."""
    kinds: dict[str, Any] = {
        "adam": pyzero.FusedZeroAdam,
        "adamw": pyzero.FusedZeroAdamW,
        "lion": pyzero.FusedZeroLion,
        "lamb": pyzero.ZeroLamb,
        "sgd": pyzero.FusedZeroSGD,
        "muon": pyzero.ZeroMuon,
    }
    found: pyzero.optimizer.ZeroOptimizer = kinds[rule](groups, **options)
    return found


def top(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def apply(rule: str, slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    """One step of a rule."""
    if rule == "muon":
        return _muon(slot, grad, options) if options["use_muon"] else _adam(slot, grad, options)
    return {"adam": _adam, "adamw": _adam, "lion": _lion, "lamb": _lamb, "sgd": _sgd}[rule](slot, grad, options)


def _moments(slot: Slot, grad: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    beta1, beta2 = options["betas"]
    exp_avg = slot.state["exp_avg"].double() * beta1 + grad * (1 - beta1)
    exp_avg_sq = slot.state["exp_avg_sq"].double() * beta2 + grad * grad * (1 - beta2)
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _adam(slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    """torch.optim.Adam or AdamW."""
    lr, (beta1, beta2), decay = options["lr"], options["betas"], options["weight_decay"]
    master, step = slot.master.double(), slot.step + 1
    grad = -grad if options["maximize"] else grad
    if options["decoupled_weight_decay"]:
        master = master * (1 - lr * decay)
    else:
        grad = grad + decay * master
    state = _moments(slot, grad, options)
    denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + EPS
    return Slot(master - lr / (1 - beta1**step) * state["exp_avg"] / denominator, state, step)


def _lion(slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    lr, (beta1, beta2) = options["lr"], options["betas"]
    grad = -grad if options["maximize"] else grad
    exp_avg = slot.state["exp_avg"].double()
    master = slot.master.double() * (1 - lr * options["weight_decay"])
    master = master - lr * torch.sign(beta1 * exp_avg + (1 - beta1) * grad)
    return Slot(master, {"exp_avg": beta2 * exp_avg + (1 - beta2) * grad}, slot.step + 1)


def _lamb(slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    """You et al. 2019, with DeepSpeed's clamp."""
    (beta1, beta2), step, master = options["betas"], slot.step + 1, slot.master.double()
    state = _moments(slot, grad, options)
    update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + EPS) + options["weight_decay"] * master
    norms = master.norm(), update.norm()
    ratio = (norms[0] / norms[1]).clamp(0.01, 10.0) if all(norms) else torch.tensor(1.0)
    lr = options["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return Slot(master - lr * ratio * update, state, step)


def _sgd(slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    """torch.optim.SGD. A parameter's first step is the one with count 1."""
    master, momentum = slot.master.double(), options["momentum"]
    grad = (-grad if options["maximize"] else grad) + options["weight_decay"] * master
    if not momentum:
        return Slot(master - options["lr"] * grad, slot.state, slot.step + 1)
    weight = 1 - options["dampening"] if slot.step else 1
    buffer = momentum * slot.state["momentum_buffer"].double() + weight * grad
    direction = grad + momentum * buffer if options["nesterov"] else buffer
    return Slot(master - options["lr"] * direction, {"momentum_buffer": buffer}, slot.step + 1)


def _muon(slot: Slot, grad: Tensor, options: dict[str, Any]) -> Slot:
    """torch.optim.Muon, with its iterations in bf16."""
    momentum, master = options["momentum"], slot.master.double()
    buffer = slot.state["momentum_buffer"].lerp(grad.float(), 1 - momentum)
    x = (grad.float().lerp(buffer, momentum) if options["nesterov"] else buffer).bfloat16()
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    move = (x.T if rows > columns else x).double() * math.sqrt(max(1.0, rows / max(columns, 1)))
    master = master * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * move
    return Slot(master, {"momentum_buffer": buffer.double()}, slot.step + 1)


def limits(
    rule: str, options: dict[str, Any], before: Slot, after: Slot, grad: Tensor, clip: tuple[float, float]
) -> dict[str, Tensor | float]:
    """The table's tolerances for one step, plus the error of a clip; see test_properties.limits_of.

    clip: The units of fp32 by which the clip rounds, and the relative error of its norm.
    """
    row, (by_clip, relative) = ADAM[torch.float32], clip
    lr, decay = options["lr"], options["weight_decay"]
    is_coupled = rule == "sgd" or not options.get("decoupled_weight_decay", True)
    largest = max(top(grad) + (decay * top(before.master) if is_coupled else 0.0), 0.0)
    if "exp_avg_sq" in before.state:
        largest = max(largest, top(before.state["exp_avg_sq"].sqrt()))
    first = next(iter(before.state.values()), None)
    largest = largest if first is None else max(largest, top(first))
    moved = max(lr, top(after.master - before.master))
    magnitude = max(top(before.master), top(after.master))
    beta2 = options["betas"][1] if "betas" in options else 0.0
    found: dict[str, Tensor | float] = {}
    for name in before.state:
        found[name] = row.exp_avg(largest) + (5 * by_clip + relative) * largest
        if name == "exp_avg_sq":
            found[name] = row.exp_avg_sq(largest, beta2) + (10 * by_clip + 2 * relative) * largest**2
    kept = 1.0 if is_coupled else 1 - lr * decay
    master: Tensor | float = row.master(1, magnitude, moved, beta2, kept) + (8 * by_clip + 2 * relative) * moved
    if rule == "sgd":
        master += lr * (row.exp_avg(2 * largest) + (5 * by_clip + relative) * largest)
    if rule == "lion":  # its direction may be 0 except for rounding
        direction = options["betas"][0] * before.state["exp_avg"].double() + (1 - options["betas"][0]) * grad.double()
        near = direction.abs() <= row.exp_avg(largest) + (5 * by_clip + relative) * largest
        master = master + 2 * lr * near
    if options.get("use_muon"):  # other roundings to bf16 may turn the singular vector of a value near 0
        rows, columns = before.master.shape
        master += (3.0 if by_clip else 0.05) * lr * math.sqrt(max(1.0, rows / max(columns, 1)))
    return {"master": master, **found}
