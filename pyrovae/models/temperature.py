r"""Low-temperature draws: the noise that latents are made of, times a temperature t.

Of a Gaussian z = m + s e that is z = m + t s e, of any other prior what its own noise makes of it:

    Student t, Gaussian     scales times t
    mixture, VampPrior      scales of every component times t; the weights stay
    flow, process           f(t u) in place of f(u), u ~ N(0, I)
    hierarchy               every layer, given the one above

and p(x|z) stays. With t = 1 these are draws of p(x). With t < 1 they are not: they keep to where p(z) is high, so that
they vary less than data does, and no log p(x) is of them. (For a Gaussian the draws are of p(z)^(1/t^2), made to
integrate to 1; for a mixture or a flow they are not.)

References:
    Kingma and Dhariwal 2018, Glow: Generative Flow with Invertible 1x1 Convolutions, https://arxiv.org/abs/1807.03039
"""

import math
from functools import singledispatch

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as torch_dist

from pyrovae.errors import UsageError
from pyrovae.models.flows import Chain, Flow, Flowed
from pyrovae.models.priors import SharedComponents
from pyrovae.models.student import EllipticalStudentT


def tempered(p: dist.Distribution, temperature: float) -> dist.Distribution:
    """A distribution at a temperature: itself at 1."""
    return p if temperature == 1 else cooled(p, temperature)


class Scaling(Flow):
    """f(u) = t u.

    Args:
        factor: t.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.factor * u, self.log_det(u)

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z / self.factor, self.log_det(z)

    def log_det(self, u: Tensor) -> Tensor:
        """Z log t, for each vector."""
        return u.new_full(u.shape[:-1], u.shape[-1] * math.log(self.factor))


@singledispatch
def cooled(p: dist.Distribution, temperature: float) -> dist.Distribution:
    """A distribution whose noise is times a temperature, of the same shapes.

    Raises:
        UsageError: it is none that has a noise to scale.
    """
    name = type(p).__name__
    raise UsageError(f"temperature: {name} has no noise that could be scaled; leave it out", settings=("temperature",))


@cooled.register
def _(p: torch_dist.Normal, temperature: float) -> dist.Distribution:
    return dist.Normal(p.loc, temperature * p.scale)


@cooled.register
def _(p: torch_dist.StudentT, temperature: float) -> dist.Distribution:
    return dist.StudentT(p.df, p.loc, temperature * p.scale)


@cooled.register
def _(p: EllipticalStudentT, temperature: float) -> dist.Distribution:
    return EllipticalStudentT(p.df, p.loc, temperature * p.scale)


@cooled.register
def _(p: torch_dist.MultivariateNormal, temperature: float) -> dist.Distribution:
    return dist.MultivariateNormal(p.loc, scale_tril=temperature * p.scale_tril)


@cooled.register
def _(p: torch_dist.LowRankMultivariateNormal, temperature: float) -> dist.Distribution:
    return dist.LowRankMultivariateNormal(p.loc, temperature * p.cov_factor, temperature**2 * p.cov_diag)


@cooled.register
def _(p: torch_dist.Independent, temperature: float) -> dist.Distribution:
    return cooled(p.base_dist, temperature).to_event(p.reinterpreted_batch_ndims)


@cooled.register
def _(p: torch_dist.MixtureSameFamily, temperature: float) -> dist.Distribution:
    return SharedComponents(p.mixture_distribution, cooled(p.component_distribution, temperature))


@cooled.register
def _(p: torch_dist.TransformedDistribution, temperature: float) -> dist.Distribution:
    return dist.TransformedDistribution(cooled(p.base_dist, temperature), p.transforms)


@cooled.register
def _(p: Flowed, temperature: float) -> dist.Distribution:
    cold = Chain([Scaling(temperature), p.flow])
    return Flowed(cold, p.loc, p.scale, p.features, p.batch_shape)


@cooled.register
def _(p: dist.ExpandedDistribution, temperature: float) -> dist.Distribution:
    return cooled(p.base_dist, temperature).expand(torch.Size(p.batch_shape))
