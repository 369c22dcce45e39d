"""Files and folders of the user's own: which reader reads which, tables, folders of images, and IDX files.

    .npz, .npy      `pyrovae.data.arrays`
    .csv            numbers, with or without a header; a column named `y` or `label` holds the labels; or columns of
                    several kinds, see `tables`
    a folder        8-bit images of one size; subfolders `train` and `test` (and `validation`) are the splits, others
                    the labels
    IDX             the files behind torchvision's data sets of handwriting, compared with their headers before use

A file is a stranger's: whatever is wrong with it ends in one line that names the file and the place in it, never in a
traceback of the library that reads it.
"""

import csv
import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae.columns import GUESSED, Column, parse
from pyrovae.data.arrays import read_npy, read_npz
from pyrovae.data.found import SPLITS, Found, in_short, require_memory, shown_path
from pyrovae.data.tables import numbers_as, numbers_of
from pyrovae.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas

FORMATS = ".npz, .npy, .csv, or a folder of images"
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
OTHERS = 10_000  # files without pixels in a folder of images


def read_path(path: Path, where: str, stream: str, columns: "str | Sequence[Column] | None" = None) -> Found:
    """What a file or folder holds.

    Args:
        path: Of the file or folder, which exists.
        where: It in words, for messages.
        stream: Whether training rows stay in the file: "auto", "on" or "off".
        columns: Kinds of the columns of a table, or "auto"; or columns that are known, with their classes; None: all
            are numbers of one kind.

    Raises:
        DataError: its kind is unknown, or it is damaged, not of numbers, or too large for the memory.
    """
    readers: dict[str, Callable[[Path, str], Found]] = {
        ".npz": read_npz,
        ".npy": partial(read_npy, stream=stream),
        ".csv": partial(_read_csv, columns=columns),
    }
    if columns is not None and path.suffix.lower() != ".csv":
        raise UsageError(f"columns: is for a .csv, got {where}; leave it out", settings=("columns",))
    if path.is_dir():
        return _read_folder(path, where)
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"{where}: cannot tell what this is from its extension {path.suffix!r}; give {FORMATS}")
    try:
        return reader(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({in_short(error)})") from error


def _read_csv(path: Path, where: str, columns: "str | Sequence[Column] | None" = None) -> Found:
    """A table, see `read_frame`. Its first line is a header unless all its cells are numbers."""
    import pandas

    require_memory(10 * path.stat().st_size, where)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = next((row for row in csv.reader(stream) if row), [])
        header = None if all(map(_is_number, first)) else 0
        table = pandas.read_csv(path, header=header, encoding="utf-8-sig", low_memory=False)
    except (ValueError, OverflowError, csv.Error) as error:
        reason = "it is empty" if isinstance(error, pandas.errors.EmptyDataError) else in_short(error)
        raise DataError(f"{where}: not a table of comma-separated numbers ({reason}); save it again") from error
    if table.empty:
        raise DataError(f"{where}: empty, no rows below its header; give at least three rows")
    if not isinstance(table.index, pandas.RangeIndex):
        raise DataError(f"{where}: rows have more fields than the {len(first)} of the header; name every column")
    if columns is not None and header is None:
        raise DataError(f"{where}: has no header, and columns of several kinds need names; add a first line of them")
    found = read_frame(table, where, columns)
    return found if header is not None else found._replace(columns=None)


def read_frame(table: "pandas.DataFrame", where: str, columns: "str | Sequence[Column] | None" = None) -> Found:
    """What a data frame holds; a column `y` or `label` of names or whole numbers is labels, unless `columns` has it.

    Args:
        table: The frame; its index is not looked at.
        where: It in words, for messages.
        columns: As for `read_path`.

    Raises:
        DataError: a column is not of its kind.
    """
    import pandas

    known = columns if columns is not None and not isinstance(columns, str) else ()
    said = known or (parse(columns) if isinstance(columns, str) and columns != GUESSED else ())
    table = table.reset_index(drop=True).infer_objects()  # numbers beside empty cells may be objects
    named = [column for column in table.columns if str(column).strip().lower() in ("y", "label")]
    named = [column for column in named if str(column).strip() not in [of.name for of in said]]
    labels = {column: table.pop(column) for column in named if _are_labels(table[column])}
    if len(labels) > 1:
        raise DataError(f"{where}: two columns of labels, {' and '.join(map(repr, labels))}; keep one")
    notices = tuple(f"{where}: column {column!r} is read as labels" for column in labels)
    y = dict(zip(["train"], (column.to_numpy() for column in labels.values()), strict=False))
    if known:
        return Found(
            {"train": numbers_as(table, known, where)}, y, None, notices, [of.name for of in known], table=(*known,)
        )
    if isinstance(columns, str):
        values, kinds, guesses = numbers_of(table, columns, where)
        names = [column.name for column in kinds]
        return Found({"train": values}, y, None, notices=(*notices, *guesses), columns=names, table=kinds)
    for column in table.columns:
        if not pandas.api.types.is_numeric_dtype(table[column]):
            # As words: a whole number may be larger than any float.
            numbers = pandas.to_numeric(table[column].astype(str), errors="coerce")
            words = table[column][numbers.isna() & table[column].notna()]
            value = f": {words.iloc[0]!r} in row {words.index[0]}" if len(words) else ""
            raise DataError(
                f"{where}: column {column!r} is not numeric{value}; leave it out or encode it, or say that columns "
                "are of several kinds: `columns=auto`",
                settings=("columns=auto",),
            )
    names = [str(column) for column in table.columns]
    return Found({"train": table.to_numpy()}, y, notices=notices, columns=names)


def _is_number(cell: str) -> bool:
    """Whether a cell holds a number, or nothing."""
    try:
        return not cell.strip() or float(cell) is not None
    except ValueError:
        return False


def _are_labels(column: Any) -> bool:
    """Names or whole numbers; a column `y` of other numbers is a coordinate."""
    return column.dtype.kind != "f" or bool((column.dropna() % 1 == 0).all())


def _read_folder(path: Path, where: str) -> Found:
    """Images in the order of their paths, with the first subfolder on the way to each as its label."""
    given = [split for split in SPLITS if (path / split).is_dir()]
    folders = {split: path / split for split in given} if {"train", "test"} <= set(given) else {"train": path}
    files = {split: _image_files(folder) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not files[split]:
            raise DataError(f"{shown_path(folder, folder)}: a folder without images ({', '.join(sorted(IMAGES))})")

    shape = _image_shape([file for split in files.values() for file in split])
    require_memory(2 * sum(map(len, files.values())) * math.prod(shape), where)
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
    return Found(x, y)


def _image_files(folder: Path) -> list[Path]:
    """The images below a folder, but for hidden ones; one of all sorts of files, such as /, is not read through."""
    images: list[Path] = []
    others = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file():
                images.append(path)
            else:
                others += 1
        if others > OTHERS and others > 10 * len(images):
            raise DataError(f"{shown_path(folder, folder)}: holds all sorts of files; give a folder of images alone")
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
    """An opened image; whatever goes wrong while it is read names the file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # each of PIL's formats fails in ways of its own
        raise DataError(f"{file}: not a whole image ({in_short(error)}); remove or replace it") from error


def check_idx(path: Path) -> None:
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
        raise DataError(f"{path}: cannot be read ({in_short(error)}); remove it and fetch it again") from error
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
