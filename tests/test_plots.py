"""Figures hold the data that they were given, and leave matplotlib's global state alone."""

import ast
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from matplotlib.text import Text

from pyrovae import plots
from pyrovae.errors import UsageError


def tiles(figure: Figure) -> list[np.ndarray]:
    """The images of a figure, row by row."""
    images = [image for axes in figure.axes for image in axes.get_children() if isinstance(image, AxesImage)]
    images.sort(key=lambda image: (image.get_extent()[3], image.get_extent()[0]))
    return [np.asarray(image.get_array()) for image in images]


def offsets(figure: Figure) -> list[np.ndarray]:
    """The points of each scatter of a figure."""
    return [
        np.asarray(points.get_offsets())
        for axes in figure.axes
        for points in axes.collections
        if isinstance(points, PathCollection)
    ]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def line(figure: Figure, label: str) -> np.ndarray:
    """The data of the curve whose label starts so, shape (points, 2)."""
    (found,) = [line for axes in figure.axes for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(found.get_xydata())


@pytest.fixture
def metrics() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4, 5],
            "train_bound": [-9e4, -110.0, -100.0, -95.0, -90.0],
            "validation_bound": [-9e4, -112.0, -101.0, -99.0, -103.0],
            "validation_elbo": [np.nan] * 5,
            "reconstruction": [-9e4, -100.0, -90.0, -80.0, -75.0],
            "kl": [1.0, 10.0, 12.0, 15.0, 16.0],
            "active_units": [0, 1, 2, 2, 2],
            "beta": [1.0] * 5,
            "learning_rate": [1e-3] * 5,
            "kl_z1[0]": [0.1, 0.2, 0.3, 0.4, 0.5],
            "kl_z1[1]": [0.2, 2.0, 3.0, 4.0, 5.0],
            "kl_z2[0]": [0.5, 1.0, 1.5, 2.0, 3.0],
        }
    )


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "name": ["VAE", "a mixture whose name is far too long for one line of a figure", "IWAE"],
            "log_marginal": [-86.5, -102.0, -84.25],
            "error": [0.5, 0.25, 0.125],
            "exact": [False, True, False],
            "elbo": [-90.0, np.nan, -88.0],
        }
    )


def test_drawing_leaves_global_state_alone(metrics: pd.DataFrame, table: pd.DataFrame) -> None:
    import matplotlib
    from matplotlib import pyplot

    images, points, profiles = torch.rand(3, 1, 6, 4), torch.randn(3, 2), torch.randn(3, 7)
    numbers, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
    for figure in (
        plots.training_curves(metrics),
        plots.reconstructions(images, images),
        plots.samples(points),
        plots.densities(points, {"normal": lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi)}),
        plots.neighbourhood(profiles, profiles[:, None]),
        plots.latent_map(torch.randn(30, 5), torch.arange(30) % 3),
        plots.clouds({"codes": points, "draws": points}),
        plots.traversals(points[None], torch.linspace(-2, 2, 3)),
        plots.k_curve([1, 10], [-2.0, -1.5], [0.1, 0.1], elbo=-2.0, exact=-1.0),
        plots.comparison(table),
    ):
        figure.draw_without_rendering()
    assert pyplot.get_fignums() == numbers
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("event", [(6, 4), (1, 6, 4), (3, 6, 4), (2,), (7,), (1,)])
def test_every_event_is_drawn_by_every_figure_with_its_title(event: tuple[int, ...]) -> None:
    x = torch.rand(2, *event)
    for figure in (
        plots.samples(x, "VAE, digits"),
        plots.reconstructions(x, x, "VAE, digits"),
        plots.neighbourhood(x, x[:, None], "VAE, digits"),
        plots.traversals(x[None], [0.0, 1.0], title="VAE, digits"),
    ):
        assert texts(figure).count("VAE, digits") == 1


def test_a_grid_has_every_image_in_rows_with_names_under_them() -> None:
    x = torch.rand(100, 3, 6, 4)
    figure = plots.grid(x, 10, "Draws")
    drawn = tiles(figure)
    assert len(drawn) == 100
    for image, tile in zip(x, drawn, strict=True):  # row by row, channels last
        np.testing.assert_allclose(tile, image.permute(1, 2, 0), atol=1e-6)
    named = plots.grid(x[:7], 5, "Data", list("abcdefg"))
    (axes,) = named.axes
    below = {text.get_text(): text.get_position() for text in axes.texts}
    extents = sorted((i.get_extent() for i in axes.get_images()), key=lambda e: (e[3], e[0]))
    for name, (left, right, bottom, top) in zip("abcdefg", extents, strict=True):
        across, down = below[name]
        assert left < across < right
        assert bottom < down < bottom + 0.28 < bottom + bottom - top
    with pytest.raises(UsageError, match="names: expected 7 names, got 2"):
        plots.grid(x[:7], 5, names=["a", "b"])
    with pytest.raises(UsageError, match=r"x: expected images, got rows of shape \(2,\)"):
        plots.grid(torch.rand(4, 2), 2)


def test_ten_reconstructions_stand_in_one_row() -> None:
    x = torch.rand(10, 4, 4)
    (axes,) = plots.reconstructions(x, x).axes
    assert len(axes.get_yticks()) == 2
    assert {round(image.get_extent()[0], 2) for image in axes.get_images()} == {i + 0.04 for i in range(10)}


def test_a_curve_of_steps_has_every_step_and_the_mean_around_it() -> None:
    steps, values = np.arange(10, 2010, 10), np.random.default_rng(0).uniform(size=200)
    figure = plots.step_curve(steps, values, "SSE", window=10)
    np.testing.assert_array_equal(line(figure, "one batch"), np.stack([steps, values], 1))
    mean = line(figure, "mean of 21")[:, 1]
    np.testing.assert_allclose(mean[50], values[40:61].mean())
    np.testing.assert_allclose(mean[3], values[:7].mean())
    np.testing.assert_allclose(mean[[0, -1]], values[[0, -1]])
    assert "above the axis" not in texts(figure)
    values[30] = 1e6
    failing = plots.step_curve(steps, values, "SSE")
    assert "1 step above the axis, up to 1,000,000" in texts(failing)
    assert np.delete(values, 30).max() < failing.axes[0].get_ylim()[1] < 10
    with pytest.raises(UsageError, match=r"values: expected one for each of at least one step, got \(3,\) for \(2,\)"):
        plots.step_curve([1, 2], [1.0, 2.0, 3.0], "SSE")


def test_importing_plots_imports_no_plotting_library() -> None:
    names: set[str] = set()
    for path in Path(plots.__file__).parent.glob("*.py"):
        source = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.module or "" for node in source.body if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in source.body if isinstance(node, ast.Import) for alias in node.names}
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert roots == {"numpy", "torch", "pyrovae"}


def test_a_figure_shows_itself_in_a_notebook_without_pyplot() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(plots.samples(torch.rand(1, 4, 4)))
    assert data["image/png"].startswith(b"\x89PNG")


def test_training_curves_mark_the_argmax_of_the_validation_bound(metrics: pd.DataFrame) -> None:
    figure = plots.training_curves(metrics)
    np.testing.assert_array_equal(line(figure, "best, epoch"), [[4, -99.0]])
    np.testing.assert_array_equal(line(figure, "train"), metrics[["epoch", "train_bound"]])
    without = plots.training_curves(metrics.drop(columns="validation_bound"))
    np.testing.assert_array_equal(line(without, "best, epoch"), [[5, -90.0]])


def test_training_curves_keep_the_first_epochs_from_flattening_the_rest(metrics: pd.DataFrame) -> None:
    bound = plots.training_curves(metrics).axes[0]
    low, high = bound.get_ylim()
    assert -9e4 < low < -112.0
    assert high > -90.0
    assert "1 epoch below the axis" in bound.get_title()


def test_training_curves_show_each_layer(metrics: pd.DataFrame) -> None:
    """The KL and the active units of every site, from the data upwards whatever the order of the columns."""
    columns = {"kl_z2": metrics.kl / 4, "kl_z1": metrics.kl / 2, "active_units_z1": metrics.active_units}
    figure = plots.training_curves(metrics.assign(**columns))
    shown = {axes.get_title(): axes.get_lines() for axes in figure.axes}
    kl = shown["KL of each layer, given those above"]
    assert [line.get_label() for line in kl] == ["z1", "z2"]
    np.testing.assert_array_equal(kl[1].get_ydata(), metrics.kl / 4)
    assert [line.get_label() for line in shown["active units of each layer"]] == ["z1"]


def test_training_curves_leave_out_what_holds_nothing(metrics: pd.DataFrame) -> None:
    titles = [axes.get_title() for axes in plots.training_curves(metrics).axes]
    assert "β" not in titles
    assert "learning rate" not in titles
    with pytest.raises(ValueError, match="not enough values"):
        line(plots.training_curves(metrics), "validation ELBO")
    metrics["active_units"] = np.nan
    metrics["beta"] = [0.2, 0.4, 0.6, 0.8, 1.0]
    titles = [axes.get_title() for axes in plots.training_curves(metrics).axes]
    assert "active units" not in titles
    assert "β" in titles


def test_training_curves_sort_the_kl_of_each_dimension_by_the_last_epoch(metrics: pd.DataFrame) -> None:
    figure = plots.training_curves(metrics)
    (mesh,) = [mesh for axes in figure.axes for mesh in axes.collections if isinstance(mesh, QuadMesh)][:1]
    names = ["z1[1]", "z2[0]", "z1[0]"]
    assert [label.get_text() for label in mesh.axes.get_yticklabels()] == names
    np.testing.assert_array_equal(mesh.get_array(), metrics[[f"kl_{name}" for name in names]].T)
    (bars,) = [axes for axes in figure.axes if axes.get_title() == "last epoch"]
    assert [bar.get_width() for bar in bars.patches] == [5.0, 3.0, 0.5]


def test_training_curves_work_with_one_epoch_and_gaps(metrics: pd.DataFrame) -> None:
    one = plots.training_curves(metrics[:1])
    one.draw_without_rendering()
    np.testing.assert_array_equal(line(one, "best, epoch"), [[1, -9e4]])
    metrics.loc[[0, 2], "validation_bound"] = np.nan
    metrics.loc[4, "validation_bound"] = np.inf
    np.testing.assert_array_equal(line(plots.training_curves(metrics), "validation"), [[2, -112.0], [4, -99.0]])


def test_training_curves_need_epochs_and_something_to_draw(metrics: pd.DataFrame) -> None:
    with pytest.raises(UsageError, match="epoch"):
        plots.training_curves(metrics.drop(columns="epoch"))
    with pytest.raises(UsageError, match="no row"):
        plots.training_curves(metrics[:0])
    with pytest.raises(UsageError, match="train an epoch"):
        plots.training_curves(metrics[["epoch"]])


def test_reconstructions_draw_each_image_above_its_reconstruction() -> None:
    x, copy = torch.rand(12, 1, 5, 4), torch.rand(12, 1, 5, 4, requires_grad=True)
    drawn = tiles(plots.reconstructions(x, copy))
    rows = [x[:8], copy[:8], x[8:], copy[8:]]  # two bands of at most 8 across
    np.testing.assert_allclose(drawn, torch.cat(rows).squeeze(1).detach())


def test_reconstructions_of_points_join_each_pair() -> None:
    x, copy = torch.randn(6, 2), torch.randn(6, 2)
    figure = plots.reconstructions(x, copy)
    originals, copies = offsets(figure)
    np.testing.assert_allclose(originals, x)
    np.testing.assert_allclose(copies, copy)
    joined = np.asarray(figure.axes[0].lines[0].get_xydata()).reshape(6, 3, 2)
    np.testing.assert_allclose(joined[:, :2], torch.stack([x, copy], 1))
    assert np.isnan(joined[:, 2]).all()


def test_reconstructions_of_profiles_lie_over_the_data() -> None:
    x, copy = torch.randn(3, 9), torch.randn(3, 9)
    for axes, original, other in zip(plots.reconstructions(x, copy).axes, x, copy, strict=True):
        np.testing.assert_allclose([curve.get_ydata() for curve in axes.lines], torch.stack([original, other]))


def test_reconstructions_refuse_another_shape() -> None:
    with pytest.raises(UsageError, match=r"reconstruction: expected the shape of x, \(3, 4, 4\), got \(2, 4, 4\)"):
        plots.reconstructions(torch.rand(3, 4, 4), torch.rand(2, 4, 4))


def test_samples_draw_the_first_64_images_and_say_so() -> None:
    x = torch.rand(70, 3, 4)
    figure = plots.samples(x, title="IWAE, K = 50")
    np.testing.assert_allclose(tiles(figure), x[:64])
    assert "IWAE, K = 50" in texts(figure)
    assert "first 64 of 70" in texts(figure)


def test_conditional_samples_have_one_row_or_panel_per_condition() -> None:
    x = torch.rand(3, 20, 4, 5)
    figure = plots.conditional_samples(x, ["cat", "dog", "eel"], "CVAE")
    np.testing.assert_allclose(tiles(figure), x[:, :16].flatten(0, 1))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "eel"]
    points = torch.randn(3, 50, 2)
    figure = plots.conditional_samples(points, ["0", "1", "2"])
    np.testing.assert_allclose(offsets(figure), points)
    assert [axes.get_title() for axes in figure.axes] == ["0", "1", "2"]
    profiles = torch.randn(2, 5, 7)
    for axes, drawn in zip(plots.conditional_samples(profiles, ["a", "b"]).axes, profiles, strict=True):
        np.testing.assert_allclose([curve.get_ydata() for curve in axes.lines], drawn)
    with pytest.raises(UsageError, match="expected 3 names, got 2"):
        plots.conditional_samples(x, ["cat", "dog"])


def shades(figure: Figure) -> np.ndarray:
    """The brightness in which each image's pixels are drawn, from 0, black, to 1, white; shape (images, H, W)."""
    images = [image for axes in figure.axes for image in axes.get_children() if isinstance(image, AxesImage)]
    images.sort(key=lambda image: (image.get_extent()[3], image.get_extent()[0]))
    return np.stack([image.to_rgba(image.get_array())[..., :3].mean(-1) for image in images])


GREYS = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]).view(1, 2, 3)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_grey_images_are_drawn_as_photographs_by_every_figure(shape: tuple[int, ...]) -> None:
    """0 is black and 1 is white, on a fixed scale, whatever is in the figure."""
    x = GREYS.view(1, *shape)
    expected = GREYS.clamp(0, 1)
    for figure in (
        plots.samples(x),
        plots.reconstructions(x, x),
        plots.neighbourhood(x, x[:, None]),
        plots.traversals(x[None], [0.0]),
    ):
        for drawn in shades(figure):
            np.testing.assert_allclose(drawn, expected[0], atol=1 / 255)


def test_colour_images_are_red_green_and_blue_in_this_order_and_clipped() -> None:
    x = torch.tensor([-1.0, 0.25, 2.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    (image,) = tiles(plots.samples(x))
    np.testing.assert_array_equal(image[0, 0], [0, 0.25, 1])
    figure = plots.samples(
        torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4), style=plots.Style(ink=True)
    )
    np.testing.assert_array_equal(tiles(figure)[0][0, 0], [1, 0, 0])  # red, with ink as without


def test_ink_is_dark_on_white_paper_and_limits_are_its_ends() -> None:
    np.testing.assert_allclose(
        shades(plots.samples(GREYS, style=plots.Style(ink=True)))[0], 1 - GREYS[0].clamp(0, 1), atol=1 / 255
    )
    wide = plots.Style(limits=(-0.5, 1.5))
    np.testing.assert_allclose(shades(plots.samples(GREYS, style=wide))[0], (GREYS[0] + 0.5) / 2, atol=1 / 255)
    colour = GREYS.view(1, 3, 1, 2)
    np.testing.assert_allclose(tiles(plots.samples(colour, style=wide))[0].transpose(2, 0, 1), (colour[0] + 0.5) / 2)
    with pytest.raises(UsageError, match=r"limits: expected the lower value first, got \(1.0, 0.0\)"):
        plots.Style(limits=(1.0, 0.0))


def outside(figure: Figure) -> list[str]:
    """The texts that the edge of a figure cuts."""
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    written = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    unseen = set()  # ticks beyond the limits of their axis, which are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return [
        text.get_text()
        for text in written
        if text not in unseen and not all(whole.contains(x, y) for x, y in text.get_window_extent().corners())
    ]


@pytest.mark.parametrize("event", [(28, 20), (1, 10, 60), (3, 32, 32), (2,), (6,)])
@pytest.mark.parametrize("count", [1, 40])
def test_no_label_is_cut_by_the_edge(event: tuple[int, ...], count: int) -> None:
    x = torch.rand(count, *event)
    names = [f"a column with a long name {i}" for i in range(event[0])] if len(event) == 1 else None
    style = plots.Style(columns=names)
    few = x[:3]
    for figure in (
        plots.reconstructions(x, x, "digits", style),
        plots.samples(x, "digits", style),
        plots.neighbourhood(few, few[:, None].expand(-1, 5, *event), "digits", style),
        plots.traversals(few[None], [-2.0, 0.0, 2.0][: len(few)], [17], "digits", style),
    ):
        assert outside(figure) == []


def test_columns_are_named_with_their_unit() -> None:
    x = torch.randn(5, 2)
    plane = plots.Style(columns=("height", "weight"), unit="standardised")
    for figure in (plots.samples(x, style=plane), plots.reconstructions(x, x, style=plane)):
        assert figure.axes[0].get_xlabel() == "height, standardised"
        assert figure.axes[0].get_ylabel() == "weight, standardised"
    panel = plots.neighbourhood(x[:1], x[None], style=plane).axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("height, standardised", "weight, standardised")
    wide = torch.randn(1, 30)
    names = [f"column {i}" for i in range(30)]
    axes = plots.samples(wide, style=plots.Style(columns=names)).axes[0]
    assert [names[int(at)] for at in axes.get_xticks()] == [label.get_text() for label in axes.get_xticklabels()]
    assert len(axes.get_xticks()) == 10  # of many, as many as can be read
    with pytest.raises(UsageError, match="columns: expected 2 names, one for each element of x, got 3"):
        plots.samples(x, style=plots.Style(columns=("a", "b", "c")))


def test_samples_of_points_are_a_scatter_and_vectors_are_profiles() -> None:
    points, profiles = torch.randn(200, 2), torch.randn(3, 5)
    np.testing.assert_allclose(offsets(plots.samples(points))[0], points)
    drawn = [axes.lines[0].get_ydata() for axes in plots.samples(profiles).axes]
    np.testing.assert_allclose(drawn, profiles)


@pytest.mark.parametrize("shape", [(5,), (0, 4, 4), (2, 4, 8, 8), (2, 1, 1, 1, 1)])
def test_an_event_that_cannot_be_drawn_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="x: expected shape"):
        plots.samples(torch.rand(shape))


def test_neighbourhood_has_one_row_per_original_set_apart() -> None:
    x, near = torch.rand(3, 4, 4), torch.rand(3, 5, 4, 4)
    figure = plots.neighbourhood(x, near)
    np.testing.assert_allclose(tiles(figure), torch.cat([x[:, None], near], 1).flatten(0, 1))
    lefts = sorted({image.get_extent()[0] for image in figure.axes[0].get_images()})
    gaps = np.diff(lefts)
    assert gaps[0] > gaps[1:].max()


def test_neighbourhood_of_points_has_one_panel_per_original() -> None:
    x, near = torch.randn(3, 2), torch.randn(3, 5, 2)
    drawn = offsets(plots.neighbourhood(x, near))
    for i in range(3):
        np.testing.assert_allclose(drawn[2 * i], near[i])
        np.testing.assert_allclose(drawn[2 * i + 1], x[i : i + 1])


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 4, 4), (3, 5, 4, 5), (3, 0, 4, 4)])
def test_neighbourhood_refuses_neighbours_of_other_data(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"neighbours: expected shape \(3, M, 4, 4\)"):
        plots.neighbourhood(torch.rand(3, 4, 4), torch.rand(shape))


def test_latent_map_puts_codes_of_two_dimensions_where_they_are() -> None:
    codes, labels = torch.randn(40, 2), ["odd" if i % 2 else "even" for i in range(40)]
    figure = plots.latent_map(codes, labels)
    even, odd = offsets(figure)
    np.testing.assert_allclose(even, codes[::2])
    np.testing.assert_allclose(odd, codes[1::2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["even", "odd"]
    assert "PCA" not in texts(figure)


def test_clouds_are_where_they_are_on_the_same_axes() -> None:
    clouds = {"codes": torch.randn(20, 2), "draws of p(z)": 5 + torch.randn(30, 2)}
    figure = plots.clouds(clouds, ["z[3]", "z[1]"], "VAE, digits")
    left, right = figure.axes
    for panel, (name, cloud) in zip((left, right), clouds.items(), strict=True):
        assert panel.get_title() == name
        assert panel.get_xlabel() == "z[3]"
        np.testing.assert_allclose(panel.collections[0].get_offsets(), cloud)
    assert left.get_xlim() == right.get_xlim()
    for wrong in ({}, {"codes": torch.randn(4, 3)}):
        with pytest.raises(UsageError, match=r"points: expected clouds of shape \(N, 2\), got"):
            plots.clouds(wrong)


def test_latent_map_names_each_class_on_one_of_its_points() -> None:
    angle = torch.linspace(0, 6.2, 50)
    ring = torch.stack([angle.cos(), angle.sin()], 1)  # whose median is its empty middle
    figure = plots.latent_map(ring, torch.full((50,), 7))
    (name,) = [text for text in figure.axes[0].texts if text.get_text() == "7"]
    assert np.linalg.norm(ring - torch.tensor(name.xy), axis=1).min() < 1e-6


def test_latent_map_leaves_a_name_that_would_hide_another_to_the_legend() -> None:
    clouds = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]]).repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2)
    figure = plots.latent_map(clouds, [name for name in ("here", "here too", "there") for _ in range(20)])
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["here", "there"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["here", "here too", "there"]


def test_latent_map_tells_twenty_classes_apart() -> None:
    figure = plots.latent_map(torch.randn(200, 2), torch.arange(200) % 20)
    styles = {
        (tuple(points.get_facecolor()[0][:3]), points.get_paths()[0].vertices.shape)
        for points in figure.axes[0].collections
    }
    assert len(styles) == 20


def test_latent_map_projects_more_dimensions_on_principal_components() -> None:
    torch.manual_seed(0)
    plane = torch.randn(500, 2) * torch.tensor([3.0, 1.0])
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    codes = plane @ rotation[:2] + 5.0  # a plane in six dimensions: two components explain all of it
    figure = plots.latent_map(codes)
    (drawn,) = offsets(figure)
    centred = codes - codes.mean(0)
    np.testing.assert_allclose(drawn @ drawn.T, centred @ centred.T, atol=1e-3)
    x_label, y_label = figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
    shares = [int(label.split("(")[1].split("%")[0]) for label in (x_label, y_label)]
    assert x_label.startswith("PCA 1")
    assert y_label.startswith("PCA 2")
    assert sum(shares) in (99, 100, 101)
    assert shares[0] == pytest.approx(90, abs=3)


def test_latent_map_of_collapsed_codes_draws() -> None:
    figure = plots.latent_map(torch.zeros(10, 4))
    figure.draw_without_rendering()
    assert "0% of the variance" in texts(figure)


def test_latent_map_colours_many_numbers_by_a_scale() -> None:
    labels = torch.linspace(0, 1, 40)
    figure = plots.latent_map(torch.randn(40, 2), labels)
    np.testing.assert_allclose(figure.axes[0].collections[0].get_array(), labels)
    assert not figure.legends


def test_latent_map_of_one_dimension_is_a_histogram_or_a_strip_per_class() -> None:
    codes, labels = torch.randn(60, 1), torch.arange(60) % 3
    bars = plots.latent_map(codes).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 60
    figure = plots.latent_map(codes, labels)
    for i, strip in enumerate(offsets(figure)):
        np.testing.assert_allclose(strip[:, 0], codes[labels == i, 0])
        assert abs(strip[:, 1] - i).max() < 0.5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1", "2"]


def test_latent_map_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"codes: expected shape \(N, Z\)"):
        plots.latent_map(torch.randn(10))
    with pytest.raises(UsageError, match=r"labels: expected shape \(10,\), got \(9,\)"):
        plots.latent_map(torch.randn(10, 2), torch.arange(9))
    with pytest.raises(UsageError, match="at most 20 names, got 30"):
        plots.latent_map(torch.randn(30, 2), [f"name {i}" for i in range(30)])


def test_traversals_have_a_row_per_dimension_and_a_column_per_value() -> None:
    images = torch.rand(2, 5, 4, 4)
    figure = plots.traversals(images, torch.linspace(-1, 1, 5), dims=[7, 3])
    np.testing.assert_allclose(tiles(figure), images.flatten(0, 1))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["−1", "−0.5", "0", "0.5", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z[7]", "z[3]"]


def test_traversals_thin_many_values_and_keep_both_ends() -> None:
    images = torch.rand(1, 40, 4, 4)
    drawn = tiles(plots.traversals(images, torch.linspace(-3, 3, 40)))
    assert len(drawn) == 16
    np.testing.assert_allclose(drawn[0], images[0, 0])
    np.testing.assert_allclose(drawn[-1], images[0, -1])


def test_traversals_of_points_are_paths_coloured_by_value() -> None:
    paths, values = torch.randn(2, 5, 2), torch.linspace(-1, 1, 5)
    figure = plots.traversals(paths, values)
    for axes, path in zip(figure.axes, paths, strict=False):
        np.testing.assert_allclose(axes.lines[0].get_xydata(), path)
        np.testing.assert_allclose(axes.collections[0].get_array(), values)


def test_traversals_refuse_values_and_dims_of_another_number() -> None:
    images = torch.rand(2, 5, 4, 4)
    with pytest.raises(UsageError, match=r"values: expected shape \(5,\), got \(4,\)"):
        plots.traversals(images, torch.zeros(4))
    with pytest.raises(UsageError, match="dims: expected 2 dimensions, got 1"):
        plots.traversals(images, torch.zeros(5), dims=[0])


def test_k_curve_holds_the_values_in_order_of_k_with_a_band_of_95_percent() -> None:
    figure = plots.k_curve([50, 1, 5], [-84.0, -88.0, -86.0], [0.1, 0.3, 0.2], elbo=-88.5, exact=-83.0)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(line(figure, "$L_K$"), [[1, -88.0], [5, -86.0], [50, -84.0]])
    assert set(line(figure, "ELBO")[:, 1]) == {-88.5}
    assert set(line(figure, "exact log p(x)")[:, 1]) == {-83.0}
    band = axes.collections[0].get_paths()[0].vertices
    for k, mean, error in ((1, -88.0, 0.3), (5, -86.0, 0.2), (50, -84.0, 0.1)):
        edges = band[band[:, 0] == k, 1]
        assert (edges.min(), edges.max()) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error))


def test_k_curve_shows_how_certain_the_rise_is_beside_the_band() -> None:
    """The rows of a curve move together: its band is wide, the differences to the last point are known far better."""
    ks, mean, error, paired = [50, 1, 5], [-84.0, -88.0, -86.0], [3.0, 3.0, 3.0], [0.0, 0.2, 0.1]
    _, rise = plots.k_curve(ks, mean, error, paired_error=paired).axes
    (container,) = rise.containers
    points, _, (bars,) = container.lines
    np.testing.assert_allclose(points.get_xydata(), [[1, -4.0], [5, -2.0], [50, 0.0]])
    for (low, high), middle, half in zip(bars.get_segments(), (-4.0, -2.0, 0.0), (0.2, 0.1, 0.0), strict=True):
        np.testing.assert_allclose((low[1], high[1]), (middle - 1.96 * half, middle + 1.96 * half))
    assert len(plots.k_curve(ks, mean, error).axes) == 1
    with pytest.raises(UsageError, match="paired_error: expected shape"):
        plots.k_curve(ks, mean, error, paired_error=[0.1])


def test_k_curve_refuses_lengths_that_differ_and_no_particles() -> None:
    with pytest.raises(UsageError, match="expected one length"):
        plots.k_curve([1, 2], [-1.0], [0.1])
    with pytest.raises(UsageError, match="at least 1, got 0"):
        plots.k_curve([0, 2], [-1.0, -1.0], [0.1, 0.1])


def test_comparison_orders_the_best_first_and_writes_the_numbers(table: pd.DataFrame) -> None:
    axes = plots.comparison(table, "static MNIST").axes[0]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == ["IWAE", "VAE", "a mixture whose name is far too long for one line of a figure"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the axis points down, so the first is on top
    numbers = [text.get_text() for text in axes.texts if "±" in text.get_text()][:3]
    assert numbers == ["−84.25 ± 0.12", "−86.50 ± 0.50", "−102.00 ± 0.25"]


def test_comparison_marks_exact_models_and_draws_intervals_and_elbos(table: pd.DataFrame) -> None:
    figure = plots.comparison(table)
    axes = figure.axes[0]
    drawn = {}
    for container in axes.containers:
        points, _, (bars,) = container.lines
        ends = np.concatenate([segment[:, 0] for segment in bars.get_segments()])
        drawn[container.get_label()] = (points.get_marker(), list(points.get_xdata()), list(ends))
    marker, means, ends = drawn["importance-sampled"]
    assert means == [-84.25, -86.5]
    assert ends == pytest.approx([-84.25 - 0.245, -84.25 + 0.245, -86.5 - 0.98, -86.5 + 0.98])
    assert drawn["exact"][1] == [-102.0]
    assert drawn["exact"][0] != marker
    (elbos,) = offsets(figure)
    np.testing.assert_array_equal(elbos[:, 0], [-88.0, -90.0])
    (hollow,) = [points for points in axes.collections if isinstance(points, PathCollection)]
    assert tuple(hollow.get_facecolor()[0][:3]) == to_rgb("white")


def test_comparison_keeps_a_hopeless_model_from_pressing_the_others_together(table: pd.DataFrame) -> None:
    table.loc[len(table)] = ["one Gaussian", -5e4, 1.0, True, np.nan]
    figure = plots.comparison(table)
    low, high = figure.axes[0].get_xlim()
    assert high - low < 30
    assert "−50,000.00" in texts(figure)
    ((edge, _),) = line(figure, "off the axis")
    assert low < edge < low + 1


def test_comparison_survives_models_without_a_number(table: pd.DataFrame) -> None:
    table["log_marginal"] = [np.nan, -np.inf, -84.0]
    figure = plots.comparison(table)
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][::2] == ["IWAE", "VAE"]
    assert "not a number" in texts(figure)
    assert "−∞" in texts(figure)
    table["log_marginal"] = np.nan
    plots.comparison(table.drop(columns="elbo")).draw_without_rendering()


def test_comparison_draws_no_interval_for_an_unknown_error(table: pd.DataFrame) -> None:
    table.loc[0, "error"] = np.nan
    figure = plots.comparison(table)
    figure.draw_without_rendering()
    assert "−86.50\n" in texts(figure)
    assert "−86.50 ±" not in texts(figure)


def test_comparison_shows_verdicts_ranks_paired_differences_and_seeds(table: pd.DataFrame) -> None:
    table = table.assign(
        low=[-87.0, -102.5, -84.5],
        high=[-85.0, -101.5, -84.0],
        verdict=["lower bound only", "exact", "ok"],
        rank_low=[1, 3, 1],
        rank_high=[2, 3, 2],
        difference=[-2.25, -17.75, 0.0],
        difference_low=[-2.5, -18.0, 0.0],
        difference_high=[-2.0, -17.5, 0.0],
        difference_bound=["at least", "", ""],
        seed_means=[[-86.5], [-102.0], [-84.0, -84.5]],
    )
    figure = plots.comparison(table)
    axes = figure.axes[0]
    marks, ends = {}, {}
    for container in axes.containers:
        points, _, (bars,) = container.lines
        marks[str(container.get_label()).split(":")[0]] = (points.get_marker(), to_rgb(points.get_color()))
        ends[points.get_xdata()[0]] = bars.get_segments()[0][:, 0].tolist()
    assert set(marks) == {"exact", "ok", "lower bound only"}
    assert len({shape for shape, _ in marks.values()}) == len({colour for _, colour in marks.values()}) == 3
    assert ends == {-84.25: [-84.5, -84.0], -86.5: [-87.0, -85.0], -102.0: [-102.5, -101.5]}
    cells = [text.get_text() for text in axes.texts]
    assert [cell for cell in cells if "±" in cell][:3] == ["≥ −84.25 ± 0.12", "≥ −86.50 ± 0.50", "−102.00 ± 0.25"]
    for column in (
        ["1–2", "1–2", "3"],
        ["highest", "≥ −2.25 [−2.50, −2.00]", "−17.75 [−18.00, −17.50]"],
        ["ok", "lower bound only", "exact"],
    ):
        start = cells.index(column[0])
        assert cells[start : start + 3] == column
    seeds, elbos = offsets(figure)
    assert seeds[:, 0].tolist() == [-84.0, -84.5]  # of the best, and none where there is but one seed
    assert len(set(seeds[:, 1])) == 1
    assert len(elbos) == 2
    assert not [text for text in axes.texts if text.get_weight() == "bold"]  # none is first for certain
    figure.draw_without_rendering()
    certain = plots.comparison(table.assign(rank_high=[2, 3, 1])).axes[0]
    bold = [text.get_text() for text in certain.texts if text.get_weight() == "bold"]
    assert bold == ["≥ −84.25 ± 0.12", "1", "best"]


def test_comparison_has_every_seed_on_its_axis(table: pd.DataFrame) -> None:
    figure = plots.comparison(table.assign(seed_means=[[-86.5], [-102.0], [-70.0, -98.5]]))
    assert figure.axes[0].get_xlim()[1] > -70


def test_comparison_names_the_missing_column(table: pd.DataFrame) -> None:
    with pytest.raises(UsageError, match="'error'"):
        plots.comparison(table.drop(columns="error"))


def normal(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), scale), 1).log_prob


def test_the_regions_of_a_density_hold_their_share_of_it() -> None:
    """Of a standard normal of the plane, the region that holds a share s is the disc of radius sqrt(-2 log(1 - s))."""
    x = 4 * torch.rand(500, 2, dtype=torch.double) - 2
    x[:2] = torch.tensor([[-4.0, -4.0], [4.0, 4.0]])  # the frame holds all of it
    axes = plots.densities(x, {"normal": normal(1.0)}, size=200).axes[0]
    edges = [c for c in axes.collections if isinstance(c, ContourSet) and not c.filled]
    radii = [np.linalg.norm(edge.get_paths()[0].vertices, axis=1) for edge in edges]
    assert len(radii) == 3
    for radius, share in zip(radii, (0.5, 0.9, 0.99), strict=True):
        np.testing.assert_allclose(radius, math.sqrt(-2 * math.log(1 - share)), rtol=0.01)


def test_a_region_that_the_frame_cuts_is_not_drawn() -> None:
    """Within 1.3 standard deviations there are 65 % of a normal of the plane: no region of 90 or 99 % is there."""
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    axes = plots.densities(corners, {"wide": normal(1.0)}).axes[0]
    assert len([c for c in axes.collections if isinstance(c, ContourSet) and not c.filled]) == 1


def test_densities_draw_each_model_over_the_same_data_and_components_as_ellipses() -> None:
    x, means = torch.randn(50, 2), torch.tensor([[1.0, -1.0]])
    covariances = torch.tensor([[[4.0, 1.0], [1.0, 2.0]]])
    figure = plots.densities(x, {"narrow": normal(0.5), "wide": normal(2.0)}, {"wide": (means, covariances)})
    narrow, wide = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["narrow", "wide"]
    for points in offsets(figure):
        np.testing.assert_allclose(points, x)
    assert len(narrow.lines) == 1  # what the legend needs, without a point
    for drawn, radius in zip(wide.lines, (1, 2), strict=True):
        away = np.asarray(drawn.get_xydata()) - means.numpy()
        squares = np.einsum("pi,ij,pj->p", away, np.linalg.inv(covariances[0]), away)
        np.testing.assert_allclose(squares, radius**2, rtol=1e-5)
    with pytest.raises(UsageError, match="components: 'tall' is no model's name; choose from narrow"):
        plots.densities(x, {"narrow": normal(0.5)}, {"tall": (means, covariances)})


def test_densities_are_of_the_plane() -> None:
    with pytest.raises(UsageError, match=r"x: expected shape \(N, 2\)"):
        plots.densities(torch.randn(5, 3), {"normal": normal(1.0)})
    with pytest.raises(UsageError, match="models: expected at least one"):
        plots.densities(torch.randn(5, 2), {})
    with pytest.raises(UsageError, match=r"'one' gives a log p\(x\) of shape \(6400, 1\), expected \(6400,\)"):
        plots.densities(torch.randn(5, 2), {"one": lambda x: x[:, :1]})


def test_a_film_shows_each_frame_as_it_is_and_goes_back() -> None:
    """Grey levels to the last, ink inverted; frames there and back without the ends twice; pictures side by side."""
    from PIL import Image

    levels = torch.tensor([0.0, 0.2, 0.6, 1.0])
    frames = levels.view(4, 1, 1, 1, 1).expand(4, 3, 1, 28, 28)
    for ink in (False, True):
        with Image.open(io.BytesIO(plots.film(frames, plots.Style(ink=ink)))) as picture:
            assert picture.n_frames == 6
            assert picture.size == (3 * 112 + 4 * 4, 112 + 2 * 4)
            shown = []
            for i in range(6):
                picture.seek(i)
                shown.append(np.array(picture.convert("L"))[60, [60, 180, 290]].tolist())
        wanted = [round(255 * (1 - level if ink else level)) for level in levels[[0, 1, 2, 3, 2, 1]].tolist()]
        assert shown == [[level] * 3 for level in wanted]
    with pytest.raises(UsageError, match="frames: expected shape"):
        plots.film(torch.zeros(3, 2, 5))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_that_are_left_out_have_a_colour_of_their_own(channels: int) -> None:
    x = torch.ones(2, 3, channels, 4, 4)
    x[:, 1, :, 2:] = torch.nan
    figure = plots.named_rows(x, ["a", "b"], ["x", "seen", "filled"], "caption")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    pixels = imread(buffer)[..., :3]
    colour = np.array(to_rgb("#BBD6EA"))
    share = (np.abs(pixels - colour).max(-1) < 0.01).mean()
    tile = (np.abs(pixels - 1).max(-1) < 0.01).mean()
    assert 0.01 < share < tile
    with pytest.raises(UsageError, match=r"rows, columns: expected \(2, 3\) names, got 1 and 3"):
        plots.named_rows(x, ["a"], ["x", "seen", "filled"], "caption")
