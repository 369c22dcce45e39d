"""Counts: a known negative binomial model is recovered, log p(x) is that of quadrature, and totals are given."""

import math

import numpy as np
import pytest
import torch
from conftest import EXACT
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
from pyrovae.data import load_data
from pyrovae.errors import DataError, UsageError
from pyrovae.inference import IWAE, Individual, fit, log_marginal
from pyrovae.models import (
    MLP,
    VAE,
    ConditionalVAE,
    FullCovarianceNormal,
    LogCounts,
    MeanFieldNormal,
    NegativeBinomial,
    Poisson,
    StandardNormal,
    UnconditionalPrior,
    ZeroInflatedNegativeBinomial,
)

THETA = torch.tensor([0.7, 2.0, 5.0, 20.0])
SLOPE, LEVEL = torch.tensor([1.0, -0.8, 0.6, 0.4]), torch.tensor([1.0, 2.0, 0.5, 3.0])


def log_binomial(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """log NB(x) by its definition, in nats."""
    counted = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return counted + theta * (theta / (theta + mean)).log() + x * (mean / (theta + mean)).log()


def log_p(x: Tensor, slope: Tensor, level: Tensor, theta: Tensor) -> Tensor:
    """log p(x) of counts whose log means are a line in z ~ N(0, 1), by Gauss-Hermite quadrature, shape (N,)."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(81))
    log_mean = (level + slope * points[:, None]).double()
    joint = log_binomial(x[:, None].double(), log_mean.exp(), theta.double()).sum(-1)
    return torch.logsumexp(joint + (weights / math.sqrt(2 * math.pi)).log(), 1)


def made(rows: int) -> Tensor:
    """Counts of the known model."""
    torch.manual_seed(0)
    mean = (LEVEL + SLOPE * torch.randn(rows, 1)).exp()
    return torch.poisson(torch.distributions.Gamma(THETA, THETA / mean).sample())


def pair() -> VAE:
    decoder, view = MLP(1, 4, hidden=()), LogCounts((4,))
    return VAE(StandardNormal(1), NegativeBinomial(decoder), FullCovarianceNormal(MLP(4, hidden=(20,)).seeing(view), 1))


def test_log_p_of_counts_is_that_of_quadrature() -> None:
    """At the parameters that the counts are made with, row by row, from a guide that knows nothing."""
    vae, x = pair(), made(50)
    (linear,) = (m for m in vae.likelihood.decoder.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(SLOPE[:, None])
        linear.bias.copy_(LEVEL)
        vae.likelihood.log_theta.copy_(THETA.log())
    estimate = log_marginal(vae.model, vae.guide, x, num_particles=1000, proposal=Individual())
    error = 5 * estimate.standard_error + 1e-4
    assert error.max() < 0.2
    assert ((estimate.estimate - log_p(x, SLOPE, LEVEL, THETA)).abs() < error).all()


@pytest.mark.slow
def test_a_known_negative_binomial_model_is_recovered() -> None:
    """Its parameters within 15 %, its log p(x) of other rows by quadrature and by sampling; none of it at the start."""
    x, others = made(2500)[:2000], made(2500)[2000:]
    vae = pair()
    vae.initialise(x)
    (linear,) = (m for m in vae.likelihood.decoder.modules() if isinstance(m, nn.Linear))

    def found() -> tuple[Tensor, Tensor, Tensor]:
        sign = linear.weight[0, 0].sign()
        return (sign * linear.weight[:, 0]).detach(), linear.bias.detach(), vae.likelihood.log_theta.exp().detach()

    truth = log_p(others, SLOPE, LEVEL, THETA)
    assert (truth - log_p(others, *found())).mean() > 0.3
    assert (found()[2] / THETA - 1).abs().max() > 0.5
    fit(vae.model, vae.guide, x, IWAE(5), epochs=60, batch_size=200, seed=0, progress=False,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02))  # fmt: skip
    slope, level, theta = found()
    assert (truth - log_p(others, slope, level, theta)).mean().abs() < 0.02
    assert_close(slope, SLOPE, rtol=0, atol=0.15)
    assert_close(level, LEVEL, rtol=0, atol=0.15)
    assert_close(theta.log(), THETA.log(), rtol=0, atol=0.25)
    estimate = log_marginal(vae.model, vae.guide, others, num_particles=1000)
    error = 5 * estimate.standard_error + 1e-3
    assert ((estimate.estimate - log_p(others, slope, level, theta)).abs() < error).all()


def test_the_elements_are_what_the_formulas_say() -> None:
    """Poisson, negative binomial and zero-inflated, from the decoder's output in the documented order."""
    torch.manual_seed(0)
    z, x = torch.randn(5, 2).double(), torch.poisson(2 * torch.ones(5, 3)).double()
    poisson = Poisson(MLP(2, 3)).double()
    out = poisson.decoder(z)
    assert_close(poisson(z).log_prob(x), (x * out - out.exp() - torch.lgamma(x + 1)).sum(-1), **EXACT)
    binomial = NegativeBinomial(MLP(2, (2, 3)), "predicted").double()
    log_mean, log_theta = binomial.decoder(z).unbind(1)
    assert_close(binomial(z).log_prob(x), log_binomial(x, log_mean.exp(), log_theta.exp()).sum(-1), **EXACT)
    inflated = ZeroInflatedNegativeBinomial(MLP(2, (2, 3))).double()
    log_mean, gate = inflated.decoder(z).unbind(1)
    of_counts = log_binomial(x, log_mean.exp(), inflated.log_theta.exp()).exp()
    wanted = gate.sigmoid() * (x == 0) + (1 - gate.sigmoid()) * of_counts
    assert_close(inflated(z).log_prob(x), wanted.log().sum(-1), **EXACT)


@pytest.mark.parametrize("cls", [Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_a_given_total_is_what_the_means_add_up_to(cls: type) -> None:
    """Of each row its own, whatever z, and in proportions that do not depend on the total: softmax of the output."""
    torch.manual_seed(0)
    shape = cls.decoder_shape((4,))
    decoder = MLP(3, shape, hidden=())
    with torch.no_grad():
        next(m for m in decoder.modules() if isinstance(m, nn.Linear)).weight[:, -1] = 0  # the total by itself
    part = cls(decoder, library="given")
    total = torch.tensor([10.0, 1000.0])
    p = part(torch.cat([torch.randn(1, 2).expand(2, 2), total.log().unsqueeze(1)], 1))
    counts = p.base_dist.base_dist if cls is ZeroInflatedNegativeBinomial else p
    assert_close(counts.mean.sum(-1), total, rtol=1e-5, atol=0)
    assert_close(counts.mean[0] * 100, counts.mean[1], rtol=1e-4, atol=0)
    vae = ConditionalVAE(UnconditionalPrior(StandardNormal(2)), part, MeanFieldNormal(MLP(5), 2))
    result = log_marginal(vae.model, vae.guide, torch.ones(3, 4), 50, given=(torch.full((3, 1), 4.0).log(),))
    assert result.estimate.isfinite().all()


def test_what_are_no_counts_is_refused_and_counts_have_a_space(tmp_path) -> None:
    for wrong in (-1.0, 0.5, math.nan, math.inf):
        with pytest.raises(DataError, match=r"support \{0, 1, 2, ...\}, got values"):
            Poisson(MLP(2, 2)).check_support(torch.tensor([[1.0, wrong]]))
    counts = made(60).numpy()
    for dtype in (np.uint8, np.int64, np.float64):
        np.save(tmp_path / "x.npy", counts.clip(0, 255).astype(dtype))
        data = load_data(tmp_path / "x.npy")
        rows = data.rows("counts")
        assert rows.measure.description == "mass on counts {0, 1, ...}^4"
        assert rows.measure.bits_per_dimension(-4 * math.log(2)) == 1
        assert set(rows.test.unique().tolist()) <= set(counts.clip(0, 255).ravel().tolist())
    for wrong_rows in (counts - 5, counts / 2):
        np.save(tmp_path / "y.npy", wrong_rows)
        with pytest.raises(DataError, match="are no counts: choose a Gaussian"):
            load_data(tmp_path / "y.npy").rows("counts")


def test_a_run_of_counts_is_of_their_mass_and_its_encoder_sees_logarithms(tmp_path) -> None:
    np.save(tmp_path / "x.npy", made(200).numpy())
    run = pyrovae.train(
        {"data": str(tmp_path / "x.npy"), "likelihood": "negative-binomial", "latent_dim": [2], "epochs": 2,
         "eval_K": 20, "seed": 0, "device": "cpu"}, tmp_path / "run", plots=False)  # fmt: skip
    assert run.evaluation["measure"] == "mass on counts {0, 1, ...}^4"
    assert isinstance(run.model().guides[0].encoder.view, LogCounts)
    drawn = run.model().sample(100)
    assert bool(((drawn >= 0) & (drawn == drawn.round())).all())


def test_a_run_can_be_given_totals_and_says_so(tmp_path) -> None:
    """Draws given a total have about that total; log p is named as given it; the library without it is refused."""
    np.save(tmp_path / "x.npy", made(300).numpy())
    options = {"data": str(tmp_path / "x.npy"), "likelihood": {"name": "poisson", "library": "given"}, "seed": 0,
               "latent_dim": [2], "epochs": 2, "eval_K": 20, "device": "cpu"}  # fmt: skip
    run = pyrovae.train({**options, "condition": "total"}, tmp_path / "run", plots=False)
    assert run.evaluation["measure"] == "mass on counts {0, 1, ...}^4, given total"
    drawn = run.model().sample(2000, torch.tensor([500.0]).log()).sum(1)
    assert abs(drawn.mean().item() - 500) < 5 * math.sqrt(500 / 2000)
    assert_close(run.rows().given["test"][0], run.rows().test.sum(1, keepdim=True).clamp(min=1).log())
    with pytest.raises(UsageError, match="which `condition=total` gives"):
        pyrovae.Recipe(**options)


@pytest.mark.slow
def test_compiled_training_is_that_of_the_pair() -> None:
    """The same weights to rounding after steps that are compiled, and after steps that are not."""
    weights, cls = [], ZeroInflatedNegativeBinomial
    for mode in ("off", "on"):
        torch.manual_seed(1)
        likelihood = cls(MLP(2, cls.decoder_shape((4,)), hidden=(8,)))
        vae = VAE(StandardNormal(2), likelihood, MeanFieldNormal(MLP(4, hidden=(8,)).seeing(LogCounts((4,))), 2))
        x = made(100)
        vae.initialise(x)
        fit(vae.model, vae.guide, x, IWAE(3), epochs=2, batch_size=50, seed=0, compile=mode, progress=False)
        weights.append(nn.utils.parameters_to_vector(vae.parameters()).detach())
    assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
