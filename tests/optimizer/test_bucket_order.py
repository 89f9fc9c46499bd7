"""Buckets in the order in which gradients come: how many of them are alive in a backward, whatever the groups."""

import copy
import weakref
from typing import Any

import pytest
import torch
from models import assert_same, params_of, randint
from torch import Tensor, nn

import pyzero
from pyzero.comm.work import Work
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import GRANULE, Key, ParamSpec, RunKey, cap_bytes, plan

WIDTH = 32
NUM_LAYERS = 24
CAP_MB = 2 * 12 * WIDTH * WIDTH * 2 / 2**20 / 4  # half a layer, in bf16


class Block(nn.Module):
    """A transformer block's parameters and order of use, with a gated sum for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.mix(self.norm1(x)).chunk(3, -1)
        x = x + self.out(torch.sigmoid(a) * b + c)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """With a tied embedding, and where asked a head that is not used, or a decoder that is registered first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        half = NUM_LAYERS // 2
        if kind == "encoder-decoder":
            self.decoder = nn.ModuleList(Block() for _ in range(half))
            self.encoder = nn.ModuleList(Block() for _ in range(half))
        else:
            self.encoder, self.decoder = nn.ModuleList(Block() for _ in range(NUM_LAYERS)), nn.ModuleList()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(WIDTH, 2) if kind == "unused head" else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return self.head(self.norm(x))


def make(kind: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(kind).bfloat16()


def groups_of(model: nn.Module, how: str) -> Any:
    params = list(model.parameters())
    if how == "decay":
        return [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr": 5e-3},
        ]
    if how == "per layer":
        return [{"params": [p], "lr": 1e-2 * 0.9**i} for i, p in enumerate(params)]
    return params


def live(group: Any, kind: str, how: str) -> tuple[list[float], int, list[Tensor]]:
    """Peaks of live gradients over all of them, by step; the largest bucket over all gradients, too."""
    model = make(kind)
    params = list(model.parameters())
    optimizer = pyzero.FusedZeroAdamW(groups_of(model, how), lr=1e-2, process_group=group, bucket_cap_mb=CAP_MB)
    total = sum(param.nbytes for param in params)
    peaks = []
    for step in range(4):
        watch = [p for p in params if p.requires_grad]
        peak = [0]

        def seen(param: Tensor, peak: list[int] = peak, watch: list[Tensor] = watch) -> None:
            live_bytes = sum(p.grad.nbytes for p in watch if p.grad is not None and not is_sharded(p.grad))
            peak[0] = max(peak[0], live_bytes)

        handles = [param.register_post_accumulate_grad_hook(seen) for param in watch]
        tokens = randint(16, (2, 5), seed=10 * step + group.rank())
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(peak[0] / total)
        for handle in handles:
            handle.remove()
    largest = max(bucket.flat.nbytes for bucket in optimizer._buckets)
    return peaks, largest / total, params_of(model)


def is_sharded(grad: Tensor) -> bool:
    return type(grad).__name__ == "ShardedGrad"


@pytest.mark.parametrize("how", ["one group", "decay", "per layer"])
@pytest.mark.parametrize("kind", ["plain", "unused head", "encoder-decoder"])
def test_few_gradients_are_alive_in_a_backward(ranks, kind, how):
    for peaks, largest, _ in ranks.run(2, live, kind, how):
        assert max(peaks[1:]) < 0.15 + 2 * largest, peaks
        if how == "decay" and kind == "plain":
            assert peaks[0] < 0.15 + 2 * largest  # the model's own order is known from the start


def test_the_order_of_buckets_changes_no_bit(ranks):
    wanted = ranks.run(2, trained, "decay", {"overlap": False, "bucket_cap_mb": 25.0})[0]
    for options in ({}, {"bucket_cap_mb": CAP_MB}, {"bucket_cap_mb": 1e-4}, {"stage": 1}):
        for got in ranks.run(2, trained, "decay", options):
            assert_same(got, wanted)


def trained(group: Any, how: str, options: dict[str, Any]) -> list[Tensor]:
    model = make("encoder-decoder")
    optimizer = pyzero.FusedZeroAdamW(groups_of(model, how), lr=1e-2, process_group=group, **options)
    for step in range(3):
        tokens = randint(16, (2, 5), seed=10 * step + group.rank())
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return params_of(model)


def test_groups_in_one_bucket_keep_their_hyper_parameters():
    """Against an optimizer for each group."""

    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 10 + 50 * i)) for i in range(6)]

    settings = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.01, "betas": (0.5, 0.6), "eps": 1e-3, "maximize": True}]
    ours, theirs = params(), params()
    together = pyzero.FusedZeroAdamW([{"params": ours[i::2], **settings[i]} for i in range(2)])
    apart = [pyzero.FusedZeroAdamW(theirs[i::2], **settings[i]) for i in range(2)]
    assert len(together._buckets) == 1 and len(together._buckets[0].layout.runs) == 2
    for step in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.full_like(one, 1.0 + step)
            other.grad = one.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert_same(params_of(nn.ParameterList(ours)), params_of(nn.ParameterList(theirs)))


def test_runs_lie_side_by_side_and_fill_the_bucket():
    key = Key("bf16", "cpu")
    specs = [ParamSpec(i, 10 + 90 * i, 2, key, RunKey(i % 3, i != 4)) for i in range(9)]
    for arrival in (None, [4, 0, 8, 2, 6, 1, 3, 5, 7]):
        for layout in plan(specs, 1000, 3, arrival):
            assert [layout.runs[0].begin, layout.runs[-1].end] == [0, layout.numel]
            for run, after in zip(layout.runs, layout.runs[1:], strict=False):
                assert run.end == after.begin and run.end % GRANULE == 0
            for slot in layout.param_slots:
                (owner,) = [run for run in layout.runs if run.begin <= slot.offset < run.end]
                assert owner.key == specs[slot.number].run and slot.offset + slot.numel <= owner.end


def held_while_buckets_move(group: Any, steps_before: int) -> tuple[float, float]:
    """Bytes of weights and state in buckets, over those at rest: when any bucket is made, and after it."""
    sizes: list[int] = []
    buckets: weakref.WeakSet[Bucket] = weakref.WeakSet()

    def held() -> int:
        alive = [vars(bucket) for bucket in buckets]
        return sum(each.nbytes for b in alive if "flat" in b for each in (b["flat"], b["master"], *b["state"].values()))

    class Watched(Bucket):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            buckets.add(self)
            sizes.append(held())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyzero.sharding.param_buckets.Bucket", Watched)
        params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(40)]
        optimizer = pyzero.FusedZeroAdamW(params, process_group=group, bucket_cap_mb=4 * 4096 * 2 / 2**20)
        if steps_before:
            state = optimizer.full_state_dict()
            for values in state["state"].values():
                values["exp_avg"] = torch.ones_like(values["exp_avg"])
            optimizer.load_state_dict(state)
        at_rest, num_made = held(), len(sizes)
        for number in [*range(2, 40), 0, 1]:  # each bucket's last two come from the one behind it
            params[39 - number].float().sum().backward()
        optimizer.step()
    assert len(sizes) == 2 * num_made, "no bucket has moved"
    return max(sizes) / at_rest, held() / at_rest


@pytest.mark.parametrize("loads", [False, True], ids=["fresh", "loaded"])
def test_few_buckets_are_there_twice_while_they_move(ranks, loads):
    for most, after in ranks.run(2, held_while_buckets_move, loads):
        assert most <= 1.35 and after == 1.0


def nothing_read(optimizer: Any, param: nn.Parameter) -> None:
    optimizer.state[param]["step"] += 0  # which moves in any case


WRITES: dict[str, Any] = {  # into exp_avg, each as torch's version counters do not show it
    "data": lambda optimizer, p: optimizer.state[p]["exp_avg"].data.fill_(8),
    "dlpack": lambda optimizer, p: torch.from_dlpack(optimizer.state[p]["exp_avg"]).fill_(8),
    "get": lambda optimizer, p: optimizer.state[p].get("exp_avg").data.fill_(8),
    "values": lambda optimizer, p: [v.data.fill_(8) for v in optimizer.state[p].values() if v.dim()],
    "items": lambda optimizer, p: [v.data.fill_(8) for n, v in optimizer.state[p].items() if n == "exp_avg"],
    "dict": lambda optimizer, p: dict(optimizer.state[p])["exp_avg"].data.fill_(8),
    "unpacked": lambda optimizer, p: {**optimizer.state[p]}["exp_avg"].data.fill_(8),
    "copied": lambda optimizer, p: copy.copy(optimizer.state[p])["exp_avg"].data.fill_(8),
    "copy()": lambda optimizer, p: optimizer.state[p].copy()["exp_avg"].data.fill_(8),
    "joined": lambda optimizer, p: (optimizer.state[p] | {})["exp_avg"].data.fill_(8),
    "joined to": lambda optimizer, p: ({} | optimizer.state[p])["exp_avg"].data.fill_(8),
    "state_dict": lambda optimizer, p: [
        s["exp_avg"].to_local().data.fill_(8) for s in optimizer.state_dict()["state"].values()
    ],
    "nothing": nothing_read,
}


def written_before_the_first_step(group: Any) -> list[tuple[str, float, int]]:
    """By way: the first moment after a step of no gradient that moves buckets, and how many shards were sent."""
    found = []
    for way, write in WRITES.items():
        params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(4)]
        optimizer = pyzero.FusedZeroAdamW(params, betas=(0.5, 0.5), process_group=group, bucket_cap_mb=1e-3)
        before = [bucket.layout for bucket in optimizer._buckets]
        for param in params:
            write(optimizer, param)
        for param in params:  # the reverse of how they lie
            (param.float() * 0).sum().backward()
        sent: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bucket, "to_send", lambda self, name, sent=sent: sent.append(name) or self.sharded(name))
            optimizer.step()
        assert [bucket.layout for bucket in optimizer._buckets] != before, "no bucket has moved"
        (moment,) = {float(value) for p in params for value in optimizer.full_state(p)["exp_avg"]}
        found.append((way, moment, len(sent)))
    return found


def test_state_that_was_written_before_the_first_step_moves_however_it_was_written(ranks):
    for found in ranks.run(2, written_before_the_first_step):
        for way, moment, num_sent in found:
            assert (moment, num_sent > 0) == ((0.0, False) if way == "nothing" else (4.0, True)), way


def written_on_one_rank(group: Any, writer: int, name: str) -> list[Tensor]:
    """What lies there after a step of no gradient that moves buckets, one of a parameter each."""
    params = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16)) for _ in range(4)]
    optimizer = pyzero.FusedZeroAdamW(params, lr=0.0, betas=(0.5, 0.5), process_group=group, bucket_cap_mb=1e-3)
    before = [bucket.layout for bucket in optimizer._buckets]
    for param in params if group.rank() == writer else []:
        (param.detach() if name == "weights" else optimizer.state[param][name]).fill_(8)
    for param in params:  # the reverse of how they lie
        (param.float() * 0).sum().backward()
    optimizer.step()
    assert [bucket.layout for bucket in optimizer._buckets] != before, "no bucket has moved"
    return [optimizer.full_master(p) if name != "exp_avg" else optimizer.full_state(p)[name] for p in params]


@pytest.mark.parametrize(("name", "after"), [("exp_avg", 4.0), ("weights", 8.0)])
@pytest.mark.parametrize("writer", [0, 1])
def test_what_one_rank_alone_has_written_moves(ranks, writer, name, after):
    """The ranks decide together: each sends its shards, or none does."""
    wanted = torch.zeros(2, 2048)
    wanted[writer] = after
    for values in ranks.run(2, written_on_one_rank, writer, name):
        assert_same(values, [wanted.flatten()] * 4)


def loaded_over_gradients_in_flight(group: Any) -> tuple[bool, int]:
    """Whether buckets of inf are in flight when a load moves to others, and how many steps they then skip."""
    model, other = make("encoder-decoder"), make("encoder-decoder")
    optimizers = [
        pyzero.FusedZeroAdamW(m.parameters(), bucket_cap_mb=CAP_MB, process_group=group) for m in (model, other)
    ]
    tokens = randint(16, (2, 5), seed=0)
    model(tokens).float().sum().backward()
    optimizers[0].step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "is_done", lambda self, patience_s: False)  # as where the other rank is late
        (other(tokens).float().sum() * float("inf")).backward()
    in_flight = bool(optimizers[1]._gradients._exchange._in_flight)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[1].step()
    return in_flight, optimizers[1].skipped_steps


def test_a_load_moves_no_bucket_whose_gradients_are_in_flight(ranks):
    assert ranks.run(2, loaded_over_gradients_in_flight) == [(True, 1)] * 2


def test_buckets_grow_with_the_ranks_that_share_one_on_gpus():
    caps = {num_ranks: cap_bytes(None, num_ranks, on_gpu=True) >> 20 for num_ranks in (1, 2, 8, 32, 128, 512, 16384)}
    assert caps == {1: 256, 2: 50, 8: 100, 32: 200, 128: 400, 512: 800, 16384: 800}
    assert cap_bytes(None, 512, on_gpu=False) == cap_bytes(25.0, 8, on_gpu=True) == 25 << 20


def test_launch_order_is_that_of_the_last_arrival():
    keys = [Key("bf16", "cpu"), Key("fp32", "cpu")]
    specs = [ParamSpec(i, 64, 2, keys[i in (1, 5)]) for i in range(6)]
    order = [[slot.number for slot in layout.param_slots] for layout in plan(specs, 256, 2, [5, 4, 3, 2, 1, 0])]
    assert order == [[4, 3], [5, 1], [2, 0]]


class CountedNumber(int):
    """A parameter's number that counts how often it is looked up."""

    num_hashes = 0

    def __hash__(self) -> int:
        CountedNumber.num_hashes += 1
        return int(self)


def test_a_plan_of_many_parameters_takes_time_in_proportion(monkeypatch):
    optimizer = pyzero.FusedZeroAdamW([nn.Parameter(torch.ones(4)) for _ in range(300)])
    came = [CountedNumber(number) for number in range(150)]
    monkeypatch.setattr(optimizer._group, "first_ranks", lambda *_: came)
    layouts = optimizer._param_buckets.plan_by_arrival(came)
    assert sum(len(layout.param_slots) for layout in layouts or ()) == 300
    assert CountedNumber.num_hashes < 10 * len(came)


def moved_bytes(group: Any) -> tuple[int, int]:
    """Bytes that ranks receive for one parameter's whole state, and the parameter's."""
    from pyzero.comm.group import Group

    small, large = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(100_000))
    optimizer = pyzero.FusedZeroAdamW([small, large], process_group=group)
    moved = [0]
    gather = Group.gather_shards

    def counting(self: Any, shard: Tensor, *args: Any) -> Tensor:
        moved[0] += shard.nbytes * self.size
        return gather(self, shard, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "gather_shards", counting)
        optimizer.full_state(small)
    return moved[0], small.nbytes


def test_whole_tensors_move_no_more_than_the_parameter(ranks):
    for moved, num_bytes in ranks.run(2, moved_bytes):
        assert moved <= 3 * 2 * num_bytes + 2 * 64  # and what each reads, in words


def saved_and_loaded(group: Any, cap_mb: float, reduce_grads: bool) -> None:
    """Fragments are of the buckets that they were saved in; another bucket size takes those over."""

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            tokens = randint(16, (2, 5), seed=10 * step + (group.rank() if reduce_grads else 0))
            model(tokens).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, other = make("encoder-decoder"), make("encoder-decoder")
    options = {"process_group": group, "reduce_grads": reduce_grads}
    optimizer = pyzero.FusedZeroAdamW(groups_of(model, "decay"), lr=1e-2, bucket_cap_mb=CAP_MB, **options)
    train(model, optimizer, range(2))
    saved = {key: value for key, value in optimizer.state_dict().items()}
    saved["state"] = {i: {k: v.clone() for k, v in state.items()} for i, state in saved["state"].items()}
    train(model, optimizer, range(2, 4))
    resumed = pyzero.FusedZeroAdamW(groups_of(other, "decay"), lr=1.0, bucket_cap_mb=cap_mb, **options)
    resumed.load_state_dict(saved)
    train(other, resumed, range(2, 4))
    assert_same(params_of(other), params_of(model))
    assert [bucket.numbers for bucket in resumed._buckets] == [bucket.numbers for bucket in optimizer._buckets]


@pytest.mark.parametrize(("cap_mb", "reduce_grads"), [(CAP_MB, True), (25.0, True), (25.0, False)])
def test_a_state_dict_brings_its_buckets(ranks, cap_mb, reduce_grads):
    ranks.run(2, saved_and_loaded, cap_mb, reduce_grads)


def loaded_in_other_dtypes(group: Any) -> str:
    """The message of a load into two buckets, of state whose parts were cut from one."""

    def make(dtype: torch.dtype) -> pyzero.FusedZeroAdamW:
        params = [nn.Parameter(torch.ones(100, dtype=of_param)) for of_param in (torch.bfloat16, dtype)]
        return pyzero.FusedZeroAdamW(params, process_group=group)

    optimizer = make(torch.float32)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(make(torch.bfloat16).state_dict())
    return str(error.value)


def test_parts_of_parameters_in_other_dtypes_are_refused(ranks):
    for message in ranks.run(2, loaded_in_other_dtypes):
        assert "expected parameters in the dtypes in which they were saved" in message
