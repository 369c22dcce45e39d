"""Other rows than those of a data set, for a model that was trained on it: read as its own, or refused in a line."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.data.files import FORMATS, read_path
from pyrovae.data.found import check_shape, counted, encode_labels, shown_path
from pyrovae.data.given import LABEL
from pyrovae.data.rows import Rows
from pyrovae.data.streaming import Conversion
from pyrovae.data.transforms import Dequantize, DrawnPixels, Threshold, draw_once
from pyrovae.errors import DataError


class Others(NamedTuple):
    """Rows of a file, as a model has them.

    Attributes:
        x: Shape (N, *event), in the order of the file.
        given: What the model is given beside them, each of shape (N, ...).
        labels: The name of each row's label; None where there are none.
        notices: Sentences for the user.
    """

    x: Tensor
    given: tuple[Tensor, ...]
    labels: list[str] | None
    notices: tuple[str, ...]


def other_rows(rows: Rows, source: str | Path, split: str = "test") -> Others:
    """Read a file or folder as rows of the kind that a model was trained on, all of them, by the same transform.

    Grey levels become what those of the training data became, with noise that is the same each time; continuous values
    are standardised by the training rows where those were. Zeros and ones, and dequantised levels in [0, 1], are taken
    for what they are: such as draws from the model.

    Args:
        rows: What the model was trained on.
        source: A path that `load_data` reads.
        split: Which rows, of a file that has splits.

    Raises:
        DataError: it is missing or damaged, or its rows are of another shape, kind, or of classes that the model does
            not have.
    """
    path = Path(source).expanduser()
    where = shown_path(source, path)
    if not path.exists():
        raise DataError(f"{where}: no such file or folder; give {FORMATS}")
    found = read_path(path, where, "off", rows.table)
    part = "train" if set(found.x) == {"train"} else split
    if part not in found.x:
        raise DataError(f"{where}: has no rows of {split}, but of {', '.join(found.x)}; choose one of these splits")
    check_shape(found.x[part], where)
    if rows.columns is not None and found.columns is not None and list(found.columns) != list(rows.columns):
        raise DataError(
            f"{where}: columns {', '.join(found.columns[:5])}, ..., where the model was trained on "
            f"{', '.join(rows.columns[:5])}, ...; give the same in the same order"
        )
    raw = _raw(found.x[part], rows, where)
    notices = list(found.notices)
    numbers, classes = encode_labels({part: found.y[part]} if part in found.y else {}, found.x, where, notices)
    labels = None if part not in numbers else _names(numbers[part], classes or rows.classes)
    return Others(_points(raw, rows, where), _given(labels, rows, where), labels, tuple(notices))


def _raw(array: np.ndarray, of: Rows, where: str) -> Tensor:
    """Rows as uint8 or float32, channels first, of the shape of others and finite, but for what may be missing."""
    event_shape = of.event_shape
    rows = torch.from_numpy(np.array(Conversion.of(array)(array)))
    if (1, *rows.shape[1:]) == event_shape:
        rows = rows.unsqueeze(1)  # grey images without their channel axis
    if rows.ndim == 2 and rows.shape[1] == math.prod(event_shape):
        rows = rows.unflatten(1, event_shape)  # images as lines of a table, as draws are saved
    if tuple(rows.shape[1:]) != event_shape:
        raise DataError(f"{where}: rows of shape {tuple(rows.shape[1:])}, where the model has {event_shape}")
    wrong = ~rows.isfinite() & ~rows.isnan() if of.missing else ~rows.isfinite()
    if wrong.any():
        bad = wrong.flatten(1).any(1).nonzero().flatten().tolist()
        raise DataError(
            f"{where}: {counted(len(bad), 'row')} with values NaN, infinite or beyond float32, the first being row "
            f"{bad[0]}; remove or fill such rows"
        )
    return rows


def _points(raw: Tensor, rows: Rows, where: str) -> Tensor:
    """Raw rows in the space of the model, by the transform of its own rows."""
    transform, binary = rows.of_raw, bool(((raw == 0) | (raw == 1)).all())
    if isinstance(transform, DrawnPixels | Threshold) and binary:
        return raw.float()
    unit = raw.is_floating_point() and bool(raw.min() >= 0) and bool(raw.max() <= 1)
    if isinstance(transform, Dequantize) and unit:
        return raw.float()
    if isinstance(transform, DrawnPixels | Threshold | Dequantize):
        levels, low, high = transform.levels, raw.min().item(), raw.max().item()
        whole = levels is not None and bool((raw == raw.round()).all())
        if not unit and not (whole and low >= 0 and high < (levels or 0)):
            wanted = "values from 0 to 1" if levels is None else f"grey levels from 0 to {levels - 1}"
            raise DataError(
                f"{where}: values from {low:g} to {high:g}, where the model was trained on {wanted}; bring them there"
            )
        if unit and levels is not None:
            raise DataError(
                f"{where}: values from {low:g} to {high:g}, where the model was trained on grey levels from 0 to "
                f"{levels - 1} made binary; save levels as uint8, or zeros and ones"
            )
    return draw_once(raw, transform, "test")


def _names(labels: np.ndarray, classes: tuple[str, ...] | None) -> list[str]:
    """The name of each label, where it has one, else its number."""
    named = dict(enumerate(classes or ()))
    return [named.get(label, str(label)) for label in labels.tolist()]


def _given(labels: list[str] | None, rows: Rows, where: str) -> tuple[Tensor, ...]:
    """One-hot labels, where the model is given labels."""
    if rows.given.name is None:
        return ()
    if rows.given.name != LABEL:
        raise DataError(f"{where}: the model is given {rows.given.words}; only labels are read beside other rows")
    if labels is None:
        raise DataError(f"{where}: no labels, and the model is given one with each row; add `y` or a column `label`")
    column = {name: i for i, name in enumerate(rows.given.columns)}
    if unknown := [name for name in labels if name not in column]:
        raise DataError(f"{where}: label {unknown[0]}, where the model has {', '.join(rows.given.columns)}")
    return (one_hot(torch.tensor([column[name] for name in labels]), len(column)).to(torch.float32),)
