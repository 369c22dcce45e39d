"""NumPy's files, .npy and .npz: nothing is allocated or unpacked before their headers agree with their sizes.

A .npy file is a header, a Python literal that says type, order and shape, and then the numbers. A .npz file is a zip
archive of such files. Both may be damaged, cut short, or made to claim terabytes, so each claim is compared with what
is known before it is believed:

- the bytes that the header's shape and type make, with the bytes of the file, or of the archive's member;
- of a member, with what its packed bytes can unpack to: deflate makes at most 1032 bytes of one;
- the memory that all arrays need together, with what is available.

Python objects are never unpickled, since unpickling runs what the file says.
"""

import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from pyrovae.data.found import HELD_OUT, SPLITS, Found, available_memory, in_short, require_memory, shown_path
from pyrovae.errors import DataError

POSITION = 16  # bytes of memory for each row that stays in its file: its place, and room to draw it


def read_npy(path: Path, where: str, stream: str) -> Found:
    """The rows of a .npy file, as a memory map; they are read from it once the splits are known, or stay in it.

    Labels are those of NAME.labels.npy beside NAME.npy, where there is one.

    Raises:
        DataError: its header is not one, or does not agree with its size; or there is too little memory.
    """
    header = _whole_npy(path, where)
    streamed = stream == "on" or (stream == "auto" and header.needed > available_memory())
    if not streamed:
        require_memory(header.needed, where)
    rows = _mapped(path, where)
    if streamed and rows.ndim > 1 and rows.size:
        if not rows.flags.c_contiguous:
            raise DataError(f"{where}: stored column by column, so rows cannot be read from it; save it in C order")
        held_out = 2 * min(HELD_OUT, len(rows)) * rows[0].size
        require_memory(POSITION * len(rows) + 8 * held_out, where)
    beside = path.with_suffix(".labels.npy")
    if not beside.is_file():
        return Found({"train": rows}, {}, stream=streamed)
    its_place = shown_path(beside, beside)
    require_memory(_whole_npy(beside, its_place).needed, its_place)
    labels = np.array(_mapped(beside, its_place))
    return Found(
        {"train": rows}, {"train": labels}, notices=(f"{where}: labels are read from {beside}",), stream=streamed
    )


def _whole_npy(path: Path, where: str) -> "_NpyHeader":
    """The header of a .npy file that is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _npy_header(file, where)
    if header.nbytes != size:
        raise DataError(f"{where}: expected {header.nbytes} bytes by its header, found {size}; save it again")
    return header


def _mapped(path: Path, where: str) -> np.ndarray:
    """The memory map of a .npy file whose header was checked."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=LARGEST_HEADER)
    except ValueError as error:
        raise DataError(f"{where}: cannot be read ({in_short(error)}); save it again") from error


def read_npz(path: Path, where: str) -> Found:
    """Rows and labels of a .npz archive: `x` and `y`, or `x_train`, `y_train` and so on.

    Raises:
        DataError: it is no archive, or damaged; it lacks those keys; or there is too little memory.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # zipfile trusts the numbers of a damaged directory, and fails as each of them makes it
        size = path.stat().st_size
        expected = max(size, _zip_bytes(path))
        raise DataError(
            f"{where}: not a whole .npz archive: expected more than {expected} bytes, found {size} "
            f"({in_short(error)}); copy or save it again"
        ) from error
    with archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        keys = _npz_keys(set(members), where)
        used = {key: members[key] for pair in keys.values() for key in pair if key in members}
        # All headers first: nothing is allocated for an archive that claims too much.
        require_memory(sum(_npz_header(archive, info, f"{where}, {key}") for key, info in used.items()), where)
        arrays = {key: _npz_array(archive, info, f"{where}, {key}") for key, info in used.items()}
    unused = sorted(set(members) - set(used))
    notices = (f"{where}: not used: {', '.join(unused)} (used: {', '.join(used)})",) if unused else ()
    x = {split: arrays[key] for split, (key, _) in keys.items()}
    y = {split: arrays[key] for split, (_, key) in keys.items() if key in arrays}
    return Found(x, y, notices=notices)


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
    """A member whose header was checked, unpacked."""
    with _zip_member(archive, info, where) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False, max_header_size=LARGEST_HEADER)


@contextmanager
def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Iterator[IO[bytes]]:
    """Open a member, naming it in whatever goes wrong while it is read."""
    try:
        with archive.open(info) as stream:
            yield stream
    except DataError:
        raise
    except Exception as error:  # as where the archive is opened
        raise DataError(f"{where}: damaged inside its archive ({in_short(error)}); copy or save it again") from error


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


LARGEST_HEADER = 2**16  # the most that a header of version 1.0 can have


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
        raise refused(in_short(error)) from error
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
