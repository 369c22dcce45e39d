"""Imputed halves of pictures: log p(missing | seen) of a run beside the exact mixture that `compare` chooses.

    python benchmarks/imputation.py RUN [--rows 200] [--K 1000]

Both parts of log p(x) - log p(seen) are importance-sampled from a Gaussian fitted to each row; of the mixture they are
exact. Nats per datum; the differences are paired, with their standard error over rows, and with their Monte Carlo
error. Also the mean squared error of the imputed means, over the missing elements.
"""

import argparse

import torch

from pyrovae.inference import Individual, impute, log_marginal, log_prob_missing, verdict
from pyrovae.inference.estimate import standard_error
from pyrovae.models import Masked
from pyrovae.runs.baseline import fit_baselines
from pyrovae.runs.directory import open_run
from pyrovae.runs.scoring import rows_of

HALVES = ("lower", "left")


def half(name: str, event_shape: tuple[int, ...]) -> torch.Tensor:
    """What is seen: all but one half, boolean, of the event's shape."""
    seen = torch.ones(event_shape, dtype=torch.bool)
    height, width = event_shape[-2:]
    seen[..., *((slice(height // 2, None), slice(None)) if name == "lower" else (slice(None), slice(width // 2)))] = (
        False
    )
    return seen


def main() -> None:
    """Score, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--K", type=int, default=1000)
    options = parser.parse_args()
    run = open_run(options.run)
    rows, model = run.rows(), run.model()
    x = rows_of(rows, "test", options.rows).x
    masked = Masked(model, rows.transform(rows.train).mean(0))
    baseline = fit_baselines(rows)[0]
    whole = log_marginal(model.model, model.guide, x, options.K, proposal=Individual(), seed=0)
    print(f"{run.name}, the first {len(x)} test rows; {rows.measure.description}; K = {options.K}; nats per datum")
    print(f"log p(x): {whole.mean:.3f}, {verdict(whole)}; {baseline.description}: {baseline.log_prob(x).mean():.3f}\n")
    for name in HALVES:
        seen = half(name, rows.event_shape)
        given = (seen.expand(x.shape),)
        part = log_marginal(masked.model, masked.guide, x, options.K, proposal=Individual(), seed=0, given=given)
        poor = log_marginal(masked.model, masked.guide, x, options.K, seed=0, given=given)
        missing = log_prob_missing(whole, part)
        exact = baseline.log_prob_missing(x, seen).detach()
        difference = missing.values - exact
        print(f"{name} half missing")
        print(f"  log p(seen): {part.mean:.3f}, {verdict(part)}")
        print(f"  log p(seen) by the guide, of filled rows: {poor.mean:.3f}, {verdict(poor)}")
        print(f"  log p(missing | seen): {missing.mean:.3f} ± {missing.error_over_rows:.3f}")
        print(f"  {baseline.description}: {exact.mean():.3f} ± {standard_error(exact):.3f}")
        print(
            f"  difference: {difference.mean():.3f} ± {standard_error(difference):.3f}, "
            f"Monte Carlo error {missing.monte_carlo_error:.3f}"
        )
        filled = impute(masked.model, masked.guide, x, seen, 1, options.K)
        for who, mean in ((run.name, filled.mean), (baseline.description, baseline.impute(x, seen, mean=True)[0])):
            print(f"  mean squared error of the mean, {who}: {(mean - x)[:, ~seen].square().mean():.4f}")
        print(
            f"  effective sample size: least {filled.ess.min():.1f}, median {filled.ess.median():.0f} of {options.K}\n"
        )


if __name__ == "__main__":
    main()
