"""The programs on checkpoints in README and docs/checkpoints.md, each in a run that trains between its paragraphs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from example_runs import working_in
from resume import assert_equal, build, make, step

import pyzero

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 4  # the programs use the default group


def programs() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Checkpoints\n")[1].split("\n## ")[0]
    text = section + (ROOT / "docs" / "checkpoints.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def follow(group: Any, program: str, folder: Path) -> list[Any]:
    """Returns the state when it saved, and at its end."""
    model = build(torch.bfloat16, 0)
    optimizer = make("adamw", model, group)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    names = {"torch": torch, "dist": dist, "pyzero": pyzero, "model": model, "optimizer": optimizer, "step": 0}
    names["schedule"] = schedule

    def state() -> list[Any]:
        counts = names["step"], schedule.last_epoch
        return [optimizer.full_state_dict(), [param.detach().clone() for param in model.parameters()], *counts]

    for paragraph in program.split("\n\n"):
        step(optimizer, model, names["step"], group.rank(), group.size())
        schedule.step()
        names["step"] += 1
        if re.search(r"save\w*\(", paragraph):
            saved = state()
        with working_in(folder):  # and elsewhere while an asynchronous save writes
            exec(paragraph, names)
    return [saved, state()]


@pytest.mark.parametrize("number", [0, 2, 3])
def test_what_is_loaded_is_what_was_saved(ranks, tmp_path, number):
    for saved, loaded in ranks.run(WORLD_SIZE, follow, programs()[number], tmp_path):
        counted = 4 if number == 0 else 2  # the others say nothing of step and schedule
        assert_equal(loaded[:counted], saved[:counted])


def test_training_goes_on_while_it_is_saved(ranks, tmp_path):
    load = '\n\npyzero.load_checkpoint("checkpoints", model=model, optimizer=optimizer)'
    for saved, loaded in ranks.run(WORLD_SIZE, follow, programs()[1] + load, tmp_path):
        assert_equal(loaded[:2], saved[:2])


def test_there_are_no_more_programs():
    assert len(programs()) == 4
