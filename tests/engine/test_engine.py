"""initialize() and the engine, on one rank and on four."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from logs import logged
from torch import nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss

import pyzero
from pyzero.deepspeed.engine.applied_steps import AppliedSteps
from pyzero.deepspeed.schedules import WarmupLR

FP32 = {"train_batch_size": 4, "zero_optimization": {"stage": 2}}
FP16 = {**FP32, "fp16": {"enabled": True, "hysteresis": 1, "initial_scale_power": 12}}
SECTIONS = {"fp16": FP16["fp16"], "bf16": {"enabled": True}}


def make_model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def start(config, model=None, **kwargs):
    model = model or make_model()
    if "optimizer" not in kwargs and "optimizer" not in config:
        kwargs["optimizer"] = torch.optim.AdamW(model.parameters(), lr=0.01)
    return pyzero.initialize(model=model, config=config, **kwargs)


def exact_loss(outputs, signs):
    """Gradients are means of small integers, which are exact in fp32 in any order of sums."""
    return (outputs * signs).mean()


def exact_batch(step, rows):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(-4, 5, (rows, 4), generator=generator).float()
    signs = torch.randint(0, 2, (rows, 1), generator=generator).float() * 6 - 3
    return inputs, signs.expand(rows, 3)


def train_exact(config, num_micro, rank=0, size=1, steps=3):
    """Return the weights after `steps` steps on global batches of 32, divided into micro-batches and over ranks."""
    engine, *_ = start(config)
    for step in range(steps):
        inputs, signs = (t.chunk(num_micro * size)[rank::size] for t in exact_batch(step, 32))
        for x, sign in zip(inputs, signs, strict=True):
            engine.backward(exact_loss(engine(x), sign))
            engine.step()
    assert engine.global_steps == steps
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def train_exact_on_rank(group, config, num_micro):
    return train_exact(config, num_micro, group.rank(), group.size()).tolist()


def test_accumulation_equals_one_batch():
    whole = train_exact({"train_batch_size": 32}, 1)
    parts = train_exact({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8}, 4)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, torch.cat([p.detach().flatten() for p in make_model().parameters()]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_four_ranks_equal_one_process(ranks, stage):
    config = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 8},
    }
    whole = train_exact({"train_batch_size": 32}, 1).tolist()
    assert ranks.run(4, train_exact_on_rank, config, 2) == [whole] * 4


def test_against_torch():
    """The groups and hyper-parameters of the given optimizer are used."""
    model = make_model()
    twin = copy.deepcopy(model)
    settings = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)

    def groups(m):
        return [{"params": [m.weight]}, {"params": [m.bias], "lr": 0.5, "weight_decay": 0.0}]

    theirs = torch.optim.Adam(groups(twin), **settings)
    engine, optimizer, _, _ = start(FP32, model, optimizer=torch.optim.Adam(groups(model), **settings))
    assert isinstance(optimizer, pyzero.FusedZeroAdam)
    for step in range(5):
        inputs, signs = exact_batch(step, 4)
        engine.backward(exact_loss(engine(inputs), signs))
        engine.step()
        exact_loss(twin(inputs), signs).backward()
        theirs.step()
        theirs.zero_grad()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        # A few roundings of a weight below 2 per step.
        torch.testing.assert_close(mine, other, rtol=0, atol=5 * 4 * 2**-24)
    assert engine.get_lr() == [0.02, 0.5]


@pytest.mark.parametrize("section", ["fp16", "bf16"])
def test_16_bit_model_takes_fp32_inputs(section):
    model = make_model()
    before = list(model.parameters())
    parameters = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    engine, *_ = start({**FP32, section: SECTIONS[section]}, model, optimizer=optimizer)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    inputs, signs = exact_batch(0, 4)
    outputs = engine(inputs)
    assert outputs.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[section] == model.weight.dtype
    assert inputs.dtype == torch.float32
    start_weight = model.weight.detach().clone()
    engine.backward(exact_loss(outputs, signs))
    engine.step()
    assert engine.was_step_applied()
    # Adam's first step is lr in the direction of the sign, wherever the gradient is not 0.
    moved = (model.weight.detach().float() - start_weight.float()).abs()
    assert float(moved.max()) == pytest.approx(0.01, rel=0.1)


def test_nested_inputs():
    class Taker(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pair, *, table):
            return [pair[0].dtype, pair[1][0].dtype, table["x"].dtype, table["name"], self.weight.sum()]

    engine, *_ = start({**FP32, "bf16": {"enabled": True}}, Taker())
    x = torch.ones(1)
    dtypes = engine((x, [x.double()]), table={"x": torch.ones(1, dtype=torch.int64), "name": "n"})
    assert dtypes[:4] == [torch.bfloat16, torch.bfloat16, torch.int64, "n"]


def test_overflow_is_skipped():
    config = {**FP16, "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_num_steps": 10}}}
    engine, optimizer, _, schedule = start(config)
    assert isinstance(schedule, WarmupLR)
    inputs, signs = exact_batch(0, 4)
    before = engine.module.weight.detach().clone()
    engine.backward(exact_loss(engine(inputs), signs) * 1e6)
    engine.step()
    assert not engine.was_step_applied() and engine.skipped_steps == 1
    assert optimizer.loss_scale == 2048.0
    assert torch.equal(engine.module.weight, before)
    assert schedule.last_epoch == 0  # the schedule did not advance
    engine.backward(exact_loss(engine(inputs), signs))  # its gradients are below 4
    engine.step()
    assert engine.was_step_applied() and engine.skipped_steps == 1 and schedule.last_epoch == 1
    assert isinstance(engine.get_global_grad_norm(), float)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("section", ["bf16", None])
def test_the_schedule_stays_once_for_each_skipped_step(section, is_late):
    """Also without a loss scale: at the skipped step, or on a GPU at the next one."""
    config = {**FP32, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}
    engine, _, _, schedule = start({**config, section: SECTIONS[section]} if section else config)
    engine._applied_steps = AppliedSteps(is_late)
    inputs, signs = exact_batch(0, 4)
    epochs = []
    for factor in (1, float("inf"), 1, float("nan"), float("inf"), 1, 1):
        engine.backward(exact_loss(engine(inputs), signs) * factor)
        with torch.device("meta"):  # a script's default device
            engine.step()
        epochs.append(schedule.last_epoch)
    assert epochs == ([1, 2, 2, 3, 3, 3, 4] if is_late else [1, 1, 2, 2, 2, 3, 4])


@pytest.mark.parametrize("by_config", [True, False])
def test_a_skipped_step_names_the_parameter(caplog, by_config):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    given = {} if by_config else {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    engine, *_ = start({**FP32, **({"optimizer": {"type": "Adam"}} if by_config else {})}, model, **given)
    engine.backward((model[1].bias * float("inf")).sum())
    engine.step()
    engine.step()  # where it was is looked for from the second on
    assert "the gradient of 1.bias, shape (2,)" in caplog.text


def test_a_group_is_added_to_what_initialize_made():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = {**FP32, "optimizer": {"type": "Adam"}}
    _, optimizer, *_ = start(config, model, model_parameters=list(model[0].parameters()))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert all("param_names" not in group for group in optimizer.full_state_dict()["param_groups"])


def test_hysteresis_from_the_config():
    engine, optimizer, *_ = start({**FP32, "fp16": {"enabled": True}})
    inputs, signs = exact_batch(0, 4)
    scales = []
    for _ in range(2):
        engine.backward(exact_loss(engine(inputs), signs) * 1e6)
        engine.step()
        scales.append(optimizer.loss_scale)
    assert scales == [65536.0, 32768.0]


def test_an_fp16_loss_is_scaled_in_fp32():
    """In fp16, a loss of 2 times the scale of 32768 would be inf."""
    engine, *_ = start({**FP32, "fp16": {"enabled": True, "initial_scale_power": 15}})
    engine.backward(engine(torch.full((1, 4), 0.01)).mean() * 0 + engine.module.weight.mean() * 1e-2 + 2)
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize("section", ["fp16", "bf16"])
@pytest.mark.parametrize("loss_function", [l1_loss, mse_loss, huber_loss])
def test_a_loss_of_16_bit_outputs_and_fp32_targets(loss_function, section):
    """It works if this torch has a backward for the mix. Otherwise the error's remedy works."""
    engine, *_ = start({**FP32, section: SECTIONS[section]})
    inputs, targets = exact_batch(0, 4)
    weight = torch.ones(1, dtype=engine.module.weight.dtype, requires_grad=True)
    try:
        loss_function(weight, torch.zeros(1)).backward()
        outcome = nullcontext()
    except RuntimeError:
        outcome = pytest.raises(RuntimeError, match=r"Found dtype .* wanted one.*outputs\.float\(\)")
    with outcome:
        engine.backward(loss_function(engine(inputs), targets))
    engine.optimizer.zero_grad()
    engine.backward(loss_function(engine(inputs).float(), targets))
    before = engine.module.weight.detach().clone()
    engine.step()
    assert engine.was_step_applied() and not torch.equal(engine.module.weight, before)


def test_other_errors_of_backward_pass_through():
    engine, *_ = start(FP32)
    loss = engine(torch.ones(1, 4)).sum()
    engine.backward(loss)
    with pytest.raises(RuntimeError, match="^Trying to backward through the graph a second time"):
        engine.backward(loss)


def test_clipping():
    engine, *_ = start({**FP32, "gradient_clipping": 0.5})
    inputs, signs = exact_batch(0, 4)
    engine.backward(exact_loss(engine(inputs), signs) * 100)
    engine.step()
    plain, *_ = start(FP32)
    plain.backward(exact_loss(plain(inputs), signs) * 100)
    plain.step()
    assert engine.get_global_grad_norm() == plain.get_global_grad_norm() > 0.5
    moments = [e.optimizer.state[e.module.weight]["exp_avg"].norm() for e in (engine, plain)]
    assert moments[0] < 0.02 * moments[1]


def test_boundary_and_counters():
    engine, *_ = start({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2})
    inputs, signs = exact_batch(0, 2)
    seen = []
    for _ in range(4):
        seen.append(engine.is_gradient_accumulation_boundary())
        engine.backward(exact_loss(engine(inputs), signs))
        engine.step()
        assert engine.was_step_applied() is seen[-1]
    assert seen == [False, True, False, True]
    assert (engine.micro_steps, engine.global_steps) == (4, 2)
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (4, 2)
    assert engine.train_micro_batch_size_per_gpu() == 2
    engine.set_train_micro_batch_size(3)
    assert engine.get_batch_info() == (6, 3, 2)
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu=0"):
        engine.set_train_micro_batch_size(0)


def test_config_builds_optimizer_and_loader():
    config = {**FP32, "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.9]}}}
    data = torch.utils.data.TensorDataset(torch.arange(12.0).view(12, 1))
    _, optimizer, loader, schedule = start(config, training_data=data)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["decoupled_weight_decay"], schedule) == (0.5, (0.8, 0.9), True, None)
    assert sorted(float(x) for (batch,) in loader for x in batch) == list(range(12))
    assert [len(batch) for (batch,) in loader] == [4, 4, 4]


def test_muon_of_the_config():
    """As in DeepSpeed, Muon trains hidden matrices, and Adam embeddings, the output layer and vectors."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "hidden": make_model(), "lm_head": nn.Linear(3, 5)})
    params = {"lr": 0.5, "muon_lr": 0.25, "momentum": 0.9, "betas": [0.8, 0.9], "ns_method": "gram"}
    config = {**FP32, "optimizer": {"type": "Muon", "params": params}}
    given = [{"params": list(model.hidden.parameters()), "weight_decay": 0.1}, *model.embed.parameters()]
    engine, optimizer, *_ = start(config, model, model_parameters=[*given, *model.lm_head.parameters()])
    found = [
        (len(group["params"]), group["use_muon"], group["lr"], group["weight_decay"], engine.get_mom()[index])
        for index, group in enumerate(optimizer.param_groups)
    ]
    assert isinstance(optimizer, pyzero.ZeroMuon)
    assert found == [
        (3, False, 0.5, 0.0, (0.8, 0.9)),
        (1, True, 0.25, 0.1, 0.9),
        (1, False, 0.5, 0.1, (0.8, 0.9)),
    ]
    before = model.hidden.weight.detach().clone()
    engine.backward(model.lm_head(model.hidden(model.embed.weight)).square().mean())
    engine.step()
    moved = torch.linalg.svdvals(model.hidden.weight * 1 / (1 - 0.25 * 0.1) - before) * (1 - 0.25 * 0.1) / 0.25
    assert 0.5 < moved.min() and moved.max() < 1.5
    torch_muon = torch.optim.Muon([model.hidden.weight], lr=0.3)
    assert start(FP32, model.hidden, optimizer=torch_muon)[1].param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("by_config", [True, False])
def test_sgd(by_config):
    """The type is torch.optim.SGD, as in DeepSpeed."""
    params = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.25, "nesterov": True}
    models = [make_model() for _ in range(2)]
    wanted = torch.optim.SGD(models[0].parameters(), **params)
    config = {**FP32, "zero_allow_untested_optimizer": True}
    if by_config:
        engine, optimizer, *_ = start({**config, "optimizer": {"type": "SGD", "params": params}}, models[1])
    else:
        engine, optimizer, *_ = start(config, models[1], optimizer=torch.optim.SGD(models[1].parameters(), **params))
    assert isinstance(optimizer, pyzero.FusedZeroSGD) and engine.get_mom() == [0.5]
    for step in range(3):
        inputs, signs = exact_batch(step, 8)
        exact_loss(models[0](inputs), signs).backward()
        wanted.step()
        wanted.zero_grad()
        engine.backward(exact_loss(engine(inputs), signs))
        engine.step()
    for param, value in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=2**-20, atol=2**-22)


@pytest.mark.filterwarnings("error")
def test_a_torch_scheduler_follows_the_new_optimizer():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    engine, _, _, returned = start(FP32, model, optimizer=optimizer, lr_scheduler=schedule)
    assert returned is schedule
    for step in range(2):
        inputs, signs = exact_batch(step, 4)
        engine.backward(exact_loss(engine(inputs), signs))
        engine.step()
    assert engine.get_lr() == [0.25]


@pytest.mark.filterwarnings("error")
def test_a_schedule_that_is_not_handed_in_counts_too(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine, *_ = start(FP32, model, optimizer=optimizer)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    schedule.step()
    assert engine.get_lr() == [0.5]
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    optimizer.param_groups[0]["lr"] = 0.125
    assert engine.get_lr() == [0.125]


def test_a_group_whose_parameters_can_be_gone_through_once():
    model = make_model()
    before = model.weight.detach().clone()
    config = {**FP32, "optimizer": {"type": "Adam", "params": {"lr": 0.5}}}
    engine, *_ = start(config, model, model_parameters=[{"params": model.parameters()}])
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    assert not torch.equal(model.weight, before)


class Batch(dict):
    """A dict with its keys as attributes, as in many libraries."""

    __getattr__ = dict.__getitem__


class OfBatch(nn.Linear):
    def forward(self, batch):
        return super().forward(batch.inputs)


def test_16_bit_inputs_in_a_dict_of_a_class_of_its_own():
    engine, *_ = start({**FP32, "bf16": {"enabled": True}}, OfBatch(4, 3))
    batch = Batch(inputs=torch.ones(1, 4))
    assert engine(batch).dtype == torch.bfloat16 and batch.inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (None, TypeError, "got NoneType; pass"),
        ({"loss": torch.ones(())}, TypeError, "got dict; pass the one in it"),
        (torch.ones(3), ValueError, r"got one of shape \(3,\); pass loss.mean"),
    ],
    ids=["none", "dict", "several"],
)
def test_no_loss(loss, error, words):
    engine, *_ = start(FP32)
    with pytest.raises(error, match=words):
        engine.backward(loss)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: torch.optim.RMSprop(m.parameters(), lr=1), TypeError, "got RMSprop"),
        (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), ValueError, "amsgrad=True"),
        (lambda m: torch.optim.Adam(make_model().parameters()), ValueError, "of the same model"),
    ],
    ids=["rmsprop", "amsgrad", "other model"],
)
def test_optimizers_refused(make, error, words):
    model = make_model()
    with pytest.raises(error, match=words):
        start(FP32, model, optimizer=make(model))


def test_optimizer_with_state_is_refused():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="has taken steps"):
        start(FP32, model, optimizer=optimizer)


@pytest.mark.parametrize(("kwargs", "words"), [({"mpu": object()}, "mpu"), ({"config": None}, "expected a config")])
def test_arguments_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        pyzero.initialize(model=make_model(), **{"config": FP32, **kwargs})


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_that_is_not_trained(ranks, stage):
    for outputs, wanted, dtype, errors in ranks.run(4, evaluated, stage):
        assert outputs.dtype == dtype == torch.bfloat16 and torch.equal(outputs, wanted)
        assert all('pass optimizer= to initialize(), or set "optimizer" in the config' in error for error in errors)


def evaluated(group, stage):
    model = make_model()
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    inputs = torch.ones(2, 4)
    wanted = copy.deepcopy(model).bfloat16()(inputs.bfloat16())
    engine, optimizer, loader, schedule = pyzero.initialize(model=model, config=config)
    assert (optimizer, loader, schedule, engine.optimizer) == (None, None, None, None)
    with torch.no_grad():
        outputs = engine.eval()(inputs)
    errors = []
    for act in (engine.step, engine.no_sync, lambda: engine.backward(outputs.sum()), lambda: engine.skipped_steps):
        with pytest.raises(RuntimeError) as caught:
            act()
        errors.append(str(caught.value))
    return outputs.detach(), wanted.detach(), outputs.dtype, errors


def told_by_an_engine(group, folder):
    with logged(logging.INFO) as lines:
        engine, *_ = start({**FP32, "bf16": {"enabled": True}})
        engine(torch.ones(1, 4))
        engine.load_checkpoint(folder)
    return [line for line in lines if "config:" not in line]


def test_what_concerns_all_ranks_is_told_by_the_first(ranks, tmp_path):
    first, *others = ranks.run(4, told_by_an_engine, str(tmp_path))
    assert "inputs in torch.float32 are cast" in first[0] and "no checkpoint is loaded" in first[1]
    assert others == [[]] * 3
