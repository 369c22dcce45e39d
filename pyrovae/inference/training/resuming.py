"""Resuming: what a checkpoint says of a training run is compared with a fresh run before any of it is taken over.

A checkpoint may come from a stranger, with checksums that are right. Optimisers do not look at their moments: fused
ones read and write them as far as the parameters reach. So all of a saved state has to have the form of a fresh one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.errors import CheckpointError

MOST_FAULTS = 5  # that a message names
FORMS = ("fused", "capturable", "foreach")  # settings of an optimiser that are the device's own
Faults = list[str]


def refuse(faults: Sequence[str], where: str) -> None:
    """Raise a CheckpointError that names faults, if there are any."""
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise CheckpointError(f"{where}: cannot be resumed: {'; '.join(faults[:MOST_FAULTS])}{more}")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which words and numbers of `now` were others then: "seed 1 then, 2 now"."""
    return [
        f"{name} {then.get(name)!r:.100} then, {value!r} now"
        for name, value in now.items()
        if type(then.get(name)) is not type(value) or then.get(name) != value
    ]


def matched(fresh: Any, saved: Any, where: str, faults: Faults) -> Any:
    """Saved values in the form of fresh ones: of the same names, lengths, kinds, shapes and types, all numbers finite.

    Args:
        fresh: Dictionaries, lists, tensors, numbers, words and None, for which a number or word may stand as well.
        saved: What should be like it.
        where: What it is called in `faults`.
        faults: Gets a phrase for each difference; the result is then of no use.

    Returns:
        The saved numbers, with tensors on the device of the fresh ones and laid out in memory as they are.
    """
    if isinstance(fresh, Mapping) and isinstance(saved, Mapping):
        faults += [f"{where} lacks {name}" for name in fresh if name not in saved]
        faults += [f"{where} has an unknown {name!s:.40}" for name in saved if name not in fresh]
        return {name: matched(fresh[name], saved[name], f"{where} {name}", faults) for name in fresh if name in saved}
    if isinstance(fresh, list | tuple) and isinstance(saved, list | tuple):
        if len(fresh) != len(saved):
            faults.append(f"{where} has {len(saved)} elements, expected {len(fresh)}")
        pairs = enumerate(zip(fresh, saved, strict=False))
        return type(fresh)(matched(own, theirs, f"{where} {i}", faults) for i, (own, theirs) in pairs)
    if isinstance(fresh, Tensor) and fresh.ndim == 0 and is_number(saved):  # a learning rate may be either
        saved = torch.tensor(saved, dtype=fresh.dtype)
    if is_number(fresh) and isinstance(saved, Tensor) and saved.numel() == 1:
        saved = saved.item()
    if isinstance(fresh, Tensor) and isinstance(saved, Tensor):
        if fault := misfit(fresh, saved):
            faults.append(f"{where} {fault}")
            return fresh
        return torch.empty_like(fresh).copy_(saved)
    plain = saved is None or isinstance(saved, bool | str) or is_number(saved)
    if not plain or not (fresh is None or type(fresh) is type(saved) or (is_number(fresh) and is_number(saved))):
        faults.append(f"{where} is {described(saved)}, expected {described(fresh)}")
    return saved


def misfit(fresh: Tensor, saved: Tensor) -> str | None:
    """What keeps a saved tensor from standing in the place of a fresh one."""
    if saved.shape != fresh.shape:
        return f"has shape {tuple(saved.shape)}, expected {tuple(fresh.shape)}"
    if saved.dtype != fresh.dtype:
        return f"has type {saved.dtype}, expected {fresh.dtype}"
    bad = int((~saved.isfinite()).sum())
    return f"has {bad} elements that are not finite" if bad else None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no longer than one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**1000


def described(value: Any) -> str:
    """A value in a few words, however long it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 10**12):
        return str(value)
    return {int: "a number", str: "a word", dict: "a dictionary"}.get(type(value), "a list")


# -- The optimiser -----------------------------------------------------------------------------------------------------


def stepped_dry(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser after a step, which is when most make it. The parameters stay as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for p in parameters:
        p.grad = torch.zeros_like(p, layout=torch.sparse_coo) if sparse else torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.grad = None
            p.copy_(value)
    return optimizer.state_dict()


def optimizer_state(
    optimizer: Optimizer,
    saved: Any,
    named: Mapping[str, Tensor],
    faults: Faults,
    *,
    untouched: Any,
    step: int,
    same_torch: bool,
) -> dict[str, Any]:
    """A saved state of an optimiser, to be loaded into it.

    Args:
        optimizer: A fresh one.
        saved: What its `state_dict` was.
        named: Its parameters by name.
        faults: Gets what is wrong with it.
        untouched: Names of parameters that no gradient had reached; they may have no state.
        step: Gradient steps that were taken.
        same_torch: Whether it was saved under this version of torch; another one may know other settings.
    """
    fresh = stepped_dry(optimizer)
    state, groups = (saved.get(key) if isinstance(saved, dict) else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        faults.append("the optimiser's state is of another form")
        return fresh
    for own, theirs in zip(fresh["param_groups"], groups, strict=False):
        theirs |= {key: own[key] for key in FORMS if key in own}
        if not same_torch:
            keep_known(own, theirs)
    found = matched({**fresh, "state": {}}, {**saved, "state": {}}, "the optimiser's", faults)
    if not isinstance(untouched, list):
        faults.append("its list of parameters that no gradient had reached is of another form")
        return fresh
    names = {id(p): name for name, p in named.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        name = f"the optimiser's state of {names.get(id(p), f'parameter {i}')}"
        if i in fresh["state"] and i in state:
            entry = found["state"][i] = matched(fresh["state"][i], state[i], name, faults)
            if not faults and "step" in entry and not 0 <= float(entry["step"]) <= step:
                faults.append(f"{name} is of step {float(entry['step']):g}, the run of step {step}")
        elif i in fresh["state"] and names.get(id(p)) not in untouched:
            faults.append(f"{name} is missing")
    if extra := len(state.keys() - fresh["state"].keys()):
        faults.append(f"the optimiser has states of {extra} unknown parameters")
    for own, theirs in zip(fresh["param_groups"], found["param_groups"], strict=False):
        if theirs.get("params") != own["params"]:
            faults.append("the optimiser's groups have other parameters")
        negative = [key for key, value in theirs.items() if is_number(value) and value < 0]
        faults += [f"the optimiser's {key} is negative" for key in negative if is_number(own[key]) and own[key] >= 0]
    return found


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` found, tensors as they are: torch would give them the types of the parameters."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.update({parameters[i]: entry for i, entry in state["state"].items()})


def keep_known(fresh: Mapping[str, Any], saved: dict[str, Any]) -> None:
    """Leave out what is unknown, and put in what is missing: settings of another version of torch."""
    for name in [name for name in saved if name not in fresh]:
        del saved[name]
    saved |= {name: value for name, value in fresh.items() if name not in saved}


# -- Counters ----------------------------------------------------------------------------------------------------------


def check_progress(fresh: Mapping[str, Any], saved: Any, step: int, rows: int, batch_size: int, faults: Faults) -> None:
    """Look whether a run's counters, `trainer.Progress` as a dictionary, can be those of a run.

    Args:
        fresh: Those of a run that starts.
        saved: What the checkpoint says.
        step: The step that the checkpoint is of.
        rows: Training rows.
        batch_size: Rows per step.
        faults: Gets what is wrong with them.
    """
    if not isinstance(saved, dict) or saved.keys() != fresh.keys():
        faults.append("its counters are of another form")
        return
    batches = math.ceil(rows / batch_size)

    def whole(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most

    def record(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and isinstance(x, int | float) for name, x in value.items()
        )

    rules: dict[str, Callable[[Any], bool]] = {
        "epoch": lambda value: whole(value, step // batches),
        "step": lambda value: whole(value, step) and value == step,
        "batch": lambda value: whole(value, batches) and saved["epoch"] * batches + value == step,
        "total": is_number,
        "rows": lambda value: whole(value, rows) and value == min(saved["batch"] * batch_size, rows),
        "seconds": lambda value: is_number(value) and value >= 0,
        "untrained_bound": lambda value: value is None or isinstance(value, float),
        "best_bound": lambda value: isinstance(value, float) and not math.isnan(value),
        "best_epoch": lambda value: whole(value, saved["epoch"]),
        "best_step": lambda value: value is None or whole(value, step),
        "compiled": lambda value: (
            value is None or (isinstance(value, list) and all(whole(n, batch_size) for n in value))
        ),
        "refused": lambda value: value is None or isinstance(value, str),
        "beta": lambda value: value is None or (is_number(value) and value > 0),
        "losses": lambda value: isinstance(value, list) and all(map(is_number, value)),
        "history": lambda value: isinstance(value, list) and len(value) == saved["epoch"] and all(map(record, value)),
    }
    for name, right in rules.items():
        if not right(saved[name]):
            faults.append(f"its {name} is {described(saved[name])}, which does not go with step {step}")
            return  # what is left may depend on it
