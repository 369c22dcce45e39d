"""How far log p(x) and its verdict can be believed, on pairs whose log p(x) is known.

    python benchmarks/calibration.py [--repetitions 200] [--rows 100] [--K 1000] [--out calibration.csv]

z ~ N(0, I_q), x|z ~ N(Wz, s2 I) with orthogonal columns of W, so that the posterior N(m(x), diag v) is known; the guide
is N(m(x), c^2 diag v), for c from 0.5 (too narrow) to 3 (too wide). For each q and c, over repetitions with data and
draws of their own:

    error       mean of (estimate - exact mean log p(x) of the rows), in nats
    covers      share of Monte Carlo intervals, estimate +- 1.96 errors, that hold the exact mean of the rows
    bootstrap   share of 95 % bootstrap intervals over rows that hold E log p(x)
    over        mean share of rows whose k-hat is over the threshold
    verdicts    how often each was given
"""

import argparse
import time

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.inference import log_marginal
from pyrovae.inference.bootstrap import interval
from pyrovae.inference.verdict import verdict

DIMENSIONS = (2, 5, 10, 20, 50)
WIDTHS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
NOISE = 0.5


class Pair:
    """The linear-Gaussian pair with q latent dimensions and a guide of c times the posterior's width."""

    def __init__(self, q: int, c: float) -> None:
        self.c, self.size = c, q + 2
        basis = torch.linalg.qr(torch.randn(self.size, q, dtype=torch.float64))[0]
        self.w = basis * torch.linspace(0.5, 2.0, q, dtype=torch.float64)
        precision = self.w.square().sum(0) / NOISE**2 + 1
        self.scale = precision.rsqrt()
        self.gain = self.w / NOISE**2 / precision
        covariance = self.w @ self.w.T + NOISE**2 * torch.eye(self.size, dtype=torch.float64)
        self.marginal = dist.MultivariateNormal(torch.zeros(self.size, dtype=torch.float64), covariance)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.w.shape[1]), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.gain, self.c * self.scale).to_event(1))


def calibrate(q: int, c: float, repetitions: int, rows: int, num_particles: int) -> dict[str, object]:
    """One line of the table."""
    torch.manual_seed(0)
    pair = Pair(q, c)
    population = -pair.marginal.entropy().item()
    errors, covered, held, over, verdicts = [], 0, 0, 0.0, []
    for repetition in range(repetitions):
        x = pair.marginal.sample((rows,))
        result = log_marginal(pair.model, pair.guide, x, num_particles, seed=repetition)
        error = result.mean - pair.marginal.log_prob(x).mean().item()
        errors.append(error)
        covered += abs(error) <= 1.96 * result.monte_carlo_error + 1e-9
        low, high = interval(result.estimate, seed=repetition)
        held += low <= population <= high
        over += (result.pareto_k > result.k_threshold).double().mean().item()
        verdicts.append(verdict(result).kind)
    return {
        "q": q,
        "width": c,
        "K": num_particles,
        "error": sum(errors) / repetitions,
        "covers": covered / repetitions,
        "bootstrap": held / repetitions,
        "over": over / repetitions,
        **{kind: verdicts.count(kind) / repetitions for kind in ("exact", "ok", "lower bound only")},
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description="Calibrate log p(x) and its verdict on linear-Gaussian pairs.")
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--K", type=int, default=1000)
    parser.add_argument("--out", default="calibration.csv")
    options = parser.parse_args()
    began = time.perf_counter()
    records = []
    print(f"{'q':>3}{'width':>7}{'error':>9}{'covers':>8}{'bootstrap':>11}{'over':>7}   verdicts")
    for q in DIMENSIONS:
        for c in WIDTHS:
            r = calibrate(q, c, options.repetitions, options.rows, options.K)
            records.append(r)
            said = ", ".join(f"{k} {100 * r[k]:.0f} %" for k in ("exact", "ok", "lower bound only") if r[k])
            figures = f"{r['error']:>9.3f}{r['covers']:>8.2f}{r['bootstrap']:>11.2f}{r['over']:>7.2f}"
            print(f"{q:>3}{c:>7.2f}{figures}   {said}", flush=True)
    pd.DataFrame(records).to_csv(options.out, index=False)
    print(f"{time.perf_counter() - began:.0f} s; {options.out}")


if __name__ == "__main__":
    main()
