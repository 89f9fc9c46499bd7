"""What may cross with a round of buckets: gradients in any order, late exchanges, broken backwards, new parameters."""

import gc
import math
import queue
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from models import assert_same, params_of
from own_groups import OwnGroups
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyzero
from pyzero.comm.transport import ExactTransport, Exchange
from pyzero.comm.work import Work

LONGEST_DELAY_S = 5e-3
WIDTH = 24
NUM_BRANCHES = 5
START = ExactTransport.start


@contextmanager
def counted_starts(optimizer: pyzero.FusedZeroAdam) -> Iterator[list[int]]:
    """How many exchanges its transport starts, counted in the last entry of the list."""
    sent, start = [0], optimizer._transport.start

    def counting(*args: Any) -> Exchange:
        sent[-1] += 1
        return start(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer._transport, "start", counting)
        yield sent


# ---- any order, any delay ------------------------------------------------------------------------------------------


class LateExchanges:
    """ExactTransport.start, run later by one thread, which until then keeps nothing alive but the result."""

    def __init__(self, seed: int, mistake: str) -> None:
        self._random = random.Random(seed)
        self._mistake = mistake
        self.freed: list[str] = []  # buffers that went before they were read
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def start(self, transport: ExactTransport, send: Tensor, what: str) -> Exchange:
        received, to_read = torch.full_like(send, float("nan")), weakref.ref(send)
        slices = list(received.view(transport.group.size, -1).unbind(0))
        done, delay_s = threading.Event(), self._random.uniform(0, LONGEST_DELAY_S)

        def run() -> None:
            time.sleep(delay_s)
            late = to_read()
            if late is None:
                self.freed.append(what)
                late = received
            exchange = START(transport, late, what)
            exchange.work.wait()
            torch.cat(exchange.slices, out=received)
            done.set()

        self._jobs.put(run)
        handle = None if self._mistake == "result is not waited for" else Done(done)
        kept = torch.empty(0) if self._mistake == "buffer is not kept" else send
        return Exchange(Work(handle, transport.group, what), slices, kept)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._jobs.task_done()

    def drain(self) -> None:
        """Return when all that was started has been sent."""
        self._jobs.join()

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()


class Done:
    """What Work takes for a handle."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self._event.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return self._event.is_set()


def branches(dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(7)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)) for _ in range(NUM_BRANCHES)]
    return nn.ModuleList(layers).to(dtype)


def in_any_order(
    group: Any, dtype: torch.dtype, options: dict[str, Any], disturbed: bool, mistake: str = ""
) -> dict[str, Any]:
    """Branches whose gradients arrive in another order on each rank and in each backward, at random times."""
    rank = group.rank()
    model, draw, late = branches(dtype), random.Random(rank), LateExchanges(100 + rank, mistake)
    options = {"transport": "exact", **options}  # the one that can be late by itself
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, **options)
    orders: list[list[int]] = []

    def arrive(index: int) -> None:
        orders[-1].append(index)
        time.sleep(draw.uniform(0, LONGEST_DELAY_S / 10))

    with pytest.MonkeyPatch.context() as patch:
        if disturbed:
            patch.setattr(ExactTransport, "start", lambda *args: late.start(*args))
            for index, param in enumerate(model.parameters()):
                param.register_hook(lambda grad, index=index: arrive(index))
        for step in range(2):
            optimizer.zero_grad()
            for micro in range(2):
                orders.append([])
                x = torch.full((2, WIDTH), (1.0 + rank + step) / (3 + micro), dtype=dtype)
                losses = [torch.empty(0)] * NUM_BRANCHES
                for index in draw.sample(range(NUM_BRANCHES), NUM_BRANCHES) if disturbed else range(NUM_BRANCHES):
                    losses[index] = model[index](x).float().square().mean()
                torch.stack(losses).sum().backward()
            if disturbed:
                late.drain()  # or the step's own collectives would come in between
            optimizer.step()
    late.stop()
    return {"params": params_of(model), "orders": orders, "freed": late.freed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_order_of_gradients_and_late_exchanges_change_no_bit(ranks, size, dtype):
    wanted = ranks.run(size, in_any_order, dtype, {"overlap": False}, False)[0]["params"]
    for options in ({"bucket_cap_mb": 1e-4}, {"bucket_cap_mb": 3e-3}, {}):
        results = ranks.run(size, in_any_order, dtype, options, True)
        for result in results:
            assert not result["freed"]
            assert_same(result["params"], wanted)
        assert len({str(result["orders"][0]) for result in results}) == size  # no two ranks had the same


@pytest.mark.parametrize("overlap", [True, False])
def test_a_result_that_is_not_waited_for_changes_bits(ranks, overlap):
    wanted = ranks.run(2, in_any_order, torch.float32, {}, False)[0]["params"]
    options = {"bucket_cap_mb": 3e-3, "overlap": overlap}
    for result in ranks.run(2, in_any_order, torch.float32, options, True, "result is not waited for"):
        with pytest.raises(AssertionError, match="differs"):
            assert_same(result["params"], wanted)


def test_a_buffer_that_is_not_kept_is_noticed(ranks):
    results = ranks.run(2, in_any_order, torch.float32, {"bucket_cap_mb": 3e-3}, True, "buffer is not kept")
    assert all("the reduce-scatter of gradient bucket 0" in result["freed"] for result in results)


# ---- reentrant checkpoints -----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks in reentrant checkpoints, or plain where `how` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))

    def run(self, indices: tuple[int, ...], x: Tensor, depth: int) -> Tensor:
        """These blocks one after the other, inside `depth` checkpoints."""
        if depth:
            return checkpoint(self.run, indices, x, depth - 1, use_reentrant=True)
        for index in indices:
            x = self.blocks[index](x)
        return x

    def forward(self, x: Tensor, how: str) -> Tensor:
        plain, depth = how.endswith("plain"), 0 if how.endswith("plain") else 1
        if how.startswith("twice"):
            for indices in ((0, 1), (1,), (2, 3)):
                x = self.run(indices, x, depth)
            return x
        if how.startswith("tied"):
            return self.run((0, 1, 2, 3), x, depth) @ self.blocks[0][0].weight
        if how == "nested":
            return self.run((2, 3), self.run((0, 1), x, 3), 2)
        for index in range(4):
            x = self.run((index,), x, 0 if plain else 1)
        return x


def rounds(group: Any, dtype: torch.dtype, how: str) -> dict[str, Any]:
    """Two backwards in each of three steps; what they sent, and the gradients of the first step."""
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, loss_scale=None, bucket_cap_mb=5e-4
    )
    grads: list[Tensor] = []

    with counted_starts(optimizer) as sent:
        sent.clear()
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(2):
                sent.append(0)
                x = torch.full((2, WIDTH), 1.0 + group.rank() + step + micro / 4, dtype=dtype, requires_grad=True)
                model(x, how).float().square().mean().backward()
            if step == 0:
                grads = [optimizer.full_grad(param) for param in model.parameters()]
            optimizer.step()
    return {"sent": sent, "grads": grads, "buckets": len(optimizer._buckets)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("how", "plain", "same"),
    # A weight that comes again behind its bucket goes with the next round; from then on its bucket waits for it.
    [
        ("each", "plain", True),
        ("nested", "plain", True),
        ("twice", "twice, plain", False),
        ("tied", "tied, plain", False),
    ],
)
def test_one_round_per_outermost_backward(ranks, dtype, how, plain, same):
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[dtype]
    wanted = ranks.run(2, rounds, dtype, plain)
    for got, other in zip(ranks.run(2, rounds, dtype, how), wanted, strict=True):
        num_buckets = got["buckets"]
        assert num_buckets > 3 and other["sent"] == [num_buckets] * 6
        assert got["sent"] == [num_buckets] * 6
        if same:
            assert_same(got["grads"], other["grads"])
        for ours, theirs in zip(got["grads"], other["grads"], strict=True):
            # Two gradients of one weight are added in another order: one rounding of each, in its dtype.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * unit * float(theirs.abs().max()))


def late_in_every_step(group: Any) -> tuple[bool, list[int]]:
    """Whether buckets have moved, and by step how many were sent. A weight in two checkpoints is late."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group, bucket_cap_mb=4e-4)  # one parameter in each
    before, found = [bucket.numbers for bucket in optimizer._buckets], []
    with counted_starts(optimizer) as sent:
        for step in range(3):
            sent[0] = 0
            y = torch.full((100,), 1.0 + step + group.rank(), requires_grad=True)
            for index in (1, 2, 1, 0):
                y = checkpoint(lambda y, param=params[index]: y * param, y, use_reentrant=True)
            y.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(sent[0])
    return [bucket.numbers for bucket in optimizer._buckets] != before, found


def test_a_late_weight_costs_one_round_more_once(ranks):
    """Its bucket waits for the end of backward from then on, and so does the one that it moves to."""
    for has_moved, found in ranks.run(2, late_in_every_step):
        assert has_moved and found == [2 * 3, 3, 3]


def used_in_every_other_step(group: Any) -> list[tuple[int, int]]:
    """By step: how many buckets were sent in backward, and in all."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group, bucket_cap_mb=4e-4)  # one parameter in each
    found = []
    with counted_starts(optimizer) as sent:
        for step in range(8):
            sent[0] = 0
            sum(param.sum() for param in (params if step % 2 == 0 else params[:2])).backward()
            in_backward = sent[0]
            optimizer.step()
            optimizer.zero_grad()
            found.append((in_backward, sent[0]))
    return found


def test_a_parameter_of_every_other_step_costs_one_round_more_once(ranks):
    """No bucket waits for one that was unused, so its gradient takes a round of its own; then its bucket waits."""
    one_round = (3, 3)
    for found in ranks.run(2, used_in_every_other_step):
        assert found == [one_round, one_round, (2, 2 + 3), *[one_round] * 5]


def two_models(group: Any, together: bool) -> list[Tensor]:
    """Two optimizers over two models, in one backward or one at a time."""
    models = [branches(torch.float32), branches(torch.float32)]
    optimizers = [
        pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, bucket_cap_mb=3e-3) for model in models
    ]
    for step in range(3):
        x = torch.full((2, WIDTH), 1.0 + group.rank() + step)
        losses = [sum(branch(x / (1 + i)).square().mean() for branch in model) for i, model in enumerate(models)]
        for loss in [losses[0] + losses[1]] if together else losses:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [*params_of(models[0]), *params_of(models[1])]


def test_two_models_in_one_backward(ranks):
    apart = ranks.run(2, two_models, False)[0]
    for got in ranks.run(2, two_models, True):
        assert_same(got, apart)
    assert not any(torch.equal(a, b) for a, b in zip(apart[: len(apart) // 2], apart[len(apart) // 2 :], strict=True))


# ---- backwards that are broken off ---------------------------------------------------------------------------------


def raising(grad: Tensor) -> None:
    raise ArithmeticError("on purpose")


def broken_off(group: Any, dtype: torch.dtype, places: tuple[int | None, ...], then: str) -> dict[str, Any]:
    """In step 1, backward raises behind the gradients of `places[rank]` of five layers, of which a bucket holds two."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(5)]).to(dtype)
    cap = 2 * WIDTH * (WIDTH + 1) * model[0].weight.element_size() / 2**20  # two layers in each bucket
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, loss_scale=None, bucket_cap_mb=cap
    )
    place, sent_for_nothing = places[group.rank()], 0

    with counted_starts(optimizer) as sent:
        for step in range(3):
            x = torch.full((2, WIDTH), 1.0 + step + group.rank(), dtype=dtype)
            if step == 1:
                y = x
                for index, layer in enumerate(model):
                    y = layer(y)
                    if place is not None and index == 4 - place:
                        y.register_hook(raising)
                with nullcontext() if place is None else pytest.raises(ArithmeticError):
                    y.float().square().mean().backward()
                if then == "step":
                    optimizer.step()
                    sent[0] = 0
                    optimizer.zero_grad()
                    sent_for_nothing += sent[0]
            optimizer.zero_grad()
            sent[0] = 0
            model(x).float().square().mean().backward()
            optimizer.step()
    num_buckets = len(optimizer._buckets)
    assert (num_buckets, sent[0], sent_for_nothing) == (3, 3, 0)  # one round
    return params_of(model)


# 1 is inside the first bucket, 2 is behind it; None does not raise.
@pytest.mark.parametrize("places", [(1, 1), (2, 2), (1, 2), (4, 1), (None, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_broken_off_anywhere(ranks, dtype, places):
    wanted = ranks.run(2, broken_off, dtype, (None, None), "zero_grad")
    for got, other in zip(ranks.run(2, broken_off, dtype, places, "zero_grad"), wanted, strict=True):
        assert_same(got, other)


@pytest.mark.parametrize("places", [(2, 4), (None, 2)], ids=str)
def test_a_step_after_a_broken_backward_takes_what_there_is(ranks, places):
    results = ranks.run(2, broken_off, torch.float32, places, "step")
    assert_same(results[0], results[1])


def first_bucket_half_filled(group: Any, breaks: bool) -> tuple[int, bool, list[Tensor]]:
    """A backward that raises between the two parameters of a bucket, then one in which the other comes first."""
    params = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(70))]
    optimizer = pyzero.FusedZeroAdamW(params, lr=1e-2, process_group=group)

    if breaks:
        first, second = params[0] * 2, params[1] * 3  # backward takes the later one first
        first.register_hook(raising)
        with pytest.raises(ArithmeticError):
            (first + second).sum().backward()
    optimizer.zero_grad()
    with counted_starts(optimizer) as sent:
        second, first = params[1] * 3, params[0] * 2
        (first + second).sum().backward()
    optimizer.step()
    return sent[0], optimizer._gradients._reducer._readiness.waits_for_end(0), params_of(nn.ParameterList(params))


def test_a_bucket_that_was_half_filled_starts_anew(ranks):
    _, _, wanted = ranks.run(2, first_bucket_half_filled, False)[0]
    for sent, waits, params in ranks.run(2, first_bucket_half_filled, True):
        assert (sent, waits) == (1, False)
        assert_same(params, wanted)


def late_and_broken_off(group: Any, breaks: bool) -> tuple[int, list[Tensor]]:
    """A layer in two reentrant checkpoints is late; a backward that raises in between leaves no trace."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    optimizer = pyzero.FusedZeroAdamW(layers.parameters(), lr=1e-2, process_group=group, bucket_cap_mb=1e-4)

    def backward(fails: bool) -> None:
        x = torch.full((2, WIDTH), 1.0 + group.rank(), requires_grad=True)
        y = x * 1
        if fails:
            y.register_hook(raising)
        for index in (1, 1, 2) if fails else (0, 1, 2):
            y = checkpoint(layers[index], y, use_reentrant=True)
        y.square().mean().backward()

    if breaks:
        with pytest.raises(ArithmeticError):
            backward(True)
        assert any(record.has_local for record in optimizer._gradients._records.by_number)
    optimizer.zero_grad()
    with counted_starts(optimizer) as sent:
        backward(False)
    optimizer.step()
    return sent[0] // len(optimizer._buckets), params_of(layers)


def test_a_late_gradient_of_a_broken_backward_is_forgotten(ranks):
    _, wanted = ranks.run(2, late_and_broken_off, False)[0]
    for rounds, params in ranks.run(2, late_and_broken_off, True):
        assert rounds == 1
        assert_same(params, wanted)


# ---- what joins, what is left, what goes ---------------------------------------------------------------------------


def joined_between(group: Any, stage: int, how: str) -> list[Tensor]:
    """A parameter that joins the optimizer between a backward and its step."""
    first = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    second = nn.Parameter(torch.ones(70, dtype=torch.bfloat16), requires_grad=how != "unfrozen")
    params = [first] if how == "added" else [first, second]
    optimizer = pyzero.FusedZeroAdamW(params, lr=0.1, process_group=group, stage=stage)
    (first.float() * (1 + group.rank())).sum().backward()
    if how == "added":
        optimizer.add_param_group({"params": [second]})
    second.requires_grad_(True)
    optimizer.step()
    assert torch.equal(second, torch.ones_like(second))
    (first.float() + second.float()).sum().backward()
    optimizer.step()
    return [first.detach().clone(), second.detach().clone()]


@pytest.mark.parametrize("how", ["added", "unfrozen"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_that_joins_between_backward_and_step(ranks, stage, how):
    wanted = ranks.run(1, joined_between, stage, how)[0]
    for got in ranks.run(2, joined_between, stage, how):
        assert_same(got[1:], wanted[1:])  # the gradients of the first are other ones on one rank
        assert (got[0] < 0.9).all()


def unfrozen_in_time(group: Any, stage: int, freezes_first: bool) -> list[float]:
    """Norms of torch's clipping, and gradients, of the backward in which the second parameter is first trained."""
    first = nn.Parameter(torch.ones(64))
    second, third = (nn.Parameter(torch.ones(n), requires_grad=False) for n in (16, 1))
    params = [first, second, third]
    optimizer = pyzero.FusedZeroAdamW(params, lr=0.0, process_group=group, stage=stage)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    first.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    first.requires_grad_(not freezes_first)
    second.requires_grad_(True)
    loss = first.sum() + (4.0 * second.sum() if group.rank() == 0 else 0.0)
    another = (second * third).sum()  # its graph has both
    scaler.scale(loss + 0.0 * second.sum()).backward()
    torch.autograd.grad(another, [second])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([param for param in params if param.grad is not None], 1.0)
    grads = [optimizer.full_grad(param) for param in (first, second)]
    return [float(norm), *(0.0 if grad is None else float(grad[0]) for grad in grads)]


@pytest.mark.parametrize("freezes_first", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_a_parameter_that_is_trained_anew_are_averaged_before_they_are_read(ranks, stage, freezes_first):
    values = [0.0 if freezes_first else 1.0, 2.0]  # the mean of 4 and 0
    norm = math.sqrt(64 * values[0] ** 2 + 16 * values[1] ** 2)
    wanted = [norm, *(value / norm for value in values)]
    for got in ranks.run(2, unfrozen_in_time, stage, freezes_first):
        assert got == pytest.approx(wanted, rel=1e-5)


def unfrozen_unevenly(group: Any) -> list[tuple[float, float]]:
    """Gradients where rank 0's backwards are other ones than rank 1's between the unfreezing and the first round."""
    found = []
    for how in ("no_sync", "broken", "broken, then a step"):
        first, second = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(16), requires_grad=False)
        optimizer = pyzero.FusedZeroAdamW([first, second], lr=0.0, process_group=group, stage=2)
        second.requires_grad_(True)
        if how == "no_sync":
            for _ in range(2 - 2 * group.rank()):
                with optimizer.no_sync():
                    (first.sum() + second.sum()).backward()
        else:
            late = second * 1.0
            if group.rank() == 0:
                late.register_hook(broken_hook)
            try:
                (first.sum() + late.sum()).backward()
            except ZeroDivisionError:
                assert group.rank() == 0
        if how != "broken, then a step":
            (first.sum() + second.sum()).backward()
        optimizer.step()
        found.append(tuple(float(optimizer.full_grad(param)[0]) for param in (first, second)))
    return found


def broken_hook(grad: torch.Tensor) -> None:
    raise ZeroDivisionError


def test_what_is_unfrozen_joins_behind_the_same_round_on_all_ranks(ranks):
    assert ranks.run(2, unfrozen_unevenly) == [[(2.0, 2.0), (2.0, 1.5), (1.0, 0.5)]] * 2


def references(group: Any) -> list[int]:
    """To the gradients' owner, after each of many backwards over one graph: a hook left on a node would hold one."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    optimizer = pyzero.FusedZeroAdamW(layers.parameters(), process_group=group, bucket_cap_mb=1e-4)
    y = torch.ones(2, WIDTH, requires_grad=True)
    for layer in layers:
        y = checkpoint(lambda z, layer=layer: checkpoint(layer, z, use_reentrant=True), y, use_reentrant=True)
    loss, counts = y.square().mean(), []
    for _ in range(12):
        loss.backward(retain_graph=True)
        counts.append(sys.getrefcount(optimizer._gradients._reducer))
    return counts


def test_no_hook_is_left_behind(ranks):
    for counts in ranks.run(2, references):
        assert len(set(counts)) == 1, counts


def made_anew(group: Any, stage: int) -> None:
    """An optimizer goes, without the garbage collector; the next one over the same model starts as a first one does."""

    def train(model: nn.Module) -> weakref.ref[Any]:
        optimizer = pyzero.FusedZeroAdamW(
            model.parameters(), lr=1e-2, process_group=group, stage=stage, bucket_cap_mb=1e-3
        )
        for step in range(2):
            y = torch.full((2, WIDTH), 1.0 + step + group.rank(), requires_grad=True)
            for layer in model:
                y = checkpoint(layer, y, use_reentrant=True)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        shards = [bucket.state["exp_avg"] for bucket in optimizer._buckets]
        optimizer.zero_grad()
        gone.extend(weakref.ref(shard) for shard in shards)
        return weakref.ref(optimizer)

    gone: list[Any] = []
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    gc.collect()
    gc.disable()
    try:
        first = train(model)
        assert first() is None and all(ref() is None for ref in gone)
    finally:
        gc.enable()
    twin = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    twin.load_state_dict(model.state_dict())
    train(model)
    train(twin)
    assert_same(params_of(model), params_of(twin))


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_made_anew_over_the_same_model(ranks, stage):
    ranks.run(2, made_anew, stage)


class _Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("broken")


def add_a_group_in_a_broken_round(group: Any) -> tuple[int, list[Tensor]]:
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group, bucket_cap_mb=4e-4)  # one parameter in each
    with pytest.raises(RuntimeError, match="broken"):
        (_Breaks.apply(params[0]) * params[2]).sum().backward()
    num_sent = optimizer._gradients._rounds.next
    more = nn.Parameter(torch.ones(100))
    optimizer.add_param_group({"params": [more]})
    optimizer.step()
    return num_sent, [param.detach().mean() for param in (*params, more)]


def collectives_after_a_round_broken_on_one_rank(group: Any, transport: str) -> list[Tensor]:
    """What rank 0 has not sent yet goes ahead of each; and another optimizer does not meet what it never sent."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    more = nn.Parameter(torch.ones(100))

    def build() -> pyzero.FusedZeroAdamW:
        return pyzero.FusedZeroAdamW(params, process_group=group, transport=transport, bucket_cap_mb=4e-4)

    optimizer = build()
    saved = optimizer.full_state_dict()
    calls = [
        lambda: optimizer.full_master(params[0]),
        lambda: optimizer.full_state_dict(),
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.add_param_group({"params": [more]}),
        lambda: None,
    ]
    for call in calls:
        first = _Breaks.apply(params[0]) if group.rank() == 0 else params[0]
        with pytest.raises(RuntimeError, match="broken") if group.rank() == 0 else nullcontext():
            (first * params[2]).sum().backward()
        for param in params:
            param.grad = None
        call()
    optimizer = None
    optimizer = build()
    (params[1] * (1.0 + group.rank())).sum().backward()
    optimizer.step()
    return [param.detach().mean() for param in params]


@pytest.mark.parametrize("transport", ["auto", "exact"])
def test_collectives_may_come_behind_a_round_broken_on_one_rank(ranks, transport):
    for first, second, third in OwnGroups(ranks)(2, collectives_after_a_round_broken_on_one_rank, transport):
        assert first == third == 1.0 and second < 1.0


def test_a_group_may_come_in_the_middle_of_a_broken_round(ranks):
    for num_sent, (first, second, third, more) in ranks.run(2, add_a_group_in_a_broken_round):
        assert num_sent == 1
        assert first == second == more == 1.0 and third < 1.0


def captured_backward(group: Any) -> str:
    """As on a GPU, into a CUDA graph: its replay runs no hook."""
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group)
    optimizer._gradients._reducer._device = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError) as caught:
            param.sum().backward()
    return str(caught.value)


def test_a_backward_that_is_captured_is_refused(ranks):
    for said in ranks.run(2, captured_backward):
        assert "got 2 ranks that reduce gradients in it; run backward and step() eagerly" in said
