"""Rows that stay in their file: what does not fit in memory is read when it is used, batch by batch.

A memory map needs no memory of its own: the system keeps of the file what has room. Three things make reading it at
random places as fast as it can be:

- rows are read in the order in which they lie in the file;
- the system is told not to read on around each row (`MADV_RANDOM`): it would fetch megabytes for a row of kilobytes;
- it is told of all rows of a batch, best some batches ahead (`announce`), before the first is touched
  (`POSIX_FADV_WILLNEED`), so that the disk works on them together instead of one after the other.

The file is only read, and has to stay as it is while it is in use. One that is cut short meanwhile ends the process
with the signal SIGBUS, which cannot be caught.
"""

import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**20  # elements that are converted at a time


@dataclass(frozen=True)
class Conversion:
    """From rows of a source to rows that models use: uint8 or float32, images channels first.

    Attributes:
        dtype: torch.uint8 or torch.float32.
        channels: Where images get their channel axis: "first" (they have none), "last" (it is moved), or None.
    """

    dtype: torch.dtype
    channels: str | None = None

    @classmethod
    def of(cls, source: np.ndarray) -> "Conversion":
        """Grey levels stay uint8 and are images from three axes on; everything else becomes float32."""
        if source.dtype not in (np.uint8, np.bool_):
            return cls(torch.float32)
        channels = None
        if source.ndim == 3:
            channels = "first"
        elif source.ndim == 4 and source.shape[1] not in (1, 3, 4) and source.shape[3] in (1, 3, 4):
            channels = "last"
        return cls(torch.uint8, channels)

    def binary(self) -> "Conversion":
        """The same for rows known to be zeros and ones."""
        return replace(self, dtype=torch.uint8)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Convert some rows; the result is contiguous, and may share memory with them."""
        if rows.dtype == np.bool_:
            rows = rows.view(np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever checks the rows names what overflows
            rows = rows.astype(np.uint8 if self.dtype == torch.uint8 else np.float32, copy=False)
        if self.channels is not None:
            rows = rows[:, None] if self.channels == "first" else np.moveaxis(rows, 3, 1)
        return np.ascontiguousarray(rows)

    def event_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a converted row, from that of a row of the source."""
        if self.channels == "first":
            return (1, *shape)
        return (shape[2], *shape[:2]) if self.channels == "last" else shape


class MappedRows:
    """Training rows in a file; a batch is read by indexing, as from a tensor of shape (N, *event).

    Args:
        source: The memory map of a file, row after row in C order.
        positions: Which rows of the file these are, in their order; all if None.
        conversion: From rows of the file to those of this object.
    """

    def __init__(self, source: np.ndarray, positions: np.ndarray | None, conversion: Conversion) -> None:
        if not isinstance(source, np.memmap):
            raise TypeError(
                f"source: expected a memory map, got {type(source).__name__}; use np.load(..., mmap_mode='r')"
            )
        self.source, self.conversion = source, conversion
        self.positions = np.arange(len(source)) if positions is None else positions
        self.dtype = conversion.dtype
        self.shape = torch.Size((len(self.positions), *conversion.event_shape(source.shape[1:])))
        self.ndim = len(self.shape)
        advise(source, "MADV_RANDOM")
        self._descriptor: int | None = None
        if hasattr(os, "posix_fadvise"):
            self._descriptor = os.open(str(source.filename), os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """A copy of some rows, in memory: contiguous, and writable without the file being changed."""
        if not isinstance(index, Tensor | slice):
            raise TypeError(f"rows of a file are indexed by a tensor or a slice, got {type(index).__name__}")
        positions = self.positions[index if isinstance(index, slice) else index.numpy(force=True)]
        return _gathered(self.source, positions, self.conversion, self._announce)

    def announce(self, index: Tensor) -> None:
        """Let the system begin to read rows that will be indexed soon."""
        self._announce(np.sort(self.positions[index.numpy(force=True)]))

    def __repr__(self) -> str:
        return f"MappedRows({str(self.source.filename)!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def _announce(self, positions: np.ndarray) -> None:
        if self._descriptor is None:
            return
        size = self.source[0].nbytes
        # Not `mmap.madvise`: it holds the interpreter's lock, and so the training loop, while requests are queued.
        for start in (positions * size + self.source.offset).tolist():
            os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)


def read(source: np.ndarray, positions: np.ndarray | None, conversion: Conversion) -> Tensor:
    """Converted rows at some positions of an array or map, in memory; all of them if None."""
    if positions is None:
        positions = np.arange(len(source))
    if isinstance(source, np.memmap) and source.flags.c_contiguous and 2 * len(positions) < len(source):
        return MappedRows(source, positions, conversion)[:]  # few among many: the gaps need not be read
    return _gathered(source, positions, conversion)


def _gathered(
    source: np.ndarray,
    positions: np.ndarray,
    conversion: Conversion,
    announce: Callable[[np.ndarray], None] | None = None,
) -> Tensor:
    """Read rows in the order of the source, block by block, and put each in its place."""
    shape = (len(positions), *conversion.event_shape(source.shape[1:]))
    rows = torch.empty(shape, dtype=conversion.dtype, device="cpu")
    filled = rows.numpy()
    places = np.argsort(positions, kind="stable")
    for block in blocks(shape):
        at = places[block]
        if announce is not None:
            announce(positions[at])
        filled[at] = conversion(source[positions[at]])
    return rows


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of an array, of bounded size whatever the type of its elements."""
    step = max(1, _BLOCK // math.prod(shape[1:]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def advise(source: np.ndarray, advice: str) -> None:
    """Tell the system how a map is about to be read, where there is a way to say it."""
    if isinstance(source, np.memmap) and isinstance(source.base, mmap.mmap) and hasattr(mmap, advice):
        source.base.madvise(getattr(mmap, advice))
