"""Guides q(z|x): amortised Gaussian approximations of the posterior.

A guide is a module whose `forward(x)` maps (*batch, *event) to a distribution of batch shape `batch` and event shape
(Z,). Its encoder turns x into features; a linear head turns features into the distribution's parameters. Swapping one
guide for another is swapping the class name. The same classes serve as the conditionals p(z1|z2) of a hierarchy.

To write a new one, subclass `Guide`, name the number of head outputs in `super().__init__`, return the distribution
from `forward`, and name the class in `GUIDES` of `pyrovae.models.choices`. Parameters with a default are its
settings, on the command line too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.grids import OfPlaces
from pyrovae.models.networks import Network, check_event
from pyrovae.settings import Count, checked

# Added to every scale: far below any scale that matters, it keeps 1/scale finite in single precision.
SCALE_FLOOR = 1e-6


class Guide(nn.Module, ABC):
    """q(z|x) with an encoder and a linear head, which of features on a grid is the same at every place.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        outputs: Number of parameters of the distribution, the width of the head.
        inputs: Of the head; None: what the encoder puts out.
        head: What turns features into parameters, in place of a linear map; None: that.

    Attributes:
        short: Other names that the class goes by where it is chosen by name.
        of_pair: It infers with log p(x, z), which a VAE gives it (`attach`), so that it is no function by itself.
        of_one_layer: It is no layer of a hierarchy.
        latents: What its draws are: "real numbers", "bits", "one-hot vectors" or "codes". A prior and its guide have
            the same.
    """

    short: ClassVar[tuple[str, ...]] = ()
    of_pair: ClassVar[bool] = False
    of_one_layer: ClassVar[bool] = False
    latents: str = "real numbers"
    shift: Tensor
    rescale: Tensor

    @checked
    def __init__(
        self,
        encoder: Network,
        latent_dim: Count,
        outputs: int,
        inputs: int | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if len(encoder.out_shape) != 1:
            raise UsageError(f"encoder: expected a vector of features as output, got shape {encoder.out_shape}")
        self.latent_dim = latent_dim
        self.encoder = encoder
        features, places = encoder.out_shape[0] if inputs is None else inputs, encoder.places
        usual = nn.Linear if places == 1 else partial(OfPlaces, places)
        self.head: Any = usual(features, outputs) if head is None else head
        # The encoder sees (x - shift) * rescale: the identity until `initialise`.
        self.register_buffer("shift", torch.zeros(encoder.in_shape))
        self.register_buffer("rescale", torch.ones(()))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return event_seen(self.encoder)

    def features_of(self, x: Tensor) -> Tensor:
        """The encoder's output for x (*batch, *event), shape (*batch, features)."""
        return self.encoder((seen(self.encoder, x) - self.shift) * self.rescale)

    def parameters_of(self, x: Tensor) -> Tensor:
        """The head's output for x (*batch, *event), shape (*batch, outputs)."""
        found: Tensor = self.head(self.features_of(x))
        return found

    def attach(self, log_joint: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take log p(x, z) of the pair that it is the guide of. Here: it needs none."""

    @abstractmethod
    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x) for x of shape (*batch, *event): batch shape `batch`, event shape (latent_dim,)."""

    def initialise(self, x: Tensor) -> None:
        """Centre the encoder's input, if it asks for it, at the mean of x (N, *event), with one scale for all."""
        if self.encoder.centred:
            centre(self.encoder, x, self.shift, self.rescale)
        self.begin(x)

    def begin(self, x: Tensor) -> None:
        """Start what it has beside its network, at rows x (N, *event). Here: there is nothing."""


def seen(encoder: Network, x: Tensor) -> Tensor:
    """What an encoder sees of x (*batch, *event), before it is centred: x, unless it has a view of it."""
    check_event(x, event_seen(encoder))
    return x if encoder.view is None else encoder.view(x)


def event_seen(encoder: Network) -> tuple[int, ...]:
    """Event shape of the x that an encoder takes, through its view if it has one."""
    return encoder.in_shape if encoder.view is None else encoder.view.event_shape


def centre(encoder: Network, x: Tensor, shift: Tensor, rescale: Tensor) -> None:
    """Set shift and rescale so that (seen - shift) * rescale has mean 0 over rows x (N, *event), and variance 1."""
    if encoder.view is not None:
        encoder.view.initialise(x)
    values = seen(encoder, x)
    shift.copy_(values.mean(0))
    spread = (values - shift).double().square().mean().sqrt()
    rescale.copy_(1 / spread if spread > 0 else torch.ones(()))


def check_by_itself(guide: Guide, where: str) -> None:
    """Refuse a guide that infers with log p(x, z) of its pair, for what has none that it could use."""
    if guide.of_pair:
        raise UsageError(
            f"guide: {type(guide).__name__} refines by log p(x, z) of a VAE with one latent layer, whose prior is its "
            f"own, and cannot be used in {where}; use another guide there"
        )


def check_component(guide: Guide, where: str) -> None:
    """Refuse a guide that is no component of a mixture: by itself it is no q(z|x), or it has mass on points alone."""
    check_by_itself(guide, where)
    if guide.latents == "codes":
        raise UsageError(
            f"guide: {type(guide).__name__} has mass on the codes of its own row, and {where}, would have none on "
            "those of others; use a prior over codes, such as UniformCodes",
            settings=("guide",),
        )


class MeanFieldNormal(Guide):
    """Diagonal covariance: N(m(x), diag s(x)^2)."""

    short = ("mean-field", "diagonal")

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, raw_scale = self.parameters_of(x).chunk(2, -1)
        return dist.Normal(loc, softplus(raw_scale) + SCALE_FLOOR).to_event(1)


class FullCovarianceNormal(Guide):
    """Full covariance by its Cholesky factor: N(m(x), L(x) L(x)')."""

    short = ("full", "full-covariance")
    rows: Tensor
    columns: Tensor

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        below = latent_dim * (latent_dim - 1) // 2
        super().__init__(encoder, latent_dim, 2 * latent_dim + below)
        rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor) -> dist.Distribution:
        z = self.latent_dim
        loc, raw_scale, below = self.parameters_of(x).split([z, z, self.rows.numel()], -1)
        scale_tril = torch.diag_embed(softplus(raw_scale) + SCALE_FLOOR)
        scale_tril[..., self.rows, self.columns] = below
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class LowRankNormal(Guide):
    """Low rank plus diagonal: N(m(x), F(x) F(x)' + diag s(x)^2), F of shape (Z, rank).

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        rank: Number of columns of F, from 1 to Z.
    """

    short = ("low-rank",)

    @checked
    def __init__(self, encoder: Network, latent_dim: Count, rank: Count = 2) -> None:
        if rank > latent_dim:
            raise UsageError(f"rank: expected a whole number from 1 to latent_dim = {latent_dim}, got {rank}")
        super().__init__(encoder, latent_dim, (2 + rank) * latent_dim)
        self.rank = rank

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, raw_scale, factor = self.parameters_of(x).split(
            [self.latent_dim, self.latent_dim, self.rank * self.latent_dim], -1
        )
        # Small at the start, so that training begins near the mean-field guide.
        factor = 0.1 * factor.unflatten(-1, (self.latent_dim, self.rank))
        variance = (softplus(raw_scale) + SCALE_FLOOR).square()
        return dist.LowRankMultivariateNormal(loc, factor, variance)
