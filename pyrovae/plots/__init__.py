r"""Figures of training, of data and codes, and of model comparison.

Each function returns a `matplotlib.figure.Figure`. It is made without pyplot, so no figure registry, backend or
rcParams is touched: it shows when it is the last expression of a notebook cell, and `figure.savefig(path)` writes it.

How a datum is drawn follows from its event shape alone:

    (H, W), (1, H, W)    grey image: 0 is black, 1 is white, as in a photograph; values beyond are clipped
    (3, H, W)            colour image, channels red, green and blue, values clipped to [0, 1]
    (2,)                 point in the plane
    (D,)                 line profile: value over index

`Style` changes that: `ink` draws 1 as black on white paper, as strokes are written, and as the commands draw the data
sets of handwriting; other `limits` than 0 and 1 suit other units; `columns` are the names of a vector's elements.

Flattened images are profiles until they are given their shape back: `x.unflatten(1, (28, 28))`.
Colours are told apart by the colour-blind (Okabe and Ito's, and three more for classes); markers and dashes repeat
them for grey print.
"""

from __future__ import annotations

import io
import re
import textwrap
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

MAX_IMAGES = 64  # more would be too small to read
MAX_PAIRS = 500  # of points joined by a segment
MAX_PANELS = 16
MAX_ROWS = 8  # of a neighbourhood; a traversal may have twice as many
MAX_COLUMNS = 16
MAX_CLASSES = 20
MAX_NAMES = 12  # of columns, under a panel
Z95 = 1.96  # standard errors in half a 95% interval
# Colour, marker and name of an estimate: one that may be far too low points to where log p(x) is.
VERDICT_MARKS = {
    "exact": (INK, "D", "exact"),
    "ok": (BLUE, "o", "ok: a tight lower bound"),
    "unchecked": (BLUE, ">", "unchecked: a lower bound, not tried on simulated data"),
    "importance-sampled": (BLUE, "o", "importance-sampled"),
    "lower bound only": (VERMILLION, ">", "lower bound only: log p(x) may be far higher"),
    "invalid": (FAINT, "x", "invalid"),
}


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
# Before a difference to the highest number, by what it is of the difference of log p(x).
SIGNS = {"": "", "at least": "≥ ", "at most": "≤ ", "open": "? "}


def training_curves(metrics: DataFrame, title: str | None = None) -> Figure:
    """Draw how training went: bounds, their parts, KL per dimension, active units and schedules.

    A column that is absent or holds no finite value leaves its panel or line out. The vertical limits of the bounds
    and the reconstruction leave out epochs so low, as the first often are, that they would flatten the rest; a note
    says how many.

    Args:
        metrics: One row per epoch. `epoch`, and any of `train_bound`, `validation_bound` (its maximum is marked as
            the best epoch; that of `train_bound` where there is no validation), `validation_elbo`,
            `reconstruction`, `kl` and `kl_<site>[<dimension>]` in nats per datum; `active_units`; `beta`, drawn
            unless always 1; `learning_rate`, drawn if it changes.
        title: First line of the title, for example the model, K and the data.
    Raises:
        UsageError: there is no `epoch`, no row, or nothing to draw.
    """
    _require_columns(metrics, "metrics", ["epoch"])
    columns = {
        str(name): values
        for name in metrics.columns
        if np.isfinite(values := np.asarray(metrics[name], dtype=float)).any()
    }
    epoch = np.asarray(metrics["epoch"], dtype=float)
    columns.pop("epoch", None)
    if np.all(columns.get("beta", 1.0) == 1.0):
        columns.pop("beta", None)
    if np.ptp(columns.get("learning_rate", 0.0)) == 0:
        columns.pop("learning_rate", None)
    dimensions = [name for name in columns if re.fullmatch(r"kl_.+\[\d+\]", name)]
    bounds = [name for name in ("train_bound", "validation_bound", "validation_elbo") if name in columns]

    stacks: list[list[str]] = [
        ["bounds"] if bounds else [],
        [name for name in ("reconstruction", "kl") if name in columns],
        [name for name in ("active_units", "beta", "learning_rate") if name in columns],
    ]
    stacks = [stack for stack in stacks if stack]
    if not stacks and not dimensions:
        raise UsageError("metrics: expected a column of finite values beside 'epoch', got none; train an epoch first")
    # On a grid of 6 by 6 the stacks share the width and the panels of a stack share its height, whatever is there.
    layout = [
        [stack[row * len(stack) // 6] for stack in stacks for _ in range(6 // len(stacks))]
        for row in range(6 if stacks else 0)
    ]
    layout += [["heatmap"] * 4 + ["last"] * 2] * (6 if dimensions else 0)

    height = 3.7 * (bool(stacks) + bool(dimensions)) + 0.6
    figure = _figure(11, height, "Training; bounds, reconstruction and KL in nats per datum", title)
    panels: dict[str, Axes] = figure.subplot_mosaic(layout)  # type: ignore[arg-type]
    if bounds:
        _draw_bounds(panels["bounds"], epoch, {name: columns[name] for name in bounds})
    for name, label, colour in (
        ("reconstruction", "E log p(x|z)", VERMILLION),
        ("kl", "KL(q || p)", PURPLE),
        ("active_units", "active units", INK),
        ("beta", "β", ORANGE),
        ("learning_rate", "learning rate", FAINT),
    ):
        if name in panels:
            _curve(panels[name], epoch, columns[name], color=colour)
            panels[name].set_title(label, fontsize="medium")
    if "active_units" in panels:
        panels["active_units"].set_ylim(0, np.nanmax(columns["active_units"]) + 1)
        panels["active_units"].locator_params(axis="y", nbins=5, integer=True)
    if "reconstruction" in panels:
        _leave_out_low_epochs(panels["reconstruction"], columns["reconstruction"][None])
    for stack in stacks:
        for name in stack:
            _integer_ticks(panels[name])
            panels[name].grid(alpha=0.3)
            panels[name].tick_params(labelbottom=name == stack[-1])
        panels[stack[-1]].set_xlabel("epoch")
    if dimensions:
        kl = {name.removeprefix("kl_"): columns[name] for name in dimensions}
        _draw_kl_per_dimension(panels["heatmap"], panels["last"], epoch, kl)
    return figure


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
    label = f"best epoch {epoch[best]:g}: {_number(finite[best])}"
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


def reconstructions(x: Tensor, reconstruction: Tensor, title: str | None = None, style: Style = PLAIN) -> Figure:
    """Draw data beside their reconstructions.

    Images: each reconstruction under its original, the first 32 pairs. Points: each original joined to its
    reconstruction, the first 500. Profiles: each reconstruction over its original, the first 16.

    Args:
        x: Data, shape (N, *event).
        reconstruction: What the model makes of them, for example the mean of p(x|z); same shape.
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the shapes differ, or the event shape cannot be drawn.
    """
    if x.shape != reconstruction.shape:
        raise UsageError(
            f"reconstruction: expected the shape of x, {tuple(x.shape)}, got {tuple(reconstruction.shape)}; "
            "pass one reconstruction per datum"
        )
    kind = _kind("x", x, 1)
    shown = min(len(x), {"image": MAX_IMAGES // 2, "point": MAX_PAIRS, "profile": MAX_PANELS}[kind])
    originals, copies = _array(x[:shown]), _array(reconstruction[:shown])
    if kind == "image":
        across = min(shown, 8)
        bands = -(-shown // across)
        caption = f"Each reconstruction below its original{_of(shown, len(x))}"
        rows = [band * 2.25 + row for band in range(bands) for row in (0, 1)]
        figure, axes = _tiles(rows, list(range(across)), originals.shape[1:], caption, title)
        for i, (original, copy) in enumerate(zip(originals, copies, strict=True)):
            _tile(axes, style, original, rows[2 * (i // across)], i % across)
            _tile(axes, style, copy, rows[2 * (i // across) + 1], i % across)
        axes.set_yticks([row + 0.5 for row in rows], ["x", "reconstruction"] * bands)
    elif kind == "point":
        figure, axes = _plane(style, f"Data joined to their reconstructions{_of(shown, len(x))}", title)
        ends = np.stack([originals, copies, np.full_like(originals, np.nan)], 1).reshape(-1, 2)  # NaN lifts the pen
        axes.plot(ends[:, 0], ends[:, 1], color=FAINT, linewidth=0.7, zorder=1)
        _scatter(axes, originals, s=22, facecolors="white", edgecolors=INK, linewidths=0.8, label="x")
        _scatter(axes, copies, s=12, color=BLUE, label="reconstruction")
        figure.legend(loc="outside lower center", ncols=2)
    else:
        figure, panels = _panels(shown, x.shape[1], style, f"Data and their reconstructions{_of(shown, len(x))}", title)
        for panel, original, copy in zip(panels, originals, copies, strict=True):
            _profile(panel, original, color=INK, linewidth=1.6, label="x")
            _profile(panel, copy, color=BLUE, linestyle="--", label="reconstruction")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def samples(x: Tensor, title: str | None = None, style: Style = PLAIN) -> Figure:
    """Draw samples: the first 64 images in a grid, all points in the plane, or the first 16 profiles.

    Args:
        x: Samples, shape (N, *event).
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the event shape cannot be drawn.
    """
    kind = _kind("x", x, 1)
    shown = min(len(x), {"image": MAX_IMAGES, "point": len(x), "profile": MAX_PANELS}[kind])
    drawn, caption = _array(x[:shown]), f"Samples{_of(shown, len(x))}"
    if kind == "image":
        across = min(shown, max(6, int(np.ceil(np.sqrt(shown)))))
        figure, axes = _tiles(list(range(-(-shown // across))), list(range(across)), drawn.shape[1:], caption, title)
        for i, image in enumerate(drawn):
            _tile(axes, style, image, i // across, i % across)
    elif kind == "point":
        figure, axes = _plane(style, caption, title)
        _scatter(axes, drawn, s=_dot(shown), color=BLUE, alpha=0.6, linewidths=0, rasterized=True)
    else:
        figure, panels = _panels(shown, x.shape[1], style, caption, title)
        for panel, profile in zip(panels, drawn, strict=True):
            _profile(panel, profile, color=BLUE)
    return figure


def neighbourhood(x: Tensor, neighbours: Tensor, title: str | None = None, style: Style = PLAIN) -> Figure:
    """Draw data, and beside each what is decoded from the neighbourhood of its code.

    Images: one row per original, the original set apart at the left; the first 8 originals and 15 neighbours.
    Points and profiles: one panel per original, the first 16, with all its neighbours.

    Args:
        x: Originals, shape (N, *event).
        neighbours: Decoded from codes near that of each original, shape (N, M, *event).
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the shapes do not fit together, or the event shape cannot be drawn.
    """
    kind = _kind("x", x, 1)
    if neighbours.dim() < 2 or (neighbours.shape[:1] + neighbours.shape[2:]) != x.shape or neighbours.shape[1] == 0:
        wanted = ", ".join(map(str, (len(x), "M", *x.shape[1:])))
        raise UsageError(
            f"neighbours: expected shape ({wanted}), got {tuple(neighbours.shape)}; "
            "pass M >= 1 neighbours for each row of x"
        )
    shown = min(len(x), MAX_ROWS if kind == "image" else MAX_PANELS)
    caption = f"Data, and decoded from the neighbourhood of their codes{_of(shown, len(x))}"
    originals, around = _array(x[:shown]), _array(neighbours[:shown])
    if kind == "image":
        around = around[:, : MAX_COLUMNS - 1]
        columns = [0.0, *(1.35 + j for j in range(around.shape[1]))]
        figure, axes = _tiles(list(range(shown)), columns, originals.shape[1:], caption, title)
        for i, (original, row) in enumerate(zip(originals, around, strict=True)):
            for image, column in zip([original, *row], columns, strict=True):
                _tile(axes, style, image, i, column)
        axes.set_xticks([0.5, (columns[1] + columns[-1] + 1) / 2], ["x", "neighbours"])
    else:
        figure, panels = _panels(shown, x.shape[1], style, caption, title)
        for panel, original, near in zip(panels, originals, around, strict=True):
            if kind == "point":
                _scatter(panel, near, s=_dot(len(near)), color=SKY, linewidths=0, label="neighbours")
                _scatter(panel, original[None], marker="X", s=60, color=INK, edgecolors="white", label="x")
            else:
                for j, profile in enumerate(near):
                    label = "neighbours" if j == 0 else None
                    _profile(panel, profile, color=SKY, linewidth=0.8, alpha=0.7, label=label)
                _profile(panel, original, color=INK, linewidth=1.8, label="x")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def latent_map(codes: Tensor, labels: Any = None, title: str | None = None) -> Figure:
    """Draw codes in the plane, coloured by label.

    Two dimensions are drawn as they are, more by their first two principal components. One dimension is a histogram,
    or with labels a strip per class.

    Args:
        codes: Shape (N, Z), for example the means of q(z|x).
        labels: N numbers or strings. At most 20 distinct values are classes with a legend, and each name is also
            written on its class's most central point; more numbers are a colour scale.
        title: First line of the title.
    Raises:
        UsageError: the shapes do not fit together, or there are more than 20 names.
    """
    if codes.dim() != 2 or 0 in codes.shape:
        raise UsageError(f"codes: expected shape (N, Z), got {tuple(codes.shape)}; pass one code per datum")
    points = _array(codes)
    classes: np.ndarray = np.empty(0)
    given: Any = None
    if labels is not None:
        given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if given.shape != (len(points),):
            raise UsageError(
                f"labels: expected shape ({len(points)},), got {given.shape}; pass one label per row of codes"
            )
        classes = np.unique(given)
        if len(classes) > MAX_CLASSES and not np.issubdtype(given.dtype, np.number):
            raise UsageError(
                f"labels: expected at most {MAX_CLASSES} names, got {len(classes)}; "
                "group them, or pass numbers for a colour scale"
            )
    discrete = 0 < len(classes) <= MAX_CLASSES

    latent_dim = points.shape[1]
    figure = _figure(6.8, 5.6, f"Latent codes, {len(points):,} data, Z = {latent_dim}", title)
    axes = figure.add_subplot()
    if latent_dim == 1 and given is None:
        axes.hist(points[:, 0], bins=min(60, max(10, len(points) // 10)), color=BLUE, edgecolor="white")
        axes.set_xlabel("z[0]")
        axes.set_ylabel("data")
        return figure
    if latent_dim == 1:
        # The height is the label itself; within a class it is spread to keep equal codes apart.
        heights = given
        if discrete:
            heights = np.searchsorted(classes, given) + np.random.default_rng(0).uniform(-0.3, 0.3, len(points))
            axes.set_yticks(range(len(classes)), [str(name) for name in classes])
        points = np.stack([points[:, 0], np.asarray(heights, dtype=float)], 1)
        axes.set_xlabel("z[0]")
        axes.set_ylabel("label")
    else:
        names = ["z[0]", "z[1]"]
        if latent_dim > 2:
            points, shares = _principal_components(points)
            names = [f"PCA {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_aspect("equal", adjustable="datalim")

    style: dict[str, Any] = {"s": _dot(len(points)), "linewidths": 0, "rasterized": True}
    if discrete:
        for i, name in enumerate(classes):
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            _scatter(axes, points[given == name], color=colour, marker=marker, alpha=0.7, label=str(name), **style)
        legend = figure.legend(loc="outside right upper", title="label", fontsize="small")
        for handle in legend.legend_handles:
            handle.set(alpha=1.0, sizes=[30])  # type: ignore[union-attr]
        if latent_dim > 1:
            _name_classes(axes, points, classes, given)
    elif given is not None:
        drawn = _scatter(axes, points, c=given.astype(float), cmap=SEQUENTIAL, **style)
        figure.colorbar(drawn, ax=axes, label="label")
    else:
        _scatter(axes, points, color=BLUE, alpha=0.6, **style)
    return figure


def _principal_components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components, shape (N, 2), and their shares of the variance."""
    from sklearn.decomposition import PCA

    if len(points) < 2:
        raise UsageError("codes: expected at least 2 rows to find principal components, got 1; pass more data")
    pca = PCA(n_components=2, svd_solver="full")
    with np.errstate(invalid="ignore"):  # 0 / 0, for codes that all collapsed on one
        components = pca.fit_transform(points)
    return components, np.nan_to_num(pca.explained_variance_ratio_)


def _name_classes(axes: Axes, points: np.ndarray, classes: np.ndarray, given: Any) -> None:
    """Write each class's name on its most central point: in grey print the colours alone would not do."""
    from matplotlib.patheffects import withStroke

    for name in classes:
        members = points[given == name]
        central = np.linalg.norm(members - np.median(members, 0), axis=1).argmin()  # the median may lie outside
        axes.annotate(
            textwrap.shorten(str(name), 16, placeholder="…"),
            tuple(members[central]),
            ha="center",
            va="center",
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def traversals(
    images: Tensor,
    values: Numbers,
    dims: Sequence[int] | None = None,
    title: str | None = None,
    style: Style = PLAIN,
) -> Figure:
    """Draw what is decoded while one latent dimension moves and the others stay.

    Images: one row per dimension, one column per value; the first 16 rows, and 16 columns spread evenly over the
    values. Points and profiles: one panel per dimension, the first 16, coloured by value.

    Args:
        images: Decoded, shape (Z, S, *event).
        values: The S values that each dimension takes, in order.
        dims: Which latent dimension each row of `images` is; by default 0, 1, ..., Z - 1.
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the shapes do not fit together, or the event shape cannot be drawn.
    """
    kind = _kind("images", images, 2)
    value, rows = _array(values), list(range(len(images)) if dims is None else dims)
    if value.shape != images.shape[1:2]:
        raise UsageError(
            f"values: expected shape ({images.shape[1]},), got {value.shape}; pass one value per column of images"
        )
    if len(rows) != len(images):
        raise UsageError(
            f"dims: expected {len(images)} dimensions, got {len(rows)}; name the dimension of each row of images"
        )
    shown = min(len(rows), MAX_PANELS)
    names = [f"z[{dim}]" for dim in rows[:shown]]
    caption = f"Decoded along one latent dimension at a time{_of(shown, len(rows))}"
    decoded = _array(images[:shown])
    if kind == "image":
        picked = np.linspace(0, len(value) - 1, min(len(value), MAX_COLUMNS)).round().astype(int)
        figure, axes = _tiles(list(range(shown)), list(range(len(picked))), decoded.shape[2:], caption, title)
        for row in range(shown):
            for column, step in enumerate(picked):
                _tile(axes, style, decoded[row, step], row, column)
        # Rounded at the third digit of the largest, so that a zero reached by steps of 0.1 reads 0.
        digits = 2 - int(np.floor(np.log10(np.abs(value).max() or 1.0)))
        headings = [f"{round(value[step], digits) + 0.0:g}".replace("-", "−") for step in picked]
        axes.set_xticks(np.arange(len(picked)) + 0.5, headings)
        axes.set_yticks(np.arange(shown) + 0.5, names)
        return figure

    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, panels = _panels(shown, images.shape[2], style, caption, title)
    scale = ScalarMappable(Normalize(value.min(), value.max()), colormaps[SEQUENTIAL])
    for panel, path, name in zip(panels, decoded, names, strict=True):
        panel.set_title(name, fontsize="medium")
        if kind == "point":
            panel.plot(path[:, 0], path[:, 1], color=FAINT, linewidth=0.8, zorder=1)
            _scatter(panel, path, c=value, cmap=scale.cmap, norm=scale.norm, s=18)
        else:
            for profile, colour in zip(path, scale.to_rgba(value), strict=True):
                _profile(panel, profile, color=colour)
    figure.colorbar(scale, ax=panels, label="along the latent dimension")
    return figure


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
    k, bound, half = _array(ks), _array(mean), Z95 * _array(error)
    paired = Z95 * _array([] if paired_error is None else paired_error)
    if not (k.ndim == 1 and len(k) and k.shape == bound.shape == half.shape):
        raise UsageError(
            f"ks, mean, error: expected one length, got shapes {k.shape}, {bound.shape}, {half.shape}; "
            "pass a mean and an error for each K"
        )
    if paired_error is not None and paired.shape != k.shape:
        raise UsageError(f"paired_error: expected shape {k.shape}, as ks, got {paired.shape}; pass one for each K")
    if k.min() < 1:
        raise UsageError(f"ks: expected numbers of particles of at least 1, got {k.min():g}; remove it")
    order = np.argsort(k)
    k, bound, half = k[order], bound[order], half[order]

    panels = 1 if paired_error is None else 2
    figure = _figure(6.4 if panels == 1 else 10.5, 4.4, r"Importance-weighted bound $L_K$ over K", title)
    axes = figure.add_subplot(1, panels, 1, ylabel="nats per datum")
    band: dict[str, Any] = {"color": BLUE, "alpha": 0.25, "linewidth": 0}
    axes.fill_between(k, bound - half, bound + half, label="95% interval over rows", **band)
    axes.plot(k, bound, "o-", color=BLUE, markersize=4, label=rf"$L_K$, at K = {k[-1]:,.0f}: {_number(bound[-1])}")
    if elbo is not None:
        axes.axhline(float(elbo), color=ORANGE, linestyle="--", label=f"ELBO: {_number(elbo)}")
    if exact is not None:
        axes.axhline(float(exact), color=INK, label=f"exact log p(x): {_number(exact)}")
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
    _require_columns(table, "table", ["name", "log_marginal", "error", "exact"])
    table = table.sort_values("log_marginal", ascending=False, na_position="last", kind="stable")

    def numbers(column: str, otherwise: Any) -> np.ndarray:
        known = table[column].astype(float) if column in table.columns else otherwise
        return np.broadcast_to(np.asarray(known, dtype=float), len(table))

    value, error = numbers("log_marginal", None), numbers("error", None)
    half = np.where(np.isfinite(error), Z95 * error, 0.0)  # an unknown error draws no interval
    with np.errstate(invalid="ignore"):  # infinities
        ends = np.stack([value - numbers("low", value - half), numbers("high", value + half) - value])
    ends = np.where(np.isfinite(ends), ends, 0.0).clip(min=0)
    elbo = numbers("elbo", np.nan)
    exact = np.asarray(table["exact"], dtype=bool)
    judged = "verdict" in table.columns
    kinds = np.asarray(table["verdict"]) if judged else np.where(exact, "exact", "importance-sampled")
    seeds = [list(m) if len(m) > 1 else [] for m in table["seed_means"]] if "seed_means" in table.columns else []
    names = [textwrap.fill(str(name), 30) for name in table["name"]]
    reach = ends.max(0)
    for i, means in enumerate(seeds):
        reach[i] = max([reach[i], *(abs(mean - value[i]) for mean in means)])
    low, high, drawn = _on_scale(value, reach, elbo)

    heights = np.array([max(0.36, 0.18 * (name.count("\n") + 1.4)) for name in names])  # inches
    rows = np.cumsum(heights) - heights / 2
    caption = "log p(x) with 95% intervals, higher is better"
    figure = _figure(12.6 if judged else 8.2, heights.sum() + 1.7, caption, title)
    axes = figure.add_subplot(xlim=(low, high), ylim=(heights.sum(), 0), xlabel="log p(x), nats per datum")
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
        handles.append(_scatter(axes, np.array(of_seeds), label="one seed", **style))
    with_elbo = drawn & np.isfinite(elbo)
    if with_elbo.any():
        # The line to the estimate is the gap; it runs to the edge where the ELBO is off the axis.
        gap: dict[str, Any] = {"color": FAINT, "linewidth": 0.8, "linestyle": ":"}
        axes.hlines(rows[with_elbo], elbo[with_elbo], value[with_elbo], **gap)
        hollow = {"facecolors": "white", "edgecolors": "0.35", "s": 34}
        handles.append(_scatter(axes, np.stack([elbo, rows], 1)[with_elbo], label="ELBO", zorder=2, **hollow))
    beyond = ~drawn & (value < low)
    if beyond.any():
        edge = np.full(beyond.sum(), low + 0.015 * (high - low))
        handles += axes.plot(edge, rows[beyond], "<", color=FAINT, markersize=9, label="off the axis")

    bounds = [
        "≥ " if judged and not sure and np.isfinite(mean) else "" for sure, mean in zip(exact, value, strict=True)
    ]
    columns = {"± standard error": [b + _with_error(*pair) for b, *pair in zip(bounds, value, error, strict=True)]}
    best = value == value[0]
    if "rank_low" in table.columns:
        best = numbers("rank_high", None) == 1
        ranks = zip(numbers("rank_low", None), numbers("rank_high", None), strict=True)
        columns["rank"] = ["–".join(f"{r:g}" for r in sorted(set(ends)) if np.isfinite(r)) for ends in ranks]
    if "difference_low" in table.columns:
        parts = zip(*(numbers(f"difference{end}", None) for end in ("", "_low", "_high")), strict=True)
        signs = [SIGNS[kind] for kind in table["difference_bound"]] if "difference_bound" in table.columns else []
        differences = [
            f"{sign}{_number(d)} [{_number(a)}, {_number(b)}]" if np.isfinite(d) else ""
            for (d, a, b), sign in zip(parts, signs or [""] * len(table), strict=True)
        ]
        columns["to the best, 95% interval"] = ["best" if best[0] else "highest", *differences[1:]]
    if "seeds" in table.columns:
        spreads = numbers("spread", np.nan) if "spread" in table.columns else np.full(len(table), np.nan)
        columns["seeds"] = [
            f"{n}, sd {sd:.2g}" if np.isfinite(sd) else f"{n}" for n, sd in zip(table["seeds"], spreads, strict=True)
        ]
    if judged:
        columns["verdict"] = list(kinds)
    beside = axes.get_yaxis_transform()  # x in widths of the axes, y in data
    offset = 10.0  # points
    for heading, cells in columns.items():
        place: dict[str, Any] = {"xycoords": beside, "textcoords": "offset points", "annotation_clip": False}
        for row, cell, first, kind in zip(rows, cells, best, kinds, strict=True):
            weight = "bold" if first and heading != "verdict" else "normal"
            colour = VERDICT_MARKS[kind][0] if heading == "verdict" and kind in VERDICT_MARKS else INK
            axes.annotate(cell, (1, row), (offset, 0), va="center", weight=weight, color=colour, **place)
        axes.annotate(heading, (1, 0), (offset, 0), va="bottom", fontsize="small", color="0.35", **place)
        offset += 6.2 * max(map(len, [heading, *cells])) + 12
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
    _require_columns(table, "table", ["name", "gap", "error"])
    gap, error = (np.asarray(table[name], dtype=float) for name in ("gap", "error"))
    ends = elbo + np.cumsum(gap)
    starts = np.concatenate([[elbo], ends[:-1]])
    rows = np.arange(len(gap))
    columns = 1 if dimensions is None else 2
    height = max(3.4, 0.7 * len(gap) + 1.6) + 0.6 * (columns - 1)  # with room for a legend below
    figure = _figure(6.2 * columns, height, "Where the bound is lost", title)
    axes = figure.add_subplot(1, columns, 1, ylim=(len(gap) - 0.4, -0.6), xlabel="nats per datum")
    colours = [ORANGE, *[BLUE] * (len(gap) - 2), GREEN][: len(gap)]
    axes.barh(rows, gap, left=starts, height=0.55, color=colours)
    above = axes.get_xaxis_transform()  # x in data, y in heights of the axes
    for value, label, side in ((elbo, "ELBO", "left"), (ends[-1], "log p(x)", "right")):
        axes.axvline(value, color=INK, linewidth=0.8, linestyle="--" if label == "ELBO" else "-", zorder=0)
        axes.text(value, 1.02, f"{label} {_number(value)}", transform=above, ha=side, va="bottom")
    beside = axes.get_yaxis_transform()
    for row, (mean, spread) in enumerate(zip(gap, error, strict=True)):
        axes.text(1.03, row, _with_error(mean, spread), transform=beside, va="center")
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
    _require_columns(dimensions, "dimensions", ["kl", "variance"])
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


def _figure(width: float, height: float, caption: str, title: str | None) -> Figure:
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


def _kind(argument: str, x: Tensor, batch_dims: int) -> str:
    """Decide how the events of `x` are drawn: 'image', 'point' or 'profile'."""
    event = tuple(x.shape[batch_dims:])
    if x.dim() > batch_dims and 0 not in x.shape:
        if len(event) == 2 or (len(event) == 3 and event[0] in (1, 3)):
            return "image"
        if len(event) == 1:
            return "point" if event == (2,) else "profile"
    batch = ("N",) if batch_dims == 1 else ("Z", "S")
    raise UsageError(
        f"{argument}: expected shape ({', '.join(batch)}, *event), none of them 0, with event (H, W), (1, H, W), "
        f"(3, H, W) or (D,), got {tuple(x.shape)}; reshape it, for example x.unflatten(1, (28, 28))"
    )


def _tiles(
    rows: Sequence[float], columns: Sequence[float], event: Sequence[int], caption: str, title: str | None
) -> tuple[Figure, Axes]:
    """Make axes for images: each fills a cell of 1 by 1 whose upper left corner is at (column, row)."""
    across, down = columns[-1] + 1, rows[-1] + 1
    ratio = event[-2] / event[-1]
    width = min(0.85, 11 / across, 11 / (down * ratio))  # inches of a cell
    figure = _figure(max(5.0, across * width + 1.5), down * width * ratio + 0.9, caption, title)
    figure.set_layout_engine("compressed")  # else images of another shape than their axes push the labels out
    axes = figure.add_subplot()
    axes.set(xlim=(-0.05, across + 0.05), ylim=(down + 0.05, -0.05), xticks=[], yticks=[], aspect=ratio)
    axes.autoscale(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes


def _tile(axes: Axes, style: Style, image: np.ndarray, row: float, column: float) -> None:
    """Draw an image, shape (H, W), (1, H, W) or (3, H, W), in the cell at (column, row)."""
    from matplotlib.patches import Rectangle

    low, high = style.limits
    if image.ndim == 3:
        image = image[0] if len(image) == 1 else np.moveaxis((image - low) / (high - low), 0, -1).clip(0, 1)
    left, right, top, bottom = column + 0.04, column + 0.96, row + 0.04, row + 0.96
    extent = (left, right, bottom, top)
    grey: dict[str, Any] = {"cmap": "gray_r" if style.ink else "gray", "vmin": low, "vmax": high}
    axes.imshow(image, **grey, extent=extent, origin="upper", aspect=axes.get_aspect())
    frame: dict[str, Any] = {
        "fill": False,
        "edgecolor": "0.75",
        "linewidth": 0.5,
    }  # else white images on white have no edge
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))


def _panels(count: int, size: int, style: Style, caption: str, title: str | None) -> tuple[Figure, list[Axes]]:
    """Make `count` small axes with common limits, for points or for profiles of that size."""
    kind, names = "point" if size == 2 else "profile", style.names(size)
    across = min(count, 4)
    down = -(-count // across)
    short = [_short(name) for name in names or ()][:: -(-size // MAX_NAMES)]
    room = 0.07 * max(map(len, short)) if short and kind == "profile" else 0.0  # inches, for names on end
    height = (2.4 if kind == "point" else 1.8) * down + 1.1 + room
    figure = _figure(max(5.0, 2.5 * across + 0.6), height, caption, title)
    across_name, up_name = "index" if names is None else "", style.axis("value")
    if kind == "point":
        across_name, up_name = map(style.axis, names or ("x[0]", "x[1]"))
        figure.set_layout_engine("compressed")  # equal scales leave gaps that it closes
    panels: list[Axes] = []
    for i in range(count):
        first = panels[0] if panels else None
        panel = figure.add_subplot(down, across, i + 1, sharex=first, sharey=first)
        lowest, leftmost = i + across >= count, i % across == 0
        panel.tick_params(labelbottom=lowest, labelleft=leftmost)
        panel.set_xlabel(across_name if lowest else "")
        panel.set_ylabel(up_name if leftmost else "")
        panel.grid(alpha=0.3)
        if kind == "point":
            panel.set_aspect("equal")
        elif names is not None:
            at = range(0, size, -(-size // MAX_NAMES))
            panel.set_xticks(at, short, rotation=60, ha="right", rotation_mode="anchor")
        panels.append(panel)
    return figure, panels


def _plane(style: Style, caption: str, title: str | None) -> tuple[Figure, Axes]:
    """Make axes for points of the data plane, with equal scales."""
    figure = _figure(5.6, 5.6, caption, title)
    across, up = map(style.axis, style.names(2) or ("x[0]", "x[1]"))
    axes = figure.add_subplot(aspect="equal", xlabel=across, ylabel=up, adjustable="datalim")
    axes.grid(alpha=0.3)
    return figure, axes


def _short(name: str) -> str:
    """A name in at most 20 characters: its ends, where names differ."""
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"


def _scatter(axes: Axes, points: np.ndarray, **style: Any) -> PathCollection:
    return axes.scatter(points[:, 0], points[:, 1], **style)


def _profile(axes: Axes, values: np.ndarray, **style: Any) -> None:
    axes.plot(np.arange(len(values)), values, marker="." if len(values) <= 30 else None, **style)


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


def _dot(count: int) -> float:
    """Area of a dot, in points squared: smaller for more."""
    return float(np.clip(16000 / count, 4, 25))


def _of(shown: int, count: int) -> str:
    return "" if shown == count else f" (first {shown:,} of {count:,})"


def _with_error(value: float, error: float) -> str:
    if not (np.isfinite(value) and np.isfinite(error)):
        return _number(value)
    digits = 3 if 0 < error < 0.1 else 2
    return f"{value:,.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def _number(value: float) -> str:
    """Write nats with a real minus sign, and more digits for less."""
    if np.isnan(value):
        return "not a number"
    if np.isinf(value):
        return "−∞" if value < 0 else "∞"
    digits = 1 if abs(value) >= 1000 else 2 if abs(value) >= 0.1 or value == 0 else 3
    return f"{value:,.{digits}f}".replace("-", "−")


def _array(values: Numbers) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def _require_columns(table: DataFrame, argument: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing or not len(table):
        got = f"columns {list(table.columns)}" if missing else "no row"
        raise UsageError(f"{argument}: expected the columns {list(names)} and at least one row, got {got}; add them")
