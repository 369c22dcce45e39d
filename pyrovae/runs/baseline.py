"""Exact baselines: of each family that suits the rows, the model with the best validation log p(x)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyrovae.errors import UsageError
from pyrovae.runs.progress import Say, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.models.exact import Exact

# Numbers of components tried for a baseline, until the validation rows say that more are no better.
COMPONENTS = (1, 2, 5, 10, 20, 50, 100, 200)
MOST_ROWS = 200_000  # to fit a baseline to, whole in memory


def fit_baselines(
    rows: "Rows",
    components: Sequence[int] = COMPONENTS,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    say: Say = silent,
) -> "list[Exact]":
    """A model of each family in `BASELINES` that is of the rows' measure, in the order of that tuple.

    Args:
        rows: Data of either measure. Training rows that are drawn anew at each use are drawn once.
        components: Numbers of components to try, increasing; a family's search ends when one is worse than the one
            before. A family that can have none of them is left out, which is said.
        seed: Of the draw and of what is random in a fit.
        device: Where to compute.
        say: Called with a line for each model tried.

    Returns:
        Models in double precision: covariances of images are too ill-conditioned for single. None, which is said, where
        no family is of the rows' measure.

    Raises:
        UsageError: no family can have any of the numbers of components.
    """
    from pyrovae.models.baselines import BASELINES
    from pyrovae.seeding import seeded

    with seeded(seed, "baseline rows"):
        train = rows.transform(rows.train[:: -(-len(rows.train) // MOST_ROWS)]).to(device)
    families = [family for family in BASELINES if family.measure == rows.measure.kind]
    if not families:
        say(f"baseline: no exact one is of a {rows.measure.description}")
        return []
    found = [best_of(family, train, rows.validation, components, seed, say) for family in families]
    if not any(model for family, model in zip(families, found, strict=True) if not family.of_rows):
        raise UsageError(f"baseline: none of {list(components)} components can be fit to {len(train)} rows")
    return [model for model in found if model is not None]


def best_of(
    family: "type[Exact]",
    train: "Tensor",
    validation: "Tensor",
    components: Sequence[int],
    seed: int = 0,
    say: Say = silent,
) -> "Exact | None":
    """The model of a family that has the best validation log p(x); None if it can have no such number of components."""
    from pyrovae.models.exact import best_on

    def tried(model: "Exact", iterations: int, bound: float) -> None:
        took = "1 iteration" if iterations == 1 else f"{iterations} iterations"
        say(f"baseline: {model.description}, validation log p(x) {bound:.2f} nats after {took}")

    best = best_on(family.fitted(train, validation, components, seed), validation, tried)
    if best is None:
        say(f"baseline: left out {family.word}, of which at most {family.most_components(train)} can be fit here")
        return None
    if best.components == max(components) and len(components) > 1:
        say(f"baseline: {best.components} components are the most that are tried; more may be better")
    return best.eval()
