"""Disentangling on sprites: scores and log p(x) of the ELBO with beta 1, 4 and 16, of beta-TC and of FactorVAE.

    python benchmarks/disentangle.py runs/disentangle [--seeds 5] [--epochs 60] [--methods beta-1,tc-6] [--K 200]

Every run is recipes/sprites.yaml with another objective: 3,072 pictures of 32x32, of four factors, an MLP
1024-200-200-10, batches of 64. It is a directory; the same command goes on with what was stopped, and does not train
anew what is there. A last run has a capacity that grows from 0 to 12 nats in two thirds of its epochs (gamma 10).

It writes benchmarks/results/disentangle.csv, .md and .png: the scores of every run, as python -m pyrovae.disentangle
has them; the difference of MIG to that of beta = 1, paired by seed, with its 95 % interval by Student's t over seeds;
and the KL of the capacity run beside C. Where a method has fewer seeds than were asked for, its line says how many.
"""

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import pyrovae
from pyrovae.processors import pick_device
from pyrovae.runs.disentangling import NAME, Asked, score_runs
from pyrovae.runs.grouping import usable
from pyrovae.runs.scoring import Scoring

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS: dict[str, dict[str, Any]] = {
    "beta-1": {"beta": 1.0},
    "tc-6": {"elbo": {"name": "beta-tc", "weight": 6.0}},
    "beta-4": {"beta": 4.0},
    "beta-16": {"beta": 16.0},
    "factor-10": {"elbo": {"name": "factor", "weight": 10.0}},
}
CAPACITY, GROWING = 12.0, 2 / 3  # nats; the share of the epochs in which C grows
SHOWN = ("mig", "sap", "dci_disentanglement", "beta_vae", "factor_vae", "total_correlation", "active_units")


def trained(directory: Path, chosen: dict[str, Any], epochs: int, seed: int) -> None:
    """A run, trained to its end; the seconds of the processor that it took are beside it."""
    if (directory / "evaluation.json").exists():
        return
    recipe = yaml.safe_load((HERE.parent / "recipes" / "sprites.yaml").read_text())
    common = {
        "epochs": epochs,
        "seed": seed,
        "compile": "on",
        "device": "cpu",
        "threads": 1,
        "eval_rows": 20,
        "eval_K": 20,
    }
    resume, started = (directory / "config.yaml").exists(), time.process_time()
    pyrovae.train({} if resume else {**recipe, **common, **chosen}, directory, resume=resume, plots=False)
    directory.with_suffix(".seconds").write_text(f"{time.process_time() - started:.1f}")


def differences(table: pd.DataFrame) -> dict[str, str]:
    """MIG of each method less that of beta = 1, paired by seed, with its 95 % interval over seeds."""
    from scipy.stats import t

    mig = table.pivot(index="seed", columns="method", values="mig")
    found = {}
    for method in mig.columns.drop("beta-1", errors="ignore"):
        d = (mig[method] - mig["beta-1"]).dropna()
        half = t.ppf(0.975, len(d) - 1) * d.std() / math.sqrt(len(d)) if len(d) > 1 else math.nan
        interval = f" [{d.mean() - half:+.3f}, {d.mean() + half:+.3f}]" if len(d) > 1 else " (one seed: no interval)"
        found[method] = f"{d.mean():+.3f}{interval}"
    return found


def capacity_lines(directory: Path) -> list[str]:
    """The KL of the run with a capacity beside C, at some of its epochs."""
    history = pd.read_csv(directory / "metrics.csv")
    lines = [
        "",
        "| epoch | C, nats | KL, nats | KL / C | active units | reconstruction, nats |",
        "|---|---|---|---|---|---|",
    ]
    for row in history.iloc[9::10].to_dict("records"):
        kl, c, loss = row["kl"], row["capacity"], row["reconstruction"]
        lines.append(
            f"| {row['epoch']:.0f} | {c:.2f} | {kl:.2f} | {kl / c:.3f} | {row['active_units']:.0f} | {loss:.2f} |"
        )
    return lines


def in_words(table: pd.DataFrame, epochs: int) -> str:
    """The record, as Markdown."""
    first, less = table.iloc[0], differences(table)
    lines = [
        "# Disentangling on sprites",
        "",
        f"Written by `python benchmarks/disentangle.py`. {first['rows']} sprites of 32x32, factors {first['factors']}; "
        f"MLP 1024-200-200-10, {epochs} epochs, batches of 64. Scores of all rows, {first['codes']} of q(z|x), "
        f"{first['bins']} bins, all factors; ± standard deviation over seeds. log p(x) of "
        f"{first['test_rows']} test rows in nats, "
        f"{first['measure']}, K = {first['K']}, a lower bound in expectation.",
        "",
        f"| objective | seeds | log p(x) | {' | '.join(name.replace('_', ' ') for name in SHOWN)} | MIG less beta 1 |",
        "|" + "---|" * (4 + len(SHOWN)),
    ]
    for method, seeds in table.groupby("method", sort=False):
        cells = [spread(seeds[name]) for name in ("log_marginal", *SHOWN)]
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} | {less.get(str(method), '')} |")
    return "\n".join([*lines, ""])


def spread(values: pd.Series) -> str:
    """The mean, ± the standard deviation over seeds."""
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--methods", default=",".join(METHODS), help="by comma (default: all)")
    parser.add_argument("--test-rows", type=int, default=None, help="for log p(x) (default: all)")
    parser.add_argument("--K", type=int, default=200)
    asked = parser.parse_args()
    folder: Path = asked.directory
    folder.mkdir(parents=True, exist_ok=True)
    methods = asked.methods.split(",")
    for seed in range(1, asked.seeds + 1):
        for method in methods:
            trained(folder / f"{method}-{seed}", METHODS[method], asked.epochs, seed)
    held = folder / "capacity-1"
    trained(held, {"beta": f"capacity:{CAPACITY:g}:{round(GROWING * asked.epochs)}"}, asked.epochs, 1)
    runs = [folder / f"{method}-{seed}" for method in methods for seed in range(1, asked.seeds + 1)]
    out = folder / "scores"
    frame = score_runs(
        usable(runs, print), Asked(), Scoring(asked.K), out, limit=asked.test_rows, device=pick_device("cpu"), say=print
    )
    frame["method"] = frame["run"].str.rsplit("-", n=1).str[0]
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / "disentangle.csv", index=False)
    shutil.copy(out / f"{NAME}.png", RESULTS / "disentangle.png")
    text = in_words(frame, asked.epochs) + "\n".join(["", "A capacity C, of one seed:", *capacity_lines(held), ""])
    (RESULTS / "disentangle.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
