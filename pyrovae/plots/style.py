"""What every figure shares: colours, how data are drawn, how numbers are written.

Colours are told apart by the colour-blind (Okabe and Ito's, and three more for classes); markers and dashes repeat
them for grey print.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyrovae.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from pandas import DataFrame

Numbers = Tensor | np.ndarray | Sequence[float]

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
INK, FAINT = "#000000", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, SKY, INK, PURPLE, "#999933", "#882255", FAINT)
MARKERS = ("o", "^", "s")  # 3 shapes beside 10 colours: no pair comes twice in 30 classes
SEQUENTIAL = "cividis"  # its lightness is monotone: the order survives grey print
Z95 = 1.96  # standard errors in half a 95% interval


@dataclass(frozen=True)
class Style:
    """How data are drawn, where their shape does not say it.

    Args:
        ink: Grey images as dark ink on white paper, the upper limit being black; else as a photograph, it being white.
        limits: The values drawn darkest and brightest (with `ink`, brightest and darkest); values beyond are clipped.
        columns: Names of the elements of vectors, D of them.
        unit: Of the elements of vectors, such as "standardised"; it follows their names.
    """

    ink: bool = False
    limits: tuple[float, float] = (0.0, 1.0)
    columns: Sequence[str] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.limits[0] < self.limits[1]:
            raise UsageError(f"limits: expected the lower value first, got {self.limits}")

    def axis(self, name: str) -> str:
        """A label with the unit."""
        return f"{name}, {self.unit}" if self.unit else name

    def names(self, count: int) -> list[str] | None:
        """The names of so many columns, if there are any."""
        if self.columns is not None and len(self.columns) != count:
            raise UsageError(f"columns: expected {count} names, one for each element of x, got {len(self.columns)}")
        return None if self.columns is None else [str(name) for name in self.columns]


PLAIN = Style()


def new_figure(width: float, height: float, caption: str, title: str | None) -> Figure:
    """Make a figure, in inches, that shows itself in a notebook."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(caption if title is None else f"{title}\n{caption}", fontsize=11, wrap=True)
    # A notebook shows a Figure only once pyplot is imported; this method, which IPython looks for, needs no pyplot.
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def scatter(axes: Axes, points: np.ndarray, **style: Any) -> PathCollection:
    return axes.scatter(points[:, 0], points[:, 1], **style)


def dot_area(count: int) -> float:
    """Area of a dot, in points squared: smaller for more."""
    return float(np.clip(16000 / count, 4, 25))


def with_error(value: float, error: float) -> str:
    if not (np.isfinite(value) and np.isfinite(error)):
        return in_nats(value)
    digits = 3 if 0 < error < 0.1 else 2
    return f"{value:,.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def in_nats(value: float) -> str:
    """Write nats with a real minus sign, and more digits for less."""
    if np.isnan(value):
        return "not a number"
    if np.isinf(value):
        return "−∞" if value < 0 else "∞"
    digits = 1 if abs(value) >= 1000 else 2 if abs(value) >= 0.1 or value == 0 else 3
    return f"{value:,.{digits}f}".replace("-", "−")


def as_array(values: Numbers) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def require_columns(table: DataFrame, argument: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing or not len(table):
        got = f"columns {list(table.columns)}" if missing else "no row"
        raise UsageError(f"{argument}: expected the columns {list(names)} and at least one row, got {got}; add them")
