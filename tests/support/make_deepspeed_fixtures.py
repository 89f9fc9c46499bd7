"""Writes tests/data/deepspeed/*.zip: checkpoint folders that DeepSpeed 0.19.8 saves on CPUs.

    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    python tests/support/make_deepspeed_fixtures.py [NAME ...]

Each holds two checkpoints of one run: "saved", and "later", which has the result of DeepSpeed's next steps. One also
has "fresh", from before the first step.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed_case import (
    BETAS,
    CASES,
    CLIENT_STATE,
    FOLDER,
    LR,
    SAVED_AT,
    SCALING,
    STEPS,
    Case,
    Model,
    local_gradients,
)


def train(rank: int, case: Case, folder: str, port: int) -> None:
    """Train and save on one rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.num_ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # every CPU supports the fp16 operations used here
    precision = {"enabled": True, **(SCALING if case.precision == "fp16" else {})}
    model = Model()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.groups(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # the default is 1.0
            "zero_optimization": {"stage": case.stage, **case.zero},
            "optimizer": {"type": case.optimizer, "params": {"lr": LR, "betas": BETAS, **case.params}},
            case.precision: precision,
            **case.config,
        },
    )
    if case.has_fresh:
        engine.save_checkpoint(folder, tag="fresh", save_latest=False)
    for step in range(STEPS):
        if step == SAVED_AT:
            engine.save_checkpoint(folder, tag="saved", client_state=CLIENT_STATE)
        engine.backward(engine(local_gradients(model, case, step, rank)))
        engine.step()
    engine.save_checkpoint(folder, tag="later", save_latest=False)
    torch.distributed.destroy_process_group()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(case for case in CASES if case.name in sys.argv[1:] or not sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (case, folder, 29700 + number), nprocs=case.num_ranks)
            for script in Path(folder).glob("*.py"):  # DeepSpeed adds its converter scripts
                script.unlink()
            print(shutil.make_archive(str(FOLDER / case.name), "zip", folder))


if __name__ == "__main__":
    main()
