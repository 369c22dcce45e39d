"""The networks of a recipe's pair: of its architecture, or between vectors of what comes nearest to it."""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING

from pyrovae.errors import UsageError
from pyrovae.runs.options import PARTS
from pyrovae.runs.parts import Part
from pyrovae.runs.recipe import first

if TYPE_CHECKING:
    from pyrovae.models.networks import Network
    from pyrovae.models.states import State

Shape = tuple[int, ...]


class Networks:
    """What makes the networks of an architecture, of `network` with its settings."""

    def __init__(self, network: Part) -> None:
        self.settings = network.settings
        self.encoding, self.decoding = PARTS["network"][network.name].classes
        # Layers above the first map vectors to vectors, so they are dense in every architecture.
        self.vectors = (
            self.encoding if self.encoding == self.decoding else PARTS["network"][first("network")].classes[0]
        )
        known = self.vectors.settings
        self.shared = {
            k: v for k, v in self.settings.items() if k in known and known[k].kind == self.encoding.settings[k].kind
        }

    def encoder(self, in_shape: Shape, event_shape: Shape) -> "Network":
        """From x, x and what is given, or what is seen of x, to features."""
        shapes = {"in_shape": in_shape, "event_shape": event_shape}
        network: Network = self.encoding.build("network", self.settings, **shapes)
        return network

    def decoder(self, size: int, out_shape: Shape, event_shape: Shape) -> "Network":
        """From codes to what a likelihood takes for x of an event shape."""
        shapes = {"in_shape": size, "out_shape": out_shape, "event_shape": event_shape}
        network: Network = self.decoding.build("network", self.settings, **shapes)
        return network

    def dense(self, size: int) -> "Network":
        """From vectors to features."""
        network: Network = self.vectors.build("network", self.shared, in_shape=size)
        return network


class Levels(ABC):
    """The layers of a hierarchy with a state, from the data upwards, and the networks between them.

    Attributes:
        sizes: Number of elements of each layer.
        states: How each layer changes the state.
    """

    sizes: list[int]
    states: "list[State]"

    @abstractmethod
    def encoder(self, in_shape: Shape, event_shape: Shape) -> "Network":
        """f_1, from x, or what is seen of it, to features."""

    @abstractmethod
    def upwards(self) -> "list[Network]":
        """f_2, ..., f_L, from the features of a layer to those of the next."""

    @abstractmethod
    def decoder(self, out_shape: Shape, event_shape: Shape) -> "Network":
        """From the state to what a likelihood takes for x of an event shape."""

    @abstractmethod
    def reader(self, level: int, features: bool) -> "Network":
        """Of the state above a layer, with the layer's own features beside it or not."""

    @abstractmethod
    def message(self, level: int) -> "Network":
        """The features of a layer as they are."""


class Vectors(Levels):
    """States that are vectors, as wide as the features that the encoder finds, and dense networks between them."""

    def __init__(self, networks: Networks, latent: Shape, event_shape: Shape) -> None:
        import torch

        from pyrovae.models.states import State

        self.networks, self.sizes = networks, list(latent)
        with torch.device("meta"):  # for its shape alone
            (self.width,) = networks.encoder(event_shape, event_shape).out_shape
            self.found = [self.width, *(network.out_shape[0] for network in self.upwards())]
        settings = networks.settings
        how = {"blocks": settings.get("blocks", 1), "activation": settings["activation"], "layers": len(latent)}
        self.states = [State((size,), (self.width,), **how) for size in latent]

    def encoder(self, in_shape: Shape, event_shape: Shape) -> "Network":
        return self.networks.encoder(in_shape, event_shape)

    def upwards(self) -> "list[Network]":
        found: list[Network] = []
        for _ in self.sizes[1:]:
            found.append(self.networks.dense(found[-1].out_shape[0] if found else self.width))
        return found

    def decoder(self, out_shape: Shape, event_shape: Shape) -> "Network":
        return self.networks.decoder(self.width, out_shape, event_shape)

    def reader(self, level: int, features: bool) -> "Network":
        return self.networks.dense(self.width + self.found[level] * features)

    def message(self, level: int) -> "Network":
        from pyrovae.models import MLP

        return MLP(self.found[level], hidden=())


class Grids(Levels):
    """States that are grids: layers are shared out evenly among the stages of `network`, from the image inwards.

    A layer of so many latent dimensions has these at each place of its grid.

    Raises:
        UsageError: there are fewer layers than stages.
    """

    def __init__(self, networks: Networks, latent: Shape, event_shape: Shape) -> None:
        from pyrovae.models.grids import passed_through
        from pyrovae.models.networks import image_shape
        from pyrovae.models.states import State

        channels = tuple(networks.settings["channels"])
        self.how = {key: networks.settings[key] for key in ("blocks", "activation", "block")}
        if len(latent) < len(channels):
            raise UsageError(
                f"latent_dim: {len(channels)} stages of `network.channels` need as many layers at least, got "
                f"{len(latent)}",
                settings=("latent_dim", "network.channels"),
            )
        _, height, width = image_shape(event_shape)
        sizes = passed_through((height, width), len(channels))
        stages = [i * len(channels) // len(latent) for i in range(len(latent))]
        self.channels = channels
        self.shapes = [(channels[stage], *sizes[stage + 1]) for stage in stages]
        latents = [(size, *shape[1:]) for size, shape in zip(latent, self.shapes, strict=True)]
        self.sizes = [math.prod(shape) for shape in latents]
        below = [self.shapes[0], *self.shapes]
        self.states = [
            State(z, shape, under, **self.how, layers=len(latent))
            for z, shape, under in zip(latents, self.shapes, below, strict=False)
        ]

    def encoder(self, in_shape: Shape, event_shape: Shape) -> "Network":
        from pyrovae.models.grids import Flat, GridEncoder

        return Flat(GridEncoder(in_shape, self.channels[:1], **self.how), "out")

    def upwards(self) -> "list[Network]":
        from pyrovae.models.grids import Flat, GridEncoder

        return [
            Flat(GridEncoder(below, above[:1], **self.how, stride=1 if below == above else 2))
            for below, above in pairwise(self.shapes)
        ]

    def decoder(self, out_shape: Shape, event_shape: Shape) -> "Network":
        from pyrovae.models.grids import Flat, GridDecoder

        return Flat(GridDecoder(self.shapes[0], out_shape, self.channels[:1], **self.how), "in")

    def reader(self, level: int, features: bool) -> "Network":
        from pyrovae.models.grids import Flat, GridEncoder

        channels, *size = self.shapes[level]
        return Flat(GridEncoder((channels * (1 + features), *size), (channels,), **self.how, stride=1))

    def message(self, level: int) -> "Network":
        from torch import nn

        from pyrovae.models.grids import Flat
        from pyrovae.models.networks import Network

        return Flat(Network(nn.Identity(), self.shapes[level], self.shapes[level]))


def levels(networks: Networks, latent: Shape, event_shape: Shape) -> Levels:
    """The layers of a hierarchy with a state: on grids, where the architecture has them."""
    return (Grids if networks.encoding.constants.get("of_grids") else Vectors)(networks, latent, event_shape)
