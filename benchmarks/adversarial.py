"""What adversarial and perceptual training do to the bound: one decoder, trained seven ways on the same rows.

    python benchmarks/adversarial.py runs/adversarial [--data digits] [--data-root ROOT] [--epochs 60] [--seeds 3]

Pairs of one network (Z = 8, Gaussian p(x|z) whose scale is set in closed form after each epoch), Adam at 1e-3:

    elbo         the ELBO
    perceptual   log p of a frozen classifier's features in place of log p(x|z)
    vae-gan      log p of the adversary's features in place of log p(x|z), and the decoder's reward (Larsen et al.)
    vae-gan-10   the same with ten times the reward
    adds W       the ELBO, and W times the decoder's reward: what adversarial training costs the bound, by its weight

All are scored alike: log p(x) of p(z) p(x|z) on the test rows by K draws of a Gaussian fitted to each row, since a
guide that was trained by something else is far from the posterior of this p(x|z), reconstructions by PSNR and SSIM, and
what is drawn by the Frechet distance of the decoder's means to as many training rows, on the features of a
classifier trained on the rows' labels. `perceptual` is trained by these very features, which flatters it there.

It writes benchmarks/results/adversarial-DATA.csv, .md and .png. Every run is a directory that the same command goes on
with after it was stopped. Differences of log p(x) to `elbo` are paired by row, and averaged over seeds:

    error^2  =  Var(d) / rows  +  Var(means of the seeds' differences) / seeds
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import pyrovae
from pyrovae.data.measure import Measure
from pyrovae.inference import Individual
from pyrovae.inference.estimate import standard_error
from pyrovae.quality import frechet_distance
from pyrovae.runs.comparison import Scored, score_run
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.features import Features, classifier_features
from pyrovae.runs.scoring import Scoring, rows_of
from pyrovae.seeding import seeded

RESULTS = Path(__file__).parent / "results"
ADDS = {"name": "vae-gan", "features": 0.0, "pixels": 1.0}
WAYS: dict[str, Any] = {
    "elbo": "elbo",
    "perceptual": "perceptual",
    "vae-gan": "vae-gan",
    "vae-gan-10": {"name": "vae-gan", "weight": 10.0},
    "adds-1": {**ADDS, "weight": 1.0},
    "adds-10": {**ADDS, "weight": 10.0},
    "adds-100": {**ADDS, "weight": 100.0},
}
TITLES = {
    "elbo": "ELBO",
    "perceptual": "perceptual",
    "vae-gan": "VAE-GAN",
    "vae-gan-10": "VAE-GAN, 10 rewards",
    "adds-1": "ELBO + 1 reward",
    "adds-10": "ELBO + 10 rewards",
    "adds-100": "ELBO + 100 rewards",
}
DRAWN = 2000  # at most, for the Frechet distance
PICTURES = 10  # of each way


def options(way: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Of a run."""
    return {
        "data": asked.data,
        "data_root": asked.data_root,
        "elbo": WAYS[way],
        "likelihood": {"name": "gaussian", "scale": "optimal"},
        "latent_dim": [8],
        "network": {"name": "mlp", "hidden": asked.hidden},
        "epochs": asked.epochs,
        "seed": seed,
        "device": "cpu",
        "threads": 1,
        "compile": asked.compile,
        "eval_rows": asked.rows,
        "eval_K": 100,
    }


def trained(directory: Path, chosen: dict[str, Any], say: Callable[[str], object]) -> Run:
    """A run, trained to its end; the seconds of the processor that it took are beside it."""
    if (directory / "evaluation.json").exists():
        return open_run(directory)
    resume = (directory / "config.yaml").exists()
    say(f"{'resuming' if resume else 'training'} {directory.name}")
    started = time.process_time()
    run = pyrovae.train({} if resume else chosen, directory, resume=resume, plots=False)
    if not resume:  # else it is unknown
        (directory.parent / f"{directory.name}.seconds").write_text(f"{time.process_time() - started:.1f}")
    return run


def distance(model: Any, data: Tensor, features: Features) -> tuple[float, float]:
    """The Frechet distance of the decoder's means, at codes of the prior, to as many rows of data; and its error."""
    with seeded("adversarial"), torch.no_grad():
        found = frechet_distance(features(data), features(model.sample(len(data), mean=True)))
    return found.extrapolated, found.error


def one(run: Run, drawn: tuple[float, float]) -> dict[str, float]:
    """What is averaged over seeds, but for log p(x)."""
    quality = run.evaluation["reconstruction_quality"]
    history = run.history
    adversary = history["adversary_loss"].iloc[-1] if "adversary_loss" in history else math.nan
    scale = history["likelihood_scale"].iloc[-1]
    return {
        "elbo": run.evaluation["elbo"],
        "frechet": drawn[0],
        "frechet_error": drawn[1],
        "adversary_loss": adversary,
        "scale": scale,
        "psnr": quality["psnr"]["mean"],
        "ssim": quality["ssim"]["mean"],
    }


def compared(scored: dict[str, Scored], ones: dict[str, list[dict[str, float]]], measure: Measure) -> pd.DataFrame:
    """One line for each way: means over seeds, in nats per datum where nothing else is said."""
    plain, records = scored["elbo"], []
    for way, entry in scored.items():
        seeds = len(entry.results)
        difference = entry.estimate - plain.estimate
        means = [ours - theirs for ours, theirs in zip(entry.means, plain.means, strict=True)]
        over_seeds = statistics.variance(means) / seeds if seeds > 1 else 0.0
        averages = {name: statistics.mean(found[name] for found in ones[way]) for name in ones[way][0]}
        records.append(
            {
                "way": way,
                "log_marginal": entry.estimate.mean().item(),
                "error": standard_error(entry.estimate),
                "bits_per_dimension": measure.bits_per_dimension(entry.estimate.mean().item()),
                "difference": difference.mean().item(),
                "difference_error": math.hypot(standard_error(difference), math.sqrt(over_seeds)),
                "differences": means,
                "verdict": entry.verdict.kind.value,
                "reason": entry.verdict.reason,
                **averages,
                "frechets": [found["frechet"] for found in ones[way]],
            }
        )
    return pd.DataFrame(records)


def in_words(table: pd.DataFrame, about: str) -> str:
    """The record, as Markdown."""
    lines = [
        "# What adversarial and perceptual training do to the bound",
        "",
        "Written by `python benchmarks/adversarial.py`. " + about,
        "",
        "| trained by | ELBO | log p(x) | bits/dim | less that of the ELBO | by seed | PSNR, dB | SSIM | Frechet | s | "
        "adversary's loss | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        own = row["way"] == "elbo"
        less = "" if own else f"{row['difference']:+.1f} ± {row['difference_error']:.1f}"
        by_seed = "" if own else ", ".join(f"{value:+.1f}" for value in row["differences"])
        loss = "" if math.isnan(row["adversary_loss"]) else f"{row['adversary_loss']:.2f}"
        lines.append(
            f"| {TITLES[row['way']]} | {row['elbo']:.1f} | {row['log_marginal']:.1f} ± {row['error']:.1f} | "
            f"{row['bits_per_dimension']:.3f} | {less} | {by_seed} | {row['psnr']:.2f} | {row['ssim']:.3f} | "
            f"{row['frechet']:.2f} ± {row['frechet_error']:.2f} | {row['scale']:.3f} | {loss} | {row['verdict']} |"
        )
    reasons = "; ".join(f"{TITLES[row['way']]}: {row['reason']}" for row in table.to_dict("records"))
    return "\n".join([*lines, "", f"Verdicts, in full: {reasons}.", ""])


def draw(table: pd.DataFrame, pictures: dict[str, Tensor], path: Path) -> None:
    """log p(x) against the Frechet distance of each way, and what each decoder makes of the same codes."""
    from matplotlib.figure import Figure

    from pyrovae.plots.style import PALETTE

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for i, row in enumerate(table.to_dict("records")):
        left.errorbar(
            row["frechet"], row["log_marginal"], yerr=1.96 * row["error"], fmt="o", color=PALETTE[i], capsize=3,
            label=TITLES[row["way"]],
        )  # fmt: skip
        seeds = [row["log_marginal"] + value for value in row["differences"]]
        if len(seeds) > 1:
            left.plot(row["frechets"], [m - row["difference"] for m in seeds], ".", color=PALETTE[i], markersize=4)
    left.set_xscale("log")
    left.set_xlabel("Frechet distance of decoded draws of z (smaller is better)")
    left.set_ylabel("log p(x), nats per datum")
    left.set_title("bars: 95 % over rows; dots: seeds", fontsize="medium")
    left.legend(fontsize="small")
    side = math.isqrt(next(iter(pictures.values())).flatten(1).shape[1])
    framed = {
        way: torch.nn.functional.pad(tiles.reshape(-1, side, side), (1, 1, 1, 1)) for way, tiles in pictures.items()
    }
    rows = [torch.cat([*tiles], 1) for tiles in framed.values()]
    right.imshow(torch.cat(rows), cmap="gray_r", vmin=0, vmax=1)
    right.set_yticks([(side + 2) * (i + 0.5) for i in range(len(rows))], [TITLES[way] for way in pictures])
    right.set_xticks([])
    right.set_title("the decoder's means at draws of N(0, I)", fontsize="medium")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where runs are, or are to be")
    parser.add_argument("--data", default="digits", help="of grey pictures with labels")
    parser.add_argument("--data-root", help="where torchvision has it")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first, at most")
    parser.add_argument("--K", type=int, default=300)
    parser.add_argument("--compile", default="off", help="of training steps: auto, on or off")
    return parser.parse_args()


def main() -> None:
    """Train, score, write."""
    asked = arguments()
    folder: Path = asked.directory
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Any]] = {way: [] for way in WAYS}
    ones: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    pictures: dict[str, Tensor] = {}
    rows = features = None
    for seed in range(asked.seeds):
        for way in WAYS:
            run = trained(folder / f"{way}-{seed}", options(way, seed, asked), print)
            rows = rows or run.rows()
            features = features or classifier_features(rows, say=print)
            batch, model = rows_of(rows, "test", asked.rows), run.model()
            with seeded("data"):
                data = rows.transform(rows.train[:: max(1, len(rows.train) // DRAWN)])
            results[way].append(score_run(run, rows, batch, Scoring(asked.K, proposal=Individual()), print))
            ones[way].append(one(run, distance(model, data, features)))
            if seed == 0:
                with seeded("pictures"):
                    pictures[way] = model.sample(PICTURES, mean=True)
            print(f"{way}-{seed}: {results[way][-1][0].mean:.2f} nats, {ones[way][-1]}", flush=True)
    assert rows is not None
    assert features is not None
    scored = {way: Scored(TITLES[way], *zip(*found, strict=True)) for way, found in results.items()}
    table = compared(scored, ones, rows.measure)
    tested = len(rows_of(rows, "test", asked.rows))
    about = (
        f"{asked.data}: {len(rows.train)} training rows, {rows.measure.description}; networks of "
        f"{asked.hidden} units, Z = 8, {asked.epochs} epochs, {asked.seeds} seeds. ELBO and log p(x) in nats per "
        f"datum of {tested} test rows, K = {asked.K} draws of a Gaussian fitted to each row, means over seeds, ± over "
        f"rows; bits per dimension of {rows.measure.levels} levels; differences paired by row and seed, ± over rows "
        "and seeds. Frechet: squared distance, extrapolated to infinitely many rows, of the decoder's means to "
        f"{len(data)} training rows, on {features.description}. s: the standard deviation of p(x|z), in closed form. "
        "The adversary's loss is 2 log 2 = 1.39 where it knows nothing."
    )
    RESULTS.mkdir(exist_ok=True)
    name = f"adversarial-{asked.data}"
    table.to_csv(RESULTS / f"{name}.csv", index=False)
    words = in_words(table, about)
    (RESULTS / f"{name}.md").write_text(words)
    draw(table, pictures, RESULTS / f"{name}.png")
    print(words)


if __name__ == "__main__":
    main()
