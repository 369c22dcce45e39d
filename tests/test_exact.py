"""Linear Gaussian models: log p(x) is exact, and where a fit ends the likelihood is highest."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import assert_mean
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as Oracle
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

import pyrovae
from pyrovae.errors import DataError, UsageError
from pyrovae.models import PPCA, FactorAnalysis
from pyrovae.models.exact import RELATIVE_FLOOR

D, Q = 6, 2


def rows(count: int = 200, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of an anisotropic Gaussian far from the origin."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator, dtype=dtype) * torch.tensor(
        [3.0, 2.0, 1.0, 0.5, 0.3, 0.2], dtype=dtype
    )
    return torch.randn(count, D, generator=generator, dtype=dtype) @ mixing.T + 5


def fitted(x: Tensor, components: int = Q) -> PPCA:
    model = PPCA(x.shape[1:], components).to(x.dtype)
    assert model.fit(x) == 1
    return model


def test_log_prob_is_that_of_its_gaussian_written_out() -> None:
    """N(x; mu, W W' + s^2 I) with the covariance inverted by brute force, also for images."""
    x = rows()
    model = fitted(x)
    covariance = model.weight @ model.weight.T + (2 * model.log_scale).exp() * torch.eye(D, dtype=x.dtype)
    assert_close(model.log_prob(x), MultivariateNormal(model.loc, covariance).log_prob(x))
    images = x.unflatten(1, (1, 2, 3))
    assert_close(fitted(images).log_prob(images), model.log_prob(x))


@pytest.mark.parametrize("components", [1, 2, 3])
def test_it_is_the_pca_of_scikit_learn(components: int) -> None:
    """Row by row, once the variances are over N - 1, as scikit-learn has them."""
    x = rows()
    model = fitted(x, components)
    with torch.no_grad():
        model.weight.mul_(math.sqrt(len(x) / (len(x) - 1)))
        model.log_scale.add_(0.5 * math.log(len(x) / (len(x) - 1)))
    wanted = PCA(components, svd_solver="full").fit(x.numpy()).score_samples(x.numpy())
    assert_close(model.log_prob(x), torch.from_numpy(wanted))


def test_the_closed_form_is_the_maximum() -> None:
    """The gradient vanishes there, other parameters are worse, and more components are better on the same rows."""
    x = rows()
    model = fitted(x)
    best = model.log_prob(x).mean()
    gradients = torch.autograd.grad(best, list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-9
    for seed in range(5):
        other = fitted(x)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        assert other.log_prob(x).mean() < best
    values = [fitted(x, components).log_prob(x).mean().item() for components in range(1, D)]
    assert values == sorted(values)


def test_samples_are_of_its_density() -> None:
    model = fitted(rows())
    torch.manual_seed(0)
    x, means = model.sample(20_000), model.sample(20_000, mean=True)
    with torch.no_grad():
        noise = (2 * model.log_scale).exp() * torch.eye(D, dtype=x.dtype)
        for drawn, covariance in ((x, model.weight @ model.weight.T + noise), (means, model.weight @ model.weight.T)):
            assert_mean(drawn, model.loc)
            centred = drawn - model.loc
            assert_mean((centred.unsqueeze(2) * centred.unsqueeze(1)).flatten(1), covariance.flatten())


def test_single_precision_rows_and_constant_elements() -> None:
    """Moments are summed in double precision; a constant element has the least variance and not none."""
    x = rows(dtype=torch.float32)
    assert_close(fitted(x).double().log_prob(x), fitted(x.double()).log_prob(x.double()), rtol=1e-5, atol=1e-5)
    flat = torch.cat([rows()[:, :2], torch.ones(200, 4, dtype=torch.float64)], 1)
    assert fitted(flat).log_prob(flat).isfinite().all()


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"components: expected a whole number from 1 to 5, .* got 6"):
        PPCA(D, D)
    with pytest.raises(UsageError, match="event_shape: expected positive sizes"):
        PPCA(0)
    model = PPCA(D, Q).double()
    with pytest.raises(UsageError, match=r"x: expected event shape \(6,\), got a tensor of \(4, 5\)"):
        model.log_prob(torch.zeros(4, 5))
    with pytest.raises(UsageError, match="x: expected more rows than the 2 components, got 2"):
        model.fit(rows(2))
    with pytest.raises(DataError, match="x: expected finite values, got 1 that"):
        model.log_prob(torch.full((1, D), 0.0).index_fill(1, torch.tensor([0]), math.inf))
    with pytest.raises(DataError, match="variance 0"):
        model.fit(torch.ones(10, D))
    with pytest.raises(UsageError, match="num_samples"):
        model.sample(0)


@pytest.mark.parametrize("cls", [PPCA, FactorAnalysis])
def test_em_never_falls_and_ends_at_the_maximum(cls: type[PPCA] | type[FactorAnalysis]) -> None:
    """From the random start of the constructor; mean log p(x) of its history is that of the model left behind."""
    x = rows()
    best, model = cls(D, Q).double(), cls(D, Q).double()
    best.fit(x)
    history = model.em(x, max_iterations=5000, tolerance=1e-12)
    assert min(b - a for a, b in pairwise(history)) > -1e-12
    assert history[-1] - history[0] > 1
    assert history[-1] == pytest.approx(model.log_prob(x).mean().item(), abs=1e-12)
    assert history[-1] == pytest.approx(best.log_prob(x).mean().item(), abs=1e-7)


@pytest.mark.parametrize("components", [1, 2, 3])
def test_factor_analysis_is_that_of_scikit_learn(components: int) -> None:
    """At its parameters row by row, and the same maximum, found by another way."""
    generator = torch.Generator().manual_seed(components)
    loadings, z = (torch.randn(n, components, generator=generator, dtype=torch.float64) for n in (12, 2000))
    noise = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    x = z @ loadings.T + noise * torch.randn(2000, 12, generator=generator, dtype=torch.float64) + 5
    oracle = Oracle(components, tol=1e-10, max_iter=5000, svd_method="lapack").fit(x.numpy())
    model = FactorAnalysis(12, components).double()
    assert model.fit(x) < oracle.n_iter_ / 3
    found = model.log_prob(x).mean().item()
    assert found == pytest.approx(oracle.score(x.numpy()), rel=1e-10)
    with torch.no_grad():
        model.loc.copy_(torch.from_numpy(oracle.mean_))
        model.weight.copy_(torch.from_numpy(oracle.components_.T.copy()))
        model.log_scale.copy_(torch.from_numpy(oracle.noise_variance_).log() / 2)
    assert_close(model.log_prob(x), torch.from_numpy(oracle.score_samples(x.numpy())), rtol=1e-10, atol=1e-10)


def test_factor_analysis_is_stationary_and_matches_every_variance() -> None:
    """No gradient is left, and diag(W W' + Psi) is the variance of each element."""
    x = rows()
    model = FactorAnalysis(D, Q).double()
    model.fit(x)
    gradients = torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5
    variances = (model.weight.square().sum(1) + (2 * model.log_scale).exp()).detach()
    assert_close(variances, x.var(0, correction=0), rtol=1e-5, atol=1e-8)


def test_factor_analysis_of_equal_noise_is_probabilistic_pca() -> None:
    """With the same parameters; free noise is better on the same rows, and does not mind the units of an element."""
    x = rows()
    pca, factors, other = fitted(x), FactorAnalysis(D, Q).double(), FactorAnalysis(D, Q).double()
    with torch.no_grad():
        factors.loc.copy_(pca.loc)
        factors.weight.copy_(pca.weight)
        factors.log_scale.copy_(pca.log_scale.expand(D))
    assert_close(factors.log_prob(x), pca.log_prob(x))
    factors.fit(x)
    assert factors.log_prob(x).mean() > pca.log_prob(x).mean()
    units = torch.tensor([1.0, 10.0, 1e6, 0.1, 1e-4, 1.0], dtype=x.dtype)
    other.fit(units * x)
    assert_close(other.log_prob(units * x) + units.log().sum(), factors.log_prob(x), rtol=1e-4, atol=1e-4)


def test_a_constant_element_of_factor_analysis_has_the_least_variance() -> None:
    flat = torch.cat([rows()[:, :3], torch.ones(200, 3, dtype=torch.float64)], 1)
    model = FactorAnalysis(D, Q).double()
    model.fit(flat)
    assert model.log_prob(flat).isfinite().all()
    noise = (2 * model.log_scale).exp()
    assert_close(noise[3:], (RELATIVE_FLOOR * flat.var(0, correction=0).mean()).expand(3), rtol=1e-6, atol=0)


def test_one_decomposition_serves_all_numbers_of_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are those that are fit one by one."""
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(matrix), eigh(matrix))[1])
    x = rows()
    found = [model for model, _ in PPCA.fitted(x, x, [1, 2, 5, 10])]
    assert len(calls) == 1
    assert [model.components for model in found] == [1, 2, 5]
    for model in found:
        assert torch.equal(model.log_prob(x), fitted(x, model.components).log_prob(x))


@pytest.mark.slow
def test_a_run_of_it_keeps_the_maximum(tmp_path: Path) -> None:
    """Training starts where `fit` ends; what the run reports is the exact log p(x) of its test rows."""
    options = {"data": "three-gaussians", "model": {"name": "ppca", "components": 1}, "epochs": 1, "lr": 1e-6}
    run = pyrovae.train({**options, "device": "cpu", "seed": 0}, tmp_path / "run", plots=False)
    rows = run.rows()
    wanted = PPCA(2, 1).double()
    wanted.fit(rows.train)
    found = run.evaluation["log_marginal"]
    assert found == pytest.approx(wanted.log_prob(rows.test[: run.evaluation["rows"]]).mean().item(), abs=1e-3)
