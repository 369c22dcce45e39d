"""Which dimension of a code tells which factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyrovae.errors import UsageError
from pyrovae.plots.style import SEQUENTIAL, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def information(tables: Mapping[str, np.ndarray], factors: Sequence[str], title: str | None = None) -> Figure:
    """Draw the mutual information of codes and factors, a panel for each model.

    Args:
        tables: I(z_d; v_f) / H(v_f) by the name of a model, shape (Z, F), from 0 to 1.
        factors: Names of the F factors.
        title: Above the figure.

    Raises:
        UsageError: there is no table, or one has another number of columns.
    """
    if not tables or any(table.ndim != 2 or table.shape[1] != len(factors) for table in tables.values()):
        raise UsageError(f"tables: expected at least one of {len(factors)} columns, as factors; give the matrices")
    across = min(len(tables), 4)
    down = -(-len(tables) // across)
    most = max(len(table) for table in tables.values())
    caption = "mutual information of each dimension and factor, as a share of the factor's entropy"
    figure = new_figure(max(6.4, 2.6 * across + 1), down * (0.28 * most + 1.2) + 0.6, caption, title)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, table) in zip(panels, tables.items(), strict=False):
        image = axes.imshow(table, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(range(len(factors)), factors, rotation=45, ha="right")
        axes.set_yticks(range(len(table)), [f"z[{d}]" for d in range(len(table))], fontsize="small")
        for (d, f), value in np.ndenumerate(table):
            colour = "white" if value < 0.5 else "black"
            axes.text(f, d, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    for axes in panels[len(tables) :]:
        axes.axis("off")
    figure.colorbar(image, ax=panels.tolist(), label="I(z; v) / H(v)", shrink=0.8)
    return figure
