r"""Training losses of whole pairs, written by hand in plain torch of the parts in `parts_by_hand`.

    loss = by_hand(model, objective)          model: a pair of pyrovae, of whose parameters the loss is a function
    loss(x, *given)                           -bound summed over rows, to be compiled by `torch.compile`

What the objective asks for is written out for each: the bound, and the surrogate whose gradient is the estimator's.
The value is always that of the bound, so that it can be compared.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from parts_by_hand import (
    FLOOR,
    GUIDES,
    LIKELIHOODS,
    PRIORS,
    Draw,
    Function,
    head,
    kl_bits,
    kl_standard,
    log_normal,
    semi_amortised,
)
from torch import Tensor
from torch.nn.functional import leaky_relu, linear, softplus


@dataclass(frozen=True)
class Parts:
    """What a bound is computed of.

    Attributes:
        draw: z ~ q(z|x), K times or once without a dimension for it, as a `Draw`.
        log_prior: log p(z), of z and what is given.
        log_likelihood: log p(x|z), of z and x.
        kl: The KL of a `Draw` in closed form, of it and what is given; None: log q - log p(z) at the draw.
        K: Number of particles.
        model: The pair, for what else there is in it.
    """

    draw: Function
    log_prior: Function
    log_likelihood: Function
    kl: Function | None
    K: int
    model: Any

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.K == 1 else (self.K,)

    def elbo(self, x: Tensor, *given: Tensor) -> tuple[Draw, Tensor, Tensor]:
        """A draw, log p(x|z) and the KL."""
        q = self.draw(x, self.lead, *given)
        kl = q.log_q - self.log_prior(q.z, *given) if self.kl is None else self.kl(q, *given)
        return q, self.log_likelihood(q.z, x), kl

    def log_weights(self, x: Tensor, *given: Tensor) -> tuple[Draw, Tensor]:
        """A draw and log w, (K, N)."""
        q = self.draw(x, self.lead, *given)
        return q, self.log_likelihood(q.z, x) + self.log_prior(q.z, *given) - q.log_q


def averaged(value: Tensor) -> Tensor:
    """Of several particles their mean, of one itself."""
    return value if value.ndim == 1 else value.mean(0)


def log_mean_exp(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))


def scored(log_q: Tensor) -> Tensor:
    """Zero, with the gradient of log q."""
    return log_q - log_q.detach()


# ---------------------------------------------------------------------------------------------- bounds, reparameterised


def elbo(parts: Parts, objective: Any, x: Tensor, *given: Tensor) -> Tensor:
    _, log_likelihood, kl = parts.elbo(x, *given)
    return averaged(log_likelihood - kl)


def iwae(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    return log_mean_exp(parts.log_weights(x)[1])


def renyi(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    power = 1 - objective.alpha
    return log_mean_exp(power * parts.log_weights(x)[1]) / power


def grid_of(objective: Any) -> tuple[Tensor, Tensor]:
    """b_0 .. b_J-1 and b_j+1 - b_j of a thermodynamic bound, each (J, 1, 1)."""
    grid = torch.tensor(objective.grid).reshape(-1, 1, 1)
    return grid[:-1], grid.diff(dim=0)


def thermodynamic(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    b, width = grid_of(objective)
    log_w = parts.log_weights(x)[1]
    return (width * (b * log_w).softmax(1) * log_w).sum((0, 1))


# -------------------------------------------------------------------------------------------------------- with a weight


def free_bits(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q = parts.draw(x, ())
    loc, scale = q.parameters
    kl = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).mean(0)
    return parts.log_likelihood(q.z, x) - kl.clamp(min=objective.nats).sum()


def beta_tc(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_likelihood, kl = parts.elbo(x)
    loc, scale = q.parameters
    rows, n = len(x), objective.num_rows
    own = torch.eye(rows, dtype=torch.bool)
    log_weight = torch.where(own, -math.log(n), math.log((1 - 1 / n) / (rows - 1)))
    e = (q.z.unsqueeze(1) - loc) / scale
    each = -0.5 * e.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    joint = (each.sum(-1) + log_weight).logsumexp(1)
    of_dimensions = (each + log_weight.unsqueeze(-1)).logsumexp(1).sum(-1)
    return log_likelihood - kl - (objective.weight - 1) * (joint - of_dimensions)


def dip(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_likelihood, kl = parts.elbo(x)
    means = q.parameters[0] - q.parameters[0].mean(0)
    covariance = means.mT @ means / len(x)
    on = covariance.diagonal()
    off = covariance.square().sum() - on.square().sum()
    penalty = off + objective.diagonal * (on - 1).square().sum()
    return log_likelihood - kl - objective.weight * penalty


def factor(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_likelihood, kl = parts.elbo(x)
    layers = [m for m in parts.model.critic.network.body if hasattr(m, "weight")]

    def critic(z: Tensor, held: bool = False) -> Tensor:
        for i, layer in enumerate(layers):
            z = leaky_relu(z) if i else z
            z = linear(z, layer.weight.detach(), layer.bias.detach()) if held else layer(z)
        return z.squeeze(-1)

    fake = q.z.detach().gather(0, torch.rand_like(q.z).argsort(0))
    loss = softplus(-critic(q.z.detach())) + softplus(critic(fake))
    return log_likelihood - kl - objective.weight * critic(q.z, held=True) - scored(loss)


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """The U-statistic of MMD^2 between rows, with a sum of inverse multiquadratic kernels."""
    rows, dim = a.shape
    constants = 2.0 * dim * torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0])

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = (x.unsqueeze(1) - y).square().sum(-1, keepdim=True)
        return (constants / (constants + squares)).mean(-1)

    within = kernel(a, a).sum() + kernel(b, b).sum() - 2 * rows
    return within / (rows * (rows - 1)) - 2 * kernel(a, b).mean()


def info_vae(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_likelihood, kl = parts.elbo(x)
    return log_likelihood - kl - objective.weight * mmd(q.z, torch.randn_like(q.z))


def wae(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q = parts.draw(x, ())
    return parts.log_likelihood(q.z, x) - objective.weight * mmd(q.z, torch.randn_like(q.z))


# -------------------------------------------------------------------------------------------------- gradient estimators


def sticking_the_landing(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q = parts.draw(x, ())
    return parts.log_likelihood(q.z, x) + parts.log_prior(q.z) - q.held


class Reweighted(torch.autograd.Function):
    """The identity, whose gradient is weighed by weights that are known once the bound is."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: list[Tensor]) -> Tensor:
        ctx.weights = weights
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.weights[0].unsqueeze(-1) * gradient, None


def vr_max(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    log_w = parts.log_weights(x)[1]
    return log_mean_exp(log_w).detach() + scored(log_w.amax(0))


def score_function(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_likelihood, kl = parts.elbo(x)
    value = log_likelihood - kl
    reward = value.detach()
    others = (reward.sum() - reward) / (len(x) - 1)
    return value + (reward - others) * scored(q.log_q)


def vimco(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_w = parts.log_weights(x)
    value = log_mean_exp(log_w)
    with torch.no_grad():
        K = len(log_w)
        others = (log_w.sum(0) - log_w) / (K - 1)
        without = torch.where(torch.eye(K, dtype=torch.bool).unsqueeze(-1), others.unsqueeze(1), log_w)
        reward = value - (without.logsumexp(1) - math.log(K))
    return value + (reward * scored(q.log_q)).sum(0)


def wake_sleep(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_w = parts.log_weights(x)
    return log_mean_exp(log_w) + (2 * log_w.detach().softmax(0) * scored(q.log_q)).sum(0)


def covariance(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q, log_w = parts.log_weights(x)
    b, width = grid_of(objective)
    v = width * (b * log_w).softmax(1)
    with torch.no_grad():
        deviation = (v * (log_w - (v / width * log_w).sum(1, keepdim=True))).sum(0)
    return (v * log_w).sum((0, 1)) + (deviation * scored(q.log_q)).sum(0)


def relaxed(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    logits = head(parts.model.guides[0])(x)
    u = torch.rand_like(logits).clamp(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps / 2)
    noisy = logits + u.log() - (-u).log1p()
    z = (noisy > 0).to(logits) + scored((noisy / objective.gradient.temperature).sigmoid())
    return parts.log_likelihood(z, x) - kl_bits(logits, parts.model.prior.logits)


def enumerated(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    """Categories: a decoder's answer to each is the same for all rows."""
    log_q = head(parts.model.guides[0])(x).log_softmax(-1)
    states = torch.eye(log_q.shape[-1])
    log_p = parts.log_likelihood(states.unsqueeze(1), x) + parts.log_prior(states).unsqueeze(-1)  # (C, N)
    return (log_q.exp() * (log_p.T - log_q)).sum(-1)


def doubly_reparameterised(parts: Parts, objective: Any, x: Tensor) -> Tensor:
    q = parts.draw(x, parts.lead)
    weights: list[Tensor] = []
    z = Reweighted.apply(q.z, weights)
    loc, scale = (p.detach() for p in q.parameters)
    log_w = parts.log_likelihood(z, x) + parts.log_prior(z) - log_normal(z, loc, scale)
    weights.append(log_w.detach().softmax(0))
    return log_mean_exp(log_w)


# By the word of the bound and of the gradient.
BOUNDS: dict[tuple[str, str], Function] = {
    ("elbo", "reparameterised"): elbo,
    ("iwae", "reparameterised"): iwae,
    ("renyi", "reparameterised"): renyi,
    ("thermodynamic", "reparameterised"): thermodynamic,
    ("free-bits", "reparameterised"): free_bits,
    ("beta-tc", "reparameterised"): beta_tc,
    ("dip", "reparameterised"): dip,
    ("factor", "reparameterised"): factor,
    ("info-vae", "reparameterised"): info_vae,
    ("wae", "reparameterised"): wae,
    ("elbo", "sticking-the-landing"): sticking_the_landing,
    ("iwae", "doubly-reparameterised"): doubly_reparameterised,
    ("iwae", "vr-max"): vr_max,
    ("elbo", "score-function"): score_function,
    ("iwae", "leave-one-out"): vimco,
    ("iwae", "wake-sleep"): wake_sleep,
    ("thermodynamic", "covariance"): covariance,
    ("elbo", "relaxed"): relaxed,
    ("elbo", "enumerated"): enumerated,
}


# --------------------------------------------------------------------------------------------------------------- models


def corrupting(corruption: Any) -> Function:
    """x as the guide sees it while it is trained."""
    kind = type(corruption).__name__
    if kind == "Masking":
        return lambda x: x.masked_fill(torch.rand_like(x) < corruption.share, 0)
    if kind == "SaltAndPepper":

        def corrupt(x: Tensor) -> Tensor:
            value = torch.where(torch.rand_like(x) < 0.5, corruption.greatest, corruption.least)
            return torch.where(torch.rand_like(x) < corruption.share, value, x)

        return corrupt
    if kind == "Noise":
        return lambda x: x + corruption.scale * corruption.unit * torch.randn_like(x)
    return lambda x: x


def closed_form(prior: Any, guide: Any) -> Function | None:
    """KL(q(z|x) || p(z)) of a `Draw`, where both families have one."""
    name, of = type(prior).__name__, type(guide).__name__
    gaussian = of in ("MeanFieldNormal", "FullCovarianceNormal", "LowRankNormal", "SemiAmortised")
    if name == "StandardNormal" and gaussian:
        return lambda q, *given: q.kl
    if name == "IsotropicNormal" and of == "MeanFieldNormal":
        return lambda q: kl_standard(q.parameters[0] / prior.scale, q.parameters[1] / prior.scale)
    if name == "IndependentBernoulli":
        return lambda q: kl_bits(q.parameters, prior.logits)
    return None


def vae(model: Any, objective: Any) -> Function:
    (guide,), prior = model.guides, model.prior
    log_prior = PRIORS[type(prior).__name__](prior)
    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)
    corrupt, of = corrupting(model.corruption), type(guide).__name__
    if of == "SemiAmortised":
        draw = semi_amortised(guide, lambda z, x: log_prior(z) + log_likelihood(z, x))
    else:
        draw = GUIDES[of](guide) if of in GUIDES else None
    parts = Parts(
        lambda x, lead: draw(corrupt(x), lead),
        log_prior,
        log_likelihood,
        closed_form(prior, guide),
        objective.num_particles,
        model,
    )
    bound = BOUNDS[objective.word, objective.gradient.word]
    return lambda x: -bound(parts, objective, x).sum()


def conditional_vae(model: Any, objective: Any) -> Function:
    prior = model.prior
    kind, unit, dims = type(prior).__name__, model.unit, len(model.event_shape)
    draw_of = GUIDES[type(model.encoder).__name__](model.encoder)
    if kind == "UnconditionalPrior":
        of_z = PRIORS[type(prior.prior).__name__](prior.prior)
        log_prior, kl = (lambda z, y: of_z(z)), closed_form(prior.prior, model.encoder)
    else:
        log_prior, kl = PRIORS[kind](prior), None
    if kind == "AmortisedPrior":
        parameters_of = head(prior.conditional)

        def kl(q: Draw, y: Tensor) -> Tensor:
            loc, raw = parameters_of(y).chunk(2, -1)
            scale = softplus(raw) + FLOOR
            m, s = q.parameters
            return kl_standard((m - loc) / scale, s / scale)

    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = draw_of(torch.cat([x, unit * y], -1), ())
        divergence = q.log_q - log_prior(q.z, y) if kl is None else kl(q, y)
        return (divergence - log_likelihood(torch.cat([q.z, y], -1), x)).sum()

    assert dims == 1
    return loss


def gaussian_of(theirs: Any) -> Function:
    """Location and scale by a mean-field guide's network."""
    parameters_of = head(theirs)

    def run(h: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = parameters_of(h).chunk(2, -1)
        return loc, softplus(raw) + FLOOR

    return run


def drawn(loc: Tensor, scale: Tensor) -> Tensor:
    return loc + scale * torch.randn_like(loc)


def kl_gaussians(m: Tensor, s: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return kl_standard((m - loc) / scale, s / scale)


def hierarchical_vae(model: Any, objective: Any) -> Function:
    q1, q2 = (gaussian_of(guide) for guide in model.guides)
    p1 = gaussian_of(model.conditionals[0])
    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)
    log_top = (
        None if type(model.prior).__name__ == "StandardNormal" else PRIORS[type(model.prior).__name__](model.prior)
    )

    def loss(x: Tensor) -> Tensor:
        m1, s1 = q1(x)
        z1 = drawn(m1, s1)
        m2, s2 = q2(z1)
        z2 = drawn(m2, s2)
        top = kl_standard(m2, s2) if log_top is None else log_normal(z2, m2, s2) - log_top(z2)
        kl = top + log_normal(z1, m1, s1) - log_normal(z1, *p1(z2))
        return (kl - log_likelihood(z1, x)).sum()

    return loss


def ladder_vae(model: Any, objective: Any) -> Function:
    """With learned merges and skip connections."""
    first, second = (net.body for net in model.features.networks)
    shift, rescale = model.features.shift, model.features.rescale
    q1, q2 = (gaussian_of(guide) for guide in model.guides)
    p1 = gaussian_of(model.conditionals[0])
    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)

    def loss(x: Tensor) -> Tensor:
        d1 = first((x - shift) * rescale)
        m2, s2 = q2(second(d1))
        z2 = drawn(m2, s2)
        m1, s1 = q1(torch.cat([z2, d1], -1))
        kl = kl_standard(m2, s2) + kl_gaussians(m1, s1, *p1(z2))
        return (kl - log_likelihood(torch.cat([drawn(m1, s1), z2], -1), x)).sum()

    return loss


def auxiliary_vae(model: Any, objective: Any) -> Function:
    (net,), shift, rescale = model.features.networks, model.features.shift, model.features.rescale
    body, q_a, q_z, r = net.body, *map(gaussian_of, (model.auxiliary, model.given_auxiliary, model.reverse))
    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)

    def loss(x: Tensor) -> Tensor:
        d = body((x - shift) * rescale)
        m_a, s_a = q_a(d)
        a = drawn(m_a, s_a)
        m_z, s_z = q_z(torch.cat([a, d], -1))
        z = drawn(m_z, s_z)
        log_ratio = log_normal(a, m_a, s_a) - log_normal(a, *r(torch.cat([z, d], -1)))
        return (kl_standard(m_z, s_z) + log_ratio - log_likelihood(z, x)).sum()

    return loss


def autoencoder(model: Any, objective: Any) -> Function:
    code, corrupt = head(model.point), corrupting(model.corruption)
    log_likelihood = LIKELIHOODS[type(model.likelihood).__name__](model.likelihood)
    return lambda x: -log_likelihood(code(corrupt(x)), x).sum()


MODELS: dict[str, Function] = {
    "VAE": vae,
    "ConditionalVAE": conditional_vae,
    "HierarchicalVAE": hierarchical_vae,
    "LadderVAE": ladder_vae,
    "AuxiliaryVAE": auxiliary_vae,
    "Autoencoder": autoencoder,
}


def by_hand(model: Any, objective: Any) -> Callable[..., Tensor]:
    """The loss of x (N, *event) and what is given, -bound summed over rows, as a function of the pair's parameters.

    Raises:
        KeyError: a part of it has not been written by hand.
    """
    loss: Callable[..., Tensor] = MODELS[type(model).__name__](model, objective)
    return loss
