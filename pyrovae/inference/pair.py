"""A pair: a Pyro model and guide as one torch module, whichever way they were written.

A model or a guide may be a torch module, a method of one, a `functools.partial`, or a plain function that refers to
modules by name. `Pair` finds those modules, so that their parameters can be trained, moved and saved without the Pyro
parameter store. Parameters that a plain function declares with `pyro.param` live in that store, where Pyro put them;
`adopt` takes them in.
"""

import functools
import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import pyro
from pyro.poutine.runtime import effectful
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

Program = Callable[..., Any]

# A search for modules looks at no more objects than these.
MOST_OBJECTS = 20_000
# What holds nothing.
ATOMS = (Tensor, str, bytes, int, float, complex, NoneType)
# Python's own classes hold what a user puts there (a SimpleNamespace, an OrderedDict); these hold their own.
LIBRARIES = {"torch", "pyro", "numpy", "pandas", "math", "builtins", "matplotlib", "typing", "functools", "inspect"}
# What every module has.
OF_MODULES = set(vars(nn.Module()))


class Pair(nn.Module):
    """The modules behind a model and a guide.

    Args:
        model: A Pyro model, called as model(x).
        guide: A Pyro guide, called as guide(x).
    """

    def __init__(self, model: Program, guide: Program) -> None:
        super().__init__()
        found: dict[str, nn.Module] = {}
        for program in (model, guide):
            for name, module in modules_of(program):
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
    modules = [m for program in programs for _, found in modules_of(program) for m in found.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def modules_of(program: Any, seen: dict[int, Any] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that a program is made of or refers to, however deep in containers, objects and functions.

    Args:
        program: A module, function, method, or any object.
        seen: What was looked at before, by its identity; it grows. A module is found in each search anew.
    """
    seen = {} if seen is None else seen
    inside: dict[int, nn.Module] = {}
    stack = [("", program)]
    while stack and len(seen) < MOST_OBJECTS:
        name, value = stack.pop()
        if id(value) in seen or id(value) in inside:
            continue
        if isinstance(value, nn.Module):
            yield name or type(value).__name__.lower(), value
            inside |= {id(module): module for module in value.modules()}
            parts = [part for module in value.modules() for part in unregistered(module)]
        else:
            seen[id(value)] = value  # itself, so that its identity is not given to another object
            parts = [*parts_of(value)]
        stack += [(inner or name, part) for inner, part in reversed(parts)]


def unregistered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds where torch does not look for modules: containers and objects."""
    for name, value in vars(module).items():
        if not isinstance(value, (*ATOMS, nn.Module)) and name not in OF_MODULES:
            yield name, value


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object that is no module is made of or refers to, with the names by which it does."""
    yield "", getattr(value, "__dict__", {}).get("__wrapped__")  # as of functools.wraps and functools.cache
    if isinstance(value, functools.partial):
        yield "", value.func
        yield from ((f"arg{i}", a) for i, a in enumerate(value.args))
        yield from value.keywords.items()
    elif inspect.ismethod(value):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, FunctionType):
        if not belongs_to_a_library(value):
            yield from references_of(value)
    elif isinstance(value, dict | list | tuple | set | frozenset | deque):
        inside = value.values() if isinstance(value, dict) else value
        yield from (("", part) for part in islice(inside, MOST_OBJECTS) if not isinstance(part, ATOMS))
    elif isinstance(value, staticmethod | classmethod):
        yield "", value.__func__
    elif isinstance(value, property):
        yield "", value.fget
    elif isinstance(value, type):
        if not belongs_to_a_library(value):
            yield from ((k, v) for k, v in vars(value).items() if k == "__call__" or not k.startswith("__"))
    elif not isinstance(value, (*ATOMS, ModuleType)) and root_of(type(value)) not in LIBRARIES:
        yield from getattr(value, "__dict__", {}).items()
        for owner in type(value).__mro__:
            slots = vars(owner).get("__slots__", ())
            yield from ((k, getattr(value, k, None)) for k in ([slots] if isinstance(slots, str) else slots))
            yield "", owner


def references_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to by name: variables it closes over, defaults, globals (inner functions' too)."""
    yield from inspect.getclosurevars(function).nonlocals.items()
    for parameter in inspect.signature(function).parameters.values():
        yield parameter.name, parameter.default
    codes = [function.__code__]
    for code in codes:  # grows while it is read
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    names = {name: None for code in codes for name in code.co_names}
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            yield name, value
            if isinstance(value, ModuleType) and value.__name__.split(".")[0] not in LIBRARIES:
                yield from ((inner, vars(value)[inner]) for inner in names if inner in vars(value))


def belongs_to_a_library(value: Any) -> bool:
    """Whether a callable is torch's, Pyro's or Python's own: looking into those finds nothing of the user's."""
    root = root_of(value)
    if root == pyro.__name__ and hasattr(value, "__wrapped__"):
        return False
    # Code of our own refers to nothing of the user's either; what our objects hold is another matter.
    return root in LIBRARIES or root in sys.stdlib_module_names or root == __name__.split(".")[0]


def root_of(value: Any) -> str:
    """The package in which a function or class was written."""
    return (getattr(value, "__module__", None) or "").split(".")[0]
