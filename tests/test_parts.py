"""One contract for every prior, likelihood and guide, and for the networks under them."""

import copy
import inspect
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT, assert_mean
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.testing import assert_close

import pyrovae
from pyrovae.columns import parse
from pyrovae.errors import DataError, UsageError
from pyrovae.models import (
    MLP,
    VAE,
    AutoregressivePrior,
    Bernoulli,
    BernoulliMixture,
    ConvDecoder,
    ConvEncoder,
    FlowPrior,
    FullCovarianceNormal,
    GatedMarkov,
    Gaussian,
    HierarchicalVAE,
    IsotropicNormal,
    LogisticNormalGuide,
    LogisticNormalPrior,
    LowRankNormal,
    Markov,
    MarkovGuide,
    MaskedConvolutions,
    MeanFieldNormal,
    MixtureOfGaussians,
    Network,
    OrnsteinUhlenbeck,
    StandardNormal,
    StepEncoder,
    TransformerCodes,
    UniformCodes,
    VampPrior,
    VectorQuantiser,
)
from pyrovae.models.flow_guides import FlowGuide
from pyrovae.models.flow_priors import FlowedPrior
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.likelihoods import Likelihood
from pyrovae.models.priors import Prior
from pyrovae.runs import options
from pyrovae.runs.parts import Choice, Class
from pyrovae.settings import Either, Several, Words, kind_of, read

Z = 2
# Whose distributions have a mean, but none in closed form.
AUTOREGRESSIVE = (MaskedConvolutions, TransformerCodes)
WITHOUT_MEAN = (
    FlowPrior,
    FlowedPrior,
    AutoregressivePrior,
    FlowGuide,
    OrnsteinUhlenbeck,
    Markov,
    GatedMarkov,
    MarkovGuide,
    LogisticNormalPrior,
    LogisticNormalGuide,
    *AUTOREGRESSIVE,
)
WITHOUT_PARAMETERS = (StandardNormal, IsotropicNormal, UniformCodes)


def encoder(shape: tuple[int, ...]) -> Network:
    if len(shape) == 1:
        return MLP(shape, hidden=(7,))
    return ConvEncoder(shape, channels=(3, 4), hidden=6, activation="silu")


def decoder(shape: tuple[int, ...], latent_dim: int = Z) -> Network:
    if len(shape) < 3:
        return MLP(latent_dim, shape, hidden=(7,))
    return ConvDecoder(latent_dim, shape, channels=(3, 4), hidden=6, activation="silu")


LEVELS = 5  # of grey
# Settings with which parts are small enough to be looked at from everywhere.
SMALL = {"components": 3, "rank": 1, "layers": 2, "hidden": 5, "bins": 4, "steps": 2}
SMALL |= {"codes": 3, "code_dim": 1, "temperature": 5.0, "heads": 1, "reach": 1}


def variants(choice: Choice) -> list[dict[str, object]]:
    """Settings of a class: its defaults, each other word, and a number where a word or a number is asked for."""
    small = {key: value for key, value in SMALL.items() if key in choice.settings}
    found: list[dict[str, object]] = []
    for key, setting in choice.settings.items():
        kinds = setting.kind.kinds if isinstance(setting.kind, Either) else (setting.kind,)
        words = [word for kind in kinds if isinstance(kind, Words) for word in kind.names]
        numbers = [0.7] if words and len(kinds) > 1 else []
        found += [{**small, key: value} for value in (*numbers, *words)]
    return found or [small]


def named(cls: type, settings: dict[str, object], kind: str) -> str:
    """Gaussian(learned)-MLP."""
    words = ", ".join(str(value) for key, value in settings.items() if key not in SMALL)
    return f"{cls.__name__}{f'({words})' if words else ''}-{kind}"


def likelihood(cls: type[Likelihood], settings: dict[str, object], event: tuple[int, ...]) -> Likelihood:
    taken = inspect.signature(cls).parameters
    offered = {name: value for name, value in (("levels", LEVELS), ("columns", TABLE)) if name in taken}
    return cls(decoder(cls.decoder_shape(event, **offered, **settings)), **offered, **settings)


def classes(part: str) -> list[tuple[type, dict[str, object], tuple[str, ...]]]:
    """Every class of a part, with settings, and what its constructor takes from the pair."""
    choices = options.PARTS[part].values()
    return [(c.classes[0].load(), settings, c.classes[0].takes) for c in choices for settings in variants(c)]


def attached(guide: Guide) -> Guide:
    """A guide that knows a log p(x, z), as those that refine by it do of a VAE's."""
    dims = len(guide.event_shape)
    guide.attach(lambda x, z: -(z - x.flatten(x.ndim - dims).sin().sum(-1, keepdim=True)).square().sum(-1))
    return guide


GUIDES: dict[str, Callable[[], Guide]] = {
    named(cls, settings, kind): lambda cls=cls, shape=shape, settings=settings: attached(
        cls(encoder(shape), Z, **settings)
    )
    for cls, settings, takes in classes("guide")
    if "prior" not in takes
    for kind, shape in (("MLP", (4,)), ("Conv", (1, 5, 3)))
} | {
    named(cls, settings, "Steps"): lambda cls=cls, settings=settings: cls(
        StepEncoder((Z, 3), hidden=(4,)), Z, GatedMarkov(Z, Z), **settings
    )
    for cls, settings, takes in classes("guide")
    if "prior" in takes
}


def two_layers(below: Guide) -> list[Guide]:
    """A guide and one of its codes, as a hierarchy has them."""
    return [below, MeanFieldNormal(MLP(Z, hidden=(7,)), Z)]


def prior(cls: type[Prior], settings: dict[str, object], takes: tuple[str, ...], guide: Guide) -> Prior:
    """A prior, with what it takes from a pair of that guide."""
    offered: dict[str, Callable[[], object]] = {
        "latent_dim": lambda: Z,
        "event_shape": lambda: guide.event_shape,
        "guide": lambda: guide,
        "guides": lambda: two_layers(guide),
        "quantiser": lambda: VectorQuantiser(encoder((4,)), Z, codes=3, code_dim=1),
    }
    return cls(**{name: offered[name]() for name in takes}, **settings)


UNCONDITIONAL = [entry for entry in classes("prior") if issubclass(entry[0], Prior)]  # others: test_conditional
PRIORS: dict[str, Callable[[], Prior]] = {
    named(cls, settings, "").rstrip("-"): lambda cls=cls, settings=settings, takes=takes: prior(
        cls, settings, takes, MeanFieldNormal(encoder((4,)), Z)
    )
    for cls, settings, takes in UNCONDITIONAL
    if not {"guide", "guides"} & set(takes)
} | {
    f"{cls.__name__}({name})": lambda cls=cls, make=make, settings=settings, takes=takes: prior(
        cls, settings, takes, make()
    )
    for cls, settings, takes in UNCONDITIONAL
    if {"guide", "guides"} & set(takes)
    for name, make in GUIDES.items()
    if not make().of_pair and make().latents != "codes" and name.endswith("-MLP")
}
# Events of two numbers for densities, which are integrated over the plane; of a few elements for masses.
EVENTS = {
    "density": {"MLP": (2,), "Conv": (1, 2, 1)},
    "mass": {"MLP": (4,), "Conv": (1, 2, 3)},
    "levels": {"MLP": (3,), "Conv": (1, 2, 2)},
    "counts": {"MLP": (2,), "Conv": (1, 2, 1)},
    "columns": {"MLP": (5,)},
    "documents": {"MLP": (3,)},
}
TABLE = parse("a=continuous,b=count,c=binary,d=categorical:3,e=continuous")
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    named(cls, settings, kind): lambda cls=cls, settings=settings, event=event: likelihood(cls, settings, event)
    for cls, settings, _ in classes("likelihood")
    for kind, event in ({"Conv": (3, 1, 1)} if "autoregressive" in settings.values() else EVENTS[cls.measure]).items()
}
# The values of an element that a mass of each measure is on.
POINTS = {"mass": [0.0, 1.0], "levels": [float(level) for level in range(LEVELS)]}
MASSES = [name for name, make in LIKELIHOODS.items() if make().measure in POINTS]
TABLES = [name for name, make in LIKELIHOODS.items() if make().measure == "columns"]
COUNTS = [name for name, make in LIKELIHOODS.items() if make().measure == "counts"]
DOCUMENTS = [name for name, make in LIKELIHOODS.items() if make().measure == "documents"]  # sums: test_topics.py
PARTS = {**GUIDES, **LIKELIHOODS, **PRIORS}


def every(parts: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", parts)


def borrowed(part: nn.Module) -> tuple[nn.Module, ...]:
    """The guides of the pair that a prior is made of, or the prior of a guide, whose parameters are not its own."""
    return (*getattr(part, "_guide", ()), *getattr(part, "_guides", ()), *getattr(part, "_prior", ()))


def shared(part: nn.Module) -> tuple[Guide, ...]:
    """All guides of the pair that a prior knows, of which it may use no more than a codebook."""
    return (*borrowed(part), *getattr(part, "_quantiser", ()))


def build(name: str) -> nn.Module:
    """The part in double precision, its parameters away from any special start."""
    part = PARTS[name]().double()
    with torch.no_grad():
        for module in (part, *(guide.double() for guide in shared(part))):
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return part


def apply(part: nn.Module, batch: tuple[int, ...]) -> tuple[dist.Distribution, Tensor]:
    """The part's distribution for a random input of that batch shape, and the input."""
    if isinstance(part, Prior):
        return part().expand(batch), torch.zeros(*batch, 0)
    shape = part.event_shape if isinstance(part, Guide) else part.latent_shape
    value = torch.randn(*batch, *shape, dtype=torch.float64)
    if isinstance(part, Likelihood) and part.latents == "points of a simplex":
        value = value.softmax(-1)
    return part(value), value


def event_shape(part: nn.Module) -> tuple[int, ...]:
    return part.event_shape if isinstance(part, Likelihood) else (Z,)


def values(part: nn.Module, batch: tuple[int, ...]) -> Tensor:
    """Random values in the support."""
    out = torch.randn(*batch, *event_shape(part), dtype=torch.float64)
    if not isinstance(part, Likelihood):
        if part.latents == "codes":
            return part.codebook[torch.randint(3, out.shape), 0]
        one_hot = torch.nn.functional.one_hot(out.argmax(-1), Z).double()
        return {
            "real numbers": out,
            "bits": (out > 0).double(),
            "one-hot vectors": one_hot,
            "points of a simplex": out.softmax(-1),
        }[part.latents]
    return {
        "mass": (out > 0).double(),
        "levels": (LEVELS * out.sigmoid()).floor(),
        "counts": (3 * out.abs()).floor(),
        "documents": (3 * out.abs()).floor(),
        "columns": torch.cat(
            [out[..., :1], out[..., 1:2].abs().round(), (out[..., 2:4] > 0).double(), out[..., 4:]], -1
        ),
        "density": out.sigmoid(),
    }[part.measure]


@every(PARTS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_batch_is_the_loop_over_its_elements(name: str, batch: tuple[int, ...]) -> None:
    """For every batch shape: event and batch shapes as documented, and each log_prob that of its element alone."""
    part = build(name)
    p, given = apply(part, batch)
    value = values(part, batch)
    assert p.batch_shape == batch
    assert p.event_shape == event_shape(part)
    assert p.sample().shape == (*batch, *event_shape(part))
    found = p.log_prob(value)
    assert found.shape == batch
    for index in itertools.product(*map(range, batch)):
        alone = part() if isinstance(part, Prior) else part(given[index])
        assert_close(found[index], alone.log_prob(value[index]), **EXACT)
    if batch and (name not in DISCRETE or isinstance(part, Guide)):  # of few states, draws may be alike
        assert found.std() > 1e-3


@every(PARTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    """No parameter is dead: a VampPrior reaches its guide's too, though it does not own them."""
    part = build(name)
    p, _ = apply(part, (5,))
    loss = p.log_prob(values(part, (5,))).square().sum()
    if isinstance(part, WITHOUT_PARAMETERS):
        assert not list(part.parameters())
        return
    loss.backward()
    parameters = dict(part.named_parameters())
    if isinstance(part, Prior) and (guides := borrowed(part)):
        assert set(parameters) == {"pseudo_inputs"}
        *below, top = guides
        parameters |= dict(top.named_parameters())
        for guide in below:  # of which one point is passed on: its location, though not all of a flow
            parameters |= {f"below, {name}": p for name, p in guide.head.named_parameters()}
    assert parameters
    for parameter_name, parameter in parameters.items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


# Coordinates in which densities that are not on all of the line, fall slowly or have an edge at their mean are smooth
# and end: x, t and dx/dt.
COORDINATES: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "Beta": (torch.sigmoid, torch.logit, lambda t: t.sigmoid() * (-t).sigmoid()),
    "LogNormal": (torch.exp, torch.log, torch.exp),
    "Laplace": (lambda t: t**3, lambda x: x.sign() * x.abs() ** (1 / 3), lambda t: 3 * t**2),
    "StudentT": (lambda t: torch.sinh(3 * t), lambda x: torch.asinh(x) / 3, lambda t: 3 * torch.cosh(3 * t)),
}


def density_on_a_grid(p: dist.Distribution, shape: tuple[int, ...], name: str = "") -> tuple[Tensor, Tensor]:
    """Points (P, 2) and probabilities (P,) of a density in two dimensions, by the trapezoid rule."""
    straight = (lambda t: t, lambda x: x, torch.ones_like)
    cls = name.split("(")[0].split("-")[0]
    x_of, t_of, slope = COORDINATES.get(cls, straight)
    edge = p.mean.detach().flatten() if cls == "Laplace" else 0.0
    draws = t_of(p.sample((2000,)).flatten(1) - edge)
    centre, reach = draws.mean(0), (15 if cls in COORDINATES else 10) * draws.std(0)
    axes = [torch.linspace(c - r, c + r, 401, dtype=torch.float64) for c, r in zip(centre, reach, strict=True)]
    grid = torch.cartesian_prod(*axes)
    points = x_of(grid) + edge
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes) * slope(grid).prod(1)
    return points, p.log_prob(points.reshape(-1, *shape)).exp() * cell


# The density of a continuous Bernoulli jumps at 0 and 1: tests/test_continuous_bernoulli.py integrates between them;
# tails of a Student t reach beyond any grid: tests/test_student_prior.py.
ELSEWHERE = ("ContinuousBernoulli", "StudentTPrior")
DISCRETE = [n for n in (*GUIDES, *PRIORS) if PARTS[n]().latents in ("bits", "one-hot vectors", "codes")]
SHARES = [n for n in (*GUIDES, *PRIORS) if PARTS[n]().latents == "points of a simplex"]
OF_THEIR_OWN = (*MASSES, *COUNTS, *TABLES, *DOCUMENTS, *DISCRETE, *SHARES)
CONTINUOUS = [n for n in PARTS if n not in OF_THEIR_OWN and not n.startswith(ELSEWHERE)]


@every(CONTINUOUS)
def test_density_integrates_to_1_and_is_what_is_sampled(name: str) -> None:
    """Quadrature over the plane: total 1, and the first and second moments are those of samples to 5 s.e."""
    part = build(name)
    with torch.no_grad():
        p, _ = apply(part, ())
        points, mass = density_on_a_grid(p, event_shape(part), name)
        # A spline's density has corners, where the rule is of second order; tests/test_flows.py goes around them.
        assert mass.sum().item() == pytest.approx(1, abs=1e-4 if "Spline" in name else 1e-6)
        samples = p.sample((20_000,)).flatten(1)
        moments = torch.cat([samples, samples**2, samples.prod(1, keepdim=True), samples.tanh()], 1)
        wanted = torch.cat([points, points**2, points.prod(1, keepdim=True), points.tanh()], 1)
        assert_mean(moments, mass @ wanted)


@pytest.mark.parametrize("name", MASSES)
def test_masses_sum_to_1_and_are_what_is_sampled(name: str) -> None:
    """All 2^D or L^D images: total 1, and their frequencies are those of samples to 5 s.e."""
    part = build(name)
    p, _ = apply(part, ())
    D = math.prod(part.event_shape)
    images = torch.tensor(list(itertools.product(POINTS[part.measure], repeat=D)), dtype=torch.float64)
    mass = p.log_prob(images.reshape(-1, *part.event_shape)).exp().detach()
    assert mass.sum().item() == pytest.approx(1, abs=1e-10)
    samples = p.sample((20_000,)).flatten(1)
    least = 0.03 * POINTS[part.measure][-1]
    assert_mean(samples, mass @ images, least=least)
    assert_mean(samples.unsqueeze(2) * samples.unsqueeze(1), torch.einsum("p,pi,pj->ij", mass, images, images))
    near = {"rtol": 0, "atol": 0.1} if "autoregressive" in name else EXACT  # tests/test_levels.py says why
    assert_close(mass @ images, p.mean.detach().flatten(), **near)


@pytest.mark.parametrize("name", DISCRETE)
def test_masses_of_latents_sum_to_1_and_are_what_is_sampled(name: str) -> None:
    """All states of Z bits, Z one-hot vectors, or Z codes: total 1, their mean, and frequencies of samples to 5 s.e."""
    part = build(name)
    with torch.no_grad():
        p, _ = apply(part, ())
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * Z)
        if part.latents == "one-hot vectors":
            states = states[states.sum(1) == 1]
        elif part.latents == "codes":
            states = torch.cartesian_prod(*[part.codebook[:, 0]] * Z)
            assert torch.equal(p.enumerate_support(expand=False), states)
        mass = p.log_prob(states).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-10)
        assert mass.std() > 1e-3 or isinstance(part, WITHOUT_PARAMETERS)
        if not isinstance(part, AUTOREGRESSIVE):
            assert_close(mass @ states, p.mean, **EXACT)
        samples = p.sample((20_000,))
        same = (samples[:, None] == states).all(-1).double()
        assert_mean(same, mass)


@pytest.mark.parametrize("name", SHARES)
def test_densities_of_shares_integrate_to_1_and_are_what_is_sampled(name: str) -> None:
    """Of two shares: over the log-ratio, in which dz_1 = z_1 z_2 dv."""
    part = build(name)
    p, _ = apply(part, ())
    v = torch.linspace(-150, 150, 300_001, dtype=torch.float64)
    z = torch.stack([v.sigmoid(), (-v).sigmoid()], -1)
    mass = (p.log_prob(z) + z.log().sum(-1)).exp() * (v[1] - v[0])
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert_mean(p.sample((20_000,)), mass @ z)


@pytest.mark.parametrize("name", COUNTS)
def test_masses_of_counts_sum_to_1_and_are_what_is_sampled(name: str) -> None:
    """Pairs of counts up to 400: total 1, mean and variance as the distribution says, and as samples have them."""
    part = build(name)
    with torch.no_grad():
        p, _ = apply(part, ())
        counts = torch.arange(400.0, dtype=torch.float64)
        points = torch.cartesian_prod(counts, counts)
        mass = p.log_prob(points.reshape(-1, *part.event_shape)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)
        mean, second = mass @ points, mass @ points**2
        assert_close(mean, p.mean.flatten(), rtol=1e-6, atol=0)
        assert_close(second - mean**2, p.variance.flatten(), rtol=1e-5, atol=0)
        samples = p.sample((20_000,)).flatten(1)
        for f in (lambda x: (x == 0).double(), lambda x: (x == 1).double(), lambda x: (x / 3).tanh()):
            assert_mean(f(samples), mass @ f(points), least=0.03)


@pytest.mark.parametrize("name", [n for n in PRIORS if n.startswith(("Mixture", "Vamp"))])
def test_mixture_priors_against_an_explicit_loop(name: str) -> None:
    """log p(z) = log sum_c pi_c p_c(z), one component at a time, also under plates."""
    prior = build(name)
    z = values(prior, (4, 5))
    total = torch.zeros(4, 5, dtype=torch.float64)
    for c in range(prior.components):
        if isinstance(prior, VampPrior):
            weight, component = 1 / prior.components, prior._guide[0](prior.pseudo_inputs[c])
        else:
            weight = prior.logits.softmax(0)[c]
            scale = prior.floor + softplus(prior.raw_scale[c])
            component = dist.MultivariateNormal(prior.loc[c], torch.diag(scale**2))
        total = total + weight * component.log_prob(z).exp()
    assert_close(prior().log_prob(z), total.log(), **EXACT)
    assert_close(prior().expand((4, 5)).log_prob(z), total.log(), **EXACT)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_standard_normal(latent_dim: int) -> None:
    """-(Z log 2 pi + |z|^2)/2."""
    z = torch.randn(6, latent_dim, dtype=torch.float64)
    wanted = -(latent_dim * math.log(2 * math.pi) + z.square().sum(-1)) / 2
    assert_close(StandardNormal(latent_dim).double()().log_prob(z), wanted, **EXACT)


def test_guides_say_the_parameters_they_document() -> None:
    """N(m, diag s^2), N(m, L L'), N(m, F F' + diag s^2), from the head's output in the documented order."""
    z = 3
    x = torch.randn(5, 4, dtype=torch.float64)
    for guide in (MeanFieldNormal(MLP(4), z), FullCovarianceNormal(MLP(4), z), LowRankNormal(MLP(4), z, rank=2)):
        guide.double()
        out, q = guide.parameters_of(x), guide(x)
        scale = softplus(out[:, z : 2 * z]) + SCALE_FLOOR
        if isinstance(guide, FullCovarianceNormal):
            L = torch.diag_embed(scale)
            for k, (i, j) in enumerate([(1, 0), (2, 0), (2, 1)]):
                L[:, i, j] = out[:, 2 * z + k]
            covariance = L @ L.mT
        elif isinstance(guide, LowRankNormal):
            F = 0.1 * out[:, 2 * z :].reshape(5, z, 2)
            covariance = F @ F.mT + torch.diag_embed(scale**2)
        else:
            covariance = torch.diag_embed(scale**2)
        wanted = dist.MultivariateNormal(out[:, :z], covariance)
        value = torch.randn(7, 5, z, dtype=torch.float64)
        assert_close(q.log_prob(value), wanted.log_prob(value), **EXACT)
        assert_close(q.mean, out[:, :z], **EXACT)


@every(PARTS)
def test_state_dict_round_trip(name: str) -> None:
    """A part loaded with another's state is that part."""
    first = build(name)
    torch.manual_seed(12345)
    second = build(name)
    for theirs, ours in zip(shared(second), shared(first), strict=True):  # parameters of the pair
        theirs.load_state_dict(ours.state_dict())
    batch = (3,)
    torch.manual_seed(2)
    p, given = apply(first, batch)
    value = values(first, batch)

    def other() -> Tensor:
        return (second() if isinstance(second, Prior) else second(given)).log_prob(value)

    if not isinstance(first, WITHOUT_PARAMETERS):
        assert (other() - p.log_prob(value)).abs().max() > (1e-3 if name not in DISCRETE else 1e-5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(other(), (first() if isinstance(first, Prior) else first(given)).log_prob(value))


@every(PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows(name: str, dtype: torch.dtype) -> None:
    """Everything a part computes has the dtype of its parameters, and float32 agrees with float64."""
    exact = build(name)
    part = copy.deepcopy(exact).to(dtype)
    for guide in shared(part):
        guide.to(dtype)
    p, given = apply(exact, (3,))
    value = values(exact, (3,))
    q = part() if isinstance(part, Prior) else part(given.to(dtype))
    assert q.sample().dtype == q.log_prob(value.to(dtype)).dtype == dtype
    if isinstance(borrowed(part)[-1] if borrowed(part) else part, WITHOUT_MEAN):
        with pytest.raises(NotImplementedError):
            q.mean  # noqa: B018
    else:
        assert q.mean.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-12
    assert_close(q.log_prob(value.to(dtype)).double(), p.log_prob(value), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# How parts start, and their floors


@pytest.mark.parametrize("name", ["Bernoulli-MLP", "Bernoulli-Conv"])
def test_bernoulli_starts_at_the_mean_of_the_data(name: str) -> None:
    """decoder(z) less what the weights add is the logit of the mean, clipped to [0.001, 0.999], element by element."""
    part = build(name)
    x = torch.bernoulli(torch.rand(part.event_shape).double().expand(50, *part.event_shape))
    x[:, ..., 0] = 1.0
    x[:, ..., 1] = 0.0
    z = torch.randn(6, Z, dtype=torch.float64)
    weights_add = part.decoder(z) - part.decoder.output_bias.reshape(part.event_shape)
    part.initialise(x)
    assert_close(part.decoder(z) - weights_add, torch.logit(x.mean(0).clamp(1e-3, 1 - 1e-3)).expand(6, *x.shape[1:]))
    assert x.mean(0).std() > 0.1


def starts() -> list[str]:
    """Families of a location and a scale."""
    families = ("Gaussian", "Laplace", "StudentT", "LogNormal", "DiscretizedLogistic(")
    return [name for name in LIKELIHOODS if name.startswith(families)]


@pytest.mark.parametrize("name", starts())
def test_location_and_scale_start_at_the_moments_of_the_data(name: str) -> None:
    """Without the weights, the mean is that of x and the sd half that of x (pooled if one for all)."""
    part = build(name)
    spread = torch.linspace(0.5, 2.0, math.prod(part.event_shape)).double().reshape(part.event_shape)
    x = 3 + spread * torch.randn(400, *part.event_shape, dtype=torch.float64)
    if part.mean == "sigmoid":
        x = (x - 3).sigmoid()
    z = torch.randn(6, Z, dtype=torch.float64)
    shape = part.decoder.out_shape
    weights_add = part.decoder(z) - part.decoder.output_bias.reshape(shape)
    part.initialise(x.exp() if name.startswith("LogNormal") else x)
    start = (part.decoder(z) - weights_add).detach()
    deviation = 0.5 * (x - x.mean(0)).square().mean(0).sqrt()
    if part.scale == "predicted":
        start, raw_scale = start.unbind(1)
        scale = part.unit * (part.floor + softplus(raw_scale))
    else:
        scale = part.loc_and_scale(z)[1]
    law = {"Laplace": math.sqrt(2), "StudentT": math.sqrt(5 / 3), "DiscretizedLogistic": math.pi / math.sqrt(3)}
    deviation = deviation / law.get(type(part).__name__, 1.0)
    if part.scale in ("learned", "optimal"):
        deviation = deviation.square().mean().sqrt()
    elif part.scale == 0.7:
        deviation = torch.tensor(0.7, dtype=torch.float64)
    assert part.unit.item() == pytest.approx((x - x.mean(0)).square().mean().sqrt().item(), rel=1e-12)
    mean = start.sigmoid() if part.mean == "sigmoid" else part.unit * start
    assert_close(mean, x.mean(0).expand_as(start), **EXACT)
    assert_close(scale, deviation.expand_as(scale), rtol=0, atol=1e-8)


@every(GUIDES)
def test_guides_start_centred(name: str) -> None:
    """After `initialise` the encoder sees data of mean 0 and mean square 1."""
    guide = build(name)
    seen = []
    guide.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = 4 + 3 * torch.randn(30, *guide.event_shape, dtype=torch.float64)
    guide(x)
    guide.initialise(x)
    guide(x)
    assert torch.equal(seen[0], x)
    assert_close(seen[1].mean(0), torch.zeros(guide.event_shape).double(), **EXACT)
    assert seen[1].square().mean().item() == pytest.approx(1, abs=1e-10)


def test_vamp_prior_starts_at_rows_of_the_data() -> None:
    """Pseudo-inputs are distinct rows while they last, and no two are equal when they do not."""
    x = 10 * torch.randn(6, 4, dtype=torch.float64)
    for components in (4, 6, 15):
        prior = VampPrior(MeanFieldNormal(MLP(4), Z).double(), 4, components).double()
        prior.initialise(x)
        distance = torch.cdist(prior.pseudo_inputs.detach(), x)
        rows = distance.argmin(1)
        assert (distance.min(1).values < 0.2).all()
        counts = rows.bincount(minlength=6)
        assert counts.max() - counts.min() <= 1
        apart = torch.cdist(prior.pseudo_inputs, prior.pseudo_inputs) + torch.eye(components)
        assert (apart > 1e-4).all()


@pytest.mark.parametrize("scale", ["learned", "per-dimension", "predicted"])
def test_gaussian_scale_has_a_floor_and_says_so(scale: str) -> None:
    """No parameter drives the scale below the floor, and `scale_at_floor` is the share of elements that are there."""
    part = Gaussian(decoder((2, 4) if scale == "predicted" else (4,)), scale, floor=0.05).double()
    z = torch.randn(6, Z, dtype=torch.float64)
    assert part.scale_at_floor(z) == 0
    with torch.no_grad():
        if scale == "predicted":
            part.decoder.output_bias.view(2, 4)[1, :2] = -1e4
        elif scale == "per-dimension":
            part.raw_scale[:2] = -1e4
        else:
            part.raw_scale.fill_(-1e4)
    found = part(z).stddev
    share = 1.0 if scale == "learned" else 0.5
    assert (found >= 0.05).all()
    assert (found == 0.05).double().mean() == share
    assert part.scale_at_floor(z) == share
    if scale == "learned":
        for above, at_floor in ((0.0004, 1.0), (0.0006, 0.0)):  # within 1 % of 0.05, and beyond
            with torch.no_grad():
                part.raw_scale.fill_(math.log(math.expm1(above)))
            assert part.scale_at_floor(z) == at_floor
    assert Gaussian(decoder((4,)), 0.01).scale_at_floor(z.float()) == 0


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("scale", ["learned", "per-dimension", "predicted"])
def test_the_units_of_the_data_are_a_constant(scale: str, factor: float) -> None:
    """In other units, log p(cx|z) = log p(x|z) - D log c at the start, and the floor is the same share of the data."""
    x = torch.randn(200, 4, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64) + 1
    z = torch.randn(200, Z, dtype=torch.float64)
    one = Gaussian(decoder((2, 4) if scale == "predicted" else (4,)), scale).double()
    other = copy.deepcopy(one)
    one.initialise(x)
    other.initialise(factor * x)
    assert_close(other(z).log_prob(factor * x), one(z).log_prob(x) - 4 * math.log(factor), rtol=1e-9, atol=1e-6)
    assert one.scale_at_floor(z) == other.scale_at_floor(z) == 0
    with torch.no_grad():
        if scale == "predicted":
            other.decoder.output_bias.view(2, 4)[1] = -1e4
        else:
            other.raw_scale.fill_(-1e4)
    assert other.scale_at_floor(z) == 1
    sd = (x - x.mean(0)).square().mean().sqrt().item()
    assert_close(other(z).stddev, torch.full((200, 4), 1e-3 * factor * sd, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [0.7, "learned", "per-dimension", "predicted"])
def test_a_sigmoid_mean_is_that_of_the_output_and_touches_no_scale(scale: float | str) -> None:
    """With the same decoder: mean 1 / (1 + exp(-output)) in the data's units, the scale as it was."""
    plain = Gaussian(decoder((2, 4) if scale == "predicted" else (4,)), scale).double()
    bounded = Gaussian(plain.decoder, scale, mean="sigmoid").double()
    x = torch.rand(200, 4, dtype=torch.float64)
    plain.initialise(x)
    bounded.initialise(x)
    z = torch.randn(6, Z, dtype=torch.float64)
    with torch.no_grad():
        plain.decoder.output_bias.normal_(0, 3)
    out = plain(z).mean / plain.unit
    assert_close(bounded(z).mean, 1 / (1 + (-out).exp()), **EXACT)
    assert_close(bounded(z).stddev, plain(z).stddev, **EXACT)


def test_a_sigmoid_mean_is_for_data_between_0_and_1() -> None:
    """Training rows outside are refused with what was found; constant ones at 0 and 1 start at 0.001 and 0.999."""
    part = Gaussian(decoder((4,)), mean="sigmoid")
    with pytest.raises(DataError, match=r"from -1 to 2 with 2 elements outside; rescale"):
        part.initialise(torch.tensor([[0.0, 1.0, 2.0, 0.5], [0.0, -1.0, 1.0, 0.5]]))
    part.initialise(torch.tensor([0.0, 1.0, 0.3, 0.5]).expand(7, 4))
    with torch.no_grad():
        for weight in (m.weight for m in part.decoder.modules() if isinstance(m, nn.Linear)):
            weight.zero_()
    assert_close(part(torch.zeros(Z)).mean, torch.tensor([0.001, 0.999, 0.3, 0.5]), rtol=1e-5, atol=0)
    part.check_support(part(torch.zeros(Z)).sample() + 2)  # a density on R^D: a draw may lie outside


def test_constant_data_keep_their_units() -> None:
    part = Gaussian(decoder((4,)))
    part.initialise(torch.full((9, 4), 3.0))
    assert part.unit == 1
    assert part(torch.zeros(1, Z)).stddev.isfinite().all()


@pytest.mark.parametrize("name", ["MeanFieldNormal-MLP", "FullCovarianceNormal-MLP", "LowRankNormal-MLP"])
def test_guide_scale_has_a_floor(name: str) -> None:
    """The smallest scale of a guide is SCALE_FLOOR."""
    guide = build(name)
    with torch.no_grad():
        guide.head.weight.zero_()
        guide.head.bias[:Z] = 0
        guide.head.bias[Z : 2 * Z] = -1e4
        guide.head.bias[2 * Z :] = 0
    variance = guide(torch.zeros(guide.event_shape).double()).variance
    assert_close(variance.sqrt(), torch.full((Z,), SCALE_FLOOR, dtype=torch.float64), rtol=1e-9, atol=0)


def test_mixture_of_gaussians_scale_has_a_floor() -> None:
    """No component collapses to a point."""
    prior = MixtureOfGaussians(Z, components=3, floor=0.1).double()
    with torch.no_grad():
        prior.raw_scale.fill_(-1e4)
    assert_close(prior().component_distribution.stddev, torch.full((3, Z), 0.1, dtype=torch.float64), **EXACT)


def test_measures_and_support() -> None:
    """Masses and densities are told apart, and data without probability is refused with what was found."""
    bernoulli, gaussian = Bernoulli(decoder((4,))), Gaussian(decoder((4,)))
    assert (bernoulli.measure, gaussian.measure) == ("mass", "density")
    bernoulli.check_support(torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    with pytest.raises(DataError, match=r"from 0 to 255 with 2 elements neither 0 nor 1.*binarise"):
        bernoulli.check_support(torch.tensor([[0.0, 1.0, 255.0, 0.5]]))
    gaussian.check_support(torch.randn(3, 4))
    with pytest.raises(DataError, match="2 that are not"):
        gaussian.check_support(torch.tensor([[0.0, math.nan, math.inf, 0.5]]))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (1, 1, 3), (6, 9), (2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_convolution_never_sees_a_particle_dimension(shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """Leading dimensions are flattened into one: rank 4 at every convolution, values those of the loop, any size."""
    networks = [ConvEncoder(shape, (3, 4), 6).double(), ConvDecoder(Z, shape, (3, 4), 6).double()]
    seen: list[int] = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].ndim))
        seen.clear()
        x = torch.randn(*batch, *network.in_shape, dtype=torch.float64)
        out = network(x)
        assert seen == [4, 4]
        assert out.shape == (*batch, *network.out_shape)
        for index in itertools.product(*map(range, batch)):
            assert_close(out[index], network(x[index]), **EXACT)
    assert networks[1].out_shape == shape


@pytest.mark.parametrize("of_images", [False, True])
def test_a_row_that_is_repeated_is_computed_once_unless_there_is_noise(of_images: bool) -> None:
    """Of 4 states for 7 rows each, 4 reach the layers, with the values and gradients of all 28; with dropout, 28 do."""
    network = (ConvDecoder(Z, (1, 3, 5), (3, 4), 6) if of_images else MLP(Z, (3, 5), (6,))).double()
    dropping = MLP(Z, (3, 5), (6,), dropout=0.5).double()
    seen: list[int] = []
    for one in (network, dropping):
        one.body.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    z = torch.randn(4, 1, Z, dtype=torch.float64, requires_grad=True)
    repeated = z.expand(4, 7, Z)
    out, whole = network(repeated), network(repeated.contiguous())
    assert_close(out, whole, **EXACT)
    slope = torch.randn_like(out)
    assert_close(*(torch.autograd.grad((of * slope).sum(), z)[0] for of in (out, whole)), **EXACT)
    assert dropping(repeated).std(1).min() > 0  # each row has a mask of its own
    assert seen == [4, 28, 28]


def test_any_module_in_a_network_gets_the_same_manners() -> None:
    """A wrapped body sees one batch dimension; with several particles its output is that of the flattened rows."""
    ranks = []

    class Body(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ranks.append(x.ndim)
            return x.cumsum(1)

    network = Network(Body(), 3, 3)
    x = torch.randn(4, 2, 3)
    assert torch.equal(network(x), x.cumsum(-1))
    assert ranks == [2]
    assert network.output_bias is None
    with pytest.raises(UsageError, match=r"\(2,\).*\(3,\)"):
        Network(Body(), 3, 2)(x)


def test_mlp_is_the_layers_it_says() -> None:
    """in -> hidden with its activation -> out, linear at the end when an output is asked for."""
    x = torch.randn(5, 4, dtype=torch.float64)
    mlp = MLP(4, (2, 3), hidden=(8, 6), activation="relu").double()
    first, second, last = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    wanted = last(torch.relu(second(torch.relu(first(x))))).reshape(5, 2, 3)
    assert_close(mlp(x), wanted, **EXACT)
    features = MLP(4, hidden=(8,), activation="tanh").double()
    assert_close(features(x), torch.tanh(next(m for m in features.modules() if isinstance(m, nn.Linear))(x)), **EXACT)
    assert features.output_bias is None
    assert mlp.output_bias is last.bias
    assert MLP(4, hidden=()).output_bias is None
    dropout = MLP(4, 3, hidden=(50,), dropout=0.5).double()
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(dropout.eval()(x), dropout(x))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of parts


def hierarchy() -> HierarchicalVAE:
    return HierarchicalVAE(
        StandardNormal(2),
        [MeanFieldNormal(MLP(2, hidden=(5,)), 3)],
        Gaussian(MLP(3, 4, hidden=(5,))),
        [MeanFieldNormal(MLP(4, hidden=(5,)), 3), FullCovarianceNormal(MLP(3, hidden=(5,)), 2)],
    ).double()


def test_samples_are_draws_of_x_and_their_means_on_demand() -> None:
    """E of `sample` is E p(x) by hand: top layer, conditional, decoder mean, and noise of p(x|z) unless left out."""
    vae = hierarchy()
    n = 20_000
    with torch.no_grad():
        z2 = torch.randn(n, 2, dtype=torch.float64)
        z1 = vae.conditionals[0](z2).sample()
        byhand = vae.likelihood.decoder(z1)
        noisy = byhand + vae.likelihood(z1).stddev * torch.randn_like(byhand)
    for samples, expected in ((vae.sample(n, mean=True), byhand), (vae.sample(n), noisy)):
        assert samples.shape == (n, 4)
        for f in (lambda v: v, torch.square):
            assert_mean(f(samples) - f(expected), 0.0, least=0.1)
    assert noisy.var() > 2 * byhand.var()  # so that one cannot pass for the other
    assert vae.latent_sites == ["z1", "z2"]


def test_samples_of_bits_are_bits_with_the_probabilities_of_their_means() -> None:
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 3))), MeanFieldNormal(MLP((1, 3)), 2)).double()
    draws, means = vae.sample(20_000), vae.sample(20_000, mean=True)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((means > 0) & (means < 1)).all()
    assert_mean(draws - means, 0.0, least=0.1)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "5", None])
def test_samples_are_counted_by_whole_numbers(count) -> None:
    mixture = BernoulliMixture((3,), 2)
    for model in (hierarchy(), mixture):
        with pytest.raises(UsageError, match=r"num_samples: expected a whole number of at least 1, got") as caught:
            model.sample(count)
        assert "\n" not in str(caught.value)


def test_each_layer_has_the_conditional_of_its_place() -> None:
    """Of three layers of one size: p(z2|z3) is the last conditional, p(z1|z2) the first."""

    def around(mean: float) -> MeanFieldNormal:
        part = MeanFieldNormal(MLP(2, hidden=[3]), 2)
        with torch.no_grad():
            part.head.weight.zero_()
            part.head.bias.fill_(mean)
        return part

    guides = [MeanFieldNormal(MLP(d, hidden=[3]), 2) for d in (4, 2, 2)]
    vae = HierarchicalVAE(StandardNormal(2), [around(10.0), around(20.0)], Bernoulli(MLP(2, 4, hidden=[3])), guides)
    sites = poutine.trace(vae.model).get_trace(torch.zeros(5, 4)).nodes
    assert_close(sites["z2"]["fn"].mean, torch.full((5, 2), 20.0))
    assert_close(sites["z1"]["fn"].mean, torch.full((5, 2), 10.0))


def test_encode_decode_reconstruct() -> None:
    """Means of q(z1|x), of p(x|z1), and of one after the other."""
    vae = hierarchy()
    x = torch.randn(3, 4, dtype=torch.float64)
    loc = vae.guides[0].parameters_of(x)[:, :3]
    assert_close(vae.encode(x), loc.detach(), **EXACT)
    assert_close(vae.decode(loc), vae.likelihood.decoder(loc).detach(), **EXACT)
    assert_close(vae.reconstruct(x), vae.likelihood.decoder(loc).detach(), **EXACT)
    bernoulli = VAE(StandardNormal(2), Bernoulli(MLP(2, 4)), MeanFieldNormal(MLP(4), 2)).double()
    z = torch.randn(3, 2, dtype=torch.float64)
    assert_close(bernoulli.decode(z), torch.sigmoid(bernoulli.likelihood.decoder(z)).detach(), **EXACT)
    assert bernoulli.latent_sites == ["z"]


def test_a_vamp_pair_names_each_parameter_once_and_survives_a_copy() -> None:
    """The guide is shared, not copied: one name per parameter, and a deep copy's prior follows the copy's guide."""
    guide = MeanFieldNormal(MLP(4), 2)
    vae = VAE(VampPrior(guide, 4, components=3), Bernoulli(MLP(2, 4)), guide).double()
    names = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert len({id(p) for p in vae.parameters()}) == len(names)
    other = copy.deepcopy(vae)
    z = torch.randn(3, 2, dtype=torch.float64)
    before = vae.prior().log_prob(z)
    with torch.no_grad():
        other.guides[0].head.bias.add_(1.0)
    assert torch.equal(vae.prior().log_prob(z), before)
    assert (other.prior().log_prob(z) - before).abs().max() > 0.01


def parts_of_a_hierarchy(**changes: object) -> dict:
    parts = {
        "prior": StandardNormal(2),
        "conditionals": [MeanFieldNormal(MLP(2), 3)],
        "likelihood": Gaussian(MLP(3, 4)),
        "guides": [MeanFieldNormal(MLP(4), 3), MeanFieldNormal(MLP(3), 2)],
    }
    return {**parts, **changes}


MISMATCHES = {
    "guide's input": (
        {"likelihood": Gaussian(MLP(3, 5))},
        r"likelihood's output is \(5,\), the guide's input is \(4,\)",
    ),
    "decoder's input": ({"likelihood": Gaussian(MLP(6, 4))}, r"latent_dim is \(3,\), the decoder's input is \(6,\)"),
    "next guide": (
        {"guides": [MeanFieldNormal(MLP(4), 3), MeanFieldNormal(MLP(7), 2)]},
        r"latent_dim is \(3,\), the next guide's input is \(7,\)",
    ),
    "conditional's output": (
        {"conditionals": [MeanFieldNormal(MLP(2), 5)]},
        r"latent_dim is \(3,\), the conditional's is \(5,\)",
    ),
    "conditional's input": (
        {"conditionals": [MeanFieldNormal(MLP(8), 3)]},
        r"latent_dim is \(2,\), the conditional's input is \(8,\)",
    ),
    "prior": ({"prior": StandardNormal(9)}, r"latent_dim is \(2,\), the prior's is \(9,\)"),
    "count": ({"conditionals": []}, r"0 conditionals need 1 guides, got 2"),
}


@pytest.mark.parametrize("arrow", MISMATCHES)
def test_mismatched_parts_are_refused_with_both_sides(arrow: str) -> None:
    """Every arrow of the graph is checked at construction; the message names both sides and their shapes."""
    HierarchicalVAE(**parts_of_a_hierarchy())
    changes, message = MISMATCHES[arrow]
    with pytest.raises(UsageError, match=message):
        HierarchicalVAE(**parts_of_a_hierarchy(**changes))


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "x": (lambda: MLP(4, 2)(torch.zeros(3, 5)), r"\(4,\).*\(3, 5\)"),
    "rank of x": (lambda: ConvEncoder((1, 5, 5))(torch.zeros(5, 5)), r"\(1, 5, 5\).*\(5, 5\)"),
    "pseudo-inputs": (lambda: VampPrior(MeanFieldNormal(MLP(4), 2), 5, 3)(), r"\(4,\).*\(3, 5\)"),
    "activation": (lambda: MLP(4, activation="sine"), "one of tanh, .*'sine'"),
    "hidden": (lambda: MLP(4, hidden=(3, 0)), r"hidden: expected whole numbers of at least 1, got \(3, 0\)"),
    "channels": (lambda: ConvDecoder(2, (1, 4, 4), channels=(0,)), "channels"),
    "image": (lambda: ConvEncoder(784), r"\(784,\); use an MLP"),
    "latent_dim": (lambda: StandardNormal(0), "latent_dim.*at least 1, got 0"),
    "guide latent_dim": (lambda: MeanFieldNormal(MLP(4), 0), "latent_dim.*at least 1, got 0"),
    "components": (lambda: MixtureOfGaussians(2, components=0), "components.*got 0"),
    "rank": (lambda: LowRankNormal(MLP(4), 2, rank=3), "rank.*latent_dim = 2, got 3"),
    "features": (lambda: MeanFieldNormal(MLP(4, (2, 2)), 2), r"encoder.*\(2, 2\)"),
    "scale": (lambda: Gaussian(MLP(2, 4), "lerned"), "scale.*'lerned'"),
    "negative scale": (lambda: Gaussian(MLP(2, 4), -1.0), r"scale.*-1\.0"),
    "floor": (lambda: Gaussian(MLP(2, 4), floor=-1.0), r"floor.*-1\.0"),
    "predicted": (lambda: Gaussian(MLP(2, 4), "predicted"), r"\(2, \*event\), got \(4,\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_arguments_that_make_no_sense_are_refused(case: str) -> None:
    """The message names the argument, what was wanted and what came."""
    make, message = REFUSALS[case]
    with pytest.raises(UsageError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# What the classes say of themselves

CHOICES = {**options.PARTS, "proposal": options.PROPOSALS}
CLASSES = {
    f"{part} {cls.name}": cls
    for part, choices in CHOICES.items()
    for choice in choices.values()
    for cls in choice.classes
}


def every_class() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


@every_class()
def test_what_is_read_from_the_sources_is_what_python_says(cls: Class) -> None:
    """Settings, their kinds and defaults, what else is taken, and the attributes: read without importing torch."""
    loaded = cls.load()
    parameters = inspect.signature(loaded).parameters
    settings = {}
    for name, parameter in parameters.items():
        kind = kind_of(parameter.annotation)
        if parameter.default is not parameter.empty and kind is not None:
            settings[name] = (kind, parameter.default)
    assert {name: setting.kind for name, setting in cls.settings.items()} == {
        n: kind for n, (kind, _) in settings.items()
    }
    for name, (kind, default) in settings.items():
        assert cls.settings[name].default == (kind.container(default) if isinstance(kind, Several) else default)
    assert set(cls.takes) == parameters.keys() - settings.keys()
    for name in {"word", "short", "measure"} & cls.constants.keys():
        assert cls.constants[name] == getattr(loaded, name)


@every_class()
def test_every_setting_is_described_and_has_a_default_that_is_allowed(cls: Class) -> None:
    """--help has a line for the class and one for each setting; what it says are no stumps of sentences."""
    assert cls.help
    for name, setting in cls.settings.items():
        assert setting.default is None or setting.kind.holds(setting.default), name
        assert len(setting.help) > 5, name
    for text in (cls.help, *(setting.help for setting in cls.settings.values())):
        assert not re.search(r'[\n`"]|\.$', text)
        assert text.count("(") == text.count(")")


@every_class()
def test_a_value_that_is_not_allowed_is_refused_by_name(cls: Class) -> None:
    """The constructor and the command line refuse alike, each in one line."""
    offered = {
        "latent_dim": Z,
        "event_shape": (4,),
        "guide": GUIDES["MeanFieldNormal-MLP"](),
        "guides": two_layers(GUIDES["MeanFieldNormal-MLP"]()),
        "prior": GatedMarkov(Z, Z),
        "quantiser": GUIDES["VectorQuantiser-MLP"](),
        "condition_dim": 1,
        "conditional": GUIDES["MeanFieldNormal-MLP"](),
        "encoder": encoder((4,)),
        "decoder": decoder((4,)),
        "levels": LEVELS,
        "columns": TABLE,
        "in_shape": (1, 4, 4),
        "out_shape": (1, 4, 4),
    }
    for name, setting in cls.settings.items():
        with pytest.raises(UsageError, match=f"^{name}: expected {re.escape(str(setting.kind))}, got 'no such'"):
            cls.load()(**{key: offered.get(key) for key in cls.takes}, **{name: "no such"})
        with pytest.raises(UsageError, match=f"^part.{name}: expected {re.escape(str(setting.kind))}, got no such"):
            read(f"part.{name}", "no such", setting.kind)


def test_the_table_of_the_readme_names_every_class() -> None:
    text = (PACKAGE.parent / "README.md").read_text()
    assert [cls.name for cls in CLASSES.values() if f"`{cls.name}`" not in text] == []


@pytest.mark.parametrize("part", CHOICES)
def test_names_tell_choices_apart(part: str) -> None:
    """In any case, and short names too; the classes of one word are of different measures, or a network's two ends."""
    words = [word.lower() for name, choice in CHOICES[part].items() for word in (name, *choice.short)]
    assert len(words) == len(set(words))
    for choice in CHOICES[part].values():
        if len(choice.classes) > 1 and part != "network":
            measures = [cls.constants["measure"] for cls in choice.classes]
            assert len(measures) == len(set(measures))
        if part == "network":
            encoding, decoding = choice.classes
            assert encoding.settings.keys() == decoding.settings.keys()


@pytest.mark.parametrize("cls", [cls for choice in options.BASELINES.values() for cls in choice.classes])
def test_every_baseline_is_a_distribution(cls: Class) -> None:
    """Its log p(x) sums to 1, is that of its Pyro model, of what it samples, and of seen and missing parts."""
    event = {"mass": (2, 3), "density": (2,)}[str(cls.constants["measure"])]
    settings = {"components": 1 if cls.name in ("PPCA", "FactorAnalysis") else 3}
    model = cls.build("model", settings, event_shape=event).double()
    scale = torch.arange(1.0, 1 + math.prod(event), dtype=torch.float64).reshape(event)
    x = torch.randn(60, *event, dtype=torch.float64) * scale + 0.5
    x = (x > 0).double() if model.measure == "mass" else x
    assert model.fit(x) >= 1
    with torch.no_grad():
        objective = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        loss = objective.loss(model.model, model.guide, x)
        assert loss == pytest.approx(-model.log_prob(x).sum().item(), rel=1e-9)
        samples = model.sample(20_000)
        if model.measure == "mass":
            points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
            mass = model.log_prob(points.reshape(-1, *event)).exp()
        else:
            reach = 12 * x.std(0)
            axes = [
                torch.linspace(m - r, m + r, 601, dtype=torch.float64) for m, r in zip(x.mean(0), reach, strict=True)
            ]
            points = torch.cartesian_prod(*axes)
            mass = model.log_prob(points).exp() * math.prod((axis[1] - axis[0]).item() for axis in axes)
        assert mass.sum().item() == pytest.approx(1, abs=1e-4)
        assert_mean(samples.flatten(1), mass @ points)
        seen = torch.rand(len(x), *event) < 0.5  # a mask for each row: what is seen and what is missing make up p(x)
        assert_close(model.log_prob_seen(x, seen) + model.log_prob_missing(x, seen), model.log_prob(x))


# ---------------------------------------------------------------------------------------------------------------------
# The package


PACKAGE = Path(pyrovae.__file__).parent


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_changes_nothing_global() -> None:
    """Random states, default dtype, threads, validation and the parameter store are what torch and Pyro made them."""
    code = """
import random, numpy, torch, pyro, torch.distributions as td
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            td.Distribution._validate_args, pyro.settings.get(), list(pyro.get_param_store().keys()),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
before = state()
import pyrovae, pyrovae.models, pyrovae.inference
from pyrovae import VAE, IWAE, log_marginal
assert state() == before
print("unchanged")
"""
    assert in_a_fresh_process(code) == "unchanged"


@pytest.mark.slow
def test_import_is_light() -> None:
    """`import pyrovae` loads nothing heavy; models and inference need no plotting, no data sets, no ArviZ."""
    code = """
import sys, pyrovae
heavy = ("torchvision", "sklearn", "arviz", "matplotlib")
assert not [name for name in heavy if name in sys.modules], "import pyrovae"
import pyrovae.models
print(*[name for name in heavy if name in sys.modules])
"""
    assert in_a_fresh_process(code) == ""


def test_integers_are_refused_before_arithmetic() -> None:
    """Grey levels as they are loaded are not x: the message says what is."""
    guide = MeanFieldNormal(MLP(3, hidden=[4]), 2)
    levels = torch.zeros(5, 3, dtype=torch.uint8)
    for use in (guide, guide.initialise):
        with pytest.raises(UsageError, match=r"expected floating-point numbers, got torch.uint8"):
            use(levels)


def test_an_event_without_dimensions_is_refused() -> None:
    with pytest.raises(UsageError, match=r"event shape \(\)"):
        MLP(())
