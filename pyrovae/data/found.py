"""What a source holds, before it is split: rows and labels as NumPy has them, and what they must be."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyrovae.errors import DataError

SPLITS = ("train", "validation", "test")
# Fixed seeds, one for each use, so that no two uses share a stream.
SEED = {"permutation": 1, "plane": 2, "train": 3, "validation": 4, "test": 5}
HELD_OUT = 10_000  # rows of validation and test at most, where they are taken off the training rows


class Found(NamedTuple):
    """What a source holds: rows and labels under "train", and under "test" and "validation" where it has them."""

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    levels: int | None = 256  # of uint8 rows
    notices: tuple[str, ...] = ()
    columns: Sequence[str] | None = None  # their names, for messages and figures
    classes: tuple[str, ...] | None = None  # names of labels that are numbers
    stream: bool = False  # whether the training rows stay where they are


def check_shape(rows: np.ndarray, where: str) -> None:
    if rows.dtype.kind not in "buif":
        raise DataError(f"{where}: expected numbers, got {rows.dtype}; save them as float32 or uint8")
    if rows.ndim < 2:
        raise DataError(f"{where}: expected rows, shape (N, *event), got shape {rows.shape}; pass x.reshape(-1, 1)")
    if rows.size == 0:
        raise DataError(f"{where}: empty, shape {rows.shape}; give at least three rows")


def check_agreement(x: dict[str, np.ndarray], where: str) -> None:
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
    return f"{number} {noun}" + ("" if number == 1 else "s")


def in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
