"""A sigmoid belief net trained by estimators for discrete latents, from the same start on the same batches.

    python benchmarks/belief_net.py --data digits --bits 8 --epochs 60 --out FILE.csv
    python benchmarks/belief_net.py --data mnist --data-root ROOT --rows 5000 --bits 200 --epochs 12 --out FILE.csv

z of Z bits with learned logits, p(x_d|z) and q(z_d|x) each one linear layer. Every estimator takes as many steps of
Adam (rate 0.003, batches of 50). Scored by the importance-weighted bound of 1,000 draws on test rows, in nats per datum
with the error over rows; with at most 12 bits also by log p(x), the sum over all 2^Z states. Differences are to the
first estimator, REINFORCE, paired by rows. Rows are added to the file, one for each run.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.data import load_data
from pyrovae.inference import (
    ELBO,
    IWAE,
    Covariance,
    Enumerated,
    LeaveOneOut,
    OfParticles,
    Relaxed,
    ScoreFunction,
    Thermodynamic,
    WakeSleep,
    adam,
    fit,
    log_marginal,
)

EXACT_BITS = 12


class BeliefNet(nn.Module):
    """One layer of Z bits over D bits.

    Args:
        x: Training rows, (N, D): the output bias starts at the logits of their means.
        bits: Z.
    """

    def __init__(self, x: Tensor, bits: int) -> None:
        super().__init__()
        self.prior, self.encoder = nn.Parameter(torch.zeros(bits)), nn.Linear(x.shape[1], bits)
        self.decoder = nn.Linear(bits, x.shape[1])
        with torch.no_grad():
            self.decoder.bias.copy_(x.mean(0).clamp(1e-3, 1 - 1e-3).logit())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), by the sum over all states, shape (N,)."""
        z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(self.prior))
        log_prior = dist.Bernoulli(logits=self.prior).to_event(1).log_prob(z)
        log_likelihood = dist.Bernoulli(logits=self.decoder(z)[:, None]).to_event(1).log_prob(x)
        return torch.logsumexp(log_prior[:, None] + log_likelihood, 0)


def estimators(k: int, bits: int) -> dict[str, OfParticles]:
    """The bounds and estimators compared, by what tables call them."""
    found: dict[str, OfParticles] = {
        f"REINFORCE, IWAE({k})": IWAE(k, gradient=ScoreFunction()),
        f"leave one out, ELBO({k})": ELBO(k, gradient=LeaveOneOut()),
        f"VIMCO, IWAE({k})": IWAE(k, gradient=LeaveOneOut()),
        f"VIMCO, IWAE({4 * k})": IWAE(4 * k, gradient=LeaveOneOut()),
        f"wake-sleep, IWAE({k})": IWAE(k, gradient=WakeSleep()),
        f"thermodynamic({k}), covariance": Thermodynamic(k, 5, 0.03, gradient=Covariance()),
        f"relaxed, ELBO({k})": ELBO(k, gradient=Relaxed()),
    }
    if bits <= EXACT_BITS:
        found["enumerated, ELBO"] = ELBO(gradient=Enumerated())
    return found


def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of all runs."""
    return adam(parameters, lr=3e-3)


def trained(
    rows: tuple[Tensor, Tensor], bound: OfParticles, options: argparse.Namespace, seed: int
) -> dict[str, object]:
    """One run: its scores, and those of each row under "per_row"."""
    x, test = rows
    torch.manual_seed(seed)
    net = BeliefNet(x, options.bits)
    started = time.perf_counter()
    settings = {"epochs": options.epochs, "batch_size": 50, "seed": seed, "optimizer": fast}
    fit(net.model, net.guide, x, bound, compile="off", progress=False, **settings)
    seconds = time.perf_counter() - started
    net.eval()
    estimate = log_marginal(net.model, net.guide, test, num_particles=1000, seed=0).estimate
    exact = net.log_prob(test) if options.bits <= EXACT_BITS else torch.full_like(estimate, math.nan)
    return {"bound_1000": estimate, "log_p": exact, "seconds": seconds}


def rows_of(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and test rows of {0, 1}^D, grey levels by one draw."""
    rows = load_data(options.data, options.data_root).rows("mass", "fixed")
    train, test = (torch.as_tensor(np.asarray(part)).flatten(1).float() for part in (rows.train, rows.test))
    return train[: options.rows], test[: options.test_rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--bits", type=int, default=200)
    parser.add_argument("--K", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = rows_of(options)
    columns = ["data", "rows", "bits", "epochs", "seed", "estimator", "bound_1000", "error_over_rows", "log_p",
               "above_reinforce", "paired_error", "seconds"]  # fmt: skip
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for seed in range(options.seeds):
            first: Tensor | None = None
            for name, bound in estimators(options.K, options.bits).items():
                found = trained(rows, bound, options, seed)
                score, root = found["bound_1000"], math.sqrt(len(rows[1]))
                assert isinstance(score, Tensor)
                first = score if first is None else first
                difference = score - first
                record = {
                    "data": Path(options.data).stem,
                    "rows": len(rows[0]),
                    "bits": options.bits,
                    "epochs": options.epochs,
                    "seed": seed,
                    "estimator": name,
                    "bound_1000": f"{score.mean():.3f}",
                    "error_over_rows": f"{score.std() / root:.3f}",
                    "log_p": f"{found['log_p'].mean():.3f}",
                    "above_reinforce": f"{difference.mean():.3f}",
                    "paired_error": f"{difference.std() / root:.3f}",
                    "seconds": f"{found['seconds']:.0f}",
                }
                writer.writerow(record)
                file.flush()
                print(record, flush=True)


if __name__ == "__main__":
    main()
