"""A pair: a Pyro model and guide as one torch module, whichever way they were written.

The modules that they refer to are found (`modules`), and become parts of the pair. Parameters that a plain function
declares with `pyro.param` live in Pyro's store, where Pyro put them; `adopt` takes them in.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.inference.modules import Program, modules_of


class Pair(nn.Module):
    """The modules behind a model and a guide.

    Args:
        model: A Pyro model, called as model(x, *given).
        guide: A Pyro guide, called as guide(x, *given).
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
    def held(self) -> Iterator[None]:
        """Hold the parameters fixed: what is run meanwhile has no gradient by them, but has one by its inputs.

        Buffers, such as the averages of batch normalisation, are as before at the end.
        """
        modules = list(dict.fromkeys(self.parts.modules()))
        before = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
        buffers = [(module, name, b) for module in modules for name, b in module._buffers.items() if b is not None]
        # By their dictionaries: under a trace they hold tensors that are no parameters, and the same holds of these.
        for module, name, parameter in before:
            module._parameters[name] = parameter.detach()  # type: ignore[assignment]
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.clone()
        try:
            with HeldParam():
                yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            for module, name, parameter in before:
                module._parameters[name] = parameter


class HeldParam(Messenger):
    """Have `pyro.param` statements give values without a gradient."""

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        msg["value"] = msg["value"].detach()
