"""The configuration of a run: from names to objects.

A configuration is a nested dictionary of plain values, as YAML holds it. `resolve` checks what was given, fills in the
defaults, and refuses every option that the choices made have no use for; the `build_*` functions turn the result into
a pair, an objective and rows. This is the one place where a name stands for a class.
"""

import difflib
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.proposals import Proposal
    from pyrovae.models.mixture import Mixture
    from pyrovae.models.vae import HierarchicalVAE

    Model = HierarchicalVAE | Mixture

Config = dict[str, Any]
Convert = Callable[[str, Any], Any]


def whole(least: int, most: int | None = None) -> Convert:
    """A whole number of at least `least`."""

    def convert(name: str, value: Any) -> int:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or number != math.floor(number if math.isfinite(number) else 0.5):
            raise UsageError(f"--{name}: expected a whole number of at least {least}, got {value}")
        result = int(value) if isinstance(value, int) or str(value).strip().lstrip("+").isdecimal() else int(number)
        if result < least or (most is not None and result > most):
            limit = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(f"--{name}: expected a whole number {limit}, got {value}")
        return result

    return convert


def number(least: float = -math.inf, open_below: bool = False, below: float = math.inf) -> Convert:
    """A finite number within limits."""

    def convert(name: str, value: Any) -> float:
        try:
            result = float(value)
        except (TypeError, ValueError):
            result = math.nan
        low = "above" if open_below else "of at least"
        limits = "" if least == -math.inf else f" {low} {least:g}"
        limits += "" if below == math.inf else f" and below {below:g}"
        inside = result > least if open_below else result >= least
        if isinstance(value, bool) or not math.isfinite(result) or not inside or result >= below:
            raise UsageError(f"--{name}: expected a number{limits}, got {value}")
        return result

    return convert


def one_of(*names: str) -> Convert:
    """One of some words; a wrong one names the nearest."""

    def convert(name: str, value: Any) -> str:
        word = str(value)
        if word.lower() in names:
            return word.lower()
        raise UsageError(f"--{name}: {nearest(word, names)}")

    return convert


def when(name: str, value: Any) -> str:
    """auto, on or off; YAML reads the last two as true and false."""
    word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    return one_of("auto", "on", "off")(name, word)


def thread_count(name: str, value: Any) -> int | str:
    """A whole number, or auto."""
    try:
        return "auto" if str(value).lower() == "auto" else whole(1, 4096)(name, value)
    except UsageError:
        raise UsageError(f"--{name}: expected auto or a whole number from 1 to 4096, got {value}") from None


def nearest(word: str, names: tuple[str, ...] | list[str]) -> str:
    """What to say about a word that is not among some names."""
    near = difflib.get_close_matches(word.lower(), [n.lower() for n in names], 1, 0.5)
    match = next((n for n in names if near and n.lower() == near[0]), None)
    return f"{word!r} is none of {', '.join(names)}{f'; did you mean {match}?' if match else ''}"


def text(name: str, value: Any) -> str:
    """A word or a path, which no number stands for: YAML reads 007 as 7, and 12:30 as 750."""
    if isinstance(value, str | PathLike) and str(value):
        return str(value)
    raise UsageError(f"--{name}: expected a word, got {value!r}; put it in quotes in YAML")


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise UsageError(f"--{name}: expected true or false, got {value}")


def several(value: Any) -> list[Any]:
    """The items of 200,200 or [200,200] as typed, or of a YAML list."""
    if isinstance(value, list | tuple):
        return list(value)
    return re.sub(r"^\[(.*)\]$", r"\1", str(value).strip()).split(",")


def widths(name: str, value: Any) -> list[int]:
    """Whole numbers, as 200,200 or a YAML list."""
    return [whole(1)(name, item) for item in several(value)]


def factors(name: str, value: Any) -> list[float]:
    """Positive numbers, as 1,1.5 or a YAML list."""
    return [number(0, open_below=True)(name, item) for item in several(value)]


def scale(name: str, value: Any) -> float | str:
    """A positive number, or one of three words."""
    words = ("learned", "per-dimension", "predicted")
    try:
        return number(0, open_below=True)(name, value)
    except UsageError:
        if str(value) in words:
            return str(value)
        raise UsageError(f"--{name}: expected a positive number, {', '.join(words)}, got {value}") from None


@dataclass(frozen=True)
class Setting:
    """One option: how it is checked, what it is when not given, what --help says."""

    convert: Convert
    default: Any
    help: str
    metavar: str | None = None


@dataclass(frozen=True)
class Choice:
    """One choice of a part, with the short names it goes by and its own settings."""

    help: str
    short: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)


COMPONENTS = "number of components"
MLP_SETTINGS = {
    "hidden": Setting(widths, [200, 200], "widths of the hidden layers", "200,200"),
    "activation": Setting(
        one_of("tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus"), "tanh", "activation", "NAME"
    ),
    "dropout": Setting(number(0, below=1), 0.0, "dropout probability while training", "P"),
}
CONV_SETTINGS = {
    "channels": Setting(widths, [32, 64], "channels of the convolutions, from the image inwards", "32,64"),
    "hidden": Setting(whole(1), 256, "width of the dense layer", "INT"),
    "activation": Setting(MLP_SETTINGS["activation"].convert, "relu", "activation", "NAME"),
}
MIXTURE_SETTINGS = {
    "components": Setting(whole(1), 10, COMPONENTS, "INT"),
    "covariance": Setting(
        one_of("full", "diagonal", "tied", "spherical"), "full", "full, diagonal, tied or spherical", "NAME"
    ),
    "weights": Setting(one_of("trainable", "uniform"), "trainable", "trainable or uniform", "NAME"),
}

# Part -> choice -> settings. The defaults are those of the classes; a test compares them.
PARTS: dict[str, dict[str, Choice]] = {
    "model": {
        "vae": Choice("one latent layer"),
        "hierarchical": Choice("several latent layers, one for each --latent-dim"),
        "mixture": Choice("exact baseline: of Gaussians for densities, of Bernoullis for masses", (), MIXTURE_SETTINGS),
    },
    "prior": {
        "StandardNormal": Choice("N(0, I)", ("standard", "normal")),
        "MixtureOfGaussians": Choice(
            "learned weights, means and scales",
            ("mixture", "mog"),
            {"components": Setting(whole(1), 10, COMPONENTS, "INT")},
        ),
        "VampPrior": Choice(
            "the guide averaged over learned pseudo-inputs",
            ("vamp",),
            {"components": Setting(whole(1), 500, "number of pseudo-inputs", "INT")},
        ),
    },
    "likelihood": {
        "Bernoulli": Choice("mass on {0,1}^D"),
        "Gaussian": Choice(
            "density",
            (),
            {
                "scale": Setting(scale, "learned", "a number, learned, per-dimension or predicted", "SCALE"),
                "floor": Setting(
                    number(0),
                    1e-3,
                    "least scale that is learned, as a share of the data's standard deviation",
                    "NUMBER",
                ),
            },
        ),
    },
    "guide": {
        "MeanFieldNormal": Choice("diagonal covariance", ("mean-field", "diagonal")),
        "FullCovarianceNormal": Choice("full covariance by its Cholesky factor", ("full", "full-covariance")),
        "LowRankNormal": Choice(
            "low rank plus diagonal", ("low-rank",), {"rank": Setting(whole(1), 2, "rank of the factor", "INT")}
        ),
    },
    "network": {
        "mlp": Choice("dense layers", (), MLP_SETTINGS),
        "conv": Choice("convolutions, for images", (), CONV_SETTINGS),
    },
}

# Where the draws of an estimate of log p(x) come from.
PROPOSALS: dict[str, Choice] = {
    "guide": Choice("the guide itself"),
    "widened": Choice(
        "the guide at several widths, mixed with the prior",
        (),
        {
            "scales": Setting(factors, [1.0, 1.25, 1.5, 2.0], "factors of the guide's widths", "1,1.5"),
            "share": Setting(number(0, below=1), 0.1, "share of draws from the prior", "P"),
        },
    ),
    "individual": Choice(
        "a Gaussian fitted to each row",
        (),
        {
            "family": Setting(one_of("full", "diagonal"), "full", "covariance, full or diagonal", "NAME"),
            "steps": Setting(whole(1), 200, "steps of the fit", "INT"),
            "draws": Setting(whole(2), 16, "draws at each step, an even number", "INT"),
            "widen": Setting(number(0, open_below=True), 1.05, "factor of its widths when it is weighted", "NUMBER"),
        },
    ),
    "annealed": Choice(
        "chains of Hamiltonian Monte Carlo to p(z|x), their setting checked on simulated data",
        (),
        {
            "temperatures": Setting(whole(1), 200, "steps of the path to p(x, z)", "INT"),
            "leapfrog": Setting(whole(1), 5, "leapfrog steps at each", "INT"),
            "start": Setting(one_of("guide", "prior"), "guide", "where chains start, guide or prior", "NAME"),
        },
    ),
    "prior": Choice("the prior, naively"),
}

ELBOS = ("elbo", "iwae", "renyi")


def beta(name: str, value: Any) -> float | str:
    """A number, or warmup:EPOCHS, cyclical:EPOCHS or capacity:NATS:EPOCHS."""
    words = str(value).split(":")
    if words[0] in ("warmup", "cyclical") and len(words) == 2:
        return f"{words[0]}:{whole(1)(name, words[1])}"
    if words[0] == "capacity" and len(words) == 3:
        return f"capacity:{number(0)(name, words[1]):g}:{whole(1)(name, words[2])}"
    try:
        return number(0)(name, value)
    except UsageError:
        raise UsageError(
            f"--{name}: expected a number of at least 0, warmup:EPOCHS, cyclical:EPOCHS or capacity:NATS:EPOCHS, "
            f"got {value}"
        ) from None


# None as a default is filled in by `resolve`, from the other choices.
OPTIONS: dict[str, dict[str, Setting]] = {
    "Bound": {
        "elbo": Setting(one_of(*ELBOS), "elbo", "elbo, iwae or renyi (default elbo)", "NAME"),
        "K": Setting(whole(1), None, "particles per datum (default 1; 5 for iwae and renyi)", "INT"),
        "M": Setting(whole(1), 1, "outer averages of the K-particle bound (default 1)", "INT"),
        "alpha": Setting(number(), None, "order of the Renyi bound, only with renyi (default 0.5)", "NUMBER"),
        "beta": Setting(
            beta,
            None,
            "weight of the KL, only with elbo: a number, warmup:EPOCHS, cyclical:EPOCHS or capacity:NATS:EPOCHS; above "
            "1 a looser lower bound is maximised, below 1 what may exceed log p(x) (default 1)",
            "BETA",
        ),
    },
    "Model": {
        "latent_dim": Setting(
            widths,
            None,
            "latent dimensions; for hierarchical one per layer from the data up (default 50; 50,25)",
            "INT",
        ),
    },
    "Data": {
        "data": Setting(text, "digits", "a name (see above) or a .npz, .npy, .csv or folder of images", "NAME|PATH"),
        "data_root": Setting(text, None, "where torchvision's data sets are, or are downloaded to", "DIR"),
        "binarize": Setting(
            one_of("dynamic", "fixed", "threshold"),
            None,
            "grey levels to bits for a Bernoulli likelihood: dynamic, fixed or threshold (default dynamic); validation "
            "and test rows are always fixed",
            "HOW",
        ),
        "stream": Setting(
            when,
            "auto",
            "read training rows of a .npy from the file at every step: auto (where they do not fit in memory), on or "
            "off (default auto)",
            "WHEN",
        ),
        "standardize": Setting(flag, False, "centre and scale continuous columns by the training rows"),
    },
    "Training": {
        "epochs": Setting(whole(1), 100, "passes over the data (default 100)", "INT"),
        "batch_size": Setting(whole(1), 100, "rows per step (default 100)", "INT"),
        "lr": Setting(number(0, open_below=True, below=1e37), 1e-3, "learning rate (default 0.001)", "NUMBER"),
        "optimizer": Setting(text, "Adam", "a class of torch.optim (default Adam)", "NAME"),
        "schedule": Setting(
            one_of("constant", "staged", "cosine"),
            "constant",
            "learning rate: constant, staged (3^i epochs each, as in the IWAE paper) or cosine (default constant)",
            "NAME",
        ),
        "patience": Setting(whole(1), None, "stop after so many epochs without a better validation bound", "INT"),
        "seed": Setting(whole(0, 2**63 - 1), None, "of everything random (default: drawn, printed and stored)", "INT"),
        "device": Setting(text, "auto", "auto, cpu, cuda or cuda:N (default auto)", "NAME"),
        "compile": Setting(
            when,
            "auto",
            "compile the training step: auto (where the run is long enough to repay it), on or off (default auto)",
            "WHEN",
        ),
        "precision": Setting(
            one_of("fp32", "tf32", "bf16-mixed"),
            "fp32",
            "of matrix products and convolutions: fp32, tf32 (CUDA) or bf16-mixed; all else is in single precision "
            "(default fp32)",
            "NAME",
        ),
        "particle_chunk": Setting(
            whole(1), None, "draw so many of the K particles at a time, to save memory; the gradient is of all", "INT"
        ),
        "threads": Setting(
            thread_count,
            "auto",
            "processor threads: a number, or auto, fewer where other programs keep the machine busy (default auto)",
            "INT|auto",
        ),
    },
    "Evaluation": {
        "eval_K": Setting(whole(1), 1000, "particles for the test log p(x) at the end (default 1000)", "INT"),
        "eval_rows": Setting(whole(1), 1000, "test rows it is computed on, the first ones (default 1000)", "INT"),
    },
}
SETTINGS = {name: setting for group in OPTIONS.values() for name, setting in group.items()}
# What a run adds to the options in its config.yaml.
DERIVED = ("data_hash", "event_shape", "version")
# What may differ between a run and its resumption.
RESUMABLE = ("epochs", "patience", "eval_K", "eval_rows", "device", "compile", "particle_chunk", "threads", "stream")


def option(key: str) -> str:
    """A configuration key as it is typed: latent_dim -> latent-dim."""
    return key.replace("_", "-")


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


def build_rows(config: Config) -> "Rows":
    """Load the data, settle what depends on it (`likelihood`, `binarize`), and split it.

    The configuration of a run, which has the hash of its rows, downloads nothing: it may be a stranger's.

    Raises:
        DataError: the data is missing, damaged, or does not suit the likelihood.
    """
    from pyrovae.data import DOWNLOADED, default_measure, load_data

    if config["data_root"] is not None and str(config["data"]).lower().replace("_", "-") not in DOWNLOADED:
        raise UsageError(f"--data-root: not used by --data {config['data']}; it is for {', '.join(DOWNLOADED)}")
    data = load_data(config["data"], config["data_root"], "data_hash" not in config, stream=config["stream"])
    if config["likelihood"] is None:
        binarised = config["binarize"] is not None
        measure = "mass" if binarised else default_measure(data)
        pick = choose_measure if config["model"]["name"] == "mixture" else choose_likelihood
        config["likelihood"] = pick("Bernoulli" if measure == "mass" else "Gaussian")
    measure = "mass" if config["likelihood"]["name"] == "Bernoulli" else "density"
    rows = data.rows(measure, binarize=config["binarize"], standardize=config["standardize"])
    if measure == "mass" and "covariance" in config["model"]:
        if config["model"]["covariance"] != "full":
            raise UsageError("--model.covariance: not used by a mixture of Bernoullis; use --likelihood gaussian")
        # Left out, so that a saved configuration never claims what such a mixture does not have.
        config["model"] = {key: value for key, value in config["model"].items() if key != "covariance"}
    config["binarize"] = rows.binarize
    config["data_hash"] = rows.hash
    if config["batch_size"] > len(rows.train):
        raise UsageError(f"--batch-size: {config['batch_size']} is more than the {len(rows.train)} training rows")
    return rows


def build_model(config: Config, event_shape: tuple[int, ...]) -> "Model":
    """The pair that a resolved configuration declares; its parameters are drawn from torch's random state."""
    from pyrovae import models
    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture

    if config["model"]["name"] == "mixture":
        settings = {k: v for k, v in config["model"].items() if k != "name"}
        if config["likelihood"]["name"] == "Bernoulli":
            settings.pop("covariance", None)
            return BernoulliMixture(event_shape, **settings)
        return GaussianMixture(event_shape, **settings)

    def settings_of(part: str) -> Config:
        return {k: v for k, v in config[part].items() if k != "name"}

    latent = config["latent_dim"]
    conv = config["network"]["name"] == "conv"
    network = settings_of("network")
    # Layers above the first map vectors to vectors, so they are dense in every architecture.
    dense = {k: v for k, v in network.items() if k in ("activation", "dropout")}
    if not conv:
        dense["hidden"] = network["hidden"]

    predicted = config["likelihood"].get("scale") == "predicted"
    out_shape = (2, *event_shape) if predicted else event_shape
    decoder = (
        models.ConvDecoder(latent[0], out_shape, **network) if conv else models.MLP(latent[0], out_shape, **network)
    )
    likelihood = getattr(models, config["likelihood"]["name"])(decoder, **settings_of("likelihood"))

    make_guide, guide_settings = getattr(models, config["guide"]["name"]), settings_of("guide")
    encoder = models.ConvEncoder(event_shape, **network) if conv else models.MLP(event_shape, **network)
    guides = [make_guide(encoder, latent[0], **guide_settings)]
    conditionals = []
    for below, above in pairwise(latent):
        guides.append(make_guide(models.MLP(below, **dense), above, **guide_settings))
        conditionals.append(models.MeanFieldNormal(models.MLP(above, **dense), below))

    make_prior, prior_settings = getattr(models, config["prior"]["name"]), settings_of("prior")
    if make_prior is models.VampPrior:
        prior = models.VampPrior(guides[0], event_shape, **prior_settings)
    else:
        prior = make_prior(latent[-1], **prior_settings)
    if len(latent) == 1:
        return models.VAE(prior, likelihood, guides[0])
    return models.HierarchicalVAE(prior, conditionals, likelihood, guides)


def build_objective(config: Config, steps_per_epoch: int = 1) -> "PyroELBO":
    """The objective that a resolved configuration trains with."""
    from pyro.infer import TraceEnum_ELBO

    from pyrovae.inference import objectives

    if config["model"]["name"] == "mixture":
        return TraceEnum_ELBO(max_plate_nesting=1)
    particles = {"num_particles": config["K"], "num_averages": config["M"]}
    if config["elbo"] == "iwae":
        return objectives.IWAE(**particles)
    if config["elbo"] == "renyi":
        return objectives.Renyi(config["alpha"], **particles)
    return objectives.ELBO(beta=build_beta(config["beta"], steps_per_epoch), **particles)


def build_beta(value: float | str, steps_per_epoch: int) -> Any:
    """A number, or the schedule that a string such as warmup:10 names."""
    from pyrovae.inference.objectives import Capacity, Cyclical, LinearWarmup

    if not isinstance(value, str):
        return value
    kind, *numbers = value.split(":")
    steps = int(numbers[-1]) * steps_per_epoch
    if kind == "warmup":
        return LinearWarmup(steps=steps)
    return Cyclical(period=steps) if kind == "cyclical" else Capacity(float(numbers[0]), steps=steps)


def build_proposal(value: Any) -> "Proposal | None":
    """The proposal that was asked for, as its name and settings; None for the guide itself."""
    from pyrovae.inference.annealed import Annealed
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.proposals import FromPrior, Widened

    chosen = choose("proposal", value, "guide", PROPOSALS)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if k != "name"}
    if chosen["name"] == "guide":
        return None
    classes = {"widened": Widened, "individual": Individual, "annealed": Annealed, "prior": FromPrior}
    made: Proposal = classes[chosen["name"]](**settings)
    return made


def build_optimizer(config: Config) -> "Callable[[list[Tensor]], torch.optim.Optimizer]":
    """What makes the optimiser of a list of parameters."""
    import torch

    from pyrovae.inference.training.trainer import adam

    if config["optimizer"] == "Adam":
        return lambda parameters: adam(parameters, lr=config["lr"])
    return lambda parameters: getattr(torch.optim, config["optimizer"])(parameters, lr=config["lr"])


def build_schedule(config: Config) -> Any:
    """What makes the scheduler of an optimiser, or None."""
    import torch

    from pyrovae.inference.training.trainer import staged

    if config["schedule"] == "staged":
        return staged
    if config["schedule"] == "cosine":
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    return None


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
