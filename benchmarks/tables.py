"""A table of mixed columns with a fifth of its cells empty: imputation, and log p of what is seen, of a VAE and others.

    python benchmarks/tables.py [--seeds 3] [--rows 4000] [--epochs 150] [--continuous]

writes benchmarks/results/tables.md, with --continuous, which leaves the other columns out, tables-continuous.md. The
table is made from three latent numbers by functions that are not linear, so that it is known what was in the empty
cells: six continuous columns, two counts, two of yes and no, and two of classes. A model is fit to training rows with
gaps, and fills the gaps of test rows that it has not seen; cells are missing completely at random. Of continuous
columns and counts, the error is the root mean square of imputed means, in standard deviations of the column; of the
others, the share of wrong classes, the likeliest being imputed.

    medians and modes    means of continuous columns and counts, the usual class of others
    mixture              of products over columns, EM on rows with gaps, components by the validation rows; exact
    Gaussians            of full covariance, likewise; where all columns are continuous
    VAE                  IWAE of K = 20 on rows with gaps (MIWAE); imputed by K = 2,000 weighted draws
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pyrovae
from pyrovae.columns import BINARY, CATEGORICAL
from pyrovae.data import Rows, load_data
from pyrovae.inference import impute, log_marginal, verdict
from pyrovae.inference.proposals import FROM_GUIDE
from pyrovae.models import Masked
from pyrovae.runs.baseline import fit_baselines

ROOT = Path(__file__).resolve().parent
SPEC = ",".join([*(f"c{i}=continuous" for i in range(6)), "n0=count", "n1=count"])


def table(rows: int, seed: int) -> pd.DataFrame:
    """Columns that are functions of three latent numbers, with noise of their own."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(rows, 3))
    noise = random.normal(size=(rows, 6))
    turn, radius = 2 * z[:, 0], 1 + 0.5 * np.tanh(z[:, 1])
    continuous = np.stack(
        [radius * np.cos(turn), radius * np.sin(turn), z[:, 0] * z[:, 1], z[:, 2] ** 2, np.sin(2 * z[:, 2]), z[:, 1]], 1
    )
    continuous += 0.15 * noise
    odds = np.stack([3 * np.sin(turn), 4 * (z[:, 2] ** 2 - 1)], 1)
    first = np.stack([3 * np.cos(turn), 3 * np.sin(turn), -3 * np.cos(turn)], 1)
    second = np.stack([3 * z[:, 1], -3 * z[:, 1], 3 * np.sin(2 * z[:, 2]), -3 * np.sin(2 * z[:, 2])], 1)
    gumbel = -np.log(-np.log(random.random((rows, 7))))
    return pd.DataFrame(
        {
            **{f"c{i}": continuous[:, i] * 10.0**i for i in range(6)},
            "n0": random.poisson(np.exp(1 + z[:, 1])),
            "n1": random.poisson(4 * radius * (1 + np.cos(turn))),
            "yes": np.where(random.random(rows) < 1 / (1 + np.exp(-odds[:, 0])), "yes", "no"),
            "far": np.where(random.random(rows) < 1 / (1 + np.exp(-odds[:, 1])), "far", "near"),
            "place": np.array(["east", "north", "west"])[(first + gumbel[:, :3]).argmax(1)],
            "kind": np.array(["a", "b", "c", "d"])[(second + gumbel[:, 3:]).argmax(1)],
        }
    )


def errors(rows: Rows, truth: Tensor, gone: Tensor, mean: Tensor, usual: Tensor) -> tuple[float, float]:
    """Of imputed test rows: the error of numbers, and the share of wrong classes."""
    assert rows.table is not None
    of_classes = torch.tensor([column.kind in (BINARY, CATEGORICAL) for column in rows.table])
    away = ((mean - truth) / truth.std(0)).square()[gone & ~of_classes]
    return away.mean().sqrt().item(), (usual != truth)[gone & of_classes].double().mean().item()


def compared(seed: int, count: int, epochs: int, continuous: bool, folder: Path) -> list[dict[str, object]]:
    """What each model does with the table of a seed."""
    whole = table(count, seed)
    if continuous:
        whole = whole.filter(regex=r"c\d")
    spec = ",".join(word for word in SPEC.split(",") if word.partition("=")[0] in whole)
    gaps = whole.astype(object).mask(np.random.default_rng(seed + 1000).random(whole.shape) < 0.2)
    path = folder / f"table{seed}.csv"
    gaps.to_csv(path, index=False)
    options = {
        "data": str(path), "columns": spec, "missing": True, "elbo": "iwae", "K": 20, "latent_dim": [6],
        "epochs": epochs,
        "likelihood": {"name": "Columns", "scale": "predicted"}, "network": {"name": "mlp", "activation": "relu"},
        "seed": seed, "device": "cpu", "eval_K": 100,
    }  # fmt: skip
    run = pyrovae.train(options, folder / f"run{seed}", plots=False)
    rows, vae = run.rows(), run.model()
    # The same rows in the same order and the same words: rows are split by their number alone.
    truth = load_data(whole, columns=spec).test
    x, seen = rows.test, ~rows.test.isnan()
    assert torch.allclose(truth[seen], x[seen])
    baselines = fit_baselines(rows, seed=seed)
    train = rows.transform(rows.train)
    mean, usual = train.nanmean(0).expand_as(x), train.nanmedian(0).values.expand_as(x).clone()
    for i, column in enumerate(rows.table or ()):
        values = train[:, i][~train[:, i].isnan()]
        usual[:, i] = values.mode().values if column.kind in (BINARY, CATEGORICAL) else usual[:, i]
    masked = Masked(vae, torch.full((x.shape[1],), torch.nan))
    ours = impute(masked.model, masked.guide, x, seen, 200, 2000, proposal=FROM_GUIDE)
    estimate = log_marginal(vae.model, vae.guide, x, 2000)
    found: list[dict[str, object]] = [
        {"model": "means and usual classes", "errors": errors(rows, truth, ~seen, mean, usual)}
    ]
    for mixture in baselines:
        exact = mixture.log_prob(x.double()).detach()
        above = estimate.estimate - exact
        imputed = mixture.impute(x.double(), seen, mean=True)[0]
        found.append(
            {
                "model": mixture.description,
                "errors": errors(rows, truth, ~seen, imputed, mixture.impute(x.double(), seen, 200).mode(0).values),
                "log p(seen)": f"{exact.mean():.3f}, exact",
                "VAE above": f"{above.mean():.3f} ± {above.std() / len(above) ** 0.5:.3f}",
            }
        )
    found.append(
        {
            "model": "VAE, MIWAE",
            "errors": errors(rows, truth, ~seen, ours.mean, ours.draws.mode(0).values),
            "log p(seen)": f"{estimate.mean:.3f} ± {estimate.monte_carlo_error:.2g}, {verdict(estimate).kind.value}",
            "ess": f"{ours.ess.median():.0f} of 2000, least {ours.ess.min():.1f}",
        }
    )
    return found


def main() -> None:
    """Compare on the tables of some seeds, and write what came out."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rows", type=int, default=4000)
    p.add_argument("--epochs", type=int, default=150)
    p.add_argument("--continuous", action="store_true", help="leave columns of other kinds out")
    options = p.parse_args()
    lines = [
        "| table | model | numbers, RMSE in sd | classes, wrong | log p(seen), nats | VAE - it, paired | ESS |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for found in compared(seed, options.rows, options.epochs, options.continuous, Path(folder)):
                numbers, classes = found["errors"]  # type: ignore[misc]
                cells = [found.get(key, "") for key in ("log p(seen)", "VAE above", "ess")]
                lines.append(
                    f"| {seed} | {found['model']} | {numbers:.3f} | {'' if options.continuous else f'{classes:.3f}'} | "
                    + " | ".join(map(str, cells))
                    + " |"
                )
                print(lines[-1], flush=True)
    columns, of, name, flag = (
        ("Six columns", "a density of 6 columns", "tables-continuous.md", " --continuous")
        if options.continuous
        else ("Twelve columns", "a density of 6 columns times a mass of 6", "tables.md", "")
    )
    head = (
        f"# A table of {'continuous' if flag else 'mixed'} columns with a fifth of its cells empty\n\n`python "
        f"benchmarks/tables.py --seeds {options.seeds} --rows {options.rows} --epochs {options.epochs}{flag}`, torch "
        f"{torch.__version__}. {columns}, of test rows that no model was fit to; {of}, of what is seen.\n\n"
    )
    (ROOT / "results" / name).write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
