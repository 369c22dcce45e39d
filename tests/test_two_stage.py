"""Two stages: the joined pair is the first with another p(z), and it trains the second one on draws of q(z|x)."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from conftest import EXACT, assert_mean
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

import pyrovae
from pyrovae.errors import CheckpointError, DataError, PairError, UsageError
from pyrovae.inference import (
    ELBO,
    IWAE,
    Annealed,
    adam,
    aggregate_kl,
    fit,
    gaps,
    log_marginal,
    log_weights,
    sandwich,
    to_inference_data,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.units import use_of_units
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    VAE,
    ExPostVAE,
    Gaussian,
    MeanFieldNormal,
    MixtureOfGaussians,
    Network,
    StandardNormal,
    TwoStageVAE,
    VampPrior,
)
from pyrovae.models.guides import SCALE_FLOOR
from pyrovae.models.two_stage import SecondStage
from pyrovae.runs.directory import load, open_run
from pyrovae.runs.evaluation import evaluate
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.scoring import Scoring
from pyrovae.runs.training import train

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(3))
D, Z, U = 3, 2, 2


def small(inputs: int, latent: int, dropout: float = 0.0, hidden: tuple[int, ...] = (8,)) -> VAE:
    guide = MeanFieldNormal(MLP(inputs, hidden=hidden, dropout=dropout), latent)
    return VAE(StandardNormal(latent), Gaussian(MLP(latent, inputs, hidden=hidden, dropout=dropout)), guide)


def stages(dropout: float = 0.0) -> TwoStageVAE:
    first = small(D, Z, dropout)
    first.initialise(X)
    model = TwoStageVAE(first, small(Z, U))
    model.initialise(X)
    return model


# -- What it is --------------------------------------------------------------------------------------------------------


def test_log_weights_are_those_of_both_stages():
    """log w = log p(x|z) - log q(z|x) + log-weight of the second stage at z, draw by draw."""
    model = stages().double()
    x = X.double()
    particles = draw(Pair(model.model, model.guide), Batch(x), 4)
    z, u = particles.latents["z1"].value, particles.latents["z2"].value
    second, below = model.second, model.first
    of_x = below.likelihood(z).log_prob(x) - below.posterior(x).log_prob(z)
    of_z = second.prior().log_prob(u) + second.likelihood(u).log_prob(z) - second.posterior(z).log_prob(u)
    assert_close(particles.log_weights, of_x + of_z, **EXACT)


def test_gradients_are_those_of_the_second_stage_on_draws_of_the_first_guide():
    """And nothing else gets one: at the same draws, parameter by parameter."""
    model = stages().double()
    pair = Pair(model.model, model.guide)
    torch.manual_seed(7)
    particles = draw(pair, Batch(X.double()), 5)
    particles.log_weights.sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(7)
    z = model.posterior(X.double()).rsample((5,))  # the first that the guide draws
    assert not z.requires_grad
    q = model.second.posterior(z)
    u = q.rsample()
    (model.prior().log_prob(u) + model.second.likelihood(u).log_prob(z) - q.log_prob(u)).sum().backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(together) == set(alone) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in alone.items():
        assert_close(together[name], gradient, **EXACT)


class Line(nn.Module):
    """W z + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias


def linear(weight: Tensor, bias: Tensor, scale: float, mean: Tensor, variance: Tensor) -> VAE:
    """x = W z + b + scale e, and the exact q(z|x) of z ~ N(mean, variance), for z of one element."""
    outputs = len(bias)
    precision = 1 / variance + weight.square().sum() / scale**2
    guide = MeanFieldNormal(Network(nn.Identity(), outputs, outputs), 1)
    with torch.no_grad():
        guide.head.weight.copy_(torch.stack([weight[:, 0] / scale**2 / precision, torch.zeros(outputs)]))
        loc = (mean / variance - weight[:, 0] @ bias / scale**2) / precision
        guide.head.bias.copy_(torch.stack([loc, (precision**-0.5 - SCALE_FLOOR).expm1().log()]))
    return VAE(StandardNormal(1), Gaussian(Network(Line(weight, bias), 1, outputs), scale=scale), guide)


@pytest.fixture
def gaussian() -> tuple[TwoStageVAE, dist.Normal, MultivariateNormal, Tensor]:
    """Two linear stages with exact guides: the joined pair, its exact p(z) and p(x), and rows drawn from it."""
    torch.set_default_dtype(torch.float64)
    try:
        w, b, a, c = torch.randn(D, 1), torch.randn(D), torch.randn(1, 1) + 1, torch.randn(1)
        p_z = dist.Normal(c[0], (a[0, 0] ** 2 + 0.25).sqrt())
        p_x = MultivariateNormal(w[:, 0] * c + b, w @ w.T * p_z.variance + 0.64 * torch.eye(D))
        first = linear(w, b, 0.8, p_z.mean, p_z.variance)
        return TwoStageVAE(first, linear(a, c, 0.5, torch.zeros(()), torch.ones(()))), p_z, p_x, p_x.sample((40,))
    finally:
        torch.set_default_dtype(torch.float32)


def test_log_weights_of_linear_stages_with_exact_guides_are_log_p(gaussian: tuple):
    """log p(x) of the joined model, whatever is drawn: p(x|z), p(z|u) and p(u) are all of it, and each once."""
    model, _, p_x, x = gaussian
    log_w = log_weights(model.model, model.guide, x, 5)
    assert_close(log_w, p_x.log_prob(x).expand(5, -1), rtol=0.0, atol=1e-8)


def test_samples_are_of_the_joined_model(gaussian: tuple):
    model, _, p_x, _ = gaussian
    x = model.sample(20_000)
    assert_mean(x, p_x.mean)
    assert_mean((x - p_x.mean).square(), p_x.covariance_matrix.diagonal())


def test_every_evaluation_takes_it(gaussian: tuple):
    model, _, p_x, x = gaussian
    few, truth = x[:3], p_x.log_prob(x[:3])
    assert_close(log_marginal(model.model, model.guide, few, 20).estimate, truth, rtol=0.0, atol=1e-8)
    assert_close(gaps(model.model, model.guide, few, num_particles=50).elbo.values, truth, rtol=0.0, atol=1e-8)
    sides = sandwich(model.model, model.guide, few, 2, Annealed(3, 1))
    assert_close(sides.forward, sides.reverse, rtol=0.0, atol=1e-6)  # chains that start at the posterior
    assert set(to_inference_data(model.model, model.guide, few, 50).posterior.data_vars) >= {"z1", "z2"}


# -- The first stage is frozen -----------------------------------------------------------------------------------------


def test_the_first_stage_stays_as_it_was_and_in_evaluation_mode():
    """Its dropout never acts: training leaves its parameters and buffers to the bit, and q(z|x) draws are its own."""
    model = stages(dropout=0.5)
    before = copy.deepcopy(model.first.state_dict())
    started = copy.deepcopy(model.second.state_dict())
    seen = []
    fit(
        model.model, model.guide, X, ELBO(), batch_size=20, epochs=2, progress=False,
        should_stop=lambda: seen.append((model.first.likelihood.training, model.guides[1].training)),
    )  # fmt: skip
    assert set(seen) == {(False, True)}
    for name, value in model.first.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, started[name]) for name, value in model.second.state_dict().items())


def test_a_copy_is_frozen_as_well():
    model = copy.deepcopy(stages(dropout=0.5)).train()
    assert not model.guides[0].training
    assert model.guides[1].training
    assert not model.eval().guides[1].training


def test_each_tensor_has_one_name():
    tensors = Pair(*[getattr(stages(), name) for name in ("model", "guide")]).tensors()
    assert len({id(tensor) for tensor in tensors.values()}) == len(tensors)


def test_a_second_stage_of_other_vectors_is_refused():
    with pytest.raises(UsageError, match=r"z: a guide's latent_dim is \(2,\), the next guide's input is \(5,\)"):
        TwoStageVAE(small(D, 2), small(5, 2))


# -- Distance of the aggregate posterior from the prior ----------------------------------------------------------------


def test_aggregate_kl_of_one_gaussian_is_its_kl(gaussian: tuple):
    """Where q(z|x) is the same for all x, it is q(z), and both sides are KL(q || p), p(z) = E_u p(z|u)."""
    model, p_z, _, x = gaussian
    with torch.no_grad():
        model.guides[0].head.weight.zero_()
        q = model.posterior(x[0]).base_dist
    truth = kl_divergence(q, p_z).item()
    found = aggregate_kl(model.model, model.guide, x, "z1", 40, 1)
    for estimate in (found.upper, found.lower):
        assert abs(estimate.mean - truth) < 5 * estimate.monte_carlo_error
        assert estimate.monte_carlo_error < 0.05 * truth


def test_the_prior_of_a_second_stage_is_a_bound_that_draws_tighten(gaussian: tuple):
    """With a q(u|z) that is too wide: by its ELBO with one draw, to p(z) with many."""
    model, _, _, x = gaussian
    exact = aggregate_kl(model.model, model.guide, x, "z1", 20, 1).upper
    with torch.no_grad():
        model.guides[1].head.bias[1] += 1
    one, many = (aggregate_kl(model.model, model.guide, x, "z1", 20, k).upper for k in (1, 300))
    assert one.mean > exact.mean + 0.1
    assert abs(many.mean - exact.mean) < 0.02 + 5 * math.hypot(many.monte_carlo_error, exact.monte_carlo_error)


def test_aggregate_kl_brackets_that_of_data_at_large():
    """q(z|x) = N(x, s^2), x ~ N(0, t^2): q(z) = N(0, s^2 + t^2); a few rows leave it between, many rows close in."""
    s, t = 0.5, 1.5
    truth = kl_divergence(dist.Normal(0.0, math.hypot(s, t)), dist.Normal(0.0, 1.0)).item()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, s).to_event(1))

    found = [
        [aggregate_kl(model, guide, t * torch.randn(rows, 1), num_particles=4) for _ in range(times)]
        for rows, times in ((6, 80), (800, 4))
    ]
    upper, lower = (
        [torch.tensor([getattr(e, side).mean for e in row]).mean() for row in found] for side in ("upper", "lower")
    )
    assert lower[0] < truth - 0.1 < truth + 0.1 < upper[0]
    assert upper[1] - lower[1] < 0.05
    assert abs(upper[1] - truth) < 0.2


def test_aggregate_kl_needs_a_latent_drawn_from_x_alone():
    model = stages()
    for site in ("z2", "z"):
        with pytest.raises(PairError, match=f"site '{site}': is not the first that the guide draws"):
            aggregate_kl(model.model, model.guide, X, site)
    with pytest.raises(UsageError, match="at least 2 rows"):
        aggregate_kl(model.model, model.guide, X[:1], "z1")


# -- A prior that is fitted afterwards ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ex_post_prior_takes_most_of_the_distance_on_digits_and_costs_nothing():
    rows = pyrovae.load_data("digits").rows("mass")
    x = rows.transform(rows.train)
    guide = MeanFieldNormal(MLP((1, 8, 8), hidden=(60,)), 3)
    likelihood = pyrovae.Bernoulli(MLP(3, (1, 8, 8), hidden=(60,)))
    first = VAE(StandardNormal(3), likelihood, guide)
    first.initialise(x)
    fit(first.model, first.guide, rows.train, ELBO(beta=0.2), transform=rows.transform, epochs=20, progress=False)
    model = ExPostVAE(first, MixtureOfGaussians(3, components=30))
    model.initialise(x)
    options = {"epochs": 20, "progress": False, "optimizer": lambda parameters: adam(parameters, lr=2e-2)}
    fit(model.model, model.guide, rows.train, ELBO(), transform=rows.transform, **options)
    held_out = torch.cat([rows.validation, rows.test])
    before, after = (aggregate_kl(m.model, m.guide, x, num_particles=3).upper for m in (first, model))
    assert after.mean < 0.5 * before.mean
    scores = [log_marginal(m.model, m.guide, held_out, num_particles=300, seed=1) for m in (first, model)]
    gain = scores[1].estimate - scores[0].estimate
    assert gain.mean() > -3 * gain.std() / math.sqrt(len(gain))


def test_a_vamp_prior_fitted_afterwards_leaves_the_guide_it_is_made_of():
    first = small(D, Z)
    first.initialise(X)
    model = ExPostVAE(first, VampPrior(first.guides[0], D, components=5))
    model.initialise(X)
    before = copy.deepcopy(first.guides[0].state_dict())
    fit(model.model, model.guide, X, ELBO(), batch_size=20, epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in first.guides[0].state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"prior.pseudo_inputs"}


def test_stages_are_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SecondStage(small(D, Z), StandardNormal(Z))


# -- As a run ----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "data": "ring", "likelihood": "gaussian", "latent_dim": [3], "network": {"name": "mlp", "hidden": [8]}, "epochs": 1,
    "seed": 1, "eval_rows": 30, "eval_K": 20, "device": "cpu", "compile": "off", "batch_size": 500,
}  # fmt: skip
SECOND: dict[str, Any] = {key: TINY[key] for key in ("network", "seed", "eval_rows", "eval_K", "device", "compile")}
SECOND |= {"epochs": 2, "batch_size": 500}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage in a/, a second one on it in b/."""
    folder = tmp_path_factory.mktemp("runs")
    train(TINY, folder / "a", plots=False)
    train({**SECOND, "first": str(folder / "a")}, folder / "b", plots=False)
    return folder


def test_a_run_stands_when_its_first_stage_is_gone(runs: Path, tmp_path: Path):
    """Loaded, scored and resumed: the parts and weights of the first stage are its own, those of the run it was."""
    first = load(runs / "a")
    shutil.copytree(runs / "b", tmp_path / "b")
    model = load(tmp_path / "b")
    assert isinstance(model, TwoStageVAE)
    for name, value in model.first.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    run = open_run(tmp_path / "b")
    kept = run.recipe.plain()["first"]
    assert kept["name"] == str(runs / "a")
    assert Recipe(**kept["recipe"]).plain()["latent_dim"] == [3]
    assert (run.recipe.data, run.recipe.latent_dim, run.recipe.likelihood.name) == ("ring", (3,), "Gaussian")


def test_a_run_says_how_far_its_codes_are_from_the_prior(runs: Path):
    found = open_run(runs / "b").evaluation["aggregate_kl"]
    model, x = load(runs / "b"), open_run(runs / "b").rows().test[:30]
    for name, (m, site) in {"first": (model.first, "z"), "joined": (model, "z1")}.items():
        again = aggregate_kl(m.model, m.guide, x, site, 20, 100)
        assert abs(found[name]["upper"]["mean"] - again.upper.mean) < 6 * found[name]["upper"]["monte_carlo_error"]
    assert "aggregate_kl" not in open_run(runs / "a").evaluation


def test_a_run_resumes_bit_for_bit(runs: Path, tmp_path: Path):
    """After its first stage is gone: one epoch and one more are two."""
    shutil.copytree(runs / "a", tmp_path / "a")
    train({**SECOND, "first": str(tmp_path / "a"), "epochs": 1}, tmp_path / "c", plots=False)
    shutil.rmtree(tmp_path / "a")
    train({"epochs": 2}, tmp_path / "c", resume=True, plots=False)
    ours, theirs = (checkpoints.load_latest(path).weights for path in (tmp_path / "c", runs / "b"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_is_resumed_on_the_first_stage_that_it_names_and_on_no_other(runs: Path, tmp_path: Path):
    train({**SECOND, "first": str(runs / "a"), "epochs": 1}, tmp_path / "c", plots=False)
    kept = open_run(tmp_path / "c").recipe.first
    assert train({"first": str(runs / "a")}, tmp_path / "c", resume=True, plots=False).recipe.first == kept
    with pytest.raises(CheckpointError, match=r"another configuration \(first: \S*a then, elsewhere now\)"):
        train({"first": "elsewhere"}, tmp_path / "c", resume=True, plots=False)


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_on_the_first_stage_again(runs: Path, tmp_path: Path):
    (tmp_path / "c").mkdir()
    shutil.copy(runs / "b" / "config.yaml", tmp_path / "c")
    train({}, tmp_path / "c", resume=True, plots=False)
    ours, theirs = (checkpoints.load_latest(path).weights for path in (tmp_path / "c", runs / "b"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


STRANGE = {
    "none": {},
    "a list": {"recipe": [1]},
    "a mixture": {"recipe": {"model": "mixture"}},
    "two stages": {"recipe": {"first": "a"}},
    "unknown options": {"recipe": {"x": 1}},
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_first_stage_in_a_configuration_is_refused(runs: Path, tmp_path: Path, case: str):
    shutil.copytree(runs / "b", tmp_path / "b")
    content = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    content["first"] = {"name": "a", "weights": "", **STRANGE[case]}
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match="declares no model"):
        load(tmp_path / "b")


def test_a_saved_configuration_asks_for_the_first_stage_as_it_was(runs: Path, tmp_path: Path):
    """It names the run and the hash of its weights: another run under that name is refused, and so is none."""
    options = {k: v for k, v in open_run(runs / "b").recipe.plain().items() if k not in ("data_hash", "event_shape")}
    with pytest.raises(CheckpointError, match=r"the weights of .* are not those"):
        train({**options, "first": {**options["first"], "weights": "0" * 64}}, tmp_path / "d")
    with pytest.raises(CheckpointError, match="no such run directory"):
        train({**options, "first": {**options["first"], "name": str(tmp_path / "gone")}}, tmp_path / "d")
    run = train(options, tmp_path / "d", plots=False)
    assert run.recipe.plain()["first"] == options["first"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no first stage": ({"model": "two-stage"}, "first: a two-stage is trained on the codes of a vae; name its run"),
    "a model of one stage": ({"model": "vae", "first": "a"}, "first: not used, since a vae has one stage"),
    "an exact model": ({"model": "mixture", "first": "a"}, "first: not used, since a mixture has one stage"),
    "a weight of the KL": ({"first": "a", "beta": 0.5}, "beta: not used, since the second stage"),
    "a condition": ({"first": "a", "condition": "label"}, "condition: not used"),
    "corruption": ({"first": "a", "corruption": "masking"}, r"corruption: not used, since the q\(z\|x\)"),
    "several layers": ({"first": "a", "latent_dim": [3, 2]}, "latent_dim: a two-stage has one latent layer, got 2"),
    "no path": ({"first": 3}, "first: expected the directory of a run, got 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str):
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        Recipe(**options)


def test_other_data_and_second_stages_of_second_stages_are_refused(runs: Path, tmp_path: Path):
    given = {**SECOND, "first": str(runs / "a")}
    with pytest.raises(UsageError, match=r"data: that of the first stage, .*, is ring; leave it out"):
        train({**given, "data": "pinwheel"}, tmp_path / "d")
    with pytest.raises(UsageError, match="likelihood: that of the first stage"):
        train({**given, "likelihood": {"name": "Gaussian", "scale": 0.5}}, tmp_path / "d")
    with pytest.raises(UsageError, match=r"first: the model of .* is two-stage; a two-stage is trained on"):
        train({**given, "first": str(runs / "b")}, tmp_path / "d")


def test_a_second_stage_is_not_written_over_its_first(runs: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in (runs / "a").rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(runs / "a")
    for directory in (runs / "a", tmp_path / "link"):
        with pytest.raises(UsageError, match="is that of the first stage, which stays"):
            train({**SECOND, "first": str(runs / "a")}, directory, overwrite=True, plots=False)
    assert {path: path.read_bytes() for path in (runs / "a").rglob("*") if path.is_file()} == before


def test_rows_that_changed_since_are_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pyrovae.runs import training

    build = training.build_rows
    monkeypatch.setattr(training, "build_rows", lambda recipe: build(recipe.replace(standardize=True)))
    with pytest.raises(DataError, match="the data has changed since the first stage was trained"):
        train({**SECOND, "first": str(runs / "a")}, tmp_path / "d")


def test_the_recipe_needs_a_first_stage_and_nothing_else(runs: Path, tmp_path: Path):
    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "two-stage.yaml").read_text())
    with pytest.raises(UsageError, match="first: a two-stage is trained on the codes of a vae; name its run"):
        Recipe(**recipe)
    quick = {key: SECOND[key] for key in ("seed", "eval_rows", "eval_K", "device", "compile")}
    run = train({**recipe, **quick, "first": str(runs / "a"), "epochs": 1}, tmp_path / "e", plots=False)
    scale = run.model().second.likelihood.loc_and_scale(torch.zeros(1, 3))[1]
    assert len(scale.unique()) == 3  # learned for each element of z: its own from the start


def test_it_is_evaluated_as_any_other(runs: Path):
    values = evaluate(open_run(runs / "b"), Scoring(30), limit=20)
    assert math.isfinite(values["log_marginal"])
    assert set(values["aggregate_kl"]) >= {"first", "joined"}


# -- What it is for ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_stage_takes_half_of_the_distance_on_the_ring():
    """On held-out rows of a plane pushed to a ring, from either side, and log p(x) is no worse."""
    rows = pyrovae.load_data("ring").rows("density")
    first = small(2, 2, hidden=(50,))
    first.initialise(rows.train)
    options = {"progress": False, "optimizer": lambda parameters: adam(parameters, lr=3e-3)}
    fit(first.model, first.guide, rows.train, ELBO(), epochs=12, **options)
    model = TwoStageVAE(first, small(2, 2, hidden=(50, 50)))
    model.initialise(rows.train)
    fit(model.model, model.guide, rows.train, IWAE(10), epochs=25, **options)
    x = torch.cat([rows.validation, rows.test])
    before = aggregate_kl(first.model, first.guide, x, num_particles=2)
    after = aggregate_kl(model.model, model.guide, x, "z1", num_particles=2)
    assert after.upper.mean < 0.5 * before.lower.mean
    scores = [log_marginal(m.model, m.guide, x, num_particles=300, seed=1) for m in (first, model)]
    assert (scores[1].estimate - scores[0].estimate).mean() > 0


@pytest.mark.slow
def test_active_units_are_as_many_as_a_surface_has_dimensions():
    """And the learned scale goes to its floor, wherever that is."""
    rows = pyrovae.load_data("manifold-2-in-20").rows("density")
    guide = MeanFieldNormal(MLP(20, hidden=(60,)), 4)
    vae = VAE(StandardNormal(4), Gaussian(MLP(4, 20, hidden=(60,)), floor=0.5), guide)
    vae.initialise(rows.train)
    fit(vae.model, vae.guide, rows.train, ELBO(), epochs=8, optimizer=lambda p: adam(p, lr=5e-3), progress=False)
    units = use_of_units(Pair(vae.model, vae.guide), Batch(rows.test))
    assert units.active_by_variance == units.active_by_kl == 2
    scale = vae.likelihood.loc_and_scale(torch.zeros(1, 4))[1][0, 0] / vae.likelihood.unit
    assert scale < 1.1 * vae.likelihood.floor
