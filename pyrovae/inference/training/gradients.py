r"""The loss of a pair on a batch and its gradient, as modules that can be run as they are, or compiled.

The loss is -sum_n L_n, with the bound L_n of an objective:

    Gradient    (x, *given, *settings)  ->  loss, gradients, and what else is observed of t_kn
    Terms       (x, *given)             ->  t_kn, the strands that the objective makes of each particle and datum
    Pullback    (x, *given, s)          ->  the gradients of sum_kn s_kn t_kn

What changes between steps is an input (the parameters, the batch, the objective's settings) or a random operation
(noise, dropout), so that each is one graph of tensor operations (see `pyrovae.inference.tracing`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing.bfloat16 import HalfProducts
from pyrovae.inference.tracing.compiler import compile_graph, recorded
from pyrovae.inference.tracing.recording import Stored, state, waits
from pyrovae.inference.training.optimizers import as_accumulated
from pyrovae.seeding import same_noise


class Part(nn.Module, ABC):
    """Something computed of a pair and a batch, as a module whose parameters and buffers are all that it depends on.

    Args:
        objective: The objective.
        pair: The pair.
        precision: One of `PRECISIONS`.
        num_particles: How many are drawn; None: all of the objective's.
    """

    def __init__(
        self, objective: Objective, pair: Pair, precision: str = "fp32", num_particles: int | None = None
    ) -> None:
        super().__init__()
        self.objective, self.pair, self.precision = objective, pair, precision
        self.num_particles = num_particles or sum(objective.chunks())
        # Where each parameter is: to look for all of them by name at every step would take as long as the encoder.
        places: dict[int, tuple[nn.Module, str]] = {}
        for module in pair.parts.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    places.setdefault(id(parameter), (module, name))  # of a shared one, the first
        self.places = list(places.values())
        self.settings = list(objective.settings(0))
        for i, value in enumerate(pair.stored.values()):
            self.register_buffer(f"stored{i}", value)

    @property
    def trainable(self) -> list[Tensor]:
        """What gradients are taken of, in the order of `Pair.trainable`."""
        stored = [getattr(self, f"stored{i}") for i in range(len(self.pair.stored))]
        return [module._parameters[name] for module, name in self.places] + stored

    def forward(self, *inputs: Tensor) -> Any:
        """What `compute` returns, with gradients where it takes them."""
        leaves = self.trainable
        for tensor in leaves:
            if isinstance(tensor, FakeTensor):  # in a trace, where tensors do not ask for gradients by themselves
                tensor.requires_grad_()
        with ExitStack() as context:
            if self.pair.stored:
                known = map(id, self.pair.stored.values())
                context.enter_context(Stored(dict(zip(known, leaves[len(self.places) :], strict=True))))
            if self.precision == "bf16-mixed":
                context.enter_context(HalfProducts())
            return self.compute(leaves, *inputs)

    @abstractmethod
    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        """The computation itself."""

    def gradients(self, value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of a scalar by what asks for one; None for what does not, or is not used."""
        asking = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, asking, allow_unused=True))
        # Here too, so that in a graph it is compiled with the rest.
        return as_accumulated([next(found) if leaf.requires_grad else None for leaf in leaves], leaves)

    def draw(self, tensors: Sequence[Tensor]) -> Tensor:
        """The objective's strands of draws for a batch of these tensors, shape (S, num_particles, N)."""
        x, *given = tensors
        return self.objective.strands(self.pair, Batch(x, tuple(given)), self.num_particles)


class Gradient(Part):
    """(x, *given, *settings) -> loss, gradients, `observed`; None for parameters on which the loss does not depend."""

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        tensors = len(inputs) - len(self.settings)
        with torch.enable_grad():
            terms = self.draw(inputs[:tensors])
            settings = dict(zip(self.settings, inputs[tensors:], strict=True))
            loss = -self.objective.surrogate(terms, **settings).sum()
            gradients = self.gradients(loss, leaves)
        return loss.detach(), *gradients, *observed(self.objective, terms)


class Terms(Part):
    """(x, *given) -> the strands of K' particles, shape (S, K', N)."""

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        with torch.no_grad():
            return self.draw(inputs)


class Pullback(Part):
    """(x, *given, s) -> the gradients of sum s t, with t the strands of K' particles and s of their shape."""

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        *tensors, slope = inputs
        with torch.enable_grad():
            return self.gradients((self.draw(tensors) * slope).sum(), leaves)


def observed(objective: Objective, terms: Tensor) -> tuple[Tensor, ...]:
    """What a step sees of all terms beside the loss: sums that a constraint adapts to, and the losses of others."""
    constraint = objective.constraint
    seen = () if constraint is None else constraint.observed(terms)
    return *seen, *objective.losses_of_others(terms)


class Code:
    """A part compiled for inputs of one shape.

    Args:
        part: What to compile.
        inputs: Of which shape, type and device matter.

    Raises:
        Refused: the part is more than tensor operations.
    """

    def __init__(self, part: Part, *inputs: Tensor) -> None:
        self.part = part
        self.state = [t.detach() for t in state(part).values()]
        with same_noise(inputs[0].device):
            graph = recorded(part, *inputs)
        self.waits = waits(graph)  # for the device, which a CUDA graph must not
        self.code = compile_graph(graph)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the part returns."""
        return self.code(*self.state, *inputs)


def check_chunk(objective: Objective, particle_chunk: int | None) -> None:
    """Refuse chunks of an objective that is not made of particles."""
    if particle_chunk is None:
        return
    check_count("particle_chunk", particle_chunk)
    if not objective.of_particles:
        raise UsageError(
            f"particle_chunk: {objective!r} is not made of terms of single particles; use an objective of "
            "pyrovae.inference, or leave it out"
        )
