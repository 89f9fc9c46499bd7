"""What the training benches train: a model that returns its loss, and what each rank gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 16  # of Linears
_BLOCK_LAYERS = 4  # FSDP2 takes longer with blocks of one (docs/experiments.md)


class Model(Protocol):
    """A module, called with a rank's inputs."""

    blocks: nn.Module  # in order; FSDP2 shards one at a time

    def __call__(self, inputs: Tensor) -> Tensor:
        """The loss, 0-D fp32."""


class Workload(Protocol):
    """A model and its inputs, by their sizes."""

    @property
    def title(self) -> str:
        """Its name in tables."""

    def model(self) -> Any:
        """A Model in fp32, on torch's default device."""

    def inputs(self) -> Tensor:
        """A rank's inputs, on the CPU."""


def num_params(workload: Workload) -> int:
    """Its parameters; tied ones count once."""
    with torch.device("meta"):
        return sum(param.numel() for param in workload.model().parameters())


def to_json(workload: Any) -> list[Any]:
    """What `from_json` takes, for ranks."""
    return [type(workload).__name__, asdict(workload)]


def from_json(saved: list[Any]) -> Workload:
    kind, sizes = saved
    made: Workload = {"Linears": Linears, "GPT2": GPT2}[kind](**sizes)
    return made


# ---- square layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linears:
    """Square layers one after the other. The loss is the mean square of what comes out."""

    width: int
    rows: int = 16

    @property
    def title(self) -> str:
        return f"{LAYERS} x Linear({self.width})"

    def model(self) -> nn.Module:
        return _Linears(self.width)

    def inputs(self) -> Tensor:
        return _generated(lambda: torch.randn(self.rows, self.width)).bfloat16()


class _Linears(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, width) for _ in range(LAYERS)]
        blocks = (layers[begin : begin + _BLOCK_LAYERS] for begin in range(0, LAYERS, _BLOCK_LAYERS))
        self.blocks = nn.Sequential(*[nn.Sequential(*block) for block in blocks])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).float().square().mean()


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPT2:
    """Decoder blocks, with the embedding as the head. By default it has the sizes of the smallest GPT-2."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50_257
    tokens: int = 64  # per rank

    @property
    def title(self) -> str:
        return f"GPT-2 ({num_params(self) / 1e6:.3g}M)"

    def model(self) -> nn.Module:
        return GPT(self)

    def inputs(self) -> Tensor:
        return _generated(lambda: torch.randint(self.vocabulary, (1, self.tokens + 1)))


class GPT(nn.Module):
    """Decoder blocks of torch's own layers. It takes tokens, and returns the loss of the next token."""

    def __init__(self, sizes: GPT2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                sizes.width,
                sizes.heads,
                4 * sizes.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, n + 1) int64, n up to the context -> 0-D fp32."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.places.weight[: inputs.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _generated(make: Any) -> Tensor:
    """Random numbers, other ones on each rank."""
    torch.manual_seed(1 + dist.get_rank())
    made: Tensor = make()
    return made
