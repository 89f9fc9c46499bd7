"""The order in which this rank's gradients come, while the optimizer learns it for its buckets."""

from __future__ import annotations


class ArrivalOrder:
    """Numbers of the parameters, in the order of their last gradients.

    Attributes:
        is_learning: Gradients are sent while backward goes on, and the buckets are not in this order yet.
    """

    def __init__(self, is_learning: bool) -> None:
        self.is_learning = is_learning
        self._numbers: dict[int, None] = {}

    def note(self, number: int) -> None:
        """Note that a gradient has come."""
        if self.is_learning:
            self._numbers.pop(number, None)
            self._numbers[number] = None

    def order(self) -> list[int]:
        """Return the numbers noted so far."""
        return list(self._numbers)

    def restart(self) -> None:
        """Forget the numbers noted so far."""
        self._numbers.clear()

    def finish(self) -> None:
        """Learn no more."""
        self.is_learning = False
        self._numbers.clear()
