"""KL(q || p) of the latent sites of a pair: in closed form where there is one, else at the draws."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyrovae.inference.gaussians import kl_to_factorised
from pyrovae.inference.look import plain
from pyrovae.inference.weights import Latent, Particles


def kl_terms(particles: Particles, analytic: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """KL(q || p) of each latent site, and the form it was taken in.

    Returns:
        {site: KL or log q - log p in nats, shape (K, N)} and {site: "analytic" or "sampled"}. Auxiliary sites of the
        guide are in the entry "auxiliary".
    """
    values: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, latent in particles.latents.items():
        kl = analytic_kl(latent) if analytic else None
        values[name] = latent.log_guide - latent.log_prior if kl is None else kl
        forms[name] = "sampled" if kl is None else "analytic"
    auxiliary = [name for name in particles.log_guides if name not in particles.latents]
    if auxiliary:
        values["auxiliary"] = torch.stack([particles.log_guides[name] for name in auxiliary]).sum(0)
        forms["auxiliary"] = "sampled"
    return values, forms


def analytic_kl(latent: Latent) -> Tensor | None:
    """KL(q || p) of a site in closed form, shape (K, N), or None.

    It exists where torch registers one, and between a full- or low-rank-covariance Gaussian and a factorised one. It
    may be used where neither distribution depends on the site's own value: in q(z1|x) q(z2|z1) against p(z2) p(z1|z2),
    p(z1|z2) depends on z1 through z2, and the closed form would be the KL of something else.
    """
    if latent.masked or not latent.ancestral:
        return None
    q = latent.guide
    if (of_bits := kl_of_bits(q, latent.prior)) is not None:
        return of_bits.expand(latent.value.shape).reshape(*latent.log_guide.shape, -1).sum(-1)
    if (of_gaussian := kl_to_factorised(q, latent.prior)) is not None:
        return of_gaussian
    if isinstance(q, dist.LowRankMultivariateNormal):  # torch's form takes each parameter to be of the batch's shape
        q = dist.LowRankMultivariateNormal(q.loc, q.cov_factor, q.cov_diag)
    try:
        return kl_divergence(q, latent.prior)
    except NotImplementedError:
        return None


def kl_of_bits(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p) of each of several independent bits, or None of what are none.

    torch's own takes parameters to be of one shape, and raises an IndexError where they would be broadcast.
    """
    q, p = plain(q), plain(p)
    if not (isinstance(q, dist.Bernoulli) and isinstance(p, dist.Bernoulli)):
        return None
    of_q, of_p = (dist.Bernoulli(logits=logits) for logits in torch.broadcast_tensors(q.logits, p.logits))
    return kl_divergence(of_q, of_p)
