"""The mixture guide: the gradient of its draws against quadrature, and on a pair whose posterior is a mixture."""

import math
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.inference import ELBO, IWAE, StickingTheLanding, fit, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import Widened
from pyrovae.inference.tracing import compiler
from pyrovae.models import MLP, VAE, Gaussian, MixtureOfNormals, StandardNormal
from pyrovae.models.mixture_guide import ReparameterisedMixture


class Mixture(nn.Module):
    """Three Gaussians of Z elements with parameters of their own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(1.2 * torch.randn(3, dim, dtype=torch.float64))
        self.log_scale = nn.Parameter(0.4 * torch.randn(3, dim, dtype=torch.float64) - 0.3)
        self.logits = nn.Parameter(0.5 * torch.randn(3, dtype=torch.float64))

    def forward(self) -> ReparameterisedMixture:
        normals = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return ReparameterisedMixture(dist.Categorical(logits=self.logits), normals)


def integrand(z: Tensor) -> Tensor:
    """Something that is different in every direction, shape (*batch,)."""
    return (2 * z[..., 0]).tanh() + z[..., 0].sin() * z[..., -1] + 0.3 * z.square().sum(-1)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_of_draws_is_that_of_quadrature(dim: int) -> None:
    """d/dphi E h(z), for weights, means and scales, to 5 standard errors; without the weights' part it is not."""
    q = Mixture(dim)
    parameters = list(q.parameters())
    axis = torch.linspace(-10, 10, 601, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    integral = (q().log_prob(points).exp() * integrand(points)).sum() * (axis[1] - axis[0]) ** dim
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(integral, parameters)])
    assert (wanted[-3:].abs() > 0.1).any()
    found = []
    for _ in range(200):
        mean = integrand(q().rsample(torch.Size([1000]))).mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)]))
    assert_mean(torch.stack(found), wanted, least=0.05)


def test_draws_are_those_of_the_components_under_any_plates() -> None:
    """The value of a draw with a gradient is that without one, and plates draw anew for each particle and datum."""
    q = Mixture(2)
    torch.manual_seed(1)
    with_gradient = q().expand((5, 4)).rsample()
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(q().expand((5, 4)).rsample(), with_gradient)
    assert with_gradient.shape == (5, 4, 2)
    assert len(with_gradient.detach().flatten().unique()) == 40


class Bimodal(nn.Module):
    """p(z) two Gaussians of the plane, x|z ~ N(z, s^2 I): the posterior is two Gaussians, and the guide can be it."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
        self.scale = torch.tensor([[0.7, 0.4], [0.5, 0.8]], dtype=torch.float64)
        self.weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
        self.noise = 0.9
        self.offset = nn.Parameter(torch.zeros(2, 5, dtype=torch.float64))  # of the guide from the posterior

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            normals = dist.Normal(self.loc, self.scale).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(self.weight), normals))
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)

    def evidence(self, x: Tensor) -> Tensor:
        """log pi_c + log p(x|c) of each component, shape (N, C)."""
        total = (self.scale.square() + self.noise**2).sqrt()
        return self.weight.log() + dist.Normal(self.loc, total).to_event(1).log_prob(x.unsqueeze(-2))

    def guide(self, x: Tensor) -> None:
        gain = self.scale.square() / (self.scale.square() + self.noise**2)
        loc = self.loc + gain * (x.unsqueeze(-2) - self.loc) + self.offset[:, :2]
        scale = gain.sqrt() * self.noise * self.offset[:, 2:4].exp()
        weights = dist.Categorical(logits=self.evidence(x) + self.offset[:, 4])
        with pyro.plate("data", len(x)):
            pyro.sample("z", ReparameterisedMixture(weights, dist.Normal(loc, scale.expand_as(loc)).to_event(1)))


def test_at_a_posterior_of_two_modes_every_weight_is_its_evidence() -> None:
    """log w = log p(x) for every draw; sticking the landing has no gradient for any draw, the ELBO's only on average.

    Roeder et al. 2017, for a guide whose draws have a gradient through weights as well.
    """
    pair, x = Bimodal(), torch.randn(6, 2, dtype=torch.float64)
    log_p = pair.evidence(x).logsumexp(-1)
    assert_close(log_weights(pair.model, pair.guide, x, 50), log_p.expand(50, -1), **EXACT)
    gradients: dict[str, list[Tensor]] = {"sticking": [], "total": []}
    sticking = ELBO(gradient=StickingTheLanding())
    losses = {"sticking": sticking(pair.model, pair.guide), "total": ELBO()(pair.model, pair.guide)}
    for _ in range(100):
        for name, loss in losses.items():
            gradients[name].append(torch.autograd.grad(loss(x), pair.offset)[0].flatten())
    assert torch.stack(gradients["sticking"]).abs().max() < 1e-10
    total = torch.stack(gradients["total"])
    assert total.std(0).min() > 0.1
    assert_mean(total, 0.0)


def test_weights_means_and_scales_are_learned() -> None:
    """From a guide that is wrong in all of them, training by the ELBO ends at log p(x)."""
    pair, x = Bimodal(), torch.randn(40, 2, dtype=torch.float64)
    with torch.no_grad():
        pair.offset.copy_(torch.tensor([[0.3, -0.3, 0.4, -0.4, 1.5], [-0.3, 0.2, -0.4, 0.4, -1.0]]))
    log_p = pair.evidence(x).logsumexp(-1).mean().item()
    optimiser, loss = torch.optim.Adam(pair.parameters(), lr=0.05), ELBO(5)(pair.model, pair.guide)

    def gap() -> float:
        with torch.no_grad():
            return log_p - log_weights(pair.model, pair.guide, x, 500).mean().item()

    assert gap() > 0.3
    for _ in range(150):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
    assert gap() < 0.01
    assert pair.offset[:, 4].diff().abs() < 0.2  # the weights' own; a common factor is none


def vae() -> VAE:
    torch.manual_seed(3)
    guide = MixtureOfNormals(MLP(4, hidden=(8,)), 3, components=2)
    return VAE(StandardNormal(3), Gaussian(MLP(3, 4, hidden=(8,))), guide)


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(3), ELBO(2, gradient=StickingTheLanding())], ids=repr)
def test_traced_training_is_that_of_the_pair(objective: ELBO | IWAE) -> None:
    """Weights after a few epochs, by the recorded graph and without."""
    x, trained = torch.randn(20, 4), []
    for how in ("on", "off"):
        model = vae()
        with patch.object(compiler, "inductor", lambda graph, inputs: graph):
            options = {"batch_size": 10, "epochs": 3, "seed": 0, "progress": False, "compile": how}
            result = fit(model.model, model.guide, x, objective, **options)
        assert result.compiled == (how == "on"), result.notices
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-5)
    start = torch.cat([p.detach().flatten() for p in vae().parameters()])
    assert (trained[0] - start).abs().max() > 1e-3


def test_widened_mixtures_are_wider_and_weighed_right() -> None:
    """Of each component, the standard deviations are multiplied, and the mean weight stays p(x)."""
    pair, x = Bimodal(), torch.randn(3, 2, dtype=torch.float64)
    log_p = pair.evidence(x).logsumexp(-1)
    sampler = Widened(scales=(2.0,), share=0.0)(Pair(pair.model, pair.guide), Batch(x))
    ratios = (sampler(4000) - log_p).exp()
    assert (ratios.std(0) > 0.3).all()
    assert_mean(ratios, 1.0, least=0.15)
    result = log_marginal(pair.model, pair.guide, x, 10)
    assert math.isclose(result.mean, log_p.mean().item(), abs_tol=1e-9)
