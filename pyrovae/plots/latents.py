"""Codes in the plane."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.plots.style import (
    BLUE,
    MARKERS,
    PALETTE,
    SEQUENTIAL,
    VERMILLION,
    as_array,
    dot_area,
    new_figure,
    scatter,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CLASSES = 20


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
    points = as_array(codes)
    given: Any = None
    classes: np.ndarray = np.empty(0)
    if labels is not None:
        given, classes = _labels(labels, len(points))
    latent_dim = points.shape[1]
    figure = new_figure(6.8, 5.6, f"Latent codes, {len(points):,} data, Z = {latent_dim}", title)
    axes = figure.add_subplot()
    if latent_dim == 1 and given is None:
        axes.hist(points[:, 0], bins=min(60, max(10, len(points) // 10)), color=BLUE, edgecolor="white")
        axes.set_xlabel("z[0]")
        axes.set_ylabel("data")
        return figure
    points = _strips(axes, points, given, classes) if latent_dim == 1 else _plane(axes, points)

    style: dict[str, Any] = {"s": dot_area(len(points)), "linewidths": 0, "rasterized": True}
    if len(classes):
        for i, name in enumerate(classes):
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            scatter(axes, points[given == name], color=colour, marker=marker, alpha=0.7, label=str(name), **style)
        legend = figure.legend(loc="outside right upper", title="label", fontsize="small")
        for handle in legend.legend_handles:
            handle.set(alpha=1.0, sizes=[30])  # type: ignore[union-attr]
        if latent_dim > 1:
            _name_classes(axes, points, classes, given)
    elif given is not None:
        drawn = scatter(axes, points, c=given.astype(float), cmap=SEQUENTIAL, **style)
        figure.colorbar(drawn, ax=axes, label="label")
    else:
        scatter(axes, points, color=BLUE, alpha=0.6, **style)
    return figure


def clouds(points: Mapping[str, Tensor], names: Sequence[str] = ("z[0]", "z[1]"), title: str | None = None) -> Figure:
    """Draw clouds of points of the plane beside one another on the same axes, such as codes and draws of their prior.

    Args:
        points: A cloud (N, 2) by its name; the first has a colour of its own.
        names: Of the two axes.
        title: First line of the title.
    Raises:
        UsageError: there is no cloud, or one is not of the plane.
    """
    arrays = {name: as_array(cloud) for name, cloud in points.items()}
    if not arrays or any(cloud.ndim != 2 or cloud.shape[1] != 2 or not len(cloud) for cloud in arrays.values()):
        shapes = ", ".join(str(cloud.shape) for cloud in arrays.values())
        raise UsageError(f"points: expected clouds of shape (N, 2), got {shapes or 'none'}")
    figure = new_figure(3.6 * len(arrays) + 0.6, 4.8, "Points in the plane, the same axes in all panels", title)
    panels = figure.subplots(1, len(arrays), sharex=True, sharey=True, squeeze=False)[0]
    for i, (panel, (name, cloud)) in enumerate(zip(panels, arrays.items(), strict=True)):
        scatter(panel, cloud, color=VERMILLION if i else BLUE, s=dot_area(len(cloud)), alpha=0.6, linewidths=0)
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel(names[0])
        panel.set_box_aspect(1)
    reach = np.concatenate([*arrays.values()])
    low, high = reach.min(), reach.max()
    margin = 0.05 * (high - low) or 1.0
    panels[0].set(ylabel=names[1], xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    return figure


def _labels(labels: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels, shape (N,), and the classes among them: none where they are numbers on a scale."""
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.shape != (count,):
        raise UsageError(f"labels: expected shape ({count},), got {given.shape}; pass one label per row of codes")
    classes = np.unique(given)
    if len(classes) <= MAX_CLASSES:
        return given, classes
    if not np.issubdtype(given.dtype, np.number):
        raise UsageError(
            f"labels: expected at most {MAX_CLASSES} names, got {len(classes)}; "
            "group them, or pass numbers for a colour scale"
        )
    return given, classes[:0]


def _strips(axes: Axes, points: np.ndarray, given: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Put codes of one dimension, shape (N, 1), at the height of their label: shape (N, 2)."""
    heights = given
    if len(classes):  # within a class the height is spread, to keep equal codes apart
        heights = np.searchsorted(classes, given) + np.random.default_rng(0).uniform(-0.3, 0.3, len(points))
        axes.set_yticks(range(len(classes)), [str(name) for name in classes])
    axes.set_xlabel("z[0]")
    axes.set_ylabel("label")
    return np.stack([points[:, 0], np.asarray(heights, dtype=float)], 1)


def _plane(axes: Axes, points: np.ndarray) -> np.ndarray:
    """Two dimensions as they are, more by their first two principal components: shape (N, 2)."""
    names = ["z[0]", "z[1]"]
    if points.shape[1] > 2:
        points, shares = _principal_components(points)
        names = [f"PCA {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_aspect("equal", adjustable="datalim")
    return points


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
    """Write each class's name on its most central point: in grey print the colours alone would not do.

    Where classes lie over one another, a name that would hide another is left to the legend.
    """
    from matplotlib.patheffects import withStroke

    written = []
    for name in classes:
        members = points[given == name]
        central = np.linalg.norm(members - np.median(members, 0), axis=1).argmin()  # the median may lie outside
        text = axes.annotate(
            textwrap.shorten(str(name), 16, placeholder="…"),
            tuple(members[central]),
            ha="center",
            va="center",
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        written.append(text)
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # boxes are where the layout puts them
    free: list[Any] = []
    for text in written:
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in free):
            text.remove()
        else:
            free.append(box)
