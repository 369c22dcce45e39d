"""What is known of Gaussians: the one file that looks into a distribution to see whether it is one.

A distribution that is not known here is not refused anywhere but by name: it cannot be widened, its dimensions have no
marginals, and its family is "other". To make one known, register its class with the functions below.
"""

from functools import singledispatch
from typing import Literal, get_args

import pyro.distributions as dist
import torch
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
    """ "diagonal" or "full": the covariance of a Gaussian; "other": what is not known to be one.

    It is one if it is in R^d, where torch's bijection brings its support: a LogNormal is a Gaussian of log z.
    """
    return "other"


@family.register
def _(q: dist.ExpandedDistribution) -> str:
    return family(q.base_dist)


@family.register
def _(q: Independent) -> str:
    return family(q.base_dist)


@family.register
def _(q: Normal) -> str:
    return "diagonal"


@family.register(MultivariateNormal)
@family.register(LowRankMultivariateNormal)
def _(q: MultivariateNormal | LowRankMultivariateNormal) -> str:
    return "full"


@family.register
def _(q: TransformedDistribution) -> str:
    """That of its base, if its transforms are torch's bijection but for an affine map, as those of a flow are not."""
    base = family(q.base_dist)
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
    if base == "other" or not torch.allclose(u[2], (u[0] + u[1]) / 2, **close):
        return "other"
    by_element = all(transform.domain.event_dim == 0 for transform in q.transforms)
    unchanged = u.shape == points.shape and torch.allclose(u, points, **close)
    return base if by_element or unchanged else "full"


def with_covariance(p: Distribution, q: Distribution) -> Distribution:
    """A factorised Gaussian p as a multivariate one when q is, since torch has no KL between the two classes."""
    correlated = isinstance(q, MultivariateNormal | LowRankMultivariateNormal)
    factorised = isinstance(p, Independent) and isinstance(p.base_dist, Normal)
    if correlated and factorised and len(p.event_shape) == 1:
        return dist.MultivariateNormal(p.mean, scale_tril=torch.diag_embed(p.stddev))
    return p
