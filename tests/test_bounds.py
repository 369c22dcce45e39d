"""The bounds, against quadrature, enumeration, closed forms and Pyro's own objectives.

A Monte Carlo test repeats one datum R times as R rows, so that one call gives R independent values of a bound; where
parameters are given one copy per row, one backward pass gives R independent gradients.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from conftest import EXACT, assert_mean
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import (
    ELBO,
    IWAE,
    Capacity,
    Cyclical,
    ImportanceWeighted,
    LinearWarmup,
    Objective,
    Renyi,
    log_marginal,
    log_weights,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.kl import kl_terms
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import draw, log_mean_exp
from pyrovae.models import (
    MLP,
    VAE,
    Bernoulli,
    FullCovarianceNormal,
    Gaussian,
    HierarchicalVAE,
    LowRankNormal,
    MeanFieldNormal,
    MixtureOfGaussians,
    Network,
    StandardNormal,
)

R = 40_000


def seeded(bound: Objective, pair, x: Tensor, seed: int = 1) -> Tensor:
    """The bound with the same draws whenever K * M is the same."""
    torch.manual_seed(seed)
    return bound.bound(pair.model, pair.guide, x)


# ---------------------------------------------------------------------------------------------------------------------
# A Gaussian pair in one dimension: z ~ N(0, 1), x|z ~ N(z, 1), so p(x) = N(0, 2) and p(z|x) = N(x/2, 1/2).


class GaussianPair:
    """With the guide N(x/2 + shift, variance)."""

    def __init__(self, variance: float = 0.5, shift: float = 0.0) -> None:
        self.variance, self.shift = variance, shift

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, math.sqrt(self.variance)))

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        return Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x)

    def moment(self, power: float) -> float:
        """E_q (w / p(x))^power = int posterior^power q^(1 - power)."""
        v1, v2, r = 0.5, self.variance, power
        mixed = 1 / (r / v1 + (1 - r) / v2)
        log = 0.5 * (math.log(mixed) - r * math.log(v1) - (1 - r) * math.log(v2))
        return math.exp(log - 0.5 * r * (1 - r) * self.shift**2 / ((1 - r) * v1 + r * v2))


WIDE = GaussianPair(1.0, 0.2)


def rows(value: float = 0.7, n: int = R) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def test_order_on_the_same_draws() -> None:
    """The same 8 draws as 8x1, 4x2, 2x4, 1x8: L_1 <= L_2 <= L_4 <= L_8 whatever they are; and E L_8 <= log p(x)."""
    x = rows()
    L = {k: seeded(IWAE(k, num_averages=8 // k), WIDE, x) for k in (1, 2, 4, 8)}
    for k in (1, 2, 4):
        assert (L[k] <= L[2 * k] + 1e-12).all()
        assert (L[2 * k] - L[k]).mean() > 1e-3
    gap = WIDE.log_prob(x) - L[8]
    assert gap.mean() > 5 * gap.std() / math.sqrt(R)


@pytest.mark.parametrize("num_particles", [1, 2, 3, 8])
def test_exp_of_the_bound_is_unbiased(num_particles: int) -> None:
    """E exp(L_K - log p(x)) = 1 for every K, under a guide wider than the posterior."""
    x = rows()
    values = (IWAE(num_particles).bound(WIDE.model, WIDE.guide, x) - WIDE.log_prob(x)).exp()
    assert_mean(values, 1.0, least=0.05)


def test_bias_is_half_the_squared_coefficient_of_variation_over_K() -> None:
    """log p - E L_K = CV2/(2K) - (m3/3 - 3 CV2^2/4)/K^2 + O(K^-3): it halves from K to 2K."""
    w = [WIDE.moment(n) for n in range(5)]
    assert w[1] == pytest.approx(1)
    cv2, m3 = w[2] - 1, w[3] - 3 * w[2] + 2
    x = rows(n=5000)
    bias = {}
    for k in (32, 64):
        difference = IWAE(k).bound(WIDE.model, WIDE.guide, x) - WIDE.log_prob(x)
        # exp(difference) - 1 has mean zero and most of the variance: a control variate
        values = difference.exp() - 1 - difference
        predicted = cv2 / (2 * k) - (m3 / 3 - 3 * cv2**2 / 4) / k**2
        error = 5 * values.std() / math.sqrt(len(x))
        assert error < predicted / 8
        assert (values.mean() - predicted).abs() < error + 20 * cv2 / k**3
        bias[k] = values
    assert_mean(bias[32] - 2 * bias[64], 0.0, least=cv2 / 64 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# The 1-D latent with Bernoulli data: quadrature knows every value.

X = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
THETA = {
    "w": torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64),
    "b": torch.tensor([-0.5, 0.3, 0.2], dtype=torch.float64),
    "loc": torch.tensor(-0.3, dtype=torch.float64),
    "log_scale": torch.tensor(-0.1, dtype=torch.float64),
}


class BernoulliPair:
    """z ~ N(0, 1), x_d|z ~ Bernoulli(sigmoid(w_d z + b_d)), guide N(loc, scale^2); one copy of theta per row."""

    def __init__(self, n: int) -> None:
        self.theta = {name: t.expand(n, *t.shape).clone().requires_grad_() for name, t in THETA.items()}

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            logits = z.unsqueeze(-1) * self.theta["w"] + self.theta["b"]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.theta["loc"], self.theta["log_scale"].exp()))


def grid_of_noise(n: int = 65) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E under N(0, 1): the trapezoid rule, whose error falls as exp(-n) for analytic functions."""
    nodes = torch.linspace(-8, 8, n, dtype=torch.float64)
    weights = Normal(0.0, 1.0).log_prob(nodes).exp()
    return nodes, weights / weights.sum()


def log_weight_at(noise: Tensor, theta: dict[str, Tensor]) -> Tensor:
    z = theta["loc"] + theta["log_scale"].exp() * noise
    likelihood = logsigmoid((2 * X - 1) * (z[:, None] * theta["w"] + theta["b"])).sum(-1)
    prior = -0.5 * z**2
    guide = -0.5 * noise**2 - theta["log_scale"]
    return likelihood + prior - guide


def quadrature(num_particles: int, alpha: float, theta: dict[str, Tensor], n: int = 65) -> Tensor:
    """E of the K-sample Renyi bound, as a function of theta."""
    nodes, weights = grid_of_noise(n)
    log_w = log_weight_at(nodes, theta)
    grid = torch.stack(torch.meshgrid(*[log_w] * num_particles, indexing="ij"))
    product = torch.stack(torch.meshgrid(*[weights] * num_particles, indexing="ij")).prod(0)
    if alpha == 1:
        return (grid.mean(0) * product).sum()
    power = 1 - alpha
    return ((torch.logsumexp(power * grid, 0) - math.log(num_particles)) / power * product).sum()


QUADRATURE = [
    pytest.param(ELBO(), 1, 1.0, id="L_1 analytic"),
    pytest.param(ELBO(kl="sampled"), 1, 1.0, id="L_1 sampled"),
    pytest.param(IWAE(1), 1, 0.0, id="L_1"),
    pytest.param(IWAE(2), 2, 0.0, id="L_2"),
    pytest.param(IWAE(3), 3, 0.0, id="L_3"),
    pytest.param(IWAE(2, num_averages=3), 2, 0.0, id="L_2 averaged"),
    pytest.param(Renyi(0.5, 2), 2, 0.5, id="alpha=0.5"),
    pytest.param(Renyi(2.0, 2), 2, 2.0, id="alpha=2"),
    pytest.param(Renyi(-1.0, 3), 3, -1.0, id="alpha=-1"),
]


@pytest.mark.parametrize(("bound", "num_particles", "alpha"), QUADRATURE)
def test_values_and_gradients_are_those_of_quadrature(bound: Objective, num_particles: int, alpha: float) -> None:
    """E L_1, E L_2, E L_3, E Renyi, and their reparameterised gradients, against quadrature."""
    theta = {name: t.clone().requires_grad_() for name, t in THETA.items()}
    truth = quadrature(num_particles, alpha, theta)
    assert truth.item() == pytest.approx(quadrature(num_particles, alpha, THETA, 49).item(), abs=1e-6)
    pair, x = BernoulliPair(R), X.expand(R, 3)
    values = bound.bound(pair.model, pair.guide, x)
    assert_mean(values, truth, least=0.06)
    values.sum().backward()
    truth.backward()
    assert max(t.grad.abs().max() for t in theta.values()) > 0.9
    for name, t in theta.items():
        assert_mean(pair.theta[name].grad, t.grad, least=0.1)


def test_the_quadrature_test_has_power() -> None:
    """What it tells apart differs by more than its 5 standard errors."""
    cases = [(1, 1.0), (2, 0.0), (3, 0.0), (2, 0.5), (2, 2.0), (3, -1.0)]
    values = sorted(quadrature(k, alpha, THETA).item() for k, alpha in cases)
    assert min(b - a for a, b in itertools.pairwise(values)) > 2 * 0.06


def test_log_p_is_that_of_quadrature() -> None:
    """log_marginal against log of the integral, within 5 of its own standard errors."""
    nodes, weights = grid_of_noise()
    log_likelihood = logsigmoid((2 * X - 1) * (nodes[:, None] * THETA["w"] + THETA["b"])).sum(-1)
    truth = torch.logsumexp(log_likelihood + weights.log(), 0)
    pair = BernoulliPair(20)
    pair.theta["loc"], pair.theta["log_scale"] = torch.tensor([0.5, 0.2]).double()  # wider than the posterior
    result = log_marginal(pair.model, pair.guide, X.expand(20, 3), 2000)
    z_scores = (result.estimate - truth) / result.standard_error
    assert (result.standard_error < 0.03).all()
    assert z_scores.abs().max() < 5
    assert_mean(result.estimate.exp(), truth.exp(), least=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# A discrete latent: enumeration knows every value.


class DiscretePair:
    """z ~ Categorical(pi), x|z ~ Bernoulli(logits_z), guide Categorical(q); one copy of the logits per row."""

    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    start = torch.tensor([[1.0, -0.5], [-1.0, 0.5], [0.3, 2.0]], dtype=torch.float64)

    def __init__(self, n: int) -> None:
        self.logits = self.start.expand(n, 3, 2).clone().requires_grad_()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(self.pi))
            pyro.sample("x", dist.Bernoulli(logits=self.logits[torch.arange(len(x)), z]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(self.q))

    def log_joint(self, logits: Tensor) -> Tensor:
        return self.pi.log() + logsigmoid((2 * self.x - 1) * logits).sum(-1)


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_discrete_latent_by_enumeration(num_particles: int) -> None:
    """E L_K and its gradient in the model are sums over the C^K tuples of draws."""
    logits = DiscretePair.start.clone().requires_grad_()
    pair = DiscretePair(R)
    log_w = pair.log_joint(logits) - pair.q.log()
    truth = sum(
        pair.q[list(c)].prod() * log_mean_exp(log_w[list(c)]) for c in itertools.product(range(3), repeat=num_particles)
    )
    truth.backward()
    values = IWAE(num_particles).bound(pair.model, pair.guide, pair.x.expand(R, 2))
    assert_mean(values, truth.detach(), least=0.04)
    values.sum().backward()
    assert_mean(pair.logits.grad, logits.grad, least=0.02)
    with torch.no_grad():
        log_p = torch.logsumexp(pair.log_joint(logits), 0)
        assert_mean((values - log_p).exp(), 1.0, least=0.05)


def test_gradient_through_a_discrete_guide_is_refused() -> None:
    """Without a reparameterised sampler the guide's gradient would silently lack the score: the site is named."""
    pair = DiscretePair(4)
    logits = torch.zeros(3, requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("assignment", dist.Categorical(logits=logits))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("assignment", dist.Categorical(pair.pi))
            pyro.sample("x", dist.Bernoulli(logits=pair.start[z]).to_event(1), obs=x)

    x = pair.x.expand(4, 2)
    for bound in (ELBO(), IWAE(2), Renyi(0.5, 2)):
        with pytest.raises(PairError, match=r"'assignment'.*reparameterised"):
            bound.differentiable_loss(model, guide, x)
        with torch.no_grad():  # its value is right, and stays allowed
            assert math.isfinite(bound.loss(model, guide, x))


# ---------------------------------------------------------------------------------------------------------------------
# Renyi


def test_reductions_against_explicit_loops() -> None:
    """M averages of K-sample bounds: draws (M K, N) are grouped K in a row, and K is what is divided by."""
    particles = draw(Pair(WIDE.model, WIDE.guide), Batch(rows(n=3)), 6)
    log_w = particles.log_weights
    for m, k in ((1, 6), (2, 3), (3, 2), (6, 1)):
        for alpha in (0.0, 0.5, 2.0, -1.0):
            groups = [log_w[i * k : (i + 1) * k] for i in range(m)]
            wanted = sum((g * (1 - alpha)).exp().mean(0).log() / (1 - alpha) for g in groups) / m
            assert_close(Renyi(alpha, k, num_averages=m).of(particles), wanted, **EXACT)
        assert_close(ELBO(k, num_averages=m, kl="sampled").of(particles), log_w.mean(0), **EXACT)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 1), (3, 2)])
def test_renyi_0_is_iwae_draw_for_draw(k: int, m: int) -> None:
    """alpha = 0 is the IWAE bound: value and gradient."""
    found = []
    for bound in (Renyi(0.0, k, m), IWAE(k, m)):
        pair = BernoulliPair(5)
        value = seeded(bound, pair, X.expand(5, 3))
        value.sum().backward()
        found.append([value.detach(), *(t.grad for t in pair.theta.values())])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)
    assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("bound", [IWAE(1), Renyi(0.5), Renyi(-2.0), Renyi(3.0), IWAE(1, num_averages=4)])
def test_one_particle_is_the_elbo_draw_for_draw(bound: Objective) -> None:
    """K = 1: every bound is the ELBO, value and gradient."""
    found = []
    for b in (bound, ELBO(1, num_averages=bound.num_averages, kl="sampled")):
        pair = BernoulliPair(5)
        value = seeded(b, pair, X.expand(5, 3))
        value.sum().backward()
        found.append([value.detach(), *(t.grad for t in pair.theta.values())])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)


def test_renyi_tends_to_the_elbo() -> None:
    """Renyi(1 - d) = mean log w + (d/2) var log w + O(d^2) on the same draws."""
    particles = draw(Pair(WIDE.model, WIDE.guide), Batch(rows(n=4)), 10)
    log_w = particles.log_weights
    for d in (0.02, -0.02, 2e-3):
        excess = (Renyi(1 - d, 10).of(particles) - ELBO(10, kl="sampled").of(particles)) / d
        wanted = log_w.var(0, correction=0) / 2
        assert (wanted > 0.01).all()
        assert ((excess - wanted).abs() < abs(d) * (log_w - log_w.mean(0)).abs().pow(3).mean(0)).all()


@pytest.mark.parametrize("alpha", [1.0, 1 - 1e-8, 1 + 1e-8, 1 - 9e-5])
def test_renyi_next_to_1_does_not_overflow(alpha: float) -> None:
    """Closer to 1 than 1e-4 the bound is the ELBO draw for draw, where 1/(1 - alpha) would be all rounding error."""
    pair, x = BernoulliPair(5), X.expand(5, 3)
    assert_close(seeded(Renyi(alpha, 6), pair, x), seeded(ELBO(6, kl="sampled"), pair, x), **EXACT)


def test_renyi_is_non_increasing_in_alpha_on_the_same_draws() -> None:
    """A power mean grows with its exponent 1 - alpha."""
    alphas = [-3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0]
    values = [seeded(Renyi(a, 7), WIDE, rows(n=50)) for a in alphas]
    for higher, lower in itertools.pairwise(values):
        assert (higher >= lower).all()
        assert (higher - lower).max() > 1e-3


@pytest.mark.parametrize("alpha", [-0.5, 0.5, 2.0])
def test_renyi_of_gaussians_in_closed_form(alpha: float) -> None:
    """E exp((1 - alpha) L_alpha,K) = p(x)^(1 - alpha) int p(z|x)^(1 - alpha) q^alpha at every K."""
    pair = GaussianPair(0.6, 0.5)
    x = rows()
    for k in (1, 3):
        values = Renyi(alpha, k).bound(pair.model, pair.guide, x) - pair.log_prob(x)
        moment = pair.moment(1 - alpha)
        assert_mean(((1 - alpha) * values).exp(), moment, least=abs(moment - 1) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# beta, schedules and the form of the KL


def small_vae(
    guide_class: type = MeanFieldNormal, prior: nn.Module | None = None, likelihood: str = "bernoulli", **options: int
) -> VAE:
    decoder = MLP(3, 4, hidden=(8,))
    p = Bernoulli(decoder) if likelihood == "bernoulli" else Gaussian(decoder)
    return VAE(prior or StandardNormal(3), p, guide_class(MLP(4, hidden=(8,)), 3, **options)).double()


def binary(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.4, dtype=torch.float64))


@pytest.mark.parametrize("form", ["auto", "sampled"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_beta_weighs_the_kl_only(beta: float, form: str) -> None:
    """-loss = E log p(x|z) - beta KL, and the bound that is reported has no beta in it."""
    vae, x, k = small_vae(), binary(), 3
    objective = ELBO(k, beta=beta, kl=form)
    torch.manual_seed(1)
    particles = draw(Pair(vae.model, vae.guide), Batch(x), k)
    z = particles.latents["z"].value
    likelihood = dist.Bernoulli(logits=vae.likelihood.decoder(z)).log_prob(x).sum(-1).mean(0)
    q = vae.guides[0](x).base_dist
    if form == "auto":
        kl = (0.5 * (q.mean**2 + q.variance - 1) - q.stddev.log()).sum(-1)
    else:
        kl = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(-1).mean(0)
    assert kl.abs().max() > 0.1
    assert_close(seeded(objective, vae, x), likelihood - beta * kl, **EXACT)
    torch.manual_seed(1)
    assert objective.loss(vae.model, vae.guide, x) == pytest.approx(-(likelihood - beta * kl).sum().item(), abs=1e-10)
    assert_close(objective.of(particles), likelihood - kl, **EXACT)
    if beta == 1:
        assert_close(seeded(objective, vae, x), seeded(ELBO(k, kl=form), vae, x), **EXACT)


def test_a_beta_above_one_is_a_looser_lower_bound() -> None:
    """It loosens the bound by (beta - 1) KL, whatever is said of tightening; below 1 it is none, and says so."""
    pair, x = GaussianPair(), rows()  # the guide is the posterior: the ELBO is log p(x)
    log_p = pair.log_prob(x[:1]).item()
    mean, variance = 0.7 / 2, 0.5
    kl = 0.5 * (mean**2 + variance - 1 - math.log(variance))
    for beta in (0.5, 1.0, 2.0, 8.0):
        values = seeded(ELBO(beta=beta), pair, x)
        assert_mean(values, log_p - (beta - 1) * kl, least=kl / 4)
        assert (values.mean() > log_p + kl / 4) == (beta < 1)
    assert "With beta > 1 the value is a looser lower bound" in (ELBO.__doc__ or "")


def test_schedules() -> None:
    """beta as a function of the gradient step."""
    steps = [0, 1, 5, 10, 11, 15, 25]
    assert [LinearWarmup(2.0, steps=10).beta(s) for s in steps] == pytest.approx([0, 0.2, 1, 2, 2, 2, 2])
    cyclical = Cyclical(2.0, period=10, rise=0.5)
    assert [cyclical.beta(s) for s in steps] == pytest.approx([0, 0.4, 2, 0, 0.4, 2, 2])
    assert [cyclical.beta(s) for s in (2, 12, 22)] == pytest.approx([0.8] * 3)
    assert [Cyclical(2.0, period=10, rise=0).beta(s) for s in steps] == [2.0] * 7
    capacity = Capacity(20.0, steps=10, gamma=3.0)
    assert [capacity.capacity(s) for s in steps] == pytest.approx([0, 2, 10, 20, 20, 20, 20])
    assert capacity.settings(5) == {"beta": 3.0, "capacity": 10.0}
    assert LinearWarmup(2.0, steps=10).settings(5) == {"beta": 1.0}
    kl = torch.tensor([1.0, 4.0, 4.0])  # mean 3
    assert_close(capacity.penalty(kl, **capacity.settings(5)), torch.full((3,), 3.0 * 7.0))
    assert_close(capacity.penalty(kl, **capacity.settings(0)), torch.full((3,), 3.0 * 3.0))
    assert_close(LinearWarmup(2.0, steps=10).penalty(kl, beta=1.0), kl)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="beta"):
            ELBO(beta=bad)


@pytest.mark.parametrize("schedule", [LinearWarmup(2.0, steps=10), Cyclical(1.5, period=8), Capacity(4.0, steps=10)])
def test_scheduled_loss(schedule) -> None:
    """The loss at step s is -(E log p(x|z) - penalty(KL, s)); differentiated losses count as steps, others do not."""
    vae, x = small_vae(), binary()
    objective = ELBO(2, beta=schedule)
    losses = []
    for step in range(4):
        torch.manual_seed(1)
        particles = draw(Pair(vae.model, vae.guide), Batch(x), 2)
        terms = kl_terms(particles)[0]["z"].mean(0)
        wanted = -(particles.log_likelihood.mean(0) - schedule.penalty(terms, **schedule.settings(step))).sum()
        assert_close(objective.of(particles), particles.log_likelihood.mean(0) - terms, **EXACT)
        assert objective.taken.steps == step
        torch.manual_seed(1)
        assert objective.loss(vae.model, vae.guide, x) == pytest.approx(wanted.item(), abs=1e-10)
        assert objective.taken.steps == step
        torch.manual_seed(1)
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        assert_close(loss, wanted, **EXACT)
        losses.append(loss.item())
    assert len(set(losses)) == 4


@pytest.mark.parametrize("prior", ["standard", "mixture"])
@pytest.mark.parametrize("guide_class", [MeanFieldNormal, FullCovarianceNormal, LowRankNormal])
def test_analytic_and_sampled_kl_agree(guide_class: type, prior: str) -> None:
    """They have the same expectation; `kl_forms` states which one was taken."""
    p = StandardNormal(3) if prior == "standard" else MixtureOfGaussians(3, components=4)
    vae, x = small_vae(guide_class, p), binary(3)
    with torch.no_grad():
        particles = draw(Pair(vae.model, vae.guide), Batch(x), 20_000)
        assert ELBO().kl_forms(particles) == {"z": "analytic" if prior == "standard" else "sampled"}
        sampled, forms = kl_terms(particles, analytic=False)
        assert forms == {"z": "sampled"}
        auto, _ = kl_terms(particles)
    if prior == "standard":
        assert (auto["z"] == auto["z"][0]).all()
        assert (auto["z"] > 0.02).all()
        assert_mean(sampled["z"], auto["z"][0], least=0.1)
    else:
        z = particles.latents["z"].value
        assert_close(auto["z"], vae.posterior(x).log_prob(z) - p().log_prob(z), **EXACT)


@pytest.mark.parametrize("guide_class", [MeanFieldNormal, FullCovarianceNormal, LowRankNormal])
def test_analytic_kl_to_a_prior_that_is_not_standard(guide_class: type) -> None:
    """KL(N(m, S), N(c, diag v)) = (tr(S/v) + sum (m - c)^2/v - Z + sum log v - log det S)/2."""
    guide, x = small_vae(guide_class).guides[0], binary(3)
    c, scale = torch.tensor([[0.5, -1.0, 2.0], [0.3, 2.0, 0.7]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, scale).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([*z.shape[:-1], 4]).to_event(1), obs=x)

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide(x))

    q = guide(x)
    S = torch.diag_embed(q.variance) if guide_class is MeanFieldNormal else q.covariance_matrix
    v = scale**2
    trace = (S.diagonal(dim1=-2, dim2=-1) / v).sum(-1)
    wanted = 0.5 * (trace + ((q.mean - c) ** 2 / v).sum(-1) - 3 + v.log().sum() - torch.logdet(S))
    values, forms = kl_terms(draw(Pair(model, program), Batch(x), 2))
    assert forms == {"z": "analytic"}
    assert_close(values["z"], wanted.expand(2, 3), **EXACT)


@pytest.mark.parametrize("shared", ["factor", "diagonal"])
def test_analytic_kl_of_a_low_rank_guide_whose_rows_share_a_parameter(shared: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    factor, diagonal = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
            pyro.sample("other", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            other = pyro.sample("other", dist.Normal(x[:, 0], 1.0))
            own = x.exp() + 0 * other[..., None]  # of each particle, too
            f, d = (factor, own) if shared == "factor" else (factor * own[..., None], diagonal)
            pyro.sample("z", dist.LowRankMultivariateNormal(x, f, d))

    f, d = (factor, x.exp()) if shared == "factor" else (factor * x.exp()[..., None], diagonal)
    S = f @ f.mT + torch.diag_embed(d)
    trace = (S.diagonal(dim1=-2, dim2=-1) + x.square()).sum(-1) / 4
    wanted = 0.5 * (trace - 3 + 3 * math.log(4.0) - torch.logdet(S))
    for k in (1, 2):
        values, forms = kl_terms(draw(Pair(model, guide), Batch(x), k))
        assert forms["z"] == "analytic"
        assert_close(values["z"].expand(k, 4), wanted.expand(k, 4), **EXACT)


def test_auxiliary_sites_add_up() -> None:
    """The ELBO is the mean of log-weights, with log q of every site in them."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a, b = (pyro.sample(name, dist.Normal(x, 0.5), infer={"is_auxiliary": True}) for name in "ab")
            pyro.sample("z", dist.Delta(a + b))

    particles = draw(Pair(model, guide), Batch(torch.tensor([0.3, -0.4], dtype=torch.float64)), 5)
    assert_close(ELBO(5).of(particles), particles.log_weights.mean(0), **EXACT)


def test_hierarchy_takes_the_analytic_kl_only_where_it_is_one() -> None:
    """In q(z1|x) q(z2|z1) against p(z2) p(z1|z2) the KL of z2 is analytic, that of z1 sampled; the ELBO is the same."""
    vae = HierarchicalVAE(
        StandardNormal(2),
        [MeanFieldNormal(MLP(2, hidden=(16,)), 3)],
        Gaussian(MLP(3, 4, hidden=(8,))),
        [MeanFieldNormal(MLP(4, hidden=(8,)), 3), MeanFieldNormal(MLP(3, hidden=(16,)), 2)],
    ).double()
    with torch.no_grad():  # strong and nonlinear dependence between the layers
        for module in (vae.conditionals[0], vae.guides[1]):
            for p in module.parameters():
                p.mul_(2.5)
    x = torch.randn(1, 4, dtype=torch.float64).expand(R, 4)
    auto, sampled = ELBO(), ELBO(kl="sampled")
    with torch.no_grad():
        particles = draw(Pair(vae.model, vae.guide), Batch(x), 1)
        a, s = auto.of(particles), sampled.of(particles)
        assert auto.kl_forms(particles) == {"z1": "sampled", "z2": "analytic"}
        assert sampled.kl_forms(particles) == {"z1": "sampled", "z2": "sampled"}
        assert_mean(a - s, 0.0, least=0.1)
        z1 = particles.latents["z1"]
        wrong = torch.distributions.kl_divergence(z1.guide, z1.prior)[0]
        error = (wrong - (z1.log_guide - z1.log_prior)[0]).mean()
    assert error.abs() > 0.1, "this hierarchy would not show the fault"


def test_masked_sites_carry_nothing() -> None:
    """poutine.mask takes a datum out of the bound, which a KL of the two distributions would not see: it is sampled."""
    x = rows(n=4)
    keep = torch.tensor([True, False, True, False])
    pair = GaussianPair(0.8, 0.1)
    masked = Pair(poutine.mask(pair.model, mask=keep), poutine.mask(pair.guide, mask=keep))
    auto = ELBO(3)
    sampled = seeded(ELBO(3, kl="sampled"), pair, x)
    assert_close(seeded(auto, masked, x), sampled * keep, **EXACT)
    assert auto.kl_forms(draw(masked, Batch(x))) == {"z": "sampled"}
    assert_close(seeded(IWAE(3), masked, x), seeded(IWAE(3), pair, x) * keep, **EXACT)
    for one_side in (Pair(masked.model, pair.guide), Pair(pair.model, masked.guide)):
        assert_close(seeded(auto, one_side, x), seeded(ELBO(3, kl="sampled"), one_side, x), **EXACT)
        assert auto.kl_forms(draw(one_side, Batch(x))) == {"z": "sampled"}


# ---------------------------------------------------------------------------------------------------------------------
# Pyro


def registered(vae: VAE) -> tuple[Callable, Callable]:
    """The pair as Pyro's own objectives want it: its parameters in the parameter store."""

    def model(x: Tensor) -> None:
        pyro.module("vae", vae)
        vae.model(x)

    def guide(x: Tensor) -> None:
        pyro.module("vae", vae)
        vae.guide(x)

    return model, guide


ORACLES = [
    pytest.param(ELBO(4, kl="sampled"), Trace_ELBO, {}, id="Trace_ELBO"),
    pytest.param(ELBO(4), TraceMeanField_ELBO, {}, id="TraceMeanField_ELBO"),
    *(pytest.param(Renyi(a, 4), RenyiELBO, {"alpha": a}, id=f"RenyiELBO({a})") for a in (0.0, 0.5, 2.0, -1.0)),
    pytest.param(IWAE(4), RenyiELBO, {"alpha": 0.0}, id="IWAE"),
]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(("ours", "pyro_class", "options"), ORACLES)
def test_pyro_as_oracle(ours: Objective, pyro_class: type, options: dict, likelihood: str) -> None:
    """The same seed gives the same value and the same gradient as Pyro's objective, one data plate around all sites."""
    x = binary()
    vae = small_vae(likelihood=likelihood)
    model, guide = registered(vae)
    oracle = pyro_class(num_particles=4, vectorize_particles=True, max_plate_nesting=1, **options)
    torch.manual_seed(3)
    wanted = oracle.loss_and_grads(model, guide, x)
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    assert max(g.abs().max() for g in gradients.values()) > 0.1
    for run in (
        lambda: ours.loss_and_grads(vae.model, vae.guide, x),
        lambda: ours.loss_and_grads(model, guide, x),
        lambda: (loss := ours(vae.model, vae.guide)(x)).backward() or loss.item(),
    ):
        vae.zero_grad()
        torch.manual_seed(3)
        assert run() == pytest.approx(wanted, abs=1e-9)
        for name, p in vae.named_parameters():
            assert_close(p.grad, gradients[name], **EXACT)


def test_a_factor_outside_the_plate_changes_pyro_s_value_and_is_refused() -> None:
    """One site outside the plate makes Pyro's Renyi bound one of the whole batch; here it is an error with its name."""
    vae, x = small_vae(), binary()

    def model(x: Tensor) -> None:
        pyro.factor("leak", x.new_zeros(()))
        vae.model(x)

    oracle = RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    losses = []
    for program in (vae.model, model):
        torch.manual_seed(3)
        losses.append(oracle.loss(program, vae.guide, x))
    assert abs(losses[0] - losses[1]) > 1e-3
    for bound in (IWAE(4), ELBO(), Renyi(0.5, 2)):
        with pytest.raises(PairError, match=r"model site 'leak'.*its plates: none"):
            bound.loss(model, vae.guide, x)


def test_a_factor_inside_the_plate_counts_once() -> None:
    """log w gains exactly the factor."""
    vae, x = small_vae(), binary()

    def model(x: Tensor) -> None:
        vae.model(x)
        with pyro.plate("more", len(x)):
            pyro.factor("bonus", 0.25 * x.sum(-1))

    for bound in (IWAE(4), ELBO(4), ELBO(4, kl="sampled"), Renyi(0.5, 4)):
        torch.manual_seed(1)
        changed = bound.bound(model, vae.guide, x)
        assert_close(changed - seeded(bound, vae, x), 0.25 * x.sum(-1), **EXACT)


@pytest.mark.parametrize("bound", [ELBO(), IWAE(3), Renyi(0.5, 3)])
@pytest.mark.parametrize("side", ["model", "guide"])
def test_scale_is_refused(bound: Objective, side: str) -> None:
    """poutine.scale and subsampling plates would act inside the log-mean-exp: refused by the name of the site."""
    vae, x = small_vae(), binary()
    programs = {"model": vae.model, "guide": vae.guide}
    programs[side] = poutine.scale(programs[side], scale=2.0)
    with pytest.raises(PairError, match=f"{side} site 'z' is scaled by 2"):
        bound.loss(programs["model"], programs["guide"], x)

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 10 * len(x), subsample_size=len(x)):
            z = pyro.sample("z", (vae.prior if side == "model" else lambda: vae.guides[0](x))())
            if side == "model":
                pyro.sample("x", vae.likelihood(z), obs=x)

    programs = {"model": vae.model, "guide": vae.guide, side: subsampled}
    with pytest.raises(PairError, match=f"{side} site 'z' is in a subsampling plate"):
        bound.loss(programs["model"], programs["guide"], x)


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(3), Renyi(0.5, 2)], ids=["ELBO", "IWAE", "Renyi"])
def test_svi_trains_as_a_torch_loop_does(objective: Objective) -> None:
    """Inside pyro.infer.SVI: the same parameters as a plain torch loop of the same seed, and no parameter store."""
    first = small_vae()
    x = (torch.rand(40, 1, dtype=torch.float64) < 0.5).double().expand(40, 4).contiguous()
    second, untrained = copy.deepcopy(first), copy.deepcopy(first)

    svi = SVI(first.model, first.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    torch.manual_seed(5)
    losses = [svi.step(x) for _ in range(40)]
    assert len(pyro.get_param_store()) == 0

    bound = objective(second.model, second.guide)
    optimiser = torch.optim.Adam(bound.parameters(), lr=0.02)
    torch.manual_seed(5)
    for wanted in losses:
        optimiser.zero_grad()
        loss = bound(x)
        loss.backward()
        optimiser.step()
        assert loss.item() == pytest.approx(wanted, abs=1e-9)
    for a, b, c in zip(first.parameters(), second.parameters(), untrained.parameters(), strict=True):
        assert_close(a, b, **EXACT)
        assert (a - c).abs().max() > 1e-3
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert svi.evaluate_loss(x) < losses[0]


def test_two_models_of_one_class_do_not_share_parameters() -> None:
    """Training the second leaves the first as it was, and is not changed by the first's presence."""
    first, second = small_vae(), small_vae()
    alone = copy.deepcopy(second)
    x = binary()

    def train(vae: VAE) -> None:
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), ELBO())
        torch.manual_seed(5)
        for _ in range(5):
            svi.step(x)

    train(alone)
    train(first)
    before = [p.detach().clone() for p in first.parameters()]
    train(second)
    for p, kept in zip(first.parameters(), before, strict=True):
        assert torch.equal(p, kept)
    for p, wanted in zip(second.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, wanted)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_numbers_of_particles_that_make_no_sense(bad) -> None:
    """K and M are whole numbers of at least 1, and the message says which of them was wrong."""
    with pytest.raises(UsageError, match="num_particles \\(K\\)"):
        IWAE(bad)
    with pytest.raises(UsageError, match="num_averages \\(M\\)"):
        ELBO(num_averages=bad)
    with pytest.raises(UsageError, match="num_particles \\(K\\)"):
        log_weights(WIDE.model, WIDE.guide, rows(n=2), bad)
    with pytest.raises(UsageError, match="alpha"):
        Renyi(math.nan)
    with pytest.raises(UsageError, match="kl"):
        ELBO(kl="exact")


def test_user_s_own_objective() -> None:
    """A subclass that defines `reduce` is a complete objective: here the best of K draws."""

    @dataclass(frozen=True)
    class Best(ImportanceWeighted):
        num_particles: int = 1
        num_averages: int = 1

        def reduce(self, log_weights: Tensor) -> Tensor:
            return log_weights.max(1).values

    vae, x = small_vae(), binary()
    best, mean = seeded(Best(4), vae, x), seeded(ELBO(4, kl="sampled"), vae, x)
    torch.manual_seed(1)
    assert_close(best, log_weights(vae.model, vae.guide, x, 4).max(0).values, **EXACT)
    assert (best > mean).all()


def test_batch_invariance() -> None:
    """The bound of a batch is those of its rows: one wrapped network body sees no other row."""
    vae = VAE(StandardNormal(2), Gaussian(Network(nn.Linear(2, 4), 2, 4)), MeanFieldNormal(MLP(4), 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    particles = draw(Pair(vae.model, vae.guide), Batch(x), 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    fixed = poutine.condition(vae.model, data={"z": particles.latents["z"].value[:, order]})
    with pyro.plate("_particles", 3, dim=-2):
        trace = poutine.trace(fixed).get_trace(x[order])
    trace.compute_log_prob()
    log_joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    assert_close(log_joint, (particles.log_prior + particles.log_likelihood)[:, order], **EXACT)
