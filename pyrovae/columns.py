"""Columns of a table: of what kind each is, as a user writes it and as a run keeps it.

    age=continuous, visits=count, smoker=binary, job=categorical:5

The number behind `categorical` is that of its classes; it is found in the data, and kept, so that a run's networks can
be made without them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyrovae.errors import UsageError

CONTINUOUS, BINARY, COUNT, CATEGORICAL = KINDS = ("continuous", "binary", "count", "categorical")
GUESSED = "auto"  # what stands for kinds that are guessed from the values


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: As the header has it.
        kind: One of `KINDS`.
        classes: Names of the values 0, 1, ... of a categorical or binary column; none where the values are numbers.
        levels: How many classes a categorical column has; 0 of others.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    levels: int = 0

    def __str__(self) -> str:
        """As it is written.

        >>> str(Column("job", "categorical", levels=5))
        'job=categorical:5'
        """
        return f"{self.name}={self.kind}" + (f":{self.levels}" if self.kind == CATEGORICAL else "")


def parse(text: str) -> tuple[Column, ...]:
    """The columns that are written so, `levels` 0 where they are not said.

    Raises:
        UsageError: it is not written so, a kind is unknown, or a name comes twice.
    """
    found: list[Column] = []
    for word in text.split(","):
        name, equals, kind = word.strip().rpartition("=")
        kind, colon, levels = kind.partition(":")
        known = kind in KINDS and (not colon or (kind == CATEGORICAL and levels.isdecimal() and int(levels) > 1))
        if not equals or not known or not name:
            raise UsageError(
                f"columns: expected NAME=KIND, with a kind of {', '.join(KINDS)}, or {GUESSED}, got {word.strip()!r}",
                settings=("columns",),
            )
        if name in [column.name for column in found]:
            raise UsageError(f"columns: {name!r} is named twice", settings=("columns",))
        found.append(Column(name, kind, levels=int(levels or 0)))
    return tuple(found)


def written(columns: Sequence[Column]) -> str:
    """The columns as they are written, by comma."""
    return ",".join(map(str, columns))


def measure_of(columns: Sequence[Column]) -> str:
    """Of what log p of such a row is.

    >>> measure_of(parse("a=continuous,b=count,c=binary,d=binary"))
    'density of 1 column times mass of 3 (2 binary, 1 count)'
    """
    kinds = Counter(column.kind for column in columns)
    continuous = kinds.pop(CONTINUOUS, 0)
    parts = [f"density of {continuous} column{'s' * (continuous != 1)}"] if continuous else []
    if kinds:
        which = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kind in kinds)
        noun = "" if continuous else f" column{'s' * (kinds.total() != 1)}"
        parts.append(f"mass of {kinds.total()}{noun} ({which})")
    return " times ".join(parts)
