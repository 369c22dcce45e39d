"""Data as pictures: samples, reconstructions, neighbourhoods and traversals.

How a datum is drawn follows from its event shape alone:

    (H, W), (1, H, W)    grey image: 0 is black, 1 is white, as in a photograph; values beyond are clipped
    (3, H, W)            colour image, channels red, green and blue, values clipped to [0, 1]
    (2,)                 point in the plane
    (D,)                 line profile: value over index

`Style` changes that: `ink` draws 1 as black on white paper, as strokes are written, and as the commands draw the data
sets of handwriting; other `limits` than 0 and 1 suit other units; `columns` are the names of a vector's elements.

Flattened images are profiles until they are given their shape back: `x.unflatten(1, (28, 28))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.plots.style import (
    BLUE,
    FAINT,
    INK,
    PLAIN,
    SEQUENTIAL,
    SKY,
    Numbers,
    Style,
    as_array,
    dot_area,
    new_figure,
    scatter,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 64  # more would be too small to read
MAX_ACROSS = 10  # reconstructions in one row
MAX_PAIRS = 500  # of points joined by a segment
MAX_PANELS = 16
MAX_ROWS = 8  # of a neighbourhood; a traversal may have twice as many
MAX_COLUMNS = 16
MAX_NAMES = 12  # of columns, under a panel
UNSEEN = "#BBD6EA"  # pixels that are left out


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
    drawn, caption = as_array(x[:shown]), f"Samples{_of(shown, len(x))}"
    if kind == "image":
        return _grid(drawn, min(shown, max(6, int(np.ceil(np.sqrt(shown))))), caption, title, style)[0]
    if kind == "point":
        figure, axes = _plane(style, caption, title)
        scatter(axes, drawn, s=dot_area(shown), color=BLUE, alpha=0.6, linewidths=0, rasterized=True)
    else:
        figure, panels = _panels(shown, x.shape[1], style, caption, title)
        for panel, profile in zip(panels, drawn, strict=True):
            _profile(panel, profile, color=BLUE)
    return figure


def grid(
    x: Tensor,
    columns: int,
    caption: str = "Data",
    names: Sequence[str] | None = None,
    title: str | None = None,
    style: Style = PLAIN,
) -> Figure:
    """Draw images in rows of so many, all of them, whatever they are; with names, each under its own.

    Args:
        x: Images, shape (N, H, W), (N, 1, H, W) or (N, 3, H, W).
        columns: How many stand in a row.
        caption: What they are, the second line of the title.
        names: Of each image, such as its class.
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the event shape is no image's, or there is not one name for each.
    """
    if _kind("x", x, 1) != "image":
        raise UsageError(f"x: expected images, got rows of shape {tuple(x.shape[1:])}; draw them with samples")
    if names is not None and len(names) != len(x):
        raise UsageError(f"names: expected {len(x)} names, got {len(names)}; name each image, or none")
    across = min(columns, len(x))
    figure, axes = _grid(as_array(x), across, caption, title, style, gap=0.0 if names is None else 0.28)
    for i, name in enumerate(names or ()):
        row, column = divmod(i, across)
        axes.text(column + 0.5, 1.28 * row + 0.97, _short(name), ha="center", va="top", fontsize="small")
    return figure


def named_rows(
    x: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    caption: str,
    title: str | None = None,
    style: Style = PLAIN,
) -> Figure:
    """Draw images in rows and columns that each have a name, the first 16 of either.

    Args:
        x: Images, shape (R, C, H, W), (R, C, 1, H, W) or (R, C, 3, H, W); pixels that are NaN are left out.
        rows: Names of the R rows.
        columns: Names of the C columns.
        caption: What they are, the second line of the title.
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the event shape is no image's, or there is not one name for each row and column.
    """
    if _kind("x", x, 2) != "image":
        raise UsageError(f"x: expected images, got rows of shape {tuple(x.shape[2:])}; save them as a table")
    if (len(rows), len(columns)) != tuple(x.shape[:2]):
        raise UsageError(f"rows, columns: expected {tuple(x.shape[:2])} names, got {len(rows)} and {len(columns)}")
    down, across = min(len(rows), MAX_COLUMNS), min(len(columns), MAX_COLUMNS)
    drawn = as_array(x[:down, :across])
    figure, axes = _tiles(list(range(down)), list(range(across)), drawn.shape[2:], caption, title)
    for row, column in np.ndindex(down, across):
        _tile(axes, style, drawn[row, column], row, column)
    axes.set_xticks(np.arange(across) + 0.5, [_short(name) for name in columns[:across]])
    axes.set_yticks(np.arange(down) + 0.5, [_short(name) for name in rows[:down]])
    return figure


def conditional_samples(x: Tensor, names: Sequence[str], title: str | None = None, style: Style = PLAIN) -> Figure:
    """Draw samples given each of several conditions, such as the classes of a label.

    Images: one row per condition; the first 16 conditions and samples. Points and profiles: one panel per condition,
    the first 16; all points, and the first 16 profiles.

    Args:
        x: Samples, shape (C, S, *event).
        names: What each of the C rows of samples is given.
        title: First line of the title.
        style: How data are drawn.
    Raises:
        UsageError: the shapes do not fit together, or the event shape cannot be drawn.
    """
    kind = _kind("x", x, 2)
    if len(names) != len(x):
        raise UsageError(f"names: expected {len(x)} names, got {len(names)}; name what each row of samples is given")
    shown = min(len(x), MAX_PANELS)
    caption = f"Samples given each condition{_of(shown, len(x))}"
    drawn, labels = as_array(x[:shown]), [_short(name) for name in names[:shown]]
    if kind == "image":
        across = min(drawn.shape[1], MAX_COLUMNS)
        figure, axes = _tiles(list(range(shown)), list(range(across)), drawn.shape[2:], caption, title)
        for row in range(shown):
            for column in range(across):
                _tile(axes, style, drawn[row, column], row, column)
        axes.set_yticks(np.arange(shown) + 0.5, labels)
        return figure
    figure, panels = _panels(shown, x.shape[2], style, caption, title)
    for panel, of_condition, label in zip(panels, drawn, labels, strict=True):
        panel.set_title(label, fontsize="medium")
        if kind == "point":
            scatter(panel, of_condition, s=dot_area(len(of_condition)), color=BLUE, alpha=0.6, linewidths=0)
        else:
            for profile in of_condition[:MAX_PANELS]:
                _profile(panel, profile, color=BLUE, linewidth=0.8, alpha=0.7)
    return figure


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
    originals, copies = as_array(x[:shown]), as_array(reconstruction[:shown])
    if kind == "image":
        across = shown if shown <= MAX_ACROSS else 8
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
        scatter(axes, originals, s=22, facecolors="white", edgecolors=INK, linewidths=0.8, label="x")
        scatter(axes, copies, s=12, color=BLUE, label="reconstruction")
        figure.legend(loc="outside lower center", ncols=2)
    else:
        figure, panels = _panels(shown, x.shape[1], style, f"Data and their reconstructions{_of(shown, len(x))}", title)
        for panel, original, copy in zip(panels, originals, copies, strict=True):
            _profile(panel, original, color=INK, linewidth=1.6, label="x")
            _profile(panel, copy, color=BLUE, linestyle="--", label="reconstruction")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
    originals, around = as_array(x[:shown]), as_array(neighbours[:shown])
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
                scatter(panel, near, s=dot_area(len(near)), color=SKY, linewidths=0, label="neighbours")
                scatter(panel, original[None], marker="X", s=60, color=INK, edgecolors="white", label="x")
            else:
                for j, profile in enumerate(near):
                    label = "neighbours" if j == 0 else None
                    _profile(panel, profile, color=SKY, linewidth=0.8, alpha=0.7, label=label)
                _profile(panel, original, color=INK, linewidth=1.8, label="x")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


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
    value, rows = as_array(values), list(range(len(images)) if dims is None else dims)
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
    decoded = as_array(images[:shown])
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
    figure, panels = _panels(shown, images.shape[2], style, caption, title)
    _draw_paths(panels, decoded, value, names, kind)
    return figure


def _draw_paths(panels: list[Axes], paths: np.ndarray, value: np.ndarray, names: list[str], kind: str) -> None:
    """Draw points or profiles along one latent dimension in each panel; `paths` has shape (panels, S, D)."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(value.min(), value.max()), colormaps[SEQUENTIAL])
    for panel, path, name in zip(panels, paths, names, strict=True):
        panel.set_title(name, fontsize="medium")
        if kind == "point":
            panel.plot(path[:, 0], path[:, 1], color=FAINT, linewidth=0.8, zorder=1)
            scatter(panel, path, c=value, cmap=scale.cmap, norm=scale.norm, s=18)
        else:
            for profile, colour in zip(path, scale.to_rgba(value), strict=True):
                _profile(panel, profile, color=colour)
    panels[0].figure.colorbar(scale, ax=panels, label="along the latent dimension")


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
    figure = new_figure(max(5.0, across * width + 1.5), down * width * ratio + 0.9, caption, title)
    figure.set_layout_engine("compressed")  # else images of another shape than their axes push the labels out
    axes = figure.add_subplot()
    axes.set(xlim=(-0.05, across + 0.05), ylim=(down + 0.05, -0.05), xticks=[], yticks=[], aspect=ratio)
    axes.autoscale(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes


def _grid(
    images: np.ndarray, across: int, caption: str, title: str | None, style: Style, gap: float = 0.0
) -> tuple[Figure, Axes]:
    """Draw images in rows of `across`, with a gap between rows, in heights of an image."""
    rows = [(1 + gap) * row for row in range(-(-len(images) // across))]
    figure, axes = _tiles(rows, list(range(across)), images.shape[1:], caption, title)
    axes.set_ylim(rows[-1] + 1.05 + gap, -0.05)
    for i, image in enumerate(images):
        _tile(axes, style, image, rows[i // across], i % across)
    return figure, axes


def _tile(axes: Axes, style: Style, image: np.ndarray, row: float, column: float) -> None:
    """Draw an image, shape (H, W), (1, H, W) or (3, H, W), in the cell at (column, row), NaN in a colour of its own."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    low, high = style.limits
    if image.ndim == 3:
        image = image[0] if len(image) == 1 else np.moveaxis((image - low) / (high - low), 0, -1).clip(0, 1)
    if image.ndim == 3:
        image = np.where(np.isnan(image), to_rgb(UNSEEN), image)
    left, right, top, bottom = column + 0.04, column + 0.96, row + 0.04, row + 0.96
    extent = (left, right, bottom, top)
    shades = colormaps["gray_r" if style.ink else "gray"].with_extremes(bad=UNSEEN)
    grey: dict[str, Any] = {"cmap": shades, "vmin": low, "vmax": high}
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
    figure = new_figure(max(5.0, 2.5 * across + 0.6), height, caption, title)
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
    figure = new_figure(5.6, 5.6, caption, title)
    across, up = map(style.axis, style.names(2) or ("x[0]", "x[1]"))
    axes = figure.add_subplot(aspect="equal", xlabel=across, ylabel=up, adjustable="datalim")
    axes.grid(alpha=0.3)
    return figure, axes


def _short(name: str) -> str:
    """A name in at most 20 characters: its ends, where names differ."""
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"


def _profile(axes: Axes, values: np.ndarray, **style: Any) -> None:
    axes.plot(np.arange(len(values)), values, marker="." if len(values) <= 30 else None, **style)


def _of(shown: int, count: int) -> str:
    return "" if shown == count else f" (first {shown:,} of {count:,})"
