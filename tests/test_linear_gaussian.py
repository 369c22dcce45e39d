"""Probabilistic PCA, where everything is known.

z ~ N(0, I_q), x|z ~ N(Wz + mu, s2 I), M = W'W + s2 I, C = WW' + s2 I:

    log p(x) = log N(x; mu, C)        p(z|x) = N(M^-1 W'(x - mu), s2 M^-1)

log w is quadratic in z for any Gaussian guide, so averages over `sigma_points` are expectations without error.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, SOLVED, sigma_points
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from pyrovae.errors import PairError
from pyrovae.inference import ELBO, IWAE, Objective, Renyi, StickingTheLanding, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    VAE,
    FullCovarianceNormal,
    Gaussian,
    LowRankNormal,
    MeanFieldNormal,
    Network,
    StandardNormal,
)
from pyrovae.models.guides import SCALE_FLOOR, Guide

D, Q = 5, 3


class LinearGaussian:
    """The pair with its exact guide, as plain Pyro functions of theta = (W, mu, log s2)."""

    def __init__(self) -> None:
        # correlated columns, so that no factorised guide is exact
        self.W = (torch.randn(D, Q, dtype=torch.float64) + 0.7).requires_grad_()
        self.mu = torch.randn(D, dtype=torch.float64).requires_grad_()
        self.log_s2 = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)

    @property
    def theta(self) -> list[Tensor]:
        return [self.W, self.mu, self.log_s2]

    @property
    def s2(self) -> Tensor:
        return self.log_s2.exp()

    @property
    def precision(self) -> Tensor:
        """M / s2, of the posterior."""
        return (self.W.T @ self.W) / self.s2 + torch.eye(Q, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """s2 M^-1, of the posterior."""
        return torch.linalg.inv(self.precision)

    @property
    def gain(self) -> Tensor:
        """M^-1 W', which maps x - mu to the posterior mean."""
        return self.covariance @ self.W.T / self.s2

    def sample(self, n: int) -> Tensor:
        with torch.no_grad():
            z = torch.randn(n, Q, dtype=torch.float64)
            return z @ self.W.T + self.mu + self.s2.sqrt() * torch.randn(n, D, dtype=torch.float64)

    def log_prob(self, x: Tensor) -> Tensor:
        C = self.W @ self.W.T + self.s2 * torch.eye(D, dtype=torch.float64)
        return MultivariateNormal(self.mu, C).log_prob(x)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q, dtype=torch.float64), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.mu, self.s2.sqrt()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale_tril = (x - self.mu) @ self.gain.T, torch.linalg.cholesky(self.covariance)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    def vae(self, guide: Guide, scale: str = "learned") -> VAE:
        """The same model in shipped parts."""
        s = self.s2.sqrt().item()
        likelihood = Gaussian(Network(nn.Linear(Q, D), Q, D), scale if scale == "learned" else s)
        vae = VAE(StandardNormal(Q), likelihood, guide).double()
        with torch.no_grad():
            likelihood.decoder.body.weight.copy_(self.W)
            likelihood.decoder.body.bias.copy_(self.mu)
            if scale == "learned":
                likelihood.raw_scale.fill_(inverse_softplus(torch.tensor(s - likelihood.floor, dtype=torch.float64)))
        return vae


def inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def linear_guide(guide_class: type[Guide], **options: int) -> Guide:
    return guide_class(Network(nn.Identity(), D, D), Q, **options).double()


def set_guide(guide: Guide, gain: Tensor, offset: Tensor, covariance: Tensor) -> None:
    """q(z|x) = N(gain x + offset, covariance), or with its diagonal for a mean-field guide."""
    if isinstance(guide, MeanFieldNormal):
        rest = [inverse_softplus(covariance.diagonal().sqrt() - SCALE_FLOOR)]
    elif isinstance(guide, FullCovarianceNormal):
        L = torch.linalg.cholesky(covariance)
        rest = [inverse_softplus(L.diagonal() - SCALE_FLOOR), L[tuple(torch.tril_indices(Q, Q, -1))]]
    else:  # covariance = l_min I + a matrix of rank Q - 1
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors[:, 1:] * (values[1:] - values[0]).sqrt()
        rest = [inverse_softplus(values[0].sqrt() - SCALE_FLOOR).expand(Q), factor.flatten() / 0.1]
    with torch.no_grad():
        guide.head.weight.zero_()
        guide.head.weight[:Q] = gain
        guide.head.bias.copy_(torch.cat([offset, *rest]))


def exact_guide(exact: LinearGaussian, name: str) -> Guide:
    guide = linear_guide(FullCovarianceNormal) if name == "full" else linear_guide(LowRankNormal, rank=Q - 1)
    set_guide(guide, exact.gain, -exact.gain @ exact.mu, exact.covariance)
    return guide


def fit(objective: Objective, vae: VAE, x: Tensor, module: VAE | Guide) -> None:
    """Maximise an objective without noise: the noise tables make it a smooth function."""
    module.initialise(x)
    optimiser = torch.optim.LBFGS(
        module.parameters(),
        max_iter=300,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        history_size=40,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective.differentiable_loss(vae.model, vae.guide, x) / len(x)
        loss.backward()
        return loss

    optimiser.step(closure)


BOUNDS = [
    ELBO(kl="sampled"),
    ELBO(3, num_averages=2, kl="sampled"),
    IWAE(1),
    IWAE(7),
    IWAE(5, num_averages=4),
    *(Renyi(alpha, 6) for alpha in (-1.0, 0.0, 0.5, 1 - 1e-3, 1 - 1e-8, 1.0, 2.0)),
    Renyi(0.5, 3, num_averages=2),
]


def bound_name(bound: Objective) -> str:
    alpha = f"alpha={bound.alpha}," if isinstance(bound, Renyi) else ""
    return f"{type(bound).__name__}({alpha}K={bound.num_particles},M={bound.num_averages})"


@pytest.fixture
def exact() -> LinearGaussian:
    return LinearGaussian()


@pytest.mark.parametrize("bound", BOUNDS, ids=bound_name)
@pytest.mark.parametrize("form", ["functions", "full", "lowrank", "full, fixed scale"])
def test_exact_guide_every_bound_is_log_p(exact: LinearGaussian, form: str, bound: Objective) -> None:
    """With the posterior as guide every log-weight is log p(x), so no bound has a Monte Carlo error."""
    x = exact.sample(4)
    guide_name, _, fixed = form.partition(", ")
    pair = exact if form == "functions" else exact.vae(exact_guide(exact, guide_name), fixed or "learned")
    with torch.no_grad():
        assert_close(bound.bound(pair.model, pair.guide, x), exact.log_prob(x), **SOLVED)
        assert_close(log_weights(pair.model, pair.guide, x, 6), exact.log_prob(x).expand(6, 4), **SOLVED)
    assert bound.loss(pair.model, pair.guide, x) == pytest.approx(-exact.log_prob(x).sum().item(), abs=1e-8)


def test_exact_guide_elbo_with_analytic_kl(exact: LinearGaussian, noise) -> None:
    """E log p(x|z) - KL is log p(x) for the posterior, and its only noise is that of log p(x|z)."""
    x, elbo = exact.sample(4), ELBO(2 * Q)
    particles = draw(Pair(exact.model, exact.guide), Batch(x), 2 * Q)
    z = particles.latents["z"].value
    log_likelihood = dist.Normal(z @ exact.W.T + exact.mu, exact.s2.sqrt()).log_prob(x).sum(-1)
    q = MultivariateNormal((x - exact.mu) @ exact.gain.T, exact.covariance)
    kl = kl_divergence(q, MultivariateNormal(torch.zeros(Q).double(), torch.eye(Q).double()))
    assert_close(elbo.of(particles), log_likelihood.mean(0) - kl, **SOLVED)
    assert elbo.kl_forms(particles) == {"z": "analytic"}
    noise(sigma_points(Q))
    assert_close(elbo.bound(exact.model, exact.guide, x), exact.log_prob(x), **SOLVED)


def test_beta_above_one_bounds_log_p_from_below_and_beta_below_one_does_not(exact: LinearGaussian, noise) -> None:
    """With the posterior as guide the beta-ELBO is log p(x) - (beta - 1) KL: below it, above it, by that KL."""
    x = exact.sample(6)
    truth = exact.log_prob(x).detach()
    q = MultivariateNormal((x - exact.mu) @ exact.gain.T, exact.covariance)
    kl = kl_divergence(q, MultivariateNormal(torch.zeros(Q).double(), torch.eye(Q).double())).detach()
    noise(sigma_points(Q))
    with torch.no_grad():
        values = {beta: ELBO(2 * Q, beta).bound(exact.model, exact.guide, x) for beta in (0.5, 1.0, 2.0)}
    for beta, value in values.items():
        assert_close(value, truth - (beta - 1) * kl, **SOLVED)
    assert (values[2.0] < values[1.0]).all()  # a lower bound, and the looser one
    assert (values[0.5] > truth).any()  # no bound


@pytest.mark.parametrize("num_particles", [1, 7, 30])
def test_exact_guide_log_marginal(exact: LinearGaussian, num_particles: int) -> None:
    """The estimate of log p(x) is exact at every K, without spread, and so is its whole curve."""
    x = exact.sample(4)
    result = log_marginal(exact.model, exact.guide, x, num_particles)
    truth = exact.log_prob(x).detach()
    for value in (result.estimate, result.elbo, *result.curve.values()):
        assert_close(value, truth, **SOLVED)
    assert_close(result.ess, torch.full((4,), float(num_particles), dtype=torch.float64), **SOLVED)
    if num_particles == 1:  # exact, but one draw cannot tell
        assert result.standard_error.isnan().all()
    else:
        assert (result.standard_error < 1e-7).all()
        assert (result.pareto_k == 0).all()


@pytest.mark.parametrize("bound", [*BOUNDS, pytest.param(ELBO(2 * Q), id="analytic")], ids=bound_name)
def test_exact_guide_gradient_is_that_of_log_p(exact: LinearGaussian, bound: Objective, noise) -> None:
    """With the posterior written as a function of theta, d bound = d log p(x) draw for draw."""
    if isinstance(bound, ELBO) and bound.kl == "auto":
        noise(sigma_points(Q))  # without noise from log p(x|z) this bound is exact too
    x = exact.sample(4)
    wanted = torch.autograd.grad(exact.log_prob(x).sum(), exact.theta)
    found = torch.autograd.grad(-bound.differentiable_loss(exact.model, exact.guide, x), exact.theta)
    assert all(w.abs().max() > 0.1 for w in wanted)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("form", ["sampled", "auto"])
@pytest.mark.parametrize("name", ["mean-field", "full", "lowrank"])
def test_any_gaussian_guide_gap_is_kl(exact: LinearGaussian, name: str, form: str, noise) -> None:
    """log p(x) - ELBO = KL(q(z|x) || p(z|x)) for any Gaussian guide."""
    classes = {"mean-field": MeanFieldNormal, "full": FullCovarianceNormal, "lowrank": LowRankNormal}
    guide = linear_guide(classes[name])
    vae, x = exact.vae(guide), exact.sample(4)
    points = sigma_points(Q + 2)  # a low-rank Gaussian draws Q + rank numbers
    noise(*(points.split([2, Q], 1) if name == "lowrank" else [sigma_points(Q)]))
    objective = ELBO(len(points) if name == "lowrank" else 2 * Q, kl=form)
    elbo = objective.bound(vae.model, vae.guide, x)
    particles = draw(Pair(vae.model, vae.guide), Batch(x), objective.num_particles)
    assert objective.kl_forms(particles) == {"z": "analytic" if form == "auto" else "sampled"}
    q = guide(x)
    covariance = torch.diag_embed(q.variance) if name == "mean-field" else q.covariance_matrix
    posterior = MultivariateNormal((x - exact.mu) @ exact.gain.T, exact.covariance)
    gap = kl_divergence(MultivariateNormal(q.mean, covariance), posterior)
    assert (gap > 0.1).all()
    assert_close(exact.log_prob(x) - elbo, gap, **SOLVED)


@pytest.mark.parametrize("form", ["sampled", "auto"])
def test_mean_field_gap(exact: LinearGaussian, form: str, noise) -> None:
    """The best factorised guide has variances 1/L_ii, L = M/s2, and gap (sum_i log L_ii - log det L)/2 at every x."""
    L = exact.precision.detach()
    gap = (L.diagonal().log().sum() - torch.logdet(L)) / 2
    assert gap > 0.1
    guide = linear_guide(MeanFieldNormal)
    set_guide(guide, exact.gain, -exact.gain @ exact.mu, torch.diag(1 / L.diagonal()))
    vae, x = exact.vae(guide), exact.sample(6)
    noise(sigma_points(Q))
    objective = ELBO(2 * Q, kl=form)
    assert_close(exact.log_prob(x) - objective.bound(vae.model, vae.guide, x), gap.expand(6), **SOLVED)
    # and it is the best one: the bound is stationary there
    objective.differentiable_loss(vae.model, vae.guide, x).backward()
    assert all(p.grad.abs().max() < 1e-7 for p in guide.parameters())


@pytest.mark.parametrize("name", ["mean-field", "full", pytest.param("lowrank", marks=pytest.mark.slow)])
def test_trained_guide_reaches_its_family_s_best(exact: LinearGaussian, name: str, noise) -> None:
    """A full covariance (or rank Q - 1 and a diagonal) closes the gap; a factorised guide stays at its own."""
    if name == "mean-field":
        guide, tables = linear_guide(MeanFieldNormal), [sigma_points(Q)]
    elif name == "full":
        guide, tables = linear_guide(FullCovarianceNormal), [sigma_points(Q)]
    else:
        guide = linear_guide(LowRankNormal, rank=Q - 1)
        tables = sigma_points(2 * Q - 1).split([Q - 1, Q], 1)
    L = exact.precision.detach()
    gap = (L.diagonal().log().sum() - torch.logdet(L)) / 2 if name == "mean-field" else torch.zeros(())
    vae, x = exact.vae(guide), exact.sample(20)
    noise(*tables)
    objective = ELBO(len(tables[0]), kl="sampled")

    def found() -> Tensor:
        with torch.no_grad():
            return exact.log_prob(x) - objective.bound(vae.model, vae.guide, x)

    assert (found() - gap > 0.1).all()
    fit(objective, vae, x, guide)
    assert_close(found(), gap.double().expand(20), rtol=0, atol=1e-3)


def data_with_spectrum() -> tuple[Tensor, Tensor]:
    """Data (300, D) whose covariance has exactly the eigenvalues returned, in decreasing order."""
    x = torch.randn(300, D, dtype=torch.float64)
    x = x - x.mean(0)
    U, _, _ = torch.linalg.svd(x, full_matrices=False)
    rotation, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    values = torch.tensor([6.0, 4.0, 2.5, 0.6, 0.3], dtype=torch.float64)
    return math.sqrt(300) * U * values.sqrt() @ rotation + torch.arange(D), values


def linear_vae(guide_class: type[Guide], scale: float | str) -> VAE:
    return VAE(StandardNormal(Q), Gaussian(Network(nn.Linear(Q, D), Q, D), scale), linear_guide(guide_class)).double()


@pytest.mark.parametrize("guide_class", [MeanFieldNormal, FullCovarianceNormal])
@pytest.mark.parametrize("form", ["sampled", "auto"])
def test_maximum_likelihood(guide_class: type[Guide], form: str, noise) -> None:
    """A trained linear VAE reaches Tipping and Bishop's maximum, its variance the mean of the discarded eigenvalues."""
    x, values = data_with_spectrum()
    s2 = values[Q:].mean()
    best = -(D * math.log(2 * math.pi) + values[:Q].log().sum() + (D - Q) * s2.log() + D) / 2
    vae, objective = linear_vae(guide_class, "learned"), ELBO(2 * Q, kl=form)
    noise(sigma_points(Q))

    def value() -> float:
        return -objective.loss(vae.model, vae.guide, x) / len(x)

    def variance() -> float:
        return vae.likelihood.loc_and_scale(torch.zeros(Q).double())[1][0].item() ** 2

    assert best - value() > 1e-5
    assert abs(variance() - s2) > 1e-4
    fit(objective, vae, x, vae)
    assert value() == pytest.approx(best.item(), abs=1e-5)
    assert variance() == pytest.approx(s2.item(), abs=1e-4)
    linear, unit = vae.likelihood.decoder.body, vae.likelihood.unit
    loadings = unit * linear.weight
    noise_covariance = variance() * torch.eye(D, dtype=torch.float64)
    truth = MultivariateNormal(unit * linear.bias, loadings @ loadings.T + noise_covariance)
    assert truth.log_prob(x).mean().item() == pytest.approx(best.item(), abs=1e-5)


@pytest.mark.parametrize(("beta", "active"), [(0.5, 3), (1.0, 3), (2.5, 2), (4.0, 1)])
def test_beta_optimum_is_ppca_of_variance_beta_s2(beta: float, active: int, noise) -> None:
    """With s2 fixed the beta optimum has squared singular values l_j - beta s2, and #{l_j > beta s2} active units."""
    x, values = data_with_spectrum()
    s2 = 1.1
    vae, objective = linear_vae(MeanFieldNormal, math.sqrt(s2)), ELBO(2 * Q, beta=beta)
    noise(sigma_points(Q))
    wanted = (values[:Q] - beta * s2).clamp(min=0)
    assert int((wanted > 0).sum()) == active

    def found() -> Tensor:
        return torch.linalg.svdvals((vae.likelihood.unit * vae.likelihood.decoder.body.weight).detach()).square()

    assert (found() - wanted).abs().max() > 1e-4
    fit(objective, vae, x, vae)
    assert_close(found(), wanted, rtol=0, atol=1e-4)
    spread = vae.encode(x).var(0)
    assert int((spread > 1e-3).sum()) == active
    # beta times the log-likelihood of PPCA with variance beta s2, up to the two normalising constants
    v = beta * s2
    eigenvalues = torch.cat([wanted + v, torch.full((D - Q,), v, dtype=torch.float64)])
    ppca = -(D * math.log(2 * math.pi) + eigenvalues.log().sum() + (values / eigenvalues).sum()) / 2
    best = beta * (ppca + D / 2 * math.log(2 * math.pi * v)) - D / 2 * math.log(2 * math.pi * s2)
    assert -objective.loss(vae.model, vae.guide, x) / len(x) == pytest.approx(best.item(), abs=1e-6)


def test_log_weights_identity_of_terms(exact: LinearGaussian) -> None:
    """log p(x|z) + log p(z) - log q(z|x), each at the same z, in float64 to rounding."""
    x = exact.sample(4)
    particles = draw(Pair(exact.model, exact.guide), Batch(x), 5)
    z = particles.latents["z"].value
    assert_close(particles.log_prior, dist.Normal(0.0, 1.0).log_prob(z).sum(-1), **EXACT)
    likelihood = dist.Normal(z @ exact.W.T + exact.mu, exact.s2.sqrt()).log_prob(x).sum(-1)
    assert_close(particles.log_likelihood, likelihood, **EXACT)
    q = MultivariateNormal((x - exact.mu) @ exact.gain.T, exact.covariance)
    assert_close(particles.log_guide, q.log_prob(z), **SOLVED)
    assert_close(particles.log_weights, particles.log_likelihood + particles.log_prior - particles.log_guide, **EXACT)


# ------------------------------------------------------------------------------------------------ sticking the landing


def sticking(bound: type = ELBO, num_particles: int = 1) -> Objective:
    return bound(num_particles, gradient=StickingTheLanding())


@pytest.mark.parametrize("name", ["full", "lowrank"])
def test_at_the_posterior_the_gradient_of_the_guide_is_zero_for_every_draw(exact: LinearGaussian, name: str) -> None:
    """log w does not depend on z there; the plain estimators have a gradient that is noise of mean 0."""
    vae, x = exact.vae(exact_guide(exact, name)), exact.sample(4)
    parameters = list(vae.guides[0].parameters())

    def gradient(bound: Objective) -> Tensor:
        torch.manual_seed(2)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    assert gradient(ELBO(kl="sampled")).abs().max() > 1.0
    for bound in (sticking(), sticking(ELBO, 7), sticking(IWAE, 5)):
        assert gradient(bound).abs().max() < 1e-8, bound


def test_sticking_the_landing_has_the_value_and_the_expected_gradient_of_the_elbo(exact: LinearGaussian) -> None:
    """For K = 1, away from the posterior, of the guide's parameters and of the model's."""
    guide = linear_guide(MeanFieldNormal)
    set_guide(guide, 0.7 * exact.gain, torch.full((Q,), 0.2).double(), 2 * exact.covariance)
    vae, x, draws = exact.vae(guide), exact.sample(1), 40_000
    parameters = [guide.head.bias, vae.likelihood.decoder.body.bias]

    def drawn(bound: Objective) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(3)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        return loss.detach(), list(torch.autograd.grad(loss, parameters))

    value, found = drawn(sticking(ELBO, draws))
    plain, _ = drawn(ELBO(draws, kl="sampled"))
    assert_close(value, plain, **SOLVED)
    _, wanted = drawn(ELBO(draws))  # by the analytic KL
    for f, w in zip(found, wanted, strict=True):
        assert w.abs().max() > 0.5
        assert ((f - w).abs() < 0.05 * w.abs().max()).all()


def test_a_guide_with_dropout_cannot_be_held(exact: LinearGaussian) -> None:
    guide = MeanFieldNormal(MLP(D, hidden=(8,), dropout=0.5), Q).double()
    vae, x = exact.vae(guide), exact.sample(4)
    with pytest.raises(PairError, match="guide site 'z': the guide gives another density when it is run again"):
        sticking().differentiable_loss(vae.model, vae.guide, x)


def test_tensors_that_no_module_holds_cannot_be_held(exact: LinearGaussian) -> None:
    """Else their gradient would be the ELBO's own, in silence."""
    loc, x = torch.zeros(4, Q, dtype=torch.double, requires_grad=True), exact.sample(4)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    vae = exact.vae(exact_guide(exact, "full"))
    with pytest.raises(PairError, match=r"'z': a tensor of shape \(4, 3\) that is trained is in no module"):
        sticking().differentiable_loss(vae.model, guide, x)
    ELBO().differentiable_loss(vae.model, guide, x)
    sticking().differentiable_loss(vae.model, vae.guide, x.requires_grad_())  # the data are no parameters


def test_averages_of_a_held_guide_see_each_batch_once(exact: LinearGaussian) -> None:
    """The guide is run twice, and batch normalisation is as under the ELBO."""
    x, seen = exact.sample(6), []
    for bound in (ELBO(), sticking()):
        norm = torch.nn.BatchNorm1d(D)
        guide = MeanFieldNormal(Network(torch.nn.Sequential(norm, torch.nn.Linear(D, 8)), D, 8), Q).double()
        vae = exact.vae(guide)
        bound.differentiable_loss(vae.model, vae.guide, x)
        seen.append(norm)
    plain, held = seen
    assert plain.num_batches_tracked == held.num_batches_tracked == 1
    assert plain.running_mean.abs().max() > 0
    assert torch.equal(plain.running_mean, held.running_mean)
    assert torch.equal(plain.running_var, held.running_var)


def test_what_is_declared_by_pyro_param_is_held_too() -> None:
    """q = N(0.3 + 0 x, 1) is the posterior where x says nothing of z."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for bound, is_zero in ((ELBO(kl="sampled"), False), (sticking(), True)):
        loss = bound.differentiable_loss(model, guide, torch.ones(5))
        (slope,) = torch.autograd.grad(loss, pyro.param("loc").unconstrained())
        assert (slope.abs() < 1e-6) == is_zero
    pyro.clear_param_store()
