r"""Deep Markov pairs: guides step by step against the Kalman filter, and sequences of unequal length.

z_1 ~ N(0, 1)    z_t = a z_{t-1} + sqrt(1 - a^2) e_t    x_t = w z_t + b_t + s e'_t, seen up to the row's own length
"""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import EXACT, SOLVED, assert_mean
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, adam, fit, log_marginal
from pyrovae.models import (
    VAE,
    GatedMarkov,
    Gaussian,
    MarkovGuide,
    OrnsteinUhlenbeck,
    PartlySeen,
    SequenceDecoder,
    StandardNormal,
    StepEncoder,
)
from pyrovae.models.sequence_guides import StepByStep

T, D, NOISE = 6, 2, 0.7
LENGTHS = (1, 6, 3, 5, 2, 6, 4)


def pair(prior: type = GatedMarkov, merge: str = "precision", width: int = 2, steps: int = T, **settings) -> VAE:
    """Of sequences of so many steps, with small networks, in double precision; the same parameters at any length."""
    torch.manual_seed(1)
    decoder = SequenceDecoder(steps * width, (steps, D), **{"hidden": (5,), **settings})
    likelihood = PartlySeen(Gaussian(decoder, scale=NOISE))
    view = likelihood.view((steps, D))
    encoder = StepEncoder(view.out_shape, hidden=(7,), event_shape=(steps, D)).seeing(view)
    p = prior(steps * width, (steps, D))
    guide = MarkovGuide(encoder, steps * width, p, hidden=4, merge=merge)
    model = VAE(p, likelihood, guide).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        decoder.bias.zero_()
    return model


def padded(x: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Sequences x (N, T, D) with NaN after their lengths."""
    after = torch.arange(x.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    return x.masked_fill(after.unsqueeze(-1), math.nan)


def log_joint_and_guide(model: VAE, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return model.log_joint(x, z), model.guides[0](x).log_prob(z)


# -- Against the Kalman filter -----------------------------------------------------------------------------------------


def linear(model: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """a, w and b of a pair of one latent element with an Ornstein-Uhlenbeck prior and a linear decoder."""
    layer = next(m for m in model.likelihood.decoder.modules() if isinstance(m, torch.nn.Linear))
    a = (-(-model.prior.log_length).exp()).exp()
    return a.detach(), layer.weight.detach()[:, 0], (layer.bias + model.likelihood.decoder.bias).detach()


def log_p(x: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """log p(x) of sequences by the covariance of what is seen of each: a Kalman filter's, by other means."""
    steps = torch.arange(x.shape[1])
    of_z = a ** (steps - steps.unsqueeze(1)).abs()
    covariance = torch.kron(of_z, torch.outer(w, w)) + NOISE**2 * torch.eye(x[0].numel()).double()
    found = []
    for row in x.flatten(1):
        at = ~row.isnan()
        found.append(MultivariateNormal(b.flatten()[at], covariance[at][:, at]).log_prob(row[at]))
    return torch.stack(found)


def messages(x: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """n_t and the l_t whose softplus is the precision of p(x_t, ..., x_end | z_t) as a function of z_t: (N, T, 2)."""
    precision, eta = torch.zeros(len(x)).double(), torch.zeros(len(x)).double()
    found = []
    for t in reversed(range(x.shape[1])):
        shrunk = 1 + (1 - a**2) * precision
        there = ~x[:, t, 0].isnan()
        precision = a**2 * precision / shrunk + there * w.dot(w) / NOISE**2
        eta = a * eta / shrunk + torch.where(there, (x[:, t] - b[t]).nan_to_num() @ w, 0.0) / NOISE**2
        found.append(torch.stack([eta / precision.clamp(min=1e-9), precision.expm1().clamp(min=1e-9).log()], -1))
    return torch.stack(found[::-1], 1)


def test_with_exact_messages_every_weight_is_the_kalman_filters_log_p() -> None:
    """Whatever is drawn, for sequences of every length: the merge by precision is the posterior's step."""
    model = pair(OrnsteinUhlenbeck, width=1, hidden=())
    known = linear(model)
    x = padded(model.sample(len(LENGTHS)))
    guide = model.guides[0]
    q = StepByStep(
        partial(guide.given, messages(x, *known), guide.reached(x).unsqueeze(-1)), T, torch.zeros(len(x), T).double()
    )
    z = q.expand(torch.Size((5, len(x)))).sample()
    assert_close(model.log_joint(x, z) - q.log_prob(z), log_p(x, *known).expand(5, -1), **SOLVED)


@pytest.mark.parametrize(("merge", "most"), [("precision", 0.1), ("learned", 0.5)])
def test_the_guide_is_trained_to_the_kalman_filter(merge: str, most: float) -> None:
    """With the model held, the gap of a guide that has the posterior in its family nearly goes; log p(x) is met."""
    model = pair(OrnsteinUhlenbeck, merge, width=1, hidden=())
    model.prior.requires_grad_(False)
    model.likelihood.requires_grad_(False)
    x = padded(model.sample(210), 30 * LENGTHS)
    model.guides[0].initialise(x)
    truth = log_p(x, *linear(model))
    before = truth - log_marginal(model.model, model.guide, x, 50, seed=1).elbo
    settings = {"epochs": 15, "batch_size": 30, "progress": False, "compile": "off"}
    fit(model.model, model.guide, x, ELBO(), optimizer=lambda p: adam(p, lr=0.02), **settings)
    after = log_marginal(model.model, model.guide, x, 1000, seed=1)
    assert before.mean() > 2 * (gap := (truth - after.elbo).mean())
    assert gap < most
    assert (after.estimate - truth).mean().abs() < 5 * after.monte_carlo_error + 1e-3


# -- Lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["precision", "learned", "none"])
def test_padding_does_not_count(merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows padded to 6 steps and to 9: the same log-weights on the same noise, and the same gradients of them."""
    found, parameters = [], {}
    noise = torch.randn(3, len(LENGTHS), 9 * 2).double()
    x = padded(torch.randn(len(LENGTHS), T, D).double())
    for steps in (T, 9):
        model = pair(GatedMarkov, merge, steps=steps)
        parameters = parameters or {n: p for n, p in model.state_dict().items() if T not in p.shape}
        model.load_state_dict(parameters, strict=False)
        longer = torch.cat([x, torch.full((len(x), steps - T, D), math.nan).double()], 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda shape, **_: noise[..., : shape[-1]].expand(shape))
            q = model.guides[0](longer).expand((3, len(x)))
            z = q.rsample()
        log_w = model.log_joint(longer, z) - q.log_prob(z)
        log_w.logsumexp(0).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((log_w.detach(), gradients))
    (short, of_short), (long, of_long) = found
    assert_close(long, short, **EXACT)
    assert of_short.keys() == of_long.keys()
    for name, gradient in of_short.items():
        other = of_long[name]
        assert_close(other[:T] if name.endswith("decoder.bias") else other, gradient, **SOLVED)
        assert gradient.abs().max() > 0, name


def test_a_sequence_of_one_step_is_a_row_and_of_none_has_probability_1() -> None:
    """log p(x_1) = log int N(z; 0, I) p(x_1|z) dz, by a fine grid."""
    model = pair(width=1)
    x = padded(torch.randn(2, T, D).double(), (1, 0))
    grid = torch.linspace(-8, 8, 4001).double()
    z = torch.zeros(len(grid), T).double()
    z[:, 0] = grid
    at = model.likelihood(z).base_dist.base_dist.loc[:, 0]
    log_likelihood = Normal(at, NOISE).log_prob(x[0, 0]).sum(-1)
    truth = torch.trapezoid((log_likelihood + Normal(0.0, 1.0).log_prob(grid)).exp(), grid).log()
    found = log_marginal(model.model, model.guide, x, 20_000, seed=3)
    assert abs(found.estimate[0] - truth) < 5 * found.standard_error[0]
    assert found.standard_error[0] < 0.05
    assert abs(found.estimate[1]) < 1e-9


def test_a_gap_within_a_sequence_is_no_end() -> None:
    model = pair()
    x = torch.randn(3, T, D).double()
    x[0, 2], x[1, 4:], x[2, 5, 0] = math.nan, math.nan, math.nan
    assert model.guides[0].reached(x).sum(-1).tolist() == [6, 4, 6]


@pytest.mark.parametrize("merge", ["precision", "learned", "none"])
def test_a_draw_has_the_density_of_any_other_value(merge: str) -> None:
    """That which comes with a draw is that of the same numbers without a loop, and a product over steps."""
    model = pair(merge=merge)
    guide, x = model.guides[0], padded(torch.randn(len(LENGTHS), T, D).double())
    q = guide(x).expand((4, len(x)))
    z = q.rsample()
    assert_close(q.log_prob(z), q.log_prob(z.detach().clone()), **EXACT)
    before, total = torch.zeros(4, len(x), 1, 2).double(), torch.zeros(4, len(x)).double()
    for t, now in enumerate(z.unflatten(-1, (T, 2)).split(1, -2)):
        mean, log_scale = q.given(before, t)
        total = total + Normal(mean, log_scale.exp()).log_prob(now).sum((-2, -1))
        before = now
    assert_close(q.log_prob(z), total, **EXACT)


def test_what_follows_a_sequence_is_forecast_by_the_model() -> None:
    """x_6 given x_1 ... x_5 of a linear-Gaussian model: the mean of weighted draws is the exact one."""
    model = pair(OrnsteinUhlenbeck, width=1, hidden=())
    a, w, b = linear(model)
    x = model.sample(4)
    seen = torch.ones(T, D, dtype=torch.bool)
    seen[5] = False
    steps = torch.arange(T)
    covariance = torch.kron(a ** (steps - steps.unsqueeze(1)).abs(), torch.outer(w, w)) + NOISE**2 * torch.eye(T * D)
    at = seen.flatten()
    gain = covariance[~at][:, at] @ torch.linalg.inv(covariance[at][:, at])
    truth = b[5] + (x.flatten(1)[:, at] - b.flatten()[at]) @ gain.T
    gone = x.masked_fill(~seen, math.nan)
    z = model.guides[0](gone).expand((40_000, 4)).sample()
    log_w = model.log_joint(gone, z) - model.guides[0](gone).log_prob(z)
    forecast = model.likelihood(z).mean[..., 5, :]
    for row in range(4):
        ratio = (log_w[:, row] - log_w[:, row].logsumexp(0) + math.log(len(z))).exp()
        assert_mean(ratio.unsqueeze(-1) * (forecast[:, row] - truth[row]), 0.0, least=0.2)


def test_what_does_not_go_by_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="MarkovGuide goes by the steps of a prior over sequences, and StandardNormal"):
        MarkovGuide(StepEncoder((T, D)), T, StandardNormal(T))
    with pytest.raises(UsageError, match=r"encoder: expected a multiple of the 6 steps .* got 20"):
        MarkovGuide(StepEncoder((4, D), hidden=(5,)), T, OrnsteinUhlenbeck(T, T))
    with pytest.raises(UsageError, match="network: expected parts of 6 steps each"):
        StepEncoder((5, D), event_shape=(6, D))


def test_features_of_a_step_are_of_that_step_alone_and_its_mask() -> None:
    encoder = StepEncoder((2, 9, D), hidden=(4,), event_shape=(9, D)).double()
    x = torch.randn(3, 2, 9, D).double()
    other = x.clone()
    other[:, 1, 5, 1] += 1
    moved = (encoder(x) - encoder(other)).unflatten(1, (4, 9)).abs().sum((0, 1))
    assert moved.nonzero().flatten().tolist() == [5]
    assert_close(encoder(x.roll(1, 2)).unflatten(1, (4, 9)), encoder(x).unflatten(1, (4, 9)).roll(1, 2))


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_pair() -> None:
    model = pair(merge="learned", steps=2)
    x = padded(torch.randn(70, 2, D).double(), 35 * (1, 2))
    model.initialise(x)
    bounds = []
    for compile in ("off", "on"):
        each = copy.deepcopy(model)
        kept = fit(each.model, each.guide, x, IWAE(2), compile=compile, epochs=2, seed=1, batch_size=35, progress=False)
        bounds.append(kept.metrics["train_bound"].tolist())
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-6)


def test_the_oscillator_is_what_it_says() -> None:
    """Lengths of 10 to 30, NaN behind them, and the covariance of a stationary process: W a^k R^k W' + noise."""
    from pyrovae.data.sources import find_source

    source = find_source("oscillator")
    x = load_data("oscillator", missing=True).train
    lengths = (~x.isnan().any(-1)).sum(1)
    assert (lengths.min().item(), lengths.max().item()) == (10, 30)
    assert (x.isnan().any(-1) == (torch.arange(30) >= lengths.unsqueeze(1))).all()
    turn, weight = (torch.from_numpy(part) for part in source.parameters())
    for apart in (0, 3):
        wanted = weight @ torch.linalg.matrix_power(source.damping * turn, apart) @ weight.T
        wanted = wanted + (source.noise**2 * torch.eye(3) if apart == 0 else 0)
        products = x[:, apart:10, :, None].double() * x[:, : 10 - apart, None].double()
        assert_mean(products.mean(1), wanted.double(), least=0.6)
