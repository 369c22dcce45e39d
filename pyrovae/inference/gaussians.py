"""What is known of Gaussians: the one file that looks into a distribution to see whether it is one.

A distribution that is not known here is not refused anywhere but by name: it cannot be widened, its dimensions have no
marginals, its family is "other" or "flow", and its parameters cannot be freed for each datum. To make one known,
register its class with the functions below.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
)

# The families of Gaussians that may be fitted to a datum.
Family = Literal["diagonal", "full"]
FAMILIES = get_args(Family)
# What `family` calls a Gaussian.
GAUSSIAN = ("diagonal", "full", "low-rank")


@singledispatch
def inflated(q: Distribution, factor: float) -> Distribution:
    """A Gaussian, or a transformed one, with its standard deviations multiplied by a factor.

    Raises:
        NotImplementedError: it is not known to be one; the name of its class.
    """
    raise NotImplementedError(type(q).__name__)


@inflated.register
def _(q: dist.ExpandedDistribution, factor: float) -> Distribution:
    return inflated(q.base_dist, factor).expand(q.batch_shape)


@inflated.register
def _(q: Independent, factor: float) -> Distribution:
    return dist.Independent(inflated(q.base_dist, factor), q.reinterpreted_batch_ndims)


@inflated.register
def _(q: TransformedDistribution, factor: float) -> Distribution:
    return dist.TransformedDistribution(inflated(q.base_dist, factor), q.transforms)


@inflated.register
def _(q: Normal, factor: float) -> Distribution:
    return dist.Normal(q.loc, q.scale * factor)


@inflated.register
def _(q: MultivariateNormal, factor: float) -> Distribution:
    return dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril * factor)


@inflated.register
def _(q: LowRankMultivariateNormal, factor: float) -> Distribution:
    return dist.LowRankMultivariateNormal(q.loc, q.cov_factor * factor, q.cov_diag * factor**2)


@inflated.register
def _(q: MixtureSameFamily, factor: float) -> Distribution:
    """Each component by itself."""
    return dist.MixtureSameFamily(q.mixture_distribution, inflated(q.component_distribution, factor))


@singledispatch
def marginals(q: Distribution) -> Distribution | None:
    """The one-dimensional marginals of a distribution over vectors (*batch, Z), as a batch (*batch, Z), if known."""
    return None


@marginals.register
def _(q: dist.ExpandedDistribution) -> Distribution | None:
    return marginals(q.base_dist)


@marginals.register
def _(q: Independent) -> Distribution | None:
    return q.base_dist if q.reinterpreted_batch_ndims == 1 else None


@marginals.register(MultivariateNormal)
@marginals.register(LowRankMultivariateNormal)
def _(q: MultivariateNormal | LowRankMultivariateNormal) -> Distribution | None:
    return dist.Normal(q.mean, q.stddev)


@marginals.register
def _(q: MixtureSameFamily) -> Distribution | None:
    parts = marginals(q.component_distribution)
    if not isinstance(parts, Normal):
        return None
    weights = dist.Categorical(logits=q.mixture_distribution.logits.unsqueeze(-2))
    return dist.MixtureSameFamily(weights, dist.Normal(parts.loc.mT, parts.scale.mT))


@singledispatch
def family(q: Distribution) -> str:
    """ "diagonal", "full" or "low-rank": the covariance of a Gaussian; or what else it is known to be.

    "mixture" of Gaussians, "flow": a Gaussian transformed by what is no affine map, or "other". It is a Gaussian if it
    is one in R^d, where torch's bijection brings its support: a LogNormal is a Gaussian of log z.
    """
    return "flow" if isinstance(q, FlowOfFeatures) else "other"


@family.register
def _(q: dist.ExpandedDistribution) -> str:
    return family(q.base_dist)


@family.register
def _(q: Independent) -> str:
    return family(q.base_dist)


@family.register
def _(q: Normal) -> str:
    return "diagonal"


@family.register
def _(q: MultivariateNormal) -> str:
    return "full"


@family.register
def _(q: LowRankMultivariateNormal) -> str:
    return "low-rank"


@family.register
def _(q: MixtureSameFamily) -> str:
    return "mixture" if family(q.component_distribution) in GAUSSIAN else "other"


@family.register
def _(q: TransformedDistribution) -> str:
    """That of its base, if its transforms are torch's bijection but for an affine map; else a Gaussian's is a flow."""
    base = family(q.base_dist)
    if base not in GAUSSIAN:
        return "other"
    try:
        mean, deviation, unconstrain = q.base_dist.mean, q.base_dist.stddev, biject_to(q.support).inv
    except NotImplementedError:
        return "other"
    # An affine map takes the middle of two points to the middle; not on a line through 0, as relu does too.
    steps = torch.linspace(-2.0, 2.0, mean.numel(), dtype=mean.dtype, device=mean.device).reshape(mean.shape)
    a, b = mean + deviation * steps, mean + deviation * (2.3 * steps + 0.4).sin()
    u = points = torch.stack([a, b, (a + b) / 2])
    for transform in q.transforms:
        u = transform(u)
    u = unconstrain(u)
    close = {"rtol": 1e-3, "atol": 1e-3 * u.abs().max().item()}
    if not torch.allclose(u[2], (u[0] + u[1]) / 2, **close):
        return "flow"
    by_element = all(transform.domain.event_dim == 0 for transform in q.transforms)
    unchanged = u.shape == points.shape and torch.allclose(u, points, **close)
    return base if by_element or unchanged else "full"


@dataclass(frozen=True)
class Free:
    """The parameters of a distribution of N data, free for each of them.

    Attributes:
        start: Theirs, each of shape (N, ...). What is added to them is in units of standard deviations, and of
            logarithms: 0 is the distribution itself.
        at: The distribution at what was added, batch shape (N,).
        drawn: What to draw there: weights (N,) and components, whose sum it is, and what gives log q of their draws.
    """

    start: tuple[Tensor, ...]
    at: Callable[[Sequence[Tensor]], Distribution]
    drawn: Callable[[Sequence[Tensor]], Sequence[tuple[Tensor | float, Distribution, Distribution]]]


@runtime_checkable
class FlowOfFeatures(Protocol):
    """A flow z = m + s f(u; h) of noise u whose m, s and features h are each datum's own, and f of all data."""

    flow: Any
    loc: Tensor
    scale: Tensor
    features: Tensor


@singledispatch
def freed(q: Distribution) -> Free:
    """The parameters of a distribution of batch shape (1, N), as a guide has it for one particle.

    Of a flow of features, those that are each datum's own.

    Raises:
        NotImplementedError: it is not known; the name of its class.
    """
    if not isinstance(q, FlowOfFeatures):
        raise NotImplementedError(type(q).__name__)
    make: Callable[..., Distribution] = type(q)
    flow, loc, scale, features = q.flow, q.loc, q.scale, q.features

    def at(moved: Sequence[Tensor]) -> Distribution:
        a, b, c = moved
        return make(flow, loc + scale * a, scale * b.exp(), features + c)

    def drawn(moved: Sequence[Tensor]) -> Sequence[tuple[Tensor | float, Distribution, Distribution]]:
        own = at(moved)  # it knows log q of its own draws, and would have to invert the flow at those of another
        return [(1.0, own, own)]

    return Free((loc, scale, features), at, drawn)


@freed.register
def _(q: LowRankMultivariateNormal) -> Free:
    loc, factor, diagonal, unit = q.loc[0], q.cov_factor[0], q.cov_diag[0], q.stddev[0]

    def at(moved: Sequence[Tensor]) -> Distribution:
        a, b, c = moved
        return dist.LowRankMultivariateNormal(
            loc + unit * a, factor + unit.unsqueeze(-1) * b, diagonal * c.exp(), validate_args=False
        )

    return Free((loc, factor, diagonal), at, lambda moved: [(1.0, at(moved), at(held(moved)))])


@freed.register
def _(q: MixtureSameFamily) -> Free:
    normals, events = q.component_distribution, len(q.event_shape)
    normals = normals.base_dist if isinstance(normals, Independent) else normals
    if not isinstance(normals, Normal):
        raise NotImplementedError(type(q).__name__)
    logits, loc, scale = q.mixture_distribution.logits[0], normals.loc[0], normals.scale[0]  # (N, C), (N, C, *event)

    def parts(moved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = moved
        return (logits + a).log_softmax(-1), loc + scale * b, scale * c.exp()

    def at(moved: Sequence[Tensor]) -> Distribution:
        log_pi, m, s = parts(moved)
        components = dist.Normal(m, s, validate_args=False).to_event(events)
        return dist.MixtureSameFamily(dist.Categorical(logits=log_pi), components, validate_args=False)

    def drawn(moved: Sequence[Tensor]) -> Sequence[tuple[Tensor | float, Distribution, Distribution]]:
        log_pi, m, s = parts(moved)
        whole = at(held(moved))
        each = zip(log_pi.exp().unbind(1), m.unbind(1), s.unbind(1), strict=True)
        return [(pi, dist.Normal(a, b, validate_args=False).to_event(events), whole) for pi, a, b in each]

    return Free((logits, loc, scale), at, drawn)


def held(moved: Sequence[Tensor]) -> list[Tensor]:
    """The same without a gradient: log q is then differentiated by the draw alone."""
    return [p.detach() for p in moved]


def kl_to_factorised(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p) of a Gaussian with correlations to one of independent elements, in nats; None if they are others.

    It is -H(q) - E_q log p, and the second asks for the variances of q alone. torch has no form for the two classes.
    """
    correlated = isinstance(q, MultivariateNormal | LowRankMultivariateNormal)
    factorised = isinstance(p, Independent) and isinstance(p.base_dist, Normal)
    if not (correlated and factorised and len(p.event_shape) == 1):
        return None
    scale = p.stddev
    squares = (q.variance + (q.mean - p.mean).square()) / scale.square()
    return (0.5 * (squares + math.log(2 * math.pi)) + scale.log()).sum(-1) - q.entropy()
