"""Something raises on one rank alone, is caught there, and the script goes on: nothing is silently wrong after it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import build, loss_of, micro_batch, params_of
from own_groups import OwnGroups, is_refused
from peer_memory import through_peers
from ranks import ON_GPU
from torch import nn

import pyzero
from pyzero import memory
from pyzero.comm.transport import ExactTransport
from pyzero.comm.work import Work
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.bucket_grads import BucketGrads
from pyzero.rank_state.load import RankState
from pyzero.sharding.param_buckets import ParamBuckets
from pyzero.update import ShardUpdater

through_host_memory = pytest.mark.skipif(
    ON_GPU or sys.platform != "linux", reason="the peer transport of CPUs goes by futexes of Linux"
)
TIMEOUT_S = 3  # with "exact" the others wait so long
BAD_RANK = 1
IN_TORN_STATE = "update", "move", "load"
PLACES: dict[str, tuple[Any, str]] = {  # what raises, when it is called for the second time
    "sum": (BucketGrads, "reduce_slices"),
    "message": (Work, "wait"),
    "update": (ShardUpdater, "update"),
    "move": (ParamBuckets, "_make"),
    "load": (RankState, "copy_into"),
}


@contextlib.contextmanager
def breaking(where: str, error: type[BaseException]) -> Iterator[None]:
    owner, name = PLACES[where]
    whole = getattr(owner, name)
    num_calls = 0 if where in ("sum", "update") else 1

    def broken(self: Any, *args: Any) -> Any:
        nonlocal num_calls
        if where != "message" or self._what == "the all-gather of overflow flag and norm":
            num_calls += 1
            if num_calls == 2:
                raise error("on purpose")
        return whole(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        yield


def broken_off(group: Any, transport: str, where: str, error: type[BaseException], folder: Path) -> None:
    is_bad = group.rank() == BAD_RANK
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport=transport, bucket_cap_mb=1e-3, loss_scale=None
    )

    def train(index: int) -> None:
        loss_of(model, micro_batch(index, group.rank())).backward()
        optimizer.step()
        optimizer.zero_grad()

    def save() -> None:
        pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=9)

    if where != "move":  # which comes in the first step
        train(0)
        pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=1)
    saved = optimizer.full_state_dict() if where == "load" else {}
    before = [value.clone() for value in params_of(model)]

    acts: Callable[[], Any] = (lambda: optimizer.load_state_dict(saved)) if where == "load" else (lambda: train(1))
    with pytest.raises((error, pyzero.CollectiveError)):
        with breaking(where, error) if is_bad else contextlib.nullcontext():
            acts()
    with pytest.raises(pyzero.CollectiveError):
        if where == "sum":
            optimizer.step()  # with what there is
        optimizer.zero_grad()
        train(2)
    if where not in IN_TORN_STATE:
        for got, wanted in zip(params_of(model), before, strict=True):
            assert where == "message" or torch.equal(got, wanted)  # others may have acted upon the message
        return
    with pytest.raises((RuntimeError, pyzero.CheckpointError)):
        save()
    if is_bad:  # a rank that had not read the message yet has written nothing
        with pytest.raises(RuntimeError, match="broken off"):
            optimizer.state_dict()
    if where != "move":
        assert pyzero.latest_checkpoint(folder) == folder / "step_1"


@pytest.fixture(scope="module")
def run(ranks):
    return OwnGroups(ranks, TIMEOUT_S)


@through_host_memory
@pytest.mark.parametrize("where", PLACES)
def test_it_is_told_to_all_ranks_and_nothing_is_saved(run, tmp_path, where):
    run(2, broken_off, "peer", where, MemoryError, tmp_path)


@pytest.mark.parametrize("where", ["sum", "message"])
def test_so_it_is_by_all_to_all(run, tmp_path, where):
    run(2, broken_off, "exact", where, KeyboardInterrupt, tmp_path)


def interrupted_after_the_message(group: Any, transport: str) -> None:
    """Of a step. The other rank goes on, and waits for this one's weights."""
    is_bad = group.rank() == BAD_RANK
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, transport=transport, loss_scale=None)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for index in range(2):
        optimizer.zero_grad()
        loss_of(model, micro_batch(index, group.rank())).backward()
        if index == 0:
            optimizer.step()  # learns the order of buckets
    if not is_bad:
        with pytest.raises(pyzero.CollectiveError, match="rank 1 has given up"):
            optimizer.step()
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardUpdater, "take_pattern", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        with pytest.raises(pyzero.CollectiveError, match="was interrupted, before"):
            optimizer.step()


@through_host_memory
def test_the_others_are_told_of_an_interrupt_after_the_message(run):
    run(2, interrupted_after_the_message, "peer")


@contextlib.contextmanager
def short_of_memory(number: int, for_good: bool = False, name: str = "empty") -> Iterator[list[int]]:
    """The call of that number of memory's function fails, and all that follow if `for_good`; 0: none. Counts them."""
    owner = memory.PagePool if name == "empty" else memory  # what memory.empty calls, too
    empty, counted = getattr(owner, name), [0]

    def failing(*args: Any) -> torch.Tensor:
        counted[0] += 1
        if counted[0] == number or (for_good and counted[0] > number):
            raise torch.OutOfMemoryError("on purpose")
        return empty(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield counted


def out_of_memory(group: Any, transport: str, fails: bool) -> list[torch.Tensor]:
    """Weights after steps between batches left out on all ranks, as one was short of memory, each at another place."""
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport=transport, bucket_cap_mb=3e-3
    )

    def backward(index: int, failing: int = 0) -> int:
        with optimizer.no_sync():
            loss_of(model, micro_batch(index, group.rank())).backward()
        with short_of_memory(failing) as counted:
            loss_of(model, micro_batch(index + 1, group.rank())).backward()
        return counted[0]

    def train(index: int) -> int:
        num_allocations = backward(index)
        optimizer.step()
        optimizer.zero_grad()
        return num_allocations

    train(0)
    num_allocations = torch.tensor(train(2))
    dist.all_reduce(num_allocations, dist.ReduceOp.MAX, group=group)
    num_failed = 0
    for number in range(1, int(num_allocations) + 1):
        if fails:
            try:
                backward(100, number if group.rank() == BAD_RANK else 0)
            except torch.OutOfMemoryError:
                num_failed += 1
            optimizer.zero_grad()
        train(2 + 2 * number)
    assert not fails or group.rank() != BAD_RANK or num_failed > 3
    return params_of(model)


@pytest.mark.parametrize(
    "transport", ["exact", "collective", pytest.param("peer", marks=through_host_memory), "peer of GPUs"]
)
def test_a_backward_that_runs_out_of_memory_on_one_rank_can_be_left_out(run, transport):
    job: tuple[Any, ...] = (out_of_memory, transport)
    if transport == "peer of GPUs":
        job = (through_peers, out_of_memory, "peer")
    for got, wanted in zip(run(2, *job, True), run(2, *job, False), strict=True):
        assert all(map(torch.equal, got, wanted))


def step_short_of_memory(group: Any, stage: int, transport: str, then: str) -> list[torch.Tensor]:
    """Weights after steps between those in which one rank was short of memory, which are left out or tried again."""
    model = build(torch.bfloat16)
    options = {"process_group": group, "stage": stage, "transport": transport, "bucket_cap_mb": 3e-3}
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, **options)

    def backward(index: int) -> None:
        with optimizer.no_sync():
            loss_of(model, micro_batch(index, group.rank())).backward()

    def step(failing: int = 0) -> int:
        with short_of_memory(failing) as counted:
            optimizer.step()
        return counted[0]

    backward(0)
    step()
    optimizer.zero_grad()
    backward(1)
    num_allocations = torch.tensor(step())
    optimizer.zero_grad()
    dist.all_reduce(num_allocations, dist.ReduceOp.MAX, group=group)
    num_failed = 0
    for number in range(1, int(num_allocations) + 1):
        if then != "nothing":
            backward(100 if then == "left out" else number + 1)
            if group.rank() != BAD_RANK:
                with pytest.raises(RuntimeError, match=r"got an error on ranks \[1\]"):
                    step()
            else:
                with pytest.raises(torch.OutOfMemoryError):
                    step(number)
                num_failed += 1
            if then == "left out":
                optimizer.zero_grad()
        if then != "tried again":
            backward(number + 1)
        step()
        optimizer.zero_grad()
    assert then == "nothing" or group.rank() != BAD_RANK or num_failed > 1
    return params_of(model)


@pytest.mark.parametrize("then", ["left out", "tried again"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("transport", ["exact", "peer"])
def test_a_step_that_runs_out_of_memory_on_one_rank_raises_on_all(run, transport, stage, then):
    got, wanted = (run(2, step_short_of_memory, stage, transport, what)[0] for what in (then, "nothing"))
    assert all(map(torch.equal, got, wanted))


def finished_short_of_memory(group: Any, call: str) -> list[torch.Tensor]:
    """Weights after a batch that is left out: memory ended in its backward on one rank, and where that was finished."""
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, bucket_cap_mb=3e-3)

    def train(index: int) -> None:
        loss_of(model, micro_batch(index, group.rank())).backward()
        optimizer.step()
        optimizer.zero_grad()

    train(0)
    train(1)
    if call:
        is_bad = group.rank() == BAD_RANK
        with contextlib.suppress(torch.OutOfMemoryError), short_of_memory(2 if is_bad else 0):
            loss_of(model, micro_batch(100, group.rank())).backward()
        calls = {
            "step": optimizer.step,
            "clip": lambda: optimizer.clip_grad_norm_(1.0),
            "read": lambda: optimizer.full_grad(model.gain),
        }
        with pytest.raises(torch.OutOfMemoryError) if is_bad else pytest.raises(RuntimeError, match="got an error on"):
            with short_of_memory(1 if is_bad else 0):
                calls[call]()
        optimizer.zero_grad()
    train(2)
    return params_of(model)


@pytest.mark.parametrize("call", ["step", "clip", "read"])
def test_so_does_one_that_cannot_finish_a_broken_backward(run, call):
    got, wanted = (run(2, finished_short_of_memory, what)[0] for what in (call, ""))
    assert all(map(torch.equal, got, wanted))


def step_out_of_memory(group: Any, stage: int) -> None:
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, stage=stage, transport="exact")
    with optimizer.no_sync():
        loss_of(model, micro_batch(0, group.rank())).backward()
    is_bad = group.rank() == BAD_RANK
    with pytest.raises(torch.OutOfMemoryError if is_bad else pyzero.CollectiveError):
        with short_of_memory(1, for_good=True) if is_bad else contextlib.nullcontext():
            optimizer.step()
    with pytest.raises(pyzero.CollectiveError):
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_one_whose_memory_is_at_its_end_breaks_off_on_all(run, stage):
    run(2, step_out_of_memory, stage)


def step_with_anothers_gradient(group: Any, stage: int) -> str:
    """The message of a step before which one rank has assigned another parameter's gradient; what follows is right."""
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, stage=stage)
    weight, bias = model.norm.weight, model.norm.bias
    loss_of(model, micro_batch(0, group.rank())).backward()
    optimizer.full_grad(weight)
    if group.rank() == BAD_RANK:
        weight.grad, bias.grad = bias.grad, weight.grad
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    before = params_of(model)
    optimizer.zero_grad()
    loss_of(model, micro_batch(0, group.rank())).backward()
    grad = optimizer.full_grad(weight)
    assert all(map(torch.equal, before, params_of(build(torch.float32))))
    optimizer.step()
    assert grad is not None and grad.any()
    return str(error.value)


def step_with_anothers_gradient_and_an_assigned_one(group: Any, stage: int) -> bool:
    """Whether the step after one that failed on one rank refuses the gradient that was assigned before it."""
    first, last = (nn.Parameter(torch.zeros(64)) for _ in range(2))
    optimizer = pyzero.FusedZeroSGD([first, last], lr=1.0, process_group=group, stage=stage)
    last.sum().backward()
    earlier = last.grad
    optimizer.step()
    optimizer.zero_grad()
    first.grad = torch.full((64,), 4.0)
    last.grad = earlier if group.rank() == BAD_RANK else None
    with pytest.raises(RuntimeError):
        optimizer.step()
    last.grad = None
    is_told = is_refused(optimizer.step)
    assert torch.equal(first, torch.full_like(first, 0.0 if is_told else -4.0))
    return is_told


@pytest.mark.parametrize("stage", [1, 2])
def test_what_was_assigned_beside_it_counts_in_the_next_step_or_is_refused(run, stage):
    first, second = run(2, step_with_anothers_gradient_and_an_assigned_one, stage)
    assert first == second


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_one_rank_cannot_take_is_told_to_all(run, stage):
    others, bad = run(2, step_with_anothers_gradient, stage)
    assert "got an error on ranks [1]" in others and "of another gradient" in bad


def unfrozen(dtype: torch.dtype, group: Any, **options: Any) -> tuple[nn.Linear, nn.Linear, Any]:
    """Two layers, of which the second is unfrozen after a step; it will fill several buckets."""
    first, second = nn.Linear(8, 8).to(dtype), nn.Linear(8, 8).to(dtype)
    second.requires_grad_(False)
    params = [*first.parameters(), *second.parameters()]
    optimizer = pyzero.FusedZeroAdamW(params, lr=0.1, process_group=group, bucket_cap_mb=1e-5, **options)
    second.requires_grad_(True)
    return first, second, optimizer


def placed_short_of_memory(number: int) -> tuple[list[torch.Tensor], int]:
    """Weights after a step before which the placement failed at that allocation, 0: at none; how many it began."""
    torch.manual_seed(0)
    first, second, optimizer = unfrozen(torch.bfloat16, None)
    second(first(torch.ones(2, 8).bfloat16())).sum().backward()
    with short_of_memory(number, name="zeros") as counted:
        with pytest.raises(torch.OutOfMemoryError) if number else contextlib.nullcontext():
            optimizer.step()
    if number:
        assert optimizer.state.keys() == {*first.parameters()}
        optimizer.step()
    assert optimizer.state.keys() == {*first.parameters(), *second.parameters()}
    return params_of(first) + params_of(second), counted[0]


def test_a_placement_that_runs_out_of_memory_can_be_tried_again():
    wanted, num_allocations = placed_short_of_memory(0)
    assert num_allocations > 4
    for number in range(1, num_allocations + 1):
        got, _ = placed_short_of_memory(number)
        assert all(map(torch.equal, got, wanted))


def placement_broken_off(group: Any, stage: int) -> None:
    torch.manual_seed(0)
    first, second, optimizer = unfrozen(torch.bfloat16, group, stage=stage, transport="exact")
    is_bad = group.rank() == BAD_RANK
    with pytest.raises(torch.OutOfMemoryError if is_bad else pyzero.CollectiveError) as error:
        with short_of_memory(1, name="zeros") if is_bad else contextlib.nullcontext():
            second(first(torch.ones(2, 8).bfloat16())).sum().backward()
            optimizer.step()
    assert is_bad or "rank 1 sends nothing more, for the placement of parameters was broken off" in str(error.value)
    with pytest.raises(pyzero.CollectiveError):
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_placement_that_breaks_off_on_one_rank_is_told_to_all(ranks, stage):
    OwnGroups(ranks)(2, placement_broken_off, stage)


def broken_again(group: Any, where: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients after a backward that broke off, or whose end then found no memory; and what they should be."""
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport="exact", bucket_cap_mb=1e-3
    )

    def backward(index: int) -> None:
        loss_of(model, micro_batch(index, group.rank())).backward()

    def gradients() -> list[torch.Tensor]:
        backward(2)
        found = [optimizer.full_grad(param) for param in model.parameters()]
        optimizer.zero_grad()
        return [grad for grad in found if grad is not None]

    backward(0)
    optimizer.step()
    optimizer.zero_grad()
    breaks = group.rank() == BAD_RANK or where == "again"
    with pytest.MonkeyPatch.context() as patch:
        if where == "again":  # behind the other gradients
            patch.setattr(model, "_handle", model.embedding.weight.register_hook(out_of_it), raising=False)
        elif breaks:
            patch.setattr(ParamGrad, f"{where}_arrival", out_of_it)
        with pytest.raises(torch.OutOfMemoryError) if breaks else contextlib.nullcontext():
            backward(1)
        if where == "again":
            model._handle.remove()
            model.zero_grad()
            with pytest.raises(torch.OutOfMemoryError), short_of_memory(1):
                backward(2)
    if where != "again":
        gradients()  # with those of the other rank
    return gradients(), gradients()


def out_of_it(record: Any) -> None:
    raise torch.OutOfMemoryError("on purpose")


@pytest.mark.parametrize("where", ["before", "after", "again"])
def test_a_backward_whose_end_breaks_off_leaves_nothing_behind(run, where):
    for got, wanted in run(2, broken_again, where):
        assert all(map(torch.equal, got, wanted))


def out_of_memory_in_the_loss(group: Any, clears: str, fails: bool) -> list[torch.Tensor]:
    """Weights after steps around a batch whose backward raised before the first gradient on one rank."""
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, bucket_cap_mb=3e-3)

    def run_out(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("on purpose")

    for index in range(3):
        if fails:
            loss = loss_of(model, micro_batch(100 + index, group.rank()))
            if group.rank() == BAD_RANK:
                loss.register_hook(run_out)
            with contextlib.suppress(torch.OutOfMemoryError):
                optimizer.backward(loss)
            optimizer.zero_grad() if clears == "optimizer" else model.zero_grad()
        optimizer.backward(loss_of(model, micro_batch(index, group.rank())))
        optimizer.step()
        optimizer.zero_grad()
    return params_of(model)


@pytest.mark.parametrize("clears", ["optimizer", "model"])
def test_so_can_one_that_does_before_the_first_gradient(run, clears):
    for got, wanted in zip(
        run(2, out_of_memory_in_the_loss, clears, True),
        run(2, out_of_memory_in_the_loss, clears, False),
        strict=True,
    ):
        assert all(map(torch.equal, got, wanted))


def order_of_buckets(group: Any) -> list[tuple[int, ...]]:
    """After a first step, ahead of which another parameter's batch is left out."""
    params = [torch.nn.Parameter(torch.ones(64)) for _ in range(2)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group)
    params[1].sum().backward()
    optimizer.zero_grad()
    params[0].sum().backward()
    optimizer.step()
    return [tuple(bucket.numbers) for bucket in optimizer._buckets]


def test_a_batch_that_is_left_out_decides_on_no_order_of_buckets(run):
    assert run(2, order_of_buckets) == [[(0, 1)]] * 2


def order_of_barriers(group: Any) -> list[str]:
    """Of sends and sums, each of which is a barrier between GPUs, where one rank's backward breaks off."""
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, transport="exact", bucket_cap_mb=1e-3
    )
    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    order: list[str] = []

    def noted(owner: type, name: str) -> None:
        method = getattr(owner, name)
        patch.setattr(owner, name, lambda *args: order.append(name) or method(*args))

    def break_off(grad: torch.Tensor) -> None:
        raise RuntimeError("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        noted(ExactTransport, "start")
        noted(BucketGrads, "reduce_slices")
        patch.setattr(Work, "is_done", lambda self, patience_s: True)  # as on a GPU
        if group.rank() == BAD_RANK:
            handle = model.hidden.weight.register_hook(break_off)
            with pytest.raises(RuntimeError, match="on purpose"):
                loss_of(model, micro_batch(1, 0)).backward()
            handle.remove()
        else:
            loss_of(model, micro_batch(1, 0)).backward()
        model.zero_grad(set_to_none=False)
        loss_of(model, micro_batch(2, 0)).backward()
        optimizer._gradients.collect(None, "full_grad")
    return order


def test_an_edit_behind_a_backward_that_broke_off_keeps_the_order_of_barriers(run):
    one, other = run(2, order_of_barriers)
    assert one == other and len(one) > 8


def test_a_step_broken_off_on_one_rank_of_one(tmp_path):
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), bucket_cap_mb=1e-3)

    def save() -> None:
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)

    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    saved = optimizer.full_state_dict()
    loss_of(model, micro_batch(1, 0)).backward()
    with pytest.raises(MemoryError), breaking("update", MemoryError):
        optimizer.step()
    with pytest.raises(pyzero.CheckpointError, match="broken off"):
        save()
    optimizer.step()
    with pytest.raises(pyzero.CheckpointError, match="broken off"):  # one more step makes it no step's state
        save()
    optimizer.load_state_dict(saved)
    save()
    assert torch.equal(optimizer.full_state_dict()["state"][0]["master"], saved["state"][0]["master"])
