"""How training went: bounds, their parts, KL per dimension, active units and schedules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae.errors import UsageError
from pyrovae.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    SKY,
    VERMILLION,
    Numbers,
    as_array,
    in_nats,
    new_figure,
    require_columns,
)
from pyrovae.quality import QUALITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


CODES = ("codes_used", "code_perplexity")  # of a codebook, over each epoch
ADVERSARIES = ("critic_loss", "adversary_loss")  # what others than the pair minimise: 2 log 2 where they know nothing


def training_curves(metrics: DataFrame, title: str | None = None) -> Figure:
    """Draw how training went: bounds, their parts, KL per layer and dimension, active units and schedules.

    A column that is absent or holds no finite value leaves its panel or line out. The vertical limits of the bounds
    and the reconstruction leave out epochs so low, as the first often are, that they would flatten the rest; a note
    says how many.

    Args:
        metrics: One row per epoch. `epoch`, and any of `train_bound`, `validation_bound` (its maximum is marked; that
            of `train_bound` where there is no validation), `validation_elbo`, `reconstruction`, `kl`, of several
            layers `kl_<site>`, and `kl_<site>[<dimension>]` in nats per datum; `active_units` and
            `active_units_<site>`; `beta`, drawn unless always 1; `learning_rate`, drawn if it changes; `critic_loss`
            and `adversary_loss`, in nats; `reconstruction_sse`, `reconstruction_psnr` and `reconstruction_ssim`, each
            with an axis of its own.
        title: First line of the title, for example the model, K and the data.
    Raises:
        UsageError: there is no `epoch`, no row, or nothing to draw.
    """
    require_columns(metrics, "metrics", ["epoch"])
    epoch, columns = np.asarray(metrics["epoch"], dtype=float), _drawable(metrics)
    dimensions = [name for name in columns if re.fullmatch(r"kl_.+\[\d+\]", name)]
    bounds = [name for name in ("train_bound", "validation_bound", "validation_elbo") if name in columns]

    stacks: list[list[str]] = [
        ["bounds"] if bounds else [],
        [name for name in ("reconstruction", "kl") if name in columns],
        [name for name in ("active_units", "beta", "learning_rate", *CODES, *ADVERSARIES) if name in columns],
    ]
    stacks = [stack for stack in stacks if stack]
    quality = [q.column for q in QUALITIES if q.column in columns]
    if not stacks and not dimensions and not quality:
        raise UsageError("metrics: expected a column of finite values beside 'epoch', got none; train an epoch first")
    # On a grid of 6 by 6 the stacks share the width and the panels of a stack share its height, whatever is there.
    layout = [
        [stack[row * len(stack) // 6] for stack in stacks for _ in range(6 // len(stacks))]
        for row in range(6 if stacks else 0)
    ]
    layers = sorted(name.removeprefix("kl_") for name in columns if name.startswith("kl_") and name[-1] != "]")
    layout += [["kl by layer"] * 3 + ["units by layer"] * 3] * (5 if layers else 0)
    layout += [["heatmap"] * 4 + ["last"] * 2] * (6 if dimensions else 0)
    layout += [[name for name in quality for _ in range(6 // len(quality))] for _ in range(4) if quality]

    height = 3.7 * (bool(stacks) + bool(dimensions)) + 3.1 * bool(layers) + 2.5 * bool(quality) + 0.6
    caption = "Training; bounds, reconstruction and KL in nats per datum"
    caption += "; SSE, PSNR and SSIM of validation rows, no likelihoods" if quality else ""
    figure = new_figure(11, height, caption, title)
    panels: dict[str, Axes] = figure.subplot_mosaic(layout)  # type: ignore[arg-type]
    if bounds:
        _draw_bounds(panels["bounds"], epoch, {name: columns[name] for name in bounds})
    _draw_parts(panels, epoch, columns)
    for stack in stacks:
        for name in stack:
            _integer_ticks(panels[name])
            panels[name].grid(alpha=0.3)
            panels[name].tick_params(labelbottom=name == stack[-1])
        panels[stack[-1]].set_xlabel("epoch")
    _draw_quality(panels, epoch, columns)
    if layers:
        _draw_layers(panels["kl by layer"], epoch, {site: columns[f"kl_{site}"] for site in layers})
        units = {site: columns[name] for site in layers if (name := f"active_units_{site}") in columns}
        _draw_layers(panels["units by layer"], epoch, units)
        panels["kl by layer"].set_title("KL of each layer, given those above", fontsize="medium")
        panels["kl by layer"].set_ylabel("nats per datum")
        panels["units by layer"].set_title("active units of each layer", fontsize="medium")
    if dimensions:
        kl = {name.removeprefix("kl_"): columns[name] for name in dimensions}
        _draw_kl_per_dimension(panels["heatmap"], panels["last"], epoch, kl)
    return figure


def step_curve(steps: Numbers, values: Numbers, label: str, title: str | None = None, window: int = 50) -> Figure:
    """Draw a measurement of every training step, as noisy as a batch is small, and its running mean.

    Steps that are so far above the others that they would flatten them, as where a training fails for a while, are
    above the axis; a note says how many and how far.

    Args:
        steps: Numbers of the steps, shape (S,); they may leave some out.
        values: What was measured at each, shape (S,).
        label: What it is, with its unit.
        title: First line of the title.
        window: How many measurements on either side are averaged with each; towards both ends, as many as there are.
    Raises:
        UsageError: there is nothing to draw, or not one value for each step.
    """
    at, measured = as_array(steps), as_array(values)
    if at.shape != measured.shape or at.ndim != 1 or not len(at):
        raise UsageError(f"values: expected one for each of at least one step, got {measured.shape} for {at.shape}")
    place = np.arange(len(at))
    half = np.minimum(window, np.minimum(place, place[::-1]))  # as many before as after, else the ends would be bent
    sums = np.concatenate([[0.0], measured.cumsum()])
    mean = (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)
    figure = new_figure(8, 4, f"{label}, of the batch of each step", title)
    axes = figure.add_subplot(xlabel="step", ylabel=label)
    axes.plot(at, measured, color=SKY, linewidth=0.5, alpha=0.7, label="one batch")
    axes.plot(at, mean, color=INK, linewidth=1.5, label=f"mean of {2 * half.max() + 1}")
    low, usual = measured.min(), np.quantile(measured, 0.99)
    high = low + 1.5 * (usual - low)
    if (above := int((measured > high).sum())) and low < high:
        axes.set_ylim(low - 0.05 * (high - low), high)
        noun = "step" if above == 1 else "steps"
        axes.set_title(f"{above:,} {noun} above the axis, up to {measured.max():,.0f}", fontsize="medium")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _drawable(metrics: DataFrame) -> dict[str, np.ndarray]:
    """The columns with a finite value, less those that would only draw a constant."""
    columns = {
        str(name): values
        for name in metrics.columns
        if np.isfinite(values := np.asarray(metrics[name], dtype=float)).any()
    }
    columns.pop("epoch", None)
    if np.all(columns.get("beta", 1.0) == 1.0):
        columns.pop("beta", None)
    if np.ptp(columns.get("learning_rate", 0.0)) == 0:
        columns.pop("learning_rate", None)
    return columns


def _draw_parts(panels: dict[str, Axes], epoch: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """Draw what has a panel of its own name."""
    for name, label, colour in (
        ("reconstruction", "E log p(x|z)", VERMILLION),
        ("kl", "KL(q || p)", PURPLE),
        ("active_units", "active units", INK),
        ("beta", "β", ORANGE),
        ("learning_rate", "learning rate", FAINT),
        ("codes_used", "codes used", GREEN),
        ("code_perplexity", "perplexity of codes", BLUE),
        *((name, f"{name.split('_')[0]}'s loss (blind: 1.39)", SKY) for name in ADVERSARIES),
    ):
        if name in panels:
            _curve(panels[name], epoch, columns[name], color=colour)
            panels[name].set_title(label, fontsize="medium")
    if "active_units" in panels:
        panels["active_units"].set_ylim(0, np.nanmax(columns["active_units"]) + 1)
        panels["active_units"].locator_params(axis="y", nbins=5, integer=True)
    if "reconstruction" in panels:
        _leave_out_low_epochs(panels["reconstruction"], columns["reconstruction"][None])


def _draw_quality(panels: dict[str, Axes], epoch: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """Draw each measure of reconstructions in a panel of its own, with its unit."""
    for q in QUALITIES:
        if q.column not in panels:
            continue
        axes = panels[q.column]
        _curve(axes, epoch, columns[q.column], color=GREEN)
        axes.set_title(f"{q.title} of reconstructions", fontsize="medium")
        axes.set(xlabel="epoch", ylabel=q.unit.replace("-", "−"))
        axes.grid(alpha=0.3)
        _integer_ticks(axes)


def _draw_bounds(axes: Axes, epoch: np.ndarray, bounds: dict[str, np.ndarray]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "train_bound": {"label": "train", "color": SKY, "linestyle": "--"},
        "validation_bound": {"label": "validation", "color": BLUE},
        "validation_elbo": {"label": "validation ELBO, unscaled", "color": ORANGE, "linestyle": ":"},
    }
    for name, values in bounds.items():
        _curve(axes, epoch, values, linewidth=1.8, **styles[name])
    judged = "validation_bound" if "validation_bound" in bounds else next(iter(bounds))
    finite = np.where(np.isfinite(bounds[judged]), bounds[judged], -np.inf)
    best = int(finite.argmax())
    label = f"best, epoch {epoch[best]:g}: {in_nats(finite[best])}"
    axes.axvline(epoch[best], color=FAINT, linewidth=0.8)
    axes.plot(epoch[best], finite[best], "*", color=INK, markersize=11, linestyle="none", label=label)
    axes.set_title("bound", fontsize="medium")
    axes.set_ylabel("nats per datum")
    axes.legend(fontsize="small")
    _leave_out_low_epochs(axes, np.stack(list(bounds.values())))


def _leave_out_low_epochs(axes: Axes, values: np.ndarray) -> None:
    """Cut the lower limit where a few low epochs would flatten the others; `values` has shape (curves, epochs)."""
    values = np.where(np.isfinite(values), values, np.nan)
    values = values[:, ~np.isnan(values).all(0)]
    lowest, high = np.nanmin(values, 0), np.nanmax(values)
    typical = np.quantile(lowest, 0.2, method="higher")
    low = high - 1.5 * (high - typical)
    cut = int((lowest < low).sum())
    if cut and low < high:
        axes.set_ylim(low, high + 0.05 * (high - low))
        noun = "epoch" if cut == 1 else "epochs"
        axes.set_title(f"{axes.get_title()} ({cut} {noun} below the axis)", fontsize="medium")


def _draw_layers(axes: Axes, epoch: np.ndarray, layers: dict[str, np.ndarray]) -> None:
    """A curve for each layer, from the data upwards: dark to light."""
    from matplotlib import colormaps

    for (site, values), shade in zip(layers.items(), np.linspace(0.1, 0.85, len(layers)), strict=True):
        _curve(axes, epoch, values, color=colormaps[SEQUENTIAL](shade), label=site)
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if layers:
        axes.legend(fontsize="small", ncols=2)
    _integer_ticks(axes)


def _draw_kl_per_dimension(heatmap: Axes, last: Axes, epoch: np.ndarray, kl: dict[str, np.ndarray]) -> None:
    """Draw KL over epochs as colour, and that of the last epoch as bars; rows are sorted by the bars."""
    table = np.stack(list(kl.values()))
    final = np.nan_to_num([values[np.isfinite(values)][-1] for values in table])
    order = np.argsort(-final, kind="stable")
    names = [list(kl)[i] for i in order]
    rows = np.arange(len(names))

    middles = (epoch[1:] + epoch[:-1]) / 2
    first, end = (1.0, 1.0) if len(epoch) == 1 else (epoch[1] - epoch[0], epoch[-1] - epoch[-2])
    edges = np.concatenate([[epoch[0] - first / 2], middles, [epoch[-1] + end / 2]])
    mesh = heatmap.pcolormesh(
        edges, np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(table[order]), cmap=SEQUENTIAL, vmin=0
    )
    heatmap.figure.colorbar(mesh, ax=heatmap, label="nats per datum", pad=0.01)
    heatmap.set_title("KL per latent dimension, sorted by the last epoch", fontsize="medium")
    heatmap.set_xlabel("epoch")
    _integer_ticks(heatmap)

    last.set_axisbelow(True)
    last.barh(rows, final[order], color=PURPLE, height=0.8)
    last.set_title("last epoch", fontsize="medium")
    last.set_xlabel("KL, nats per datum")
    last.set_xlim(left=0)
    last.grid(alpha=0.3, axis="x")
    for axes in (heatmap, last):
        step = -(-len(names) // 25)  # at most 25 names fit the height
        axes.set_yticks(rows[::step], names[::step], fontsize="small")
        axes.set_ylim(len(names) - 0.5, -0.5)


def _curve(axes: Axes, epoch: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draw finite values only, joined across gaps: validation may run every few epochs."""
    finite = np.isfinite(values)
    axes.plot(epoch[finite], values[finite], marker="." if finite.sum() <= 30 else None, **style)


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    if high - low < 1:  # one epoch alone
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
