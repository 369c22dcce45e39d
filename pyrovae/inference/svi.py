"""The training loop: any pair, any objective, on one device or several processes.

What makes a run repeatable and resumable bit for bit: the rows of epoch e come from a permutation seeded by (seed, e),
and the noise of step t from a generator seeded by (seed, t, process). Nothing random has to be saved.
"""

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyrovae.errors import CheckpointError, DataError, NumericalError, OutputError, PyrovaeError, UsageError
from pyrovae.inference import checkpoint as checkpoints
from pyrovae.inference.checks import check_count, check_rows
from pyrovae.inference.diagnostics import measure
from pyrovae.inference.log_weights import draw, sample_sites
from pyrovae.inference.objectives import ELBO, Bound, Objective
from pyrovae.inference.pair import Pair, Program, evaluating
from pyrovae.inference.seeding import derive_seed, seeded

if TYPE_CHECKING:
    import pandas as pd

Factory = Callable[[list[Tensor]], Optimizer]
Metrics = dict[str, float]


def adam(parameters: list[Tensor], lr: float = 1e-3, eps: float = 1e-8) -> Optimizer:
    """Adam in its fused form, the default optimiser."""
    return torch.optim.Adam(parameters, lr=lr, eps=eps, fused=True)


def staged(optimizer: Optimizer, stages: int = 8) -> LRScheduler:
    """The IWAE paper's schedule: stage i of 0 .. stages-1 lasts 3^i epochs at lr * round(10^(1 - i/7), 1) / 10.

    Eight stages are 3280 epochs, from lr to lr / 10.
    """
    ends = [(3 ** (i + 1) - 1) // 2 for i in range(stages)]

    def factor(epoch: int) -> float:
        stage = next((i for i, end in enumerate(ends) if epoch < end), stages - 1)
        return round(10 ** (1 - stage / 7), 1) / 10

    return LambdaLR(optimizer, factor)


@dataclass
class Fit:
    """What `fit` returns; the pair itself holds the weights of the best epoch.

    Attributes:
        history: One dictionary of measurements per epoch; `metrics` is the same as a table.
        best_epoch: Epoch (from 1) of the best validation bound, or the last one without validation data.
        stopped: "finished", "early" (patience ran out) or "interrupted".
        step: Gradient steps taken.
        notices: What the user should read.
    """

    history: list[Metrics] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = "finished"
    step: int = 0
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
    best_bound: float = -math.inf
    best_epoch: int = 0
    best_step: int | None = None
    history: list[Metrics] = field(default_factory=list)


def fit(
    model: Program,
    guide: Program,
    data: Tensor,
    objective: PyroELBO | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 100,
    optimizer: Factory = adam,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    validation: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Metrics], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Fit:
    """Train a pair.

    Args:
        model: Pyro model, called as model(x), with all its sites inside one `pyro.plate("data", len(x))`.
        guide: Pyro guide, called as guide(x).
        data: Training rows, shape (N, *event), or whatever `transform` takes.
        objective: Any `pyro.infer.ELBO` with a differentiable loss; `ELBO()` when None. Its loss, summed over the
            batch, is what is minimised.
        epochs: Passes over the data, counted from the start also when resuming.
        batch_size: Rows per step over all processes; the last batch of an epoch has the rows that are left.
        optimizer: Makes a torch optimiser of a list of parameters.
        schedule: Makes a scheduler of the optimiser; it is stepped once per epoch.
        validation: Rows of shape (V, *event), not transformed. The epoch of the best validation bound (with beta = 1)
            is kept; without them, the last.
        transform: Maps a batch of rows to x, e.g. a binarisation drawn anew at every step.
        patience: Stop after so many epochs without a better validation bound.
        seed: Of the order of rows and all noise. The caller's random state is restored.
        device: "cpu", "cuda", ...; None: where the pair's parameters are, or with several processes where Accelerate
            puts each. The pair is moved there and stays there.
        directory: Where to keep metrics.csv, TensorBoard records and checkpoints; None: nowhere.
        resume: Continue from the newest whole checkpoint in `directory`.
        progress: Show a progress bar when the output is a terminal.
        on_epoch: Called with the measurements of each epoch.
        should_stop: Asked after every step; True saves the state and returns.

    Returns:
        The history; the pair's parameters are those of the best epoch, or the last ones when interrupted.

    Raises:
        UsageError: an argument makes no sense, or the pair has nothing to train.
        PairError: the pair does not give a bound per datum.
        NumericalError: a loss or gradient is NaN or infinite. The step was not taken; checkpoints are intact.
        CheckpointError: `resume` without a usable checkpoint, or one of other data, seed or batch size.
        OutputError: the directory cannot be written.
    """
    objective = objective if objective is not None else ELBO()
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None:
            check_count(name, value)
    for name, rows in (("data", data), ("validation", validation)):
        if rows is not None or name == "data":
            check_rows(name, rows)
    if batch_size > len(data):
        raise UsageError(f"batch_size: {batch_size} is more than the {len(data)} training rows")
    if not hasattr(objective, "differentiable_loss"):
        raise UsageError(
            f"objective: {type(objective).__name__} has no differentiable_loss; use an objective of pyrovae.inference "
            "(Renyi and IWAE for RenyiELBO), or Pyro's Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO"
        )
    if resume and directory is None:
        raise UsageError("resume: needs the directory of the run to continue")
    trainer = Trainer(
        model, guide, data, objective, batch_size, optimizer, schedule, validation, transform, seed, device
    )
    with seeded(seed, "fit", device=trainer.device), trainer.accelerated():
        trainer.start(Path(directory) if directory is not None else None, resume)
        return trainer.run(epochs, patience, progress, on_epoch, should_stop)


class Trainer:
    """One run of `fit`: what it holds, step by step."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Tensor,
        objective: PyroELBO,
        batch_size: int,
        optimizer: Factory,
        schedule: Callable[[Optimizer], LRScheduler] | None,
        validation: Tensor | None,
        transform: Callable[[Tensor], Tensor] | None,
        seed: int,
        device: str | torch.device | None,
    ) -> None:
        self.objective, self.batch_size, self.seed = objective, batch_size, seed
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.transform = transform or (lambda rows: rows)
        self.requested = None if device is None else torch.device(device)
        if self.requested is not None and self.requested.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device: {self.requested} asked for, but torch sees no CUDA device; use cpu")
        self.data, self.validation = data, validation
        self.pair = Pair(model, guide)
        here = next((p.device for p in self.pair.parameters()), torch.device("cpu"))
        self.device = self.requested or here
        self.progress = Progress()
        self.notices: list[str] = []
        self.best_weights: dict[str, Tensor] | None = None
        self.kept_best: int | None = None  # best step as of the checkpoint before

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

    def start(self, directory: Path | None, resume: bool) -> None:
        """Put everything on the device, check the pair, and restore a checkpoint if asked."""
        self.directory = directory
        self.pair.to(self.device)
        self.data = self.data.to(self.device)
        self.validation = None if self.validation is None else self.validation.to(self.device)
        if self.validation is not None and not self.validation.isfinite().all():
            bad = (~self.validation.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise DataError(
                f"validation: {len(bad)} rows are not finite, the first being {bad[:5]}; repair or drop them"
            )
        if directory is not None and not resume and checkpoints.steps(directory):
            raise UsageError(
                f"directory: {directory} holds the checkpoints of another run; pass resume=True, or choose another"
            )
        sampled = self.data[:: max(1, len(self.data) // 1000)].cpu().contiguous()
        self.fingerprint = hashlib.sha256(sampled.numpy().tobytes()).hexdigest()[:16]
        self.discover()
        self.optimizer = self.make_optimizer(list(self.pair.trainable().values()))
        self.scheduler = self.make_schedule(self.optimizer) if self.make_schedule else None
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError("optimizer: LBFGS evaluates the loss several times per step; use another")
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError("schedule: ReduceLROnPlateau needs a metric; use one that is stepped by the epoch alone")
        if resume:
            self.restore()
        bound = Bound(self.objective, self.pair)
        self.loss = self.accelerator.prepare_model(bound) if self.world > 1 else bound

    def discover(self) -> None:
        """Run the pair once with a gradient: it must work, and every parameter should get one."""
        rows = torch.arange(min(2, self.batch_size), device=self.device)
        x = self.transform(self.data[rows])
        if self.validation is not None and self.validation.shape[1:] != x.shape[1:]:
            raise UsageError(
                f"validation: expected event shape {tuple(x.shape[1:])}, that of the training rows, got "
                f"{tuple(self.validation.shape[1:])}"
            )
        before = getattr(self.objective, "step", 0)
        with self.diagnosing(x, rows), poutine.trace(param_only=True) as declared:
            loss = self.objective.differentiable_loss(self.pair.model, self.pair.guide, x)
            depends_on = leaves(loss)
            if not depends_on:
                raise UsageError("fit: found no parameters to train in the model and the guide")
            loss.backward()
        self.objective.step = before
        self.pair.adopt(declared.trace)
        if self.pair.stored and self.world > 1:
            raise UsageError(
                f"fit: pyro.param {', '.join(self.pair.stored)}: several processes train torch modules only; declare "
                "parameters in a module"
            )
        known = {id(p) for p in self.pair.trainable().values()}
        lost = [tuple(leaf.shape) for leaf in depends_on if id(leaf) not in known]
        if lost:
            raise UsageError(
                f"fit: the loss depends on {len(lost)} parameters, of shapes {', '.join(map(str, lost[:4]))}, that "
                "belong to no module which the model and the guide refer to, so they would not be trained; make both "
                "methods of one torch.nn.Module"
            )
        idle = [name for name, p in self.pair.trainable().items() if p.grad is None]
        if idle:
            self.notices.append(f"no gradient reaches {', '.join(idle)}: the loss does not depend on them")
        for p in self.pair.trainable().values():
            p.grad = None

    def run(
        self,
        epochs: int,
        patience: int | None,
        progress: bool,
        on_epoch: Callable[[Metrics], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Fit:
        """Train until `epochs` are done, patience runs out or somebody asks to stop."""
        state = self.progress
        record = Record(self.directory if self.rank == 0 else None)
        stopped = "finished"
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
        if stopped != "interrupted" and self.best_weights is not None:
            checkpoints.assign(self.pair.tensors(), self.best_weights, "best epoch")
        return Fit(state.history, state.best_epoch, stopped, state.step, self.notices)

    def epoch(self, bar: "Bar", should_stop: Callable[[], bool] | None) -> bool:
        """Train on the batches of the current epoch that are left; False if asked to stop before its end."""
        state = self.progress
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", state.epoch))
        order = torch.randperm(len(self.data), generator=generator).to(self.device)
        batches = order.split(self.batch_size)
        self.pair.train()
        started = time.perf_counter()
        for rows in batches[state.batch :]:
            total = self.take_step(rows)
            state.step += 1
            state.batch += 1
            state.total += total
            state.rows += len(rows)
            bar.show(state, len(batches))
            if should_stop is not None and should_stop():
                if state.batch < len(batches):
                    state.seconds += time.perf_counter() - started
                    return False
                break
        state.seconds += time.perf_counter() - started
        return True

    def take_step(self, rows: Tensor) -> float:
        """One gradient step on some rows; returns the objective summed over them."""
        state = self.progress
        mine = rows[self.rank :: self.world]
        # A process without rows of its own still has to take part: it does so with a loss of nothing.
        share = float(len(mine) > 0) * self.world
        mine = mine if len(mine) else rows[:1]
        torch.manual_seed(derive_seed(self.seed, "step", state.step, self.rank))
        x = self.transform(self.data[mine])
        self.objective.step = state.step
        with self.diagnosing(x, mine):
            # Processes' gradients are averaged; times their number, that is the gradient of the sum over all rows.
            loss = self.loss(x) * share
            loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # One transfer from the device for both.
        value, size = torch.stack([loss.detach().double() / self.world, norm.double()]).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            what = f"the loss is {value}" if not math.isfinite(value) else "a gradient is not finite"
            message = self.diagnose(x, mine, what)
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericalError(message)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world > 1:
            value = self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum").item()
        return -value

    @contextmanager
    def diagnosing(self, x: Tensor, rows: Tensor) -> Iterator[None]:
        """Tell a distribution that was given NaN or infinite numbers, which Pyro refuses, from other faults."""
        try:
            yield
        except ValueError as error:
            if not x.isfinite().all():
                raise NumericalError(self.diagnose(x, rows, "x is not finite")) from error
            broken = any(not p.isfinite().all() for p in self.pair.trainable().values())
            if isinstance(error, PyrovaeError) or not (broken or "Expected parameter" in str(error)):
                raise
            reason = str(error).split("\n")[0].removesuffix(", but found invalid values:")
            raise NumericalError(self.diagnose(x, rows, f"a distribution was refused ({reason})")) from error

    def diagnose(self, x: Tensor, rows: Tensor, what: str) -> str:
        """Say which rows, sites and parameters make a loss or gradient that is not finite."""
        state = self.progress
        wrong = (~x.isfinite()).flatten(1).any(1)
        sites: list[str] = []
        if isinstance(self.objective, Objective):
            torch.manual_seed(derive_seed(self.seed, "step", state.step, self.rank))
            self.transform(self.data[rows])
            k = self.objective.num_averages * self.objective.num_particles
            with torch.no_grad(), suppress(ValueError), pyro.validation_enabled(False):
                particles = draw(self.pair.model, self.pair.guide, x, k)
                bad = (~particles.log_weights.isfinite()).any(0)
                wrong = wrong if wrong.any() else bad
                latents = particles.latents
                terms = {name: latent.log_prior + latent.log_guide for name, latent in latents.items()}
                observed = [name for name in sample_sites(particles.model_trace) if name not in latents]
                terms[", ".join(observed)] = particles.log_likelihood
                sites = [name for name, term in terms.items() if not term.isfinite().all()]
        named = self.pair.trainable().items()
        parameters = [name for name, p in named if not p.isfinite().all()]
        gradients = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        where = f" in rows {rows[wrong][:5].tolist()}" if wrong.any() else ""
        for kind, names in (("site", sites), ("parameter", parameters), ("gradient of", gradients)):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            where += f", {kind} {shown}" if names else ""
        last = f"the last good step is {state.step - 1}" if state.step else "no step has been taken"
        kept = f"; the checkpoints in {self.directory} are intact" if self.directory else ""
        return (
            f"epoch {state.epoch + 1}, step {state.step}: {what}{where}; {last}{kept}. "
            "Lower the learning rate, or look at these rows"
        )

    def finish_epoch(self, record: "Record") -> None:
        """Measure, record and count an epoch, and keep it if it is the best so far."""
        state = self.progress
        metrics: Metrics = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_bound": state.total / max(1, state.rows),
        }
        if self.validation is not None:
            metrics |= self.validate()
        beta = getattr(self.objective, "beta", None)
        metrics |= beta.values(state.step) if beta is not None else {"beta": 1.0}
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        metrics["rows_per_second"] = state.rows / max(state.seconds, 1e-9)
        metrics["seconds"] = state.seconds
        state.history.append(metrics)
        state.epoch += 1
        state.batch, state.total, state.rows, state.seconds = 0, 0.0, 0, 0.0
        if self.scheduler is not None:
            self.scheduler.step()
        bound = metrics.get("validation_bound", math.inf)
        improved = self.validation is None or bound > state.best_bound
        if not math.isfinite(bound) and self.validation is not None:
            self.notices.append(f"epoch {state.epoch}: the validation bound is {bound}, so it cannot be the best")
        if improved:
            state.best_bound, state.best_epoch, state.best_step = bound, state.epoch, state.step
            if self.validation is not None:
                self.best_weights = {name: t.detach().clone() for name, t in self.pair.tensors().items()}
        record.write(state.history)

    def validate(self) -> Metrics:
        """Bounds and their terms on the validation rows, with the same noise at every epoch."""
        assert self.validation is not None
        torch.manual_seed(derive_seed(self.seed, "validation"))
        batches = self.validation.split(max(self.batch_size, 100))
        with evaluating(self.pair.model, self.pair.guide):
            try:
                report = measure(self.pair.model, self.pair.guide, batches, self.objective)
            except ValueError as error:
                if isinstance(error, PyrovaeError) or "Expected parameter" not in str(error):
                    raise
                rows = torch.arange(len(self.validation), device=self.device)
                what = f"on the validation rows a distribution was refused ({str(error).splitlines()[0]})"
                raise NumericalError(self.diagnose(self.validation, rows, what)) from error
        renamed = {"bound": "validation_bound", "elbo": "validation_elbo"}
        return {renamed.get(name, name): value for name, value in report.items()}

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        if self.directory is None or self.rank != 0:
            return
        state = self.progress
        training = {
            "progress": dict(vars(state)),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else plain(self.scheduler.state_dict()),
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
        self.notices += saved.notices
        theirs, ours = saved.training["run"], self.identity()
        differing = [
            f"{key} {theirs.get(key)!r} then, {ours[key]!r} now" for key in ours if theirs.get(key) != ours[key]
        ]
        if differing:
            raise CheckpointError(f"{self.directory}: cannot resume, since it was run with {'; '.join(differing)}")
        then, now = saved.training["environment"], self.environment()
        changed = [f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
        if changed:
            self.notices.append(f"resumed in another environment, so not bit-exact: {'; '.join(changed)}")
        checkpoints.assign(self.pair.tensors(), saved.weights, f"{self.directory}, step {saved.step}")
        self.optimizer.load_state_dict(saved.training["optimizer"])
        if self.scheduler is not None and saved.training["scheduler"] is not None:
            self.scheduler.load_state_dict(saved.training["scheduler"])
        self.progress = Progress(**saved.training["progress"])
        best = self.kept_best = self.progress.best_step
        if self.validation is not None and best is not None:
            try:
                weights = saved.weights if best == saved.step else checkpoints.load(self.directory, best).weights
            except CheckpointError as error:
                self.notices.append(f"{error}; the best epoch so far is lost, and is chosen anew from here on")
                weights, self.progress.best_bound = saved.weights, -math.inf
            self.best_weights = {name: t.to(self.device) for name, t in weights.items()}

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {
            "objective": describe_objective(self.objective),
            "optimizer": type(self.optimizer).__name__,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "processes": self.world,
            "rows": len(self.data),
            "data": self.fingerprint,
        }

    def environment(self) -> dict[str, Any]:
        """What may change, at the price of the last bits."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }


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


def describe_objective(objective: PyroELBO) -> str:
    """Class and settings of an objective, e.g. "IWAE(alpha=0.0, num_averages=1, num_particles=5)"."""
    known = ("alpha", "beta", "kl", "num_averages", "num_particles")
    settings = ", ".join(f"{name}={getattr(objective, name)}" for name in known if hasattr(objective, name))
    return f"{type(objective).__name__}({settings})"


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

            self.writer = SummaryWriter(os.fspath(directory / "tensorboard"))
        except OSError as error:
            raise OutputError(f"{directory}: cannot be written ({error.strerror or error})") from error

    def write(self, history: list[Metrics]) -> None:
        """Write the whole table anew, and the last epoch to TensorBoard."""
        if self.directory is None:
            return
        import pandas as pd

        checkpoints.write_atomically(self.directory / "metrics.csv", pd.DataFrame(history).to_csv(index=False))
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
        text = f"train bound {state.total / state.rows:.2f}"
        self.bar.set_postfix_str(text + (f", validation {last:.2f} nats" if last is not None else " nats"))
