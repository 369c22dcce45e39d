"""The gradients of a run: how biased and how noisy each estimator is, as a table, a CSV and a figure."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyrovae.errors import PairError, UsageError
from pyrovae.processors import pick_device
from pyrovae.runs.directory import Run
from pyrovae.runs.options import BOUNDS, GRADIENTS, OBJECTIVES
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.report import Report
from pyrovae.runs.scoring import rows_of

if TYPE_CHECKING:
    import pandas as pd

    from pyrovae.inference.batch import Batch
    from pyrovae.inference.objectives import OfParticles
    from pyrovae.inference.pair import Pair

SEEN = 3  # the t of a bias that is said to be one
# What others are compared with, the best first: unbiased, of whatever bound has it and whatever pair it is for.
REFERENCES = ("enumerated", "reparameterised", "leave-one-out", "score-function")


def analyse(
    run: Run,
    ks: Sequence[int],
    elbo: str | None = None,
    words: Sequence[str] | None = None,
    limit: int = 20,
    draws: int = 200,
    split: str = "test",
    seed: int = 0,
    device: str = "auto",
    say: Say | None = None,
) -> Report:
    """Draw gradients of a run's bound, or another, by every estimator that is of it, for each number of particles.

    The bound is plain: with beta = 1, and M = 1.

    Raises:
        UsageError: the run has no bound, or none of the estimators is for its pair.
    """
    from pyrovae.inference.noise import elements
    from pyrovae.inference.pair import Pair

    recipe = run.recipe
    if not recipe.elbo:
        raise UsageError(f"{run.directory}: holds a {recipe.model.name}, which has no bound and so no gradient of one")
    elbo = elbo or (recipe.elbo.name if recipe.elbo.name in BOUNDS else BOUNDS[0])
    known = OBJECTIVES[elbo].constants["gradients"]
    for word in words or ():
        if word not in known:
            raise UsageError(
                f"gradients: {word} is not of {elbo}, which has {', '.join(known)}", settings=("gradients",)
            )
    place, rows = pick_device(device), run.rows()
    batch = rows_of(rows, split, limit).to(place)
    model = run.model(place)
    pair = Pair(model.model, model.guide)
    places = elements(pair, batch, seed)
    records: list[Report] = []
    refused: dict[str, list[int]] = {}
    for k in ks:
        of_k, why = at(pair, batch, recipe, elbo, k, words or known, places, draws, seed, say or silent)
        records += of_k
        for reason in why:
            refused.setdefault(reason, []).append(k)
    if not records:
        raise UsageError(f"gradients: none is for this pair: {'; '.join(refused)}")
    values = {
        "bound": elbo,
        "unit": "nats per datum",
        "measure": rows.measure.description,
        "split": split,
        "rows": len(batch),
        "draws": draws,
        "elements": {side: sum(map(len, of.values())) for side, of in places.items()},
        "gradients": records,
        "refused": refused,
        "seed": seed,
        "device": place.type,
        "data_hash": rows.hash,
    }
    run.keep("gradients.json", values, say)
    return values


def at(
    pair: "Pair",
    batch: "Batch",
    recipe: Any,
    elbo: str,
    k: int,
    words: Sequence[str],
    places: Any,
    draws: int,
    seed: int,
    say: Say,
) -> tuple[list[Report], list[str]]:
    """What is said of each estimator with K particles, and why others are refused."""
    from pyrovae.inference.noise import gradients, noise_of

    found, objectives, refused = {}, {}, list[str]()
    known = OBJECTIVES[elbo].constants["gradients"]
    for word in dict.fromkeys((*(w for w in REFERENCES if w in known), *words)):
        if word not in words and any(w in found for w in REFERENCES):
            continue  # only to be compared with, and another is there
        try:
            objectives[word] = build(recipe, elbo, k, word)
            found[word] = gradients(pair, batch, objectives[word], places, draws, seed)
        except (UsageError, PairError) as error:
            refused.append(str(error))
            continue
        say(f"{draws} gradients of {elbo}, K = {k}, {word}")
    reference = next((word for word in REFERENCES if word in found), None)
    if reference is None:
        return [], refused
    return [
        {
            "gradient": word,
            "K": k,
            "parameters": side,
            "reference": reference,
            "why_biased": objectives[word].gradient.bias(objectives[word]),
            **asdict(noise_of(drawn, found[reference][side], seed)),
        }
        for word in words
        if word in found
        for side, drawn in found[word].items()
    ], refused


def build(recipe: Any, elbo: str, k: int, word: str) -> "OfParticles":
    """The plain bound with an estimator; of the run's own, with its settings."""
    own = recipe.gradient.settings if recipe.gradient.name == word else {}
    given = {"alpha": 0.5 if recipe.alpha is None else recipe.alpha, "partitions": recipe.partitions or 10}
    gradient = GRADIENTS[word].classes[0].build("gradient", own)
    made: OfParticles = OBJECTIVES[elbo].classes[0].build("elbo", {}, num_particles=k, gradient=gradient, **given)
    return made


def table(values: Report) -> "pd.DataFrame":
    """A row for each estimator, K and side, as gradients.csv has them."""
    import pandas as pd

    records = []
    for record in values["gradients"]:
        flat = {key: record[key] for key in ("gradient", "K", "parameters")}
        for name in ("variance", "snr"):
            flat |= {
                name: record[name]["value"],
                f"{name}_low": record[name]["low"],
                f"{name}_high": record[name]["high"],
            }
        records.append(flat | {key: record[key] for key in ("bias", "bias_t", "reference", "why_biased")})
    return pd.DataFrame(records)


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    looked = ", ".join(f"{count} of the {side}'s" for side, count in values["elements"].items())
    lines = [
        f"{name}: gradients of {values['bound']}, mean of {values['rows']} {values['split']} rows, {values['measure']}",
        f"{values['draws']} draws; of {looked} parameters; [95 % intervals over draws]",
    ]
    for side in values["elements"]:
        lines += ["", f"  {side + ', by':<24}{'K':>5}  {'variance':<32}{'signal to noise':<24}{'bias':>8}{'t':>8}"]
        for record in (r for r in values["gradients"] if r["parameters"] == side):
            spread, snr = (between(record[key]) for key in ("variance", "snr"))
            t, bias = record["bias_t"], record["bias"]
            compared = f"{f'{bias:.0%}' if abs(t) > SEEN else 'none':>8}{t:>8.1f}"
            compared = compared if record["gradient"] != record["reference"] else f"{'-':>8}{'-':>8}"
            lines.append(f"  {record['gradient']:<24}{record['K']:>5}  {spread:<32}{snr:<24}{compared}")
    references = " or ".join(sorted({r["reference"] for r in values["gradients"]}))
    lines += [
        "",
        f"  bias: |E (g - r)| / |E r| and its t; r by {references}, on the same noise; none: |t| <= {SEEN}.",
        "  Signal to noise: of the mean square over parameters what D draws of no signal would show is taken off.",
    ]
    biased = {r["gradient"]: r["why_biased"] for r in values["gradients"] if r["why_biased"]}
    lines += [f"  {word} is biased: {why}." for word, why in biased.items()]
    lines += [f"  K = {', '.join(map(str, ks))}: {why}" for why, ks in values["refused"].items()]
    return "\n".join(lines)


def between(interval: Report) -> str:
    """A number and its interval, three digits of each."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    return "not finite" if not math.isfinite(value) else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def save(run: Run, values: Report) -> None:
    """Write gradients.csv and plots/gradients.png."""
    from pyrovae import plots
    from pyrovae.files import inside, write_atomically
    from pyrovae.runs.figures import save_figure

    found, text = table(values), io.StringIO()
    found.to_csv(text, index=False)
    write_atomically(run.directory / "gradients.csv", text.getvalue())
    title = f"{run.name}, gradients of {values['bound']}, {values['rows']} {values['split']} rows"
    save_figure(plots.gradient_noise(found, title), inside(run.directory, "plots"), "gradients")
