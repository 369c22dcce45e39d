"""A run's checkpoints: what is saved of it, and how it goes on from there."""

import math
import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.errors import CheckpointError
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.processes import describe_device
from pyrovae.inference.training.record import Progress
from pyrovae.inference.training.resuming import (
    check_progress,
    differences,
    keep_known,
    load_optimizer,
    matched,
    optimizer_state,
    refuse,
)

if TYPE_CHECKING:
    from pyrovae.inference.training.trainer import Trainer


def save(run: "Trainer") -> None:
    """Write a checkpoint of the state as it is."""
    if run.directory is None or run.processes.rank != 0:
        return
    state = run.progress
    training = {
        "progress": dict(vars(state)),
        "optimizer": run.optimizer.state_dict(),
        "untouched": [name for name, p in run.pair.trainable().items() if p not in run.optimizer.state],
        "scheduler": schedule_state(run),
        "run": identity(run),
        "environment": environment(run),
    }
    # The newest two stay, so the best of either has to stay as well.
    best = (state.best_step, run.kept_best)
    checkpoints.save(run.directory, checkpoints.Checkpoint(state.step, run.pair.tensors(), training), best)
    run.kept_best = state.best_step


def restore(run: "Trainer") -> None:
    """Take over the newest whole checkpoint of the directory."""
    assert run.directory is not None
    saved = checkpoints.load_latest(run.directory)
    for notice in saved.notices:
        run.notice(notice)
    training, where = saved.training, f"{run.directory}, step {saved.step}"
    if not all(isinstance(training.get(key), dict) for key in ("run", "environment", "progress", "optimizer")):
        raise CheckpointError(f"{where}: cannot be resumed: its record is of another form")
    if differing := differences(training["run"], identity(run)):
        raise CheckpointError(f"{run.directory}: cannot resume, since it was run with {'; '.join(differing)}")
    then = training["environment"]
    if run.threads_vary and then.get("threads") in range(1, torch.get_num_threads()):
        torch.set_num_threads(then["threads"])  # the run's own, for the same bits
    now = environment(run)
    if changed := differences(then, now):
        run.notice(f"resumed in another environment, so not bit-exact: {'; '.join(changed)}")
    # All of it is looked at before any of it is taken over.
    faults: list[str] = []
    check_progress(vars(Progress()), training["progress"], saved.step, len(run.source), run.settings.batch_size, faults)
    same_torch = then.get("torch") == now["torch"]
    optimizer = optimizer_state(
        run.optimizer,
        training["optimizer"],
        run.pair.trainable(),
        faults,
        untouched=training.get("untouched"),
        step=saved.step,
        same_torch=same_torch,
    )
    fresh, scheduler = schedule_state(run), training.get("scheduler")
    if not same_torch and isinstance(fresh, dict) and isinstance(scheduler, dict):
        keep_known(fresh, scheduler)
    scheduler = matched(fresh, scheduler, "the schedule's", faults)
    refuse(faults, where)
    checkpoints.assign(run.pair.tensors(), saved.weights, where)
    load_optimizer(run.optimizer, optimizer)
    if run.scheduler is not None:
        run.scheduler.load_state_dict(scheduler)
    vars(run.progress).update(training["progress"])
    run.kept_best = run.progress.best_step
    if then.get("processes") != run.processes.world:
        run.progress.compiled = None  # each process has other numbers of rows
    if run.validation is not None and run.progress.best_step is not None:
        restore_best(run, saved)


def restore_best(run: "Trainer", saved: checkpoints.Checkpoint) -> None:
    """Take over the weights of the best epoch so far."""
    assert run.directory is not None
    best = run.progress.best_step
    assert best is not None
    faults: list[str] = []
    try:
        weights = saved.weights if best == saved.step else checkpoints.load(run.directory, best).weights
        weights = matched(run.pair.tensors(), weights, "its", faults)
        refuse(faults, f"{run.directory}, step {best}")
    except CheckpointError as error:
        run.notice(f"{error}; the best epoch so far is lost, and is chosen anew from here on")
        weights, run.progress.best_bound = saved.weights, -math.inf
    run.best_weights = {name: t.to(run.processes.device) for name, t in weights.items()}


def schedule_state(run: "Trainer") -> dict[str, Any] | None:
    """The state of the schedule, if there is one."""
    return None if run.scheduler is None else plain(run.scheduler.state_dict())


def identity(run: "Trainer") -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    return {
        "objective": repr(run.objective),
        "optimizer": type(run.optimizer).__name__,
        "seed": run.settings.seed,
        "batch_size": run.settings.batch_size,
        "rows": len(run.source),
        "data": run.source.fingerprint,
        "precision": run.settings.precision,
    }


def environment(run: "Trainer") -> dict[str, Any]:
    """What may change, at the price of the last bits."""
    return {
        "torch": str(torch.__version__),
        "device": describe_device(run.processes.device),
        "processes": run.processes.world,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "particle_chunk": run.settings.particle_chunk,
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without functions, which are made anew when resuming."""
    return {
        k: v for k, v in state.items() if v is None or isinstance(v, bool | int | float | str | list | tuple | Tensor)
    }
