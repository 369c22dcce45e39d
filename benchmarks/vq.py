"""VQ-VAE on MNIST: what its codes cost under four priors, beside a VAE of the same networks.

    python benchmarks/vq.py runs/vq --mnist ROOT [--train 55000] [--epochs 30] [--seeds 3] [--rows 1000]

Convolutions of 16 and 32 channels down to 7 x 7 and back (28 x 28, bits drawn anew at every step, Adam at 1e-3, batches
of 100). For each seed:

    uniform         a VQ-VAE of 64 codes of 16 elements at each place, under a uniform prior
    unigram, unigram by place, masked convolutions, transformer
                    its codes under priors that are fitted afterwards, its networks held
    vae             N(0, I) and a Gaussian guide of 98 latents, two at each place, between the same convolutions

The log p(x) of a VQ-VAE is its stated lower bound, log p(x|z(x)) + log p(codes); of the VAE the ELBO and an estimate by
importance sampling. Every run is a directory, which the same command goes on with after it was stopped. It writes
benchmarks/results/vq.csv and .md; differences are paired by row and seed, with

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
NETWORK = {"name": "conv", "channels": [16, 32], "hidden": 0}
QUANTISER = {"name": "VectorQuantiser", "codes": 64, "code_dim": 16}
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
    networks = {**common, **data, "network": NETWORK, "epochs": epochs}
    found = {"uniform": trained(first, {**networks, "guide": QUANTISER, "prior": "UniformCodes", "latent_dim": [784]})}
    found["vae"] = trained(folder / f"vae-{seed}", {**networks, "latent_dim": [98]})
    for name, (prior, share) in AFTERWARDS.items():
        chosen = {**common, "model": "ex-post", "first": str(first), "prior": prior, "lr": 3e-3}
        fitted = max(1, round(share * epochs))
        found[name] = trained(folder / f"{name.replace(' ', '-')}-{seed}", {**chosen, "epochs": fitted})
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
        "# VQ-VAE on MNIST: the cost of codes under four priors, and a VAE of the same networks",
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


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--mnist", required=True, metavar="ROOT", help="where torchvision has MNIST")
    parser.add_argument("--train", type=int, default=60_000, help="training and validation rows, the first")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    asked = parser.parse_args()
    folder: Path = asked.directory
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mnist.npz"
    path = path if path.exists() else subset(asked.mnist, asked.train, path)
    data = {"data": str(path), "likelihood": "bernoulli", "binarize": "dynamic"}
    results: dict[str, list[Any]] = {}
    usage, rows = [], None
    for seed in range(1, asked.seeds + 1):
        for name, run in runs_of(seed, folder, data, asked.epochs).items():
            rows = rows or run.rows()
            batch = rows_of(rows, "test", asked.rows)
            results.setdefault(name, []).append(score_run(run, rows, batch, Scoring(50), print))
            if name == "uniform" and run.history is not None:
                usage.append(run.history.iloc[-1][["codes_used", "code_perplexity"]].tolist())
    scored = {name: Scored(name, *zip(*found, strict=True)) for name, found in results.items()}
    assert rows is not None
    table = compared(scored, math.prod(rows.event_shape))
    about = (
        f"{len(rows.train)} training rows, {asked.epochs} epochs, {rows.measure.description}; the first {asked.rows} "
        f"test rows (one fixed binarisation), {asked.seeds} seed{'s' if asked.seeds > 1 else ''}, K = 50. Of the "
        "VQ-VAE log p(x) is the stated lower bound; ± over rows, of differences over rows and seeds, paired."
    )
    used = "; ".join(f"{int(codes)} of 64 codes used, perplexity {perplexity:.1f}" for codes, perplexity in usage)
    text = in_words(table, f"Of the last epoch, by seed: {used}.", about)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "vq.csv", index=False)
    (RESULTS / "vq.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
