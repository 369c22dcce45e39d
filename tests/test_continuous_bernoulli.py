"""The continuous Bernoulli: a density on [0, 1], normalised whatever its parameter."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import assert_mean
from torch import Tensor
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli
from torch.testing import assert_close

from pyrovae.errors import DataError
from pyrovae.models import MLP, ContinuousBernoulli
from pyrovae.models.tilted_uniform import NEAR_0, TiltedUniform, eta_of, mean_of

# Where the series ends, where torch's begins to clamp, and where dark pixels are.
ETAS = (0.0, 1e-6, 1e-3, 2 * NEAR_0 - 1e-3, 2 * NEAR_0 + 1e-3, 1.0, -3.0, 15.0, 30.0, -100.0, -500.0, 1000.0)


@cache
def quadrature() -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights that integrate any of the densities to 1e-10."""
    points, weights = np.polynomial.legendre.leggauss(1000)
    return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)


@pytest.mark.parametrize("eta", ETAS)
def test_the_density_integrates_to_1_and_has_its_mean(eta: float) -> None:
    x, weights = quadrature()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        p = TiltedUniform(torch.tensor(eta, dtype=dtype))
        density = p.log_prob(x.to(dtype)).double().exp()
        assert abs((density * weights).sum().item() - 1) < tolerance
        assert abs((density * weights * x).sum().item() - p.mean.item()) < tolerance


@pytest.mark.parametrize("eta", [eta for eta in ETAS if abs(eta) < 15])
def test_it_is_that_of_torch_where_torch_does_not_clamp(eta: float) -> None:
    x, logits = torch.linspace(0, 1, 11).double(), torch.tensor(eta).double()
    assert_close(TiltedUniform(logits).log_prob(x), TorchContinuousBernoulli(logits=logits).log_prob(x))


@pytest.mark.parametrize("eta", ETAS)
def test_samples_have_the_mean_and_gradients_are_those_of_the_density(eta: float) -> None:
    """d log p(x) / d eta = x - mean, on both sides of the series' end; samples move with eta by -(dF/d eta) / p."""
    parameter = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    p, x = TiltedUniform(parameter), torch.tensor(0.3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(p.log_prob(x), parameter)
    assert_close(gradient, x - mean_of(parameter.detach()), rtol=0, atol=1e-10)
    torch.manual_seed(0)
    samples = p.expand((20_000,)).rsample()
    assert ((samples >= 0) & (samples <= 1)).all()
    assert_mean(samples.detach()[:, None], p.mean.detach()[None])
    (slope,) = torch.autograd.grad(samples.mean(), parameter)
    variance = (samples - p.mean).square().mean().item()  # the derivative of the mean
    assert slope.item() == pytest.approx(variance, rel=0.05)


def test_a_mean_has_its_eta() -> None:
    eta = torch.tensor(ETAS, dtype=torch.float64)
    assert_close(eta_of(mean_of(eta)), eta, rtol=1e-6, atol=1e-9)


def test_a_pair_starts_at_the_mean_of_its_data_and_refuses_what_is_outside() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 3) ** torch.tensor([0.2, 1.0, 5.0])
    likelihood = ContinuousBernoulli(MLP(2, (3,), hidden=(4,)))
    with torch.no_grad():
        for parameter in likelihood.decoder.parameters():
            parameter.zero_()
    likelihood.initialise(x)
    assert_close(likelihood(torch.zeros(1, 2)).mean[0], x.mean(0), rtol=1e-4, atol=1e-4)
    likelihood.check_support(x)
    for wrong in (
        torch.tensor([[-0.1, 0.5, 0.5]]),
        torch.tensor([[0.1, 1.5, 0.5]]),
        torch.tensor([[0.1, 0.5, torch.nan]]),
    ):
        with pytest.raises(DataError, match=r"x: a continuous Bernoulli likelihood has support \[0, 1\], got .* 1 el"):
            likelihood.check_support(wrong)
