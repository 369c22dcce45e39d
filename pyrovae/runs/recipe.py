"""What to train, on what, and how: every option, checked, with the rest filled in.

A recipe is made of options as plain values, such as a YAML file holds, and gives them back as such. An option that the
choices made have no use for is refused; `pyrovae.runs.build` turns a recipe into a pair, an objective and rows.
"""

import copy
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pyrovae.columns import GUESSED, parse, written
from pyrovae.errors import UsageError
from pyrovae.runs.options import (
    BASELINES,
    CONDITIONAL,
    DERIVED,
    GRADIENTS,
    OBJECTIVES,
    PARTS,
    RECONSTRUCTIONS,
    SETTINGS,
)
from pyrovae.runs.parts import Part, choose, nearest
from pyrovae.settings import read

Options = dict[str, Any]
# What a model with an exact log p(x) has no use for, one without a p(x), and one that is fit in closed form, with what
# stands for nothing.
NOT_OF_RECONSTRUCTION: Options = {"elbo": Part(), "K": 0, "M": 0, "eval_K": 0}
NOT_OF_EXACT: Options = {"elbo": Part(), "K": 0, "M": 0, "latent_dim": (), "eval_K": 0, "precision": "fp32"}
NOT_OF_CLOSED_FORM: Options = {
    "epochs": 1,
    "batch_size": 1,
    "lr": 0.0,
    "optimizer": "",
    "schedule": "",
    "compile": "off",
    "precision": "fp32",
}
# Training rows with a label, of a pair that sees some.
LABELS = 100
# What is said of a bound.
OF_BOUNDS = ("elbo", "K", "M", "alpha", "beta", "partitions", "gradient")
# What the draws of a prior or a guide are that says nothing else.
REAL = "real numbers"
# What those of a prior are that is made of the guide.
OF_GUIDE = "those of its guide"
# Parts of a pair that are chosen for themselves.
OF_PAIRS = ("prior", "guide", "network", "corruption")


@dataclass(frozen=True, init=False, kw_only=True)
class Recipe:
    """All that decides what is trained.

    Made of options by their names, as `python -m pyrovae.fit --help` lists them: `Recipe(data="digits", elbo="iwae",
    prior={"name": "VampPrior", "components": 50})`. What is not given has its default, and a seed is drawn.

    Attributes:
        prior, guide, network, corruption: Nothing for a model with an exact log p(x).
        gradient: How the gradient of the bound is estimated; nothing for a model without one.
        first: The run of the first stage of a two-stage, by its directory; once it is known, with the hash of its
            `weights` and its `recipe`. Nothing for other models.
        likelihood, binarize: Left to the data, where they were not given, until `settled`.
        K, M, eval_K: Numbers of particles; 0 for a model with an exact log p(x).
        data_hash, event_shape: Of the rows, once they are known.
        levels: Number of grey levels, once the rows are known, where the likelihood is of levels; else 0.
        classes: Names of the columns of what everything is given, such as the classes of the labels, once they are
            known; none, unless `condition` or `labels` says so.
        given: The options as they were given.

    Raises:
        UsageError: a value makes no sense, or an option is not used by the choices made.
    """

    model: Part
    elbo: Part
    K: int
    M: int
    alpha: float | None
    beta: float | str | None
    partitions: int | None
    gradient: Part
    latent_dim: tuple[int, ...]
    first: Part
    data: str
    data_root: str | None
    binarize: str | None
    condition: str | None
    labels: int | None
    stream: Literal["auto", "on", "off"]
    standardize: bool
    columns: str | None
    missing: bool
    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    schedule: str
    patience: int | None
    seed: int
    device: str
    compile: str
    precision: str
    particle_chunk: int | None
    threads: int | str
    eval_K: int
    eval_rows: int
    prior: Part
    guide: Part
    network: Part
    corruption: Part
    likelihood: Part
    data_hash: str = ""
    event_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    levels: int = 0
    given: Mapping[str, Any] = field(repr=False, compare=False)

    def __init__(self, /, **options: Any) -> None:
        unknown = {"data_hash": "", "event_shape": (), "classes": (), "levels": 0}
        for key, value in {**completed(options), **unknown, "given": options}.items():
            object.__setattr__(self, key, value)

    @property
    def is_exact(self) -> bool:
        """Whether the model's log p(x) is exact, so that there is no guide and nothing to estimate."""
        return self.model.name in BASELINES

    @property
    def is_reconstruction(self) -> bool:
        """Whether the model reconstructs and has no p(x)."""
        return self.model.name in RECONSTRUCTIONS

    @property
    def is_closed_form(self) -> bool:
        """Whether the model is fit at once, so that no step is taken."""
        return bool(PARTS["model"][self.model.name].classes[0].constants.get("closed_form"))

    @property
    def unused(self) -> Options:
        """Options that the model has no use for, with what stands for nothing there."""
        unused = NOT_OF_EXACT if self.is_exact else NOT_OF_RECONSTRUCTION if self.is_reconstruction else {}
        return unused | (NOT_OF_CLOSED_FORM if self.is_closed_form else {})

    @property
    def keeps_last(self) -> bool:
        """Whether the last epoch is kept and not the best, as under a constraint and by what is no bound."""
        no_bound = bool(self.elbo) and OBJECTIVES[self.elbo.name].constants.get("keeps_last", False)
        return is_constraint(self.beta) or no_bound

    @property
    def below(self) -> "Recipe":
        """Of a two-stage, the recipe of the first stage, once it is known.

        Raises:
            UsageError: there is none, or it is not that of a vae of p(x).
        """
        kept = self.first.settings.get("recipe")
        recipe = Recipe(**kept) if isinstance(kept, Mapping) else self
        if recipe.model.name != first("model") or recipe.condition is not None:
            raise UsageError(f"first: expected a run of a {first('model')}, and in a configuration all of its recipe")
        return recipe

    @property
    def measure(self) -> str | None:
        """Of log p(x), such as "mass" or "density"; None while the likelihood is left to the data."""
        return PARTS["likelihood"][self.likelihood.name].measure if self.likelihood else None

    def options(self) -> Options:
        """All of it by the names of options: `prior`, `prior.components`, ..."""
        flat: Options = {}
        for key, value in self.plain().items():
            settings = dict(value) if isinstance(value, dict) else {"name": value}
            flat |= {key: settings.pop("name"), **{f"{key}.{name}": item for name, item in settings.items()}}
        return flat

    def replace(self, **options: Any) -> "Recipe":
        """The recipe with other options, as if all of it had been given; without what is known of its rows."""
        return Recipe(**overlaid(self.plain(), options))

    def settled(self, **known: Any) -> "Recipe":
        """The recipe with what its rows decide: `likelihood`, `columns`, `binarize`, `data_hash`, `event_shape`, ..."""
        made = copy.copy(self)
        for key, value in known.items():
            object.__setattr__(made, key, value)
        return made

    def plain(self) -> Options:
        """All of it as plain values, which YAML can hold."""
        values: Options = {}
        for key in (f.name for f in fields(self) if f.name != "given"):
            value = getattr(self, key)
            if not value and key in ("first", "gradient", *OF_PAIRS, *DERIVED):
                continue
            if isinstance(value, Part):  # a bound without settings is a word
                value = value.name if key == "elbo" and not value.settings else value.plain()
            values[key] = None if key in self.unused else list(value) if isinstance(value, tuple) else value
        return values


def completed(given: Options) -> Options:
    """Check what was given and fill in the rest, without looking at the data.

    Raises:
        UsageError: a value makes no sense, or an option is not used by the choices made.
    """
    known = [*SETTINGS, *PARTS, "elbo", "gradient"]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"configuration: {nearest(str(unknown[0]), known)}")
    usual = first("model") if given.get("first") is None else staged()
    values: Options = {"model": choose("model", given.get("model"), usual, PARTS["model"])}
    for name, setting in SETTINGS.items():
        value = given.get(name)
        values[name] = setting.default if value is None else read(name, value, setting.kind)
    values |= {"elbo": Part(), "gradient": Part()}
    complete_stages(values, given)
    name = values["model"].name
    complete_labels(values, given)
    special = complete_exact if name in BASELINES else complete_reconstruction if name in RECONSTRUCTIONS else None
    (special or complete_pair)(values, given)
    if PARTS["model"][name].classes[0].constants.get("closed_form"):
        refuse(given, (*NOT_OF_CLOSED_FORM, "patience"), f"a {name} is fit in closed form")
        values |= NOT_OF_CLOSED_FORM
    values["likelihood"] = choose_likelihood(given.get("likelihood"), values["model"])
    complete_table(values, given)
    check_judged(values)
    check_latents(values)
    of_total = values["likelihood"].settings.get("library") == "given"
    if of_total and (values["condition"] or "").split(",")[-1].strip() != "total":
        raise UsageError(
            "likelihood.library=given: means are shares of a total, which `condition=total` gives",
            settings=("likelihood.library=given", "condition=total"),
        )
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**31)
    if values["optimizer"]:
        check_optimizer(values["optimizer"])
    return values


def first(part: str) -> str:
    """The default choice of a part."""
    return next(iter(PARTS[part]))


def a(name: str) -> str:
    """A choice with its article: a vae, an ex-post."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def complete_table(values: Options, given: Options) -> None:
    """Say the likelihood of a table with columns of several kinds; refuse what it, or rows with gaps, cannot have."""
    model, likelihood = values["model"].name, values["likelihood"]
    given = {name: value for name, value in given.items() if value}  # a configuration says what is false
    product = next(name for name, choice in PARTS["likelihood"].items() if "columns" in choice.classes[0].takes)
    of_pairs = "prior" in PARTS["model"][model].classes[0].takes
    if likelihood.name == product and values["columns"] is None:
        values["columns"] = GUESSED
    if not of_pairs or values["first"]:
        refuse(given, ("columns", "missing"), f"a {model} is of whole rows, all columns of one kind")
        return
    if values["columns"] is not None:
        if likelihood.name not in ("", product):
            why = f"columns: not used by {likelihood.name}, which is of columns of one kind"
            raise UsageError(why, settings=("columns", f"likelihood={likelihood.name}"))
        values["columns"] = values["columns"] if values["columns"] == GUESSED else written(parse(values["columns"]))
        values["likelihood"] = likelihood or choose_likelihood(product, values["model"])
        refuse(given, ("standardize",), "continuous columns are standardised inside, with log p in their own units")
        if "guide" in PARTS["prior"][values["prior"].name].classes[0].takes:
            raise UsageError(f"prior={values['prior'].name}: pseudo-inputs have no classes; choose another for a table")
    if (values["columns"] or values["missing"]) and values["corruption"].name != first("corruption"):
        raise UsageError("corruption: is of whole rows of one kind; leave it out", settings=("corruption",))


def complete_labels(values: Options, given: Options) -> None:
    """Say how many labels are seen by a pair that sees some, and refuse them, and what makes no sense with classes."""
    name = values["model"].name
    constants = PARTS["model"][name].classes[0].constants
    if constants.get("of_labels"):
        values["labels"] = LABELS if values["labels"] is None else values["labels"]
    else:
        known = [name for name, choice in PARTS["model"].items() if choice.constants.get("of_labels")]
        refuse(given, ("labels",), f"{a(name)} sees none", f"model={known[0]}")
    if "classifier" in PARTS["model"][name].classes[0].takes:
        refuse(given, ("condition",), f"{a(name)} model is given nothing", f"model={first('model')}")


def staged() -> str:
    """The model that a run with a first stage is, unless it says otherwise."""
    return next(name for name, choice in PARTS["model"].items() if "first" in choice.classes[0].takes)


def complete_stages(values: Options, given: Options) -> None:
    """Ask for the first stage of a model that has one, and refuse it, and what makes no sense with it, elsewhere."""
    name = values["model"].name
    if "first" not in PARTS["model"][name].classes[0].takes:
        refuse(given, ("first",), f"a {name} has one stage", f"model={staged()}")
        values["first"] = Part()
        return
    if values["first"] is None:
        raise UsageError(
            f"first: {a(name)} is trained on the codes of a {first('model')}; name its run", settings=("first",)
        )
    refuse(given, ("condition",), f"{a(name)} model is given nothing", f"model={first('model')}")
    if values["model"].settings.get("guide") != "adapted":
        why = f"the second stage of {a(name)} is all in the KL, so that a weight changes nothing"
        refuse(given, ("beta",), why)


def complete_exact(values: Options, given: Options) -> None:
    """Fill in the rest of a model with an exact log p(x), and refuse what it has no use for."""
    name = values["model"].name
    unused = (*OF_BOUNDS, "latent_dim", *OF_PAIRS)
    refuse(given, unused, f"a {name} is fit by its exact log p(x)")
    refuse(given, ("condition",), f"a {name} is of p(x), given nothing")
    refuse(given, ("eval_K",), f"the log p(x) of a {name} is exact")
    refuse(given, ("particle_chunk",), f"a {name} has no particles")
    refuse(given, ("precision",), f"a {name} is fit and scored in single precision")
    values |= NOT_OF_EXACT | {part: Part() for part in OF_PAIRS}


def complete_reconstruction(values: Options, given: Options) -> None:
    """Fill in the rest of a model without a p(x), and refuse what it has no use for."""
    name = values["model"].name
    takes = PARTS["model"][name].classes[0].takes
    why = f"the model ({name}) reconstructs only and has no p(x)"
    refuse(given, (*OF_BOUNDS, "prior", "guide", "eval_K", "particle_chunk"), why)
    refuse(given, ("condition",), f"the model ({name}) is given nothing")
    latent = tuple(values["latent_dim"] or [50])
    if len(latent) != 1:
        raise UsageError(
            f"latent_dim: the model ({name}) has one code, got {len(latent)} sizes; give one", settings=("latent_dim",)
        )
    values |= NOT_OF_RECONSTRUCTION | {part: Part() for part in OF_PAIRS} | {"latent_dim": latent}
    if "encoder" not in takes:
        refuse(given, ("network", "corruption"), f"the model ({name}) has no networks")
        return
    for part in ("network", "corruption"):
        values[part] = choose(part, given.get(part), first(part), PARTS[part])


def complete_pair(values: Options, given: Options) -> None:
    """Fill in the rest of a pair with one or several latent layers, and refuse parts that do not go together."""
    name = values["model"].name
    given = with_usual(given, PARTS["model"][name].constants.get("usual", {}))
    complete_bound(values, given)
    least, most = PARTS["model"][name].classes[0].constants.get("layers", (1, 1))
    layered = least > 1
    sizes: list[int] = [] if values["first"] else [50, 25][: 2 if layered else 1]
    latent = tuple(values["latent_dim"] or sizes)
    if not layered and len(latent) > 1:
        raise UsageError(
            f"latent_dim: a {name} has one latent layer, got {len(latent)}; use `model=hierarchical`",
            settings=("latent_dim", "model=hierarchical"),
        )
    if layered and len(latent) < least:
        raise UsageError(
            f"latent_dim: a {name} model needs one for each layer, such as 50,25; got one", settings=("latent_dim",)
        )
    if most is not None and len(latent) > most:
        raise UsageError(
            f"latent_dim: {a(name)} model has {most}, such as 50,25; got {len(latent)}", settings=("latent_dim",)
        )
    if layered:
        refuse(given, ("condition",), f"a {name} model is given nothing", f"model={first('model')}")
    values["latent_dim"] = latent
    complete_parts(values, given)
    check_steps(values)
    complete_classes(values)
    if values["first"] and values["corruption"].name != first("corruption"):
        raise UsageError(f"corruption: not used, since the q(z|x) of a {name} is frozen", settings=("corruption",))
    prior = values["prior"].name
    takes = PARTS["prior"][prior].classes[0].takes
    if prior in CONDITIONAL and values["condition"] is None:
        named = f"prior={prior}"
        raise UsageError(
            f"{named}: is p(z|y), and nothing is given; give `condition=label`", settings=(named, "condition=label")
        )
    if layered and "guide" in takes:
        raise UsageError(
            f"prior={prior}: needs a {first('model')}, since it is made of its one guide q(z|x)",
            settings=(f"prior={prior}",),
        )
    of_model = PARTS["model"][name].classes[0].takes
    if "guides" in takes and ("guides" not in of_model or "features" in of_model):
        raise UsageError(
            f"prior={prior}: is made of guides from the data upwards, which {a(name)} does not have; use "
            "`model=hierarchical`",
            settings=(f"prior={prior}", "model=hierarchical"),
        )


def complete_classes(values: Options) -> None:
    """Refuse, of a pair with classes, a prior that is not of its kind, and of others what is only for such a pair."""
    name, prior, elbo = values["model"].name, values["prior"].name, values["elbo"].name
    cls = PARTS["model"][name].classes[0]
    if OBJECTIVES[elbo].constants.get("of_labels") and not cls.constants.get("of_labels"):
        known = [word for word, choice in PARTS["model"].items() if choice.constants.get("of_labels")]
        raise UsageError(
            f"elbo={elbo}: is of labels that are seen, and {a(name)} sees none; use `model={known[0]}`",
            settings=(f"elbo={elbo}", f"model={known[0]}"),
        )
    if "classifier" not in cls.takes:
        return
    only = cls.constants["usual"].get("prior")
    if only is not None and prior != only:
        raise UsageError(
            f"prior={prior}: the components of {a(name)} are its classes; use `prior={only}`",
            settings=(f"prior={prior}", f"prior={only}"),
        )
    if {"guide", "guides"} & set(PARTS["prior"][prior].classes[0].takes):
        raise UsageError(
            f"prior={prior}: is made of a guide q(z|x), and that of {a(name)} is q(z|x, y); choose another",
            settings=(f"prior={prior}",),
        )


def with_usual(given: Options, usual: Mapping[str, str]) -> Options:
    """What was given, with a model's own choice of the parts that were not, or whose settings alone were."""
    chosen = {}
    for part, name in usual.items():
        value = given.get(part)
        nameless = isinstance(value, Mapping) and value.get("name") is None
        chosen[part] = name if value is None else {**dict(value), "name": name} if nameless else value
    return {**given, **chosen}


def complete_parts(values: Options, given: Options) -> None:
    """Choose the parts of a pair; a prior on a first stage has that stage's networks."""
    name = values["model"].name
    taken = () if {"guide", "guides", "second"} & set(PARTS["model"][name].classes[0].takes) else ("guide", "network")
    refuse(given, taken, f"{a(name)} has the guide and the networks of its first stage")
    for part in OF_PAIRS:
        values[part] = Part() if part in taken else choose(part, given.get(part), first(part), PARTS[part])
    network = values["network"].name
    if network and PARTS["network"][network].classes[0].constants.get("of_steps"):
        why = f"with `network={network}` each step of x is decoded from codes of its own, with nothing beside them"
        refuse(given, ("condition",), why, f"network={first('network')}", of=f"network={network}")
    prior, guide = values["prior"].name, values["guide"].name
    if guide:
        of_prior, of_guide = latents_of("prior", prior), latents_of("guide", guide)
        if of_prior not in (of_guide, OF_GUIDE):
            fitting = next((name for name in PARTS["guide"] if latents_of("guide", name) == of_prior), "")
            raise UsageError(
                f"prior={prior}: is a distribution of {of_prior}, and `guide={guide}` one of {of_guide}; "
                f"use `guide={fitting}`",
                settings=(f"prior={prior}", f"guide={guide}", f"guide={fitting}"),
            )
    of_any = PARTS["model"][name].classes[0].constants.get("of_any_latents")
    if guide and latents_of("guide", guide) != REAL and not of_any:
        raise UsageError(
            f"guide={guide}: is one of {latents_of('guide', guide)}, and {a(name)} is of {REAL}; use `model=vae` or "
            "`model=hierarchical`",
            settings=(f"guide={guide}", "model=vae", "model=hierarchical"),
        )


def check_steps(values: Options) -> None:
    """Refuse a guide that goes by the steps of its prior, where there are none or the pair has another shape.

    Raises:
        UsageError: the prior is not of steps, or the pair has several layers, stages or a condition.
    """
    name, guide, prior = values["model"].name, values["guide"].name, values["prior"].name
    if not guide or "prior" not in PARTS["guide"][guide].classes[0].takes:
        return
    named = f"guide={guide}"
    if not PARTS["prior"][prior].constants.get("of_steps"):
        fitting = ", ".join(word for word, choice in PARTS["prior"].items() if choice.constants.get("of_steps"))
        raise UsageError(
            f"{named}: goes by the steps of its prior, and `prior={prior}` has none; use one of {fitting}",
            settings=(named, f"prior={prior}"),
        )
    if name != first("model") or values["condition"] is not None:
        what = "given a condition" if name == first("model") else f"of {a(name)} model"
        raise UsageError(
            f"{named}: is of the one layer of a {first('model')}, given nothing, and not {what}", settings=(named,)
        )


def check_latents(values: Options) -> None:
    """Refuse a likelihood of latents of one kind, such as shares, where prior and guide have others.

    Raises:
        UsageError: they do.
    """
    likelihood, guide = values["likelihood"].name, values["guide"].name
    wanted = PARTS["likelihood"][likelihood].constants.get("latents") if likelihood else None
    if not guide or wanted in (None, latents_of("guide", guide)):
        return
    fitting = [
        f"{part}={name}" for part in ("prior", "guide") for name in PARTS[part] if latents_of(part, name) == wanted
    ]
    raise UsageError(
        f"likelihood={likelihood}: takes {wanted}, and `guide={guide}` is one of {latents_of('guide', guide)}; use "
        + ", ".join(f"`{one}`" for one in fitting),
        settings=(f"likelihood={likelihood}", f"guide={guide}", *fitting),
    )


def latents_of(part: str, name: str) -> str:
    """What the draws of a prior or a guide are."""
    kind: str = PARTS[part][name].classes[0].constants.get("latents", REAL)
    return kind


def overlaid(stored: Options, options: Options) -> Options:
    """Stored options with others over them, as if all of it had been given."""
    kept = {key: value for key, value in stored.items() if key not in DERIVED}
    for key, value in options.items():
        if isinstance(value, dict) and "name" not in value:
            theirs = kept.get(key) or {}
            value = {**(theirs if isinstance(theirs, dict) else {"name": theirs}), **value}
        kept[key] = value
    return kept


def complete_bound(values: Options, given: Options) -> None:
    """Fill in K, alpha, beta, partitions and the gradient, and refuse the ones that the bound does not use."""
    values["elbo"] = choose("elbo", given.get("elbo"), next(iter(OBJECTIVES)), OBJECTIVES)
    elbo = values["elbo"].name
    bound = OBJECTIVES[elbo].classes[0]
    values["gradient"] = choose_gradient(elbo, given.get("gradient"))
    if values["K"] is None:
        values["K"] = bound.constants["usual_particles"]
    estimator = values["gradient"].name
    if values["K"] * values["M"] < GRADIENTS[estimator].classes[0].constants.get("least_particles", 1):
        raise UsageError(
            f"gradient={estimator}: needs several particles, got `K=1`; raise `K`, or use `gradient=score-function`",
            settings=(f"gradient={estimator}", "K=1", "K", "gradient=score-function"),
        )
    name = values["model"].name
    if bound.constants.get("by_critic") and "critic" not in PARTS["model"][name].classes[0].takes:
        raise UsageError(
            f"elbo={elbo}: needs a critic of the codes, which a {name} has not; use `model={first('model')}`",
            settings=(f"elbo={elbo}", f"model={first('model')}"),
        )
    if "alpha" not in bound.takes:
        refuse(given, ("alpha",), f"`elbo={elbo}` has no order", "elbo=renyi", of=f"elbo={elbo}")
    elif values["alpha"] is None:
        values["alpha"] = 0.5
    elif abs(1 - values["alpha"]) < 1e-4:
        raise UsageError("alpha=1: that is the ELBO; use `elbo=elbo`", settings=("alpha=1", "elbo=elbo"))
    if "partitions" not in bound.takes:
        refuse(given, ("partitions",), f"`elbo={elbo}` is no sum", "elbo=thermodynamic", of=f"elbo={elbo}")
    elif values["partitions"] is None:
        values["partitions"] = 10
    if "beta" not in bound.takes:
        why = f"with `elbo={elbo}` a weighted KL is not a bound on log p(x)"
        refuse(given, ("beta",), why, "elbo=elbo", of=f"elbo={elbo}")
    elif values["beta"] is None and not values["first"]:
        values["beta"] = 1.0
    elif is_constraint(values["beta"]):
        refuse(given, ("patience",), "under a constraint the last epoch is kept")
    if bound.constants.get("keeps_last"):
        refuse(given, ("patience",), f"of `elbo={elbo}`, which is no bound, the last epoch is kept", of=f"elbo={elbo}")


def check_judged(values: Options) -> None:
    """Refuse an objective by a judge where there can be none, or where nothing would set the scale of p(x|z).

    Raises:
        UsageError: the model has no place for it, or is of other rows than it can look at.
    """
    elbo, name = values["elbo"].name, values["model"].name
    judge = OBJECTIVES[elbo].constants.get("judge") if elbo else None
    if judge is None:
        return
    if "judge" not in PARTS["model"][name].classes[0].takes:
        raise UsageError(
            f"elbo={elbo}: needs a {judge} in the pair, which {a(name)} has no place for; use `model={first('model')}`",
            settings=(f"elbo={elbo}", f"model={first('model')}"),
        )
    for key in ("condition", "columns", "missing"):
        if values[key]:
            raise UsageError(
                f"elbo={elbo}: is for whole rows of one kind, given nothing; leave `{key}` out",
                settings=(f"elbo={elbo}", key),
            )
    if values["likelihood"].settings.get("scale") != "optimal":
        raise UsageError(
            f"elbo={elbo}: what it maximises need not have p(x|z) in it, whose scale is then to be set in closed form; "
            "use `likelihood=gaussian` with `likelihood.scale=optimal`",
            settings=(f"elbo={elbo}", "likelihood=gaussian", "likelihood.scale=optimal"),
        )


def choose_gradient(elbo: str, value: Any) -> Part:
    """How the gradient of a bound is estimated.

    Raises:
        UsageError: there is no such estimator, or it is not of this bound.
    """
    chosen = choose("gradient", value, next(iter(GRADIENTS)), GRADIENTS)
    words = OBJECTIVES[elbo].constants["gradients"]
    if chosen.name not in words:
        named = f"gradient={chosen.name}"
        bounds = [f"elbo={word}" for word, bound in OBJECTIVES.items() if chosen.name in bound.constants["gradients"]]
        raise UsageError(
            f"{named}: is not of `elbo={elbo}`, which has {', '.join(words)}; use one "
            f"of these, or {' or '.join(f'`{bound}`' for bound in bounds)}",
            settings=(named, f"elbo={elbo}", *bounds),
        )
    return chosen


def is_constraint(beta: float | str | None) -> bool:
    """Whether a weight of the KL is a constraint on it."""
    return isinstance(beta, str) and beta.startswith("constraint:")


def choose_likelihood(value: Any, model: Part) -> Part:
    """The likelihood, or none if it is left to the data; for an exact model it only says of which measure that is."""
    likelihood = choose("likelihood", value, None, PARTS["likelihood"])
    if model.name in PARTS["model"] and {"likelihood", "first"} & set(PARTS["model"][model.name].classes[0].takes):
        return likelihood
    if likelihood and not isinstance(value, str):
        used = {f"likelihood.{key}": item for key, item in dict(value).items() if key != "name"}
        refuse(used, tuple(used), f"a {model.name} has settings of its own", "model.components")
    return Part(likelihood.name)


def refuse(given: Options, names: tuple[str, ...], why: str, remedy: str = "", of: str = "") -> None:
    """Refuse options that would be ignored.

    Args:
        given: The options that were given.
        names: Those that are not used.
        why: The reason.
        remedy: A setting to use instead.
        of: A setting that the reason names, in backticks.
    """
    used = tuple(name for name in names if given.get(name) is not None)
    if used:
        remedies = f"; use `{remedy}`" if remedy else ""
        settings = (*used, *filter(None, (of, remedy)))
        raise UsageError(f"{', '.join(used)}: not used, since {why}{remedies}", settings=settings)


def check_optimizer(name: str) -> None:
    """Refuse what torch.optim does not have."""
    import torch

    classes = {n: v for n, v in vars(torch.optim).items() if isinstance(v, type)}
    names = [n for n, v in classes.items() if issubclass(v, torch.optim.Optimizer)]
    names = [n for n in names if n not in ("Optimizer", "LBFGS", "SparseAdam")]
    if name not in names:
        raise UsageError(f"optimizer: {nearest(name, names)}", settings=("optimizer",))


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed but should be said."""
    notes = []
    if maximised := OBJECTIVES[recipe.elbo.name].constants.get("maximised") if recipe.elbo else None:
        notes.append(f"what is maximised is {maximised}; what is reported is the ELBO")
    if recipe.alpha is not None and recipe.alpha < 0:
        notes.append(f"alpha = {recipe.alpha:g} is negative: an upper bound on log p(x) as K grows, not a lower one")
    if recipe.beta == 0:
        notes.append("beta = 0: no KL term, so nothing draws the guide to the prior")
    elif isinstance(recipe.beta, float) and recipe.beta < 1:
        notes.append(
            f"beta = {recipe.beta:g} is below 1: what is maximised may exceed log p(x); what is reported is unscaled"
        )
    return notes


def as_word(condition: str) -> str:
    """What is given, for the name of a file.

    >>> as_word("age, x/y")
    'age-x-y'
    """
    return re.sub(r"\W+", "-", condition)


def title(recipe: Recipe) -> str:
    """A short name for a run, for tables and directories: digits-iwae-K5."""
    data = recipe.data.rstrip("/").split("/")[-1].split(".")[0].split(":")[0]  # without its settings
    if recipe.is_reconstruction:
        corrupted = "" if recipe.corruption.name in ("", first("corruption")) else f"-{recipe.corruption.name}"
        return f"{data}-{recipe.model.name}-Z{recipe.latent_dim[0]}{corrupted}"
    if recipe.is_exact:
        components = recipe.model.settings.get("components")
        return f"{data}-{recipe.model.name}" + (f"-C{components}" if components else "")
    chosen = [recipe.prior, recipe.guide, recipe.likelihood, recipe.corruption]
    defaults = [first("prior"), first("guide"), first("likelihood"), first("corruption"), ""]
    usual = next(iter(GRADIENTS))
    by = [recipe.gradient.name] if recipe.gradient.name != usual else []
    parts = [data, recipe.elbo.name, f"K{recipe.K}", *by, *(part.name for part in chosen if part.name not in defaults)]
    if recipe.condition is not None:
        parts.append(f"given-{as_word(recipe.condition)}")
    if recipe.model.name != first("model"):
        parts.insert(1, recipe.model.name)
    return "-".join(parts)
