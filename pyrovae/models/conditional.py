r"""A conditional variational autoencoder: everything is given y, such as a label.

    p(x, z | y) = p(z|y) p(x|z, y)        q(z|x, y)

`model(x, y)` and `guide(x, y)` are Pyro programs like those of a VAE, and inference takes y as `given=(y,)`: every
bound and every estimate is then one of log p(x|y). The parts are those of a VAE, over more inputs: the decoder maps
(z, y), a vector of Z + C elements, and the encoder (x, y), see `join`.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Clean, Corruption
from pyrovae.models.gaps import completed
from pyrovae.models.guides import Guide, check_by_itself
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.moments import moments_of
from pyrovae.models.priors import Prior
from pyrovae.models.temperature import tempered
from pyrovae.settings import Number, Whole, check


class ConditionalPrior(nn.Module, ABC):
    """p(z|y), a distribution over vectors of `latent_dim` elements.

    Attributes:
        short: Other names that the class goes by where it is chosen by name.
    """

    short: ClassVar[tuple[str, ...]] = ()

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, y: Tensor) -> dist.Distribution:
        """The distribution for y of shape (N, C): batch shape (N,) or (), event shape (latent_dim,)."""

    @abstractmethod
    def initialise(self, xy: Tensor, unit: Tensor) -> None:
        """Start whatever depends on the data at training data (x, y) as the encoder takes them, y times `unit`."""


class UnconditionalPrior(ConditionalPrior):
    """p(z|y) = p(z), the same for all y: what y says of x, the likelihood says alone.

    Args:
        prior: p(z).
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior.latent_dim)
        self.prior = prior

    def forward(self, y: Tensor) -> dist.Distribution:
        return self.prior()

    def initialise(self, xy: Tensor, unit: Tensor) -> None:
        """Start p(z)."""
        self.prior.initialise(xy)


class AmortisedPrior(ConditionalPrior):
    """p(z|y) by a network of y, where there is a condition.

    Args:
        conditional: Any guide class over a network from C, as `MeanFieldNormal(MLP(C), Z)`.
    """

    short = ("amortised",)

    def __init__(self, conditional: Guide) -> None:
        super().__init__(conditional.latent_dim)
        self.conditional = conditional

    def forward(self, y: Tensor) -> dist.Distribution:
        return self.conditional(y)

    def initialise(self, xy: Tensor, unit: Tensor) -> None:
        """Nothing depends on the data."""


class ConditionalVAE(nn.Module):
    """A VAE given y, with one latent site "z".

    Args:
        prior: p(z|y).
        likelihood: p(x|z, y), its decoder over vectors (z, y) of Z + C elements.
        guide: q(z|x, y), its encoder over (x, y): a vector of D + C elements, or an image of C more channels.
        corruption: What q(z|x, y) sees of x while it is trained; None: x.

    Raises:
        UsageError: neighbouring parts disagree on the number of dimensions; both sides are named.

    References:
        Sohn, Lee and Yan 2015, Learning Structured Output Representation using Deep Conditional Generative Models,
        https://papers.nips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html
    """

    latent_sites = ("z",)
    code_note = ""
    unit: Tensor

    def __init__(
        self, prior: ConditionalPrior, likelihood: Likelihood, guide: Guide, corruption: Corruption | None = None
    ) -> None:
        super().__init__()
        check_by_itself(guide, "a ConditionalVAE")
        self.prior, self.likelihood, self.encoder = prior, likelihood, guide
        self.corruption = Clean() if corruption is None else corruption
        # The encoder sees (x, unit * y): as large as x varies, so that one scale suits both. 1 until `initialise`.
        self.register_buffer("unit", torch.ones(()))
        if guide.latent_dim != prior.latent_dim:
            raise UsageError(
                f"z: the guide's latent_dim is {guide.latent_dim}, the prior's is {prior.latent_dim}; make them equal"
            )
        (inputs,) = likelihood.latent_shape
        if inputs <= prior.latent_dim:
            raise UsageError(
                f"z: the decoder's input has {inputs} elements, too few for (z, y) with z of {prior.latent_dim}; build "
                f"it over {prior.latent_dim} + C"
            )
        ways = (False, True) if len(self.event_shape) > 1 else (False,)
        possible = {joined_shape(self.event_shape, self.condition_dim, as_channels) for as_channels in ways}
        if guide.event_shape not in possible:
            raise UsageError(
                f"(x, y): the guide's input is {guide.event_shape}, expected {' or '.join(map(str, sorted(possible)))} "
                f"for x of shape {self.event_shape} and y of {self.condition_dim} elements; build its encoder so"
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return self.likelihood.event_shape

    @property
    def code(self) -> dict[str, int]:
        """The latent site, and its number of elements."""
        return {"z": self.prior.latent_dim}

    @property
    def condition_dim(self) -> int:
        """C, the number of elements of y."""
        return self.likelihood.latent_shape[0] - self.prior.latent_dim

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """p(x, z | y) as a Pyro model, for x of shape (N, *event) and y of shape (N, C).

        Raises:
            DataError: x has values outside the support of the likelihood.
            UsageError: y has another number of elements.
        """
        self.check_condition(y)
        if dist.is_validation_enabled():  # as it is not in a trace, where x has no values
            self.likelihood.check_support(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(y))
            return pyro.sample("x", self.likelihood(join(z, y)), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """q(z|x, y) as a Pyro guide, for x (N, *event) and y (N, C); in training mode that of x as corrupted."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(self.corruption(x), y))

    def check_condition(self, y: Tensor) -> None:
        """Refuse a y that has not C elements in its last dimension."""
        if y.shape[-1:] != (self.condition_dim,):
            raise UsageError(f"y: expected shape (N, {self.condition_dim}), got {tuple(y.shape)}; give one-hot labels")

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """(x, y) as the encoder takes them, for x of shape (*batch, *event) and y of shape (N, C)."""
        first, *rest = self.encoder.event_shape
        x = x.reshape(*x.shape[: x.ndim - len(self.event_shape)], first - self.condition_dim, *rest)
        return join(x, self.unit * y, 1 + len(rest))

    def initialise(self, x: Tensor, y: Tensor) -> None:
        """Start the parts at training data x (N, *event) and y (N, C): output bias, input centring, pseudo-inputs."""
        self.check_condition(y)
        whole = completed(x)  # x itself, unless it has gaps
        spread = (whole - whole.mean(0)).double().square().mean().sqrt()
        self.unit.copy_(spread if spread > 0 else torch.ones(()))
        self.corruption.initialise(whole)
        self.encoder.initialise(self.beside(x, y))
        self.likelihood.initialise(x)
        self.prior.initialise(self.beside(whole, y), self.unit)

    def posterior(self, x: Tensor, y: Tensor) -> dist.Distribution:
        """q(z|x, y) for x of shape (N, *event) and y of shape (N, C): batch shape (N,), event shape (Z,)."""
        self.check_condition(y)
        return self.encoder(self.beside(x, y))

    @torch.no_grad()
    def sample(self, num_samples: int, y: Tensor, mean: bool = False, temperature: float = 1.0) -> Tensor:
        """Draws of x given y: z from p(z|y), then x from p(x|z, y), with torch's random state.

        Args:
            num_samples: How many, at least 1.
            y: What they are given, shape (C,) for all of them or (num_samples, C).
            mean: The mean of p(x|z, y) at each z in place of a draw: without the noise of x, as pictures are shown.
            temperature: Above 0; the noise of z is times this. With any but 1 these are no draws of p(x|y).

        Returns:
            Shape (num_samples, *event).

        Raises:
            UsageError: num_samples is no whole number of at least 1, temperature no number above 0, or y has another
                shape.
        """
        check("num_samples", num_samples, Whole(1))
        check("temperature", temperature, Number(above=0))
        self.check_condition(y)
        if y.ndim > 1 and y.shape != (num_samples, self.condition_dim):
            raise UsageError(
                f"y: expected shape ({self.condition_dim},) or ({num_samples}, {self.condition_dim}), "
                f"got {tuple(y.shape)}; give one row for each sample"
            )
        y = y.expand(num_samples, -1)
        with pyro.poutine.block(), pyro.plate("samples", num_samples):
            z = pyro.sample("z", tempered(self.prior(y), temperature))
            likelihood = self.likelihood(join(z, y))
            return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of q(z|x, y), shape (N, Z); where that has no closed form, as for a flow, the mean of 256 draws."""
        return moments_of(self.posterior(x, y), x.device).mean

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|z, y) for z of shape (*batch, Z) and y of shape (N, C) or (C,), shape (*batch, *event)."""
        self.check_condition(y)
        return self.likelihood(join(z, y)).mean

    @torch.no_grad()
    def remarks(self, x: Tensor, y: Tensor) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event) given y (N, C), in sentences."""
        return self.likelihood.remarks(join(self.encode(x, y), y))

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|z, y) at the mean of q(z|x, y), shape (N, *event)."""
        return self.decode(self.encode(x, y), y)


def joined_shape(event_shape: tuple[int, ...], conditions: int, as_channels: bool) -> tuple[int, ...]:
    """Event shape of (x, y), for y of so many elements: a vector, or an image of more channels.

    >>> joined_shape((1, 28, 28), 10, as_channels=False), joined_shape((1, 28, 28), 10, as_channels=True)
    ((794,), (11, 28, 28))
    """
    if not as_channels:
        return (math.prod(event_shape) + conditions,)
    depth, *rest = event_shape if len(event_shape) > 2 else (1, *event_shape)
    return (depth + conditions, *rest)


def join(x: Tensor, y: Tensor, dims: int = 1) -> Tensor:
    """(x, y) as one event: y becomes more elements of a vector, or more channels, each constant over the image.

    Args:
        x: Events of so many `dims`, shape (*batch, E, *rest).
        y: Shape (N, C), where N is the last of `batch`, or (C,).

    Returns:
        Shape (*batch, E + C, *rest).
    """
    batch, rest = x.shape[: x.ndim - dims], x.shape[x.ndim - dims + 1 :]
    planes = y.reshape(*y.shape, *(1 for _ in rest)).expand(*batch, y.shape[-1], *rest)
    return torch.cat([x, planes], -dims)
