r"""Objectives with a weight: the ELBO less a penalty of the codes of a batch.

With rows x_1 .. x_N, q(z) = (1/N) sum_n q(z|x_n) is the aggregate posterior, and

    mean KL(q(z|x_n) || p(z)) = I(n, z) + TC + sum_d KL(q(z_d) || p(z_d)),      TC = KL(q(z) || prod_d q(z_d))

where the prior factorises. Per datum, averaged over the batch, what is maximised is

    free-bits    E log p(x|z) - sum_g max(C, KL_g)             KL_g of a dimension or a site, averaged over the batch
    beta-tc      ELBO - (beta - 1) TC
    dip          ELBO - lambda_o sum_{i != j} cov_ij^2 - lambda_d sum_i (cov_ii - 1)^2
    factor       ELBO - gamma TC                            by a critic of codes
    info-vae     ELBO - lambda MMD^2(q(z), p(z))
    wae          E log p(x|z) - lambda MMD^2(q(z), p(z))
    semi-supervised
                 ELBO + alpha log q(y = label|x)            of rows whose label the guide observes

Penalties are not negative, so that each but wae is a lower bound on the mean of log p(x), looser than the ELBO; that
one is no bound of anything. Free bits and labels are of each row or KL, all others are computed of the batch's estimate
of q(z), see below. None of it is in what is reported: `evaluated` is the ELBO, and log p(x), the KL and the rest are
those of the pair.

**The total correlation** needs log q(z) at draws z_i ~ q(z|x_i), of which a batch of B rows shows B terms in N:

    weighted      log (1/(N B)) sum_j q(z_i|x_j)
    stratified    log [q(z_i|x_i)/N + (1 - 1/N) (1/(B-1)) sum_{j != i} q(z_i|x_j)]

Row i itself is in the batch for certain, as z_i is its draw, and any other one with probability (B - 1)/(N - 1): so the
argument of the second logarithm has expectation q(z_i), and only the logarithm biases it. The argument of the first is
about B times too small where rows overlap, by which its TC is (Z - 1) log B too large: a constant that no gradient
sees, but no total correlation. Chen et al. leave most of the rest of the second's weight on one other row; spread over
all of them it has the same expectation and less variance. The published code of it fills a column of the matrix of
weights in place of its diagonal, where a row weighs its own draw: here the diagonal has 1/N.

**The MMD** is the U-statistic of the batch's draws and as many of the prior's, with the kernel
sum_c C_c / (C_c + |z - z'|^2), C_c = 2 Z s_c, s_c from 0.1 to 10, divided by their number. It is unbiased, and may be
negative.

References:
    Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow, https://arxiv.org/abs/1606.04934
    Chen et al. 2018, Isolating Sources of Disentanglement in VAEs, https://arxiv.org/abs/1802.04942
    Kim and Mnih 2018, Disentangling by Factorising, https://arxiv.org/abs/1802.05983
    Kumar, Sattigeri and Balakrishnan 2018, Variational Inference of Disentangled Latent Concepts,
    https://arxiv.org/abs/1711.00848
    Zhao, Song and Ermon 2019, InfoVAE, https://arxiv.org/abs/1706.02262
    Tolstikhin et al. 2018, Wasserstein Auto-Encoders, https://arxiv.org/abs/1711.01558
    Kingma et al. 2014, Semi-Supervised Learning with Deep Generative Models, https://arxiv.org/abs/1406.5298
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyrovae.errors import PairError
from pyrovae.inference.estimators import USUAL, GradientEstimator
from pyrovae.inference.gaussians import marginals
from pyrovae.inference.kl import kl_terms
from pyrovae.inference.objectives import ELBO, OfParticles
from pyrovae.inference.weights import Latent, Particles, log_prob, sample_sites
from pyrovae.settings import NotNegative, Positive, check_fields

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the kernel, as shares of its usual 2 Z


class Weighted(OfParticles):
    """The ELBO with a penalty, of which nothing is in what is reported.

    Attributes:
        maximised: What that is: a bound, of what, or none.
        by_critic: Whether it needs one in the guide.
    """

    maximised: ClassVar[str]
    by_critic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)

    @property
    @final
    def evaluated(self) -> ELBO:
        return ELBO(self.num_particles, num_averages=self.num_averages)

    @final
    def terms(self, particles: Particles) -> Tensor:
        """log p(x|z), the KL of all sites, and what the penalty is made of: shape (2 + T, K', N)."""
        values, _ = kl_terms(particles)
        kl = sum(values.values(), torch.zeros_like(particles.log_likelihood))
        return torch.cat([torch.stack([particles.log_likelihood, kl]), self.penalised(particles, values)])

    @final
    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        log_likelihood, kl, *penalised = terms.mean(1)
        if not settings:
            return log_likelihood - kl
        return self.maximise(log_likelihood, kl, torch.stack(penalised), **settings)

    @abstractmethod
    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """What the penalty is made of, shape (T, K', N), by draws and the KL of each site, (K', N)."""

    @abstractmethod
    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        """What is maximised, shape (N,), of what was averaged over draws: E log p(x|z), KL, and (T, N)."""


@dataclass(frozen=True)
class FreeBits(Weighted):
    """The ELBO with so many nats of KL free.

    Args:
        num_particles: Number of draws averaged.
        nats: C, of each group: below it the KL of the group, averaged over the batch, has no gradient.
        group: What a group is: a latent dimension, or a latent site.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "free-bits"
    title: ClassVar[str] = "ELBO, free bits"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = "a lower bound on the ELBO, and so on log p(x), means over the batch"

    num_particles: int = 1
    nats: NotNegative = 0.1
    group: Literal["dimension", "site"] = "dimension"
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """The KL of each group, shape (groups, K', N)."""
        if self.group == "site":
            return torch.stack([*kls.values()])
        return torch.cat([kl_of_dimensions(name, latent) for name, latent in particles.latents.items()])

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        kept = torch.maximum(penalised.mean(1), torch.as_tensor(settings["free_nats"]).to(penalised))
        return log_likelihood - kept.sum()

    def settings(self, step: int) -> dict[str, float]:
        return {"free_nats": self.nats}


@dataclass(frozen=True)
class BetaTC(Weighted):
    """The ELBO with its total correlation weighted.

    Args:
        num_rows: N, the rows of the data set.
        num_particles: Number of draws averaged.
        weight: Beta, of the total correlation; 1 is the ELBO.
        estimate: Of log q(z), see the module: stratified or weighted.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "beta-tc"
    title: ClassVar[str] = "beta-TC ELBO"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = (
        "with a weight of at least 1 a lower bound on the ELBO, and so on log p(x), means over the batch, as far as "
        "the total correlation is estimated well"
    )

    num_rows: int
    num_particles: int = 1
    weight: NotNegative = 6.0
    estimate: Literal["stratified", "weighted"] = "stratified"
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        return total_correlation(particles, self.num_rows, self.estimate == "stratified").unsqueeze(0)

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        return log_likelihood - kl - (settings["weight"] - 1) * penalised[0]

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class DIP(Weighted):
    """The ELBO, and codes drawn to a covariance of I.

    Args:
        num_particles: Number of draws averaged.
        weight: Lambda_o, of the squares off the diagonal.
        diagonal: Lambda_d, of the squares on it, as a multiple of the weight.
        covariance: Of what: of the means of q(z|x), DIP-VAE-I; or of q(z), DIP-VAE-II.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "dip"
    title: ClassVar[str] = "DIP ELBO"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = "a lower bound on the ELBO, and so on log p(x), means over the batch"

    num_particles: int = 1
    weight: NotNegative = 10.0
    diagonal: NotNegative = 1.0
    covariance: Literal["means", "draws"] = "means"
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """The sums of squares off the diagonal and on it, the same for all rows: shape (2, K', N)."""
        name, latent = only_site(particles)
        q = factors(name, latent)
        means = q.mean.expand(latent.value.shape)
        centred = means - means.mean(1, keepdim=True)
        covariance = centred.mT @ centred / means.shape[1]  # (K', Z, Z)
        if self.covariance == "draws":
            covariance = covariance + torch.diag_embed(q.variance.expand(latent.value.shape).mean(1))
        on = torch.diagonal(covariance, dim1=-2, dim2=-1)
        off = covariance.square().sum((-2, -1)) - on.square().sum(-1)
        both = torch.stack([off, (on - 1).square().sum(-1)])
        return both.unsqueeze(-1).expand(*both.shape, means.shape[1])

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        off, on = penalised
        return log_likelihood - kl - settings["weight"] * (off + self.diagonal * on)

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class Factor(Weighted):
    """The ELBO with its total correlation weighted, by a critic in the guide (`pyrovae.models.Critic`).

    Args:
        num_particles: Number of draws averaged.
        weight: Gamma, of the total correlation, beside the ELBO's own.
        rate: Learning rate of the adversary, as a multiple of the pair's.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "factor"
    title: ClassVar[str] = "FactorVAE ELBO"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = (
        "a lower bound on the ELBO, and so on log p(x), means over the batch, as far as the critic knows the density "
        "ratio"
    )
    by_critic: ClassVar[bool] = True
    others: ClassVar[tuple[str, ...]] = ("critic_loss",)

    num_particles: int = 1
    weight: NotNegative = 10.0
    rate: Positive = 1.0
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """The critic's log-density ratio and its loss, shape (2, K', N)."""
        found = left_at(particles.guide_trace, "critic_ratio", "critic_loss")
        if found is None:
            raise PairError(
                "objective: Factor needs a critic in the guide that is in training mode; build the pair with "
                "VAE(..., critic=Critic(latent_dim))"
            )
        return torch.stack(found).expand(2, *particles.log_likelihood.shape)

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        ratio, loss = penalised
        return log_likelihood - kl - settings["weight"] * ratio - (loss - loss.detach())

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


class Matched(Weighted):
    """A penalty on how far the codes of a batch are from draws of the prior, by their MMD."""

    @final
    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """MMD^2 of q(z) and p(z), the same for all rows: shape (1, K', N)."""
        name, latent = only_site(particles)
        if latent.value.ndim != 3 or latent.value.shape[1] < 2:
            shape = tuple(latent.value.shape[1:])
            raise PairError(f"site '{name}': an MMD needs vectors of at least 2 rows, got draws of shape {shape}")
        with torch.no_grad():
            drawn = latent.prior.sample()
        squared = mmd(latent.value, drawn.expand(latent.value.shape))
        return squared.unsqueeze(-1).expand(latent.value.shape[:2]).unsqueeze(0)

    @final
    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}

    weight: float


@dataclass(frozen=True)
class InfoVAE(Matched):
    """The ELBO, and codes drawn to the prior by their MMD.

    Args:
        num_particles: Number of draws averaged.
        weight: Lambda, in nats, of MMD^2.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "info-vae"
    title: ClassVar[str] = "InfoVAE ELBO"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = "a lower bound on the ELBO, and so on log p(x), in expectation and means over the batch"

    num_particles: int = 1
    weight: NotNegative = 100.0
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        return log_likelihood - kl - settings["weight"] * penalised[0]


@dataclass(frozen=True)
class WAE(Matched):
    """The reconstruction E log p(x|z), and codes drawn to the prior by their MMD in place of the KL: no bound.

    Args:
        num_particles: Number of draws averaged.
        weight: Lambda, in nats, of MMD^2.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "wae"
    title: ClassVar[str] = "WAE"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others are of each row by itself
    maximised: ClassVar[str] = "no bound: nothing keeps q(z|x) from becoming a point"
    keeps_last: ClassVar[bool] = True

    num_particles: int = 1
    weight: NotNegative = 100.0
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        return log_likelihood - settings["weight"] * penalised[0]


@dataclass(frozen=True)
class SemiSupervised(Weighted):
    """The ELBO, and alpha times the log-probability of what the guide observes: of labels, under q(y|x).

    Nothing of the bound of a row with a label trains q(y|x), since its y is not drawn; this does.

    Args:
        num_particles: Number of draws averaged.
        weight: Alpha, of the log-probability of each label.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "semi-supervised"
    title: ClassVar[str] = "ELBO, semi-supervised"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = (
        "reparameterised",
        "score-function",
        "leave-one-out",
        "enumerated",
        "relaxed",
    )
    maximised: ClassVar[str] = "a lower bound on the ELBO, since a label's log-probability is not positive"
    of_labels: ClassVar[bool] = True

    num_particles: int = 1
    weight: NotNegative = 1.0
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """log q of what the guide observes, shape (1, K', N).

        Raises:
            PairError: it observes nothing.
        """
        shape = tuple(particles.log_weights.shape)
        sites = {name: site for name, site in sample_sites(particles.guide_trace).items() if site["is_observed"]}
        if not sites:
            raise PairError(
                "objective: the guide observes no label, so that there is nothing semi-supervised; give labels, as "
                "given=(y,), or use ELBO",
                settings=("elbo=elbo",),
            )
        log_q = [log_prob(site, f"guide site '{name}'", (shape[0], shape[1])) for name, site in sites.items()]
        return torch.stack(log_q).sum(0, keepdim=True)

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        return log_likelihood - kl + settings["weight"] * penalised[0]

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


def left_at(trace: Trace, *names: str) -> list[Tensor] | None:
    """What a critic or a judge left at deterministic sites of those names; None where one is missing."""
    sites = [trace.nodes.get(name) for name in names]
    values = [site["value"] for site in sites if site is not None]
    return values if len(values) == len(names) else None


def only_site(particles: Particles) -> tuple[str, Latent]:
    """The latent site of a pair that has one.

    Raises:
        PairError: it has several, of whose joint distribution over rows nothing is known.
    """
    if len(particles.latents) != 1:
        raise PairError(
            f"objective: is for pairs with one latent site, got {', '.join(particles.latents) or 'none'}; use ELBO, or "
            "FreeBits(group='site')",
            settings=("elbo=elbo", "elbo=free-bits", "elbo.group=site"),
        )
    ((name, latent),) = particles.latents.items()
    return name, latent


def factors(name: str, latent: Latent) -> Distribution:
    """The marginals of the elements of z under a guide, a batch of shape (K, N, Z) or one that expands to it.

    Raises:
        PairError: they are not known.
    """
    found = marginals(latent.guide) if latent.value.ndim == 3 else None
    if found is None:
        raise PairError(
            f"guide site '{name}' ({type(latent.guide).__name__}): the marginals of its elements are not known; use a "
            "Gaussian guide",
            settings=("guide=MeanFieldNormal",),
        )
    return found


def kl_of_dimensions(name: str, latent: Latent) -> Tensor:
    """KL(q(z_d|x) || p(z_d)) of each element, shape (Z, K, N), where both sides factorise.

    Raises:
        PairError: one of them does not.
    """
    sides = (side.base_dist if isinstance(side, Independent) else None for side in (latent.guide, latent.prior))
    q, p = (None if side is None or latent.value.ndim != 3 else side for side in sides)
    if q is None or p is None or not latent.ancestral:
        raise PairError(
            f"objective: nats are free of each dimension of site '{name}', but its {'guide' if q is None else 'prior'} "
            "does not factorise over them; use FreeBits(group='site')",
            settings=("elbo.group=site",),
        )
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        kl = q.log_prob(latent.value) - p.log_prob(latent.value)
    return kl.expand(latent.value.shape).movedim(-1, 0)


def total_correlation(particles: Particles, num_rows: int, stratified: bool = True) -> Tensor:
    """An estimate of log q(z) - sum_d log q(z_d) at each draw, shape (K, N); see the module.

    Args:
        particles: Of a batch of at least 2 rows, drawn from the data set without replacement.
        num_rows: N, of the data set.
        stratified: Whether the batch's own row has its own weight.

    Raises:
        PairError: the guide's elements have no known marginals, or the batch is larger than the data set.
    """
    name, latent = only_site(particles)
    q = factors(name, latent)
    rows = latent.value.shape[1]
    if rows < 2 or rows > num_rows:
        raise PairError(f"objective: expected batches of 2 to {num_rows} rows, those of the data set, got {rows}")
    z = latent.value.transpose(0, 1).unsqueeze(2)  # each draw under each row: (N, K, 1, Z) under (K, N, Z)
    log_weight = _log_weights(rows, num_rows, stratified, z)
    of_elements = q.log_prob(z)  # (N, K, N, Z): where the guide factorises, its density is their sum
    log_q = of_elements.sum(-1) if isinstance(latent.guide, Independent) else latent.guide.log_prob(z)
    joint = (log_q + log_weight).logsumexp(-1)
    each = (of_elements + log_weight.unsqueeze(-1)).logsumexp(-2).sum(-1)
    return (joint - each).T


def _log_weights(rows: int, num_rows: int, stratified: bool, like: Tensor) -> Tensor:
    """log of what q(z_i|x_j) weighs in the estimate of q(z_i): shape (i, 1, j)."""
    if not stratified:
        return like.new_full((rows, 1, rows), -math.log(num_rows * rows))
    others = math.log((1 - 1 / num_rows) / (rows - 1))
    own = torch.eye(rows, dtype=torch.bool, device=like.device)
    spread = like.new_full((rows, rows), others)
    return spread.masked_fill(own, -math.log(num_rows)).unsqueeze(1)


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """The U-statistic of MMD^2 between samples of shape (*batch, N, Z) each, shape (*batch); see the module."""
    rows, dim = a.shape[-2:]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        constants = (2.0 * dim * scale for scale in SCALES)
        return sum((c / (c + squares) for c in constants), torch.zeros_like(squares)) / len(SCALES)

    within = kernel(a, a) + kernel(b, b)
    off = within.sum((-2, -1)) - 2.0 * rows  # the diagonals are ones
    return off / (rows * (rows - 1)) - 2 * kernel(a, b).mean((-2, -1))


# Those that have a name on the command line.
WEIGHTED = (FreeBits, BetaTC, Factor, DIP, InfoVAE, WAE, SemiSupervised)
