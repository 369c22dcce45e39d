"""Mixtures of factor analysers: against dense Gaussians, against one factor analyser, and on digits."""

import math

import pytest
import torch
from conftest import EXACT, SOLVED
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import UsageError
from pyrovae.models import FactorAnalysis, GaussianMixture, MixtureOfFactorAnalysers
from pyrovae.models.linear_gaussian import RELATIVE_FLOOR

D, Q, C = 6, 2, 3
NOISES = pytest.mark.parametrize("noise", ["shared", "per-component"])


def rows(n: int = 400) -> Tensor:
    """Of three planes in six dimensions, with noise of different size in each element."""
    c = torch.arange(n) % C
    centre, weight = 4 * torch.randn(C, D).double(), torch.randn(C, D, Q).double()
    z, noise = torch.randn(n, Q, 1).double(), torch.randn(n, D).double()
    return centre[c] + (weight[c] @ z).squeeze(-1) + noise * torch.linspace(0.1, 1, D).double()


def dense(model: MixtureOfFactorAnalysers) -> MixtureSameFamily:
    """The same density by covariances of D by D."""
    noise = (2 * model.log_scale).exp().expand(model.components, -1)
    covariance = model.weight @ model.weight.mT + torch.diag_embed(noise)
    parts = MultivariateNormal(model.means.flatten(1), covariance)
    return MixtureSameFamily(Categorical(probs=model.weights), parts)


@NOISES
def test_log_p_is_that_of_dense_gaussians(noise: str) -> None:
    model = MixtureOfFactorAnalysers((2, 3), components=C, factors=Q, noise=noise).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    x = 2 * torch.randn(50, 2, 3).double()
    assert_close(model.log_prob(x), dense(model).log_prob(x.flatten(1)), **EXACT)
    seen = torch.tensor([[True, False, True], [True, True, False]])
    away, at = dense(model), seen.flatten()
    part = away.component_distribution
    of_seen = MultivariateNormal(part.loc[:, at], part.covariance_matrix[:, at][:, :, at])
    wanted = MixtureSameFamily(away.mixture_distribution, of_seen).log_prob(x.flatten(1)[:, at])
    assert_close(model.log_prob_seen(x, seen), wanted, **SOLVED)


@NOISES
def test_one_component_is_factor_analysis(noise: str) -> None:
    """Its maximum, which factor analysis is taken to by a descent of another kind."""
    x = torch.randn(300, Q).double() @ torch.randn(Q, D).double() + torch.randn(300, D).double()
    one, alone = MixtureOfFactorAnalysers(D, 1, Q, noise).double(), FactorAnalysis(D, Q).double()
    alone.fit(x)
    one.initialise(x)
    one.em(x, max_iterations=1000, tolerance=1e-14)
    assert_close(one.log_prob(x).mean(), alone.log_prob(x).mean(), **SOLVED)
    assert_close(one.log_prob(x), alone.log_prob(x), rtol=0, atol=1e-4)


@NOISES
def test_em_never_falls_and_finds_the_planes(noise: str) -> None:
    """From a start away from k-means too; and log p(x) of new rows is near that of the truth."""
    x = rows(900)
    model = MixtureOfFactorAnalysers(D, C, Q, noise).double()
    model.initialise(x[:600])
    with torch.no_grad():
        model.means.add_(torch.randn_like(model.means))
        model.weight.copy_(torch.randn_like(model.weight))
    start = model.log_prob(x[:600]).mean()
    history = torch.tensor(model.em(x[:600], max_iterations=300, tolerance=1e-9))
    assert_close(history[0].double(), start, rtol=1e-6, atol=0)
    assert (history.diff() >= 0).all()
    assert history[-1] > history[0] + 1
    own = GaussianMixture(D, C).double()
    own.fit(x[600:])  # the same family and more, fit to the rows themselves
    assert model.log_prob(x[600:]).mean() > own.log_prob(x[600:]).mean() - 0.3


def test_a_component_without_rows_keeps_its_parameters_and_constant_elements_their_floor() -> None:
    x = rows()
    x[:, 1] = 3.0
    model = MixtureOfFactorAnalysers(D, C, Q, "per-component").double()
    model.initialise(x)
    with torch.no_grad():
        model.means[2] = 1e6
    before = model.weight[2].clone()
    model.em(x, max_iterations=5)
    assert_close(model.weight[2], before, rtol=0, atol=0)
    assert model.weights[2] < 1e-30
    assert model.log_prob(x).isfinite().all()
    floor = RELATIVE_FLOOR * x.var(0, correction=0).mean()
    assert_close(model.log_scale[:2, 1], floor.log().expand(2) / 2, **SOLVED)


def test_more_factors_than_elements_are_refused_and_the_default_has_fewer() -> None:
    with pytest.raises(UsageError, match=r"factors: expected a whole number from 1 to 2, .* got 3"):
        MixtureOfFactorAnalysers(3, factors=3)
    with pytest.raises(UsageError, match="factors: expected a whole number from 1 to 0"):
        MixtureOfFactorAnalysers(1)
    assert [MixtureOfFactorAnalysers(d).factors for d in (2, 4, 100)] == [1, 3, 5]


def test_on_digits_it_is_above_one_analyser_and_a_diagonal_mixture() -> None:
    """Held-out log p(x), paired: by far more than five errors of the difference."""
    data = load_data("digits").rows("density")
    x, held_out = data.transform(data.train).double(), torch.cat([data.validation, data.test]).double()
    models = [
        MixtureOfFactorAnalysers((1, 8, 8), 10, 5),
        FactorAnalysis((1, 8, 8), 5),
        FactorAnalysis((1, 8, 8), 25),
        GaussianMixture((1, 8, 8), 10, "diagonal"),
    ]
    scores = []
    for model in models:
        model.double().fit(x)
        scores.append(model.log_prob(held_out).detach())
    for other in scores[1:]:
        gain = scores[0] - other
        assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain)) > 0
