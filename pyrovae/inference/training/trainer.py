"""The training loop: any pair, any objective, on one device or several processes.

What makes a run repeatable and resumable bit for bit: the rows of epoch e come from a permutation seeded by (seed, e),
and the noise of step t from a generator seeded by (seed, t, process). Nothing random has to be saved. Steps are
compiled where that pays (see `steps`), which is decided from the number of steps and operations, never from a clock.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.checks import check_count, check_given, check_programs, check_rows
from pyrovae.errors import DataError, NumericalError, OutputError, PyrovaeError, UsageError
from pyrovae.inference.automatic import undone
from pyrovae.inference.batch import Batch
from pyrovae.inference.diagnostics import measure
from pyrovae.inference.modules import Program, evaluating
from pyrovae.inference.objectives import ELBO, ImportanceWeighted, Objective, as_objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import arithmetic, check_precision, flushing
from pyrovae.inference.tracing.checked import Before
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.batches import Data, RowSource, Source, unchanged
from pyrovae.inference.training.closed_form import set_closed_forms
from pyrovae.inference.training.counts import worth_compiling
from pyrovae.inference.training.diagnosis import Diagnosis, look_at_constraint, look_for_divergence
from pyrovae.inference.training.gradients import check_chunk
from pyrovae.inference.training.moving import MovingAverages
from pyrovae.inference.training.optimizers import Factory, adam, check_layout, grouped
from pyrovae.inference.training.processes import Processes, accelerated, is_of_the_network
from pyrovae.inference.training.record import Bar, Fit, Metrics, Notices, Progress, Record, without_bounds
from pyrovae.inference.training.saving import Keeper
from pyrovae.inference.training.settings import Callbacks, Settings
from pyrovae.inference.training.step import NotFinite, Step
from pyrovae.inference.training.trial import Trial, tried
from pyrovae.inference.validity import WHOLE
from pyrovae.inference.weights import draw
from pyrovae.processes import several
from pyrovae.processors import threads as using_threads
from pyrovae.seeding import derive_seed, reseed, same_noise, seeded


def fit(
    model: Program,
    guide: Program,
    data: "Tensor | RowSource | None" = None,
    objective: PyroELBO | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 100,
    optimizer: Factory = adam,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    given: Sequence[Tensor] = (),
    validation: Tensor | None = None,
    validation_given: Sequence[Tensor] = (),
    transform: Callable[[Tensor], Tensor] | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    compile: str = "auto",
    precision: str = "fp32",
    particle_chunk: int | None = None,
    threads: int | str | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_start: Callable[[], None] | None = None,
    on_epoch: Callable[[Metrics], None] | None = None,
    on_step: Callable[..., None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    extra_metrics: Callable[[], Mapping[str, float]] | None = None,
) -> Fit:
    """Train a pair.

    Args:
        model: Pyro model, called as model(x, *given), with all its sites inside one `pyro.plate("data", len(x))`.
        guide: Pyro guide, called as guide(x, *given).
        data: Training rows, shape (N, *event), or whatever `transform` takes: a tensor, or an object that reads rows
            when it is indexed, such as `pyrovae.data.streaming.MappedRows`, from a file larger than memory.
        objective: Any `pyro.infer.ELBO` with a differentiable loss; `ELBO()` when None. Its loss, summed over the
            batch, is what is minimised.
        epochs: Passes over the data, counted from the start also when resuming.
        batch_size: Rows per step over all processes; the last batch of an epoch has the rows that are left.
        optimizer: Makes a torch optimiser of a list of parameters. Modules of the pair that minimise a loss of their
            own, such as a critic, get a group of it with a rate of their own (`Objective.rate`).
        schedule: Makes a scheduler of the optimiser; it is stepped once per epoch.
        given: What everything is conditioned on, such as labels: tensors with a row for each of the data.
        validation: Rows of shape (V, *event), not transformed. The epoch of the best validation bound (with beta = 1)
            is kept; without them, under a `Constraint`, or by what is no bound, the last.
        validation_given: What is given beside them.
        transform: Maps a batch of rows to x, e.g. a binarisation drawn anew at every step.
        patience: Stop after so many epochs without a better validation bound.
        seed: Of the order of rows and all noise. The caller's random state is restored.
        device: "cpu", "cuda", ...; None: where the pair's parameters are, or with several processes where Accelerate
            puts each. The pair is moved there and stays there.
        compile: "auto", where the run is long enough to repay 5 to 20 s of compiling; "on"; "off". Compiled steps give
            the numbers of the pair itself to rounding. A pair that is more than tensor operations is run as it is.
        precision: "fp32"; "tf32", on CUDA devices; "bf16-mixed", with matrix products and convolutions in bfloat16 and
            everything else, the bound above all, in single precision. Validation is in single precision.
        particle_chunk: Draw so many particles at a time. The gradient is that of all of them; the memory that of a
            chunk, for a third more time.
        threads: Processor threads to compute with: a number; "auto", as many as torch would take, less those whose
            cores other programs keep busy at the start; None: as many as torch has. They are as before at the end.
        directory: Where to keep metrics.csv, TensorBoard records and checkpoints; None: nowhere.
        resume: Continue from the newest whole checkpoint in `directory`. With other validation rows than before, the
            best epoch is chosen anew.
        progress: Show a progress bar when the output is a terminal.
        on_start: Called when everything is checked, and a checkpoint restored if asked, before the first step. Until
            then nothing in `directory` is changed; it may remove older checkpoints there.
        on_epoch: Called with the measurements of each epoch.
        on_step: Called after each step as on_step(step, x, *given), with how many were taken and the rows that the last
            was taken on, x transformed; what it draws shifts nothing. Costs nothing when it is left out.
        on_notice: Called with what the user should read, when it comes up. They are in `Fit.notices` as well.
        should_stop: Asked after every step; True saves the state and returns.
        extra_metrics: Called after each epoch with the pair in evaluation mode; the numbers that it returns are
            recorded with that epoch's, under their names. What it draws shifts nothing.

    Returns:
        The history; the pair's parameters are those of the best epoch, or the last ones when interrupted.

    Raises:
        UsageError: an argument makes no sense, or the pair has nothing to train.
        PairError: the pair does not give a bound per datum.
        NumericalError: a loss or gradient is NaN or infinite. The step was not taken; checkpoints are intact.
        CheckpointError: `resume` without a usable checkpoint, or one of other data, seed or batch size.
        OutputError: the directory cannot be written, or another process of the run is gone.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None:
            check_count(name, value)
    if data is None:
        raise UsageError(
            "data: none given; fit takes a model, a guide and rows, as in fit(vae.model, vae.guide, rows, objective)"
        )
    # What is no tensor may read its rows from elsewhere, by announcing them first.
    check_rows("data", data[:1] if hasattr(data, "announce") else data)
    check_given(given, len(data), "data")
    check_programs(model, guide, len(given))
    if validation is None and validation_given:
        raise UsageError("validation_given: given without validation rows; pass validation=, or leave it out")
    scored = None if validation is None else Batch.of(validation, validation_given, "validation")
    if batch_size > len(data):
        raise UsageError(f"batch_size: {batch_size} is more than the {len(data)} training rows")
    goal = as_objective(ELBO() if objective is None else objective)
    if resume and directory is None:
        raise UsageError("resume: needs the directory of the run to continue")
    if compile not in ("auto", "on", "off"):
        raise UsageError(f"compile: expected auto, on or off, got {compile!r}")
    check_chunk(goal, particle_chunk)
    if patience is not None and (goal.constraint is not None or goal.keeps_last):
        why = "by an objective that is no bound" if goal.keeps_last else "under a constraint"
        raise UsageError(f"patience: not used, since {why} the last epoch is kept; leave it out")
    requested = None if device is None else torch.device(device)
    if requested is not None and requested.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {requested} asked for, but torch sees no CUDA device; use cpu")
    pair, notices = Pair(model, guide), Notices(on_notice)
    here = requested or next((p.device for p in pair.parameters()), torch.device("cpu"))
    settings = Settings(epochs, batch_size, seed, precision, particle_chunk)
    if not several():  # of several, each is told its device later
        check_precision(precision, here)
    with (
        seeded(seed, "fit", device=here),
        accelerated(requested, here) as processes,
        same_noise(processes.device),  # of several processes, each has been told its device
        arithmetic(precision, processes.device),
        flushing(isinstance(goal, ImportanceWeighted) and goal.num_particles > 1),
        using_threads(threads, notices),
    ):
        where = None if directory is None else Path(directory)
        rows = Data(data, tuple(given), transform or unchanged, scored)
        calls = Callbacks(on_step, on_epoch, should_stop, extra_metrics)
        trainer = Trainer(pair, rows, goal, settings, processes, where, notices, calls)
        trainer.keeper.threads_vary = threads == "auto"
        try:
            trainer.start(optimizer, schedule, resume, compile, on_start)
            return trainer.run(patience, progress)
        except RuntimeError as error:
            if processes.alone or isinstance(error, PyrovaeError) or not is_of_the_network(error):
                raise
            lost = f"process {processes.rank}: another process of this run cannot be reached"
            if checkpoints.kept_in(where):
                lost += f"; the checkpoints in {directory} are intact: continue with resume"
            raise OutputError(lost) from error


class Trainer:
    """One run of `fit`: what it holds, step by step."""

    def __init__(
        self,
        pair: Pair,
        data: Data,
        objective: Objective,
        settings: Settings,
        processes: Processes,
        directory: Path | None,
        notice: Notices,
        calls: Callbacks,
    ) -> None:
        self.pair, self.objective, self.settings = pair, objective, settings
        self.processes, self.directory, self.notice, self.calls = processes, directory, notice, calls
        pair.to(processes.device)
        self.source = Source(data, processes.device)
        self.moving = MovingAverages(pair, processes.rank == 0, None if processes.alone else processes.total)
        self.validation = None if data.validation is None else data.validation.to(processes.device)
        self.progress = Progress()
        self.diagnosis = Diagnosis(pair, objective, self.source, settings, self.progress, directory, processes.rank)
        self.step: Step  # made by `start`, as is this
        self.trial: Trial
        self.keeper = Keeper(
            pair,
            objective,
            self.source,
            settings,
            processes,
            self.progress,
            directory,
            notice,
            data.validation,
        )

    def start(
        self,
        make_optimizer: Factory,
        make_schedule: Callable[[Optimizer], LRScheduler] | None,
        resume: bool,
        compile: str,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        """Check the pair, make what trains it, and restore a checkpoint if asked."""
        if on_start is None and not resume:
            self.refuse_others()
        self.discover()
        self.keeper.optimizer = grouped(make_optimizer, self.pair, self.objective)
        check_layout(self.pair, self.keeper.optimizer)
        self.keeper.scheduler = make_schedule(self.keeper.optimizer) if make_schedule else None
        if isinstance(self.keeper.optimizer, torch.optim.LBFGS):
            raise UsageError("optimizer: LBFGS evaluates the loss several times per step; use another")
        if isinstance(self.keeper.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError("schedule: ReduceLROnPlateau needs a metric; use one that is stepped by the epoch alone")
        if resume:
            self.keeper.restore()
        if not self.processes.alone:
            self.processes.spread(self.pair.tensors().values())
        self.make_step(compile)
        if on_start is not None:
            on_start()
            if not resume:
                self.refuse_others()

    def make_step(self, compile: str) -> None:
        """Decide whether steps are compiled, and make what takes them."""
        before = self.progress.compiled
        if before is None or compile != "auto":
            work, device = self.trial.flops, self.processes.device
            self.progress.compiled = worth_compiling(
                compile, len(self.source), self.settings, self.processes.world, work, device
            )
        if before is not None and before != self.progress.compiled:
            self.notice(f"resumed with compile={compile!r}, so not bit-exact")
        self.step = self.diagnosis.step = Step(
            self.objective,
            self.pair,
            self.keeper.optimizer,
            compiled=set(() if self.progress.refused else self.progress.compiled or ()),
            particle_chunk=self.settings.particle_chunk,
            precision=self.settings.precision,
            together=None if self.processes.alone else self.processes.total,
            beta=self.progress.beta,
            losses=self.progress.losses,
            on_notice=self.notice,
            on_refusal=self.notice.not_compiled,
        )
        if self.step.compiled:
            self.inspect()

    def discover(self) -> None:
        """Look at the pair, and run it once with a gradient: it must work, and every parameter should get one."""
        rows = torch.arange(self.settings.batch_size)
        batch, validation = self.source.batch(rows), self.validation
        if validation is not None:
            check_validation(self.pair, validation, batch)
        divided = self.settings.batch_size < len(self.source) or not self.processes.alone
        with undone(self.pair), self.diagnosis.diagnosing(batch, rows):
            self.trial = tried(self.pair, self.objective, batch, len(self.source), divided, self.notice)
            if self.trial.whole and validation is not None:
                raise UsageError(f"validation: {WHOLE}, so that it cannot be run on others; leave validation out")

    @torch.no_grad()
    def inspect(self) -> None:
        """Run the pair on all rows once: compiled code validates nothing, so what it has to say, it says here."""
        state = Before(self.pair, self.processes.device)
        every = torch.arange(self.processes.rank, len(self.source), self.processes.world)
        batches = every.split(self.settings.batch_size)
        with closing(self.source.raw(batches)) as coming:
            for rows, raw in zip(batches, coming, strict=True):
                batch = self.source.transformed(raw)
                with self.diagnosis.diagnosing(batch, rows):
                    self.objective.draw(self.pair, batch, 1)
        state.restore()

    def refuse_others(self) -> None:
        """Refuse a directory that holds another run."""
        if self.processes.rank == 0 and checkpoints.kept_in(self.directory):
            raise UsageError(
                f"directory: {self.directory} holds the checkpoints of another run; pass resume=True, or choose another"
            )

    def run(self, patience: int | None, progress: bool) -> Fit:
        """Train until all epochs are done, patience runs out or somebody asks to stop."""
        state, epochs = self.progress, self.settings.epochs
        record = Record(self.directory if self.processes.rank == 0 else None)
        stopped = "finished"
        if state.step == 0 and self.validation is not None and self.trial.no_density is None:
            with suppress(ValueError, ArithmeticError):  # the first step has more to say about it
                state.untrained_bound = self.measured()["bound"]
        with Bar(progress and self.processes.rank == 0, epochs, state.epoch, self.objective.train_name) as bar:
            while state.epoch < epochs:
                if patience is not None and state.epoch - state.best_epoch >= patience and state.epoch:
                    stopped = "early"
                    break
                if not self.epoch(bar):
                    stopped = "interrupted"
                    self.keeper.save()
                    break
                self.finish_epoch(record)
                self.keeper.save()
                if self.calls.on_epoch is not None:
                    self.calls.on_epoch(state.history[-1])
        record.close()
        if stopped != "interrupted":
            look_for_divergence(state, self.notice)
            if (constraint := self.objective.constraint) is not None:
                look_at_constraint(constraint, state.history[-1], self.notice)
        if stopped != "interrupted" and self.keeper.best_weights is not None:
            checkpoints.assign(self.pair.tensors(), self.keeper.best_weights, "best epoch")
        compiled = bool(self.step.codes)
        return Fit(
            state.history, state.best_epoch, stopped, state.step, compiled, self.step.compile_seconds, self.notice.texts
        )

    def epoch(self, bar: "Bar") -> bool:
        """Train on the batches of the current epoch that are left; False if asked to stop before its end."""
        state, should_stop = self.progress, self.calls.should_stop
        generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, "order", state.epoch))
        order = torch.randperm(len(self.source), generator=generator)
        # Parameters for each row are by the row's place.
        batches = (order if not self.trial.whole else torch.arange(len(self.source))).split(self.settings.batch_size)
        left = batches[state.batch :]
        # A process without rows of its own still has to take part: it does so with rows that do not count.
        mine = [
            rows[self.processes.rank :: self.processes.world] if len(rows) > self.processes.rank else rows[:1]
            for rows in left
        ]
        self.pair.train()
        self.step.recheck()
        first = state.batch
        # A step that is not finite is not taken, but its batch has moved what batch normalisation keeps.
        kept = [(buffer, buffer.detach().clone()) for buffer in self.pair.buffers()]
        started, compiling = time.perf_counter(), self.step.compile_seconds
        try:
            with closing(self.source.raw(mine)) as coming:
                for rows, own, raw in zip(left, mine, coming, strict=True):
                    self.take_step(raw, own, len(rows) <= self.processes.rank)
                    state.rows += len(rows)
                    bar.show(state, len(batches))
                    if self.processes.agreed(should_stop is not None and should_stop(), state.step):
                        break
            self.settle(batches, first)
        except NumericalError:
            for buffer, value in kept:
                buffer.copy_(value)
            raise
        finally:
            state.refused = self.step.refused
            state.beta = None if self.step.beta is None else self.step.beta.item()
            state.losses = self.step.losses.tolist()
            state.seconds += time.perf_counter() - started - (self.step.compile_seconds - compiling)
        return state.batch == len(batches)

    def take_step(self, raw: Batch, rows: Tensor, absent: bool) -> None:
        """One gradient step on the batch that some rows make."""
        state = self.progress
        reseed(derive_seed(self.settings.seed, "step", state.step, self.processes.rank), self.processes.device)
        batch = self.source.transformed(raw)
        with self.diagnosis.diagnosing(batch, rows):
            try:
                loss = self.step(batch, state.step, absent)
            except NotFinite as error:
                raise NumericalError(self.diagnosis.diagnose(batch, rows, str(error))) from None
        self.moving.step(absent)
        state.total -= loss or 0.0
        state.step += 1
        state.batch += 1
        if self.calls.on_step is not None and not absent:
            self.calls.on_step(state.step, *batch.tensors)

    def settle(self, batches: Sequence[Tensor], first: int) -> None:
        """Take over what a GPU has added up since batch `first` of the epoch."""
        state = self.progress
        try:
            state.total -= self.step.settle()
        except NotFinite as error:
            # Nothing has been updated from the first such step on: go back to it.
            failed = first + error.taken
            state.step, state.batch = state.step - (state.batch - failed), failed
            rows = batches[failed][self.processes.rank :: self.processes.world]
            reseed(derive_seed(self.settings.seed, "step", state.step, self.processes.rank), self.processes.device)
            raise NumericalError(self.diagnosis.diagnose(self.source.batch(rows), rows, str(error))) from None

    def finish_epoch(self, record: "Record") -> None:
        """Measure, record and count an epoch, and keep it if it is the best so far."""
        state = self.progress
        metrics: Metrics = {
            "epoch": state.epoch + 1,
            "step": state.step,
            self.objective.train_name: state.total / max(1, state.rows),
        }
        metrics |= {name: loss / state.rows for name, loss in zip(self.objective.others, state.losses, strict=True)}
        closed = set_closed_forms(self.pair, self.objective, self.source, self.settings, state.epoch)
        if self.validation is not None:
            if not self.processes.alone and any(True for _ in self.pair.buffers()):
                self.processes.spread(
                    self.pair.tensors().values()
                )  # moments of batch normalisation are each process's own
            metrics |= self.validate()
        metrics |= closed | self.moving.record()
        metrics |= {name: float(value) for name, value in self.step.values(state.step).items()}
        metrics["learning_rate"] = float(self.keeper.optimizer.param_groups[0]["lr"])
        metrics["rows_per_second"] = state.rows / max(state.seconds, 1e-9)
        metrics["seconds"] = state.seconds
        metrics |= self.extra(metrics)
        bound = metrics.get("validation_bound", math.inf)
        state.history.append(metrics if self.trial.no_density is None else without_bounds(metrics))
        state.epoch += 1
        state.batch, state.total, state.rows, state.seconds = 0, 0.0, 0, 0.0
        state.losses = self.step.losses.zero_().tolist()
        if self.keeper.scheduler is not None:
            self.keeper.scheduler.step()
        # Under a constraint a better bound may be one that breaks it: there the last epoch is kept.
        any_is_best = self.validation is None or self.objective.constraint is not None or self.objective.keeps_last
        improved = any_is_best or bound > state.best_bound
        if not math.isfinite(bound) and self.validation is not None:
            self.notice(f"epoch {state.epoch}: the validation bound is {bound}, so it cannot be the best")
        if improved:
            state.best_bound, state.best_epoch, state.best_step = bound, state.epoch, state.step
            if self.validation is not None:
                self.keeper.best_weights = {name: t.detach().clone() for name, t in self.pair.tensors().items()}
        record.write(state.history)

    def validate(self) -> Metrics:
        """Bounds and their terms on the validation rows, with the same noise at every epoch."""
        renamed = {"bound": "validation_bound", "elbo": "validation_elbo"}
        return {renamed.get(name, name): value for name, value in self.measured().items()}

    def extra(self, metrics: Metrics) -> Metrics:
        """What the caller measures, beside these measurements."""
        if self.calls.extra_metrics is None:
            return {}
        reseed(derive_seed(self.settings.seed, "extra metrics"), self.processes.device)
        with evaluating(self.pair.model, self.pair.guide), arithmetic("fp32", self.processes.device):
            found = {str(name): float(value) for name, value in self.calls.extra_metrics().items()}
        if taken := sorted(found.keys() & metrics.keys()):
            raise UsageError(f"extra_metrics: {', '.join(taken)}: already a measurement of fit's; choose another name")
        return found

    def measured(self) -> Metrics:
        """What `measure` finds on the validation rows."""
        assert self.validation is not None
        reseed(derive_seed(self.settings.seed, "validation"), self.processes.device)
        batches = self.validation.split(max(self.settings.batch_size, 100))
        with evaluating(self.pair.model, self.pair.guide):
            try:
                return measure(self.pair.model, self.pair.guide, batches, self.objective, self.settings.particle_chunk)
            except ValueError as error:
                if isinstance(error, PyrovaeError) or "Expected parameter" not in str(error):
                    raise
                rows = torch.arange(len(self.validation), device=self.processes.device)
                what = f"on the validation rows a distribution was refused ({str(error).splitlines()[0]})"
                raise NumericalError(self.diagnosis.diagnose(self.validation, rows, what)) from error


def check_validation(pair: Pair, validation: Batch, training: Batch) -> None:
    """Refuse validation rows that are not finite, or of another shape than the training rows.

    NaN, as what is missing of a row, may be in the support of the pair, which then has log-weights of such rows.
    """
    wrong = (~validation.x.isfinite()).reshape(len(validation), -1).any(1)
    if wrong.any() and not bears(pair, validation[wrong.nonzero().flatten()]):
        bad = wrong.nonzero().flatten().tolist()
        raise DataError(f"validation: {len(bad)} rows are not finite, the first being {bad[:5]}; repair or drop them")
    count = len(validation.given)
    if count > len(training.given) or not can_be_given(pair, count):
        raise UsageError(f"validation_given: {count} tensors, where training has {len(training.given)}")
    for theirs, ours in zip(validation.tensors, training.tensors, strict=False):
        if theirs.shape[1:] != ours.shape[1:]:
            raise UsageError(
                f"validation: expected event shape {tuple(ours.shape[1:])}, that of the training rows, got "
                f"{tuple(theirs.shape[1:])}"
            )


def can_be_given(pair: Pair, count: int) -> bool:
    """Whether model and guide can be called with so many tensors beside x, as where labels need not be seen."""
    with suppress(UsageError):
        check_programs(pair.model, pair.guide, count)
        return True
    return False


def bears(pair: Pair, batch: Batch) -> bool:
    """Whether the log-weights of some rows are finite, by a draw for each."""
    with evaluating(pair.model, pair.guide), torch.no_grad(), suppress(ValueError):
        return bool(draw(pair, batch).log_weights.isfinite().all())
    return False
