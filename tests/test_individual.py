"""Gaussians fitted to each datum, on pairs whose posterior and log p(x) are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from test_linear_gaussian import D, LinearGaussian, Q
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import individual, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.individual import FittedGaussian, Individual, moments
from pyrovae.inference.pair import Pair
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.weights import draw
from pyrovae.models import VAE, Bernoulli, MeanFieldNormal, Network, StandardNormal

# Guides that start the fit: shift in posterior standard deviations, and factor of them.
STARTS = {"shifted": (4.0, 1.0), "wide": (0.5, 5.0), "narrow": (0.5, 0.2), "collapsed": (1.0, 0.01)}


@pytest.fixture
def exact() -> LinearGaussian:
    return LinearGaussian()


def start_at(exact: LinearGaussian, shift: float, factor: float):
    """A mean-field guide away from the posterior."""

    def guide(x: Tensor) -> None:
        s = exact.covariance.diagonal().sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - exact.mu) @ exact.gain.T + shift * s, factor * s).to_event(1))

    return guide


def divergence(exact: LinearGaussian, q: FittedGaussian) -> Tensor:
    """KL(q || p(z|x)) = log p(x) - ELBO of q, in closed form."""
    posterior = MultivariateNormal((q.space.batch.x - exact.mu) @ exact.gain.T, exact.covariance)
    return kl_divergence(MultivariateNormal(q.loc, scale_tril=q.scale_tril), posterior).detach()


def best_diagonal_gap(exact: LinearGaussian) -> Tensor:
    return 0.5 * (exact.precision.diagonal().log().sum() - torch.logdet(exact.precision)).detach()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_a_fit_reaches_the_best_gaussian_of_its_family(exact, start, family):
    x, guide, tolerance = exact.sample(20), start_at(exact, *STARTS[start]), 0.01
    least = best_diagonal_gap(exact) if family == "diagonal" else torch.zeros(())
    assert best_diagonal_gap(exact) > 10 * tolerance  # so that the families can be told apart
    before = divergence(exact, moments(Unconstrained(Pair(exact.model, guide), Batch(x)), family)) - least
    assert (before > 20 * tolerance).all()
    after = divergence(exact, Individual(family).fit(Pair(exact.model, guide), Batch(x))) - least
    assert (after > -1e-9).all()
    assert (after < tolerance).all(), after


def test_a_full_fit_ends_without_noise(exact):
    """The path derivative is 0 at the posterior, draw for draw."""
    q = Individual("full").fit(Pair(exact.model, start_at(exact, 0.5, 1.5)), Batch(exact.sample(20)))
    log_w = q.log_weights(100)
    assert log_w.std(0).max() < 1e-3
    assert_close(log_w.mean(0), exact.log_prob(q.space.batch.x).detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_the_gradient_is_that_of_the_elbo(exact, family):
    """For posterior precision P: g_m = L'P(m* - m) and g_L = tril(I - L'PL), of which "diagonal" has the diagonal."""
    x = exact.sample(2)
    scale = torch.rand(2, Q, dtype=torch.float64) + 0.5
    if family == "full":
        scale = torch.diag_embed(scale) + 0.5 * torch.randn(2, Q, Q, dtype=torch.float64).tril(-1)
    q = FittedGaussian(
        torch.randn(2, Q, dtype=torch.float64), scale, Unconstrained(Pair(exact.model, exact.guide), Batch(x))
    )
    L, P = q.scale_tril, exact.precision.detach()
    away = (x - exact.mu) @ exact.gain.T - q.loc
    g_m = (L.mT @ (P @ away[..., None]))[..., 0].detach()
    g_L = (torch.eye(Q, dtype=torch.float64) - L.mT @ P @ L).tril()
    samples = [individual.gradient(q, 16) for _ in range(200)]
    assert_mean(torch.stack([s[0] for s in samples]), g_m)
    assert_mean(torch.stack([s[1] for s in samples]), g_L if family == "full" else g_L.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_a_step_is_taken_in_the_coordinates_of_q(family):
    """m + L(a + T e)."""
    scale, a = torch.rand(2, Q) + 0.5, torch.randn(2, Q)
    in_L = torch.randn(2, Q)
    T = torch.diag_embed(in_L.exp())
    if family == "full":
        below = torch.randn(2, Q, Q).tril(-1)
        scale = torch.diag_embed(scale) + torch.randn(2, Q, Q).tril(-1)
        in_L, T = torch.diag_embed(in_L) + below, T + below
    q = FittedGaussian(torch.randn(2, Q), scale, None)
    e = torch.randn(5, 2, Q)
    assert_close(individual.moved(q, a, in_L).at(e), q.at(a + (T @ e[..., None])[..., 0]))


def test_the_fit_does_not_depend_on_the_units_of_z(exact):
    """z in other units: the same noise leads to the same log-weights."""
    unit = torch.tensor([1e-2, 1.0, 1e3], dtype=torch.float64)
    s, x = exact.covariance.diagonal().sqrt().detach(), exact.sample(4)

    def pair(unit: Tensor | float):
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q, dtype=torch.float64), torch.ones(Q) * unit).to_event(1))
                pyro.sample("x", dist.Normal((z / unit) @ exact.W.T + exact.mu, exact.s2.sqrt()).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc = (x - exact.mu) @ exact.gain.T + s
                pyro.sample("z", dist.Normal(loc * unit, s * unit).to_event(1))

        return model, guide

    log_w = []
    for scale in (1.0, unit):
        torch.manual_seed(1)
        log_w.append(Individual("full", steps=30).fit(Pair(*pair(scale)), Batch(x)).log_weights(5))
    assert_close(log_w[0], log_w[1], rtol=0, atol=1e-6)


def test_a_worse_end_gives_way_to_the_start_row_by_row(exact, monkeypatch):
    """Following the gradient the wrong way in row 0."""
    right = individual.gradient

    def wrong(q: FittedGaussian, draws: int) -> tuple[Tensor, Tensor]:
        g_m, g_L = right(q, draws)
        sign = torch.tensor([-1.0, 1.0, 1.0], dtype=g_m.dtype)
        return g_m * sign[:, None], g_L * sign[:, None]

    monkeypatch.setattr(individual, "gradient", wrong)
    x, guide = exact.sample(3), start_at(exact, 2.0, 1.0)
    torch.manual_seed(2)
    start = moments(Unconstrained(Pair(exact.model, guide), Batch(x)), "diagonal")
    torch.manual_seed(2)
    q = Individual("diagonal").fit(Pair(exact.model, guide), Batch(x))
    assert torch.equal(q.loc[0], start.loc[0])
    assert torch.equal(q.scale[0], start.scale[0])
    assert (divergence(exact, q)[1:] < divergence(exact, start)[1:] - 1).all()


def test_a_gradient_that_is_no_number_moves_nothing(exact, monkeypatch):
    broken = torch.tensor([math.nan, 1.0, 1.0], dtype=torch.float64)
    right = individual.gradient
    monkeypatch.setattr(individual, "gradient", lambda q, draws: tuple(g * broken[:, None] for g in right(q, draws)))
    q = Individual("diagonal").fit(Pair(exact.model, start_at(exact, 2.0, 1.0)), Batch(exact.sample(3)))
    assert q.loc.isfinite().all()
    assert (divergence(exact, q)[1:] < best_diagonal_gap(exact) + 0.02).all()


def test_the_start_has_the_moments_of_the_guide(exact):
    """Of the posterior, which is the guide here, correlations included."""
    x = exact.sample(5)
    for family in ("diagonal", "full"):
        q = moments(Unconstrained(Pair(exact.model, exact.guide), Batch(x)), family)
        mean, spread = (x - exact.mu) @ exact.gain.T, exact.covariance.diagonal().sqrt()
        got = q.scale_tril @ q.scale_tril.mT / (spread[:, None] * spread)
        wanted = exact.covariance / (spread[:, None] * spread)
        wanted = wanted if family == "full" else wanted.diagonal().diag()
        # 500 draws: a mean has an error of 1/sqrt(500) = 0.045, a variance one of 0.063.
        assert ((q.loc - mean) / spread).abs().max() < 5 * 0.045
        assert (got - wanted).abs().max() < 5 * 0.063


def test_draws_that_leave_out_a_direction_are_a_start_too():
    """The covariance of two latents that are always equal has no Cholesky factor."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = torch.tensor([[1e9, 0.0], [1e9, 1e-9]], dtype=x.dtype)
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), scale_tril=scale))

    L = moments(Unconstrained(Pair(model, guide), Batch(torch.randn(50, 2, dtype=torch.float64))), "full").scale
    assert (L.diagonal(dim1=1, dim2=2) > 0).all()
    assert ((L @ L.mT / 1e18 - 1).abs() < 5 * 0.063).all()


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_log_prob_is_the_density_at_its_own_draws(family):
    scale = torch.rand(3, 4, dtype=torch.float64) + 0.5
    if family == "full":
        scale = torch.diag_embed(scale) + torch.randn(3, 4, 4, dtype=torch.float64).tril(-1)
    q = FittedGaussian(torch.randn(3, 4, dtype=torch.float64), scale, None)
    noise = torch.randn(6, 3, 4, dtype=torch.float64)
    truth = MultivariateNormal(q.loc, scale_tril=q.scale_tril).log_prob(q.at(noise))
    assert_close(q.density_at(noise), truth)
    assert_close(q.log_prob(q.at(noise)), truth)


def test_the_elbo_is_that_of_the_closed_form(exact):
    q = Individual("diagonal", steps=20).fit(Pair(exact.model, start_at(exact, 1.0, 1.0)), Batch(exact.sample(50)))
    value, error = q.elbo(500, chunk_size=70)
    z = (value - (exact.log_prob(q.space.batch.x) - divergence(exact, q)).detach()) / error
    assert z.abs().max() < 5
    assert 0.7 < z.std() < 1.4


@pytest.mark.parametrize(("family", "widen"), [("diagonal", 1.6), ("full", 1.0), ("full", 1.05), ("full", 1.6)])
def test_weights_are_unbiased(exact, family, widen):
    """E exp(log w - log p) = 1, also after a fit that is far from done."""
    x = exact.sample(4)
    sample = Individual(family, steps=5, draws=2, widen=max(widen, 1.6))(
        Pair(exact.model, start_at(exact, 0.5, 1.0)), Batch(x)
    )
    assert_mean((sample(20000) - exact.log_prob(x)).exp(), 1.0, least=0.3)
    sample = Individual(family, steps=60, widen=widen)(Pair(exact.model, start_at(exact, 0.5, 1.0)), Batch(x))
    assert_mean((sample(20000) - exact.log_prob(x)).exp(), 1.0, least=0.1)


def test_widening_costs_what_it_should(exact):
    """q with c times the posterior's width: E log w = log p + Q (log c + (1 - c^2) / 2)."""
    x, c = exact.sample(3), 1.4
    loc, scale = (x - exact.mu) @ exact.gain.T, torch.linalg.cholesky(exact.covariance).expand(3, Q, Q)
    q = FittedGaussian(loc.detach(), scale.detach(), Unconstrained(Pair(exact.model, exact.guide), Batch(x)))
    truth = exact.log_prob(x) + Q * (math.log(c) + (1 - c * c) / 2)
    assert_mean(q.widened(c).log_weights(4000), truth.detach(), least=0.5)


def test_a_full_fit_in_many_dimensions_does_not_diverge():
    """Its steps are noisier there; a posterior that is no Gaussian keeps the noise up."""
    size = 60

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=6 * z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - 0.5, 0.5).to_event(1))

    x = torch.randint(0, 2, (3, size)).float()
    fitted = {
        family: Individual(family, steps=100).fit(Pair(model, guide), Batch(x)) for family in ("diagonal", "full")
    }
    assert (fitted["diagonal"].elbo(400)[0] - moments(fitted["full"].space, "diagonal").elbo(400)[0] > 1).all()
    # The posterior factorises: a full covariance wins nothing, and its noise loses little.
    assert (fitted["diagonal"].elbo(2000)[0] - fitted["full"].elbo(2000)[0] < 1).all()


def test_it_is_a_proposal_of_log_marginal(exact):
    """Where the guide's own estimate is far off."""
    x, guide = exact.sample(5), start_at(exact, 6.0, 0.3)
    truth = exact.log_prob(x)
    assert (log_marginal(exact.model, guide, x, 500, seed=0).estimate < truth - 5).all()
    result = log_marginal(exact.model, guide, x, 500, proposal=Individual(), seed=0)
    assert ((result.estimate - truth).abs() < 5 * result.standard_error + 1e-3).all()
    assert (result.ess > 300).all()
    assert "fitted to each datum" in result.estimator


# ------------------------------------------------------------------------------------- several sites, constrained


def model(x: Tensor) -> None:
    """v ~ Gamma(2, 2), z|v ~ N(0, v), x|z, v ~ N(z, 1/4 + v/10)."""
    two = torch.tensor(2.0, dtype=x.dtype)
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.Gamma(two, two))
        z = pyro.sample("z", dist.Normal(torch.zeros_like(v), v.sqrt()))
        pyro.sample("x", dist.Normal(z, 0.25 + v / 10), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.LogNormal(torch.zeros_like(x), 0.7))
        pyro.sample("z", dist.Normal(x - 0.3 * v, 0.6))


def quadrature(x: Tensor) -> Tensor:
    """log p(x) of that model on a grid of (log v, z)."""
    u, z = torch.linspace(-12, 4, 1601, dtype=x.dtype), torch.linspace(-9, 9, 1801, dtype=x.dtype)
    v = u.exp()[:, None]
    log_p = (
        dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 2.0).log_prob(v)
        + u[:, None]
        + dist.Normal(0.0, v.sqrt()).log_prob(z)
    )
    cell = math.log(u[1] - u[0]) + math.log(z[1] - z[0])
    return torch.stack(
        [torch.logsumexp(log_p + dist.Normal(z, 0.25 + v / 10).log_prob(value), (0, 1)) + cell for value in x]
    )


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_several_and_constrained_sites(family):
    """log |dv/du| is in: log p(x) is that of quadrature."""
    x = torch.tensor([-2.0, 0.1, 1.5], dtype=torch.float64)
    truth = quadrature(x)
    result = log_marginal(model, guide, x, 20000, proposal=Individual(family, steps=80, widen=1.2), seed=0)
    assert (result.standard_error < 0.01).all()
    assert ((result.estimate - truth).abs() < 5 * result.standard_error).all()
    q = Individual(family, steps=80).fit(Pair(model, guide), Batch(x))
    elbo, error = q.elbo(4000)
    before = moments(q.space, family).elbo(4000)[0]
    assert (elbo - before > 0.05).all()
    assert (truth - elbo > -5 * error).all()


# ---------------------------------------------------------------------------------------------- what it leaves alone


def test_the_pair_is_left_as_it_was():
    """No gradient in its parameters, its mode back, and dropout off while fitting."""

    modes = set()

    class Decoder(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            modes.add(self.training)
            return super().forward(z)

    body = Decoder(2, 6)
    vae = VAE(StandardNormal(2), Bernoulli(Network(body, 2, 6)), MeanFieldNormal(Network(nn.Linear(6, 4), 6, 4), 2))
    x = torch.randint(0, 2, (3, 6)).float()
    vae.train()
    log_marginal(vae.model, vae.guide, x, 20, proposal=Individual(steps=3))
    Individual(steps=3).fit(Pair(vae.model, vae.guide), Batch(x))
    assert all(p.grad is None for p in vae.parameters())
    assert body.training
    assert modes == {False}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "flow"}, "family: expected diagonal or full, got 'flow'"),
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"draws": 3}, "draws: expected an even number"),
        ({"draws": 2.0}, "draws: expected a whole number of at least 1, got 2.0"),
        ({"widen": 0.0}, "widen: expected a number above 0, got 0.0"),
        ({"widen": math.inf}, "widen: expected a number above 0, got inf"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        Individual(**options)


def test_a_discrete_latent_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x[:, 0], 0.5)))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, D), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x[:, 0], 0.5)))

    with pytest.raises(PairError, match="'z': Bernoulli is discrete"):
        Individual().fit(Pair(model, guide), Batch(torch.randn(2, D)))


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_a_fitted_gaussian_is_a_pyro_guide(family):
    """Its draws have the log-weights of the Gaussian, |dz/du| included, and their spread; other data are refused."""
    x = torch.tensor([-2.0, 0.1, 1.5], dtype=torch.float64)
    fitted = Individual(family, steps=20, draws=4).fit(Pair(model, guide), Batch(x))
    torch.manual_seed(0)
    particles = draw(Pair(model, fitted.guide), Batch(x), 3000)
    u = fitted.space.join(particles)
    assert_close(particles.log_weights, fitted.space.log_joint(u) - fitted.log_prob(u), rtol=0, atol=1e-8)
    assert_mean(u, fitted.loc)
    error = fitted.log_weights(3000).std(0) / 3000**0.5
    assert ((particles.log_weights.mean(0) - fitted.elbo(3000)[0]).abs() < 7 * error).all()
    alone = pyro.poutine.trace(fitted.guide).get_trace(x)
    assert [alone.nodes[name]["value"].shape for name in fitted.space.shapes] == [(3,), (3,)]
    with pytest.raises(UsageError, match="fit it to these"):
        fitted.guide(x + 1)
