"""From raw rows to the x of a model: binary, dequantised, standardised, or as they are.

A transform is a small value that is called with raw rows, and perhaps a generator; those that draw do so anew whenever
they are called.
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
        return (_uniform(raw, generator) < probability(raw, self.levels)).to(torch.float32)


@dataclass(frozen=True)
class Threshold:
    """Binary pixels: 1 where the pixel probability exceeds 0.5."""

    levels: int | None

    def __call__(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (probability(raw, self.levels) > 0.5).to(torch.float32)


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
    return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator)


def probability(raw: Tensor, levels: int | None) -> Tensor:
    return raw.to(torch.float32) / (1 if levels is None else levels - 1)
