r"""Densities of the plane: p(x) of models as contours, against data.

A contour bounds the smallest region that holds a given share of p(x): {x: p(x) >= t}, with t such that its probability
is the share. On a grid of cells of area A, whose probabilities are p(x) A, t is found by adding up the largest first. A
region that is not whole in the frame, because the model has mass beyond it, is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.plots.style import BLUE, INK, PLAIN, VERMILLION, Style, as_array, dot_area, new_figure, scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.5, 0.9, 0.99)
SHADES = (0.45, 0.25, 0.12)  # opacity of the region of each share
MARGIN = 0.2  # of the data's range, around them
RADII = (1.0, 2.0)  # standard deviations, of the ellipses of components


def densities(
    x: Tensor,
    models: Mapping[str, Callable[[Tensor], Tensor]],
    components: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    title: str | None = None,
    style: Style = PLAIN,
    size: int = 80,
) -> Figure:
    """Draw p(x) of models of the plane, each in a panel, over the same data.

    Args:
        x: Data, shape (N, 2), at least two rows that differ in both elements.
        models: By name, log p(x) in nats of points of shape (P, 2), shape (P,): `log_prob` of an exact model, or
            `lambda x: log_marginal(model, guide, x, 500).estimate` of a pair.
        components: By name of a model, means (C, 2) and covariances (C, 2, 2) of Gaussians that it is made of, drawn as
            ellipses at one and two standard deviations.
        title: First line of the title.
        style: How data are drawn.
        size: Points of the grid on a side: `size` squared values of log p(x) for each model.
    Raises:
        UsageError: x is not of the plane, there is no model, a model gives other shapes, or `components` names none.
    """
    _check(x, models, components or {}, size)
    (left, low), (right, high) = _frame(as_array(x))
    across, up = (torch.linspace(*ends, size, dtype=torch.double) for ends in ((left, right), (low, high)))
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)  # (up, across, 2)
    area = float((across[1] - across[0]) * (up[1] - up[0]))

    columns = len(models) if len(models) <= 3 else math.ceil(math.sqrt(len(models)))
    rows = -(-len(models) // columns)
    held = ", ".join(f"{share:.0%}" for share in SHARES)
    caption = f"The smallest regions that hold {held} of p(x), and {len(x):,} data"
    figure = new_figure(max(6.2, 3.9 * columns), 4.0 * rows + 0.9, caption, title)
    figure.set_layout_engine("compressed")
    names = list(map(style.axis, style.names(2) or ("x[0]", "x[1]")))
    for i, (name, log_prob) in enumerate(models.items()):
        axes = figure.add_subplot(rows, columns, i + 1, aspect="equal", xlim=(left, right), ylim=(low, high))
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel(names[0] if i + columns >= len(models) else "")
        axes.set_ylabel(names[1] if i % columns == 0 else "")
        scatter(axes, as_array(x), s=dot_area(len(x)) / 3, color=INK, alpha=0.5, linewidths=0, rasterized=True)
        _contours(axes, across, up, _values(name, log_prob, grid.to(x)), area)
        for mean, covariance in zip(*(components or {}).get(name, ((), ())), strict=True):
            _ellipses(axes, as_array(mean), as_array(covariance))
    if components:
        handle = figure.axes[0].plot([], [], color=VERMILLION, label="components, at 1 and 2 standard deviations")
        figure.legend(handles=handle, loc="outside lower center", fontsize="small")
    return figure


def levels(density: np.ndarray, area: float, shares: tuple[float, ...] = SHARES) -> list[float | None]:
    """For each share, the t whose region {p(x) >= t} holds it, None where the cells do not hold as much.

    Args:
        density: p(x) of each cell, any shape.
        area: Of a cell, so that `density` times `area` is its probability.
        shares: Probabilities, from 0 to 1.
    """
    falling = np.sort(density, axis=None)[::-1]
    held = np.cumsum(falling) * area
    places = [int(np.searchsorted(held, share)) for share in shares]
    return [float(falling[place]) if place < len(falling) else None for place in places]


def _check(x: Tensor, models: Mapping[str, Any], components: Mapping[str, Any], size: int) -> None:
    """Refuse what is not of the plane, and names that are of no model."""
    check_count("size", size, 2)
    if x.dim() != 2 or x.shape[1] != 2 or len(x) < 2 or not (x.max(0).values > x.min(0).values).all():
        raise UsageError(
            f"x: expected shape (N, 2), of rows that differ in both elements, got {tuple(x.shape)}; pass data of the "
            "plane"
        )
    if not models:
        raise UsageError("models: expected at least one log p(x), by name, got none")
    if unknown := sorted(set(components) - set(models)):
        raise UsageError(f"components: '{unknown[0]}' is no model's name; choose from {', '.join(models)}")


def _frame(points: np.ndarray) -> np.ndarray:
    """The lower left and upper right corners, shape (2, 2): the data, and a margin."""
    low, high = points.min(0), points.max(0)
    return np.stack([low - MARGIN * (high - low), high + MARGIN * (high - low)])


@torch.no_grad()
def _values(name: str, log_prob: Callable[[Tensor], Tensor], grid: Tensor) -> np.ndarray:
    """p(x) on a grid of points (up, across, 2), shape (up, across)."""
    points = grid.flatten(0, 1)
    values = log_prob(points)
    if values.shape != (len(points),):
        raise UsageError(
            f"models: '{name}' gives a log p(x) of shape {tuple(values.shape)}, expected ({len(points)},), one number "
            "for each point"
        )
    return np.exp(as_array(values)).reshape(grid.shape[:2])


def _contours(axes: Axes, across: Tensor, up: Tensor, density: np.ndarray, area: float) -> None:
    """Shade the regions, the larger ones lighter, and draw their edges."""
    for level, shade in zip(levels(density, area), SHADES, strict=True):
        if level is None or not density.min() < level < density.max():
            continue
        axes.contourf(across, up, density, levels=[level, np.inf], colors=[BLUE], alpha=shade)
        axes.contour(across, up, density, levels=[level], colors=[BLUE], linewidths=0.8)


def _ellipses(axes: Axes, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Draw where a Gaussian is one and two standard deviations away from its mean."""
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)])
    for radius in RADII:
        axes.plot(*(mean[:, None] + radius * circle), color=VERMILLION, linewidth=0.9)
