"""Pyro's automatic guides, which make themselves the first time they are run; and how to leave a pair as it was."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGaussian, AutoGuide, AutoStructured

from pyrovae.errors import PairError
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import evaluating, modules_of
from pyrovae.inference.pair import Pair


def automatic(guide: Callable) -> list[AutoGuide]:
    """Pyro's automatic guides in a guide."""
    found = [m for _, module in modules_of(guide) for m in module.modules() if isinstance(m, AutoGuide)]
    return list(dict.fromkeys(found))


def set_up(guide: Callable, batch: Batch) -> None:
    """Have automatic guides look at their model for data, without the plate of particles that they are run in later."""
    for auto in automatic(guide):
        if auto.prototype_trace is None:
            with pyro.poutine.block():
                auto(*batch.tensors)


def check_automatic(guide: Callable) -> None:
    """Refuse an automatic guide that has no density for each row."""
    for auto in automatic(guide):
        if isinstance(auto, AutoContinuous | AutoGaussian | AutoStructured):
            raise PairError(
                f"{type(auto).__name__} draws the latents of all rows as one, so there is no log q(z|x) of a "
                "row: fit trains it with pyro.infer.Trace_ELBO() alone. Use AutoNormal, or a guide that is a function "
                "of x, such as those of pyrovae.models"
            )


@contextmanager
def undone(pair: Pair) -> Iterator[None]:
    """Restore buffers; after an error, also what was declared to Pyro, and automatic guides."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in pair.buffers()]
    store = pyro.get_param_store()
    declared = set(store.keys())
    inside = {
        m: shallow(vars(m)) for auto in automatic(pair.guide) if auto.prototype_trace is None for m in auto.modules()
    }
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - declared:
            with suppress(KeyError):  # of a parameter with two names, which has been forgotten by the other
                del store[name]
        for module, before in inside.items():
            vars(module).clear()
            vars(module).update(before)
        raise
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def untouched(pair: Pair) -> Iterator[None]:
    """In evaluation mode and without gradients; at the end buffers are restored, and what was declared is forgotten."""
    store = pyro.get_param_store()
    declared = set(store.keys())
    try:
        with evaluating(pair), torch.no_grad(), undone(pair):
            yield
    finally:
        for name in set(store.keys()) - declared:
            with suppress(KeyError):  # of a parameter with two names
                del store[name]


def shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes, with copies of its dictionaries."""
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}
