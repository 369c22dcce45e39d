"""Exact baselines: of each family that suits the rows, the model with the best validation log p(x)."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError
from pyrovae.runs.progress import Say, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyrovae.columns import Column
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

    Of rows with gaps, of counts and of tables, a mixture of products over their columns; where all of these have
    densities, a mixture of Gaussians of full covariance as well.

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
    from pyrovae.columns import DENSITIES
    from pyrovae.models.baselines import BASELINES
    from pyrovae.models.product_mixture import MixtureOfProducts
    from pyrovae.seeding import seeded

    with seeded(seed, "baseline rows"):
        train = rows.transform(rows.train[:: -(-len(rows.train) // MOST_ROWS)]).to(device)
    if columns := columns_of(rows):
        made = (
            MixtureOfProducts(rows.event_shape, count, columns=columns).to(device).double()
            for count in components
            if count <= len(train)
        )
        fitted: list[Iterator[tuple[Any, int]]] = [((model, model.fit(train, seed)) for model in made)]
        if all(column.kind in DENSITIES for column in columns):
            fitted.append(full_covariance(train, rows.validation, components, seed))
        found = [best_model(models, rows.validation, components, say) for models in fitted]
        return [model for model in found if model is not None]
    families = [family for family in BASELINES if family.measure == rows.measure.kind and not rows.missing]
    if not families:
        say(f"baseline: no exact one is of a {rows.measure.description}")
        return []
    found = [best_of(family, train, rows.validation, components, seed, say) for family in families]
    if not any(model for family, model in zip(families, found, strict=True) if not family.of_rows):
        raise UsageError(f"baseline: none of {list(components)} components can be fit to {len(train)} rows")
    return [model for model in found if model is not None]


def full_covariance(
    train: "Tensor", validation: "Tensor", components: Sequence[int], seed: int
) -> "Iterator[tuple[Any, int]]":
    """Mixtures of Gaussians of columns (N, D), maybe with gaps: fit in the columns' standard deviations."""
    from pyrovae.models.mixture import GaussianMixture

    wide = train.double()
    unit = (wide - wide.nanmean(0)).square().nanmean(0).sqrt()
    unit = unit.where(unit > 0, 1.0)
    for model, iterations in GaussianMixture.fitted(wide / unit, validation / unit, components, seed):
        yield model.rescale(unit), iterations


def columns_of(rows: "Rows") -> "Sequence[Column]":
    """The columns of which a mixture of products is the baseline: of a table, of counts, and of vectors with gaps."""
    from pyrovae.columns import BINARY, CONTINUOUS, COUNT, Column

    kinds = {"counts": COUNT} | ({"mass": BINARY, "density": CONTINUOUS} if rows.missing else {})
    if rows.table is not None:
        return rows.table
    of_vectors = len(rows.event_shape) == 1 and rows.measure.kind in kinds
    return [Column("x", kinds[rows.measure.kind])] * rows.event_shape[0] if of_vectors else []


def best_of(
    family: "type[Exact]",
    train: "Tensor",
    validation: "Tensor",
    components: Sequence[int],
    seed: int = 0,
    say: Say = silent,
) -> "Exact | None":
    """The model of a family that has the best validation log p(x); None if it can have no such number of components."""
    best = best_model(family.fitted(train, validation, components, seed), validation, components, say)
    if best is None:
        say(f"baseline: left out {family.word}, of which at most {family.most_components(train)} can be fit here")
    return best


def best_model(
    fitted: "Iterator[tuple[Any, int]]", validation: "Tensor", components: Sequence[int], say: Say
) -> "Exact | None":
    """Of models as they are fit, the first that the next one is no better than on the validation rows; None of none."""
    from pyrovae.models.exact import best_on

    def tried(model: "Exact", iterations: int, bound: float) -> None:
        took = "1 iteration" if iterations == 1 else f"{iterations} iterations"
        say(f"baseline: {model.description}, validation log p(x) {bound:.2f} nats after {took}")

    best: Exact | None = best_on(fitted, validation, tried)
    if best is None:
        return None
    if best.components == max(components) and len(components) > 1:
        say(f"baseline: {best.components} components are the most that are tried; more may be better")
    return best.eval()
