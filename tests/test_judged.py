"""Judges of x and of what is decoded: who gets which gradient, what an adversary knows, two optimisers in a loop."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
import pyrovae.inference.training.gradients as parts
from pyrovae.errors import CheckpointError, PairError, UsageError
from pyrovae.inference import ELBO, VAEGAN, Factor, Objective, Perceptual, fit, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.training.checkpoint import load_latest
from pyrovae.inference.training.optimizers import adam, grouped
from pyrovae.inference.training.step import Step
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    VAE,
    Critic,
    Discriminator,
    Gaussian,
    IsotropicNormal,
    Judge,
    MeanFieldNormal,
    Network,
    Perception,
    StandardNormal,
)
from pyrovae.plots.training import training_curves
from pyrovae.runs.build import build_model, build_objective
from pyrovae.runs.features import network_for
from pyrovae.runs.recipe import Recipe, title, warnings
from pyrovae.seeding import derive_seed, reseed

D, Z = 4, 2
X = torch.randn(23, D, generator=torch.Generator().manual_seed(1)) + torch.arange(D)
HOW = {"epochs": 3, "batch_size": 5, "seed": 7, "progress": False, "compile": "off"}
EXACT = {"rtol": 0.0, "atol": 0.0}


def vae(judge: Judge | None = None, critic: Critic | None = None, scale: str = "optimal", seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    likelihood = Gaussian(MLP(Z, D, (8,)), scale)
    return VAE(StandardNormal(Z), likelihood, MeanFieldNormal(MLP(D, hidden=(8,)), Z), None, critic, judge)


def adversary(noise: float = 0.1) -> Discriminator:
    torch.manual_seed(3)
    return Discriminator(MLP(D, hidden=(8,)), noise)


def critic() -> Critic:
    torch.manual_seed(4)
    return Critic(Z, (8,))


def seeing(network: nn.Module, features: int) -> Perception:
    return Perception().through(Network(network, D, features))


def stop_after(count: int) -> Callable[[], bool]:
    seen = iter(range(1, 10**6))
    return lambda: next(seen) == count


def tensors(pair: VAE) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pair.state_dict().items()}


# --------------------------------------------------------------------------------------------- who gets which gradient

DECODER, ENCODER = {"likelihood.decoder"}, {"guides.0"}
REACHED = {
    "feature_likelihood": DECODER | ENCODER | {"judge.scale"},
    "decoder_reward": DECODER,
    "adversary_loss": {"judge.adversary"},
}


def modules_reached(pair: VAE, value: Tensor) -> set[str]:
    """The modules of which every parameter has a gradient of a scalar, and no other has."""
    named = dict(pair.named_parameters())
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    found = {name: g is not None and bool(g.any()) for name, g in zip(named, gradients, strict=True)}
    modules = {name: ".".join(name.split(".")[:2]) for name in named}
    reached = {modules[name] for name, hit in found.items() if hit}
    missed = {name for name, hit in found.items() if not hit and modules[name] in reached}
    assert missed <= {"judge.adversary.output.weight", "judge.adversary.output.bias"}
    return reached


@pytest.mark.parametrize("site", REACHED)
def test_a_discriminators_gradients_reach_those_they_should_and_no_other(site: str) -> None:
    pair = vae(adversary())
    pair.initialise(X)
    particles = draw(Pair(pair.model, pair.guide), Batch(X), 3)
    value = particles.model_trace.nodes[site]["value"]
    assert value.shape == (3, len(X))
    assert modules_reached(pair, value.sum()) == REACHED[site]


@pytest.mark.parametrize(("site", "reached"), [("critic_ratio", ENCODER), ("critic_loss", {"critic.network"})])
def test_a_critics_gradients_reach_those_they_should_and_no_other(site: str, reached: set[str]) -> None:
    pair = vae(critic=critic())
    particles = draw(Pair(pair.model, pair.guide), Batch(X), 3)
    assert modules_reached(pair, particles.guide_trace.nodes[site]["value"].sum()) == reached


def test_a_frozen_network_lets_gradients_through_and_gets_none() -> None:
    pair = vae(seeing(nn.Sequential(nn.Linear(D, 3), nn.Tanh()), 3))
    pair.initialise(X)
    particles = draw(Pair(pair.model, pair.guide), Batch(X), 3)
    value = particles.model_trace.nodes["feature_likelihood"]["value"]
    assert modules_reached(pair, value.sum()) == REACHED["feature_likelihood"]
    assert not [name for name, _ in pair.named_parameters() if name.startswith("judge.network")]


def test_what_is_maximised_is_as_weighted_and_the_adversarys_loss_has_no_value_in_it() -> None:
    pair = vae(adversary())
    particles = draw(Pair(pair.model, pair.guide), Batch(X), 2)
    objective = VAEGAN(2, weight=3.0, features=0.5, pixels=2.0)
    found = {
        name: particles.model_trace.nodes[name]["value"].mean(0) for name in ("feature_likelihood", "decoder_reward")
    }
    log_likelihood, kl = ELBO(2).terms(particles).mean(1)
    wanted = 0.5 * found["feature_likelihood"] + 3.0 * found["decoder_reward"] + 2.0 * log_likelihood - kl
    terms = objective.terms(particles)
    assert_close(objective.combine(terms, **objective.settings(0)), wanted)
    assert_close(objective.of(particles), ELBO(2).of(particles))
    (loss,) = objective.losses_of_others(terms)
    assert_close(loss, particles.model_trace.nodes["adversary_loss"]["value"].mean(0).sum())
    seen = vae(seeing(nn.Linear(D, 3), 3))
    particles = draw(Pair(seen.model, seen.guide), Batch(X), 2)
    log_likelihood, kl = ELBO(2).terms(particles).mean(1)
    wanted = 3.0 * particles.model_trace.nodes["feature_likelihood"]["value"].mean(0) + log_likelihood - kl
    objective = Perceptual(2, weight=3.0, pixels=1.0)
    assert_close(objective.combine(objective.terms(particles), **objective.settings(0)), wanted)
    assert_close(objective.of(particles), ELBO(2).of(particles))


# ------------------------------------------------------------------------------------------------------- what is known


def test_a_discriminator_at_its_best_is_the_log_density_ratio() -> None:
    """Of N(0, 1) and N(1, 0.7^2), a decoder that puts out its code, both with noise of the discriminator's own."""
    noise = 0.5

    class Itself(nn.Module):
        """A decoder that puts out its code."""

        def forward(self, z: Tensor) -> Tensor:
            return z + 0.0

    class Known(MeanFieldNormal):
        """q(z|x) = p(z), whatever x is."""

        def forward(self, x: Tensor) -> dist.Distribution:
            return dist.Normal(self.parameters_of(x)[..., :1] * 0 + 1, 0.7).to_event(1)

    torch.manual_seed(0)
    prior = IsotropicNormal(1, 0.7)
    prior.loc.fill_(1.0)
    body = MLP(1, hidden=(32, 32), activation="leaky_relu")
    pair = VAE(
        prior,
        Gaussian(Network(Itself(), 1, 1), 1.0),
        Known(MLP(1, hidden=(2,)), 1),
        judge=Discriminator(body, noise),
    )
    x = torch.randn(1500, 1)
    how = HOW | {"epochs": 60, "batch_size": 500, "optimizer": lambda p: adam(p, lr=5e-3)}
    fit(pair.model, pair.guide, x, VAEGAN(weight=0.0, features=0.0), **how)
    grid = torch.linspace(-1.0, 2.0, 13).unsqueeze(1)
    with torch.no_grad():
        found = pair.judge.adversary(grid)[1]
    data, made = (
        dist.Normal(loc, math.sqrt(scale**2 + noise**2)).log_prob(grid).squeeze(1)
        for loc, scale in ((0.0, 1.0), (1.0, 0.7))
    )
    wanted = data - made
    assert wanted.abs().max() > 1.0
    assert (found - wanted).abs().mean() < 0.15


def test_features_that_are_x_itself_have_the_density_of_a_gaussian_pair() -> None:
    """The loss and every gradient of both networks to the last bit, anywhere; of the scale but for rounding."""
    plain, seen = vae(scale="learned"), vae(seeing(nn.Identity(), D))
    plain.initialise(X)
    seen.initialise(X)
    named = [dict(pair.named_parameters()) for pair in (plain, seen)]
    shared = [name for name in named[0] if name in named[1]]
    scales = named[0]["likelihood.raw_scale"], named[1]["judge.scale.raw_scale"]
    assert len(shared) == len(named[0]) - 1 == len(named[1]) - 1
    for seed in range(3):
        found = []
        for pair, objective, own, scale in zip((plain, seen), (ELBO(2), Perceptual(2)), named, scales, strict=True):
            torch.manual_seed(seed)
            loss = objective.loss_of(Pair(pair.model, pair.guide), Batch(X))
            found.append((loss, *torch.autograd.grad(loss, [*(own[name] for name in shared), scale])))
        for ours, theirs in zip(found[0][:-1], found[1][:-1], strict=True):
            assert_close(ours, theirs, **EXACT)
        assert_close(found[0][-1], found[1][-1], rtol=1e-5, atol=0)
        with torch.no_grad():  # elsewhere, both in the same way
            for i, name in enumerate(shared):
                for own in named:
                    own[name] -= 1e-3 * found[0][1 + i]
            for scale in scales:
                scale -= 1e-3 * found[0][-1]


# ------------------------------------------------------------------------------------------------------ two optimisers


def by_hand(pair: VAE, objective: Objective, optimizers: list[torch.optim.Optimizer]) -> None:
    """`fit`, written by hand: one gradient, and each optimiser steps on parameters of its own."""
    both = Pair(pair.model, pair.guide)
    pair.train()
    step = 0
    for epoch in range(HOW["epochs"]):
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(derive_seed(7, "order", epoch)))
        for rows in order.split(HOW["batch_size"]):
            reseed(derive_seed(7, "step", step, 0), torch.device("cpu"))
            objective.loss_of(both, Batch(X[rows])).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
def test_a_pair_and_its_adversary_are_trained_by_two_optimisers(kind: type) -> None:
    """To the last bit as two optimisers of torch would, with rates of their own."""
    objective = VAEGAN(weight=2.0, pixels=1.0, rate=0.3)
    trained, wanted = (vae(adversary(), scale="learned") for _ in range(2))
    fitted = fit(
        trained.model, trained.guide, X, objective, optimizer=lambda parameters: kind(parameters, lr=0.01), **HOW
    )
    theirs = list(wanted.judge.adversary.parameters())
    own = [p for p in wanted.parameters() if all(p is not other for other in theirs)]
    by_hand(wanted, objective, [kind(own, lr=0.01), kind(theirs, lr=0.01 * 0.3)])
    assert_close(tensors(trained), tensors(wanted), **EXACT)
    assert [epoch["learning_rate"] for epoch in fitted.history] == [0.01] * 3


def test_a_critic_is_trained_as_by_one_optimiser_where_its_rate_is_the_pairs() -> None:
    """FactorVAE, whose critic was in the pair's own group: the same bits; with a rate of its own others."""
    found = []
    for rate in (1.0, 2.0):
        trained = vae(critic=critic(), scale="learned")
        fitted = fit(trained.model, trained.guide, X, Factor(2, rate=rate), **HOW)
        found.append(tensors(trained))
        assert all(0 < epoch["critic_loss"] < 5 for epoch in fitted.history)
    wanted = vae(critic=critic(), scale="learned")
    by_hand(wanted, Factor(2), [adam(list(wanted.parameters()))])
    assert_close(found[0], tensors(wanted), **EXACT)
    assert not torch.equal(found[0]["critic.network.body.1.weight"], found[1]["critic.network.body.1.weight"])


def test_a_schedule_moves_both_rates() -> None:
    rates = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    pair = vae(adversary())
    fit(
        pair.model,
        pair.guide,
        X,
        VAEGAN(rate=0.5),
        optimizer=lambda p: Noting(p, lr=1e-3),
        schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1),
        **HOW,
    )
    assert_close(torch.tensor(rates[0]), torch.tensor([1e-3, 0.5e-3]))
    assert_close(torch.tensor(rates[-1]), torch.tensor([1e-5, 0.5e-5]))


def test_the_loss_of_an_adversary_is_recorded_by_epoch() -> None:
    """With rates of nothing, the mean over rows of what each epoch's draws give."""
    pair, objective = vae(adversary()), VAEGAN()
    seen: list[float] = []

    def note(step: int, x: Tensor) -> None:
        seen.append(len(x))

    fitted = fit(
        pair.model, pair.guide, X, objective, optimizer=lambda p: torch.optim.SGD(p, lr=1e-30), on_step=note, **HOW
    )
    sums = []
    for step in range(5):
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(derive_seed(7, "order", 0)))
        reseed(derive_seed(7, "step", step, 0), torch.device("cpu"))
        particles = draw(Pair(pair.model, pair.guide), Batch(X[order.split(5)[step]]), 1)
        sums.append(particles.model_trace.nodes["adversary_loss"]["value"].sum())
    assert fitted.history[0]["adversary_loss"] == pytest.approx(sum(sums).item() / len(X), rel=1e-6)
    assert all(epoch["adversary_loss"] == pytest.approx(2 * math.log(2), rel=0.2) for epoch in fitted.history)


def test_the_curve_of_an_adversarys_loss_is_drawn_and_no_bound_of_what_is_maximised() -> None:
    history = pd.DataFrame({"epoch": [1, 2], "train_objective": [5.0, 6.0], "adversary_loss": [1.39, 1.2]})
    panels = training_curves(history).axes
    assert [axes.get_title() for axes in panels] == ["adversary's loss (blind: 1.39)"]
    assert panels[0].lines[0].get_ydata().tolist() == [1.39, 1.2]


@pytest.mark.parametrize("how", [{}, {"particle_chunk": 1}], ids=["whole", "chunks"])
def test_resumed_equals_never_stopped(tmp_path: Path, how: dict) -> None:
    """Stopped in the middle of epochs: every tensor, both optimisers' states, and the losses of both."""
    objective = VAEGAN(2, rate=0.5)
    whole = vae(adversary())
    never = fit(whole.model, whole.guide, X, objective, directory=tmp_path / "never", **HOW, **how)
    for count in (2, 6, 1):
        pair = vae(adversary())
        resume = (tmp_path / "stopped").exists()
        options = HOW | how | {"directory": tmp_path / "stopped", "resume": resume}
        fit(pair.model, pair.guide, X, objective, should_stop=stop_after(count), **options)
    pair = vae(adversary(), seed=9)
    last = fit(pair.model, pair.guide, X, objective, directory=tmp_path / "stopped", resume=True, **HOW, **how)
    assert_close(tensors(pair), tensors(whole), **EXACT)
    theirs, ours = load_latest(tmp_path / "never").training, load_latest(tmp_path / "stopped").training
    assert len(ours["optimizer"]["param_groups"]) == 2
    assert_close(ours["optimizer"], theirs["optimizer"], **EXACT)
    for name in ("train_objective", "adversary_loss", "likelihood_scale"):
        assert [e[name] for e in last.history] == [e[name] for e in never.history]
    other = replace(objective, rate=1.0)
    with pytest.raises(CheckpointError, match="cannot resume, since it was run with objective"):
        fit(pair.model, pair.guide, X, other, directory=tmp_path / "stopped", resume=True, **HOW)


def test_processes_step_as_one_on_the_rows_of_all(monkeypatch: pytest.MonkeyPatch, noise: Callable) -> None:
    """Two with 15 and 8 rows come to the parameters, and the recorded loss, of one that has all 23."""
    noise(torch.zeros(1, Z))
    monkeypatch.setattr("torch.normal", lambda mean, std, *_, **__: mean)  # draws of the prior
    parted: list[Tensor] = []

    def step_of(together: Callable | None = None) -> tuple[VAE, Step]:
        pair = vae(adversary(noise=0.0)).double()
        whole, objective = Pair(pair.model, pair.guide), VAEGAN(rate=0.5)
        optimizer = grouped(lambda p: torch.optim.SGD(p, lr=0.01), whole, objective)
        return pair, Step(objective, whole, optimizer, together=together)

    def hear(vector: Tensor) -> Tensor:
        parted.append(vector.clone())
        return vector

    x = X.double()
    alone, step = step_of()
    step(Batch(x), 0)
    before = tensors(step_of()[0])
    step_of(hear)[1](Batch(x[15:]), 0)
    step_of(hear)[1](Batch(x[:1]), 0, absent=True)
    pair, one = step_of(lambda vector: vector + sum(parted))
    one(Batch(x[:15]), 0)
    assert_close(tensors(pair), tensors(alone), rtol=0, atol=1e-12)
    assert_close(one.losses, step.losses, rtol=1e-12, atol=0)
    assert not torch.equal(before["judge.adversary.output.weight"], tensors(alone)["judge.adversary.output.weight"])


def test_loops_of_ones_own_train_both() -> None:
    """The loss is one scalar with the gradient of each: in SVI too."""
    pair = vae(adversary())
    before = tensors(pair)
    SVI(pair.model, pair.guide, PyroOptim(torch.optim.SGD, {"lr": 0.01}), VAEGAN()).step(X)
    after = tensors(pair)
    for name in ("judge.adversary.output.weight", "likelihood.decoder.body.1.weight"):
        assert not torch.equal(before[name], after[name])


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("judge", ["discriminator", "perception"])
def test_a_graph_has_the_loss_and_gradients_of_both(monkeypatch: pytest.MonkeyPatch, judge: str) -> None:
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    found = []
    for compiled in (False, True):
        torch.manual_seed(2)
        pair = vae(adversary() if judge == "discriminator" else seeing(nn.Linear(D, 3), 3)).double()
        whole, objective = Pair(pair.model, pair.guide), VAEGAN() if judge == "discriminator" else Perceptual()
        step = Step(objective, whole, grouped(adam, whole, objective), compiled=compiled)
        for number in range(2):
            torch.manual_seed(5 + number)
            step(Batch(X.double()), number)
        assert bool(step.codes) == compiled
        assert step.refused is None
        found.append((tensors(pair), step.losses))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_trains_compiled_as_eagerly() -> None:
    found = []
    for how in ("off", "on"):
        pair = vae(adversary())
        fitted = fit(pair.model, pair.guide, X[:20], VAEGAN(), **HOW | {"compile": how})
        found.append((tensors(pair), torch.tensor([epoch["adversary_loss"] for epoch in fitted.history])))
        assert (fitted.compile_seconds > 0) == (how == "on")
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- frozen


def test_a_frozen_network_stays_as_it_is_and_its_hash_is_kept(tmp_path: Path) -> None:
    """With batch normalisation and dropout, which train in training mode, in it."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh())
    body.train()
    body(X)
    before = {name: t.clone() for name, t in body.state_dict().items()}
    pair = vae(seeing(body, 5))
    pair.initialise(X)
    fit(pair.model, pair.guide, X, Perceptual(), directory=tmp_path, **HOW)
    after = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    assert_close({name: after[name] for name in before}, before, **EXACT)
    assert not pair.judge.network.training
    saved = load_latest(tmp_path).weights
    assert_close(next(t for name, t in saved.items() if name.endswith("judge.fingerprint")), pair.judge.fingerprint)
    assert not [name for name in saved if "judge.network" in name]
    pair.judge.check_resumed()
    body[0].weight += 1e-3
    with pytest.raises(UsageError, match="the frozen network is not the one that the run began with"):
        pair.judge.check_resumed()


def test_what_is_scored_is_p_of_x_and_knows_nothing_of_the_judge() -> None:
    pair, alone = vae(adversary()), vae()
    pair.eval()
    alone.eval()
    found = [log_marginal(p.model, p.guide, X, 20, seed=1).estimate for p in (pair, alone)]
    assert_close(found[0], found[1], **EXACT)
    blind = vae(Perception()).eval()  # as one that is loaded
    assert_close(log_marginal(blind.model, blind.guide, X, 20, seed=1).estimate, found[0], **EXACT)
    assert VAEGAN().evaluated == Perceptual().evaluated == ELBO()


def test_what_cannot_be_judged_is_refused() -> None:
    pair = vae()
    for objective, judge in ((VAEGAN(), "Discriminator"), (Perceptual(), "Perception")):
        with pytest.raises(PairError, match=f"needs a judge in the model.*judge={judge}"):
            objective.bound(pair.model, pair.guide, X)
    blind = vae(Perception())
    with pytest.raises(UsageError, match="has no network to look through"):
        Perceptual().bound(blind.model, blind.guide, X)
    with pytest.raises(UsageError, match="expected a network to a vector"):
        Discriminator(Network(nn.Unflatten(1, (2, 2)), D, (2, 2)))
    for wrong in ({"weight": -1.0}, {"rate": 0.0}, {"features": math.inf}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            VAEGAN(**wrong)


# -------------------------------------------------------------------------------------------------- on the command line

OPTIMAL = {"name": "gaussian", "scale": "optimal"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "gaussian"}, "whose scale is then to be set in closed form; use `likelihood=gaussian`"),
        ({"likelihood": None}, "whose scale is then to be set in closed form"),
        ({"model": "hierarchical"}, "needs a Discriminator in the pair, which a hierarchical has no place for"),
        ({"condition": "label"}, "given nothing; leave `condition` out"),
        ({"missing": True}, "of one kind, given nothing; leave `missing` out"),
        ({"patience": 3}, "which is no bound, the last epoch is kept"),
        ({"gradient": "score-function"}, "is not of `elbo=vae-gan`"),
        ({"elbo": {"name": "vae-gan", "network": "classifier"}}, "not used by vae-gan"),
    ],
)
def test_a_recipe_that_cannot_be_judged_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**{"elbo": "vae-gan", "likelihood": OPTIMAL, **options})


def test_a_recipe_makes_the_pair_and_says_what_it_maximises() -> None:
    recipe = Recipe(elbo={"name": "vae-gan", "weight": 3.0, "rate": 0.5}, likelihood=OPTIMAL, network={"hidden": [8]})
    assert Recipe(**recipe.plain()) == recipe
    assert build_objective(recipe) == VAEGAN(weight=3.0, rate=0.5)
    judge = build_model(recipe, (6,)).judge
    assert isinstance(judge, Discriminator)
    assert judge.adversary.body.in_shape == (6,)
    assert "no bound on log p(x)" in warnings(recipe)[0]
    assert "vae-gan" in title(recipe)
    seen = Recipe(elbo="perceptual", likelihood=OPTIMAL)
    assert isinstance(build_model(seen, (6,)).judge, Perception)
    assert build_objective(seen) == Perceptual(network="classifier")
    assert build_model(Recipe(likelihood="gaussian"), (6,)).judge is None


class Rows:
    """As much of rows as a file of features asks for."""

    event_shape = (2,)


def test_a_run_looks_through_the_module_of_a_file_and_is_scored_without_it(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    rows = ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(body, (torch.zeros(2, 2),), dynamic_shapes=rows), tmp_path / "f.pt2")
    x = torch.randn(5, 4, 2)
    assert_close(network_for(str(tmp_path / "f.pt2"), Rows())(x), body(x), rtol=1e-6, atol=1e-6)
    options = {
        "data": "three-gaussians",
        "elbo": {"name": "perceptual", "network": str(tmp_path / "f.pt2")},
        "likelihood": OPTIMAL,
        "network": {"hidden": [8]},
        "latent_dim": [2],
        "batch_size": 500,
        "epochs": 1,
        "seed": 0,
        "eval_K": 5,
        "eval_rows": 20,
        "device": "cpu",
    }
    run = pyrovae.train(options, tmp_path / "run", plots=False)
    assert run.evaluation["measure"].startswith("density of the data")
    torch.nn.init.ones_(body[0].weight)
    torch.export.save(torch.export.export(body, (torch.zeros(2, 2),), dynamic_shapes=rows), tmp_path / "f.pt2")
    with pytest.raises(UsageError, match="the frozen network is not the one that the run began with"):
        pyrovae.train({"epochs": 2}, tmp_path / "run", resume=True, plots=False)
    (tmp_path / "f.pt2").unlink()
    assert pyrovae.load(tmp_path / "run").judge.network is None
    with pytest.raises(UsageError, match=r"is no file; give one that torch\.export\.save wrote"):
        pyrovae.train({"epochs": 2}, tmp_path / "run", resume=True, plots=False)


def test_a_denoising_autoencoders_codes_are_features_as_in_darla(tmp_path: Path) -> None:
    options = {"data": "three-gaussians", "network": {"hidden": [8]}, "latent_dim": [3], "epochs": 1, "batch_size": 500}
    noisy = {"model": "autoencoder", "corruption": "noise", "seed": 0, "device": "cpu"}
    run = pyrovae.train({**options, **noisy}, tmp_path / "run", plots=False)
    x = torch.randn(4, 2, requires_grad=True)
    codes = network_for(str(tmp_path / "run"), Rows())(x)
    assert_close(codes, run.model().encode(x.detach()))
    assert torch.autograd.grad(codes.sum(), x)[0].any()
    other = Rows()
    other.event_shape = (3,)
    with pytest.raises(UsageError, match=r"expected one of an autoencoder of rows of shape \(3,\)"):
        network_for(str(tmp_path / "run"), other)


def test_a_file_that_is_no_module_of_such_rows_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "f.pt2").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"holds no module of torch\.export"):
        network_for(str(tmp_path / "f.pt2"), Rows())
    torch.export.save(torch.export.export(nn.Linear(3, 1), (torch.zeros(2, 3),)), tmp_path / "g.pt2")
    with pytest.raises(UsageError, match=r"any number of rows of shape \(2,\)"):
        network_for(str(tmp_path / "g.pt2"), Rows())
