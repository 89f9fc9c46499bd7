"""accelerate's loop: prepare, accumulate, backward, clip_grad_norm_, save_state, load_state.

torchrun --standalone --nproc-per-node 2 examples/integrations/accelerate_loop.py
"""

import torch
from accelerate import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from pyzero import FusedZeroAdamW
from pyzero.accelerate import Accelerator  # the line that differs: `from accelerate import Accelerator`


def build(accelerator):
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    data = TensorDataset(x, x @ torch.randn(16, 4))
    loader = DataLoader(data, batch_size=16)  # over all ranks
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).to(accelerator.device)
    optimizer = FusedZeroAdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return accelerator.prepare(model, optimizer, loader, schedule)


def epoch(accelerator, model, optimizer, loader, schedule):
    """Of 8 steps, each of two micro-batches: the loss of each micro-batch, averaged over ranks."""
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def main(folder="runs/accelerate", epochs=6, resume=False):
    split = DataLoaderConfiguration(split_batches=True)  # so that neither data nor schedule depends on the ranks
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2, dataloader_config=split)
    parts, losses = build(accelerator), []
    if resume:
        accelerator.load_state(folder)
    else:
        for _ in tqdm(range(epochs), disable=not accelerator.is_main_process):
            losses += epoch(accelerator, *parts)
        accelerator.save_state(folder)
    losses += epoch(accelerator, *parts)
    accelerator.print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses, accelerator


if __name__ == "__main__":
    main()[1].end_training()
