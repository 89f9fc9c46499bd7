"""The model that DeepSpeed (make_deepspeed_fixtures.py) and the tests of its checkpoints train with the same gradients.

The gradients are multiples of 1/4, and their means over ranks are multiples of 1/8. They are exact in 16 bits and in
any order of summation, so that the two differ only by the rounding of Adam.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "data" / "deepspeed"
SAVED_AT, STEPS = 3, 8  # steps before the checkpoint "saved", and before "later"
OVERFLOWS_AT = (1, 5, 6)  # steps, in fp16
GROWS_AT = 4  # the step at which the dynamic loss scale grows, with SCALING
LR, DECAY = 2.0**-5, 0.125
BETAS = (0.9, 0.999)
CLIENT_STATE = {"epoch": 3, "note": "plain data", "seen": [1, 2.5, None]}
SCALING = {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 1}


@dataclass(frozen=True)
class Case:
    """One checkpoint folder."""

    name: str
    precision: str  # "fp16" or "bf16"
    stage: int
    num_ranks: int
    optimizer: str = "AdamW"
    zero: dict[str, Any] = field(default_factory=dict)  # further keys of "zero_optimization"
    config: dict[str, Any] = field(default_factory=dict)  # further keys of the config
    params: dict[str, Any] = field(default_factory=lambda: {"torch_adam": True})  # further parameters of the optimizer
    has_fresh: bool = False  # there is also a checkpoint "fresh", from before the first step

    @property
    def dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]

    @property
    def has_dynamic_scale(self) -> bool:
        return self.precision == "fp16" and "fp16" not in self.config


CASES = (
    Case("fp16-stage1", "fp16", 1, 1, has_fresh=True),
    Case("fp16-stage2-2ranks", "fp16", 2, 2),
    Case("bf16-stage1-2ranks", "bf16", 1, 2, optimizer="Adam", params={"torch_adam": True, "adam_w_mode": False}),
    Case("bf16-stage2", "bf16", 2, 1, params={}),  # DeepSpeed's own FusedAdam
    Case("fp16-stage2-3ranks-fixed-scale", "fp16", 2, 3, config={"fp16": {"enabled": True, "loss_scale": 64.0}}),
    Case("bf16-optimizer-2ranks", "bf16", 1, 2, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case("fp16-round-robin-2ranks", "fp16", 2, 2, zero={"round_robin_gradients": True, "parameter_alignment": True}),
    Case("bf16-elastic-2ranks", "bf16", 2, 2, zero={"elastic_checkpoint": True}),
)


class Model(nn.Module):
    """Odd sizes, a bias, a tied weight, one of 1 element, an empty one, a frozen layer, buffers. No layer is called."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 7)
        self.frozen = nn.Linear(7, 3)
        self.norm = nn.LayerNorm(7)
        self.temperature = nn.Parameter(torch.zeros(1))
        self.empty = nn.Parameter(torch.zeros(0))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("num_batches", torch.tensor(5))
        self.frozen.requires_grad_(False)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator).clamp(-3, 3)

    def groups(self) -> list[dict[str, Any]]:
        trained = [param for param in self.parameters() if param.requires_grad]
        decayed = [param for param in trained if param.ndim > 1]
        others = [param for param in trained if param.ndim <= 1]
        return [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0, "lr": LR / 2}]

    def forward(self, grads: list[Tensor]) -> Tensor:
        """A loss that has these gradients."""
        trained = [param for param in self.parameters() if param.requires_grad]
        products = [(param.float() * grad).sum() for param, grad in zip(trained, grads, strict=True)]
        return torch.stack(products).sum()


def local_gradients(model: Model, case: Case, step: int, rank: int) -> list[Tensor]:
    """The gradients of one rank's loss, for each trained parameter."""
    grads = []
    for index, param in enumerate(param for param in model.parameters() if param.requires_grad):
        numbers = torch.arange(param.numel()).reshape(param.shape)
        grad = ((7 * numbers + 5 * index + 4 * step + 2 * rank) % 9 - 4) / 4
        grads.append(grad * 3 if case.num_ranks == 3 else grad)  # thirds are not exact
    if case.precision == "fp16" and step in OVERFLOWS_AT:
        next(grad for grad in grads if grad.ndim > 1)[2, 1] = float("inf")
    return grads


def mean_gradients(model: Model, case: Case, step: int) -> list[Tensor]:
    """The gradients that DeepSpeed's Adam gets: half the mean if the loss scale grows, as it divides by the new one."""
    of_ranks = [local_gradients(model, case, step, rank) for rank in range(case.num_ranks)]
    factor = 0.5 if case.has_dynamic_scale and step == GROWS_AT else 1.0
    return [torch.stack(grads).mean(0) * factor for grads in zip(*of_ranks, strict=True)]
