"""docs/migrating.md: what stands before and after ends at the same weights; what cannot run here compiles."""

import re
import sys

import pytest
import torch
import torch.distributed as dist
from example_runs import ROOT, working_in
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))  # for the import in the section on sparse gradients

WORLD_SIZE = 4  # the programs use the default group
STEPS, LR = 6, 1e-3
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "migrating.md").read_text(), re.MULTILINE | re.DOTALL)
)
# How far apart two runs may end, as a part of how far they came. fp32: sums in another order, six steps of 2^-24 each.
# fp16 and bf16: weights of size 0.3 are rounded by 2^-11 and 2^-8 of it, and come 0.004 far; measured 0.017 and 0.12.
# Muon's steps are rounded to bf16: where two sums differ in their last bit, an element may by 2^-8; measured 5e-8.
FP32, FP16, BF16, MUON = 1e-5, 0.04, 0.2, 1e-3
DDP = "torch: DDP with ZeroRedundancyOptimizer"


def programs(name):
    return re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)


class Model(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(11, 8, sparse=sparse)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, words):
        return self.head(self.hidden(self.table(words)).tanh()).float()


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch), batch % 3)


def follow(group, program, folder, only_rank_0_matters=True, sparse=False):
    """All weights at the start and at the end, in fp32 where they are kept so."""
    torch.manual_seed(0)
    model = Model(sparse)
    start = flat(param.detach() for param in model.parameters())
    rows = torch.randint(0, 11, (STEPS, WORLD_SIZE, 4), generator=torch.Generator().manual_seed(1))
    if only_rank_0_matters and dist.get_rank() > 0:
        for param in model.parameters():
            nn.init.zeros_(param)
    names = {
        "torch": torch,
        "dist": dist,
        "model": model,
        "loss_of": loss_of,
        "batches": list(rows[:, dist.get_rank()]),
    }
    with working_in(folder):
        exec(program.replace("import deepspeed", "import pyzero.deepspeed as deepspeed"), names)
    dist.barrier()
    return start, flat(whole(param, names.get("optimizer")) for param in model.parameters())


def flat(params):
    return torch.cat([param.float().flatten() for param in params])


def whole(param, optimizer):
    if hasattr(optimizer, "full_master"):
        return optimizer.full_master(param)
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach()


def assert_close(found, wanted, tolerance):
    for (start, ours), (_, theirs) in zip(found, wanted, strict=True):
        came = (theirs - start).abs().mean()
        assert came > LR
        assert (ours - theirs).abs().mean() < tolerance * came
        assert torch.equal(ours, found[0][1])


@pytest.mark.parametrize(
    "name, tolerance",
    [(DDP, FP32), ("torch: DDP with Muon", MUON), ("torch: FSDP2", BF16), ("DeepSpeed", FP32)],
)
def test_before_and_after_agree(ranks, tmp_path, name, tolerance):
    before, after = programs(name)
    wanted = ranks.run(WORLD_SIZE, follow, before, tmp_path, name != "torch: FSDP2")  # FSDP2 broadcasts nothing
    assert_close(ranks.run(WORLD_SIZE, follow, after, tmp_path), wanted, tolerance)


@pytest.mark.parametrize("name, tolerance", [("apex: amp and FusedAdam", FP16), ("apex: DistributedFusedAdam", BF16)])
def test_what_takes_the_place_of_apex(ranks, tmp_path, name, tolerance):
    before, after = programs(name)
    compile(before, name, "exec")
    same_rule = programs(DDP)[0].replace("lr=1e-3", "lr=1e-3, weight_decay=0.0")
    wanted = ranks.run(WORLD_SIZE, follow, same_rule, tmp_path)
    assert_close(ranks.run(WORLD_SIZE, follow, after, tmp_path), wanted, tolerance)


def test_sparse_tables(ranks, tmp_path):
    [program] = programs("Sparse gradients")
    found = ranks.run(WORLD_SIZE, follow, program, tmp_path, True, True)
    assert all((end - start).abs().mean() > LR and torch.equal(end, found[0][1]) for start, end in found)


def test_there_are_no_other_programs():
    assert sum(map(len, map(programs, SECTIONS))) == 13 and len(SECTIONS) == 7
