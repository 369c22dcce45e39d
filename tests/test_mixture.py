"""The mixtures are exact, so their tests are identities: an explicit sum, scikit-learn, quadrature, a closed form."""

import copy
import itertools
import math
from typing import TypeVar, get_args

import numpy as np
import pyro
import pytest
import torch
from conftest import EXACT, SOLVED, assert_mean
from pyro.infer import TraceEnum_ELBO
from sklearn.mixture import GaussianMixture as Reference
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae.errors import DataError, NumericalError, UsageError
from pyrovae.models.mixture import BernoulliMixture, Covariance, GaussianMixture, Mixture

M = TypeVar("M", bound=Mixture)
COVARIANCES = get_args(Covariance)
EVENTS = [(2,), (1, 4, 4)]


def scrambled(mixture: M) -> M:
    """In float64, every parameter random: no test may pass because something is zero or equal."""
    for parameter in mixture.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixture


def gaussian(event: tuple[int, ...] = (2,), covariance: str = "full", **options: object) -> GaussianMixture:
    return scrambled(GaussianMixture(event, components=3, covariance=covariance, **options))  # type: ignore[arg-type]


def bernoulli(event: tuple[int, ...] = (2,), **options: object) -> BernoulliMixture:
    return scrambled(BernoulliMixture(event, components=3, **options))  # type: ignore[arg-type]


def data_for(mixture: Mixture, n: int) -> Tensor:
    x = torch.randn(n, *mixture.event_shape, dtype=torch.float64)
    return x if mixture.measure == "density" else (x > 0).double()


EVERY = [pytest.param(lambda event, c=c: gaussian(event, c), id=f"gaussian-{c}") for c in COVARIANCES] + [
    pytest.param(bernoulli, id="bernoulli")
]


def clusters(n: int = 300, dim: int = 3) -> Tensor:
    """Three overlapping clouds of unequal shape and size."""
    part = torch.tensor([0] * (n // 2) + [1] * (n // 3) + [2] * (n - n // 2 - n // 3))
    centres = 2.5 * torch.randn(3, dim, dtype=torch.float64)
    spread = torch.randn(3, dim, dim, dtype=torch.float64)
    return centres[part] + (spread[part] @ torch.randn(n, dim, 1, dtype=torch.float64)).squeeze(-1)


def plane_integral(f: Tensor, step: float) -> Tensor:
    return f.sum() * step**2


def plane_grid(reach: float = 25.0, step: float = 0.05) -> tuple[Tensor, float]:
    axis = torch.arange(-reach, reach, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), step


# --- log p(x) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("build", EVERY)
def test_enumeration_is_the_exact_sum(build, event):
    mixture = build(event)
    x = data_for(mixture, 7)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide, x)
    exact = -mixture.log_prob(x).sum()
    assert_close(loss, exact, **EXACT)

    parameters = list(mixture.parameters())
    enumerated, summed = torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters)
    for name, a, b in zip(dict(mixture.named_parameters()), enumerated, summed, strict=True):
        assert_close(a, b, atol=1e-8, rtol=1e-10)
        assert a.abs().max() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gaussian_is_an_explicit_loop(covariance):
    mixture = gaussian((1, 2, 2), covariance)
    x = data_for(mixture, 5)
    weights = mixture.mixing_logits.exp() / mixture.mixing_logits.exp().sum()
    total = torch.zeros(5, dtype=torch.float64)
    for w, mean, sigma in zip(weights, mixture.means, mixture.covariances, strict=True):
        total = total + w * MultivariateNormal(mean.flatten(), sigma).log_prob(x.flatten(1)).exp()
    assert_close(mixture.log_prob(x), total.log(), **SOLVED)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gaussian_is_scikit_learn(covariance):
    mixture = gaussian((4,), covariance)
    x = data_for(mixture, 50)
    with torch.no_grad():
        precision = torch.linalg.inv(mixture.scale_tril).mT.numpy()
        spread = mixture.scale_tril.diagonal(dim1=-2, dim2=-1).numpy()
        reference = Reference(3, covariance_type="diag" if covariance == "diagonal" else covariance)
        reference.weights_, reference.means_ = mixture.weights.numpy(), mixture.means.numpy()
        reference.precisions_cholesky_ = {
            "full": precision,
            "tied": precision[0],
            "diagonal": 1 / spread,
            "spherical": 1 / spread[:, 0],
        }[covariance]
        np.testing.assert_allclose(mixture.log_prob(x), reference.score_samples(x.numpy()), **SOLVED)
        np.testing.assert_allclose(mixture.responsibilities(x), reference.predict_proba(x.numpy()), atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_density_integrates_to_one(covariance):
    grid, step = plane_grid()
    with torch.no_grad():
        total = plane_integral(gaussian((2,), covariance).log_prob(grid).exp(), step)
    assert total.item() == pytest.approx(1, abs=1e-8)


def test_bernoulli_masses_sum_to_one_and_are_an_explicit_loop():
    mixture = bernoulli((2, 4))
    points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)
    with torch.no_grad():
        mass = mixture.log_prob(points.reshape(-1, 2, 4)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-12)
        for x, got in zip(points[::17], mass[::17], strict=True):
            explicit = sum(
                w * math.prod(p if bit else 1 - p for p, bit in zip(pi, x.tolist(), strict=True))
                for w, pi in zip(mixture.weights.tolist(), mixture.means.flatten(1).tolist(), strict=True)
            )
            assert got.item() == pytest.approx(explicit, rel=1e-10)


@pytest.mark.parametrize("build", EVERY)
def test_sampler_follows_the_density(build):
    # The mean log p of draws is minus the entropy, and their mean is the mixture's: both by summing over all x.
    mixture = build((2,))
    with torch.no_grad():
        if mixture.measure == "density":
            grid, step = plane_grid()
        else:
            grid, step = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).double(), 1.0
        log_p = mixture.log_prob(grid)
        p = log_p.exp() * step**2
        x = mixture.sample(20_000)
        checks = [(log_p @ p, mixture.log_prob(x)), ((grid.prod(1) @ p), x.prod(1))]
        checks += [(grid[:, d] @ p, x[:, d]) for d in range(2)]
    for expected, draws in checks:
        assert_mean(draws, expected, least=0.1)


@pytest.mark.parametrize("build", EVERY)
def test_means_of_samples_are_those_of_the_components_by_their_weights(build):
    mixture = build((2,))
    drawn = mixture.sample(20_000, mean=True)
    for mean, weight in zip(mixture.means.detach(), mixture.weights.detach(), strict=True):
        assert_mean((drawn == mean).all(1).double(), weight, least=0.1)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("build", EVERY)
def test_state_dict_round_trip(build, event):
    mixture, other = build(event), build(event)
    x = data_for(mixture, 6)
    assert not torch.equal(mixture.log_prob(x), other.log_prob(x))
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(mixture.log_prob(x), other.log_prob(x))


@pytest.mark.parametrize("build", EVERY)
def test_dtype_follows(build):
    mixture = build((2,))
    x = data_for(mixture, 200)
    exact = mixture.log_prob(x)
    mixture.float()
    single = mixture.log_prob(x.float())
    assert single.dtype == mixture.sample(2).dtype == torch.float32
    assert_close(single.double(), exact, atol=1e-4, rtol=1e-5)
    history = mixture.em(x.float(), max_iterations=3)
    assert all(p.dtype == torch.float32 for p in mixture.parameters())
    assert mixture.log_prob(x.float()).mean().item() == pytest.approx(history[-1], abs=1e-4)


# --- EM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_is_scikit_learn_from_the_same_start(covariance):
    x = clusters()
    mixture = GaussianMixture(3, components=3, covariance=covariance).double()
    mixture.initialise(x, seed=3)
    history = mixture.em(x, max_iterations=2000, tolerance=1e-11)
    kind = "diag" if covariance == "diagonal" else covariance
    reference = Reference(3, covariance_type=kind, random_state=3, tol=1e-11, max_iter=2000).fit(x.numpy())
    assert history[-1] == pytest.approx(reference.score(x.numpy()), abs=1e-6)
    np.testing.assert_allclose(mixture.means.detach(), reference.means_, atol=1e-3)
    assert history[-1] > history[0] + 1e-3


@pytest.mark.parametrize("build", EVERY)
def test_em_never_decreases_and_ends_where_the_gradient_is_zero(build):
    mixture = build((2, 2))
    mixture.floor = 1e-12  # or the M step would not be the maximum, and its fixed point not stationary
    x = clusters(dim=4).reshape(-1, 2, 2)
    x = x if mixture.measure == "density" else (x > 0).double()
    history = mixture.em(x, max_iterations=2000, tolerance=1e-12)
    assert len(history) > 5
    assert all(later >= earlier for earlier, later in itertools.pairwise(history))
    mean = mixture.log_prob(x).mean()
    assert mean.item() == pytest.approx(history[-1], abs=1e-10)
    for gradient in torch.autograd.grad(mean, list(mixture.parameters())):
        assert gradient.abs().max() < 1e-4


def test_em_stops_at_the_tolerance_and_at_the_limit():
    x = clusters()
    mixture = GaussianMixture(3, components=3).double()
    mixture.initialise(x)
    assert len(copy.deepcopy(mixture).em(x, max_iterations=2, tolerance=0)) == 3
    history = mixture.em(x, tolerance=1e-2)
    gains = [later - earlier for earlier, later in itertools.pairwise(history)]
    assert gains[-1] < 1e-2 <= min(gains[:-1])


def test_em_undoes_an_iteration_that_loses():
    # A huge floor moves the best covariances away from the best likelihood, so the first M step has to lose.
    x = clusters()
    mixture = GaussianMixture(3, components=3).double()
    mixture.initialise(x)
    mixture.floor = 100.0
    before = mixture.log_prob(x)
    assert mixture.em(x) == pytest.approx([before.mean().item()], abs=1e-12)
    assert torch.equal(mixture.log_prob(x), before)


@pytest.mark.parametrize("build", EVERY)
def test_em_in_chunks_is_em(build):
    mixture = build((2,))
    x = data_for(mixture, 40)
    whole, parts = copy.deepcopy(mixture), copy.deepcopy(mixture)
    whole_history = whole.em(x, max_iterations=4, tolerance=0)
    assert parts.em(x, max_iterations=4, tolerance=0, batch_size=7) == pytest.approx(whole_history, abs=1e-10)
    assert_close(parts.log_prob(x), whole.log_prob(x), **SOLVED)


def test_em_of_a_float32_module_computes_in_float64():
    # Two nearly equal dimensions, as neighbouring pixels are: in float32 this covariance is singular.
    x = clusters()
    x[:, 1] = x[:, 0] + 1e-4 * x[:, 1]
    x = x.float()
    mixture = GaussianMixture(3, components=3, floor=0.0)
    mixture.initialise(x)
    wide = copy.deepcopy(mixture).double()
    assert mixture.em(x, tolerance=1e-6) == pytest.approx(wide.em(x.double(), tolerance=1e-6), abs=1e-10)
    assert_close(mixture.log_prob(x).mean().double(), wide.log_prob(x.double()).mean(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("event", EVENTS)
def test_one_component_is_the_sample_mean_and_covariance(event):
    mixture = GaussianMixture(event, components=1, floor=0.01).double()
    x = data_for(mixture, 60) * 3 + 1
    mixture.initialise(x)
    flat = x.flatten(1)
    assert_close(mixture.means[0], x.mean(0), **EXACT)
    expected = torch.cov(flat.T, correction=0) + 0.01 * torch.eye(flat.shape[1], dtype=torch.float64)
    assert_close(mixture.covariances[0], expected, **EXACT)
    # From anywhere, one iteration of EM is the same fit.
    again = scrambled(GaussianMixture(event, components=1, floor=0.01))
    again.em(x, max_iterations=1)
    assert_close(again.covariances[0], expected, **EXACT)


def test_one_bernoulli_component_is_the_sample_mean_within_the_floor():
    x = (torch.rand(50, 2, 3) > 0.4).double()
    x[:, 0, 0], x[:, 1, 2] = 0, 1
    mixture = BernoulliMixture((2, 3), components=1, floor=0.01).double()
    mixture.initialise(x)
    assert_close(mixture.means[0], x.mean(0).clamp(0.01, 0.99), **EXACT)
    assert mixture.means[0, 0, 0].item() == pytest.approx(0.01)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_an_empty_component_keeps_its_parameters(covariance):
    mixture = GaussianMixture(2, components=3, covariance=covariance).double()
    x = torch.randn(50, 2, dtype=torch.float64)
    with torch.no_grad():
        mixture.means[2] = 1e4
    mixture.em(x, max_iterations=5)
    assert torch.equal(mixture.means[2], torch.full((2,), 1e4, dtype=torch.float64))
    if covariance != "tied":
        assert torch.equal(mixture.covariances[2], torch.eye(2, dtype=torch.float64))
    assert mixture.weights[2] < 1e-30
    assert mixture.mixing_logits.isfinite().all()
    for loss in (
        mixture.log_prob(x).sum(),
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide, x),
    ):
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(mixture.parameters())))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_floor_holds_a_component_that_collapses(covariance):
    x = torch.zeros(20, 2)
    x[10:] = 1  # two points, ten times each: every covariance is zero, or of rank one
    mixture = GaussianMixture(2, components=2, covariance=covariance, floor=1e-4)
    mixture.initialise(x)
    assert math.isfinite(mixture.em(x)[-1])
    expected = 1e-4 * torch.eye(2).expand(2, 2, 2)
    assert_close(mixture.covariances, expected, atol=1e-9, rtol=1e-4)


# --- weights and training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GaussianMixture, BernoulliMixture])
def test_uniform_weights_stay_uniform(kind):
    mixture = kind(2, components=3, weights="uniform").double()
    x = clusters(dim=2) if mixture.measure == "density" else (clusters(dim=2) > 0).double()
    free = kind(2, components=3).double()
    for m in (mixture, free):
        m.initialise(x)
        m.em(x, max_iterations=10)
    assert "mixing_logits" not in dict(mixture.named_parameters())
    assert torch.equal(mixture.weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert (free.weights - 1 / 3).abs().max() > 0.01
    assert "mixing_logits" in mixture.state_dict()
    assert torch.equal(kind(2, components=3).weights, torch.full((3,), 1 / 3))


# The information matrix at the truth gives these means standard errors of 0.02 and 0.04 (narrow) and 0.075 (broad) in
# each coordinate; the tolerance is 5 of the largest. k-means misses it by far: it cuts the overlap with straight lines,
# which pushes the mean of the broad Gaussian away from the others.
TOLERANCE = 0.375


def three_gaussians() -> tuple[Tensor, Tensor]:
    """3000 rows, 1000 from each of a broad and two narrow Gaussians that overlap; and the true means."""
    means = torch.tensor([[0.0, 0.0], [2.5, 0.0], [0.0, 2.5]], dtype=torch.float64)
    sd = torch.tensor([[1.5, 1.5], [0.5, 1.0], [1.0, 0.5]], dtype=torch.float64)
    noise = torch.randn(3, 1000, 2, dtype=torch.float64)
    return (means[:, None] + sd[:, None] * noise).flatten(0, 1), means


def mean_error(mixture: GaussianMixture, means: Tensor) -> float:
    """Largest distance of a mean from the truth, under the best matching of components."""
    orders = itertools.permutations(range(3))
    return min((mixture.means.detach()[list(o)] - means).norm(dim=-1).max().item() for o in orders)


@pytest.mark.parametrize("method", ["em", pytest.param("adam", marks=pytest.mark.slow)])
def test_three_gaussians_are_recovered(method):
    x, means = three_gaussians()
    mixture = GaussianMixture(2, components=3, weights="uniform").double()
    mixture.initialise(x)
    assert mean_error(mixture, means) > 2 * TOLERANCE
    if method == "em":
        mixture.em(x, max_iterations=500, tolerance=1e-7)
    else:
        optimiser = torch.optim.Adam(mixture.parameters(), lr=0.05)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        for _ in range(150):
            optimiser.zero_grad()
            (elbo.differentiable_loss(mixture.model, mixture.guide, x) / len(x)).backward()
            optimiser.step()
    assert mean_error(mixture, means) < TOLERANCE


@pytest.mark.parametrize("build", EVERY)
def test_fitting_leaves_global_state_alone(build):
    mixture = build((2,))
    x = data_for(mixture, 50)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mixture.initialise(x)
    mixture.em(x, max_iterations=3)
    TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide, x).backward()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert not list(pyro.get_param_store().keys())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "diag"}, "covariance: expected one of full, diagonal, tied, spherical, got 'diag'"),
        ({"weights": "equal"}, "weights: expected trainable or uniform, got 'equal'"),
        ({"components": 0}, "components: expected a whole number of at least 1, got 0"),
        ({"floor": -1.0}, "floor: expected a number of at least 0"),
        ({"event_shape": (2, 0)}, "event_shape: expected positive sizes"),
        ({"event_shape": ()}, "event_shape: expected positive sizes"),
    ],
)
def test_arguments_refused(options, message):
    with pytest.raises(UsageError, match=message):
        GaussianMixture(**{"event_shape": 2, **options})


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_bernoulli_floor_refused(floor):
    with pytest.raises(UsageError, match=r"floor: expected a number above 0 and below 0.5"):
        BernoulliMixture(2, floor=floor)


@pytest.mark.parametrize("method", ["log_prob", "responsibilities", "model", "initialise", "em"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5), r"x: expected event shape \(2, 2\), got \(5,\); build the mixture with event_shape=\(5,\)"),
        ((4, 4), r"got \(4,\); pass x.reshape\(-1, 2, 2\)"),
        ((2, 2), r"pass x.unsqueeze\(0\)"),
    ],
)
def test_event_shape_refused(method, shape, message):
    with pytest.raises(UsageError, match=message):
        getattr(GaussianMixture((2, 2), 2), method)(torch.zeros(shape))


@pytest.mark.parametrize("method", ["log_prob", "responsibilities", "initialise", "em"])
def test_values_refused(method):
    with pytest.raises(DataError, match=r"x: expected values in \{0, 1\}, got others between 0 and 0.5"):
        getattr(BernoulliMixture(2, 2), method)(torch.tensor([[0.0, 0.5]] * 3))
    for bad in (math.inf, -math.inf):
        with pytest.raises(DataError, match="x: expected values in the real numbers"):
            getattr(GaussianMixture(2, 2), method)(torch.tensor([[0.0, bad]] * 3))


@pytest.mark.parametrize("method", ["initialise", "em"])
def test_fits_refused(method):
    with pytest.raises(UsageError, match="x: expected at least 3 rows for 3 components, got 2"):
        getattr(GaussianMixture(2, 3), method)(torch.zeros(2, 2))
    for covariance in COVARIANCES:
        with pytest.raises(NumericalError, match="expected positive definite covariances"):
            getattr(GaussianMixture(2, 1, covariance, floor=0.0), method)(torch.zeros(5, 2))


def test_em_options_refused():
    mixture, x = GaussianMixture(2, 1), torch.randn(5, 2)
    with pytest.raises(UsageError, match="max_iterations"):
        mixture.em(x, max_iterations=0)
    with pytest.raises(UsageError, match="batch_size"):
        mixture.em(x, batch_size=0)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "tied", "spherical"])
def test_data_of_any_unit_are_fitted_alike(covariance):
    """x in units of c: every log-density is less by D log c, and the fit is the same."""
    torch.manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 0.1]]).double()
    x[:70] += 3

    def fitted(c):
        mixture = GaussianMixture(3, components=2, covariance=covariance).double()
        mixture.initialise(c * x)
        mixture.em(c * x, tolerance=1e-9)
        return mixture.log_prob(c * x) + 3 * math.log(c)

    for c in (1e-6, 1e6):
        assert_close(fitted(c), fitted(1.0), rtol=0, atol=1e-6)
