"""examples/tensor_parallel.py: 2 x 2 ranks train as one process does, and their checkpoint resumes on another mesh."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import parallel_case as case
import torch

import pyzero

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 50
EXTRA = 3  # on another mesh
LR = 3e-3


def run(group: Any, shape: tuple[int, int], folder: Path, steps: range) -> case.Run:
    """Run the example's loop on a mesh. If its steps do not begin at 0, load the checkpoint first."""
    sys.path.insert(0, str(EXAMPLES))
    import tensor_parallel as example
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    model = example.split(example.GPT(), mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    if steps.start:
        assert pyzero.load_checkpoint(folder, model=model, optimizer=optimizer)["step"] == steps.start
    losses, norms = [], []
    for step in steps:
        loss = model(example.batch(step).chunk(shape[0])[mesh["dp"].get_local_rank()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean)
        norms.append(optimizer.grad_norm)
    pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=steps.stop)
    return case.Run(torch.stack(losses), torch.stack(norms), [case.whole(p) for p in model.parameters()])


@cache
def alone(dtype: torch.dtype) -> case.Run:
    sys.path.insert(0, str(EXAMPLES))
    import tensor_parallel as example

    model = example.GPT().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(STEPS + EXTRA):
        loss = model(example.batch(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    return case.Run(torch.stack(losses), torch.stack(norms), [p.detach() for p in model.parameters()])


def test_four_ranks_follow_one_process_and_go_on_on_another_mesh(ranks, tmp_path):
    exact, torchs = alone(torch.float64), alone(torch.float32)
    first = ranks.run(4, run, (2, 2), tmp_path, range(STEPS))
    second = ranks.run(4, run, (4, 1), tmp_path, range(STEPS, STEPS + EXTRA))
    for a, b in zip(first, second, strict=True):
        case.assert_near(case.Run(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), b.weights), exact, torchs)


def test_the_script_runs(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = [str(EXAMPLES / "tensor_parallel.py"), "--steps", "40"]
    losses = []
    for size, options in (("2", ["--save", str(tmp_path)]), ("1", ["--tensor", "1", "--load", str(tmp_path)])):
        command = [*launcher, size, *script, *options]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
        losses += [float(found) for found in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[3] < losses[0] - 0.3
