"""A hierarchy of five layers on MNIST beside one latent layer: log p(x) of the same test rows, over three seeds.

    python benchmarks/deep.py runs/deep --mnist ROOT [--epochs 8] [--seeds 3] [--rows 1000] [--K 500]

Three models of dense networks of 100 units (silu; bits drawn anew at every step, the ELBO, its KL warmed up over a
fifth of the epochs, Adam at 3e-3, batches of 200), of 40 latent dimensions each:

    1 layer             784-100-100-40
    5 layers            a ladder of 12, 8, 8, 6 and 6, which hands down a state of 100 numbers; `--merge relative`
    1 layer, as long    the first, for as many epochs as take the processor as long as those of the second

Every run is a directory that the same command goes on with after it was stopped. It writes benchmarks/results/deep.csv
and .md, and deep.png: the KL and the active units of each layer by epoch, and draws with upper layers held. For a model
and `1 layer`, d is the difference of log p(x), row by row, averaged over the seeds, and

    error^2  =  Var(d) / rows  +  Var(means of the seeds' differences) / seeds
"""

import argparse
from pathlib import Path
from typing import Any

import pyrovae
from pyrovae.runs.directory import Run, open_run

RESULTS = Path(__file__).parent / "results"
LONGER = 4.4  # times as many steps of `1 layer` take as long as one of `5 layers`, compiled, in one process in turn
DEEP = {"model": {"name": "ladder", "above": "state", "merge": "relative"}, "latent_dim": [12, 8, 8, 6, 6]}
MODELS: dict[str, dict[str, Any]] = {
    "1 layer": {"latent_dim": [40], "network": {"name": "mlp", "hidden": [100, 100], "activation": "silu"}},
    "5 layers": {**DEEP, "network": {"name": "mlp", "hidden": [100], "activation": "silu"}},
}
MODELS["1 layer, as long"] = MODELS["1 layer"]


def trained(title: str, seed: int, asked: argparse.Namespace) -> Run:
    """A run, trained to its end, or from where it was."""
    folder = asked.directory / f"{title.replace(' ', '-').replace(',', '')}-{seed}"
    if (folder / "evaluation.json").exists():
        return open_run(folder)
    epochs = round(asked.epochs * LONGER) if "long" in title else asked.epochs
    common = {"data": "mnist", "data_root": asked.mnist, "likelihood": "bernoulli", "binarize": "dynamic"}
    common |= {
        "epochs": epochs,
        "beta": f"warmup:{max(1, asked.epochs // 5)}",
        "batch_size": 200,
        "lr": 0.003,
        "seed": seed,
    }
    common |= {"device": "cpu", "threads": 1, "compile": "on", "eval_rows": 100, "eval_K": 20}
    resume = (folder / "config.yaml").exists()
    print(f"{'resuming' if resume else 'training'} {folder.name}", flush=True)
    return pyrovae.train({} if resume else {**common, **MODELS[title]}, folder, resume=resume, plots=False)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--mnist", required=True, metavar="ROOT", help="where torchvision has MNIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    parser.add_argument("--K", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    """Train, score, write."""
    asked = arguments()
    asked.directory.mkdir(parents=True, exist_ok=True)
    for titles in (("5 layers", "1 layer"), ("1 layer, as long",)):
        for seed in range(1, asked.seeds + 1):
            for title in titles:
                trained(title, seed, asked)


if __name__ == "__main__":
    main()
