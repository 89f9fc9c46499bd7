"""Loss scaling: the policy, and the scale that lives on the device."""

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from pyzero import ops
from pyzero.arguments.hyper_parameters import as_number
from pyzero.gradients.stats_rows import HostView
from pyzero.ops.backend import LossScalePolicy
from pyzero.ops.loss_scale import IN_A_ROW, SCALE, SKIPPED, loss_scale_state, wanted_of_policy

_OP = LossScalePolicy()  # the defaults, except min_scale: a scale of 0 has no inverse
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # so that 1 / scale is finite


@dataclass(frozen=True)
class LossScale:
    """The policy of a dynamic loss scale. Names and defaults are torch.amp.GradScaler's.

    Attributes:
        init_scale: The first scale.
        growth_factor: Factor for the scale after `growth_interval` clean steps in a row.
        backoff_factor: Factor for the scale after an overflow.
        growth_interval: Clean steps in a row before the scale grows.
        min_scale: The scale never falls below it.
        max_scale: The scale never grows above it.
        hysteresis: Overflows before the scale falls, counted since the scale last grew.
        consecutive_hysteresis: Count them since the last clean step instead.
        growth_delay: Additional clean steps before the first growth, at the start and after an overflow. DeepSpeed
            has 1.
    """

    init_scale: float = 65536.0
    growth_factor: float = _OP.growth_factor
    backoff_factor: float = _OP.backoff_factor
    growth_interval: int = _OP.growth_interval
    min_scale: float = 2.0**-14
    max_scale: float = _OP.max_scale
    hysteresis: int = _OP.hysteresis
    consecutive_hysteresis: bool = _OP.consecutive_hysteresis
    growth_delay: int = _OP.growth_delay

    def __post_init__(self) -> None:
        """Raise ValueError if a field is out of range."""
        wanted = wanted_of_policy(self.op_policy())
        for name in ("min_scale", "init_scale"):  # they are kept in fp32
            scale = as_number(name, getattr(self, name))
            if not _SMALLEST <= scale <= _LARGEST:
                wanted = f"2**-126 <= {name} < 2**128"
        if wanted is not None:
            raise ValueError(f"expected {wanted}, got {self}; correct that field")

    @property
    def is_fixed(self) -> bool:
        """Whether the scale stays at `init_scale`, whatever the bounds."""
        return self.growth_factor == self.backoff_factor == 1

    def op_policy(self) -> LossScalePolicy:
        """Return the policy for the op."""
        return LossScalePolicy(**{name: getattr(self, name) for name in LossScalePolicy._fields})


def static(scale: float) -> LossScale:
    """Return the policy of a scale that never changes. Steps that overflow are still skipped and counted."""
    return LossScale(scale, growth_factor=1.0, backoff_factor=1.0, min_scale=scale, max_scale=scale)


def choose(loss_scale: "str | float | LossScale | None", dtypes: set[torch.dtype]) -> LossScale | None:
    """Return the policy for ZeroOptimizer's argument `loss_scale`, or None for no scaling."""
    if isinstance(loss_scale, LossScale) or loss_scale is None:
        return loss_scale
    if loss_scale == "auto":
        return LossScale() if torch.float16 in dtypes else None
    if loss_scale == "dynamic":
        return LossScale()
    if isinstance(loss_scale, numbers.Real) and not isinstance(loss_scale, bool):
        return static(float(loss_scale))
    raise ValueError(
        f'expected loss_scale as "auto", "dynamic", None, a number or a LossScale, got {loss_scale!r}; '
        f"pass one of these"
    )


class Scaler:
    """The scale and its counters, on the device."""

    def __init__(self, policy: LossScale | None, device: torch.device, backend: str) -> None:
        self.enabled = policy is not None
        self._backend = backend
        policy = policy or static(1.0)
        own = policy.op_policy()._asdict()
        # Without bounds either, because the op would clamp the scale to them.
        stays = {"growth_factor": 1.0, "backoff_factor": 1.0, "min_scale": _SMALLEST, "max_scale": _LARGEST}
        self._frozen_policy = {**own, **stays}
        self._is_fixed = policy.is_fixed
        self._policy = self._frozen_policy if self._is_fixed else own
        self.state = loss_scale_state(policy.init_scale, policy.hysteresis, device, policy.growth_delay)
        self._found, self._counts = HostView(), HostView()
        self.epoch = 0  # grows whenever the scale may change
        self.inv_scale = torch.empty((), dtype=torch.float32, device=device)  # 1 / scale; fixed between two updates
        self._refresh()

    @property
    def scale(self) -> Tensor:
        """The loss scale: 0-D, on the device."""
        return self.state[SCALE]

    @property
    def is_dynamic(self) -> bool:
        """Whether there is a scale that changes with overflows."""
        return self.enabled and not self._is_fixed

    @property
    def num_skipped(self) -> Tensor:
        """Steps skipped so far: 0-D, on the device."""
        return self.state[SKIPPED]

    def saved(self) -> Tensor:
        """Return a copy of the state for `load`. A scale of 0 in it means no loss scale."""
        state = self.state.clone()
        if not self.enabled:
            state[SCALE] = 0.0
        return state

    def load(self, state: Tensor) -> bool:
        """Load a saved state. If only one of the two has a loss scale, load only the counts of skips.

        A fixed scale stays. A dynamic one becomes the saved one, inside its own bounds.

        Returns:
            Whether the saved state has a scale.
        """
        saved = float(state[SCALE])
        has_scale = saved != 0.0
        first = SKIPPED if has_scale != self.enabled else SCALE + 1
        self.state[first:].copy_(state[first:])
        if has_scale and self.enabled and not self._is_fixed:
            scale = min(max(saved, self._policy["min_scale"]), self._policy["max_scale"])
            self.epoch += scale != float(self.scale)
            self.scale.fill_(scale)
            self._refresh()
        return has_scale

    def _refresh(self) -> None:
        torch.reciprocal(self.scale, out=self.inv_scale)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale."""
        scaled: Tensor = loss * self.scale.to(loss.device)
        return scaled

    def update(self, found_inf: Tensor, only_count: bool = False) -> None:
        """Advance the state machine by one step. found_inf: (1,) fp32, the same on all ranks.

        only_count: Count the step and a skip, but keep the scale, because another scaler scaled these gradients.
        """
        if not self.enabled and self._has_nothing_to_count(found_inf):
            return
        policy = self._frozen_policy if only_count else self._policy
        ops.loss_scale_update_(self.state, found_inf, **policy, backend=self._backend)
        if policy is not self._frozen_policy:  # that policy does not change the scale
            self.epoch += 1
            self._refresh()

    def _has_nothing_to_count(self, found_inf: Tensor) -> bool:
        """Whether the step was clean and no skipped step came before it. False if the host would have to wait."""
        return found_inf.is_cpu and not self._found.of(found_inf)[0] and not self._counts.of(self.state)[IN_A_ROW]
