"""Estimators of gradients: each has the bound's value, and by quadrature or enumeration its gradient in expectation, or
a bias that is seen; the known order of variances; chunks of particles and graphs give the same.

Parameters are given one copy per row, so that one backward pass gives R independent gradients.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import test_steps
import torch
import yaml
from conftest import assert_mean
from pyro.infer import TraceEnum_ELBO, config_enumerate
from test_bounds import THETA, X, grid_of_noise, log_weight_at
from test_steps import EXACT, gradients, step_of
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torch.testing import assert_close

from pyrovae.errors import CheckpointError, PairError, UsageError
from pyrovae.gradients import command
from pyrovae.inference import (
    ELBO,
    IWAE,
    Capacity,
    Covariance,
    DoublyReparameterised,
    Enumerated,
    GradientEstimator,
    LargestWeight,
    LeaveOneOut,
    OfParticles,
    Relaxed,
    Renyi,
    Reparameterised,
    ScoreFunction,
    StickingTheLanding,
    Thermodynamic,
    WakeSleep,
    fit,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimators import GRADIENTS
from pyrovae.inference.noise import elements, noise_of, sides
from pyrovae.inference.noise import gradients as sampled_gradients
from pyrovae.inference.objectives import OBJECTIVES
from pyrovae.inference.pair import Pair
from pyrovae.runs.training import train

uncompiled = test_steps.uncompiled  # the fixture
R = 20_000
STUDENT = 5.0


class OfRows(nn.Module):
    """Parameters with one copy for each of n rows."""

    def __init__(self, n: int, theta: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value.expand(n, *value.shape).clone()))


class Continuous(OfRows):
    """z ~ N(0, 1), x_d|z ~ Bernoulli(sigmoid(w_d z + b_d)), guide N(loc, scale^2): that of test_bounds, as a module."""

    def __init__(self, n: int) -> None:
        super().__init__(n, THETA)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[..., None] * self.w + self.b).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


BITS = {
    "prior": torch.tensor([0.4, -0.7], dtype=torch.float64),
    "weight": torch.tensor([[1.5, -1.0, 0.7], [0.5, 2.0, -1.0]], dtype=torch.float64),
    "guide_logits": torch.tensor([0.6, 0.3], dtype=torch.float64),
}


class Discrete(OfRows):
    """Two bits z, three bits x; parameters of all of them."""

    def __init__(self, n: int) -> None:
        super().__init__(n, BITS)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            logits = torch.einsum("...i,...ij->...j", z, self.weight)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.guide_logits).to_event(1))


STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64)


def log_densities(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(x, z) and log q(z|x) of all states of `Discrete`."""

    def of(logits: Tensor, value: Tensor) -> Tensor:
        return Independent(Bernoulli(logits=logits), 1).log_prob(value)

    log_p = of(theta["prior"], STATES) + of(STATES @ theta["weight"], X.expand(4, 3))
    return log_p, of(theta["guide_logits"], STATES)


def reduced(bound: OfParticles, log_weights: Tensor) -> Tensor:
    """The bound of log-weights (K, points)."""
    if isinstance(bound, ELBO):
        return log_weights.mean(0)
    return bound.combine(log_weights.repeat(bound.num_averages, 1).unsqueeze(0))


def over_tuples(values: Tensor, k: int) -> Tensor:
    """Of numbers of single particles, (S,), those of all K-tuples: (K, S^K)."""
    return torch.stack(torch.meshgrid(*[values] * k, indexing="ij")).flatten(1)


def by_quadrature(bound: OfParticles) -> dict[str, Tensor]:
    """The gradient of the bound's expectation for `Continuous`."""
    theta = {name: t.clone().requires_grad_() for name, t in THETA.items()}
    nodes, weights = grid_of_noise()
    log_w, k = log_weight_at(nodes, theta), bound.num_particles
    ((reduced(bound, over_tuples(log_w, k)) * over_tuples(weights, k).prod(0)).sum()).backward()
    return {name: t.grad for name, t in theta.items()}


def by_enumeration(bound: OfParticles) -> dict[str, Tensor]:
    """The gradient of the bound's expectation for `Discrete`."""
    theta = {name: t.clone().requires_grad_() for name, t in BITS.items()}
    (log_p, log_q), k = log_densities(theta), bound.num_particles
    chance = over_tuples(log_q, k).sum(0).exp()
    (reduced(bound, over_tuples(log_p - log_q, k)) * chance).sum().backward()
    return {name: t.grad for name, t in theta.items()}


def drawn(pair: OfRows, bound: OfParticles, seed: int = 1) -> dict[str, Tensor]:
    """A gradient of the bound for each row, by parameter."""
    torch.manual_seed(seed)
    rows = len(next(pair.parameters()))
    bound.bound(pair.model, pair.guide, X.expand(rows, 3)).sum().backward()
    return {name: p.grad for name, p in pair.named_parameters()}


def largest_t(found: Tensor, wanted: Tensor) -> float:
    """The largest distance of means from what was wanted, in standard errors; rounding is no distance."""
    return ((found.mean(0) - wanted).abs() / (found.std(0) / math.sqrt(len(found)) + 1e-12)).max().item()


S, L, D = ScoreFunction(), LeaveOneOut(), DoublyReparameterised()
THROUGH_DRAWS = [
    *(ELBO(k, gradient=StickingTheLanding()) for k in (1, 3)),
    *(IWAE(k, gradient=D) for k in (1, 2, 3)),
    IWAE(2, 3, gradient=D),
    *(Renyi(alpha, 2, gradient=D) for alpha in (0.5, 2.0, -1.0)),
    *(Thermodynamic(k, 3, 0.1) for k in (1, 2)),
]
AT_FIXED_DRAWS = [
    *(bound(gradient=S) for bound in (ELBO, lambda **g: IWAE(2, **g), lambda **g: Renyi(0.5, 2, **g))),
    *(
        ELBO(3, gradient=L),
        IWAE(2, gradient=L),
        IWAE(3, gradient=L),
        IWAE(2, 3, gradient=L),
        Renyi(-1.0, 2, gradient=L),
    ),
    *(Thermodynamic(2, 3, 0.1, gradient=gradient) for gradient in (S, L)),
]


@pytest.mark.parametrize("bound", THROUGH_DRAWS + AT_FIXED_DRAWS, ids=repr)
def test_the_expectation_is_the_gradient_of_the_bound_by_quadrature(bound: OfParticles) -> None:
    found, wanted = drawn(Continuous(R), bound), by_quadrature(bound)
    assert max(g.abs().max() for g in wanted.values()) > 0.8
    for name, gradient in wanted.items():
        assert_mean(found[name], gradient, least=0.25)
    assert bound.gradient.bias(bound) == ""


@pytest.mark.parametrize("bound", AT_FIXED_DRAWS, ids=repr)
def test_the_expectation_is_the_gradient_of_the_bound_by_enumeration(bound: OfParticles) -> None:
    found, wanted = drawn(Discrete(R), bound), by_enumeration(bound)
    assert max(g.abs().max() for g in wanted.values()) > 0.2
    for name, gradient in wanted.items():
        assert_mean(found[name], gradient, least=0.1)


def test_the_score_function_s_gradient_is_the_score_times_the_bound_above_the_other_rows() -> None:
    """Draw for draw: by loc, at fixed z, log w has the derivative of -log q, and so one score less."""
    pair, bound = Continuous(50), IWAE(gradient=S)
    found = drawn(pair, bound)["loc"]
    with torch.no_grad():
        torch.manual_seed(1)
        value = bound.bound(pair.model, pair.guide, X.expand(50, 3))
        torch.manual_seed(1)
        score = torch.randn(1, 50, dtype=torch.float64)[0] / pair.log_scale.exp()
    others = (value.sum() - value) / 49
    assert_close(found, (value - others - 1) * score, **EXACT)


@pytest.mark.parametrize("make", [Continuous, Discrete])
def test_a_bias_is_seen_where_it_is_said(make: type[OfRows]) -> None:
    """Of the guide; the model's gradient is right, but of VR-max."""
    truth = by_quadrature if make is Continuous else by_enumeration
    own = {Continuous: [IWAE(3, gradient=g) for g in (StickingTheLanding(), LargestWeight())], Discrete: []}[make]
    own += [ELBO(gradient=Relaxed())] if make is Discrete else []
    guides = {"loc", "log_scale", "guide_logits"}
    for bound in (*own, IWAE(3, gradient=WakeSleep())):
        found, wanted = drawn(make(R), bound), truth(bound)
        off = {name: largest_t(found[name], gradient) for name, gradient in wanted.items()}
        assert bound.gradient.bias(bound)
        assert max(t for name, t in off.items() if name in guides) > 2 * STUDENT, bound
        if not isinstance(bound.gradient, LargestWeight):
            assert max(t for name, t in off.items() if name not in guides) < STUDENT, bound


def test_the_bias_of_covariances_falls_with_the_number_of_particles() -> None:
    distances = []
    for k in (2, 6):
        found = drawn(Discrete(R), Thermodynamic(k, 2, 0.3, gradient=Covariance()))["guide_logits"]
        wanted = by_enumeration(Thermodynamic(k, 2, 0.3))["guide_logits"]
        assert largest_t(found, wanted) > 2 * STUDENT
        distances.append((found.mean(0) - wanted).abs().max().item())
    assert distances[0] > 2 * distances[1]


def test_the_guide_s_part_of_wake_sleep_is_that_of_the_other_kl() -> None:
    """E sum_k v_k grad log q(z_k) over all tuples of states."""
    bound = IWAE(3, gradient=WakeSleep())
    theta = {name: t.clone().requires_grad_() for name, t in BITS.items()}
    log_p, log_q = log_densities(theta)
    v = over_tuples((log_p - log_q).detach(), 3).softmax(0)
    chance = over_tuples(log_q.detach(), 3).sum(0).exp()
    ((v * over_tuples(log_q, 3)).sum(0) * chance).sum().backward()
    assert_mean(drawn(Discrete(R), bound)["guide_logits"], theta["guide_logits"].grad, least=0.05)


class Assignments(OfRows):
    """A categorical z and a bit y given z, both latent; enumerable by Pyro too."""

    def __init__(self, n: int) -> None:
        torch.manual_seed(0)
        shapes = {"prior": (3,), "bit": (3,), "weight": (3, 2, 3), "guide_z": (3,), "guide_y": (3,)}
        super().__init__(n, {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()})

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rows = torch.arange(len(x))
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            y = pyro.sample("y", dist.Bernoulli(logits=self.bit[rows, z]))
            pyro.sample("x", dist.Bernoulli(logits=self.weight[rows, z, y.long()]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.guide_z))
            pyro.sample("y", dist.Bernoulli(logits=self.guide_y[torch.arange(len(x)), z]))


def test_enumerated_is_pyro_s_own_sum_without_noise() -> None:
    """TraceEnum_ELBO of a guide whose sites are enumerated in parallel: value and gradient, whatever the seed."""
    pair, x = Assignments(4), X.expand(4, 3)
    own = []
    for loss in (
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(pair.model, config_enumerate(pair.guide), x),
        ELBO(gradient=Enumerated()).differentiable_loss(pair.model, pair.guide, x),
        ELBO(3, kl="sampled", gradient=Enumerated()).differentiable_loss(pair.model, pair.guide, x),
    ):
        own.append([loss.detach(), *torch.autograd.grad(loss, list(pair.parameters()))])
    for wanted, *found in zip(*own, strict=True):
        for each in found:
            assert_close(each, wanted, **EXACT)


class Mixed(nn.Module):
    """A bit c, and z given c reparameterised."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.3).double())
        self.loc = nn.Parameter(torch.tensor([-0.5, 0.8]).double())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)))
            z = pyro.sample("z", dist.Normal(2 * c - 1, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=self.logit.expand(len(x))))
            pyro.sample("z", dist.Normal(self.loc[c.long()], 0.8))


def test_a_bit_is_summed_and_what_is_given_it_reparameterised() -> None:
    """Against the closed form of Gaussians: E log w of each state, and its derivative."""
    pair, x = Mixed(), torch.tensor(0.7, dtype=torch.float64)
    q = dist.Bernoulli(logits=pair.logit)
    each = []
    for c in (0.0, 1.0):
        m, v = pair.loc[int(c)], 0.64
        expected = -0.5 * ((m - (2 * c - 1)) ** 2 + v + (x - m) ** 2 + v) - math.log(2 * math.pi)
        entropy = 0.5 * math.log(2 * math.pi * math.e * v)
        log_c = dist.Bernoulli(0.4).log_prob(torch.tensor(c)).double() - q.log_prob(q.probs.new_tensor(c))
        each.append(q.log_prob(q.probs.new_tensor(c)).exp() * (expected + entropy + log_c))
    wanted = torch.autograd.grad(sum(each), [pair.logit, pair.loc])
    torch.manual_seed(0)
    bound = ELBO(40_000, kl="sampled", gradient=Enumerated())
    value = bound.bound(pair.model, pair.guide, x.reshape(1))
    assert value.item() == pytest.approx(sum(each).item(), abs=0.02)
    for found, truth in zip(torch.autograd.grad(value.sum(), [pair.logit, pair.loc]), wanted, strict=True):
        assert_close(found, truth, rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------------------ variances


class Toy(nn.Module):
    """z ~ N(mu, I), x ~ N(z, I) in 20 dimensions, q = N(x/2 + b, 2/3 I) beside the best b, one copy of b for each row.

    References:
        Rainforth et al. 2018, Tighter Variational Bounds are Not Necessarily Better, https://arxiv.org/abs/1802.04537
    """

    def __init__(self, n: int, off: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        mu = torch.randn(20)
        self.x = (mu + math.sqrt(2) * torch.randn(20)).expand(n, 20)
        self.b = nn.Parameter((mu / 2 + off * torch.randn(20)).expand(n, 20).clone())
        self.mu = nn.Parameter(mu.expand(n, 20).clone())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.b, math.sqrt(2 / 3)).to_event(1))


def of_toy(off: float, bound: OfParticles, draws: int) -> dict[str, Tensor]:
    pair = Toy(draws, off)
    torch.manual_seed(1)
    bound.bound(pair.model, pair.guide, pair.x).sum().backward()
    return {"guide": pair.b.grad, "model": pair.mu.grad}


def snr(gradient: Tensor) -> float:
    """Root mean square over coordinates of |mean| / sd, less what the error of the mean adds to it."""
    draws = len(gradient)
    squares = (gradient.mean(0) / gradient.std(0)) ** 2 * (draws - 3) / (draws - 1) - 1 / draws
    return squares.mean().clamp(min=0).sqrt().item()


def slope(values: dict[int, float]) -> float:
    """Of the logarithm by the logarithm of K."""
    k, y = (torch.tensor(list(v), dtype=torch.float64).log() for v in (values.keys(), values.values()))
    return (((k - k.mean()) * (y - y.mean())).sum() / (k - k.mean()).square().sum()).item()


def test_the_doubly_reparameterised_gradient_has_less_than_a_third_of_the_variance() -> None:
    """At K = 64, of the guide; of the model they are the same, draw for draw."""
    plain, doubly = (of_toy(0.1, IWAE(64, gradient=g), 300) for g in (Reparameterised(), DoublyReparameterised()))
    assert plain["guide"].var(0).mean() > 3 * doubly["guide"].var(0).mean()
    assert_close(plain["model"], doubly["model"])
    difference = plain["guide"] - doubly["guide"]
    assert largest_t(difference, torch.zeros(20)) < STUDENT


def test_leaving_one_out_has_less_variance_than_the_plain_score() -> None:
    """On both pairs and bounds of a mean and of a logarithm; with the baseline of the other rows less than without."""
    for make, name in ((Continuous, "loc"), (Discrete, "guide_logits")):
        for bound in (ELBO, IWAE):
            scored, left_out = (drawn(make(4000), bound(4, gradient=g))[name].var(0).mean() for g in (S, L))
            assert left_out < 0.8 * scored


@pytest.mark.slow
def test_signal_to_noise_by_the_number_of_particles() -> None:
    """Of the guide it falls as K^-1/2 under IWAE and rises as K^1/2 doubly reparameterised; of the model it rises."""
    iwae = {k: snr(of_toy(0.1, IWAE(k), 20_000)["guide"]) for k in (4, 16, 64)}
    assert -0.6 < slope(iwae) < -0.35
    doubly = {k: of_toy(0.01, IWAE(k, gradient=D), 4000 if k > 64 else 20_000) for k in (16, 64, 256)}
    assert 0.4 < slope({k: snr(found["guide"]) for k, found in doubly.items()}) < 0.6
    assert 0.4 < slope({k: snr(found["model"]) for k, found in doubly.items()}) < 0.6


# ---------------------------------------------------------------------------------------------- the thermodynamic bound


@pytest.mark.parametrize("partitions", [1, 2, 5, 40])
def test_left_and_right_sums_have_the_importance_weighted_bound_between_them(partitions: int) -> None:
    torch.manual_seed(0)
    log_weights = 3 * torch.randn(2, 6, 500, dtype=torch.float64)
    bound = Thermodynamic(6, partitions, 0.02, 2)
    between = IWAE(6, 2).reduce(log_weights)
    lower, upper = bound.reduce(log_weights), bound.upper(log_weights)
    assert (lower < between).all()
    assert (between < upper).all()
    if partitions == 1:
        assert_close(lower, log_weights.mean(1))
    if partitions == 40:
        assert (upper - lower).mean() < 0.5


# ------------------------------------------------------------------------------------- values, chunks, graphs, refusals


def every() -> list[tuple[Callable[[], OfRows], OfParticles]]:
    """Every estimator with every bound that it is of, on a pair that it is for."""
    bounds = (ELBO(5), IWAE(5, 2), Renyi(0.5, 5), Thermodynamic(5, 3))
    return [
        (Continuous if cls.reparameterises else Discrete, replace(bound, gradient=cls()))
        for bound, cls in itertools.product(bounds, GRADIENTS)
        if cls.word in bound.gradients
    ]


def test_every_bound_and_every_estimator_is_tried() -> None:
    tried = every()
    assert {type(bound) for _, bound in tried} == set(OBJECTIVES)
    assert {type(bound.gradient) for _, bound in tried} == set(GRADIENTS)
    assert all(word in {cls.word for cls in GRADIENTS} for bound in OBJECTIVES for word in bound.gradients)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("make", "bound"), every(), ids=lambda value: "" if isinstance(value, type) else repr(value))
def test_value_chunks_and_graphs(make: Callable[[int], OfRows], bound: OfParticles) -> None:
    """The value is that of `combine`; chunks of particles, and graphs, give the loss and gradient of the whole."""
    pair, x = make(6), X.expand(6, 3)
    whole, batch = Pair(pair.model, pair.guide), Batch(x)
    eager, graph = (step_of(pair, bound, compiled=on) for on in (False, True))
    (loss, found), (wanted, own) = gradients(graph, x), gradients(eager, x)
    assert graph.refused is None
    for a, b in zip((loss, *found), (wanted, *own), strict=True):
        assert_close(a, b, **EXACT)
    if not isinstance(bound.gradient, Relaxed | Enumerated):  # whose noise is another
        torch.manual_seed(5)
        with torch.no_grad():
            assert_close(
                -bound.bound_of(whole, batch).sum(), wanted, rtol=0, atol=0 if bound.gradient.analytic else 1e-9
            )
    chunked = step_of(pair, bound, particle_chunk=2)
    loss, found = gradients(chunked, x)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    strands = []
    for i, k in enumerate(chunked.sizes):
        torch.manual_seed(seed + i)
        strands.append(bound.strands(whole, batch, k))
    wanted = -bound.surrogate(torch.cat(strands, 1)).sum()
    assert_close(loss, wanted.detach(), **EXACT)
    for a, b in zip(found, torch.autograd.grad(wanted, list(pair.parameters())), strict=True):
        assert_close(a, b, **EXACT)


def test_the_default_gradient_is_the_derivative_of_the_bound_to_the_last_bit() -> None:
    pair, x = Continuous(6), X.expand(6, 3)
    for bound in (ELBO(3), IWAE(4), Renyi(0.5, 4)):
        torch.manual_seed(2)
        loss = bound.differentiable_loss(pair.model, pair.guide, x)
        torch.manual_seed(2)
        terms = bound.draw(Pair(pair.model, pair.guide), Batch(x), 4 if bound.num_particles == 4 else 3)
        own = -bound.combine(terms, **bound.settings(0)).sum()
        for a, b in zip(*(torch.autograd.grad(v, list(pair.parameters())) for v in (loss, own)), strict=True):
            assert torch.equal(a, b)


def test_a_loss_that_is_divided_has_a_gradient_that_is() -> None:
    """What weighs the draws' part is a ratio: nothing in it takes the loss to be a plain sum."""
    pair, x, found = Continuous(6), X.expand(6, 3), []
    for scale in (1.0, 0.25):
        torch.manual_seed(3)
        loss = IWAE(4, gradient=D).differentiable_loss(pair.model, pair.guide, x) * scale
        found.append(torch.autograd.grad(loss, list(pair.parameters())))
    for whole, quarter in zip(*found, strict=True):
        assert_close(whole / 4, quarter, **EXACT)


class Upwards(nn.Module):
    """A hierarchical guide, q(a|x) q(b|a): what the guide makes of a draw is not weighed, and not held."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.full((n,), v, dtype=torch.float64)) for v in (0.3, 0.8))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            a = pyro.sample("a", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(self.a, 0.9))
            pyro.sample("b", dist.Normal(self.b * a, 0.7))


@pytest.mark.parametrize("gradient", [DoublyReparameterised(), LeaveOneOut(), ScoreFunction()], ids=repr)
def test_a_hierarchical_guide_has_the_gradient_of_the_reparameterised_one(gradient: GradientEstimator) -> None:
    x = torch.full((40_000,), 0.5, dtype=torch.float64)
    pairs = [Upwards(len(x)), Upwards(len(x))]
    for pair, bound in zip(pairs, (IWAE(4), IWAE(4, gradient=gradient)), strict=True):
        torch.manual_seed(4)
        bound.bound(pair.model, pair.guide, x).sum().backward()
    plain, other = pairs
    for name in ("a", "b"):
        difference = getattr(plain, name).grad - getattr(other, name).grad
        assert difference.abs().max() > 0.1
        assert_mean(difference, 0.0, least=0.08)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(5, gradient=Enumerated()), "gradient=enumerated: is none of IWAE, which has reparameterised, "),
        (lambda: ELBO(gradient=DoublyReparameterised()), "gradient=doubly-reparameterised: is none of ELBO"),
        (lambda: Renyi(0.5, gradient=WakeSleep()), "gradient=wake-sleep: is none of Renyi"),
        (lambda: ELBO(gradient="score-function"), "gradient='score-function': is none of ELBO"),
        (lambda: ELBO(gradient=LeaveOneOut()), "gradient=leave-one-out: needs several particles, got one"),
        (lambda: IWAE(gradient=WakeSleep()), "gradient=wake-sleep: needs several particles"),
        (lambda: ELBO(beta=Capacity(), gradient=S), "gradient=score-function: is for a bound of each row by itself"),
        (lambda: Relaxed(0.0), None),
        (lambda: ELBO(gradient=Relaxed(0.0)), "temperature: expected a number above 0"),
        (lambda: Thermodynamic(3, 0), "partitions"),
        (lambda: Thermodynamic(3, 4, 1.0), "first: expected a number between 0 and 1"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_by_name(make: Callable, message: str | None) -> None:
    if message is None:
        make()
        return
    with pytest.raises(UsageError, match=message):
        make()


class Wide(nn.Module):
    """Thirteen bits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(13).double())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((13,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))


def test_what_an_estimator_cannot_do_for_a_pair_is_refused_by_name() -> None:
    x = X.expand(2, 3)
    cases = (
        (Discrete(2), ELBO(), r"'z' \(Bernoulli\) .*score; use `gradient=score-function` or .* or `gradient=relaxed`$"),
        (Discrete(2), IWAE(2), r"'z' \(Bernoulli\) .* or `gradient=leave-one-out` or `gradient=wake-sleep` or"),
        (Discrete(2), IWAE(2, gradient=D), r"'z' \(Bernoulli\) has no reparameterised sampler"),
        (Discrete(2), ELBO(gradient=StickingTheLanding()), r"'z' \(Bernoulli\) has no reparameterised sampler"),
        (Continuous(2), ELBO(gradient=Enumerated()), "no discrete site of finitely many states"),
        (Continuous(2), ELBO(gradient=Relaxed()), "no site that is Bernoulli or one-hot"),
        (Assignments(2), ELBO(gradient=Relaxed()), r"'z' \(Categorical\) .* or `gradient=enumerated`$"),
        (Wide(), ELBO(gradient=Enumerated()), "'z': has 8192 states, and at most 4096 are summed"),
    )
    for pair, bound, message in cases:
        with pytest.raises(PairError, match=message):
            bound.differentiable_loss(pair.model, pair.guide, x)


# ------------------------------------------------------------------------------------------------------------- training


class Network(nn.Module):
    """A small sigmoid belief net in single precision: four bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prior, self.encoder, self.decoder = nn.Parameter(torch.zeros(4)), nn.Linear(3, 4), nn.Linear(4, 3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


ROWS = (torch.rand(23, 3, generator=torch.Generator().manual_seed(3)) < 0.4).float()


def trained(bound: OfParticles, **options: object) -> tuple[list[float], list[Tensor]]:
    pair = Network()
    settings = {"epochs": 3, "batch_size": 5, "seed": 7} | options
    history = fit(pair.model, pair.guide, ROWS, bound, **settings).history
    return [epoch["train_bound"] for epoch in history], [p.detach().clone() for p in pair.parameters()]


@pytest.mark.slow
def test_training_compiled_is_training_eager() -> None:
    """Through the compiler itself."""
    (bounds, found), (own, wanted) = (trained(IWAE(4, gradient=L), compile=mode) for mode in ("on", "off"))
    assert bounds == pytest.approx(own, rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bound", [IWAE(4, gradient=L), ELBO(gradient=Enumerated()), ELBO(gradient=Relaxed())], ids=repr
)
def test_resumed_is_never_stopped(tmp_path: Path, bound: OfParticles) -> None:
    seen = iter(range(1, 100))
    never = trained(bound)
    trained(bound, directory=tmp_path, should_stop=lambda: next(seen) == 7)
    again = trained(bound, directory=tmp_path, resume=True)
    assert again[0] == never[0]
    assert all(torch.equal(a, b) for a, b in zip(again[1], never[1], strict=True))
    other = ELBO(gradient=ScoreFunction())
    with pytest.raises(CheckpointError, match="gradient=ScoreFunction"):
        trained(other, directory=tmp_path, resume=True)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("gradient", ["vimco", "enumerated"])
def test_the_shipped_pair_of_bits_is_trained_from_the_command(tmp_path: Path, gradient: str) -> None:
    """The bound of validation rows rises; the configuration records how it was trained."""
    several = {"elbo": "iwae", "K": 5} if gradient == "vimco" else {"elbo": "elbo"}
    run = train(
        {"data": "digits", "epochs": 5, "latent_dim": [4], "network": {"hidden": [20]}, "seed": 1, "eval_rows": 50,
         "eval_K": 20, "compile": "off", "device": "cpu", "prior": "IndependentBernoulli", "lr": 0.01,
         "guide": "BernoulliGuide", "gradient": gradient, **several},
        tmp_path / "run", plots=False,
    )  # fmt: skip
    bounds = run.history["validation_bound"].tolist()
    assert bounds[-1] > bounds[0] + 0.5
    recorded = yaml.safe_load((run.directory / "config.yaml").read_text())["gradient"]
    assert recorded == {"name": {"vimco": "leave-one-out"}.get(gradient, gradient)}


def test_training_says_that_a_gradient_is_biased() -> None:
    for bound, said in ((IWAE(4, gradient=WakeSleep()), True), (IWAE(4, gradient=L), False)):
        notes: list[str] = []
        trained(bound, epochs=1, on_notice=notes.append)
        assert any("the wake-sleep gradient is biased: the guide's part is of KL(p || q)" in n for n in notes) == said


def test_noise_is_that_of_known_draws() -> None:
    """Gaussian draws of known mean and sd, and a reference beside them that is off by a known vector, or is not."""
    torch.manual_seed(0)
    draws, sd = 4000, torch.tensor([1.0, 2.0, 0.5]).double()
    mean = torch.tensor([0.1, 0.0, -0.1]).double()
    reference = mean + sd * torch.randn(draws, 3, dtype=torch.float64)
    shift = torch.tensor([0.04, -0.03, -0.01]).double()
    off = noise_of(reference + shift + 0.1 * torch.randn(draws, 3), reference)
    right = noise_of(reference + 0.1 * torch.randn(draws, 3), reference)
    wanted = (((mean + shift) / (sd.square() + 0.01).sqrt()) ** 2).mean().sqrt().item()
    assert off.snr.low < wanted < off.snr.high
    assert off.variance.low < (sd.square() + 0.01).mean().item() < off.variance.high
    assert off.bias_t > 10
    assert off.bias == pytest.approx((shift.norm() / mean.norm()).item(), rel=0.5)
    assert abs(right.bias_t) < 4
    silent = noise_of(torch.randn(200, 50, dtype=torch.float64), torch.randn(200, 50, dtype=torch.float64))
    assert silent.snr.value < 0.03  # plugged in, it would be 1 / sqrt(200) = 0.07
    assert silent.snr.high < 0.06


def test_sides_are_told_apart_and_draws_depend_on_their_number_alone() -> None:
    pair, x = Network(), ROWS[:4]
    whole, batch = Pair(pair.model, pair.guide), Batch(x)
    of = sides(whole, batch)
    assert all("encoder" in name for name in of["guide"])
    assert len(of["guide"]) == 2
    assert len(of["model"]) == 3
    places = elements(whole, batch)
    few, many = (sampled_gradients(whole, batch, IWAE(3, gradient=L), places, d) for d in (10, 12))
    for side in ("model", "guide"):
        assert torch.equal(few[side], many[side][:10])
    assert {side: found.shape[1] for side, found in many.items()} == {"model": 4 + 4 * 3 + 3, "guide": 3 * 4 + 4}


def test_the_command_says_which_estimators_are_biased(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run of digits: VR-max's and sticking the landing's bias is seen, the others' is not."""
    run = train(
        {"data": "digits", "elbo": "iwae", "K": 8, "epochs": 8, "latent_dim": [4], "network": {"hidden": [20]},
         "seed": 1, "eval_rows": 20, "eval_K": 20, "compile": "off", "device": "cpu"},
        tmp_path / "run", plots=False,
    )  # fmt: skip
    words = "reparameterised,doubly-reparameterised,sticking-the-landing,vr-max"
    command([str(run.directory), "--K", "8", "--draws", "120", "--rows", "10", "--gradients", words])
    said = capsys.readouterr().out
    table = pd.read_csv(run.directory / "gradients.csv").set_index(["gradient", "parameters"])
    biased = {word for word, side in table.index if side == "guide" and abs(table.bias_t[word, side]) > 4}
    assert biased == {"sticking-the-landing", "vr-max"}
    assert table.variance["doubly-reparameterised", "guide"] < 0.5 * table.variance["reparameterised", "guide"]
    assert table.snr_low["doubly-reparameterised", "guide"] > table.snr["reparameterised", "guide"]
    assert "sticking-the-landing is biased: what it leaves out has expectation 0 for K = 1 alone" in said
    assert (run.directory / "plots" / "gradients.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match="gradients: enumerated is not of iwae"):
        command([str(run.directory), "--gradients", "enumerated"])
