r"""The continuous Bernoulli distribution in its natural parameter: a uniform on [0, 1], tilted by exp(eta x).

    log p(x) = eta x - log int_0^1 exp(eta t) dt = eta (x - 1/2) - log [ sinh(eta/2) / (eta/2) ]

The second form is even in eta but for its first term, and neither overflows nor cancels: for h = |eta|/2 the logarithm
is h + log(1 - exp(-2h)) - log(2h), or h^2/6 - h^4/180 + h^6/2835 near 0. torch's `ContinuousBernoulli` normalises by
a probability that it keeps 1e-7 away from 0 and 1 in single precision, so that its density does not integrate to 1
beyond |eta| = 16; the dark pixels of dequantised images have eta near -500.

References:
    Loaiza-Ganem and Cunningham 2019, The continuous Bernoulli, https://arxiv.org/abs/1907.06845
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

NEAR_0 = 0.1  # below this |eta|/2 the series is exact to 1e-12, above it the closed forms lose no more than that
SINGLE = torch.Size()


class TiltedUniform(dist.TorchDistribution):
    """p(x) proportional to exp(eta x) on [0, 1], reparameterised by its quantiles.

    Args:
        eta: Any real numbers; the batch shape is theirs.
    """

    arg_constraints = {"eta": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, eta: Tensor, validate_args: bool | None = None) -> None:
        self.eta = eta
        super().__init__(eta.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TiltedUniform":
        return TiltedUniform(self.eta.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, for value in [0, 1] of a shape that broadcasts with the batch's."""
        return self.eta * (value - 0.5) - log_sinhc(self.eta / 2)

    def rsample(self, sample_shape: Any = SINGLE) -> Tensor:
        """The quantiles of uniform numbers: log(1 + u (exp(eta) - 1)) / eta, of a falling density, else mirrored."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.eta.dtype, device=self.eta.device)
        flat = self.eta.abs() < 1e-4
        rate = torch.where(flat, torch.ones_like(self.eta), self.eta.abs())
        falling = -torch.log1p(u * torch.expm1(-rate)) / rate
        tilted = torch.where(self.eta > 0, 1 - falling, falling)
        return torch.where(flat, u + self.eta * u * (1 - u) / 2, tilted).clamp(0, 1)

    @property
    def mean(self) -> Tensor:
        """1/2 + (coth(h) - 1/h) / 2 at h = eta/2, in (0, 1)."""
        return mean_of(self.eta)


def log_sinhc(h: Tensor) -> Tensor:
    """log(sinh(h) / h), for any h."""
    near = h.abs() < NEAR_0
    far = torch.where(near, torch.ones_like(h), h.abs())  # where gradients of the closed form are finite
    square = torch.where(near, h, torch.zeros_like(h)).square()
    series = square / 6 - square**2 / 180 + square**3 / 2835
    return torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))


def mean_of(eta: Tensor) -> Tensor:
    """The mean for each eta, the derivative of log int exp(eta t) dt."""
    h = eta / 2
    near = h.abs() < NEAR_0
    far = torch.where(near, torch.ones_like(h), h)
    series = h / 3 - h**3 / 45 + 2 * h**5 / 945
    return 0.5 + 0.5 * torch.where(near, series, 1 / torch.tanh(far) - 1 / far)


def eta_of(mean: Tensor) -> Tensor:
    """The eta of each mean in (0, 1), by bisection; `mean_of` rises."""
    low, high = (torch.full_like(mean, limit, dtype=torch.float64) for limit in (-1e4, 1e4))
    for _ in range(60):
        middle = (low + high) / 2
        rises = mean_of(middle) < mean
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return ((low + high) / 2).to(mean)
