"""Optimizers over fully_shard's parameters: masters and moments of local shards, norms over all ranks."""

import gc
import itertools
import re
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pyzero


def solo() -> Any:
    """Make a group of only this rank."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def fsdp_run(group: Any, max_norm: float | None, is_hidden: bool = False) -> tuple[case.Run, bool]:
    model = case.fsdp(case.Model(), group)
    if is_hidden:
        gc.freeze()
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group, max_grad_norm=max_norm)
    run = case.train(model, optimizer, group)
    masters_are_weights = all(
        torch.equal(optimizer.full_master(param), weight)
        for param, weight in zip(model.parameters(), run.weights, strict=True)
    )
    return run, masters_are_weights


@pytest.mark.parametrize("size", [1, 2, 4])
def test_follows_adamw_on_one_process(ranks, size):
    for max_norm in (None, 0.2):
        for run, masters_are_weights in ranks.run(size, fsdp_run, max_norm):
            case.assert_follows(run, max_norm)
            assert masters_are_weights


def test_modules_that_the_collector_does_not_name_are_found(ranks):
    """The modules are hidden by gc.freeze().

    If they were not found, fully_shard would silently gather weights from before the optimizer.
    """
    for run, _ in ranks.run(2, fsdp_run, None, True):
        case.assert_follows(run, None)


def memory_of(group: Any) -> tuple[int, int, bool]:
    model = case.fsdp(case.Model(), group)
    case.loss_of(model, case.batch(0)).backward()  # fully_shard has seen its parameters where it put them
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.1, process_group=group)
    local = sum(param.to_local().numel() for param in model.parameters())
    before = case.loss_of(model, case.batch(0))
    optimizer.step()
    after = case.loss_of(model, case.batch(0))
    return optimizer.state_bytes(), local, bool(after < before)


def test_fp32_shards_are_their_own_masters_and_fsdp_reads_them(ranks):
    for state_bytes, local, has_learned in ranks.run(4, memory_of):
        assert has_learned  # FSDP's all-gather reads what the step wrote
        padding = 20 * 2 * 64  # parameters, slots of 64 elements, twice where FSDP pads
        assert 8 * local <= state_bytes <= 8 * (local + padding)  # two moments, and no masters beside the weights


def bf16_run(group: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model, plain = case.fsdp(case.Model(torch.bfloat16), group), case.Model(torch.bfloat16)
    ours = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    alone = pyzero.FusedZeroAdamW(plain.parameters(), lr=case.LR, process_group=solo())
    case.train(model, ours, group)
    case.train(plain, alone, group)
    return [ours.full_master(p) for p in model.parameters()], [alone.full_master(p) for p in plain.parameters()]


def test_bf16_shards_have_fp32_masters(ranks):
    masters, wanted = ranks.run(1, bf16_run)[0]
    for ours, theirs in zip(masters, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)  # one rank's shards are whole: bit for bit
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters)


def mixed_precision(group: Any) -> tuple[list[torch.Tensor], float]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = case.fsdp(case.Model(), group, mp_policy=policy)
    theirs = case.fsdp(case.Model(), group, mp_policy=policy)
    ours = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=case.LR)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(case.NUM_STEPS):
        x = case.batch(step).chunk(size)[rank]
        for net, optimizer in ((model, ours), (theirs, torchs)):
            optimizer.zero_grad()
            case.loss_of(net, x).backward()
            optimizer.step()
    pairs = zip(model.parameters(), theirs.parameters(), strict=True)
    differences = [(case.whole(a) - case.whole(b)).abs().max() for a, b in pairs]
    return [p.grad.to_local() for p in model.parameters()], float(torch.stack(differences).max())


def test_mixed_precision_policy_keeps_fp32_weights(ranks):
    """Both runs do the same bf16 forward, so they differ only by Adam's rounding. A weight is about 1."""
    for grads, difference in ranks.run(2, mixed_precision):
        assert all(grad.dtype == torch.float32 for grad in grads)
        assert difference < case.NUM_STEPS * case.LR * 2**-8  # bf16 weights differ in their last bit at times


def fp16_overflow(group: Any, way: str) -> dict[str, Any]:
    """One rank overflows in the second of four steps of two micro-batches, in one parameter of its own shard."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = case.fsdp(case.Model(torch.float16), group)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=case.LR, process_group=group, loss_scale=pyzero.LossScale(init_scale=2.0**10)
    )
    applied, scales, weights = [], [], []
    for step in range(4):
        optimizer.zero_grad(set_to_none=way != "zeros")
        for micro in range(2):
            if way == "no_sync":
                model.set_requires_gradient_sync(micro == 1)
            loss = case.loss_of(model, case.batch(2 * step + micro, torch.float16).chunk(size)[rank])
            if way == "scale":
                optimizer.scale(loss / 2).backward()
            else:
                optimizer.backward(loss / 2)
        if step == 1 and rank == size - 1:
            param = next(p for p in model.parameters() if p.to_local().numel())
            param.grad.to_local().view(-1)[0] = float("inf")
        optimizer.step()
        applied.append(optimizer.was_step_applied)
        scales.append(optimizer.loss_scale)
        weights.append([case.whole(p) for p in model.parameters()])
    return {"applied": applied, "scales": scales, "weights": weights, "norm": float(optimizer.grad_norm)}


@pytest.mark.parametrize("way", ["backward", "no_sync", "scale", "zeros"])
def test_an_overflow_on_one_rank_skips_on_all(ranks, way):
    results = ranks.run(2, fp16_overflow, way)
    for result in results:
        assert result["applied"] == [True, False, True, True]
        assert result["scales"] == [1024.0, 512.0, 512.0, 512.0]
        assert result["norm"] == results[0]["norm"] < 100  # of unscaled gradients
        before, skipped, after = result["weights"][:3]
        assert all(torch.equal(a, b) for a, b in zip(before, skipped, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(skipped, after, strict=True))
        for step in range(4):
            for a, b in zip(result["weights"][step], results[0]["weights"][step], strict=True):
                assert torch.equal(a, b)


def after_a_refused_backward(group: Any, way: str) -> tuple[bool, list[float]]:
    """Return norms of a plain backward, and of one after a refused backward.

    The refused backward was scaled, where `.grad` carried no scale.
    """
    model = case.fsdp(case.Model(), group)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.0, process_group=group, loss_scale=1024.0)
    norms = []
    for is_first in (True, False):
        case.loss_of(model, case.batch(0)).backward()
        if not is_first:
            with pytest.raises(RuntimeError, match="same loss scale"):
                loss = case.loss_of(model, case.batch(0))
                optimizer.backward(loss) if way == "backward" else optimizer.scale(loss).backward()
            optimizer.zero_grad()
            case.loss_of(model, case.batch(0)).backward()
        is_scaled = optimizer.is_scaled_backward
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.grad_norm))
    return is_scaled, norms


@pytest.mark.parametrize("way", ["backward", "scale"])
def test_a_backward_that_is_refused_leaves_no_loss_scale_behind(ranks, way):
    for is_scaled, (plain, behind) in ranks.run(1, after_a_refused_backward, way):
        assert not is_scaled
        assert behind == plain


def written_outside(group: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model = case.fsdp(case.Model(torch.bfloat16), group)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    first, second = list(model.parameters())[:2]
    first._local_tensor = first.to_local().clone() + 1  # as torch's own loads move it
    optimizer.set_full_master(second, torch.full(second.shape, 1.5))
    case.loss_of(model, case.batch(0, torch.bfloat16)).backward()
    optimizer.set_full_grad(first, torch.ones(first.shape))
    optimizer.step()
    optimizer.zero_grad()
    return [(case.whole(param).float(), optimizer.full_master(param)) for param in model.parameters()]


def test_writes_from_outside_reach_masters(ranks):
    model = case.Model(torch.bfloat16)
    first = (2 * model.first.weight.detach() + 1).float()
    for pairs in ranks.run(2, written_outside):
        for weight, master in pairs:
            assert torch.equal(weight, master.bfloat16().float())
        moved = first * (1 - case.LR * 1e-2) - case.LR  # a gradient of 1 moves by lr, beside the decay
        torch.testing.assert_close(pairs[0][1], moved, rtol=0, atol=1e-6)
        assert (pairs[1][1] - 1.5).abs().max() < 2 * case.LR


def refused(group: Any) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh

    found = {}

    def attempt(name: str, build: Any) -> None:
        try:
            build()
        except (TypeError, ValueError) as error:
            found[name] = str(error)

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = case.fsdp(case.Model(), group)
    extra = nn.Parameter(torch.ones(3))
    attempt("plain", lambda: pyzero.FusedZeroAdamW([*model.parameters(), extra]))
    attempt("lamb", lambda: pyzero.ZeroLamb(model.parameters()))
    both = [*model.parameters(), *case.fsdp(case.Model(), square["dp"]).parameters()]
    attempt("meshes", lambda: pyzero.FusedZeroAdamW(both))
    shards = case.fsdp(case.Model(), square["tp"])  # nothing averages over dp
    attempt("shards", lambda: pyzero.FusedZeroAdamW(shards.parameters()))
    alike = pyzero.FusedZeroAdamW(shards.parameters(), process_group=square["tp"], lr=case.LR)
    found["alike run"] = case.train(shards, alike, square["tp"].get_group())
    with torch.no_grad():
        model(case.batch(0))
    attempt("gathered", lambda: pyzero.FusedZeroAdamW(model.parameters()))
    hybrid = case.fsdp(case.Model(), square)  # replicated over dp, sharded over tp
    attempt("hybrid", lambda: pyzero.FusedZeroAdamW(hybrid.parameters(), process_group=square["dp"]))
    ours = pyzero.FusedZeroAdamW(hybrid.parameters(), process_group=square["dp"], reduce_grads=False, lr=case.LR)
    found["hybrid run"] = case.train(hybrid, ours, group)
    return found


def test_what_cannot_be_right_is_refused(ranks):
    for found in ranks.run(4, refused):
        assert "reduce_grads=False and average it" in found["plain"]
        assert "expected whole parameters for the rule lamb" in found["lamb"]
        assert "slice all meshes from one" in found["meshes"]
        assert "a mesh of two dimensions, replicas and shards" in found["shards"]
        assert "call reshard()" in found["gathered"]
        assert "pass reduce_grads=False" in found["hybrid"]
        case.assert_follows(found["alike run"], None)
        case.assert_follows(found["hybrid run"], None)


def lion(group: Any) -> list[torch.Tensor]:
    model, plain = case.fsdp(case.Model(), group), case.Model()
    optimizer = pyzero.FusedZeroLion(model.parameters(), lr=1e-3, process_group=group)
    alone = pyzero.FusedZeroLion(plain.parameters(), lr=1e-3, process_group=solo())
    case.train(model, optimizer, group)
    case.train(plain, alone, group, share=(0, 1))
    return [case.whole(a) - case.whole(b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


def test_lion_over_shards(ranks):
    """Lion moves by the sign. Unless rounding flips a sign, weights agree to their last bits."""
    for differences in ranks.run(2, lion):
        far = torch.cat([d.view(-1) for d in differences]).abs() > 1e-5
        assert far.float().mean() < 0.01


def beside_plain(group: Any) -> tuple[str, list[torch.Tensor], list[torch.Tensor]]:
    """Train the shards of blocks by one optimizer, and the parameters that are left whole by another."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = case.Model()
    for block in model.blocks:
        fully_shard(block, mesh=DeviceMesh.from_group(group, "cpu"))
    before = [case.whole(param) for param in model.parameters()]
    model.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="expected fully_shard to average all gradients") as refused:
        pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    model.blocks.requires_grad_(True)
    whole = [param for param in model.parameters() if not hasattr(param, "to_local")]
    sharded = [param for param in model.parameters() if hasattr(param, "to_local")]
    first, second = (pyzero.FusedZeroAdamW(params, lr=case.LR, process_group=group) for params in (whole, sharded))
    moved = [case.whole(param) - was for param, was in zip(model.parameters(), before, strict=True)]
    for step in range(3):
        case.loss_of(model, case.batch(step).chunk(dist.get_world_size(group))[dist.get_rank(group)]).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return str(refused.value), moved, [case.whole(param) for param in model.parameters()]


def test_an_optimizer_of_whole_parameters_leaves_shards_beside_them_as_they_are(ranks):
    wanted = case.alone(torch.float32, None, 3).weights
    for refused, moved, weights in ranks.run(2, beside_plain):
        assert "got parameter 0 beside frozen parameters of it" in refused  # whose mesh has the ranks that reduce it
        assert not any(difference.any() for difference in moved)
        for ours, theirs in zip(weights, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def taken_over(group: Any) -> case.Run:
    model = case.fsdp(case.Model(), group)
    torchs = torch.optim.AdamW(model.parameters(), lr=case.LR)
    for step in range(6):
        case.loss_of(model, case.batch(step).chunk(2)[dist.get_rank(group)]).backward()
        torchs.step()
        torchs.zero_grad()
    ours = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    ours.load_state_dict(torchs.state_dict())
    return case.train(model, ours, group, range(6, case.NUM_STEPS))


def test_state_of_torchs_adamw_over_shards_is_taken(ranks):
    wanted = case.alone(torch.float32, None)
    for run in ranks.run(2, taken_over):
        torch.testing.assert_close(run.losses, wanted.losses[6:], rtol=1e-5, atol=1e-6)


def read_in_another_order(group: Any) -> list[str]:
    model = case.fsdp(case.Model(), group)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    case.loss_of(model, case.batch(0)).backward()
    params = list(model.parameters())
    one, other = next((a, b) for a, b in itertools.combinations(params, 2) if a.shape == b.shape)
    said = []
    for read in (optimizer.full_master, optimizer.full_state, optimizer.full_grad):
        with pytest.raises(RuntimeError) as caught:
            read(other if group.rank() else one)
        said.append(str(caught.value))
    with pytest.raises(RuntimeError) as caught:
        if group.rank():
            optimizer.full_state_dict()
        else:
            optimizer.full_master(one)
    optimizer.step()
    assert torch.equal(optimizer.full_master(one), one.full_tensor())  # the ranks are still in step
    return [*said, str(caught.value)]


def test_ranks_that_read_different_whole_tensors_are_told(ranks):
    here, there = ranks.run(2, read_in_another_order)
    assert here == there
    for words, what in zip(here, ("the master", "the state", "the gradient", "the master"), strict=True):
        assert re.match(rf"rank 0 reads {what} of parameter \d+; rank 1 reads ", words)
    assert "rank 1 reads the full state dict. Read whole tensors equally often" in here[-1]


def read_on_a_mesh(group: Any) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh["tp"], [Shard(0)])) for _ in range(2)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=mesh["dp"])
    with pytest.raises(RuntimeError) as caught:
        optimizer.full_master(params[dist.get_rank() == 3])
    assert torch.equal(optimizer.full_master(params[1]), torch.ones(8, 8))
    return str(caught.value)


def test_all_ranks_of_a_mesh_are_told_where_one_reads_another_tensor(ranks):
    for rank, said in enumerate(ranks.run(4, read_on_a_mesh)):
        theirs = "the master of parameter 1" if rank % 2 else "other tensors"
        assert f"rank 0 reads the master of parameter 0; rank 1 reads {theirs}" in said
