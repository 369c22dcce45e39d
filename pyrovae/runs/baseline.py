"""An exact baseline: the mixture of the rows' measure with the best validation log p(x)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyrovae.errors import UsageError
from pyrovae.runs.progress import Say, silent

if TYPE_CHECKING:
    import torch

    from pyrovae.data import Rows
    from pyrovae.models.mixture import Mixture

# Numbers of components tried for the baseline, until the validation rows say that more are no better.
COMPONENTS = (1, 2, 5, 10, 20, 50, 100, 200)
MOST_ROWS = 200_000  # to fit a baseline to, whole in memory


def fit_baseline(
    rows: "Rows",
    components: Sequence[int] = COMPONENTS,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    say: Say = silent,
) -> "tuple[str, Mixture]":
    """The mixture with the best validation log p(x), fit by EM on the training rows.

    Args:
        rows: Data of either measure. Training rows that are drawn anew at each use are drawn once.
        components: Numbers of components to try, increasing; the search ends when one is worse than the one before.
        seed: Of the draw and of k-means.
        device: Where to compute.
        say: Called with a line for each mixture tried.

    Returns:
        A name, and the mixture, in double precision: covariances of images are too ill-conditioned for single.
    """
    import torch

    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture
    from pyrovae.seeding import seeded

    binary = rows.measure.kind == "mass"
    with seeded(seed, "baseline rows"):
        train = rows.transform(rows.train[:: -(-len(rows.train) // MOST_ROWS)]).to(device)
    # Nats per datum gained by an iteration below which EM ends: far below what models of so many dimensions differ by.
    # Those of full covariances are dearer, and densities spread more widely than masses.
    tolerance = rows.measure.dimensions * (1e-5 if binary else 1e-4)
    best, best_bound, best_count = None, -float("inf"), 0
    for count in components:
        if count > len(train):
            break
        mixture = BernoulliMixture(rows.event_shape, count) if binary else GaussianMixture(rows.event_shape, count)
        mixture = mixture.to(device).double()
        mixture.initialise(train, seed=seed)
        iterations = len(mixture.em(train, max_iterations=50, tolerance=tolerance)) - 1
        with torch.no_grad():
            bound = torch.cat([mixture.log_prob(block) for block in rows.validation.split(1000)]).mean().item()
        kind = "Bernoullis" if binary else "Gaussians"
        say(f"baseline: {count:>3} {kind}, validation log p(x) {bound:.2f} nats after {iterations} iterations of EM")
        if bound <= best_bound:
            break
        best, best_bound, best_count = mixture, bound, count
    if best_count == max(components) and len(components) > 1:
        say(f"baseline: {best_count} components are the most that are tried; more may be better")
    if best is None:
        raise UsageError(f"baseline: none of {list(components)} components can be fit to {len(train)} rows")
    return f"mixture of {best_count} {'Bernoullis' if binary else 'Gaussians, full covariance'}", best.eval()
