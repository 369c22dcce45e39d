"""A flow as prior: its density is exact, and it learns what a standard normal cannot be."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, fit, log_marginal
from pyrovae.models import MLP, VAE, Bernoulli, FlowPrior, MeanFieldNormal, Prior, StandardNormal


def flow(latent_dim: int, layers: int = 3) -> FlowPrior:
    """A flow in double precision, far from the identity."""
    torch.manual_seed(0)
    prior = FlowPrior(latent_dim, layers, hidden=8).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2).add_(0.5 * torch.randn_like(parameter))
    return prior


def test_the_density_integrates_to_1() -> None:
    with torch.no_grad():
        p = flow(2)()
        reach = 1.2 * p.sample((5000,)).abs().max(0).values
        axes = [torch.linspace(-r, r, 801, dtype=torch.float64) for r in reach.tolist()]
        cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
        assert p.log_prob(torch.cartesian_prod(*axes)).exp().sum().item() * cell == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_log_prob_of_samples_is_the_change_of_variables(latent_dim: int) -> None:
    """log p(z) = log N(u; 0, I) - log |det dz/du|, the determinant by autograd; other elements than u itself move."""
    p = flow(latent_dim)()

    def push(u: torch.Tensor) -> torch.Tensor:
        for transform in p.transforms:
            u = transform(u)
        return u

    for u in torch.randn(5, latent_dim, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(push, u)
        wanted = dist.Normal(0.0, 1.0).log_prob(u).sum() - torch.linalg.slogdet(jacobian).logabsdet
        assert_close(p.log_prob(push(u).detach()), wanted)
    assert (jacobian.abs().sum(0) > 0).all()
    assert jacobian.abs().min(dim=1).values.max() > 1e-3  # a full row: no element is left alone


def test_plates_and_copies() -> None:
    prior = flow(3)
    p = prior().expand((4, 5))
    z = p.rsample()
    assert z.shape == (4, 5, 3)
    assert_close(p.log_prob(z), prior().log_prob(z.detach()))
    copy.deepcopy(prior)  # nothing of the last graph is kept
    assert list(prior.state_dict()) == [name for name, _ in prior.named_parameters()]


def test_it_starts_near_the_standard_normal() -> None:
    torch.manual_seed(0)
    z = torch.randn(100, 4)
    assert (FlowPrior(4)().log_prob(z) - StandardNormal(4)().log_prob(z)).abs().max() < 0.5


def test_one_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match=r"latent_dim: .* at least 2.*, got 1"):
        FlowPrior(1)


def trained(prior: Prior, epochs: int, compile: str) -> tuple[list[float], VAE]:
    """The training bounds of a pair with this prior on binary digits, and the pair."""
    x = binary_digits()
    torch.manual_seed(0)
    pair = VAE(prior, Bernoulli(MLP(2, (64,), hidden=(50,))), MeanFieldNormal(MLP(64, hidden=(50,)), 2))
    pair.initialise(x)
    settings = {"epochs": epochs, "seed": 1, "compile": compile, "progress": False}
    kept = fit(pair.model, pair.guide, x, ELBO(), optimizer=lambda p: torch.optim.Adam(p, 3e-3), **settings)
    return kept.metrics["train_bound"].tolist(), pair


def binary_digits() -> torch.Tensor:
    return (load_data("digits").rows("mass").train[:600].flatten(1) > 0.5).float()


@pytest.mark.slow
def test_it_learns_a_better_bound_than_the_standard_normal() -> None:
    """In two latent dimensions; log p(x) of the same pair, by importance sampling, is higher too."""
    torch.manual_seed(2)
    (plain, standard), (flowed, flow) = (
        trained(prior, 60, "off") for prior in (StandardNormal(2), FlowPrior(2, 3, 16))
    )
    assert flowed[-1] > plain[-1] + 0.2
    x = binary_digits()[:200]
    values = [log_marginal(pair.model, pair.guide, x, 500, seed=1).mean for pair in (standard, flow)]
    assert values[1] > values[0] + 0.2


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_pair() -> None:
    torch.manual_seed(2)
    prior = FlowPrior(2, 2, 8)
    eager, compiled = (trained(copy.deepcopy(prior), 2, compile)[0] for compile in ("off", "on"))
    assert compiled == pytest.approx(eager, rel=1e-5)
