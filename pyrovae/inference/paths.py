r"""Paths in the latent space: codes in, codes out, for whoever decodes them.

Between two codes a and b, with t from 0 to 1,

    line            (1 - t) a + t b
    great circle    ((1 - t) |a| + t |b|) u(t)      u(t) = [sin((1 - t) w) a/|a| + sin(t w) b/|b|] / sin w

where w is the angle between a and b: the direction turns evenly from the one to the other, and the length goes evenly
from |a| to |b|. Draws of N(0, I) in Z dimensions have a length near sqrt(Z), give or take 0.7, and two of them are
almost orthogonal, so that the middle of the straight line between them has a length near sqrt(Z / 2): shorter than
any draw, and a place where a decoder was never trained. The great circle stays where the draws are.

References:
    White 2016, Sampling Generative Networks, https://arxiv.org/abs/1609.04468
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae.checks import check_count, describe
from pyrovae.errors import UsageError
from pyrovae.settings import Number, Whole, check

# Below this sine of the angle there is no plane that both codes lie in, to the digits that floats have.
STRAIGHT = 1e-6


def line(a: Tensor, b: Tensor, steps: int = 11) -> Tensor:
    """Codes on the straight line from a to b.

    Args:
        a: Where it starts, shape (*batch, Z).
        b: Where it ends, of the same shape.
        steps: S, at least 2; both ends are among them.

    Returns:
        Shape (*batch, S, Z).

    Raises:
        UsageError: a and b differ in shape, or steps is below 2.

    >>> line(torch.zeros(1), torch.ones(1), 5).flatten().tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    t = _times(a, b, steps)
    return (1 - t) * a.unsqueeze(-2) + t * b.unsqueeze(-2)


def great_circle(a: Tensor, b: Tensor, steps: int = 11) -> Tensor:
    """Codes on the great circle from a to b, by the shorter way round; arguments and errors as for `line`.

    Where the two are one direction, or one of them is 0, it is the straight line. Where they are opposite all ways
    round are equally short: it goes by way of the axis on which a has the least, and in one dimension, where there is
    no way round, through 0.

    >>> great_circle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), 3).norm(dim=1).round().tolist()
    [1.0, 2.0, 3.0]
    """
    t = _times(a, b, steps)
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)
    long, longer = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    from_a, to_b = (z / length.where(length > 0, 1) for z, length in ((a, long), (b, longer)))
    cosine = (from_a * to_b).sum(-1, keepdim=True)
    aside = to_b - cosine * from_a  # orthogonal to a, of length sin w
    sine = aside.norm(dim=-1, keepdim=True)
    least = torch.nn.functional.one_hot(from_a.abs().argmin(-1), a.shape[-1]).to(a)
    any_aside = least - (least * from_a).sum(-1, keepdim=True) * from_a
    length = any_aside.norm(dim=-1, keepdim=True)
    any_aside = any_aside / length.where(length > 0, 1)
    angle = torch.atan2(sine, cosine)
    direction = (t * angle).cos() * from_a + (t * angle).sin() * (aside / sine).where(sine > STRAIGHT, any_aside)
    circle = ((1 - t) * long + t * longer) * direction
    has_plane = (long * longer > 0) & ((sine > STRAIGHT) | ((cosine < 0) & (length > STRAIGHT)))
    path = circle.where(has_plane, (1 - t) * a + t * b)
    return torch.cat([a, path[..., 1:-1, :], b], -2)  # the ends to the last digit


def neighbours(z: Tensor, radius: float, count: int = 8) -> Tensor:
    """Codes near others: z + radius eps, eps ~ N(0, I), with torch's random state.

    Args:
        z: Codes, shape (*batch, Z).
        radius: Standard deviation in each dimension; 0 for the codes themselves.
        count: M, neighbours of each code.

    Returns:
        Shape (*batch, M, Z).

    Raises:
        UsageError: count is below 1, or radius below 0.
    """
    check_count("count", count)
    check("radius", radius, Number(least=0))
    return z.unsqueeze(-2) + radius * torch.randn(*z.shape[:-1], count, z.shape[-1], dtype=z.dtype, device=z.device)


def traverse(z: Tensor, dims: Sequence[int], values: Tensor) -> Tensor:
    """A code with one element at a time set to each of some values, and the others left as they are.

    Args:
        z: The code, shape (Z,).
        dims: Which elements, D of them.
        values: S values for all of them, shape (S,), or for each, shape (D, S).

    Returns:
        Shape (D, S, Z).

    Raises:
        UsageError: an element is not there, or there are other values than for so many elements.

    >>> traverse(torch.zeros(3), [2], torch.tensor([-1.0, 1.0])).tolist()
    [[[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]]
    """
    if z.ndim != 1:
        raise UsageError(f"z: expected one code of shape (Z,), got {describe(z)}; pass codes[n]")
    for dim in dims:
        check("dims", dim, Whole(0, len(z) - 1))
    if values.shape[:-1] not in ((), (len(dims),)) or values.ndim == 0:
        raise UsageError(f"values: expected shape (S,) or ({len(dims)}, S), got {tuple(values.shape)}; pass a row each")
    values = values.expand(len(dims), -1)
    path = z.repeat(len(dims), values.shape[-1], 1)
    for row, dim in enumerate(dims):
        path[row, :, dim] = values[row].to(z)
    return path


def _times(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """t from 0 to 1, shape (S, 1), for two codes of one shape."""
    check_count("steps", steps, 2)
    if a.shape != b.shape or a.ndim == 0:
        raise UsageError(f"b: expected codes of the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    return torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).unsqueeze(-1)
