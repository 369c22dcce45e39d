"""A pair: a Pyro model and guide as one torch module, whichever way they were written.

A model or a guide may be a torch module, a method of one, a `functools.partial`, or a plain function that refers to
modules by name. `Pair` finds those modules, so that their parameters can be trained, moved and saved without the Pyro
parameter store. Parameters that a plain function declares with `pyro.param` live in that store, where Pyro put them;
`adopt` takes them in.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import pyro
from pyro.poutine.runtime import effectful
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

Program = Callable[..., Any]


class Pair(nn.Module):
    """The modules behind a model and a guide.

    Args:
        model: A Pyro model, called as model(x).
        guide: A Pyro guide, called as guide(x).
    """

    def __init__(self, model: Program, guide: Program) -> None:
        super().__init__()
        found: dict[str, nn.Module] = {}
        seen: set[int] = set()
        for program in (model, guide):
            for name, module in modules_of(program, seen):
                if all(module is not other for other in found.values()):
                    while name in found or hasattr(nn.ModuleDict, name):
                        name += "_"
                    found[name] = module
        nested = {id(inner) for outer in found.values() for inner in list(outer.modules())[1:]}
        self.parts = nn.ModuleDict({name: module for name, module in found.items() if id(module) not in nested})
        self.stored: dict[str, Tensor] = {}
        # In a tuple, so that torch does not register a model that is a module a second time.
        self._programs = (model, guide)

    @property
    def model(self) -> Program:
        """The model, as it was given."""
        return self._programs[0]

    @property
    def guide(self) -> Program:
        """The guide, as it was given."""
        return self._programs[1]

    def adopt(self, trace: Trace) -> None:
        """Take in what a run of the pair declared with `pyro.param`: the parameter sites of its trace."""
        known = {id(p) for p in self.parameters()}
        for name, site in trace.nodes.items():
            if site["type"] == "param" and id(value := site["value"].unconstrained()) not in known:
                self.stored[name] = value

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer by name, those of the Pyro parameter store included."""
        return {**self.parts.state_dict(keep_vars=True), **{f"param:{k}": v for k, v in self.stored.items()}}

    def trainable(self) -> dict[str, Tensor]:
        """Every tensor that asks for a gradient, by name."""
        named = {**dict(self.parts.named_parameters()), **{f"param:{k}": v for k, v in self.stored.items()}}
        return {name: p for name, p in named.items() if p.requires_grad}

    def announce(self) -> None:
        """Tell Pyro's handlers about the parameters, as a `pyro.param` statement would, without storing them.

        This is how `pyro.infer.SVI` finds what to train.
        """
        for name, parameter in self.parts.named_parameters():
            if parameter.requires_grad:
                value = parameter.view_as(parameter)
                value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
                effectful(type="param")(lambda *_, value=value, **__: value)(
                    name, constraint=constraints.real, event_dim=None, name=name
                )


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Put the modules behind models and guides into evaluation mode (no dropout), and back at the end."""
    modules = [m for program in programs for _, found in modules_of(program, set()) for m in found.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def modules_of(program: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that a program is made of or refers to."""
    if isinstance(program, nn.Module):
        yield type(program).__name__.lower(), program
        return
    if id(program) in seen:
        return
    seen.add(id(program))
    if isinstance(program, functools.partial):
        named = [
            ("", program.func),
            *((f"arg{i}", a) for i, a in enumerate(program.args)),
            *program.keywords.items(),
        ]
    elif inspect.ismethod(program):
        owner = program.__self__
        named = [("", owner)] if isinstance(owner, nn.Module) else list(vars(owner).items())
        named.append(("", program.__func__))
    elif isinstance(program, FunctionType):
        named = [*references_of(program)]
    else:
        return
    for name, value in named:
        if isinstance(value, nn.Module):
            yield name or type(value).__name__.lower(), value
        elif isinstance(value, dict | list | tuple):
            inside = value.values() if isinstance(value, dict) else value
            yield from ((name, module) for module in inside if isinstance(module, nn.Module))
        elif callable(value) and not belongs_to_a_library(value):
            yield from modules_of(value, seen)


def references_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to by name: variables it closes over, defaults, globals (inner functions' too)."""
    yield from inspect.getclosurevars(function).nonlocals.items()
    for parameter in inspect.signature(function).parameters.values():
        yield parameter.name, parameter.default
    codes = [function.__code__]
    for code in codes:  # grows while it is read
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        for name in code.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]


def belongs_to_a_library(value: Any) -> bool:
    """Whether a callable is torch's or Pyro's own: looking into those finds nothing of the user's."""
    module = getattr(value, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "builtins", "math") or (
        module.split(".")[0] == pyro.__name__ and not hasattr(value, "__wrapped__")
    )
