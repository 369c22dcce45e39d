"""Raw rows: what a source holds, split and summed up, before it is brought into the space of a likelihood."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrovae.columns import Column
from pyrovae.data.factors import Factors
from pyrovae.data.streaming import MappedRows
from pyrovae.data.summary import Moments


@dataclass(frozen=True, eq=False)
class Raw:
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
        table: The columns of a table of several kinds; None of all else.
        missing: Whether NaN stands for what is missing.
        factors: What rows were made from, where that is known; else None.
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
    table: tuple[Column, ...] | None = None
    missing: bool = False
    factors: Factors | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.train.shape[1:])

    @property
    def binary(self) -> bool:
        """Whether all values are 0 or 1."""
        return self.levels is None and self.train.dtype == torch.uint8
