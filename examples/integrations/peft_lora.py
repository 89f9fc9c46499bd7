"""peft's LoRA over a frozen bf16 base: masters and moments of the adapters alone, sharded.

python examples/integrations/peft_lora.py
torchrun --standalone --nproc-per-node 2 examples/integrations/peft_lora.py
"""

import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import pyzero

CONFIG = GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def build():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(CONFIG).bfloat16()
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)  # adapters in bf16 too: the masters are fp32
    return model, pyzero.FusedZeroAdamW(model.parameters(), lr=2e-2, max_grad_norm=1.0)


def step(model, optimizer, number, rank, size):
    """A step's batch is a function of the step, of which each rank takes its part."""
    starts = torch.randint(32, (16, 1), generator=torch.Generator().manual_seed(number))
    rows = ((starts + torch.arange(16)) % 32)[rank::size]
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main(folder="runs/lora", steps=100):
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, optimizer = build()
    losses = [step(model, optimizer, number, rank, size) for number in tqdm(range(steps), disable=rank > 0)]
    saved = pyzero.save_checkpoint(
        folder, model=model, optimizer=optimizer, step=steps, exclude_frozen_parameters=True
    )  # adapters only; model.save_pretrained() writes what peft loads
    if rank == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}, saved in {saved}")
    return losses, model, optimizer


if __name__ == "__main__":
    main()
