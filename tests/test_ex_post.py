"""A prior fitted after training: by maximum likelihood to the codes, where its best one has a closed form."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_two_stage import SECOND, TINY, linear, small
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, adam, fit, log_marginal
from pyrovae.models import VAE, ExPostVAE, MixtureOfGaussians
from pyrovae.runs.build import build_model, make
from pyrovae.runs.directory import load, open_run
from pyrovae.runs.options import CONDITIONAL, PARTS
from pyrovae.runs.parts import choose
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.training import train

W, B = torch.tensor([[1.0], [-0.5], [2.0]], dtype=torch.float64), torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
NOISE = 0.8


def first_stage() -> VAE:
    """x = W z + b + 0.8 e and the exact q(z|x) of z ~ N(0, 1)."""
    torch.set_default_dtype(torch.float64)
    try:
        return linear(W, B, NOISE, torch.zeros(()), torch.ones(()))
    finally:
        torch.set_default_dtype(torch.float32)


def rows(count: int = 400) -> Tensor:
    """Data of the same line, whose z are N(2, 0.6^2): another prior than the first stage was trained with."""
    z = 2 + 0.6 * torch.randn(count, 1, dtype=torch.float64)
    return z @ W.T + B + NOISE * torch.randn(count, 3, dtype=torch.float64)


def best_gaussian(vae: VAE, x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the aggregate posterior: the Gaussian of the highest likelihood for its draws."""
    q = vae.posterior(x)
    return q.mean.mean().item(), (q.variance.mean() + q.mean.var(0, unbiased=False)).sqrt().item()


def gaussian_prior(mean: float = 0.0, sd: float = 0.7) -> MixtureOfGaussians:
    """N(mean, sd^2), learned."""
    prior = MixtureOfGaussians(1, components=1).double()
    with torch.no_grad():
        prior.loc.fill_(mean)
        prior.raw_scale.fill_(math.log(math.expm1(sd - prior.floor)))
    return prior


def fitted(model: ExPostVAE, x: Tensor, epochs: int) -> None:
    """Train by the ELBO, with a rate that falls to nothing."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    settings = {"epochs": epochs, "batch_size": 50, "progress": False, "compile": "off", "schedule": schedule}
    fit(model.model, model.guide, x, ELBO(num_particles=20), optimizer=lambda p: adam(p, lr=0.1), **settings)


def log_p(x: Tensor, mean: float, sd: float) -> Tensor:
    """log p(x) of the line with z ~ N(mean, sd^2), in closed form."""
    return MultivariateNormal(W[:, 0] * mean + B, sd**2 * W @ W.T + NOISE**2 * torch.eye(3)).log_prob(x)


def test_the_fitted_gaussian_is_that_of_the_moments_of_the_codes():
    """Of draws of q(z|x), new ones at every step: mean and standard deviation of the aggregate posterior."""
    first, x = first_stage(), rows()
    mean, sd = best_gaussian(first, x)
    model = ExPostVAE(first, gaussian_prior())
    assert abs(mean) > 1
    fitted(model, x, 20)
    found = model.prior().component_distribution
    assert found.mean.item() == pytest.approx(mean, abs=0.02)
    assert found.stddev.item() == pytest.approx(sd, abs=0.02)


def test_its_log_p_is_that_of_the_first_stage_under_the_new_prior():
    """In closed form, and higher than before by what it should be; the ELBO of the held guide lies below by its KL."""
    first, x = first_stage(), rows(60)
    mean, sd = best_gaussian(first, x)
    model = ExPostVAE(first, gaussian_prior(mean, sd))
    truth = log_p(x, mean, sd)
    estimate = log_marginal(model.model, model.guide, x, 2000, seed=1)
    assert (truth - log_p(x, 0.0, 1.0)).mean() > 0.3
    assert ((estimate.estimate - truth).abs() < 5 * estimate.standard_error + 1e-3).all()
    precision = W.square().sum() / NOISE**2 + 1 / sd**2
    posterior = Normal((mean / sd**2 + (x - B) @ W / NOISE**2) / precision, precision**-0.5)
    gap = kl_divergence(first.posterior(x).base_dist, posterior).mean().item()
    assert gap > 0.01
    assert (truth.mean() - estimate.elbo.mean()).item() == pytest.approx(gap, abs=0.01)


def test_an_adapted_guide_becomes_the_posterior_under_the_new_prior():
    """p(x|z) stays as it is; the ELBO reaches log p(x), which a held guide stays below."""
    x = rows()
    bounds = {}
    for guide in ("held", "adapted"):
        model = ExPostVAE(first_stage(), gaussian_prior(2.0, 0.6), guide)
        decoder = copy.deepcopy(model.likelihood.state_dict())
        before = copy.deepcopy(model.guides[0].state_dict())
        fitted(model, x, 15)
        assert all(torch.equal(value, decoder[name]) for name, value in model.likelihood.state_dict().items())
        stayed = [torch.equal(value, before[name]) for name, value in model.guides[0].state_dict().items()]
        assert all(stayed) == (guide == "held")
        p = model.prior().component_distribution
        truth = log_p(x, p.mean.item(), p.stddev.item()).mean().item()
        bounds[guide] = truth - log_marginal(model.model, model.guide, x, 2000, seed=1).elbo.mean().item()
    assert bounds["held"] > 0.01
    assert bounds["adapted"] < 0.2 * bounds["held"]


def test_modes_of_an_adapted_guide_follow_training():
    """A held guide's dropout never acts; an adapted one's does while it is trained."""
    first = small(3, 2, dropout=0.5)
    for guide, training in (("held", False), ("adapted", True)):
        model = ExPostVAE(copy.deepcopy(first), MixtureOfGaussians(2), guide).train()
        assert (model.guides[0].training, model.likelihood.training) == (training, False)


ANY = [
    name
    for name, choice in PARTS["prior"].items()
    if name not in CONDITIONAL
    and "guides" not in choice.classes[0].takes
    and choice.classes[0].constants.get("latents") in (None, "those of its guide")  # the codes are real numbers
]


@pytest.mark.parametrize("name", ANY)
def test_any_prior_is_fitted_to_the_codes_and_nothing_else_moves(name: str):
    """Its bound rises, by what the prior alone has: decoder and guide stay to the bit, and p(z) comes nearer q(z)."""
    x = 1.5 + torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.2, 2.0])
    first = small(3, 2)
    first.initialise(x)
    small_ones = {"components": 8, "hidden": 8, "steps": 2}
    settings = {key: value for key, value in small_ones.items() if key in PARTS["prior"][name].settings}
    prior = make(
        "prior", choose("prior", {"name": name, **settings}, None, PARTS["prior"]), latent_dim=2, event_shape=(3,),
        guide=first.guides[0],
    )  # fmt: skip
    with torch.no_grad():  # so that codes are nowhere near where any prior starts
        first.guides[0].head.bias[:2] += 1.0
    model = ExPostVAE(first, prior)
    model.initialise(x)
    before = copy.deepcopy(model.first.likelihood.state_dict() | model.first.guides[0].state_dict())
    learned = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learned} <= {id(p) for p in prior.parameters()}
    if not learned:
        return
    settings = {"epochs": 15, "batch_size": 50, "progress": False, "compile": "off", "seed": 1}
    kept = fit(model.model, model.guide, x, ELBO(), optimizer=lambda p: adam(p, lr=0.05), **settings)
    bounds = kept.metrics["train_bound"].tolist()
    assert bounds[-1] > bounds[0] + 0.05
    after = model.first.likelihood.state_dict() | model.first.guides[0].state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


# -- As a run ----------------------------------------------------------------------------------------------------------

EX_POST: dict[str, Any] = {key: value for key, value in SECOND.items() if key != "network"} | {"model": "ex-post"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage in a/, a fitted prior on it in b/."""
    folder = tmp_path_factory.mktemp("runs")
    train(TINY, folder / "a", plots=False)
    train({**EX_POST, "first": str(folder / "a"), "prior": {"name": "flow", "hidden": 8}}, folder / "b")
    return folder


def test_a_run_of_a_fitted_prior_stands_by_itself(runs: Path, tmp_path: Path):
    """Scored as any other, and its own: loaded when the first stage is gone, which it has to the bit."""
    first = load(runs / "a")
    run = open_run(shutil.copytree(runs / "b", tmp_path / "b"))
    model = run.model()
    assert isinstance(model, ExPostVAE)
    for name, value in model.first.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    values = run.evaluation
    assert values["K"] == 20
    assert values["aggregate_kl"]["joined"]["upper"]["mean"] > 0
    assert (run.directory / "plots" / "codes.png").exists()
    again = log_marginal(model.model, model.guide, run.rows().test[:30], 20, seed=0)
    assert values["log_marginal"] == pytest.approx(again.mean, abs=1e-4)


def test_a_run_with_an_adapted_guide_has_no_distance_before_and_after(runs: Path, tmp_path: Path):
    """Since q(z) of the first stage is no longer there; and the weights of the KL mean something again."""
    model = {"name": "ex-post", "guide": "adapted"}
    options = {**EX_POST, "first": str(runs / "a"), "model": model, "prior": "mixture", "beta": 0.5, "epochs": 1}
    run = train(options, tmp_path / "c", plots=False)
    assert "aggregate_kl" not in run.evaluation
    first = load(runs / "a").guides[0].state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in run.model().guides[0].state_dict().items())


def test_a_recipe_declares_the_prior_of_the_first_stages_guide(runs: Path):
    """A VampPrior is made of the guide that it is fitted to the codes of."""
    run = open_run(runs / "b")
    options = {**EX_POST, "prior": {"name": "vamp", "components": 4}}
    recipe = Recipe(**options, first=run.recipe.plain()["first"])
    model = build_model(recipe, (2,))
    assert model.prior._guide[0] is model.guides[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no first stage": ({"model": "ex-post"}, "first: an ex-post is trained on the codes of a vae; name its run"),
    "networks": ({"network": "mlp"}, "network: not used, since an ex-post has the guide and the networks of its first"),
    "a guide": ({"guide": "full"}, "guide: not used, since an ex-post has the guide and the networks of its first"),
    "a weight of the KL": ({"beta": 0.5}, "beta: not used, since the second stage of an ex-post is all in the KL"),
    "a conditional prior": ({"prior": "amortised"}, "prior=AmortisedPrior: is p"),
    "no such use": ({"model": {"name": "ex-post", "guide": "half"}}, "model.guide: expected held or adapted, got half"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str):
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        Recipe(**{"model": "ex-post", **({} if case == "no first stage" else {"first": "a"}), **options})


def test_another_number_of_dimensions_than_the_codes_have_is_refused(runs: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"latent_dim: a prior on .* has that of its codes, 3; leave it out"):
        train({**EX_POST, "first": str(runs / "a"), "latent_dim": [2]}, tmp_path / "d")


def test_the_recipe_stops_when_validation_rows_gain_no_more(runs: Path, tmp_path: Path):
    """It needs a first stage and nothing else; the epoch that is kept is the best one of the validation rows."""
    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "ex-post.yaml").read_text())
    quick = {key: EX_POST[key] for key in ("seed", "eval_rows", "eval_K", "device", "compile")}
    options = {**recipe, **quick, "first": str(runs / "a"), "prior": "mixture", "lr": 0.5, "patience": 1}
    run = train(options, tmp_path / "e", plots=False)
    bounds = run.history["validation_bound"]
    assert len(bounds) == bounds.idxmax() + 2 < recipe["epochs"]
