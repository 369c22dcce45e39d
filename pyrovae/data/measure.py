"""The measure: what a reported log p(x) is, and so which numbers may stand in one column."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """What a reported log p(x) is: a mass or a density, of what, on which space.

    Attributes:
        kind: The name of the space that the rows are in: "mass", on {0,1}^D, "density", "levels", or that of another.
        description: The space in words, for tables.
        levels: Number of grey levels L if the rows are levels, or dequantised ones; else None.
        dimensions: D, the number of elements of one event.
        coded: Whether points of the space can be coded, so that there are bits; not where it has a density, as in part
            columns of several kinds have, nor of rows with gaps, each of which has dimensions of its own.
    """

    kind: str
    description: str
    levels: int | None
    dimensions: int
    coded: bool = field(default=True, repr=False)

    def bits_per_dimension(self, nats: float) -> float | None:
        """Bits per dimension from a mean log p(x) in nats, the cost of coding x; None for a density in its own units.

        Those of a density of dequantised levels are an upper bound of the cost under the mass that it gives to levels.

        >>> Measure("mass", "mass on {0,1}^2", None, 2).bits_per_dimension(-2 * math.log(2))
        1.0
        """
        if not self.coded:
            return None
        bits = -nats / (self.dimensions * math.log(2))
        if self.kind == "density":
            return None if self.levels is None else bits + math.log2(self.levels)
        return bits
