r"""Sequences: Markov priors against Gaussian processes and loops, and a state-space model against the Kalman filter.

z_1 ~ N(0, I)    z_t = a z_{t-1} + sqrt(1 - a^2) e_t    x_t = W z_t + b + s e'_t
"""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, SOLVED, assert_mean
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, adam, fit, log_marginal, log_weights
from pyrovae.models import (
    MLP,
    VAE,
    FullCovarianceNormal,
    Gaussian,
    Markov,
    MeanFieldNormal,
    OrnsteinUhlenbeck,
    SequenceDecoder,
    SequenceEncoder,
)

T, Z, D, NOISE = 5, 2, 3, 0.5


def process(length: tuple[float, ...] = (2.0, 8.0), steps: int = T) -> OrnsteinUhlenbeck:
    """In double precision, of these correlation lengths."""
    prior = OrnsteinUhlenbeck(steps * len(length), (steps, D)).double()
    with torch.no_grad():
        prior.log_length.copy_(torch.tensor(length, dtype=torch.float64).log())
    return prior


def covariance(length: tuple[float, ...] = (2.0, 8.0)) -> Tensor:
    """Of z as a vector, z_1 first: exp(-|s - t| / l) between steps of an element, and none between elements."""
    apart = (torch.arange(T).unsqueeze(0) - torch.arange(T).unsqueeze(1)).abs().double()
    each = (-apart.unsqueeze(-1) / torch.tensor(length, dtype=torch.float64)).exp()  # (T, T, Z)
    return torch.einsum("std,de->sdte", each, torch.eye(len(length)).double()).reshape(T * len(length), -1)


def test_the_process_is_the_gaussian_of_its_covariance() -> None:
    """Its density exactly; its draws by their moments; and so in the shape (T, Z)."""
    prior, wanted = process(), MultivariateNormal(torch.zeros(T * Z).double(), covariance())
    z = torch.randn(4, 3, T * Z, dtype=torch.float64)
    assert_close(prior().log_prob(z), wanted.log_prob(z), **SOLVED)
    assert_close(prior.steps_of().log_prob(z.unflatten(-1, (T, Z))), wanted.log_prob(z), **SOLVED)
    draws = prior().sample((20_000,)).detach()
    assert_mean(draws.unsqueeze(-1) * draws.unsqueeze(-2), covariance(), least=0.06)


@pytest.mark.parametrize("cls", [OrnsteinUhlenbeck, Markov])
def test_the_density_is_the_product_over_steps_and_draws_have_it(cls: type) -> None:
    """log p(z) = log N(z_1; 0, I) + sum log N(z_t; m(z_{t-1}), s(z_{t-1})^2), one step and one row at a time."""
    torch.manual_seed(1)
    prior = cls(T * Z, T).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter))
    noise = torch.randn(3, T, Z, dtype=torch.float64)
    z = prior.steps_of().transforms[0](noise)
    for row, e in zip(z, noise, strict=True):
        total = dist.Normal(0.0, 1.0).log_prob(row[0]).sum()
        assert_close(row[0], e[0], **EXACT)
        for t in range(1, T):
            mean, log_scale = prior.step(row[t - 1])
            assert_close(row[t], mean + log_scale.exp() * e[t], **EXACT)
            total = total + dist.Normal(mean, log_scale.exp()).log_prob(row[t]).sum()
        assert_close(prior().log_prob(row.flatten()), total, **EXACT)
    jacobian = torch.autograd.functional.jacobian(lambda e: prior.steps_of().transforms[0](e).flatten(), noise[0])
    wanted = torch.linalg.slogdet(jacobian.reshape(T * Z, T * Z)).logabsdet
    transform = prior.steps_of().transforms[0]
    assert_close(transform.log_abs_det_jacobian(noise[:1], z[:1])[0], wanted, **EXACT)


# -- A linear-Gaussian state-space model -------------------------------------------------------------------------------


def kalman(x: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """log p(x) of sequences x (N, T, D), by the filter: predict, compare with x_t, update."""
    eye = torch.eye(len(a)).double()
    mean, variance = torch.zeros(len(x), len(a)).double(), eye
    total = torch.zeros(len(x)).double()
    for t in range(x.shape[1]):
        if t:
            mean, variance = a * mean, a[:, None] * variance * a + (1 - a**2) * eye
        predicted = MultivariateNormal(mean @ w.T + b[t], w @ variance @ w.T + NOISE**2 * torch.eye(D).double())
        total = total + predicted.log_prob(x[:, t])
        gain = variance @ w.T @ torch.linalg.inv(predicted.covariance_matrix[0])
        mean = mean + (x[:, t] - predicted.mean) @ gain.T
        variance = variance - gain @ w @ variance
    return total


def state_space() -> VAE:
    """The shipped pair with networks without hidden layers, in double precision."""
    torch.manual_seed(3)
    decoder = SequenceDecoder(T * Z, (T, D), hidden=())
    encoder = MLP((T, D), hidden=())
    pair = VAE(process(), Gaussian(decoder, scale=NOISE), FullCovarianceNormal(encoder, T * Z)).double()
    with torch.no_grad():
        decoder.bias.normal_()
    return pair


def known(pair: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """a, W and b of the pair."""
    linear = next(m for m in pair.likelihood.decoder.modules() if isinstance(m, torch.nn.Linear))
    a = (-(-pair.prior.log_length).exp()).exp()
    return a.detach(), linear.weight.detach(), (linear.bias + pair.likelihood.decoder.bias).detach()


def posterior(pair: VAE, x: Tensor) -> MultivariateNormal:
    """p(z|x) of all steps at once, in closed form."""
    _, w, b = known(pair)
    every = torch.block_diag(*[w] * T)
    precision = torch.linalg.inv(covariance()) + every.T @ every / NOISE**2
    cov = torch.linalg.inv(precision)
    return MultivariateNormal((x - b).flatten(1) @ every @ cov / NOISE**2, (cov + cov.T) / 2)


def test_log_weights_under_the_exact_posterior_are_those_of_the_kalman_filter() -> None:
    """Every one of them, whatever is drawn: prior, decoder and shapes are those of the state-space model."""
    pair = state_space()
    x = pair.sample(7)

    def guide(x: Tensor) -> None:
        q = posterior(pair, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril))

    log_w = log_weights(pair.model, guide, x, 4)
    assert_close(log_w, kalman(x, *known(pair)).expand(4, -1), **SOLVED)


def test_the_pair_is_trained_to_the_kalman_filter() -> None:
    """With the model held, the ELBO ends within half of the gap of the best mean-field guide; log p(x) meets it."""
    pair = state_space()
    pair.prior.requires_grad_(False)
    pair.likelihood.requires_grad_(False)
    x = pair.sample(300)
    pair.guides[0].initialise(x)
    with torch.no_grad():
        pair.guides[0].head.weight.zero_()
    truth = kalman(x, *known(pair))
    precision = torch.linalg.inv(posterior(pair, x).covariance_matrix[0])
    mean_field = (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet) / 2
    before = log_marginal(pair.model, pair.guide, x, 50, seed=1)
    assert (truth - before.elbo).mean() > 5
    settings = {"epochs": 20, "batch_size": 25, "progress": False, "compile": "off"}

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    fit(pair.model, pair.guide, x, ELBO(), optimizer=lambda p: adam(p, lr=0.02), schedule=schedule, **settings)
    after = log_marginal(pair.model, pair.guide, x, 500, seed=1)
    assert (truth - after.elbo).mean() < 0.5 * mean_field
    assert ((after.estimate - truth).abs() < 5 * after.standard_error + 1e-3).all()


def test_latents_of_the_shape_of_steps_in_a_pair_of_ones_own() -> None:
    """z of shape (T, Z) trains and scores as the vector does: the same log-weights at the same latents."""
    pair = state_space()
    x = pair.sample(6)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior.steps_of())
            pyro.sample("x", pair.likelihood(z.flatten(-2)), obs=x)

    def guide(x: Tensor) -> None:
        q = posterior(pair, x)
        flat = dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril)
        steps = torch.distributions.transforms.ReshapeTransform((T * Z,), (T, Z))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(flat, [steps]))

    assert_close(log_weights(model, guide, x, 3), kalman(x, *known(pair)).expand(3, -1), **SOLVED)


# -- Networks of sequences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out_shape", "before"), [((T, D), 0), ((2, T, D), 1), ((T, D, 4), 0)])
def test_a_step_of_the_output_is_that_of_its_latents_and_all_steps_are_decoded_alike(out_shape, before) -> None:
    """Two parameters of x before time, as a predicted scale has them, and categories after it, included."""
    decoder = SequenceDecoder(T * Z, out_shape, event_shape=(T, D)).double()
    z = torch.randn(4, T, Z, dtype=torch.float64)
    other = z.clone()
    other[:, 2] += 1
    moved = (decoder(z.flatten(1)) - decoder(other.flatten(1))).movedim(1 + before, 0).abs().flatten(1).sum(1)
    assert (moved > 0).tolist() == [t == 2 for t in range(T)]
    shifted = decoder(z.roll(1, 1).flatten(1)).movedim(1 + before, 1)
    assert_close(shifted, decoder(z.flatten(1)).movedim(1 + before, 1).roll(1, 1))


def test_an_encoder_of_sequences_sees_so_many_steps_to_either_side() -> None:
    encoder = SequenceEncoder((20, D), hidden=(6, 7)).double()
    x = torch.randn(1, 20, D, dtype=torch.float64)
    other = x.clone()
    other[:, 10] += 1
    moved = (encoder(x) - encoder(other)).reshape(7, 20).abs().sum(0)
    assert (moved > 0).nonzero().flatten().tolist() == list(range(6, 15))
    assert SequenceEncoder(20, hidden=(3,))(torch.randn(2, 20)).shape == (2, 60)


def test_steps_that_do_not_share_out_the_latents_are_refused() -> None:
    with pytest.raises(UsageError, match=r"latent_dim: expected a multiple of the number of .* got 7 for 5 steps"):
        OrnsteinUhlenbeck(7, (5, 3))
    with pytest.raises(UsageError, match=r"latent_dim: expected a multiple of the 5 steps of x, .* got 7"):
        SequenceDecoder(7, (5, 3))
    assert Markov(12, 100, steps=4).width == 3


@pytest.mark.slow
@pytest.mark.parametrize("cls", [OrnsteinUhlenbeck, Markov])
def test_compiled_steps_are_those_of_the_pair(cls: type) -> None:
    """On rows of digits as sequences of their lines."""
    x = (load_data("digits").rows("mass").train[:300].reshape(-1, 8, 8) > 0.5).double()
    torch.manual_seed(2)
    pair = VAE(
        cls(16, (8, 8)), Gaussian(SequenceDecoder(16, (8, 8))), MeanFieldNormal(SequenceEncoder((8, 8)), 16)
    ).double()
    pair.initialise(x)
    settings = {"epochs": 2, "seed": 1, "progress": False}
    bounds = []
    for compile in ("off", "on"):
        each = copy.deepcopy(pair)
        kept = fit(each.model, each.guide, x, ELBO(), compile=compile, **settings)
        bounds.append(kept.metrics["train_bound"].tolist())
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-6)
    assert math.isfinite(bounds[0][0])
