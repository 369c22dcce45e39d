r"""Named sources: one entry of `SOURCES` for each data set, with everything that is known of it.

`digits` comes with scikit-learn; the toys in the plane are drawn, always the same; all others are read by torchvision.
A new data set is a new entry. Nothing heavy is imported before a source is read: `--help` lists them.

A source may have settings, which are written after its name: `sprites:side=32,scales=4`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pyrovae.errors import DataError, UsageError
from pyrovae.settings import Count, Whole, close, kind_of, read

if TYPE_CHECKING:
    import numpy as np

    from pyrovae.data.found import Found

PLANE_ROWS = 5000
SURFACE_ROWS = 10_000
DOCUMENTS, WORDS, BOARD = 2000, 100, 5  # documents, words of each, and squares of a board's side
SEQUENCES, SHORTEST, LONGEST = 3000, 10, 30  # sequences, and their least and most steps
WIDTH = 32  # of the hidden layer that bends a surface


@dataclass(frozen=True)
class Source(ABC):
    """A data set with a name.

    Attributes:
        name: What users call it; in any case, with `-` or `_`.
        kind: What it is one of, in a list of sources.
        downloaded: Whether it is fetched to a directory of data sets.
        handwriting: Whether it is bright strokes on black, which pictures show as ink on paper.
        settings: Fields that a user may set.
    """

    kind: ClassVar[str]
    downloaded: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()
    name: str
    handwriting: bool = field(default=False, kw_only=True)

    @property
    def typed(self) -> str:
        """What users type, with its settings."""
        return self.name + (":" + ",".join(f"{name}=..." for name in self.settings) if self.settings else "")

    @abstractmethod
    def read(self, root: Path, download: bool) -> "Found":
        """Its rows and labels; those that are downloaded are under `root`, and put there if `download` says so.

        Raises:
            DataError: missing, or damaged.
        """

    def having(self, words: str) -> "Source":
        """The same with some settings, as "side=32,scales=4".

        Raises:
            UsageError: one that it does not have, is given twice, or of a value that it cannot have.
        """
        kinds = {field.name: kind_of(field.type) for field in fields(self) if field.name in self.settings}
        values: dict[str, Any] = {}
        for word in words.split(","):
            name, equals, value = (part.strip() for part in word.partition("="))
            kind = kinds.get(name)
            if kind is None or not equals or name in values:
                what = (
                    "is given twice" if name in values else f"expected {', '.join(f'{n}=...' for n in self.settings)}"
                )
                near = close(name, self.settings) if kind is None else None
                what = what if self.settings else "it has no settings"
                hint = f"; did you mean {near}?" if near else ""
                raise UsageError(f"data={self.name}: {word.strip()!r}: {what}{hint}", settings=(f"data={self.name}",))
            values[name] = read(f"data={self.name}, {name}", value, kind)
        return replace(self, **values)


@dataclass(frozen=True)
class Digits(Source):
    """The 1797 handwritten digits of scikit-learn: 8x8 pixels of 17 levels."""

    kind = "8x8, embedded"

    def read(self, root: Path, download: bool) -> "Found":
        from sklearn.datasets import load_digits

        from pyrovae.data.found import Found

        digits = load_digits()
        return Found({"train": digits.images.astype("uint8")}, {"train": digits.target}, levels=17)


@dataclass(frozen=True)
class Plane(Source):
    """Rows drawn in the plane.

    Attributes:
        draw: From a generator and standard normal noise, shape (PLANE_ROWS, 2), to rows and labels (None: it has none).
    """

    kind = "toys in the plane"
    draw: "Callable[[np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray | None]]"

    def read(self, root: Path, download: bool) -> "Found":
        import numpy as np

        from pyrovae.data.found import SEED, Found

        random = np.random.default_rng(SEED["plane"])
        x, labels = self.draw(random, random.standard_normal((PLANE_ROWS, 2)))
        return Found({"train": x}, {} if labels is None else {"train": labels})


def _three_gaussians(random: "np.random.Generator", noise: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Uniform weights, sd 1/2, centres on the circle of radius 2."""
    import numpy as np

    label = random.integers(3, size=PLANE_ROWS)
    angle = np.pi / 2 + 2 * np.pi * label / 3
    centre = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centre + noise / 2, label


def _ring(random: "np.random.Generator", noise: "np.ndarray") -> "tuple[np.ndarray, None]":
    """A standard normal variable pushed to the unit circle."""
    import numpy as np

    return noise / 10 + noise / np.linalg.norm(noise, axis=1, keepdims=True), None


def _pinwheel(random: "np.random.Generator", noise: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Five arms, sd 0.3 along and 0.05 across, turned by exp(radius) / 4."""
    import numpy as np

    label = random.integers(5, size=PLANE_ROWS)
    along, across = 1 + 0.3 * noise[:, 0], 0.05 * noise[:, 1]
    angle = 2 * np.pi * label / 5 + np.exp(along) / 4
    turned = [np.cos(angle) * along - np.sin(angle) * across, np.sin(angle) * along + np.cos(angle) * across]
    return np.stack(turned, 1), label


@dataclass(frozen=True)
class Manifold(Source):
    r"""Rows on a curved surface without noise, so that they have no density in the space around it.

        x = W_2 tanh(W_1 z + b) / sqrt(WIDTH),        z = label / 2 + e / 8,  label in {-1, 1}^inner,  e ~ N(0, I)

    with weights of a network drawn once, from N(0, 1) but for W_1, of variance 4 / inner. Rows lie in 2^inner patches
    of the surface, one for each label: where the surface is, and how rows are spread on it, are two things to find.

    Attributes:
        inner: r, the dimension of the surface.
        outer: d, that of the rows.
    """

    kind = "on a surface of r dimensions in d"
    inner: int
    outer: int

    def read(self, root: Path, download: bool) -> "Found":
        import numpy as np

        from pyrovae.data.found import SEED, Found

        random = np.random.default_rng(SEED["manifold"])
        first = random.standard_normal((self.inner, WIDTH)) * 2 / np.sqrt(self.inner)
        bias, second = random.standard_normal(WIDTH), random.standard_normal((WIDTH, self.outer))
        sides = random.integers(2, size=(SURFACE_ROWS, self.inner))
        z = sides - 0.5 + random.standard_normal(sides.shape) / 8
        x = np.tanh(z @ first + bias) @ second / np.sqrt(WIDTH)
        return Found({"train": x}, {"train": sides @ 2 ** np.arange(self.inner)})


@dataclass(frozen=True)
class Oscillator(Source):
    r"""Noisy damped oscillations of unequal length, a linear-Gaussian state-space model, NaN after the last step.

        z_1 = e_1        z_t = a R z_{t-1} + sqrt(1 - a^2) e_t        x_t = W z_t + noise e'_t

    with R a turn by a twelfth of a circle, so that every z_t is N(0, I_2), and W of three rows, drawn once from
    N(0, 1). A length is 10 to 30, any of them as likely. Its log p(x) is that of a Kalman filter.

    Attributes:
        damping: a.
        noise: Standard deviation of what is observed.
    """

    kind = "sequences, NaN after their end"
    damping: float = 0.95
    noise: float = 0.3

    def read(self, root: Path, download: bool) -> "Found":
        import numpy as np

        from pyrovae.data.found import SEED, Found

        random = np.random.default_rng(SEED["oscillator"])
        turn, weight = self.parameters()
        z = random.standard_normal((SEQUENCES, 2))
        states = [z]
        for _ in range(1, LONGEST):
            z = self.damping * z @ turn.T + np.sqrt(1 - self.damping**2) * random.standard_normal(z.shape)
            states.append(z)
        x = np.stack(states, 1) @ weight.T + self.noise * random.standard_normal((SEQUENCES, LONGEST, len(weight)))
        length = random.integers(SHORTEST, LONGEST + 1, size=(SEQUENCES, 1))
        x[np.arange(LONGEST) >= length] = np.nan
        return Found({"train": x}, {})

    def parameters(self) -> "tuple[np.ndarray, np.ndarray]":
        """R, shape (2, 2), and W, shape (3, 2)."""
        import numpy as np

        from pyrovae.data.found import SEED

        angle = np.pi / 6
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return turn, np.random.default_rng([SEED["oscillator"], 1]).standard_normal((3, 2))


@dataclass(frozen=True)
class Sprites(Source):
    """Pictures of one shape each, drawn from factors that are known; see `pyrovae.data.sprites`.

    The grid has colours x 3 shapes x scales x angles x positions x positions pictures; a factor of one value is none.

    Attributes:
        side: Of a picture, in pixels.
        rows: Of so many, drawn from the grid without replacement; all of it, where it has no more.
        scales: How many sizes there are.
        angles: How many angles.
        positions: How many places along x, and as many along y; half the side unless given.
        colours: How many colours, in three channels; with a single one there is one channel.
    """

    kind = "drawn, of known factors"
    settings = ("side", "rows", "scales", "angles", "positions", "colours")
    side: Annotated[int, Whole(8, 256)] = 64
    rows: Count = 20_000
    scales: Count = 6
    angles: Count = 40
    positions: Count | None = None
    colours: Annotated[int, Whole(1, 7)] = 1

    def read(self, root: Path, download: bool) -> "Found":
        import numpy as np
        import torch

        from pyrovae.data.factors import Factor, Factors
        from pyrovae.data.found import Found, require_memory
        from pyrovae.data.sprites import PALETTE, SHAPES, chosen, coloured, draw

        places = self.positions or self.side // 2
        sizes = (self.colours, len(SHAPES), self.scales, self.angles, places, places)
        size, channels = math.prod(sizes), 1 if self.colours == 1 else 3
        needed = 24 * size + min(size, self.rows) * self.side**2 * (1 + channels)
        require_memory(needed, f"{self.name}, {min(size, self.rows)} rows of {size}", "ask for fewer (rows=...)")
        values = np.stack(np.unravel_index(chosen(size, self.rows), sizes), 1)
        pictures = draw(values[:, 1:], sizes[1:], self.side)
        if channels > 1:
            pictures = coloured(pictures, values[:, 0])
        named = {
            "colour": tuple(PALETTE)[: self.colours],
            "shape": SHAPES,
            "scale": _evenly(1 / 2, 1, self.scales),
            "angle": tuple(f"{360 * i / self.angles:g}" for i in range(self.angles)),
            "x": _evenly(0, 1, places),
            "y": _evenly(0, 1, places),
        }
        kept = [i for i, count in enumerate(sizes) if count > 1]
        factors = [Factor(name, names, name not in ("colour", "shape")) for name, names in named.items()]
        of_rows = torch.from_numpy(np.ascontiguousarray(values[:, kept]))
        return Found(
            {"train": pictures},
            {"train": values[:, 1]},
            classes=SHAPES,
            factors=Factors(tuple(factors[i] for i in kept), {"train": of_rows}),
        )


def _evenly(low: float, high: float, count: int) -> tuple[str, ...]:
    """Names of so many values from the one to the other; of one, the higher."""
    return tuple(f"{high if count == 1 else low + (high - low) * i / (count - 1):.3g}" for i in range(count))


@dataclass(frozen=True)
class Bars(Source):
    """Documents of 100 words of 25 kinds, the squares of a 5x5 board, drawn from ten topics.

    A topic is a row or a column of the board, its five words as likely; each document has shares of the topics of its
    own, from a Dirichlet distribution of concentration 1/2.

    References:
        Griffiths and Steyvers 2004, Finding Scientific Topics, PNAS 101
    """

    kind = "counts of words of documents"

    def read(self, root: Path, download: bool) -> "Found":
        import numpy as np

        from pyrovae.data.found import SEED, Found

        random = np.random.default_rng(SEED["bars"])
        shares = random.dirichlet(np.full(2 * BOARD, 0.5), DOCUMENTS)
        counts = random.multinomial(WORDS, shares @ self.topics())
        names = [f"r{row}c{column}" for row in range(1, BOARD + 1) for column in range(1, BOARD + 1)]
        return Found({"train": counts.astype("float32")}, {}, columns=names)

    def topics(self) -> "np.ndarray":
        """Their distributions over words, shape (10, 25)."""
        import numpy as np

        rows = np.kron(np.eye(BOARD), np.ones(BOARD))
        columns = np.kron(np.ones(BOARD), np.eye(BOARD))
        return np.concatenate([rows, columns]) / BOARD


def _arrays(found: Any, name: str) -> "tuple[np.ndarray, np.ndarray]":
    """Rows and labels of a torchvision data set that has them as arrays."""
    import numpy as np

    return np.asarray(found.data), np.asarray(found.targets)


def _upright(found: Any, name: str) -> "tuple[np.ndarray, np.ndarray]":
    """EMNIST is stored with rows and columns exchanged."""
    rows, labels = _arrays(found, name)
    return rows.swapaxes(1, 2), labels


def _svhn(found: Any, name: str) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np

    return np.asarray(found.data), np.asarray(found.labels)


def _omniglot(found: Any, name: str) -> "tuple[np.ndarray, np.ndarray]":
    """28x28, strokes bright."""
    from PIL import Image, ImageOps

    def convert(image: Any) -> Any:
        return ImageOps.invert(image.convert("L").resize((28, 28), Image.Resampling.BOX))

    return _pictures(found, name, (28, 28), convert)


def _celeba(found: Any, name: str) -> "tuple[np.ndarray, None]":
    """The central 148x148 pixels at 64x64; forty attributes for each face, and none of them its label."""
    from PIL import Image

    def convert(image: Any) -> Any:
        left, top = (image.width - 148) // 2, (image.height - 148) // 2
        square = image.convert("RGB").crop((left, top, left + 148, top + 148))
        return square.resize((64, 64), Image.Resampling.BILINEAR)

    return _pictures(found, name, (64, 64, 3), convert)[0], None


def _pictures(
    found: Any, name: str, shape: tuple[int, ...], convert: Callable[[Any], Any]
) -> "tuple[np.ndarray, np.ndarray]":
    """Decode torchvision's images one by one: pictures of shape (N, *shape), and their labels."""
    import numpy as np

    from pyrovae.data.found import in_short, require_memory

    require_memory(2 * len(found) * math.prod(shape), name)
    pictures, labels = np.empty((len(found), *shape), np.uint8), []
    for index in range(len(found)):
        try:
            image, label = found[index]
            pictures[index] = np.asarray(convert(image))
        except OSError as error:
            raise DataError(f"{name}: image {index} cannot be read ({in_short(error)}); fetch it again") from error
        labels.append(label)
    return pictures, np.array(labels)


_BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_BALANCED = {"train": {"train": True, "split": "balanced"}, "test": {"train": False, "split": "balanced"}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_BACKGROUND = {"train": {"background": True}, "test": {"background": False}}
_FACES = {split: {"split": split[:5], "target_type": []} for split in ("train", "validation", "test")}  # its "valid"


@dataclass(frozen=True)
class Torchvision(Source):
    """A data set that torchvision fetches and reads.

    Attributes:
        loader: torchvision's class.
        splits: Arguments of that class for each split it has.
        unpack: From an object of that class, and the name for messages, to rows and labels (None: it has none).
        idx: Its IDX files, as a pattern of names without their ends; they are checked before they are read.
        named: Whether its labels have names that say more than the numbers do.
        other_labels: Whether the labels of test stand for other things than those of train, and are counted on.
    """

    kind = "by torchvision"
    downloaded = True
    loader: str
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _BY_TRAIN)
    unpack: "Callable[[Any, str], tuple[np.ndarray, np.ndarray | None]]" = _arrays
    idx: str | None = None
    named: bool = field(default=False, kw_only=True)
    other_labels: bool = field(default=False, kw_only=True)

    def read(self, root: Path, download: bool) -> "Found":
        from pyrovae.data.found import Found

        if self.idx is not None:
            self._check_files(root / self.loader / "raw")
        x: dict[str, np.ndarray] = {}
        y: dict[str, np.ndarray] = {}
        classes = None
        for split, arguments in self.splits.items():
            found = self._construct(root, arguments, download)
            x[split], labels = self.unpack(found, self.name)
            if labels is not None:
                y[split] = labels + (y["train"].max() + 1 if self.other_labels and split != "train" else 0)
            classes = tuple(found.classes) if self.named else None
        return Found(x, y, classes=classes)

    def _check_files(self, folder: Path) -> None:
        from pyrovae.data.files import check_idx

        for path in sorted(folder.glob(f"{self.idx}-idx?-ubyte*")):
            if path.suffix == ".gz" and path.with_suffix("").exists():
                continue
            check_idx(path)
            if path.suffix == ".gz":  # torchvision would replace it by a download, unless it is the original
                raise DataError(f"{path}: packed, and torchvision reads unpacked files; run gunzip --keep on it")

    def _construct(self, root: Path, arguments: Mapping[str, Any], download: bool) -> Any:
        from torchvision import datasets

        from pyrovae.data.found import in_short

        loader = getattr(datasets, self.loader)
        try:
            try:
                return loader(root, download=False, **arguments)
            except RuntimeError:  # torchvision's word for files that are missing, or damaged
                if not download:
                    raise
                return loader(root, download=True, **arguments)
        except Exception as error:  # a download fails in as many ways as there are networks
            tried = "the download failed" if download else "download is off"
            fetch = "" if download else f", or fetch it with pyrovae.load_data({self.name!r})"
            raise DataError(
                f"{self.name}: not found, or damaged, under {root}, and {tried} ({in_short(error)}); "
                f"give the directory that holds it{fetch}",
                settings=("data_root",),
            ) from error


SOURCES: tuple[Source, ...] = (
    Digits("digits", handwriting=True),
    Torchvision("mnist", "MNIST", idx="*", handwriting=True),
    Torchvision("fashion-mnist", "FashionMNIST", idx="*", named=True),
    Torchvision("kmnist", "KMNIST", idx="*", handwriting=True),
    Torchvision("emnist", "EMNIST", _BALANCED, _upright, idx="emnist-balanced-*", handwriting=True),
    Torchvision("omniglot", "Omniglot", _BACKGROUND, _omniglot, other_labels=True, handwriting=True),
    Torchvision("cifar10", "CIFAR10", named=True),
    Torchvision("svhn", "SVHN", _BY_SPLIT, _svhn),
    Torchvision("celeba", "CelebA", _FACES, _celeba),
    Plane("three-gaussians", _three_gaussians),
    Plane("ring", _ring),
    Plane("pinwheel", _pinwheel),
    Manifold("manifold-2-in-20", 2, 20),
    Manifold("manifold-3-in-20", 3, 20),
    Oscillator("oscillator"),
    Sprites("sprites"),
    Bars("bars"),
)
NAMES: tuple[str, ...] = tuple(source.name for source in SOURCES)


def find_source(name: object) -> Source | None:
    """The source of that name, in any case and with `-` or `_`, with the settings after it; None if there is none.

    Raises:
        UsageError: there is, and it has no such settings.
    """
    word, colon, settings = name.partition(":") if isinstance(name, str) else ("", "", "")
    wanted = word.lower().replace("_", "-")
    source = next((source for source in SOURCES if source.name == wanted), None)
    return source.having(settings) if source is not None and colon else source
