"""Variational autoencoders: a prior, a likelihood and a guide, declared as a Pyro model/guide pair.

    VAE:              p(x, z) = p(z) p(x|z)                                  q(z|x)
    HierarchicalVAE:  p(x, z) = p(zL) ... p(z1|z2) p(x|z1)                   q(z1|x) q(z2|z1) ... q(zL|zL-1)

Both are `LatentLayers`, with everything that the number of layers leaves alike; each says what it is made from.

`model(x)` and `guide(x)` are ordinary Pyro programs: every site is inside one plate over the data, and parameters are
those of torch modules (the Pyro parameter store is not used).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Clean, Corruption
from pyrovae.models.guides import Guide
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.priors import Prior
from pyrovae.settings import Whole, check


class Layer(Protocol):
    """p(zL-1|zL): a module that maps the layer above, of `event_shape`, to a distribution of `latent_dim` elements."""

    @property
    def latent_dim(self) -> int: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def __call__(self, z: Tensor, /) -> dist.Distribution: ...


class LatentLayers(nn.Module, ABC):
    """A model with any number L of latent layers, each given the one above, and its guide.

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards: each a module that maps the layer above to a
            distribution, such as any guide class over a network from Z_above. Empty for L = 1.
        likelihood: p(x|z1).
        guides: q(z1|x), q(z2|z1), ..., q(zL|zL-1), from the data upwards.
        corruption: What q(z1|x) sees of x while it is trained; None: x.

    Attributes:
        word: What it is called where it is chosen by name.

    Raises:
        UsageError: neighbouring parts disagree on the number of latent dimensions; both sides are named.
    """

    word: ClassVar[str]

    @abstractmethod
    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Layer],
        likelihood: Likelihood,
        guides: Sequence[Guide],
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.conditionals: Sequence[Layer] = nn.ModuleList(conditionals)  # type: ignore[arg-type, assignment]
        self.likelihood = likelihood
        self.guides: Sequence[Guide] = nn.ModuleList(guides)  # type: ignore[assignment]
        self.corruption = Clean() if corruption is None else corruption
        self.check_shapes()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return self.likelihood.event_shape

    @property
    def latent_sites(self) -> list[str]:
        """Names of the latent sites, from the data upwards: ["z"], or ["z1", ..., "zL"]."""
        layers = len(self.guides)
        return ["z"] if layers == 1 else [f"z{i}" for i in range(1, layers + 1)]

    def check_shapes(self) -> None:
        """Compare the shapes on both sides of every arrow."""
        if len(self.guides) != len(self.conditionals) + 1:
            raise UsageError(
                f"guides: {len(self.conditionals)} conditionals need {len(self.conditionals) + 1} guides, "
                f"got {len(self.guides)}"
            )
        arrows = [
            (
                "x",
                self.event_shape,
                "the likelihood's output",
                self.guides[0].event_shape,
                "the guide's input",
            )
        ]
        first = self.guides[0]
        arrows.append(
            (
                "z",
                (first.latent_dim,),
                "the guide's latent_dim",
                self.likelihood.latent_shape,
                "the decoder's input",
            )
        )
        for below, above in pairwise(self.guides):
            arrows.append(
                (
                    "z",
                    (below.latent_dim,),
                    "a guide's latent_dim",
                    above.event_shape,
                    "the next guide's input",
                )
            )
        for i, p in enumerate(self.conditionals):
            below, above = self.guides[i], self.guides[i + 1]
            arrows.append(("z", (below.latent_dim,), "the guide's latent_dim", (p.latent_dim,), "the conditional's"))
            arrows.append(
                ("z", (above.latent_dim,), "the guide's latent_dim", p.event_shape, "the conditional's input")
            )
        top = self.guides[-1]
        arrows.append(("z", (top.latent_dim,), "the guide's latent_dim", (self.prior.latent_dim,), "the prior's"))
        for name, left, left_name, right, right_name in arrows:
            if tuple(left) != tuple(right):
                raise UsageError(
                    f"{name}: {left_name} is {tuple(left)}, {right_name} is {tuple(right)}; make them equal"
                )

    def latent(self, sites: list[str]) -> Tensor:
        """Sample the latent layers from the prior down to z1, within the caller's plates."""
        z = pyro.sample(sites[-1], self.prior())
        for name, conditional in zip(sites[-2::-1], reversed(list(self.conditionals)), strict=True):
            z = pyro.sample(name, conditional(z))
        return z

    def model(self, x: Tensor) -> Tensor:
        """p(x, z) as a Pyro model, for x of shape (N, *event).

        Raises:
            DataError: x has values outside the support of the likelihood.
        """
        if dist.is_validation_enabled():  # as it is not in a trace, where x has no values
            self.likelihood.check_support(x)
        with pyro.plate("data", len(x)):
            z = self.latent(self.latent_sites)
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z|x) as a Pyro guide, for x of shape (N, *event); in training mode that of x as corrupted."""
        z = self.corruption(x)
        with pyro.plate("data", len(x)):
            for name, guide in zip(self.latent_sites, self.guides, strict=True):
                z = pyro.sample(name, guide(z))
        return z

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start what is trained at training data x of shape (N, *event): output bias, input centring, pseudo-inputs."""

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z1|x) for x of shape (*batch, *event), never corrupted: batch shape `batch`, event shape (Z,)."""
        return self.guides[0](x)

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        """Draws of x: z from the prior, then x from p(x|z), with torch's random state.

        Args:
            num_samples: How many, at least 1.
            mean: The mean of p(x|z) at each z in place of a draw: without the noise of x, as pictures are shown.

        Returns:
            Shape (num_samples, *event).

        Raises:
            UsageError: num_samples is no whole number of at least 1.
        """
        check("num_samples", num_samples, Whole(1))
        with pyro.poutine.block(), pyro.plate("samples", num_samples):
            likelihood = self.likelihood(self.latent(self.latent_sites))
            return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Mean of q(z1|x), shape (N, Z)."""
        return self.posterior(x).mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z1) for z1 of shape (*batch, Z), shape (*batch, *event)."""
        return self.likelihood(z).mean

    @torch.no_grad()
    def remarks(self, x: Tensor) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event), in sentences."""
        return self.likelihood.remarks(self.encode(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the mean of q(z|x), shape (N, *event)."""
        return self.decode(self.encode(x))


class VAE(LatentLayers):
    """One latent layer: a variational autoencoder, with one latent site "z".

    Args:
        prior: p(z).
        likelihood: p(x|z).
        guide: q(z|x).
        corruption: What q(z|x) sees of x while it is trained; None: x.

    References:
        Kingma and Welling 2014, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114
    """

    word = "vae"

    def __init__(
        self, prior: Prior, likelihood: Likelihood, guide: Guide, corruption: Corruption | None = None
    ) -> None:
        super().__init__(prior, [], likelihood, [guide], corruption)

    def initialise(self, x: Tensor) -> None:
        start(self, x)


class HierarchicalVAE(LatentLayers):
    """Several latent layers: a VAE with latent sites "z1", ..., "zL".

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards: each a module that maps the layer above to a
            distribution, such as any guide class over a network from Z_above.
        likelihood: p(x|z1).
        guides: q(z1|x), q(z2|z1), ..., q(zL|zL-1), from the data upwards.
        corruption: What q(z1|x) sees of x while it is trained; None: x.

    Raises:
        UsageError: neighbouring parts disagree on the number of latent dimensions; both sides are named.
    """

    word = "hierarchical"

    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Guide],
        likelihood: Likelihood,
        guides: Sequence[Guide],
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__(prior, conditionals, likelihood, guides, corruption)

    def initialise(self, x: Tensor) -> None:
        start(self, x)


def start(model: LatentLayers, x: Tensor) -> None:
    """Start the parts of a model that depend on the data at training data x of shape (N, *event)."""
    model.corruption.initialise(x)
    model.guides[0].initialise(x)
    model.likelihood.initialise(x)
    model.prior.initialise(x)


PAIRS = (VAE, HierarchicalVAE)
