"""A hierarchy of five layers beside one latent layer: log p(x) of the same test rows, over three seeds.

    python benchmarks/deep.py runs/deep --mnist ROOT [--epochs 8] [--seeds 3] [--rows 1000] [--K 500]
    python benchmarks/deep.py runs/deep-digits --epochs 60

On MNIST, or on scikit-learn's 8 x 8 digits, which need no download: bits drawn anew at every step. Dense networks of
100 units (silu), the ELBO with its KL warmed up over a fifth of the epochs, Adam at 3e-3, batches of 200 (of the digits
50), 40 latent dimensions:

    1 layer             100-100-40
    5 layers            a ladder of 12, 8, 8, 6 and 6, which hands down a state of 100 numbers; `--model.merge relative`
    1 layer, as long    the first, for as many epochs as take the processor as long as those of the second

Every run is a directory that the same command goes on with after it was stopped. It writes deep.csv and .md (of digits
deep-digits.*) to benchmarks/results, deep.png, the KL and the active units of each layer by epoch, and deep-layers.png,
draws with upper layers held. For a model and `1 layer`, d is the difference of log p(x), row by row, averaged over the
seeds, and

    error^2  =  Var(d) / rows  +  Var(means of the seeds' differences) / seeds
"""

import argparse
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

import pyrovae
from pyrovae.inference.estimate import standard_error
from pyrovae.runs.comparison import Scored, score_run
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.figures import style_of, write_layers
from pyrovae.runs.scoring import Scoring, rows_of

RESULTS = Path(__file__).parent / "results"
LONGER = 4.4  # times as many steps of `1 layer` take as long as one of `5 layers`, compiled, in one process in turn
MODELS: dict[str, dict[str, Any]] = {
    "1 layer": {"latent_dim": [40], "network": {"name": "mlp", "hidden": [100, 100], "activation": "silu"}},
    "5 layers": {
        "model": {"name": "ladder", "above": "state", "merge": "relative"},
        "latent_dim": [12, 8, 8, 6, 6],
        "network": {"name": "mlp", "hidden": [100], "activation": "silu"},
    },
}
MODELS["1 layer, as long"] = MODELS["1 layer"]


def trained(title: str, seed: int, asked: argparse.Namespace) -> Run:
    """A run, trained to its end, or from where it was."""
    folder = asked.directory / f"{title.replace(' ', '-').replace(',', '')}-{seed}"
    if (folder / "evaluation.json").exists():
        return open_run(folder)
    epochs = round(asked.epochs * LONGER) if "long" in title else asked.epochs
    mnist = {"data": "mnist", "data_root": asked.mnist, "batch_size": 200, "compile": "on"}
    data = mnist if asked.mnist else {"batch_size": 50, "compile": "off"}
    common = {**data, "likelihood": "bernoulli", "binarize": "dynamic", "epochs": epochs, "lr": 0.003, "seed": seed}
    common |= {"beta": f"warmup:{max(1, asked.epochs // 5)}", "device": "cpu", "threads": 1}
    common |= {"eval_rows": 100, "eval_K": 20}
    resume = (folder / "config.yaml").exists()
    print(f"{'resuming' if resume else 'training'} {folder.name}", flush=True)
    return pyrovae.train({} if resume else {**common, **MODELS[title]}, folder, resume=resume, plots=False)


def line(title: str, runs: list[Run], scored: Scored, plain: Scored) -> dict[str, Any]:
    """What the table says of a model: means over its seeds, and its paired difference to `1 layer`, in nats."""
    difference = scored.estimate - plain.estimate
    means = [ours - theirs for ours, theirs in zip(scored.means, plain.means, strict=True)]
    over_seeds = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    last = [run.history.iloc[int(run.history.validation_bound.argmax())] for run in runs]
    sites = sorted(name[3:] for name in last[0].index if name.startswith("kl_") and name[-1] != "]") or [""]
    of = {site: f"_{site}" if site else "" for site in sites}
    return {
        "model": title,
        "parameters": sum(p.numel() for p in runs[0].model("cpu").parameters()),
        "epochs": len(runs[0].history),
        "log p(x)": f"{scored.estimate.mean().item():.2f} ± {standard_error(scored.estimate):.2f}",
        "less 1 layer": f"{difference.mean().item():+.2f} ± "
        f"{math.hypot(standard_error(difference), math.sqrt(over_seeds)):.2f}",
        "by seed": ", ".join(f"{value:+.2f}" for value in means),
        "ELBO": f"{scored.elbo:.2f}",
        "verdict": scored.verdict.kind.value,
        "KL": ", ".join(
            f"{site} {statistics.mean(row[f'kl{of[site]}'] for row in last):.2f}".strip() for site in sites
        ),
        "active units": ", ".join(
            f"{site} {statistics.mean(row[f'active_units{of[site]}'] for row in last):.0f}".strip() for site in sites
        ),
    }


def draw(runs: list[Run], path: Path) -> None:
    """KL and active units of each layer by epoch, a curve for each seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {"kl": "KL, nats per datum", "active_units": "active units"}
    for axes, (kind, label) in zip(panels, names.items(), strict=True):
        for number, run in enumerate(runs):
            for i in range(1, 6):
                shown = {"label": f"z{i}"} if number == 0 else {}
                axes.plot(
                    run.history.epoch, run.history[f"{kind}_z{i}"], color=colormaps["cividis"](0.2 * i - 0.15), **shown
                )
        axes.set(xlabel="epoch", ylabel=f"{label} of each layer", ylim=(0, None))
    panels[1].legend(title="from the data up", fontsize="small")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--mnist", metavar="ROOT", help="where torchvision has MNIST; else digits")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    parser.add_argument("--K", type=int, default=500)
    return parser.parse_args()


def write(runs: dict[str, list[Run]], asked: argparse.Namespace) -> None:
    """Score all runs, and write the table and the figures."""
    some = runs["5 layers"][0]
    rows = some.rows()
    batch = rows_of(rows, "test", asked.rows)
    scored = {}
    for title, of in runs.items():
        results = [score_run(run, rows, batch, Scoring(asked.K), print) for run in of]
        scored[title] = Scored(title, *zip(*results, strict=True))
    table = pd.DataFrame([line(title, runs[title], entry, scored["1 layer"]) for title, entry in scored.items()])
    name = "deep" if asked.mnist else "deep-digits"
    table.to_csv(RESULTS / f"{name}.csv", index=False)
    about = (
        f"{len(rows.train)} training rows, {rows.measure.description}; log p(x) in nats per datum of {len(batch)} "
        f"test rows (one fixed binarisation), K = {asked.K}, mean over {len(runs['1 layer'])} seeds, ± over rows; "
        "differences paired by row and seed, ± over rows and seeds. KL and active units of validation rows at the "
        "best epoch, means over seeds."
    )
    heading = [f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
    lines = [f"| {' | '.join(map(str, values))} |" for values in table.itertuples(index=False)]
    (RESULTS / f"{name}.md").write_text("\n".join([f"# One latent layer and five\n\n{about}\n", *heading, *lines, ""]))
    draw(runs["5 layers"], RESULTS / f"{name}.png")
    write_layers(some.model("cpu"), rows.test[:1], asked.directory, "five layers", style_of(some.recipe, rows))
    shutil.copy(asked.directory / "layers.png", RESULTS / f"{name}-layers.png")
    print(table.to_string(index=False))


def main() -> None:
    """Train, score, write: first with the two models of as many epochs, then again with the third."""
    asked = arguments()
    asked.directory.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    seeds = range(1, asked.seeds + 1)
    for titles in (("1 layer", "5 layers"), ("1 layer, as long",)):
        for seed in seeds:
            for title in titles:
                runs.setdefault(title, []).append(trained(title, seed, asked))
        write(runs, asked)


if __name__ == "__main__":
    main()
