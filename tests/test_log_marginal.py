"""log p(x) by importance sampling: exact where it can be, honest about its error where it cannot."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import log_marginal, log_weights
from pyrovae.inference.marginal import LogMarginal, curve_sizes, exact, pareto_k, standard_error, summarise
from pyrovae.inference.weights import log_mean_exp
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal

SAME = {"rtol": 0.0, "atol": 1e-12}


class GaussianPair:
    """z ~ N(0, 1), x|z ~ N(z, 1): p(x) = N(0, 2), posterior N(x/2, 1/2). The guide's scale is a multiple of its sd."""

    def __init__(self, width: float = 1.0, shift: float = 0.0) -> None:
        self.scale, self.shift = width * math.sqrt(0.5), shift

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, self.scale))

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        return Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x)


class Given(dist.TorchDistribution):
    """A distribution whose sample and log-probability are what they are given as."""

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, value: Tensor, log_prob: Tensor) -> None:
        self.value, self.given = value, log_prob
        super().__init__(log_prob.shape, validate_args=False)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.value

    def log_prob(self, value: Tensor) -> Tensor:
        return self.given + torch.zeros_like(value, dtype=self.given.dtype)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Given":
        return Given(self.value.expand(batch_shape), self.given.expand(batch_shape))


def particles_of_the_plates() -> int:
    """K of the particle plate that the pair runs in."""
    return pyro.sample("probe", dist.Delta(torch.zeros(())), infer={"is_auxiliary": True}).shape[0]


class TabledPair(GaussianPair):
    """Its guide reads the noise of particle k from row k of a table, counted over all chunks of sizes `calls`."""

    def __init__(self, table: Tensor, **options: float) -> None:
        super().__init__(**options)
        self.table, self.calls = table, []

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            done, k = sum(self.calls), particles_of_the_plates()
            self.calls.append(k)
            q = dist.Normal(x / 2 + self.shift, self.scale)
            z = q.mean + self.scale * self.table[done : done + k]
            pyro.sample("z", Given(z, q.log_prob(z)))


def pair_of(log_w: Tensor) -> tuple[Callable, Callable]:
    """A pair whose log-weights are the rows of a table (K, N), in order of drawing."""
    rows = iter(range(len(log_w)))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.tensor([[next(rows)] for _ in range(particles_of_the_plates())]).expand(-1, len(x))
            pyro.sample("z", Given(z, torch.zeros_like(z, dtype=log_w.dtype)))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Given(torch.zeros(()), torch.zeros((), dtype=log_w.dtype)))
            pyro.sample("x", Given(x, log_w[z, torch.arange(len(x))]), obs=x)

    return model, guide


def data(n: int = 6) -> Tensor:
    return torch.linspace(-2, 2, n, dtype=torch.float64)


def assert_same(a: LogMarginal, b: LogMarginal, index: Tensor | None = None, **tolerance: float) -> None:
    """Every per-datum field of two reports, the second's rows taken in the order `index`."""
    take = (lambda t: t) if index is None else (lambda t: t[index])
    for name in ("estimate", "standard_error", "ess", "pareto_k", "elbo"):
        assert_close(getattr(a, name), take(getattr(b, name)), equal_nan=True, **tolerance)
    assert a.curve.keys() == b.curve.keys()
    for k in a.curve:
        assert_close(a.curve[k], take(b.curve[k]), **tolerance)
    assert a.num_particles == b.num_particles


@pytest.mark.usefixtures("unexamined")
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 30, 100, 1000])
def test_exactly_K_draws_however_they_are_cut(chunk_size: int | None) -> None:
    """K is exact, divisible by the chunk or not, no chunk exceeds its size, and the result is that of one shot."""
    K, x = 100, data()
    table = torch.randn(K, len(x), dtype=torch.float64)
    pair = TabledPair(table, width=1.5, shift=0.2)
    result = log_marginal(pair.model, pair.guide, x, K, chunk_size=chunk_size)
    assert sum(pair.calls) == K
    assert max(pair.calls) <= (chunk_size or K)
    once = TabledPair(table, width=1.5, shift=0.2)
    log_w = log_weights(once.model, once.guide, x, K)
    assert_same(result, summarise(log_w), **SAME)
    assert_close(result.estimate, torch.logsumexp(log_w, 0) - math.log(K), **SAME)
    assert (result.estimate - result.elbo > 0.01).all()


def test_rows_in_blocks_are_rows_one_by_one() -> None:
    """More rows than fit a block: same noise, same result; progress counts every row once."""
    n, K = 230, 20
    x = torch.randn(n, dtype=torch.float64)
    column = torch.randn(K, 1, dtype=torch.float64)  # the same noise for every datum
    seen: list[int] = []

    def pair() -> TabledPair:
        class Restarting(TabledPair):
            def guide(self, x: Tensor) -> None:
                self.calls.clear()
                super().guide(x)

        return Restarting(column.expand(K, 1), width=1.5)

    p = pair()
    whole = log_marginal(p.model, p.guide, x, K, progress=seen.append)
    assert seen[-1] == n
    assert seen == sorted(set(seen))
    order = torch.randperm(n)
    assert_same(log_marginal(p.model, p.guide, x[order], K), whole, order, **SAME)
    half = log_marginal(p.model, p.guide, x[: n // 2], K)
    assert_same(half, whole, torch.arange(n // 2), **SAME)
    single = log_marginal(p.model, p.guide, x[7:8], K)
    assert_same(single, whole, torch.tensor([7]), **SAME)


def test_constant_weights_are_exact() -> None:
    """Under the posterior: estimate = log p(x), no error, ess = K, k-hat = 0, a flat curve."""
    pair, x = GaussianPair(), data()
    result = log_marginal(pair.model, pair.guide, x, 200)
    assert_close(result.estimate, pair.log_prob(x), rtol=0, atol=1e-10)
    assert (result.standard_error < 1e-7).all()
    assert (result.pareto_k == 0).all()
    assert_close(result.ess, torch.full_like(x, 200.0), rtol=1e-9, atol=0)
    for values in result.curve.values():
        assert_close(values, pair.log_prob(x), rtol=0, atol=1e-10)
    for constant in (0.0, -1e4, 3.0):
        report = summarise(torch.full((50, 2), constant, dtype=torch.float64))
        assert_close(report.estimate, torch.full((2,), constant, dtype=torch.float64), rtol=1e-14, atol=1e-14)
        assert (report.standard_error < 1e-6).all()
        assert (report.pareto_k == 0).all()


def test_khat_tells_guides_apart_and_looks_at_the_right_tail() -> None:
    """Posterior of variance v under a guide of variance s^2: w has tail index k = 1 - s^2/v below v, and none above.

    A guide too wide has bounded weights, but 1/w is then unbounded: k-hat of -log w would call it the bad one.
    """
    x = data(20)

    def khat(width: float, sign: int = 1) -> Tensor:
        pair = GaussianPair(width)
        if sign == 1:
            return log_marginal(pair.model, pair.guide, x, 4000).pareto_k
        return pareto_k(-log_weights(pair.model, pair.guide, x, 4000))

    wide, narrow, exact = khat(1.5), khat(0.25), khat(1.0)
    assert (exact == 0).all()
    assert (wide < 0.5).all()
    assert wide.mean() < 0.2
    assert narrow.mean() > 0.7
    assert (narrow > wide.max()).all()
    assert khat(1.5, sign=-1).mean() > 0.7
    assert khat(0.25, sign=-1).mean() < 0.2


def test_khat_of_pareto_weights_is_their_shape() -> None:
    """w = u^-k for uniform u has a generalised Pareto tail of shape k."""
    u = torch.rand(20_000, 8, dtype=torch.float64)
    for k in (0.2, 0.5, 0.9):
        found = pareto_k(-k * u.log())
        assert_mean(found, k, least=0.3)
        assert found.std() < 0.15


def test_khat_is_nan_where_there_are_too_few_draws() -> None:
    """Fewer than 30 draws have no tail to fit: NaN, not a number that looks good; the estimate stays."""
    pair, x = GaussianPair(1.5), data()
    for K, enough in ((1, False), (2, False), (29, False), (30, True), (200, True)):
        result = log_marginal(pair.model, pair.guide, x, K)
        assert result.estimate.isfinite().all()
        assert bool((~result.pareto_k.isnan()).all()) == enough
        assert bool(result.standard_error.isnan().all()) == (K == 1)


def test_a_tail_of_equal_weights_is_a_light_one() -> None:
    """Two values of a discrete latent give two weights: bounded, not called equal, and no error."""
    w = torch.ones(200, 2, dtype=torch.float64)
    w[:120] = 3.0
    w[0, 1] = 2.0
    result = summarise(w.log())
    assert result.pareto_k.tolist() == [-1.0, -1.0]
    assert not result.over_threshold.any()


def test_k_threshold() -> None:
    """min(1 - 1/log10 K, 0.7)."""
    log_w = torch.randn(1, 2, dtype=torch.float64)
    for K, wanted in ((100, 0.5), (1000, 2 / 3), (10_000, 0.7), (100_000, 0.7)):
        report = summarise(log_w.expand(K, 2))
        assert report.k_threshold == pytest.approx(wanted)


def test_standard_error_and_ess_against_their_definitions() -> None:
    """se = sd(w)/(sqrt(K) mean w), ess = (sum w)^2 / sum w^2."""
    K = 50
    w = torch.rand(K, 3, dtype=torch.float64) + 0.1
    report = summarise(w.log() - 800)  # exp would underflow: the reductions stay in logs
    assert_close(report.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-10, atol=0)
    assert_close(report.standard_error, w.std(0, correction=0) / math.sqrt(K) / w.mean(0), rtol=1e-10, atol=0)
    assert_close(report.estimate, w.mean(0).log() - 800, rtol=0, atol=1e-11)
    assert_close(report.elbo, w.log().mean(0) - 800, rtol=0, atol=1e-11)


def test_standard_error_is_calibrated() -> None:
    """Over repeats: mean z-score^2 is 1, and exp(estimate)/p(x) has mean 1."""
    pair, K, repeats = GaussianPair(1.4, 0.2), 400, 400
    x = torch.full((repeats,), 0.7, dtype=torch.float64)
    result = log_marginal(pair.model, pair.guide, x, K)
    z = (result.estimate - pair.log_prob(x)) / result.standard_error
    assert_mean((result.estimate - pair.log_prob(x)).exp(), 1.0, least=0.02)
    assert_mean(z.square(), 1.0, least=0.5)
    # the errors of a mean over rows add in quadrature
    assert result.monte_carlo_error == pytest.approx(result.standard_error.square().sum().sqrt().item() / repeats)
    wanted = result.estimate.std() / math.sqrt(repeats)
    assert result.error_over_rows == pytest.approx(wanted.item())
    assert result.mean == pytest.approx(result.estimate.mean().item())
    assert math.isnan(standard_error(torch.ones(1)))


@pytest.mark.usefixtures("unexamined")
@pytest.mark.parametrize("first", [True, False])
def test_zero_weights_are_counted(first: bool) -> None:
    """log w = -inf is a weight of 0: it stays in K, in the ess and in the error; k-hat does not call it constant."""
    w = torch.rand(40, 2, dtype=torch.float64) + 0.5
    zeros = slice(0, 10) if first else slice(30, 40)
    w[zeros, 1] = 0
    model, guide = pair_of(w.log())
    result = log_marginal(model, guide, data(2), 40, chunk_size=16)
    assert_close(result.estimate, w.mean(0).log(), **SAME)
    assert_close(result.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-10, atol=0)
    assert result.elbo[1] == -math.inf
    assert result.zero_weights.tolist() == [0, 10]
    tiny = w.clone()
    tiny[zeros, 1] = 1e-30
    assert_close(result.pareto_k, log_marginal(*pair_of(tiny.log()), data(2), 40).pareto_k, **SAME)
    assert result.pareto_k[0].isfinite()
    assert result.invalid == []


@pytest.mark.usefixtures("unexamined")
@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
def test_rows_without_a_number_are_named_and_poison_the_mean(bad: float) -> None:
    """A row that underflows, overflows or is NaN is in `invalid`, and the mean is not finite: nothing is dropped."""
    log_w = torch.randn(30, 4, dtype=torch.float64)
    log_w[:, 1] = bad
    log_w[3 if bad != -math.inf else slice(None), 3] = bad
    model, guide = pair_of(log_w)
    result = log_marginal(model, guide, data(4), 30)
    assert result.invalid == [1, 3]
    assert not math.isfinite(result.mean)
    assert len(result.estimate) == 4
    assert result.pareto_k[[1, 3]].isnan().all()
    assert result.pareto_k[[0, 2]].isfinite().all()
    good = torch.logsumexp(log_w, 0) - math.log(30)
    assert_close(result.estimate[[0, 2]], good[[0, 2]], **SAME)


def test_a_seed_is_for_the_blocks_of_one_call_and_no_one_else() -> None:
    """The same numbers again, other draws in another block of equal rows, and the caller's random state untouched."""
    pair = GaussianPair(1.5)
    x = torch.ones(200, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = log_marginal(pair.model, pair.guide, x, 20, seed=5).estimate
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(log_marginal(pair.model, pair.guide, x, 20, seed=5).estimate, first)
    assert torch.equal(log_marginal(pair.model, pair.guide, x[:100], 20, seed=5).estimate, first[:100])
    assert (first[:100] != first[100:]).all()
    assert (log_marginal(pair.model, pair.guide, x, 20, seed=6).estimate != first).all()


@pytest.mark.usefixtures("unexamined")
def test_jackknife_against_its_definition() -> None:
    """K L_K less (K - 1) times the mean of L_{K-1} without each draw, even where one weight is all of the sum."""
    log_w = 5 * torch.randn(7, 4, dtype=torch.float64)
    log_w[3, 2] = 60.0
    result = log_marginal(*pair_of(log_w), data(4), 7)
    without = [log_mean_exp(torch.cat([log_w[:i], log_w[i + 1 :]])) for i in range(7)]
    assert_close(result.jackknife, 7 * log_mean_exp(log_w) - 6 * torch.stack(without).mean(0), rtol=0, atol=1e-9)
    assert log_marginal(*pair_of(log_w[:1]), data(4), 1).jackknife.isnan().all()


def test_jackknife_removes_the_bias_of_order_1_over_k() -> None:
    """Weights of variance 1 are too low by about 1/(2K) on the log scale; the jackknife is nearer by an order."""
    log_w = torch.randn(20, 40_000, dtype=torch.float64) * math.sqrt(math.log(2)) - math.log(2) / 2
    result = summarise(log_w)
    error = standard_error(result.estimate)
    assert abs(result.mean + 1 / 40) < 0.005 + 5 * error
    assert result.mean < -0.018
    assert abs(result.jackknife.mean().item()) < 0.003 + 5 * standard_error(result.jackknife)


def test_the_estimate_is_seldom_above_by_more_than_the_excess() -> None:
    """P(mean L_K >= mean log p + b/N) <= exp(-b), over repetitions, for heavy tails too; the bound says -log(P)/N."""
    result = summarise(torch.zeros(3, 4, dtype=torch.float64))
    assert result.excess() == pytest.approx(13.8155 / 4, rel=1e-4)
    assert exact(torch.zeros(4)).excess() == 0
    for scale in (0.3, 1.0, 3.0):
        log_w = scale * torch.randn(5, 4, 20_000, dtype=torch.float64) - scale**2 / 2
        means = log_mean_exp(log_w).mean(0)
        for probability in (0.3, 0.1, 0.01):
            share = (means >= -math.log(probability) / 4).double().mean().item()
            assert share <= probability


@pytest.mark.usefixtures("unexamined")
def test_a_float32_pair_is_accumulated_in_float64() -> None:
    """Reports are in double precision, and the sum over K is that of the float32 log-weights in double precision."""
    K = 20_000
    log_w = -1000 + 0.1 * torch.randn(K, 2, dtype=torch.float32)
    report = log_marginal(*pair_of(log_w), data(2).float(), K)
    done = log_weights(*pair_of(log_w), data(2).float(), K).double()
    wanted = torch.logsumexp(done, 0) - math.log(K)
    assert report.estimate.dtype == report.elbo.dtype == report.standard_error.dtype == torch.float64
    assert_close(report.estimate, wanted, rtol=0, atol=1e-10)
    assert_close(report.elbo, done.mean(0), rtol=0, atol=1e-10)
    single = torch.logsumexp(done.float(), 0).double() - math.log(K)
    assert (single - wanted).abs().max() > 1e-7, "float32 would have passed"


@pytest.mark.usefixtures("unexamined")
def test_curve() -> None:
    """Bounds for k = 1, 2, 5, ... from disjoint groups of the same draws: first the elbo, last the estimate, rising."""
    assert curve_sizes(1) == [1]
    assert curve_sizes(10) == [1, 2, 5, 10]
    assert curve_sizes(73) == [1, 2, 5, 10, 20, 50, 73]
    pair, x, K = GaussianPair(1.6, 0.3), data(), 73
    table = torch.randn(K, len(x), dtype=torch.float64)
    tabled = TabledPair(table, width=1.6, shift=0.3)
    result = log_marginal(tabled.model, tabled.guide, x, K, chunk_size=10)
    assert list(result.curve) == [1, 2, 5, 10, 20, 50, 73]
    assert_close(result.curve[1], result.elbo, **SAME)
    assert_close(result.curve[K], result.estimate, **SAME)
    again = TabledPair(table, width=1.6, shift=0.3)
    log_w = log_weights(again.model, again.guide, x, K)
    for k in (2, 5, 20, 50):
        groups = [log_w[i * k : (i + 1) * k].exp().mean(0).log() for i in range(K // k)]
        assert_close(result.curve[k], torch.stack(groups).mean(0), **SAME)
    many = log_marginal(pair.model, pair.guide, x.repeat(100), 100)
    means = [values.mean() for values in many.curve.values()]
    assert all(a < b for a, b in pairwise(means))
    assert (pair.log_prob(x).mean() - means[-1]).abs() < 0.02


def test_dropout_is_off_and_modes_come_back() -> None:
    """Evaluation runs every module in evaluation mode and leaves each as it was, also after an error."""
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, dropout=0.5)), MeanFieldNormal(MLP(4, dropout=0.5), 2)).double()
    vae.likelihood.decoder.eval()
    modes = [m.training for m in vae.modules()]
    assert True in modes
    assert False in modes
    seen: list[bool] = []
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, *_: seen.append(m.training))
    x = torch.ones(3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    first = log_marginal(vae.model, vae.guide, x, 50)
    assert seen
    assert not any(seen)
    assert [m.training for m in vae.modules()] == modes
    vae.eval()
    torch.manual_seed(1)
    assert_same(log_marginal(vae.model, vae.guide, x, 50), first, **SAME)
    vae.train()
    with pytest.raises(ValueError, match="event shape"):
        log_marginal(vae.model, vae.guide, torch.ones(3, 5, dtype=torch.float64), 50)
    assert all(m.training for m in vae.modules())


def test_no_gradient_is_kept() -> None:
    """Evaluation builds no graph."""
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, 4)), MeanFieldNormal(MLP(4), 2))
    result = log_marginal(vae.model, vae.guide, torch.ones(3, 4), 10)
    assert not result.estimate.requires_grad
    assert log_weights(vae.model, vae.guide, torch.ones(3, 4), 10).requires_grad


@pytest.mark.parametrize("bad", [0, -3, 1.5, True, "10"])
def test_bad_numbers_are_refused_by_name(bad) -> None:
    """K and chunk_size are whole numbers of at least 1."""
    pair = GaussianPair()
    with pytest.raises(UsageError, match=r"num_particles \(K\)"):
        log_marginal(pair.model, pair.guide, data(), bad)
    with pytest.raises(UsageError, match="chunk_size"):
        log_marginal(pair.model, pair.guide, data(), 10, chunk_size=bad)


@pytest.mark.parametrize("bad", [[1.0, 2.0], torch.zeros(()), torch.zeros(0, 3), None])
def test_bad_data_is_refused(bad) -> None:
    """x is a tensor with rows."""
    pair = GaussianPair()
    with pytest.raises(UsageError, match=r"x: expected a tensor of shape \(N, \*event\)"):
        log_marginal(pair.model, pair.guide, bad, 10)


def test_exact_is_an_estimate_without_error() -> None:
    """What a model with a closed form reports: K = 0, no error, double precision."""
    values = torch.tensor([-1.0, -2.5], requires_grad=True)
    report = exact(values)
    assert_close(report.estimate, torch.tensor([-1.0, -2.5], dtype=torch.float64), **SAME)
    assert (report.standard_error == 0).all()
    assert (report.num_particles, report.mean, report.monte_carlo_error) == (0, -1.75, 0.0)
