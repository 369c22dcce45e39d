"""More stochastic layers, and guides from the bottom up and from the top down, on small binary MNIST: a table.

    python benchmarks/layers.py --data-root ROOT --runs RUNS [--epochs 20 --hidden 100,100 --lr 0.002 --seeds 1]

The pictures are of 14 x 14 pixels, means of 2 x 2 of MNIST's, of the first 20,000 training rows; binarised anew at each
step, and test rows once. Each pair is trained by the ELBO with the KL warmed up over the first fifth of the epochs.
log p(x) is of the same test rows for all, in nats per datum, by importance sampling from each pair's own guide, and so
a lower bound on average; differences are paired over rows. Runs that are there are not trained again.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchvision.datasets import MNIST

import pyrovae
from pyrovae.inference import log_marginal
from pyrovae.inference.estimate import standard_error
from pyrovae.runs.directory import open_run

OUT = Path(__file__).parent / "results" / "layers.csv"
PAIRS = {
    "1 layer": {"model": "vae", "latent_dim": [32]},
    "2 layers, ladder": {"model": "ladder", "latent_dim": [32, 16]},
    "3 layers, ladder": {"model": "ladder", "latent_dim": [32, 16, 8]},
    "2 layers, ladder, precision": {"model": {"name": "ladder", "merge": "precision"}, "latent_dim": [32, 16]},
    "2 layers, bottom-up guide": {"model": "hierarchical", "latent_dim": [32, 16]},
    "1 layer, auxiliary": {"model": "auxiliary", "latent_dim": [32, 16]},
}


def small_mnist(root: Path, file: Path) -> Path:
    """A file of 20,000 training rows, and all test rows, of 14 x 14 pixels."""
    if not file.exists():
        arrays = {}
        for name, train, rows in (("x_train", True, 20_000), ("x_test", False, None)):
            pictures = MNIST(str(root), train=train).data[:rows].double()
            means = pictures.unflatten(2, (14, 2)).unflatten(1, (14, 2)).mean((2, 4))
            arrays[name] = means.round().byte().numpy()
        np.savez(file, **arrays)
    return file


def scored(title: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, object], torch.Tensor]:
    """What the table says of a run, which is trained if it is not there, and log p(x) of its test rows."""
    folder = args.runs / f"{title.replace(' ', '-').replace(',', '')}-{args.epochs}-{seed}"
    if not (folder / "evaluation.json").exists():
        data = small_mnist(args.data_root, args.runs / "mnist14.npz")
        options = {"data": str(data), "binarize": "dynamic", "beta": f"warmup:{max(1, args.epochs // 5)}"}
        options |= {
            "epochs": args.epochs,
            "seed": seed,
            "lr": args.lr,
            "network": {"name": "mlp", "hidden": args.hidden},
            "eval_rows": args.rows,
            "eval_K": 10,
            "device": "cpu",
        }
        pyrovae.train(options | PAIRS[title], folder, plots=False)
    run = open_run(folder)
    model, x = run.model("cpu"), run.rows().test[: args.rows]
    found = log_marginal(model.model, model.guide, x, args.K, seed=0)
    told, history = run.evaluation, run.history
    layers = told["layers"] or {"z": {"kl": told["kl"], "active_units": told["active_units"]}}
    line = {
        "pair": title,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "best epoch": int(history.validation_bound.argmax()) + 1,
        "training, minutes": round(history.seconds.sum() / 60, 1),
        "ELBO": round(told["elbo"], 2),
        "log p(x)": round(found.mean, 2),
        "error over rows": round(found.error_over_rows, 2),
        "Monte Carlo error": round(found.monte_carlo_error, 3),
        "median ESS": round(found.ess.median().item(), 1),
        "KL by layer": "; ".join(f"{site} {layer['kl']:.2f}" for site, layer in layers.items()),
        "active units": "; ".join(f"{site} {layer['active_units']}" for site, layer in layers.items()),
        "rows": args.rows,
        "K": args.K,
    }
    return line, found.estimate


def main() -> None:
    """Train, score and write the table, anew after each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", default="100,100")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--K", type=int, default=1000)
    args = parser.parse_args()
    lines: list[dict[str, object]] = []
    for seed in map(int, args.seeds.split(",")):
        first: torch.Tensor | None = None
        for title in PAIRS:
            line, values = scored(title, seed, args)
            first = values if first is None else first
            to_first = values - first
            line |= {"to 1 layer": round(to_first.mean().item(), 2), "its error": round(standard_error(to_first), 2)}
            lines.append(line)
            print(pd.DataFrame(lines).drop(columns=["rows", "K"]).to_string(index=False), flush=True)
            pd.DataFrame(lines).to_csv(OUT, index=False)


if __name__ == "__main__":
    main()
