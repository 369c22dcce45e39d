"""What an estimate may be quoted as, against pairs whose log p(x) is known; and the bootstrap over rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.inference import log_marginal
from pyrovae.inference.annealed import Annealed, Sandwich
from pyrovae.inference.bootstrap import interval, means
from pyrovae.inference.log_marginal import exact, summarise
from pyrovae.inference.verdict import verdict, worst_rows

ROWS = 60


def draws_of_gaussian(q: int, width: float, k: int = 1000, rows: int = ROWS) -> Tensor:
    """Log-weights (K, N), less log p(x), of a posterior N(0, I_q) and a guide N(0, width^2 I)."""
    e = torch.randn(k, rows, q, dtype=torch.float64)
    return (e.square() / 2 - (width * e).square() / 2 + math.log(width)).sum(-1)


@pytest.mark.parametrize("q", [2, 10, 50])
def test_verdicts_on_pairs_with_exact_answers(q: int) -> None:
    """Exact for the posterior; ok for guides near it, and then within 0.03 nat; a bound only for poor ones."""
    torch.manual_seed(q)
    assert verdict(summarise(draws_of_gaussian(q, 1.0))).kind == "exact"
    for width in (0.9, 1.1):
        result = summarise(draws_of_gaussian(q, width))
        assert verdict(result).kind == "ok"
        assert abs(result.mean) < 0.03
    poor = {2: (0.3, 0.5), 10: (0.5, 2.5), 50: (0.5, 0.7, 1.5, 2.0)}[q]
    for width in poor:
        result = summarise(draws_of_gaussian(q, width))
        said = verdict(result)
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


def test_a_few_bad_rows_do_not_spoil_many_good_ones_but_a_tenth_does() -> None:
    torch.manual_seed(0)
    good, bad = draws_of_gaussian(5, 1.1), draws_of_gaussian(5, 3.5)
    few, many = good.clone(), good.clone()
    few[:, :3], many[:, :12] = bad[:, :3], bad[:, :12]
    assert verdict(summarise(few)).kind == "ok"
    assert set(worst_rows(summarise(few))[:3]) == {0, 1, 2}
    said = verdict(summarise(many))
    assert said.kind == "lower bound only"
    assert "rows have a k-hat over 0.67, more than 10 %" in said.reason


def test_a_bias_that_the_tail_does_not_show() -> None:
    """Bounded weights of large variance: no k-hat is over, but the jackknife finds the bias."""
    w = torch.zeros(40, ROWS, dtype=torch.float64)
    w[:7] = torch.linspace(1.0, 1.1, 7, dtype=torch.float64).unsqueeze(-1)
    w[7:] = 1e-8
    result = summarise(w.log())
    assert (result.pareto_k < 0).all()
    bias = (result.jackknife - result.estimate).mean().item()
    assert bias == pytest.approx((1 / 7 - 1 / 40) / 2, rel=0.2)
    assert str(verdict(result)).startswith("lower bound only: the jackknife finds it 0.06")


def test_too_few_draws_give_a_bound() -> None:
    said = verdict(summarise(draws_of_gaussian(2, 1.1, k=20)))
    assert str(said) == "lower bound only: no tail diagnostic: K = 20 is too small for k-hat"


@pytest.mark.parametrize("check", [None, True])
def test_a_single_draw_says_nothing_of_its_error(check) -> None:
    """Equal to itself, it is not called exact, and its error is not called zero."""
    result = summarise(draws_of_gaussian(2, 1.1, k=1))
    sandwich = Sandwich(torch.empty(0), *torch.zeros(3, 50, dtype=torch.float64), 1, Annealed()) if check else None
    said = verdict(result, sandwich)
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
    """In bfloat16 log-weights near -110 are 0.5 apart: their spread is no rounding."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.tensor(0.8, dtype=x.dtype)).to_event(1))

    assert verdict(log_marginal(model, guide, torch.randn(3, 64).bfloat16(), 200)).kind != "exact"


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
    assert verdict(result).kind == "exact"


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
