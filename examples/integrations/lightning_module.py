"""A LightningModule with automatic and with manual optimisation, under DDP, which averages the gradients.

python examples/integrations/lightning_module.py
torchrun --standalone --nproc-per-node 2 examples/integrations/lightning_module.py
"""

import os

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyzero import FusedZeroAdamW


class Module(lightning.LightningModule):
    def __init__(self, automatic):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.automatic_optimization, self.losses = automatic, []

    def configure_optimizers(self):
        return FusedZeroAdamW(self.parameters(), lr=1e-2, reduce_grads=False)  # DDP has reduced them

    def training_step(self, batch, index):
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())
        return loss


class WholeState(lightning.pytorch.strategies.DDPStrategy):
    def optimizer_state(self, optimizer):  # on all ranks: rank 0's file holds the whole state, not its shard
        return optimizer.full_state_dict(to=0)


def main(folder="runs/lightning", automatic=True, epochs=6, resume=None, module_class=Module, **options):
    lightning.seed_everything(0)
    x = torch.randn(256, 16)
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    loader = DataLoader(TensorDataset(x, x @ torch.randn(16, 4)), batch_size=16 // num_ranks)
    module = module_class(automatic)
    options = {"strategy": WholeState(), **({"gradient_clip_val": 1.0} if automatic else {}), **options}
    trainer = lightning.Trainer(default_root_dir=folder, max_epochs=epochs, devices=num_ranks, logger=False, **options)
    trainer.fit(module, loader, ckpt_path=resume)
    return module.losses, trainer


if __name__ == "__main__":
    for automatic in (True, False):
        losses, _ = main(automatic=automatic)
        print(f"automatic={automatic}, loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
