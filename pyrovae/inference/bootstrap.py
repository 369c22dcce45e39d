"""The bootstrap over rows: how far a mean over rows would move with other rows of the same kind.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap
"""

import math

import torch
from torch import Tensor

from pyrovae.seeding import seeded

RESAMPLES = 10_000
# Resamples drawn at once times rows: 8 MB of indices.
MOST_AT_ONCE = 2**20


def means(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means of resampled rows, the same rows for every model.

    Args:
        values: One number per model and row, shape (M, N).
        resamples: B.
        seed: Of the resampling.

    Returns:
        Shape (B, M), in double precision.
    """
    values = values.detach().double().cpu()
    rows = values.shape[-1]
    # Sums of small differences lose fewer digits.
    center = values.mean(-1, keepdim=True)

    # Written into one tensor: small results kept one by one would sit where the next large one might have been.
    result = torch.empty(resamples, len(values), dtype=torch.float64)
    with seeded(seed, "bootstrap"):
        for block in result.split(max(1, MOST_AT_ONCE // rows)):
            drawn = torch.randint(rows, (len(block), rows)) + rows * torch.arange(len(block)).unsqueeze(1)
            counts = torch.bincount(drawn.flatten(), minlength=len(block) * rows).view(len(block), rows).double()
            block.copy_(counts @ (values - center).T / rows + center.T)
    return result


def interval(values: Tensor, level: float = 0.95, seed: int = 0) -> list[float]:
    """The percentile interval of the mean of values (N,): its lower and upper end; NaN for a single value."""
    if len(values) < 2:
        return [math.nan, math.nan]
    (low,), (high,) = ends(means(values.unsqueeze(0), seed=seed), level)
    return [low, high]


def ends(resampled: Tensor, level: float = 0.95, interpolation: str = "linear") -> tuple[list[float], list[float]]:
    """Between what the level's share of resamples (B, M) lies: the lower and upper ends for each of M models."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    low, high = torch.quantile(resampled, tails, dim=0, interpolation=interpolation)
    return low.tolist(), high.tolist()
