"""Student t as a prior: its density is exact however heavy the tails, and tells elements from vectors."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, assert_mean
from test_flow_prior import trained
from torch import Tensor
from torch.testing import assert_close

from pyrovae.models import StandardNormal, StudentTPrior

KINDS = ("marginal", "multivariate")


def prior(tails: str, df: float, latent_dim: int = 2) -> StudentTPrior:
    """In double precision, with a location and scales of its own."""
    made = StudentTPrior(latent_dim, df=df, tails=tails).double()
    with torch.no_grad():
        made.loc.copy_(torch.linspace(-1, 2, latent_dim))
        made.raw_scale.copy_(torch.linspace(-0.5, 1, latent_dim))
    return made


def plane(p: dist.Distribution) -> tuple[Tensor, Tensor]:
    """Points (P, 2) of the plane and probabilities (P,), by x = sinh(t): the tails fall off exponentially in t."""
    t = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    step = (t[1] - t[0]).item()
    points, at = torch.cartesian_prod(t.sinh(), t.sinh()), torch.cartesian_prod(t.cosh(), t.cosh()).prod(-1)
    return points, p.log_prob(points).exp() * at * step**2


@pytest.mark.parametrize("tails", KINDS)
@pytest.mark.parametrize("df", [0.7, 1.0, 3.0])
def test_the_density_integrates_to_1_and_is_what_is_sampled(tails: str, df: float) -> None:
    """Without a mean or a variance as well: by bounded functions of z, which know how far out elements are together."""
    with torch.no_grad():
        p = prior(tails, df)()
        points, mass = plane(p)
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)

        def bounded(z: Tensor) -> Tensor:
            far = z**2 / (16 + z**2)
            return torch.cat([z.tanh(), far, far.prod(-1, keepdim=True), (z[:, :1] * z[:, 1:]).tanh()], -1)

        assert_mean(bounded(p.sample((20_000,))), mass @ bounded(points))


def test_the_vector_is_a_scale_mixture_of_gaussians() -> None:
    """p(z) = E N(z; m, diag s^2 nu / v) over v ~ chi^2_nu: by quadrature over v, and Pyro's own as well."""
    made = prior("multivariate", 3.0, 3)
    p = made()
    v = torch.linspace(1e-4, 60, 200_001, dtype=torch.float64)
    weight = dist.Chi2(torch.tensor(3.0, dtype=torch.float64)).log_prob(v).exp() * (v[1] - v[0])
    z = torch.randn(4, 3, dtype=torch.float64) * 3
    for row in z:
        gaussian = dist.Normal(p.loc, p.scale * (3 / v).sqrt().unsqueeze(-1)).log_prob(row).sum(-1)
        assert p.log_prob(row).exp().item() == pytest.approx((weight * gaussian.exp()).sum().item(), rel=1e-4)
    assert_close(p.log_prob(z), dist.MultivariateStudentT(p.df, p.loc, torch.diag(p.scale)).log_prob(z), **EXACT)


def test_one_element_is_the_same_either_way_and_many_degrees_are_a_gaussian() -> None:
    z = torch.randn(5, 1, dtype=torch.float64) * 4
    marginal, multivariate = (prior(tails, 2.5, 1)().log_prob(z) for tails in KINDS)
    assert_close(marginal, multivariate, **EXACT)
    z = torch.randn(5, 3, dtype=torch.float64)
    for tails in KINDS:
        p = prior(tails, 1e7, 3)()
        scale = torch.nn.functional.softplus(torch.linspace(-0.5, 1, 3, dtype=torch.float64))
        wanted = dist.Normal(torch.linspace(-1, 2, 3, dtype=torch.float64), scale).to_event(1).log_prob(z)
        assert_close(p.log_prob(z), wanted, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("tails", KINDS)
def test_degrees_of_freedom_are_learned_from_draws(tails: str) -> None:
    """Maximum likelihood of 4000 draws of 3 degrees, from 5: nearer than the error of such an estimate, thrice."""
    torch.manual_seed(1)
    truth, made = prior(tails, 3.0), StudentTPrior(2, tails=tails).double()
    z = truth().sample((4000,)).detach()
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -made().log_prob(z).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert abs(made.log_df.exp().item() - 3) < 0.5
    assert_close(made.loc.detach(), truth.loc.detach(), rtol=0.0, atol=0.15)


def test_given_degrees_stay() -> None:
    names = dict(StudentTPrior(2, df=4.0).named_parameters())
    assert set(names) == {"loc", "raw_scale"}
    assert StudentTPrior(2, df=4.0)().base_dist.df[0].item() == pytest.approx(4)


def test_moments_are_there_where_they_exist() -> None:
    for df, mean, variance in ((0.7, False, math.nan), (1.5, True, math.inf), (3.0, True, None)):
        p = prior("multivariate", df)()
        assert bool(p.mean.isfinite().all()) == mean
        if variance is None:
            assert_close(p.variance, 3 * p.scale.square())
        else:
            assert_close(p.variance, torch.full((2,), variance, dtype=torch.float64), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("tails", KINDS)
def test_compiled_steps_are_those_of_the_pair(tails: str) -> None:
    made = StudentTPrior(2, tails=tails)
    eager, compiled = (trained(copy.deepcopy(made), 2, compile)[0] for compile in ("off", "on"))
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert eager != trained(StandardNormal(2), 2, "off")[0]
