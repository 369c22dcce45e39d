"""Spaces: what a likelihood asks of a data set, and how its raw rows become points of the likelihood's space.

A likelihood says the `name` of its space as its measure, or is handed a `Space` of its own with `Data.rows`. To write a
new one, subclass `Space`: its fields are the user's settings, and `read` gives a `Reading`, the `Measure` included.

    Binary        {0,1}^D      grey levels or probabilities become bits, drawn or by a threshold
    Continuous    R^D          grey levels are dequantised to [0,1]^D; all else stays in its units, or is standardised
    GreyLevels    {0,...,L-1}^D   grey levels as they are
    Counts        {0, 1, ...}^D   whole numbers as they are
    Documents     the same, of a given total
    OfColumns     each column of a table in a space of its own
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pyrovae.checks import check_choice
from pyrovae.columns import measure_of
from pyrovae.data.found import counted, require_memory
from pyrovae.data.measure import Measure
from pyrovae.data.raw import Raw
from pyrovae.data.streaming import MappedRows
from pyrovae.data.summary import Moments
from pyrovae.data.transforms import AsFloat, Dequantize, DrawnPixels, Standardize, Threshold, Transform
from pyrovae.errors import DataError, UsageError

BINARIZE = ("dynamic", "fixed", "threshold")
DARK = 128  # where the greatest value of uint8 is below this, it is more likely a count or a category than a pixel
COUNTS = (
    "counts want a Poisson or negative binomial likelihood and categories a categorical one; yes and no are saved as 0 "
    "and 1"
)


@dataclass(frozen=True)
class Reading:
    """How the rows of one data set become points of a space.

    Attributes:
        measure: What log p(x) of these points is.
        transform: From raw rows to points, whenever rows are used.
        once: Whether training rows are transformed once, as validation and test rows always are.
        binarize: The binarisation that was used, if any.
        notices: Sentences for the user.
        data_range: The greatest less the least value that an element of a point can have, where the space says it.
    """

    measure: Measure
    transform: Transform
    once: bool = False
    binarize: str | None = None
    notices: tuple[str, ...] = ()
    data_range: float | None = None


@dataclass(frozen=True)
class Space(ABC):
    """Where a likelihood has its support."""

    name: ClassVar[str]  # as a likelihood's `measure` says it
    words: ClassVar[str]  # for messages

    @abstractmethod
    def read(self, data: Raw) -> Reading:
        """How rows of that data become points of this space.

        Raises:
            DataError: they cannot.
            UsageError: a setting is of no use for them.
        """


@dataclass(frozen=True)
class Binary(Space):
    """{0,1}^D, where log p(x) is of a mass.

    Attributes:
        binarize: How grey pixels become binary. "dynamic", the default for grey levels: training rows drawn anew
            whenever they are used; "fixed": drawn once; "threshold": pixel > 0.5. Validation and test rows are always
            fixed. Floats in [0,1] are binarised only on demand.
    """

    name = "mass"
    words = "a mass on {0,1}"
    binarize: str | None = None

    def __post_init__(self) -> None:
        if self.binarize is not None:
            check_choice("binarize", self.binarize, BINARIZE)

    def read(self, data: Raw) -> Reading:
        dimensions = math.prod(data.event_shape)
        measure = Measure("mass", f"mass on {{0,1}}^{dimensions}", None, dimensions)
        if data.binary or of_bits(data):
            if self.binarize is not None:
                raise UsageError(
                    f"{data.name}: binary data has nothing to binarise; leave the binarisation out",
                    settings=(f"binarize={self.binarize}",),
                )
            return Reading(measure, AsFloat(), data_range=1.0)
        if data.moments is not None:
            self._require_probabilities(data.name, data.moments)
        binarize = self.binarize or "dynamic"
        if binarize == "fixed" and isinstance(data.train, MappedRows):
            remedy = "draws the training rows once and keeps them: choose dynamic or threshold"
            require_memory(math.prod(data.train.shape), f"{data.name}, binarize='fixed'", remedy)
        how = {
            "dynamic": "a pixel is 1 with probability level / 255, drawn anew whenever it is used",
            "fixed": "a pixel is 1 with probability level / 255, drawn once",
            "threshold": "a pixel is 1 where its level is over 127",
        }
        notices = as_grey_levels(data, f"for a Bernoulli likelihood {how[binarize]} (binarize: {binarize})")
        transform = Threshold(data.levels) if binarize == "threshold" else DrawnPixels(data.levels)
        return Reading(measure, transform, binarize == "fixed", binarize, notices, data_range=1.0)

    def _require_probabilities(self, name: str, moments: Moments) -> None:
        """Refuse continuous values that are no probabilities, or that nobody said are.

        Raises:
            DataError: whole numbers, values outside [0,1], or no binarisation chosen.
        """
        found = f"{name}: values in [{moments.low:.6g}, {moments.high:.6g}]"
        if moments.whole.all():
            raise DataError(
                f"{found}, all whole numbers, have no mass on {{0,1}}: save grey levels (0 to 255) as uint8; {COUNTS}"
            )
        if moments.low < 0 or moments.high > 1:
            raise DataError(
                f"{found} have no mass on {{0,1}}: save grey levels as uint8, or scale to [0,1] and choose a "
                "binarisation, or choose a Gaussian likelihood",
                settings=("binarize", "likelihood=gaussian"),
            )
        if self.binarize is None:
            raise DataError(
                f"{found}, not only 0 and 1, have no mass on {{0,1}}: choose a binarisation, which reads them as "
                "pixel probabilities, or a Gaussian likelihood",
                settings=("binarize", "likelihood=gaussian"),
            )


@dataclass(frozen=True)
class Continuous(Space):
    """R^D, where log p(x) is of a density: grey levels dequantised to [0,1]^D, or continuous data in its own units.

    Attributes:
        standardize: Of continuous data, (x - mean) / sd of the training rows; a constant column has its sd replaced
            by 1.
    """

    name = "density"
    words = "a density"
    standardize: bool = False

    def read(self, data: Raw) -> Reading:
        dimensions = math.prod(data.event_shape)
        if data.binary:
            raise DataError(
                f"{data.name}: values are only 0 and 1, and a density of binary data is meaningless (it has no bound): "
                "choose a Bernoulli likelihood",
                settings=("likelihood=bernoulli",),
            )
        if data.levels is not None:
            if self.standardize:
                raise UsageError(
                    f"{data.name}: standardize is for continuous data; {data.levels} grey levels are dequantised "
                    "to [0,1]; leave it out"
                )
            words = f"density of data dequantised from {data.levels} levels to [0,1]^{dimensions}"
            notices = as_grey_levels(data, "for a density they are dequantised to [0,1], x = (level + u) / 256")
            measure = Measure("density", words, data.levels, dimensions)
            return Reading(measure, Dequantize(data.levels), notices=notices, data_range=1.0)
        assert data.moments is not None
        transform: Transform = AsFloat()
        words = "density of the data in its own units"
        if self.standardize:
            words, transform = "density of standardised data", Standardize(data.moments.mean, data.moments.sd)
        measure = Measure("density", f"{words}, {counted(dimensions, 'dimension')}", None, dimensions)
        return Reading(measure, transform, notices=without_bound(data.name, data.moments, dimensions))


@dataclass(frozen=True)
class GreyLevels(Space):
    """{0, ..., L - 1}^D, where log p(x) is of a mass: an element of x is its level."""

    name = "levels"
    words = "a mass on grey levels"

    def read(self, data: Raw) -> Reading:
        if data.levels is None:
            found = "zeros and ones" if data.binary else "continuous values"
            remedy = "bernoulli" if data.binary else "gaussian"
            raise DataError(
                f"{data.name}: holds {found} and no grey levels: save levels (0 to 255) as uint8, or choose a "
                f"{remedy.capitalize()} likelihood",
                settings=(f"likelihood={remedy}",),
            )
        dimensions = math.prod(data.event_shape)
        measure = Measure("levels", f"mass on {{0,...,{data.levels - 1}}}^{dimensions}", data.levels, dimensions)
        notices = as_grey_levels(data, "for a mass on these levels x is the level")
        return Reading(measure, AsFloat(), notices=notices, data_range=data.levels - 1.0)


@dataclass(frozen=True)
class Counts(Space):
    """{0, 1, 2, ...}^D, where log p(x) is of a mass: whole numbers as they are, such as uint8 of a file."""

    name = "counts"
    words = "a mass on counts"

    def read(self, data: Raw) -> Reading:
        dimensions = math.prod(data.event_shape)
        measure = Measure("counts", f"mass on counts {{0, 1, ...}}^{dimensions}", None, dimensions)
        return Reading(measure, AsFloat(), notices=as_counts(data))


@dataclass(frozen=True)
class Documents(Space):
    """{0, 1, 2, ...}^V of a given total, where log p(x) is of a mass: how often each of V words comes in a document."""

    name = "documents"
    words = "a mass on counts of words given their total"

    def read(self, data: Raw) -> Reading:
        if len(data.event_shape) != 1:
            raise DataError(f"{data.name}: documents are rows of counts of words, not of shape {data.event_shape}")
        (words,) = data.event_shape
        measure = Measure("documents", f"mass on counts of {words} words given their total", None, words, coded=False)
        return Reading(measure, AsFloat(), notices=as_counts(data))


@dataclass(frozen=True)
class OfColumns(Space):
    """Columns of several kinds, each in a space of its own: log p(x) is of a density of some times a mass of others.

    A continuous column is in its own units; one that is binary or categorical has the numbers of its classes.
    """

    name = "columns"
    words = "a density of some columns times a mass of others"

    def read(self, data: Raw) -> Reading:
        if data.table is None:
            raise DataError(
                f"{data.name}: its columns are of one kind; say of which kind each is, or `columns=auto`",
                settings=("columns=auto",),
            )
        return Reading(Measure("columns", measure_of(data.table), None, len(data.table), coded=False), AsFloat())


SPACES: tuple[type[Space], ...] = (Binary, Continuous, GreyLevels, Counts, Documents, OfColumns)


def as_counts(data: Raw) -> tuple[str, ...]:
    """What to say of data that are read as counts.

    Raises:
        DataError: they are none.
    """
    moments = data.moments
    if moments is not None and (moments.low < 0 or not moments.whole.all()):
        raise DataError(
            f"{data.name}: values in [{moments.low:.6g}, {moments.high:.6g}], with "
            f"{int((~moments.whole).sum())} of {counted(math.prod(data.event_shape), 'column')} not of whole numbers, "
            "are no counts: choose a Gaussian likelihood",
            settings=("likelihood=gaussian",),
        )
    what = "two values" if data.binary else f"{data.levels} grey levels"
    text = f"{data.name}: {what} are read as counts, as the likelihood has them"
    return (text,) if data.binary or (data.levels is not None and data.highest is None) else ()


def as_grey_levels(data: Raw, how: str) -> tuple[str, ...]:
    """How a file of uint8 is read: it may hold counts or categories, whose numbers would mean something else."""
    if data.highest is None:
        return ()
    text = f"{data.name}: uint8 up to {data.highest} is read as 256 grey levels: {how}"
    if data.highest < DARK:
        text += f". If these are no grey levels: {COUNTS}"
    return (text,)


def without_bound(name: str, moments: Moments, dimensions: int) -> tuple[str, ...]:
    """Where a density of these values has no upper bound, so that a large log p(x) says little."""
    notices: tuple[str, ...] = ()
    constant = moments.constant
    whole = moments.whole & ~constant
    if whole.any():
        which = "all values are" if whole.all() else f"{int(whole.sum())} of {counted(dimensions, 'column')} are"
        notices += (
            f"{name}: {which} whole numbers, and are read as continuous values: their density has no upper "
            "bound (a scale that narrows at each of them raises it without end), so log p(x) says little; save "
            f"grey levels (0 to 255) as uint8; {COUNTS}",
        )
    if constant.any():
        notices += (
            f"{name}: {counted(int(constant.sum()), 'column')} of {dimensions} constant in the training rows: "
            "under a free scale or a mixture the density there grows without bound and log p(x) says nothing; "
            "drop them or fix the scale",
        )
    return notices


def default_measure(data: Raw) -> Literal["mass", "density", "columns"]:
    """The measure that suits the data.

    Mass for binary data and for grey levels in one channel (or in rows without a channel axis); density for colour
    and for continuous data; columns for a table whose columns are of several kinds.
    """
    if data.table is not None:
        return "columns"
    grey = data.levels is not None and (len(data.event_shape) != 3 or data.event_shape[0] == 1)
    return "mass" if data.binary or grey or of_bits(data) else "density"


def of_bits(data: Raw) -> bool:
    """Whether all values that are not missing are 0 or 1, where some may be missing."""
    seen = data.moments
    return data.missing and seen is not None and seen.low >= 0 and seen.high <= 1 and bool(seen.whole.all())
