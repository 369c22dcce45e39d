"""Rows in three splits: `Data`, as the source has them, and `Rows`, as a model is trained and scored on them."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.columns import Column, written
from pyrovae.data.factors import Factors
from pyrovae.data.given import Given, conditioned
from pyrovae.data.labels import partly_labelled
from pyrovae.data.measure import Measure
from pyrovae.data.raw import Raw
from pyrovae.data.spaces import SPACES, Space
from pyrovae.data.streaming import MappedRows
from pyrovae.data.transforms import AsFloat, Transform, draw_once
from pyrovae.errors import UsageError


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model of one measure trains on and is scored on.

    Attributes:
        train: Compact training rows (uint8 stays uint8), shape (N, *event); index a batch, then `transform` it. Rows
            that stay in their file are read when indexed, by a tensor or a slice.
        transform: A batch of `train` -> float32 x of the same shape, on the batch's device. Under dynamic
            binarisation and dequantisation every call draws anew, from torch's global generator of that device.
        validation: Fixed float32 rows.
        test: Fixed float32 rows.
        labels: int64 labels of each split, or None.
        measure: What log p(x) of these rows is.
        hash: Hex digest of the data, the measure, the binarisation and the bytes of validation and test, with what they
            are conditioned on: equal hashes mean identical scored rows.
        binarize: The binarisation that was used; None for a density and for data binary already.
        notices: Sentences for the user: those of the data, then those of the measure.
        columns: Names of the columns of a table, for figures and messages; None where there are none.
        classes: Names of the labels 0, 1, ...; None where labels are numbers.
        given: What the model is conditioned on, by split: `given["train"]`; nothing, unless `Data.rows` was asked.
        data_range: The greatest less the least value that an element can have, which SSIM and PSNR need: 1 for binary
            rows and dequantised levels, L - 1 for levels; else that of the validation rows.
        of_raw: From a raw row of the source to x, whether or not training rows are drawn once: see `others`.
        table: The columns of a table of several kinds; None of all else.
        missing: Whether NaN stands for what is missing, and log p is that of what is seen.
        factors: What the rows of each split were made from, where that is known; else None.
    """

    train: Tensor | MappedRows = field(repr=False)
    transform: Callable[[Tensor], Tensor]
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    labels: dict[str, Tensor | None] = field(repr=False)
    measure: Measure
    hash: str
    binarize: str | None
    notices: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    given: Given = field(default_factory=Given)
    data_range: float = 1.0
    of_raw: Transform = field(default_factory=AsFloat)
    table: tuple[Column, ...] | None = None
    missing: bool = False
    factors: Factors | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.test.shape[1:])

    @property
    def of_one_unit(self) -> bool:
        """Whether errors of all elements are of one unit and known: not of several kinds of columns, nor with gaps."""
        return self.table is None and not self.missing


@dataclass(frozen=True, eq=False)
class Data(Raw):
    """Raw rows in three fixed splits, of which `rows` makes what a model is trained and scored on; see `Raw`."""

    def rows(
        self,
        measure: str | Space,
        binarize: str | None = None,
        standardize: bool = False,
        condition: str | None = None,
        labels: int | None = None,
        seed: int = 0,
    ) -> Rows:
        """Make the rows that a model of `measure` trains on and is scored on.

        Args:
            measure: The name of a space: "mass", for a likelihood on {0,1}, "density", "levels" or "counts"; or a
                `Space` with its settings.
            binarize: How grey pixels become binary under "mass": dynamic, fixed or threshold; see `Binary`.
            standardize: Under "density" of continuous data, (x - mean) / sd of the training rows; see `Continuous`.
            condition: What the model is given beside x: "label", for one-hot labels; columns of a table, which are then
                none of x, or both, as "age,label"; None, for nothing.
            labels: So many training rows have their label in `given["train"]`, as many of each class, the others zeros;
                the other splits are given nothing. None: no row has.
            seed: Of the draw of these rows.
        Raises:
            UsageError: an unknown measure, binarisation or condition, or one that the data or the measure has no use
                for.
            DataError: data with no mass on {0,1}, or binary data, which have no density; or without labels to
                condition on.
        """
        space = self._space(measure, binarize, standardize) if isinstance(measure, str) else measure
        data, given = (self, Given()) if condition is None else conditioned(self, condition)
        if labels is not None:
            data, given = partly_labelled(self, labels, seed)
        reading = space.read(data)
        scored = reading.measure
        if data.missing:
            scored = replace(scored, description=f"{scored.description}, of what is seen", coded=False)
        if condition is not None:
            scored = replace(scored, description=f"{scored.description}, given {given.words}")
        train, transform = data.train, reading.transform
        if reading.once:
            train, transform = draw_once(train, transform, "train", torch.uint8), AsFloat()
        validation = draw_once(data.validation, reading.transform, "validation")
        test = draw_once(data.test, reading.transform, "test")
        words = f"{self.hash} {scored} {reading.binarize}"
        if given.name is not None:
            words += f" {' '.join(given.columns)}"
        if data.table is not None:
            words += f" {written(data.table)} {[column.classes for column in data.table]}"
        return Rows(
            train=train,
            transform=transform,
            validation=validation,
            test=test,
            labels=data.labels,
            measure=scored,
            hash=sha256([validation, test, *given["validation"], *given["test"]], words),
            binarize=reading.binarize,
            notices=data.notices + reading.notices,
            columns=data.columns,
            classes=self.classes,
            given=given,
            data_range=spread(validation) if reading.data_range is None else reading.data_range,
            of_raw=reading.transform,
            table=data.table,
            missing=data.missing,
            factors=data.factors,
        )

    def _space(self, measure: str, binarize: str | None, standardize: bool) -> Space:
        """The space of that name, with the settings that were chosen for it.

        Raises:
            UsageError: there is none, or it has no use for a setting.
        """
        check_choice("measure", measure, [space.name for space in SPACES])
        space = next(space for space in SPACES if space.name == measure)
        chosen: dict[str, Any] = {"binarize": binarize, "standardize": standardize or None}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        for name in chosen:
            if name not in {setting.name for setting in fields(space)}:
                raise UsageError(f"{self.name}: {name} is not used by {space.words}; leave it out")
        return space(**chosen)


def spread(rows: Tensor) -> float:
    """The greatest less the least value of any element."""
    seen = rows[~rows.isnan()]
    return (seen.max() - seen.min()).item()


def sha256(tensors: Iterable[Tensor], words: str = "") -> str:
    """SHA-256, in hex, of words and of the type, shape and bytes of tensors."""
    digest = hashlib.sha256(words.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
