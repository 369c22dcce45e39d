"""What arguments are checked for, in one place, so that wrong ones read alike everywhere."""

from torch import Tensor

from pyrovae.errors import UsageError


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_rows(name: str, x: object) -> None:
    """Refuse what is no tensor with rows."""
    if not isinstance(x, Tensor) or x.ndim < 1 or len(x) < 1:
        raise UsageError(f"{name}: expected a tensor of shape (N, *event) with N >= 1, got {describe(x)}")


def describe(x: object) -> str:
    """A value in a few words, for an error message."""
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
