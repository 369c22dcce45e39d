"""Score a run: its report, its K-curve, and draws for ArviZ."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.errors import Interrupted, OutputError, UsageError
from pyrovae.files import replaced
from pyrovae.processors import pick_device
from pyrovae.runs.build import build_objective
from pyrovae.runs.directory import Run, begins
from pyrovae.runs.features import features_for
from pyrovae.runs.figures import save_curve
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.report import Report, refuse_invalid, report_on
from pyrovae.runs.scores import Scores
from pyrovae.runs.scoring import Scoring, compile_draws, open_scores, rows_of
from pyrovae.runs.tables import describe

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch
    from pyrovae.runs.build import Model
    from pyrovae.runs.features import MakeFeatures

# Draws of each row in a netCDF file, and the bytes that they may take.
SAVED_DRAWS = 100
MOST_SAVED = 2 * 10**9


def evaluate(
    run: Run,
    how: Scoring,
    *,
    limit: int | None = None,
    split: str = "test",
    device: str = "auto",
    compile: str = "auto",
    precision: str = "fp32",
    anew: bool = False,
    netcdf: Path | None = None,
    make_features: "MakeFeatures | None" = None,
    say: Say = silent,
) -> Report:
    """Score a run, going on where an interrupted evaluation was; say and write the report and the K-curve.

    Args:
        run: The run.
        how: How log p(x) is estimated.
        limit: Score only so many rows, the first.
        split: "test", "validation" or "train".
        device: "auto", "cpu", "cuda", ...
        compile: "auto", "on" or "off": compile the draws.
        precision: "fp32" or "bf16", of compiled draws.
        anew: Forget what was scored before with these settings.
        netcdf: Where to save draws for ArviZ.
        make_features: Makes features for a Frechet distance, such as `classifier_features`; None: none.
        say: Called with each line that a user should read.

    Raises:
        UsageError: something was asked for that cannot be had.
        NumericalError: some row has no estimate.
        Interrupted: stopped, with the scores so far kept.
    """
    started, rows = time.perf_counter(), run.rows()
    batch = rows_of(rows, split, limit).to(pick_device(device))
    model = run.model(batch.x.device)
    if netcdf is not None:
        check_netcdf(netcdf, model, batch, how)
    features = None if make_features is None else features_for(make_features, rows, batch, say)
    compiled = compile_draws(model, batch, how, compile, precision)
    scores = open_scores(run, model, rows, batch, compiled, split)
    if scores is not None and anew:
        scores.clear()
    for note in [*run.notices, *(notes_on(scores) if scores is not None else ())]:
        say(f"note: {note}")
    recipe = run.recipe
    asked = {"objective": build_objective(recipe), "particle_chunk": recipe.particle_chunk, "features": features}
    with keeping(run, scores, len(batch)):
        values = report_on(model, batch, rows, compiled, split=split, store=scores, say=say, **asked)
    values["notices"] = run.notices
    run.keep("evaluation.json" if split == "test" else f"evaluation-{split}.json", values, say)
    refuse_invalid(values)
    say(describe(run.name, values))
    say(f"\n  {'time':<26}{time.perf_counter() - started:>16.1f} s")
    if values.get("K") is not None and run.writable:
        save_curve(run, values)
    if netcdf is not None:
        save_draws(netcdf, model, batch, rows, how, say)
    return values


@contextmanager
def keeping(run: Run, scores: Scores | None, rows: int) -> Iterator[None]:
    """Say how many scores are kept of an evaluation that is stopped.

    Raises:
        Interrupted: it was, and some are.
    """
    try:
        yield
    except KeyboardInterrupt:
        if scores is None or not (kept := Scores(run.directory, scores.settings).found):
            raise
        message = f"stopped; the scores of {kept} of {rows} rows are kept, and the same command goes on from there"
        raise Interrupted(message, run.directory, trained=True) from None


def notes_on(scores: Scores) -> list[str]:
    """What was found of earlier evaluations."""
    notes = []
    if scores.strange:
        notes.append(f"{scores.path}: has scores that another user or a version before wrote; they are not used")
    if scores.found:
        notes.append(
            f"{scores.found} rows were scored before with these settings, see {scores.path}; --anew repeats it"
        )
    return notes


def check_netcdf(path: Path, model: "Model", batch: "Batch", how: Scoring) -> None:
    """Refuse draws for ArviZ that cannot be made or saved, before anything is.

    Raises:
        UsageError: another proposal, no such directory, another file of that name, or too many rows for memory.
    """
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.weights import draw

    if not how.proposal.has_guide:
        raise UsageError(
            "netcdf: draws are saved from `proposal=guide` or individual, not from another",
            settings=("netcdf", "proposal=guide"),
        )
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK) or not path.resolve().parent.is_dir():
        raise UsageError(
            f"netcdf {path}: expected a file in a directory that exists ({path.resolve()})", settings=("netcdf",)
        )
    if os.path.lexists(path) and not (path.is_file() and begins(path, b"\x89HDF")):
        raise UsageError(
            f"netcdf {path}: is there already and holds no saved draws; choose another name", settings=("netcdf",)
        )
    drawn = draw(Pair(model.model, model.guide), batch[:1])
    latents = sum(latent.value[0, 0].numel() for latent in drawn.latents.values())
    each = 2 * (batch.x[0].numel() + latents) * batch.x.element_size() * SAVED_DRAWS + 8 * how.num_particles
    free = shutil.disk_usage(path.resolve().parent).free
    if (size := each * len(batch)) > free:
        raise UsageError(
            f"netcdf {path}: takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB; give `rows`",
            settings=("netcdf", "rows"),
        )
    if size > MOST_SAVED:
        most = max(1, MOST_SAVED // each)
        raise UsageError(
            f"netcdf: {SAVED_DRAWS} draws for each of {len(batch)} rows take {size / 1e9:.1f} GB of memory; give "
            f"`rows={most}` or fewer",
            settings=("netcdf", f"rows={most}"),
        )


def save_draws(path: Path, model: "Model", batch: "Batch", rows: "Rows", how: Scoring, say: Say) -> None:
    """Write posterior and predictive draws as netCDF, for ArviZ.

    Raises:
        OutputError: the file cannot be written.
    """
    from pyrovae.inference.inference_data import to_inference_data

    say(f"drawing {SAVED_DRAWS} times from p(z|x) and p(x|z) for each of {len(batch)} rows")
    data = to_inference_data(
        model.model,
        model.guide,
        batch.x,
        SAVED_DRAWS,
        how.num_particles,
        seed=how.seed,
        given=batch.given,
        measure=rows.measure.description,
        proposal=how.proposal,
    )
    try:
        with replaced(path) as temporary:
            data.to_netcdf(str(temporary))
    except OutputError as error:
        raise OutputError(f"netcdf {error}", settings=("netcdf",)) from error
