r"""Rows of which some elements are seen and the others missing, under models whose log p(x) is exact.

    log p(x_missing | x_seen) = log p(x) - log p(x_seen)

A Gaussian's parts are Gaussians. Order the elements of x so that the seen ones come first, and factorise the covariance
in that order,

    N(mu, F F')      F F' = L L',   L = [ A  0 ]      x_seen ~ N(mu_s, A A')
                                        [ B  C ]      x_missing | x_seen ~ N(mu_m + B A^-1 (x_s - mu_s), C C')

so that one triangular factor has all of it: the transposed R of a QR decomposition of F', which never forms the
covariance. A mixture's parts are mixtures, its weights given the seen part being those of Bayes' rule:

    p(x_seen) = sum_c w_c p(x_seen | c)      p(x_missing | x_seen) = sum_c p(c | x_seen) p(x_missing | x_seen, c)
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
