r"""Sprites: pictures of one shape each, drawn from factors that are known, the same bit for bit on every machine.

A picture has `side` x `side` pixels of 0 and 1. Its factors, in the order of dSprites, and the last moving fastest:

    colour    red, green, blue, ...: three channels of 0 and 1; with a single colour there is one channel and no factor
    shape     square, ellipse, heart
    scale     evenly from 1/2 to 1 of the largest size, whose radius is a fifth of the side
    angle     2 pi a / angles
    x, y      evenly over all places where the largest sprite is inside the picture

A pixel is 1 where its centre is inside the shape. With (u, v) the centre's place in the frame of the sprite, turned by
its angle, and r its radius, the shapes lie in the circle of radius r:

    square    max(u, v)^2 <= r^2 / 2
    ellipse   u^2 + 4 v^2 <= r^2
    heart     a square of half side r/2 and two discs of radius r/2 around the middles of two of its sides; it stands on
              the corner between the other two, so that it is turned by an eighth of a circle more

All of it is done in whole numbers: places in units of 2^-6 of a pixel, cosines and sines in units of 2^-12, so that
squares stay far below 2^63. A cosine is rounded to these units, which the last bits of a library's cosine do not reach.
Some factors cannot be seen: a square looks the same after a quarter of a turn, an ellipse after a half, and small
sprites at angles close to each other may have the same pixels, as those of dSprites have.

Fewer rows than the grid has are drawn from it without replacement: those with the least of keys that a bijection of
64-bit numbers (SplitMix64) makes of the places in the grid.

References:
    Matthey, Higgins, Hassabis and Lerchner 2017, dSprites, https://github.com/google-deepmind/dsprites-dataset
    Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators, https://doi.org/10.1145/2660193.2660195
"""

import math
from collections.abc import Callable

import numpy as np

PIXEL, UNIT = 2**6, 2**12  # units of a place in a pixel, and of a cosine in 1
AT_ONCE = 2**22  # pixels of patches that are drawn together
SHAPES = ("square", "ellipse", "heart")
PALETTE = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
    "white": (1, 1, 1),
}


def chosen(size: int, rows: int) -> np.ndarray:
    """Places in a grid of that size, in ascending order: `rows` of them without replacement, or all if it has fewer.

    Example:
        >>> chosen(5, 9).tolist()
        [0, 1, 2, 3, 4]
    """
    if rows >= size:
        return np.arange(size)
    key = (np.arange(1, size + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return np.sort(np.argsort(key)[:rows])


def draw(factors: np.ndarray, sizes: tuple[int, ...], side: int) -> np.ndarray:
    """Pictures in one channel.

    Args:
        factors: Numbers of the values of shape, scale, angle, x and y, shape (N, 5).
        sizes: How many values each of these has.
        side: Of the pictures, in pixels.

    Returns:
        Zeros and ones, uint8, shape (N, side, side); x is from left to right, y from top to bottom.
    """
    width = 2 * _radius(0, 1, side) // PIXEL + 2  # of the patch around a sprite, in pixels
    pictures = np.zeros((len(factors), side + 2, side + 2), np.uint8)  # patches may end beyond the edge
    block = max(1, AT_ONCE // width**2)
    for start in range(0, len(factors), block):
        _draw_some(pictures[start : start + block], factors[start : start + block], sizes, side, width)
    return pictures[:, :side, :side]


def _draw_some(pictures: np.ndarray, factors: np.ndarray, sizes: tuple[int, ...], side: int, width: int) -> None:
    """Draw into empty pictures."""
    shape, scale, angle, *place = factors.T
    of_scale = np.array([_radius(i, sizes[1], side) for i in range(sizes[1])], np.int64)
    radius = (of_scale * UNIT)[scale][:, None, None]
    largest, away, at = int(of_scale[-1]), [], []
    for count, number in zip(sizes[3:], place, strict=True):
        centre = np.array([_place(i, count, largest, side) for i in range(count)], np.int64)[number]
        first = (centre - largest) // PIXEL
        pixels = first[:, None] + np.arange(width, dtype=np.int64)
        away.append(PIXEL * pixels + PIXEL // 2 - centre[:, None])
        at.append(pixels)
    dx, dy = away[0][:, None, :], away[1][:, :, None]
    drawn = np.zeros((len(factors), width, width), bool)
    for number, (inside, eighths) in enumerate(_INSIDE):
        these = shape == number
        turn = [2 * math.pi * (i / sizes[2] + eighths / 8) for i in range(sizes[2])]
        cos, sin = (
            np.array([round(UNIT * f(t)) for t in turn], np.int64)[angle[these], None, None]
            for f in (math.cos, math.sin)
        )
        u = cos * dx[these] + sin * dy[these]
        v = cos * dy[these] - sin * dx[these]
        drawn[these] = inside(u, v, radius[these])
    pictures[np.arange(len(factors))[:, None, None], at[1][:, :, None], at[0][:, None, :]] = drawn


def _radius(scale: int, scales: int, side: int) -> int:
    """Of the circle around a sprite, in units of a place."""
    return side * PIXEL // 5 if scales == 1 else side * PIXEL * (scales - 1 + scale) // (10 * (scales - 1))


def _place(number: int, count: int, margin: int, side: int) -> int:
    """The middle of a sprite along one axis."""
    return side * PIXEL // 2 if count == 1 else margin + (side * PIXEL - 2 * margin) * number // (count - 1)


def _in_square(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return 2 * np.maximum(abs(u), abs(v)) ** 2 <= r**2


def _in_ellipse(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return u**2 + 4 * v**2 <= r**2


def _in_heart(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    half = r // 2
    square = np.maximum(abs(u), abs(v)) <= half
    return square | (u**2 + (v + half) ** 2 <= half**2) | ((u + half) ** 2 + v**2 <= half**2)


Inside = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_INSIDE: tuple[tuple[Inside, int], ...] = ((_in_square, 0), (_in_ellipse, 0), (_in_heart, 1))


def coloured(pictures: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Pictures in three channels, shape (N, side, side, 3), each of one colour of `PALETTE` by its number."""
    return pictures[..., None] * np.array(list(PALETTE.values()), np.uint8)[colours][:, None, None, :]
