"""The Student-t distribution of a location and a scale, with one number of degrees of freedom for all elements.

    log p(x) = c(df) - log scale - (df + 1)/2 log(1 + ((x - loc) / scale)^2 / df),
    c(df)    = log Gamma((df + 1)/2) - log Gamma(df/2) - log(df pi)/2

torch's `StudentT` repeats df for every element, and so computes both log Gamma's for each of them at every step.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

SINGLE = torch.Size()


class ScaledT(dist.TorchDistribution):
    """Independent Student-t elements, reparameterised.

    Args:
        df: Degrees of freedom, above 2, shape ().
        loc: Mean of each element; the batch shape is its.
        scale: Scale of each, of the same shape.
    """

    arg_constraints = {  # noqa: RUF012
        "df": constraints.greater_than(2),
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScaledT":
        return ScaledT(self.df, self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the shape that value and the batch broadcast to."""
        half = (self.df + 1) / 2
        constant = torch.lgamma(half) - torch.lgamma(self.df / 2) - (self.df * math.pi).log() / 2
        square = ((value - self.loc) / self.scale).square()
        return constant - self.scale.log() - half * torch.log1p(square / self.df)

    def rsample(self, sample_shape: Any = SINGLE) -> Tensor:
        """A Gaussian over the root of a gamma-distributed precision."""
        shape = self._extended_shape(sample_shape)
        normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        precision = torch._standard_gamma((self.df / 2).expand(shape)) * 2 / self.df
        return self.loc + self.scale * normal / precision.sqrt()

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * (self.df / (self.df - 2))
