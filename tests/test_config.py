"""From options to objects: defaults, short names, and every combination that is refused."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import yaml
from pyro.infer import TraceEnum_ELBO

from pyrovae import inference
from pyrovae.command import explain
from pyrovae.errors import DataError, UsageError
from pyrovae.inference import ELBO, IWAE, Capacity, Cyclical, LinearWarmup, Renyi, fit
from pyrovae.models import BernoulliMixture, GaussianMixture
from pyrovae.runs.build import (
    build_beta,
    build_model,
    build_objective,
    build_optimizer,
    build_rows,
    build_schedule,
    settle,
)
from pyrovae.runs.options import CONDITIONAL, DERIVED, OPTIONS, PARTS, RESUMABLE, SETTINGS
from pyrovae.runs.parts import ROOT, Part, outline
from pyrovae.runs.recipe import Recipe, title, warnings

IMAGE, VECTOR = (1, 8, 8), (5,)


def resolve(given) -> Recipe:
    return Recipe(**given)


def config(**given) -> Recipe:
    """A recipe that trains fast."""
    small = {"seed": 0, "latent_dim": 3}
    if given.get("model", {}) == "hierarchical":
        small["latent_dim"] = [4, 3]
    if str(given.get("model", "")).startswith("mixture") or isinstance(given.get("model"), dict):
        small = {"seed": 0}
    return resolve(small | given)


def told(error: BaseException) -> str:
    """What a command says of an error: options, of which the error itself, as Python shows it, has none."""
    assert "--" not in str(error)
    assert "\n" not in str(error)
    return explain(error)[1]


@contextmanager
def refusal(words: str) -> Iterator[None]:
    """A `UsageError` that a command tells in these words."""
    with pytest.raises(UsageError) as caught:
        yield
    assert re.search(words, told(caught.value)), told(caught.value)


def refused(words: str, **given) -> None:
    with refusal(words):
        resolve(given)


# ----------------------------------------------------------------------------------------------------------- defaults


def test_defaults_of_the_bounds_and_the_optimiser():
    resolved = resolve({})
    assert (resolved.elbo, resolved.K, resolved.M, resolved.beta) == (Part("elbo"), 1, 1, 1.0)
    assert resolve({"elbo": "iwae"}).K == resolve({"elbo": "renyi"}).K == 5
    assert resolve({"elbo": "renyi"}).alpha == 0.5
    signature = inspect.signature(inference.fit).parameters
    for key in ("epochs", "batch_size", "patience"):
        assert getattr(resolved, key) == signature[key].default
    assert resolved.lr == inspect.signature(inference.adam).parameters["lr"].default
    assert (resolved.likelihood, resolved.binarize) == (Part(), None)  # left to the data


def test_a_seed_is_drawn_anew_when_none_is_given():
    assert resolve({}).seed != resolve({}).seed
    assert resolve({"seed": "12"}).seed == 12
    assert resolve({"seed": 0}).seed == 0
    assert resolve({"seed": str(2**63 - 1)}).seed == resolve({"seed": 2**63 - 1}).seed == 2**63 - 1


def test_resolving_is_idempotent():
    """What a run stores, --config takes back unchanged."""
    for given in (
        {},
        {"model": "hierarchical", "elbo": "renyi", "alpha": -1, "prior": "mog"},
        {"beta": "capacity:25:10", "prior": {"name": "vamp", "components": 7}, "network": "conv"},
        {"model": {"name": "mixture", "components": 3}, "likelihood": "gaussian"},
        {"likelihood": {"name": "Gaussian", "scale": "0.5"}, "guide": {"name": "full"}},
    ):
        once = resolve(given)
        assert resolve(once.plain()) == once.replace() == once
        assert yaml.safe_load(yaml.safe_dump(once.plain())) == once.plain()


# -------------------------------------------------------------------------------------------------- names and values


def test_short_names_and_any_case():
    for part, choices in PARTS.items():
        for full, choice in choices.items():
            for word in (full, full.upper(), *choice.short):
                needs = {
                    "hierarchical": {"latent_dim": [5, 3]},
                    "two-stage": {"first": "runs/a"},
                    "ex-post": {"first": "runs/a"},
                    "IndependentBernoulli": {"guide": "BernoulliGuide"},
                    "BernoulliGuide": {"prior": "IndependentBernoulli"},
                    "CategoricalPrior": {"guide": "CategoricalGuide"},
                    "CategoricalGuide": {"prior": "CategoricalPrior"},
                    "MarkovGuide": {"prior": "Markov"},
                    "LogisticNormalPrior": {"guide": "DirichletGuide"},
                    "LogisticNormalGuide": {"prior": "DirichletPrior"},
                    "DirichletPrior": {"guide": "DirichletGuide"},
                    "DirichletGuide": {"prior": "DirichletPrior"},
                    "Topics": {"prior": "dirichlet", "guide": "logistic-normal"},
                    "VectorQuantiser": {"prior": "UniformCodes"},
                    "UniformCodes": {"guide": "vq"},
                    "UnigramCodes": {"guide": "vq"},
                    "MaskedConvolutions": {"guide": "vq"},
                    "TransformerCodes": {"guide": "vq"},
                    "HierarchicalVampPrior": {"model": "hierarchical"},
                    "AmortisedPrior": {"condition": "label"},
                    "ConditionalVampPrior": {"condition": "label"},
                }.get(full, {})
                assert getattr(resolve({part: word, **needs}), part).name == full


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"elbo": "iwea"}, "did you mean iwae?"),
        ({"prior": "VampPiror"}, "did you mean VampPrior?"),
        ({"prior": "stanard"}, "did you mean standard?"),
        ({"likelihood": "bernouli"}, "did you mean Bernoulli?"),
        ({"guide": "FulCovarianceNormal"}, "did you mean FullCovarianceNormal?"),
        ({"model": "hierarchial"}, "did you mean hierarchical?"),
        ({"network": "cnov"}, "did you mean conv?"),
        ({"network": {"activation": "rely"}}, "did you mean relu?"),
        ({"optimizer": "adam"}, "did you mean Adam?"),
        ({"schedule": "stagd"}, "did you mean staged?"),
        ({"binarize": "dynamc"}, "did you mean dynamic?"),
        ({"batchsize": 3}, "did you mean batch_size?"),
    ],
)
def test_a_misspelt_word_names_the_nearest(given, meant):
    refused(re.escape(meant), **given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", 2.0),
        ("0", 0.0),
        ("warmup:10", LinearWarmup(steps=70)),
        ("cyclical:4", Cyclical(period=28)),
        ("capacity:12.5:3", Capacity(12.5, steps=21)),
    ],
)
def test_beta_is_a_number_or_a_schedule_in_epochs(text, expected):
    resolved = resolve({"beta": text})
    assert build_beta(resolved.beta, 7) == expected
    objective = build_objective(resolved, 7)
    assert isinstance(objective, ELBO)
    assert objective.beta == expected


@pytest.mark.parametrize(
    "beta",
    [
        "-1",
        "nan",
        "inf",
        "warmup",
        "warmup:",
        "warmup:0",
        "warmup:2.5",
        "capacity:5",
        "capacity:-1:5",
        "cyclic:5",
        "a:b:c",
    ],
)
def test_beta_that_makes_no_sense(beta):
    refused("--beta: expected .*got", beta=beta)


def test_objectives():
    def built(**given):
        return build_objective(config(**given))

    assert (built(K=3, M=2).num_particles, built(K=3, M=2).num_averages) == (3, 2)
    assert type(built(elbo="iwae")) is IWAE
    renyi = built(elbo="renyi", alpha=-0.5, K=7)
    assert (type(renyi), renyi.alpha, renyi.num_particles) == (Renyi, -0.5, 7)
    assert type(built(model="mixture")) is TraceEnum_ELBO


def test_optimisers_and_schedules():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = build_optimizer(resolve({"optimizer": "RMSprop", "lr": 0.5}))(parameters)
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert build_optimizer(resolve({"lr": 0.25}))(parameters).param_groups[0]["lr"] == 0.25
    assert build_schedule(resolve({})) is None
    assert build_schedule(resolve({"schedule": "staged"})) is inference.staged
    cosine = build_schedule(resolve({"schedule": "cosine", "epochs": 4}))(optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates == sorted(rates, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_numbers_as_words_or_as_numbers():
    assert resolve({"latent_dim": "40"}).latent_dim == resolve({"latent_dim": 40}).latent_dim == (40,)
    assert resolve({"model": "hierarchical", "latent_dim": "8,4,2"}).latent_dim == (8, 4, 2)
    for word in ("false", "False", False):
        assert resolve({"missing": word}).missing is False
    assert resolve({"K": "1e3"}).K == resolve({"K": "1000.0"}).K == 1000
    assert resolve({"network": {"hidden": "30"}}).network.settings["hidden"] == [30]
    assert resolve({"likelihood": {"name": "gaussian", "scale": "0.5"}}).likelihood.settings["scale"] == 0.5


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "nan", "inf", "many", "", True, [3], "1e400"])
@pytest.mark.parametrize("key", ["K", "M", "epochs", "batch_size", "patience", "eval_K", "eval_rows", "latent_dim"])
def test_whole_numbers(key, value):
    if key == "latent_dim" and value == [3]:
        return
    refused(f"--{key.replace('_', '-')}: expected (a )?whole numbers? of at least 1", **{key: value})


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300", "fast"])
def test_learning_rates(value):
    refused(f"--lr: expected a number above 0 and below 1e.37, got {value}", lr=value)


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**63), "x"])
def test_seeds_out_of_range(seed):
    refused("--seed: expected a whole number", seed=seed)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"alpha": 0.5}, "--alpha: not used, since --elbo elbo has no order; use --elbo renyi"),
        ({"elbo": "iwae", "alpha": 0.5}, "--alpha: not used, since --elbo iwae"),
        ({"elbo": "iwae", "beta": 2}, "--beta: .*not a bound on log p"),
        ({"elbo": "renyi", "beta": 2}, "--beta: .*not a bound on log p"),
        ({"elbo": "renyi", "alpha": 1}, "--alpha 1: that is the ELBO; use --elbo elbo"),
        ({"elbo": "renyi", "alpha": "1.00001"}, "--alpha 1"),
        ({"elbo": "renyi", "alpha": "nan"}, "--alpha: expected a number"),
        ({"elbo": "renyi", "alpha": "inf"}, "--alpha: expected a number"),
        ({"latent_dim": [3, 2]}, "a vae has one latent layer, got 2; use --model hierarchical"),
        ({"model": "hierarchical", "latent_dim": 3}, "one for each layer, such as 50,25; got one"),
        ({"model": "hierarchical", "prior": "vamp"}, "VampPrior: needs a vae"),
        (
            {"network": "sequence", "condition": "label"},
            "condition: not used, since with .*network.sequence.* each step",
        ),
        ({"model": "ladder", "latent_dim": 3}, "a ladder model needs one for each layer, such as 50,25; got one"),
        ({"model": "auxiliary", "latent_dim": "8,4,2"}, "an auxiliary model has 2, such as 50,25; got 3"),
        ({"missing": "maybe"}, "--missing: expected true or false, got maybe"),
        ({"model": {"name": "ladder", "above": "maybe"}}, "--model.above: expected one of next, all, state, got maybe"),
        ({"model": {"name": "ladder", "merge": "precise"}}, "did you mean precision?"),
        ({"prior": {"components": 3}}, "--prior.components: not used by StandardNormal, which has no settings"),
        ({"prior": {"name": "mog", "component": 3}}, "--prior.component: .*it has components"),
        ({"network": {"name": "conv", "dropout": 0.1}}, "--network.dropout: not used by conv"),
        ({"network": {"channels": "3,4"}}, "--network.channels: not used by mlp"),
        ({"network": {"dropout": 1}}, "--network.dropout: expected a number of at least 0 and below 1"),
        ({"network": {"hidden": "20,0"}}, "--network.hidden: expected whole numbers of at least 1, got 20,0"),
        ({"likelihood": {"scale": 1}}, "--likelihood.scale: say which --likelihood it is for"),
        ({"likelihood": {"name": "bernoulli", "scale": 1}}, "--likelihood.scale: not used by Bernoulli"),
        (
            {"likelihood": {"name": "gaussian", "scale": 0}},
            "--likelihood.scale: expected a number above 0 or one of learned",
        ),
        ({"likelihood": {"name": "gaussian", "scale": "free"}}, "--likelihood.scale: expected a number above 0"),
        ({"likelihood": {"name": "gaussian", "floor": -1}}, "--likelihood.floor"),
        ({"model": "mixture", "K": 5}, "--K: not used, since a mixture is fit by its exact log p"),
        ({"model": "mixture", "elbo": "iwae", "prior": "vamp"}, "--elbo, --prior: not used"),
        ({"model": "mixture", "eval_K": 5}, "--eval-K: not used, since the log p"),
        ({"model": "mixture", "particle_chunk": 5}, "--particle-chunk: not used, since a mixture has no particles"),
        ({"model": "mixture", "precision": "tf32"}, "--precision: not used"),
        ({"model": {"components": 3}}, "--model.components: not used by vae"),
        ({"model": "mixture", "likelihood": {"name": "gaussian", "scale": 2}}, "--likelihood.scale: not used"),
        ({"optimizer": "LBFGS"}, "--optimizer: 'LBFGS' is none of"),
        ({"optimizer": "Optimizer"}, "--optimizer: 'Optimizer' is none of"),
        ({"optimizer": "SparseAdam"}, "--optimizer: 'SparseAdam' is none of"),
        ({"optimizer": "Tensor"}, "--optimizer: 'Tensor' is none of"),
        ({"standardize": "yes"}, "--standardize: expected true or false, got yes"),
    ],
)
def test_combinations_that_make_no_sense(given, words):
    refused(words, **given)


def test_messages_are_in_the_words_of_whoever_reads_them():
    """Python's of settings and values, the command's of options; one that is not named is added at the end."""
    for given, python in (
        ({"elbo": "iwae", "beta": 2}, "beta: not used, since with `elbo=iwae` a .*; use `elbo=elbo`$"),
        ({"latent_dim": [2, 3]}, "latent_dim: a vae has one latent layer, got 2; use `model=hierarchical`$"),
        ({"model": "mixture", "particle_chunk": 2, "eval_K": 3}, "eval_K: not used, since the log p"),
        ({"likelihood": {"scale": 1}}, "likelihood.scale: say which `likelihood` it is for$"),
    ):
        with pytest.raises(UsageError, match=f"^{python}"):
            resolve(given)
    for error, words in (
        (UsageError("alpha, beta: not used", settings=("alpha", "beta")), "--alpha, --beta: not used"),
        (UsageError("runs/out: is a file; out with it", settings=("out",)), "runs/out: is a file; out with it (--out)"),
        (UsageError("a: use `b_c=1`, not b_c=1", settings=("b_c=1",)), "a: use --b-c 1, not b_c=1"),
        (UsageError("x: `resume=True` goes on", settings=("resume=True",)), "x: --resume goes on"),
    ):
        assert explain(error) == (2, words)


def test_what_is_allowed_but_said():
    assert "upper bound" in warnings(resolve({"elbo": "renyi", "alpha": -1}))[0]
    assert "no KL term" in warnings(resolve({"beta": 0}))[0]
    assert "may exceed log p(x)" in warnings(resolve({"beta": 0.5}))[0]
    assert warnings(resolve({})) == warnings(resolve({"beta": 4})) == warnings(resolve({"beta": "warmup:3"})) == []


def test_the_batch_is_at_most_the_data():
    with refusal(r"--batch-size: 2000 is more than the 14\d\d training rows"):
        build_rows(resolve({"batch_size": 2000}))


def test_likelihood_and_binarisation_follow_the_data():
    for given, likelihood, binarize in (
        ({}, "Bernoulli", "dynamic"),
        ({"data": "three-gaussians"}, "Gaussian", None),
        ({"likelihood": "gaussian"}, "Gaussian", None),
        ({"binarize": "threshold"}, "Bernoulli", "threshold"),
        ({"model": "mixture"}, "Bernoulli", "dynamic"),
    ):
        resolved = resolve(given)
        resolved = settle(resolved, build_rows(resolved))
        assert (resolved.likelihood.name, resolved.binarize) == (likelihood, binarize)
    with pytest.raises(UsageError, match="binarize is not used by a density"):
        build_rows(resolve({"likelihood": "gaussian", "binarize": "fixed"}))
    with pytest.raises(DataError, match="have no mass on"):
        build_rows(resolve({"data": "ring", "likelihood": "bernoulli"}))


def test_titles_tell_runs_apart():
    assert title(resolve({"elbo": "iwae", "likelihood": "Bernoulli"})) == "digits-iwae-K5"
    assert title(resolve({"model": "mixture"})) == "digits-mixture-C10"
    assert title(resolve({"data": "a/b.npz", "prior": "vamp", "likelihood": "Gaussian"})) == (
        "b-elbo-K1-VampPrior-Gaussian"
    )


def test_a_recipe_is_frozen_and_has_a_field_for_every_option():
    having = {f.name for f in dataclasses.fields(Recipe)} - {"given"}
    assert having == {*SETTINGS, *PARTS, "elbo", "gradient", *DERIVED} - {"version"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).epochs = 3
    with pytest.raises(UsageError, match=r"configuration: 'epoch' is none of .*did you mean epochs"):
        resolve({}).replace(epoch=3)


def test_resumable_options_exist():
    assert set(RESUMABLE) <= {name for group in OPTIONS.values() for name in group}


# ------------------------------------------------------------------------------------------------------- every choice


def rows_for(likelihood: str, event: tuple[int, ...]) -> torch.Tensor:
    """Rows in the support of every likelihood of that one's measure."""
    x, kind = torch.rand(8, *event), PARTS["likelihood"][likelihood].measure
    if kind == "columns":
        x = x.flatten(1)
        return torch.stack([x[:, 0], (5 * x[:, 1]).floor(), x[:, 2].round(), (2.99 * x[:, 3]).floor()], 1)
    if kind == "mass":
        return x.round()
    return x if kind == "density" else (7.99 * x).floor()  # counts, and levels of eight


def assert_trains(given: dict, likelihood: str, event: tuple[int, ...]) -> None:
    """One step changes every parameter that the bound depends on."""
    kind = PARTS["likelihood"][likelihood].measure
    table = {"columns": "a=continuous,b=count,c=binary,d=categorical:3"} if kind == "columns" else {}
    resolved = config(**given, **table, likelihood=likelihood).settled(levels=8 if kind == "levels" else 0)
    if resolved.condition is not None:
        resolved = resolved.settled(classes=("a", "b"))
    x, y = rows_for(likelihood, event), torch.eye(2).repeat(4, 1)
    beside = () if resolved.condition is None else (y,)
    pair = build_model(resolved, tuple(x.shape[1:]))
    pair.initialise(x, *beside)
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    result = fit(
        pair.model,
        pair.guide,
        x,
        build_objective(resolved),
        epochs=1,
        batch_size=8,
        optimizer=build_optimizer(resolved),
        given=beside,
    )
    assert result.step == 1
    assert result.notices == []
    still = [name for name, p in pair.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def small(part: str, name: str) -> dict:
    """A choice with settings that make it small."""
    wanted = {
        "components": 4,
        "hidden": 12,
        "channels": "3,4",
        "steps": 3,
        "width": 12,
        "blocks": 1,
        "codes": 4,
        "code_dim": 1,
    }
    return {"name": name} | {key: value for key, value in wanted.items() if key in PARTS[part][name].settings}


def fitting(prior: str, guide: str) -> dict | None:
    """The gradient that a prior and a guide are trained by; None for those of different latents, which are refused."""
    of_prior, of_guide = (
        PARTS[part][name].classes[0].constants.get("latents") for part, name in (("prior", prior), ("guide", guide))
    )
    if of_prior not in (of_guide, "those of its guide"):
        with refusal(f"--prior {prior}: is a distribution of .*, and --guide {guide} one of .*; use --guide "):
            config(prior=small("prior", prior), guide=guide, condition="label" if prior in CONDITIONAL else None)
        return None
    if "prior" in PARTS["guide"][guide].classes[0].takes and not PARTS["prior"][prior].constants.get("of_steps"):
        with refusal(f"--guide {guide}: goes by the steps of its prior, and --prior {prior} has none; use one of"):
            config(prior=small("prior", prior), guide=guide, condition="label" if prior in CONDITIONAL else None)
        return None
    return {"gradient": "score-function"} if of_guide else {}


HIERARCHY = {"model": "hierarchical", "latent_dim": [4, 2]}


def refines(prior: str, guide: str, model: dict) -> bool:
    """Whether a guide needs log p(x, z) of a pair that is not there, of which it says so."""
    takes = set(PARTS["prior"][prior].classes[0].takes)
    needs = PARTS["guide"][guide].classes[0].constants.get("of_pair", False)
    if not needs or not (model or {"guide", "conditional"} & takes):
        return False
    given = {"prior": small("prior", prior), "guide": guide, "condition": "label" if prior in CONDITIONAL else None}
    with refusal("guide: SemiAmortised refines by log p.* and cannot be used in a|of at least 2, got 2 for 3 steps"):
        found = config(**given, **model, likelihood="Bernoulli")
        build_model(found.settled(classes=("a", "b") if found.condition else ()), IMAGE)
    return True


# Parts meet in pairs: a prior may be made of the guide, and the guide's and the decoder's network see the event.
@pytest.mark.parametrize("prior", [name for name, c in PARTS["prior"].items() if "guides" not in c.classes[0].takes])
@pytest.mark.parametrize("guide", PARTS["guide"])
def test_every_prior_trains_with_every_guide(prior, guide):
    """With the usual one of the other part by convolutions and given labels, too."""
    by = fitting(prior, guide)
    if by is None or refines(prior, guide, {}):
        return
    if (prior, guide) == ("VampPrior", "VectorQuantiser"):
        with refusal("guide: VectorQuantiser has mass on the codes of its own row, and a VampPrior"):
            assert_trains({"prior": small("prior", prior), "guide": small("guide", guide)}, "Bernoulli", VECTOR)
        return
    usual = prior == next(iter(PARTS["prior"])) or guide == next(iter(PARTS["guide"]))
    given = {"prior": small("prior", prior), "guide": small("guide", guide), **by}
    for network, event in (("mlp", VECTOR), ("conv", IMAGE))[: 2 if usual else 1]:
        of_network = {**given, "network": small("network", network)}
        if prior not in CONDITIONAL:
            assert_trains(of_network, "Bernoulli", event)
        alone = PARTS["guide"][guide].classes[0].constants.get("of_pair", False)  # none that is given anything
        if (usual or prior in CONDITIONAL) and not alone:
            assert_trains({**of_network, "condition": "label"}, "Bernoulli", event)


@pytest.mark.parametrize(
    ("network", "event"),
    [("mlp", VECTOR), ("mlp", IMAGE), ("conv", IMAGE), ("conv", (3, 9, 11)), ("residual-conv", (3, 5, 6))],
)
@pytest.mark.parametrize("likelihood", PARTS["likelihood"])
def test_every_likelihood_trains_with_every_network(network, event, likelihood):
    if PARTS["likelihood"][likelihood].measure == "columns" and network != "mlp":
        return  # rows of a table are vectors
    by = {"prior": "LogisticNormalPrior", "guide": "LogisticNormalGuide"} if likelihood == "Topics" else {}
    if PARTS["likelihood"][likelihood].measure == "documents" and event != VECTOR:
        with refusal("likelihood: documents are vectors of counts"):
            assert_trains({"network": small("network", network), **by}, likelihood, event)
        return
    assert_trains({"network": small("network", network), **by}, likelihood, event)


@pytest.mark.parametrize(
    "prior",
    [name for name, c in PARTS["prior"].items() if name not in CONDITIONAL and "guide" not in c.classes[0].takes],
)
@pytest.mark.parametrize("guide", [name for name, c in PARTS["guide"].items() if "prior" not in c.classes[0].takes])
def test_every_hierarchy_trains(prior, guide):
    by = fitting(prior, guide)
    if by is None or refines(prior, guide, HIERARCHY):
        return
    if guide == "VectorQuantiser":
        with refusal("guide: VectorQuantiser has (a codebook of its own|mass on the codes of its own row)"):
            given = {"prior": small("prior", prior), "guide": small("guide", guide)}
            build_model(config(**given, **HIERARCHY, likelihood="Bernoulli"), IMAGE)
        return
    usual = prior == next(iter(PARTS["prior"])) or guide == next(iter(PARTS["guide"]))
    for network in PARTS["network"] if usual else ("mlp",):
        given = {"prior": small("prior", prior), "guide": small("guide", guide), "network": network, **by}
        assert_trains({"model": "hierarchical"} | given, "Bernoulli", IMAGE)


@pytest.mark.parametrize(
    "guide",
    [
        name
        for name, c in PARTS["guide"].items()
        if not {"of_pair", "latents"} & c.classes[0].constants.keys() and "prior" not in c.classes[0].takes
    ],
)
def test_every_guide_trains_in_pairs_that_start_at_the_top(guide):
    """A ladder with either of its settings, and a guide with auxiliary latents; networks where features are found."""
    wide = {"guide": guide, "network": small("network", "residual"), "latent_dim": [4, 3]}
    for model in ({"name": "ladder", "above": "next"}, {"name": "ladder"}, {"name": "auxiliary"}):
        assert_trains({**wide, "model": model}, "Bernoulli", VECTOR)
    if guide == "MeanFieldNormal":
        for network, merge in zip(PARTS["network"], 3 * ["relative", "learned"], strict=False):
            model = {"name": "ladder", "merge": merge, "above": "state"}
            given = {"model": model, "latent_dim": [3, 2], "network": small("network", network)}
            assert_trains(given, "Bernoulli", IMAGE)
        for above in ("next", "all"):
            model = {"name": "ladder", "merge": "precision", "above": above}
            for network in PARTS["network"]:
                given = {"model": model, "latent_dim": [4, 3, 2], "network": small("network", network)}
                assert_trains(given, "Bernoulli", IMAGE)
    else:
        with refusal(f"--model.merge: precision .* diagonal covariance, got {guide}; choose learned"):
            build_model(config(**wide, model={"name": "ladder", "merge": "precision"}, likelihood="Bernoulli"), VECTOR)


def test_what_a_constructor_refuses_is_told_as_an_option():
    """What only the parts together decide is refused when they are built, by the name of the option."""
    for given, words in (
        ({"guide": {"name": "low-rank", "rank": 4}}, "--guide.rank: expected a whole number from 1 to latent_dim = 3"),
        (
            {"likelihood": {"name": "gaussian", "scale": 2, "floor": 0.1}},
            "--likelihood.floor: not used, since",
        ),
    ):
        with refusal(words):
            build_model(config(**{"likelihood": "gaussian"} | given), VECTOR)


def test_an_exact_model_has_the_settings_of_its_measure():
    """A setting of the other class is refused where it was given, and left out where it was a default."""
    for given, likelihood, expected in (
        ({"components": 3}, "bernoulli", {"components": 3, "weights": "trainable", "floor": 1e-3}),
        ({"floor": 0.2}, "bernoulli", {"components": 10, "weights": "trainable", "floor": 0.2}),
        ({"components": 3}, "gaussian", {"components": 3, "weights": "trainable", "covariance": "full"}),
    ):
        resolved = resolve({"model": {"name": "mixture"} | given, "likelihood": likelihood})
        resolved = settle(resolved, build_rows(resolved))
        assert resolved.model == Part("mixture", expected)
        assert Recipe(**resolved.replace().given).model.settings.items() >= expected.items()
        assert build_model(resolved, (64,)).components == expected["components"]
    with refusal("--model ppca: is for a density, and the rows are of a mass; choose"):
        build_rows(resolve({"model": "ppca", "likelihood": "bernoulli"}))
    with refusal(r"--model.covariance: not used by BernoulliMixture; it has components"):
        build_rows(resolve({"model": {"name": "mixture", "covariance": "tied"}, "likelihood": "bernoulli"}))
    with refusal(r"--model.floor: expected a number above 0 and below 0.5, got 0.7"):
        build_rows(resolve({"model": {"name": "mixture", "floor": 0.7}, "likelihood": "bernoulli"}))


@pytest.mark.parametrize("scale", ["0.5", "learned", "per-dimension", "predicted"])
@pytest.mark.parametrize(("network", "event"), [("mlp", VECTOR), ("conv", IMAGE)])
def test_every_scale_trains(scale, network, event):
    resolved = config(likelihood={"name": "Gaussian", "scale": scale}, network=network)
    x = rows_for("Gaussian", event)
    pair = build_model(resolved, event)
    pair.initialise(x)
    assert fit(pair.model, pair.guide, x, build_objective(resolved), epochs=1, batch_size=8).notices == []


@pytest.mark.parametrize(
    ("likelihood", "covariance"),
    [("Bernoulli", None), *(("Gaussian", covariance) for covariance in ("full", "diagonal", "tied", "spherical"))],
)
@pytest.mark.parametrize("weights", ["trainable", "uniform"])
@pytest.mark.parametrize("event", [VECTOR, IMAGE])
def test_every_mixture_trains(likelihood, covariance, weights, event):
    given = {"name": "mixture", "components": 2, "covariance": covariance, "weights": weights}
    resolved = config(model=given, likelihood=likelihood)
    x = rows_for(likelihood, event)
    pair = build_model(resolved, event)
    assert isinstance(pair, BernoulliMixture if likelihood == "Bernoulli" else GaussianMixture)
    pair.initialise(x)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = pair.log_prob(x).mean().item()
    fit(pair.model, pair.guide, x, build_objective(resolved), epochs=10, batch_size=8)
    assert pair.log_prob(x).mean().item() > before


def test_convolutions_of_vectors_are_refused():
    with pytest.raises(UsageError, match=r"\(5,\)"):
        build_model(config(network="conv", likelihood="gaussian"), VECTOR)


class WithoutFunctions(ast.NodeTransformer):
    """What is left of a source's tree without functions, but for the signatures of constructors."""

    def visit_FunctionDef(self, node):
        node.body = [ast.Expr(ast.Constant(...))]
        return node if node.name == "__init__" else None


def test_an_outline_is_a_source_without_its_functions():
    """Of every module: what is parsed for --help says what the whole source says."""
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text("utf-8")
        whole = WithoutFunctions().visit(ast.parse(source))
        assert ast.dump(ast.parse(outline(source))) == ast.dump(whole), path
