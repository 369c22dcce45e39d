"""EM on rows with gaps: it climbs the exact log p of what is seen, and ends where nothing is left to gain."""

import itertools
import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from conftest import EXACT, SOLVED
from torch import Tensor
from torch.distributions import Bernoulli, MultivariateNormal
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import DataError
from pyrovae.models import PPCA, BernoulliMixture, Exact, FactorAnalysis, GaussianMixture, MixtureOfFactorAnalysers
from pyrovae.models.exact import best_on
from pyrovae.models.mixture import Mixture
from pyrovae.runs.baseline import fit_baselines

COVARIANCES = ("full", "diagonal", "tied", "spherical")
D = 4


def clouds(rows: int = 300, apart: float = 3.0) -> Tensor:
    """Two correlated clouds."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, D, D, generator=generator, dtype=torch.float64)
    cloud = torch.rand(rows, generator=generator) < 0.4
    noise = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return torch.einsum("nij,nj->ni", mixing[cloud.long()], noise) + apart * cloud.unsqueeze(1) + 5


def with_gaps(x: Tensor, share: float = 0.3) -> Tensor:
    """The same rows with gaps; the first is whole, nothing is seen of the second."""
    generator = torch.Generator().manual_seed(1)
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < share, math.nan)
    x[1] = math.nan
    return x


def bits(rows: int = 300, apart: float = 3.0) -> Tensor:
    return (clouds(rows, apart) > 6).double()


MAKERS: list[tuple[str, Callable[[], Exact], Callable[..., Tensor]]] = [
    *((kind, lambda kind=kind: GaussianMixture(D, 2, kind, floor=0.0), clouds) for kind in COVARIANCES),
    ("bernoulli", lambda: BernoulliMixture(D, 2), bits),
    ("ppca", lambda: PPCA(D, 2), clouds),
    ("analysers", lambda: MixtureOfFactorAnalysers(D, 2, 1), clouds),
    ("factors", lambda: FactorAnalysis(D, 1), clouds),
]
EVERY = pytest.mark.parametrize(("make", "rows"), [case[1:] for case in MAKERS], ids=[case[0] for case in MAKERS])


def built(make: Callable[[], Exact]) -> Exact:
    torch.manual_seed(0)
    return make().double()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_density_of_a_row_is_that_of_its_seen_block(covariance: str) -> None:
    """By hand, component by component and row by row; a row of which nothing is seen has log p = 0."""
    x = with_gaps(clouds(40))
    mixture = built(lambda: GaussianMixture(D, 2, covariance))
    mixture.initialise(x)
    wanted = []
    for row in x:
        seen = ~row.isnan()
        parts = [
            MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(row[seen])
            if seen.any()
            else torch.zeros((), dtype=torch.float64)
            for mean, covariance in zip(mixture.means, mixture.covariances, strict=True)
        ]
        wanted.append((mixture.weights.log() + torch.stack(parts)).logsumexp(0))
    assert_close(mixture.log_prob(x), torch.stack(wanted), **SOLVED)
    assert abs(mixture.log_prob(x)[1]) < 1e-12
    assert_close(mixture.responsibilities(x)[1], mixture.weights, **SOLVED)


@pytest.mark.parametrize("cls", [PPCA, FactorAnalysis])
def test_the_density_of_a_row_of_a_linear_model_is_that_of_its_seen_block(
    cls: type[PPCA] | type[FactorAnalysis],
) -> None:
    x, model = with_gaps(clouds(40)), built(lambda: cls(D, 2))
    model.fit(clouds())
    noise = (2 * model.log_scale).exp().expand(D).diag()
    covariance = model.weight @ model.weight.T + noise
    for row, found in zip(x, model.log_prob(x), strict=True):
        seen = ~row.isnan()
        if seen.any():
            assert_close(MultivariateNormal(model.loc[seen], covariance[seen][:, seen]).log_prob(row[seen]), found)


def test_the_mass_of_a_row_is_the_sum_over_what_is_missing() -> None:
    mixture, x = built(lambda: BernoulliMixture(D, 2)), with_gaps(bits(20))
    whole = torch.tensor(list(itertools.product([0.0, 1.0], repeat=D)), dtype=torch.float64)
    masses = mixture.log_prob(whole).exp()
    for row, found in zip(x, mixture.log_prob(x), strict=True):
        alike = ((whole == row) | row.isnan()).all(1)
        assert_close(masses[alike].sum().log(), found, **EXACT)


@EVERY
def test_em_gains_at_every_step_and_ends_where_nothing_is_left(make: Callable[[], Exact], rows: Callable) -> None:
    """No step is undone, and in the end the gradient of log p of what is seen, by every parameter, is zero."""
    x, model = with_gaps(rows()), built(make)
    steps = 25 if isinstance(model, Mixture) else 100
    if isinstance(model, Mixture):
        model.initialise(x)
    history = model.em(x, max_iterations=steps, tolerance=0.0)
    assert len(history) == steps + 1
    assert all(after > before - 1e-9 for before, after in itertools.pairwise(history))
    assert history[-1] - history[0] > 1e-3
    assert history[-1] == pytest.approx(model.log_prob(x).mean().item(), abs=1e-9)
    model.em(x, max_iterations=4000, tolerance=1e-11)
    gradients = torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 5e-4


@EVERY
def test_a_fit_to_rows_with_gaps_is_near_that_of_whole_ones(make: Callable[[], Exact], rows: Callable) -> None:
    """On other rows, whole: within 0.05 nats, where a fit to rows filled with medians loses more."""
    x, others = rows(4000, apart=9.0).split(2000)
    gaps = with_gaps(x, 0.4)
    scores = []
    for data in (x, gaps, gaps.where(~gaps.isnan(), gaps.nanmedian(0).values)):
        model = built(make)
        model.fit(data)
        scores.append(model.log_prob(others).mean().item())
    assert abs(scores[0] - scores[1]) < 0.05
    assert scores[0] - scores[2] > 0.1


def test_parameters_are_recovered_from_rows_with_gaps() -> None:
    """Weights, means and covariances of two clouds, two fifths of all elements missing."""
    truth = built(lambda: GaussianMixture(3, 2))
    with torch.no_grad():
        truth.means.copy_(torch.tensor([[0.0, 0, 0], [4, 4, 0]]))
        truth.unit_lower[:, 1, 0] = torch.tensor([0.8, -0.8])
        truth.mixing_logits.copy_(torch.tensor([0.7, 0.3]).log())
    x = with_gaps(truth.sample(6000), 0.4)
    model = built(lambda: GaussianMixture(3, 2))
    model.fit(x)
    order = model.means[:, 0].argsort()
    assert_close(model.weights[order], truth.weights, rtol=0, atol=0.03)
    assert_close(model.means[order], truth.means, rtol=0, atol=0.12)
    assert_close(model.covariances[order], truth.covariances, rtol=0, atol=0.2)


def test_more_masks_than_are_looked_at_together_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = with_gaps(clouds(60))
    found = []
    for most in (2**20, D**2 * 7):
        monkeypatch.setattr("pyrovae.models.mixture.CHUNK", most)
        monkeypatch.setattr("pyrovae.models.linear_gaussian.MOST_NUMBERS", most)
        models = [built(lambda: GaussianMixture(D, 2)), built(lambda: PPCA(D, 2))]
        found.append([(model.fit(x), model.log_prob(x).detach())[1] for model in models])
    for one, two in zip(*found, strict=True):
        assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_families_are_tried_on_rows_with_gaps() -> None:
    """The number of components that is best for what is seen of other rows; infinite elements are no gaps."""
    x, others = with_gaps(clouds()), with_gaps(clouds(600)[300:])
    chosen = best_on(PPCA.fitted(x, others, (1, 2, 3)), others)
    assert chosen is not None
    assert chosen.log_prob(others).isfinite().all()
    for model in (PPCA(D, 1), GaussianMixture(D, 1), BernoulliMixture(D, 1)):
        with pytest.raises(DataError, match=r"x: expected"):
            model.log_prob(torch.full((1, D), math.inf))


def test_a_mass_of_bits_with_gaps_is_the_product_over_what_is_seen() -> None:
    """Of one component: probabilities are the shares of ones among what is seen."""
    x, model = with_gaps(bits()), built(lambda: BernoulliMixture(D, 1))
    model.fit(x)
    shares = x.nanmean(0)
    assert_close(model.means[0].detach(), shares, **EXACT)
    each = Bernoulli(shares).log_prob(x.nan_to_num(0.0)).where(~x.isnan(), 0.0)
    assert_close(model.log_prob(x).detach(), each.sum(1), **SOLVED)


def test_the_baseline_of_continuous_columns_does_not_mind_their_units() -> None:
    """Full covariance beside products, above them; log p falls by the logarithms of the units and no more."""
    x = with_gaps(clouds(500, apart=9.0))
    unit = torch.tensor([1.0, 1e-3, 1e4, 10.0], dtype=torch.float64)
    found = []
    for data in (x, x * unit):
        frame = pd.DataFrame(data.numpy(), columns=list("abcd"))
        rows = load_data(frame, columns="a=continuous,b=continuous,c=continuous,d=continuous", missing=True)
        found.append((rows := rows.rows("columns"), fit_baselines(rows, (1, 2, 3))))
    (rows, (products, full)), (others, (_, scaled)) = found
    assert "Gaussians, full covariance" in full.description
    assert "products over columns" in products.description
    assert full.log_prob(rows.test).mean() > products.log_prob(rows.test).mean() + 0.3
    seen = (~rows.test.isnan()).double()
    wanted = full.log_prob(rows.test.double()) - seen @ unit.log()
    assert_close(scaled.log_prob(others.test.double()), wanted, rtol=0, atol=1e-3)
