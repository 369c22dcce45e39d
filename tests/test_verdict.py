"""What an estimate may be quoted as, against pairs whose log p(x) is known; and the bootstrap over rows."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.inference import log_marginal
from pyrovae.inference.annealed import Annealed, Sandwich
from pyrovae.inference.bootstrap import interval, means
from pyrovae.inference.marginal import exact, summarise
from pyrovae.inference.proposals import FromGuide, Sampler
from pyrovae.inference.simulation import Simulated
from pyrovae.inference.verdicts import verdict, worst_rows

ROWS = 60


def draws_of_gaussian(q: int, width: float, k: int = 1000, rows: int = ROWS) -> Tensor:
    """Log-weights (K, N), less log p(x), of a posterior N(0, I_q) and a guide N(0, width^2 I)."""
    e = torch.randn(k, rows, q, dtype=torch.float64)
    return (e.square() / 2 - (width * e).square() / 2 + math.log(width)).sum(-1)


def sandwich_of(width: float, jackknife: float = 0.0) -> Simulated:
    """A check on simulated data with that width, and that bias by the jackknife."""
    lower = torch.zeros(300, dtype=torch.float64)
    return Simulated(lower, lower + width, lower + jackknife, 1000, "draws from the guide")


NARROW = sandwich_of(0.0)


@pytest.mark.parametrize("q", [2, 10, 50])
def test_verdicts_on_pairs_with_exact_answers(q: int) -> None:
    """Ok for the posterior, and for guides near it, and then within 0.03 nat; a bound only for poor ones.

    Whatever the draws look like, they alone are not enough, and equal weights are not called exact.
    """
    torch.manual_seed(q)
    equal = summarise(draws_of_gaussian(q, 1.0))
    assert verdict(equal).kind == "unchecked"
    assert "the 1000 weights of every row are equal" in verdict(equal).reason
    assert verdict(equal, NARROW).kind == "ok"
    for width in (0.9, 1.1):
        result = summarise(draws_of_gaussian(q, width))
        assert verdict(result).kind == "unchecked"
        assert verdict(result, NARROW).kind == "ok"
        assert abs(result.mean) < 0.03
    poor = {2: (0.3, 0.5), 10: (0.5, 2.5), 50: (0.5, 0.7, 1.5, 2.0)}[q]
    for width in poor:
        result = summarise(draws_of_gaussian(q, width))
        said = verdict(result, NARROW)
        assert said.kind == "lower bound only"
        assert f"rows {worst_rows(result)[0]}," in said.reason


@pytest.mark.parametrize(("q", "width"), [(2, 0.8), (5, 1.25), (10, 1.1), (20, 0.9)])
def test_intervals_of_what_is_ok_cover(q: int, width: float) -> None:
    """Of 200 repetitions with 20 rows each, 95 % Monte Carlo intervals hold the exact mean: 90 % do, and not all."""
    torch.manual_seed(1)
    result = summarise(draws_of_gaussian(q, width, k=300, rows=200 * 20))
    means = result.estimate.view(200, 20).mean(1)
    errors = result.standard_error.view(200, 20).square().sum(1).sqrt() / 20
    held = (means.abs() <= 1.96 * errors).double().mean().item()
    assert 0.9 < held < 0.995


def test_a_tenth_of_doubtful_rows_spoils_the_mean_and_a_few_do_not() -> None:
    """A k-hat between its limit and 1 is a matter of how many rows have it."""
    torch.manual_seed(0)
    good, doubtful = draws_of_gaussian(5, 1.1), draws_of_gaussian(5, 0.65, rows=400)
    k_hat = summarise(doubtful).pareto_k
    doubtful = doubtful[:, (k_hat > 0.7) & (k_hat < 0.95) & (summarise(doubtful).ess > 20)]
    few, many = good.clone(), good.clone()
    few[:, :3], many[:, :12] = doubtful[:, :3], doubtful[:, :12]
    assert verdict(summarise(few), NARROW).kind == "ok"
    assert set(worst_rows(summarise(few))[:3]) == {0, 1, 2}
    said = verdict(summarise(many), NARROW)
    assert said.kind == "lower bound only"
    assert "rows have a k-hat over 0.67, more than 10 %" in said.reason


@pytest.mark.parametrize("distance", [6.0, 40.0])
def test_a_single_row_that_is_missed_is_not_averaged_away(distance: float) -> None:
    """One row of sixty whose guide is far off: the mean is too low by distance^2 / 120, and no error says so."""
    torch.manual_seed(0)
    log_w = draws_of_gaussian(2, 1.1)
    e = torch.randn(1000, dtype=torch.float64)
    log_w[:, 17] = e.square() / 2 - (e + distance).square() / 2
    result = summarise(log_w)
    assert -result.mean > 5 * result.monte_carlo_error
    said = verdict(result, NARROW)
    assert said.kind == "lower bound only"
    assert "1 of 60 rows may be missed by any distance" in said.reason
    assert "(the worst: 17)" in said.reason


def test_all_weight_on_a_handful_of_draws_is_not_enough_whatever_the_tail() -> None:
    """Six of a thousand weights are equal, all others 0: there is no tail to speak of, and hardly a sample."""
    torch.manual_seed(0)
    log_w = draws_of_gaussian(2, 1.1)
    log_w[:, 5] = -1e4
    log_w[:6, 5] = 0.0
    result = summarise(log_w)
    assert result.pareto_k[5] < 0.6
    assert verdict(result, NARROW).kind == "lower bound only"
    log_w[:30, 5] = 0.0
    assert verdict(summarise(log_w), NARROW).kind == "ok"


def test_a_bias_that_the_tail_does_not_show() -> None:
    """Bounded weights of large variance: no k-hat is over, but the jackknife finds the bias."""
    w = torch.full((100, ROWS), 1e-8, dtype=torch.float64)
    w[:10] = torch.linspace(1.0, 1.001, 10, dtype=torch.float64).unsqueeze(-1)
    log_w = w.log()
    log_w[10:15] = math.log(0.2)
    result = summarise(log_w)
    assert (result.pareto_k < 0).all()
    assert (result.ess > 10).all()
    bias = (result.jackknife - result.estimate).mean().item()
    assert bias == pytest.approx((1 / result.ess[0].item() - 1 / 100) / 2, rel=0.25)
    assert verdict(summarise(log_w), NARROW).kind == ("lower bound only" if bias > 0.05 else "ok")


def test_too_few_draws_give_a_bound() -> None:
    said = verdict(summarise(draws_of_gaussian(2, 1.1, k=20)))
    assert str(said) == "lower bound only: no tail diagnostic: K = 20 is too small for k-hat"


@pytest.mark.parametrize("check", [None, "sandwich", "simulated"])
def test_a_single_draw_says_nothing_of_its_error(check) -> None:
    """Equal to itself, it is not called exact, and its error is not called zero."""
    result = summarise(draws_of_gaussian(2, 1.1, k=1))
    sandwich = Sandwich(torch.empty(0), *torch.zeros(3, 50, dtype=torch.float64), 1, Annealed())
    said = verdict(result, {"sandwich": sandwich, "simulated": NARROW}.get(check))
    assert said.kind == "lower bound only"
    assert "nan" not in said.reason
    assert math.isnan(result.monte_carlo_error)


def test_a_sandwich_is_the_judge_of_chains() -> None:
    """Narrow enough, or not; but a bias that the jackknife finds is one all the same."""
    torch.manual_seed(0)
    good, poor = (summarise(draws_of_gaussian(10, width, k=16)) for width in (0.95, 2.0))
    lower = torch.zeros(50, dtype=torch.float64)
    narrow = Sandwich(torch.empty(0), lower, lower + 0.05, lower, 16, Annealed())
    wide = Sandwich(torch.empty(0), lower, lower + 0.15, lower, 16, Annealed())
    assert verdict(good, narrow).kind == "ok"
    assert verdict(good, wide).kind == "lower bound only"
    assert "0.15 ± 0 nats wide, not narrower than 0.1" in verdict(good, wide).reason
    assert "jackknife" in verdict(poor, narrow).reason
    assert verdict(poor, narrow).kind == "lower bound only"


def test_a_row_whose_weight_is_on_too_few_draws_counts_as_over() -> None:
    torch.manual_seed(0)
    log_w = draws_of_gaussian(2, 1.1)
    log_w[:, 3] = -1e6 * torch.arange(1000, dtype=torch.float64)
    result = summarise(log_w)
    assert result.pareto_k[3].isnan()
    assert result.over_threshold.tolist() == [i == 3 for i in range(ROWS)]


def test_coarse_numbers_are_not_called_equal() -> None:
    """In bfloat16 log-weights near -110 are 0.5 apart: their spread is no rounding, whatever proposal has them."""

    class Coarse(FromGuide):
        def __call__(self, *pair_and_x: Any) -> Sampler:
            sampler = super().__call__(*pair_and_x)
            return Sampler(lambda k: sampler(k).bfloat16(), sampler.at)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.tensor(0.8, dtype=x.dtype)).to_event(1))

    assert (log_marginal(model, guide, torch.randn(3, 64), 200, proposal=Coarse()).pareto_k != 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_number_are_invalid_and_named(bad: float) -> None:
    """One NaN or infinite weight, or no weight that is not zero."""
    log_w = draws_of_gaussian(2, 1.1)
    log_w[: 1 if bad != -math.inf else None, 7] = bad
    result = summarise(log_w)
    said = verdict(result)
    assert said.kind == "invalid"
    assert "1 of 60 rows, the first being 7 (" in said.reason
    assert not math.isfinite(result.mean)


def test_closed_forms_are_exact() -> None:
    assert verdict(exact(torch.zeros(3))).kind == "exact"
    assert verdict(exact(torch.tensor([0.0, -math.inf]))).kind == "invalid"
    assert verdict(exact(torch.zeros(3))).bias == 0


def test_the_stated_bias_is_that_of_simulated_data_or_worse() -> None:
    """Width plus two errors; and where the jackknife of these rows finds twice what it finds there, twice that."""
    torch.manual_seed(0)
    result = summarise(draws_of_gaussian(5, 1.2))
    jackknife = (result.jackknife - result.estimate).mean().item()
    alike = verdict(result, sandwich_of(0.02, jackknife))
    assert alike.kind == "ok"
    assert alike.bias == pytest.approx(0.02, rel=1e-6)
    assert "too low by at most 0.02 nats" in alike.reason
    twice = verdict(result, sandwich_of(0.02, (jackknife - 1e-4) / 2))
    assert twice.bias == pytest.approx(0.04, rel=1e-3)
    assert verdict(result, sandwich_of(0.06, (jackknife - 1e-4) / 2)).kind == "lower bound only"
    assert verdict(result, sandwich_of(0.11, jackknife)).kind == "lower bound only"
    rough = Simulated(*torch.zeros(3, 4, dtype=torch.float64), 1000, "")
    rough.upper[0] = 0.4  # 0.1 wide, give or take 0.1
    assert verdict(result, rough).kind == "lower bound only"


def test_single_precision_rounding_is_no_error() -> None:
    """An exact guide in single precision: weights differ by rounding, and are called equal."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(40), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shrink = 1 / (1 + 0.7**2)
            pyro.sample("z", dist.Normal(shrink * x, 0.7 * math.sqrt(shrink)).to_event(1))

    x = torch.randn(5, 40) * math.sqrt(1 + 0.7**2)
    result = log_marginal(model, guide, x, 500)
    assert result.curve[1].std() > 0
    assert 0 < result.standard_error.max() < 1e-5
    assert "weights of every row are equal" in verdict(result).reason


def test_bootstrap_of_a_mean_against_its_standard_error() -> None:
    """The spread of resampled means is sd / sqrt(N) of the rows, and pairs of models are resampled together."""
    torch.manual_seed(0)
    values = torch.randn(2, 400, dtype=torch.float64)
    resampled = means(torch.cat([values, values[:1] - values[1:]]), seed=2)
    assert resampled.shape == (10_000, 3)
    assert_close(resampled[:, 2], resampled[:, 0] - resampled[:, 1], rtol=0, atol=1e-12)
    spread = values.std(-1, correction=0) / math.sqrt(400)
    assert_close(resampled.std(0)[:2], spread, rtol=0.03, atol=0)
    low, high = interval(values[0], seed=2)
    center = values[0].mean().item()
    assert (high - low) / 2 == pytest.approx(1.96 * spread[0].item(), rel=0.04)
    assert (low + high) / 2 == pytest.approx(center, abs=0.05 * spread[0].item() * 1.96)
    assert interval(values[0], level=0.5, seed=2)[1] < high
    assert means(values, 7, seed=2).shape == (7, 2)
    assert all(map(math.isnan, interval(values[0, :1])))
