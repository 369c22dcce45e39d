"""Draws at a temperature: the noise of latents times t, by moments in closed form; with t = 1, the draws themselves."""

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.models import (
    MLP,
    VAE,
    ConditionalVAE,
    FlowPrior,
    Gaussian,
    HierarchicalVAE,
    MaskedAutoregressivePrior,
    MeanFieldNormal,
    MixtureOfGaussians,
    NeuralSplinePrior,
    OrnsteinUhlenbeck,
    Prior,
    StandardNormal,
    StudentTPrior,
    UnconditionalPrior,
)
from pyrovae.models.flows import Flowed
from pyrovae.models.temperature import tempered
from pyrovae.runs.directory import open_run
from pyrovae.runs.looking import look
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.training import train
from pyrovae.runs.ways import way_of

T = 0.5


def moments(p: dist.Distribution, number: int = 40_000) -> tuple[Tensor, Tensor]:
    """Draws, and those of it at a temperature."""
    return p.sample((number,)), tempered(p, T).sample((number,))


GAUSSIANS: dict[str, dist.Distribution] = {
    "diagonal": dist.Normal(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double()).to_event(1),
    "full": dist.MultivariateNormal(
        torch.tensor([1.0, -2.0]).double(), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    ),
    "low rank": dist.LowRankMultivariateNormal(
        torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0], [0.5]]).double(), torch.tensor([0.3, 2.0]).double()
    ),
    "in plates": dist.Normal(torch.tensor([1.0, -2.0]).double(), 1.0).to_event(1).expand((3,)),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_gaussian_keeps_its_mean_and_has_t_squared_of_its_covariance(name: str) -> None:
    """So that its log-density is 1/t^2 of what it was, up to a constant."""
    p = GAUSSIANS[name]
    cool = tempered(p, T)
    assert_close(cool.mean, p.mean)
    assert_close(cool.variance, T**2 * p.variance)
    z = torch.randn(5, *p.batch_shape, 2, dtype=torch.float64)
    constant = cool.log_prob(z) - p.log_prob(z) / T**2
    assert_close(constant, constant[:1].expand_as(constant), **EXACT)


def test_components_of_a_mixture_are_narrower_and_as_likely() -> None:
    prior = MixtureOfGaussians(2, components=2).double()
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([[-8.0, 0.0], [8.0, 0.0]]))
        prior.logits.copy_(torch.tensor([0.3, 0.7]).log())
        wide, cool = moments(prior())
    assert_mean((cool[:, 0] > 0).double(), 0.7, least=0.05)
    right = cool[cool[:, 0] > 0] - torch.tensor([8.0, 0.0])
    assert_mean(right.square(), T**2 * prior().component_distribution.variance[1].detach())
    assert (wide[wide[:, 0] > 0] - torch.tensor([8.0, 0.0])).square().mean() > 2 * right.square().mean()


@pytest.mark.parametrize("tails", ["marginal", "multivariate"])
def test_a_student_t_has_scales_times_t(tails: str) -> None:
    prior = StudentTPrior(2, df=9.0, tails=tails).double()
    p = prior()
    assert_close(tempered(p, T).variance, T**2 * p.variance)


def test_a_process_has_its_noise_scaled() -> None:
    """Of a Gaussian process that is t^2 of its covariance."""
    process = OrnsteinUhlenbeck(6, (3, 1)).double()
    with torch.no_grad():
        wide, cool = moments(process())
        assert_mean(cool.square(), torch.full((6,), T**2).double(), least=0.02)
        assert_mean(cool[:, 0] * cool[:, 2], T**2 * (wide[:, 0] * wide[:, 2]).mean().item(), least=0.05)


@pytest.mark.parametrize("cls", [FlowPrior, MaskedAutoregressivePrior, NeuralSplinePrior])
def test_a_flow_has_its_noise_scaled(cls: type[Prior]) -> None:
    """f(t u) of the same u, and its density is the change of variables."""
    prior = cls(2, layers=2, hidden=4).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        cool = tempered(prior(), T)
        torch.manual_seed(5)
        draw = cool.sample((200,))
        torch.manual_seed(5)
        u = torch.randn(200, 2, dtype=torch.float64)
        assert_close(back(prior(), draw), T * u, **EXACT)
        noise = dist.Normal(0.0, 1.0).log_prob
        wanted = prior().log_prob(draw) - noise(T * u).sum(-1) + noise(u).sum(-1) - 2 * math.log(T)
        assert_close(cool.log_prob(draw), wanted, **EXACT)


def back(p: dist.Distribution, z: Tensor) -> Tensor:
    """The noise that a flow makes z of."""
    if isinstance(p, Flowed):
        return p.flow.inverse((z - p.loc) / p.scale)[0]
    for transform in reversed(p.transforms):
        z = transform.inv(z)
    return z


def linear() -> HierarchicalVAE:
    """z2 ~ N(0, 1), z1|z2 and x|z1 of unit lines, with scales 0.5 and 0.3."""
    made = HierarchicalVAE(
        StandardNormal(1),
        [MeanFieldNormal(MLP(1, hidden=()), 1)],
        Gaussian(MLP(1, 1, hidden=()), scale=0.3),
        [MeanFieldNormal(MLP(1, hidden=()), 1), MeanFieldNormal(MLP(1, hidden=()), 1)],
    ).double()
    with torch.no_grad():
        head = made.conditionals[0].head
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, 0.5]).expm1().log())
        head.bias[0] = 0
        for parameter, value in zip(made.likelihood.decoder.parameters(), (1.0, 0.0), strict=True):
            parameter.fill_(value)
    return made


def test_every_layer_is_scaled_and_x_is_not() -> None:
    """Var x = t^2 (1 + 0.5^2) + 0.3^2; at t = 1 the draws of p(x) themselves, to the bit."""
    pair = linear()
    assert_mean(pair.sample(60_000, temperature=T).square(), T**2 * 1.25 + 0.09, least=0.02)
    torch.manual_seed(1)
    plain = pair.sample(5)
    torch.manual_seed(1)
    assert torch.equal(pair.sample(5, temperature=1.0), plain)


def test_a_conditional_pair_is_scaled_in_z() -> None:
    pair = ConditionalVAE(
        UnconditionalPrior(StandardNormal(1)),
        Gaussian(MLP(1 + 1, 1, hidden=()), scale=0.3),
        MeanFieldNormal(MLP(1 + 1, hidden=()), 1),
    ).double()
    with torch.no_grad():
        for parameter, value in zip(pair.likelihood.decoder.parameters(), ([[1.0, 2.0]], [0.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    x = pair.sample(60_000, torch.tensor([3.0]).double(), temperature=T)
    assert_mean((x - 6).square(), T**2 + 0.09, least=0.02)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "half"])
def test_a_temperature_is_a_number_above_0(value) -> None:
    with pytest.raises(UsageError, match="temperature: expected a number above 0, got"):
        linear().sample(3, temperature=value)


def test_a_prior_without_noise_to_scale_is_refused() -> None:
    class Laplace(StandardNormal):
        def forward(self) -> dist.Distribution:
            return dist.Laplace(self.loc, 1.0).to_event(1)

    pair = VAE(Laplace(2), Gaussian(MLP(2, 3)), MeanFieldNormal(MLP(3), 2))
    assert pair.sample(3).shape == (3, 3)
    with pytest.raises(UsageError, match="temperature: Laplace has no noise that could be scaled"):
        pair.sample(3, temperature=0.5)


def test_the_command_says_that_draws_are_none_of_p_x(tmp_path) -> None:
    """And draws as `sample` does; a model without p(z) is refused."""
    options = {
        "data": "ring", "latent_dim": [2], "network": {"name": "mlp", "hidden": [8]}, "epochs": 1, "seed": 1,
        "eval_rows": 20, "eval_K": 10, "device": "cpu", "compile": "off", "batch_size": 500,
    }  # fmt: skip
    train(options, tmp_path / "a", plots=False)
    way = way_of({"temperature": "0.5", "n": "40"})
    looked = look(str(tmp_path / "a"), {})
    torch.manual_seed(3)
    made = way(looked, 0)
    torch.manual_seed(3)
    assert_close(made.variables["x"][1], open_run(tmp_path / "a").model().sample(40, temperature=0.5))
    assert "at temperature 0.5, not of p(x)" in made.said[0]
    for options in ({"model": "ppca"}, {"model": "pca"}):
        other = replace(looked, run=replace(looked.run, recipe=Recipe(data="ring", **options)))
        with pytest.raises(UsageError, match=f"temperature: not used, since a {options['model']} has no p"):
            way(other, 0)
