r"""Rows of which some elements are seen and the others missing, under models whose log p(x) is exact.

    log p(x_missing | x_seen) = log p(x) - log p(x_seen)

A Gaussian's parts are Gaussians. Order the elements of x so that the seen ones come first, and factorise the covariance
in that order,

    N(mu, F F')      F F' = L L',   L = [ A  0 ]      x_seen ~ N(mu_s, A A')
                                        [ B  C ]      x_missing | x_seen ~ N(mu_m + B A^-1 (x_s - mu_s), C C')

so that one triangular factor has all of it: the transposed R of a QR decomposition of F', which never forms the
covariance. A mixture's parts are mixtures, its weights given the seen part being those of Bayes' rule:

    p(x_seen) = sum_c w_c p(x_seen | c)      p(x_missing | x_seen) = sum_c p(c | x_seen) p(x_missing | x_seen, c)

EM of a Gaussian with gaps (`Gaps`) takes what is missing for latent. Its E step needs the two moments of whole rows
given what is seen of them, and with S the covariance and M the diagonal matrix of zeros and ones that keeps what is
seen,

    A = M S M + (I - M)      E[x | x_seen] = mu + S M A^-1 M (x - mu)      Cov[x | x_seen] = S - S M A^-1 M S

where A is the covariance of what is seen with a one for each missing element, so that masks of all sizes make one batch
of Cholesky factors, |A| is that of what is seen, and rows with the same mask share them.

References:
    Little and Rubin 2002, Statistical Analysis with Missing Data, chapter 11
    Ghahramani and Jordan 1994, Supervised Learning from Incomplete Data via an EM Approach
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.errors import UsageError


class Conditional(NamedTuple):
    """What a model says of N rows by what is seen of them.

    Attributes:
        log_prob_seen: log p(x_seen) in nats, shape (N,).
        missing: p(x_missing | x_seen): batch shape (N,), event shape (M,), the M missing elements in the order of
            `x.flatten(1)`.
    """

    log_prob_seen: Tensor
    missing: dist.Distribution


def gaussian_parts(loc: Tensor, factor: Tensor, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian's p(x_seen), and its p(x_missing | x_seen), in double precision.

    Args:
        loc: mu, shape (D,).
        factor: Any F with the covariance F F', shape (D, R), R at least D.
        x: Rows, shape (N, D).
        seen: Which elements are, boolean, shape (D,).

    Returns:
        log p(x_seen) in nats, shape (N,); mean, shape (N, M), and Cholesky factor, shape (M, M), of the missing.
    """
    count = int(seen.sum())
    order = torch.cat([seen.nonzero().flatten(), (~seen).nonzero().flatten()])
    upper = torch.linalg.qr(factor.double()[order].mT).R
    lower = (upper * upper.diagonal().sign().unsqueeze(-1)).mT
    A, B, C = lower[:count, :count], lower[count:, :count], lower[count:, count:]
    away = (x.double() - loc.double())[:, seen]
    white = torch.linalg.solve_triangular(A, away.mT, upper=False)  # (S, N)
    log_prob = -0.5 * white.square().sum(0) - A.diagonal().log().sum() - 0.5 * count * math.log(2 * math.pi)
    return log_prob, loc.double()[~seen] + (B @ white).mT, C


class Gaps:
    """Rows with gaps, each with its own, under Gaussians.

    Args:
        x: Rows, shape (N, D), NaN where an element is missing.
    """

    def __init__(self, x: Tensor) -> None:
        self.seen = ~x.isnan()
        self.x = x.where(self.seen, 0.0)
        self.masks, self.which = self.seen.unique(dim=0, return_inverse=True)

    def factors(self, covariance: Tensor) -> Tensor:
        """Cholesky factors of A, shape (P, D, D): of each of the P different masks."""
        both = self.masks.unsqueeze(2) & self.masks.unsqueeze(1)
        return torch.linalg.cholesky(covariance.where(both, torch.eye(len(covariance)).to(covariance)))

    def log_prob(self, loc: Tensor, covariance: Tensor) -> Tensor:
        """log N(x_seen; mu, S) in nats, shape (N,); of mu (D,) and S (D, D)."""
        away = (self.x - loc).where(self.seen, 0.0).unsqueeze(2)
        factors = self.factors(covariance)
        white = torch.linalg.solve_triangular(factors[self.which], away, upper=False).squeeze(2)
        of_mask = factors.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * math.log(2 * math.pi) * self.masks.to(loc).sum(
            1
        )
        return -0.5 * white.square().sum(1) - of_mask[self.which]

    def moments(self, loc: Tensor, covariance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over rows, with weights (N,), of E[x - mu | x_seen], (D,), and E[(x - mu)(x - mu)' | x_seen], (D, D)."""
        kept = covariance.where(self.masks.unsqueeze(2), 0.0)  # M S
        gain = torch.cholesky_solve(kept, self.factors(covariance)).mT  # S M A^-1
        missing = ~(self.masks.unsqueeze(2) | self.masks.unsqueeze(1))
        left = (covariance - gain @ kept).where(missing, 0.0)  # Cov[x | x_seen]
        away = (self.x - loc).where(self.seen, 0.0)
        away = away.where(self.seen, (gain[self.which] @ away.unsqueeze(2)).squeeze(2))
        of_mask = weights.new_zeros(len(self.masks)).index_add_(0, self.which, weights)
        weighted = weights.unsqueeze(1) * away
        return weighted.sum(0), weighted.mT @ away + (of_mask[:, None, None] * left).sum(0)


def mixture_given(log_joint: Tensor, components: dist.Distribution) -> Conditional:
    """A mixture's part, from log p(c, x_seen), shape (N, C), and p(x_missing | x_seen, c), batch shape (N, C)."""
    weights = dist.Categorical(logits=log_joint)
    return Conditional(log_joint.logsumexp(-1), dist.MixtureSameFamily(weights, components, validate_args=False))


def patterns(seen: Tensor, rows: int, event_shape: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
    """The different masks among rows: each mask, of the event's shape, with the numbers of the rows that have it.

    Args:
        seen: Boolean, of the event's shape for all rows alike, or (N, *event).
        rows: N.
        event_shape: Of one row.

    Raises:
        UsageError: it is of another type or shape.
    """
    if seen.dtype != torch.bool or seen.shape not in (event_shape, torch.Size([rows, *event_shape])):
        raise UsageError(
            f"seen: expected a boolean mask of shape {tuple(event_shape)} or {(rows, *event_shape)}, True where x is "
            f"seen, got {str(seen.dtype).removeprefix('torch.')} of shape {tuple(seen.shape)}"
        )
    if seen.shape == event_shape:
        yield seen, torch.arange(rows, device=seen.device)
        return
    masks, which = seen.flatten(1).unique(dim=0, return_inverse=True)
    for i, mask in enumerate(masks):
        yield mask.view(event_shape), (which == i).nonzero().flatten()
