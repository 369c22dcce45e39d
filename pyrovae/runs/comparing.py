"""Runs side by side: scored on the same rows, beside exact baselines, a table for each measure."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.runs.baseline import COMPONENTS, fit_baselines
from pyrovae.runs.comparison import Scored, score_run, table
from pyrovae.runs.comparison_tables import check_replaced, present
from pyrovae.runs.directory import Run
from pyrovae.runs.features import Features, MakeFeatures, features_for, frechet_of
from pyrovae.runs.grouping import check_same_rows, load_rows, measure_of, name_pools, pools
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.quality import Draws, Reconstructs, reconstruction_values
from pyrovae.runs.quality_tables import Seen, present_quality
from pyrovae.runs.scoring import Scoring, rows_of, score

if TYPE_CHECKING:
    import torch

    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch


def compare_runs(
    runs: Sequence[Run],
    how: Scoring,
    out: Path,
    *,
    limit: int | None = None,
    device: "torch.device | str" = "cpu",
    pool: bool = True,
    components: Sequence[int] = COMPONENTS,
    make_features: MakeFeatures | None = None,
    say: Say = silent,
) -> list[Scored]:
    """Score runs, and say and write the tables, of log p(x) and of quality.

    Args:
        runs: Of one measure or of both; those of a measure on the same rows.
        how: How log p(x) is estimated; its seed is that of the bootstrap and the baselines, too.
        out: The directory of tables and figures.
        limit: Score only so many test rows, the first.
        device: Where to compute.
        pool: Whether runs that differ only in their seed are one line.
        components: Numbers of components tried for the baselines; without any there are none.
        make_features: Makes features for Frechet distances, such as `classifier_features`; None: none.
        say: Called with each line that a user should read.

    Returns:
        What was scored, baselines too.

    Raises:
        UsageError: the rows differ, or `out` has files of these names that are none of ours.
    """
    by_measure: dict[str, list[Run]] = {}
    for run in runs:
        by_measure.setdefault(measure_of(run), []).append(run)
    for kind, members in by_measure.items():
        check_same_rows(members)
        check_replaced(out, kind)
    together = pools(runs, pool)
    names = name_pools(together)
    loaded = load_rows(runs)
    everything = []
    for kind, members in by_measure.items():
        rows = loaded[members[0].directory]
        batch = rows_of(rows, "test", limit).to(device)
        features = None if make_features is None else features_for(make_features, rows, batch, say)
        of_kind = [(name, seeds) for name, seeds in zip(names, together, strict=True) if measure_of(seeds[0]) == kind]
        scored = scored_of(of_kind, rows, batch, how, say)
        # A baseline is of p(x), given nothing.
        baselines = fit_baselines(rows, components, how.seed, device, say) if components and not rows.given.name else []
        scored += [Scored(model.description, [score(model, batch, how)]) for model in baselines]
        if scored:
            present(table(scored, how.seed), rows, kind, len(batch), members[0].recipe.data, out, say)
        everything += scored
        if not rows.of_one_unit:
            continue
        models = ((name, [run.model(device) for run in seeds]) for name, seeds in of_kind)
        seen = of_quality(models, batch, rows.data_range, baselines, features, how.seed)
        present_quality(seen, rows, kind, len(batch), out, features, say)
    say(f"tables and figures in {out}")
    return everything


def scored_of(
    groups: "Iterable[tuple[str, Sequence[Run]]]", rows: "Rows", batch: "Batch", how: Scoring, say: Say
) -> list[Scored]:
    """The log p(x) of the runs of each name, but for those of a model that has no p(x)."""
    return [
        Scored(name, *zip(*(score_run(run, rows, batch, how, say) for run in seeds), strict=True))
        for name, seeds in groups
        if not seeds[0].recipe.is_reconstruction
    ]


def of_quality(
    models: "Iterable[tuple[str, Iterable[Any]]]",
    batch: "Batch",
    data_range: float,
    others: Sequence[Any] = (),
    features: Features | None = None,
    seed: int = 0,
) -> list[Seen]:
    """What is seen of each model, for the table of their quality: those that neither reconstruct nor draw are left out.

    Args:
        models: Trained pairs by name, one for each seed; each is made when it is its turn.
        batch: Rows, the same for all.
        data_range: The greatest less the least value that an element can have.
        others: Fitted baselines with a `description`, with a density or without one.
        features: Of what the Frechet distances are; without them there are none.
        seed: Of the draws.
    """
    found = []
    for name, seeds in chain(models, ((model.description, [model]) for model in others)):
        values, distances = [], []
        for model in seeds:
            if isinstance(model, Reconstructs):
                values.append(reconstruction_values(model, batch, data_range))
            if features is not None and isinstance(model, Draws):
                distances.append(frechet_of(model, batch, features, seed))
        found += [Seen(name, values, distances)] if values or distances else []
    return found
