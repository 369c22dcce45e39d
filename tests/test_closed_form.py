"""Scales in closed form: the maximum of the bound given all else, set by training, and a number for all rows alike."""

import copy
import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, Renyi, fit, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import OfParticles
from pyrovae.inference.pair import Pair
from pyrovae.inference.training.closed_form import weights_of
from pyrovae.inference.training.optimizers import adam
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, VAE, Gaussian, Laplace, Masked, MeanFieldNormal, StandardNormal
from pyrovae.models.location_scale import LocationScale

FAMILIES = {"Gaussian": Gaussian, "Laplace": Laplace}
D = 4


def vae(family: type[LocationScale], scale: str | float, hidden: tuple[int, ...] = (8,)) -> VAE:
    torch.manual_seed(0)
    return VAE(StandardNormal(2), family(MLP(2, D, hidden), scale), MeanFieldNormal(MLP(D, hidden=(8,)), 2))


def data(rows: int = 200) -> Tensor:
    """Rows around a plane, with noise of sd 0.3."""
    random = torch.Generator().manual_seed(1)
    loadings = torch.tensor([[1.0, -0.5, 0.8, 0.2], [0.0, 0.7, 0.9, -1.1]])
    return torch.randn(rows, 2, generator=random) @ loadings + 0.3 * torch.randn(rows, D, generator=random)


def at_the_maximum(pair: VAE, objective: OfParticles, x: Tensor, z: dict[str, Tensor], times: int) -> list[float]:
    """Set the scale so many times at the same draws; the bounds before each time, and after the last."""
    wrapped, bounds = Pair(pair.model, pair.guide), []
    for _ in range(times + 1):
        with torch.no_grad():
            particles = draw(wrapped, Batch(x), len(z["z"]), z)
            bounds.append(objective.of(particles).sum().item())
            if len(bounds) <= times:
                weights = weights_of(objective, particles)
                p = particles.model_trace.nodes["x"]["fn"]
                pair.likelihood.maximise((weights * pair.likelihood.statistics(p, x)).sum((1, 2)))
    return bounds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", [ELBO(num_particles=3), IWAE(3), Renyi(0.5, 3)], ids=lambda o: type(o).__name__)
def test_the_closed_form_is_where_a_learned_scale_has_no_gradient(family: str, objective: OfParticles) -> None:
    """For each bound and law, at the same draws; EM never lowers the bound, and for the ELBO one step is enough."""
    x = data().double()
    pair = vae(FAMILIES[family], "optimal").double()
    pair.initialise(x)
    z = {"z": torch.randn(3, len(x), 2, dtype=torch.float64)}
    bounds = at_the_maximum(pair, objective, x, z, 1 if isinstance(objective, ELBO) else 200)
    assert bounds[1] - bounds[0] > 10
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(bounds))
    learned = copy.deepcopy(pair)
    learned.likelihood = FAMILIES[family](pair.likelihood.decoder, "learned").double()
    learned.likelihood.unit.copy_(pair.likelihood.unit)
    raw = learned.likelihood.raw_scale
    for shift, far in ((0.0, False), (0.1, True)):
        excess = pair.likelihood.optimal / pair.likelihood.unit - learned.likelihood.floor
        with torch.no_grad():
            raw.copy_(excess.expm1().log() + shift)
        particles = draw(Pair(learned.model, learned.guide), Batch(x), 3, z)
        (gradient,) = torch.autograd.grad(objective.of(particles).sum(), raw)
        assert (abs(gradient) > 1) if far else (abs(gradient) < 1e-5)


@pytest.mark.slow
def test_fit_sets_it_to_the_error_of_training_rows_and_learns_what_a_learned_scale_does() -> None:
    """sigma^2 = E |x - mean|^2 / D to its Monte Carlo error, and within 5 % of what gradients find."""
    x, scales = data(1000), {}

    def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return adam(parameters, lr=0.02)

    for scale in ("optimal", "learned"):
        pair = vae(Gaussian, scale, hidden=())
        pair.initialise(x)
        how = {"batch_size": 50, "epochs": 30, "optimizer": fast, "compile": "off", "progress": False}
        fitted = fit(pair.model, pair.guide, x, **how)
        with torch.no_grad():
            scales[scale] = pair.likelihood.loc_and_scale(torch.zeros(1, 2))[1][0, 0].item()
            q = pair.posterior(x)
            draws = [(x - pair.likelihood(q.sample()).mean).square().mean() for _ in range(50)]
            error = torch.stack(draws).mean().item()
        if scale == "optimal":
            assert fitted.metrics["likelihood_scale"].iloc[-1] == pytest.approx(scales[scale])
            assert fitted.metrics["likelihood_scale"].iloc[0] > 1.2 * scales[scale]
            assert scales[scale] ** 2 == pytest.approx(error, rel=0.05)  # one draw of each row, by which it was set
    assert scales["optimal"] == pytest.approx(scales["learned"], rel=0.05)
    estimate = log_marginal(pair.model, pair.guide, x[:100], num_particles=200)  # refuses rows that depend on others
    assert estimate.estimate.isfinite().all()


def test_a_resumed_run_has_it_to_the_last_bit(tmp_path) -> None:
    x, found = data(), []
    for directory, stops in (("whole", (4,)), ("parts", (2, 4))):
        for epochs in stops:
            pair = vae(Gaussian, "optimal")
            pair.initialise(x)
            how = {"batch_size": 50, "compile": "off", "progress": False, "directory": tmp_path / directory}
            kept = fit(pair.model, pair.guide, x, IWAE(3), epochs=epochs, resume=epochs == 4 and len(stops) > 1, **how)
        found.append((pair.state_dict(), kept.metrics["likelihood_scale"].tolist()))
    (whole, scales), (parts, again) = found
    assert scales == again
    assert len(set(scales)) == 4
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_missing_elements_count_nothing() -> None:
    """Of rows seen in part, the mean square over what is seen, whatever stands where nothing is."""
    x, seen = data().double(), torch.rand(200, D) < 0.6
    pair = vae(Gaussian, "optimal").double()
    masked = Masked(pair, torch.zeros(D, dtype=torch.float64))
    with torch.no_grad():
        trace = poutine.trace(poutine.replay(masked.model, poutine.trace(masked.guide).get_trace(x, seen)))
        p = trace.get_trace(x, seen).nodes["x"]["fn"]
        for missing in (0.0, 9.0, math.nan):
            filled = x.where(seen, torch.full((), missing, dtype=torch.float64))
            totals = pair.likelihood.statistics(p.expand((1, 200)), filled).sum((1, 2))
            pair.likelihood.maximise(totals)
            wanted = (x - p.base_dist.mean)[seen].square().mean().sqrt()
            assert_close(pair.likelihood.optimal, wanted, rtol=1e-9, atol=0)


def test_a_scale_that_is_trained_otherwise_is_let_alone() -> None:
    """Learned scales record nothing; a pair whose parameters are held keeps its scale; one without x is refused."""
    x = data(100)
    pair = vae(Gaussian, "learned")
    fitted = fit(pair.model, pair.guide, x, epochs=1, batch_size=50, compile="off", progress=False)
    assert "likelihood_scale" not in fitted.metrics
    held = vae(Gaussian, "optimal")
    held.likelihood.requires_grad_(False)
    fit(held.model, held.guide, x, epochs=1, batch_size=50, compile="off", progress=False)
    assert held.likelihood.optimal == 1
    renamed = vae(Gaussian, "optimal")

    def of_y(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", renamed.likelihood(pyro.sample("z", renamed.prior())), obs=y)

    with pytest.raises(UsageError, match="Gaussian has a closed form, of an observed site 'x'"):
        fit(of_y, renamed.guide, x, epochs=1, batch_size=50, compile="off", progress=False)


def test_the_floor_holds() -> None:
    pair = vae(Gaussian, "optimal")
    pair.likelihood.maximise(torch.tensor([0.0, 10.0]))
    assert pair.likelihood(torch.zeros(1, 2)).stddev[0, 0] == pytest.approx(1e-3)
    assert pair.likelihood.scale_at_floor(torch.zeros(1, 2)) == 1
    assert math.isfinite(pair.likelihood(torch.zeros(1, 2)).log_prob(torch.ones(1, D)).item())
