"""How far log p(x) and its verdict can be believed, on pairs whose log p(x) is known.

    python benchmarks/calibration.py alike [--repetitions 200] [--rows 100] [--K 1000] [--out FILE.csv]
    python benchmarks/calibration.py differ [--pairs 5000] [--seed 0] [--out FILE.csv]

`alike`: z ~ N(0, I_q), x|z ~ N(Wz, s2 I) with orthogonal columns of W, so that the posterior N(m(x), diag v) is known;
the guide is N(m(x), c^2 diag v), for c from 0.5 (too narrow) to 3 (too wide). For each q and c, over repetitions with
data and draws of their own:

    error       mean of (estimate - exact mean log p(x) of the rows), in nats
    covers      share of Monte Carlo intervals, estimate +- 1.96 errors, that hold the exact mean of the rows
    bootstrap   share of 95 % bootstrap intervals over rows that hold E log p(x)
    over        mean share of rows whose k-hat is over the threshold
    verdicts    how often each was given

`differ`: pairs drawn at random from families whose rows are not alike (`FAMILIES`), each pair with parameters, a guide,
data, a number of rows and a K of its own; exact answers by closed forms, sums and quadrature. For each family, of what
is called `ok`: how often the mean is too low by more than the stated bias and 2 Monte Carlo errors (wanted: at most
3 %), by more than the bias, 3 errors and 0.01 nat (wanted: never), and how often a good guide is called so.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.inference import log_marginal
from pyrovae.inference.bootstrap import interval
from pyrovae.inference.verdicts import verdict

DIMENSIONS = (2, 5, 10, 20, 50)
WIDTHS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
NOISE = 0.5
KINDS = ("exact", "ok", "unchecked", "lower bound only")


# -- Rows alike --------------------------------------------------------------------------------------------------------


class LinearGaussian:
    """The linear-Gaussian pair with q latent dimensions and a guide of c times the posterior's width.

    Args:
        q: Latent dimensions.
        c: Width.
        limit: The guide's mean is cut at so many standard deviations of the prior, where its network would saturate.
    """

    def __init__(self, q: int, c: float, limit: float = math.inf) -> None:
        self.c, self.size, self.limit = c, q + 2, limit
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
            mean = (x @ self.gain).clamp(-self.limit, self.limit)
            pyro.sample("z", dist.Normal(mean, self.c * self.scale).to_event(1))


def calibrate(q: int, c: float, repetitions: int, rows: int, num_particles: int) -> dict[str, object]:
    """One line of the table of rows that are alike."""
    torch.manual_seed(0)
    pair = LinearGaussian(q, c)
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
        **{kind: verdicts.count(kind) / repetitions for kind in KINDS},
    }


def alike(repetitions: int, rows: int, num_particles: int) -> pd.DataFrame:
    """Calibrate on rows that are alike."""
    records = []
    print(f"{'q':>3}{'width':>7}{'error':>9}{'covers':>8}{'bootstrap':>11}{'over':>7}   verdicts")
    for q in DIMENSIONS:
        for c in WIDTHS:
            r = calibrate(q, c, repetitions, rows, num_particles)
            records.append(r)
            said = ", ".join(f"{k} {100 * r[k]:.0f} %" for k in KINDS if r[k])
            figures = f"{r['error']:>9.3f}{r['covers']:>8.2f}{r['bootstrap']:>11.2f}{r['over']:>7.2f}"
            print(f"{q:>3}{c:>7.2f}{figures}   {said}", flush=True)
    return pd.DataFrame(records)


# -- Rows that differ --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pair, data, and what is true of them.

    Attributes:
        model: Pyro model.
        guide: Pyro guide.
        x: Data, shape (N, *event).
        exact: log p(x), shape (N,).
        good: Whether the guide is close to the posterior everywhere, so that `ok` is due.
    """

    model: Callable
    guide: Callable
    x: Tensor
    exact: Tensor
    good: bool


def uniform(low: float, high: float) -> float:
    """A number between two others."""
    return low + (high - low) * torch.rand(()).item()


def choice(*items: float) -> float:
    """One of some numbers."""
    return items[torch.randint(len(items), ()).item()]


def outliers(rows: int) -> Case:
    """A linear-Gaussian pair whose guide saturates, on data of which a few are far out."""
    good = torch.rand(()) < 0.3
    q = int(choice(1, 2, 5))
    pair = LinearGaussian(q, uniform(0.95, 1.2) if good else uniform(0.8, 1.5), math.inf if good else uniform(1.5, 4))
    x = pair.marginal.sample((rows,))
    x = torch.where(torch.rand(rows, 1) < uniform(0, 0.03), x * uniform(1, 10), x)
    return Case(pair.model, pair.guide, x, pair.marginal.log_prob(x), bool(good))


GRID = torch.linspace(-60, 60, 24_001, dtype=torch.float64)


def integrated(log_joint: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """log of the integral over z of exp log_joint(z), of shape (len(z), rows) for z of shape (len(z), 1)."""
    parts = [torch.logsumexp(log_joint(z[:, None]), 0) for z in GRID.split(2000)]
    return torch.logsumexp(torch.stack(parts), 0) + math.log(GRID[1] - GRID[0])


def heavy_tails(rows: int) -> Case:
    """z ~ Student-t, x|z ~ N(z, s): a guide that is linear in x, or one with tails of its own."""
    prior = dist.StudentT(torch.tensor(uniform(1.5, 8), dtype=torch.float64))
    s, good = uniform(0.3, 1.5), bool(torch.rand(()) < 0.3)
    gain, width = uniform(0.8, 1) / (1 + s**2), uniform(0.9, 2.0) * s / math.sqrt(1 + s**2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(prior.df, x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    def guide(x: Tensor) -> None:
        # For a good one, the posterior far out is that of a flat prior: N(x, s).
        shrink = gain + (1 - gain) * x.square() / (x.square() + 10) if good else gain
        with pyro.plate("data", len(x)):
            scale = torch.full_like(x, 1.3 * s if good else width)
            pyro.sample("z", dist.StudentT(torch.tensor(5.0, dtype=x.dtype), shrink * x, scale)) if good else (
                pyro.sample("z", dist.Normal(shrink * x, scale))
            )

    x = (prior.sample((rows,)) + s * torch.randn(rows, dtype=torch.float64)).clamp(-50, 50)
    exact = integrated(lambda z: prior.log_prob(z) + dist.Normal(z, s).log_prob(x), rows)
    return Case(model, guide, x, exact, good)


def rare_states(rows: int) -> Case:
    """One of S states, some of them rare, that a guide recognises more or less."""
    S, good = int(choice(2, 3, 5, 10)), bool(torch.rand(()) < 0.3)
    log_prior = torch.log_softmax(-uniform(0, 8) * torch.rand(S, dtype=torch.float64), 0)
    means, s = 3 * torch.randn(S, 2, dtype=torch.float64), uniform(0.3, 2)
    bend = uniform(0.9, 1.1) if good else uniform(0.4, 1.6)
    slight = (0.2 if good else uniform(0, 12)) * torch.rand(S, dtype=torch.float64)  # how far a state is forgotten
    floor = uniform(0.001, 0.1) if good or torch.rand(()) < 0.3 else 0.0

    def log_joint(x: Tensor) -> Tensor:
        return log_prior + dist.Normal(means, s).to_event(1).log_prob(x[..., None, :])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=log_prior))
            pyro.sample("x", dist.Normal(means[z], s).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            probs = torch.softmax(bend * log_joint(x) - slight, -1)
            pyro.sample("z", dist.Categorical(probs=(1 - floor) * probs + floor / S))

    z = dist.Categorical(logits=log_prior).sample((rows,))
    x = means[z] + s * torch.randn(rows, 2, dtype=torch.float64)
    return Case(model, guide, x, torch.logsumexp(log_joint(x), -1), good)


def two_modes(rows: int) -> Case:
    """x|z ~ N(z^2, s) or N(|z|, s), whose posterior has two modes, of which the guide takes the second more or less."""
    power, s, good = choice(1.0, 2.0), uniform(0.2, 1.5), bool(torch.rand(()) < 0.3)
    second = 0.5 if good else choice(0.0, 1e-5, 1e-3, 0.01, 0.1, 0.3)
    wide = uniform(1.1, 1.6) if good else uniform(0.8, 2)
    where = torch.linspace(0, 8, 400, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.abs() ** power, s), obs=x)

    def guide(x: Tensor) -> None:
        # Mean and spread of |z| given x, by a sum.
        log_p = -0.5 * where**2 + dist.Normal(where**power, s).log_prob(x[:, None])
        weight = torch.softmax(log_p, -1)
        mean = (weight * where).sum(-1)
        sd = (weight * (where - mean[:, None]).square()).sum(-1).sqrt() * wide + 0.05
        logits = torch.tensor([1 - second, second], dtype=x.dtype).log().expand(len(x), 2)
        parts = dist.Normal(torch.stack([mean, -mean], -1), sd[:, None].expand(-1, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))

    x = torch.randn(rows, dtype=torch.float64).abs() ** power + s * torch.randn(rows, dtype=torch.float64)
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1)
    exact = integrated(lambda z: prior.log_prob(z) + dist.Normal(z.abs() ** power, s).log_prob(x), rows)
    return Case(model, guide, x, exact, good)


def test_scores(rows: int) -> Case:
    """Item response: x_j|z ~ Bernoulli(logit a_j (z - b_j)), with a guide that is linear in the score."""
    items, good = int(choice(5, 10, 20, 40)), bool(torch.rand(()) < 0.3)
    a = torch.exp(0.6 * torch.randn(items, dtype=torch.float64)) * uniform(0.5, 2)
    b = 1.2 * torch.randn(items, dtype=torch.float64)
    width = uniform(1.1, 1.5) if good else uniform(0.7, 1.8)
    near = torch.linspace(-6, 6, 601, dtype=torch.float64)
    bits = dist.Bernoulli(logits=a * (near[:, None] - b))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=a * (z[..., None] - b)).to_event(1), obs=x)

    def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.softmax(bits.log_prob(x[:, None]).sum(-1) - near.square() / 2, -1)
        mean = (weight * near).sum(-1)
        return mean, (weight * (near - mean[:, None]).square()).sum(-1).sqrt()

    z = torch.randn(2000, 1, dtype=torch.float64)
    sample = torch.bernoulli(torch.sigmoid(a * (z - b)))
    mean, sd = posterior(sample)
    score = torch.stack([torch.ones(2000, dtype=torch.float64), sample @ a], 1)
    line = torch.linalg.lstsq(score, mean[:, None]).solution[:, 0]
    spread = (mean - score @ line).square().mean().add(sd.square().mean()).sqrt()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if good:
                loc, scale = posterior(x)
            else:
                loc, scale = line[0] + x @ a * line[1], spread.expand(len(x))
            pyro.sample("z", dist.Normal(loc, width * scale))

    x = sample[:rows]
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1)
    return Case(
        model,
        guide,
        x,
        torch.logsumexp(prior.log_prob(near)[:, None] + torch.stack([bits.log_prob(row).sum(-1) for row in x], 1), 0)
        + math.log(near[1] - near[0]),
        good,
    )


FAMILIES = (outliers, heavy_tails, rare_states, two_modes, test_scores)


def differ(pairs: int, seed: int) -> pd.DataFrame:
    """Calibrate on pairs whose rows differ; a line for each pair."""
    records = []
    for number in range(pairs):
        torch.manual_seed(seed * 1_000_000 + number)
        family = FAMILIES[number % len(FAMILIES)]
        rows, num_particles = int(choice(50, 100, 300, 1000)), int(choice(200, 500, 1000, 2000))
        case = family(rows)
        # States are drawn, which could be summed: it is the judgement of draws that is tried.
        result = log_marginal(case.model, case.guide, case.x, num_particles, seed=number, most_states=0)
        said = verdict(result)
        low = (case.exact - result.estimate).mean().item()
        bias = said.bias if said.bias is not None else math.nan
        records.append(
            {
                "family": family.__name__,
                "seed": seed,
                "number": number,
                "rows": rows,
                "K": num_particles,
                "good": case.good,
                "verdict": said.kind,
                "too_low": low,
                "bias": bias,
                "error": result.monte_carlo_error,
                "by_two": low > bias + 2 * result.monte_carlo_error,
                "by_three": low > bias + 3 * result.monte_carlo_error + 0.01,
                "reason": said.reason,
            }
        )
    return pd.DataFrame(records)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A line for each family."""
    lines = []
    for name, group in [*frame.groupby("family", sort=False), ("all", frame)]:
        ok = group[group["verdict"] == "ok"]
        good = group[group["good"]]
        poor = group[(group["verdict"] != "ok") & (group["too_low"] < 0.005)]
        lines.append(
            {
                "family": name,
                "pairs": len(group),
                "ok": len(ok),
                "of good guides": (good["verdict"] == "ok").mean(),
                "too low by > bias + 2 errors": ok["by_two"].mean(),
                "by > bias + 3 errors + 0.01": int(ok["by_three"].sum()),
                "most too low": ok["too_low"].max(),
                "median bias stated": ok["bias"].median(),
                "not ok though within 0.005": len(poor),
                "most too low of all": group["too_low"].max(),
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    """Print a table and write it."""
    parser = argparse.ArgumentParser(description="Calibrate log p(x) and its verdict on pairs with exact answers.")
    parser.add_argument("which", choices=("alike", "differ"))
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--K", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="calibration.csv")
    options = parser.parse_args()
    began = time.perf_counter()
    if options.which == "alike":
        frame = alike(options.repetitions, options.rows, options.K)
    else:
        frame = differ(options.pairs, options.seed)
        with pd.option_context("display.width", 200, "display.max_columns", None):
            print(summary(frame).to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    frame.to_csv(options.out, index=False)
    print(f"{time.perf_counter() - began:.0f} s; {options.out}")


if __name__ == "__main__":
    main()
