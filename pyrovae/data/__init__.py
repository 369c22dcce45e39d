r"""Data: where rows come from, how they are split, and the measure on which a model of them is scored.

`load_data` returns `Data`: raw rows in three fixed splits. `Data.rows` makes of them `Rows`, what a model trains on
and is scored on, for one of two measures:

- **mass**: p(x) is a probability, x in {0,1}^D. Grey pixels become binary ones; a pixel of level l out of L is 1
  with probability l / (L - 1).
- **density**: p(x) is a density. Grey levels are dequantised, x = (l + u) / L with u ~ U[0,1), so that

      log P(l) >= E_u log p(x) - D log L

  (Jensen), and -log p(x) / (D log 2) + log2 L bounds the bits per dimension of the levels l from above.

Nats of different measures are not comparable, so every `Rows` carries its `Measure`, and a `hash` that two runs share
only if they are scored on identical rows. Training rows may be drawn anew in every epoch; validation and test rows
never are, and neither they nor the splits depend on a global seed.

Named sources: `digits` comes with scikit-learn; `mnist`, `fashion-mnist`, `kmnist`, `emnist` (its "balanced" split),
`omniglot`, `cifar10`, `svhn` and `celeba` are read by torchvision; `three-gaussians`, `ring` and `pinwheel` are drawn
in the plane. Any other source is a path: .npz, .npy, .csv, or a folder of images.

The training rows of a .npy file that does not fit in memory stay in it (`pyrovae.data.streaming`). Nothing depends on
whether they do: splits are a function of the number of rows, and what is found out about all rows (that they are
finite, or binary; their hash, moments and overlap) is computed block by block, in the order of the source.
"""

import csv
import difflib
import gzip
import hashlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.streaming import Conversion, MappedRows, read
from pyrovae.data.summary import Moments, Part, summarise
from pyrovae.errors import DataError, UsageError
from pyrovae.files import user_cache

SPLITS = ("train", "validation", "test")
BINARIZE = ("dynamic", "fixed", "threshold")
STREAM = ("auto", "on", "off")

# torchvision's class for each name, and the arguments that select each split it has.
_BY_TRAIN: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TORCHVISION = {
    "mnist": ("MNIST", _BY_TRAIN),
    "fashion-mnist": ("FashionMNIST", _BY_TRAIN),
    "kmnist": ("KMNIST", _BY_TRAIN),
    "emnist": ("EMNIST", {split: {**chosen, "split": "balanced"} for split, chosen in _BY_TRAIN.items()}),
    "omniglot": ("Omniglot", {"train": {"background": True}, "test": {"background": False}}),
    "cifar10": ("CIFAR10", _BY_TRAIN),
    "svhn": ("SVHN", {split: {"split": split} for split in ("train", "test")}),
    "celeba": ("CelebA", {split: {"split": split[:5], "target_type": []} for split in SPLITS}),  # its "valid"
}
_PLANE = ("three-gaussians", "ring", "pinwheel")
HANDWRITING = ("digits", "mnist", "kmnist", "emnist", "omniglot")  # bright strokes on black, in all of them
DOWNLOADED: tuple[str, ...] = tuple(_TORCHVISION)  # by torchvision, to a root
NAMES: tuple[str, ...] = ("digits", *_TORCHVISION, *_PLANE)
_FORMATS = ".npz, .npy, .csv, or a folder of images"
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}

# Fixed seeds, one for each use, so that no two uses share a stream.
_SEED = {"permutation": 1, "plane": 2, "train": 3, "validation": 4, "test": 5}
_PLANE_ROWS = 5000
_HELD_OUT = 10_000  # rows of validation and test at most, where they are taken off the training rows
_OTHERS = 10_000  # files without pixels in a folder of images
_DARK = 128  # where the greatest value of uint8 is below this, it is more likely a count or a category than a pixel
_COUNTS = (
    "counts want a Poisson or negative binomial likelihood and categories a categorical one, as a Pyro model of your "
    "own; yes and no are saved as 0 and 1"
)
_POSITION = 16  # bytes of memory for each row that stays in its file: its place, and room to draw it


@dataclass(frozen=True)
class Measure:
    """What a reported log p(x) is: a mass or a density, of what, on which space.

    Attributes:
        kind: "mass" or "density".
        description: The space in words, for tables.
        levels: Number of grey levels L if the rows are dequantised ones, else None.
        dimensions: D, the number of elements of one event.
    """

    kind: str
    description: str
    levels: int | None
    dimensions: int

    def bits_per_dimension(self, nats: float) -> float | None:
        """Bits per dimension from a mean log p(x) in nats; None for a density in the data's own units.

        >>> Measure("mass", "mass on {0,1}^2", None, 2).bits_per_dimension(-2 * math.log(2))
        1.0
        """
        bits = -nats / (self.dimensions * math.log(2))
        if self.kind == "mass":
            return bits
        return None if self.levels is None else bits + math.log2(self.levels)


@dataclass(frozen=True)
class AsFloat:
    """The rows as they are, in float32."""

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return raw.to(torch.float32)


@dataclass(frozen=True)
class Bernoulli:
    """Binary pixels drawn with probability level / (levels - 1), or the value itself where levels is None."""

    levels: int | None

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (_uniform(raw, generator) < _probability(raw, self.levels)).to(torch.float32)


@dataclass(frozen=True)
class Threshold:
    """Binary pixels: 1 where the pixel probability exceeds 0.5."""

    levels: int | None

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (_probability(raw, self.levels) > 0.5).to(torch.float32)


@dataclass(frozen=True)
class Dequantize:
    """x = (level + u) / levels in [0,1), u ~ U[0,1); floor(x * levels) is the level again."""

    levels: int

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        level = raw.to(torch.float32)
        # In float32 255 + u can round up to 256, the next level; 2^-16 is the spacing of floats just below 256.
        return torch.minimum(level + _uniform(raw, generator), level + (1 - 2**-16)) / self.levels


@dataclass(frozen=True, eq=False)
class Standardize:
    """(x - mean) / sd, element by element; mean and sd have the shape of one event."""

    mean: Tensor
    sd: Tensor

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (raw.to(torch.float32) - self.mean.to(raw.device)) / self.sd.to(raw.device)


Transform = AsFloat | Bernoulli | Threshold | Dequantize | Standardize


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator)


def _probability(raw: Tensor, levels: int | None) -> Tensor:
    return raw.to(torch.float32) / (1 if levels is None else levels - 1)


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
        _choice("measure", measure, ("mass", "density"))
        if binarize is not None:
            _choice("binarize", binarize, BINARIZE)
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
            transform = Threshold(self.levels) if binarize == "threshold" else Bernoulli(self.levels)
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
                _require_memory(math.prod(self.train.shape), f"{self.name}, --binarize fixed", remedy)
            train = _drawn(self.train, transform, "train", torch.uint8)
            return self._rows(train, AsFloat(), transform, measure, binarize, notices)
        return self._rows(self.train, transform, transform, measure, binarize, notices)

    def _grey(self, how: str) -> tuple[str, ...]:
        """How a file of uint8 is read: it may hold counts or categories, whose numbers would mean something else."""
        if self.highest is None:
            return ()
        text = f"{self.name}: uint8 up to {self.highest} is read as 256 grey levels: {how}"
        if self.highest < _DARK:
            text += f". If these are no grey levels: {_COUNTS}"
        return (text,)

    def _require_probabilities(self, moments: Moments, binarize: str | None) -> None:
        found = f"{self.name}: values in [{moments.low:.6g}, {moments.high:.6g}]"
        if moments.whole.all():
            raise DataError(
                f"{found}, all whole numbers, have no mass on {{0,1}}: save grey levels (0 to 255) as uint8; {_COUNTS}"
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
        words = f"density of the data in its own units, {_count(dimensions, 'dimension')}"
        if standardize:
            transform = Standardize(self.moments.mean, self.moments.sd)
            words = f"density of standardised data, {_count(dimensions, 'dimension')}"
        constant = self.moments.constant
        whole = self.moments.whole & ~constant
        notices = ()
        if whole.any():
            which = "all values are" if whole.all() else f"{int(whole.sum())} of {_count(dimensions, 'column')} are"
            notices += (
                f"{self.name}: {which} whole numbers, and are read as continuous values: their density has no upper "
                "bound (a scale that narrows at each of them raises it without end), so log p(x) says little; save "
                f"grey levels (0 to 255) as uint8; {_COUNTS}",
            )
        if constant.any():
            notices += (
                f"{self.name}: {_count(int(constant.sum()), 'column')} of {dimensions} constant in the training rows: "
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
        validation = _drawn(self.validation, fixed, "validation")
        test = _drawn(self.test, fixed, "test")
        words = f"{self.hash} {measure} {binarize}"
        digest = _sha256([validation, test], words)
        said, names = self.notices + notices, (self.columns, self.classes)
        return Rows(train, transform, validation, test, self.labels, measure, digest, binarize, said, *names)


def default_measure(data: Data) -> Literal["mass", "density"]:
    """The measure that suits the data.

    Mass for binary data and for grey levels in one channel (or in rows without a channel axis); density for colour
    and for continuous data.
    """
    grey = data.levels is not None and (len(data.event_shape) != 3 or data.event_shape[0] == 1)
    return "mass" if data.binary or grey else "density"


def load_data(
    source: str | Path = "digits",
    root: str | Path | None = None,
    download: bool = True,
    stream: Literal["auto", "on", "off"] = "auto",
) -> Data:
    """Load a named data set or the user's own file, in splits that are the same in every run.

    A given test set is kept; validation is then the last min(5000, N // 10) of the N training rows after a fixed
    permutation (at least one), unless it is given too. Without a test set the rows are permuted and split 80/10/10,
    but no more than 10,000 rows each go to validation and test, which are held in memory.

    Args:
        source: One of `NAMES` (in any case, with `-` or `_`), or a path to

            - .npz holding `x`, or `x_train` and `x_test` and perhaps `x_validation`; labels `y`, `y_train`, ...;
            - .npy holding rows; the one format whose training rows can stay in the file;
            - .csv, with or without a header, numeric; a column named `y` or `label` holds the labels;
            - a folder of 8-bit images of one size: subfolders `train` and `test` (and `validation`) are the splits,
              other subfolders the labels; one channel if all are grey, otherwise three (alpha is dropped).

            uint8 is read as 256 grey levels; (N, H, W) gets a channel axis, and (N, H, W, C) with C in 1, 3, 4 has it
            moved first unless axis 1 can be one already. Data of zeros and ones only is binary. Everything else is
            continuous, in float32.
        root: Directory of torchvision's data sets; by default `pyrovae` in the user's cache, `~/.cache`.
        download: Let torchvision fetch what is not under `root`.
        stream: Whether training rows stay in their file and are read when used: "auto", if they do not fit in memory
            and are in a .npy file; "on", always; "off", never. Splits, rows and hash are the same either way. The
            file has to stay as it is meanwhile: one that is cut short ends the process (SIGBUS).
    Returns:
        The rows as they are. EMNIST is turned upright; Omniglot is 28x28, strokes bright, labels counted through
        from training to test alphabets; CelebA is the central 148x148 pixels at 64x64, without labels.
    Raises:
        UsageError: `source` is neither a name nor an existing path, or its training rows cannot stay in it.
        DataError: missing, damaged, empty, non-finite or non-numeric data, or too much of it for the memory;
            rows and columns in messages are counted from 0.

    >>> load_data("digits").event_shape
    (1, 8, 8)
    """
    if not isinstance(source, str | Path):
        raise UsageError(
            f"source: expected the name of a data set or the path of a file, got {type(source).__name__}; fit and "
            "log_marginal take rows as a tensor"
        )
    _choice("stream", stream, STREAM)
    name = str(source).lower().replace("_", "-")
    if isinstance(source, str) and name in NAMES:
        where, path = name, None
    else:
        path = _existing(source)
        name, where = path.name, _place(source, path)
    if stream == "on" and (path is None or path.suffix.lower() != ".npy"):
        raise UsageError(f"stream: only the rows of a .npy file can stay in it, got {where}; save them with np.save")
    found = _named(name, root, download) if path is None else _read(path, where, stream)

    x, notices = found.x, list(found.notices)
    for split, array in x.items():
        _check_shape(array, f"{where}, {split}")
    _check_agreement(x, where)
    y, classes = _encode(found.y, x, where, notices)
    parts = _split({split: len(array) for split, array in x.items()}, where, notices)
    conversion = Conversion.of(x["train"])
    summary = summarise(x, parts, conversion, where, found.columns)
    levels = found.levels if _of_levels(x["train"]) and not summary.binary else None
    if summary.binary:
        conversion = conversion.binary()
    notices += summary.notices

    labels: dict[str, Tensor | None] = dict.fromkeys(SPLITS)
    for split, part in parts.items():
        if part.source in y:
            of_source = torch.from_numpy(y[part.source])
            labels[split] = of_source if part.positions is None else of_source[torch.from_numpy(part.positions)]
    train, validation, test = ((x[parts[split].source], parts[split].positions, conversion) for split in SPLITS)
    return Data(
        name,
        MappedRows(*train) if found.stream else read(*train),
        read(*validation),
        read(*test),
        labels,
        levels,
        None if levels is None or path is None or path.is_dir() else summary.highest,
        summary.moments,
        summary.hash,
        tuple(notices),
        found.columns if found.columns is None else tuple(found.columns),
        classes or found.classes,
    )


# ---------------------------------------------------------------------------------------------- where rows come from


class _Found(NamedTuple):
    """What a source holds: rows and labels under "train", and under "test" and "validation" where it has them."""

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    levels: int | None = 256  # of uint8 rows
    notices: tuple[str, ...] = ()
    columns: Sequence[str] | None = None  # their names, for messages and figures
    classes: tuple[str, ...] | None = None  # names of labels that are numbers
    stream: bool = False  # whether the training rows stay where they are


def _named(name: str, root: str | Path | None, download: bool) -> _Found:
    if name in _TORCHVISION:
        return _torchvision(name, root, download)
    if name in _PLANE:
        return _plane(name)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _Found({"train": digits.images.astype(np.uint8)}, {"train": digits.target}, levels=17)


def _plane(name: str) -> _Found:
    """Draw a data set of the plane, always the same one."""
    random = np.random.default_rng(_SEED["plane"])
    noise = random.standard_normal((_PLANE_ROWS, 2))
    if name == "ring":
        return _Found({"train": noise / 10 + noise / np.linalg.norm(noise, axis=1, keepdims=True)}, {})
    if name == "three-gaussians":  # uniform weights, sd 1/2, centres on the circle of radius 2
        label = random.integers(3, size=_PLANE_ROWS)
        angle = np.pi / 2 + 2 * np.pi * label / 3
        centre = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
        return _Found({"train": centre + noise / 2}, {"train": label})
    # Pinwheel: five arms, sd 0.3 along and 0.05 across, turned by exp(radius) / 4.
    label = random.integers(5, size=_PLANE_ROWS)
    along, across = 1 + 0.3 * noise[:, 0], 0.05 * noise[:, 1]
    angle = 2 * np.pi * label / 5 + np.exp(along) / 4
    turned = [np.cos(angle) * along - np.sin(angle) * across, np.sin(angle) * along + np.cos(angle) * across]
    return _Found({"train": np.stack(turned, 1)}, {"train": label})


def _torchvision(name: str, root: str | Path | None, download: bool) -> _Found:
    from torchvision import datasets

    directory = Path(user_cache() if root is None else root).expanduser().absolute()
    class_name, splits = _TORCHVISION[name]
    loader = getattr(datasets, class_name)
    if issubclass(loader, datasets.MNIST):
        stems = "emnist-balanced-*" if name == "emnist" else "*"
        for path in sorted((directory / class_name / "raw").glob(f"{stems}-idx?-ubyte*")):
            if path.suffix == ".gz" and path.with_suffix("").exists():
                continue
            _check_idx(path)
            if path.suffix == ".gz":  # torchvision would replace it by a download, unless it is the original
                raise DataError(f"{path}: packed, and torchvision reads unpacked files; run gunzip --keep on it")

    x: dict[str, np.ndarray] = {}
    y: dict[str, np.ndarray] = {}
    for split, arguments in splits.items():
        found = _construct(loader, directory, arguments, name, download)
        if name == "omniglot":
            x[split], y[split] = _pictures(found, name, (28, 28), _omniglot_picture)
            y[split] += 0 if split == "train" else y["train"].max() + 1
        elif name == "celeba":  # forty attributes for each face, and none of them its label
            x[split], _ = _pictures(found, name, (64, 64, 3), _celeba_picture)
        else:
            x[split], y[split] = np.asarray(found.data), np.asarray(found.labels if name == "svhn" else found.targets)
        if name == "emnist":
            x[split] = x[split].swapaxes(1, 2)
    # Of the others the classes are digits and letters, or numbers by themselves.
    classes = tuple(loader.classes) if name == "fashion-mnist" else tuple(found.classes) if name == "cifar10" else None
    return _Found(x, y, classes=classes)


def _construct(loader: Any, directory: Path, arguments: dict[str, Any], name: str, download: bool) -> Any:
    try:
        try:
            return loader(directory, download=False, **arguments)
        except RuntimeError:  # torchvision's word for files that are missing, or damaged
            if not download:
                raise
            return loader(directory, download=True, **arguments)
    except Exception as error:  # a download fails in as many ways as there are networks
        tried = "the download failed" if download else "download is off"
        fetch = "" if download else f", or fetch it with pyrovae.load_data({name!r})"
        raise DataError(
            f"{name}: not found, or damaged, under {directory}, and {tried} ({_one_line(error)}); "
            f"give the directory that holds it with --data-root{fetch}"
        ) from error


def _pictures(
    found: Any, name: str, shape: tuple[int, ...], convert: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Decode torchvision's images one by one: pictures of shape (N, *shape), and their labels."""
    _require_memory(2 * len(found) * math.prod(shape), name)
    pictures, labels = np.empty((len(found), *shape), np.uint8), []
    for index in range(len(found)):
        try:
            image, label = found[index]
            pictures[index] = np.asarray(convert(image))
        except OSError as error:
            raise DataError(f"{name}: image {index} cannot be read ({_one_line(error)}); fetch it again") from error
        labels.append(label)
    return pictures, np.array(labels)


def _omniglot_picture(image: Any) -> Any:
    from PIL import Image, ImageOps

    return ImageOps.invert(image.convert("L").resize((28, 28), Image.Resampling.BOX))


def _celeba_picture(image: Any) -> Any:
    from PIL import Image

    left, top = (image.width - 148) // 2, (image.height - 148) // 2
    square = image.convert("RGB").crop((left, top, left + 148, top + 148))
    return square.resize((64, 64), Image.Resampling.BILINEAR)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if str(source) and os.path.exists(path):
        return path
    if isinstance(source, Path) or path.suffix or len(path.parts) > 1:
        raise DataError(
            f"{_place(source, path)}: no such file or folder; give {_FORMATS}, or one of {', '.join(NAMES)}"
        )
    nearest = difflib.get_close_matches(source.lower().replace("_", "-"), NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"unknown data set {source!r}: {hint}Give one of {', '.join(NAMES)}, or a path to {_FORMATS}")


def _read(path: Path, where: str, stream: str) -> _Found:
    readers: dict[str, Callable[[Path, str], _Found]] = {
        ".npz": _read_npz,
        ".npy": partial(_read_npy, stream=stream),
        ".csv": _read_csv,
    }
    if path.is_dir():
        return _read_folder(path, where)
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"{where}: cannot tell what this is from its extension {path.suffix!r}; give {_FORMATS}")
    try:
        return reader(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({_one_line(error)})") from error


def _read_npy(path: Path, where: str, stream: str) -> _Found:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _npy_header(file, where)
    if header.nbytes != size:
        raise DataError(f"{where}: expected {header.nbytes} bytes by its header, found {size}; save it again")
    streamed = stream == "on" or (stream == "auto" and header.needed > _available_memory())
    if not streamed:
        _require_memory(header.needed, where)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_NPY_HEADER_SIZE)
    except ValueError as error:
        raise DataError(f"{where}: cannot be read ({_one_line(error)}); save it again") from error
    if streamed and rows.ndim > 1 and rows.size:
        if not rows.flags.c_contiguous:
            raise DataError(f"{where}: stored column by column, so rows cannot be read from it; save it in C order")
        held_out = 2 * min(_HELD_OUT, len(rows)) * rows[0].size
        _require_memory(_POSITION * len(rows) + 8 * held_out, where)
    return _Found({"train": rows}, {}, stream=streamed)


def _read_npz(path: Path, where: str) -> _Found:
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # zipfile trusts the numbers of a damaged directory, and fails as each of them makes it
        size = path.stat().st_size
        expected = max(size, _zip_bytes(path))
        raise DataError(
            f"{where}: not a whole .npz archive: expected more than {expected} bytes, found {size} "
            f"({_one_line(error)}); copy or save it again"
        ) from error
    with archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        keys = _npz_keys(set(members), where)
        used = {key: members[key] for pair in keys.values() for key in pair if key in members}
        # All headers first: nothing is allocated for an archive that claims too much.
        _require_memory(sum(_npz_header(archive, info, f"{where}, {key}") for key, info in used.items()), where)
        arrays = {key: _npz_array(archive, info, f"{where}, {key}") for key, info in used.items()}
    unused = sorted(set(members) - set(used))
    notices = (f"{where}: not used: {', '.join(unused)} (used: {', '.join(used)})",) if unused else ()
    x = {split: arrays[key] for split, (key, _) in keys.items()}
    y = {split: arrays[key] for split, (_, key) in keys.items() if key in arrays}
    return _Found(x, y, notices=notices)


def _npz_keys(found: set[str], where: str) -> dict[str, tuple[str, str]]:
    """The keys of rows and labels for each split in the archive."""
    if "x" in found and not any(f"x_{split}" in found for split in SPLITS):
        return {"train": ("x", "y")}
    if "x" not in found and {"x_train", "x_test"} <= found:
        return {split: (f"x_{split}", f"y_{split}") for split in SPLITS if f"x_{split}" in found}
    raise DataError(
        f"{where}: expected either `x`, or `x_train` and `x_test` (and perhaps `x_validation`), "
        f"found {', '.join(sorted(found)) or 'nothing'}"
    )


def _npz_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> int:
    """Check what a member claims against what its archive can hold; return the bytes of memory it needs."""
    with _zip_member(archive, info, where) as stream:
        header = _npy_header(stream, where)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where}: packed in a way that NumPy does not use; save it with np.savez_compressed")
    # Deflate makes at most 1032 bytes of one, so that a small archive cannot claim to hold a large array.
    possible = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else 1032)
    found = min(info.file_size, possible)
    if header.nbytes != info.file_size or header.nbytes > possible:
        raise DataError(f"{where}: expected {header.nbytes} bytes by its header, found {found}; save it again")
    return header.needed + header.nbytes


def _npz_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    with _zip_member(archive, info, where) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False, max_header_size=_NPY_HEADER_SIZE)


@contextmanager
def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Iterator[IO[bytes]]:
    """Open a member, naming it in whatever goes wrong while it is read."""
    try:
        with archive.open(info) as stream:
            yield stream
    except DataError:
        raise
    except Exception as error:  # as where the archive is opened
        raise DataError(f"{where}: damaged inside its archive ({_one_line(error)}); copy or save it again") from error


def _zip_bytes(path: Path) -> int:
    """Where the last member announced by its own header ends: what a zip file cut short held at least."""
    end = 0
    with path.open("rb") as stream:
        while len(head := stream.read(30)) == 30 and head.startswith(b"PK\x03\x04"):
            size, name_length, extra_length = struct.unpack("<18xI4xHH", head)
            stream.seek(name_length, os.SEEK_CUR)
            extra = stream.read(extra_length)
            if size == 0xFFFFFFFF and len(extra) >= 20:  # a zip64 member: id, length, size, compressed size
                size = struct.unpack_from("<12xQ", extra)[0]
            end = stream.tell() + size
            stream.seek(min(end, path.stat().st_size))
    return end


_NPY_HEADER_SIZE = 2**16  # the most that a header of version 1.0 can have


class _NpyHeader(NamedTuple):
    nbytes: int  # of the whole file, by what the header says
    needed: int  # of memory, for the rows in their final type and the copies made on the way


# What np.save writes for an array without fields, its entries in any order. Nothing else is handed to NumPy's parser,
# which evaluates the header and so fails in as many ways as there are expressions.
_NPY_HEADER = re.compile(
    rb"""\{(?:\s*(?:
        'descr'\s*:\s*'(?P<descr>[<>|=]?[?a-zA-Z][0-9]{0,9}(?:\[[0-9a-zA-Z]{1,9}\])?)'
      | 'fortran_order'\s*:\s*(?P<order>True|False)
      | 'shape'\s*:\s*\((?P<shape>\s*(?:(?:SIZE\s*,\s*)+(?:SIZE\s*)?)?)\)
    )\s*(?:,|(?=\}))){3}\s*\}\s*""".replace(rb"\s", rb"[\t\r\n\x20]").replace(b"SIZE", b"(?:0|[1-9][0-9]{0,17})"),
    re.VERBOSE,
)


def _npy_header(stream: IO[bytes], where: str) -> _NpyHeader:
    """Read the header of a .npy file and allocate nothing.

    Only version 1.0 is read: later ones exist for structured types, and may claim a header of 4 GB.
    """

    def refused(reason: str) -> DataError:
        return DataError(f"{where}: not a NumPy array of numbers ({reason}); save it with np.save")

    begin = stream.read(10)
    if begin[:6] != b"\x93NUMPY" or len(begin) < 10:
        raise refused(f"it begins with {begin!r}")
    if begin[6:8] != b"\x01\x00":
        raise refused(f"format version {tuple(begin[6:8])}, of structured arrays")
    length = int.from_bytes(begin[8:10], "little")
    header = stream.read(length)
    found = _NPY_HEADER.fullmatch(header) if len(header) == length else None
    if found is None or None in found.groups():
        raise refused(f"its header is {header[:200].strip()!r}" if len(header) == length else "its header is cut short")
    try:
        dtype = np.dtype(found["descr"].decode())
    except (TypeError, ValueError) as error:
        raise refused(_one_line(error)) from error
    if dtype.hasobject:
        raise DataError(
            f"{where}: an array of Python objects ({dtype}), which is never unpickled; "
            "save numbers, e.g. np.save(path, array.astype(np.float32))"
        )
    shape = tuple(int(size) for size in found["shape"].split(b",") if size.strip())
    # Sizes beside a zero are bounded by no file.
    if not dtype.itemsize or len(shape) > 32 or math.prod(filter(None, shape)) * dtype.itemsize >= 2**63:
        raise refused(f"its header claims {dtype} of shape {shape}"[:200])
    count = math.prod(shape)
    each = {"u1": 1, "b1": 1, "f4": 4}.get(dtype.str[1:], 8)
    return _NpyHeader(stream.tell() + count * dtype.itemsize, count * each)


def _read_csv(path: Path, where: str) -> _Found:
    import pandas

    _require_memory(10 * path.stat().st_size, where)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = next((row for row in csv.reader(stream) if row), [])
        header = None if all(map(_is_number, first)) else 0
        table = pandas.read_csv(path, header=header, encoding="utf-8-sig", low_memory=False)
    except (ValueError, csv.Error) as error:
        reason = "it is empty" if isinstance(error, pandas.errors.EmptyDataError) else _one_line(error)
        raise DataError(f"{where}: not a table of comma-separated numbers ({reason}); save it again") from error
    if table.empty:
        raise DataError(f"{where}: empty, no rows below its header; give at least three rows")
    if not isinstance(table.index, pandas.RangeIndex):
        raise DataError(f"{where}: rows have more fields than the {len(first)} of the header; name every column")

    named = [column for column in table.columns if str(column).strip().lower() in ("y", "label")]
    labels = {column: table.pop(column) for column in named if _are_labels(table[column])}
    if len(labels) > 1:
        raise DataError(f"{where}: two columns of labels, {' and '.join(map(repr, labels))}; keep one")
    for column in table.columns:
        if not pandas.api.types.is_numeric_dtype(table[column]):
            words = table[column][pandas.to_numeric(table[column], errors="coerce").isna() & table[column].notna()]
            value = f": {words.iloc[0]!r} in row {words.index[0]}" if len(words) else ""
            raise DataError(f"{where}: column {column!r} is not numeric{value}; leave it out or encode it")
    rows = table.to_numpy()
    notices = tuple(f"{where}: column {column!r} is read as labels" for column in labels)
    y = dict(zip(["train"], (column.to_numpy() for column in labels.values()), strict=False))
    columns = None if header is None else [str(column) for column in table.columns]
    return _Found({"train": rows}, y, notices=notices, columns=columns)


def _is_number(cell: str) -> bool:
    try:
        return not cell.strip() or float(cell) is not None
    except ValueError:
        return False


def _are_labels(column: Any) -> bool:
    """Names or whole numbers; a column `y` of other numbers is a coordinate."""
    return column.dtype.kind != "f" or bool((column.dropna() % 1 == 0).all())


def _read_folder(path: Path, where: str) -> _Found:
    given = [split for split in SPLITS if (path / split).is_dir()]
    folders = {split: path / split for split in given} if {"train", "test"} <= set(given) else {"train": path}
    files = {split: _image_files(folder) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not files[split]:
            raise DataError(f"{_place(folder, folder)}: a folder without images ({', '.join(sorted(_IMAGES))})")

    shape = _image_shape([file for split in files.values() for file in split])
    _require_memory(2 * sum(map(len, files.values())) * math.prod(shape), where)
    x: dict[str, np.ndarray] = {}
    y: dict[str, np.ndarray] = {}
    for split, folder in folders.items():
        x[split] = np.empty((len(files[split]), *shape), np.uint8)
        for index, file in enumerate(files[split]):
            with _image(file) as image:
                x[split][index] = np.asarray(image.convert("L" if len(shape) == 2 else "RGB"))
        if len(shape) == 3:
            x[split] = np.moveaxis(x[split], 3, 1)
        parts = [file.relative_to(folder).parts for file in files[split]]
        if all(len(part) > 1 for part in parts):
            y[split] = np.array([part[0] for part in parts])
    return _Found(x, y)


def _image_files(folder: Path) -> list[Path]:
    """The images below a folder, but for hidden ones; one of all sorts of files, such as /, is not read through."""
    images: list[Path] = []
    others = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in _IMAGES and not path.name.startswith(".") and path.is_file():
                images.append(path)
            else:
                others += 1
        if others > _OTHERS and others > 10 * len(images):
            raise DataError(f"{_place(folder, folder)}: holds all sorts of files; give a folder of images alone")
    return sorted(images)


def _image_shape(files: Sequence[Path]) -> tuple[int, ...]:
    """The one shape of all images, (H, W) if all are grey, else (H, W, 3), from their headers alone."""
    sizes: dict[tuple[int, int], Path] = {}
    modes = set()
    for file in files:
        with _image(file) as image:
            sizes.setdefault((image.height, image.width), file)
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise DataError(f"{file}: more than 8 bits per pixel (mode {image.mode}); save it as 8-bit, or as .npy")
            modes.add(image.mode)
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise DataError(
            f"{second}: {other[1]}x{other[0]} pixels, but {first} has {one[1]}x{one[0]}; resize all to one size"
        )
    return next(iter(sizes)) + (() if modes <= {"1", "L", "LA"} else (3,))


@contextmanager
def _image(file: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # each of PIL's formats fails in ways of its own
        raise DataError(f"{file}: not a whole image ({_one_line(error)}); remove or replace it") from error


def _check_idx(path: Path) -> None:
    """Compare what the header of an IDX file (packed or not) declares with what the file holds."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4)
            sizes = stream.read(4 * head[3]) if len(head) == 4 else b""
            if head[:3] != b"\0\0\x08" or not sizes or len(sizes) < 4 * head[3]:
                raise DataError(f"{path}: not an IDX file of bytes; remove it and fetch it again")
            expected = 4 + len(sizes) + math.prod(struct.unpack(f">{head[3]}I", sizes))
            found = _packed_bytes(stream, 4 + len(sizes), expected) if path.suffix == ".gz" else path.stat().st_size
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); remove it and fetch it again") from error
    if found != expected:
        raise DataError(f"{path}: expected {expected} bytes by its header, found {found}; remove it and fetch it again")


def _packed_bytes(stream: Any, found: int, expected: int) -> int:
    """Count the bytes that a gzip stream unpacks to, reading on no further than one block beyond what is expected."""
    try:
        while found <= expected and (block := stream.read1(2**16)):
            found += len(block)
    except EOFError:  # cut short
        pass
    return found


# ------------------------------------------------------------------------------------------------ what rows must be


def _check_shape(rows: np.ndarray, where: str) -> None:
    if rows.dtype.kind not in "buif":
        raise DataError(f"{where}: expected numbers, got {rows.dtype}; save them as float32 or uint8")
    if rows.ndim < 2:
        raise DataError(f"{where}: expected rows, shape (N, *event), got shape {rows.shape}; pass x.reshape(-1, 1)")
    if rows.size == 0:
        raise DataError(f"{where}: empty, shape {rows.shape}; give at least three rows")


def _check_agreement(x: dict[str, np.ndarray], where: str) -> None:
    for split, rows in x.items():
        if rows.shape[1:] != x["train"].shape[1:]:
            raise DataError(
                f"{where}: train and {split} differ in event shape, {x['train'].shape[1:]} and {rows.shape[1:]}; "
                "give both the same columns"
            )
        if _of_levels(rows) != _of_levels(x["train"]):
            raise DataError(
                f"{where}: train is {x['train'].dtype} and {split} is {rows.dtype}, "
                "one of them grey levels and the other not; save both in one type"
            )


def _of_levels(rows: np.ndarray) -> bool:
    return rows.dtype in (np.uint8, np.bool_)


def _require_memory(
    needed: int, where: str, remedy: str = "give fewer rows, or save them as one array in .npy"
) -> None:
    available = _available_memory()
    if needed > available:
        raise DataError(
            f"{where}: needs about {needed / 2**30:.3g} GiB of memory, {available / 2**30:.3g} GiB is available; "
            f"{remedy}"
        )


def _available_memory() -> int:
    """Bytes that the machine, and the container around this process, leave."""
    import psutil  # type: ignore[import-untyped]

    available = psutil.virtual_memory().available
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, versions 2 and 1
        with suppress(OSError, ValueError):  # there is none, or it sets no limit
            available = min(available, int(Path("/sys/fs/cgroup", limit).read_text()))
    return available


def _encode(
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
            raise DataError(f"{where}: labels are no text ({_one_line(error)}); save them again") from error
    elif joined.dtype.kind == "f" and not (np.isfinite(joined) & (joined % 1 == 0)).all():
        notices.append(f"{where}: labels are not used: expected whole numbers or names, got other values")
        return {}, None
    ends = np.cumsum([len(labels) for labels in y.values()])[:-1]
    return dict(zip(y, np.split(joined.astype(np.int64), ends), strict=True)), classes


def _split(counts: Mapping[str, int], where: str, notices: list[str]) -> dict[str, Part]:
    """Take validation, and test where none is given, off the end of the training rows in a fixed order."""
    count = counts["train"]
    missing = [split for split in ("validation", "test") if split not in counts]
    tenth = max(1, count // 10)
    held_out = min(_HELD_OUT if "test" in missing else 5000, tenth)
    first = count - held_out * len(missing)
    if count < 2 or first < 1:
        raise DataError(f"{where}: {_count(count, 'row')}, too few for training, validation and test; give more")
    parts = {split: Part(split) for split in counts}
    if not missing:
        return parts
    if "test" in missing and held_out < tenth:
        notices.append(f"{where}: validation and test are {held_out} rows each, not a tenth of {count}")
    order = np.random.default_rng(_SEED["permutation"]).permutation(count)
    positions = np.split(order, [first + held_out * i for i in range(len(missing))])
    return parts | {split: Part("train", at) for split, at in zip(["train", *missing], positions, strict=True)}


# ------------------------------------------------------------------------------------------------------ small things


def _drawn(rows: Tensor | MappedRows, transform: Transform, split: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Transform rows once, with the fixed generator of their split; in blocks, to bound memory."""
    generator = torch.Generator("cpu").manual_seed(_SEED[split])
    drawn = torch.empty(rows.shape, dtype=dtype, device="cpu")
    for start in range(0, len(rows), 1024):
        drawn[start : start + 1024] = transform(rows[start : start + 1024], generator)
    return drawn


def _sha256(tensors: Iterable[Tensor], words: str = "") -> str:
    digest = hashlib.sha256(words.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}{hint}")


def _place(source: str | Path, path: Path) -> str:
    """A path as it was given, and as resolved."""
    resolved = os.path.realpath(path)
    return resolved if str(source) == resolved else f"{source} ({resolved})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
