"""Paths in the latent space: their ends, middles and lengths are those of geometry."""

import math

import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import great_circle, line, neighbours, traverse


def codes(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("path", [line, great_circle])
def test_ends_are_exact_and_the_way_back_is_the_same(path: object) -> None:
    assert callable(path)
    a, b = codes(5, 7), codes(5, 7)
    z = path(a, b, 9)
    assert z.shape == (5, 9, 7)
    assert torch.equal(z[:, 0], a)
    assert torch.equal(z[:, -1], b)
    assert_close(path(b, a, 9).flip(1), z, **EXACT)
    assert_close(path(a, b, 3)[:, 1], z[:, 4], **EXACT)


def test_the_line_is_evenly_spaced() -> None:
    a, b = codes(5, 7), codes(5, 7)
    z = line(a, b, 9)
    assert_close(z.diff(dim=1), ((b - a) / 8).unsqueeze(1).expand(-1, 8, -1), **EXACT)
    assert_close(z[:, 4], (a + b) / 2, **EXACT)


def test_the_great_circle_turns_evenly_in_one_plane_with_even_length() -> None:
    """Angles between steps are all w/8, lengths linear, the middle in the direction of the bisector."""
    a, b = codes(5, 7), codes(5, 7)
    z = great_circle(a, b, 9)
    unit = z / z.norm(dim=-1, keepdim=True)
    angles = (unit[:, 1:] * unit[:, :-1]).sum(-1).acos()
    whole = (unit[:, 0] * unit[:, -1]).sum(-1).acos()
    assert_close(angles, (whole / 8).unsqueeze(1).expand(-1, 8))
    assert_close(z.norm(dim=-1), line(a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True), 9)[..., 0], **EXACT)
    bisector = unit[:, 0] + unit[:, -1]
    assert_close(unit[:, 4], bisector / bisector.norm(dim=-1, keepdim=True), **EXACT)
    assert (torch.linalg.matrix_rank(z, rtol=1e-10) == 2).all()


def test_the_great_circle_where_there_is_no_angle() -> None:
    """Equal codes stay; one direction, and 0, are a line; opposite ones go by a third; in one dimension, through 0."""
    a, zero = codes(7), torch.zeros(7, dtype=torch.float64)
    assert_close(great_circle(a, a), a.expand(11, 7), **EXACT)
    assert_close(great_circle(a, 3 * a), line(a, 3 * a), **EXACT)
    assert_close(great_circle(zero, a), line(zero, a), **EXACT)
    assert_close(great_circle(a, zero), line(a, zero), **EXACT)
    assert_close(great_circle(zero, zero), zero.expand(11, 7), **EXACT)
    z = great_circle(a, -2 * a)
    assert_close(z.norm(dim=-1), torch.linspace(1, 2, 11, dtype=torch.float64) * a.norm(), **EXACT)
    assert (z[5] @ a).item() == pytest.approx(0, abs=1e-10)
    assert torch.equal(z[-1], -2 * a)
    assert_close(great_circle(a[:1], -a[:1]), line(a[:1], -a[:1]), **EXACT)
    # Nearly one direction, in single precision: no division by rounding.
    near = a.float() * (1 + 1e-7)
    assert_close(great_circle(a.float(), near), a.float().expand(11, 7), rtol=1e-5, atol=1e-6)


def test_the_line_leaves_the_shell_of_the_prior_and_the_circle_does_not() -> None:
    """Middles in 200 dimensions: of length sqrt(Z/2) on the line, sqrt(Z) on the circle."""
    a, b = codes(500, 200), codes(500, 200)
    of_line, of_circle = (path(a, b, 3)[:, 1].norm(dim=-1) for path in (line, great_circle))
    assert of_line.mean().item() == pytest.approx(math.sqrt(100), rel=0.02)
    assert of_circle.mean().item() == pytest.approx(math.sqrt(200), rel=0.02)


def test_neighbours_are_around_their_code() -> None:
    z = codes(3, 4)
    near = neighbours(z, 0.5, 20_000)
    assert near.shape == (3, 20_000, 4)
    away = (near - z.unsqueeze(1)).movedim(1, 0)
    assert_mean(away, 0.0)
    assert_mean(away.square(), 0.25)
    assert torch.equal(neighbours(z, 0.0, 2), z.unsqueeze(1).expand(-1, 2, -1))


def test_a_traversal_moves_one_element_and_no_other() -> None:
    z = codes(4)
    values = torch.linspace(-2, 2, 5)
    path = traverse(z, [3, 0], values)
    assert torch.equal(path[0, :, 3], values.double())
    assert torch.equal(path[1, :, 0], values.double())
    assert torch.equal(path[0, :, :3], z[:3].expand(5, 3))
    assert torch.equal(path[1, :, 1:], z[1:].expand(5, 3))
    each = traverse(z, [3, 0], torch.stack([values, 2 * values]))
    assert torch.equal(each[1, :, 0], 2 * values.double())


def test_what_is_refused() -> None:
    a = codes(3)
    with pytest.raises(UsageError, match="steps: expected a whole number of at least 2, got 1"):
        line(a, a, 1)
    with pytest.raises(UsageError, match=r"b: expected codes of the shape of a, \(3,\), got \(2,\)"):
        great_circle(a, a[:2])
    with pytest.raises(UsageError, match="radius: expected a number of at least 0, got -1"):
        neighbours(a, -1)
    with pytest.raises(UsageError, match="dims: expected a whole number from 0 to 2, got 3"):
        traverse(a, [3], torch.zeros(2))
    with pytest.raises(UsageError, match=r"z: expected one code of shape \(Z,\)"):
        traverse(codes(2, 3), [0], torch.zeros(2))
    with pytest.raises(UsageError, match=r"values: expected shape \(S,\) or \(1, S\), got \(2, 2\)"):
        traverse(a, [0], torch.zeros(2, 2))
