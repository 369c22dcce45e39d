"""A pair's latents as one vector: densities change by |dz/du|, on both sides alike."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import PairError
from pyrovae.inference import Individual, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.weights import draw

X = torch.tensor([[0.3, -1.0], [2.0, 0.4], [-0.7, 0.1]], dtype=torch.float64)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(b, a.unsqueeze(-1)).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Normal(x / 2, 0.5).to_event(1))
        pyro.sample("a", dist.LogNormal(x.new_zeros(()), 0.5))


def test_densities_of_u() -> None:
    """u = (log a, b): log p(u) = log p(a, b) + log a, log q(u) likewise, so that weights are the same."""
    torch.manual_seed(0)
    space = Unconstrained(Pair(model, guide), Batch(X))
    particles = draw(Pair(model, guide), Batch(X), 5)
    u = space.join(particles)
    a = particles.latents["a"].value
    assert_close(u, torch.cat([a.log().unsqueeze(-1), particles.latents["b"].value], -1))
    at = space(u)
    assert_close(at.log_likelihood, particles.log_likelihood)
    assert_close(at.log_prior, particles.log_prior + a.log())
    assert_close(at.log_guide, particles.log_guide + a.log())
    assert_close(at.log_joint - at.log_guide, particles.log_weights)
    assert_close(space.log_joint(u), at.log_joint)
    values, log_det = space.split(u)
    assert_close(values["a"], a)
    assert_close(log_det, a.log())


def test_a_support_that_moves_is_refused_by_name() -> None:
    """The bijection of a site must not depend on another latent."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))

    with pytest.raises(PairError, match="model site 'b': its support depends on other latents"):
        Unconstrained(Pair(model, guide), Batch(torch.ones(3)))


def test_a_mixture_is_as_unconstrained_as_its_components() -> None:
    """z from two Gaussians in two dimensions: log p(x) is that of two Gaussians, drawn from one fitted to each row."""
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)

    def mixture(x: Tensor, noise: float = 0.0) -> dist.MixtureSameFamily:
        scale = x.new_tensor(1 + noise**2).sqrt().expand(2)
        return dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2, dtype=x.dtype)), dist.Normal(means, scale).to_event(1)
        )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", mixture(x))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x, 0.6).to_event(1))

    x = torch.randn(4, 2, dtype=torch.float64)
    result = log_marginal(model, guide, x, 2000, proposal=Individual(steps=50), seed=0)
    exact = mixture(x, 0.5).log_prob(x)
    assert ((result.estimate - exact).abs() < 5 * result.standard_error).all()
    assert (result.standard_error < 0.05).all()
