"""pytest plugin in the process of DeepSpeed's unit tests, and in their ranks: `import deepspeed` means this package.

What pyzero.deepspeed has nothing for is a placeholder here, so that a test file can be imported: a test that uses one
fails. What DeepSpeed's tests read of its optimizers' insides is told from ours.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import deepspeed_common
import pytest
import torch
from deepspeed_common import DistributedTest, Pool
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyzero.compat
from pyzero.optimizer import ZeroOptimizer


def _placeholder(module: str, name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"pyzero has no {module}.{name}")

    return type(name, (), {"__module__": module, "__init__": refuse, "NAME": name})


class _Absent(ModuleType):
    """A module of DeepSpeed's that pyzero has nothing for."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _placeholder(self.__name__, name)
        setattr(self, name, value)
        return value


class _AbsentFinder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, below = fullname.partition(".")
        if package != "deepspeed" or below in pyzero.compat._MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _LossScaler:
    """What their tests ask a loss scaler."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer

    @property
    def _policy(self) -> Any:
        return self._optimizer._scaler._rule

    @property
    def cur_scale(self) -> float:
        return self._optimizer.loss_scale

    loss_scale = cur_scale

    @property
    def cur_iter(self) -> int:
        return self._optimizer.num_steps_taken

    @property
    def scale_window(self) -> int:
        return self._policy.growth_interval

    @property
    def min_loss_scale(self) -> float:
        return self._policy.min_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self._optimizer._scaler.enabled and self._policy.growth_factor != 1.0


def _count_steps(optimizer: Any, *args: Any) -> None:
    optimizer.num_steps_taken = getattr(optimizer, "num_steps_taken", 0) + 1


class _OnCpu(DistributedDataParallel):
    """Their tests hand it the device of a GPU, which it refuses on a CPU."""

    def __init__(self, module: Any, device_ids: Any = None, output_device: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


# Of modules that pyzero has, names that it lacks: a key of the config is its own name in lower case.
_SCHEDULES = """LR_RANGE_TEST_MIN_LR LR_RANGE_TEST_STEP_RATE LR_RANGE_TEST_STEP_SIZE LR_RANGE_TEST_STAIRCASE
WARMUP_MIN_LR WARMUP_MAX_LR WARMUP_NUM_STEPS WARMUP_TYPE CYCLE_MIN_LR CYCLE_MAX_LR CYCLE_FIRST_STEP_SIZE DECAY_LR_RATE
DECAY_STEP_SIZE CYCLE_MIN_MOM CYCLE_MAX_MOM DECAY_MOM_RATE CYCLE_MOMENTUM CYCLE_FIRST_STAIR_COUNT CYCLE_SECOND_STEP_SIZE
CYCLE_SECOND_STAIR_COUNT TOTAL_NUM_STEPS WARMUP_MIN_RATIO COS_MIN_RATIO""".split()
_NAMES = {
    "runtime.lr_schedules": {
        **{name: name.lower() for name in _SCHEDULES},
        **dict(ONE_CYCLE="OneCycle", LR_RANGE_TEST="LRRangeTest", WARMUP_LR="WarmupLR"),
        **dict(WARMUP_DECAY_LR="WarmupDecayLR", WARMUP_COSINE_LR="WarmupCosineLR"),
        **dict(WARMUP_LOG_RATE="log", WARMUP_LINEAR_RATE="linear"),
        "VALID_LR_SCHEDULES": ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"],
    },
    "runtime.config": {"ADAM_OPTIMIZER": "adam"},
    "runtime.base_optimizer": {"ZeROOptimizer": ZeroOptimizer},
    "runtime.fp16.fused_optimizer": {"FP16_Optimizer": ZeroOptimizer},
    "ops": {"__compatible_ops__": defaultdict(lambda: True)},
    "utils.torch": {"required_torch_version": lambda **versions: True},
}


def _install() -> None:
    pyzero.compat.install()
    sys.meta_path.insert(0, _AbsentFinder())
    sys.modules["unit.common"] = deepspeed_common
    util = sys.modules["unit.util"] = ModuleType("unit.util")
    util.__dict__.update(bf16_required_version_check=lambda: True, required_amp_check=lambda: False)
    for module, values in _NAMES.items():
        vars(importlib.import_module(f"deepspeed.{module}")).update(values)
    ZeroOptimizer.loss_scaler = ZeroOptimizer.loss_scale_config = property(_LossScaler)  # type: ignore[attr-defined]
    ZeroOptimizer.dynamic_loss_scale = property(lambda self: self.loss_scaler.dynamic_loss_scale)  # type: ignore[attr-defined]
    ZeroOptimizer.needs_scaler = lambda self: self._scaler.enabled  # type: ignore[attr-defined]
    torch.Tensor.ds_persist = False  # type: ignore[attr-defined]  # of stage 3: none stays whole for being small
    register_optimizer_step_post_hook(_count_steps)
    torch.nn.parallel.DistributedDataParallel = _OnCpu  # type: ignore[misc]


_install()
_pools: dict[int, Pool] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sequential: DeepSpeed's")
    config.addinivalue_line("markers", "world_size(n): DeepSpeed's")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    cls = pyfuncitem.cls
    if cls is None or not issubclass(cls, DistributedTest):
        return None
    marker = pyfuncitem.get_closest_marker("world_size")
    size = marker.args[0] if marker else cls.world_size
    names = pyfuncitem._fixtureinfo.argnames
    kwargs = {name: pyfuncitem.funcargs[name] for name in names if name != "self"}
    kwargs = {name: str(value) if name == "tmpdir" else value for name, value in kwargs.items()}
    if size not in _pools:
        _pools[size] = Pool(size)
    answers = _pools[size].run(pyfuncitem.function, cls, kwargs)
    failures = [text for outcome, text in answers if outcome == "failed"]
    if failures:
        if size > 1:  # a rank may hang
            _pools.pop(size).stop()
        raise AssertionError(_last_error(failures) + "\n\n" + "\n".join(failures))
    if any(outcome == "skipped" for outcome, _ in answers):
        pytest.skip(answers[0][1])
    return True


def _last_error(failures: list[str]) -> str:
    """The line that says most: not that of a rank that waited for another."""
    lines = [text.strip().splitlines()[-1] for text in failures]
    return next((line for line in lines if "CollectiveError" not in line and "Timeout" not in line), lines[0])
