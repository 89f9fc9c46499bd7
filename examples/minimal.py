import os

import torch
import torch.distributed as dist

from pyzero import FusedZeroAdamW

rank = int(os.environ.get("RANK", 0))  # torchrun's; without it this is the only process
if "RANK" in os.environ:
    dist.init_process_group("gloo")
# On GPUs: torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) first, "nccl" for "gloo", and model and x .cuda()
torch.manual_seed(rank)  # each rank draws its own data; all get rank 0's weights
model = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).bfloat16()
optimizer = FusedZeroAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
for step in range(301):
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    loss = (model(x) - x[:, :1].abs()).float().square().mean()
    loss.backward()  # averages the gradients over the ranks; each keeps its part of them
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0 and rank == 0:
        print(f"step {step}: loss {loss.item():.3f}")
if dist.is_initialized():
    dist.destroy_process_group()
