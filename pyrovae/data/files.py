"""Files and folders of the user's own: which reader reads which, tables, folders of images, and IDX files.

    .npz, .npy      `pyrovae.data.arrays`
    .csv            numbers, with or without a header; a column named `y` or `label` holds the labels
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
from typing import Any

import numpy as np

from pyrovae.data.arrays import read_npy, read_npz
from pyrovae.data.found import SPLITS, Found, in_short, require_memory, shown_path
from pyrovae.errors import DataError

FORMATS = ".npz, .npy, .csv, or a folder of images"
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
OTHERS = 10_000  # files without pixels in a folder of images


def read_path(path: Path, where: str, stream: str) -> Found:
    """What a file or folder holds.

    Args:
        path: Of the file or folder, which exists.
        where: It in words, for messages.
        stream: Whether training rows stay in the file: "auto", "on" or "off".

    Raises:
        DataError: its kind is unknown, or it is damaged, not of numbers, or too large for the memory.
    """
    readers: dict[str, Callable[[Path, str], Found]] = {
        ".npz": read_npz,
        ".npy": partial(read_npy, stream=stream),
        ".csv": _read_csv,
    }
    if path.is_dir():
        return _read_folder(path, where)
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"{where}: cannot tell what this is from its extension {path.suffix!r}; give {FORMATS}")
    try:
        return reader(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({in_short(error)})") from error


def _read_csv(path: Path, where: str) -> Found:
    """A table. Its first line is a header unless all its cells are numbers."""
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

    named = [column for column in table.columns if str(column).strip().lower() in ("y", "label")]
    labels = {column: table.pop(column) for column in named if _are_labels(table[column])}
    if len(labels) > 1:
        raise DataError(f"{where}: two columns of labels, {' and '.join(map(repr, labels))}; keep one")
    for column in table.columns:
        if not pandas.api.types.is_numeric_dtype(table[column]):
            # As words: a whole number may be larger than any float.
            numbers = pandas.to_numeric(table[column].astype(str), errors="coerce")
            words = table[column][numbers.isna() & table[column].notna()]
            value = f": {words.iloc[0]!r} in row {words.index[0]}" if len(words) else ""
            raise DataError(f"{where}: column {column!r} is not numeric{value}; leave it out or encode it")
    rows = table.to_numpy()
    notices = tuple(f"{where}: column {column!r} is read as labels" for column in labels)
    y = dict(zip(["train"], (column.to_numpy() for column in labels.values()), strict=False))
    columns = None if header is None else [str(column) for column in table.columns]
    return Found({"train": rows}, y, notices=notices, columns=columns)


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
