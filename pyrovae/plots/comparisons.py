"""Models side by side: log p(x) of each, the bound over K, and where the bound is lost."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae.errors import UsageError
from pyrovae.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    VERMILLION,
    Z95,
    Numbers,
    as_array,
    in_nats,
    new_figure,
    require_columns,
    scatter,
    with_error,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Colour, marker and name of an estimate: one that may be far too low points to where log p(x) is.
VERDICT_MARKS = {
    "exact": (INK, "D", "exact"),
    "ok": (BLUE, "o", "ok: a tight lower bound"),
    "unchecked": (BLUE, ">", "unchecked: a lower bound, not tried on simulated data"),
    "importance-sampled": (BLUE, "o", "importance-sampled"),
    "lower bound only": (VERMILLION, ">", "lower bound only: log p(x) may be far higher"),
    "invalid": (FAINT, "x", "invalid"),
}
# Before a difference to the highest number, by what it is of the difference of log p(x).
SIGNS = {"": "", "at least": "≥ ", "at most": "≤ ", "open": "? "}


def k_curve(
    ks: Numbers,
    mean: Numbers,
    error: Numbers,
    elbo: float | None = None,
    exact: float | None = None,
    title: str | None = None,
    paired_error: Numbers | None = None,
) -> Figure:
    """Draw the bound L_K over K, with a 95% band: how much is gained by more particles.

    The band is of each point by itself: other rows would move all of them together. How certain the rise is, is shown
    by a second panel, where the same rows are compared with themselves.

    Args:
        ks: The numbers of particles, S of them, each at least 1.
        mean: L_K, mean nats per datum, shape (S,).
        error: Standard error of `mean`, nats, shape (S,); the band is 1.96 of it either way.
        elbo: Mean ELBO, drawn as a dashed line.
        exact: Mean exact log p(x), drawn as a solid line.
        title: First line of the title.
        paired_error: Standard error of the mean of L_K less the L_K of the largest K, row by row, shape (S,). Without
            it there is no second panel.
    Raises:
        UsageError: the lengths differ, or a K is below 1.
    """
    k, bound, half, paired = _checked_curve(ks, mean, error, paired_error)
    order = np.argsort(k)
    k, bound, half = k[order], bound[order], half[order]
    panels = 1 if paired_error is None else 2
    figure = new_figure(6.4 if panels == 1 else 10.5, 4.4, r"Importance-weighted bound $L_K$ over K", title)
    axes = figure.add_subplot(1, panels, 1, ylabel="nats per datum")
    band: dict[str, Any] = {"color": BLUE, "alpha": 0.25, "linewidth": 0}
    axes.fill_between(k, bound - half, bound + half, label="95% interval over rows", **band)
    axes.plot(k, bound, "o-", color=BLUE, markersize=4, label=rf"$L_K$, at K = {k[-1]:,.0f}: {in_nats(bound[-1])}")
    if elbo is not None:
        axes.axhline(float(elbo), color=ORANGE, linestyle="--", label=f"ELBO: {in_nats(elbo)}")
    if exact is not None:
        axes.axhline(float(exact), color=INK, label=f"exact log p(x): {in_nats(exact)}")
    if paired_error is not None:
        rise = figure.add_subplot(1, panels, 2, ylabel="nats per datum")
        rise.set_title(rf"$L_K$ less that of K = {k[-1]:,.0f}, on the same rows", fontsize="medium")
        interval: dict[str, Any] = {"fmt": "o-", "color": VERMILLION, "markersize": 4, "capsize": 3}
        rise.errorbar(k, bound - bound[-1], yerr=paired[order], label="95% interval of the difference", **interval)
        rise.axhline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    position = np.log(k)
    for panel in figure.axes:
        panel.set_xscale("log")
        if len(k) > 1 and np.diff(position).min() > np.ptp(position) / 14:  # else their numbers would run together
            panel.set_xticks(k)
            panel.minorticks_off()
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel("particles K")
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _checked_curve(ks: Numbers, mean: Numbers, error: Numbers, paired_error: Numbers | None) -> list[np.ndarray]:
    """K, the bound, and half of its interval and of its paired interval; refuses lengths that differ."""
    k, bound, half = as_array(ks), as_array(mean), Z95 * as_array(error)
    paired = Z95 * as_array([] if paired_error is None else paired_error)
    if not (k.ndim == 1 and len(k) and k.shape == bound.shape == half.shape):
        raise UsageError(
            f"ks, mean, error: expected one length, got shapes {k.shape}, {bound.shape}, {half.shape}; "
            "pass a mean and an error for each K"
        )
    if paired_error is not None and paired.shape != k.shape:
        raise UsageError(f"paired_error: expected shape {k.shape}, as ks, got {paired.shape}; pass one for each K")
    if k.min() < 1:
        raise UsageError(f"ks: expected numbers of particles of at least 1, got {k.min():g}; remove it")
    return [k, bound, half, paired]


def comparison(table: DataFrame, title: str | None = None) -> Figure:
    """Draw models by log p(x), the best on top: exact values, estimates and mere lower bounds each in their own way.

    A model so far below the others that it would press them together is drawn as an arrow at the left edge; its
    number still stands at the right.

    Args:
        table: One row per model: `name`; `log_marginal`, mean nats per datum; `error`, its standard error over data;
            `exact`, whether log p(x) is exact rather than importance-sampled; and, where known, `elbo`, the ends `low`
            and `high` of a 95% interval, `rank_low` and `rank_high`, the paired `difference` to the best with
            `difference_low`, `difference_high` and `difference_bound` (a key of `SIGNS`), `verdict` as in
            `pyrovae.inference.verdict`, `seeds`, how many runs are pooled in the row, with the `spread` of their means
            and the means themselves, `seed_means`. A model of rank 1 for certain is bold; without ranks, the highest
            number is.
        title: First line of the title, for example the data and K.
    Raises:
        UsageError: a column is missing, or there is no row.
    """
    require_columns(table, "table", ["name", "log_marginal", "error", "exact"])
    table = table.sort_values("log_marginal", ascending=False, na_position="last", kind="stable")

    judged = "verdict" in table.columns
    exact = np.asarray(table["exact"], dtype=bool)
    kinds = np.asarray(table["verdict"]) if judged else np.where(exact, "exact", "importance-sampled")
    names = [textwrap.fill(str(name), 30) for name in table["name"]]
    heights = np.array([max(0.36, 0.18 * (name.count("\n") + 1.4)) for name in names])  # inches
    rows = np.cumsum(heights) - heights / 2

    caption = "log p(x) with 95% intervals, higher is better"
    figure = new_figure(12.6 if judged else 8.2, heights.sum() + 1.7, caption, title)
    axes = figure.add_subplot(ylim=(heights.sum(), 0), xlabel="log p(x), nats per datum")
    handles = _draw_models(axes, rows, table, kinds)
    _write_beside(axes, rows, _columns_beside(table, kinds), kinds, best=_is_best(table))
    for row, height in zip(rows, heights, strict=True):
        axes.axhline(row + height / 2, color="0.92", linewidth=0.8, zorder=0)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=7)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "left", "right"]].set_visible(False)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def _numbers(table: DataFrame, column: str) -> np.ndarray:
    """A column as numbers, shape (rows,): NaN where the table does not have it."""
    return np.asarray(table[column].astype(float)) if column in table.columns else np.full(len(table), np.nan)


def _is_best(table: DataFrame) -> np.ndarray:
    """Which models are drawn bold: of rank 1 for certain, or without ranks the highest."""
    if "rank_low" in table.columns:
        return _numbers(table, "rank_high") == 1
    value = _numbers(table, "log_marginal")
    return value == value[0]


def _draw_models(axes: Axes, rows: np.ndarray, table: DataFrame, kinds: np.ndarray) -> list[Any]:
    """Draw each model's interval, seeds and ELBO in its row; returns what the legend names."""
    value, error, elbo = (_numbers(table, name) for name in ("log_marginal", "error", "elbo"))
    half = np.where(np.isfinite(error), Z95 * error, 0.0)  # an unknown error draws no interval
    with np.errstate(invalid="ignore"):  # infinities
        low, high = (
            _numbers(table, name) if name in table.columns else value + sign * half
            for name, sign in (("low", -1), ("high", 1))
        )
        ends = np.stack([value - low, high - value])
    ends = np.where(np.isfinite(ends), ends, 0.0).clip(min=0)
    seeds = [list(m) if len(m) > 1 else [] for m in table["seed_means"]] if "seed_means" in table.columns else []
    reach = ends.max(0)
    for i, means in enumerate(seeds):
        reach[i] = max([reach[i], *(abs(mean - value[i]) for mean in means)])
    left, right, drawn = _on_scale(value, reach, elbo)
    axes.set_xlim(left, right)

    handles: list[Any] = []
    for kind, (colour, marker, label) in VERDICT_MARKS.items():
        here = drawn & (kinds == kind)
        if here.any():
            intervals = axes.errorbar(value[here], rows[here], xerr=ends[:, here], fmt=marker, color=colour)
            intervals.lines[0].set(markersize=7, zorder=3)
            intervals.lines[2][0].set(linewidth=2)
            intervals.set_label(label)
            handles.append(intervals)
    of_seeds = [(mean, rows[i] + 0.12) for i, means in enumerate(seeds) if drawn[i] for mean in means]
    if of_seeds:
        style: dict[str, Any] = {"color": INK, "s": 7, "linewidths": 0, "zorder": 3}
        handles.append(scatter(axes, np.array(of_seeds), label="one seed", **style))
    with_elbo = drawn & np.isfinite(elbo)
    if with_elbo.any():
        # The line to the estimate is the gap; it runs to the edge where the ELBO is off the axis.
        gap: dict[str, Any] = {"color": FAINT, "linewidth": 0.8, "linestyle": ":"}
        axes.hlines(rows[with_elbo], elbo[with_elbo], value[with_elbo], **gap)
        hollow = {"facecolors": "white", "edgecolors": "0.35", "s": 34}
        handles.append(scatter(axes, np.stack([elbo, rows], 1)[with_elbo], label="ELBO", zorder=2, **hollow))
    beyond = ~drawn & (value < left)
    if beyond.any():
        edge = np.full(beyond.sum(), left + 0.015 * (right - left))
        handles += axes.plot(edge, rows[beyond], "<", color=FAINT, markersize=9, label="off the axis")
    return handles


def _columns_beside(table: DataFrame, kinds: np.ndarray) -> dict[str, list[str]]:
    """What is written beside each row, by its heading."""
    value, error = _numbers(table, "log_marginal"), _numbers(table, "error")
    exact, judged = np.asarray(table["exact"], dtype=bool), "verdict" in table.columns
    bounds = [
        "≥ " if judged and not sure and np.isfinite(mean) else "" for sure, mean in zip(exact, value, strict=True)
    ]
    columns = {"± standard error": [b + with_error(*pair) for b, *pair in zip(bounds, value, error, strict=True)]}
    if "rank_low" in table.columns:
        ranks = zip(_numbers(table, "rank_low"), _numbers(table, "rank_high"), strict=True)
        columns["rank"] = ["–".join(f"{r:g}" for r in sorted(set(ends)) if np.isfinite(r)) for ends in ranks]
    if "difference_low" in table.columns:
        parts = zip(*(_numbers(table, f"difference{end}") for end in ("", "_low", "_high")), strict=True)
        signs = [SIGNS[kind] for kind in table["difference_bound"]] if "difference_bound" in table.columns else []
        differences = [
            f"{sign}{in_nats(d)} [{in_nats(a)}, {in_nats(b)}]" if np.isfinite(d) else ""
            for (d, a, b), sign in zip(parts, signs or [""] * len(table), strict=True)
        ]
        columns["to the best, 95% interval"] = ["best" if _is_best(table)[0] else "highest", *differences[1:]]
    if "seeds" in table.columns:
        columns["seeds"] = [
            f"{n}, sd {sd:.2g}" if np.isfinite(sd) else f"{n}"
            for n, sd in zip(table["seeds"], _numbers(table, "spread"), strict=True)
        ]
    if judged:
        columns["verdict"] = list(kinds)
    return columns


def _write_beside(
    axes: Axes, rows: np.ndarray, columns: dict[str, list[str]], kinds: np.ndarray, best: np.ndarray
) -> None:
    """Write the columns at the right of the axes, the best models bold and the verdicts in their colour."""
    beside = axes.get_yaxis_transform()  # x in widths of the axes, y in data
    place: dict[str, Any] = {"xycoords": beside, "textcoords": "offset points", "annotation_clip": False}
    offset = 10.0  # points
    for heading, cells in columns.items():
        for row, cell, first, kind in zip(rows, cells, best, kinds, strict=True):
            weight = "bold" if first and heading != "verdict" else "normal"
            colour = VERDICT_MARKS[kind][0] if heading == "verdict" and kind in VERDICT_MARKS else INK
            axes.annotate(cell, (1, row), (offset, 0), va="center", weight=weight, color=colour, **place)
        axes.annotate(heading, (1, 0), (offset, 0), va="bottom", fontsize="small", color="0.35", **place)
        offset += 6.2 * max(map(len, [heading, *cells])) + 12


def _on_scale(value: np.ndarray, reach: np.ndarray, elbo: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Choose the limits of a comparison, and which models lie within; `value` descends, its marks `reach` so far.

    The axis ends before the first model that is 20 times as far from the best as the one above it (or as its marks
    reach), once two models and half of all are on it: below that a difference could not be seen.
    """
    finite = np.isfinite(value)
    count = int(finite.sum())
    if count == 0:
        return 0.0, 1.0, finite
    finite_value, reach = value[finite], reach[finite]
    gap = finite_value[0] - finite_value
    shown = count
    for i in range(max(2, -(-count // 2)), count):
        if gap[i] > 20 * max(gap[i - 1], reach[:i].max()) > 0:
            shown = i
            break
    low = (finite_value - reach)[:shown].min()
    high = (finite_value + reach)[:shown].max()
    near = elbo[finite][:shown]
    near = near[near > low - 3 * (high - low)]  # NaN compares as false
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) or 1.0
    drawn = finite.copy()
    drawn[np.flatnonzero(finite)[shown:]] = False
    return low - margin, high + margin, drawn


def gaps(table: DataFrame, elbo: float, dimensions: DataFrame | None = None, title: str | None = None) -> Figure:
    """Draw the way from the ELBO up to log p(x), and what each latent dimension is used for.

    Args:
        table: The parts of log p(x) - ELBO from the ELBO upwards: `name`; `gap`, mean nats per datum; `error`, its
            standard error over data.
        elbo: Where they start, mean nats per datum.
        dimensions: One row per latent dimension: `kl`, mean nats per datum; `variance` of E[z|x].
        title: First line of the title.
    Raises:
        UsageError: a column is missing, or there is no row.
    """
    require_columns(table, "table", ["name", "gap", "error"])
    gap, error = (np.asarray(table[name], dtype=float) for name in ("gap", "error"))
    ends = elbo + np.cumsum(gap)
    starts = np.concatenate([[elbo], ends[:-1]])
    rows = np.arange(len(gap))
    columns = 1 if dimensions is None else 2
    height = max(3.4, 0.7 * len(gap) + 1.6) + 0.6 * (columns - 1)  # with room for a legend below
    figure = new_figure(6.2 * columns, height, "Where the bound is lost", title)
    axes = figure.add_subplot(1, columns, 1, ylim=(len(gap) - 0.4, -0.6), xlabel="nats per datum")
    colours = [ORANGE, *[BLUE] * (len(gap) - 2), GREEN][: len(gap)]
    axes.barh(rows, gap, left=starts, height=0.55, color=colours)
    above = axes.get_xaxis_transform()  # x in data, y in heights of the axes
    for value, label, side in ((elbo, "ELBO", "left"), (ends[-1], "log p(x)", "right")):
        axes.axvline(value, color=INK, linewidth=0.8, linestyle="--" if label == "ELBO" else "-", zorder=0)
        axes.text(value, 1.02, f"{label} {in_nats(value)}", transform=above, ha=side, va="bottom")
    beside = axes.get_yaxis_transform()
    for row, (mean, spread) in enumerate(zip(gap, error, strict=True)):
        axes.text(1.03, row, with_error(mean, spread), transform=beside, va="center")
    axes.text(1.03, -0.6, "± standard error", transform=beside, va="bottom", fontsize="small", color="0.35")
    axes.set_yticks(rows, [str(name) for name in table["name"]])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "left", "right"]].set_visible(False)
    if dimensions is not None:
        _draw_units(figure.add_subplot(1, columns, 2), dimensions)
    return figure


def _draw_units(axes: Axes, dimensions: DataFrame) -> None:
    """Draw the KL of each latent dimension, the largest first, by whether E[z|x] varies."""
    require_columns(dimensions, "dimensions", ["kl", "variance"])
    table = dimensions.sort_values("kl", ascending=False, na_position="last", kind="stable")
    kl, variance = (np.asarray(table[name], dtype=float) for name in ("kl", "variance"))
    floor = 1e-4  # shorter bars would not be seen on a logarithmic axis
    for shown, colour, label in (
        (variance > 0.01, BLUE, "variance of E[z|x] over 0.01"),
        (~(variance > 0.01), FAINT, "variance of E[z|x] below"),
    ):
        at = np.flatnonzero(shown)
        if len(at):
            axes.bar(at + 1, np.maximum(kl[at], floor), width=0.8, color=colour, label=f"{label}: {len(at)}")
    axes.axhline(0.01, color=VERMILLION, linestyle=":", label=f"0.01 nat: {int((kl > 0.01).sum())} above")
    axes.set(yscale="log", xlim=(0, len(kl) + 1), xlabel="latent dimension, by its KL", ylabel="nats per datum")
    axes.set_ylim(bottom=floor)
    axes.set_title("KL(q(z|x) || p(z)) of each dimension", fontsize="medium")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3, axis="y")
    # Outside: bars that are nearly as high as the first leave no room within.
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, fontsize="small", loc="outside lower right")
