"""torch.compile of the model; the optimizer's hooks run between the compiled parts.

The first step compiles, for some 20 s; the other 99 take less than a second.

python examples/integrations/compiled.py
torchrun --standalone --nproc-per-node 2 examples/integrations/compiled.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from pyzero import FusedZeroAdamW


def main(steps=100, backend="inductor"):
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 4)).bfloat16()
    optimizer = FusedZeroAdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    compiled = torch.compile(model, backend=backend)
    target = torch.randn(16, 4)
    losses = []
    for step in tqdm(range(steps), disable=rank > 0):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))[rank::size]
        loss = (compiled(x.bfloat16()).float() - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
