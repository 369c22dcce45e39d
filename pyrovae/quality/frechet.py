r"""The Frechet distance between data and samples: between Gaussians with the moments of their features.

For features of F dimensions with means m_1, m_2 and covariances S_1, S_2,

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

the squared 2-Wasserstein distance of the Gaussians, which is what is called FID where the features are those of an
Inception network. It is 0 for equal moments, whatever else differs, and is in squared units of the features: numbers
of different features do not compare.

From n rows of each the estimate is too high, by about C / n (Chong and Forsyth): estimated moments differ even where
the true ones do not. For two equal Gaussians of covariance I, to first order,

    E[d^2_n] = (2 F + F (F + 1) / 2) / n

so that distances from different numbers of rows do not compare either, and neither do models with different C. What is
reported is therefore the estimate from N, N/2 and N/4 rows (the smaller ones averaged over disjoint parts), and where
the line through the first two in 1/n meets 1/n = 0:

    d^2 = (N d^2_N - N/2 d^2_{N/2}) / (N - N/2) = 2 d^2_N - d^2_{N/2}

That from N/4 shows whether the line is one: where it lies far above, the extrapolated distance is too low, and where it
lies far below, as with features of heavy tails, too high still. The error is a jackknife over `GROUPS` groups of rows.
The extrapolated distance may be below 0 by about its error; the plain one never is.

References:
    Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, https://arxiv.org/abs/1706.08500
    Chong and Forsyth 2020, Effectively Unbiased FID and Inception Score, https://arxiv.org/abs/1911.07023
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.seeding import seeded

HALVINGS = 2  # of the rows: N, N/2 and N/4
GROUPS = 20  # of rows, left out one by one for the error
LEAST = 2  # rows for each dimension of the features, in the smallest part


@dataclass(frozen=True)
class Frechet:
    """The squared Frechet distance of features of data and of samples, in squared units of the features.

    Attributes:
        extrapolated: To infinitely many rows; may be below 0 by about its error.
        error: Its standard error over rows.
        by_rows: The plain estimate, which is too high, from N rows of each, from N/2 and from N/4.
        dimensions: F.
    """

    extrapolated: float
    error: float
    by_rows: dict[int, float]
    dimensions: int

    @property
    def plain(self) -> float:
        """The estimate from all rows, as papers have it."""
        return self.by_rows[max(self.by_rows)]


def gaussian_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """The squared Frechet distance of two Gaussians, by eigenvalues in double precision.

    Args:
        mean: Shape (F,).
        covariance: Shape (F, F).
        other_mean: Shape (F,).
        other_covariance: Shape (F, F).

    Example: in one dimension it is (m_1 - m_2)^2 + (s_1 - s_2)^2.
        >>> gaussian_distance(torch.zeros(1), torch.eye(1), torch.full((1,), 3.0), 4 * torch.eye(1))
        10.0
    """
    first, second = covariance.double(), other_covariance.double()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()  # rounding may leave less than 0
    shift = (mean.double() - other_mean.double()).square().sum()
    return max(0.0, (shift + first.trace() + second.trace() - 2 * cross).item())


def frechet_distance(data: Tensor, samples: Tensor, seed: int = 0) -> Frechet:
    """The squared Frechet distance of features, extrapolated to infinitely many rows, and the plain estimates.

    Args:
        data: Features of data, shape (N, F): of any map from x to F numbers.
        samples: Features of as many draws from a model, same shape.
        seed: Of the order in which rows are dealt to parts: data may be sorted by class.

    Raises:
        UsageError: the shapes differ, or there are too few rows for so many dimensions.
    """
    check_features(data, samples)
    count, dimensions = data.shape
    with seeded(seed, "frechet"):
        pair = [features.detach().double().cpu()[torch.randperm(count)] for features in (data, samples)]
    by_rows = _by_rows(*pair)
    # Both sets without the same group: the values' own variation, and that of the order, is in the difference.
    group = torch.arange(count) % GROUPS
    without = torch.tensor([_extrapolated(_by_rows(*(f[group != i] for f in pair))) for i in range(GROUPS)]).double()
    error = math.sqrt((GROUPS - 1) * (without - without.mean()).square().mean().item())
    return Frechet(_extrapolated(by_rows), error, by_rows, dimensions)


def check_features(data: Tensor, samples: Tensor) -> None:
    """Refuse features that are no two matrices of one shape, too few rows of them, and what is not finite.

    Raises:
        UsageError: they are.
    """
    if data.shape != samples.shape or data.ndim != 2:
        raise UsageError(
            f"features: expected two matrices of one shape (N, F), got {tuple(data.shape)} of data and "
            f"{tuple(samples.shape)} of samples; draw as many samples as there are rows of data"
        )
    check_enough(*data.shape)
    if not (data.isfinite().all() and samples.isfinite().all()):
        raise UsageError("features: expected finite numbers; look at what the map makes of these rows")


def check_enough(rows: int, dimensions: int) -> None:
    """Refuse rows that are too few for the smallest part of them to have moments of so many dimensions.

    Raises:
        UsageError: they are.
    """
    if rows < (least := LEAST * 2**HALVINGS * dimensions):
        raise UsageError(
            f"features: {rows} rows are too few for {dimensions} dimensions, of which the smallest part of the rows "
            f"must have {LEAST} for each; give at least {least} rows, or features of fewer dimensions"
        )


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), over N - 1, of features (N, F)."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _by_rows(data: Tensor, samples: Tensor) -> dict[int, float]:
    """The plain estimates by number of rows: each the mean over as many disjoint parts as there are."""
    found = {}
    for parts in (2**halving for halving in range(HALVINGS + 1)):
        size = len(data) // parts
        pieces = zip(data.split(size)[:parts], samples.split(size)[:parts], strict=True)
        found[size] = sum(gaussian_distance(*_moments(a), *_moments(b)) for a, b in pieces) / parts
    return found


def _extrapolated(by_rows: dict[int, float]) -> float:
    """Where the line through the estimates from N and N/2 rows, over 1/n, meets 1/n = 0."""
    (rows, all_of_them), (fewer, half_of_them), *_ = by_rows.items()
    return (rows * all_of_them - fewer * half_of_them) / (rows - fewer)
