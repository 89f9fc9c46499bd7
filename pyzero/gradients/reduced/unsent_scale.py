"""Tracks whether unsent gradients carry the loss scale, if ranks reduce them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pyzero.gradients.grad_stats import Unsent, mixed_scale_error
from pyzero.gradients.reduced.records import GradRecords


class UnsentScale:
    """The one loss scale, or none, of all of this rank's unsent sums. Reduced gradients carry none.

    The scale changes in step() and load_state_dict(), after all gradients that carried it were sent.
    """

    def __init__(self, records: GradRecords, inv_scale: Tensor | None) -> None:
        self.inv_scale = inv_scale  # 0-D, 1 / the present loss scale; None: there is none
        self.is_carried = False  # unsent gradients carry it
        self._arrives = False  # arriving gradients carry it
        self._records = records
        self._mean: tuple[int, Tensor] | None = None  # (version of inv_scale, 0-D inv_scale / number of ranks)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A context in which arriving gradients carry the loss scale."""
        self._arrives = True
        try:
            yield
        finally:
            self._arrives = False

    def before_gradient(self) -> None:
        """Called before backward adds to any `.grad`.

        Raises:
            RuntimeError: Unsent gradients carry a scale and the arriving one does not, or the other way round.
        """
        if self._arrives == self.is_carried:
            return
        self._records.observe_all()  # the caller may have cleared the gradients with the other scale
        if self._records.have_local_values():
            raise mixed_scale_error()
        self.is_carried = self._arrives

    def kind(self) -> Unsent:
        """Return the kind of unsent gradients that this rank holds."""
        if not self._records.have_local():
            return Unsent.NONE
        if self.is_carried:
            return Unsent.SCALED if any(record.has_values for record in self._records.by_number) else Unsent.ZEROS
        return Unsent.PLAIN if self.inv_scale is None or self._records.have_local_values() else Unsent.ZEROS

    def mean_factor(self, num_ranks: int) -> float | Tensor:
        """Return the factor from a sum over ranks to the unscaled mean. It is computed once per loss scale."""
        if not self.is_carried or self.inv_scale is None:
            return 1.0 / num_ranks
        version = self.inv_scale._version
        if self._mean is None or self._mean[0] != version:
            self._mean = version, self.inv_scale / num_ranks
        return self._mean[1]

    def after_round(self) -> None:
        """Called after a round, which has sent all gradients but those of a later round."""
        self.is_carried &= self._records.have_local()
