"""Priors on MNIST at equal training time: log p(x) of the same test rows, over three seeds.

    python benchmarks/priors.py runs/priors --mnist ROOT [--epochs 20] [--seeds 3] [--rows 1000] [--K 1000]

Five models of one network (784-200-200-40, tanh; bits drawn anew at every step, the ELBO, Adam at 1e-3, batches of
100):

    standard    N(0, I)
    mixture     100 Gaussians with diagonal covariance
    vamp        a VampPrior of 100 pseudo-inputs
    flow        a RealNVP flow of 6 couplings
    ex-post     `standard` at 7/10 of its epochs, then a flow fitted to its codes in the time that is left

Training time is that of the processor. Other programs may share the machine, so it is not read from a clock while
models are trained: the time of a compiled step of each model is measured first, all models in turn in one process,
and the numbers of epochs are those that take as long as `--epochs` of `standard`. The seconds that training took are
in the table as well. Every run is a directory that the same command goes on with after it was stopped.

It writes benchmarks/results/priors.csv, .md and .png. For a model and `standard`, d is the difference of log p(x), row
by row, averaged over the seeds, and

    error^2  =  Var(d) / rows  +  Var(means of the seeds' differences) / seeds
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

import pyrovae
from pyrovae.inference.estimate import standard_error
from pyrovae.inference.training.trainer import fit
from pyrovae.runs.build import build_objective, build_optimizer
from pyrovae.runs.comparison import Scored, score_run
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.scoring import Scoring, rows_of
from pyrovae.runs.training import prepare

RESULTS = Path(__file__).parent / "results"
FIRST = 0.7  # share of the training time of `ex-post` that its first stage has
STEPS, ROUNDS = 60, 5  # of a measurement, and how many there are of each model
COMPONENTS = 100
PRIORS: dict[str, dict[str, Any]] = {
    "standard": {"name": "StandardNormal"},
    "mixture": {"name": "MixtureOfGaussians", "components": COMPONENTS},
    "vamp": {"name": "VampPrior", "components": COMPONENTS},
    "flow": {"name": "FlowPrior"},
    "ex-post": {"name": "FlowPrior"},
}
TITLES = {
    "standard": "N(0, I)",
    "mixture": f"mixture of {COMPONENTS} Gaussians",
    "vamp": f"VampPrior, {COMPONENTS} pseudo-inputs",
    "flow": "flow, trained with the pair",
    "ex-post": "flow, fitted afterwards",
}


def options(name: str, seed: int, root: str, first: Path | None = None) -> dict[str, Any]:
    """Of a run, but for its epochs."""
    common = {
        "prior": PRIORS[name],
        "seed": seed,
        "compile": "on",
        "device": "cpu",
        "threads": 1,
        "eval_rows": 20,
        "eval_K": 20,
    }
    if first is not None:
        return {**common, "model": "ex-post", "first": str(first)}
    mnist = {"data": "mnist", "data_root": root, "likelihood": "bernoulli", "binarize": "dynamic"}
    return {**common, **mnist, "latent_dim": [40]}


def trained(directory: Path, chosen: dict[str, Any], say: Callable[[str], object]) -> Run:
    """A run, trained to its end; the seconds of the processor that its training took are beside it."""
    if (directory / "evaluation.json").exists():
        return open_run(directory)
    resume = (directory / "config.yaml").exists()
    say(f"{'resuming' if resume else 'training'} {directory.name} for {chosen['epochs']} epochs")
    started = time.process_time()
    run = pyrovae.train({} if resume else chosen, directory, resume=resume, plots=False)
    if not resume:  # else it is unknown
        (directory.parent / f"{directory.name}.seconds").write_text(f"{time.process_time() - started:.1f}")
    return run


# -- How long a step takes ---------------------------------------------------------------------------------------------


def step_times(root: str, first: Path) -> dict[str, float]:
    """Processor milliseconds of a compiled step of each model, the median of all rounds."""
    found: dict[str, list[float]] = {name: [] for name in PRIORS}
    prepared = {
        name: prepare(
            Recipe(**options(name, 1, root, first if name == "ex-post" else None)), None, False, lambda text: None
        )
        for name in PRIORS
    }
    for _ in range(ROUNDS):
        for name, run in prepared.items():
            found[name] += measured(run)
    return {name: 1000 * statistics.median(times) for name, times in found.items()}


def measured(prepared: Any) -> list[float]:
    """Processor seconds of single steps; the first ones are left out."""
    recipe, rows, model = prepared.run.recipe, prepared.rows, prepared.model
    ends: list[float] = []

    def stop() -> bool:
        ends.append(time.process_time())
        return len(ends) > STEPS

    fit(
        model.model, model.guide, rows.train, build_objective(recipe), transform=rows.transform, epochs=1, seed=1,
        optimizer=build_optimizer(recipe), compile="on", threads=1, progress=False, should_stop=stop,
    )  # fmt: skip
    return [after - before for before, after in pairwise(ends[5:])]


def epochs_of(times: dict[str, float], epochs: int) -> dict[str, int]:
    """Epochs that take as long as so many of `standard`; of `ex-post`, in what its first stage leaves."""
    left = epochs - first_epochs(epochs)
    return {
        name: max(1, round((left if name == "ex-post" else epochs) * times["standard"] / ms))
        for name, ms in times.items()
    }


def first_epochs(epochs: int) -> int:
    """Epochs of the first stage of `ex-post`."""
    return round(FIRST * epochs)


# -- What came of it ---------------------------------------------------------------------------------------------------


def compared(scored: dict[str, Scored], seconds: dict[str, list[float]], epochs: dict[str, int]) -> pd.DataFrame:
    """One line for each model: log p(x), and its paired difference to `standard`, in nats per datum."""
    plain, records = scored["standard"], []
    for name, entry in scored.items():
        seeds = len(entry.results)
        difference = entry.estimate - plain.estimate
        means = [ours - theirs for ours, theirs in zip(entry.means, plain.means, strict=True)]
        over_seeds = statistics.variance(means) / seeds if seeds > 1 else 0.0
        records.append(
            {
                "model": TITLES[name],
                "epochs": epochs[name],
                "seconds": statistics.mean(seconds[name]) if seconds[name] else math.nan,
                "log_marginal": entry.estimate.mean().item(),
                "error": standard_error(entry.estimate),
                "difference": difference.mean().item(),
                "difference_error": math.hypot(standard_error(difference), math.sqrt(over_seeds)),
                "differences": means,
                "elbo": entry.elbo,
                "monte_carlo_error": entry.monte_carlo_error,
                "verdict": entry.verdict.kind.value,
                "reason": entry.verdict.reason,
            }
        )
    return pd.DataFrame(records)


def in_words(table: pd.DataFrame, times: dict[str, float], about: str) -> str:
    """The record, as Markdown."""
    lines = [
        "# Priors on MNIST at equal training time",
        "",
        "Written by `python benchmarks/priors.py`. " + about,
        "",
        "| prior | ms/step | epochs | processor s | log p(x) | less N(0, I) | by seed | ELBO | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, ms), row in zip(times.items(), table.to_dict("records"), strict=True):
        by_seed = ", ".join(f"{value:+.2f}" for value in row["differences"])
        less = "" if name == "standard" else f"{row['difference']:+.2f} ± {row['difference_error']:.2f}"
        spent = "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['model']} | {ms:.2f} | {row['epochs']} | {spent} | {row['log_marginal']:.2f} ± "
            f"{row['error']:.2f} | {less} | {'' if name == 'standard' else by_seed} | {row['elbo']:.2f} | "
            f"{row['verdict']} |"
        )
    reasons = "; ".join(f"{row['model']}: {row['reason']}" for row in table.to_dict("records"))
    return "\n".join([*lines, "", f"Verdicts, in full: {reasons}.", ""])


def draw(table: pd.DataFrame, path: Path) -> None:
    """The differences to `standard`, seed by seed, with 95 % intervals of their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    others = table.iloc[1:]
    for place, row in enumerate(others.to_dict("records")):
        axes.errorbar(row["difference"], place, xerr=1.96 * row["difference_error"], fmt="o", color="C0", capsize=4)
        axes.plot(row["differences"], [place + 0.22] * len(row["differences"]), "|", color="0.45", markersize=9)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(others)), others["model"])
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_xlabel("log p(x) less that of N(0, I), nats per datum\n95 % intervals; bars: single seeds")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--mnist", required=True, metavar="ROOT", help="where torchvision has MNIST")
    parser.add_argument("--epochs", type=int, default=20, help="of the standard prior")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    parser.add_argument("--K", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    """Measure steps, train, score, write."""
    asked = arguments()
    folder: Path = asked.directory
    folder.mkdir(parents=True, exist_ok=True)
    begun = trained(folder / "begun", {**options("standard", 0, asked.mnist), "epochs": 1}, print)
    kept = folder / "steps.json"
    if not kept.exists():
        kept.write_text(json.dumps(step_times(asked.mnist, begun.directory)))
    times: dict[str, float] = json.loads(kept.read_text())
    epochs = epochs_of(times, asked.epochs)
    print({name: f"{ms:.2f} ms, {epochs[name]} epochs" for name, ms in times.items()}, flush=True)

    rows = None
    results: dict[str, list[Any]] = {name: [] for name in PRIORS}
    seconds: dict[str, list[float]] = {name: [] for name in PRIORS}
    for seed in range(1, asked.seeds + 1):
        first = folder / f"first-{seed}"
        short = options("standard", seed, asked.mnist) | {"epochs": first_epochs(asked.epochs)}
        trained(first, short, print)
        for name in PRIORS:
            of = options(name, seed, asked.mnist, first if name == "ex-post" else None)
            run = trained(folder / f"{name}-{seed}", {**of, "epochs": epochs[name]}, print)
            stages = [f"first-{seed}", f"{name}-{seed}"] if name == "ex-post" else [f"{name}-{seed}"]
            taken = [folder / f"{stage}.seconds" for stage in stages]
            if all(path.exists() for path in taken):
                seconds[name].append(sum(float(path.read_text()) for path in taken))
            rows = rows or run.rows()
            batch = rows_of(rows, "test", asked.rows)
            results[name].append(score_run(run, rows, batch, Scoring(asked.K), print))
            print(f"{name}-{seed}: {results[name][-1][0].mean:.3f}", flush=True)
    scored = {name: Scored(TITLES[name], *zip(*found, strict=True)) for name, found in results.items()}
    table = compared(scored, seconds, epochs)
    assert rows is not None
    about = (
        f"784-200-200-40, {len(rows.train)} training rows, {rows.measure.description}; log p(x) in nats per datum of "
        f"the first {asked.rows} test rows (one fixed binarisation), K = {asked.K}, means over "
        f"{asked.seeds} seed{'s' if asked.seeds > 1 else ''}, ± over rows; "
        "differences paired by row and seed, ± over rows and seeds."
    )
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "priors.csv", index=False)
    (RESULTS / "priors.md").write_text(in_words(table, times, about))
    draw(table, RESULTS / "priors.png")
    print(in_words(table, times, about))


if __name__ == "__main__":
    main()
