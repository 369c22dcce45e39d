"""Calibration: how often classes that are said to have a probability are right, over that probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyrovae.plots.style import BLUE, FAINT, INK, new_figure, require_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def reliability(tables: dict[str, DataFrame], title: str | None = None) -> Figure:
    """Draw accuracy over confidence above, and how many rows have each confidence below, a column for each table.

    Args:
        tables: By name, a row for each bin: `low`, `high`, `rows`, `confidence`, `accuracy` and its 95% interval
            `accuracy_low` and `accuracy_high`. Bins without rows are left out.
        title: Above the figure.

    Returns:
        The figure. Calibrated probabilities lie on its diagonal, those that are too sure below it.
    """
    names = ["low", "high", "rows", "confidence", "accuracy", "accuracy_low", "accuracy_high"]
    caption = "Accuracy over confidence max p(y|x); 95% intervals; below the diagonal: too sure"
    figure = new_figure(4.2 * len(tables) + 0.6, 5.2, caption, title)
    panels = figure.subplots(2, len(tables), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (above, below), (name, table) in zip(panels.T, tables.items(), strict=True):
        require_columns(table, "tables", names)
        seen = table[table["rows"] > 0]
        above.plot([0, 1], [0, 1], color=FAINT, lw=1, ls="--")
        errors = [seen["accuracy"] - seen["accuracy_low"], seen["accuracy_high"] - seen["accuracy"]]
        errors = [each.clip(lower=0) for each in errors]
        above.errorbar(seen["confidence"], seen["accuracy"], yerr=errors, fmt="o-", color=BLUE, ms=4, lw=1, capsize=2)
        above.set(xlim=(0, 1), ylim=(0, 1), title=name, ylabel="accuracy")
        below.bar(table["low"], table["rows"], table["high"] - table["low"], align="edge", color=FAINT, edgecolor=INK)
        below.set(xlabel="confidence", ylabel="rows", yscale="symlog")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    return figure
