"""Calls on DTensor parameters in unusual orders, against torch.optim.AdamW in one process."""

import logging
import math
import re
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from logs import Log
from parallel_case import split, square
from torch import nn

import pyzero
from pyzero.sharding.local_param import local_of


def join_late(group: Any) -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = DeviceMesh.from_group(group, "cpu"), {}
    sharded = pyzero.FusedZeroAdamW(case.fsdp(case.Model(), group).parameters(), process_group=group)
    plain = pyzero.FusedZeroAdamW([nn.Parameter(torch.ones(3))], process_group=group)
    whole = torch.arange(16.0).view(4, 4)
    split = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    nothing = nn.Parameter(distribute_tensor(whole[:0], mesh, [Shard(0)]))
    found["empty"] = pyzero.FusedZeroAdamW([split, nothing], process_group=group).state[nothing]["exp_avg"].numel()
    for name, optimizer, param in (("plain", sharded, nn.Parameter(torch.ones(3))), ("split", plain, split)):
        try:
            optimizer.add_param_group({"params": [param]})
        except ValueError as error:
            found[name] = str(error)
    plain.add_param_group({"params": [nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))]})
    found["as it was"] = torch.equal(split.full_tensor(), whole)
    found["groups"] = [len(sharded.param_groups), len(plain.param_groups)]
    return found


def test_a_group_that_joins_late_and_cannot_be_right_is_refused(ranks):
    for found in ranks.run(2, join_late):
        assert "reduce_grads=False and average it" in found["plain"]
        assert "pass those parameters when it is built" in found["split"]
        assert found["empty"] == 0
        assert found["as it was"]
        assert found["groups"] == [1, 2]


def read_in_place(group: Any) -> torch.Tensor:
    """A state dict shares the optimizer's memory. Write into it, write other weights, and load it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    param = nn.Parameter(distribute_tensor(weight, DeviceMesh.from_group(group, "cpu"), [Shard(0)]))
    optimizer = pyzero.FusedZeroAdamW([param], process_group=group)
    state = optimizer.state_dict()
    with torch.no_grad():
        state["state"][0]["master"].to_local().fill_(7.001)
        param.fill_(3.0)
    optimizer.load_state_dict(state)
    return optimizer.full_master(param)


def test_loaded_masters_outlive_weights_that_were_written(ranks):
    for master in ranks.run(2, read_in_place):
        assert torch.equal(master, torch.full((4, 4), 7.001))


def written_whole(group: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Return (way, weight, master) for each way to write a bf16 DTensor, after a step with a learning rate of 0."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    other = distribute_tensor(torch.full((4, 4), 3.0, dtype=torch.bfloat16), mesh, [Shard(0)])
    ways = {
        "fill_": lambda net: net.weight.fill_(3.0),
        "copy_": lambda net: net.weight.copy_(other),
        "detach": lambda net: net.weight.detach().mul_(3.0),
        "init": lambda net: nn.init.constant_(net.weight, 3.0),
        "load_state_dict": lambda net: net.load_state_dict({"weight": other}),
        "to_local": lambda net: net.weight.to_local().fill_(3.0),
    }
    found = []
    for name, write in ways.items():
        net = nn.Linear(4, 4, bias=False)
        net.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4, dtype=torch.bfloat16), mesh, [Shard(0)]))
        optimizer = pyzero.FusedZeroAdamW(net.parameters(), lr=0.0, process_group=group)
        with torch.no_grad():
            write(net)
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
        found.append((name, case.whole(net.weight), optimizer.full_master(net.weight)))
    return found


def test_whatever_writes_a_sharded_weight_reaches_its_master(ranks):
    for found in ranks.run(2, written_whole):
        assert len(found) == 6
        for name, weight, master in found:
            assert torch.equal(master, torch.full((4, 4), 3.0)), name
            assert torch.equal(weight.float(), master), name


def tied(group: Any, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    solo = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    whole = torch.arange(32.0).view(8, 4)
    param = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
    optimizer = pyzero.FusedZeroAdamW([param], process_group=mesh["dp"], stage=stage)
    (param * distribute_tensor(whole, mesh["tp"], [Shard(0)])).sum().backward()
    optimizer.sum_tied_grads([(param, solo)])
    grad = optimizer.full_grad(param)
    assert grad is not None
    return grad, whole


@pytest.mark.parametrize("stage", [1, 2])
def test_tied_gradients_of_a_split_weight(ranks, stage):
    for grad, whole in ranks.run(4, tied, stage):
        assert torch.equal(grad, whole)


def evaluate_before_step(group: Any, reshards: bool | None) -> case.Run:
    model = case.fsdp(case.Model(), group, reshard_after_forward=reshards)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    step = optimizer.step

    def evaluate_and_step() -> None:
        with torch.no_grad():
            model(case.batch(99))  # leaves weights gathered until a backward or a write
        step()

    optimizer.step = evaluate_and_step  # type: ignore[method-assign]
    return case.train(model, optimizer, group)


@pytest.mark.parametrize("reshards", [None, False])
def test_a_forward_before_step_leaves_no_old_weights_behind(ranks, reshards):
    for run in ranks.run(2, evaluate_before_step, reshards):
        case.assert_follows(run, None)


def clip_and_fill(group: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model, alone = case.fsdp(case.Model(), group), case.Model()
    ours = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group)
    torchs = torch.optim.AdamW(alone.parameters(), lr=case.LR)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    norms = []
    for step in range(4):
        x = case.batch(step)
        for net, part in ((model, x.chunk(size)[rank]), (alone, x)):
            if step != 2:  # the third step keeps the second's gradients, clipped
                net.zero_grad(set_to_none=False)
            case.loss_of(net, part).backward()
        norms.append((ours.clip_grad_norm_(0.05), nn.utils.clip_grad_norm_(alone.parameters(), 0.05)))
        ours.step()
        torchs.step()
    return norms


def test_gradients_that_stay_behind_a_clipped_step_are_clipped(ranks):
    for norms in ranks.run(2, clip_and_fill):
        for ours, theirs in norms:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def edited_after_a_clip(group: Any, how: str) -> tuple[list[torch.Tensor], float, float]:
    """Return the weights after a step, the norm that the clip returned, and grad_norm after the step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    if group is not None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    make = torch.optim.AdamW if group is None else pyzero.FusedZeroAdamW
    optimizer = make(model.parameters(), lr=0.1, **({} if group is None else {"process_group": group}))
    model(torch.ones(2, 4)).square().sum().backward()
    clip = torch.nn.utils.clip_grad_norm_
    norm = clip(model.parameters(), 1.0) if group is None else optimizer.clip_grad_norm_(1.0)
    if how == "clip":
        clip(model.parameters(), 0.5)
    elif how == "add":
        for param in model.parameters():
            param.grad.add_(1.0)
    optimizer.step()
    weights = [p.detach() if group is None else p.detach().full_tensor() for p in model.parameters()]
    told = norm if group is None else optimizer.grad_norm
    return weights, float(norm), float(told)


@pytest.mark.parametrize("how", ["nothing", "clip", "add"])
def test_edits_between_clip_and_step_are_as_torchs(ranks, how):
    wanted, norm, _ = edited_after_a_clip(None, how)
    for weights, got, told in ranks.run(2, edited_after_a_clip, how):
        assert got == pytest.approx(norm, rel=1e-6)
        if how == "nothing":
            assert told == pytest.approx(norm, rel=1e-5)  # of before the clip
        for one, other in zip(weights, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def distributed(group: Any, kind: str) -> Any:
    """Make a model with fully_shard, with tensor parallelism on a square mesh, or with both."""
    model = case.Model()
    if kind == "fully_shard":
        return case.fsdp(model, group)
    mesh = square()
    split(model, mesh["tp"])
    return case.fsdp(model, mesh["dp"]) if kind == "both" else model


def lines_of_skips(group: Any, kind: str, bad_rank: int) -> list[str]:
    """Return the warnings of a step in which one rank's part of the gradient of "blocks.1.up.weight" has a NaN."""
    log, model = Log(), distributed(group, kind)
    optimizer = pyzero.FusedZeroAdamW(model.named_parameters(), lr=case.LR, stage=1)
    logging.getLogger("pyzero").addHandler(log)
    try:
        for is_bad in (False, True):
            optimizer.zero_grad()
            case.loss_of(model, case.batch(0)).backward()
            if is_bad and dist.get_rank() == bad_rank:
                local_of(model.blocks[1].up.weight.grad).view(-1)[0] = float("nan")
            optimizer.step()
        return log.lines
    finally:
        logging.getLogger("pyzero").removeHandler(log)


@pytest.mark.parametrize("bad_rank", [0, 1, 3])
@pytest.mark.parametrize("kind", ["fully_shard", "both"])
def test_the_first_rank_names_the_rank_whose_part_is_bad(ranks, kind, bad_rank):
    (line,), *others = ranks.run(4, lines_of_skips, kind, bad_rank)
    assert f"the gradient of blocks.1.up.weight, shape (12, 6), in the part of rank {bad_rank} (" in line
    assert others == [[], [], []]


def bad_of_four(group: Any) -> list[str]:
    """Two ranks hold each part. Only rank 3's gradient of its part is NaN."""
    log, mesh = Log(), square()
    model = split(case.Model(), mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(model.named_parameters(), lr=case.LR)
    if dist.get_rank() == 3:
        model.blocks[1].up.weight.register_hook(lambda grad: grad * float("nan"))
    logging.getLogger("pyzero").addHandler(log)
    try:
        case.loss_of(model, case.batch(0)).backward()
        optimizer.step()
        return log.lines
    finally:
        logging.getLogger("pyzero").removeHandler(log)


def test_the_first_rank_names_the_rank_whose_own_gradient_is_bad(ranks):
    (line,), *others = ranks.run(4, bad_of_four)
    assert "the gradient of blocks.1.up.weight, shape (12, 6), in the part of rank 3 (" in line
    assert others == [[], [], []]


def mix_scales(group: Any, first: str, between: str, then: str) -> str:
    """Run two backwards, each scaled or plain, the second perhaps over other parameters. Return the error, if any."""
    model = case.fsdp(case.Model(), group)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group, loss_scale=8.0)

    def run(how: str) -> None:
        loss = case.loss_of(model, case.batch(0))
        if how == "scaled":
            optimizer.backward(loss)
        else:
            loss.backward()

    run(first)
    if between == "zero_grad":
        model.zero_grad()
    elif between == "zeros":
        model.zero_grad(set_to_none=False)
    elif between == "freeze":  # no parameter gets a second gradient
        for param in model.blocks[0].parameters():
            param.requires_grad_(False)
        for name, param in model.named_parameters():
            if not name.startswith("blocks.0"):
                param.grad = None
    try:
        run(then)
    except RuntimeError as error:
        return str(error)
    optimizer.step()
    return f"{float(optimizer.grad_norm):.5f}"


@pytest.mark.parametrize("between", ["", "freeze"])
def test_a_plain_backward_on_scaled_gradients_is_refused(ranks, between):
    for first, then in (("scaled", "plain"), ("plain", "scaled")):
        for message in ranks.run(2, mix_scales, first, between, then):
            assert "expected all gradients of one sum to carry the same loss scale" in message, (first, then)


@pytest.mark.parametrize("between", ["zero_grad", "zeros"])
def test_cleared_gradients_take_any_scale(ranks, between):
    plain = ranks.run(2, mix_scales, "plain", between, "plain")
    for first, then in (("scaled", "plain"), ("plain", "scaled"), ("scaled", "scaled")):
        assert ranks.run(2, mix_scales, first, between, then) == plain, (first, then)


def broken_by_a_hook(group: Any, dtype: torch.dtype, clears: bool) -> float:
    """A hook from before the optimizer raises in the second backward, after it added. A third backward follows.

    Return the gradient.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, raises = square(), False

    def hook(param: torch.Tensor) -> None:
        if raises:
            raise ArithmeticError("on purpose")

    param = nn.Parameter(distribute_tensor(torch.zeros(64, dtype=dtype), mesh["tp"], [Shard(0)]))
    param.register_post_accumulate_grad_hook(hook)
    optimizer = pyzero.FusedZeroSGD([param], lr=1.0, process_group=mesh["dp"], loss_scale=None)
    with optimizer.no_sync():
        param.to_local().sum().backward()
        raises = True
        with pytest.raises(ArithmeticError):
            (param.to_local() * 2).sum().backward()
        raises = False
    if clears:
        optimizer.zero_grad()
    (param.to_local() * 10).sum().backward()
    grad = optimizer.full_grad(param)
    assert grad is not None
    return float(grad.max())


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hook_that_raises_loses_no_earlier_gradient_of_a_split_weight(ranks, dtype, clears):
    assert set(ranks.run(4, broken_by_a_hook, dtype, clears)) == {10.0 if clears else 13.0}


def out_of_step(group: Any, kind: str) -> list[str]:
    """Rank 1 steps with another lr, then with NaN. Then it clips while others step, and counts fewer skips than they.

    Return how each step ends on this rank.
    """
    model = distributed(group, kind)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=group, max_consecutive_skips=5)
    is_other = dist.get_rank() == 1
    ends = []
    lrs = {"lr": 0.5, "nan": math.nan}
    for event in ("lr", "nan", "norm", "skips", ""):
        optimizer.zero_grad()
        case.loss_of(model, case.batch(0)).backward()
        optimizer.param_groups[0]["lr"] = lrs.get(event, case.LR) if is_other else case.LR
        optimizer._overflow.num_in_a_row = 5 if event == "skips" and not is_other else 0
        before = [local_of(param).clone() for param in model.parameters()]
        try:
            optimizer.clip_grad_norm_(1.0) if event == "norm" and is_other else optimizer.step()
            ends.append("stepped")
        except (RuntimeError, ValueError) as error:
            ends.append(type(error).__name__ + str(error))
            assert all(map(torch.equal, map(local_of, model.parameters()), before))
    return ends


@pytest.mark.parametrize(("size", "kind"), [(2, "fully_shard"), (4, "tensor"), (4, "both")])
def test_ranks_of_a_mesh_that_are_out_of_step_are_told_on_all(ranks, size, kind):
    for rank, (lr, nan, norm, skips, last) in enumerate(ranks.run(size, out_of_step, kind)):
        assert re.search("RuntimeError.*(same hyper-parameters.*on ranks|an error on ranks)", lr)
        assert re.search(
            "ValueErrorInvalid learning rate: nan" if rank == 1 else "RuntimeError.*(got others|an error) on ranks", nan
        )
        assert re.search("CollectiveError.*clip_grad_norm_ on rank|RuntimeError.*an error on ranks", norm)
        assert "finite gradients, got inf or NaN in 5 steps" in skips
        assert last == "stepped"
