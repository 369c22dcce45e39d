r"""Priors over sequences: z of T steps, each a vector of Z elements, as one vector z_1, ..., z_T of T Z elements.

All are Markov, with standard normal noise e_t:

    z_1 = e_1        z_t = m(z_{t-1}) + s(z_{t-1}) e_t
    log p(z) = log N(z_1; 0, I) + sum_t log N(z_t; m(z_{t-1}), diag s(z_{t-1})^2)

    OrnsteinUhlenbeck    m = a z,  s^2 = 1 - a^2,  a = exp(-1/l) element by element: every z_t is N(0, I)
    Markov               m and s by a network of z_{t-1}
    GatedMarkov          m between a linear map of z_{t-1} and a network's, by a gate for each element

A density needs no loop over time, since all of z is there: e_t = (z_t - m(z_{t-1})) / s(z_{t-1}) for all t at once,
with the Jacobian prod 1/s. Draws take T steps.

In a pair, z is a vector like any other, z.unflatten(-1, (T, Z)) its steps: `SequenceDecoder` reads them, and every
guide serves. A `FullCovarianceNormal` has covariances between steps, as the exact posterior of a linear-Gaussian
state-space model does: x_t = W z_t + b + noise under an `OrnsteinUhlenbeck`, whose log p(x) is that of the Kalman
filter. In a pair of your own z may have the shape (T, Z): `prior.steps_of()` is p(z) in that shape.

References:
    Uhlenbeck and Ornstein 1930, On the Theory of the Brownian Motion, Physical Review 36
    Krishnan, Shalit and Sontag 2017, Structured Inference Networks for Nonlinear State Space Models,
    https://arxiv.org/abs/1609.09869
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ReshapeTransform, Transform

from pyrovae.errors import UsageError
from pyrovae.models.networks import MLP, Network
from pyrovae.models.priors import Prior
from pyrovae.settings import Count, Number, Positive, Whole, checked

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


class Recurrence(Transform):
    """e to z and back: z_1 = e_1, z_t = m(z_{t-1}) + s(z_{t-1}) e_t.

    Args:
        step: m and log s of z_{t-1}, each (*batch, Z), for z_{t-1} of that shape.
    """

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        # The last z that was taken back, and log s there, which its Jacobian needs again.
        self.last: tuple[Tensor, Tensor] | None = None

    def _call(self, x: Tensor) -> Tensor:
        z = [x[..., 0, :]]
        for e in x[..., 1:, :].unbind(-2):
            mean, log_scale = self.step(z[-1])
            z.append(mean + log_scale.exp() * e)
        return torch.stack(z, -2)

    def _inverse(self, y: Tensor) -> Tensor:
        mean, log_scale = self.step(y[..., :-1, :])
        self.last = (y, log_scale)
        return torch.cat([y[..., :1, :], (y[..., 1:, :] - mean) * (-log_scale).exp()], -2)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_t sum_d log s, shape `batch`."""
        if self.last is None or self.last[0] is not y:
            self._inverse(y)
        assert self.last is not None
        return self.last[1].expand_as(y[..., 1:, :]).sum((-2, -1))


class Sequential(Prior):
    """A prior over sequences of T steps.

    A subclass says of itself that it is `of_steps`, for guides that go step by step.

    Args:
        latent_dim: T Z.
        event_shape: Event shape of x, whose first dimension is time.
        steps: T, of which the latent dimensions are a multiple; None: as many as x has.

    Attributes:
        steps: T.
        width: Z, elements of a step.
    """

    of_steps: ClassVar[bool] = True
    loc: Tensor

    def __init__(self, latent_dim: int, event_shape: int | tuple[int, ...], steps: int | None) -> None:
        super().__init__(latent_dim)
        self.steps = (event_shape if isinstance(event_shape, int) else event_shape[0]) if steps is None else steps
        self.width, left = divmod(latent_dim, self.steps)
        if left or self.steps < 2:
            raise UsageError(
                f"latent_dim: expected a multiple of the number of steps, of at least 2, got {latent_dim} for "
                f"{self.steps} steps; give `steps` or another number of dimensions"
            )
        self.register_buffer("loc", torch.zeros(self.steps, self.width), persistent=False)

    @abstractmethod
    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """m and log s of the step after z (*batch, Z), each of a shape that broadcasts with it."""

    def steps_of(self) -> dist.Distribution:
        """p(z) with z in its shape: event shape (T, Z)."""
        noise = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(2)
        return dist.TransformedDistribution(noise, [Recurrence(self.step)])

    def forward(self) -> dist.Distribution:
        flat = ReshapeTransform(self.loc.shape, torch.Size([self.latent_dim]))
        return dist.TransformedDistribution(self.steps_of(), [flat])


class OrnsteinUhlenbeck(Sequential):
    """A stationary Gaussian process of sequences: covariance exp(-|s - t| / l) between steps, variance 1.

    Args:
        latent_dim: T Z.
        event_shape: Event shape of x, whose first dimension is time.
        steps: T, of which the latent dimensions are a multiple (default: as many as x has).
        length: l at the start, in steps, learned for each element of a step.
    """

    short = ("ou",)
    of_steps = True

    @checked
    def __init__(
        self,
        latent_dim: Count,
        event_shape: int | tuple[int, ...],
        steps: Annotated[int, Whole(2)] | None = None,
        length: Positive = 5.0,
    ) -> None:
        super().__init__(latent_dim, event_shape, steps)
        self.log_length = nn.Parameter(torch.full((self.width,), math.log(length)))

    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rate = (-self.log_length).exp()
        # log sqrt(1 - a^2), without the cancellation of long lengths.
        return (-rate).exp() * z, 0.5 * (-torch.expm1(-2 * rate)).log()


class Markov(Sequential):
    """A Markov process of sequences: each step is Gaussian given the one before, by a network of it.

    It starts near N(0, I) at all steps. How a step depends on the one before is the same at all times.

    Args:
        latent_dim: T Z.
        event_shape: Event shape of x, whose first dimension is time.
        steps: T, of which the latent dimensions are a multiple (default: as many as x has).
        hidden: Width of the hidden layer of the network.
        widest: Largest log s of a step, in either direction, so that no step's scale runs away.
    """

    of_steps = True

    @checked
    def __init__(
        self,
        latent_dim: Count,
        event_shape: int | tuple[int, ...],
        steps: Annotated[int, Whole(2)] | None = None,
        hidden: Count = 64,
        widest: Annotated[float, Number(above=0)] = 5.0,
    ) -> None:
        super().__init__(latent_dim, event_shape, steps)
        self.widest = widest
        self.network: Network = MLP(self.width, (2, self.width), (hidden,))

    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = (0.1 * self.network(z)).unbind(-2)
        return mean, self.widest * (log_scale / self.widest).tanh()


class GatedMarkov(Sequential):
    """A Markov process of sequences whose steps are linear or not, by a gate for each element.

    With W and V matrices, f a network and g = sigmoid of a network, all of z_{t-1},

        m = (1 - g) W z + g f(z)        log s = V f(z) + v, bounded as that of `Markov`

    as in a deep Markov model. It starts near z_t = z_{t-1} + e_t / 2.

    Args:
        latent_dim: T Z.
        event_shape: Event shape of x, whose first dimension is time.
        steps: T, of which the latent dimensions are a multiple (default: as many as x has).
        hidden: Width of the hidden layer of the network.
        widest: Largest log s of a step, in either direction, so that no step's scale runs away.
    """

    of_steps = True

    @checked
    def __init__(
        self,
        latent_dim: Count,
        event_shape: int | tuple[int, ...],
        steps: Annotated[int, Whole(2)] | None = None,
        hidden: Count = 64,
        widest: Annotated[float, Number(above=0)] = 5.0,
    ) -> None:
        super().__init__(latent_dim, event_shape, steps)
        self.widest = widest
        self.network: Network = MLP(self.width, (2, self.width), (hidden,))  # the gate's logit and f
        self.linear = nn.Linear(self.width, self.width)
        self.spread = nn.Linear(self.width, self.width)
        with torch.no_grad():
            nn.init.eye_(self.linear.weight)
            self.linear.bias.zero_()
            self.spread.bias.fill_(-math.log(2))

    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logit, proposed = self.network(z).unbind(-2)
        gate = (logit - 2).sigmoid()
        log_scale = self.spread(proposed)
        return self.linear(z).lerp(proposed, gate), self.widest * (log_scale / self.widest).tanh()
