"""Rows in three splits: `Data`, as the source has them, and `Rows`, as a model is trained and scored on them."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.data.found import counted, require_memory
from pyrovae.data.measure import Measure
from pyrovae.data.streaming import MappedRows
from pyrovae.data.summary import Moments
from pyrovae.data.transforms import AsFloat, Dequantize, DrawnPixels, Standardize, Threshold, Transform, draw_once
from pyrovae.errors import DataError, UsageError

BINARIZE = ("dynamic", "fixed", "threshold")
_DARK = 128  # where the greatest value of uint8 is below this, it is more likely a count or a category than a pixel
COUNTS = (
    "counts want a Poisson or negative binomial likelihood and categories a categorical one, as a Pyro model of your "
    "own; yes and no are saved as 0 and 1"
)


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
        hash: Hex digest of the data, the measure, the binarisation and the bytes of validation and test: equal
            hashes mean identical scored rows.
        binarize: The binarisation that was used; None for a density and for data binary already.
        notices: Sentences for the user: those of the data, then those of the measure.
        columns: Names of the columns of a table, for figures and messages; None where there are none.
        classes: Names of the labels 0, 1, ...; None where labels are numbers.
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

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.test.shape[1:])


@dataclass(frozen=True, eq=False)
class Data:
    """Raw rows in three fixed splits.

    Attributes:
        name: The named source, or the file's name.
        train: uint8 levels, uint8 zeros and ones, or float32; shape (N, *event), images channels first. `MappedRows`
            if they stay in their file.
        validation: Likewise, and always in memory.
        test: Likewise.
        labels: int64 labels under "train", "validation" and "test"; None where there are none.
        levels: Number of grey levels: 256 for uint8, 17 for digits, None for binary and continuous data.
        highest: The greatest level in a file of the user's, who may have meant something else by uint8; else None.
        moments: Range, means and deviations of continuous data; None for levels and for binary data.
        hash: SHA-256, in hex, over the dtype, shape and bytes of what the source holds, in its order.
        notices: Sentences for the user: rows found in train and test, columns not used, ...
        columns: Names of the columns of a table; None where there are none.
        classes: Names of the labels 0, 1, ...; None where labels are numbers.
    """

    name: str
    train: Tensor | MappedRows = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    labels: dict[str, Tensor | None] = field(repr=False)
    levels: int | None
    highest: int | None = field(repr=False)
    moments: Moments | None = field(repr=False)
    hash: str
    notices: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.train.shape[1:])

    @property
    def binary(self) -> bool:
        """Whether all values are 0 or 1."""
        return self.levels is None and self.train.dtype == torch.uint8

    def rows(self, measure: Literal["mass", "density"], binarize: str | None = None, standardize: bool = False) -> Rows:
        """Make the rows that a model of `measure` trains on and is scored on.

        Args:
            measure: "mass", for a likelihood on {0,1}, or "density".
            binarize: How grey pixels become binary under "mass". "dynamic", the default for grey levels: training
                rows drawn anew whenever they are used; "fixed": drawn once; "threshold": pixel > 0.5. Validation
                and test rows are always fixed: thresholded, or one draw that is the same in every run. Floats in
                [0,1] are binarised only on demand.
            standardize: Under "density" of continuous data, (x - mean) / sd of the training rows; a constant
                column has its sd replaced by 1.
        Raises:
            UsageError: an unknown measure or binarisation, or one that the data or the measure has no use for.
            DataError: data with no mass on {0,1}, or binary data, which have no density.
        """
        check_choice("measure", measure, ("mass", "density"))
        if binarize is not None:
            check_choice("binarize", binarize, BINARIZE)
        if measure == "mass":
            if standardize:
                raise UsageError(f"{self.name}: standardize is not used by a mass on {{0,1}}; leave it out")
            return self._mass(binarize)
        if binarize is not None:
            raise UsageError(f"{self.name}: binarize={binarize!r} is not used by a density; leave it out")
        return self._density(standardize)

    def _mass(self, binarize: str | None) -> Rows:
        transform: Transform = AsFloat()
        notices: tuple[str, ...] = ()
        if self.binary and binarize is not None:
            raise UsageError(f"{self.name}: binary data has nothing to binarise; leave out --binarize {binarize}")
        if not self.binary:
            if self.moments is not None:
                self._require_probabilities(self.moments, binarize)
            binarize = binarize or "dynamic"
            transform = Threshold(self.levels) if binarize == "threshold" else DrawnPixels(self.levels)
            how = {
                "dynamic": "a pixel is 1 with probability level / 255, drawn anew whenever it is used",
                "fixed": "a pixel is 1 with probability level / 255, drawn once",
                "threshold": "a pixel is 1 where its level is over 127",
            }
            notices = self._grey(f"for a Bernoulli likelihood {how[binarize]} (--binarize {binarize})")
        dimensions = math.prod(self.event_shape)
        measure = Measure("mass", f"mass on {{0,1}}^{dimensions}", None, dimensions)
        if binarize == "fixed":
            if isinstance(self.train, MappedRows):
                remedy = "draws the training rows once and keeps them: choose dynamic or threshold"
                require_memory(math.prod(self.train.shape), f"{self.name}, --binarize fixed", remedy)
            train = draw_once(self.train, transform, "train", torch.uint8)
            return self._rows(train, AsFloat(), transform, measure, binarize, notices)
        return self._rows(self.train, transform, transform, measure, binarize, notices)

    def _grey(self, how: str) -> tuple[str, ...]:
        """How a file of uint8 is read: it may hold counts or categories, whose numbers would mean something else."""
        if self.highest is None:
            return ()
        text = f"{self.name}: uint8 up to {self.highest} is read as 256 grey levels: {how}"
        if self.highest < _DARK:
            text += f". If these are no grey levels: {COUNTS}"
        return (text,)

    def _require_probabilities(self, moments: Moments, binarize: str | None) -> None:
        found = f"{self.name}: values in [{moments.low:.6g}, {moments.high:.6g}]"
        if moments.whole.all():
            raise DataError(
                f"{found}, all whole numbers, have no mass on {{0,1}}: save grey levels (0 to 255) as uint8; {COUNTS}"
            )
        if moments.low < 0 or moments.high > 1:
            raise DataError(
                f"{found} have no mass on {{0,1}}: save grey levels as uint8, or scale to [0,1] and choose --binarize, "
                "or choose --likelihood gaussian"
            )
        if binarize is None:
            raise DataError(
                f"{found}, not only 0 and 1, have no mass on {{0,1}}: choose --binarize, which reads them as "
                "pixel probabilities, or --likelihood gaussian"
            )

    def _density(self, standardize: bool) -> Rows:
        dimensions = math.prod(self.event_shape)
        if self.binary:
            raise DataError(
                f"{self.name}: values are only 0 and 1, and a density of binary data is meaningless (it has no bound): "
                "choose --likelihood bernoulli"
            )
        if self.levels is not None:
            if standardize:
                raise UsageError(
                    f"{self.name}: standardize is for continuous data; {self.levels} grey levels are dequantised "
                    "to [0,1]; leave it out"
                )
            words = f"density of data dequantised from {self.levels} levels to [0,1]^{dimensions}"
            dequantize = Dequantize(self.levels)
            measure = Measure("density", words, self.levels, dimensions)
            notices = self._grey("for a density they are dequantised to [0,1], x = (level + u) / 256")
            return self._rows(self.train, dequantize, dequantize, measure, None, notices)

        assert self.moments is not None
        transform: Transform = AsFloat()
        words = f"density of the data in its own units, {counted(dimensions, 'dimension')}"
        if standardize:
            transform = Standardize(self.moments.mean, self.moments.sd)
            words = f"density of standardised data, {counted(dimensions, 'dimension')}"
        constant = self.moments.constant
        whole = self.moments.whole & ~constant
        notices = ()
        if whole.any():
            which = "all values are" if whole.all() else f"{int(whole.sum())} of {counted(dimensions, 'column')} are"
            notices += (
                f"{self.name}: {which} whole numbers, and are read as continuous values: their density has no upper "
                "bound (a scale that narrows at each of them raises it without end), so log p(x) says little; save "
                f"grey levels (0 to 255) as uint8; {COUNTS}",
            )
        if constant.any():
            notices += (
                f"{self.name}: {counted(int(constant.sum()), 'column')} of {dimensions} constant in the training rows: "
                "under a free scale or a mixture the density there grows without bound and log p(x) says nothing; "
                "drop them or fix the scale",
            )
        return self._rows(self.train, transform, transform, Measure("density", words, None, dimensions), None, notices)

    def _rows(
        self,
        train: Tensor | MappedRows,
        transform: Transform,
        fixed: Transform,
        measure: Measure,
        binarize: str | None,
        notices: tuple[str, ...] = (),
    ) -> Rows:
        validation = draw_once(self.validation, fixed, "validation")
        test = draw_once(self.test, fixed, "test")
        words = f"{self.hash} {measure} {binarize}"
        digest = sha256([validation, test], words)
        said, names = self.notices + notices, (self.columns, self.classes)
        return Rows(train, transform, validation, test, self.labels, measure, digest, binarize, said, *names)


def default_measure(data: Data) -> Literal["mass", "density"]:
    """The measure that suits the data.

    Mass for binary data and for grey levels in one channel (or in rows without a channel axis); density for colour
    and for continuous data.
    """
    grey = data.levels is not None and (len(data.event_shape) != 3 or data.event_shape[0] == 1)
    return "mass" if data.binary or grey else "density"


def sha256(tensors: Iterable[Tensor], words: str = "") -> str:
    digest = hashlib.sha256(words.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
