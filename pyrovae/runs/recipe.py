"""The configuration of a run: a nested dictionary of plain values, as YAML holds it.

`resolve` checks what was given, fills in the defaults, and refuses every option that the choices made have no use for;
`pyrovae.runs.build` turns the result into a pair, an objective and rows.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from pyrovae.errors import UsageError
from pyrovae.runs.options import DERIVED, PARTS, SETTINGS, Choice, nearest, option

Config = dict[str, Any]


def resolve(given: Config) -> Config:
    """Check what was given and fill in the rest, without looking at the data.

    `likelihood` and `binarize` may depend on the data: they stay None until `build_rows`.

    Raises:
        UsageError: a value makes no sense, or an option is not used by the choices made.
    """
    unknown = [key for key in given if key not in SETTINGS and key not in PARTS]
    if unknown:
        known = [*SETTINGS, *PARTS]
        raise UsageError(f"configuration: {nearest(str(unknown[0]), known)}")
    config: Config = {}
    model = choose("model", given.get("model"), "vae")
    config["model"] = model
    for name, setting in SETTINGS.items():
        value = given.get(name)
        config[name] = setting.default if value is None else setting.convert(option(name), value)
    mixture = model["name"] == "mixture"
    if mixture:
        refuse(
            given,
            ("elbo", "K", "M", "alpha", "beta", "latent_dim", "prior", "guide", "network"),
            "a mixture is fit by its exact log p(x)",
        )
        refuse(given, ("eval_K",), "the log p(x) of a mixture is exact")
        refuse(given, ("particle_chunk",), "a mixture has no particles")
        refuse(given, ("precision",), "a mixture is fit and scored in single precision")
        for name in ("elbo", "K", "M", "latent_dim", "eval_K", "precision"):
            config[name] = None
        config["likelihood"] = choose_measure(given.get("likelihood"))
    else:
        resolve_bound(config, given)
        layers = 2 if model["name"] == "hierarchical" else 1
        latent = config["latent_dim"] or [50, 25][:layers]
        if model["name"] == "vae" and len(latent) != 1:
            raise UsageError(f"--latent-dim: a vae has one latent layer, got {len(latent)}; use --model hierarchical")
        if model["name"] == "hierarchical" and len(latent) < 2:
            raise UsageError("--latent-dim: a hierarchical model needs one for each layer, such as 50,25; got one")
        config["latent_dim"] = latent
        for part, default in (("prior", "StandardNormal"), ("guide", "MeanFieldNormal"), ("network", "mlp")):
            config[part] = choose(part, given.get(part), default)
        config["likelihood"] = choose_likelihood(given.get("likelihood"))
        if config["guide"].get("rank", 1) > min(latent):
            raise UsageError(f"--guide.rank: {config['guide']['rank']} is more than --latent-dim {min(latent)}")
        if model["name"] == "hierarchical" and config["prior"]["name"] == "VampPrior":
            raise UsageError("--prior VampPrior: needs a vae, since its pseudo-inputs go through one guide q(z|x)")
    if config["seed"] is None:
        config["seed"] = secrets.randbelow(2**31)
    check_optimizer(config["optimizer"])
    return config


def overlaid(stored: Config, options: Config) -> Config:
    """A stored configuration with options over it, as if all of it had been given."""
    kept = {key: value for key, value in stored.items() if key not in DERIVED}
    for key, value in options.items():
        if isinstance(value, dict) and "name" not in value:
            theirs = kept.get(key) or {}
            value = {**(theirs if isinstance(theirs, dict) else {"name": theirs}), **value}
        kept[key] = value
    return kept


def resolve_bound(config: Config, given: Config) -> None:
    """Fill in K, alpha and beta, and refuse the ones that the bound does not use."""
    elbo = config["elbo"]
    if config["K"] is None:
        config["K"] = 1 if elbo == "elbo" else 5
    if elbo != "renyi":
        refuse(given, ("alpha",), f"--elbo {elbo} has no order; use --elbo renyi")
    elif config["alpha"] is None:
        config["alpha"] = 0.5
    elif abs(1 - config["alpha"]) < 1e-4:
        raise UsageError("--alpha 1: that is the ELBO; use --elbo elbo")
    if elbo != "elbo":
        refuse(given, ("beta",), f"with --elbo {elbo} a weighted KL is not a bound on log p(x); use --elbo elbo")
    elif config["beta"] is None:
        config["beta"] = 1.0


def choose(part: str, value: Any, default: str | None, among: Mapping[str, Choice] | None = None) -> Any:
    """A part's name and settings: what was given, short names resolved, with the defaults filled in, or None."""
    if not isinstance(value, str | Mapping | None):
        raise UsageError(f"--{part}: expected a name, or a name and settings, got {value!r}")
    value = {"name": value} if isinstance(value, str) else dict(value or {})
    choices = PARTS[part] if among is None else among
    name = value.pop("name", None)
    name = default if name is None else name
    if name is None:
        if value:
            raise UsageError(f"--{part}.{option(next(iter(value)))}: say which --{part} it is for")
        return None
    names = {word.lower(): full for full, choice in choices.items() for word in (full, *choice.short)}
    if str(name).lower() not in names:
        raise UsageError(f"--{part}: {nearest(str(name), [*choices, *(s for c in choices.values() for s in c.short)])}")
    full = names[str(name).lower()]
    settings = choices[full].settings
    for key in value:
        if key not in settings:
            used = f"; it has {', '.join(settings)}" if settings else ", which has no settings"
            raise UsageError(f"--{part}.{option(key)}: not used by {full}{used}")
    result: Config = {"name": full}
    for key, setting in settings.items():
        given = value.get(key)
        result[key] = setting.default if given is None else setting.convert(f"{part}.{key}", given)
    return result


def choose_likelihood(value: Any) -> Any:
    """The likelihood of a VAE with its settings, or None if it is left to the data."""
    likelihood = choose("likelihood", value, None)
    if likelihood and isinstance(likelihood.get("scale"), float):
        if not isinstance(value, str) and dict(value).get("floor") is not None:
            raise UsageError("--likelihood.floor: not used, since --likelihood.scale is fixed to a number")
        likelihood.pop("floor")
    return likelihood


def choose_measure(value: Any) -> Any:
    """The likelihood of a mixture, which only says whether it is a density or a mass."""
    likelihood = choose_likelihood(value)
    if likelihood and not isinstance(value, str):
        used = {f"likelihood.{key}": item for key, item in dict(value).items() if key != "name"}
        refuse(used, tuple(used), "a mixture has covariances of its own: --model.covariance")
    return likelihood and {"name": likelihood["name"]}


def refuse(given: Config, names: tuple[str, ...], why: str) -> None:
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


def warnings(config: Config) -> list[str]:
    """What is allowed but should be said."""
    notes = []
    if config.get("alpha") is not None and config["alpha"] < 0:
        notes.append(f"alpha = {config['alpha']:g} is negative: an upper bound on log p(x) as K grows, not a lower one")
    if config.get("beta") == 0:
        notes.append("beta = 0: no KL term, so nothing draws the guide to the prior")
    elif isinstance(config.get("beta"), float) and config["beta"] < 1:
        notes.append(
            f"beta = {config['beta']:g} is below 1: what is maximised may exceed log p(x); what is reported is unscaled"
        )
    return notes


def title(config: Config) -> str:
    """A short name for a run, for tables and directories: digits-iwae-K5."""
    data = str(config["data"]).rstrip("/").split("/")[-1].split(".")[0]
    if config["model"]["name"] == "mixture":
        return f"{data}-mixture-C{config['model']['components']}"
    parts = [data, config["elbo"], f"K{config['K']}"]
    if config["model"]["name"] == "hierarchical":
        parts.insert(1, "hierarchical")
    if config["prior"]["name"] != "StandardNormal":
        parts.append(config["prior"]["name"])
    if config["guide"]["name"] != "MeanFieldNormal":
        parts.append(config["guide"]["name"])
    if config["likelihood"]["name"] == "Gaussian":
        parts.append("Gaussian")
    return "-".join(parts)
