"""Checks of the values of options: what a constructor or a config is given before it computes.

A comparison alone does not refuse NaN (`nan < 0` is false) or True (which is 1), and ends in a
TypeError for "3": hence the predicates, which take anything.
"""

import numbers
import sys
from collections.abc import Sequence
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and not a truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, neither NaN nor infinite, and not a truth value."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def need(condition: bool, text: str) -> None:
    """A `ValueError` with `text` unless the condition holds."""
    if not condition:
        raise ValueError(text)


def check_whole(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not a positive whole number."""
    for name, value in values.items():
        need(
            is_whole(value) and value >= 1, f"{name} must be a positive whole number, got {value!r}"
        )


def check_count(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not a whole number, 0 or more."""
    for name, value in values.items():
        need(
            is_whole(value) and value >= 0,
            f"{name} must be a whole number, 0 or more, got {value!r}",
        )


def check_odd(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not an odd positive whole number."""
    check_whole(**values)
    for name, value in values.items():
        need(value % 2 == 1, f"{name} must be odd and positive, got {value}")


def check_positive(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not a positive number."""
    for name, value in values.items():
        need(is_number(value) and value > 0, f"{name} must be a positive number, got {value!r}")


def check_not_negative(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not a number, 0 or more."""
    for name, value in values.items():
        need(is_number(value) and value >= 0, f"{name} must be a number, 0 or more, got {value!r}")


def check_rate(**values: Any) -> None:
    """A `ValueError` naming the first argument that is not at least 0 and less than 1."""
    for name, value in values.items():
        need(
            is_number(value) and 0 <= value < 1,
            f"{name} must be at least 0 and less than 1, got {value!r}",
        )


def check_flag(**values: Any) -> None:
    """A `ValueError` naming the first argument that is neither True nor False."""
    for name, value in values.items():
        need(isinstance(value, bool), f"{name} must be True or False, got {value!r}")


def check_choice(choices: Sequence[Any], **values: Any) -> None:
    """A `ValueError` naming the first argument that is not one of the choices."""
    for name, value in values.items():
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        need(known, f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_sizes(length: int | None = None, /, **values: Any) -> None:
    """A `ValueError` naming the first argument that is not `length` positive whole numbers."""
    many = {None: "", 2: "two ", 3: "three ", 4: "four "}[length]
    for name, value in values.items():
        need(
            isinstance(value, tuple | list)
            and len(value) == (len(value) if length is None else length)
            and all(is_whole(v) and v >= 1 for v in value),
            f"{name} must be {many}positive integers, got {value!r}",
        )
