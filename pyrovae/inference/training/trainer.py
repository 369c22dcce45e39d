"""The training loop: any pair, any objective, on one device or several processes.

What makes a run repeatable and resumable bit for bit: the rows of epoch e come from a permutation seeded by (seed, e),
and the noise of step t from a generator seeded by (seed, t, process). Nothing random has to be saved. Steps are
compiled where that pays (see `steps`), which is decided from the number of steps and operations, never from a clock.
"""

import hashlib
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.flop_counter import FlopCounterMode

from pyrovae.checks import check_count, check_given, check_programs, check_rows
from pyrovae.errors import CheckpointError, DataError, NumericalError, OutputError, PairError, PyrovaeError, UsageError
from pyrovae.files import inside, write_atomically
from pyrovae.inference.batch import Batch
from pyrovae.inference.diagnostics import measure
from pyrovae.inference.modules import Program, evaluating
from pyrovae.inference.objectives import ELBO, ImportanceWeighted, Objective, as_objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import arithmetic, check_precision, flushing
from pyrovae.inference.tracing.checked import Before
from pyrovae.inference.tracing.graphs import CompileWarning
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.batches import RowSource, gather
from pyrovae.inference.training.gradients import check_chunk
from pyrovae.inference.training.optimizers import Factory, adam, check_layout
from pyrovae.inference.training.resuming import (
    check_progress,
    differences,
    keep_known,
    load_optimizer,
    matched,
    optimizer_state,
    refuse,
)
from pyrovae.inference.training.step import NotFinite, Step
from pyrovae.inference.validity import WHOLE, automatic, check_automatic, examine, set_up, undone, why_no_density
from pyrovae.inference.weights import draw, sample_sites
from pyrovae.processors import threads as using_threads
from pyrovae.seeding import derive_seed, reseed, same_noise, seeded

if TYPE_CHECKING:
    import pandas as pd

# Compiling takes 5 to 20 s: less than this is not worth it.
COMPILING_SECONDS = 20.0

Metrics = dict[str, float]


@dataclass
class Fit:
    """What `fit` returns; the pair itself holds the weights of the best epoch.

    Attributes:
        history: One dictionary of measurements per epoch; `metrics` is the same as a table.
        best_epoch: Epoch (from 1) of the best validation bound, or the last one without validation data.
        stopped: "finished", "early" (patience ran out) or "interrupted".
        step: Gradient steps taken.
        compiled: Whether steps were compiled.
        compile_seconds: What compiling them took; not part of the epochs' `seconds`.
        notices: What the user should read.
    """

    history: list[Metrics] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = "finished"
    step: int = 0
    compiled: bool = False
    compile_seconds: float = 0.0
    notices: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> "pd.DataFrame":
        """One row per epoch: bounds and terms in nats per datum, rates and counts."""
        import pandas as pd

        return pd.DataFrame(self.history)


@dataclass
class Progress:
    """Where training stands: all that has to be stored beside weights and optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0
    batch: int = 0  # batches done in the current epoch
    total: float = 0.0  # of the current epoch: sum of the objective over rows
    rows: int = 0
    seconds: float = 0.0
    untrained_bound: float | None = None  # of the validation rows, before the first step
    best_bound: float = -math.inf
    best_epoch: int = 0
    best_step: int | None = None
    compiled: list[int] | None = None  # numbers of rows for which steps are compiled, once that is decided
    refused: str | None = None  # why they could not be
    history: list[Metrics] = field(default_factory=list)


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
    on_notice: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
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
        optimizer: Makes a torch optimiser of a list of parameters.
        schedule: Makes a scheduler of the optimiser; it is stepped once per epoch.
        given: What everything is conditioned on, such as labels: tensors with a row for each of the data.
        validation: Rows of shape (V, *event), not transformed. The epoch of the best validation bound (with beta = 1)
            is kept; without them, the last.
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
        resume: Continue from the newest whole checkpoint in `directory`.
        progress: Show a progress bar when the output is a terminal.
        on_start: Called when everything is checked, and a checkpoint restored if asked, before the first step. Until
            then nothing in `directory` is changed; it may remove older checkpoints there.
        on_epoch: Called with the measurements of each epoch.
        on_notice: Called with what the user should read, when it comes up. They are in `Fit.notices` as well.
        should_stop: Asked after every step; True saves the state and returns.

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
    scored = None if validation is None else Batch.of(validation, validation_given, "validation")
    if batch_size > len(data):
        raise UsageError(f"batch_size: {batch_size} is more than the {len(data)} training rows")
    goal = as_objective(ELBO() if objective is None else objective)
    if resume and directory is None:
        raise UsageError("resume: needs the directory of the run to continue")
    if compile not in ("auto", "on", "off"):
        raise UsageError(f"compile: expected auto, on or off, got {compile!r}")
    check_chunk(goal, particle_chunk)
    trainer = Trainer(
        Pair(model, guide),
        Data(data, tuple(given), transform or unchanged, scored),
        goal,
        Settings(epochs, batch_size, seed, precision, particle_chunk, None if device is None else torch.device(device)),
        optimizer,
        schedule,
        on_notice,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # of several, each is told its device later
        check_precision(precision, trainer.device)
    with (
        seeded(seed, "fit", device=trainer.device),
        trainer.accelerated(),
        same_noise(trainer.device),  # of several processes, each has been told its device
        arithmetic(precision, trainer.device),
        flushing(isinstance(goal, ImportanceWeighted) and goal.num_particles > 1),
        using_threads(threads, trainer.notice),
    ):
        trainer.threads_vary = threads == "auto"
        try:
            trainer.start(Path(directory) if directory is not None else None, resume, compile, on_start)
            return trainer.run(patience, progress, on_epoch, should_stop)
        except RuntimeError as error:
            if trainer.world == 1 or isinstance(error, PyrovaeError) or not is_of_the_network(error):
                raise
            saved = directory is not None and checkpoints.steps(Path(directory))
            kept = f"; the checkpoints in {directory} are intact: continue with resume" if saved else ""
            raise OutputError(f"process {trainer.rank}: another process of this run cannot be reached{kept}") from error


@dataclass(frozen=True)
class Settings:
    """What a run is trained with, beside its pair, data and objective; see `fit`."""

    epochs: int
    batch_size: int
    seed: int
    precision: str
    particle_chunk: int | None
    device: torch.device | None


@dataclass(frozen=True)
class Data:
    """What a run is trained on, see `fit`; `validation` with what is given beside it."""

    rows: "Tensor | RowSource"
    given: tuple[Tensor, ...]
    transform: Callable[[Tensor], Tensor]
    validation: Batch | None


def unchanged(rows: Tensor) -> Tensor:
    """x as the rows are."""
    return rows


class Trainer:
    """One run of `fit`: what it holds, step by step."""

    def __init__(
        self,
        pair: Pair,
        data: Data,
        objective: Objective,
        settings: Settings,
        make_optimizer: Factory,
        make_schedule: Callable[[Optimizer], LRScheduler] | None,
        on_notice: Callable[[str], None] | None,
    ) -> None:
        self.pair, self.objective, self.settings = pair, objective, settings
        self.data, self.given, self.transform, self.validation = data.rows, data.given, data.transform, data.validation
        self.make_optimizer, self.make_schedule, self.on_notice = make_optimizer, make_schedule, on_notice
        self.requested = settings.device
        if self.requested is not None and self.requested.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device: {self.requested} asked for, but torch sees no CUDA device; use cpu")
        here = next((p.device for p in self.pair.parameters()), torch.device("cpu"))
        self.device = self.requested or here
        self.progress = Progress()
        self.step: Step  # made by `start`
        self.whole = False  # the pair works on all rows together only, in their order
        self.no_density: str | None = None  # why what is maximised is no bound
        self.notices: list[str] = []
        self.best_weights: dict[str, Tensor] | None = None
        self.kept_best: int | None = None  # best step as of the checkpoint before
        self.threads_vary = False  # whether a resumed run may take fewer threads than are free

    @contextmanager
    def accelerated(self) -> Iterator[None]:
        """Set up Accelerate, which keeps its state in a singleton; a single process gives it back afterwards."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)
        on_cpu = self.device.type == "cpu" if alone or self.requested else not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=on_cpu)
        if not alone:
            self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        try:
            yield
        finally:
            if alone:
                AcceleratorState._reset_state(reset_partial_state=True)

    def start(
        self, directory: Path | None, resume: bool, compile: str, on_start: Callable[[], None] | None = None
    ) -> None:
        """Put everything on the device, check the pair, and restore a checkpoint if asked."""
        self.directory = directory
        self.pair.to(self.device)
        if isinstance(self.data, Tensor) and fits(self.data, self.device):
            self.data = self.data.detach().to(self.device)  # else batches are copied there as they come
        self.given = tuple(value.detach().to(self.device) for value in self.given)
        self.validation = None if self.validation is None else self.validation.to(self.device)
        if self.validation is not None and not self.validation.x.isfinite().all():
            rows = self.validation.x.reshape(len(self.validation), -1)
            bad = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
            raise DataError(
                f"validation: {len(bad)} rows are not finite, the first being {bad[:5]}; repair or drop them"
            )
        if on_start is None and not resume:
            self.refuse_others()
        every = slice(None, None, max(1, len(self.data) // 1000))
        sampled = (t[every].cpu().contiguous().view(torch.uint8) for t in (self.data, *self.given))
        self.fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in sampled)).hexdigest()[:16]
        self.discover()
        self.optimizer = self.make_optimizer(list(self.pair.trainable().values()))
        check_layout(self.pair, self.optimizer)
        self.scheduler = self.make_schedule(self.optimizer) if self.make_schedule else None
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError("optimizer: LBFGS evaluates the loss several times per step; use another")
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError("schedule: ReduceLROnPlateau needs a metric; use one that is stepped by the epoch alone")
        if resume:
            self.restore()
        if self.world > 1:
            self.spread()
        before = self.progress.compiled
        if before is None or compile != "auto":
            self.progress.compiled = self.worth_compiling(compile)
        if before is not None and before != self.progress.compiled:
            self.notice(f"resumed with --compile {compile}, so not bit-exact")
        self.step = Step(
            self.objective,
            self.pair,
            self.optimizer,
            compiled=set(() if self.progress.refused else self.progress.compiled or ()),
            particle_chunk=self.settings.particle_chunk,
            precision=self.settings.precision,
            together=(lambda vector: self.accelerator.reduce(vector, "sum")) if self.world > 1 else None,
            on_notice=self.notice,
        )
        if self.step.compiled:
            self.inspect()
        if on_start is not None:
            on_start()
            if not resume:
                self.refuse_others()

    def refuse_others(self) -> None:
        """Refuse a directory that holds another run."""
        if self.directory is not None and self.rank == 0 and checkpoints.steps(self.directory):
            raise UsageError(
                f"directory: {self.directory} holds the checkpoints of another run; pass resume=True, or choose another"
            )

    def notice(self, text: str) -> None:
        """Keep a sentence for the user, and say it if there is somebody to say it to."""
        self.notices.append(text)
        if self.on_notice is not None:
            self.on_notice(text)
        elif text.startswith("not compiled"):
            warnings.warn(text, CompileWarning, stacklevel=2)

    def spread(self) -> None:
        """Give all processes the tensors of the first one."""
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in self.pair.tensors().values():
                tensor.copy_(broadcast(tensor.detach().clone()))

    def worth_compiling(self, compile: str) -> list[int]:
        """The numbers of rows for which steps are to be compiled.

        Decided from counts alone, so that it comes out the same when a run is repeated or resumed.
        """
        if compile == "off":
            return []
        whole, rest = divmod(len(self.data), self.settings.batch_size)
        counts = {self.settings.batch_size: whole, rest: 1} if rest else {self.settings.batch_size: whole}
        found: dict[int, float] = {}
        for rows, steps in counts.items():
            for mine in {max(1, len(range(rank, rows, self.world))) for rank in range(self.world)}:
                seconds = self.settings.epochs * steps * saved_seconds(self.flops * mine, self.device)
                found[mine] = found.get(mine, 0.0) + seconds
        return [rows for rows, seconds in found.items() if compile == "on" or seconds > COMPILING_SECONDS]

    @torch.no_grad()
    def inspect(self) -> None:
        """Run the pair on all rows once: compiled code validates nothing, so what it has to say, it says here."""
        state = Before(self.pair, self.device)
        batches = torch.arange(self.rank, len(self.data), self.world).split(self.settings.batch_size)
        with closing(gather(self.data, batches, self.device, self.given)) as coming:
            for rows, raw in zip(batches, coming, strict=True):
                batch = self.transformed(raw)
                with self.diagnosing(batch, rows):
                    self.objective.draw(self.pair, batch, 1)
        state.restore()

    def discover(self) -> None:
        """Look at the pair, and run it once with a gradient: it must work, and every parameter should get one."""
        rows = torch.arange(self.settings.batch_size)
        batch = self.batch_of(rows)
        if self.validation is not None and self.validation.x.shape[1:] != batch.x.shape[1:]:
            raise UsageError(
                f"validation: expected event shape {tuple(batch.x.shape[1:])}, that of the training rows, got "
                f"{tuple(self.validation.x.shape[1:])}"
            )
        of_particles = self.objective.of_particles
        with undone(self.pair), self.diagnosing(batch, rows):
            self.examine(batch)
            # Fewer rows than a step has, for the memory of all particles at once.
            self.probe(batch[:2] if of_particles and not self.whole else batch)
            if not of_particles and self.settings.batch_size == len(self.data):
                # Perhaps parameters of the rows, perhaps a layer as wide; where there are batches, they are the latter.
                self.whole = self.whole or any(len(self.data) in p.shape[:1] for p in self.pair.trainable().values())

    def batch_of(self, rows: Tensor) -> Batch:
        """The batch that some rows make."""
        return self.transformed(next(gather(self.data, [rows], self.device, self.given)))

    def transformed(self, raw: Batch) -> Batch:
        """A batch of rows as x, with what is given beside them."""
        return Batch(self.transform(raw.x), raw.given)

    def examine(self, batch: Batch) -> None:
        """Refuse a pair that cannot be trained, on a batch as steps have them."""
        guide, total = self.pair.guide, len(self.data)
        per_row = bool(automatic(guide))
        declared = poutine.trace(param_only=True)
        try:
            if not per_row or self.settings.batch_size == total:
                if self.objective.of_particles:
                    check_automatic(guide)
                set_up(guide, batch)
                with declared:
                    findings = examine(self.pair, batch, total=total) if self.objective.of_particles else None
                self.whole = per_row or (findings is not None and findings.whole)
                self.no_density = findings.no_density if findings else why_no_density(self.pair, batch)
        except Exception as error:
            stored = [site["value"] for site in declared.trace.nodes.values() if site["type"] == "param"]
            per_row = any(total in p.shape[:1] for p in (*self.pair.parameters(), *stored))
            if self.settings.batch_size == total or not per_row:
                raise
            raise PairError(self.only_whole()) from error
        if (self.whole or per_row) and (self.settings.batch_size < total or self.world > 1):
            raise PairError(self.only_whole())
        if self.whole and self.validation is not None:
            raise UsageError(f"validation: {WHOLE}, so that it cannot be run on others; leave validation out")
        if self.no_density is not None:
            self.notice(f"{self.no_density}. It is trained all the same, and what is recorded is no bound")

    def only_whole(self) -> str:
        """What to say of a pair that would be run on parts of its rows, but cannot."""
        return (
            f"batch_size: {WHOLE}; use batch_size={len(self.data)}, on one process, or a guide that is a function of x"
        )

    def probe(self, batch: Batch) -> None:
        """A gradient of the loss on a batch, for the parameters that it depends on."""
        state = Before(self.pair, self.device)
        with (
            poutine.trace(param_only=True) as declared,
            FlopCounterMode(display=False) as counter,
        ):
            terms = self.objective.draw(self.pair, batch, sum(self.objective.chunks()))
            loss = -self.objective.combine(terms, **self.objective.settings(0)).sum()
            depends_on = leaves(loss)
            if not depends_on:
                raise UsageError("fit: found no parameters to train in the model and the guide")
            loss.backward()
        state.restore()
        self.flops = counter.get_total_flops() / len(batch)
        self.pair.adopt(declared.trace)
        known = {id(p) for p in self.pair.trainable().values()}
        lost = [tuple(leaf.shape) for leaf in depends_on if id(leaf) not in known]
        if lost:
            raise UsageError(
                f"fit: the loss depends on {len(lost)} parameters, of shapes {', '.join(map(str, lost[:4]))}, that "
                "belong to no module which the model and the guide refer to, so they would not be trained; make both "
                "methods of one torch.nn.Module"
            )
        self.idle = [name for name, p in self.pair.trainable().items() if p.grad is None]
        if self.idle:
            self.notice(f"no gradient reaches {', '.join(self.idle)}: the loss does not depend on them")
        for p in self.pair.trainable().values():
            p.grad = None

    def run(
        self,
        patience: int | None,
        progress: bool,
        on_epoch: Callable[[Metrics], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Fit:
        """Train until all epochs are done, patience runs out or somebody asks to stop."""
        state, epochs = self.progress, self.settings.epochs
        record = Record(self.directory if self.rank == 0 else None)
        stopped = "finished"
        if state.step == 0 and self.validation is not None and self.no_density is None:
            with suppress(ValueError, ArithmeticError):  # the first step has more to say about it
                state.untrained_bound = self.measured()["bound"]
        with Bar(progress and self.rank == 0, epochs, state.epoch) as bar:
            while state.epoch < epochs:
                if patience is not None and state.epoch - state.best_epoch >= patience and state.epoch:
                    stopped = "early"
                    break
                if not self.epoch(bar, should_stop):
                    stopped = "interrupted"
                    self.save()
                    break
                self.finish_epoch(record)
                self.save()
                if on_epoch is not None:
                    on_epoch(state.history[-1])
        record.close()
        if stopped != "interrupted":
            self.look_for_divergence()
        if stopped != "interrupted" and self.best_weights is not None:
            checkpoints.assign(self.pair.tensors(), self.best_weights, "best epoch")
        compiled = bool(self.step.codes)
        return Fit(
            state.history, state.best_epoch, stopped, state.step, compiled, self.step.compile_seconds, self.notices
        )

    def epoch(self, bar: "Bar", should_stop: Callable[[], bool] | None) -> bool:
        """Train on the batches of the current epoch that are left; False if asked to stop before its end."""
        state = self.progress
        generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, "order", state.epoch))
        order = torch.randperm(len(self.data), generator=generator)
        # Parameters for each row are by the row's place.
        batches = (order if not self.whole else torch.arange(len(self.data))).split(self.settings.batch_size)
        left = batches[state.batch :]
        # A process without rows of its own still has to take part: it does so with rows that do not count.
        mine = [rows[self.rank :: self.world] if len(rows) > self.rank else rows[:1] for rows in left]
        self.pair.train()
        self.step.recheck()
        first = state.batch
        # A step that is not finite is not taken, but its batch has moved what batch normalisation keeps.
        kept = [(buffer, buffer.detach().clone()) for buffer in self.pair.buffers()]
        started, compiling = time.perf_counter(), self.step.compile_seconds
        try:
            with closing(gather(self.data, mine, self.device, self.given)) as coming:
                for rows, own, raw in zip(left, mine, coming, strict=True):
                    self.take_step(raw, own, len(rows) <= self.rank)
                    state.rows += len(rows)
                    bar.show(state, len(batches))
                    if self.agreed(should_stop is not None and should_stop()):
                        break
            self.settle(batches, first)
        except NumericalError:
            for buffer, value in kept:
                buffer.copy_(value)
            raise
        finally:
            state.refused = self.step.refused
            state.seconds += time.perf_counter() - started - (self.step.compile_seconds - compiling)
        return state.batch == len(batches)

    def agreed(self, stop: bool) -> bool:
        """Whether to stop: all processes, each of which may have been asked to, hear of it at the same step."""
        if self.world == 1:
            return stop
        if self.device.type == "cuda" and self.progress.step % 16:
            return False  # the answer has to be waited for, so it is not asked for at every step
        return bool(self.accelerator.reduce(torch.tensor([float(stop)], device=self.device), "sum").item())

    def take_step(self, raw: Batch, rows: Tensor, absent: bool) -> None:
        """One gradient step on the batch that some rows make."""
        state = self.progress
        reseed(derive_seed(self.settings.seed, "step", state.step, self.rank), self.device)
        batch = self.transformed(raw)
        with self.diagnosing(batch, rows):
            try:
                loss = self.step(batch, state.step, absent)
            except NotFinite as error:
                raise NumericalError(self.diagnose(batch, rows, str(error))) from None
        state.total -= loss or 0.0
        state.step += 1
        state.batch += 1

    def settle(self, batches: Sequence[Tensor], first: int) -> None:
        """Take over what a GPU has added up since batch `first` of the epoch."""
        state = self.progress
        try:
            state.total -= self.step.settle()
        except NotFinite as error:
            # Nothing has been updated from the first such step on: go back to it.
            failed = first + error.taken
            state.step, state.batch = state.step - (state.batch - failed), failed
            rows = batches[failed][self.rank :: self.world]
            reseed(derive_seed(self.settings.seed, "step", state.step, self.rank), self.device)
            raise NumericalError(self.diagnose(self.batch_of(rows), rows, str(error))) from None

    @contextmanager
    def diagnosing(self, batch: Batch, rows: Tensor) -> Iterator[None]:
        """Tell a distribution that was given NaN or infinite numbers, which Pyro refuses, from other faults."""
        try:
            yield
        except ValueError as error:
            if not batch.x.isfinite().all():
                raise NumericalError(self.diagnose(batch, rows, "x is not finite")) from error
            broken = any(not p.isfinite().all() for p in self.pair.trainable().values())
            if isinstance(error, PyrovaeError) or not (broken or "Expected parameter" in str(error)):
                raise
            reason = str(error).split("\n")[0].removesuffix(", but found invalid values:")
            raise NumericalError(self.diagnose(batch, rows, f"a distribution was refused ({reason})")) from error

    def diagnose(self, batch: Batch, rows: Tensor, what: str) -> str:
        """Say which rows, sites and parameters make a loss or gradient that is not finite."""
        state = self.progress
        wrong = (~batch.x.isfinite()).reshape(len(batch), -1).any(1)
        sites: list[str] = []
        if self.objective.of_particles:
            self.repeat_noise(rows)
            k = sum(self.objective.chunks())
            with torch.no_grad(), suppress(ValueError), pyro.validation_enabled(False):
                particles = draw(self.pair, batch, min(k, self.settings.particle_chunk or k))
                bad = (~particles.log_weights.isfinite()).any(0)
                wrong = wrong if wrong.any() else bad
                latents = particles.latents
                terms = {name: latent.log_prior + latent.log_guide for name, latent in latents.items()}
                observed = [name for name in sample_sites(particles.model_trace) if name not in latents]
                terms[", ".join(observed)] = particles.log_likelihood
                sites = [name for name, term in terms.items() if not term.isfinite().all()]
        named = self.pair.trainable()
        parameters = [name for name, p in named.items() if not p.isfinite().all()]
        gradients: list[str] = []
        if hasattr(self, "step"):
            self.repeat_noise(rows)
            with suppress(ValueError):
                found = zip(named, self.step.gradient(batch, state.step, compiled=False)[1], strict=True)
                gradients = [name for name, g in found if g is not None and not g.isfinite().all()]
        where = f" in rows {rows[wrong][:5].tolist()}" if wrong.any() else ""
        for kind, names in (("site", sites), ("parameter", parameters), ("gradient of", gradients)):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            where += f", {kind} {shown}" if names else ""
        last = f"the last good step is {state.step - 1}" if state.step else "no step has been taken"
        saved = self.directory is not None and checkpoints.steps(self.directory)
        kept = f"; the checkpoints in {self.directory} are intact" if saved else ""
        return (
            f"epoch {state.epoch + 1}, step {state.step}: {what}{where}; {last}{kept}. "
            "Lower the learning rate, or look at these rows"
        )

    def repeat_noise(self, rows: Tensor) -> None:
        """Bring the random state to where it was when the current step began on these rows."""
        reseed(derive_seed(self.settings.seed, "step", self.progress.step, self.rank), self.device)
        self.batch_of(rows)

    def finish_epoch(self, record: "Record") -> None:
        """Measure, record and count an epoch, and keep it if it is the best so far."""
        state = self.progress
        metrics: Metrics = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_bound": state.total / max(1, state.rows),
        }
        if self.validation is not None:
            if self.world > 1 and any(True for _ in self.pair.buffers()):
                self.spread()  # moments of batch normalisation are each process's own
            metrics |= self.validate()
        metrics |= self.objective.settings(state.step)
        metrics["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        metrics["rows_per_second"] = state.rows / max(state.seconds, 1e-9)
        metrics["seconds"] = state.seconds
        bound = metrics.get("validation_bound", math.inf)
        state.history.append(metrics if self.no_density is None else without_bounds(metrics))
        state.epoch += 1
        state.batch, state.total, state.rows, state.seconds = 0, 0.0, 0, 0.0
        if self.scheduler is not None:
            self.scheduler.step()
        improved = self.validation is None or bound > state.best_bound
        if not math.isfinite(bound) and self.validation is not None:
            self.notice(f"epoch {state.epoch}: the validation bound is {bound}, so it cannot be the best")
        if improved:
            state.best_bound, state.best_epoch, state.best_step = bound, state.epoch, state.step
            if self.validation is not None:
                self.best_weights = {name: t.detach().clone() for name, t in self.pair.tensors().items()}
        record.write(state.history)

    def look_for_divergence(self) -> None:
        """Say that training has made the pair worse.

        Raises:
            NumericalError: the best epoch is far worse than the pair was before training.
        """
        state = self.progress
        first, best = state.untrained_bound, state.best_bound
        if first is None or not math.isfinite(best):  # no epoch is the best: said already
            return
        found = f"the best validation bound, {best:.6g} nats in epoch {state.best_epoch}, is "
        if best < first - abs(first) - 10:
            raise NumericalError(
                f"training diverged: {found}far below the {first:.6g} before training; lower the learning rate"
            )
        last = state.history[-1].get("validation_bound", best)
        if best < first:
            self.notice(f"{found}below the {first:.6g} before training: lower the learning rate, or train for longer")
        elif not last > best - abs(best) - 10:
            self.notice(
                f"training diverged: {found}followed by {last:.6g} in the last one; the best is kept, and a lower "
                "learning rate may find a better one"
            )

    def validate(self) -> Metrics:
        """Bounds and their terms on the validation rows, with the same noise at every epoch."""
        renamed = {"bound": "validation_bound", "elbo": "validation_elbo"}
        return {renamed.get(name, name): value for name, value in self.measured().items()}

    def measured(self) -> Metrics:
        """What `measure` finds on the validation rows."""
        assert self.validation is not None
        reseed(derive_seed(self.settings.seed, "validation"), self.device)
        batches = self.validation.split(max(self.settings.batch_size, 100))
        with evaluating(self.pair.model, self.pair.guide):
            try:
                return measure(self.pair.model, self.pair.guide, batches, self.objective, self.settings.particle_chunk)
            except ValueError as error:
                if isinstance(error, PyrovaeError) or "Expected parameter" not in str(error):
                    raise
                rows = torch.arange(len(self.validation), device=self.device)
                what = f"on the validation rows a distribution was refused ({str(error).splitlines()[0]})"
                raise NumericalError(self.diagnose(self.validation, rows, what)) from error

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        if self.directory is None or self.rank != 0:
            return
        state = self.progress
        training = {
            "progress": dict(vars(state)),
            "optimizer": self.optimizer.state_dict(),
            "untouched": [name for name, p in self.pair.trainable().items() if p not in self.optimizer.state],
            "scheduler": self.schedule_state(),
            "run": self.identity(),
            "environment": self.environment(),
        }
        # The newest two stay, so the best of either has to stay as well.
        best = (state.best_step, self.kept_best)
        checkpoints.save(self.directory, checkpoints.Checkpoint(state.step, self.pair.tensors(), training), best)
        self.kept_best = state.best_step

    def restore(self) -> None:
        """Take over the newest whole checkpoint of the directory."""
        assert self.directory is not None
        saved = checkpoints.load_latest(self.directory)
        for notice in saved.notices:
            self.notice(notice)
        training, where = saved.training, f"{self.directory}, step {saved.step}"
        if not all(isinstance(training.get(key), dict) for key in ("run", "environment", "progress", "optimizer")):
            raise CheckpointError(f"{where}: cannot be resumed: its record is of another form")
        if differing := differences(training["run"], self.identity()):
            raise CheckpointError(f"{self.directory}: cannot resume, since it was run with {'; '.join(differing)}")
        then = training["environment"]
        if self.threads_vary and then.get("threads") in range(1, torch.get_num_threads()):
            torch.set_num_threads(then["threads"])  # the run's own, for the same bits
        now = self.environment()
        if changed := differences(then, now):
            self.notice(f"resumed in another environment, so not bit-exact: {'; '.join(changed)}")
        # All of it is looked at before any of it is taken over.
        faults: list[str] = []
        check_progress(
            vars(Progress()), training["progress"], saved.step, len(self.data), self.settings.batch_size, faults
        )
        same_torch = then.get("torch") == now["torch"]
        optimizer = optimizer_state(
            self.optimizer,
            training["optimizer"],
            self.pair.trainable(),
            faults,
            untouched=training.get("untouched"),
            step=saved.step,
            same_torch=same_torch,
        )
        fresh, scheduler = self.schedule_state(), training.get("scheduler")
        if not same_torch and isinstance(fresh, dict) and isinstance(scheduler, dict):
            keep_known(fresh, scheduler)
        scheduler = matched(fresh, scheduler, "the schedule's", faults)
        refuse(faults, where)
        checkpoints.assign(self.pair.tensors(), saved.weights, where)
        load_optimizer(self.optimizer, optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler)
        self.progress = Progress(**training["progress"])
        if then.get("processes") != self.world:
            self.progress.compiled = None  # each process has other numbers of rows
        best = self.kept_best = self.progress.best_step
        if self.validation is not None and best is not None:
            try:
                weights = saved.weights if best == saved.step else checkpoints.load(self.directory, best).weights
                weights = matched(self.pair.tensors(), weights, "its", faults)
                refuse(faults, f"{self.directory}, step {best}")
            except CheckpointError as error:
                self.notice(f"{error}; the best epoch so far is lost, and is chosen anew from here on")
                weights, self.progress.best_bound = saved.weights, -math.inf
            self.best_weights = {name: t.to(self.device) for name, t in weights.items()}

    def schedule_state(self) -> dict[str, Any] | None:
        """The state of the schedule, if there is one."""
        return None if self.scheduler is None else plain(self.scheduler.state_dict())

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {
            "objective": repr(self.objective),
            "optimizer": type(self.optimizer).__name__,
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "rows": len(self.data),
            "data": self.fingerprint,
            "precision": self.settings.precision,
        }

    def environment(self) -> dict[str, Any]:
        """What may change, at the price of the last bits."""
        return {
            "torch": str(torch.__version__),
            "device": describe_device(self.device),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "particle_chunk": self.settings.particle_chunk,
        }


def without_bounds(metrics: Metrics) -> Metrics:
    """Measurements of a pair without a density, under names that claim no bound and no KL."""
    named = {name.replace("_bound", "_objective"): value for name, value in metrics.items()}
    return {k: v for k, v in named.items() if k != "validation_elbo" and k != "kl" and not k.startswith("kl_")}


def is_of_the_network(error: RuntimeError) -> bool:
    """Whether torch could not reach another process; Gloo says so in words alone."""
    known = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in known)


def fits(data: Tensor, device: torch.device) -> bool:
    """Whether a device has room for all rows and as much again."""
    return device.type != "cuda" or data.device == device or 2 * data.nbytes <= torch.cuda.mem_get_info(device)[0]


def describe_device(device: torch.device) -> str:
    """What the last bits depend on: "cpu", or of a GPU its name, its driver and the versions of its libraries."""
    if device.type != "cuda":
        return device.type
    driver, cudnn = cast(Any, torch._C)._cuda_getDriverVersion(), torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def saved_seconds(flops: float, device: torch.device) -> float:
    """What compiling saves of a step of so many floating-point operations, roughly.

    Measured on two CPU cores: the Python of a pair, and its passes over memory, which grow with its products. On a GPU
    it is nearly all Python.
    """
    return 4e-3 if device.type == "cuda" else 1e-3 + 5e-12 * flops


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that would get a gradient from a scalar: the leaves of its graph."""
    found: dict[int, Tensor] = {}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions]
    return list(found.values())


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without functions, which are made anew when resuming."""
    return {
        k: v for k, v in state.items() if v is None or isinstance(v, bool | int | float | str | list | tuple | Tensor)
    }


class Record:
    """metrics.csv and TensorBoard records of a run directory; of nothing without one."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.writer: Any = None
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.fspath(inside(directory, "tensorboard")))
        except OSError as error:
            raise OutputError(
                f"{error.filename or directory}: cannot be written ({error.strerror or error})"
            ) from error

    def write(self, history: list[Metrics]) -> None:
        """Write the whole table anew, and the last epoch to TensorBoard."""
        if self.directory is None:
            return
        import pandas as pd

        write_atomically(self.directory / "metrics.csv", pd.DataFrame(history).to_csv(index=False))
        for name, value in history[-1].items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name.replace("[", "/").rstrip("]"), value, int(history[-1]["epoch"]))

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()


class Bar:
    """A progress bar over epochs with the bound in nats per datum; silent where the output is no terminal."""

    def __init__(self, shown: bool, epochs: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=epochs, initial=done, unit="epoch", disable=None if shown else True, leave=False)
        self.drawn = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, state: Progress, batches: int) -> None:
        """Show the bound of the current epoch so far."""
        if self.bar.disable or (time.monotonic() - self.drawn < 0.1 and state.batch < batches):
            return
        self.drawn = time.monotonic()
        self.bar.n = round(state.epoch + state.batch / batches, 2)
        last = state.history[-1].get("validation_bound") if state.history else None
        text = f"train bound {state.total / state.rows:.2f}" if state.total else "training"
        self.bar.set_postfix_str(text + (f", validation {last:.2f} nats" if last is not None else " nats"))
