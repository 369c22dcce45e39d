"""A run's checkpoints: what is saved of it, and how it goes on from there."""

import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.errors import CheckpointError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.batches import Source, fingerprint
from pyrovae.inference.training.processes import Processes, describe_device
from pyrovae.inference.training.record import Notices, Progress
from pyrovae.inference.training.resuming import (
    check_progress,
    differences,
    keep_known,
    load_optimizer,
    matched,
    optimizer_state,
    refuse,
)
from pyrovae.inference.training.settings import Settings


class Keeper:
    """What keeps a run's state in its directory, and takes it over from there.

    Attributes:
        optimizer: Of the pair's parameters.
        scheduler: Of its rate, if there is one.
        best_weights: Those of the best epoch so far.
        threads_vary: Whether a resumed run may take fewer threads than are free.
    """

    optimizer: Optimizer
    scheduler: LRScheduler | None

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        source: Source,
        settings: Settings,
        processes: Processes,
        progress: Progress,
        directory: Path | None,
        notice: Notices,
        validation: Batch | None,
    ) -> None:
        self.pair, self.objective, self.source, self.settings = pair, objective, source, settings
        self.processes, self.progress, self.directory, self.notice = processes, progress, directory, notice
        self.validation = None if validation is None else fingerprint(validation.tensors)
        self.best_weights: dict[str, Tensor] | None = None
        self.kept_best: int | None = None  # best step as of the checkpoint before
        self.threads_vary = False

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        if self.directory is None or self.processes.rank != 0:
            return
        state = self.progress
        training = {
            "progress": dict(vars(state)),
            "optimizer": self.optimizer.state_dict(),
            "untouched": [name for name, p in self.pair.trainable().items() if p not in self.optimizer.state],
            "scheduler": self.schedule_state(),
            "run": self.identity(),
            "environment": self.environment(),
            "validation": self.validation,
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
        progress, rows = training["progress"], len(self.source)
        check_progress(vars(Progress()), progress, saved.step, rows, self.settings.batch_size, faults)
        if not faults and len(progress["losses"]) not in (0, len(self.objective.others)):
            faults.append("its losses are not those of this objective")
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
        vars(self.progress).update(training["progress"])
        self.kept_best = self.progress.best_step
        if then.get("processes") != self.processes.world:
            self.progress.compiled = None  # each process has other numbers of rows
        if training.get("validation", self.validation) != self.validation:
            self.choose_anew()
        elif self.validation is not None and self.progress.best_step is not None:
            self.restore_best(saved)

    def choose_anew(self) -> None:
        """Forget the best epoch so far: bounds on different validation rows are not compared."""
        rows = "no" if self.validation is None else "other"
        self.notice(f"resumed with {rows} validation rows, so that the best epoch is chosen anew from here on")
        state = self.progress
        state.untrained_bound, state.best_bound = None, -math.inf
        state.best_epoch, state.best_step = state.epoch, state.step

    def restore_best(self, saved: checkpoints.Checkpoint) -> None:
        """Take over the weights of the best epoch so far."""
        assert self.directory is not None
        best = self.progress.best_step
        assert best is not None
        faults: list[str] = []
        try:
            weights = saved.weights if best == saved.step else checkpoints.load(self.directory, best).weights
            weights = matched(self.pair.tensors(), weights, "its", faults)
            refuse(faults, f"{self.directory}, step {best}")
        except CheckpointError as error:
            self.notice(f"{error}; the best epoch so far is lost, and is chosen anew from here on")
            weights, self.progress.best_bound = saved.weights, -math.inf
        self.best_weights = {name: t.to(self.processes.device) for name, t in weights.items()}

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
            "rows": len(self.source),
            "data": self.source.fingerprint,
            "precision": self.settings.precision,
        }

    def environment(self) -> dict[str, Any]:
        """What may change, at the price of the last bits."""
        return {
            "torch": str(torch.__version__),
            "device": describe_device(self.processes.device),
            "processes": self.processes.world,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "particle_chunk": self.settings.particle_chunk,
        }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without functions, which are made anew when resuming."""
    return {
        k: v for k, v in state.items() if v is None or isinstance(v, bool | int | float | str | list | tuple | Tensor)
    }
