"""What every likelihood p(x|z) is: a decoder, and the distribution that it is the parameters of.

The families are in `likelihoods` and other files; the tuple of them all is in `choices`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.networks import Network
from pyrovae.models.views import View


class Likelihood(nn.Module, ABC):
    """p(x|z) with a decoder.

    Args:
        decoder: Maps z to what the distribution needs.
        event_shape: Event shape of x.

    Attributes:
        measure: Of p(x), by the name of the space of x: "mass", "density", "counts".
        short: Other names that the class goes by where it is chosen by name.
        latents: What z has to be, in the words of a prior's `latents`; None: anything.
    """

    measure: ClassVar[str]
    latents: ClassVar[str | None] = None
    short: ClassVar[tuple[str, ...]] = ()

    def __init__(self, decoder: Network, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.event_shape = event_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Event shape of z."""
        return self.decoder.in_shape

    @classmethod
    @abstractmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        """Event shape of the decoder's output for that of x, with the settings that the constructor is given."""

    @abstractmethod
    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z) for z of shape (*batch, Z): batch shape `batch`, event shape `event_shape`."""

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start the decoder's output at the mean of training data x of shape (N, *event)."""

    @abstractmethod
    def check_support(self, x: Tensor) -> None:
        """Refuse data outside the support, naming what was found.

        Raises:
            DataError: some value of x has no probability under this likelihood.
        """

    def remarks(self, z: Tensor) -> list[str]:
        """What a user should know of p(x|z) at trained codes z of shape (*batch, Z), in sentences. Here: nothing."""
        return []

    def view(self, event_shape: tuple[int, ...]) -> View | None:
        """What an encoder should see of x, or of (x, y) as one event, of that shape; None, as here: it as it is."""
        return None


def set_output_bias(network: Network, value: Tensor) -> None:
    """Start the last bias of a network at `value`; a network without one is left as it is."""
    if network.output_bias is not None:
        with torch.no_grad():
            network.output_bias.copy_(value.reshape(network.output_bias.shape))
