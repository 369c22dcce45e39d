r"""What each latent dimension is used for: its KL, and how far its posterior mean moves with the data.

    kl_z[d]            KL of the d-th marginals, KL(q(z_d|x) || p(z_d)); the sum is the KL where both factorise
    active units       #{d : Var_x E[z_d|x] > 0.01}, the definition of the IWAE paper;
                       or #{d : mean of kl_z[d] > 0.01}, the other common one
    KL dimensions      the fewest d whose kl_z[d] add up to 90 % of the sum over d: how many really carry what z says,
                       where active units count those that carry anything

Where the guide draws a layer given others, E[z|x] averages over the particles drawn. Auxiliary latents, on which no
x depends, are not counted.

References:
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.inference.batch import Batch
from pyrovae.inference.gaussians import marginals
from pyrovae.inference.kl import kl_of_bits
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.weights import Latent, draw

ACTIVE_VARIANCE = 0.01
ACTIVE_KL = 0.01
KL_SHARE = 0.9
# More columns than this would make the record larger than the checkpoints.
MOST_DIMENSIONS = 1024


@dataclass(frozen=True)
class Units:
    """What each latent dimension is used for; Z of them, all sites together that are not auxiliary.

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
def use_of_units(pair: Pair, batch: Batch, num_particles: int = 10) -> Units:
    """KL and variance of each latent dimension over N rows of data.

    Args:
        pair: The pair.
        batch: N rows.
        num_particles: Draws that are averaged where a distribution depends on one, as in the layers of a hierarchy.
    """
    names: list[str] = []
    kls: list[list[Tensor]] = []
    centres: list[list[Tensor]] = []
    noises: list[list[Tensor]] = []
    with evaluating(pair):
        for block in batch.split(200):
            every = draw(pair, block, num_particles).latents
            latents = {site: latent for site, latent in every.items() if not latent.auxiliary}
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
    error = all_kl.std(0) / math.sqrt(len(batch)) if len(batch) > 1 else torch.full_like(all_kl[0], math.nan)
    # The noise of averages over particles is not variance over data.
    variance = (all_centres.var(0, correction=0) - all_noise.mean(0)).clamp(min=0)
    return Units(tuple(names), all_kl.mean(0), error, variance)


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
        of_bits = kl_of_bits(q, p)
        kl = kl_divergence(q, p) if of_bits is None else of_bits
    except NotImplementedError:
        kl = q.log_prob(z) - p.log_prob(z)
    return kl.expand(z.shape).mean(0).T


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
