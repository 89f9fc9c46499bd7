"""A small GPT whose layers are split over two ranks, and trained on as many pairs of them as there are:

    torchrun --nproc-per-node 4 examples/tensor_parallel.py --tensor 2 --save runs/gpt
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --tensor 1 --load runs/gpt

torch splits the weights (parallelize_module); FusedZeroAdamW sees it in them, and shards its state over the data ranks.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pyzero

WIDTH, HEADS, LAYERS, CONTEXT, ROWS = 32, 4, 2, 32, 8
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.query, self.key, self.value))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # those of this rank
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights on every rank
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.place.weight
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), tokens[:, 1:].flatten())


def split(model: GPT, mesh: DeviceMesh) -> GPT:
    columns = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
    for block in model.blocks:
        parallelize_module(block, mesh, {**columns, "out": RowwiseParallel(), "down": RowwiseParallel()})
    return model


def batch(step: int) -> Tensor:
    begins = torch.randint(len(TEXT) - CONTEXT - 1, (ROWS,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[begin : begin + CONTEXT + 1] for begin in begins.tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=2, help="ranks that share a layer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", help="where a checkpoint goes")
    parser.add_argument("--load", help="where one is; of any mesh")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size() // args.tensor, args.tensor), mesh_dim_names=("dp", "tp"))
    model = split(GPT(), mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    first = pyzero.load_checkpoint(args.load, model=model, optimizer=optimizer)["step"] if args.load else 0
    for step in range(first, first + args.steps):
        loss = model(batch(step).chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, gradient norm {optimizer.grad_norm.item():.2f}")
    if args.save:
        pyzero.save_checkpoint(args.save, model=model, optimizer=optimizer, step=first + args.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
