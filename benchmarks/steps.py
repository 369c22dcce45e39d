"""The time of a compiled training step with every part, against the plain pair and against the same written by hand.

    python benchmarks/steps.py                                all rows that benchmarks/results/steps.csv does not have
    python benchmarks/steps.py --only SplineFlow,ladder       these rows anew
    python benchmarks/steps.py --table                        the tables anew, of what was measured before

A row is a pair with one part (or two that go together) in the place of the plain one: a prior, guide, likelihood,
bound, gradient estimator, network, corruption or model, at its usual settings. The plain pair is N(0, I), a diagonal
Gaussian guide and a Bernoulli likelihood (a Gaussian one, for rows of real numbers, levels, counts and tables),
784-200-200-50, tanh, batch 100, the ELBO with K = 1, Adam at 1e-3. Of each there are

    step             milliseconds of the processor for a compiled step of pyrovae, update included
    / plain          that over the plain pair's
    / by hand        that over the same pair's in plain torch (`peers/parts_by_hand.py`, `peers/pairs_by_hand.py`), with
                     its loss compiled by torch.compile on the same noise, fused Adam, denormal numbers flushed
    eager / plain    both without compiling
    compiling        seconds of the processor, of the children that compile as well, for the first step less a later
                     one: where the compiler's headers are ready, and nothing of the row has been compiled before
                     (but for rows that are a plain pair, whose code is there)

Before anything is timed, the loss and every gradient by hand are compared with the pair's own on the same noise; a row
where they differ is not measured.

Contestants are in one process with one thread and take turns of `--steps` steps, in an order drawn anew for each of
`--rounds` rounds, of which the first step does not count. Time is that of the processor and not of a clock, so that
programs beside it do not count; what they do to caches and clock rates is the same for all who take turns. A round
gives a ratio of medians; what is reported is the median of the rounds' ratios, with the order statistics that are a
confidence interval of 95 % for it, whatever the distribution.

Results go to --out row by row, so that a run that was stopped goes on where it was; its table goes to docs/speed.md.
"""

import argparse
import csv
import gc
import math
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

import torch  # noqa: E402
from pairs_by_hand import by_hand  # noqa: E402
from torch import Tensor  # noqa: E402

from pyrovae.errors import PyrovaeError  # noqa: E402
from pyrovae.inference.batch import Batch  # noqa: E402
from pyrovae.inference.pair import Pair  # noqa: E402
from pyrovae.inference.training.optimizers import adam  # noqa: E402
from pyrovae.inference.training.step import Step  # noqa: E402
from pyrovae.runs.build import build_model, build_objective  # noqa: E402
from pyrovae.runs.options import EXACT, GRADIENTS, OBJECTIVES, PARTS, STAGED  # noqa: E402
from pyrovae.runs.parts import Choices  # noqa: E402
from pyrovae.runs.recipe import Recipe  # noqa: E402
from pyrovae.seeding import seeded  # noqa: E402

RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "speed.md"
MARKS = "<!-- written by benchmarks/steps.py -->", "<!-- to here -->"
BATCH, ROWS_OF_DATA = 100, 55_000
WIDTH, IMAGE, LEVELS, FEW_LEVELS, CATEGORIES, CLASSES = 784, (1, 28, 28), 256, 8, 10, 10
KINDS = {"a": ("continuous", 16), "b": ("binary", 8), "c": ("count", 8), "d": ("categorical:5", 8)}
TABLE = ",".join(f"{letter}{i}={kind}" for letter, (kind, number) in KINDS.items() for i in range(number))
# What is there to choose from; the first of each is the plain pair's, of likelihoods the first of a space.
CHOICES = {**PARTS, "elbo": OBJECTIVES, "gradient": GRADIENTS}
# Parts whose step is none of a pair's, and why.
NO_STEP = {
    **dict.fromkeys(Choices(EXACT), "has no guide: fit by EM, in closed form, or by its exact log p(x)"),
    **dict.fromkeys(Choices(STAGED), "a step is that of its second stage, after a first that is trained before"),
    "pca": "fit in closed form",
    "perceptual": "of the features of a classifier, which is trained before",
}
# Of a likelihood or a prior, what else a pair with it has.
Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        part: What kind of part it is a row of.
        name: Its name.
        options: Of a recipe, beside the plain ones.
        space: What x is: bits, grey, levels, few-levels, counts, positive, table or gaps.
        also: Other parts that have no other row.
        note: What else there is to say.
    """

    part: str
    name: str
    options: Options = field(default_factory=dict)
    space: str = "bits"
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def plain(self) -> "Row":
        """The row that it is compared with: of rows of the same shape."""
        if self.space == "bits":
            return PLAIN
        of_table = self.space == "table"
        return Row(
            "",
            "plain, table" if of_table else "plain, density",
            {"likelihood": "Gaussian"},
            "grey40" if of_table else "grey",
        )


PLAIN = Row("", "plain")
WARM = Row("", "warm", {"elbo": "iwae", "network": {"name": "mlp", "hidden": [8]}})
BITS: Options = {"prior": "IndependentBernoulli", "guide": "BernoulliGuide"}
CATEGORY: Options = {"prior": "CategoricalPrior", "guide": "CategoricalGuide", "latent_dim": [CATEGORIES]}
# What a choice needs beside itself. Others are in the place of the plain pair's part, and nothing else is changed.
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("prior", "IndependentBernoulli"): {
        "options": {**BITS, "gradient": "score-function"},
        "also": ("guide BernoulliGuide", "gradient score-function"),
        "note": "bits, by the score function",
    },
    ("prior", "CategoricalPrior"): {
        "options": {**CATEGORY, "gradient": "enumerated"},
        "also": ("guide CategoricalGuide", "gradient enumerated"),
        "note": f"{CATEGORIES} categories, summed out",
    },
    ("prior", "HierarchicalVampPrior"): {
        "options": {"model": "hierarchical", "prior": "HierarchicalVampPrior"},
        "note": "two layers, 50 and 25",
    },
    ("prior", "OrnsteinUhlenbeck"): {
        "options": {"prior": {"name": "OrnsteinUhlenbeck", "steps": 10}},
        "note": "10 steps",
    },
    ("prior", "Markov"): {"options": {"prior": {"name": "Markov", "steps": 10}}, "note": "10 steps"},
    ("prior", "GatedMarkov"): {"options": {"prior": {"name": "GatedMarkov", "steps": 10}}, "note": "10 steps"},
    ("guide", "MarkovGuide"): {
        "options": {"prior": "Markov", "guide": "MarkovGuide", "network": "steps", "latent_dim": [56]},
        "note": "28 steps of 28, Z = 2 for each",
    },
    ("prior", "AmortisedPrior"): {"options": {"prior": "AmortisedPrior", "condition": "label"}, "note": "10 classes"},
    ("prior", "ConditionalVampPrior"): {
        "options": {"prior": "ConditionalVampPrior", "condition": "label"},
        "note": "10 classes, 20 pseudo-inputs for each row",
    },
    ("gradient", "leave-one-out"): {
        "options": {**BITS, "elbo": "iwae", "gradient": "leave-one-out"},
        "note": "VIMCO, bits, K = 5",
    },
    ("gradient", "wake-sleep"): {"options": {**BITS, "elbo": "iwae", "gradient": "wake-sleep"}, "note": "bits, K = 5"},
    ("gradient", "relaxed"): {"options": {**BITS, "gradient": "relaxed"}, "note": "bits"},
    ("gradient", "covariance"): {
        "options": {**BITS, "elbo": "thermodynamic", "gradient": "covariance"},
        "note": "bits, K = 5",
    },
    ("gradient", "doubly-reparameterised"): {
        "options": {"elbo": "iwae", "gradient": "doubly-reparameterised"},
        "note": "IWAE, K = 5",
    },
    ("gradient", "vr-max"): {"options": {"elbo": "iwae", "gradient": "vr-max"}, "note": "IWAE, K = 5"},
    ("model", "autoencoder"): {"note": "no prior and no guide"},
    ("model", "hierarchical"): {"note": "two layers, 50 and 25"},
    ("model", "ladder"): {"note": "two layers, 50 and 25"},
    ("model", "auxiliary"): {"note": "z of 50, a of 25"},
    ("elbo", "vae-gan"): {
        "options": {"elbo": "vae-gan", "likelihood": {"name": "Gaussian", "scale": "optimal"}},
        "space": "grey",
        "note": "a discriminator of the encoder's layers",
    },
    ("network", "residual-conv"): {"note": "1x28x28"},
    ("network", "conv"): {"note": "32 and 64 channels, 1x28x28"},
    ("network", "sequence"): {
        "options": {"network": "sequence", "latent_dim": [56]},
        "note": "28 steps of 28, Z = 2 for each",
    },
    ("network", "steps"): {
        "options": {"network": "steps", "latent_dim": [56]},
        "note": "28 steps of 28, Z = 2 for each",
    },
    ("likelihood", "Gaussian"): {"space": "grey"},
    ("likelihood", "ContinuousBernoulli"): {"space": "grey"},
    ("likelihood", "Laplace"): {"space": "grey"},
    ("likelihood", "StudentT"): {"space": "grey"},
    ("likelihood", "Beta"): {"space": "grey"},
    ("likelihood", "LogNormal"): {"space": "grey"},
    ("likelihood", "DiscretizedLogistic"): {"space": "levels", "note": f"{LEVELS} levels"},
    ("likelihood", "DiscretizedLogisticMixture"): {"space": "levels", "note": f"{LEVELS} levels, 5 components"},
    ("likelihood", "Categorical"): {"space": "few-levels", "note": f"{FEW_LEVELS} levels"},
    ("likelihood", "Columns"): {
        "space": "table",
        "options": {"likelihood": "Columns", "columns": TABLE},
        "note": "40 columns: 16 continuous, 8 of each other kind",
    },
}
# Rows of what is no part by itself.
MORE = (
    Row("condition", "label", {"condition": "label"}, note="ConditionalVAE, N(0, I), 10 classes"),
    Row(
        "missing",
        "gaps",
        {"likelihood": "Gaussian", "missing": True},
        "gaps",
        note="a fifth of the elements missing",
    ),
    Row("likelihood", "Gaussian, scale predicted", {"likelihood": {"name": "Gaussian", "scale": "predicted"}}, "grey"),
)
# What may be slow comes first; what takes minutes to compile comes last.
LAST = ("conv", "residual-conv", "NeuralSplinePrior", "SplineFlow", "DiscretizedLogisticMixture", "MarkovGuide")
FIRST = (
    "Beta", "Gaussian", "LogNormal", "ladder", "IndependentBernoulli", "AutoregressivePrior", "relaxed", "free-bits",
    "leave-one-out", "Laplace", "StudentT", "thermodynamic", "iwae", "beta-tc", "Categorical", "hierarchical", "Markov",
    "MixtureOfGaussians", "FlowPrior", "PlanarFlow", "SylvesterFlow", "InverseAutoregressiveFlow", "CategoricalPrior",
    "Columns", "ZeroInflatedNegativeBinomial", "auxiliary", "Poisson", "gaps", "FullCovarianceNormal", "LowRankNormal",
    "NegativeBinomial", "StudentTPrior", "DiscretizedLogistic", "sticking-the-landing", "doubly-reparameterised",
    "VampPrior", "SemiAmortised", "MixtureOfNormals",
)  # fmt: skip


def rows() -> list[Row]:
    """All of them: every choice of every part, but for those that have no step of their own."""
    found = [PLAIN, *MORE]
    covered = {also for special in SPECIAL.values() for also in special.get("also", ())}
    for part, choices in CHOICES.items():
        for i, (name, choice) in enumerate(choices.items()):
            plain = (i == 0 and part != "likelihood") or name == "Bernoulli"
            if plain or name in NO_STEP or f"{part} {name}" in covered:
                continue
            special = SPECIAL.get((part, name), {})
            counts = part == "likelihood" and choice.measure == "counts"
            found.append(
                Row(part, name, **{"options": {part: name}, "space": "counts" if counts else "bits", **special})
            )
    order = {name: i for i, name in enumerate(("plain", *FIRST))} | {name: len(found) for name in LAST}
    return sorted(found, key=lambda row: order.get(row.name, len(order)))


# ----------------------------------------------------------------------------------------------------- what is measured


def data(row: Row, shape: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Made-up rows x (100, *event) of a row's space, and what the pair is given."""
    level = torch.rand(1, *shape) ** 2  # of each element, so that there is something to learn
    x = (level + 0.15 * torch.randn(BATCH, *shape)).clamp(1e-3, 1 - 1e-3)
    if row.space == "bits":
        x = (torch.rand(BATCH, *shape) < level).float()
    elif row.space in ("levels", "few-levels"):
        x = ((LEVELS if row.space == "levels" else FEW_LEVELS) * x).floor()
    elif row.space == "counts":
        x = torch.poisson(10 * level * torch.distributions.Gamma(2.0, 2.0).sample((BATCH, *shape)))
    elif row.space == "gaps":
        x = x.masked_fill(torch.rand_like(x) < 0.2, math.nan)
    elif row.space == "table":
        a, b, c, d = x.split([16, 8, 8, 8], 1)
        x = torch.cat([a, (b > 0.5).float(), (5 * c).floor(), (5 * d).floor()], 1)
    given = (torch.nn.functional.one_hot(torch.arange(BATCH) % CLASSES, CLASSES).float(),)
    return x, given if row.options.get("condition") else ()


def shape_of(row: Row) -> tuple[int, ...]:
    """The event shape of x."""
    if row.space in ("table", "grey40"):
        return (40,)
    network = row.options.get("network")
    return {"conv": IMAGE, "residual-conv": IMAGE, "sequence": (28, 28), "steps": (28, 28)}.get(str(network), (WIDTH,))


def declared(row: Row, small: Options | None = None) -> tuple[Any, Any, Tensor, tuple[Tensor, ...]]:
    """Of a row the model, the objective, x and what is given; the same at every call.

    Args:
        row: The row.
        small: Options of a smaller pair.
    """
    with seeded(0, "steps", row.name):
        x, given = data(row, shape_of(row))
        options = {"data": "made up", "likelihood": "Bernoulli", **row.options, **(small or {})}
        classes = tuple(map(str, range(CLASSES))) if given else ()
        levels = {"levels": LEVELS, "few-levels": FEW_LEVELS}.get(row.space, 0)
        recipe = Recipe(**options).settled(event_shape=shape_of(row), classes=classes, levels=levels)
        model: Any = build_model(recipe, shape_of(row))
        model.initialise(x, *given)
        return model, build_objective(recipe, 1, ROWS_OF_DATA), x, given


class OfPair:
    """A training step of pyrovae, as `fit` takes it."""

    def __init__(self, row: Row, compiled: bool) -> None:
        model, objective, x, given = declared(row)
        pair, self.batch = Pair(model.model, model.guide), Batch.of(x, given)
        self.refused: list[str] = []
        trained = adam(list(pair.trainable().values()))
        self.step = Step(objective, pair, trained, compiled=compiled, on_refusal=self.refused.append)

    def __call__(self) -> None:
        self.step(self.batch, 0)


class OfHand:
    """A training step by hand: the loss compiled, Adam fused."""

    def __init__(self, row: Row) -> None:
        model, objective, *self.batch = declared(row)
        loss = by_hand(model, objective)
        # With the eager generator, as pyrovae has it: the compiler's own is slower on a CPU.
        self.loss_of = torch.compile(loss, options={"fallback_random": True})
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        x, given = self.batch
        loss = self.loss_of(x, *given)
        loss.backward()
        self.optimizer.step()
        loss.item()


def written_by_hand(row: Row) -> bool:
    """Whether there is a counterpart by hand: not of a part that is new, or cannot be declared by its name alone."""
    try:
        model, objective, *_ = declared(row)
        by_hand(model, objective)
    except (KeyError, PyrovaeError):
        return False
    return True


def disagreement(row: Row, small: Options | None = None) -> str:
    """In what the pair and the one by hand differ, on the same noise and in double precision; nothing: in nothing."""
    losses, gradients = [], []
    for ours in (True, False):
        model, objective, x, given = declared(row, small)
        model, x, given = model.double(), x.double(), tuple(y.double() for y in given)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with seeded(1, "steps"):
                if ours:
                    loss = objective.loss_of(Pair(model.model, model.guide), Batch.of(x, given))
                else:
                    loss = by_hand(model, objective)(x, *given)
        finally:
            torch.set_default_dtype(default)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    if not math.isclose(*losses, rel_tol=1e-6):
        return f"the loss is {losses[0]:.6f}, by hand {losses[1]:.6f}"
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        size = max(ours.abs().max().item(), 1e-6 * abs(losses[0]))
        if (ours - theirs).abs().max().item() > 1e-4 * size:
            return f"the gradient of {name} differs"
    return ""


# -------------------------------------------------------------------------------------------------------------- timing


def processor() -> float:
    """Seconds that this process and its children have had of the processor."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def started(contestant: Callable[[], None]) -> float:
    """Seconds of the processor for the first step, less a later one."""
    before = processor()
    contestant()
    between = processor()
    contestant()
    return 2 * between - before - processor()


def turn(contestant: Callable[[], None], steps: int) -> float:
    """Median seconds of the processor of so many steps, after one that does not count."""
    contestant()
    seconds = []
    for _ in range(steps):
        before = time.process_time()
        contestant()
        seconds.append(time.process_time() - before)
    return statistics.median(seconds)


def race(contestants: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """For each contestant the seconds of a step in each round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in random.Random(i).sample(list(contestants), len(contestants)):
            times[name].append(turn(contestants[name], steps))
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios, and order statistics that it lies between with 95 % confidence."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    n, tail, rank = len(found), 0.0, 0
    while rank < n // 2 and (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1  # fewer than `rank` of n fall below the median with at most 2.5 %
    low = max(rank - 1, 0)
    return statistics.median(found), found[low], found[n - 1 - low]


class Measuring:
    """Rows measured one after the other in this process; the plain pairs are compiled once."""

    def __init__(self, rounds: int, steps: int) -> None:
        self.rounds, self.steps = rounds, steps
        self.plains: dict[str, tuple[OfPair, OfPair]] = {}
        for contestant in (OfPair(WARM, compiled=True), OfHand(WARM)):  # to have the compiler's headers ready
            contestant()

    def plain(self, row: Row) -> tuple[OfPair, OfPair]:
        """The plain pair that a row is compared with, compiled and eager."""
        name = row.plain.name
        if name not in self.plains:
            self.plains[name] = OfPair(row.plain, compiled=True), OfPair(row.plain, compiled=False)
            for contestant in self.plains[name]:
                contestant()
        return self.plains[name]

    def __call__(self, row: Row) -> dict[str, Any]:
        """All figures of a row.

        Raises:
            ValueError: the pair and the one by hand are not the same, or the pair cannot be compiled.
        """
        hand = written_by_hand(row)
        if hand and (why := disagreement(row)):
            raise ValueError(why)
        plain, plain_eager = self.plain(row)
        pair, eager = OfPair(row, compiled=True), OfPair(row, compiled=False)
        contestants: dict[str, Callable[[], None]] = {"pair": pair, "plain": plain}
        compiling = {"pair": started(pair)}
        if pair.refused:
            raise ValueError(pair.refused[0])
        if hand:
            contestants["hand"] = OfHand(row)
            compiling["hand"] = started(contestants["hand"])
        times = race(contestants, self.rounds, self.steps)
        slow = race({"eager": eager, "plain": plain_eager}, 5, 3)
        found: dict[str, Any] = {"part": row.part, "name": row.name, "note": row.note, "compared with": row.plain.name}
        found |= {f"{name}, ms": 1e3 * statistics.median(values) for name, values in times.items()}
        found |= {"eager, ms": 1e3 * statistics.median(slow["eager"])}
        for name in ("plain", *["hand"] * hand):
            for word, value in zip(("", " low", " high"), ratio(times["pair"], times[name]), strict=True):
                found[f"/ {name}{word}"] = value
        found |= {"eager / plain": ratio(slow["eager"], slow["plain"])[0]}
        found |= {f"compiling {name}, s": value for name, value in compiling.items()}
        return found | {"rounds": self.rounds, "steps": self.steps}


# ------------------------------------------------------------------------------------------------------------- results

COLUMNS = (
    "part", "name", "note", "compared with", "pair, ms", "plain, ms", "hand, ms",
    "/ plain", "/ plain low", "/ plain high", "/ hand", "/ hand low", "/ hand high",
    "eager, ms", "eager / plain", "compiling pair, s", "compiling hand, s", "rounds", "steps",
)  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """What was measured before."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """All records, in the order of the parts."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in r.items()} for r in records)


def ordered(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By part, in the order of the tuples."""
    parts = ["", *CHOICES, *(row.part for row in MORE)]
    names = {(part, name): i for part, choices in CHOICES.items() for i, name in enumerate(choices)}
    return sorted(records, key=lambda r: (parts.index(r["part"]), names.get((r["part"], r["name"]), 99)))


def interval(record: dict[str, str], key: str) -> str:
    """A ratio with its interval."""
    low, high = (float(record[f"{key} {word}"]) for word in ("low", "high"))
    return f"{float(record[key]):.2f} ({low:.2f} to {high:.2f})"


def table(records: Sequence[dict[str, str]], whole: bool) -> list[str]:
    """A line for each row; of all figures, or of those that the documents show."""
    heads = ["part", "", "step, ms", "/ plain", "/ by hand"]
    heads += ["eager / plain", "compiling, s", "by hand, s"] if whole else []
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'---:|' * (len(heads) - 2)}"]
    for r in ordered(records):
        hand = bool(r["/ hand"])
        part = "bound" if r["part"] == "elbo" else r["part"]
        cells = [f"{part} `{r['name']}`" if part else r["name"], r["note"], f"{float(r['pair, ms']):.2f}"]
        cells += [f"{float(r['/ plain']):.2f}", interval(r, "/ hand") if hand else "–"]
        if whole:
            cells += [f"{float(r['eager / plain']):.2f}", f"{float(r['compiling pair, s']):.1f}"]
            cells += [f"{float(r['compiling hand, s']):.1f}" if hand else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(records: Sequence[dict[str, str]], machine: str) -> str:
    """The table, what has not been measured, and what has no counterpart by hand."""
    every, known = rows(), {(r["part"], r["name"]) for r in records}
    missing = [f"{row.part} {row.name}" for row in every if (row.part, row.name) not in known]
    without = [f"{row.part} {row.name}" for row in every if not written_by_hand(row)]
    lines = ["# Steps of each part", "", machine, ""]
    lines += [
        "Written by `python benchmarks/steps.py`, whose docstring says what is measured and how. Intervals: 95 %.",
        "",
    ]
    lines += [*table(records, whole=True), "", f"Not written by hand: {', '.join(without) or 'none'}.", ""]
    lines += [f"Not measured yet: {', '.join(missing)}.", ""] if missing else []
    lines += ["No step of their own:", "", *(f"- {name}: {why}" for name, why in NO_STEP.items())]
    return "\n".join(lines) + "\n"


def shown(page: Path, records: Sequence[dict[str, str]]) -> None:
    """Put the table into a page, between the two marks that it has."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    middle = "\n".join(["", "", *table(records, whole=False), "", ""])
    page.write_text(before + MARKS[0] + middle + MARKS[1] + after, encoding="utf-8")


def machine() -> str:
    """Processor, threads and versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    import pyrovae

    versions = f"python {platform.python_version()}, torch {torch.__version__}, pyrovae {pyrovae.__version__}"
    return f"{cpu}; 1 thread; {versions}"


def chosen(words: str | None, done: Sequence[dict[str, str]]) -> Iterator[Row]:
    """The rows that are named, or else those that were not measured."""
    known = {(r["part"], r["name"]) for r in done}
    wanted = None if words is None else words.split(",")
    every = rows()
    if wanted and (unknown := set(wanted) - {row.name for row in every}):
        sys.exit(f"no row {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in every)}")
    return (row for row in every if (row.name in wanted if wanted else (row.part, row.name) not in known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="rows by name, with commas between")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    given = parser.parse_args()
    path = given.out / "steps.csv"
    wanted = [] if given.table else list(chosen(given.only, read(path)))
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # so that nothing was compiled before
        measure(wanted, path, given.rounds, given.steps)
    (given.out / "steps.md").write_text(report(read(path), machine()), encoding="utf-8")
    if given.out == RESULTS:
        shown(PAGE, read(path))


def measure(wanted: Sequence[Row], path: Path, rounds: int, steps: int) -> None:
    """Measure rows and write the results of each."""
    if not wanted:
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    measuring = Measuring(rounds, steps)
    for row in wanted:
        try:
            found = measuring(row)
        except (ValueError, KeyError) as error:  # a part that cannot be declared by its name alone
            print(f"NOT MEASURED: {row.part} {row.name}: {error}", flush=True)
            continue
        before = [r for r in read(path) if (r["part"], r["name"]) != (row.part, row.name)]
        write(path, ordered([*before, found]))
        hand = f", / by hand {found['/ hand']:.3f}" if "/ hand" in found else ""
        print(f"{row.part} {row.name}: {found['pair, ms']:.2f} ms, / plain {found['/ plain']:.3f}{hand}", flush=True)
        torch._dynamo.reset()
        gc.collect()


if __name__ == "__main__":
    main()
