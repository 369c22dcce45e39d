r"""What the latents say of the data: the KL of a pair split by the aggregate posterior.

With the aggregate posterior of N data, q(z) = (1/N) sum_n q(z|x_n), the KL splits into what z says about which datum
it was drawn for, and how far the aggregate posterior is from the prior:

    E KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))
    I(x; z)              = E log q(z|x) - log q(z)             at most log N
    KL(q(z) || p(z))     = E log q(z) - log p(z)

A row that is given a label y has q(z|x, y) for q(z|x): z is then also told what the row was given. Where the prior
depends on y as well, or on x as that of an auxiliary latent does, E log q(z) - log p(z|y) is the distance to no one
prior, may be below 0, and is left out.

Of one latent alone, such as the lowest of a hierarchy, p(z) = E_u p(z|u) is estimated by importance sampling from
q(u|z): too low on average, so that the distance is too high. `aggregate_kl` gives it from both sides of q(z): what
a row's own q(z|x_n) in q(z) makes too high for data of the kind at large, the others' alone make too low,

    E log q(z_n) - log p(z_n)  >=  KL of data at large  >=  E log q_-n(z_n) - log p(z_n),    z_n ~ q(z|x_n)
    q_-n(z) = 1/(N-1) sum_{j != n} q(z|x_j)

on average over rows, as E log q_-n <= E log q by Jensen. The two meet where N rows cover the aggregate posterior.

References:
    Hoffman and Johnson 2016, ELBO surgery, http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimate import Estimate, of_draws
from pyrovae.inference.modules import Program, evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import density
from pyrovae.inference.weights import Particles, draw, log_mean_exp

# Elements of latents whose densities under the guide are taken at once: 64 MiB in single precision.
LATENTS_AT_ONCE = 2**24
# Rows that are drawn for at once.
BLOCK = 200


@dataclass(frozen=True)
class Information:
    """E KL(q(z|x) || p(z)) split by the aggregate posterior of N rows.

    Attributes:
        mutual_information: log q(z|x_n) - log q(z): its mean is I(x; z).
        aggregate_kl: log q(z) - log p(z): its mean is KL(q(z) || p(z)), the distance to the prior; None where rows
            have different priors.
        kl: log q(z|x_n) - log p(z), the sum of the two, draw by draw; to the row's own prior.
    """

    mutual_information: Estimate
    aggregate_kl: Estimate | None
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
def split_kl(pair: Pair, batch: Batch, num_particles: int = 10) -> Information:
    """I(x; z) under the guide and KL(q(z) || p(z)), with q(z) the aggregate posterior of all the rows.

    Both are plug-in estimates: for data of the kind at large, I(x; z) is too low on average and KL(q(z) || p(z)) too
    high, the more the closer I(x; z) is to log N. The influence of a row on either is its own value, so that
    `error_over_rows` holds although q(z) is made of the same rows.

    Args:
        pair: The pair.
        batch: N rows.
        num_particles: Draws for each row; at least 2, for an error.

    Raises:
        UsageError: num_particles < 2.
        PairError: the guide has auxiliary sites, so that q(z|x) is not known.
    """
    check_count("num_particles", num_particles, 2)
    own, aggregate, log_prior, one_prior = [], [], [], True
    with evaluating(pair):
        for _ in range(num_particles):
            blocks = [draw(pair, block, 1) for block in batch.split(BLOCK)]
            latents = blocks[0].latents
            if auxiliary := set(blocks[0].log_guides) - set(latents):
                raise PairError(f"guide site '{min(auxiliary)}' is auxiliary, so that q(z|x) alone is not known")
            # Every row's draw as a particle, which is then evaluated at every row: log q(z_k|x_j) for all (k, j).
            z = {site: torch.cat([b.latents[site].value[0] for b in blocks])[:, None] for site in latents}
            size = sum(values[0].numel() * max(1, values.shape[-1]) for values in z.values())  # of a covariance
            pieces = []
            for rows in torch.arange(len(batch), device=batch.x.device).split(
                max(1, LATENTS_AT_ONCE // (size * len(batch)))
            ):
                values = {site: v[rows].expand(-1, len(batch), *v.shape[2:]) for site, v in z.items()}
                pieces.append(density(pair, batch, values).double())
            log_q = torch.cat(pieces)
            own.append(log_q.diagonal())
            aggregate.append(torch.logsumexp(log_q, 1) - math.log(len(batch)))
            log_prior.append(torch.cat([b.log_prior[0] for b in blocks]).double())
            # What is given may change at any z; a prior that depends on x does so at the first draws.
            asked = len(batch) > 1 and (batch.given or len(own) == 1)
            one_prior = one_prior and (not asked or torch.allclose(log_prior[-1], under_others(pair, batch, z)))
    q, mean_q, p = torch.stack(own), torch.stack(aggregate), torch.stack(log_prior)
    return Information(of_draws(q - mean_q), of_draws(mean_q - p) if one_prior else None, of_draws(q - p))


@dataclass(frozen=True)
class AggregateKL:
    """KL(q(z) || p(z)), the distance of the aggregate posterior of N rows from the prior, in nats.

    Attributes:
        upper: log q(z) - log p(z), q(z) of all N rows: its mean is the KL of these rows' aggregate posterior, and too
            high for data at large.
        lower: The same with q(z) of the other rows: for data at large too low on average, but for what the estimate
            of p(z) adds.
    """

    upper: Estimate
    lower: Estimate


@torch.no_grad()
@in_single_precision
def aggregate_kl(
    model: Program, guide: Program, x: Tensor, site: str = "z", num_particles: int = 10, prior_particles: int = 100
) -> AggregateKL:
    """KL(q(z) || p(z)) of one latent site, which the guide draws given x alone.

    Args:
        model: Pyro model, called as model(x).
        guide: Pyro guide, called as guide(x).
        x: Data, shape (N, *event), at least 2 rows.
        site: The latent's name, "z1" for the lowest of a hierarchy.
        num_particles: Draws for each row; at least 2, for an error.
        prior_particles: Draws of the latents above it, for each of its draws, to estimate log p(z) by; there are none
            to be drawn where it is the only latent, and its log p(z) is exact.

    Raises:
        UsageError: num_particles < 2, prior_particles < 1, or fewer than 2 rows.
        PairError: the guide has no such latent, or draws others before it.
    """
    check_count("num_particles", num_particles, 2)
    check_count("prior_particles", prior_particles)
    pair, batch = Pair(model, guide), Batch.of(x)
    if len(batch) < 2:
        raise UsageError(f"x: expected at least 2 rows, for each to have others, got {len(batch)}")
    upper, lower = [], []
    with evaluating(pair):
        for _ in range(num_particles):
            blocks = [draw(pair, block, 1) for block in batch.split(BLOCK)]
            if next(iter(blocks[0].log_guides), None) != site:
                raise PairError(f"site '{site}': is not the first that the guide draws, so that q(z|x) is not known")
            z = torch.cat([block.latents[site].value[0] for block in blocks])
            log_q = torch.cat([under_all(blocks, site, values) for values in z.split(BLOCK)])
            log_p = torch.cat(
                [
                    log_prior_of(pair, part, site, values, prior_particles)
                    for part, values in zip(batch.split(BLOCK), z.split(BLOCK), strict=True)
                ]
            )
            upper.append(log_q.logsumexp(1) - math.log(len(batch)) - log_p)
            others = log_q.fill_diagonal_(-math.inf)
            lower.append(others.logsumexp(1) - math.log(len(batch) - 1) - log_p)
    return AggregateKL(of_draws(torch.stack(upper)), of_draws(torch.stack(lower)))


def under_all(blocks: Sequence[Particles], site: str, z: Tensor) -> Tensor:
    """log q(z_i|x_j) of values (B, *event) under all rows, which are in blocks: shape (B, N)."""
    return torch.cat([block.latents[site].guide.log_prob(z.unsqueeze(1)).double() for block in blocks], 1)


def log_prior_of(pair: Pair, batch: Batch, site: str, z: Tensor, num_particles: int) -> Tensor:
    """log p(z) of a value (B, *event) of a site for each row, the latents above it summed out by draws: shape (B,)."""
    alone = len(draw(pair, batch[:1], 1).latents) == 1
    k = 1 if alone else num_particles
    particles = draw(pair, batch, k, at={site: z.expand(k, *z.shape)})
    return log_mean_exp((particles.log_prior - particles.log_guide + particles.log_guides[site]).double(), 0)


def under_others(pair: Pair, batch: Batch, z: dict[str, Tensor]) -> Tensor:
    """log p of the draw of each row, (N, 1, *event), where it is given what its neighbour is given: shape (N,)."""
    log_p = []
    for rows in torch.arange(len(batch), device=batch.x.device).split(BLOCK):
        values = {site: value[rows].transpose(0, 1) for site, value in z.items()}
        log_p.append(draw(pair, batch.roll(1)[rows], 1, at=values).log_prior[0])
    return torch.cat(log_p).double()
