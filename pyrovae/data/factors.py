"""Factors: what rows were made from, where that is known, such as the place and the size of what a picture shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrovae.data.summary import Part


@dataclass(frozen=True)
class Factor:
    """One factor, of so many values.

    Attributes:
        name: Such as "scale".
        values: Names of its values 0, 1, ...
        ordered: Whether the values are in order, as places are and colours are not.
    """

    name: str
    values: tuple[str, ...] = field(repr=False)
    ordered: bool = True


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of all rows.

    Attributes:
        each: The factors, F of them.
        values: The number of each row's value of each factor, int64, shape (N, F), by split.
    """

    each: tuple[Factor, ...]
    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(factor.name for factor in self.each)

    def split(self, parts: Mapping[str, Part]) -> "Factors":
        """Those of each split, which is a part of what the source holds."""
        values = {
            split: self.values[part.source]
            if part.positions is None
            else self.values[part.source][torch.from_numpy(part.positions)]
            for split, part in parts.items()
        }
        return Factors(self.each, values)
