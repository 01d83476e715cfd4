"""Checks of config values: each names the key, the value and what is allowed."""

import math

from medusa_exp.errors import UserError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a UserError unless `value` is one of the words allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known: use one of {', '.join(allowed)}.")


def at_least(key: str, value: float, bound: float) -> None:
    """Raise a UserError unless `value` is finite and not below `bound`."""
    if not math.isfinite(value):
        raise UserError(f"{key}={value} is no finite number: it must be one of at least {bound}.")
    if value < bound:
        raise UserError(f"{key}={value} is too small: it must be at least {bound}.")


def within(key: str, value: float, low: float, high: float) -> None:
    """Raise a UserError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:
        raise UserError(f"{key}={value} is out of range: it must lie between {low} and {high}.")
