"""Tables with columns of several kinds: from a data frame to numbers, and back.

A cell is a number, a word, or empty. The kind of a column is what the user says, or guessed from what is in it:

    binary        0 and 1, True and False, or two words
    categorical   more than two words, at most 100
    count         whole numbers of at least 0, none over 10,000
    continuous    all other numbers

The others have to be said: positive (numbers above 0), fraction (between 0 and 1), heavy (with outliers), and ordinal
(numbers of which only the order counts).

Words, and the numbers of a column that is said to be categorical or ordinal, become 0, 1, ... in their order; an empty
cell becomes NaN. `in_words` is the way back, so that draws have the columns and the words of the table.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae.columns import (
    BINARY,
    CATEGORICAL,
    CONTINUOUS,
    COUNT,
    DENSITIES,
    FRACTION,
    GUESSED,
    OF_CLASSES,
    ORDINAL,
    POSITIVE,
    Column,
    parse,
)
from pyrovae.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 100  # of a column of words whose kind is guessed: beyond, they are names or remarks
MOST_COUNT = 10_000  # of a column whose kind is guessed: beyond, whole numbers are amounts, years or keys


def numbers_of(frame: "pd.DataFrame", spec: str, where: str) -> tuple[np.ndarray, tuple[Column, ...], tuple[str, ...]]:
    """A table as numbers, NaN where a cell is empty.

    Args:
        frame: The columns that are modelled.
        spec: Their kinds, or some of them, as `pyrovae.columns` writes them, or "auto": the others are guessed.
        where: The table in words, for messages.

    Returns:
        Shape (N, D), float64; the columns; sentences that say what was guessed.

    Raises:
        UsageError: a column that the table does not have is named.
        DataError: a column has values that are not of its kind, or too many words.
    """
    names = [str(name).strip() for name in frame.columns]
    said = {} if spec == GUESSED else {column.name: column for column in parse(spec)}
    for name in said:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"columns: {name!r} is none of {', '.join(names[:20])}{hint}", settings=("columns",))
    for name in names:
        if "," in name or "=" in name or names.count(name) > 1:
            raise DataError(f"{where}: column {name!r}: its name comes twice, or has a comma or = in it; rename it")
    columns = [
        said_of(frame.iloc[:, i], said[name], where) if name in said else guessed(frame.iloc[:, i], name, where)
        for i, name in enumerate(names)
    ]
    values = np.stack([as_numbers(frame.iloc[:, i], column, where) for i, column in enumerate(columns)], 1)
    told = [str(column) for column in columns if column.name not in said]
    notice = f"{where}: kinds of columns are guessed: {', '.join(told)}; say others with `columns`"
    return values, tuple(columns), (notice,) if told else ()


def numbers_as(frame: "pd.DataFrame", columns: Sequence[Column], where: str) -> np.ndarray:
    """Another table as numbers, shape (N, D), with the columns and classes of one that is known.

    Raises:
        DataError: it lacks a column, or one has a value that is no class there.
    """
    names = {str(name).strip(): i for i, name in enumerate(frame.columns)}
    if absent := [column.name for column in columns if column.name not in names]:
        raise DataError(f"{where}: has no column {absent[0]!r}; give all columns that the model was trained on")
    return np.stack([as_numbers(frame.iloc[:, names[column.name]], column, where) for column in columns], 1)


def guessed(values: "pd.Series[Any]", name: str, where: str) -> Column:
    """The column that is likely, by its values."""
    words = words_of(values)
    if not is_numeric(values):
        if len(words) > MOST_CLASSES:
            raise DataError(
                f"{where}: column {name!r} has {len(words)} different words, such as {words[0]!r}; leave it out, or "
                f"say columns={name}={CATEGORICAL}",
                settings=("columns",),
            )
        return Column(name, BINARY, words) if len(words) == 2 else Column(name, CATEGORICAL, words, len(words))
    found = values.dropna().to_numpy(dtype=float)
    if np.isin(found, (0, 1)).all():
        return Column(name, BINARY)
    whole = bool((found == np.floor(found)).all()) and found.min() >= 0 and found.max() <= MOST_COUNT
    return Column(name, COUNT if whole else CONTINUOUS)


def said_of(values: "pd.Series[Any]", said: Column, where: str) -> Column:
    """The column that a user says, with its classes.

    Raises:
        DataError: the values have another number of classes.
    """
    words = words_of(values)
    if said.kind == ORDINAL and not is_numeric(values):
        raise DataError(
            f"{where}: column {said.name!r} is ordinal, but has words, such as {words[0]!r}, whose order is not known; "
            "write numbers in their place"
        )
    if said.kind in OF_CLASSES:
        if said.levels not in (0, len(words)) or len(words) < 2:
            wanted = str(said.levels) if said.levels else "two classes or more"
            raise DataError(f"{where}: column {said.name!r} has {len(words)} different values, expected {wanted}")
        return replace(said, classes=words, levels=len(words))
    if said.kind == BINARY and not (is_numeric(values) and values.dropna().isin((0, 1)).all()):
        if len(words) != 2:
            raise DataError(f"{where}: column {said.name!r} has {len(words)} different values, expected two")
        return replace(said, classes=words)
    return said


def as_numbers(values: "pd.Series[Any]", column: Column, where: str) -> np.ndarray:
    """The values of a column as float64, NaN where a cell is empty.

    Raises:
        DataError: a value is not of its kind.
    """
    if column.classes:
        numbers = {word: float(i) for i, word in enumerate(column.classes)}
        found = [np.nan if missing else numbers.get(word_of(value)) for value, missing in each(values)]
        if None in found:
            wrong = word_of(values.iloc[found.index(None)])
            raise DataError(f"{where}: column {column.name!r} has {wrong!r}, expected {', '.join(column.classes[:10])}")
        return np.array(found, dtype=np.float64)
    if not is_numeric(values):
        raise DataError(
            f"{where}: column {column.name!r} is {column.kind}, but has words, such as {words_of(values)[0]!r}; say "
            f"columns={column.name}={CATEGORICAL}",
            settings=("columns",),
        )
    array = np.asarray(values.astype(float))
    seen = array[~np.isnan(array)]
    whole = (seen >= 0) & (seen == np.floor(seen))
    allowed = {COUNT: whole, BINARY: whole, POSITIVE: seen > 0, FRACTION: (seen > 0) & (seen < 1)}
    if column.kind in allowed and not allowed[column.kind].all():
        raise DataError(f"{where}: column {column.name!r} is {column.kind}, but has values that are no such numbers")
    return array


def in_words(flat: "pd.Series[Any]", column: Column) -> "pd.Series[Any]":
    """Numbers of a column as the table has them: words, whole numbers, NaN as an empty cell."""
    if column.kind in DENSITIES:
        return flat
    flat = flat.astype(float)
    if column.classes:
        return flat.map(dict(enumerate(column.classes)))
    whole = flat.dropna()
    return flat.astype("Int64") if bool((whole == whole.round()).all()) else flat


def is_numeric(values: "pd.Series[Any]") -> bool:
    """Whether all that is there are numbers, or True and False."""
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values) or values.isna().all())


def words_of(values: "pd.Series[Any]") -> tuple[str, ...]:
    """The different values as words, sorted: numbers by their size."""
    return tuple(word_of(value) for value in sorted(values.dropna().unique(), key=lambda v: (isinstance(v, str), v)))


def word_of(value: Any) -> str:
    """A value as a word: whole numbers without a point.

    >>> word_of(3.0), word_of("a "), word_of(True)
    ('3', 'a', 'True')
    """
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else str(float(value))
    return str(value).strip()


def each(values: "pd.Series[Any]") -> Sequence[tuple[Any, bool]]:
    """Each value, and whether its cell is empty."""
    return list(zip(values, values.isna(), strict=True))
