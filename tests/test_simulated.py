"""What a proposal misses, found on simulated data, and repaired: pairs whose log p(x) is known."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import poisson
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import FromPrior, Individual, Widened, elpd, log_marginal, repair, simulated, verdict
from pyrovae.inference.batch import Batch
from pyrovae.inference.marginal import Origin
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import FROM_GUIDE, Proposal
from pyrovae.inference.repairs import FROM_BOTH, better_than_guide
from pyrovae.inference.simulation import like
from pyrovae.inference.tracing.draws import Compiled

NOISE = 0.5
VARIANCE = NOISE**2 / (1 + NOISE**2)  # of the posterior


def model(x: Tensor) -> None:
    """z ~ N(0, 1), x|z ~ N(z, NOISE)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def gaussian(width: float = 1.0, miss: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], None]:
    """A guide of that many times the posterior's width, off by miss(x)."""

    def guide(x: Tensor) -> None:
        mean = x / (1 + NOISE**2) + (0.0 if miss is None else miss(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, torch.full_like(x, width * math.sqrt(VARIANCE))))

    return guide


def data(rows: int) -> Tensor:
    """Draws of x."""
    torch.manual_seed(rows)
    return torch.randn(rows, dtype=torch.float64) * math.sqrt(1 + NOISE**2)


def exact(x: Tensor) -> Tensor:
    """log p(x), shape (N,)."""
    return dist.Normal(torch.zeros((), dtype=torch.float64), math.sqrt(1 + NOISE**2)).log_prob(x)


def absolute(x: Tensor) -> None:
    """z ~ N(0, 1), x|z ~ N(|z|, 0.1): two modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)


def one_mode(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 1.01, torch.full_like(x, 0.1 / math.sqrt(1.01))))


def states(x: Tensor) -> None:
    """One of two states, of which x says nothing."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(0.0 * z, x.new_ones(())), obs=x)


def one_state(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(x.new_tensor([1 - 1e-6, 1e-6]).expand(len(x), 2)))


# -- The sandwich ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [FROM_GUIDE, Widened(), FromPrior(), Individual(steps=10, draws=8)])
def test_both_sides_hold_log_p_and_an_exact_guide_closes_them(proposal) -> None:
    """E L_K <= E log p(x) <= E U_K on data of the model, with K small enough for either to be off."""
    check = simulated(model, gaussian(2.0), data(2000), 3, proposal, seed=1)
    entropy = -0.5 * math.log(2 * math.pi * math.e * (1 + NOISE**2))
    spread = math.sqrt(0.5 / 2000)  # of the mean log p(x) of 2000 data
    for side, sign in ((check.lower, -1), (check.upper, 1)):
        error = (side.std() / math.sqrt(2000)).item()
        assert sign * (side.mean().item() - entropy) > -5 * math.hypot(error, spread)
    assert check.width > (2 if isinstance(proposal, Individual) else 5) * check.error
    closed = simulated(model, gaussian(1.0), data(50), 3, seed=1)
    assert_close(closed.upper, closed.lower, rtol=0, atol=1e-10)


def test_the_width_against_its_closed_form_for_one_draw() -> None:
    """K = 1: the mean of U - L is KL(p || q) + KL(q || p), for Gaussians of equal means a function of the width c."""
    c = 1.5
    check = simulated(model, gaussian(c), data(20_000), 1, seed=3)
    truth = (c**2 + c**-2 - 2) / 2
    assert abs(check.width - truth) < 5 * check.error
    assert check.error < 0.05 * truth


def test_the_upper_side_takes_the_exact_draw_for_one_of_k_and_not_as_one_more() -> None:
    """With weights that are all equal but that of z*, U - L = log(1 + (w* / w - 1) / K)."""
    check = simulated(states, one_state, data(40), 50, seed=0)
    in_other = check.upper > check.lower + 1e-6
    assert 0 < in_other.sum() < 40
    ratio = (0.5 / 1e-6) / (0.5 / (1 - 1e-6))
    gap = math.log1p((ratio - 1) / 50)
    assert_close((check.upper - check.lower)[in_other], torch.full_like(check.upper[in_other], gap), rtol=1e-9, atol=0)


@pytest.mark.parametrize("pair", [(absolute, one_mode), (states, one_state), (model, gaussian(0.1))])
def test_what_is_never_drawn_is_found(pair) -> None:
    """A second mode, a state, all of the posterior but a sliver of it: draws look good in the first two."""
    x = data(60).abs() + 1
    result = log_marginal(*pair, x, 200, seed=0, most_states=0)
    assert verdict(result).kind == "lower bound only"
    if pair[1] is not gaussian:
        assert simulated(*pair, like(Batch(x)).x, 200).most > 0.5


def test_a_good_guide_is_ok_and_its_bias_small() -> None:
    x = data(60)
    result = log_marginal(model, gaussian(1.15), x, 500, seed=0)
    said = verdict(result)
    assert said.kind == "ok"
    assert said.bias < 0.003
    assert abs(result.mean - exact(x).mean().item()) < said.bias + 4 * result.monte_carlo_error
    assert said == verdict(result, simulated(model, gaussian(1.15), like(Batch(x)).x, 500, seed=0))


def test_compiled_draws_are_checked_as_they_are() -> None:
    """The same noise gives the same sandwich to rounding."""
    x = data(20).float()
    plain, fast = (simulated(model, gaussian(1.3), x, 40, p, seed=2) for p in (FROM_GUIDE, Compiled(FROM_GUIDE)))
    assert_close(fast.upper - fast.lower, plain.upper - plain.lower, rtol=0, atol=1e-4)


def between(low: float, high: float) -> Callable[[Tensor], None]:
    """A guide that knows no more of z than its ends."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.full_like(x, low), high))

    return guide


def test_a_support_that_misses_part_of_the_prior_s_is_a_bound() -> None:
    """The draws show nothing: log p(x) is missed by the log of the share of the posterior that they come from."""

    def flat(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    x = data(40)
    result = log_marginal(flat, between(0.25, 0.75), x, 500, seed=0)
    assert verdict(log_marginal(flat, between(0.0, 1.0), x, 500, seed=0)).kind == "ok"
    said = verdict(result)
    assert said.kind == "lower bound only"
    assert "simulated data the latents are where the proposal has no density" in said.reason
    check = simulated(flat, between(0.25, 0.75), like(Batch(x)).x, 500)
    assert (check.width, check.most, check.validated) == (math.inf, math.inf, False)
    assert 100 < int(check.upper.isinf().sum()) < 200  # half of the prior
    # Mixed with the prior it misses nothing: all weights are finite, and right.
    mixed = log_marginal(flat, between(0.25, 0.75), x, 2000, proposal=Widened(scales=(1.0,), share=0.5), seed=0)
    full = log_marginal(flat, between(0.0, 1.0), x, 2000, seed=0)
    assert verdict(mixed).kind == "ok"
    assert abs(mixed.mean - full.mean) < 5 * math.hypot(mixed.monte_carlo_error, full.monte_carlo_error)
    assert abs(result.mean - full.mean + math.log(2)) < 0.01


def test_how_far_one_row_is_off_is_not_told() -> None:
    check = simulated(model, gaussian(1.0), data(1), 50, seed=3)
    assert math.isnan(check.error)
    assert (check.most, check.validated) == (math.inf, False)


def test_pairs_that_cannot_be_simulated_are_unchecked() -> None:
    """A factor has no sampler; the draws are judged all the same, and the reason is given."""

    def factor(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("x", dist.Normal(z, NOISE).log_prob(x))

    said = verdict(log_marginal(factor, gaussian(1.1), data(30), 300, seed=0))
    assert said.kind == "unchecked"
    assert "'x' is a pyro.factor" in said.reason
    poor = verdict(log_marginal(factor, gaussian(0.2), data(30), 300, seed=0))
    assert poor.kind == "lower bound only"


def test_parameters_of_single_rows_cannot_be_tried_on_others() -> None:
    """Such a guide is made for its own rows: nothing is learnt from simulated ones, and that is said."""
    x = data(30)
    mean = x / (1 + NOISE**2)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 1.1 * math.sqrt(VARIANCE)))

    said = verdict(log_marginal(model, guide, x, 300, seed=0))
    assert said.kind == "unchecked"
    assert "parameters for each row" in said.reason


def test_a_proposal_that_weighs_no_given_latents_is_unchecked() -> None:
    class Mine(Proposal):
        name = "mine"

        def __call__(self, pair, batch):
            return FROM_GUIDE(pair, batch).draw

    result = log_marginal(model, gaussian(1.1), data(30), 300, proposal=Mine(), seed=0)
    assert verdict(result).kind == "unchecked"
    with pytest.raises(PairError, match="Mine does not weigh given latents; return a Sampler"):
        simulated(model, gaussian(1.1), data(5), 10, Mine())


def state_of(kind: str, mass: float, x: Tensor) -> Tensor:
    """Whether a latent is in a state of that mass: one of two, numbered or one-hot, or the second of two bits."""
    if kind == "vector":
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor([0.5, mass]).expand(len(x), 2)).to_event(1))
        return z[..., 1]
    both = x.new_tensor([1 - mass, mass]).expand(len(x), 2)
    if kind == "one-hot":
        z = pyro.sample("z", dist.OneHotCategorical(both))
        return z[..., 1]
    z = pyro.sample("z", dist.Categorical(both))
    return z.to(x.dtype)


@pytest.mark.parametrize(("kind", "seen"), [("states", 0.25), ("one-hot", 0.25), ("vector", 0.125)])
def test_rare_states_are_simulated_often_and_count_for_what_they_are(kind: str, seen: float) -> None:
    """A state of prior mass 0.002, found by x for certain and never by the guide: the mean of the weighted width is
    0.002 times what a row of it loses, with an error that 300 plain draws could not have."""

    def rare(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            inside = state_of(kind, 0.002, x)
            pyro.sample("x", dist.Normal(8.0 * inside, x.new_ones(())), obs=x)

    def never(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state_of(kind, 1e-6, x)

    check = simulated(rare, never, torch.zeros(3000, dtype=torch.float64), 10, seed=0)
    assert check.weight is not None
    assert check.weight.mean().item() == pytest.approx(1, abs=5 * (check.weight.std() / math.sqrt(3000)).item())
    # In that state, U = log(p(x, 1) / 1e-6 / 10) and L = log p(x, 0), whose mean difference is a constant.
    loss = math.log(0.002 / 1e-6 / 10) - math.log(0.998) + 8.0**2 / 2
    assert abs(check.width - 0.002 * loss) < 5 * check.error
    assert check.error < 0.07 * check.width
    assert (check.weight < 0.1).double().mean().item() == pytest.approx(seen, abs=0.04)


def test_data_of_more_digits_than_the_model_s_are_simulated_all_the_same() -> None:
    """The model of numbers in single precision, x in double: nothing but its rounding is between them."""
    x = data(30).double()

    def single(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = gaussian(1.1)
    assert verdict(log_marginal(single, lambda x: guide(x.float()), x, 300, seed=0)).kind == "ok"


def test_a_model_without_latents_has_nothing_to_be_tried() -> None:
    def certain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    x = data(30)
    result = log_marginal(certain, lambda x: None, x, 100, seed=0)
    assert_close(result.estimate, dist.Normal(0.0, 1.0).log_prob(x).double(), rtol=0, atol=1e-6)
    said = verdict(result)
    assert said.kind == "unchecked"
    assert "no latent site" in said.reason
    for proposal in (FromPrior(), Widened(), FROM_BOTH, Individual()):
        with pytest.raises(PairError, match="the model has no latent site"):
            log_marginal(certain, lambda x: None, x, 100, proposal=proposal)
    bad = replace(result, ess=torch.ones_like(result.ess))
    with pytest.raises(PairError, match="the model has no latent site"):
        repair(certain, lambda x: None, x, bad)


def test_the_check_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    simulated(model, gaussian(), data(5), 3)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)
    state = torch.get_rng_state()
    verdict(log_marginal(model, gaussian(1.1), exact(torch.ones(5)), 50, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_pair_is_not_saved_with_the_numbers() -> None:
    result = log_marginal(model, gaussian(1.1), data(400), 50, seed=4)
    assert isinstance(result.origin, Origin)
    assert len(result.origin.batch) == 300
    for kept in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert kept.origin is None
        assert torch.equal(kept.estimate, result.estimate)


# -- Repair ------------------------------------------------------------------------------------------------------------


def far_off(x: Tensor) -> Tensor:
    """40 standard deviations of the posterior for rows above 3."""
    return torch.where(x > 3, 40 * math.sqrt(VARIANCE), 0.0)


def test_missed_rows_are_named_scored_again_and_the_mean_is_right() -> None:
    x = data(200).clamp(max=2.5)
    x[[17, 90]] = 3.2
    guide = gaussian(1.1, far_off)
    result = log_marginal(model, guide, x, 400, seed=0)
    truth = exact(x).mean().item()
    assert result.mean < truth - 5
    assert result.unreliable.nonzero().flatten().tolist() == [17, 90]
    again = repair(model, guide, x, result)
    assert again.repaired == (17, 90)
    assert abs(again.mean - truth) < 5 * again.monte_carlo_error
    assert "2 of 200 rows again by" in again.estimator
    untouched = [i for i in range(200) if i not in (17, 90)]
    for name in ("estimate", "standard_error", "ess", "pareto_k", "jackknife"):
        assert torch.equal(getattr(again, name)[untouched], getattr(result, name)[untouched])
    assert torch.equal(again.elbo, result.elbo)
    assert all(torch.equal(again.curve[k][untouched], result.curve[k][untouched]) for k in again.curve)
    assert_close(again.curve[400], again.estimate)
    assert verdict(again).kind == "ok"


def test_repair_is_checked_by_the_same_procedure() -> None:
    """Simulated rows that the guide misses are repaired too: without that, the sandwich would stay wide."""
    x = data(100).clamp(max=2.9)
    guide = gaussian(1.1, lambda x: torch.where(x > 1.8, 40 * math.sqrt(VARIANCE), 0.0))
    as_it_is = simulated(model, guide, like(Batch(x)).x, 200, seed=0)
    assert as_it_is.width > 1
    assert simulated(model, guide, like(Batch(x)).x, 200, seed=0, repair=Individual(steps=1000)).validated


def test_nothing_to_repair_changes_no_number() -> None:
    x = data(30)
    result = log_marginal(model, gaussian(1.1), x, 200, seed=0)
    again = repair(model, gaussian(1.1), x, result)
    assert again.repaired == ()
    assert torch.equal(again.columns(), result.columns())


def test_the_certificate_pays_for_the_choice_of_rows() -> None:
    """-log(p/2) for the weights, and the Poisson mean of which so few rows have probability p/2, over N."""
    x = data(200).clamp(max=2.5)
    x[17] = 3.2
    guide = gaussian(1.1, far_off)
    result = log_marginal(model, guide, x, 100, seed=0)
    assert result.excess(1e-3) == pytest.approx(math.log(1e3) / 200)
    again = repair(model, guide, x, result)
    expected = again.excess(1e-3) * 200 - math.log(2e3)
    assert poisson.cdf(1, expected) == pytest.approx(5e-4, rel=1e-6)


def test_discrete_latents_are_repaired_by_the_prior() -> None:
    """A state that the guide all but never draws, half of the posterior: the mixture with the prior finds it."""
    x = data(10)
    assert better_than_guide(Pair(states, one_state), Batch(x)) is FROM_BOTH
    assert better_than_guide(Pair(model, gaussian()), Batch(x)) == Individual(steps=1000)
    result = log_marginal(states, one_state, x, 400, proposal=FROM_BOTH, seed=0)
    truth = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(x).mean().item()
    assert abs(result.mean - truth) < 5 * result.monte_carlo_error


def test_repair_takes_the_rows_that_were_scored() -> None:
    x = data(10)
    result = log_marginal(model, gaussian(1.1), x, 50, seed=0)
    for wrong, rows in ((result, x[:5]), (pickle.loads(pickle.dumps(result)), x)):
        with pytest.raises(UsageError, match="expected what log_marginal returned for x"):
            repair(model, gaussian(1.1), rows, wrong)


@pytest.mark.parametrize("use", [verdict, elpd, lambda result: repair(model, gaussian(), data(10), result)])
def test_what_is_no_estimate_is_refused(use: Callable) -> None:
    for wrong, words in ((data(10), r"a tensor of shape \(10,\)"), (None, "NoneType"), (use, "function")):
        with pytest.raises(UsageError, match=f"^result: expected what log_marginal returned, got {words}$"):
            use(wrong)


def test_what_is_no_check_is_refused() -> None:
    result = log_marginal(model, gaussian(1.1), data(10), 50, seed=0)
    with pytest.raises(UsageError, match=r"^check: expected what simulated or sandwich returned, got LogMarginal$"):
        verdict(result, result)
