"""The modules behind a Pyro program, whichever way it was written.

A model or a guide may be a torch module, a method of one, a `functools.partial`, or a plain function that refers to
modules by name. Those modules are found, so that their parameters can be trained, moved and saved without the Pyro
parameter store.
"""

import dis
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import pyro
from torch import Tensor, nn

Program = Callable[..., Any]

# A search for modules looks at no more objects than these.
MOST_OBJECTS = 20_000
# What holds nothing.
ATOMS = (Tensor, str, bytes, int, float, complex, NoneType)
# Python's own classes hold what a user puts there (a SimpleNamespace, an OrderedDict); these hold their own.
LIBRARIES = {"torch", "pyro", "numpy", "pandas", "math", "builtins", "matplotlib", "typing", "functools", "inspect"}
# What every module has.
OF_MODULES = set(vars(nn.Module()))


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
    attributes: set[str] = set()  # of anything
    chains: dict[tuple[str, ...], None] = {}
    for code in codes:
        found, used = names_in(code)
        attributes |= used
        chains |= dict.fromkeys(found)
    for name, *following in chains:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        # Of a module of Python's, what is used of it: by name, or where it got another name, whatever is.
        while isinstance(value, ModuleType) and value.__name__.split(".")[0] not in LIBRARIES:
            if not following:
                yield from ((inner, vars(value)[inner]) for inner in sorted(attributes & vars(value).keys()))
                break
            name = following.pop(0)
            value = vars(value).get(name)
            yield name, value


@functools.cache
def names_in(code: CodeType) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    """The globals that code reads, each with the attributes that follow, ("nets", "encoder"), and all attributes.

    `co_names` holds both alike, but `self.encoder` is no global `encoder`.
    """
    chains: list[tuple[str, ...]] = []
    attributes, follows = set(), False
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chains.append((name,))
            follows = True
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(name)
            if follows:
                chains[-1] += (name,)
        else:
            follows = False
    return tuple(chains), frozenset(attributes)


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
