r"""Values drawn one after another, each given those before it: the way down of a hierarchy.

    zL ~ q(zL),   z_i ~ q(z_i | above_i),   i = L-1, ..., 1,        above_i = onwards_{i+1}(z_{i+1}, above_{i+1})

What is above z_i is one of

    next     the value before it, z_{i+1}                            `alone`
    all      all values before it side by side, (z_{i+1}, ..., zL)   `beside`
    state    a vector to which each value before it was added        a network, `pyrovae.models.states.State`

The model goes this way from its prior to x, and so does a guide that is drawn from the top down.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Given = Callable[[Tensor], dist.Distribution]
Onwards = Callable[[Tensor, Tensor | None], Tensor]


def descend(sites: Iterable[tuple[str, Given, Onwards]], above: Tensor) -> Tensor:
    """Sample sites one after another, each given what is above it.

    Args:
        sites: Their names, from the top down, each with its distribution given what is above, (*batch, A), and with
            how its value changes that.
        above: What the first one is given.

    Returns:
        What would be above a further one.
    """
    for name, given, onwards in sites:
        above = onwards(pyro.sample(name, given(above)), above)
    return above


def alone(z: Tensor, above: Tensor | None) -> Tensor:
    """z (*batch, Z): the next value is given this one, and nothing of those before it."""
    return z


def beside(z: Tensor, other: Tensor | None) -> Tensor:
    """z (*batch, Z) and another value, (*rest, A) with `rest` the last of `batch`, as one: (*batch, Z + A)."""
    return z if other is None else torch.cat([z, other.expand(*z.shape[:-1], other.shape[-1])], -1)


class Descent(dist.TorchDistribution):
    """The values of a descent side by side, the last one first, as a distribution that can be drawn from.

    Its density has no closed form where values are left behind. `mean` and `stddev` are those of each value with the
    values above it at their means: exact for the first value, and for the others where means are linear and standard
    deviations constant in what is above, but for the spread that comes from above.

    Args:
        top: The distribution of the first value, event shape (Z,).
        below: Those of the others from the top down, each given what is above it.
        onwards: How each value but the last changes what is above, from the top down.
        sizes: Numbers of elements of the values that are kept, from the last one upwards.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(
        self, top: dist.Distribution, below: Sequence[Given], onwards: Sequence[Onwards], sizes: Sequence[int]
    ) -> None:
        self.top, self.below, self.onwards, self.kept = top, below, onwards, len(sizes)
        super().__init__(top.batch_shape, torch.Size([sum(sizes)]), validate_args=False)

    def run(self, value_of: Callable[[dist.Distribution], Tensor]) -> tuple[list[dist.Distribution], list[Tensor]]:
        """The distributions of the values that are kept, and these, from the last one upwards."""
        passed, values = [self.top], [value_of(self.top)]
        above: Tensor | None = None
        for given, onwards in zip(self.below, self.onwards, strict=True):
            above = onwards(values[-1], above)
            passed.append(given(above))
            values.append(value_of(passed[-1]))
        return passed[: -self.kept - 1 : -1], values[: -self.kept - 1 : -1]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each value, those above it at their means, each (*batch, Z).

        Raises:
            NotImplementedError: the distribution of some value has none in closed form.
        """
        passed, means = self.run(lambda q: q.mean)
        return torch.cat(means, -1), torch.cat([q.variance for q in passed], -1)

    @property
    def mean(self) -> Tensor:
        """Each value's mean, those above it at their means: shape (*batch, Z)."""
        return self.moments[0]

    @property
    def variance(self) -> Tensor:
        """Each value's variance, those above it at their means: shape (*batch, Z)."""
        return self.moments[1]

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape (*sample_shape, *batch, Z)."""
        # The first draw has the shape that those below it take over.
        shape = torch.Size(sample_shape)
        _, values = self.run(lambda q: q.sample(shape if q is self.top else torch.Size()))
        return torch.cat(values, -1)
