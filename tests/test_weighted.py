"""Objectives with a weight: their penalties against closed forms, their value where the weight is that of the ELBO."""

import itertools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import DIP, ELBO, WAE, BetaTC, Factor, FreeBits, InfoVAE, fit, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.weighted import _log_weights, mmd, total_correlation
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, VAE, Critic, FullCovarianceNormal, Gaussian, MeanFieldNormal, StandardNormal
from pyrovae.runs.build import build_objective
from pyrovae.runs.recipe import Recipe

SCALE = 0.3  # of q(z|x) in the pair of known codes


def known(means: Tensor) -> tuple:
    """A pair whose q(z|x) is N(x, SCALE^2 I), p(z) = N(0, I), and draws of it at rows `means`."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, SCALE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, SCALE).to_event(1))

    return model, guide, draw(Pair(model, guide), Batch.of(means), 2 if len(means) < 500 else 1)


def correlated(rows: int, correlation: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    return torch.randn(rows, 2, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_stratified_weights_have_the_expectation_of_the_whole_data_set(rows: int) -> None:
    """Over all batches that hold the row whose draw it is, of 6 rows in all, the weighed sum is q(z) on average."""
    torch.manual_seed(0)
    q = torch.rand(6, dtype=torch.float64)  # of one draw of row 0 under each row
    weights = _log_weights(rows, 6, True, q).exp()[:, 0]
    for place in range(rows):  # wherever the row stands in the batch
        sums = []
        for others in itertools.permutations(range(1, 6), rows - 1):
            batch = [*others[:place], 0, *others[place:]]
            sums.append((weights[place] * q[batch]).sum())
        assert_close(torch.stack(sums).mean(), q.mean(), **EXACT)
    assert_close(weights.sum(1), torch.ones(rows, dtype=torch.float64), **EXACT)
    assert_close(weights.diagonal(), torch.full((rows,), 1 / 6, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_total_correlation_of_a_gaussian(correlation: float) -> None:
    """q(z) of many rows is N(0, C + SCALE^2 I): -1/2 log(1 - r^2), r its correlation."""
    *_, particles = known(correlated(1000, correlation))
    found = total_correlation(particles, 1000)
    truth = -0.5 * math.log(1 - (correlation / (1 + SCALE**2)) ** 2)
    assert abs(found.mean() - truth) < 5 * found.std() / math.sqrt(1000) + 0.005
    shifted = total_correlation(particles, 1000, stratified=False)
    assert_close((shifted - found).mean().item(), math.log(1000), rtol=1e-3, atol=1e-3)


def test_total_correlation_of_a_batch_is_near_that_of_all_rows() -> None:
    means = correlated(2000, 0.8)
    truth = -0.5 * math.log(1 - (0.8 / (1 + SCALE**2)) ** 2)
    of_batches = torch.stack([total_correlation(known(rows)[2], 2000).mean() for rows in means.split(200)])
    assert abs(of_batches.mean() - truth) < 0.1 * truth + 3 * of_batches.std() / math.sqrt(10)


@pytest.mark.parametrize("covariance", ["means", "draws"])
def test_dip_is_the_distance_of_the_covariance_from_the_identity(covariance: str) -> None:
    means = correlated(100, 0.5)
    *_, particles = known(means)
    off, on = DIP(covariance=covariance).penalised(particles, {})
    c = torch.cov(means.T, correction=0) + (
        SCALE**2 * torch.eye(2, dtype=torch.float64) if covariance == "draws" else 0
    )
    assert_close(off, torch.full_like(off, 2 * c[0, 1].item() ** 2), **EXACT)
    assert_close(on, torch.full_like(on, (c.diagonal() - 1).square().sum().item()), **EXACT)


def test_mmd_of_two_samples_of_one_distribution_is_0_on_average_and_else_above() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 400, 20, 3, dtype=torch.float64)
    same, other = mmd(a, b), mmd(a, b + 1)
    assert abs(same.mean()) < 4 * same.std() / 20
    assert (same < 0).any()  # unbiased
    assert other.mean() > 20 * other.std() / 20
    one = torch.randn(1, 2, 3, dtype=torch.float64)  # a pair of points each, by hand
    k = lambda x, y: sum(6 * s / (6 * s + (x - y).square().sum()) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)) / 7  # noqa: E731
    x, y = one[0], a[0, :2]
    hand = k(x[0], x[1]) + k(y[0], y[1]) - sum(k(i, j) for i in x for j in y) / 2
    assert_close(mmd(x[None], y[None])[0], hand, **EXACT)


def test_free_bits_lift_each_kl_to_its_floor() -> None:
    means = correlated(50, 0.0) * torch.tensor([1.0, 0.01], dtype=torch.float64)
    *_, particles = known(means)
    kl = 0.5 * (SCALE**2 + means.square() - 1 - math.log(SCALE**2))
    log_likelihood = particles.log_likelihood.mean(0)
    for nats in (0.0, 1.0, 5.0):
        objective = FreeBits(2, nats=nats)
        found = objective.combine(objective.terms(particles), **objective.settings(0))
        assert_close(found, log_likelihood - kl.mean(0).clamp(min=nats).sum(), **EXACT)
        objective = FreeBits(2, nats=nats, group="site")
        found = objective.combine(objective.terms(particles), **objective.settings(0))
        assert_close(found, log_likelihood - max(kl.sum(1).mean().item(), nats), **EXACT)


def vae(guide: type = MeanFieldNormal) -> VAE:
    torch.manual_seed(0)
    return VAE(StandardNormal(2), Gaussian(MLP(2, 4, (8,))), guide(MLP(4, hidden=(8,)), 2), critic=Critic(2, (16,)))


EVERY = [FreeBits(2), BetaTC(40, 2), DIP(2), Factor(2), InfoVAE(2), WAE(2)]


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: o.word)
def test_what_is_reported_is_the_elbo_and_a_weight_of_nothing_too(objective) -> None:
    """Without settings `combine` is the ELBO of the same draws; with a weight of none it is so but for WAE."""
    pair, x = vae(), torch.randn(40, 4)
    particles = draw(Pair(pair.model, pair.guide), Batch.of(x), 2)
    elbo = ELBO(2).of(particles)
    assert_close(objective.of(particles), elbo)
    assert objective.evaluated == ELBO(2)
    (key,) = objective.settings(0)
    nothing = {key: 1.0 if isinstance(objective, BetaTC) else 0.0}
    found = objective.combine(objective.terms(particles), **nothing)
    if isinstance(objective, WAE):
        assert_close(found, particles.log_likelihood.mean(0))
    else:
        assert_close(found.mean(), elbo.mean())
    if not isinstance(objective, Factor):  # whose critic knows nothing yet
        much = objective.combine(objective.terms(particles), **{key: 50.0})
        assert much.mean() < found.mean()  # a penalty: the more of it, the lower


@pytest.mark.slow
@pytest.mark.parametrize("objective", [BetaTC(40, 2), Factor(2), WAE(2)], ids=lambda o: o.word)
def test_they_train_compiled_as_eagerly(objective) -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for how in ("off", "on"):
        pair = vae()
        fitted = fit(pair.model, pair.guide, x, objective, epochs=2, batch_size=20, seed=0, progress=False, compile=how)
        found.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
        assert (fitted.compile_seconds > 0) == (how == "on")
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", [BetaTC(600), Factor()], ids=lambda o: o.word)
def test_a_weight_of_the_total_correlation_lowers_it(objective) -> None:
    """Trained with little and much of it on the same data, codes of correlated factors become independent."""
    torch.manual_seed(0)
    x = correlated(600, 0.9).float() @ torch.randn(2, 4) + 0.1 * torch.randn(600, 4)
    left = []
    for weight in (1.0, 30.0):
        pair = vae()
        fit(
            pair.model,
            pair.guide,
            x,
            replace(objective, weight=weight),
            epochs=40,
            batch_size=100,
            seed=0,
            progress=False,
        )
        particles = draw(Pair(pair.model, pair.guide), Batch.of(x), 1)
        left.append(total_correlation(particles, 600).mean().item())
    assert left[1] < 0.5 * left[0]
    assert left[1] > -0.05


def test_a_critic_finds_the_density_ratio_of_a_gaussian() -> None:
    """Trained alone on draws of N(0, C), its mean output is the total correlation."""
    x = correlated(2000, 0.8).float()
    critic = Critic(2, (64, 64))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, SCALE).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            critic(pyro.sample("z", dist.Normal(x, SCALE).to_event(1)))

    fit(model, guide, x, Factor(weight=0.0), epochs=60, batch_size=100, seed=0, progress=False)
    ratio, _ = Factor(4).penalised(draw(Pair(model, guide), Batch.of(x), 4), {})
    truth = -0.5 * math.log(1 - (0.8 / (1 + SCALE**2)) ** 2)
    assert abs(ratio.mean().item() - truth) < 0.1 * truth


def test_the_last_epoch_is_kept_of_what_is_no_bound() -> None:
    x = correlated(200, 0.9).float() @ torch.randn(2, 4)
    pair = vae()
    how = {"epochs": 5, "batch_size": 50, "seed": 0, "progress": False, "compile": "off"}
    assert fit(pair.model, pair.guide, x, WAE(weight=0.0), validation=x[:50], **how).best_epoch == 5
    with pytest.raises(UsageError, match="by an objective that is no bound the last epoch is kept"):
        fit(pair.model, pair.guide, x, WAE(), validation=x[:50], patience=2, **how)


@pytest.mark.parametrize(
    ("options", "message"),
    {
        ("beta-tc", "gradient", "score-function"): "is not of `elbo=beta-tc`",
        ("factor", "model", "hierarchical"): "needs a critic of the codes, which a hierarchical has not",
        ("wae", "patience", 3): "which is no bound, the last epoch is kept",
        ("beta-tc", "beta", 2.0): "a weighted KL is not a bound",
    }.items(),
)
def test_a_recipe_of_them(options: tuple, message: str) -> None:
    elbo, key, value = options
    given = {"elbo": {"name": elbo, "weight": 3.0}}
    recipe = Recipe(**given)
    assert Recipe(**recipe.plain()) == recipe
    assert recipe.plain()["elbo"]["weight"] == 3.0
    assert Recipe(elbo="iwae").plain()["elbo"] == "iwae"
    assert build_objective(recipe, 1, 500).weight == 3.0
    assert getattr(build_objective(recipe, 1, 500), "num_rows", 500) == 500
    with pytest.raises(UsageError, match=message):
        Recipe(**given, **{key: value})


def test_what_cannot_be_penalised_is_refused() -> None:
    x = torch.randn(40, 4)
    full = vae(FullCovarianceNormal)
    with pytest.raises(PairError, match="its guide does not factorise over them; use FreeBits"):
        FreeBits().bound(full.model, full.guide, x)
    FreeBits(group="site").bound(full.model, full.guide, x)
    BetaTC(40).bound(full.model, full.guide, x)  # whose marginals are Gaussians
    pair = vae()
    pair.critic = None
    with pytest.raises(PairError, match="Factor needs a critic in the guide"):
        Factor().bound(pair.model, pair.guide, x)
    with pytest.raises(PairError, match="batches of 2 to 30 rows, those of the data set, got 40"):
        BetaTC(30).bound(pair.model, pair.guide, x)
    with pytest.raises(PairError, match="an MMD needs vectors of at least 2 rows"):
        WAE().bound(pair.model, pair.guide, x[:1])
    assert log_marginal(pair.model, pair.guide, x[:3], 10).estimate.shape == (3,)
    assert replace(BetaTC(40), weight=2.0) != BetaTC(40)
