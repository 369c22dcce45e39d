r"""The best distribution of the guide's own family for each datum, where that is no plain Gaussian.

What a guide's network puts out for a datum, the parameters phi of q, is here free for each datum, and ascends

    ELBO(phi) = E_q log p(x, z) - log q(z)

from where the guide has it, by Adam, in units of the guide's standard deviations. A mixture's ELBO is taken component
by component, sum_c pi_c E_c (...), with as many draws of each: its gradient by the weights is then that of a sum, and
not of chance. log q is differentiated by z alone (sticking the landing): the noise vanishes where q is the posterior.
Of a flow, what is each datum's own is free (m, s and features), and the flow's weights, which all data share, are held.

References:
    Cremer, Li and Duvenaud 2018, Inference Suboptimality in Variational Autoencoders, https://arxiv.org/abs/1801.03558
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.inference.batch import Batch
from pyrovae.inference.gaussians import Free, freed
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.weights import draw

RATE = 0.05
STEPS = 2  # times those of a Gaussian's natural-gradient fit
COMPARED = 400  # draws on which start and end are compared


@dataclass(frozen=True)
class Fitted:
    """A distribution of the guide's family for each datum.

    Attributes:
        q: Batch shape (N,).
        space: The pair at these data, as functions of u.
    """

    q: Distribution
    space: Unconstrained = field(repr=False)

    def draw(self, num_particles: int) -> Tensor:
        """Draws as unconstrained latents u, shape (K, N, U)."""
        with torch.no_grad():
            return self.space.unconstrained(self.q.sample(torch.Size([num_particles])))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u) in nats for u of shape (K, N, U), shape (K, N)."""
        values, log_det = self.space.split(u)
        (z,) = values.values()
        log_q: Tensor = self.q.log_prob(z) + log_det
        return log_q


def fit_own(pair: Pair, batch: Batch, steps: int, draws: int) -> Fitted:
    """Fit a distribution of the guide's own family to each datum, all at once, starting at the guide.

    Args:
        pair: One latent site, from a distribution that `freed` knows.
        batch: N rows of data.
        steps: Of a Gaussian's fit; here some more.
        draws: At each step, of each component.
    """
    with evaluating(pair):
        space = Unconstrained(pair, batch)
        (latent,) = draw(pair, batch).latents.values()
        with torch.no_grad():
            free = freed(latent.guide)
        start = [torch.zeros_like(p) for p in free.start]
        end = [p.clone().requires_grad_() for p in start]
        optimiser = torch.optim.Adam(end, lr=RATE)
        total = STEPS * steps
        for step in range(total):
            optimiser.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / total))
            with torch.enable_grad():
                loss = -elbo(free, end, space, draws).sum()
                gradients = torch.autograd.grad(loss, end)
            for parameter, gradient in zip(end, gradients, strict=True):
                parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimiser.step()
        with torch.no_grad():
            parts = COMPARED // draws
            of_start, of_end = (
                torch.stack([elbo(free, [*at], space, draws).double() for _ in range(parts)]).mean(0)
                for at in (start, end)
            )
            take = of_end.isfinite() & ~(of_start >= of_end)
            best = [
                torch.where(take.reshape(-1, *[1] * (e.ndim - 1)), e.detach(), s)
                for s, e in zip(start, end, strict=True)
            ]
            return Fitted(free.at(best), space)


def elbo(free: Free, moved: Sequence[Tensor], space: Unconstrained, draws: int) -> Tensor:
    """An estimate of the ELBO of each datum in nats, shape (N,), at parameters that have moved so far."""
    total = moved[0].new_zeros(())
    for weight, component, density in free.drawn(moved):
        z = component.rsample(torch.Size([draws]))
        total = total + weight * (space.log_joint_at(z) - density.log_prob(z)).mean(0)
    return total
