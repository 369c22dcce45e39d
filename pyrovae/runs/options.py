"""What can be given to a run: every option, how it is checked, what it is when not given, and what --help says.

Of the parts, and of what a proposal may be, the classes say it themselves: `pyrovae.runs.parts` reads them.
"""

from os import PathLike
from typing import Any

from pyrovae.runs.parts import Choices, Part, Setting
from pyrovae.settings import Either, Flag, Number, Several, Text, Whole, Words

PAIRS, EXACT = ("pyrovae.models.pairs", "PAIRS"), ("pyrovae.models.baselines", "BASELINES")
STAGED = ("pyrovae.models.two_stage", "STAGED")
GIVEN = ("pyrovae.models.choices", "CONDITIONAL_PRIORS")
# Priors p(z|y), for what is given.
CONDITIONAL = Choices(GIVEN)
# Models that reconstruct, and have no p(x).
WITHOUT_DENSITY = ("pyrovae.models.autoencoder", "RECONSTRUCTIONS")
RECONSTRUCTIONS = Choices(WITHOUT_DENSITY)
# Models with an exact log p(x).
BASELINES = Choices(EXACT)
# Part -> choices; the first is the default, but for a likelihood, which is left to the data.
PARTS = {
    "model": Choices(PAIRS, STAGED, EXACT, WITHOUT_DENSITY),
    "prior": Choices(("pyrovae.models.choices", "PRIORS"), GIVEN),
    "likelihood": Choices(("pyrovae.models.choices", "LIKELIHOODS")),
    "guide": Choices(("pyrovae.models.choices", "GUIDES")),
    "network": Choices(("pyrovae.models.choices", "NETWORKS")),
    "corruption": Choices(("pyrovae.models.corruptions", "CORRUPTIONS")),
}
# Where the draws of an estimate of log p(x) come from.
PROPOSALS = Choices(("pyrovae.inference", "PROPOSALS"))

# What is maximised, by word.
OBJECTIVES = Choices(
    ("pyrovae.inference.objectives", "OBJECTIVES"),
    ("pyrovae.inference.weighted", "WEIGHTED"),
    ("pyrovae.inference.judged", "JUDGED"),
)
# Those without a penalty, which are reported.
BOUNDS = tuple(word for word, choice in OBJECTIVES.items() if "maximised" not in choice.constants)
# How the gradient of what is maximised is estimated.
GRADIENTS = Choices(("pyrovae.inference.estimators", "GRADIENTS"))
SWITCH = Words(("auto", "on", "off"))
THREADS = Either((Words(("auto",)), Whole(1, 4096)))


def usual_particles(elbo: str) -> int:
    """K of an objective, unless it is given."""
    number: int = OBJECTIVES[elbo].constants["usual_particles"]
    return number


class Beta:
    """The weight of a KL: a number, or a schedule in epochs."""

    def __str__(self) -> str:
        return "a number of at least 0, warmup:EPOCHS, cyclical:EPOCHS, capacity:NATS:EPOCHS or constraint:NATS"

    def holds(self, value: object) -> bool:
        return isinstance(value, str) or Number(least=0).holds(value)

    def read(self, word: Any) -> Any:
        name, *numbers = str(word).split(":")
        if name in ("warmup", "cyclical") and len(numbers) == 1:
            return f"{name}:{self.part(Whole(), numbers[0])}"
        if name == "capacity" and len(numbers) == 2:
            return f"capacity:{self.part(Number(least=0), numbers[0]):g}:{self.part(Whole(), numbers[1])}"
        if name == "constraint" and len(numbers) == 1:
            return f"constraint:{self.part(Number(above=0), numbers[0]):g}"
        return Number().read(word)

    def part(self, kind: Whole | Number, word: str) -> Any:
        """One of its numbers."""
        value = kind.read(word)
        if not kind.holds(value):
            raise ValueError(word)
        return value


class OfRun:
    """A run by its directory; in a saved configuration, with all that was taken over from it."""

    def __str__(self) -> str:
        return "the directory of a run"

    def holds(self, value: object) -> bool:
        return isinstance(value, Part) and isinstance(value.name, str) and value.name != ""

    def read(self, word: Any) -> Any:
        if isinstance(word, str | PathLike):
            return Part(str(word))
        return Part(**{"name": word["name"], "settings": {k: v for k, v in word.items() if k != "name"}})


# None as a default is filled in by `resolve`, from the other choices.
OPTIONS: dict[str, dict[str, Setting]] = {
    "Bound": {
        "K": Setting(
            Whole(),
            None,
            "particles per datum (default "
            + ", ".join(f"{usual_particles(word)} for {word}" for word in OBJECTIVES)
            + ")",
            "INT",
        ),
        "M": Setting(Whole(), 1, "outer averages of the K-particle bound (default 1)", "INT"),
        "alpha": Setting(Number(), None, "order of the Renyi bound, only with renyi (default 0.5)", "NUMBER"),
        "partitions": Setting(
            Whole(), None, "terms of the sum, only with thermodynamic; 1 is the ELBO (default 10)", "INT"
        ),
        "beta": Setting(
            Beta(),
            None,
            "weight of the KL, only with elbo: a number, warmup:EPOCHS, cyclical:EPOCHS, capacity:NATS:EPOCHS, or "
            "constraint:NATS, adapted so that the KL is at most so many nats; above 1 a looser lower bound is "
            "maximised, below 1 what may exceed log p(x) (default 1)",
            "BETA",
        ),
    },
    "Model": {
        "latent_dim": Setting(
            Several(Whole()),
            None,
            "latent dimensions; for hierarchical and ladder one per layer from the data up (at each place, where its "
            "state is a grid, as of residual-conv), for auxiliary of z and a (default 50; 50,25; for two-stage and "
            "ex-post the first stage's)",
            "INT",
        ),
        "first": Setting(
            OfRun(),
            None,
            "a trained vae, the first stage of a two-stage or ex-post: its p(x|z) and q(z|x) are frozen, and what is "
            "trained is a second vae, of draws of q(z|x), or with ex-post a prior; data and likelihood are the first "
            "stage's",
            "RUN",
        ),
    },
    "Data": {
        "data": Setting(Text(), "digits", "a name (see above) or a .npz, .npy, .csv or folder of images", "NAME|PATH"),
        "data_root": Setting(Text(), None, "where torchvision's data sets are, or are downloaded to", "DIR"),
        "binarize": Setting(
            Words(("dynamic", "fixed", "threshold")),
            None,
            "grey levels to bits for a Bernoulli likelihood: dynamic, fixed or threshold (default dynamic); validation "
            "and test rows are always fixed",
            "HOW",
        ),
        "condition": Setting(
            Text(),
            None,
            "what everything is given: label, for p(x) given the label, with samples of each class; columns of a .csv, "
            "which are then none of x; or both, as age,label; total, of counts the logarithm of each row's sum; a vae "
            "alone",
            "NAME[,NAME]",
        ),
        "labels": Setting(
            Whole(),
            None,
            "so many training rows have their label seen, as many of each class, drawn by the seed; only with m2 "
            "(default 100)",
            "INT",
        ),
        "stream": Setting(
            SWITCH,
            "auto",
            "read training rows of a .npy from the file at every step: auto (where they do not fit in memory), on or "
            "off (default auto)",
            "WHEN",
        ),
        "columns": Setting(
            Text(),
            None,
            "of a .csv with columns of several kinds: age=continuous,visits=count,job=categorical,sex=binary, and "
            "positive, heavy, fraction or ordinal; what is not named is guessed, which is said; auto: all of them; "
            "p(x) is then a density times a mass",
            "NAME=KIND,...",
        ),
        "missing": Setting(
            Flag(), False, "empty cells and NaN are values that are missing: bounds and log p are of what is seen"
        ),
        "standardize": Setting(Flag(), False, "centre and scale continuous columns by the training rows"),
    },
    "Training": {
        "epochs": Setting(Whole(), 100, "passes over the data (default 100)", "INT"),
        "batch_size": Setting(Whole(), 100, "rows per step (default 100)", "INT"),
        "lr": Setting(Number(above=0, below=1e37), 1e-3, "learning rate (default 0.001)", "NUMBER"),
        "optimizer": Setting(Text(), "Adam", "a class of torch.optim (default Adam)", "NAME"),
        "schedule": Setting(
            Words(("constant", "staged", "cosine")),
            "constant",
            "learning rate: constant, staged (3^i epochs each, as in the IWAE paper) or cosine (default constant)",
            "NAME",
        ),
        "patience": Setting(Whole(), None, "stop after so many epochs without a better validation bound", "INT"),
        "seed": Setting(Whole(0, 2**63 - 1), None, "of everything random (default: drawn, printed and stored)", "INT"),
        "device": Setting(Text(), "auto", "auto, cpu, cuda or cuda:N (default auto)", "NAME"),
        "compile": Setting(
            SWITCH,
            "auto",
            "compile the training step: auto (where the run is long enough to repay it), on or off (default auto)",
            "WHEN",
        ),
        "precision": Setting(
            Words(("fp32", "tf32", "bf16-mixed")),
            "fp32",
            "of matrix products and convolutions: fp32, tf32 (CUDA) or bf16-mixed; all else is in single precision "
            "(default fp32)",
            "NAME",
        ),
        "particle_chunk": Setting(
            Whole(), None, "draw so many of the K particles at a time, to save memory; the gradient is of all", "INT"
        ),
        "threads": Setting(
            THREADS,
            "auto",
            "processor threads: a number, or auto, fewer where other programs keep the machine busy (default auto)",
            "INT|auto",
        ),
    },
    "Evaluation": {
        "eval_K": Setting(Whole(), 1000, "particles for the test log p(x) at the end (default 1000)", "INT"),
        "eval_rows": Setting(Whole(), 1000, "test rows it is computed on, the first ones (default 1000)", "INT"),
    },
}
SETTINGS = {name: setting for group in OPTIONS.values() for name, setting in group.items()}
# What a run adds to the options in its config.yaml.
DERIVED = ("data_hash", "event_shape", "classes", "levels", "version")
# What may differ between a run and its resumption.
RESUMABLE = ("epochs", "patience", "eval_K", "eval_rows", "device", "compile", "particle_chunk", "threads", "stream")
# Of evaluate and compare alike.
FRECHET = (
    "the Frechet distance between the rows and as many draws of x, on features of a classifier of the labels that is "
    "trained first, the same for the same rows; no likelihood"
)
