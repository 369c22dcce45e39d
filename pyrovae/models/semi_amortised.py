r"""Semi-amortised inference: an encoder's answer for a row, and a few gradient steps from there on the row's own bound.

The guide is N(m, diag s^2). The encoder gives m_0 and s_0. With r = s d/dz log p(x, z) + e at z = m + s e, the gradient
of the ELBO in coordinates in which q is N(0, I) is

    g_m = E r        g_s = E (r e)        and a step        m <- m + rate s g_m        log s <- log s + rate g_s

is one of natural-gradient ascent, the same whatever the units of z. "+ e" is the path derivative of -log q: where q is
the posterior r = 0 for every e. A step is at most sqrt(Z) long, a standard deviation in each coordinate.

The expectations are means over S fixed points e, in pairs e, -e, of mean 0 and mean square 1 in each coordinate (and
uncorrelated, where S >= 2 Z), which make both exact where the posterior is a Gaussian. So q(z|x) is a function of x,
as any guide is: log q is that of N(m_T, diag s_T^2), each row by itself, and every estimate is what it is for others.

Training hands the gradient of the bound at (m_T, s_T) on to the encoder in one of two ways. "Stopped", what the steps
add is a constant; the encoder learns to start where the steps lead, and the decoder sees no gradient through them. Or
*through* the steps, their own derivative included, which runs the decoder backwards a second time for each of them.

References:
    Kim, Wiseman, Miller, Sontag and Rush 2018, Semi-Amortized Variational Autoencoders,
        https://arxiv.org/abs/1802.02550
    Marino, Yue and Mandt 2018, Iterative Amortized Inference, https://arxiv.org/abs/1807.09356
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network
from pyrovae.settings import Count, Positive, Whole, checked


class SemiAmortised(Guide):
    """Diagonal covariance, refined for each row: the encoder's answer and a few gradient steps on the row's bound.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        steps: Number of steps, T. 0 is the encoder's answer.
        rate: Length of a step; 1 would end at the posterior's mean, were it a Gaussian of independent elements.
        draws: Points at which a step evaluates log p(x, z), an even number.
        gradient: In training, of the steps: stopped (what they add is a constant) or through them.
    """

    short = ("semi-amortised",)
    of_pair = True
    points: Tensor

    @checked
    def __init__(
        self,
        encoder: Network,
        latent_dim: Count,
        steps: Annotated[int, Whole(0)] = 5,
        rate: Positive = 0.3,
        draws: Count = 16,
        gradient: Literal["stopped", "through"] = "stopped",
    ) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim)
        if draws % 2:
            raise UsageError(f"draws: expected an even number, since points come in pairs, got {draws}")
        self.steps, self.rate, self.draws, self.gradient = steps, rate, draws, gradient
        self.register_buffer("points", fixed_points(draws, latent_dim))
        self.log_joint: Callable[[Tensor, Tensor], Tensor] | None = None

    def attach(self, log_joint: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take log p(x, z) of the pair that it is the guide of.

        Args:
            log_joint: Of x (*batch, *event) and z (S, *batch, Z): log p(x, z) in nats, shape (S, *batch).
        """
        self.log_joint = log_joint

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, raw_scale = self.parameters_of(x).chunk(2, -1)
        scale = softplus(raw_scale) + SCALE_FLOOR
        for _ in range(self.steps):
            move, factor = self.step(x, loc, scale)
            loc, scale = loc + move, scale * factor
        return dist.Normal(loc, scale).to_event(1)

    def step(self, x: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What a step at m and s (*batch, Z) adds to m and multiplies s by, each of that shape.

        Raises:
            UsageError: it is the guide of no pair that it knows.
        """
        if self.log_joint is None:
            raise UsageError("guide: SemiAmortised refines by log p(x, z), and is in no pair that has one; make a VAE")
        through = self.gradient == "through" and torch.is_grad_enabled() and loc.requires_grad
        if not through:
            loc, scale = loc.detach(), scale.detach()
        e = self.points.reshape(self.draws, *[1] * (loc.ndim - 1), self.latent_dim)
        with torch.enable_grad():
            z = loc + scale * e
            z = z if through else z.requires_grad_()
            # At a view of it: who counts a module's operations takes no gradient by a leaf that the module is given.
            (slope,) = torch.autograd.grad(self.log_joint(x, z.view_as(z)).sum(), z, create_graph=through)
        r = scale * slope + e
        return self.rate * scale * bounded(r.mean(0)), (self.rate * bounded((r * e).mean(0))).exp()


def bounded(step: Tensor) -> Tensor:
    """A step (*batch, Z), at most sqrt(Z) long: far from the posterior the gradient is no guide to how far to go."""
    length = step.square().sum(-1, keepdim=True).clamp(min=1.0).sqrt()
    return step * (math.sqrt(step.shape[-1]) / length).clamp(max=1)


def fixed_points(draws: int, dim: int) -> Tensor:
    """Points e of shape (draws, dim) in pairs e, -e: mean 0 and mean square 1, uncorrelated where draws >= 2 dim."""
    half = torch.randn(draws // 2, dim)
    if len(half) >= dim:
        half = torch.linalg.qr(half).Q
    half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])
