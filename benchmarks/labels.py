"""Labels of few rows: M2 against a classifier of the same labels alone, and clusters that see none.

    python benchmarks/labels.py runs/labels [--data digits] [--root DIR] [--labels 100] [--epochs 60] [--seeds 3]
    python benchmarks/labels.py runs/labels --data mnist --root data --epochs 15 --latent 20     the full size

For each draw of labels (by the seed, as many of each class):

    classifier     features and q(y|x) of the pair, trained on the labelled rows alone, with their labels
    enumeration    M2 without its classification term, alpha = 0
    M2             alpha chosen by what is right of a fifth of the labels, after training with the others; then with all
    GMVAE          no labels: its clusters, each named for the label that most of its test rows have

The error is that of q(y|x) over all test rows, with Wilson's interval of a draw, and the mean and its standard error
over the draws. Every run is a directory, and what is there already is not trained again. Writes
benchmarks/results/labels.md.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

import pyrovae
from pyrovae.data import Rows
from pyrovae.data.labels import drawn_labels
from pyrovae.inference.reliability import clustering_accuracy, share
from pyrovae.models import MLP, LabelledVAE
from pyrovae.runs.directory import Run, open_run
from pyrovae.seeding import seeded

RESULTS = Path(__file__).parent / "results"
ALPHAS = (1.0, 10.0, 50.0)
HIDDEN, STEPS = (200, 200), 500


def trained(folder: Path, options: dict[str, Any]) -> Run:
    """A run that is there, or is trained now."""
    if not (folder / "evaluation.json").exists():
        print(f"{folder}", flush=True)
        pyrovae.train(options, folder, overwrite=folder.exists(), plots=False)
    return open_run(folder)


def right(run: Run, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which rows q(y|x) is right of, shape (N,)."""
    model = run.model()
    assert isinstance(model, LabelledVAE)
    return (model.classify(x).argmax(1) == labels).double()


def classifier(rows: Rows, seen: torch.Tensor, seed: int) -> torch.Tensor:
    """Which test rows a classifier trained on the labelled rows alone is right of, shape (N,)."""
    labels = rows.labels
    assert labels["train"] is not None
    assert labels["test"] is not None
    with seeded(seed, "classifier"):
        network = MLP(rows.event_shape, int(labels["train"].max()) + 1, hidden=HIDDEN)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(STEPS):
            x = rows.transform(rows.train[seen])
            loss = torch.nn.functional.cross_entropy(network(x), labels["train"][seen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return (network(rows.test).argmax(1) == labels["test"]).double()


def choose_alpha(folder: Path, options: dict[str, Any], rows: Rows, count: int) -> float:
    """The alpha with which most of a fifth of the labels are right, after training with the others."""
    labels = rows.labels["train"]
    assert labels is not None
    classes, seed = int(labels.max()) + 1, options["seed"]
    every, fewer = (drawn_labels(labels, classes, n, seed, "rows") for n in (count, count - count // 5))
    held = every[~torch.isin(every, fewer)]
    found = {}
    for alpha in ALPHAS:
        chosen = options | {"labels": len(fewer), "elbo": {"name": "semi-supervised", "weight": alpha}}
        run = trained(folder / f"alpha-{alpha:g}", chosen | {"epochs": max(1, options["epochs"] // 3)})
        found[alpha] = right(run, rows.transform(rows.train[held]), labels[held]).mean().item()
    print(f"{folder.name}: right of {len(held)} labels held out {found}", flush=True)
    return max(found, key=lambda alpha: found[alpha])


def of_draw(folder: Path, options: dict[str, Any], count: int) -> dict[str, Any]:
    """Everything of one draw of labels: which test rows are right, and log p(x) of the same rows."""
    data = pyrovae.load_data(options["data"], options.get("data_root"))
    rows, seed = data.rows("mass"), options["seed"]
    labels = rows.labels["train"]
    truth = rows.labels["test"]
    assert labels is not None
    assert truth is not None
    seen = drawn_labels(labels, int(labels.max()) + 1, count, seed, "rows")
    alpha = choose_alpha(folder, options, rows, count)
    found: dict[str, Any] = {"alpha": alpha, "classifier": (classifier(rows, seen, seed), None)}
    for name, weight in (("enumeration", 0.0), ("M2", alpha)):
        own = options | {"labels": count, "elbo": {"name": "semi-supervised", "weight": weight}}
        run = trained(folder / name, own)
        found[name] = (right(run, rows.test, truth), run.evaluation)
    own = {key: value for key, value in options.items() if key != "model"} | {
        "model": "gmvae",
        "prior": {"components": 10},
    }
    run = trained(folder / "GMVAE", own)
    model = run.model()
    assert isinstance(model, LabelledVAE)
    found["GMVAE"] = (clustering_accuracy(model.classify(rows.test).argmax(1), truth), run.evaluation)
    return found


def line(name: str, draws: list[dict[str, Any]]) -> str:
    """A row of the table."""
    values = [draw[name] for draw in draws]
    each = [value if name == "GMVAE" else share(value) for value, _ in values]
    errors = [100 * (1 - one.value) for one in each]
    spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    by_draw = ", ".join(
        f"{100 * (1 - o.value):.1f} ({100 * (1 - o.high):.1f} to {100 * (1 - o.low):.1f})" for o in each
    )
    reports = [report for _, report in values if report is not None]
    scored = ", ".join(f"{r['log_marginal']:.2f} ± {r['error_over_rows']:.2f} ({r['verdict']})" for r in reports)
    return f"| {name} | {statistics.mean(errors):.1f} ± {spread:.1f} | {by_draw} | {scored or '-'} |"


def main() -> None:
    """Train what is not there, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    options = {
        "data": asked.data,
        "model": "m2",
        "latent_dim": [asked.latent],
        "network": {"name": "mlp", "hidden": list(HIDDEN), "activation": "relu"},
        "epochs": asked.epochs,
        "eval_K": 200,
        "eval_rows": 500,
        "device": "cpu",
    } | ({} if asked.root is None else {"data_root": asked.root})
    draws = [of_draw(asked.out / f"draw-{s}", options | {"seed": s}, asked.labels) for s in range(asked.seeds)]
    alphas = ", ".join(f"{draw['alpha']:g}" for draw in draws)
    table = "\n".join(line(name, draws) for name in ("classifier", "enumeration", "M2", "GMVAE"))
    text = f"""# {asked.labels} labels of {asked.data}

Written by `python benchmarks/labels.py`. {len(draws)} draws of {asked.labels} labels, as many of each class;
{asked.epochs} epochs, 200-200 relu, {asked.latent} latent dimensions, Adam at 1e-3; alpha chosen on a fifth of the
labels: {alphas}. Errors in per cent of all test rows: the mean ± its standard error over the draws, and each draw with
its 95% interval. log p(x) in nats per datum, mass on bits, of the first 500 test rows, K = 200, y summed out.

| | error | by draw | log p(x) |
|---|---|---|---|
{table}
"""
    (RESULTS / f"labels-{asked.data}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
