"""Likelihoods of grey images: what a calibrated scale is worth on MNIST, and what grey levels cost in bits on digits.

    python benchmarks/decoders.py RUNS --mnist ROOT [--rows 5000] [--epochs 20] [--scored 500] [--K 200]

One network (two layers of 200, 20 latent dimensions, tanh; the ELBO, Adam at 1e-3, batches of 100, one seed), with each
likelihood: on the first training rows of MNIST, and on scikit-learn's digits, of 17 levels.
Of densities log p(x) is of rows dequantised to [0, 1], of masses of the levels: tables of their own, in which the bits
per dimension of the first are upper bounds of what the mass that a density gives to levels would cost.

The beta-VAE of a unit variance with weight beta has the optima of the VAE whose variance is beta, since beta scales its
objective: tuned is the best of these on the validation rows, beta = 0.1, 0.01 and 0.001, scored as that VAE.

The mean square error is E |x - mean|^2 / D over test rows and one draw of the guide each; beside it stands sigma^2,
which is that of the training rows where it is optimal. Every run is a directory, which is not trained again. Writes
benchmarks/results/decoders.md.

References:
    Rybkin, Daniilidis and Levine 2021, Simple and Effective VAE Training with Calibrated Decoders (sigma-VAE),
        https://arxiv.org/abs/2006.13202
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine

import pyrovae
from pyrovae.models.location_scale import LocationScale
from pyrovae.runs.directory import Run, open_run

RESULTS = Path(__file__).parent / "results"
GAUSSIAN = {"name": "Gaussian"}
MNIST: dict[str, dict[str, Any]] = {
    "unit variance": {**GAUSSIAN, "scale": 1.0},
    "beta = 0.1": {**GAUSSIAN, "scale": 0.1**0.5},
    "beta = 0.01": {**GAUSSIAN, "scale": 0.1},
    "beta = 0.001": {**GAUSSIAN, "scale": 0.001**0.5},
    "learned sigma": GAUSSIAN,
    "optimal sigma": {**GAUSSIAN, "scale": "optimal"},
    "sigma for each pixel": {**GAUSSIAN, "scale": "per-dimension"},
}
DIGITS: dict[str, dict[str, Any]] = {
    "Gaussian, optimal sigma": {**GAUSSIAN, "scale": "optimal"},
    "Gaussian, predicted sigma": {**GAUSSIAN, "scale": "predicted"},
    "discretised logistic": {"name": "DiscretizedLogistic"},
    "discretised logistic, predicted scale": {"name": "DiscretizedLogistic", "scale": "predicted"},
    "mixture of 5 logistics for each pixel": {"name": "DiscretizedLogisticMixture"},
    "categorical": {"name": "Categorical"},
}
TUNED = [name for name in MNIST if name.startswith("beta")]


def subset(root: str, rows: int, out: Path) -> str:
    """The first training and validation rows and the test rows as a file, so that all models have the same."""
    path = out / f"mnist-{rows}.npz"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        data = pyrovae.load_data("mnist", root)
        parts = {"x_train": data.train[:rows], "x_validation": data.validation[:1000], "x_test": data.test[:1000]}
        np.savez(path, **{name: value.numpy() for name, value in parts.items()})
    return str(path)


def trained(likelihood: dict[str, Any], data: str, epochs: int, directory: Path, arguments: argparse.Namespace) -> Run:
    """The run of a model, trained if it is not there yet."""
    if not (directory / "evaluation.json").exists():
        options = {
            "data": data,
            "likelihood": likelihood,
            "latent_dim": [20],
            "epochs": epochs,
            "seed": 0,
            "device": "cpu",
            "threads": 1,
            "compile": "off",
            "eval_rows": arguments.scored,
            "eval_K": arguments.K,
        }
        print(directory, flush=True)
        pyrovae.train(options, directory, plots=False)
    return open_run(directory)


@torch.no_grad()
def errors(run: Run) -> tuple[float | None, float]:
    """sigma^2, where the likelihood has one for all elements, and E |x - mean|^2 / D on the test rows."""
    torch.manual_seed(0)
    pair, x = run.model(), run.rows().test
    replayed = poutine.replay(pair.model, poutine.trace(pair.guide).get_trace(x))
    p = poutine.trace(replayed).get_trace(x).nodes["x"]["fn"]
    shared = isinstance(pair.likelihood, LocationScale) and pair.likelihood.scale not in ("per-dimension", "predicted")
    variance = p.base_dist.variance.flatten()[0].item() if shared and run.recipe.likelihood.name == "Gaussian" else None
    return variance, (x - p.mean).square().mean().item()


def table(runs: dict[str, Run]) -> list[str]:
    """A line for each run, the best first."""
    lines = [
        "| | ELBO, nats | log p(x), nats | error over rows | verdict | bits/dim | sigma^2 | mean square error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in sorted(runs.items(), key=lambda item: -item[1].evaluation["log_marginal"]):
        found = run.evaluation
        variance, error = errors(run)
        lines.append(
            f"| {name} | {found['elbo']:.1f} | {found['log_marginal']:.1f} | {found['error_over_rows']:.1f} | "
            f"{found['verdict']} | {found['bits_per_dimension']:.3f} | "
            f"{'' if variance is None else f'{variance:.5g}'} | {error:.5g} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--mnist", required=True)
    for name, default in (("rows", 5_000), ("epochs", 20), ("scored", 500), ("K", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    mnist = subset(arguments.mnist, arguments.rows, arguments.runs)
    sets = {"MNIST": (MNIST, mnist, arguments.epochs), "digits": (DIGITS, "digits", arguments.epochs)}
    lines = [
        f"# Likelihoods of grey images: {arguments.epochs} epochs, one seed; {arguments.rows} rows of MNIST; digits",
        "",
        f"log p(x) by importance sampling from the guide, K = {arguments.K}; test rows, {arguments.scored} at most, "
        "of which the errors are. "
        "Squared errors are in units of x: of [0, 1] for densities, of levels for masses. "
        "`benchmarks/decoders.py` says more.",
    ]
    for title, (models, data, epochs) in sets.items():
        runs = {
            name: trained(likelihood, data, epochs, arguments.runs / title / name.replace(" ", "-"), arguments)
            for name, likelihood in models.items()
        }
        for kind, words in (("density", "densities of dequantised rows"), ("levels", "masses on grey levels")):
            chosen = {name: run for name, run in runs.items() if run.recipe.measure == kind}
            if chosen:
                lines += ["", f"## {title}, {words}", "", *table(chosen)]
        if title == "MNIST":
            best = max(TUNED, key=lambda name: float(runs[name].history["validation_bound"].max()))
            lines += ["", f"Tuned on the validation rows: {best}."]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decoders.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
