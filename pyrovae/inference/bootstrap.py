"""The bootstrap over rows: how far a mean over rows would move with other rows of the same kind.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyrovae.inference.seeding import seeded

RESAMPLES = 10_000
# Resamples drawn at once times rows: 80 MB of indices.
MOST_AT_ONCE = 10_000_000


def means(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means of resampled rows, the same rows for every model.

    Args:
        values: One number per model and row, shape (M, N).
        resamples: B.
        seed: Of the resampling.

    Returns:
        Shape (B, M), in double precision.
    """
    values = values.double()
    rows = values.shape[-1]

    def blocks() -> Iterator[Tensor]:
        at_once = max(1, MOST_AT_ONCE // rows)
        for start in range(0, resamples, at_once):
            index = torch.randint(rows, (min(at_once, resamples - start), rows))
            yield torch.stack([model[index].mean(-1) for model in values], -1)

    with seeded(seed, "bootstrap"):
        return torch.cat(list(blocks()))


def interval(values: Tensor, level: float = 0.95, seed: int = 0) -> list[float]:
    """The percentile interval of the mean of values (N,): its lower and upper end."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(means(values.unsqueeze(0), seed=seed).squeeze(-1), tails).tolist()
