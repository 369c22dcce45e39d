"""From a recipe to a run: a trained and scored directory."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.checks import describe
from pyrovae.errors import CheckpointError, DataError, Interrupted, UsageError
from pyrovae.files import write_json
from pyrovae.inference.diagnostics import remarks
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import check_precision
from pyrovae.inference.training.checkpoint import Checkpoint, kept_in, load_latest, lock, save
from pyrovae.inference.training.record import Progress, Record
from pyrovae.inference.training.trainer import Fit, fit
from pyrovae.inference.verdicts import Kind
from pyrovae.models import VAE, Exact, Perception, Reconstruction
from pyrovae.models.two_stage import SecondStage
from pyrovae.processes import leading, several
from pyrovae.processors import pick_device, threads
from pyrovae.runs.baseline import MOST_ROWS
from pyrovae.runs.build import build_model, build_objective, build_optimizer, build_rows, build_schedule, settle
from pyrovae.runs.codes import fit_codes
from pyrovae.runs.directory import (
    Run,
    check_folders,
    claim,
    clear,
    differences,
    fresh_directory,
    open_run,
    position,
    write_recipe,
)
from pyrovae.runs.features import network_for
from pyrovae.runs.figures import write_plots
from pyrovae.runs.options import RESUMABLE
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.quality import epoch_metrics
from pyrovae.runs.recipe import Options, Recipe, title, warnings
from pyrovae.runs.report import NO_DENSITY, Report, refuse_invalid, report_on
from pyrovae.runs.scoring import Scoring, rows_of, score
from pyrovae.runs.stages import FirstStage, check_kept, first_stage
from pyrovae.runs.starts import note_start
from pyrovae.runs.tables import describe_bound, describe_model, short_table
from pyrovae.seeding import seeded

if TYPE_CHECKING:
    import torch

    from pyrovae.data import Rows
    from pyrovae.runs.build import Model

# Rows that a model is initialised at: means and k-means need no more.
INITIAL_ROWS = 20_000
# Lines said of the epochs of a run whose output is no terminal.
EPOCH_LINES = 20

# What is entered while steps are taken, and asked after each whether to stop.
Stopping = AbstractContextManager[Callable[[], bool]]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before its first step; nothing has been written for it yet."""

    run: Run
    rows: "Rows"
    model: "Model"
    device: "torch.device"
    resume: bool


def train(
    recipe: Recipe | Options,
    directory: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    plots: bool = True,
    say: Say | None = None,
    stopping: Stopping | None = None,
) -> Run:
    """Train a model, score its test rows, and keep all of it in a run directory.

    Args:
        recipe: What to train, on what, how: a recipe, or options as one is made of.
        directory: Where; None: a new one, runs/NAME.
        resume: Continue the run of that directory, with its own recipe but for what is given here.
        overwrite: Replace the run of that directory.
        plots: Draw its figures.
        say: Called with each line that a user should read; a progress bar goes with it. None: quietly.
        stopping: Entered while steps are taken; what it yields is asked after each whether to stop. None: never.

    Returns:
        The run: its `model()`, `rows()`, `recipe`, `evaluation` (in nats per datum) and `history`.

    Raises:
        UsageError: the directory holds something else, or the recipe makes no sense, alone or for these rows.
        DataError: the data is missing, damaged, unfit for the likelihood, or has changed since a run was started.
        CheckpointError: there is no run to resume, or it is one of another recipe.
        NumericalError: a loss, a gradient or the estimate of a row is not a number.
        OutputError: the directory cannot be written.
        Interrupted: stopped, with everything saved.
    """
    started = time.perf_counter()
    progress = say if leading() else None
    tell = progress or silent
    prepared = prepare(recipe_of(recipe, directory, resume), directory, resume, tell)
    run = prepared.run
    if leading():
        check_folders(run.directory)
        if not resume:
            claim(run.directory, run.recipe, overwrite)
    with lock(run.directory) if leading() else nullcontext() as notice:
        if notice:
            tell(f"note: {notice}")
        begin = begin_run(run, resume, prepared.device)
        if not (run.directory / "config.yaml").exists():
            begin()  # so that a run that is killed while it compiles can be resumed
        announce(prepared, tell)
        ready = time.perf_counter()
        if run.recipe.is_closed_form:
            fitted = keep_fitted(prepared, begin)
        else:
            fitted = take_steps(prepared, begin, progress, stopping or nullcontext(lambda: False))
        check_finished(run, fitted)
        seconds = {"start": ready - started, "training": time.perf_counter() - ready}
        if leading():
            with saved(run), threads(run.recipe.threads):
                conclude(prepared, fitted, seconds, plots, progress)
    return run


@contextmanager
def saved(run: Run) -> Iterator[None]:
    """Say that a training is saved whose evaluation is stopped.

    Raises:
        Interrupted: it was.
    """
    try:
        yield
    except KeyboardInterrupt:
        message = "stopped while evaluating; the training is saved"
        raise Interrupted(message, run.directory, trained=True) from None


def recipe_of(asked: Recipe | Options, directory: str | Path | None, resume: bool) -> Recipe:
    """The recipe of a new run, or of the one to resume."""
    options = options_of(asked)
    if resume:
        return continued(directory, options)
    if several() and options.get("seed") is None:
        raise UsageError("seed: several processes must be given one, so that they agree", settings=("seed",))
    return asked.settled(data_hash="") if isinstance(asked, Recipe) else Recipe(**options)


def options_of(asked: Recipe | Options) -> Options:
    """The options that a recipe was made of, or is to be made of.

    Raises:
        UsageError: they are none.
    """
    if isinstance(asked, Recipe):
        return dict(asked.given)
    if not isinstance(asked, Mapping) or not all(isinstance(key, str) for key in asked):
        raise UsageError(
            f'recipe: expected a Recipe, or options such as {{"data": "digits"}}, got {describe(asked)}; those of a '
            "file are yaml.safe_load of its text"
        )
    return dict(asked)


def prepare(recipe: Recipe, directory: str | Path | None, resume: bool, say: Say) -> Prepared:
    """Load the rows and make the model; everything that can be refused before anything is written is."""
    for note in warnings(recipe):
        say(f"note: {note}")
    device = pick_device(recipe.device)
    check_precision(recipe.precision, device)
    expected = recipe.data_hash
    started = resume and directory is not None and kept_in(Path(directory))
    below = first_stage(recipe.first) if recipe.first and not started else None
    if below is not None and directory is not None:
        check_kept(recipe.first.name, Path(directory))
    if below is not None and not resume:
        recipe = below.taken_over(recipe)
    rows = build_rows(recipe)
    for note in rows.notices:
        say(f"note: {note}")
    if expected and rows.hash != expected:
        raise DataError(
            f"{directory}: the data has changed since the run started: hash {rows.hash[:12]} now, {expected[:12]} then"
        )
    if below is not None:
        below.check_rows(rows, recipe.first.name)
    recipe = settle(recipe, rows)
    model = initialised_model(recipe, rows, below, say)
    check_optimizer(recipe, model)
    run = Run(fresh_directory(title(recipe)) if directory is None else Path(directory), recipe)
    return Prepared(run, rows, model, device, resume)


def begin_run(run: Run, resume: bool, device: "torch.device") -> Callable[[], None]:
    """What makes a directory that of a run, by the process that writes."""

    def begin() -> None:
        if leading():
            if not resume:
                clear(run.directory)
            write_recipe(run.directory, run.recipe)
            note_start(run.directory, device.type)

    return begin


def initialised_model(recipe: Recipe, rows: "Rows", below: FirstStage | None = None, say: Say = silent) -> "Model":
    """The pair with its parameters drawn and started at the training rows, on a trained first stage if it has one."""
    with seeded(recipe.seed, "model"):
        model = build_model(recipe, rows.event_shape)
        spread = max(1, len(rows.train) // INITIAL_ROWS)
        if recipe.is_closed_form:
            spread = -(-len(rows.train) // MOST_ROWS)
        if isinstance(model, Exact) and recipe.is_closed_form:
            model.fit(rows.transform(rows.train[::spread]), recipe.seed, rows.validation)
            return model
        if below is not None and isinstance(model, SecondStage):
            model.first.load_state_dict(below.vae.state_dict())
        if isinstance(model, VAE) and isinstance(model.judge, Perception):
            model.judge.through(network_for(recipe.elbo.settings["network"], rows, say))
        given: Any = (value[::spread] for value in rows.given["train"])  # nothing, but for what takes it
        model.initialise(rows.transform(rows.train[::spread]), *given)
    return model


def check_optimizer(recipe: Recipe, model: "Model") -> None:
    """Refuse an optimiser that cannot be made for these parameters, before anything is written."""
    if recipe.is_closed_form:
        return
    try:
        build_optimizer(recipe)(list(model.parameters()))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer={recipe.optimizer}: {error}; choose another", settings=(f"optimizer={recipe.optimizer}",)
        ) from error


def announce(prepared: Prepared, say: Say) -> None:
    """Say what is about to be trained."""
    from torch import Tensor

    recipe, rows = prepared.run.recipe, prepared.rows
    parameters = f"{sum(p.numel() for p in prepared.model.parameters()):,} parameters"
    if frozen := sum(p.numel() for p in prepared.model.parameters() if not p.requires_grad):
        parameters += f", of which the first stage's {frozen:,} are frozen"
    how = f", binarisation {rows.binarize}" if rows.binarize else ""
    counts = ", ".join(f"{len(getattr(rows, split))} {split}" for split in ("train", "validation", "test"))
    streamed = "" if isinstance(rows.train, Tensor) else ", training rows read from the file at every step"
    say(f"data   {recipe.data}: {counts} rows{streamed}")
    say(f"       {rows.measure.description}{how}")
    say(f"model  {describe_model(recipe)}; {parameters}")
    precision = "" if recipe.precision == "fp32" else f", {recipe.precision}"
    say(f"bound  {describe_bound(recipe)}; seed {recipe.seed}, on {prepared.device.type}{precision}")
    say(f"run    {prepared.run.directory}")


def take_steps(prepared: Prepared, begin: Callable[[], None], say: Say | None, stopping: Stopping) -> Fit:
    """Run the training loop."""
    recipe, rows, model = prepared.run.recipe, prepared.rows, prepared.model
    tell = say or silent
    resume = prepared.resume and kept_in(prepared.run.directory)
    if prepared.resume and not resume:
        tell("note: the run was stopped before its first checkpoint, so it starts from the beginning")
    every = max(1, recipe.epochs // EPOCH_LINES)
    shown = sys.stderr is not None and sys.stderr.isatty()  # by a bar

    def on_epoch(metrics: dict[str, float]) -> None:
        epoch = int(metrics["epoch"])
        if not shown and (epoch % every == 0 or epoch in (1, recipe.epochs)):
            tell(epoch_in_words(metrics))

    def note(text: str) -> None:
        tell(f"note: {text}")

    def on_start() -> None:
        if isinstance(model, VAE) and isinstance(model.judge, Perception):
            model.judge.check_resumed()
        begin()

    with stopping as should_stop:
        return fit(
            model.model,
            model.guide,
            rows.train,
            build_objective(recipe, -(-len(rows.train) // recipe.batch_size), len(rows.train)),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            optimizer=build_optimizer(recipe),
            schedule=build_schedule(recipe),
            validation=rows.validation,
            given=rows.given["train"],
            validation_given=rows.given["validation"],
            transform=rows.transform,
            patience=recipe.patience,
            seed=recipe.seed,
            device=prepared.device,
            compile=recipe.compile,
            precision=recipe.precision,
            particle_chunk=recipe.particle_chunk,
            threads=recipe.threads,
            directory=prepared.run.directory,
            resume=resume,
            progress=say is not None,
            on_start=on_start,
            on_epoch=on_epoch,
            on_notice=note,
            should_stop=should_stop,
            extra_metrics=epoch_metrics(model, rows),
        )


def check_finished(run: Run, fitted: Fit) -> None:
    """Refuse to go on with a training that was stopped.

    Raises:
        Interrupted: it was, with its state saved.
    """
    if fitted.stopped == "interrupted":
        where = f"epoch {len(fitted.history) + 1}, step {fitted.step}"
        raise Interrupted(f"stopped at {where}; the state is saved", run.directory, trained=False)


def epoch_in_words(metrics: dict[str, float]) -> str:
    """What is said of an epoch."""
    train, validation = (
        f"{part}_bound" if f"{part}_bound" in metrics else f"{part}_objective" for part in ("train", "validation")
    )
    bounded = validation == "validation_bound"
    word = "train" if bounded == (train == "train_bound") else "maximised"  # which is no bound, as the other is
    counted = bounded and "active_units" in metrics
    active = f", {int(metrics['active_units'])} active units" if counted else ""
    return (
        f"epoch {int(metrics['epoch']):>4}  {word} {metrics[train]:.2f}, "
        f"validation {metrics[validation]:.2f} nats{active}, {metrics['rows_per_second']:,.0f} rows/s"
    )


def keep_fitted(prepared: Prepared, begin: Callable[[], None]) -> Fit:
    """Keep a model that has been fit in closed form, as a run of one epoch and step: its state, and how good it is."""
    run, rows, model = prepared.run, prepared.rows, prepared.model
    started = time.perf_counter()
    begin()
    if isinstance(model, Exact):
        found = {"validation_bound": score(model, rows_of(rows, "validation"), Scoring(0)).mean}
    else:
        measured = epoch_metrics(model, rows)
        found = measured() if measured else {}
    metrics = {"epoch": 1, "step": 1, **found, "seconds": time.perf_counter() - started}
    progress = Progress(1, 1, best_epoch=1, best_step=1, history=[metrics])
    if leading():
        record = Record(run.directory)
        record.write(progress.history)
        record.close()
        tensors = Pair(model.model, model.guide).tensors()
        save(run.directory, Checkpoint(1, tensors, {"progress": dict(vars(progress))}))
    return Fit(progress.history, best_epoch=1, step=1)


def conclude(prepared: Prepared, fitted: Fit, seconds: dict[str, float], plots: bool, say: Say | None) -> None:
    """Evaluate, say the short table, and plot; `seconds` are those of the stages before."""
    started = time.perf_counter()
    run, rows, model, tell = prepared.run, prepared.rows, prepared.model, say or silent
    device = next(model.parameters()).device
    model.eval()
    if isinstance(model, Reconstruction):
        density = fit_codes(model, rows, run.directory, run.recipe.seed)
        tell(f"draws are decoded from an ex-post density of the codes, a {density}; it is none of x")
    values = report_on(
        model,
        rows_of(rows, "test", run.recipe.eval_rows).to(device),
        rows,
        Scoring(run.recipe.eval_K),
        objective=build_objective(run.recipe),
        say=say,
        particle_chunk=run.recipe.particle_chunk,
    )
    write_json(run.directory / "evaluation.json", values | {"notices": []})
    refuse_invalid(values)
    for note in observations(model, fitted, rows, device):
        tell(f"note: {note}")
    tell("")
    tell(short_table(run.recipe, values, fitted, {**seconds, "evaluation": time.perf_counter() - started}))
    if plots:
        write_plots(run.recipe, model, rows, run.directory, fitted, values)
        tell(f"\nplots in {run.directory / 'plots'}{next_command(run, values)}")


def next_command(run: Run, values: Report) -> str:
    """What may be done next, after a semicolon."""
    if values["verdict"] in (Kind.EXACT, NO_DENSITY):  # there is nothing that more draws would raise
        return ""
    what = " --repair scores those rows again" if values["unreliable_rows"] else " for a larger K"
    return f"; python -m pyrovae.evaluate {run.directory}{what}"


def observations(model: "Model", fitted: Fit, rows: "Rows", device: "torch.device") -> list[str]:
    """Posterior collapse, and what the model says of itself, such as a scale at its floor."""
    x, *given = (value[:500].to(device) for value in (rows.validation, *rows.given["validation"]))
    of_model: Callable[..., list[str]] = model.remarks
    of_latents = [] if isinstance(model, Reconstruction) else remarks(fitted.history[fitted.best_epoch - 1])
    return of_latents + of_model(x, *given)


def continued(directory: str | Path | None, options: Options) -> Recipe:
    """The recipe of the run to continue, with options that may differ from its own.

    Raises:
        CheckpointError: there is none, or the options given are not its own.
    """
    if directory is None:
        raise UsageError("resume: name the directory of the run to continue")
    run = open_run(str(directory))
    if kept_in(run.directory):
        run.pair_with(load_latest(run.directory))  # sizes that its weights do not have are refused here
    stored = run.recipe
    if options.get("first") == stored.first.name:  # its own once more, whose weights were taken over when it began
        options = {key: value for key, value in options.items() if key != "first"}
    changed = stored.replace(**options)
    asked = [key for key in options if getattr(changed, key) != getattr(stored, key)]
    other = [key for key in asked if key not in RESUMABLE]
    if forbidden := differences(stored, changed, other, "then", "now"):
        raise CheckpointError(
            f"{directory}: cannot resume with another configuration ({'; '.join(forbidden)}); only "
            f"{', '.join(f'`{key}`' for key in RESUMABLE)} may differ. Start a new run in another directory",
            settings=(*RESUMABLE, "out"),
        )
    if "epochs" in options:
        check_epochs(run.directory, stored, changed.epochs)
    return stored.settled(**{key: getattr(changed, key) for key in asked})


def check_epochs(directory: Path, stored: Recipe, epochs: int) -> None:
    """Refuse a number of epochs that a run cannot be continued to."""
    if not kept_in(directory):
        return
    done, _, _ = position(load_latest(directory), directory)
    if epochs < done:
        raise UsageError(
            f"epochs={epochs}: {directory} has been trained for {done} already; give more, or leave it out",
            settings=(f"epochs={epochs}",),
        )
    if stored.schedule == "cosine" and epochs != stored.epochs:
        raise UsageError(
            f"epochs={epochs}: the cosine schedule of {directory} ends at epoch {stored.epochs}; start a new run",
            settings=(f"epochs={epochs}",),
        )
