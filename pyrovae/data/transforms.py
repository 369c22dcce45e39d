"""From raw rows to the x of a model: binary, dequantised, standardised, or as they are.

A transform is a small value that is called with raw rows, and perhaps a generator; those that draw do so anew whenever
they are called, from torch's global generator of the rows' device if none is given:

    AsFloat        x = raw
    DrawnPixels    x = 1 with probability l / (L - 1), for a pixel of level l out of L
    Threshold      x = 1 where that probability is over 1/2
    Dequantize     x = (l + u) / L, u ~ U[0, 1)
    Standardize    x = (raw - mean) / sd, of the training rows

They are compared by their settings and can be pickled, so that other processes transform rows alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.data.found import SEED
from pyrovae.data.streaming import MappedRows


@dataclass(frozen=True)
class AsFloat:
    """The rows as they are, in float32."""

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return raw.to(torch.float32)


@dataclass(frozen=True)
class DrawnPixels:
    """Binary pixels drawn with probability level / (levels - 1), or the value itself where levels is None."""

    levels: int | None

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (_uniform(raw, generator) < _probability(raw, self.levels)).to(torch.float32)


@dataclass(frozen=True)
class Threshold:
    """Binary pixels: 1 where the pixel probability exceeds 0.5."""

    levels: int | None

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (_probability(raw, self.levels) > 0.5).to(torch.float32)


@dataclass(frozen=True)
class Dequantize:
    """x = (level + u) / levels in [0,1), u ~ U[0,1); floor(x * levels) is the level again."""

    levels: int

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        level = raw.to(torch.float32)
        # In float32 255 + u can round up to 256, the next level; 2^-16 is the spacing of floats just below 256.
        return torch.minimum(level + _uniform(raw, generator), level + (1 - 2**-16)) / self.levels


@dataclass(frozen=True, eq=False)
class Standardize:
    """(x - mean) / sd, element by element; mean and sd have the shape of one event."""

    mean: Tensor
    sd: Tensor

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (raw.to(torch.float32) - self.mean.to(raw.device)) / self.sd.to(raw.device)

    def undo(self, x: Tensor) -> Tensor:
        """x in the units of the source, of any shape (*batch, *event)."""
        return x * self.sd.to(x) + self.mean.to(x)


Transform = AsFloat | DrawnPixels | Threshold | Dequantize | Standardize


def draw_once(
    rows: Tensor | MappedRows, transform: Transform, split: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Transform rows once, with the fixed generator of their split; in blocks, to bound memory."""
    generator = torch.Generator("cpu").manual_seed(SEED[split])
    drawn = torch.empty(rows.shape, dtype=dtype, device="cpu")
    for start in range(0, len(rows), 1024):
        drawn[start : start + 1024] = transform(rows[start : start + 1024], generator)
    return drawn


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """u ~ U[0, 1), one for each element."""
    return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator)


def _probability(raw: Tensor, levels: int | None) -> Tensor:
    """Of a pixel being 1: its level over the highest, or the value itself where there are no levels."""
    return raw.to(torch.float32) / (1 if levels is None else levels - 1)
