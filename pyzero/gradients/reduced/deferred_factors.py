"""Factors by which callers multiply reduced gradients. They are kept until a step, a round or a norm uses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.records import GradRecords
from pyzero.gradients.stats_rows import values_of


class DeferredFactors:
    """The factor of each reduced gradient. After one clip of all gradients, all have the same object as factor."""

    def __init__(self, records: GradRecords, device: torch.device) -> None:
        self._records = records
        self._device = device
        self._known: tuple[Tensor, tuple[int, bool] | None, Tensor] | None = None  # see _as_factor

    def multiply(self, records: Sequence[ParamGrad], factor: Tensor | float, inverse: bool = False) -> None:
        """Multiply the reduced parts of these gradients by one number, or divide them by it."""
        given, factor = factor, self._as_factor(factor, inverse)
        known = values_of(factor).item() if factor.is_cpu else _number_of(given, inverse)
        products: dict[int, Tensor] = {}  # one object for all records that have one factor
        for record in records:
            if not record.has_reduced_values:  # zeros stay zeros: on ranks that hold more, `.grad` has no reduced part
                continue
            key = id(record.factor)
            if key not in products:
                products[key] = factor if record.factor is None else record.factor * factor
            record.factor = products[key]
            record.num_edits += 1
            record.product *= known

    def unscale(self, factor: Tensor) -> None:
        """Multiply the reduced parts of all gradients, and the norm from before they were clipped."""
        self.multiply(self._records.by_number, factor)
        norm = self._records.norm_before_clip
        self._records.norm_before_clip = None if norm is None else norm * factor

    def _as_factor(self, value: Tensor | float, inverse: bool) -> Tensor:
        """Return a factor, 0-D fp32. Repeated calls with one tensor, as by clip_grad_norm_, return the same object."""
        if not isinstance(value, Tensor):
            return torch.full((), 1.0 / value if inverse else value, dtype=torch.float32, device=self._device)
        key = None if value.is_inference() else (value._version, inverse)  # it has no version, and may have changed
        known = self._known
        if known is None or key is None or known[0] is not value or known[1] != key:
            factor = self._on_device(value.detach())
            known = self._known = (value, key, factor.reciprocal() if inverse else factor)
        return known[2]

    def _on_device(self, value: Tensor) -> Tensor:
        if value.is_cpu and self._device.type != "cpu":  # a copy to a GPU would wait for it
            return torch.full((), value.item(), dtype=torch.float32, device=self._device)
        return value.reshape(()).to(self._device, torch.float32, copy=True)

    def common(self) -> Tensor | None:
        """Return the common factor (0-D), or None. Call apply_different() first."""
        return next((record.factor for record in self._records.by_number if record.has_reduced_values), None)

    def apply_different(self) -> None:
        """If factors differ, multiply them into the shards, because the update takes only one factor."""
        if len({id(record.factor) for record in self._records.by_number if record.has_reduced_values}) > 1:
            self.apply()

    def apply(self) -> None:
        """Multiply the factors into the shards."""
        for grads in self._records.buckets:
            grads.apply_factors()


def _number_of(factor: Tensor | float, inverse: bool) -> float:
    """Return the factor of gradients on a GPU as a number; 1 if the host would have to wait for it."""
    if isinstance(factor, Tensor):
        return float(factor.float().reciprocal() if inverse else factor) if factor.is_cpu else 1.0
    return 1.0 / factor if inverse else factor
