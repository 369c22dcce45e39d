"""Laplace, Student-t, log-normal and Beta elements: the densities that they say, and numbers at extremes."""

import copy
import math

import pytest
import torch
from conftest import assert_mean
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import DataError, UsageError
from pyrovae.inference import IWAE, fit
from pyrovae.models import (
    MLP,
    VAE,
    Beta,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    LogNormal,
    MeanFieldNormal,
    StandardNormal,
    StudentT,
)
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.scaled_t import ScaledT


def constant(part: Likelihood, output: list[float]) -> Likelihood:
    """The part with a decoder that puts out these numbers, whatever z is."""
    with torch.no_grad():
        for parameter in part.decoder.parameters():
            parameter.zero_()
        part.decoder.output_bias.copy_(torch.tensor(output))
    return part.double()


def test_densities_are_those_of_scipy() -> None:
    """With scale and shape as documented, element by element."""
    x, z = torch.tensor([[0.3, 2.5]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    raw = math.log(math.expm1(0.699))  # scale 0.7 with the floor of 0.001
    cases: list[tuple[Likelihood, list[float], object]] = [
        (Laplace(MLP(2, 2), 0.7), [0.1, 1.0], lambda i: stats.laplace([0.1, 1.0][i], 0.7)),
        (StudentT(MLP(2, 2), 3.5, 0.7), [0.1, 1.0], lambda i: stats.t(3.5, [0.1, 1.0][i], 0.7)),
        (StudentT(MLP(2, (2, 2)), 3.5, "predicted"), [0.1, 1.0, raw, raw], lambda i: stats.t(3.5, [0.1, 1.0][i], 0.7)),
        (StudentT(MLP(2, 2), "learned", 0.7), [0.1, 1.0], lambda i: stats.t(5, [0.1, 1.0][i], 0.7)),
        (LogNormal(MLP(2, 2), 0.7), [0.1, 1.0], lambda i: stats.lognorm(0.7, scale=math.exp([0.1, 1.0][i]))),
    ]
    for part, output, law in cases:
        wanted = [law(i) for i in range(2)]
        p = constant(part, output)(z)
        log_p = sum(law.logpdf(value) for law, value in zip(wanted, x[0].tolist(), strict=True))
        assert p.log_prob(x).item() == pytest.approx(log_p, abs=1e-6)
        assert p.mean[0].tolist() == pytest.approx([law.mean() for law in wanted], rel=1e-6)
        assert p.variance[0].tolist() == pytest.approx([law.var() for law in wanted], rel=1e-6)
    p = constant(Beta(MLP(2, (2, 2))), [-1.0, 0.5, 0.2, 3.0])(z)
    a, b = 0.01 + torch.nn.functional.softplus(torch.tensor([[-1.0, 0.5], [0.2, 3.0]], dtype=torch.float64))
    value = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert p.log_prob(value).item() == pytest.approx(stats.beta(a, b).logpdf(value).sum(), abs=1e-6)
    assert_close(p.mean[0], a / (a + b))


def test_draws_of_a_student_t_move_with_its_parameters() -> None:
    """d E x^2 / d scale = 2 scale df / (df - 2); d E log(1 + x^2) / d df by the draws is that by quadrature."""
    torch.manual_seed(0)
    df, scale = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, 1.5))
    zero = torch.zeros((), dtype=torch.float64)
    draws = ScaledT(df, zero, scale).expand((200_000,)).rsample()
    slope, of_df = torch.autograd.grad(draws.square().mean(), (scale, df))
    assert slope.item() == pytest.approx(2 * 1.5 * 9 / 7, rel=0.03)
    assert of_df.item() == pytest.approx(-(1.5**2) * 2 / 49, rel=0.15)
    assert_mean(draws.detach(), 0.0)


# Support, and data in it from the least to the greatest that single precision is likely to meet.
EXTREMES: dict[str, tuple[Likelihood, Tensor]] = {
    "Laplace": (Laplace(MLP(2, (2, 3)), "predicted"), torch.tensor([[-1e6, 0.0, 1e6]])),
    "StudentT": (StudentT(MLP(2, (2, 3)), "learned", "predicted"), torch.tensor([[-1e6, 0.0, 1e6]])),
    "LogNormal": (LogNormal(MLP(2, (2, 3)), "predicted"), torch.tensor([[1e-30, 1.0, 1e30]])),
    "Beta": (Beta(MLP(2, (2, 3))), torch.tensor([[1e-10, 0.5, 1 - 2**-24]])),
    "DiscretizedLogistic": (DiscretizedLogistic(MLP(2, (2, 3)), 256, "predicted"), torch.tensor([[0.0, 99.0, 255.0]])),
    "DiscretizedLogisticMixture": (
        DiscretizedLogisticMixture(MLP(2, (3, 2, 3)), 256, 2),
        torch.tensor([[0.0, 99.0, 255.0]]),
    ),
    "Categorical": (Categorical(MLP(2, (256, 3)), 256), torch.tensor([[0.0, 99.0, 255.0]])),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("output", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_gradients_are_finite_at_extremes(name: str, output: float) -> None:
    """In single precision, whatever the decoder puts out and wherever the data are."""
    part, x = EXTREMES[name]
    part.check_support(x)
    with torch.no_grad():
        part.decoder.output_bias.fill_(output)
    part.zero_grad()
    log_p = part(torch.zeros(1, 2)).log_prob(x)
    assert log_p.isfinite().all()
    log_p.sum().backward()
    for parameter in part.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert part.decoder.output_bias.grad is not None


@pytest.mark.parametrize("name", ["LogNormal", "Beta"])
def test_open_intervals_refuse_their_ends_but_for_what_rounding_has_made(name: str) -> None:
    part, _ = EXTREMES[name]
    words = {"LogNormal": "a log-normal likelihood has support \\(0, inf\\)", "Beta": "a Beta likelihood has support"}[
        name
    ]
    for wrong in (-0.1, 0.0, math.nan, math.inf if name == "LogNormal" else 1.0):
        with pytest.raises(DataError, match=f"^x: {words}.* 1 elements at an end or outside"):
            part.check_support(torch.tensor([[0.5, wrong, 0.3]]))
    rounded = torch.full((500, 3), 0.5)
    rounded[7, 1] = 0.0
    part.check_support(rounded)
    assert part(torch.zeros(500, 2)).log_prob(rounded).isfinite().all()


def test_a_beta_starts_at_the_mean_of_the_data_and_half_its_spread() -> None:
    x = torch.distributions.Beta(2.0, torch.tensor([2.0, 6.0, 30.0])).sample((4000,)).clamp(1e-4, 1 - 1e-4)
    part = constant(Beta(MLP(2, (2, 3))), [0.0] * 6)
    part.initialise(x.double())
    p = part(torch.zeros(1, 2, dtype=torch.float64))
    assert_close(p.mean[0], x.double().mean(0), rtol=1e-4, atol=1e-4)
    assert_close(p.stddev[0], x.double().std(0) / 2, rtol=0.02, atol=0)


def test_degrees_of_freedom_leave_a_mean_and_a_variance() -> None:
    for wrong in (2.0, 0.5, "many"):
        with pytest.raises(UsageError, match=r"^df: expected a number above 2 or learned, got"):
            StudentT(MLP(2, 3), wrong)


def trained(part: Likelihood, x: Tensor, compile: str, epochs: int = 3) -> tuple[list[float], list[str]]:
    """Bounds by epoch of a pair with that likelihood, and what was noticed."""
    torch.manual_seed(0)
    pair = VAE(StandardNormal(2), copy.deepcopy(part), MeanFieldNormal(MLP(3, hidden=(4,)), 2))
    pair.initialise(x)
    kept = fit(pair.model, pair.guide, x, IWAE(2), epochs=epochs, batch_size=20, compile=compile, progress=False)
    return kept.metrics["train_bound"].tolist(), kept.notices


SUITABLE = {
    "Laplace": (Laplace(MLP(2, 3), "optimal"), lambda u: u.logit()),
    "Gaussian": (Gaussian(MLP(2, 3), "optimal"), lambda u: u.logit()),
    "StudentT": (StudentT(MLP(2, (2, 3)), "learned", "predicted"), lambda u: u.logit()),
    "LogNormal": (LogNormal(MLP(2, 3)), lambda u: u.logit().exp()),
    "Beta": (Beta(MLP(2, (2, 3))), lambda u: u),
    "DiscretizedLogistic": (DiscretizedLogistic(MLP(2, 3), 16), lambda u: (16 * u).floor()),
    "DiscretizedLogisticMixture": (DiscretizedLogisticMixture(MLP(2, (3, 2, 3)), 16, 2), lambda u: (16 * u).floor()),
    "Categorical": (Categorical(MLP(2, (16, 3)), 16), lambda u: (16 * u).floor()),
}


@pytest.mark.parametrize("name", SUITABLE)
def test_recorded_steps_are_those_of_the_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the graph of tensor operations that is compiled: the same bounds, and nothing has to stay eager."""
    monkeypatch.setattr("pyrovae.inference.training.gradients.compile_graph", lambda graph: graph)
    part, values = SUITABLE[name]
    x = values(torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99))
    eager, _ = trained(part, x, "off")
    recorded, notices = trained(part, x, "on")
    assert recorded == pytest.approx(eager, rel=1e-5)
    assert eager[-1] > eager[0]
    assert any("compiled the training step" in text for text in notices)


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_pair() -> None:
    part, values = SUITABLE["DiscretizedLogisticMixture"]
    x = values(torch.rand(40, 3, generator=torch.Generator().manual_seed(0)))
    eager, compiled = (trained(part, x, compile)[0] for compile in ("off", "on"))
    assert compiled == pytest.approx(eager, rel=1e-5)
