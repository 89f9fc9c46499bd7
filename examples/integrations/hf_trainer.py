"""transformers' Trainer: clipping, accumulation, logs, checkpoints and resuming as everywhere; the state is sharded.

torchrun --standalone --nproc-per-node 2 examples/integrations/hf_trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from pyzero.transformers import Trainer  # the line that differs: `from transformers import Trainer`

CONFIG = GPT2Config(
    vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip


def counting(num_rows=256):
    """Rows that count on from a random number, modulo 32."""
    starts = torch.randint(32, (num_rows, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 32]


def main(folder="runs/trainer", dtype=torch.bfloat16, steps=60, resume=False, trainer_class=Trainer, **arguments):
    set_seed(0)
    model = GPT2LMHeadModel(CONFIG).to(dtype)
    defaults = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=20, logging_steps=10)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        **{**defaults, **arguments},
    )
    trainer = trainer_class(model=model, args=args, train_dataset=counting())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    main()
