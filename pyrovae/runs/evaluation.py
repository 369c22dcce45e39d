"""Score a run: its report, its K-curve, and draws for ArviZ."""

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.errors import Interrupted, OutputError, UsageError
from pyrovae.processors import pick_device
from pyrovae.runs.build import build_objective
from pyrovae.runs.directory import Run, begins
from pyrovae.runs.figures import save_curve
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.report import Report, refuse_invalid, report
from pyrovae.runs.scores import Scores
from pyrovae.runs.scoring import compile_draws, open_scores, rows_of
from pyrovae.runs.tables import describe

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.proposals import Proposal
    from pyrovae.runs.build import Model

# Draws of each row in a netCDF file, and the bytes that they may take.
SAVED_DRAWS = 100
MOST_SAVED = 2 * 10**9


def evaluate(
    run: Run,
    num_particles: int,
    limit: int | None,
    split: str,
    seed: int,
    chunk_size: int | None,
    device: str,
    proposal: "Proposal | None" = None,
    anew: bool = False,
    netcdf: Path | None = None,
    compile_mode: str = "auto",
    precision: str = "fp32",
    repair: bool = False,
    say: Say = silent,
) -> Report:
    """Score a run, going on where an interrupted evaluation was; say and write the report and the K-curve."""
    started = time.perf_counter()
    place = pick_device(device)
    rows = run.rows()
    batch = rows_of(rows, split, limit).to(place)
    model = run.model(place)
    if netcdf is not None:
        check_netcdf(netcdf, model, batch, num_particles, proposal)
    drawn_from = compile_draws(model, batch, num_particles, proposal, compile_mode, precision)
    scores = open_scores(run, model, rows, batch, num_particles, seed, chunk_size, drawn_from, split)
    if scores is not None and anew:
        scores.clear()
    for notice in run.notices:
        say(f"note: {notice}")
    if scores is not None and scores.strange:
        say(f"note: {scores.path}: has scores that another user or a version before wrote; they are not used")
    if scores is not None and scores.found:
        say(f"note: {scores.found} rows were scored before with these settings, see {scores.path}; --anew repeats it")
    try:
        values = report(
            model,
            batch,
            rows,
            num_particles=num_particles,
            objective=build_objective(run.recipe),
            split=split,
            seed=seed,
            chunk_size=chunk_size,
            say=say,
            proposal=drawn_from,
            store=scores,
            particle_chunk=run.recipe.particle_chunk,
            repair=repair,
        ) | {"notices": run.notices}
    except KeyboardInterrupt:
        if scores is None or not (kept := Scores(run.directory, scores.settings).found):
            raise
        message = (
            f"stopped; the scores of {kept} of {len(batch)} rows are kept, and the same command goes on from there"
        )
        raise Interrupted(message, run.directory, trained=True) from None
    name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
    run.keep(name, values, say)
    refuse_invalid(values)
    say(describe(run.name, values))
    say(f"\n  {'time':<26}{time.perf_counter() - started:>16.1f} s")
    if values["K"] is not None and run.writable:
        save_curve(run, values)
    if netcdf is not None:
        save_draws(netcdf, model, batch, rows, num_particles, seed, proposal, say)
    return values


def check_netcdf(path: Path, model: "Model", batch: "Batch", num_particles: int, proposal: "Proposal | None") -> None:
    """Refuse draws for ArviZ that cannot be made or saved, before anything is.

    Raises:
        UsageError: another proposal, no such directory, another file of that name, or too many rows for memory.
    """
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.weights import draw

    if proposal is not None and not isinstance(proposal, Individual):
        raise UsageError("--netcdf: draws are saved from --proposal guide or individual, not from another")
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK) or not path.resolve().parent.is_dir():
        raise UsageError(f"--netcdf {path}: expected a file in a directory that exists ({path.resolve()})")
    if os.path.lexists(path) and not (path.is_file() and begins(path, b"\x89HDF")):
        raise UsageError(f"--netcdf {path}: is there already and holds no saved draws; choose another name")
    latents = sum(
        latent.value[0, 0].numel() for latent in draw(Pair(model.model, model.guide), batch[:1]).latents.values()
    )
    each = 2 * (batch.x[0].numel() + latents) * batch.x.element_size() * SAVED_DRAWS + 8 * num_particles
    free = shutil.disk_usage(path.resolve().parent).free
    if (size := each * len(batch)) > free:
        raise UsageError(
            f"--netcdf {path}: takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB; give --rows"
        )
    if size > MOST_SAVED:
        raise UsageError(
            f"--netcdf: {SAVED_DRAWS} draws for each of {len(batch)} rows take {size / 1e9:.1f} GB of memory; give "
            f"--rows {max(1, MOST_SAVED // each)} or fewer"
        )


def save_draws(
    path: Path,
    model: "Model",
    batch: "Batch",
    rows: "Rows",
    num_particles: int,
    seed: int,
    proposal: "Proposal | None",
    say: Say,
) -> None:
    """Write posterior and predictive draws as netCDF, for ArviZ.

    Raises:
        OutputError: the file cannot be written.
    """
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.inference_data import to_inference_data

    say(f"drawing {SAVED_DRAWS} times from p(z|x) and p(x|z) for each of {len(batch)} rows")
    data = to_inference_data(
        model.model,
        model.guide,
        batch.x,
        SAVED_DRAWS,
        num_particles,
        seed=seed,
        given=batch.given,
        measure=rows.measure.description,
        proposal=proposal if isinstance(proposal, Individual) else None,
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        data.to_netcdf(str(partial))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"--netcdf {path}: could not be written ({error.strerror or error})") from error
