"""Normalising flows: inverses, determinants, densities, and what evaluation asks of a guide or a prior that is one."""

import copy
import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import UsageError
from pyrovae.inference import IWAE, DoublyReparameterised, LeaveOneOut, fit, simulated
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import density
from pyrovae.inference.training import gradients
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    VAE,
    AutoregressivePrior,
    Bernoulli,
    Guide,
    InverseAutoregressiveFlow,
    MaskedAutoregressivePrior,
    MeanFieldNormal,
    NeuralSplinePrior,
    PlanarFlow,
    Prior,
    SplineFlow,
    StandardNormal,
    SylvesterFlow,
)
from pyrovae.models.flows import (
    Affine,
    Autoregressive,
    Chain,
    Flow,
    Flowed,
    Inverted,
    Monotone,
    Planar,
    Spline,
    Sylvester,
    orthonormal,
    root,
)
from pyrovae.models.made import MADE
from pyrovae.models.moments import moments_of

F = 3  # width of the features
EXACTLY = {"rtol": 0, "atol": 1e-10}

# A flow of Z elements, conditioned on F features or, with 0, on none.
FLOWS: dict[str, Callable[[int, int], Flow]] = {
    "affine": lambda z, f: Autoregressive(z, Affine(), (7, 9), None, f),
    "affine, few units": lambda z, f: Autoregressive(z, Affine(), (2, 3), None, f),
    "affine coupling": lambda z, f: Autoregressive(z, Affine(), (7, 6), 2, f),
    "spline": lambda z, f: Autoregressive(z, Spline(4, 2.5), (7, 9), None, f),
    "spline coupling": lambda z, f: Autoregressive(z, Spline(4, 2.5), (7, 6), 2, f),
    "inverted": lambda z, f: Inverted(Autoregressive(z, Affine(), (7, 9), None, f)),
    "chain": lambda z, f: Chain([Autoregressive(z, Affine(), (7, 9), None, f) for _ in range(3)]),
    "planar": lambda z, f: Planar(z, f),
    "Sylvester": lambda z, f: Sylvester(z, min(3, z), f),
    "Sylvester chain": lambda z, f: Chain([Sylvester(z, 2, f), Planar(z, f), Sylvester(z, 1, f)]),
}
CASES = [(name, z, f) for name in FLOWS for z in (2, 5) for f in (0, F) if f or not name.startswith(("planar", "Sylv"))]
GUIDES: dict[str, Callable[[MLP, int], Guide]] = {
    "iaf": lambda encoder, z: InverseAutoregressiveFlow(encoder, z, 2, 6),
    "spline": lambda encoder, z: SplineFlow(encoder, z, 2, 6, 4),
    "planar": lambda encoder, z: PlanarFlow(encoder, z, 3),
    "sylvester": lambda encoder, z: SylvesterFlow(encoder, z, 2, 2),
}
PRIORS: dict[str, Callable[[int], Prior]] = {
    "maf": lambda z: MaskedAutoregressivePrior(z, 2, 8),
    "spline": lambda z: NeuralSplinePrior(z, 2, 8, 4),
    "autoregressive": lambda z: AutoregressivePrior(z, 3, 8),
}


def far(module: torch.nn.Module, by: float = 1.0) -> torch.nn.Module:
    """In double precision, its parameters away from any start."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module


def flow_of(name: str, z: int, f: int) -> tuple[Flow, Tensor | None, Tensor]:
    """A flow far from the identity, features of 4 rows, and points (3, 4, Z) of which some are far out."""
    flow = far(FLOWS[name](z, f))
    return flow, torch.randn(4, f).double() if f else None, 2 * torch.randn(3, 4, z).double()


@pytest.mark.parametrize(("name", "z", "f"), CASES)
def test_inverses_invert_and_determinants_are_those_of_autograd(name: str, z: int, f: int) -> None:
    """f^-1(f(u)) = u and f(f^-1(z)) = z, with one log det: that of the Jacobian by autograd, at single points too."""
    flow, features, u = flow_of(name, z, f)
    with torch.no_grad():
        out, log_det = flow(u, features)
        back, same = flow.inverse(out, features)
        assert_close(back, u, rtol=0, atol=1e-8)
        assert_close(same, log_det, rtol=0, atol=1e-8)
        there, of_inverse = flow.inverse(u, features)
        again, same = flow(there, features)
        assert_close(again, u, rtol=0, atol=1e-8)
        assert_close(same, of_inverse, rtol=0, atol=1e-8)
    for k, n in ((0, 0), (1, 2), (2, 3)):
        h = None if features is None else features[n]
        slope = torch.linalg.slogdet(jacobian(lambda point, h=h: flow(point, h)[0], u[k, n]))
        assert_close(log_det[k, n], slope.logabsdet, **EXACTLY)
        slope = torch.linalg.slogdet(jacobian(lambda point, h=h: flow.inverse(point, h)[0], u[k, n]))
        assert_close(of_inverse[k, n], -slope.logabsdet, **EXACTLY)
    assert (out - u).abs().max() > 0.1
    assert log_det.std() > 0.01


@pytest.mark.parametrize("name", FLOWS)
def test_single_precision_is_that_of_single_precision(name: str) -> None:
    """Log-determinants of both directions agree with double precision to 1e-5."""
    torch.manual_seed(1)
    flow = FLOWS[name](5, F)
    u, features = torch.randn(50, 5), torch.randn(50, F)
    exact = copy.deepcopy(flow).double()
    for ours, theirs in ((flow, exact), (flow.inverse, exact.inverse)):
        assert_close(ours(u, features)[1].double(), theirs(u.double(), features.double())[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "z", "f"), [case for case in CASES if case[1] == 5])
def test_the_gradient_of_an_inverse_is_that_of_its_values(name: str, z: int, f: int) -> None:
    """By z, features and parameters, through roots as well: against central differences of u and of log det."""
    flow, features, _ = flow_of(name, z, f)
    z_ = torch.randn(4, z).double()
    inputs = [z_, *([] if features is None else [features]), *flow.parameters()]
    directions = [torch.randn_like(value) for value in inputs]

    def value() -> Tensor:
        u, log_det = flow.inverse(z_, features)
        return (u * torch.arange(1.0, 1 + z).double()).sum() + 0.7 * log_det.square().sum()

    for tensor in inputs:
        tensor.requires_grad_()
    slopes = torch.autograd.grad(value(), inputs)
    along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
    with torch.no_grad():
        ends = []
        for step in (1e-6, -2e-6):
            for tensor, direction in zip(inputs, directions, strict=True):
                tensor.add_(step * direction)
            ends.append(value())
    assert_close((ends[0] - ends[1]) / 2e-6, along, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_a_group_is_a_function_of_those_before_it(groups: int) -> None:
    """Of all of them, and of no other; and `unrolled` gives each group what one pass gives it."""
    network = far(MADE(5, 2, (6, 7), groups, F))
    h, u = torch.randn(4, F).double(), torch.randn(3, 4, 5).double()
    of = [d * groups // 5 for d in range(5)]
    slopes = jacobian(lambda v: network(v, h[0]), u[0, 0]).abs().amax(1)  # (element, given)
    for d in range(5):
        for e in range(5):
            assert (slopes[d, e] > 1e-6) == (of[e] < of[d]), (d, e)
    raw, seen = network(u, h), []

    def group(elements: slice, parameters: Tensor) -> Tensor:
        assert_close(parameters.expand(3, 4, -1, -1), raw[..., elements, :], **EXACTLY)
        seen.extend(range(5)[elements])
        return u[..., elements]

    assert torch.equal(network.unrolled(group, h), u)
    assert seen == [*range(5)]


@pytest.mark.parametrize("monotone", [Affine(), Spline(2, 1.0), Spline(6, 3.0)], ids=["affine", "2 bins", "6 bins"])
def test_increasing_maps(monotone: Monotone) -> None:
    """They increase, invert, have the slope that they say, which is continuous, and are the identity at 0."""
    u = torch.linspace(-5, 5, 20_001).double()
    raw = (0.5 * torch.randn(monotone.outputs)).double().expand(len(u), -1)
    z, log_slope = monotone.forward(u, raw)
    assert (z.diff() > 0).all()
    back, same = monotone.inverse(z, raw)
    assert_close(back, u, rtol=0, atol=1e-8)
    assert_close(same, log_slope, rtol=0, atol=1e-7)
    between = (log_slope.exp()[1:] + log_slope.exp()[:-1]) / 2
    assert_close(z.diff(), between * u.diff(), rtol=0, atol=2e-6)
    same_again, level = monotone.forward(u, torch.zeros(len(u), monotone.outputs).double())
    assert_close(same_again, u, rtol=0, atol=1e-9)
    assert_close(level, torch.zeros_like(u), rtol=0, atol=1e-9)


def test_the_density_of_a_spline_integrates_to_1_between_its_knots() -> None:
    """Between two images of knots the density is smooth, and Gauss and Legendre's rule exact: to 1e-10."""
    spline = Spline(5, 2.0)
    raw = 0.3 * torch.randn(spline.outputs).double()
    q = Flowed(Elementwise(spline, raw), torch.zeros(1).double(), torch.ones(1).double())
    ends = torch.cat([-torch.linspace(12, 2.5, 8), spline.knots(raw)[1].squeeze(), torch.linspace(2.5, 12, 8)])
    from numpy.polynomial.legendre import leggauss

    points, weights = (torch.from_numpy(values) for values in leggauss(100))
    half = ends.diff() / 2
    z = (ends[:-1] + half)[:, None] + half[:, None] * points
    assert (q.log_prob(z.unsqueeze(-1)).exp() * weights * half[:, None]).sum().item() == pytest.approx(1, abs=1e-10)


class Elementwise(Flow):
    """A monotone map of one element, by constants."""

    def __init__(self, monotone: Monotone, raw: Tensor) -> None:
        super().__init__()
        self.monotone, self.raw = monotone, raw

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.monotone.forward(u, self.raw)
        return z, log_slope.sum(-1)

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, log_slope = self.monotone.inverse(z, self.raw)
        return u, log_slope.sum(-1)


def test_roots() -> None:
    """a + c tanh(a) = s to rounding, from c just above -1 to c far above any that a network gives."""
    c = torch.cat([-torch.logspace(-6, math.log10(0.99), 40), torch.logspace(-6, 5, 50)]).double()
    s = torch.logspace(-12, 6, 100).double()
    c, s = torch.meshgrid(c, torch.cat([-s, torch.zeros(1).double(), s]), indexing="ij")
    a = root(c, s)
    assert ((a + c * a.tanh() - s).abs() <= 1e-13 * (1 + s.abs() + c.abs())).all()


@pytest.mark.parametrize("name", ["planar", "Sylvester"])
def test_no_features_fold_space(name: str) -> None:
    """However large what is made of them, no slope of a flow falls below a hundredth, and it is inverted."""
    flow = far(FLOWS[name](3, F), 20.0)
    features, u = torch.randn(500, F).double(), torch.randn(500, 3).double()
    with torch.no_grad():
        z, log_det = flow(u, features)
        assert log_det.isfinite().all()
        assert log_det.min() >= (1 if name == "planar" else 3) * math.log(0.0099)
        back, same = flow.inverse(z, features)
        assert_close(same, log_det, rtol=0, atol=1e-6)
        assert_close(back, u, rtol=0, atol=1e-6)


def test_columns_are_orthonormal_and_any_subspace_is_in_reach() -> None:
    Q = orthonormal(3 * torch.randn(7, 6, 4).double())
    assert_close(Q.mT @ Q, torch.eye(4).double().expand(7, 4, 4), **EXACTLY)
    by_reflections = torch.eye(6).double()
    raw = torch.randn(6, 3).double()
    for v in (raw + torch.eye(6, 3)).T:
        by_reflections = by_reflections @ (torch.eye(6).double() - 2 * torch.outer(v, v) / v.dot(v))
    assert_close(orthonormal(raw), by_reflections[:, :3], **EXACTLY)


# ---------------------------------------------------------------------------------------------------------------------
# As distributions


def pair_with(guide: Guide | None = None, prior: Prior | None = None, latent_dim: int = 3) -> VAE:
    """A pair of 6 bits in double precision, far from its start."""
    guide = MeanFieldNormal(MLP(6, hidden=(5,)), latent_dim) if guide is None else guide
    likelihood = Bernoulli(MLP(latent_dim, (6,), hidden=(5,)))
    return far(VAE(StandardNormal(latent_dim) if prior is None else prior, likelihood, guide), 0.4)


@pytest.mark.parametrize("name", GUIDES)
def test_a_draw_comes_with_the_density_that_any_latent_has(name: str) -> None:
    """log q of a pair's own draws, made with them, is log q of the same values given from outside."""
    pair = pair_with(GUIDES[name](MLP(6, hidden=(5,)), 3))
    x = torch.bernoulli(torch.full((4, 6), 0.5)).double()
    particles = draw(Pair(pair.model, pair.guide), Batch(x), 5)
    z = particles.latents["z"].value.detach()
    assert_close(density(Pair(pair.model, pair.guide), Batch(x), {"z": z}), particles.log_guide, **EXACTLY)
    assert_close(torch.stack([pair.posterior(x).log_prob(row) for row in z]), particles.log_guide, **EXACTLY)


@pytest.mark.parametrize("name", PRIORS)
def test_plates_and_copies(name: str) -> None:
    """Expanded it is the same density, of one vector for all too; nothing of the last graph is kept by the module."""
    prior = far(PRIORS[name](3), 0.4)
    p = prior().expand((4, 5))
    z = p.sample()
    assert z.shape == (4, 5, 3)
    assert_close(p.log_prob(z), torch.stack([prior().log_prob(row) for row in z]), **EXACTLY)
    assert_close(p.log_prob(z[0, 0]), prior().log_prob(z[0, 0]).expand(4, 5), **EXACTLY)
    assert_close(copy.deepcopy(prior)().log_prob(z), p.log_prob(z), **EXACTLY)
    assert list(prior.state_dict()) == [parameter for parameter, _ in prior.named_parameters()]


@pytest.mark.parametrize("name", GUIDES)
def test_no_density_is_stale(name: str) -> None:
    """Of a draw changed in place, detached, copied, or made without gradients, the density is found anew."""
    guide = far(GUIDES[name](MLP(6, hidden=(5,)), 3), 0.4)
    x = torch.randn(4, 6).double()
    q, other = guide(x), guide(x)
    z = q.rsample()
    assert q.log_prob(z) is q.log_prob(z)
    with torch.no_grad():
        z.add_(0.1)
    assert_close(q.log_prob(z), other.log_prob(z.detach()), **EXACTLY)
    first, second = q.rsample(), q.rsample()
    assert_close(q.log_prob(first), other.log_prob(first.detach()), **EXACTLY)
    assert_close(q.log_prob(second), other.log_prob(second.detach()), **EXACTLY)
    # The score of a draw without gradients, as estimators for any latent take it: its expectation is 0.
    z = q.sample((5000,))
    scores = torch.autograd.grad(q.log_prob(z).mean(), [guide.head.bias, *guide.flow.parameters()])
    assert scores[0].abs().max() < 0.2
    assert (scores[0] != 0).all()
    reparameterised = q.rsample()
    with torch.no_grad():
        without = q.rsample()
    assert q.log_prob(without).requires_grad
    assert reparameterised.requires_grad


@pytest.mark.parametrize("name", GUIDES)
def test_guides_start_near_the_mean_field_guide(name: str) -> None:
    """Of the same encoder and head: within a tenth of a nat, by defaults."""
    torch.manual_seed(0)
    encoder = MLP(6, hidden=(20,))
    guides = {"iaf": InverseAutoregressiveFlow, "spline": SplineFlow, "planar": PlanarFlow, "sylvester": SylvesterFlow}
    torch.manual_seed(1)
    flow = guides[name](encoder, 8)
    torch.manual_seed(1)
    plain = MeanFieldNormal(encoder, 8)
    x = torch.randn(200, 6)
    z = plain(x).sample((20,))
    difference = plain(x).log_prob(z) - flow(x).log_prob(z)
    assert 0 < difference.mean() < 0.1  # KL(mean field || flow)
    assert difference.std() < 0.5


@pytest.mark.parametrize("name", PRIORS)
def test_priors_start_near_the_standard_normal(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(2000, 4)
    kl = (
        StandardNormal(4)().log_prob(z)
        - {"maf": MaskedAutoregressivePrior, "spline": NeuralSplinePrior, "autoregressive": AutoregressivePrior}[name](
            4
        )().log_prob(z)
    ).mean()
    assert -0.02 < kl < 0.05


def test_an_autoregressive_prior_is_the_product_of_its_conditionals() -> None:
    """log p(z) = sum_d log p(z_d | z_<d), each an explicit mixture of Gaussians that later elements do not change."""
    prior = far(AutoregressivePrior(3, 2, 6))
    z = torch.randn(5, 3).double()
    p = prior()
    changed = z.clone()
    changed[:, 2] += 1
    raw = 0.1 * prior.network(z)
    terms = []
    for d in range(3):
        logits, shift, raw_scale = raw[:, d].chunk(3, -1)
        scale = 1e-3 + torch.nn.functional.softplus(raw_scale + math.log(math.expm1(math.sqrt(0.5) - 1e-3)))
        parts = dist.Normal(prior.loc[d] + shift, scale).log_prob(z[:, d : d + 1])
        terms.append((logits.log_softmax(-1) + parts).logsumexp(-1))
    assert_close(p.log_prob(z), sum(terms), **EXACTLY)
    assert_close(p.log_prob(changed) - p.log_prob(z), p.log_prob(changed) - sum(terms), **EXACTLY)


def test_moments_of_a_flow_are_estimated_and_of_a_gaussian_exact() -> None:
    """By 256 draws, the same at every call, and the caller's random state stays."""
    guide = far(SylvesterFlow(MLP(6, hidden=(5,)), 3, 2, 2), 0.4)
    x = torch.randn(50, 6).double()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found, again = (moments_of(guide(x), x.device) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found.mean, again.mean)
    assert found.draws == 256
    z = guide(x).sample((5000,))
    assert_mean(((found.mean - z.mean(0)) / z.std(0)).flatten() * 16, 0.0)
    assert ((found.sd / z.std(0)).log().abs() < 0.35).all()
    exact = moments_of(MeanFieldNormal(MLP(6, hidden=(5,)), 3).double()(x), x.device)
    assert exact.draws == 0


@pytest.mark.parametrize("name", GUIDES)
def test_the_check_on_simulated_data_takes_a_flow(name: str) -> None:
    """Its upper bound weighs exact posterior draws, at which log q has to be found: it is above the lower one."""
    pair = pair_with(GUIDES[name](MLP(6, hidden=(5,)), 3))
    x = torch.zeros(300, 6).double()
    result = simulated(pair.model, pair.guide, x, 50)
    assert result.width > -3 * result.error
    assert math.isfinite(result.most)


def pair_of(name: str) -> VAE:
    """A pair whose guide or prior is a flow, in three latent dimensions."""
    of_guide, word = name.split()
    return pair_with(GUIDES[word](MLP(6, hidden=(5,)), 3)) if of_guide == "guide" else pair_with(prior=PRIORS[word](3))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *((f"guide {word}", IWAE(2, gradient=DoublyReparameterised())) for word in GUIDES),
        *((f"prior {word}", IWAE(2)) for word in PRIORS),
        ("guide iaf", IWAE(2)),
        ("guide planar", IWAE(2, gradient=LeaveOneOut())),
    ],
    ids=str,
)
def test_a_graph_has_the_loss_and_the_gradient_of_the_pair(
    name: str, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the compiler; a guide that is held is asked for log q at draws that it did not make itself."""
    monkeypatch.setattr(gradients, "compile_graph", lambda graph: torch.no_grad()(graph))
    pair, x = pair_of(name), torch.bernoulli(torch.full((4, 6), 0.5)).double()
    part = gradients.Gradient(objective, Pair(pair.model, pair.guide))
    code = gradients.Code(part, x)
    torch.manual_seed(5)
    wanted = part(x)
    torch.manual_seed(5)
    for got, value in zip(code(x), wanted, strict=True):
        assert_close(got, value, **EXACTLY)
        assert value.abs().max() > 0


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_pair() -> None:
    """Of flows on both sides: the same bounds on the same noise."""
    x = (load_data("digits").rows("mass").train[:200].flatten(1) > 0.5).float()
    bounds = []
    for compile in ("off", "on"):
        torch.manual_seed(0)
        guide = SylvesterFlow(MLP(64, hidden=(10,)), 3, 2, 2)
        pair = VAE(NeuralSplinePrior(3, 2, 8, 4), Bernoulli(MLP(3, (64,), hidden=(10,))), guide)
        settings = {"epochs": 2, "batch_size": 100, "seed": 1, "compile": compile, "progress": False}
        bounds.append(fit(pair.model, pair.guide, x, IWAE(3), **settings).metrics["train_bound"].tolist())
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)


@pytest.mark.parametrize("name", [*(f"guide {word}" for word in GUIDES), *(f"prior {word}" for word in PRIORS)])
def test_a_pair_is_declared_without_memory(name: str) -> None:
    """As a run is looked at before its weights are read: the same names and shapes, on the device without values."""
    torch.manual_seed(0)
    wanted = {key: value.shape for key, value in pair_of(name).state_dict().items()}
    with torch.device("meta"):
        of_guide, word = name.split()
        part = GUIDES[word](MLP(6, hidden=(5,)), 3) if of_guide == "guide" else PRIORS[word](3)
    prefix = "guides.0." if of_guide == "guide" else "prior."
    assert {key: wanted[prefix + key] for key in part.state_dict()} == {
        key: value.shape for key, value in part.state_dict().items()
    }


@pytest.mark.parametrize("make", [MaskedAutoregressivePrior, NeuralSplinePrior, AutoregressivePrior])
def test_one_element_is_refused_by_priors(make: type[Prior]) -> None:
    with pytest.raises(UsageError, match=r"latent_dim: .* at least 2, got 1; use MixtureOfGaussians"):
        make(1)


@pytest.mark.parametrize("make", [InverseAutoregressiveFlow, SplineFlow])
def test_one_element_is_refused_by_guides_that_need_two(make: type[Guide]) -> None:
    with pytest.raises(UsageError, match=r"latent_dim: .* at least 2, got 1; use PlanarFlow or SylvesterFlow"):
        make(MLP(4), 1)


def test_more_columns_than_elements_are_refused() -> None:
    assert [flow.columns for flow in SylvesterFlow(MLP(4), 3, 2).flow.flows] == [3, 3]
    with pytest.raises(UsageError, match=r"columns: expected a whole number from 1 to latent_dim = 3, got 4"):
        SylvesterFlow(MLP(4), 3, 2, 4)
