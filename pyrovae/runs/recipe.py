"""What to train, on what, and how: every option, checked, with the rest filled in.

A recipe is made of options as plain values, such as a YAML file holds, and gives them back as such. An option that the
choices made have no use for is refused; `pyrovae.runs.build` turns a recipe into a pair, an objective and rows.
"""

import copy
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pyrovae.errors import UsageError
from pyrovae.runs.options import DERIVED, PARTS, SETTINGS, Choice, nearest, option

Options = dict[str, Any]
# What a mixture, which is fit by its exact log p(x), has no use for, with what stands for nothing there.
NOT_OF_MIXTURES: Options = {"elbo": "", "K": 0, "M": 0, "latent_dim": (), "eval_K": 0, "precision": "fp32"}


@dataclass(frozen=True)
class Part:
    """What was chosen for a part of the model, with all its settings; without a name, nothing."""

    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.name)

    def plain(self) -> Options | None:
        """As YAML holds it."""
        return {"name": self.name, **self.settings} if self else None


@dataclass(frozen=True, init=False, kw_only=True)
class Recipe:
    """All that decides what is trained.

    Made of options by their names, as `python -m pyrovae.fit --help` lists them: `Recipe(data="digits", elbo="iwae",
    prior={"name": "VampPrior", "components": 50})`. What is not given has its default, and a seed is drawn.

    Attributes:
        prior, guide, network: Nothing for a mixture.
        likelihood, binarize: Left to the data, where they were not given, until `settled`.
        K, M, eval_K: Numbers of particles; 0 for a mixture.
        data_hash, event_shape: Of the rows, once they are known.
        given: The options as they were given.

    Raises:
        UsageError: a value makes no sense, or an option is not used by the choices made.
    """

    model: Part
    elbo: str
    K: int
    M: int
    alpha: float | None
    beta: float | str | None
    latent_dim: tuple[int, ...]
    data: str
    data_root: str | None
    binarize: str | None
    stream: Literal["auto", "on", "off"]
    standardize: bool
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
    likelihood: Part
    data_hash: str = ""
    event_shape: tuple[int, ...] = ()
    given: Mapping[str, Any] = field(repr=False, compare=False)

    def __init__(self, /, **options: Any) -> None:
        for key, value in {**completed(options), "data_hash": "", "event_shape": (), "given": options}.items():
            object.__setattr__(self, key, value)

    @property
    def is_mixture(self) -> bool:
        """Whether the model is a mixture, with its exact log p(x)."""
        return self.model.name == "mixture"

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
        """The recipe with what its rows decide: `likelihood`, `binarize`, `data_hash`, `event_shape`."""
        made = copy.copy(self)
        for key, value in known.items():
            object.__setattr__(made, key, value)
        return made

    def plain(self) -> Options:
        """All of it as plain values, which YAML can hold."""
        values: Options = {}
        for key in (f.name for f in fields(self) if f.name != "given"):
            value = getattr(self, key)
            if not value and key in ("prior", "guide", "network", *DERIVED):
                continue
            if isinstance(value, Part):
                value = value.plain()
            unused = key in NOT_OF_MIXTURES and self.is_mixture
            values[key] = None if unused else list(value) if isinstance(value, tuple) else value
        return values


def completed(given: Options) -> Options:
    """Check what was given and fill in the rest, without looking at the data.

    Raises:
        UsageError: a value makes no sense, or an option is not used by the choices made.
    """
    unknown = [key for key in given if key not in SETTINGS and key not in PARTS]
    if unknown:
        known = [*SETTINGS, *PARTS]
        raise UsageError(f"configuration: {nearest(str(unknown[0]), known)}")
    values: Options = {"model": choose("model", given.get("model"), "vae")}
    for name, setting in SETTINGS.items():
        value = given.get(name)
        values[name] = setting.default if value is None else setting.convert(option(name), value)
    complete = complete_mixture if values["model"].name == "mixture" else complete_vae
    complete(values, given)
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**31)
    check_optimizer(values["optimizer"])
    return values


def complete_mixture(values: Options, given: Options) -> None:
    """Fill in the rest of a mixture, and refuse what it has no use for."""
    unused = ("elbo", "K", "M", "alpha", "beta", "latent_dim", "prior", "guide", "network")
    refuse(given, unused, "a mixture is fit by its exact log p(x)")
    refuse(given, ("eval_K",), "the log p(x) of a mixture is exact")
    refuse(given, ("particle_chunk",), "a mixture has no particles")
    refuse(given, ("precision",), "a mixture is fit and scored in single precision")
    values |= {**NOT_OF_MIXTURES, "prior": Part(), "guide": Part(), "network": Part()}
    values["likelihood"] = choose_measure(given.get("likelihood"))


def complete_vae(values: Options, given: Options) -> None:
    """Fill in the rest of a VAE with one or several latent layers."""
    complete_bound(values, given)
    model = values["model"].name
    layers = 2 if model == "hierarchical" else 1
    latent = tuple(values["latent_dim"] or [50, 25][:layers])
    if model == "vae" and len(latent) != 1:
        raise UsageError(f"--latent-dim: a vae has one latent layer, got {len(latent)}; use --model hierarchical")
    if model == "hierarchical" and len(latent) < 2:
        raise UsageError("--latent-dim: a hierarchical model needs one for each layer, such as 50,25; got one")
    values["latent_dim"] = latent
    for part, default in (("prior", "StandardNormal"), ("guide", "MeanFieldNormal"), ("network", "mlp")):
        values[part] = choose(part, given.get(part), default)
    values["likelihood"] = choose_likelihood(given.get("likelihood"))
    rank = values["guide"].settings.get("rank", 1)
    if rank > min(latent):
        raise UsageError(f"--guide.rank: {rank} is more than --latent-dim {min(latent)}")
    if model == "hierarchical" and values["prior"].name == "VampPrior":
        raise UsageError("--prior VampPrior: needs a vae, since its pseudo-inputs go through one guide q(z|x)")


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
    """Fill in K, alpha and beta, and refuse the ones that the bound does not use."""
    elbo = values["elbo"]
    if values["K"] is None:
        values["K"] = 1 if elbo == "elbo" else 5
    if elbo != "renyi":
        refuse(given, ("alpha",), f"--elbo {elbo} has no order; use --elbo renyi")
    elif values["alpha"] is None:
        values["alpha"] = 0.5
    elif abs(1 - values["alpha"]) < 1e-4:
        raise UsageError("--alpha 1: that is the ELBO; use --elbo elbo")
    if elbo != "elbo":
        refuse(given, ("beta",), f"with --elbo {elbo} a weighted KL is not a bound on log p(x); use --elbo elbo")
    elif values["beta"] is None:
        values["beta"] = 1.0


def choose(part: str, value: Any, default: str | None, among: Mapping[str, Choice] | None = None) -> Part:
    """A part: what was given, short names resolved, with the defaults filled in, or none."""
    if not isinstance(value, str | Mapping | None):
        raise UsageError(f"--{part}: expected a name, or a name and settings, got {value!r}")
    value = {"name": value} if isinstance(value, str) else dict(value or {})
    choices = PARTS[part] if among is None else among
    name = value.pop("name", None)
    name = default if name is None else name
    if name is None:
        if value:
            raise UsageError(f"--{part}.{option(next(iter(value)))}: say which --{part} it is for")
        return Part()
    names = {word.lower(): full for full, choice in choices.items() for word in (full, *choice.short)}
    if str(name).lower() not in names:
        raise UsageError(f"--{part}: {nearest(str(name), [*choices, *(s for c in choices.values() for s in c.short)])}")
    full = names[str(name).lower()]
    settings = choices[full].settings
    for key in value:
        if key not in settings:
            used = f"; it has {', '.join(settings)}" if settings else ", which has no settings"
            raise UsageError(f"--{part}.{option(key)}: not used by {full}{used}")
    complete = {}
    for key, setting in settings.items():
        given = value.get(key)
        complete[key] = setting.default if given is None else setting.convert(f"{part}.{key}", given)
    return Part(full, complete)


def choose_likelihood(value: Any) -> Part:
    """The likelihood of a VAE with its settings, or none if it is left to the data."""
    likelihood = choose("likelihood", value, None)
    if not isinstance(likelihood.settings.get("scale"), float):
        return likelihood
    if not isinstance(value, str) and dict(value).get("floor") is not None:
        raise UsageError("--likelihood.floor: not used, since --likelihood.scale is fixed to a number")
    return Part(likelihood.name, {key: item for key, item in likelihood.settings.items() if key != "floor"})


def choose_measure(value: Any) -> Part:
    """The likelihood of a mixture, which only says whether it is a density or a mass."""
    likelihood = choose_likelihood(value)
    if likelihood and not isinstance(value, str):
        used = {f"likelihood.{key}": item for key, item in dict(value).items() if key != "name"}
        refuse(used, tuple(used), "a mixture has covariances of its own: --model.covariance")
    return Part(likelihood.name)


def refuse(given: Options, names: tuple[str, ...], why: str) -> None:
    """Refuse options that would be ignored."""
    used = [f"--{option(name)}" for name in names if given.get(name) is not None]
    if used:
        raise UsageError(f"{', '.join(used)}: not used, since {why}")


def check_optimizer(name: str) -> None:
    """Refuse what torch.optim does not have."""
    import torch

    classes = {n: v for n, v in vars(torch.optim).items() if isinstance(v, type)}
    names = [n for n, v in classes.items() if issubclass(v, torch.optim.Optimizer)]
    names = [n for n in names if n not in ("Optimizer", "LBFGS", "SparseAdam")]
    if name not in names:
        raise UsageError(f"--optimizer: {nearest(name, names)}")


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed but should be said."""
    notes = []
    if recipe.alpha is not None and recipe.alpha < 0:
        notes.append(f"alpha = {recipe.alpha:g} is negative: an upper bound on log p(x) as K grows, not a lower one")
    if recipe.beta == 0:
        notes.append("beta = 0: no KL term, so nothing draws the guide to the prior")
    elif isinstance(recipe.beta, float) and recipe.beta < 1:
        notes.append(
            f"beta = {recipe.beta:g} is below 1: what is maximised may exceed log p(x); what is reported is unscaled"
        )
    return notes


def title(recipe: Recipe) -> str:
    """A short name for a run, for tables and directories: digits-iwae-K5."""
    data = recipe.data.rstrip("/").split("/")[-1].split(".")[0]
    if recipe.is_mixture:
        return f"{data}-mixture-C{recipe.model.settings['components']}"
    parts = [data, recipe.elbo, f"K{recipe.K}"]
    if recipe.model.name == "hierarchical":
        parts.insert(1, "hierarchical")
    if recipe.prior.name != "StandardNormal":
        parts.append(recipe.prior.name)
    if recipe.guide.name != "MeanFieldNormal":
        parts.append(recipe.guide.name)
    if recipe.likelihood.name == "Gaussian":
        parts.append("Gaussian")
    return "-".join(parts)
