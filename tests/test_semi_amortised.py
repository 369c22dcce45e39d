"""The semi-amortised guide: its steps are the ascent they say, and close the amortisation gap."""

from unittest.mock import patch

import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, fit, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.individual import Individual
from pyrovae.inference.pair import Pair
from pyrovae.inference.suboptimality import gaps
from pyrovae.inference.tracing import compiler
from pyrovae.models import (
    MLP,
    VAE,
    ConditionalVAE,
    Gaussian,
    HierarchicalVAE,
    MeanFieldNormal,
    SemiAmortised,
    StandardNormal,
    UnconditionalPrior,
    VampPrior,
)

Z, D = 2, 4


def vae(seed: int = 0, hidden: tuple[int, ...] = (8,), **settings: object) -> VAE:
    """A pair in double precision; without hidden layers its posterior is a Gaussian."""
    torch.manual_seed(seed)
    guide = SemiAmortised(MLP(D, hidden=(8,)), Z, **settings)
    return VAE(StandardNormal(Z), Gaussian(MLP(Z, D, hidden=hidden), 0.7), guide).double()


def rows(model: VAE, count: int) -> Tensor:
    torch.manual_seed(1)
    return model.sample(count)


def test_a_step_is_the_gradient_of_the_bound_at_its_points() -> None:
    """m moves by rate s^2 d/dm and log s by rate d/d(log s) of the mean over its points of log p(x, z) + log s."""
    model = vae(steps=1, rate=0.1)
    guide, x = model.guides[0], rows(model, 5)
    guide.steps = 0
    start = guide(x)
    loc, log_scale = start.mean.detach().requires_grad_(), start.stddev.detach().log().requires_grad_()
    z = loc + log_scale.exp() * guide.points.unsqueeze(1)
    (model.log_joint(x, z).mean(0) + log_scale.sum(-1)).sum().backward()
    assert loc.grad.norm(dim=-1).max() * start.stddev.max() < Z**0.5, "a bounded step would be another"
    guide.steps = 1
    end = guide(x)
    assert_close(end.mean, start.mean + 0.1 * start.variance * loc.grad, rtol=0, atol=1e-10)
    assert_close(end.stddev.log(), start.stddev.log() + 0.1 * log_scale.grad, rtol=0, atol=1e-6)  # points are floats
    assert (end.mean - start.mean).abs().max() > 1e-3


def test_many_steps_end_at_the_best_mean_field_gaussian() -> None:
    """Of a Gaussian posterior N(m, P^-1): mean m, variances 1/P_ii, whatever the encoder said."""
    model = vae(hidden=(), steps=200)
    x = rows(model, 6)
    W, b = model.likelihood.decoder.body[1].weight, model.likelihood.decoder.body[1].bias
    precision = torch.eye(Z) + W.T @ W / 0.49
    wanted = torch.linalg.solve(precision, W.T @ (x - b).T / 0.49).T
    q = model.posterior(x)
    assert_close(q.mean, wanted, rtol=0, atol=1e-8)
    assert_close(q.variance, (1 / precision.diagonal()).expand_as(wanted), rtol=0, atol=1e-8)


def test_each_step_raises_the_bound_and_twenty_close_the_amortisation_gap() -> None:
    """T = 0, 1, 5, 20 after training without steps: the ELBO rises, and more than 60 % of the gap is closed."""
    model = vae(hidden=(8,), steps=0)
    x = rows(model, 100)
    fit(model.model, model.guide, x, ELBO(), epochs=2, batch_size=50, seed=0, progress=False)
    best = Individual("diagonal").fit(Pair(model.model, model.guide), Batch(x)).elbo(1000)[0].mean().item()
    bounds = []
    for steps in (0, 1, 5, 20):
        model.guides[0].steps = steps
        torch.manual_seed(2)
        with torch.no_grad():
            bounds.append(log_weights(model.model, model.guide, x, 500).mean().item())
    gap = best - bounds[0]
    assert gap > 0.1
    assert bounds == sorted(bounds)
    assert bounds[3] - bounds[0] > 0.95 * gap
    assert bounds[3] < best + 0.02


def test_weights_are_of_log_p_and_gaps_knows_the_guide() -> None:
    """E w = p(x), by quadrature; `gaps` calls it diagonal, and finds nothing that amortisation loses."""
    model = vae(hidden=(8,), steps=20)
    x = rows(model, 10)
    axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, None].expand(-1, len(x), Z)
    with torch.no_grad():
        log_p = model.log_joint(x, points).logsumexp(0) + 2 * (axis[1] - axis[0]).log()
        ratios = (log_weights(model.model, model.guide, x, 4000) - log_p).exp()
    assert_mean(ratios, 1.0, least=0.3)
    result = gaps(model.model, model.guide, x, 200, individual=Individual(steps=60), seed=0)
    assert result.guide_family == "diagonal"
    assert result.amortisation.mean < 0.02


@pytest.mark.parametrize("gradient", ["stopped", "through"])
def test_the_gradient_of_training_is_stopped_or_that_of_the_steps(gradient: str) -> None:
    """Of sum(m_T + s_T) by the bias of the encoder's head: of m_0 and s_T/s_0 s_0 alone, or by finite differences."""
    model = vae(steps=3, gradient=gradient)
    guide, x = model.guides[0], rows(model, 3)

    def total() -> Tensor:
        q = guide(x)
        return (q.mean + q.stddev).sum()

    bias = guide.head.bias
    (found,) = torch.autograd.grad(total(), bias)
    decoder = torch.autograd.grad(total(), list(model.likelihood.parameters()), allow_unused=True)
    if gradient == "stopped":
        assert all(g is None for g in decoder)
        guide.steps, end = 0, guide(x)
        start = guide(x)
        (wanted,) = torch.autograd.grad((start.mean + start.stddev * (end.stddev / start.stddev).detach()).sum(), bias)
    else:
        assert all(g.abs().max() > 0 for g in decoder)
        wanted = torch.zeros_like(bias)
        with torch.no_grad():
            for i in range(len(bias)):
                bias[i] += 1e-5
                above = total()
                bias[i] -= 2e-5
                wanted[i] = (above - total()) / 2e-5
                bias[i] += 1e-5
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", ["stopped", "through"])
def test_traced_training_is_that_of_the_pair(gradient: str) -> None:
    trained = []
    for how in ("on", "off"):
        model = vae(steps=2, gradient=gradient)
        x = rows(model, 20)
        with patch.object(compiler, "inductor", lambda graph, inputs: graph):
            options = {"batch_size": 10, "epochs": 2, "seed": 0, "progress": False, "compile": how}
            result = fit(model.model, model.guide, x, ELBO(2), **options)
        assert result.compiled == (how == "on"), result.notices
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(*trained, rtol=1e-9, atol=1e-9)
    start = torch.cat([p.detach().flatten() for p in vae(gradient=gradient).parameters()])
    assert (trained[0] - start).abs().max() > 1e-3


def test_where_there_is_no_log_joint_it_is_refused_by_name() -> None:
    guide = SemiAmortised(MLP(D, hidden=(8,)), Z)
    with pytest.raises(UsageError, match=r"SemiAmortised refines by log p\(x, z\), and is in no pair that has one"):
        guide(torch.randn(3, D))
    above = MeanFieldNormal(MLP(Z, hidden=(8,)), Z)
    with pytest.raises(UsageError, match=r"SemiAmortised .* cannot be used in a hierarchy"):
        HierarchicalVAE(StandardNormal(Z), [above], Gaussian(MLP(Z, D)), [guide, above])
    with pytest.raises(UsageError, match=r"SemiAmortised .* cannot be used in a VampPrior, which is made of it"):
        VampPrior(guide, D)
    with pytest.raises(UsageError, match=r"SemiAmortised .* cannot be used in a ConditionalVAE"):
        ConditionalVAE(UnconditionalPrior(StandardNormal(Z)), Gaussian(MLP(Z + 1, D - 1)), guide)
    with pytest.raises(UsageError, match="draws: expected an even number, since points come in pairs, got 3"):
        SemiAmortised(MLP(D), Z, draws=3)


def test_points_have_the_moments_of_a_gaussian() -> None:
    """Mean 0 and mean square 1 always; uncorrelated where there are twice as many as dimensions."""
    for draws, dim in ((4, 2), (16, 3), (4, 5)):
        e = SemiAmortised(MLP(D), dim, draws=draws).double().points
        assert e.shape == (draws, dim)
        assert_close(e.mean(0), torch.zeros(dim).double(), rtol=0, atol=1e-6)
        covariance = e.T @ e / draws
        wanted = torch.eye(dim).double()
        if draws < 2 * dim:
            covariance = covariance.diagonal().diag()
        assert_close(covariance, wanted, rtol=0, atol=1e-5)


def test_it_is_one_distribution_for_any_number_of_particles() -> None:
    """The refined answer for a row does not depend on draws, other rows, or how often it is asked."""
    model = vae()
    x = rows(model, 4)
    one, other = model.posterior(x), model.posterior(x[2:])
    assert isinstance(one.base_dist, dist.Normal)
    assert_close(one.mean[2:], other.mean, rtol=0, atol=1e-12)
    assert torch.equal(one.mean, model.posterior(x).mean)
