"""What arguments are checked for, in one place, so that wrong ones read alike everywhere."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.settings import Whole, Words, check


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`."""
    check(name, value, Whole(least))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is none of some words, and name the nearest."""
    check(name, value, Words(tuple(choices)))


def check_rows(name: str, x: object) -> None:
    """Refuse what is no tensor with rows."""
    if isinstance(x, Tensor) and x.ndim >= 1 and len(x) >= 1:
        return
    remedy = ""
    if hasattr(x, "to_numpy"):
        remedy = f"; pass torch.as_tensor({name}.to_numpy())"
    elif hasattr(x, "__array__") and not isinstance(x, Tensor):
        remedy = f"; pass torch.as_tensor({name})"
    raise UsageError(f"{name}: expected a tensor of shape (N, *event) with N >= 1, got {describe(x)}{remedy}")


def check_given(given: object, rows: int, name: str) -> None:
    """Refuse what is no sequence of tensors, each with so many rows, as many as `name` has."""
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise UsageError("given: expected a tuple of tensors, each with a row for each of x; pass given=(y,)")
    for value in given:
        check_rows("given", value)
        if len(value) != rows:
            raise UsageError(f"given: {len(value)} rows beside the {rows} of {name}; pass one row for each")


def check_programs(model: object, guide: object, given: int = 0) -> None:
    """Refuse what cannot be called as model(x, *given) and guide(x, *given), with so many given."""
    arguments = ", ".join(["x", *(f"given[{i}]" for i in range(given))])
    for role, program in (("model", model), ("guide", guide)):
        call = f"{role}({arguments})"
        other = (
            "" if not hasattr(program, role) else f"; pass .{role} of it, as in log_marginal(vae.model, vae.guide, x)"
        )
        if not callable(program):
            raise UsageError(f"{role}: expected a Pyro program, called as {call}, got {describe(program)}{other}")
        without_forward = isinstance(program, nn.Module) and type(program).forward is nn.Module.forward
        if without_forward and type(program).__call__ is nn.Module.__call__:
            raise UsageError(f"{role}: {type(program).__name__} cannot be called as {call}, having no forward{other}")
        if isinstance(program, type):
            raise UsageError(f"{role}: {program.__name__} is a class; pass an object of it that is called as {call}")
        try:
            called = program.forward if isinstance(program, nn.Module) and not without_forward else program
            inspect.signature(called).bind(*[None] * (1 + given))
        except TypeError as error:
            remedy = "have it take x and each tensor of given" if given else "pass what rows bring along as given=(y,)"
            raise UsageError(
                f"{role}: cannot be called as {call} ({error}); {remedy}, and give it other arguments by "
                "functools.partial"
            ) from None
        except ValueError:
            continue  # what has no signature in Python


def describe(x: Any) -> str:
    """A value in a few words, for an error message."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return (
        f"{type(x).__name__} of shape {x.shape}" if isinstance(getattr(x, "shape", None), tuple) else type(x).__name__
    )
