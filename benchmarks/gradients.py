"""Signal to noise of gradients by the number of particles, on a pair whose posterior is known.

    python benchmarks/gradients.py

z ~ N(mu, I) and x ~ N(z, I) in 20 dimensions, and a guide N(x/2 + b, 2/3 I) with b off its best by sd 0.1 in every
element: the pair of Rainforth et al. 2018, https://arxiv.org/abs/1802.04537. Each row has parameters of its own, so
that one backward pass gives as many draws of the gradient by b (the guide's) and by mu (the model's) as there are rows.
Writes benchmarks/results/gradients/toy.csv and toy.png, and prints the slopes of the logarithms over K.
"""

import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import plots
from pyrovae.inference import (
    IWAE,
    DoublyReparameterised,
    LargestWeight,
    LeaveOneOut,
    OfParticles,
    ScoreFunction,
    StickingTheLanding,
    WakeSleep,
)
from pyrovae.inference.noise import noise_of

RESULTS = Path(__file__).parent / "results" / "gradients"
DRAWS, OFF, KS = 10_000, 0.1, (1, 4, 16, 64, 256)
# So many particles times draws at once.
AT_ONCE = 64_000


class Toy(nn.Module):
    """The pair, with parameters for each of n rows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        mu = torch.randn(20)
        self.x = (mu + math.sqrt(2) * torch.randn(20)).expand(n, 20)
        self.b = nn.Parameter((mu / 2 + OFF * torch.randn(20)).expand(n, 20).clone())
        self.mu = nn.Parameter(mu.expand(n, 20).clone())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.b, math.sqrt(2 / 3)).to_event(1))


def drawn(bound: OfParticles) -> dict[str, Tensor]:
    """Gradients by side, (draws, 20); on the same noise for every estimator."""
    rows = max(10, min(DRAWS, AT_ONCE // bound.num_particles))
    parts = []
    for number in range(math.ceil(DRAWS / rows)):
        pair = Toy(rows)
        torch.manual_seed(number + 1)
        bound.bound(pair.model, pair.guide, pair.x).sum().backward()
        parts.append((pair.b.grad, pair.mu.grad))
    guide, model = (torch.cat(side)[:DRAWS].double() for side in zip(*parts, strict=True))
    return {"model": model, "guide": guide}


def main() -> None:
    estimators = (StickingTheLanding, DoublyReparameterised, LargestWeight, WakeSleep, LeaveOneOut, ScoreFunction)
    records = []
    for k in KS:
        plain = IWAE(k)
        reference = drawn(plain)
        for cls in (type(plain.gradient), *estimators):
            if k < cls.least_particles or (cls is LeaveOneOut and k > 64):  # whose work grows as K^2
                continue
            bound = replace(plain, gradient=cls())
            found = reference if cls is type(plain.gradient) else drawn(bound)
            for side, sample in found.items():
                values = asdict(noise_of(sample, reference[side]))
                flat = {"gradient": cls.word, "K": k, "parameters": side}
                for name in ("variance", "snr"):
                    flat |= {name: values[name]["value"]}
                    flat |= {f"{name}_{end}": values[name][end] for end in ("low", "high")}
                records.append(flat | {"bias": values["bias"], "bias_t": values["bias_t"],
                                       "why_biased": bound.gradient.bias(bound)})  # fmt: skip
            print(k, cls.word, flush=True)
    table = pd.DataFrame(records)
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULTS / "toy.csv", index=False, float_format="%.4g")
    title = f"A linear Gaussian pair of 20 dimensions, IWAE, {DRAWS:,} draws"
    plots.gradient_noise(table, title).savefig(RESULTS / "toy.png", dpi=90)
    for (word, side), of in table.groupby(["gradient", "parameters"], sort=False):
        slopes = [
            f"{math.log(b.snr / a.snr) / math.log(b.K / a.K):.2f}" if a.snr > 0 < b.snr else "-"
            for a, b in pairwise(of.itertuples())
        ]
        print(f"{word:<24}{side:<8}", *slopes)


if __name__ == "__main__":
    main()
