"""What a source holds, before it is split: rows and labels as NumPy has them, and what they must be.

Every reader gives a `Found`. What it must be is checked here, alike for all of them; that its values are finite is
found out later, in the one pass over all rows (`summary`). Memory is asked for before it is taken (`require_memory`):
an array that does not fit is refused in a line, and the system ends no process.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyrovae.columns import Column
from pyrovae.errors import DataError

if TYPE_CHECKING:
    from pyrovae.data.factors import Factors

SPLITS = ("train", "validation", "test")
# Fixed seeds, one for each use, so that no two uses share a stream.
SEED = {"permutation": 1, "plane": 2, "train": 3, "validation": 4, "test": 5, "manifold": 6, "oscillator": 7, "bars": 8}
HELD_OUT = 10_000  # rows of validation and test at most, where they are taken off the training rows


class Found(NamedTuple):
    """What a source holds.

    Attributes:
        x: Rows, shape (N, *event), under "train", and under "test" and "validation" where the source has them.
        y: Labels of those of them that have some, numbers or names.
        levels: Number of grey levels, if the rows are uint8.
        notices: Sentences for the user.
        columns: Names of the columns of a table, for messages and figures.
        classes: Names of labels that are numbers.
        stream: Whether the training rows stay where they are.
        table: Of a table with columns of several kinds, the columns; None of all else.
        factors: What rows were made from, where that is known.
    """

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    levels: int | None = 256
    notices: tuple[str, ...] = ()
    columns: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    stream: bool = False
    table: tuple[Column, ...] | None = None
    factors: "Factors | None" = None


def check_shape(rows: np.ndarray, where: str) -> None:
    """Refuse what are no rows of numbers.

    Raises:
        DataError: another type, fewer than two dimensions, or no element.
    """
    if rows.dtype.kind not in "buif":
        raise DataError(f"{where}: expected numbers, got {rows.dtype}; save them as float32 or uint8")
    if rows.ndim < 2:
        raise DataError(f"{where}: expected rows, shape (N, *event), got shape {rows.shape}; pass x.reshape(-1, 1)")
    if rows.size == 0:
        raise DataError(f"{where}: empty, shape {rows.shape}; give at least three rows")


def check_agreement(x: dict[str, np.ndarray], where: str) -> None:
    """Refuse splits that are not of one kind.

    Raises:
        DataError: they differ in event shape, or some are grey levels and others are not.
    """
    for split, rows in x.items():
        if rows.shape[1:] != x["train"].shape[1:]:
            raise DataError(
                f"{where}: train and {split} differ in event shape, {x['train'].shape[1:]} and {rows.shape[1:]}; "
                "give both the same columns"
            )
        if of_levels(rows) != of_levels(x["train"]):
            raise DataError(
                f"{where}: train is {x['train'].dtype} and {split} is {rows.dtype}, "
                "one of them grey levels and the other not; save both in one type"
            )


def of_levels(rows: np.ndarray) -> bool:
    """Whether rows are of a type that holds grey levels, or zeros and ones; all other types are continuous."""
    return rows.dtype in (np.uint8, np.bool_)


def encode_labels(
    y: dict[str, np.ndarray], x: dict[str, np.ndarray], where: str, notices: list[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Bring labels to int64, names to their place in sorted order, the same in all splits; and those names."""
    if not y:
        return {}, None
    y = {split: labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels for split, labels in y.items()}
    for split, labels in y.items():
        if labels.ndim == 0 or len(labels) != len(x[split]):
            raise DataError(
                f"{where}: {len(x[split])} rows in {split}, but labels of shape {labels.shape}; give one each"
            )
    if any(labels.ndim > 1 for labels in y.values()):
        notices.append(f"{where}: labels are not used: expected one for each row, got {y['train'].shape}")
        return {}, None
    joined, classes = np.concatenate(list(y.values())), None
    if joined.dtype.kind not in "buif":
        try:
            names, joined = np.unique(joined.astype(str), return_inverse=True)
            classes = tuple(names.tolist())
        except (SystemError, ValueError) as error:  # characters that Unicode does not have
            raise DataError(f"{where}: labels are no text ({in_short(error)}); save them again") from error
    elif joined.dtype.kind == "f" and not (np.isfinite(joined) & (joined == np.floor(joined))).all():
        notices.append(f"{where}: labels are not used: expected whole numbers or names, got other values")
        return {}, None
    ends = np.cumsum([len(labels) for labels in y.values()])[:-1]
    return dict(zip(y, np.split(joined.astype(np.int64), ends), strict=True)), classes


def require_memory(needed: int, where: str, remedy: str = "give fewer rows, or save them as one array in .npy") -> None:
    """Refuse to take memory that is not there.

    Args:
        needed: Bytes.
        where: What they are for, in words.
        remedy: What the user may do.

    Raises:
        DataError: fewer are available.
    """
    available = available_memory()
    if needed > available:
        raise DataError(
            f"{where}: needs about {needed / 2**30:.3g} GiB of memory, {available / 2**30:.3g} GiB is available; "
            f"{remedy}"
        )


def available_memory() -> int:
    """Bytes that the machine, and the container around this process, leave."""
    import psutil  # type: ignore[import-untyped]

    available = psutil.virtual_memory().available
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, versions 2 and 1
        with suppress(OSError, ValueError):  # there is none, or it sets no limit
            available = min(available, int(Path("/sys/fs/cgroup", limit).read_text()))
    return available


def shown_path(source: str | Path, path: Path) -> str:
    """A path as it was given, and as resolved."""
    resolved = os.path.realpath(path)
    return resolved if str(source) == resolved else f"{source} ({resolved})"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(3, "row")
    ('1 row', '3 rows')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def in_short(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
