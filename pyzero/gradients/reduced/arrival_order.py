"""In which order this rank's gradients come, while the optimizer learns it for its buckets."""

from __future__ import annotations


class ArrivalOrder:
    """Numbers of the parameters, in the order of their last gradients.

    Attributes:
        is_learning: Gradients leave while backward goes on, and the buckets are not in this order yet.
    """

    def __init__(self, is_learning: bool) -> None:
        self.is_learning = is_learning
        self._numbers: dict[int, None] = {}

    def note(self, number: int) -> None:
        """Called when a gradient has come."""
        if self.is_learning:
            self._numbers.pop(number, None)
            self._numbers[number] = None

    def order(self) -> list[int]:
        """What has been noted."""
        return list(self._numbers)

    def restart(self) -> None:
        """Forget what has been noted."""
        self._numbers.clear()

    def finish(self) -> None:
        """Learn no more."""
        self.is_learning = False
        self._numbers.clear()
