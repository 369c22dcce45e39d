"""Guides with auxiliary latents: the extended model has the p(x) of the model, whatever r(a|x, z) is."""

import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, log_weights
from pyrovae.inference.annealed import simulate
from pyrovae.inference.batch import Batch
from pyrovae.inference.diagnostics import measure
from pyrovae.inference.information import split_kl
from pyrovae.inference.pair import Pair
from pyrovae.inference.simulation import simulated
from pyrovae.inference.units import use_of_units
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, AuxiliaryVAE, Bernoulli, Gaussian, MeanFieldNormal, StandardNormal
from pyrovae.models.guides import SCALE_FLOOR, Guide


def linear(weight: Tensor, bias: Tensor | float, scale: Tensor | float) -> Guide:
    """N(weight input + bias, scale^2)."""
    size, inputs = weight.shape
    part = MeanFieldNormal(MLP(inputs, hidden=()), size).double()
    with torch.no_grad():
        part.head.weight.zero_()
        part.head.weight[:size] = weight
        part.head.bias[:size] = torch.as_tensor(bias, dtype=weight.dtype)
        part.head.bias[size:] = (torch.as_tensor(scale, dtype=weight.dtype) - SCALE_FLOOR).expm1().log()
    return part


def exact_pair() -> tuple[AuxiliaryVAE, Tensor, Tensor]:
    """x | z ~ N(W z, s^2 I) with z of two correlated elements under the posterior, which a of one element makes.

    The posterior N(M x, C) has C = c c' + diag(d^2): q(a|x) = N(0, 1), q(z|a, x) = N(c a + M x, d^2), and r is
    p(a | z, x) of these two.
    """
    torch.manual_seed(0)
    w, s = torch.tensor([[1.0, 0.8], [0.9, -0.3], [0.4, 1.1]], dtype=torch.float64), 0.6
    c = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + w.T @ w / s**2)
    m = c @ w.T / s**2
    # Of a correlation rho, the shares of both variances that a makes: |rho| each.
    rho = c[0, 1] / (c[0, 0] * c[1, 1]).sqrt()
    shared = (c.diagonal() * rho.abs()).sqrt() * torch.stack([torch.ones_like(rho), rho.sign()])
    own = (c.diagonal() * (1 - rho.abs())).sqrt()
    network = MLP(2, 3, hidden=()).double()
    with torch.no_grad():
        (layer,) = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
        layer.weight.copy_(w)
        layer.bias.zero_()
    gain = shared / own.square() / (1 + (shared / own).square().sum())  # E a | z = gain (z - M x)
    spread = 1 / (1 + (shared / own).square().sum()).sqrt()
    pair = AuxiliaryVAE(
        StandardNormal(2),
        Gaussian(network, scale=s),
        MLP(3, hidden=()),
        linear(torch.zeros(1, 3, dtype=torch.float64), 0.0, 1.0),
        linear(torch.cat([shared[:, None], m], 1), 0.0, own),
        linear(torch.cat([gain[None], -(gain @ m)[None]], 1), 0.0, spread),
    ).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    log_p = dist.MultivariateNormal(
        torch.zeros(3).double(), w @ w.T + s**2 * torch.eye(3, dtype=torch.float64)
    ).log_prob(x)
    return pair, x, log_p


def test_diagonal_factors_make_a_correlated_posterior() -> None:
    """Every log-weight is log p(x), though z has a correlation that no diagonal q(z|x) has."""
    pair, x, log_p = exact_pair()
    correlation = torch.corrcoef(pair.posterior(x[:1]).sample((4000,))[:, 0].T)[0, 1]
    assert correlation.abs() > 0.2
    assert_close(log_weights(pair.model, pair.guide, x, 7), log_p.expand(7, -1), rtol=0.0, atol=1e-8)


def random_pair() -> AuxiliaryVAE:
    """One z, one a, and bits as data; networks with random weights."""
    torch.manual_seed(1)
    pair = AuxiliaryVAE(
        StandardNormal(1),
        Bernoulli(MLP(1, 3, hidden=(6,))),
        MLP(3, hidden=(5,)),
        MeanFieldNormal(MLP(5, hidden=()), 1),
        MeanFieldNormal(MLP(6, hidden=(5,)), 1),
        MeanFieldNormal(MLP(6, hidden=(5,)), 1),
    ).double()
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.mul_(2.0 if "likelihood" in name else 1.2)
        for guide in (pair.auxiliary, pair.given_auxiliary):
            guide.head.bias[1:] = 1.2  # wider than the posterior, so that weights are bounded or nearly so
    return pair


X = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
LINE = torch.linspace(-12, 12, 1201, dtype=torch.float64)
STEP = (LINE[1] - LINE[0]).log()


def log_p(pair: AuxiliaryVAE) -> Tensor:
    """log p(x) by quadrature over z alone."""
    z = LINE[:, None, None]
    return torch.logsumexp(pair.prior().log_prob(z) + pair.likelihood(z).log_prob(X) + STEP, 0)


@torch.no_grad()
def test_the_extended_model_integrates_to_p_of_x() -> None:
    """Over z and a, on a grid: p(z) p(x|z) r(a|x, z), by the very sites that Pyro sees."""
    pair = random_pair()
    grid = torch.cartesian_prod(LINE[::8], LINE[::8])
    at = {"z": grid[:, None, :1].expand(-1, 2, 1), "a": grid[:, None, 1:].expand(-1, 2, 1)}
    particles = draw(Pair(pair.model, pair.guide), Batch(X), len(grid), at=at)
    log_joint = particles.log_likelihood + particles.log_prior
    joint = torch.logsumexp(log_joint, 0) + 2 * (LINE[8] - LINE[0]).log()
    assert_close(joint, log_p(pair), rtol=0.0, atol=1e-6)
    # The ELBO too, against the same grid.
    log_q = particles.log_guide
    elbo = (log_q.exp() * (log_joint - log_q)).sum(0) * (LINE[8] - LINE[0]) ** 2
    torch.manual_seed(0)
    assert_mean(log_weights(pair.model, pair.guide, X, 40_000), elbo, least=0.1)
    assert (elbo < log_p(pair) - 0.01).all()


@torch.no_grad()
def test_importance_sampling_over_both_estimates_log_p() -> None:
    pair = random_pair()
    torch.manual_seed(0)
    log_w = log_weights(pair.model, pair.guide, X, 40_000)
    assert_mean((log_w - log_p(pair)).exp(), 1.0, least=0.1)


@torch.no_grad()
def test_rows_that_are_simulated_have_auxiliaries_of_their_own() -> None:
    """a ~ r(a|x, z) of the x that was drawn, not of the x in its place: (z, a) is a draw of the posterior."""
    pair = random_pair()
    pair.features.networks[0] = MLP(3, hidden=()).double()  # the features are x itself
    pair.reverse = linear(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), 0.0, 1e-4)
    pair.auxiliary = linear(torch.zeros(1, 3, dtype=torch.float64), 0.0, 1.0)
    pair.given_auxiliary = linear(torch.zeros(1, 4, dtype=torch.float64), 0.0, 1.0)
    torch.manual_seed(0)
    batch, latents = simulate(Pair(pair.model, pair.guide), Batch(torch.zeros(200, 3, dtype=torch.float64)))
    assert batch.x.std() > 0.3
    assert_close(latents["a"][0, :, 0], batch.x @ torch.tensor([1.0, 2.0, 4.0]).double(), rtol=0.0, atol=1e-3)


@torch.no_grad()
def test_the_check_on_simulated_rows_holds_log_p_from_both_sides() -> None:
    """E U_K >= E log p(x) >= E L_K: of bits, the mean of log p(x) over simulated rows is -entropy."""
    pair = random_pair()
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    z = LINE[:, None, None]
    exact = torch.logsumexp(pair.prior().log_prob(z) + pair.likelihood(z).log_prob(every) + STEP, 0)
    check = simulated(pair.model, pair.guide, torch.zeros(4000, 3, dtype=torch.float64), 3, seed=1)
    mean = (exact.exp() * exact).sum()
    error = check.upper.std() / len(check.upper) ** 0.5
    assert check.upper.mean() > mean - 5 * error
    assert check.lower.mean() < mean + 5 * error
    assert check.width > 0.01


def test_what_the_auxiliary_says_is_not_counted_as_what_z_says() -> None:
    """Its KL stands beside that of z; it has no active units, and q(z, a) is far from no one prior."""
    pair = random_pair()
    found = measure(pair.model, pair.guide, [X], ELBO(500))
    assert found["kl"] == pytest.approx(found["kl_z"] + found["kl_a"], abs=1e-9)
    assert found["latent_dimensions"] == 1
    assert "kl_a[0]" not in found
    whole = Pair(pair.model, pair.guide)
    assert use_of_units(whole, Batch(X)).names == ("z[0]",)
    assert split_kl(whole, Batch(X)).aggregate_kl is None


def test_parts_that_do_not_fit_are_refused() -> None:
    def parts(**changes: object) -> dict:
        made = {
            "prior": StandardNormal(2),
            "likelihood": Bernoulli(MLP(2, 4)),
            "features": MLP(4, hidden=(6,)),
            "auxiliary": MeanFieldNormal(MLP(6), 3),
            "guide": MeanFieldNormal(MLP(9), 2),
            "reverse": MeanFieldNormal(MLP(8), 3),
        }
        return {**made, **changes}

    AuxiliaryVAE(**parts())
    for changes, message in (
        ({"guide": MeanFieldNormal(MLP(6), 2)}, r"of both is \(9,\), the guide's input is \(6,\)"),
        ({"reverse": MeanFieldNormal(MLP(8), 1)}, r"latent_dim of q\(a\|x\) is \(3,\), that of r\(a\|x, z\) is \(1,\)"),
        ({"reverse": MeanFieldNormal(MLP(6), 3)}, r"of both is \(8,\), the input of r\(a\|x, z\) is \(6,\)"),
        ({"prior": StandardNormal(5)}, r"prior's latent_dim is \(5,\), the decoder's input is \(2,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            AuxiliaryVAE(**parts(**changes))
