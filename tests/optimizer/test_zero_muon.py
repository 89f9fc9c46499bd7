"""ZeroMuon against torch.optim.Muon and AdamW on the same gradients, on one and more ranks; what each rank holds."""

from typing import Any

import pytest
import torch
from models import DTYPES
from torch import Tensor, nn

import pyzero
from pyzero.gradients import pieces
from pyzero.sharding.layout import Cut, Key, ParamSpec, plan

STEPS = 4
MUON = dict(lr=0.02, weight_decay=0.1, momentum=0.9)
ADAMW = dict(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.05)
needs_torchs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


class Net(nn.Module):
    """Wide, tall and square matrices, a convolution, vectors, and an embedding that is no hidden matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.conv = nn.Conv1d(2, 6, 3, padding=1)
        self.wide, self.tall, self.square = nn.Linear(12, 10), nn.Linear(10, 70), nn.Linear(70, 70)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1).view(-1, 2, 12)
        x = self.conv(x).mean(1)
        return self.square(torch.tanh(self.tall(torch.tanh(self.wide(x)))))


def build(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(torch.get_default_device(), dtype)


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    hidden = [param for name, param in model.named_parameters() if param.dim() >= 2 and "embed" not in name]
    return hidden, [param for param in model.parameters() if all(param is not other for other in hidden)]


def optimizer_over(model: nn.Module, group: Any = None, **options: Any) -> pyzero.ZeroMuon:
    hidden, others = split(model)
    groups = [{"params": hidden}, {"params": others, "use_muon": False, **ADAMW}]
    return pyzero.ZeroMuon(groups, **MUON, process_group=group, loss_scale=None, **options)


def backward(model: nn.Module, step: int, rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(12, (6, 4), generator=generator, device="cpu")[rank::size].to(torch.get_default_device())
    model(tokens).float().square().mean().backward()


def train(group: Any, dtype: torch.dtype, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """Weights at first, gradients of each step, and all state after the last."""
    model = build(dtype)
    before = [param.detach().float().clone() for param in model.parameters()]
    optimizer = optimizer_over(model, group, stage=stage, bucket_cap_mb=1e-3, **options)
    grads = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, group.rank(), group.size())
        grads.append([optimizer.full_grad(param) for param in model.parameters()])
        optimizer.step()
        if step == 1:  # out and in again
            saved = optimizer.state_dict()
            optimizer = optimizer_over(model, group, stage=stage, bucket_cap_mb=1e-3, **options)
            optimizer.load_state_dict(saved)
    states = [optimizer.full_state(param) for param in model.parameters()]
    for param, state in zip(model.parameters(), states, strict=True):
        assert torch.equal(param, state["master"].to(dtype))
    return {"before": before, "grads": grads, "states": states}


def by_torch(before: list[Tensor], grads: list[list[Tensor]], options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """State after torch's optimizers have taken the same gradients in fp32; a convolution as a matrix."""
    names, hidden = zip(*build(torch.float32).named_parameters(), strict=True), split(build(torch.float32))[0]
    is_hidden = [any(param.shape == other.shape for other in hidden) for _, param in zip(*names, strict=True)]
    masters = [
        nn.Parameter(p.flatten(1).clone() if hid else p.clone()) for p, hid in zip(before, is_hidden, strict=True)
    ]
    muon = torch.optim.Muon([p for p, hid in zip(masters, is_hidden, strict=True) if hid], **MUON, **options)
    adamw = torch.optim.AdamW([p for p, hid in zip(masters, is_hidden, strict=True) if not hid], **ADAMW)
    for of_step in grads:
        for master, grad in zip(masters, of_step, strict=True):
            master.grad = grad.view(master.shape)
        muon.step()
        adamw.step()
    return [
        {"master": p.detach(), **{n: v for n, v in {**muon.state[p], **adamw.state[p]}.items() if n != "step"}}
        for p in masters
    ]


@needs_torchs_muon
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "stage", "options"),
    [(1, 2, {}), (2, 1, {"nesterov": False}), (2, 2, {"adjust_lr_fn": "match_rms_adamw"}), (3, 2, {})],
)
def test_it_is_torchs(ranks, size, stage, options, dtype):
    for found in ranks.run(size, train, dtype, stage, options):
        wanted = by_torch(found["before"], found["grads"], options)
        for state, want in zip(found["states"], wanted, strict=True):
            assert set(state) == {"step", *want}
            for name, value in want.items():
                # An update is rounded to bf16 after each of 15 products: where momenta differ by one bit of fp32, a few
                # of its elements differ by one of bf16.
                torch.testing.assert_close(state[name].flatten(), value.flatten(), rtol=1e-5, atol=1e-5, msg=name)


def weights_and_zeros(group: Any, most_zeros: int) -> tuple[list[Tensor], int]:
    """Weights after two steps, and elements of the zeros that gaps between matrices are filled with."""
    model = build(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_MOST_ZEROS", most_zeros)
        optimizer = optimizer_over(model, group, stage=1)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step, group.rank(), group.size())
            optimizer.step()
    held = {
        piece.zeros.untyped_storage().data_ptr(): piece.zeros.untyped_storage().nbytes()
        for grads in optimizer._gradients._records.buckets
        for piece in grads._pieces._pieces
        if piece.zeros is not None
    }
    return [param.detach().clone() for param in model.parameters()], sum(held.values()) // 2


def test_gaps_are_filled_from_few_zeros(ranks):
    whole, cut = (ranks.run(2, weights_and_zeros, most_zeros) for most_zeros in (2**18, 7))
    for (weights, many), (same, few) in zip(whole, cut, strict=True):
        assert 0 < few <= 2 * 7 < many  # two buckets
        assert all(map(torch.equal, weights, same))


def test_a_skipped_step_and_a_matrix_without_gradient():
    model = build(torch.float16)
    hidden, others = split(model)
    optimizer = pyzero.ZeroMuon([{"params": hidden}, {"params": others, "use_muon": False}], loss_scale=8.0)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.backward(model(torch.zeros(2, 4, dtype=torch.long)).float().sum() * float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, model.parameters(), before))
    states = [optimizer.full_state(param) for param in model.parameters()]
    assert not any(value.any() for state in states for name, value in state.items() if name != "master")

    optimizer.zero_grad()
    model.wide.requires_grad_(False)
    optimizer.backward(model(torch.zeros(2, 4, dtype=torch.long)).float().square().sum())
    optimizer.step()
    changed = [not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True)]
    assert changed == [param.requires_grad for param in model.parameters()]


def test_a_gradient_of_zeros_leaves_the_decay():
    """A matrix of zeros has no direction: 1 - lr * weight_decay is left of the weights, and no NaN."""
    param = nn.Parameter(torch.ones(6, 4))
    optimizer = pyzero.ZeroMuon([param], lr=0.5, weight_decay=0.5)
    (param * 0.0).sum().backward()
    optimizer.step()
    assert torch.equal(param, torch.full((6, 4), 0.75))


def resumed(group: Any, path: str) -> list[Tensor]:
    """Saved after two of four steps by two ranks; whoever else runs this goes on from there."""
    model = build(torch.bfloat16)
    optimizer = optimizer_over(model, group)
    steps = range(STEPS)
    if group.size() != 2:
        pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
        steps = range(2, STEPS)
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, 0, 1)  # all ranks the same: means over 1, 2 and 3 ranks are the same but for rounding
        optimizer.step()
        if group.size() == 2 and step == 1:
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=step)
    return [optimizer.full_master(param) for param in model.parameters()]


def test_a_checkpoint_goes_to_other_ranks(ranks, tmp_path):
    wanted = ranks.run(2, resumed, str(tmp_path))[0]
    for size in (1, 3):
        for master, want in zip(ranks.run(size, resumed, str(tmp_path))[0], wanted, strict=True):
            torch.testing.assert_close(
                master, want, rtol=1e-2, atol=2e-4
            )  # one bit of bf16 in some gradients and moves
    model = build(torch.bfloat16)
    with pytest.raises(pyzero.CheckpointError, match="rule muon, wanted adam"):
        pyzero.load_checkpoint(str(tmp_path), model=model, optimizer=pyzero.FusedZeroAdamW(model.parameters()))


def test_a_matrix_that_went_to_adamw(tmp_path):
    model = build(torch.float32)
    optimizer = optimizer_over(model)
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)
    saved = optimizer.state_dict()

    model = build(torch.float32)
    hidden, others = split(model)
    groups = [{"params": hidden[1:]}, {"params": [hidden[0], *others], "use_muon": False, "lr": 0.5}]
    optimizer = pyzero.ZeroMuon(groups)
    with pytest.raises(pyzero.CheckpointError, match="group 1 holds parameters of another update rule"):
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer, strict=False)
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [MUON["lr"], ADAMW["lr"]]
    backward(model, 0, 0, 1)
    optimizer.step()

    model = build(torch.float32)
    hidden, others = split(model)
    optimizer = pyzero.ZeroMuon([{"params": hidden, "use_muon": False}, {"params": others, "use_muon": False}])
    with pytest.raises(ValueError, match="update rule that group 0 was built with"):
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
    optimizer.step()


@needs_torchs_muon
def test_state_of_torchs_muon_is_taken():
    mine, theirs = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    optimizer, torchs = pyzero.ZeroMuon([mine]), torch.optim.Muon([theirs], **MUON)
    for step in range(4):
        theirs.grad = torch.arange(9.0).view(3, 3).roll(step)
        torchs.step()
        if step == 1:
            optimizer.load_state_dict(torchs.state_dict())
            mine.data.copy_(theirs)
        elif step > 1:
            mine.grad = theirs.grad.clone()
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


def test_what_a_rank_holds():
    """Matrices of a decoder of 16 blocks on 8 ranks: little padding."""
    block = [4096 * 4096] * 4 + [4096 * 11008] * 3
    key = Key("bf16", "cpu", "muon", Cut.WHOLE)
    specs = [ParamSpec(index, numel, 2, key) for index, numel in enumerate(block * 16)]
    layouts = plan(specs, 100 << 20, 8)
    assert sum(layout.numel for layout in layouts) < 1.2 * sum(spec.numel for spec in specs)
    assert len(layouts) >= 4  # all but the last are sent while backward goes on


def test_groups_are_the_callers_own_dicts():
    """So a loop may set its group's learning rate, as with torch's optimizers."""
    made = [{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": is_muons} for is_muons in (True, False, False)]
    optimizer = pyzero.ZeroMuon(made[:2])
    optimizer.add_param_group(made[2])
    assert all(group is one for group, one in zip(optimizer.param_groups, made, strict=True))
    assert [group["weight_decay"] for group in made] == [0.1, 0.01, 0.01]


def test_refusals():
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"got parameter 1 of shape \(3,\); put it into a group with use_muon=False"):
        pyzero.ZeroMuon([matrix, vector])
    for option, value in {"momentum": 1.5, "ns_steps": 100, "adjust_lr_fn": "rms", "ns_coefficients": (1, 2)}.items():
        with pytest.raises(ValueError, match=f"expected .*{option}"):
            pyzero.ZeroMuon([matrix], **{option: value})
    for coefficients in (None, "abc", 3.4):
        with pytest.raises(ValueError, match=r"expected three ns_coefficients, got .*; pass \(a, b, c\)"):
            pyzero.ZeroMuon([matrix], ns_coefficients=coefficients)
    with pytest.raises(TypeError, match="expected each of ns_coefficients as a number, got None"):
        pyzero.ZeroMuon([matrix], ns_coefficients=(1.0, 2.0, None))
    optimizer = pyzero.ZeroMuon([{"params": [matrix]}, {"params": [vector], "use_muon": False}])
    assert optimizer.param_groups[1]["weight_decay"] == torch.optim.AdamW([vector]).defaults["weight_decay"]
    for group in optimizer.param_groups:
        group["use_muon"] = not group["use_muon"]
        with pytest.raises(ValueError, match="as when the group was added"):
            optimizer.step()
        group["use_muon"] = not group["use_muon"]
    with pytest.raises(ValueError, match="put it into a group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step()
