"""Settings: what a constructor's annotations allow, written once for the library and the command line.

    Annotated[int, Whole(1)]              a whole number of at least 1, `Count`
    Annotated[float, Number(above=0)]     a finite number above 0, `Positive`
    Literal["full", "diagonal"]           one of some words
    tuple[Positive, ...], Sequence[Count] several, typed as 200,200
    Positive | Literal["learned"] | None  what fits first, or nothing

`@checked` makes a constructor refuse what its annotations do not allow; `read` makes of what was typed, or of what
YAML holds, a value that they do. Parameters of other types (a network, a shape) are no settings: nobody checks them
here. Nothing heavy is imported, since --help reads these annotations from the sources.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, Protocol, Union, get_args, get_origin

from pyrovae.errors import UsageError

P = ParamSpec("P")


class Kind(Protocol):
    """What values a setting may have; `str` of it completes "expected"."""

    def holds(self, value: object) -> bool:
        """Whether a value is one of them, as it is."""

    def read(self, word: Any) -> Any:
        """The value that a word or YAML's value stands for, not yet looked at by `holds`.

        Raises:
            ValueError, TypeError, OverflowError: it stands for none.
        """


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least`, to `most` where it is given."""

    least: int = 1
    most: int | None = None

    def __str__(self) -> str:
        limits = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        return f"a whole number {limits}"

    def holds(self, value: object) -> bool:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return whole and self.least <= value and (self.most is None or value <= self.most)  # type: ignore[operator]

    def read(self, word: Any) -> Any:
        if isinstance(word, int) or str(word).strip().lstrip("+").isdecimal():
            return word if isinstance(word, int) else int(word)
        number = float(word)  # 1e3
        return int(number) if number.is_integer() else number


@dataclass(frozen=True)
class Number:
    """Finite numbers of at least `least`, above `above` and below `below`."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def __str__(self) -> str:
        limits = [("of at least", self.least), ("above", self.above), ("below", self.below)]
        told = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
        return " ".join(["a number", " and ".join(told)]).strip()

    def holds(self, value: object) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return float(value) >= self.least and self.above < float(value) < self.below

    def read(self, word: Any) -> Any:
        return word if isinstance(word, bool) else float(word)


@dataclass(frozen=True)
class Words:
    """One of some words, typed in any case."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " or ".join(self.names) if len(self.names) < 3 else f"one of {', '.join(self.names)}"

    def holds(self, value: object) -> bool:
        return isinstance(value, str) and value in self.names

    def read(self, word: Any) -> Any:
        if isinstance(word, bool):  # what YAML makes of on and off
            word = "on" if word else "off"
        return str(word).lower()


class Text:
    """A word or a path, which no number stands for: YAML reads 007 as 7, and 12:30 as 750."""

    def __str__(self) -> str:
        return "a word"

    def holds(self, value: object) -> bool:
        return isinstance(value, str) and value != ""

    def read(self, word: Any) -> Any:
        return str(word) if isinstance(word, PathLike) else word


@dataclass(frozen=True)
class Flag:
    """True or false, typed as true or false in any case."""

    def __str__(self) -> str:
        return "true or false"

    def holds(self, value: object) -> bool:
        return isinstance(value, bool)

    def read(self, word: Any) -> Any:
        return {"true": True, "false": False}.get(str(word).lower(), word)


@dataclass(frozen=True)
class Several:
    """Any number of numbers of one kind; typed as 200,200 or [200,200]."""

    item: Kind
    container: type[tuple] | type[list] = list

    def __str__(self) -> str:
        return str(self.item).removeprefix("a ").replace("number", "numbers")

    def holds(self, value: object) -> bool:
        if self.container is tuple:
            return isinstance(value, tuple) and len(value) > 0 and all(map(self.item.holds, value))
        return isinstance(value, list | tuple) and all(map(self.item.holds, value))

    def read(self, word: Any) -> Any:
        if not isinstance(word, list | tuple):
            word = str(word).strip().removeprefix("[").removesuffix("]").split(",")
        return self.container(self.item.read(item) for item in word)


@dataclass(frozen=True)
class Either:
    """The first kind that fits; None, where `optional`, which is never typed."""

    kinds: tuple[Kind, ...]
    optional: bool = False

    def __str__(self) -> str:
        return " or ".join(map(str, self.kinds))

    def holds(self, value: object) -> bool:
        return (value is None and self.optional) or any(kind.holds(value) for kind in self.kinds)

    def read(self, word: Any) -> Any:
        for kind in self.kinds:
            try:
                value = kind.read(word)
            except (TypeError, ValueError, OverflowError):
                continue
            if kind.holds(value):
                return value
        raise ValueError


Count = Annotated[int, Whole(1)]
Positive = Annotated[float, Number(above=0)]
NotNegative = Annotated[float, Number(least=0)]
Share = Annotated[float, Number(least=0, below=1)]


def kind_of(annotation: Any) -> Kind | None:
    """What an annotation allows; None for one that is no setting's."""
    origin, of = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind: Kind = of[1]
        return kind
    if origin is Literal:
        return Words(of)
    if annotation is bool:
        return Flag()
    if origin in (tuple, Sequence):
        item = kind_of(of[0])
        return None if item is None else Several(item, tuple if origin is tuple else list)
    if origin in (Union, UnionType):
        kinds = [kind_of(part) for part in of if part is not NoneType]
        known = tuple(kind for kind in kinds if kind is not None)
        return Either(known, NoneType in of) if known and len(known) == len(kinds) else None
    return None


def check(name: str, value: object, kind: Kind) -> None:
    """Refuse a value that is none of a kind.

    Raises:
        UsageError: what was expected, and what came.
    """
    if not kind.holds(value):
        raise UsageError(f"{name}: expected {kind}, got {value!r}{likely(value, kind)}")


def read(name: str, word: Any, kind: Kind) -> Any:
    """The value that a word, or a value from YAML, stands for.

    Raises:
        UsageError: it stands for none; what was expected, and what came.
    """
    try:
        value = kind.read(word)
    except (TypeError, ValueError, OverflowError):
        value = None
    if value is None or not kind.holds(value):
        hint = "; put it in quotes in YAML" if isinstance(kind, Text) else likely(word, kind)
        got = repr(word) if isinstance(kind, Text) else word
        raise UsageError(f"{name}: expected {kind}, got {got}{hint}", settings=(name,))
    return value


def likely(word: object, kind: Kind) -> str:
    """The word that was meant, if it is likely, as the end of a message."""
    match = close(word, kind.names) if isinstance(kind, Words) else None
    return f"; did you mean {match}?" if match else ""


def close(word: object, names: Sequence[str]) -> str | None:
    """The name that is nearest to a word, if any is near."""
    near = difflib.get_close_matches(str(word).lower(), [name.lower() for name in names], 1, 0.5)
    return next((name for name in names if near and name.lower() == near[0]), None)


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that first refuses arguments which its annotations do not allow."""
    signature = inspect.signature(init)
    kinds = {name: kind_of(parameter.annotation) for name, parameter in signature.parameters.items()}

    @wraps(init)
    def check_first(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if (kind := kinds[name]) is not None:
                check(name, value, kind)
        init(*args, **kwargs)

    return check_first


def check_fields(instance: Any) -> None:
    """`checked` for a dataclass, in its `__post_init__`."""
    for field in fields(instance):
        if (kind := kind_of(field.type)) is not None:
            check(field.name, getattr(instance, field.name), kind)
