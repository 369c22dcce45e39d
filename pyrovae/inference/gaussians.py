"""What is known of Gaussians: the one file that looks into a distribution to see whether it is one.

Each function says `None`, "other", or refuses what it does not know; a new distribution works everywhere without a
line here, and is only not widened, split into dimensions, or compared with a family.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import Distribution

from pyrovae.errors import PairError


def inflated(q: Any, factor: float, site: str) -> Any:
    """A Gaussian, or a transformed one, with its standard deviations multiplied by a factor."""
    if isinstance(q, dist.ExpandedDistribution):
        return inflated(q.base_dist, factor, site).expand(q.batch_shape)
    if isinstance(q, torch.distributions.Independent):
        return dist.Independent(inflated(q.base_dist, factor, site), q.reinterpreted_batch_ndims)
    if isinstance(q, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(inflated(q.base_dist, factor, site), q.transforms)
    if isinstance(q, torch.distributions.Normal):
        return dist.Normal(q.loc, q.scale * factor)
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril * factor)
    if isinstance(q, torch.distributions.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(q.loc, q.cov_factor * factor, q.cov_diag * factor**2)
    raise PairError(
        f"guide site '{site}': {type(q).__name__} cannot be widened, since it is no Gaussian; use "
        "Widened(scales=(1,)), which mixes the guide as it is with the prior"
    )


def marginals(distribution: Any) -> Distribution | None:
    """The one-dimensional marginals of a distribution over vectors (*batch, Z), as a batch (*batch, Z), if known."""
    if isinstance(distribution, dist.ExpandedDistribution):
        return marginals(distribution.base_dist)
    if isinstance(distribution, dist.Independent) and distribution.reinterpreted_batch_ndims == 1:
        return distribution.base_dist
    if isinstance(distribution, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return dist.Normal(distribution.mean, distribution.stddev)
    if isinstance(distribution, dist.MixtureSameFamily):
        parts = marginals(distribution.component_distribution)
        if isinstance(parts, dist.Normal):
            weights = dist.Categorical(logits=distribution.mixture_distribution.logits.unsqueeze(-2))
            return dist.MixtureSameFamily(weights, dist.Normal(parts.loc.mT, parts.scale.mT))
    return None
