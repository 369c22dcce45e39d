"""The mean and the standard deviation of a distribution of codes: in closed form where there is one, else by draws."""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.seeding import seeded

# Draws of each distribution: the error of the mean is a sixteenth of the standard deviation.
DRAWS = 256
AT_ONCE = 32


@dataclass(frozen=True)
class Moments:
    """Of a batch of distributions over vectors.

    Attributes:
        mean: Shape (*batch, Z).
        sd: Of each element, shape (*batch, Z).
        draws: By how many draws of each both are estimated; 0: they are exact.
    """

    mean: Tensor
    sd: Tensor
    draws: int


@torch.no_grad()
def moments_of(q: dist.Distribution, device: torch.device) -> Moments:
    """The moments of q, exact or by `DRAWS` draws, the same at every call.

    Args:
        q: The distributions.
        device: Where they are, whose random state is left as it was.
    """
    try:
        return Moments(q.mean, q.stddev, 0)
    except NotImplementedError:
        pass
    with seeded("moments", device=device):
        first = q.sample()
        total, squares = torch.zeros_like(first, dtype=torch.float64), torch.zeros_like(first, dtype=torch.float64)
        for _ in range(DRAWS // AT_ONCE):
            away = (q.sample((AT_ONCE,)) - first).double()  # from a draw, so that squares lose no digits
            total, squares = total + away.sum(0), squares + away.square().sum(0)
    mean = total / DRAWS
    variance = (squares / DRAWS - mean.square()).clamp(min=0) * DRAWS / (DRAWS - 1)
    return Moments((first + mean).to(first.dtype), variance.sqrt().to(first.dtype), DRAWS)
