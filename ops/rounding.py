"""Integers rounded up."""


def ceil_div(value: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return ceil_div(value, multiple) * multiple
