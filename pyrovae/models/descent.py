r"""Values drawn one after another, each given those before it: the way down of a hierarchy.

    zL ~ q(zL),   z_i ~ q(z_i | above_i),   i = L-1, ..., 1

What is above z_i is the value before it, z_{i+1}, or with skip connections all of them side by side, (z_{i+1}, ...,
zL). The model goes this way from its prior to x, and so does a guide that is drawn from the top down.
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


def descend(sites: Iterable[tuple[str, Given]], above: Tensor, skip: bool = False) -> Tensor:
    """Sample sites one after another, each given what is above it.

    Args:
        sites: Their names, from the top down, each with its distribution given what is above, (*batch, A).
        above: What the first one is given.
        skip: Each is given all values before it, and not only the last.

    Returns:
        What would be above a further one: the last value, or with `skip` all of them, the last one first.
    """
    for name, given in sites:
        z = pyro.sample(name, given(above))
        above = beside(z, above) if skip else z
    return above


def beside(z: Tensor, other: Tensor) -> Tensor:
    """z (*batch, Z) and another value, (*rest, A) with `rest` the last of `batch`, as one: (*batch, Z + A)."""
    return torch.cat([z, other.expand(*z.shape[:-1], other.shape[-1])], -1)


class Descent(dist.TorchDistribution):
    """What `descend` returns, as a distribution that can be drawn from.

    Its density has no closed form where values are left behind. `mean` and `stddev` are those of each value with the
    values above it at their means: exact for the first value, and for the others where means are linear and standard
    deviations constant in what is above, but for the spread that comes from above.

    Args:
        top: The distribution of the first value, event shape (Z,).
        below: Those of the others from the top down, each given what is above it.
        size: Number of elements of what is drawn.
        skip: As for `descend`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, top: dist.Distribution, below: Sequence[Given], size: int, skip: bool = False) -> None:
        self.top, self.below, self.skip = top, below, skip
        super().__init__(top.batch_shape, torch.Size([size]), validate_args=False)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each value, those above it at their means, each (*batch, Z).

        Raises:
            NotImplementedError: the distribution of some value has none in closed form.
        """
        mean, variance = self.top.mean, self.top.variance
        for given in self.below:
            q = given(mean)
            mean = beside(q.mean, mean) if self.skip else q.mean
            variance = beside(q.variance, variance) if self.skip else q.variance
        return mean, variance

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
        above = self.top.sample(torch.Size(sample_shape))
        for given in self.below:
            z = given(above).sample()
            above = beside(z, above) if self.skip else z
        return above
