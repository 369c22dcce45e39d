"""What can be given to a run: every option, how it is checked, what it is when not given, and what --help says."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from pyrovae.errors import UsageError

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
