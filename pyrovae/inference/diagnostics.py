r"""What training shows about a pair: the terms of the bound, the KL of each dimension, active units.

    reconstruction     E log p(x|z)
    kl                 KL(q(z|x) || p(z)), all sites together
    kl_z[d]            KL of the d-th marginals, KL(q(z_d|x) || p(z_d)); the sum is `kl` where both factorise
    active units       #{d : Var_x E[z_d|x] > 0.01}, the definition of the IWAE paper

All are means over data in nats. For the upper layers of a hierarchy, E[z|x] averages over the particles drawn.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyrovae.errors import UsageError
from pyrovae.inference.log_weights import Latent, draw
from pyrovae.inference.objectives import Objective, kl_terms

ACTIVE_VARIANCE = 0.01
# More columns than this would make the record larger than the checkpoints.
MOST_DIMENSIONS = 1024


@torch.no_grad()
def measure(model: Callable, guide: Callable, batches: Iterable[Tensor], objective: PyroELBO) -> dict[str, float]:
    """Means over the rows of all batches, in nats per datum.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        batches: Tensors of shape (n, *event).
        objective: Its own bound is measured unscaled, whatever its beta. For an objective of Pyro's own, only -loss/n.

    Returns:
        "bound", and for a pair with latent sites "elbo", "reconstruction", "kl", "kl_SITE[d]", "active_units" and
        "latent_dimensions", the number that could be active.

    Raises:
        UsageError: there are no batches.
    """
    rows = 0
    totals: dict[str, float] = {}
    moments: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        totals[name] = totals.get(name, 0.0) + value.double().sum().item()

    for x in batches:
        rows += len(x)
        if not isinstance(objective, Objective):
            totals["bound"] = totals.get("bound", 0.0) - float(objective.loss(model, guide, x))
            continue
        particles = draw(model, guide, x, objective.num_averages * objective.num_particles)
        kl = torch.stack([value.mean(0) for value in kl_terms(particles)[0].values()]).sum(0)
        reconstruction = particles.log_likelihood.mean(0)
        add("bound", objective.of(particles))
        add("elbo", reconstruction - kl)
        add("reconstruction", reconstruction)
        add("kl", kl)
        for site, latent in particles.latents.items():
            for d, value in enumerate(marginal_kl(latent)):
                add(f"kl_{site}[{d}]", value)
            center = posterior_mean(latent).double()
            first, second = moments.setdefault(site, [torch.zeros_like(center[0]), torch.zeros_like(center[0])])
            first += center.sum(0)
            second += center.square().sum(0)
    if not rows:
        raise UsageError("batches: expected at least one batch with rows, got none")
    report = {name: total / rows for name, total in totals.items()}
    active = {s: int((b / rows - (a / rows).square() > ACTIVE_VARIANCE).sum()) for s, (a, b) in moments.items()}
    if active:
        report["active_units"] = float(sum(active.values()))
        report["latent_dimensions"] = float(sum(first.numel() for first, _ in moments.values()))
    if len(active) > 1:
        report |= {f"active_units_{site}": float(count) for site, count in active.items()}
    return report


def posterior_mean(latent: Latent) -> Tensor:
    """E[z|x] averaged over particles, flattened to shape (N, Z)."""
    try:
        center = latent.guide.mean
    except NotImplementedError:
        center = latent.value
    return center.mean(0).reshape(latent.log_guide.shape[1], -1)


def marginal_kl(latent: Latent) -> Tensor:
    """KL between the marginals of q and p in each dimension, averaged over particles: shape (Z, N).

    Analytic where torch has it and neither side depends on z, else sampled. Empty where marginals are not known, or
    are too many to record.
    """
    z = latent.value
    q, p = marginals(latent.guide), marginals(latent.prior)
    if q is None or p is None or z.ndim != 3 or z.shape[-1] > MOST_DIMENSIONS:
        return z.new_zeros(0)
    try:
        if not latent.ancestral:
            raise NotImplementedError
        kl = kl_divergence(q, p)
    except NotImplementedError:
        kl = q.log_prob(z) - p.log_prob(z)
    return kl.expand(z.shape).mean(0).T


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


def remarks(metrics: dict[str, float]) -> list[str]:
    """What one epoch's measurements say about posterior collapse, in words."""
    active, total = metrics.get("active_units"), int(metrics.get("latent_dimensions", 0))
    if active is None or not total:
        return []
    if active == 0:
        return [
            f"posterior collapse: no latent dimension is active (KL {metrics['kl']:.3g} nats); the decoder ignores z. "
            "A weaker decoder or more epochs help, and with the ELBO a beta that is lower or warmed up from 0"
        ]
    if active < total:
        return [f"{total - int(active)} of {total} latent dimensions are inactive (variance of E[z|x] at most 0.01)"]
    return []
