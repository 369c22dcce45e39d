r"""Flows as guides of a frozen decoder, and as guides and priors of pairs trained whole: bounds, and log p(x).

    python benchmarks/flows.py --out benchmarks/results/flows.md [--epochs 100] [--latent-dim 2] [--seed 0]

A VAE with a mean-field guide is trained on the digits, binarised dynamically. Its decoder and prior are then frozen,
and guides of several families trained by the ELBO, each from that encoder and for as many epochs, the mean-field one
too. So log p(x) is the same for all, and what a family adds to the bound is what it approximates better. Every guide
estimates that log p(x) by importance sampling: the estimates have to agree, and no bound may be above them.

Second, pairs are trained whole from one seed, with a flow for the guide or for the prior, and scored by log p(x).

Scored are test and validation rows together, binarised once. Nats per datum; errors are standard errors over rows, of
differences those of paired rows.
"""

import argparse
import copy
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyrovae import __version__
from pyrovae.data import load_data
from pyrovae.inference import LogMarginal, log_marginal, verdict
from pyrovae.inference.estimate import standard_error
from pyrovae.models import (
    MLP,
    VAE,
    AutoregressivePrior,
    Bernoulli,
    FullCovarianceNormal,
    Guide,
    InverseAutoregressiveFlow,
    MaskedAutoregressivePrior,
    MeanFieldNormal,
    NeuralSplinePrior,
    PlanarFlow,
    Prior,
    SplineFlow,
    StandardNormal,
    SylvesterFlow,
)

HIDDEN = (100, 100)
BATCH, RATE = 100, 2e-3
OF_GUIDES = ("guide", "bound", "above mean-field", "log p(x) - bound", "log p(x), ± Monte Carlo error", "verdict")
OF_PAIRS = ("pair", "bound", "log p(x)", "above the first", "verdict")
GUIDES: dict[str, Callable[[MLP, int], Guide]] = {
    "mean-field Gaussian": MeanFieldNormal,
    "full-covariance Gaussian": FullCovarianceNormal,
    "planar, 8 flows": lambda encoder, z: PlanarFlow(encoder, z, 8),
    "Sylvester, 4 flows": lambda encoder, z: SylvesterFlow(encoder, z, 4),
    "spline, 4 couplings": lambda encoder, z: SplineFlow(encoder, z, 4, 50),
    "inverse autoregressive, 4 flows": lambda encoder, z: InverseAutoregressiveFlow(encoder, z, 4, 50),
}
PAIRS: dict[str, tuple[Callable[[MLP, int], Guide], Callable[[int], Prior]]] = {
    "mean-field guide, standard prior": (MeanFieldNormal, StandardNormal),
    "inverse autoregressive guide, standard prior": (GUIDES["inverse autoregressive, 4 flows"], StandardNormal),
    "Sylvester guide, standard prior": (GUIDES["Sylvester, 4 flows"], StandardNormal),
    "mean-field guide, masked autoregressive prior": (MeanFieldNormal, lambda z: MaskedAutoregressivePrior(z, 2, 64)),
    "mean-field guide, neural spline prior": (MeanFieldNormal, lambda z: NeuralSplinePrior(z, 2, 64)),
    "mean-field guide, autoregressive prior": (MeanFieldNormal, lambda z: AutoregressivePrior(z, 5, 64)),
}


class Experiment:
    """The data and how all is trained and scored."""

    def __init__(self, latent_dim: int, epochs: int, particles: int, seed: int) -> None:
        rows = load_data("digits").rows("mass", binarize="dynamic")
        self.train, self.transform = rows.train.flatten(1), rows.transform
        self.x = torch.cat([rows.test, rows.validation]).flatten(1)
        self.latent_dim, self.epochs, self.particles, self.seed = latent_dim, epochs, particles, seed

    def encoder(self) -> MLP:
        """A fresh one."""
        return MLP(self.train.shape[1], hidden=HIDDEN)

    def pair(self, guide: Callable[[MLP, int], Guide], prior: Callable[[int], Prior]) -> VAE:
        """A fresh pair; its encoder and decoder are those of every other of this seed."""
        torch.manual_seed(self.seed)
        encoder = self.encoder()
        likelihood = Bernoulli(MLP(self.latent_dim, (self.train.shape[1],), hidden=HIDDEN))
        pair = VAE(prior(self.latent_dim), likelihood, guide(encoder, self.latent_dim))
        pair.initialise(self.transform(self.train))
        return pair

    def trained(self, pair: VAE) -> VAE:
        """The pair after as many epochs of the ELBO as all, with a rate that falls to 0, by a plain loop.

        Steps of so small networks are mostly the Python around them.
        """
        torch.manual_seed(self.seed)
        optimizer = torch.optim.Adam([p for p in pair.parameters() if p.requires_grad], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(self.train)).split(BATCH):
                x = self.transform(self.train[rows])
                q = pair.posterior(x)
                z = q.rsample()
                bound = pair.likelihood(z).log_prob(x) + pair.prior().log_prob(z) - q.log_prob(z)
                optimizer.zero_grad()
                (-bound.sum()).backward()
                optimizer.step()
            schedule.step()
        return pair.eval()

    def scored(self, pair: VAE) -> LogMarginal:
        """log p(x) of the scored rows, and the ELBO."""
        return log_marginal(pair.model, pair.guide, self.x, self.particles, seed=self.seed + 1)

    def frozen(self) -> dict[str, LogMarginal]:
        """Every guide on one decoder."""
        first = self.trained(self.pair(MeanFieldNormal, StandardNormal))
        first.prior.requires_grad_(False)
        first.likelihood.requires_grad_(False)
        found = {}
        for name, make in GUIDES.items():
            torch.manual_seed(self.seed)
            own = first.guides[0]
            guide = make(copy.deepcopy(own.encoder), self.latent_dim)
            guide.shift.copy_(own.shift)
            guide.rescale.copy_(own.rescale)
            with torch.no_grad():  # mean and scale as the first guide has them; what else there is starts near 0
                for ours, theirs in zip(guide.head.parameters(), own.head.parameters(), strict=True):
                    ours[len(theirs) :].mul_(0.1)
                    ours[: len(theirs)].copy_(theirs)
            found[name] = self.scored(self.trained(VAE(first.prior, first.likelihood, guide)))
            print(name, found[name].elbo.mean().item(), found[name].mean, flush=True)
        return found

    def whole(self) -> dict[str, LogMarginal]:
        """Every pair, trained whole."""
        found = {}
        for name, (guide, prior) in PAIRS.items():
            found[name] = self.scored(self.trained(self.pair(guide, prior)))
            print(name, found[name].elbo.mean().item(), found[name].mean, flush=True)
        return found


def with_error(values: Tensor, sign: str = "") -> str:
    """Mean and standard error over rows."""
    return f"{values.mean().item():{sign}.3f} ± {standard_error(values):.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def page(experiment: Experiment, frozen: dict[str, LogMarginal], whole: dict[str, LogMarginal]) -> str:
    """The record."""
    of_frozen = []
    first = next(iter(frozen.values()))
    for name, result in frozen.items():
        gained = result.elbo - first.elbo
        left = result.estimate - result.elbo
        row = [name, with_error(result.elbo), with_error(gained, "+"), with_error(left)]
        of_frozen.append(
            [*row, f"{result.mean:.3f} ± {result.monte_carlo_error:.3f}", str(verdict(result)).split(" (")[0]]
        )
    of_whole = []
    for name, result in whole.items():
        gained = result.estimate - next(iter(whole.values())).estimate
        row = [name, with_error(result.elbo), with_error(result.estimate), with_error(gained, "+")]
        of_whole.append([*row, str(verdict(result)).split(" (")[0]])
    e = experiment
    return f"""# Flows as guides and as priors

By `python benchmarks/flows.py --epochs {e.epochs} --latent-dim {e.latent_dim} --K {e.particles} --seed {e.seed}`,
pyrovae {__version__}, torch {torch.__version__}, {platform.machine()}. Digits (8 x 8 pixels, probability mass on
{{0,1}}^64), binarised dynamically; Z = {e.latent_dim}, dense networks of two hidden layers of 100; Adam, rate from 2e-3
to 0, ELBO, {e.epochs} epochs; scored are {len(e.x)} rows that nothing was trained on. Nats per datum, ± standard errors
over rows; differences are paired. log p(x) by importance sampling from the guide, K = {e.particles}.

## A frozen decoder

One decoder for all guides, so that log p(x) is the same: by each guide it is estimated with its Monte Carlo error. What
a guide leaves, log p(x) - bound, has its amortisation in it.

{table(OF_GUIDES, of_frozen)}
""" + (f"\n## Trained whole\n\n{table(OF_PAIRS, of_whole)}\n" if whole else "")


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=2)
    parser.add_argument("--K", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    experiment = Experiment(options.latent_dim, options.epochs, options.K, options.seed)
    frozen = experiment.frozen()
    options.out.write_text(page(experiment, frozen, {}), encoding="utf-8")  # what there is, if it is interrupted
    options.out.write_text(page(experiment, frozen, experiment.whole()), encoding="utf-8")


if __name__ == "__main__":
    main()
