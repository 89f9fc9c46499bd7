"""A GPT in two pipeline stages, 1F1B, beside data parallelism: stages x replicas on a 2-D DeviceMesh.

torchrun --standalone --nproc-per-node 2 examples/pipeline.py
torchrun --standalone --nproc-per-node 4 examples/pipeline.py
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import data
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from tqdm import tqdm

import pyzero

WIDTH, CONTEXT, ROWS, MICRO_BATCHES, STAGES = 64, 64, 32, 4, 2


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.places.weight[: tokens.shape[1]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--data", help="a text file; default: the Python standard library")
parser.add_argument("--checkpoint", help="a folder: resume from it, on any number of replicas, and save to it")
args = parser.parse_args()
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size() // STAGES, STAGES), mesh_dim_names=("dp", "pp"))
replica, stage_index = mesh["dp"].get_local_rank(), mesh["pp"].get_local_rank()

torch.manual_seed(0)
layers = nn.Sequential(Embedding(), *(Block() for _ in range(4)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))
part = len(layers) // STAGES + 1
for index in range(len(layers)):
    if index // part != stage_index:
        layers[index] = nn.Identity()  # another stage's; the names stay those of the whole model
layers.bfloat16()
for param in layers.parameters():
    param.model_parallel = True  # this stage's alone: counted in the norm on every stage
optimizer = pyzero.FusedZeroAdamW(
    layers.parameters(), lr=3e-3, process_group=mesh["dp"], model_parallel_group=mesh["pp"], max_grad_norm=1.0
)
first = 0
if args.checkpoint and pyzero.latest_checkpoint(args.checkpoint):
    first = pyzero.load_checkpoint(args.checkpoint, model=layers, optimizer=optimizer)["step"]

stage = PipelineStage(layers, stage_index, STAGES, torch.device("cpu"), group=mesh["pp"].get_group())
# The loss is divided, for scale_grads=True divides all that is in .grad: twice, were there two calls before a step.
schedule = Schedule1F1B(stage, MICRO_BATCHES, lambda y, t: loss_of(y, t) / MICRO_BATCHES, scale_grads=False)
text = data.load(args.data, CONTEXT)
for step in tqdm(range(first, first + args.steps), disable=dist.get_rank() != 0):
    rows = text.batch(step, ROWS, CONTEXT + 1, seed=0).tensor_split(mesh["dp"].size())[replica]
    losses: list[Tensor] = []
    inputs = (rows[:, :-1].contiguous(),) if stage.is_first else ()  # torch 2.11 refuses strides of a part
    schedule.step(*inputs, target=rows[:, 1:] if stage.is_last else None, losses=losses, return_outputs=False)
    optimizer.step()  # stage 2: each micro-batch's gradients were reduced over "dp" in its backward
    optimizer.zero_grad()
    if stage.is_last and replica == 0 and step in (first, first + args.steps - 1):
        print(f"step {step}: loss {sum(losses).item():.3f}, norm {optimizer.grad_norm.item():.2f}")
if args.checkpoint:
    pyzero.save_checkpoint(args.checkpoint, model=layers, optimizer=optimizer, step=first + args.steps)
dist.destroy_process_group()
