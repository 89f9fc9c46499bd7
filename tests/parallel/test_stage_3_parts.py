"""Stage 3: modules and methods that a script calls outside forward, as generate() and a critic's forward_value()."""

from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

import pyzero
from pyzero.deepspeed import zero

WORLD = 4
RTOL = 16 * 2.0**-23  # for sums in another order, in fp32


class Shared(nn.Module):
    """A layer that shares its child's weight, and calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.weight


class Critic(case.Model):
    """A model whose forward is a loss. value(), and calls of its parts, bypass forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()
        self.offset = nn.Parameter(torch.zeros(1))

    def trunk(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        for block in self.blocks:
            x = block(x)
        return self.shared(x)

    def forward(self, x: Tensor) -> Tensor:
        return (self.value(x) + self.offset).sub(1).square().mean()

    def value(self, x: Tensor) -> Tensor:
        return self.last(self.trunk(x))

    def moved(self, x: Tensor) -> Tensor:
        return self.value(x + self.offset)


def start(stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": case.BATCH // WORLD,
        "optimizer": {"type": "AdamW", "params": {"lr": case.LR}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    return pyzero.initialize(model=Critic(), config=config)[0]


def rows(step: int) -> Tensor:
    return case.batch(step).chunk(WORLD)[dist.get_rank()]


def train(group: Any, stage: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of evaluations before each step, and the weights after the last."""
    engine, seen = start(stage), []
    for step in range(6):
        with torch.no_grad():
            seen.append(engine.value(rows(step)))  # the very first call of the model
            seen.append(engine.module.last(engine.module.trunk(rows(step))))
        with pytest.raises(RuntimeError):
            engine.module.first(torch.ones(1, 7))
        x = rows(step)
        if step % 3 == 0:
            loss = engine(x)
        elif step % 3 == 1:
            loss = engine.value(x).square().mean()
        else:
            loss = engine.module.value(x).mean() + engine(x)
        engine.backward(loss)
        engine.step()
    return seen, list(engine.get_fp32_state_dict().values())


def train_with_inputs(group: Any, stage: int) -> tuple[list[Tensor], list[Tensor]]:
    """Train as on a GPU with torch before 2.13, whose modules of fully_shard need an input to move."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    before = FSDPState._root_pre_forward

    def moving(self: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before(self, module, (args[0], *args[1:]), kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPState, "_root_pre_forward", moving)
        return train(group, stage)


@pytest.mark.parametrize("how", [train, train_with_inputs], ids=["plain", "with inputs"])
def test_parts_beside_forward_train_as_in_stage_2(ranks, how):
    for (seen, weights), (wanted, others) in zip(ranks.run(WORLD, how, 3), ranks.run(WORLD, train, 2), strict=True):
        for a, b in zip(seen, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=RTOL * 8, atol=RTOL * 8)
        for a, b in zip(weights, others, strict=True):
            assert (a - b).abs().max() < RTOL * 6 * case.LR + 2.0**-22


def methods(group: Any) -> None:
    engine = start(3)
    with torch.no_grad():
        wanted = engine.module.value(rows(0))
        engine.module.reshard()
        with pytest.raises(RuntimeError) as error:
            engine.moved(rows(0))
        assert "register_fsdp_forward_method(engine.module, 'moved')" in str(error.value)
        with zero.GatheredParameters(list(engine.module.parameters())):
            torch.testing.assert_close(engine.moved(rows(0)), wanted, rtol=RTOL, atol=RTOL)
            if dist.get_rank() == 0:  # nothing is sent
                engine.module.last(torch.ones(1, 6))
        register_fsdp_forward_method(engine.module, "moved")
        torch.testing.assert_close(engine.moved(rows(0)), wanted, rtol=RTOL, atol=RTOL)


def test_a_method_that_uses_weights_past_modules_says_what_to_type(ranks):
    ranks.run(WORLD, methods)


def without_hooks(group: Any) -> None:
    """Do what TRL's unwrap_model_for_generation does before and after generate()."""
    engine = start(3)
    engine.eval()
    with torch.no_grad():
        wanted = engine.value(rows(0))
    with zero.GatheredParameters(engine.module.parameters()), torch.no_grad():
        offload = engine.optimizer.parameter_offload
        for _, param in [*offload.module.named_parameters(recurse=True), *offload.module.ds_external_parameters()]:
            param.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        torch.testing.assert_close(engine.module.value(rows(0)), wanted, rtol=RTOL, atol=RTOL)
        offload._register_deepspeed_module(offload.module)
        offload._register_hooks_recursively(offload.module)
    engine.backward(engine(rows(1)))
    engine.step()
    assert engine.was_step_applied()


def test_scripts_take_hooks_off_for_a_generation(ranks):
    ranks.run(WORLD, without_hooks)


def scalar(group: Any) -> str:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="one dimension or more") as error:
        pyzero.initialize(model=model, config=config)
    return str(error.value)


def test_a_parameter_of_no_dimension_is_refused(ranks):
    assert all("got the 0-D scale" in told and "torch.ones(1)" in told for told in ranks.run(WORLD, scalar))
