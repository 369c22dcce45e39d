"""Features of x at every level of a guide: a deterministic pass over the data, once for each datum.

Nothing in it depends on latents, so that however many particles are drawn, it is run on (N, *event) and no more.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Corruption
from pyrovae.models.gaps import completed
from pyrovae.models.guides import centre, event_seen, seen
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior


class Features(nn.Module):
    """d_1 = f_1(x), d_2 = f_2(d_1), ..., d_L = f_L(d_{L-1}).

    Args:
        networks: f_1, ..., f_L, each with a vector as output.

    Raises:
        UsageError: neighbouring networks disagree on a shape, or there is none; both sides are named.
    """

    shift: Tensor
    rescale: Tensor

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        self.networks: Sequence[Network] = nn.ModuleList(networks)  # type: ignore[assignment]
        if not networks:
            raise UsageError("features: expected at least one network, got none")
        for below, above in pairwise(networks):
            if below.out_shape != above.in_shape:
                raise UsageError(
                    f"features: a network's output is {below.out_shape}, the next one's input is {above.in_shape}; "
                    "make them equal"
                )
        if any(len(network.out_shape) != 1 for network in networks):
            shapes = ", ".join(str(network.out_shape) for network in networks)
            raise UsageError(f"features: expected vectors as outputs, got shapes {shapes}")
        # The first network sees (x - shift) * rescale: the identity until `initialise`.
        self.register_buffer("shift", torch.zeros(networks[0].in_shape))
        self.register_buffer("rescale", torch.ones(()))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return event_seen(self.networks[0])

    @property
    def sizes(self) -> list[int]:
        """Number of features of each level, from the data upwards."""
        return [network.out_shape[0] for network in self.networks]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features of x (*batch, *event) at each level, from the data upwards: shapes (*batch, F_i)."""
        d = (seen(self.networks[0], x) - self.shift) * self.rescale
        levels = []
        for network in self.networks:
            d = network(d)
            levels.append(d)
        return levels

    def initialise(self, x: Tensor) -> None:
        """Centre the first network's input at the mean of x (N, *event), with one scale for all elements."""
        centre(self.networks[0], x, self.shift, self.rescale)


class Featured(Protocol):
    """A pair whose guide sees features of x."""

    features: Features
    corruption: Corruption
    likelihood: Likelihood
    prior: Prior


def start_with_features(model: Featured, x: Tensor) -> None:
    """Start the parts of a pair that depend on the data at training data x of shape (N, *event)."""
    whole = completed(x)  # x itself, unless it has gaps
    model.corruption.initialise(whole)
    model.features.initialise(x)
    model.likelihood.initialise(x)
    model.prior.initialise(whole)
