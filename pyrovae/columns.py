"""Columns of a table: of what kind each is, as a user writes it and as a run keeps it.

    age=continuous, income=positive, visits=count, smoker=binary, job=categorical:5, grade=ordinal:4

The number behind `categorical` and `ordinal` is that of their classes; it is found in the data, and kept, so that a
run's networks can be made without them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyrovae.errors import UsageError

DENSITIES = CONTINUOUS, POSITIVE, HEAVY, FRACTION = ("continuous", "positive", "heavy", "fraction")
MASSES = BINARY, COUNT, CATEGORICAL, ORDINAL = ("binary", "count", "categorical", "ordinal")
KINDS = DENSITIES + MASSES
OF_CLASSES = (CATEGORICAL, ORDINAL)  # of L different values, as 0, ..., L - 1
GUESSED = "auto"  # what stands for kinds that are guessed from the values


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: As the header has it.
        kind: One of `KINDS`.
        classes: Names of the values 0, 1, ... of a categorical, ordinal or binary column; none where the values are
            numbers.
        levels: How many classes a categorical or ordinal column has; 0 of others.
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
        return f"{self.name}={self.kind}" + (f":{self.levels}" if self.levels else "")


def parse(text: str) -> tuple[Column, ...]:
    """The columns that are written so, `levels` 0 where they are not said.

    Raises:
        UsageError: it is not written so, a kind is unknown, or a name comes twice.
    """
    found: list[Column] = []
    for word in text.split(","):
        name, equals, kind = word.strip().rpartition("=")
        kind, colon, levels = kind.partition(":")
        known = kind in KINDS and (not colon or (kind in OF_CLASSES and levels.isdecimal() and int(levels) > 1))
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
    >>> measure_of(parse("a=continuous,b=positive,c=fraction"))
    'density of 3 columns (1 continuous, 1 positive, 1 fraction)'
    """
    kinds = Counter(column.kind for column in columns)
    parts: list[str] = []
    for name, family in (("density", DENSITIES), ("mass", MASSES)):
        if number := sum(kinds[kind] for kind in family):
            noun = "" if parts else f" column{'s' * (number != 1)}"
            which = ", ".join(f"{kinds[kind]} {kind}" for kind in family if kinds[kind])
            plain = family is DENSITIES and kinds[CONTINUOUS] == number  # as a density is expected to be
            parts.append(f"{name} of {number}{noun}" + ("" if plain else f" ({which})"))
    return " times ".join(parts)
