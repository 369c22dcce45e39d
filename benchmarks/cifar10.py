"""The record of the example on CIFAR-10: tables and pictures of runs that the recipes made, in results/cifar10.

    for name in review learned-scale predicted-scale convolutional; do
      python -m pyrovae.fit --config recipes/cifar10-$name.yaml --data FILE.npz --out RUNS/$name
    done
    python benchmarks/cifar10.py RUNS

Every log p(x) is of the first 1000 test rows. SSIM is of the mean of p(x|z) at the mean of q(z|x). The columns of
single latent dimensions are left out of the record by epoch.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae import plots
from pyrovae.data import Rows
from pyrovae.inference import layers
from pyrovae.inference.estimate import standard_error
from pyrovae.inference.marginal import exact
from pyrovae.models import PPCA, VAE, FactorAnalysis, GaussianMixture, KernelDensity
from pyrovae.models.exact import Exact
from pyrovae.quality import reconstruction_quality, ssim
from pyrovae.runs.baseline import best_of
from pyrovae.runs.directory import Run, open_run

OUT = Path(__file__).parent / "results" / "cifar10"
NAMES = {
    "review": "the review's",
    "learned-scale": "learned scale",
    "predicted-scale": "predicted scale",
    "convolutional": "convolutional, predicted scale",
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SCORED = 1000  # test rows
# Numbers of components that are tried, until more are worse; covariances are of 3072 elements.
COMPONENTS = {"ppca": (100, 200, 400, 800, 1600), "mixture": (1, 2), "kde": (10_000,)}


def line(name: str, run: Run, vae: VAE, rows: Rows) -> dict[str, object]:
    """What the table says of a run: its evaluation, the quality of its reconstructions, and its time."""
    found, history = run.evaluation, run.history
    assert found is not None
    assert history is not None
    x = rows.test[:SCORED]
    quality = reconstruction_quality(x, vae.reconstruct(x), data_range=1.0)
    return {
        "run": name,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "epochs": len(history),
        "best epoch": int(history.validation_bound.argmax()) + 1,
        "training, minutes": round(history.seconds.sum() / 60, 1),
        "rows per second": round(history.rows_per_second.median()),
        "log p(x), nats": round(found["log_marginal"], 1),
        "error over rows": round(found["error_over_rows"], 1),
        "Monte Carlo error": round(found["monte_carlo_error"], 2),
        "K": found["K"],
        "rows": found["rows"],
        "verdict": found["verdict"],
        "bits per dimension": round(found["bits_per_dimension"], 4),
        "error, bits": round(found["error_over_rows"] / (x[0].numel() * math.log(2)), 4),
        "ELBO, nats": round(found["elbo"], 1),
        "KL, nats": round(found["kl"], 1),
        "active units": found["active_units"],
        "SSE": round(quality["sse"].mean().item(), 2),
        "PSNR, dB": round(quality["psnr"].mean().item(), 2),
        "SSIM": round(quality["ssim"].mean().item(), 3),
        "error of SSIM": round(standard_error(quality["ssim"]), 3),
    }


def exact_line(model: Exact, rows: Rows) -> dict[str, object]:
    """What the table says of a model whose log p(x) is exact."""
    with torch.no_grad():
        found = exact(model.log_prob(rows.test[:SCORED]))
    return {
        "run": model.description,
        "parameters": sum(p.numel() for p in model.parameters()),
        "log p(x), nats": round(found.mean, 1),
        "error over rows": round(found.error_over_rows, 1),
        "rows": len(found.estimate),
        "verdict": "exact",
        "bits per dimension": round(rows.measure.bits_per_dimension(found.mean) or math.nan, 4),
        "error, bits": round(found.error_over_rows / (rows.test[0].numel() * math.log(2)), 4),
    }


def baselines(rows: Rows) -> list[Exact]:
    """The best of each family by the validation rows, and factor analysis with as many factors as PPCA."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train = rows.transform(rows.train)
    families = (PPCA, GaussianMixture, KernelDensity)
    found = [best_of(family, train, rows.validation, COMPONENTS[family.word], say=print) for family in families]
    models = [model for model in found if model is not None]
    return [*models, *(factor_analysis(model, train) for model in models if isinstance(model, PPCA))]


def factor_analysis(start: PPCA, train: Tensor) -> FactorAnalysis:
    """By EM from PPCA, until a step gains less than a nat: its `fit` would decompose 3072 x 3072 hundreds of times."""
    model = FactorAnalysis(start.event_shape, components=start.components).double()
    with torch.no_grad():
        model.weight.copy_(start.weight)
        model.log_scale.copy_(start.log_scale.expand_as(model.log_scale))
    climbed = model.em(train, max_iterations=100, tolerance=1.0)
    print(f"factor analysis: {len(climbed) - 1} steps of EM, the last of {climbed[-1] - climbed[-2]:.2f} nats")
    return model.eval()


def similarity(vae: VAE, rows: Rows) -> pd.DataFrame:
    """SSIM of training and of test rows, with the right and with the flattering data range."""
    lines = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"training": rows.transform(rows.train[:SCORED]), "test": rows.test[:SCORED]}
    for split, x in parts.items():
        for data_range in (1.0, 2.0):
            values = ssim(x, vae.reconstruct(x), data_range)
            mean, error = values.mean().item(), standard_error(values)
            extremes = (values.min().item(), values.max().item())
            lines.append((split, len(x), data_range, *(round(v, 3) for v in (mean, error, *extremes))))
    return pd.DataFrame(
        lines, columns=["rows of", "rows", "data range", "SSIM", "error over rows", "least", "greatest"]
    )


def spreads(vae: VAE, rows: Rows, draws: dict[str, Tensor]) -> pd.DataFrame:
    """How much pictures differ from each other: data, reconstructions, and what is decoded from draws of z."""
    pictures = {"data": rows.test[:SCORED], "reconstructions": vae.reconstruct(rows.test[:SCORED])}
    pictures |= {f"z from {name}": vae.decode(z) for name, z in draws.items()}
    lines = {
        name: {
            "sd of a pixel over pictures": round(x.std(0).mean().item(), 3),
            "sd of a picture's mean": round(x.flatten(1).mean(1).std().item(), 3),
            "pixels outside [0, 1], %": round(100 * ((x < 0) | (x > 1)).float().mean().item(), 1),
        }
        for name, x in pictures.items()
    }
    return pd.DataFrame(lines).T.rename_axis("pictures").reset_index()


def pictures_of(vae: VAE, rows: Rows) -> None:
    """The review's figures, of the run at full length."""
    title, labels = "The review's pair, full length", rows.labels["test"]
    assert labels is not None
    names = [CLASSES[label] for label in labels.tolist()]
    save(plots.reconstructions(rows.test[:10], vae.reconstruct(rows.test[:10]), title), "review-reconstructions")
    save(plots.latent_map(vae.encode(rows.test), names, f"{title}: means of q(z|x)"), "review-codes")
    z = torch.randn(100, 256)
    wide = "Means of p(x|z), z from N(0, I): 1.41 times too wide"
    save(plots.grid(vae.decode(z), 10, wide, title=title), "review-draws-too-wide")
    narrow = "Means of p(x|z), z from N(0, I/2), as trained; the same draws"
    save(plots.grid(vae.decode(math.sqrt(0.5) * z), 10, narrow, title=title), "review-draws")
    codes = vae.encode(rows.test[:4])
    near = vae.decode(codes[:, None] + 0.1 * torch.randn(4, 8, 256))
    save(plots.neighbourhood(rows.test[:4], near, f"{title}; codes + 0.1 ε"), "review-neighbours")


def save(figure: Figure, name: str) -> None:
    """A figure of modest size: these are kept with the sources."""
    figure.savefig(OUT / f"{name}.png", dpi=120)


def of_review(run: Run, vae: VAE, rows: Rows) -> None:
    """What the record has of the review's own pair alone."""
    history = run.history
    assert history is not None
    single = [column for column in history if column.startswith("kl_")]
    history.drop(columns=single).round(4).to_csv(OUT / "review-epochs.csv", index=False)
    layers(vae.model, vae.guide, rows.test).to_csv(OUT / "layers.csv", index=False)
    similarity(vae, rows).to_csv(OUT / "ssim.csv", index=False)
    z = torch.randn(SCORED, 256)
    spreads(vae, rows, {"N(0, I/2)": math.sqrt(0.5) * z, "N(0, I)": z}).to_csv(OUT / "draws.csv", index=False)
    pictures_of(vae, rows)


def main() -> None:
    """Read the runs, fit the baselines, write tables and pictures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, metavar="RUNS", help="folder of the runs")
    given = arguments.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    lines = []
    for name, words in NAMES.items():
        if not (given.runs / name).exists():
            continue
        run = open_run(given.runs / name)
        vae, rows = run.model(), run.rows()
        assert isinstance(vae, VAE)
        lines.append(line(words, run, vae, rows))
        if name == "review":
            of_review(run, vae, rows)
    lines += [exact_line(model, rows) for model in baselines(rows)]
    pd.DataFrame(lines).to_csv(OUT / "runs.csv", index=False)
    print(pd.DataFrame(lines).to_string())


if __name__ == "__main__":
    main()
