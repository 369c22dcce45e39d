"""What rows are given: p(x | y) in place of p(x), with labels or covariates y that go wherever x goes.

A conditional linear Gaussian, z ~ N(A y, I), x ~ N(W z + B y, s2 I), has

    p(x|y) = N((W A + B) y, W W' + s2 I)        p(z|x, y) = N(A y + G (x - (W A + B) y), s2 M^-1)

with M = W'W + s2 I and G = M^-1 W'. With the guide at the posterior every weight is p(x|y) itself.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, SOLVED, assert_mean
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import (
    IWAE,
    Annealed,
    Compiled,
    FromPrior,
    Individual,
    Pair,
    Widened,
    gaps,
    log_marginal,
    log_weights,
    measure,
    repair,
    sandwich,
    simulated,
    to_inference_data,
    verdict,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.information import split_kl
from pyrovae.inference.precision import device_of
from pyrovae.inference.proposals import FromGuide
from pyrovae.inference.simulation import like

D, Q, C = 4, 2, 3
# More than one block of rows.
N = 130


class Conditional:
    """The pair, with its exact guide, or one that is `wide` times too wide."""

    def __init__(self, wide: float = 1.0) -> None:
        make = torch.Generator().manual_seed(7)
        self.A, self.W, self.B = (
            torch.randn(shape, generator=make, dtype=torch.float64) for shape in ((Q, C), (D, Q), (D, C))
        )
        self.s, self.wide = 0.6, wide

    def sample(self, y: Tensor) -> Tensor:
        z = y @ self.A.T + torch.randn(len(y), Q, dtype=torch.float64)
        return z @ self.W.T + y @ self.B.T + self.s * torch.randn(len(y), D, dtype=torch.float64)

    def mean(self, y: Tensor) -> Tensor:
        return y @ (self.W @ self.A + self.B).T

    @property
    def covariance(self) -> Tensor:
        return self.W @ self.W.T + self.s**2 * torch.eye(D, dtype=torch.float64)

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        return MultivariateNormal(self.mean(y), self.covariance).log_prob(x)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y @ self.A.T, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + y @ self.B.T, self.s).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        covariance = self.s**2 * torch.linalg.inv(self.W.T @ self.W + self.s**2 * torch.eye(Q, dtype=torch.float64))
        loc = y @ self.A.T + (x - self.mean(y)) @ (covariance @ self.W.T / self.s**2).T
        with pyro.plate("data", len(x)):
            scale_tril = self.wide * torch.linalg.cholesky(covariance)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def labels(n: int = N) -> Tensor:
    """Classes as indicators, in no order: neighbours differ, and so do rows a block apart."""
    return torch.eye(C, dtype=torch.float64)[torch.randint(C, (n,), generator=torch.Generator().manual_seed(3))]


@pytest.fixture
def exact() -> Conditional:
    return Conditional()


def test_every_weight_at_the_posterior_is_p_of_x_given_y(exact) -> None:
    """Blocks of rows carry their own labels; labels out of step with the rows are those that are conditioned on."""
    y = labels()
    x = exact.sample(y)
    for given in (y, y.roll(1, 0)):
        result = log_marginal(exact.model, exact.guide, x, 3, given=(given,))
        assert_close(result.estimate, exact.log_prob(x, given), **SOLVED)
        assert_close(log_weights(exact.model, exact.guide, x, 2, given=(given,))[1], result.estimate, **SOLVED)
    assert (exact.log_prob(x, y) - exact.log_prob(x, y.roll(1, 0))).mean() > 1


@pytest.mark.parametrize(
    "proposal",
    [
        FromGuide(),
        FromPrior(),
        Widened(),
        Individual(steps=60),
        Annealed(5, 2),
        pytest.param(Compiled(Widened((1.0,), 0.2)), marks=pytest.mark.slow),
    ],
    ids=lambda p: type(p).__name__,
)
def test_every_proposal_draws_given_the_labels_of_its_rows(proposal) -> None:
    pair, y = Conditional(1.3), labels()
    x, few = pair.sample(y), isinstance(proposal, Annealed)
    result = log_marginal(pair.model, pair.guide, x, 20 if few else 1000, proposal=proposal, seed=1, given=(y,))
    ratio = (result.estimate - pair.log_prob(x, y)).exp()  # with expectation 1 in each row
    assert_mean(ratio, 1.0, least=0.5)
    assert (ratio - 1).abs().median() < 0.2


@pytest.mark.slow
def test_compiled_draws_serve_labels_of_each_shape(exact) -> None:
    """The same object for labels as indicators, and as numbers of classes: the last block is filled up with rows."""
    y, compiled = labels(), Compiled()
    x = exact.sample(y)

    def by_number(program):
        return lambda x, number: program(x, torch.nn.functional.one_hot(number, C).double())

    for model, guide, given in (
        (exact.model, exact.guide, y),
        (by_number(exact.model), by_number(exact.guide), y.argmax(1)),
    ):
        for of_rows in (given, given.roll(1, 0)):
            result = log_marginal(model, guide, x, 5, proposal=compiled, seed=1, given=(of_rows,))
            truth = exact.log_prob(x, of_rows if of_rows.ndim == 2 else torch.eye(C, dtype=torch.float64)[of_rows])
            assert_close(result.estimate, truth, **SOLVED)
    assert len(compiled.programs) == 2
    assert all(program is not None for program in compiled.programs.values())


def test_gaps_are_those_of_the_conditional_posterior(exact) -> None:
    y = labels(12).roll(1, 0)
    x = exact.sample(labels(12))
    result = gaps(exact.model, exact.guide, x, 50, individual=Individual(steps=20), seed=1, given=(y,))
    assert result.family == "full"
    assert_close(result.elbo.values, exact.log_prob(x, y), **SOLVED)
    assert_close(result.gap.values, torch.zeros(12, dtype=torch.float64), rtol=0, atol=0.02)
    kl = result.information.kl  # to the prior given the same labels
    assert ((kl.values - kl_of(exact, x, y)).abs() < 6 * kl.errors).all()
    assert result.information.aggregate_kl is None


def test_an_aggregate_posterior_has_no_distance_from_many_priors() -> None:
    """z that repeats p(z|y), and nothing of x: I(z; (x, y)) is I(z; y) > 0, with a KL of 0. Sorted, in many blocks."""
    y = labels(401).argmax(1).sort().values
    x = torch.zeros(len(y), 1)

    def pair(shift: float) -> Pair:
        def prior(y: Tensor) -> dist.Distribution:
            return dist.Normal(shift * y.float().unsqueeze(-1), 1.0).to_event(1)

        def guide(x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", prior(y))

        def model(x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", prior(y))
                pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

        return Pair(model, guide)

    split = split_kl(pair(3.0), Batch(x, (y,)))
    assert split.mutual_information.mean > 0.5
    assert split.aggregate_kl is None
    assert_close(split.kl.values, torch.zeros_like(split.kl.values), rtol=0, atol=1e-5)
    same = split_kl(pair(0.0), Batch(x, (y,))).aggregate_kl
    assert same is not None
    assert_close(same.values, torch.zeros_like(same.values), rtol=0, atol=1e-5)


def kl_of(exact: Conditional, x: Tensor, y: Tensor) -> Tensor:
    """KL(p(z|x, y) || p(z|y)) in closed form, shape (N,)."""
    covariance = exact.s**2 * torch.linalg.inv(exact.W.T @ exact.W + exact.s**2 * torch.eye(Q, dtype=torch.float64))
    away = (x - exact.mean(y)) @ (covariance @ exact.W.T / exact.s**2).T
    return 0.5 * (covariance.trace() - Q - covariance.logdet() + away.square().sum(1))


def test_simulated_data_are_of_the_labels_that_they_are_scored_with(exact) -> None:
    """log p(x*|y) of x* ~ p(x|y), for each y: both sides of the sandwich, and the mean that it must have."""
    y = labels(40)
    check = sandwich(exact.model, exact.guide, torch.zeros(40, D, dtype=torch.float64), 3, Annealed(3, 1), 1, (y,))
    truth = exact.log_prob(check.x, y)
    assert_close(check.forward, truth, **SOLVED)
    assert_close(check.reverse, truth, **SOLVED)
    mean = -0.5 * (D + exact.covariance.logdet() + D * math.log(2 * math.pi))  # of log N at its own draws
    assert_mean(truth, mean, least=2.0)
    y = labels(400)
    found = simulated(exact.model, exact.guide, torch.zeros(400, D, dtype=torch.float64), 40, seed=1, given=(y,))
    assert abs(found.width) < 1e-9
    assert_mean(found.lower, mean, least=0.5)


def test_an_estimate_is_judged_and_repaired_with_its_labels() -> None:
    """A guide that knows nothing of the last class misses its rows, and them alone."""
    pair, y = Conditional(1.1), labels(60)
    x, missed = pair.sample(y), y[:, -1] == 1

    def guide(x: Tensor, y: Tensor) -> None:
        pair.guide(x, torch.where(y[:, -1:] == 1, -4.0, 1.0) * y)

    result = log_marginal(pair.model, guide, x, 200, seed=0, given=(y,))
    assert torch.equal(result.unreliable, missed)
    assert (result.estimate - pair.log_prob(x, y))[missed].mean() < -1
    again = repair(pair.model, guide, x, result, Individual(steps=400), given=(y,))
    assert again.repaired == tuple(missed.nonzero().flatten().tolist())
    assert_close(again.estimate, pair.log_prob(x, y), rtol=0, atol=0.3)
    fine = log_marginal(pair.model, pair.guide, x, 500, seed=0, given=(y,))
    assert verdict(fine).kind == "ok"
    assert torch.equal(like(fine.origin.batch, 70).given[0], torch.cat([y, y[:10]]))


def test_draws_for_arviz_are_given_the_labels(exact) -> None:
    y = labels()
    x = exact.sample(y)
    for proposal in (FromGuide(), Individual(steps=5)):
        data = to_inference_data(exact.model, exact.guide, x, 200, 50, seed=1, proposal=proposal, given=(y,))
        assert_close(torch.from_numpy(data["constant_data"]["given_0"].values), y, **EXACT)
        assert_close(
            torch.from_numpy(data["importance"]["log_marginal"].values), exact.log_prob(x, y), rtol=0, atol=0.5
        )
        assert_mean(torch.from_numpy(data["prior"]["z"].values[0]) - y @ exact.A.T, torch.zeros(N, Q).double())
        away = torch.from_numpy(data["prior_predictive"]["x"].values[0]) - exact.mean(y)
        assert_mean(away, torch.zeros(N, D).double())


def test_batches_are_measured_with_what_they_are_given(exact) -> None:
    y = labels()
    x = exact.sample(y)
    report = measure(exact.model, exact.guide, Batch(x, (y,)).split(50), IWAE(3))
    assert report["bound"] == pytest.approx(exact.log_prob(x, y).mean().item(), abs=1e-8)
    assert report["kl"] == pytest.approx(kl_of(exact, x, y).mean().item(), abs=1e-8)


def test_what_is_given_to_other_rows_is_none_of_a_rows_business(exact) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        exact.model(x, y - y.mean(0))

    y = labels(20)
    with pytest.raises(PairError, match="depends on the other rows of the batch"):
        log_marginal(model, exact.guide, exact.sample(y), 5, given=(y,))


def test_a_fitted_gaussian_is_of_its_labels(exact) -> None:
    y = labels(5)
    q = Individual(steps=2).fit(Pair(exact.model, exact.guide), Batch(exact.sample(y), (y,)))
    x = q.space.batch.x
    q.guide(x, y)
    for given in ((), (y.roll(1, 0),), (y, y)):
        with pytest.raises(UsageError, match="expected the data that the Gaussian was fitted to"):
            q.guide(x, *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda y: (y[:-1],), "given: 19 rows beside the 20 of x; pass one row for each"),
        (lambda y: y, r"given: expected a tuple of tensors, each with a row for each of x; pass given=\(y,\)"),
        (lambda y: (y.tolist(),), r"given: expected a tensor of shape \(N, \*event\) with N >= 1, got list"),
        (lambda y: (), r"cannot be called as model\(x\) \(missing a required argument: 'y'\); pass what rows bring"),
        (
            lambda y: (y, y),
            r"model: cannot be called as model\(x, given\[0\], given\[1\]\) \(too many positional arguments\)",
        ),
    ],
)
@pytest.mark.parametrize("door", [log_marginal, gaps, to_inference_data], ids=lambda f: f.__name__)
def test_what_cannot_be_given_is_refused_by_name(exact, door, given, message) -> None:
    y = labels(20)
    with pytest.raises(UsageError, match=message):
        door(exact.model, exact.guide, exact.sample(y), 5, given=given(y))


def test_a_pair_that_takes_nothing_beside_x_says_so() -> None:
    def program(x: Tensor) -> None:
        raise AssertionError

    x = torch.zeros(3)
    with pytest.raises(UsageError, match=r"model: cannot be called as model\(x, given\[0\]\)"):
        log_marginal(program, program, x, given=(x,))


def test_the_device_is_that_of_a_batch() -> None:
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
    for batch in (Batch(there), Batch(torch.empty(2), (there,))):
        assert device_of(batch).type == "cuda"
    assert device_of(Batch(torch.empty(2), (torch.empty(2),))).type == "cpu"
