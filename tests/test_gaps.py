"""Where the bound is lost: on pairs where every gap is known, and as a command."""

import dataclasses
import json
import math
import re
import shlex
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, assert_mean
from test_individual import best_diagonal_gap
from test_linear_gaussian import LinearGaussian
from test_mixture_guide import Bimodal
from torch import Tensor
from torch.distributions import AffineTransform, MultivariateNormal, Transform, constraints, kl_divergence
from torch.testing import assert_close

from pyrovae import fit, plots
from pyrovae import gaps as gaps_command
from pyrovae.command import main
from pyrovae.errors import PairError, UsageError
from pyrovae.inference import IWAE, information, measure, simulated, units, verdict
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimate import Estimate
from pyrovae.inference.individual import Individual
from pyrovae.inference.information import split_kl
from pyrovae.inference.pair import Pair
from pyrovae.inference.suboptimality import QUANTITIES, Gaps, GuideAndFitted, family_of, gaps
from pyrovae.inference.units import use_of_units
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, PlanarFlow
from pyrovae.runs.suboptimality import describe

FIT = 0.01  # how far a fit may end from the best ELBO, in nats
QUICK = Individual(steps=60)


@pytest.fixture
def exact() -> LinearGaussian:
    return LinearGaussian()


def off(exact: LinearGaussian, full: bool = False):
    """A guide away from the posterior, and its KL to it in closed form."""
    spread = exact.covariance.diagonal().sqrt().detach()
    scale_tril = torch.linalg.cholesky(exact.covariance).detach() if full else spread.diag()
    scale_tril = 0.8 * scale_tril

    def guide(x: Tensor) -> None:
        loc = (x - exact.mu) @ exact.gain.T + spread
        with pyro.plate("data", len(x)):
            if full:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))
            else:
                pyro.sample("z", dist.Normal(loc, scale_tril.diagonal()).to_event(1))

    q = MultivariateNormal(spread, scale_tril=scale_tril)
    return guide, kl_divergence(q, MultivariateNormal(torch.zeros_like(spread), exact.covariance)).item()


def agrees(estimate: Estimate, truth: Tensor | float, tolerance: float = 0.0) -> bool:
    return bool(((estimate.values - truth).abs() <= 5 * estimate.errors + tolerance + 1e-9).all())


# --------------------------------------------------------------------------------------------- the gaps, known exactly


@pytest.fixture(scope="module")
def known() -> tuple[LinearGaussian, float, Tensor, Gaps]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = LinearGaussian()
        guide, kl = off(exact)
        x = exact.sample(30)
        return exact, kl, x, gaps(exact.model, guide, x, 1000, individual=QUICK, seed=0)


def test_every_gap_is_that_of_the_closed_form(known):
    exact, kl, x, result = known
    log_p, least = exact.log_prob(x).detach(), best_diagonal_gap(exact).item()
    assert result.family == result.guide_family == "diagonal"
    assert least > 10 * FIT
    assert kl - least > 10 * FIT
    assert ((result.log_marginal.estimate - log_p).abs() <= 5 * result.log_marginal.standard_error).all()
    for name, truth, tolerance in (
        ("elbo", log_p - kl, 0.0),
        ("best_elbo", log_p - least, FIT),
        ("full_elbo", log_p, FIT),
        ("gap", kl, 0.0),
        ("approximation", least, FIT),
        ("amortisation", kl - least, FIT),
        ("full_approximation", 0.0, FIT),
        ("full_gain", least, FIT),
    ):
        estimate = getattr(result, name)
        assert agrees(estimate, truth, tolerance), name
        assert estimate.errors.max() < 0.2, name  # so that agreeing means something


def test_the_parts_add_up(known):
    result = known[-1]
    assert_close(result.approximation.values + result.amortisation.values, result.gap.values, **EXACT)
    assert_close(result.full_approximation.values + result.full_gain.values, result.approximation.values, **EXACT)
    assert_close(result.log_marginal.estimate - result.elbo.values, result.gap.values, **EXACT)


def test_log_p_of_all_draws_is_tried_on_simulated_data(known):
    """With few draws its two sides hold log p(x), of the mixture that was drawn from; what it finds is quoted."""
    exact, _, _, result = known
    guide, _ = off(exact)
    said = verdict(result.log_marginal)
    assert said.kind == "ok", said
    x = exact.sample(400)
    check = simulated(exact.model, guide, x, 2, GuideAndFitted(Individual(steps=20, draws=8)), seed=2)
    truth = exact.log_prob(exact.sample(20_000)).mean().item()
    spread = exact.log_prob(x).std().item() / 20
    for side, sign in ((check.lower, -1), (check.upper, 1)):
        assert sign * (side.mean().item() - truth) > -5 * math.hypot(side.std().item() / 20, spread)
    assert check.width > 5 * check.error
    assert "mixture of the guide and of Gaussians" in check.estimator


def test_draws_of_gaps_are_in_equal_shares_on_average(exact):
    """Whatever their number: the mean weight is p(x) for every K, and no component has more than the others."""
    guide, _ = off(exact)
    x = exact.sample(1).expand(300, -1)
    pair, batch = Pair(exact.model, guide), Batch(x)
    sampler = GuideAndFitted(Individual(steps=1))(pair, batch)
    for k in (1, 2, 4):
        log_w = torch.cat([sampler(k) for _ in range(200)])
        ratios = (log_w - exact.log_prob(x)).exp().detach()
        assert len(log_w) == 200 * k
        assert_mean(ratios.reshape(200, -1).mean(1), 1.0, least=0.3)


def test_a_mode_that_neither_guide_nor_gaussian_visits_is_found():
    """z ~ N(0, 1), x|z ~ N(|z|, 0.1), and a guide on one mode, to which the Gaussians stay: half of p(x) is missing."""

    def absolute(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)

    def one_mode(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.01, torch.full_like(x, 0.1 / math.sqrt(1.01))))

    x = 1 + torch.rand(20, dtype=torch.float64)
    result = gaps(absolute, one_mode, x, 200, individual=QUICK, seed=0).log_marginal
    truth = dist.Normal(torch.zeros_like(x), math.sqrt(1.01)).log_prob(x) + math.log(2)
    assert abs(result.mean - truth.mean() + math.log(2)) < 0.05
    said = verdict(result)
    assert said.kind == "lower bound only"
    assert "the proposal misses part of the posterior" in said.reason


def test_reported_errors_are_the_errors_made():
    """Over many equal rows with draws of their own, (estimate - truth) / error is standard normal."""
    exact = LinearGaussian()
    guide, kl = off(exact)
    x = exact.sample(1).expand(300, -1)
    result = gaps(exact.model, guide, x, 200, individual=Individual(steps=200), seed=1)
    least = best_diagonal_gap(exact).item()
    for name, truth in (("gap", kl), ("approximation", least), ("amortisation", kl - least), ("full_gain", least)):
        estimate = getattr(result, name)
        z = (estimate.values - truth) / estimate.errors
        assert 0.85 < z.std() < 1.2, (name, z.std())


def test_a_full_guide_is_compared_with_full_gaussians(exact):
    guide, kl = off(exact, full=True)
    x = exact.sample(10)
    result = gaps(exact.model, guide, x, 500, individual=QUICK, seed=0)
    assert result.family == "full"
    assert agrees(result.approximation, 0.0, FIT)
    assert agrees(result.amortisation, kl, FIT)
    assert torch.equal(result.full_elbo.values, result.best_elbo.values)
    assert result.full_gain.values.abs().max() == 0
    assert result.full_gain.errors.max() == 0
    assert result.log_marginal.num_particles == 2 * 500
    other = gaps(exact.model, guide, x, 500, "diagonal", individual=QUICK, seed=0)
    assert agrees(other.approximation, best_diagonal_gap(exact).item(), FIT)


def test_a_mixture_is_compared_with_the_best_mixture_of_each_datum():
    """On a posterior of two Gaussians: what a guide with wrong weights, means and scales loses is all amortisation."""
    pair, x = Bimodal(), torch.randn(6, 2, dtype=torch.float64)
    with torch.no_grad():
        pair.offset.copy_(torch.tensor([[0.3, -0.3, 0.4, -0.4, 1.5], [-0.3, 0.2, -0.4, 0.4, -1.0]]))
        log_p = pair.evidence(x).logsumexp(-1)
    result = gaps(pair.model, pair.guide, x, 500, individual=Individual(steps=100), seed=0)
    assert result.family == result.guide_family == "mixture"
    assert agrees(result.best_elbo, log_p, FIT)
    assert agrees(result.approximation, 0.0, FIT)
    assert result.amortisation.mean > 0.3
    assert result.full_approximation.mean > 0.02
    other = gaps(pair.model, pair.guide, x, 200, "full", individual=QUICK, seed=0)
    assert (other.family, other.guide_family) == ("full", "mixture")


def test_a_low_rank_guide_is_compared_with_the_best_of_its_rank(exact):
    """Of rank Z its family has the posterior, of rank 0 the best diagonal: in between, neither."""
    spread = exact.covariance.diagonal().sqrt().detach()

    def guide(x: Tensor) -> None:
        loc = (x - exact.mu) @ exact.gain.T + spread
        with pyro.plate("data", len(x)):
            q = dist.LowRankMultivariateNormal(loc, 0.1 * spread.diag(), 0.5 * spread.square())
            pyro.sample("z", q)

    x = exact.sample(5)
    result = gaps(exact.model, guide, x, 500, individual=Individual(steps=100), seed=0)
    assert result.family == result.guide_family == "low-rank"
    assert agrees(result.approximation, 0.0, FIT)
    assert agrees(result.gap, result.amortisation.values, FIT)
    assert result.amortisation.mean > 0.3
    assert best_diagonal_gap(exact) > 10 * FIT


def test_a_flow_is_compared_with_the_best_of_its_own_weights(exact):
    """A flow that is the identity is a Gaussian in which what is free of each datum is its mean and scales."""
    size = len(exact.covariance)
    guide_part = PlanarFlow(MLP(len(exact.mu), hidden=(4,)), size, layers=1).double()
    spread = exact.covariance.diagonal().sqrt().detach()
    with torch.no_grad():
        for parameter in guide_part.flow.parameters():
            parameter.zero_()

    def guide(x: Tensor) -> None:
        own = guide_part(x)
        with pyro.plate("data", len(x)):
            loc = ((x - exact.mu) @ exact.gain.T + spread).detach()
            pyro.sample("z", type(own)(own.flow, loc, (0.8 * spread).expand_as(loc), own.features))

    x = exact.sample(4)
    result = gaps(exact.model, guide, x, 500, individual=Individual(steps=100), seed=0)
    assert result.family == result.guide_family == "flow"
    assert agrees(result.approximation, best_diagonal_gap(exact).item(), FIT)
    assert result.amortisation.mean > 0.3


def test_one_proposal_that_is_good_is_enough(exact):
    """The guide alone is many nats off; the mixture is not."""
    guide, _ = off(exact)
    x = exact.sample(5)

    def far(x: Tensor) -> None:
        guide(x + 10)

    assert (
        draw(Pair(exact.model, far), Batch(x), 500).log_weights.logsumexp(0) - math.log(500) < exact.log_prob(x) - 10
    ).all()
    result = gaps(exact.model, far, x, 500, individual=Individual(steps=200), seed=0).log_marginal
    assert ((result.estimate - exact.log_prob(x)).abs() < 0.2).all()


def test_blocks_and_chunks_change_nothing_but_the_draws(exact):
    guide, kl = off(exact)
    x = exact.sample(5)
    state = torch.get_rng_state()
    one = gaps(exact.model, guide, x, 600, individual=QUICK, seed=0, chunk_size=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.log_marginal.num_particles == 3 * 600
    assert agrees(one.gap, kl)
    again = gaps(exact.model, guide, x, 600, individual=QUICK, seed=0, chunk_size=7)
    assert torch.equal(one.gap.values, again.gap.values)
    done = []
    equal = exact.sample(1).expand(200, -1)
    two = gaps(exact.model, guide, equal, 2, individual=Individual(steps=1), progress=done.append, seed=0)
    assert done == [100, 200]
    assert not torch.equal(two.gap.values[:100], two.gap.values[100:])  # draws of their own


def test_gradients_stay_out_of_the_pair(exact):
    guide, _ = off(exact)
    gaps(exact.model, guide, exact.sample(2), 10, individual=QUICK)
    assert all(p.grad is None for p in exact.theta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, r"num_particles \(K\): expected a whole number of at least 2, got 1"),
        ({"chunk_size": 0}, "chunk_size: expected a whole number of at least 1, got 0"),
        ({"family": "flow"}, "family: expected diagonal or full, got 'flow'"),
    ],
)
def test_arguments_that_make_no_sense(exact, options, message):
    with pytest.raises(UsageError, match=message):
        gaps(exact.model, exact.guide, exact.sample(2), **options)


# ---------------------------------------------------------------------------------------------- the family of a guide


def sites(**distributions):
    """A guide of these sites, and a model of the same sites and no data but x."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            values: dict[str, Tensor] = {}
            for name, make in distributions.items():
                values[name] = pyro.sample(name, make(x, values))

    return program


def normal(x: Tensor, values: dict[str, Tensor]):
    return dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1)


class Sinh(Transform):
    domain = codomain = constraints.real
    bijective, sign = True, 1

    def _call(self, x: Tensor) -> Tensor:
        return x.sinh()

    def _inverse(self, y: Tensor) -> Tensor:
        return y.asinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.cosh().log()


def moved(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


FAMILIES = {
    "mean-field": ("diagonal", {"z": normal}),
    "scalar": ("diagonal", {"z": lambda x, _: dist.Normal(x, 1.0)}),
    "transformed": ("diagonal", {"z": lambda x, _: dist.LogNormal(x, 1.0)}),
    "two apart": ("diagonal", {"a": normal, "b": normal}),
    "one after the other": ("other", {"a": normal, "b": lambda x, v: dist.Normal(v["a"], 1.0).to_event(1)}),
    "scale after": ("other", {"a": normal, "b": lambda x, v: dist.Normal(0.0 * v["a"], v["a"].exp()).to_event(1)}),
    "full": ("full", {"z": lambda x, _: dist.MultivariateNormal(x[:, None].expand(-1, 2), torch.eye(2))}),
    "low rank": (
        "low-rank",
        {"z": lambda x, _: dist.LowRankMultivariateNormal(x[:, None].expand(-1, 2), torch.ones(2, 1), torch.ones(2))},
    ),
    "stretched": ("diagonal", {"z": lambda x, _: moved(dist.Normal(x, 1.0), AffineTransform(1.0, 3.0))}),
    "on the simplex": ("diagonal", {"z": lambda x, v: dist.LogisticNormal(x[:, None].expand(-1, 2), torch.ones(2))}),
    "turned": ("full", {"z": lambda x, v: moved(normal(x, v), dist.transforms.Permute(torch.tensor([1, 0])))}),
    "bent": ("flow", {"z": lambda x, _: moved(dist.Normal(x, 1.0), Sinh())}),
    "flow": ("flow", {"z": lambda x, v: moved(normal(x, v), dist.transforms.affine_coupling(2, [4]))}),
    "mixture": (
        "mixture",
        {
            "z": lambda x, _: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(len(x), 2), 1)
            )
        },
    ),
    "no Gaussian": ("other", {"z": lambda x, _: dist.Gamma(x.exp(), 1.0)}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_of_a_guide(name):
    family, distributions = FAMILIES[name]
    guide = sites(**distributions)
    assert family_of(Pair(guide, guide), Batch(torch.zeros(1))) == family


def test_a_guide_that_is_no_gaussian_may_be_better_than_the_best_of_them():
    """z = sinh(e) with e ~ N(0, 1) and x ~ N(e, 1): the posterior is a bent Gaussian, and so is the guide."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", moved(dist.Normal(x.new_zeros(()), 1.0), Sinh()))
            pyro.sample("x", dist.Normal(z.asinh(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", moved(dist.Normal(x / 2, math.sqrt(0.5)), Sinh()))

    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    result = gaps(model, guide, x, 200, individual=QUICK, seed=0)
    assert (result.guide_family, result.family) == ("flow", "full")
    assert_close(result.elbo.values, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x), rtol=0, atol=1e-6)
    assert (result.amortisation.values < -0.01).all()
    assert (result.approximation.values > 0.01).all()


# -------------------------------------------------------------------------------- information and aggregate posterior


def gaussians(loc: Tensor, scale: Tensor | float = 1.0):
    """p(z) = N(0, I), and q(z|x_n) = N(loc[n], scale) for x = 0, 1, 2, ..."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(loc.shape[-1], dtype=loc.dtype), 1.0).to_event(1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[x.long()], scale).to_event(1))

    return model, guide, torch.arange(len(loc), dtype=loc.dtype)


def values(model, guide, x: Tensor) -> tuple[Pair, Batch]:
    return Pair(model, guide), Batch(x)


def test_two_gaussians_by_quadrature():
    """I(x; z) and KL(q(z) || p(z)) of q = N(+-a, 1/4)."""
    a, s = 0.5, 0.5
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    q = dist.Normal(torch.tensor([-a, a], dtype=z.dtype)[:, None], s).log_prob(z)
    mean_q, p = torch.logsumexp(q, 0) - math.log(2), dist.Normal(0.0, 1.0).log_prob(z)
    mutual = torch.trapezoid(q.exp() * (q - mean_q), z).mean().item()
    distance = torch.trapezoid(mean_q.exp() * (mean_q - p), z).item()
    assert 0.1 < mutual < math.log(2) - 0.1
    loc = torch.tensor([[-a], [a]], dtype=torch.float64).repeat(50, 1)  # every row 50 times, which changes nothing
    result = split_kl(*values(*gaussians(loc, s)), num_particles=200)
    for estimate, truth in ((result.mutual_information, mutual), (result.aggregate_kl, distance)):
        assert estimate.monte_carlo_error < 0.01
        assert abs(estimate.mean - truth) < 5 * estimate.monte_carlo_error
    truth = kl_divergence(dist.Normal(a, s), dist.Normal(0.0, 1.0)).item()
    assert abs(result.kl.mean - truth) < 5 * result.kl.monte_carlo_error


def test_the_kl_is_the_sum_of_its_parts_row_by_row():
    result = split_kl(*values(*gaussians(torch.randn(20, 3, dtype=torch.float64))))
    assert_close(result.mutual_information.values + result.aggregate_kl.values, result.kl.values, **EXACT)


def test_a_collapsed_guide_has_no_information():
    """q(z|x) = p(z): exactly 0, draw for draw."""
    result = split_kl(*values(*gaussians(torch.zeros(10, 2, dtype=torch.float64))))
    for estimate in (result.mutual_information, result.aggregate_kl, result.kl):
        assert estimate.values.abs().max() < 1e-12
    assert not result.at_limit


def test_posteriors_apart_reach_the_limit():
    loc = 100 * torch.arange(12, dtype=torch.float64)[:, None]
    result = split_kl(*values(*gaussians(loc)))
    assert_close(result.mutual_information.values, torch.full((12,), math.log(12), dtype=torch.float64))
    assert result.limit == math.log(12)
    assert result.at_limit


def test_chunks_of_densities_change_nothing(monkeypatch):
    pair = gaussians(torch.randn(9, 2, dtype=torch.float64))
    results = []
    for elements in (information.LATENTS_AT_ONCE, 2 * 2 * 9 * 4, 1):
        monkeypatch.setattr(information, "LATENTS_AT_ONCE", elements)
        torch.manual_seed(5)
        results.append(split_kl(*values(*pair)).mutual_information.values)
    for other in results[1:]:
        assert_close(results[0], other, **EXACT)


def test_a_hierarchy_is_taken_as_one_latent():
    """log q of all sites together, against an explicit loop over pairs of rows."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 0.5))
            pyro.sample("b", dist.Normal(a * x, 0.5))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("a", dist.Normal(b, 1.0))

    x = torch.randn(4, dtype=torch.float64)
    torch.manual_seed(3)
    result = split_kl(*values(model, guide, x), 2)
    torch.manual_seed(3)
    wanted = []
    for _ in range(2):
        z = {name: latent.value[0] for name, latent in draw(Pair(model, guide), Batch(x)).latents.items()}
        log_q = torch.stack(
            [
                dist.Normal(x, 0.5).log_prob(a) + dist.Normal(a * x, 0.5).log_prob(b)
                for a, b in zip(z["a"], z["b"], strict=True)
            ]
        )
        wanted.append(log_q.diagonal() - log_q.logsumexp(1) + math.log(4))
    assert_close(result.mutual_information.values, torch.stack(wanted).mean(0), **EXACT)


def test_information_needs_draws_and_a_density():
    pair = gaussians(torch.zeros(3, 1))
    with pytest.raises(UsageError, match="num_particles: expected a whole number of at least 2, got 1"):
        split_kl(*values(*pair), num_particles=1)

    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(e[..., None], 1.0).to_event(1))

    with pytest.raises(PairError, match="guide site 'e' is auxiliary"):
        split_kl(*values(pair[0], auxiliary, pair[2]))


# -------------------------------------------------------------------------------------------------------------- units


def test_active_units_by_both_definitions():
    """Dimension 0 varies; 1 is constant but far from the prior; 2 is the prior; 3 varies too little for either."""
    loc = torch.zeros(300, 4, dtype=torch.float64)
    loc[:, 0] = torch.linspace(-1, 1, 300, dtype=torch.float64)
    loc[:, 1] = 2.0
    loc[:, 3] = 0.15 * loc[:, 0]
    result = use_of_units(*values(*gaussians(loc)))
    assert result.names == ("z[0]", "z[1]", "z[2]", "z[3]")
    assert_close(result.variance, loc.var(0, correction=0), **EXACT)
    assert_close(result.kl, 0.5 * loc.square().mean(0), **EXACT)
    assert_close(result.kl_error, 0.5 * loc.square().std(0) / math.sqrt(300), **EXACT)
    assert 0 < result.variance[3] < 0.01
    assert result.active_by_variance == 1
    assert result.active_by_kl == 2
    assert result.carrying == 1  # 2 of the 2.17 nats are those of the constant


def test_a_kl_that_is_not_known_is_not_counted():
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.ones(3)))

    result = use_of_units(*values(program, program, torch.zeros(5)))
    assert result.active_by_kl is None
    assert result.carrying is None
    assert result.kl.isnan().all()


# -------------------------------------------------------------------------------------------------------- the command

SMALL = "--data three-gaussians --latent-dim 2 --network.hidden 8 --batch-size 1000 --epochs 2 --eval-K 50 --seed 3 "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert fit.command([*SMALL.split(), "--device", "cpu", "--no-plots", "--out", str(directory)]) == 0
    return directory


def test_the_command_writes_what_it_prints(trained, capsys, monkeypatch):
    # A number that no other count of dimensions can be taken for.
    monkeypatch.setattr(units, "kl_dimensions", lambda kl: round(1e6 * sum(kl)))
    words = [str(trained), "--rows", "20", "--K", "100", "--device", "cpu"]
    assert gaps_command.command(words) == 0
    out = capsys.readouterr().out
    values = json.loads((trained / "gaps.json").read_text())
    assert (trained / "plots" / "gaps.png").stat().st_size > 5000
    assert values["rows"] == 20
    assert values["K"] == 100
    assert values["unit"] == "nats per datum"
    assert values["family"] == "diagonal"
    assert f"trained: the first 20 test rows\n{values['measure']}; nats per datum, K = 100" in out
    for name in ("log_marginal", *QUANTITIES):
        own = torch.tensor(values["per_row"][name], dtype=torch.float64)
        assert len(own) == 20
        assert math.isclose(values[name]["mean"], own.mean(), rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(values[name]["error_over_rows"], own.std() / math.sqrt(20), rel_tol=1e-9)
    assert f"{values['amortisation']['mean']:.3f}"[:4] in out
    assert f"at most log N = {math.log(20):.2f}" in out
    few, total = values["kl_dimensions"]["count"], values["active_units"]["of"]
    assert few == units.kl_dimensions([dimension["kl"] for dimension in values["dimensions"]])
    assert re.search(rf"90 % of the KL in +{few} of {total}", out)
    assert ("I(x; z) is at its limit" in out) == values["mutual_information_at_limit"]
    assert gaps_command.command(words) == 0
    assert json.loads((trained / "gaps.json").read_text()) == values


def test_another_family_is_said(trained, capsys):
    words = "--rows 5 --K 20 --family full --split train --device cpu"
    assert gaps_command.command([str(trained), *words.split()]) == 0
    out = capsys.readouterr().out
    assert "the first 5 train rows (the rows it was trained on)" in out
    assert "ELBO, best full Gaussian" in out
    assert "won by full covariances" not in out
    values = json.loads((trained / "gaps.json").read_text())
    assert (values["family"], values["guide_family"]) == ("full", "diagonal")
    assert "not known to be a Gaussian" not in out
    assert "not known to be a Gaussian" in describe("run", values | {"guide_family": "other"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--K 1", "--K: expected a whole number of at least 2, for an error, got 1"),
        ("--rows 0", "--rows: expected a whole number"),
        ("--family flow", "--family: expected diagonal or full, got flow"),
        ("--split all", "--split: expected one of test, validation, train, got all"),
        ("--famly full", "--famly: no such option; did you mean --family?"),
    ],
)
def test_options_that_make_no_sense(trained, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main("gaps", gaps_command.command, [str(trained), *shlex.split(words)])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("pyrovae.gaps: error: ")
    assert message in err


def test_a_row_without_a_number_is_named(trained, capsys, monkeypatch):
    def broken(*arguments, **options) -> Gaps:
        result = gaps(*arguments, **options)
        values = result.best_elbo.values.clone()
        values[3] = -math.inf
        return dataclasses.replace(result, best_elbo=Estimate(values, result.best_elbo.errors))

    monkeypatch.setattr(sys.modules[Gaps.__module__], "gaps", broken)
    with pytest.raises(SystemExit) as caught:
        main("gaps", gaps_command.command, [str(trained), "--rows", "5", "--K", "20", "--device", "cpu"])
    assert caught.value.code == 4
    assert "not a finite number for 1 of 5 rows, the first being 3" in capsys.readouterr().err


def test_a_mixture_has_no_gap(tmp_path, capsys):
    out = str(tmp_path / "mixture")
    words = "--data three-gaussians --model mixture --model.components 2 --epochs 1 --seed 0 --device cpu --no-plots"
    assert fit.command([*words.split(), "--out", out]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main("gaps", gaps_command.command, [out])
    assert caught.value.code == 2
    assert "holds a mixture, whose log p(x) is exact" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the figure


def test_the_figure_leads_from_the_elbo_to_log_p():
    from pandas import DataFrame

    table = DataFrame({"name": ["a", "b", "c"], "gap": [2.0, 1.0, 0.5], "error": [0.2, 0.1, 0.05]})
    dimensions = DataFrame({"kl": [0.001, 3.0, 0.5], "variance": [0.0, 1.0, 0.005]})
    figure = plots.gaps(table, elbo=-10.0, dimensions=dimensions)
    left, right = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in left.patches]
    assert bars == [(-10.0, 2.0), (-8.0, 1.0), (-7.0, 0.5)]
    words = " ".join(text.get_text() for text in left.texts)
    assert "ELBO −10.00" in words
    assert "log p(x) −6.50" in words
    assert "1.00 ± 0.10" in words
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "over 0.01: 1" in legend
    assert "below: 2" in legend
    assert "2 above" in legend
    assert sorted(bar.get_height() for bar in right.patches) == [0.001, 0.5, 3.0]
    with pytest.raises(UsageError, match="table: expected the columns"):
        plots.gaps(table.drop(columns="gap"), elbo=0.0)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dimensions", [1, 2, 50])
def test_the_legend_of_the_dimensions_covers_no_bar_and_no_label(parts, dimensions):
    """Bars that are all as high as the first leave no room for it among them."""
    from pandas import DataFrame

    table = DataFrame({"name": [f"part {i}" for i in range(parts)], "gap": [1.0] * parts, "error": [0.1] * parts})
    variance = [1.0 - i % 2 for i in range(dimensions)]
    figure = plots.gaps(table, elbo=-10.0, dimensions=DataFrame({"kl": [0.7] * dimensions, "variance": variance}))
    figure.draw_without_rendering()
    axes = figure.axes[1]
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(axes.bbox)
    assert not legend.overlaps(axes.xaxis.label.get_window_extent())
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= legend.y0 < legend.y1 <= figure.bbox.y1
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_the_noise_of_averages_is_no_activity() -> None:
    """The upper of two layers has E[z2|x] = E[z1] = 0 for every x; ten draws of z1 differ between rows by chance."""

    def latents(x: Tensor) -> None:
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            latents(x)
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            latents(x)

    x = torch.randn(1500, dtype=torch.float64)
    found = use_of_units(*values(model, guide, x), 10)
    assert found.active_by_variance == 0
    assert found.active_by_kl == 0
    report = measure(model, guide, x.split(500), IWAE(10))
    assert report["active_units"] == 0
