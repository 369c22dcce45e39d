"""What is found out about all rows of a source in one pass: that they are finite, or binary; hash, moments, overlap.

The pass goes through the source block by block, in its order, so it needs little memory and gives the same numbers bit
for bit whether the source is in memory or in a file.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.streaming import Conversion, advise, blocks, read
from pyrovae.errors import DataError

_OVERLAP_ROWS = 10**7  # above this, rows are not compared: it would take minutes


@dataclass(frozen=True)
class Part:
    """Where the rows of a split are: in which array of the source, and at which positions (None: all, in order)."""

    source: str
    positions: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Moments:
    """The values of continuous data.

    Attributes:
        low: The least value of all splits.
        high: The greatest.
        mean: Of the training rows, element by element, float32.
        sd: Likewise, with 1 where it would be 0.
        constant: Which elements are the same in all training rows.
        whole: Which elements are whole numbers in all rows of all splits.
    """

    low: float
    high: float
    mean: Tensor
    sd: Tensor
    constant: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Summary:
    """What a pass over all rows gives.

    Attributes:
        hash: SHA-256, in hex, of the type, shape and values of every array.
        binary: Whether all values are 0 or 1.
        moments: None for grey levels and for binary data.
        highest: The greatest value of uint8 rows; 0 for others.
        notices: Sentences for the user.
    """

    hash: str
    binary: bool
    moments: Moments | None
    highest: int
    notices: tuple[str, ...]


def summarise(
    arrays: Mapping[str, np.ndarray],
    parts: Mapping[str, Part],
    conversion: Conversion,
    where: str,
    columns: Sequence[str] | None = None,
    missing: bool = False,
) -> Summary:
    """Pass once over every row of a source.

    Args:
        arrays: The arrays of the source; training rows are in "train".
        parts: Where the rows of each split are.
        conversion: From rows of the source to uint8 or float32, which is what is summarised.
        where: The source in words, for messages.
        columns: Names of the columns, for messages.
        missing: Whether NaN is what is missing of a row, and in order.
    Raises:
        DataError: a value is NaN, infinite or beyond float32, or a boolean that is neither.
    """
    digests = {split: _Digest() for split in arrays}
    of_seen = _SeenMoments() if missing else _Moments()
    moments = of_seen if conversion.dtype == torch.float32 else None
    train, test = parts["train"], parts["test"]
    overlap = _Overlap(read(arrays[test.source], test.positions, conversion).numpy())
    highest = 0
    for split, array in arrays.items():
        advise(array, "MADV_SEQUENTIAL")
        finite = _Finite(f"{where}, {split}", columns, missing)
        trained = np.full(len(array), split == "train" and train.positions is None)
        if split == "train" and train.positions is not None:
            trained[train.positions] = True
        for block in blocks(array.shape):
            rows = conversion(array[block])
            if moments is not None and not finite.check(rows, array, block.start):
                continue  # to count what is wrong in the rows that follow
            if moments is None:
                highest = max(highest, int(rows.max()))
                if array.dtype == np.bool_ and highest > 1:
                    raise DataError(
                        f"{where}, {split}: a boolean array in which a byte is {highest}, neither 0 nor 1: damaged, or "
                        "written as another type; save it again, grey levels as uint8"
                    )
            digests[split].update(rows)
            in_train = rows[trained[block]]
            overlap.update(in_train)
            if moments is not None:
                moments.update(rows, in_train)
        finite.require()

    binary = all(digest.binary for digest in digests.values())
    dtype = torch.uint8 if binary else conversion.dtype
    shapes = {split: conversion.event_shape(array.shape[1:]) for split, array in arrays.items()}
    lines = [f"{split} {dtype} {len(arrays[split])} {shapes[split]} {digests[split].hex(binary)}" for split in arrays]
    of_gaps = of_seen.notices(where) if isinstance(of_seen, _SeenMoments) and moments is not None else ()
    return Summary(
        hash=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        binary=binary,
        moments=None if binary or moments is None else moments.result(),
        highest=highest,
        notices=(*overlap.notices(where), *of_gaps),
    )


class _Digest:
    """SHA-256 of rows as they are, and as bytes for as long as they are zeros and ones."""

    def __init__(self) -> None:
        self.values, self.bits, self.binary = hashlib.sha256(), hashlib.sha256(), True

    def update(self, rows: np.ndarray) -> None:
        self.values.update(rows)
        self.binary = self.binary and bool(((rows == 0) | (rows == 1)).all())
        if self.binary:
            self.bits.update(rows.astype(np.uint8))

    def hex(self, binary: bool) -> str:
        return (self.bits if binary else self.values).hexdigest()


class _Finite:
    """Counts what is not finite in float32, and remembers the first such value."""

    def __init__(self, where: str, columns: Sequence[str] | None, missing: bool) -> None:
        self.where, self.columns, self.missing = where, columns, missing
        self.count, self.first = 0, ""

    def check(self, rows: np.ndarray, array: np.ndarray, start: int) -> bool:
        """Look at the rows that begin at `start` of the array; whether all values are finite."""
        finite = np.isfinite(rows) | np.isnan(rows) if self.missing else np.isfinite(rows)
        if finite.all():
            return True
        if not self.count:
            row, *element = (int(i) for i in np.unravel_index(np.argmin(finite), finite.shape))
            column = element[0] if len(element) == 1 else tuple(element)
            name = f" ({self.columns[element[0]]!r})" if self.columns else ""
            self.first = f"{array[start + row, *element]} in row {start + row}, column {column}{name}"
        self.count += finite.size - int(finite.sum())
        return False

    def require(self) -> None:
        """Refuse rows that are not all finite."""
        if self.count:
            raise DataError(
                f"{self.where}: {self.count} value{'s' * (self.count != 1)} NaN, infinite or beyond float32, the first "
                f"{self.first}; remove or fill such rows, or say that NaN is what is missing (`missing`)",
                settings=("missing",),
            )


class _Moments:
    """Range of all rows; mean and variance of the training rows in double precision, by the update of Chan et al."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.count = 0
        self.first = self.mean = self.squares = np.zeros(())
        self.constant = self.whole = np.array(True)

    def update(self, rows: np.ndarray, train: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        if self.whole.any():
            self.whole = self.whole & (rows == np.floor(rows)).all(0)
        if not len(train):
            return
        if not self.count:
            self.first = train[0]
        self.constant = self.constant & (train == self.first).all(0)
        values = train.astype(np.float64)
        mean = values.mean(0)
        squares = ((values - mean) ** 2).sum(0)
        total = self.count + len(values)
        shift = mean - self.mean
        self.squares = self.squares + squares + shift**2 * (self.count * len(values) / total)
        self.mean = self.mean + shift * (len(values) / total)
        self.count = total

    def result(self) -> Moments:
        sd = np.sqrt(self.squares / self.count).astype(np.float32)
        sd[self.constant | (sd == 0)] = 1
        mean, constant = self.mean.astype(np.float32), torch.from_numpy(self.constant)
        whole = torch.from_numpy(np.broadcast_to(self.whole, mean.shape).copy())
        return Moments(self.low, self.high, torch.from_numpy(mean), torch.from_numpy(sd), constant, whole)


class _SeenMoments:
    """The same of rows with gaps: of each element by the rows in which it is seen, of which there may be none."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.seen = self.gaps = 0
        self.count = self.mean = self.squares = np.zeros(())
        self.least, self.most = np.array(np.inf), np.array(-np.inf)  # of training rows
        self.whole = np.array(True)

    def update(self, rows: np.ndarray, train: np.ndarray) -> None:
        there = ~np.isnan(rows)
        self.seen, self.gaps = self.seen + int(there.sum()), self.gaps + int((~there).sum())
        self.low = min(self.low, float(np.min(rows, initial=np.inf, where=there)))
        self.high = max(self.high, float(np.max(rows, initial=-np.inf, where=there)))
        self.whole = self.whole & ((rows == np.floor(rows)) | ~there).all(0)
        there, values = ~np.isnan(train), np.nan_to_num(train.astype(np.float64))
        count = there.sum(0)
        mean = values.sum(0) / np.maximum(count, 1)
        squares = ((values - mean) ** 2 * there).sum(0)
        total = self.count + count
        shift = (mean - self.mean) * (count > 0)
        self.squares = self.squares + squares + shift**2 * (self.count * count / np.maximum(total, 1))
        self.mean, self.count = self.mean + shift * (count / np.maximum(total, 1)), total
        self.least = np.minimum(self.least, np.min(train, 0, initial=np.inf, where=there))
        self.most = np.maximum(self.most, np.max(train, 0, initial=-np.inf, where=there))

    def result(self) -> Moments:
        constant = self.least >= self.most
        sd = np.sqrt(self.squares / np.maximum(self.count, 1)).astype(np.float32)
        sd[constant | (sd == 0)] = 1
        parts = (self.mean.astype(np.float32), sd, constant, np.broadcast_to(self.whole, sd.shape).copy())
        return Moments(self.low, self.high, *map(torch.from_numpy, parts))

    def notices(self, where: str) -> tuple[str, ...]:
        """How much is missing.

        Raises:
            DataError: all values are.
        """
        if not self.seen:
            raise DataError(f"{where}: every value is missing; give some")
        share = 100 * self.gaps / (self.seen + self.gaps)
        return (f"{where}: {self.gaps} values are missing, {share:.3g} % of all; log p is that of what is seen",)


class _Overlap:
    """Counts the test rows that are training rows as well, byte for byte."""

    def __init__(self, test: np.ndarray) -> None:
        self.test = _row_bytes(test)
        self.sought, self.found = set(self.test), set[bytes]()
        self.rows = 0

    def update(self, train: np.ndarray) -> None:
        self.rows += len(train)
        if len(train) and self.rows <= _OVERLAP_ROWS:
            self.found |= self.sought.intersection(_row_bytes(train))

    def notices(self, where: str) -> tuple[str, ...]:
        if self.rows > _OVERLAP_ROWS:
            return (
                f"{where}: more than {_OVERLAP_ROWS} training rows, so not searched for rows in both train and test",
            )
        both = sum(row in self.found for row in self.test)
        rows = f"{len(self.test)} test row{'s' * (len(self.test) != 1)}"
        return (f"{where}: {both} of {rows} also in train",) if both else ()


def _row_bytes(rows: np.ndarray) -> list[bytes]:
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    return flat.view(f"V{flat.shape[1] * flat.itemsize}")[:, 0].tolist()
