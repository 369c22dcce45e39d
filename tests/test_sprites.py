"""Sprites: pictures whose factors are known, the same on every machine."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyrovae import load_data
from pyrovae.data.sources import find_source
from pyrovae.data.sprites import PALETTE, SHAPES, chosen, draw
from pyrovae.errors import UsageError
from pyrovae.runs.recipe import Recipe, title

SMALL = "sprites:side=16,scales=2,angles=1,positions=4"


def test_pictures_are_the_same_on_every_machine() -> None:
    """All shapes, scales, angles and ends of the places, at a side that is no power of two: their bytes are stored."""
    sizes = (3, 3, 10, 2, 2)
    factors = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), 1)
    pictures = draw(factors, sizes, 40)
    assert pictures.shape == (360, 40, 40)
    assert hashlib.sha256(pictures.tobytes()).hexdigest() == (
        "37b3d0a05689dd56821efcf0a39b7963d23f3954b31e652b8d855fcd83ccaf77"
    )
    assert hashlib.sha256(chosen(737_280, 100).astype("<i8").tobytes()).hexdigest() == (
        "d86eed26ef24b3105b219cc438a0fdea62be2b7db44a5a4c49932f7bfb992a53"
    )


def test_areas_are_those_of_the_shapes() -> None:
    """Of a radius r: 2 r^2 of the square, pi r^2 / 2 of the ellipse, (1 + pi/4) r^2 of the heart; at any angle."""
    side, sizes = 200, (3, 2, 7, 1, 1)
    factors = np.stack(np.unravel_index(np.arange(42), sizes), 1)
    area = draw(factors, sizes, side).sum((1, 2)).reshape(3, 2, 7)
    for scale, r in enumerate((side / 10, side / 5)):
        for shape, exact in enumerate((2, np.pi / 2, 1 + np.pi / 4)):
            np.testing.assert_allclose(area[shape, scale], exact * r**2, rtol=0.03)


def test_a_sprite_is_where_its_factors_say_and_inside_the_picture() -> None:
    sizes = (3, 1, 8, 5, 5)
    factors = np.stack(np.unravel_index(np.arange(600), sizes), 1)
    pictures = draw(factors, sizes, 60).astype(float)
    for (*_, x, y), picture, same in zip(factors, pictures, np.repeat(pictures[::25], 25, 0), strict=True):
        np.testing.assert_array_equal(picture, np.roll(same, (9 * y, 9 * x), (0, 1)))  # nothing of it is cut off
    at = np.arange(60) + 0.5
    area = pictures.sum((1, 2))
    centre = np.stack([(pictures * at).sum((1, 2)), (pictures * at[:, None]).sum((1, 2))], 1) / area[:, None]
    wanted = 12 + 36 * factors[:, 3:] / 4  # from r to side - r
    exact = factors[:, 0] < 2  # the middle of a heart's circle is not its centre of mass
    np.testing.assert_allclose(centre[exact], wanted[exact], atol=0.2)
    np.testing.assert_allclose(centre[~exact], wanted[~exact], atol=3)


def test_shapes_have_their_symmetries_and_no_others() -> None:
    """A quarter of a turn leaves the square as it is, a half the ellipse, and only a whole one the heart."""
    sizes = (3, 1, 4, 1, 1)
    factors = np.stack(np.unravel_index(np.arange(12), sizes), 1)
    square, ellipse, heart = draw(factors, sizes, 50).reshape(3, 4, 50, 50)
    assert (square == square[0]).all()
    assert (ellipse[0] == ellipse[2]).all()
    assert (ellipse[1] == ellipse[3]).all()
    assert (ellipse[0] != ellipse[1]).any()
    np.testing.assert_array_equal(np.rot90(heart[0], -1), heart[1])
    assert len({picture.tobytes() for picture in heart}) == 4
    np.testing.assert_array_equal(heart[0], heart[0][:, ::-1])  # upright, its corner below
    low = np.flatnonzero(heart[0].any(1)).max()
    assert heart[0][low].sum() < 4


def test_the_whole_grid_or_so_many_rows_of_it() -> None:
    """Every value of every factor as often as every other; fewer rows are a part of the same grid."""
    data = load_data(SMALL)
    assert data.factors is not None
    assert data.factors.names == ("shape", "scale", "x", "y")
    values = torch.cat(list(data.factors.values.values()))
    assert len(values) == len(values.unique(dim=0)) == 3 * 2 * 4 * 4
    for factor, column in zip(data.factors.each, values.T, strict=True):
        assert set(column.bincount().tolist()) == {96 // len(factor.values)}
    few = load_data(f"{SMALL},rows=50")
    assert few.factors is not None
    some = torch.cat(list(few.factors.values.values()))
    assert len(some) == 50 == len(some.unique(dim=0))
    every = {tuple(row): x for split in ("train", "validation", "test")
             for row, x in zip(data.factors.values[split].tolist(), getattr(data, split), strict=True)}  # fmt: skip
    for split in ("train", "validation", "test"):
        for row, x in zip(few.factors.values[split].tolist(), getattr(few, split), strict=True):
            torch.testing.assert_close(x, every[tuple(row)], rtol=0, atol=0)


def test_rows_drawn_from_the_grid_are_evenly_from_all_of_it() -> None:
    drawn = chosen(3 * 6 * 40 * 32 * 32, 20_000)
    for column, count in zip(np.unravel_index(drawn, (3, 6, 40, 32, 32)), (3, 6, 40, 32, 32), strict=True):
        chi2 = ((np.bincount(column) - 20_000 / count) ** 2).sum() / (20_000 / count)
        assert chi2 < count - 1 + 5 * np.sqrt(2 * (count - 1))


def test_colours_are_a_factor_and_the_label_is_the_shape() -> None:
    data = load_data(f"{SMALL},colours=3")
    assert data.event_shape == (3, 16, 16)
    assert data.binary
    assert data.classes == SHAPES
    assert data.factors is not None
    assert data.factors.names[:2] == ("colour", "shape")
    assert [factor.ordered for factor in data.factors.each] == [False, False, True, True, True]
    for x, (colour, shape, *_), label in zip(
        data.train, data.factors.values["train"].tolist(), data.labels["train"], strict=True
    ):
        assert tuple(x.amax((1, 2)).tolist()) == list(PALETTE.values())[colour]
        assert label == shape
    grey = load_data(SMALL)
    assert {x.amax(0).numpy().tobytes() for x in data.train} <= {x[0].numpy().tobytes() for x in cat(grey)}
    rows = data.rows("mass", condition="label")
    assert rows.factors is data.factors
    assert rows.given.columns == SHAPES


def cat(data):
    return torch.cat([data.train, data.validation, data.test])


def test_settings_that_there_are_not() -> None:
    assert find_source("Sprites:side=16, rows=5").side == 16
    assert find_source("sprites") == find_source("sprites:side=64")
    for words, message in {
        "sprites:sid=16": "'sid=16': expected side=..., .*did you mean side",
        "sprites:16": "'16': expected side=",
        "sprites:": "expected side=",
        "sprites:side=16,side=32": "is given twice",
        "sprites:side=7": "data=sprites, side: expected a whole number from 8 to 256, got 7",
        "sprites:colours=8": "from 1 to 7",
        "sprites:rows=all": "expected a whole number of at least 1, got all",
        "digits:side=9": "data=digits: 'side=9': it has no settings",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_data(words)
    assert title(Recipe(data=SMALL, seed=1)).startswith("sprites-elbo")


def test_help_names_the_settings_and_imports_nothing_heavy() -> None:
    code = "import sys\nfrom pyrovae.fit import options_parser\nprint(options_parser().format_help())\n"
    code += "assert not {'numpy', 'torch'} & set(sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "sprites:side=...,rows=...,scales=...,angles=...,positions=...,colours=..." in "".join(text.split())
