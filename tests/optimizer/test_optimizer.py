"""FusedZeroAdam over one to four ranks, against one process of torch."""

import copy
import functools
import re
import sys
from typing import Any

import pytest
import torch
from models import DTYPES, NUM_MICRO_BATCHES, Net, assert_same, build, loss_of, micro_batch, params_of, randn
from torch import Tensor, nn

import pyzero


def train(group: Any, dtype: torch.dtype, num_steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Each rank takes its share of the micro-batches, one backward each; the gradients are means over all of them."""
    rank, size = group.rank(), group.size()
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, **{"lr": 1e-2, **options})
    norms = []
    for step in range(num_steps):
        optimizer.zero_grad()
        share = NUM_MICRO_BATCHES // size
        for index in range(rank * share, (rank + 1) * share):
            optimizer.backward(loss_of(model, micro_batch(step, index)) / share)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return {"params": params_of(model), "norms": norms, "skipped": optimizer.skipped_steps}


@functools.cache
def train_torch(num_steps: int, max_norm: float) -> list[Tensor]:
    model = build(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        optimizer.zero_grad()
        for index in range(NUM_MICRO_BATCHES):
            (loss_of(model, micro_batch(step, index)) / NUM_MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return params_of(model)


@pytest.mark.parametrize(("size", "stage"), [(1, 2), *[(size, stage) for size in (2, 3, 4) for stage in (1, 2)]])
def test_fp32_follows_torch_adamw_for_100_steps(ranks, size, stage):
    results = ranks.run(size, train, torch.float32, 100, {"stage": stage, "max_grad_norm": 0.5})
    for result in results[1:]:
        assert_same(results[0]["params"], result["params"])
    for ours, theirs in zip(results[0]["params"], train_torch(100, 0.5), strict=True):
        # 100 steps of 1e-2, gradients summed in another order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_buckets_or_overlap(ranks, dtype):
    plain = ranks.run(3, train, dtype, 6, {})
    for options in (
        {"overlap": False},
        {"bucket_cap_mb": 1e-4},
        {"bucket_cap_mb": 1e-3, "overlap": False},
        {"bucket_cap_mb": 1e-3},
        {"transport": "exact"},
        {"bucket_cap_mb": 1e-3, "transport": "exact"},
    ):
        for one, two in zip(plain, ranks.run(3, train, dtype, 6, options), strict=True):
            assert_same(one["params"], two["params"])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collective_transport_agrees_with_exact(ranks, size):
    exact = ranks.run(size, train, torch.float32, 10, {})
    collective = ranks.run(size, train, torch.float32, 10, {"transport": "collective"})
    for ours, theirs in zip(exact[0]["params"], collective[0]["params"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def same_gradients(group: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """Every rank has the same gradients, whose mean over 2 or 4 ranks is exact."""
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, loss_scale=None, **options)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
    return params_of(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharded_equals_unsharded_bit_for_bit(ranks, dtype):
    single = ranks.run(1, same_gradients, dtype, {})[0]
    for size in (2, 4):
        for stage in (1, 2):
            for transport in ("exact", "auto"):
                for result in ranks.run(size, same_gradients, dtype, {"stage": stage, "transport": transport}):
                    assert_same(single, result)
    for size in (2, 3, 4):  # gradients that are already averaged
        for result in ranks.run(size, same_gradients, dtype, {"reduce_grads": False}):
            assert_same(single, result)


def with_no_sync(group: Any, dtype: torch.dtype, stage: int, leave_last: bool) -> list[Tensor]:
    rank, size = group.rank(), group.size()
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, stage=stage)
    share = NUM_MICRO_BATCHES // size
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.no_sync():
            for index in range(rank * share, (rank + 1) * share - leave_last):
                optimizer.backward(loss_of(model, micro_batch(step, index)) / share)
        if leave_last:
            optimizer.backward(loss_of(model, micro_batch(step, (rank + 1) * share - 1)) / share)
        optimizer.step()
    return params_of(model)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("leave_last", [True, False])
def test_no_sync_only_moves_communication(ranks, stage, leave_last):
    expected = ranks.run(2, train, torch.float32, 4, {"stage": stage})[0]["params"]
    for result in ranks.run(2, with_no_sync, torch.float32, stage, leave_last):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def overflow_on_one_rank(group: Any, dtype: torch.dtype, stage: int, bad_rank: int) -> dict[str, Any]:
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group, stage=stage)
    optimizer.backward(loss_of(model, micro_batch(0, 0)))
    optimizer.step()
    before = [t.clone() for t in snapshot(model, optimizer)]
    scale = optimizer.loss_scale
    optimizer.zero_grad()
    loss = loss_of(model, micro_batch(1, 0))
    optimizer.backward(loss * float("inf") if group.rank() == bad_rank else loss)
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    return {"same": same, "ratio": optimizer.loss_scale / scale, "applied": optimizer.was_step_applied}


def snapshot(model: nn.Module, optimizer: pyzero.FusedZeroAdam) -> list[Tensor]:
    return [*model.parameters(), *(view for state in optimizer.state.values() for view in state.values())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_overflow_on_one_rank_of_four_changes_nothing_anywhere(ranks, dtype, stage):
    for result in ranks.run(4, overflow_on_one_rank, dtype, stage, 2):
        assert result == {"same": True, "ratio": 0.5 if dtype == torch.float16 else 1.0, "applied": False}


def used_on_one_rank(group: Any, stage: int) -> list[Tensor]:
    """Layer 0 is used by rank 0 only, layer 1 by both, layer 2 by none."""
    torch.manual_seed(5)
    layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
    optimizer = pyzero.FusedZeroAdamW(
        layers.parameters(), lr=1e-2, process_group=group, stage=stage, bucket_cap_mb=1e-4
    )
    for step in range(5):
        x = randn(4, 9, seed=step)
        optimizer.zero_grad()
        y = layers[1](x)
        if group.rank() == 0 and step != 2:
            y = layers[0](y)
        y.square().mean().backward()
        optimizer.step()
    return params_of(layers)


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_used_on_some_ranks_or_none(ranks, stage):
    torch.manual_seed(5)
    layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
    reference = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    for step in range(5):
        x = randn(4, 9, seed=step)
        reference.zero_grad()
        y = layers[1](x)
        first = layers[0](y) if step != 2 else y
        ((first.square().mean() + y.square().mean()) / 2).backward()
        reference.step()
    for result in ranks.run(2, used_on_one_rank, stage):
        for ours, theirs in zip(result, params_of(layers), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


# ---- one process -----------------------------------------------------------------------------------------------


def test_one_process_is_torch_adam_with_its_groups_and_schedules():
    ours, theirs = build(torch.float32), build(torch.float32)

    def groups(model: Net) -> list[dict[str, Any]]:
        rest = [p for n, p in model.named_parameters() if not n.startswith("hidden")]
        return [{"params": model.hidden.parameters(), "weight_decay": 0.1, "betas": (0.8, 0.9)}, {"params": rest}]

    left, right = pyzero.FusedZeroAdam(groups(ours), lr=1e-2), torch.optim.Adam(groups(theirs), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=30) for o in (left, right)]
    for step in range(30):
        for model, optimizer, schedule in zip((ours, theirs), (left, right), schedules, strict=True):
            optimizer.zero_grad()
            loss_of(model, micro_batch(step, 0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_state_dict_resumes_bit_for_bit():
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2)

    def run(model: Net, optimizer: pyzero.FusedZeroAdam, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(loss_of(model, micro_batch(step, 0)))
            optimizer.step()
        return params_of(model)

    run(model, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    expected = run(model, optimizer, range(5, 10))
    other = build(torch.bfloat16)
    resumed = pyzero.FusedZeroAdamW(other.parameters(), lr=0.5)
    resumed.load_state_dict(saved)
    assert_same(run(other, resumed, range(5, 10)), expected)


def test_unused_parameters_are_left_alone():
    used, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(70))
    optimizer = pyzero.FusedZeroAdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(70))
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.state[used]["step"] == 1
    assert (used < 1).all()


def test_writes_to_the_model_reach_the_masters():
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        if name != "head.weight":  # tied to the embedding, which was loaded after it or before
            assert torch.equal(value, other[name]) or name == "embedding.weight"
    for param, state in optimizer.state.items():
        assert torch.equal(state["master"].to(param.dtype), param.detach())


def test_unfrozen_parameters_join_in():
    frozen, free = nn.Parameter(torch.ones(5), requires_grad=False), nn.Parameter(torch.ones(5))
    optimizer = pyzero.FusedZeroAdam([frozen, free], lr=0.1)
    (frozen * free).sum().backward()
    optimizer.step()
    assert torch.equal(frozen, torch.ones(5))
    frozen.requires_grad_(True)
    optimizer.zero_grad()
    (frozen * free).sum().backward()
    optimizer.step()
    assert (frozen < 1).all()


def test_channels_last_parameters_keep_their_strides():
    def conv() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    ours, theirs = conv(), conv()
    strides = ours.weight.stride()
    left, right = pyzero.FusedZeroAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    assert ours.weight.stride() == strides
    for step in range(3):
        x = randn(2, 3, 8, 8, seed=step)
        for model, optimizer in ((ours, left), (theirs, right)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-6)


def test_memory_and_hooks_go_with_the_optimizer():
    import gc
    import weakref

    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # the first optimizer of a process imports what keeps its frames
    model = build(torch.float16)
    gc.disable()  # it goes with its last reference, as a GPU's memory should
    try:
        optimizer = pyzero.FusedZeroAdamW(model.parameters())
        optimizer.backward(loss_of(model, micro_batch(0, 0)))
        optimizer.step()
        gone, moments = weakref.ref(optimizer), weakref.ref(optimizer.state[model.gain]["exp_avg"])
        del optimizer
        assert gone() is None and moments() is None
    finally:
        gc.enable()
    loss_of(model, micro_batch(0, 0)).backward()  # a hook left behind would fail or do something


def wrapped_in_ddp(group: Any) -> list[str]:
    ddp = nn.parallel.DistributedDataParallel(build(torch.float32), process_group=group)
    bare = build(torch.float32)
    other = pyzero.FusedZeroAdamW(bare.parameters(), process_group=group)
    loss_of(bare, micro_batch(0, 0)).backward()  # another model's DDP is no concern of this one
    other.step()
    optimizer = pyzero.FusedZeroAdamW(ddp.parameters(), process_group=group)
    try:
        loss_of(ddp, micro_batch(0, 0)).backward()
    except RuntimeError as error:
        return [str(error)]
    return [f"no error of {type(optimizer).__name__}"]


def test_a_model_in_ddp_is_refused_at_the_first_backward(ranks):
    for (message,) in ranks.run(2, wrapped_in_ddp):
        assert "reduce_grads=False" in message
        assert "Net" in message


def already_reduced_by_ddp(group: Any) -> list[list[Tensor]]:
    results = []
    for make in (
        lambda params: pyzero.FusedZeroAdamW(params, lr=1e-2, process_group=group, reduce_grads=False),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
    ):
        ddp = nn.parallel.DistributedDataParallel(build(torch.float32), process_group=group)
        optimizer = make(ddp.parameters())
        for step in range(5):
            optimizer.zero_grad()
            loss_of(ddp, micro_batch(step, group.rank())).backward()
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
            optimizer.step()
        results.append(params_of(ddp.module))
    return results


def test_gradients_reduced_by_ddp(ranks):
    for ours, theirs in ranks.run(2, already_reduced_by_ddp):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


class NoHostRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on what reads a tensor's value into python, save where the code has made sure that it lies on the host."""

    READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
    # They ask for the device first, or read what the host has of its own.
    ALLOWED = ("gather", "first_ranks", "any_rank", "values_of", "_check_ids")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, "a value was read on the host (.item(), bool(), float())"
        assert "is_nonzero" not in name
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._patch = pytest.MonkeyPatch()
        for name in self.READERS:
            self._patch.setattr(Tensor, name, self._guarded(name, getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def _guarded(self, name: str, read: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_name
            assert caller in self.ALLOWED, f"a value was read on the host: {name} in {caller}"
            return read(*args, **kwargs)

        return guarded


def without_host_reads(group: Any, stage: int) -> None:
    model = build(torch.float16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, stage=stage, max_grad_norm=1.0)
    for step in range(3):
        loss = loss_of(model, micro_batch(step, 0))
        with NoHostRead():
            optimizer.zero_grad()
            optimizer.backward(loss * float("inf") if step == 1 else loss)
            optimizer.step()
            optimizer.clip_grad_norm_(1.0, norm_type=1.0)


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_backward_and_step_read_nothing_on_the_host(ranks, size, stage):
    ranks.run(size, without_host_reads, stage)


@pytest.mark.parametrize(
    "read",
    [float, bool, lambda t: t.item(), lambda t: t.cpu(), lambda t: t.tolist()],
    ids=["float", "bool", "item", "cpu", "tolist"],
)
def test_a_host_read_would_be_seen(read):
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        read(torch.ones(1))


def state_memory(group: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all living tensors that the optimizer added, and the parameters' own."""
    import gc

    def living() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        storages = (t.untyped_storage() for t in tensors)
        spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        total, reached = 0, 0
        for begin, end in spans:  # a parameter's storage lies inside its bucket's
            total += max(end - max(begin, reached), 0)
            reached = max(reached, end)
        return total

    before = living()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).to(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, loss_scale=None)
    for _ in range(2):
        model(torch.randn(3, 256, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return living() - before, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_memory_is_two_plus_twelve_over_w_bytes(ranks, size):
    for measured, num_params in ranks.run(size, state_memory, torch.bfloat16):
        assert measured / num_params == pytest.approx(2 + 12 / size, rel=0.03)


def test_static_loss_scale_skips_and_stays():
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.1, loss_scale=128.0)
    optimizer.backward((param * torch.tensor([1.0, float("inf"), 1.0])).sum())
    optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert (optimizer.loss_scale, optimizer.skipped_steps, optimizer.was_step_applied) == (128.0, 1, False)
    optimizer.zero_grad()
    optimizer.backward((2 * param).sum())
    assert torch.equal(param.grad, torch.full((3,), 256.0))
    optimizer.step()
    assert optimizer.was_step_applied
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(12.0).sqrt())


def test_sparse_gradients_are_refused_with_a_remedy():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = pyzero.FusedZeroAdam(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"shape \(5, 3\); build its embedding with sparse=False, or .*SparseAdam$"):
        optimizer.step()


def sparse_assigned(group: Any, stage: int, who: tuple[int, ...]) -> str:
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    grad = torch.ones(5, 3)
    param.grad = grad.to_sparse() if group.rank() in who else grad
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_so_they_are_on_several_ranks(run, stage, who):
    for rank, error in enumerate(run(2, sparse_assigned, stage, who)):
        told = r"RuntimeError: .*an error on ranks \[1\]"
        wanted = r"TypeError: .*shape \(5, 3\); build" if rank in who else told
        assert re.match(wanted, error), error


def small_after_large(group: Any, stage: int, synced: bool) -> Tensor:
    """Gradients 1 and then eight times 2^-9, each of which bf16 would round away."""
    param = nn.Parameter(torch.zeros(70, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    optimizer.no_sync().__enter__() if not synced else None
    for factor in (1.0, *[2.0**-9] * 8):
        (param * factor).sum().backward()
    optimizer.step()
    return optimizer.state[param]["exp_avg"].clone()


@pytest.mark.parametrize(("stage", "synced"), [(1, True), (1, False), (2, False), (2, True)])
def test_micro_batches_are_summed_in_fp32(ranks, stage, synced):
    for exp_avg in ranks.run(2, small_after_large, stage, synced):
        torch.testing.assert_close(exp_avg, torch.full_like(exp_avg, 0.1 * (1 + 8 * 2.0**-9)), rtol=1e-6, atol=0)


def with_checkpoints(group: Any, stage: int, reentrant: bool | None) -> list[Tensor]:
    """Layer 1 is in two checkpoints of one backward."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    optimizer = pyzero.FusedZeroAdamW(
        layers.parameters(), lr=1e-2, process_group=group, stage=stage, bucket_cap_mb=1e-4
    )
    for step in range(4):
        torch.manual_seed(step * 10 + group.rank())
        x = torch.randn(4, 16, requires_grad=True)
        optimizer.zero_grad()
        for index in (0, 1, 1, 2):
            layer = layers[index]
            x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        x.square().mean().backward()
        optimizer.step()
    return params_of(layers)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(ranks, stage, reentrant):
    plain = ranks.run(2, with_checkpoints, stage, None)
    for ours, theirs in zip(plain, ranks.run(2, with_checkpoints, stage, reentrant), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-7)  # partial sums in another order


def clipped_then_grown(group: Any) -> bool:
    first, second = nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(30))
    optimizer = pyzero.FusedZeroAdamW([first], lr=0.1, process_group=group)
    first.sum().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.add_param_group({"params": [second]})
    optimizer.step()
    return bool((first < 1).all() and (second == 1).all())


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_added_between_clip_and_step(ranks, size):
    assert all(ranks.run(size, clipped_then_grown))
