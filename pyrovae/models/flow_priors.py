r"""Priors p(z) that a network makes from the elements before each element, or from half of them.

    MaskedAutoregressivePrior    z = m + s f(u), f^-1 a chain of autoregressive affine maps: log p(z) is one pass
    NeuralSplinePrior            z = m + s f(u), f a chain of couplings by rational-quadratic splines: both are cheap
    AutoregressivePrior          p(z) = prod_d p(z_d | z_<d), each conditional a mixture of Gaussians

The first two are flows of N(0, I) (`pyrovae.models.flows`). The third is no flow of noise, so that its draws have no
gradient, which a prior's need not have: a mixture may have several modes in each element, where an affine map of a
Gaussian has one. Training and log p(x) ask for log p(z) at latents of the guide, which all of them have in one pass
(the spline in two halves); a draw takes Z steps of the first and the third, whose arithmetic is that of one pass.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.flow_guides import Bins
from pyrovae.models.flows import NEAR, Affine, Autoregressive, Chain, Flow, Flowed, Inverted, Spline
from pyrovae.models.made import MADE
from pyrovae.models.priors import Prior, inverse_softplus
from pyrovae.settings import Count, Positive, checked


class FlowedPrior(Prior):
    """m + s f(u), m and s learned; what inherits from it says what f is.

    Args:
        latent_dim: Z, at least 2.

    Attributes:
        flow: f.
    """

    flow: Flow

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        check_several(latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self) -> dist.Distribution:
        return Flowed(self.flow, self.loc, self.log_scale.exp())


class MaskedAutoregressivePrior(FlowedPrior):
    """A masked autoregressive flow from N(0, I): each element is shifted and scaled given those before it.

    Args:
        latent_dim: Z, at least 2.
        layers: Number of flows, each in the reversed order of the one before.
        hidden: Width of the two hidden layers of each flow's masked network.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation,
        https://arxiv.org/abs/1705.07057
    """

    short = ("maf",)

    @checked
    def __init__(self, latent_dim: Count, layers: Count = 4, hidden: Count = 100) -> None:
        super().__init__(latent_dim)
        each = (hidden, hidden)
        self.flow = Chain([Inverted(Autoregressive(latent_dim, Affine(), each)) for _ in range(layers)])


class NeuralSplinePrior(FlowedPrior):
    """A neural spline flow from N(0, I): half of the elements are moved by splines, each a function of the other half.

    Args:
        latent_dim: Z, at least 2.
        layers: Number of flows; each gives the half that the one before moved last to the next.
        hidden: Width of the two hidden layers of each flow's network.
        bins: Bins of a spline.
        bound: Elements beyond it, on either side, in units of s, are left as they are.

    References:
        Durkan, Bekasov, Murray and Papamakarios 2019, Neural Spline Flows, https://arxiv.org/abs/1906.04032
    """

    short = ("spline", "nsf")

    @checked
    def __init__(
        self,
        latent_dim: Count,
        layers: Count = 4,
        hidden: Count = 64,
        bins: Bins = 8,
        bound: Positive = 5.0,
    ) -> None:
        super().__init__(latent_dim)
        each = (hidden, hidden)
        self.flow = Chain([Inverted(Autoregressive(latent_dim, Spline(bins, bound), each, 2)) for _ in range(layers)])


# Least scale of a Gaussian of a conditional, so that none collapses to a point.
SMALLEST = 1e-3


class AutoregressivePrior(Prior):
    """p(z_d | z_<d), each a mixture of Gaussians that a masked network makes from the elements before.

    Args:
        latent_dim: Z, at least 2.
        components: Number of Gaussians of each conditional.
        hidden: Width of the two hidden layers of the masked network.

    References:
        Uria, Murray and Larochelle 2013, RNADE: The Real-valued Neural Autoregressive Density-Estimator,
        https://arxiv.org/abs/1306.0186
    """

    short = ("autoregressive",)

    @checked
    def __init__(self, latent_dim: Count, components: Count = 10, hidden: Count = 200) -> None:
        super().__init__(latent_dim)
        check_several(latent_dim)
        self.network = MADE(latent_dim, 3 * components, (hidden, hidden))
        # Means as of quantiles of N(0, 1/2), and scales of the other half: N(0, 1), nearly, of components that differ.
        places = (torch.arange(components) + 0.5) / components
        self.loc = nn.Parameter((math.sqrt(0.5) * torch.special.ndtri(places)).repeat(latent_dim, 1))

    def forward(self) -> dist.Distribution:
        return OfElementsBefore(self.network, self.loc)


class OfElementsBefore(dist.TorchDistribution):
    """The distribution of vectors whose elements are each a mixture of Gaussians given those before.

    Args:
        network: Gives 3 C parameters for each element.
        loc: Added to the means of the mixtures, shape (Z, C).
        batch_shape: To which it is expanded.
    """

    arg_constraints: ClassVar = {"loc": constraints.real}
    support = constraints.real_vector

    def __init__(self, network: MADE, loc: Tensor, batch_shape: Sequence[int] = ()) -> None:
        self.network, self.loc = network, loc
        super().__init__(torch.Size(batch_shape), loc.shape[:1])

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "OfElementsBefore":
        return OfElementsBefore(self.network, self.loc, batch_shape)

    def conditionals(self, raw: Tensor, elements: slice = slice(None)) -> dist.Distribution:
        """p(z_d | z_<d) of some elements, from their parameters (*batch, n, 3 C): batch shape (*batch, n)."""
        logits, shift, raw_scale = raw.chunk(3, -1)
        scale = SMALLEST + softplus(inverse_softplus(math.sqrt(0.5) - SMALLEST) + raw_scale)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            dist.Normal(self.loc[elements] + shift, scale, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of z (*batch, Z), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        log_p = self.conditionals(NEAR * self.network(value)).log_prob(value).sum(-1)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One element after the other."""
        batch = self._extended_shape(torch.Size(sample_shape))[:-1]

        def group(elements: slice, raw: Tensor) -> Tensor:
            return self.conditionals((NEAR * raw).expand(*batch, *raw.shape[-2:]), elements).sample()

        with torch.no_grad():
            return self.network.unrolled(group)

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError("the mean of an autoregressive density has no closed form; average draws")


def check_several(latent_dim: int) -> None:
    """Refuse a single element, which has none before it."""
    if latent_dim < 2:
        raise UsageError(
            f"latent_dim: this prior makes elements from others, of which it takes at least 2, got {latent_dim}; use "
            "MixtureOfGaussians"
        )
