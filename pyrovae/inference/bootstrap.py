"""The bootstrap over rows: how far a mean over rows would move with other rows of the same kind.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyrovae.inference.seeding import seeded

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

    def blocks() -> Iterator[Tensor]:
        at_once = max(1, MOST_AT_ONCE // rows)
        for start in range(0, resamples, at_once):
            size = min(at_once, resamples - start)
            drawn = torch.randint(rows, (size, rows)) + rows * torch.arange(size).unsqueeze(1)
            counts = torch.bincount(drawn.flatten(), minlength=size * rows).view(size, rows).double()
            yield counts @ (values - center).T / rows + center.T

    with seeded(seed, "bootstrap"):
        return torch.cat(list(blocks()))


def interval(values: Tensor, level: float = 0.95, seed: int = 0) -> list[float]:
    """The percentile interval of the mean of values (N,): its lower and upper end; NaN for a single value."""
    if len(values) < 2:
        return [math.nan, math.nan]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(means(values.unsqueeze(0), seed=seed).squeeze(-1), tails).tolist()
