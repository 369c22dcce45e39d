"""Annealed importance sampling: unbiased whatever the path, and between two bounds on data that the model makes."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import log_marginal, log_weights
from pyrovae.inference.annealed import Annealed, Chains, Path, Sandwich, sandwich, simulate, transition
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import FromPrior
from pyrovae.inference.unconstrained import Unconstrained

SAME = {"rtol": 0.0, "atol": 1e-12}
W = torch.tensor([[1.0, 0.5], [-0.6, 0.8], [0.3, 1.2]], dtype=torch.float64)
S2 = 0.5


class LinearGaussian:
    """z ~ N(0, I), x|z ~ N(Wz, S2 I), x observed whole or in two sites.

    The guide is factorised, its standard deviations `width` times those of p(z|x), its mean off by `shift`.
    """

    precision = W.T @ W / S2 + torch.eye(2, dtype=torch.float64)

    def __init__(self, width: float = 1.0, shift: float = 0.0, parts: int = 1) -> None:
        self.width, self.shift, self.parts = width, shift, parts

    def posterior(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(x @ W @ torch.linalg.inv(self.precision) / S2, precision_matrix=self.precision)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            for i, (w, obs) in enumerate(zip(W.tensor_split(self.parts), x.tensor_split(self.parts, -1), strict=True)):
                pyro.sample(f"x{i}", dist.Normal(z @ w.T, math.sqrt(S2)).to_event(1), obs=obs)

    def guide(self, x: Tensor) -> None:
        q = self.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q.mean + self.shift, self.width * q.stddev).to_event(1))

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        covariance = W @ W.T + S2 * torch.eye(3, dtype=torch.float64)
        return MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)


class Rate:
    """A positive latent: rate ~ Gamma(a, b), x ~ Poisson(rate)."""

    a, b = torch.tensor([2.0, 1.5], dtype=torch.float64)
    x = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("rate", dist.Gamma(self.a, self.b))), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(((x + 2) / 3).log(), 0.9))

    def log_prob(self, x: Tensor) -> Tensor:
        gamma = torch.lgamma(self.a + x) - torch.lgamma(self.a) - torch.lgamma(x + 1)
        return gamma + self.a * (self.b / (self.b + 1)).log() - x * (self.b + 1).log()


class Simplex:
    """A latent with one dimension less than numbers: p ~ Dirichlet(a), x ~ Categorical(p)."""

    a = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64)
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(pyro.sample("p", dist.Dirichlet(self.a))), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Dirichlet(torch.full((3,), 1.5, dtype=torch.float64)))

    def log_prob(self, x: Tensor) -> Tensor:
        return (self.a / self.a.sum()).log()[x.long()]


class Hierarchy:
    """Two latent sites, the guide of the upper one given the lower: z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1)."""

    x = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z1", dist.Normal(z2, 1.0)), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x, 1.0))
            pyro.sample("z2", dist.Normal(0.7 * z1, 0.9))

    def log_prob(self, x: Tensor) -> Tensor:
        return Normal(torch.zeros_like(x), math.sqrt(3.0)).log_prob(x)


class Bounded:
    """A guide that reaches only |z| < 1, and a model that has no number beyond: w estimates the mass within.

    z ~ N(0, 1), x|z ~ N(z, 1), where p(z|x) = N(x/2, 1/2).
    """

    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            assert z.isfinite().all()  # as a Cholesky factorisation would
            pyro.sample("x", dist.Normal(z, 1 + 0 * (1 - z * z).sqrt()), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.full_like(x, -1.0), 1.0))

    def log_prob(self, x: Tensor) -> Tensor:
        posterior = Normal(x / 2, math.sqrt(0.5))
        within = posterior.cdf(torch.ones_like(x)) - posterior.cdf(-torch.ones_like(x))
        return Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x) + within.log()


def data(n: int = 3) -> Tensor:
    return 1.5 * torch.randn(n, 3, dtype=torch.float64)


def relative_weights(annealed: Annealed, pair, x: Tensor, num_chains: int) -> Tensor:
    """w / p(x), shape (C, N)."""
    return (annealed(Pair(pair.model, pair.guide), Batch(x))(num_chains) - pair.log_prob(x)).exp()


def test_one_temperature_is_importance_sampling() -> None:
    """T = 1 takes no transition: the log-weights are those of draws from the start."""
    pair, x = LinearGaussian(width=1.5), data()
    for start, sampler in (
        ("guide", lambda k: log_weights(pair.model, pair.guide, x, k)),
        ("prior", FromPrior()(Pair(pair.model, pair.guide), Batch(x))),
    ):
        chains = Annealed(temperatures=1, start=start)(Pair(pair.model, pair.guide), Batch(x))
        torch.manual_seed(1)
        ours = chains(20)
        torch.manual_seed(1)
        assert_close(ours, sampler(20), **SAME)
        assert chains.acceptance.isnan().all()


@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
@pytest.mark.parametrize(
    ("pair", "start"),
    [
        (LinearGaussian(width=2.0), "guide"),
        (LinearGaussian(width=0.8, shift=0.3), "guide"),
        (LinearGaussian(width=0.01, shift=9.0), "prior"),  # the guide does not matter
    ],
    ids=["wide", "narrow and shifted", "prior"],
)
@pytest.mark.parametrize(("temperatures", "leapfrog"), [(2, 3), (10, 2)])
def test_weights_are_unbiased_on_any_path(pair, start: str, schedule: str, temperatures: int, leapfrog: int) -> None:
    """E w = p(x) for each of several data, with as few temperatures as one intermediate."""
    annealed = Annealed(temperatures, leapfrog, start, schedule)
    assert_mean(relative_weights(annealed, pair, data(), 6000), 1.0, least=0.25)


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("pair", [Rate(), Simplex(), Hierarchy()], ids=["positive", "simplex", "two sites"])
def test_weights_are_unbiased_for_any_sites(pair, start: str) -> None:
    """Constrained latents (their Jacobian counts in every density) and several sites, against closed forms."""
    assert_mean(relative_weights(Annealed(6, 3, start), pair, pair.x, 6000), 1.0, least=0.15)


def test_a_proposal_that_is_no_number_is_refused() -> None:
    """And those alone: the others' estimates are of the mass that the guide reaches. Nothing is raised for them."""
    pair = Bounded()
    annealed = Annealed(6, 2)
    chains = annealed(Pair(pair.model, pair.guide), Batch(pair.x))
    assert_mean((chains(6000) - pair.log_prob(pair.x)).exp(), 1.0, least=0.1)
    assert (chains.acceptance < 0.95).all()
    assert torch.distributions.Distribution._validate_args  # on again


@pytest.mark.parametrize(("start", "temperatures"), [("guide", 8), ("prior", 40)])
def test_reverse_weights_are_unbiased(start: str, temperatures: int) -> None:
    """From exact draws of the posterior, E 1/w = 1/p(x)."""
    pair, x = LinearGaussian(width=1.3, shift=0.2), data() / 2
    chains = Annealed(temperatures, 2, start)(Pair(pair.model, pair.guide), Batch(x))
    u = pair.posterior(x).sample((6000,))
    assert_mean((pair.log_prob(x) - chains.reverse(u)).exp(), 1.0, least=0.25)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_sandwich_holds_log_p_and_narrows(start: str) -> None:
    """E forward <= E log p(x) <= E reverse on simulated data, and longer paths are tighter."""
    pair, n = LinearGaussian(width=0.6, shift=0.4), 200
    widths = []
    for temperatures in (2, 32):
        result = sandwich(pair.model, pair.guide, data(n), 3, Annealed(temperatures, 2, start), seed=temperatures)
        truth = pair.log_prob(result.x)
        for excess in (result.forward - truth, truth - result.reverse):
            assert excess.mean() <= 5 * excess.std() / math.sqrt(n)
        assert_close(result.width, (result.reverse - result.forward).mean().item())
        widths.append((result.width, result.error))
    (wide, wide_error), (narrow, narrow_error) = widths
    assert narrow + 5 * math.hypot(wide_error, narrow_error) < wide
    assert narrow < wide / 5


def test_both_sides_are_means_of_unbiased_weights() -> None:
    """E exp(forward) = p(x) and E exp(-reverse) = 1 / p(x), for chains that share z* as well."""
    pair = LinearGaussian(width=1.3)
    result = sandwich(pair.model, pair.guide, data(1000), 8, Annealed(2, 1), seed=0)
    truth = pair.log_prob(result.x)
    assert_mean((result.forward - truth).exp(), 1.0, least=0.1)
    assert_mean((truth - result.reverse).exp(), 1.0, least=0.1)


def test_the_sides_are_means_of_weights_not_of_their_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights 1 and 3 each way: log 2 from below, and from above -log((1 + 1/3) / 2) = log 1.5."""
    logs = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    for way in ("__call__", "reverse"):
        monkeypatch.setattr(Chains, way, lambda self, _: logs.expand(2, len(self.space.batch)))
    pair = LinearGaussian()
    result = sandwich(pair.model, pair.guide, data(3), 2, Annealed(1), seed=0)
    assert_close(result.forward, torch.full((3,), math.log(2.0), dtype=torch.float64), **SAME)
    assert_close(result.reverse, torch.full((3,), math.log(1.5), dtype=torch.float64), **SAME)


def test_validated_counts_the_error() -> None:
    """Narrower than 0.1 nat on average, and so with two standard errors more; a single datum has no error."""

    def of(*widths: float) -> Sandwich:
        reverse = torch.tensor(widths, dtype=torch.float64)
        zero = torch.zeros_like(reverse)
        return Sandwich(zero, zero, reverse, zero, 1, Annealed())

    assert of(0.05, 0.05, 0.05, 0.05).validated
    assert not of(0.11, 0.11, 0.11).validated
    assert of(0.03, 0.07).error == pytest.approx(0.02)
    assert of(0.03, 0.07).validated  # 0.05 + 2 x 0.02
    assert not of(0.02, 0.08).validated  # 0.05 + 2 x 0.03
    assert not of(0.05).validated


@pytest.mark.parametrize("b", [0.4, 1.0])
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_transitions_leave_their_target_invariant(b: float, start: str) -> None:
    """Chains that start at exact draws of pi_b keep its mean and covariance, at steps that are often refused."""
    pair, x = LinearGaussian(width=0.7, shift=0.5), data(2)
    p, q = pair.posterior(x), pair.posterior(x)
    if start == "guide":
        r_precision = torch.diag_embed((0.7 * q.stddev) ** -2)
        r_loc = q.mean + 0.5
    else:
        r_precision, r_loc = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), torch.zeros_like(q.mean)
    # log r + b (log p(z|x) - log r), or log p(z) + b log p(x|z): the same product of two Gaussians
    precision = (1 - b) * r_precision + b * p.precision_matrix
    loc = torch.linalg.solve(
        precision,
        (1 - b) * (r_precision @ r_loc.unsqueeze(-1)).squeeze(-1)
        + b * (p.precision_matrix @ p.mean.unsqueeze(-1))[..., 0],
    )
    target = MultivariateNormal(loc, precision_matrix=precision)
    path = Path(Unconstrained(Pair(pair.model, pair.guide), Batch(x)), start, 20000)
    state = path.at(target.sample((20000,)))
    before = state.u
    for _ in range(4):
        state, probability = transition(path, state, b, 1.5 * target.stddev, leapfrog=2)
    assert (probability.mean(0) < 0.9).all()
    assert (state.u != before).any(-1).float().mean() > 0.9  # they do move
    centred = state.u - loc
    assert_mean(centred, 0.0)
    assert_mean(centred.unsqueeze(-1) * centred.unsqueeze(-2), target.covariance_matrix)


class Correlated:
    """z ~ N(0, I_8), N(0; sum of z, 1/x^2): posteriors that scales do not make round, the less so the larger x."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1 / x), obs=torch.zeros_like(x))

    def guide(self, x: Tensor) -> None:
        precision = torch.eye(8, dtype=torch.float64) + x.square()[:, None, None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x.new_zeros(8), precision_matrix=precision / 1.5))


@pytest.mark.parametrize("acceptance", [0.6, 0.8])
def test_step_sizes_are_tuned_and_then_frozen(acceptance: float) -> None:
    """For each datum chains accept as often as was asked for, and change no step size: weights would be biased."""
    pair, x = Correlated(), torch.tensor([3.0, 6.0, 12.0], dtype=torch.float64)
    chains = Annealed(30, 4, acceptance=acceptance)(Pair(pair.model, pair.guide), Batch(x))
    steps, scales = chains.step_sizes.clone(), chains.scales.clone()
    assert steps.shape == (29, 3)
    assert (4 * steps < 0.95 * math.pi / 2).all()  # tuned, not held back
    assert (steps.mean(0).diff() < 0).all()
    chains(200)
    assert (chains.acceptance - acceptance).abs().max() < 0.12
    chains.reverse(torch.zeros(50, 3, 8, dtype=torch.float64))
    assert torch.equal(chains.step_sizes, steps)
    assert torch.equal(chains.scales, scales)


@pytest.mark.parametrize("leapfrog", [1, 4])
def test_no_trajectory_turns_back(leapfrog: int) -> None:
    """On a Gaussian of known scales e L is at most a quarter of a period, pi/2, however high the acceptance is."""
    pair, x = LinearGaussian(), data()
    chains = Annealed(20, leapfrog, acceptance=0.01)(Pair(pair.model, pair.guide), Batch(x))
    assert_close(chains.step_sizes, torch.full_like(chains.step_sizes, math.pi / 2 / leapfrog))


def test_schedules() -> None:
    """Both go from 0 to 1 and are symmetric; the sigmoid's ends are finer than even, its middle coarser."""
    for schedule in ("linear", "sigmoid"):
        b = torch.tensor(Annealed(schedule=schedule).ladder(10), dtype=torch.float64)
        assert b[0] == 0
        assert b[-1] == 1
        assert_close(b, 1 - b.flip(0), **SAME)
        steps = b.diff()
        if schedule == "linear":
            assert_close(steps, torch.full_like(steps, 0.1), **SAME)
        else:
            # (sigmoid(-3.2) - sigmoid(-4)) / (sigmoid(4) - sigmoid(-4))
            assert_close(steps[0].item(), 0.0211795 / 0.9640276, rtol=1e-4, atol=0)
            assert steps[4] > 0.15


def test_simulated_data_are_draws_of_the_model() -> None:
    """x* and z* have the joint moments of the model, and x* that of every site where x is observed in parts."""
    for parts in (1, 2):
        pair = LinearGaussian(parts=parts)
        batch, latents = simulate(Pair(pair.model, pair.guide), Batch(torch.full((20000, 3), 7.0, dtype=torch.float64)))
        x = batch.x
        z = latents["z"][0]
        assert_mean(x.unsqueeze(-1) * x.unsqueeze(-2), W @ W.T + S2 * torch.eye(3, dtype=torch.float64), least=0.2)
        assert_mean(x.unsqueeze(-1) * z.unsqueeze(-2), W, least=0.2)


def test_the_data_that_are_simulated_do_not_depend_on_x_like() -> None:
    """Of x_like only the shape counts, and it is left as it is."""
    pair = LinearGaussian(width=1.5)
    ones, zeros = torch.ones(4, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64).T  # strided
    a, b = (sandwich(pair.model, pair.guide, x, 2, Annealed(3, 1), seed=5) for x in (ones, zeros))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.forward, b.forward)
    assert torch.equal(a.reverse, b.reverse)
    assert torch.equal(ones, torch.ones_like(ones))


class Learned(nn.Module):
    """A pair with parameters and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3))
        self.encoder = nn.Linear(3, 2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def test_as_a_proposal_it_leaves_no_trace() -> None:
    """Through log_marginal: same seed, same bits; no gradient of a parameter, no training mode, no random state."""
    pair, x = Learned(), data(5).float()
    state = torch.get_rng_state()
    a, b, c = (log_marginal(pair.model, pair.guide, x, 12, 5, proposal=Annealed(4, 2), seed=seed) for seed in (1, 1, 2))
    result = sandwich(pair.model, pair.guide, x, 2, Annealed(4, 2), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.estimate, b.estimate)
    assert not torch.equal(a.estimate, c.estimate)
    assert a.estimator == Annealed(4, 2).name
    assert all(p.grad is None for p in pair.parameters())
    assert pair.training
    assert pair.decoder[0].training
    assert not any(t.requires_grad for t in (a.estimate, result.forward, result.reverse, result.acceptance, result.x))


def test_blocks_of_rows_and_chunks_of_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows or chains than are annealed at once: every one is in the result, in its place."""
    pair = LinearGaussian(width=0.9)
    monkeypatch.setattr("pyrovae.inference.annealed.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("pyrovae.inference.annealed.ELEMENTS_AT_ONCE", 4 * 4 * 3 * 3)  # 3 chains of 4 rows
    sizes, run = [], Chains.run
    monkeypatch.setattr(Chains, "run", lambda self, path, u, way: sizes.append(u.shape[:2]) or run(self, path, u, way))
    result = sandwich(pair.model, pair.guide, data(10), 8, Annealed(30, 2), seed=0)
    assert max(c * n for c, n in sizes) <= 3 * 4
    assert sum(c * n for c, n in sizes) == 2 * 8 * 10
    truth = pair.log_prob(result.x)
    assert truth.std() > 1
    assert len(truth) == 10
    for side in (result.forward, result.reverse):
        assert (side - truth).abs().max() < 0.4
    assert result.num_particles == 8
    assert ((result.acceptance > 0.5) & (result.acceptance <= 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": 0}, "temperatures: expected a whole number of at least 1, got 0"),
        ({"temperatures": 2.5}, "temperatures: .* got 2.5"),
        ({"leapfrog": 0}, "leapfrog: .* got 0"),
        ({"leapfrog": True}, "leapfrog: .* got True"),
        ({"start": "posterior"}, "start: expected guide or prior, got 'posterior'"),
        ({"schedule": "cosine"}, "schedule: expected sigmoid or linear, got 'cosine'"),
        ({"acceptance": 1.0}, "acceptance: expected a number above 0 and below 1, got 1.0"),
        ({"acceptance": math.nan}, "acceptance: .* got nan"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Annealed(**options)


def test_bad_arguments_of_the_check_are_refused_by_name() -> None:
    pair = LinearGaussian()
    with pytest.raises(UsageError, match=r"num_particles: .* got 0"):
        sandwich(pair.model, pair.guide, data(), 0)
    with pytest.raises(UsageError, match="x_like: expected a tensor of shape"):
        sandwich(pair.model, pair.guide, data(0))


def refused(message: str, model: Callable, guide: Callable, x: Tensor) -> None:
    """By the proposal."""
    with pytest.raises(PairError, match=message):
        Annealed(2, 1)(Pair(model, guide), Batch(x))


def test_discrete_latents_are_named() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("which", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("which", dist.Bernoulli(torch.full_like(x, 0.5)))

    refused("'which': Bernoulli is discrete", model, guide, torch.zeros(3))


def test_auxiliary_sites_are_named() -> None:
    pair = LinearGaussian()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("noise", dist.Normal(x.new_zeros(()), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    refused("'noise' is auxiliary", pair.model, guide, data())


def observing(observe: Callable[[Tensor, Tensor], object]) -> Callable:
    """A model of the latent of LinearGaussian with other observations."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1)), x)

    return model


def observe_a_factor(z: Tensor, x: Tensor) -> None:
    pyro.factor("energy", -(x[:, 0] - z[..., 0]).square())


def observe_a_copy(z: Tensor, x: Tensor) -> None:
    pyro.sample("scaled", dist.Normal(z @ W.T, 1.0).to_event(1), obs=x / 255)


def observe_a_part(z: Tensor, x: Tensor) -> None:
    pyro.sample("part", dist.Normal(z, 1.0).to_event(1), obs=x[:, :2])


def observe_given_x(z: Tensor, x: Tensor) -> None:
    pyro.sample("next", dist.Normal(x.roll(1, -1) + z @ W.T, 1.0).to_event(1), obs=x)


def observe_nothing(z: Tensor, x: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        (observe_a_factor, "'energy' is a pyro.factor"),
        (observe_a_copy, "'scaled' observes no part of x as it came"),
        (observe_a_part, "observes 6 of its 9 numbers .sites: part"),
        (observe_given_x, "'next': the model uses x elsewhere"),
        (observe_nothing, "observes 0 of its 9 numbers .sites: none"),
    ],
)
def test_x_that_cannot_be_simulated_is_refused_by_site(observe: Callable, message: str) -> None:
    pair = LinearGaussian()
    with pytest.raises(PairError, match=message):
        sandwich(observing(observe), pair.guide, data(), 2, Annealed(2, 1))


def test_a_factor_can_be_annealed_without_the_check() -> None:
    """With E exp(-(x - z_1)^2) under z_1 ~ N(0, 1): exp(-x^2 / 3) / sqrt(3)."""
    x = data()
    chains = Annealed(8, 2, "prior")(Pair(observing(observe_a_factor), LinearGaussian().guide), Batch(x))
    assert_mean((chains(6000) + x[:, 0].square() / 3).exp(), 1 / math.sqrt(3.0), least=0.1)
