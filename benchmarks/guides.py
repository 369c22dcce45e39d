"""What guides lose where the posterior is bent, and where it has two modes: with the decoder known, and log p(x) exact.

    python benchmarks/guides.py [--epochs 200] [--seeds 0 1 2] [--pairs banana] [--out benchmarks/results]

Two pairs of the plane, z ~ N(0, I), with a decoder that is a formula:

    banana       x ~ N(z_2 + z_1^2, 0.2^2), rows below 0.5: the posterior lies along a parabola, with one mode
    two modes    x ~ N((|z_1| + 0.2 z_1, z_2), 0.4^2 I), x_1 from 0.6 to 1.8: z_1 is above 0, or not as likely below

Each guide is trained alone on the same rows by the ELBO, Gaussians a third as long as others. log p(x) is by
quadrature, so that its gap, log p(x) - ELBO, is KL(q(z|x) || p(z|x)). Mean-field's approximation gap is that of the
best mean-field Gaussian of each row; a guide of another family closes the share of it by which its own gap is smaller.
Written: guides.md, with errors over rows and the spread over seeds, and guides-PAIR.png, the posterior of a row and
every guide's answer.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.inference import ELBO, Individual, fit, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.models import (
    MLP,
    VAE,
    FullCovarianceNormal,
    Gaussian,
    Guide,
    InverseAutoregressiveFlow,
    MeanFieldNormal,
    MixtureOfNormals,
    Network,
    RowParameters,
    SemiAmortised,
    StandardNormal,
)

Z = 2
REACH, SIZE = 6.0, 241  # of the grid for log p(x), in both directions


class Bent(nn.Module):
    """z_2 + z_1^2."""

    def forward(self, z: Tensor) -> Tensor:
        return (z[..., 1] + z[..., 0].square()).unsqueeze(-1)


class Folded(nn.Module):
    """(|z_1| + 0.2 z_1, z_2)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([z[..., 0].abs() + 0.2 * z[..., 0], z[..., 1]], -1)


PAIRS: dict[str, Callable[[], Gaussian]] = {
    "banana": lambda: Gaussian(Network(Bent(), Z, 1), 0.2),
    "two modes": lambda: Gaussian(Network(Folded(), Z, 2), 0.4),
}
GUIDES: dict[str, Callable[[Tensor], Guide]] = {
    "mean-field": lambda x: MeanFieldNormal(encoder(x), Z),
    "full": lambda x: FullCovarianceNormal(encoder(x), Z),
    "semi-amortised": lambda x: SemiAmortised(encoder(x), Z, steps=20),
    "individual": lambda x: MeanFieldNormal(RowParameters(x), Z),
    "mixture": lambda x: MixtureOfNormals(encoder(x), Z, components=2),
    "flow": lambda x: InverseAutoregressiveFlow(encoder(x), Z, layers=2, hidden=64),
}


def encoder(x: Tensor) -> MLP:
    """Of rows x (N, D)."""
    return MLP(x.shape[1], hidden=(64, 64), activation="silu")


def rows(name: str, count: int) -> Tensor:
    """Draws of x from a pair that are where its posterior is what it is called after, shape (N, D)."""
    torch.manual_seed(1)
    x = PAIRS[name]()(torch.randn(20 * count, Z)).sample()
    kept = x[:, 0] < 0.5 if name == "banana" else (x[:, 0] > 0.6) & (x[:, 0] < 1.8)
    return x[kept][:count]


def grid(size: int = SIZE) -> tuple[Tensor, float]:
    """Points of the plane, shape (P, 2), and the logarithm of the area of each."""
    axis = torch.linspace(-REACH, REACH, size)
    return torch.cartesian_prod(axis, axis), 2 * (axis[1] - axis[0]).log().item()


@torch.no_grad()
def log_p(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) of each row in nats, by quadrature, shape (N,)."""
    points, log_area = grid()
    joint = [vae.log_joint(row.expand(len(points), -1), points).logsumexp(0) + log_area for row in x]
    return torch.stack(joint)


def trained(name: str, guide: str, x: Tensor, epochs: int, seed: int = 0) -> VAE:
    """The pair with that guide, trained on rows x."""
    torch.manual_seed(seed)
    vae = VAE(StandardNormal(Z), PAIRS[name](), GUIDES[guide](x))
    options: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    }
    fit(vae.model, vae.guide, x, ELBO(8), epochs=epochs, batch_size=50, seed=seed, progress=False, **options)
    return vae


@torch.no_grad()
def gap(vae: VAE, x: Tensor, exact: Tensor, draws: int = 2000) -> Tensor:
    """log p(x) - ELBO of each row in nats, shape (N,)."""
    torch.manual_seed(2)
    return exact - log_weights(vae.model, vae.guide, x, draws).mean(0)


def approximation_gap(starts: Iterable[VAE], x: Tensor, exact: Tensor) -> Tensor:
    """log p(x) - ELBO of the best mean-field Gaussian of each row, from the moments of several guides, shape (N,)."""
    torch.manual_seed(3)
    fits = [Individual("diagonal").fit(Pair(vae.model, vae.guide), Batch(x)).elbo(4000)[0] for vae in starts]
    return exact - torch.stack(fits).amax(0)


def closed(least: Tensor, own: Tensor) -> float:
    """The share of mean-field's approximation gap by which a guide's own gap is smaller, over all rows."""
    return 1 - (own.mean() / least.mean()).item()


def experiment(name: str, epochs: int, seeds: list[int], count: int = 200) -> tuple[list[str], dict[str, VAE], Tensor]:
    """Rows of a table for a pair, the guides of the first seed, and the rows that they were trained on."""
    x = rows(name, count)
    first, own = {}, {}
    for guide in GUIDES:
        enough = epochs if guide in ("mixture", "flow") else epochs // 3  # Gaussians are found sooner
        vaes = [trained(name, guide, x, enough, seed) for seed in seeds]
        exact = log_p(vaes[0], x)
        first[guide], own[guide] = vaes[0], torch.stack([gap(vae, x, exact) for vae in vaes])
        print(f"{name}, {guide}: {own[guide].mean():.3f}", flush=True)
    least = approximation_gap([first[guide] for guide in ("mean-field", "semi-amortised", "mixture")], x, exact)
    lines = []
    for guide, gaps in own.items():
        error = gaps.mean(0).std().item() / len(x) ** 0.5
        spread = f"{gaps.mean(1).std().item():.3f}" if len(seeds) > 1 else "-"
        lines.append(f"| {name} | {guide} | {gaps.mean():.3f} ± {error:.3f} | {spread} | {closed(least, gaps):.0%} |")
    error = least.std().item() / len(x) ** 0.5
    lines.append(f"| {name} | the best mean-field Gaussian of each row | {least.mean():.3f} ± {error:.3f} | | |")
    return lines, first, x


def draw(name: str, guides: dict[str, VAE], x: Tensor, path: Path) -> None:
    """The posterior of one row of a pair, and every guide's answer, as regions of 50, 90 and 99 %, into a folder."""
    from pyrovae import plots

    row = x[(x[:, 0] - (0.0 if name == "banana" else 1.2)).abs().argmin()]
    vae = next(iter(guides.values()))
    exact = log_p(vae, row[None])[0]
    panels: dict[str, Callable[[Tensor], Tensor]] = {
        "posterior": lambda z: vae.log_joint(row.expand(len(z), -1), z) - exact
    }
    for guide, of in guides.items():
        q = of.posterior(row[None])
        panels[guide] = lambda z, q=q: q.log_prob(z[:, None])[:, 0]
    points, log_area = grid()
    mass = (vae.log_joint(row.expand(len(points), -1), points) - exact + log_area).exp()
    draws = points[torch.multinomial(mass.detach(), 400, replacement=True)]
    draws = draws + 0.05 * torch.rand_like(draws)
    figure = plots.densities(draws, panels)
    regions = "the smallest regions that hold 50%, 90% and 99% of each"
    figure.suptitle(f"{name}: p(z|x) of a row and every guide's q(z|x), {regions}, and 400 draws of p(z|x)")
    for axes in figure.axes:
        axes.set_xlabel(axes.get_xlabel() and "$z_1$")
        axes.set_ylabel(axes.get_ylabel() and "$z_2$")
    figure.savefig(path / f"guides-{name.replace(' ', '-')}.png", dpi=64, bbox_inches="tight")


def main() -> None:
    """Train, tell, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="+", choices=[*PAIRS], default=[*PAIRS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "| pair | guide | gap, nats ± error over rows | sd over seeds | of mean-field's approximation gap closed |",
        "|---|---|---|---|---|",
    ]
    for name in options.pairs:
        lines, guides, x = experiment(name, options.epochs, options.seeds)
        print(*lines, sep="\n", flush=True)
        text += lines
        draw(name, guides, x, options.out)
    (options.out / "guides.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
