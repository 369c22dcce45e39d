"""Estimators of gradients side by side: signal to noise, and variance, over the number of particles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyrovae.plots.style import MARKERS, PALETTE, new_figure, require_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def gradient_noise(table: DataFrame, title: str | None = None) -> Figure:
    """Draw signal to noise above and variance below, a column for the model's and one for the guide's parameters.

    Args:
        table: A row for each estimator, K and side: `gradient`, `K`, `parameters`, `snr` and `variance`, each with its
            `_low` and `_high`, and `why_biased`, "" for an estimator without a bias, whose markers are full.
        title: Above the figure.

    Returns:
        The figure. A value of 0, where draws show no signal, is not on its logarithmic axis.
    """
    kinds = {"snr": "signal to noise", "variance": "variance"}
    names = [name + end for name in kinds for end in ("", "_low", "_high")]
    require_columns(table, "table", ["gradient", "K", "parameters", "why_biased", *names])
    parts = list(dict.fromkeys(table["parameters"]))
    caption = "95% intervals over draws; hollow where the estimator is biased"
    figure = new_figure(5 * len(parts) + 2.4, 7, caption, title)
    panels = figure.subplots(2, len(parts), squeeze=False, sharex=True)
    every = sorted(set(table["K"]))
    for row, (name, label) in zip(panels, kinds.items(), strict=True):
        for axes, part in zip(row, parts, strict=True):
            for i, (word, found) in enumerate(table[table["parameters"] == part].groupby("gradient", sort=False)):
                at = found["K"] * 1.03 ** (i - 3)  # beside one another
                errors = [
                    (found[name] - found[f"{name}_low"]).clip(lower=0),
                    (found[f"{name}_high"] - found[name]).clip(0),
                ]
                colour, hollow = PALETTE[i % len(PALETTE)], bool((found["why_biased"] != "").any())
                style = {"color": colour, "marker": MARKERS[i % 3], "markerfacecolor": "white" if hollow else colour}
                axes.errorbar(at, found[name], yerr=errors, capsize=2, markersize=5, lw=1, label=word, **style)
            axes.set(xscale="log", yscale="log", ylabel=f"{label}, {part}")
            axes.set_xticks(every, [str(k) for k in every])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("particles K")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure
