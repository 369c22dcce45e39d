"""The measure: what a reported log p(x) is, and so which numbers may stand in one column."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What a reported log p(x) is: a mass or a density, of what, on which space.

    Attributes:
        kind: The name of the space that the rows are in: "mass", on {0,1}^D, "density", or that of another mass.
        description: The space in words, for tables.
        levels: Number of grey levels L if the rows are levels, or dequantised ones; else None.
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
        if self.kind != "density":
            return bits
        return None if self.levels is None else bits + math.log2(self.levels)
