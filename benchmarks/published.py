"""Published claims, tried on MNIST at a size that two cores reach: what was said, what is asked for here, what is seen.

    python benchmarks/published.py RUNS --mnist ROOT [--cifar10 FILE.npz] [--epochs 20] [--seeds 1] [--only CLAIM ...]

Pairs are 784-200-200-50 with tanh, trained by Adam at 1e-3 in batches of 100 for `--epochs` epochs of 55,000 rows: a
few hundredths of published trainings, so that signs and orders can be asked for and figures cannot. log p(x) is in nats
per datum of the first test rows, by importance sampling from each pair's own guide. A claim is a mean over rows (or one
number) for each seed; its error is of rows and of seeds,

    error^2  =  Var(row means over seeds) / rows  +  Var(means of seeds) / seeds

and it is met where mean +- 2 errors lies within what is asked for, not met where it lies outside, and open otherwise.
What is done is kept in RUNS, so that the same command goes on after it was stopped. Written: results/published.md.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyrovae
from pyrovae.inference import ELBO, Individual, fit, gaps, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.noise import elements, gradients, noise_of
from pyrovae.inference.objectives import IWAE
from pyrovae.inference.pair import Pair
from pyrovae.models import VAE, Bernoulli, ContinuousBernoulli, MeanFieldNormal, SemiAmortised, StandardNormal
from pyrovae.models.networks import MLP
from pyrovae.models.vae import BottomUp
from pyrovae.runs.build import build_optimizer
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.features import classifier_features
from pyrovae.runs.scoring import rows_of
from pyrovae.seeding import seeded

OUT = Path(__file__).parent / "results" / "published.md"
CONTINUED = 0.5  # of the epochs, for which a trained pair goes on by another bound
SIDE = 16  # of the pictures of CIFAR-10


@dataclass
class Trial:
    """Runs of one seed, and numbers that are kept beside them."""

    folder: Path
    mnist: str
    cifar10: Path | None
    epochs: int
    rows: int
    K: int
    seed: int
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        common = {"compile": "on", "device": "cpu", "threads": 1, "eval_rows": 20, "eval_K": 20}
        self.options = common | {"seed": self.seed, "epochs": self.epochs}

    def run(self, name: str, **options: Any) -> Run:
        """A pair of bits of MNIST, unless other options say otherwise; trained if it is not there."""
        directory = self.folder / f"{name}-{self.epochs}-{self.seed}"
        if not (directory / "evaluation.json").exists():
            resume = (directory / "config.yaml").exists()
            print(f"training {directory.name}", flush=True)
            if "data" not in options and "first" not in options:
                mnist = {"data": "mnist", "data_root": self.mnist, "latent_dim": [50]}
                options = mnist | {"likelihood": "bernoulli", "binarize": "dynamic"} | options
            pyrovae.train({} if resume else self.options | options, directory, resume=resume, plots=False)
        return open_run(directory)

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What was made before under this name, or is made now."""
        file = self.folder / f"{name}-{self.epochs}-{self.seed}-{self.rows}-{self.K}.json"
        if not file.exists():
            print(f"computing {file.stem}", flush=True)
            file.write_text(json.dumps(make().double().tolist()))
        return torch.tensor(json.loads(file.read_text()), dtype=torch.float64)

    def values(self, run: Run) -> Tensor:
        """log p(x) of the first test rows, shape (N,)."""
        return self.kept(f"values-{run.name}", lambda: self.scored(pair_of(run), self.bits))

    def scored(self, pair: BottomUp, x: Tensor) -> Tensor:
        """log p(x) of rows x, shape (N,)."""
        return log_marginal(pair.model, pair.guide, x, self.K, seed=0).estimate

    @cached_property
    def bits(self) -> Tensor:
        """The first test rows, with one fixed binarisation."""
        return rows_of(self.elbo.rows(), "test", self.rows).x

    @property
    def elbo(self) -> Run:
        """The plain pair."""
        return self.run("elbo", elbo="elbo")

    @property
    def iwae(self) -> Run:
        """The plain pair, trained by IWAE with K = 5."""
        return self.run("iwae", elbo="iwae", K=5)

    def continued(self, run: Run, objective: ELBO | IWAE) -> Tensor:
        """log p(x) after a trained pair has gone on by a bound."""

        def make() -> Tensor:
            rows, pair = run.rows(), pair_of(run)
            fit(
                pair.model, pair.guide, rows.train, objective, transform=rows.transform, seed=self.seed,
                epochs=math.ceil(CONTINUED * self.epochs), optimizer=build_optimizer(run.recipe), compile="on",
                threads=1, progress=False,
            )  # fmt: skip
            return self.scored(pair, self.bits)

        return self.kept(f"{run.name}-by-{type(objective).__name__}", make)


def pair_of(run: Run) -> BottomUp:
    """The pair of a run."""
    pair = run.model("cpu")
    assert isinstance(pair, BottomUp)
    return pair


# -- Bounds ------------------------------------------------------------------------------------------------------------


def iwae_above_elbo(trial: Trial) -> Tensor:
    """log p(x) of the pair trained by IWAE, K = 5, less that of the ELBO's."""
    return trial.values(trial.iwae) - trial.values(trial.elbo)


def frozen_bits(trial: Trial) -> Tensor:
    """log p(x) of the pair that sees one binarisation of its training rows, less that of one that sees fresh ones."""
    return trial.values(trial.run("frozen", elbo="elbo", binarize="fixed")) - trial.values(trial.elbo)


def elbo_then_iwae(trial: Trial) -> Tensor:
    """What going on by IWAE wins over going on by the ELBO, after the ELBO."""
    return trial.continued(trial.elbo, IWAE(5)) - trial.continued(trial.elbo, ELBO())


def iwae_then_elbo(trial: Trial) -> Tensor:
    """What going on by the ELBO wins over going on by IWAE, after IWAE."""
    return trial.continued(trial.iwae, ELBO()) - trial.continued(trial.iwae, IWAE(5))


def doubly_reparameterised(trial: Trial) -> Tensor:
    """What doubly-reparameterised gradients win at K = 5."""
    run = trial.run("doubly", elbo="iwae", K=5, gradient="doubly-reparameterised")
    return trial.values(run) - trial.values(trial.iwae)


def averaged_bounds(trial: Trial) -> Tensor:
    """Signal to noise of the guide's gradient under 8 averages of 8 particles, over that under 64 particles."""

    def make() -> Tensor:
        model = pair_of(trial.elbo)
        pair, batch = Pair(model.model, model.guide), Batch(trial.bits[:20])
        places = {"guide": elements(pair, batch, trial.seed)["guide"]}
        snr = []
        for objective in (IWAE(8, num_averages=8), IWAE(64)):
            found = gradients(pair, batch, objective, places, draws=500, seed=trial.seed)["guide"]
            snr.append(noise_of(found, found).snr.value)
        return torch.tensor(snr[0] / snr[1])

    return trial.kept("averaged", make)


# -- Guides ------------------------------------------------------------------------------------------------------------


def gaps_of(trial: Trial, split: str, name: str) -> Tensor:
    """A gap of the plain pair on 100 rows of a split."""

    def make() -> Tensor:
        pair, x = pair_of(trial.elbo), rows_of(trial.elbo.rows(), split, 100).x
        found = gaps(pair.model, pair.guide, x, 1000, individual=Individual(), seed=0)
        return torch.stack([found.approximation.values, found.amortisation.values])

    return trial.kept(f"gaps-{split}", make)[("approximation", "amortisation").index(name)]


def refined(trial: Trial, steps: int) -> Tensor:
    """ELBO of 100 test rows after so many gradient steps from the encoder's answer."""

    def make() -> Tensor:
        pair = pair_of(trial.elbo)
        with seeded("refined", trial.seed):
            guide = SemiAmortised(pair.guides[0].encoder, pair.guides[0].latent_dim, steps=steps)
        guide.load_state_dict(pair.guides[0].state_dict(), strict=False)  # all but the points that steps look at
        refining = VAE(pair.prior, pair.likelihood, guide)
        return log_marginal(refining.model, refining.guide, trial.bits[:100], 1000, seed=0).elbo

    return trial.kept(f"refined-{steps}", make)


def share_closed(trial: Trial) -> Tensor:
    """The share of the amortisation gap that 20 steps close."""
    won = refined(trial, 20) - refined(trial, 0)
    return won.mean() / gaps_of(trial, "test", "amortisation").mean()


def autoregressive_flow(trial: Trial) -> Tensor:
    """What an inverse autoregressive flow of two layers wins over the mean-field guide."""
    run = trial.run("iaf", elbo="elbo", guide={"name": "iaf", "layers": 2})
    return trial.values(run) - trial.values(trial.elbo)


# -- Priors and likelihoods --------------------------------------------------------------------------------------------


def told_apart(trial: Trial, drawn: Callable[[int], Tensor]) -> float:
    """AUC of a logistic regression between test rows and draws of x, on features of a classifier; on rows held out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    features = classifier_features(trial.elbo.rows())
    real = rows_of(trial.elbo.rows(), "test", 4000).x
    with seeded("draws", trial.seed), torch.no_grad():
        seen = torch.cat([features(real), features(drawn(len(real)))]).numpy()
    labels = np.repeat([1, 0], len(real))
    held_out = np.arange(len(seen)) % 2 == 0
    fitted = LogisticRegression(max_iter=1000).fit(seen[~held_out], labels[~held_out])
    return float(roc_auc_score(labels[held_out], fitted.decision_function(seen[held_out])))


def fitted_afterwards(trial: Trial) -> Run:
    """The plain pair with a mixture of 10 Gaussians fitted to its codes."""
    prior = {"name": "mixture", "components": 10}
    return trial.run("afterwards", model="ex-post", first=str(trial.elbo.directory), prior=prior)


def mixture_afterwards(trial: Trial) -> Tensor:
    """What a mixture that is fitted to the codes afterwards wins over N(0, I)."""
    return trial.values(fitted_afterwards(trial)) - trial.values(trial.elbo)


def draws_told_apart(trial: Trial) -> Tensor:
    """How much less well draws are told from test rows with that mixture than with N(0, I), in AUC."""

    def make() -> Tensor:
        areas = [told_apart(trial, pair_of(run).sample) for run in (trial.elbo, fitted_afterwards(trial))]
        return torch.tensor(areas[0] - areas[1])

    return trial.kept("told-apart", make)


def grey_as_bits(trial: Trial) -> Tensor:
    """What a continuous Bernoulli wins over training by the Bernoulli's formula, both scored by its density."""

    def make() -> Tensor:
        run = trial.run("continuous", elbo="elbo", likelihood="continuous-bernoulli", binarize=None)
        rows, proper = run.rows(), pair_of(run)
        x = rows_of(rows, "test", trial.rows).x
        with seeded("grey", trial.seed):
            decoder, encoder = MLP(50, rows.event_shape), MLP(rows.event_shape)
        improper = VAE(StandardNormal(50), Grey(decoder), MeanFieldNormal(encoder, 50))
        improper.likelihood.initialise(rows.transform(rows.train[:5000]))
        fit(
            improper.model, improper.guide, rows.train, ELBO(), transform=rows.transform, seed=trial.seed,
            epochs=trial.epochs, optimizer=build_optimizer(run.recipe), compile="on", threads=1, progress=False,
        )  # fmt: skip
        scored = VAE(StandardNormal(50), ContinuousBernoulli(decoder), improper.guides[0])
        return trial.scored(proper, x) - trial.scored(scored, x)

    return trial.kept("grey", make)


class Grey(Bernoulli):
    """The Bernoulli's formula at grey levels, which is the logarithm of no density: what is not to be done."""

    def check_support(self, x: Tensor) -> None:
        """Anything goes."""


def simpler_pictures(trial: Trial) -> Tensor:
    """AUC of -log p(x) between the model's own test rows and the same at half the contrast: 0.5 if alike."""
    from sklearn.metrics import roc_auc_score

    def make() -> Tensor:
        if trial.cifar10 is None:
            raise SystemExit("simpler-pictures: say where CIFAR-10 is, by --cifar10")
        file = small_pictures(trial.cifar10, trial.folder / "cifar16.npz")
        run = trial.run(
            "cifar16", data=str(file), latent_dim=[64], network={"name": "mlp", "hidden": "500"},
            likelihood={"name": "discretized-logistic", "scale": "predicted"},
        )  # fmt: skip
        pair, x = pair_of(run), rows_of(run.rows(), "test", trial.rows).x
        middle = x.mean((1, 2, 3), keepdim=True)
        own, pale = (trial.scored(pair, rows) for rows in (x, (middle + (x - middle) / 2).round()))
        labels = np.repeat([0, 1], len(x))
        return torch.tensor(roc_auc_score(labels, -torch.cat([own, pale]).numpy()))

    return trial.kept("simpler", make)


def small_pictures(source: Path, file: Path) -> Path:
    """A file of CIFAR-10's rows at 16 x 16 pixels, means of 2 x 2."""
    if not file.exists():
        with np.load(source) as arrays:
            small = {
                name: torch.tensor(arrays[name]).double().unflatten(2, (SIDE, 2)).unflatten(1, (SIDE, 2)).mean((2, 4))
                for name in ("x_train", "x_test")
            }
        np.savez(file, **{name: x.round().byte().numpy() for name, x in small.items()})
    return file


# -- The table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What was published, and within which numbers the same has to lie here."""

    what: str
    source: str
    published: str
    unit: str
    low: float
    high: float
    of: Callable[[Trial], Tensor]

    @property
    def asked(self) -> str:
        """In words."""
        if self.low == -math.inf:
            return f"< {self.high:g}"
        return f"> {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


ANY = math.inf
BURDA, CREMER = (
    "[Burda et al. 2016](https://arxiv.org/abs/1509.00519)",
    "[Cremer et al. 2018](https://arxiv.org/abs/1801.03558)",
)
GHOSH = "[Ghosh et al. 2020](https://arxiv.org/abs/1903.12436)"
CLAIMS = {
    "iwae": Claim("IWAE, K = 5, less ELBO", BURDA, "+1.2", "nats", 0.5, 4, iwae_above_elbo),
    "frozen": Claim("one binarisation for training, less fresh ones", BURDA, "-2", "nats", -ANY, -0.5, frozen_bits),
    "then-iwae": Claim("after the ELBO: on by IWAE, less by the ELBO", BURDA, "+1.9", "nats", 0, ANY, elbo_then_iwae),
    "then-elbo": Claim("after IWAE: on by the ELBO, less by IWAE", BURDA, "-1.2", "nats", -ANY, 0, iwae_then_elbo),
    "doubly": Claim(
        "IWAE, K = 5: doubly reparameterised, less reparameterised",
        "[Tucker et al. 2019](https://arxiv.org/abs/1810.04152)", "+0.28", "nats", 0, ANY, doubly_reparameterised,
    ),
    "averaged": Claim(
        "signal to noise of the guide's gradient, M = K = 8 over K = 64",
        "[Rainforth et al. 2018](https://arxiv.org/abs/1802.04537)", "> 1", "ratio", 1, ANY, averaged_bounds,
    ),
    "approximation": Claim(
        "approximation gap, test rows", CREMER, "1.4", "nats", 0.5, 3, lambda t: gaps_of(t, "test", "approximation")
    ),
    "amortisation": Claim(
        "amortisation gap, test rows", CREMER, "1.3", "nats", 0.5, 3, lambda t: gaps_of(t, "test", "amortisation")
    ),
    "amortisation-test": Claim(
        "amortisation gap, test rows less training rows", CREMER, "> 0", "nats", 0, ANY,
        lambda t: gaps_of(t, "test", "amortisation") - gaps_of(t, "train", "amortisation"),
    ),
    "refined": Claim(
        "share of the amortisation gap that 20 steps close", "[Kim et al. 2018](https://arxiv.org/abs/1802.02550)",
        "most", "share", 0.6, ANY, share_closed,
    ),
    "iaf": Claim(
        "inverse autoregressive flow of 2 layers, less mean-field",
        "[Kingma et al. 2016](https://arxiv.org/abs/1606.04934)", "+1.8", "nats", 0, ANY, autoregressive_flow,
    ),
    "afterwards": Claim("mixture fitted afterwards, less N(0, I)", GHOSH, "> 0", "nats", 0.5, 3, mixture_afterwards),
    "told-apart": Claim(
        "draws told from test rows, N(0, I) less that mixture", GHOSH, "> 0", "AUC", 0, ANY, draws_told_apart
    ),
    "grey": Claim(
        "grey levels: continuous Bernoulli, less the Bernoulli's formula",
        "[Loaiza-Ganem and Cunningham 2019](https://arxiv.org/abs/1907.06845)", "> 0", "nats", 100, ANY, grey_as_bits,
    ),
    "simpler": Claim(
        "CIFAR-10, 16 x 16: rows at half contrast told as outliers by -log p(x)",
        "[Nalisnick et al. 2019](https://arxiv.org/abs/1810.09136)", "< 0.5", "AUC", -ANY, 0.3, simpler_pictures,
    ),
}  # fmt: skip


def line(claim: Claim, found: Sequence[Tensor]) -> str:
    """A line of the table: one tensor for each seed, of rows or of one number."""
    means = [values.mean().item() for values in found]
    mean, over_rows = statistics.mean(means), torch.stack(list(found)).mean(0)
    squares = over_rows.var().item() / over_rows.numel() if over_rows.numel() > 1 else 0.0
    squares += statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    low, high = mean - 2 * math.sqrt(squares), mean + 2 * math.sqrt(squares)
    met = "yes" if claim.low < low and high < claim.high else "no" if high < claim.low or low > claim.high else "open"
    error = f" ± {math.sqrt(squares):.2g}" if squares else ""
    seeds = ", ".join(f"{value:+.2f}" for value in means) if len(means) > 1 else ""
    return (
        f"| {claim.what} | {claim.source}: {claim.published} | {claim.asked} {claim.unit} | "
        f"{mean:+.2f}{error} | {seeds} | {met} |"
    )


def main() -> None:
    """Try each claim for each seed, and write the table anew after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, metavar="RUNS", help="where runs are, or are to be")
    parser.add_argument("--mnist", required=True, metavar="ROOT", help="where torchvision has MNIST")
    parser.add_argument("--cifar10", type=Path, metavar="FILE.npz", help="x_train, x_test of (N, 32, 32, 3) bytes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1000, help="test rows, the first")
    parser.add_argument("--K", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), metavar="CLAIM")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Tensor]] = {}
    for seed in range(1, asked.seeds + 1):
        trial = Trial(asked.runs, asked.mnist, asked.cifar10, asked.epochs, asked.rows, asked.K, seed)
        for name in asked.only:
            began = time.process_time()
            found.setdefault(name, []).append(CLAIMS[name].of(trial))
            lines = [line(CLAIMS[name], values) for name, values in found.items()]
            print(f"{lines[list(found).index(name)]} {time.process_time() - began:.0f} s", flush=True)
            about = (
                f"Written by `python benchmarks/published.py`: {asked.epochs} epochs, {seed} seed{'s' * (seed > 1)}; "
                f"log p(x) in nats per datum of the first {asked.rows} test rows of MNIST (mass on {{0,1}}^784, one "
                f"fixed binarisation; grey levels a density on [0,1]^784), K = {asked.K}; gaps and "
                "refining of 100 rows. ± over rows and seeds."
            )
            head = ["| | published | asked for | here | by seed | met |", "|---|---|---|---|---|---|"]
            OUT.write_text("\n".join(["# Published claims on a small scale", "", about, "", *head, *lines, ""]))


if __name__ == "__main__":
    main()
