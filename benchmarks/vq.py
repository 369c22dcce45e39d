"""VQ-VAE: what its codes cost under five priors, beside a VAE of the same networks.

    python benchmarks/vq.py runs/vq [--mnist ROOT] [--train 60000] [--epochs 40] [--seeds 3] [--rows 1000]

On the digits of scikit-learn (8 x 8, codes on a grid of 2 x 2), or on MNIST (28 x 28, 7 x 7), bits drawn anew at every
step, Adam at 1e-3, batches of 100. For each seed:

    uniform         a VQ-VAE of 64 codes at each place, under a uniform prior
    unigram, unigram by place, masked convolutions, transformer
                    its codes under priors that are fitted afterwards, its networks held
    vae             N(0, I) and a Gaussian guide of two latents at each place, between the same convolutions

The log p(x) of a VQ-VAE is its stated lower bound, log p(x|z(x)) + log p(codes); of the VAE the ELBO and an estimate by
importance sampling. Every run is a directory, which the same command goes on with after it was stopped. It writes
benchmarks/results/vq.csv, .md and .png; differences are paired by row and seed, with

    error^2  =  Var(d) / rows  +  Var(means of the seeds' differences) / seeds
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import pyrovae
from pyrovae.inference.estimate import standard_error
from pyrovae.runs.comparison import Scored, score_run
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.scoring import Scoring, rows_of

RESULTS = Path(__file__).parent / "results"
COLUMNS = 16  # pictures in a row
CODES = 64
# By data: channels of the convolutions, places of the grid, elements of a code.
SIZES = {"digits": ([16, 32], 4, 16), "mnist": ([16, 32], 49, 16)}
# Fitted afterwards, and for which share of the epochs.
AFTERWARDS: dict[str, tuple[dict[str, Any], float]] = {
    "unigram": ({"name": "UnigramCodes"}, 0.5),
    "unigram by place": ({"name": "UnigramCodes", "logits": "by-place"}, 0.5),
    "masked convolutions": ({"name": "MaskedConvolutions", "layers": 4, "hidden": 32, "reach": 1}, 0.8),
    "transformer": ({"name": "TransformerCodes", "layers": 2, "hidden": 48}, 0.8),
}


def subset(root: str, rows: int, path: Path) -> Path:
    """The first training rows and all test rows of MNIST as one file."""
    from torchvision.datasets import MNIST

    train, test = (MNIST(root, train=which) for which in (True, False))
    np.savez(
        path,
        x_train=train.data[:rows].numpy(),
        y_train=train.targets[:rows].numpy(),
        x_test=test.data.numpy(),
        y_test=test.targets.numpy(),
    )
    return path


def trained(directory: Path, chosen: dict[str, Any]) -> Run:
    """A run, trained to its end; the seconds of the processor that its training took are beside it."""
    if (directory / "evaluation.json").exists():
        return open_run(directory)
    resume = (directory / "config.yaml").exists()
    print(f"{'resuming' if resume else 'training'} {directory.name} for {chosen['epochs']} epochs", flush=True)
    started = time.process_time()
    run = pyrovae.train({} if resume else chosen, directory, resume=resume, say=lambda text: print(text, flush=True))
    if not resume:  # else it is unknown
        (directory.parent / f"{directory.name}.seconds").write_text(f"{time.process_time() - started:.1f}")
    return run


def runs_of(seed: int, folder: Path, data: dict[str, Any], epochs: int) -> dict[str, Run]:
    """All runs of a seed, by what they are called."""
    common = {"seed": seed, "device": "cpu", "threads": 1, "eval_rows": 100, "eval_K": 50, "compile": "off"}
    first = folder / f"uniform-{seed}"
    channels, places, code_dim = SIZES["digits" if data["data"] == "digits" else "mnist"]
    network = {"name": "conv", "channels": channels, "hidden": 0}
    networks = {**common, **data, "network": network, "epochs": epochs}
    guide = {"name": "VectorQuantiser", "codes": CODES, "code_dim": code_dim}
    quantised = {"guide": guide, "prior": "UniformCodes", "latent_dim": [places * code_dim]}
    found = {"uniform": trained(first, {**networks, **quantised})}
    for name, (prior, share) in AFTERWARDS.items():
        chosen = {**common, "model": "ex-post", "first": str(first), "prior": prior, "lr": 3e-3, "patience": 5}
        fitted = max(1, round(share * epochs))
        found[name] = trained(folder / f"{name.replace(' ', '-')}-{seed}", {**chosen, "epochs": fitted})
    found["vae"] = trained(folder / f"vae-{seed}", {**networks, "latent_dim": [2 * places]})
    return found


def compared(scored: dict[str, Scored], dims: int) -> pd.DataFrame:
    """One line for each model: bits per dimension, and the paired difference to the uniform prior."""
    plain, records = scored["uniform"], []
    bits = 1 / (dims * math.log(2))
    for name, entry in scored.items():
        seeds = len(entry.results)
        difference = entry.estimate - plain.estimate
        means = [ours - theirs for ours, theirs in zip(entry.means, plain.means, strict=True)]
        over_seeds = statistics.variance(means) / seeds if seeds > 1 else 0.0
        records.append(
            {
                "model": name,
                "nats": entry.estimate.mean().item(),
                "error": standard_error(entry.estimate),
                "bits_per_dimension": -bits * entry.estimate.mean().item(),
                "elbo_bits_per_dimension": -bits * entry.elbo,
                "difference": difference.mean().item(),
                "difference_error": math.hypot(standard_error(difference), math.sqrt(over_seeds)),
                "differences": means,
                "verdict": entry.verdict.kind.value,
            }
        )
    return pd.DataFrame(records)


def in_words(table: pd.DataFrame, used: str, about: str) -> str:
    """The record, as Markdown."""
    lines = [
        "# VQ-VAE: the cost of codes under five priors, and a VAE of the same networks",
        "",
        "Written by `python benchmarks/vq.py`. " + about,
        "",
        "| model | log p(x) | bits per dimension | ELBO, bits per dimension | less the uniform prior, nats | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        less = "" if row["model"] == "uniform" else f"{row['difference']:+.2f} ± {row['difference_error']:.2f}"
        lines.append(
            f"| {row['model']} | {row['nats']:.2f} ± {row['error']:.2f} | {row['bits_per_dimension']:.4f} | "
            f"{row['elbo_bits_per_dimension']:.4f} | {less} | {row['verdict']} |"
        )
    return "\n".join([*lines, "", used, ""])


def draw(runs: dict[str, Run], x: Any, path: Path) -> None:
    """Test rows and their reconstructions, and draws through each prior, as means of p(x|z)."""
    import torch
    from matplotlib.figure import Figure

    pictures = {"test rows": x[:COLUMNS]}
    for name, run in runs.items():
        model: Any = run.model()
        if name == "uniform":
            pictures["reconstructions"] = model.reconstruct(x[:COLUMNS])
        torch.manual_seed(0)
        pictures[f"draws, {name}"] = model.sample(COLUMNS, mean=True)
    figure = Figure(figsize=(8, 0.62 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 1)
    for axis, (name, rows) in zip(axes, pictures.items(), strict=True):
        axis.imshow(torch.cat(list(rows.flatten(1, -3)[:, 0]), -1).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--mnist", metavar="ROOT", help="where torchvision has MNIST (default: digits instead)")
    parser.add_argument("--train", type=int, default=60_000, help="of MNIST, training and validation rows, the first")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    asked = parser.parse_args()
    folder: Path = asked.directory
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mnist.npz"
    if asked.mnist and not path.exists():
        subset(asked.mnist, asked.train, path)
    data = {"data": str(path) if asked.mnist else "digits", "likelihood": "bernoulli", "binarize": "dynamic"}
    results: dict[str, list[Any]] = {}
    usage, rows = [], None
    for seed in range(1, asked.seeds + 1):
        runs = runs_of(seed, folder, data, asked.epochs)
        for name, run in runs.items():
            rows = rows or run.rows()
            batch = rows_of(rows, "test", asked.rows)
            results.setdefault(name, []).append(score_run(run, rows, batch, Scoring(50), print))
            if name == "uniform" and run.history is not None:
                usage.append(run.history.iloc[-1][["codes_used", "code_perplexity"]].tolist())
    scored = {name: Scored(name, *zip(*found, strict=True)) for name, found in results.items()}
    assert rows is not None
    table = compared(scored, math.prod(rows.event_shape))
    about = (
        f"{'MNIST' if asked.mnist else 'Digits'}: {len(rows.train)} training rows, {asked.epochs} epochs, "
        f"{rows.measure.description}; {len(batch)} test rows (fixed bits), seeds: {asked.seeds}, K = 50; of "
        "the VQ-VAE log p(x) is the stated lower bound; ± over rows, of differences over rows and seeds, paired."
    )
    used = "; ".join(f"{int(codes)} of {CODES} codes used, perplexity {perplexity:.1f}" for codes, perplexity in usage)
    text = in_words(table, f"Of the last epoch, by seed: {used}.", about)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "vq.csv", index=False)
    (RESULTS / "vq.md").write_text(text)
    draw(runs, batch.x, RESULTS / "vq.png")
    print(text)


if __name__ == "__main__":
    main()
