r"""What the latents of a pair do: the terms of the bound, the KL of each dimension, active units, information.

    reconstruction     E log p(x|z)
    kl                 KL(q(z|x) || p(z)), all sites together
    kl_z[d]            KL of the d-th marginals, KL(q(z_d|x) || p(z_d)); the sum is `kl` where both factorise
    active units       #{d : Var_x E[z_d|x] > 0.01}, the definition of the IWAE paper;
                       or #{d : mean of kl_z[d] > 0.01}, the other common one
    KL dimensions      the fewest d whose kl_z[d] add up to 90 % of the sum over d: how many really carry what z says,
                       where active units count those that carry anything

All are means over data in nats. For the upper layers of a hierarchy, E[z|x] averages over the particles drawn.

With the aggregate posterior of N data, q(z) = (1/N) sum_n q(z|x_n), the KL splits into what z says about which datum
it was drawn for, and how far the aggregate posterior is from the prior:

    E KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))
    I(x; z)              = E log q(z|x) - log q(z)             at most log N
    KL(q(z) || p(z))     = E log q(z) - log p(z)

References:
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Hoffman and Johnson 2016, ELBO surgery, http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyrovae.checks import check_count
from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.kl import kl_terms
from pyrovae.inference.modules import evaluating
from pyrovae.inference.objectives import OfParticles, as_objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import density
from pyrovae.inference.weights import Latent, draw

ACTIVE_VARIANCE = 0.01
ACTIVE_KL = 0.01
KL_SHARE = 0.9
# Elements of latents whose densities under the guide are taken at once: 64 MiB in single precision.
LATENTS_AT_ONCE = 2**24
# More columns than this would make the record larger than the checkpoints.
MOST_DIMENSIONS = 1024


@torch.no_grad()
@in_single_precision
def measure(
    model: Callable,
    guide: Callable,
    batches: Iterable[Tensor],
    objective: PyroELBO,
    particle_chunk: int | None = None,
) -> dict[str, float]:
    """Means over the rows of all batches, in nats per datum.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        batches: Tensors of shape (n, *event).
        objective: Its own bound is measured unscaled, whatever its beta. For an objective of Pyro's own, only -loss/n.
        particle_chunk: Draw so many particles at a time, for memory. The bound is that of all of them, the rest is
            measured on the first chunk.

    Returns:
        "bound", and for a pair with latent sites "elbo", "reconstruction", "kl", "kl_SITE[d]", "active_units" and
        "latent_dimensions", the number that could be active.

    Raises:
        UsageError: there are no batches.
    """
    pair, objective, rows = Pair(model, guide), as_objective(objective), 0
    totals: dict[str, float] = {}
    moments: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        totals[name] = totals.get(name, 0.0) + value.double().sum().item()

    for x in batches:
        rows += len(x)
        if not isinstance(objective, OfParticles):
            add("bound", objective.combine(objective.draw(pair, Batch(x), 1)))
            continue
        size, *sizes = objective.chunks(particle_chunk)
        particles = draw(pair, Batch(x), size)
        terms = [objective.terms(particles), *(objective.draw(pair, Batch(x), k) for k in sizes)]
        kl = torch.stack([value.mean(0) for value in kl_terms(particles)[0].values()]).sum(0)
        reconstruction = particles.log_likelihood.mean(0)
        add("bound", objective.combine(torch.cat(terms, 1)))
        add("elbo", reconstruction - kl)
        add("reconstruction", reconstruction)
        add("kl", kl)
        for site, latent in particles.latents.items():
            for d, value in enumerate(marginal_kl(latent)):
                add(f"kl_{site}[{d}]", value)
            center, noise = posterior_mean(latent)
            first, second = moments.setdefault(site, [torch.zeros_like(center[0]), torch.zeros_like(center[0])])
            first += center.sum(0)
            second += (center.square() - noise).sum(0)
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


def posterior_mean(latent: Latent) -> tuple[Tensor, Tensor]:
    """E[z|x] averaged over particles, and the variance of that average, both of shape (N, Z) in double precision.

    The variance is 0 where the guide's mean is known, and not for the upper layers of a hierarchy, whose guides depend
    on the draws below; from a single particle it cannot be told, and is 0.
    """
    try:
        centers = latent.guide.mean
    except NotImplementedError:
        centers = latent.value
    k, n = latent.log_guide.shape
    centers = centers.reshape(k, n, -1).double()
    noise = centers.var(0) / k if k > 1 else torch.zeros_like(centers[0])
    return centers.mean(0), noise


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


def kl_dimensions(kl: Sequence[float], share: float = KL_SHARE) -> int | None:
    """The fewest dimensions that together carry that share of the sum of their KLs.

    Args:
        kl: Mean KL of each latent dimension in nats, `kl_SITE[d]` of `measure`. A sampled one below 0 counts as 0.
        share: Above 0, at most 1.

    Returns:
        From 1 to the number of dimensions; 0 where no dimension has a KL. None where a KL is not known.
    """
    largest = torch.tensor(sorted(kl, reverse=True), dtype=torch.float64).clamp(min=0)
    if not len(largest) or largest.isnan().any():
        return None
    carried = largest.cumsum(0)
    # A hair less than the share, so that nine equal dimensions of ten carry 90 % whatever the rounding of the sum.
    return 0 if carried[-1] == 0 else int((carried < (share - 1e-12) * carried[-1]).sum()) + 1


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


@dataclass(frozen=True)
class Estimate:
    """A quantity of each datum in nats, estimated from draws.

    Attributes:
        values: Shape (N,), in double precision on the CPU.
        errors: Their Monte Carlo standard errors, shape (N,).
    """

    values: Tensor
    errors: Tensor

    @property
    def mean(self) -> float:
        """Mean over the rows."""
        return self.values.mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of `mean` for these rows: sqrt(sum of squared errors) / N."""
        return self.errors.square().sum().sqrt().item() / len(self.values)

    @property
    def error_over_rows(self) -> float:
        """Standard error of `mean` as an estimate for all data of the kind: sd / sqrt(N)."""
        return (self.values.std() / math.sqrt(len(self.values))).item() if len(self.values) > 1 else math.nan


def of_draws(values: Tensor) -> Estimate:
    """The mean of independent draws (K, N), for each datum."""
    values = values.double().cpu()
    return Estimate(values.mean(0), values.std(0) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Units:
    """What each latent dimension is used for; Z of them, all sites together.

    Attributes:
        names: SITE[d].
        kl: Mean over data of KL(q(z_d|x) || p(z_d)) in nats, shape (Z,); NaN where marginals are not known.
        kl_error: Its standard error over data.
        variance: Var_x E[z_d|x], shape (Z,).
    """

    names: tuple[str, ...]
    kl: Tensor
    kl_error: Tensor
    variance: Tensor

    @property
    def active_by_variance(self) -> int:
        """How many have Var_x E[z_d|x] > 0.01."""
        return int((self.variance > ACTIVE_VARIANCE).sum())

    @property
    def active_by_kl(self) -> int | None:
        """How many have a mean KL of more than 0.01 nat; None where the KL of some dimension is not known."""
        return None if self.kl.isnan().any() else int((self.kl > ACTIVE_KL).sum())

    @property
    def carrying(self) -> int | None:
        """How few carry `KL_SHARE` of the KL, see `kl_dimensions`."""
        return kl_dimensions(self.kl.tolist())


@torch.no_grad()
@in_single_precision
def units(model: Callable, guide: Callable, x: Tensor, num_particles: int = 10) -> Units:
    """KL and variance of each latent dimension over the data x (N, *event).

    Args:
        num_particles: Draws that are averaged where a distribution depends on one, as in the layers of a hierarchy.
    """
    names: list[str] = []
    kls: list[list[Tensor]] = []
    centres: list[list[Tensor]] = []
    noises: list[list[Tensor]] = []
    with evaluating(model, guide):
        for block in x.split(200):
            latents = draw(Pair(model, guide), Batch(block), num_particles).latents
            means = {site: posterior_mean(latent) for site, latent in latents.items()}
            centre = {site: values.cpu() for site, (values, _) in means.items()}
            names = [f"{site}[{d}]" for site, values in centre.items() for d in range(values.shape[1])]
            kl = {site: marginal_kl(latent).double().cpu() for site, latent in latents.items()}
            unknown = {site: torch.full_like(values, math.nan) for site, values in centre.items()}
            kls.append([kl[site].T if kl[site].numel() else unknown[site] for site in latents])
            centres.append(list(centre.values()))
            noises.append([noise.cpu() for _, noise in means.values()])
    all_kl, all_centres, all_noise = (
        torch.cat([torch.cat(block, -1) for block in blocks]) for blocks in (kls, centres, noises)
    )
    error = all_kl.std(0) / math.sqrt(len(x)) if len(x) > 1 else torch.full_like(all_kl[0], math.nan)
    # The noise of averages over particles is not variance over data.
    variance = (all_centres.var(0, correction=0) - all_noise.mean(0)).clamp(min=0)
    return Units(tuple(names), all_kl.mean(0), error, variance)


@dataclass(frozen=True)
class Information:
    """E KL(q(z|x) || p(z)) split by the aggregate posterior of N rows.

    Attributes:
        mutual_information: log q(z|x_n) - log q(z): its mean is I(x; z).
        aggregate_kl: log q(z) - log p(z): its mean is KL(q(z) || p(z)), the distance to the prior.
        kl: log q(z|x_n) - log p(z), the sum of the two, draw by draw.
    """

    mutual_information: Estimate
    aggregate_kl: Estimate
    kl: Estimate

    @property
    def limit(self) -> float:
        """log N, which the mutual information of N rows cannot exceed."""
        return math.log(len(self.kl.values))

    @property
    def at_limit(self) -> bool:
        """Within a nat of its limit: it says little more than that the rows can be told apart by z."""
        return self.mutual_information.mean > self.limit - 1


@torch.no_grad()
@in_single_precision
def information(model: Callable, guide: Callable, x: Tensor, num_particles: int = 10) -> Information:
    """I(x; z) under the guide and KL(q(z) || p(z)), with q(z) the aggregate posterior of all the rows of x.

    Both are plug-in estimates: for data of the kind at large, I(x; z) is too low on average and KL(q(z) || p(z)) too
    high, the more the closer I(x; z) is to log N. The influence of a row on either is its own value, so that
    `error_over_rows` holds although q(z) is made of the same rows.

    Args:
        num_particles: Draws for each row; at least 2, for an error.

    Raises:
        UsageError: num_particles < 2.
        PairError: the guide has auxiliary sites, so that q(z|x) is not known.
    """
    check_count("num_particles", num_particles, 2)
    own, aggregate, log_prior = [], [], []
    with evaluating(model, guide):
        for _ in range(num_particles):
            blocks = [draw(Pair(model, guide), Batch(block), 1) for block in x.split(200)]
            latents = blocks[0].latents
            if auxiliary := set(blocks[0].log_guides) - set(latents):
                raise PairError(f"guide site '{min(auxiliary)}' is auxiliary, so that q(z|x) alone is not known")
            # Every row's draw as a particle, which is then evaluated at every row: log q(z_k|x_j) for all (k, j).
            z = {site: torch.cat([b.latents[site].value[0] for b in blocks])[:, None] for site in latents}
            size = sum(values[0].numel() * max(1, values.shape[-1]) for values in z.values())  # of a covariance
            pieces = []
            for rows in torch.arange(len(x), device=x.device).split(max(1, LATENTS_AT_ONCE // (size * len(x)))):
                values = {site: v[rows].expand(-1, len(x), *v.shape[2:]) for site, v in z.items()}
                pieces.append(density(guide, x, values).double())
            log_q = torch.cat(pieces)
            own.append(log_q.diagonal())
            aggregate.append(torch.logsumexp(log_q, 1) - math.log(len(x)))
            log_prior.append(torch.cat([b.log_prior[0] for b in blocks]).double())
    q, mean_q, p = torch.stack(own), torch.stack(aggregate), torch.stack(log_prior)
    return Information(of_draws(q - mean_q), of_draws(mean_q - p), of_draws(q - p))
