"""A DeepSpeed training script. Only the line marked below differs from what DeepSpeed's users have.

python examples/deepspeed_script.py
torchrun --standalone --nproc-per-node 2 examples/deepspeed_script.py
"""

from pathlib import Path

import torch

import pyzero.deepspeed as deepspeed  # the line that differs: `import deepspeed`

torch.manual_seed(0)
num_micro_batches = 400
inputs_all = torch.randn(num_micro_batches, 4, 10)
targets_all = inputs_all @ torch.randn(10, 10) * 0.3
dataloader = list(zip(inputs_all, targets_all, strict=True))
criterion = torch.nn.MSELoss()

model = torch.nn.Linear(10, 10)
parameters = filter(lambda p: p.requires_grad, model.parameters())
optimizer = torch.optim.Adam(parameters, lr=0.001)
model, optimizer, _, _ = deepspeed.initialize(
    model=model, optimizer=optimizer, config=str(Path(__file__).with_name("ds_config.json"))
)
losses = []
for _epoch in range(5):
    for inputs, targets in dataloader[model.rank :: model.world_size]:
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        outputs = model(inputs)
        loss = criterion(outputs.float(), targets)  # fp16 and fp32: older torch has no backward for the mix
        model.backward(loss)
        model.step()
        losses.append(loss.detach().float())

if model.rank == 0:
    first, last = torch.stack(losses[:20]).mean(), torch.stack(losses[-20:]).mean()
    print(f"loss: {first:.4f} -> {last:.4f} in {model.global_steps} steps, {model.skipped_steps} skipped")
model.destroy()
