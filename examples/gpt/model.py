"""A GPT-2 over bytes, and text out of it."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256


def build(layers: int, width: int, heads: int, context: int, seed: int) -> nn.Module:
    """GPT-2 from a config, nothing downloaded: fp32, on the CPU, the same on every rank for the same seed."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=NUM_BYTES,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        initializer_range=0.05,  # GPT-2's 0.02 is for wider models: 51k tokens in, 2.54 nats per byte against 2.60
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's "gelu_new", in one pass
    )
    with redirect_stderr(StringIO()):  # notes on token ids that bytes do not have
        return GPT2LMHeadModel(config)


class Bytewise(nn.Module):
    """Next-byte loss of a model whose weights may be kept in one dtype and computed with in another.

    CPUs without bf16 arithmetic run torch's bf16 matrix products many times slower than its fp32 ones. There the
    bf16 weights are widened for the forward pass; gradients arrive in bf16 all the same.
    """

    def __init__(self, gpt: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.gpt = gpt
        self.compute_dtype = compute_dtype

    def logits(self, tokens: Tensor) -> Tensor:
        """(rows, context, 256) of (rows, context) tokens."""
        if next(self.gpt.parameters()).dtype == self.compute_dtype:
            return self.gpt(tokens).logits
        wide = {name: param.to(self.compute_dtype) for name, param in self.gpt.named_parameters()}
        output: Any = torch.func.functional_call(self.gpt, wide, (tokens,))
        return output.logits

    def forward(self, tokens: Tensor) -> Tensor:
        """0-D fp32: mean loss in nats per byte; the first byte of a window is given."""
        logits = self.logits(tokens)[:, :-1]
        return F.cross_entropy(logits.float().reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1))


@torch.no_grad()
def sample(model: Bytewise, prompt: str, num_bytes: int, context: int, seed: int, temperature: float = 0.7) -> str:
    """Text that the model continues the prompt with."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(num_bytes):
        logits = model.logits(tokens[:, -context:])[0, -1].float()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
