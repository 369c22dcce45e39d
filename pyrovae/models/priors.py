"""Priors p(z) over the latent vector.

A prior is a module whose `forward()` returns a distribution of batch shape () and event shape (Z,). To write a new
one, subclass `Prior`, call `super().__init__(latent_dim)`, return the distribution, and name the class in `PRIORS` of
`pyrovae.models.choices`; nothing else is asked. What its constructor needs it finds by name: `latent_dim`, the pair's
`guide`, the `event_shape` of x. Parameters with a default are its settings, on the command line too, with the sentences
of its docstring.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from torch import Tensor, nn
from torch.distributions.transforms import Transform
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.guides import Guide, check_component
from pyrovae.models.networks import MLP, Network
from pyrovae.settings import Count, Number, Positive, checked


class Prior(nn.Module, ABC):
    """p(z), a distribution over vectors of `latent_dim` elements.

    Attributes:
        short: Other names that the class goes by where it is chosen by name.
        latents: What its draws are: "real numbers", "bits", "one-hot vectors" or "codes". A prior and its guide have
            the same.
    """

    short: ClassVar[tuple[str, ...]] = ()
    latents: str = "real numbers"

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self) -> dist.Distribution:
        """The distribution, batch shape (), event shape (latent_dim,)."""

    def initialise(self, x: Tensor) -> None:
        """Start whatever depends on the data at training data x of shape (N, *event). Here: nothing."""


class StandardNormal(Prior):
    """N(0, I)."""

    short = ("standard", "normal")
    loc: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        # A buffer only so that dtype and device follow the model's.
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class IsotropicNormal(Prior):
    """N(0, s^2 I) of a fixed s: another unit of z, in which the same pairs can be declared as with N(0, I).

    It is there to say what is written with another s, as a KL that is the one to N(0, I/2). Draws of z have to have
    the same s as the prior that was trained with.

    Args:
        latent_dim: Z.
        scale: s, the standard deviation of every element.
    """

    short = ("isotropic",)
    loc: Tensor

    @checked
    def __init__(self, latent_dim: Count, scale: Positive = 1.0) -> None:
        super().__init__(latent_dim)
        self.scale = scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, torch.full_like(self.loc, self.scale)).to_event(1)


class SharedComponents(dist.MixtureSameFamily):
    """A mixture that plates expand without expanding its components.

    torch would give every particle and datum a copy of every component's parameters: for a full-covariance VampPrior
    that is (K, N, C, Z, Z) numbers where (C, Z, Z) will do.
    """

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> dist.Distribution:
        return dist.ExpandedDistribution(self, torch.Size(batch_shape))


class MixtureOfGaussians(Prior):
    """Learned weights, means and scales: sum_c pi_c N(m_c, diag s_c^2).

    Args:
        latent_dim: Z.
        components: Number of components.
        floor: Least scale of a component, so that none collapses to a point.
    """

    short = ("mixture", "mog")

    @checked
    def __init__(
        self, latent_dim: Count, components: Count = 10, floor: Annotated[float, Number(least=0, below=0.7)] = 1e-3
    ) -> None:
        super().__init__(latent_dim)
        self.components, self.floor = components, floor
        self.logits = nn.Parameter(torch.zeros(components))
        # Spread as draws of N(0, I), with scales so that the mixture starts with about unit variance everywhere.
        self.loc = nn.Parameter(torch.randn(components, latent_dim) * math.sqrt(0.5))
        self.raw_scale = nn.Parameter(torch.full((components, latent_dim), inverse_softplus(math.sqrt(0.5) - floor)))

    @property
    def scale(self) -> Tensor:
        """Standard deviations, shape (C, Z)."""
        return self.floor + softplus(self.raw_scale)

    def forward(self) -> dist.Distribution:
        components = dist.Normal(self.loc, self.scale).to_event(1)
        return SharedComponents(dist.Categorical(logits=self.logits), components)

    def component(self, y: Tensor) -> dist.Distribution:
        """The component that one-hot y of shape (*batch, C) says: batch shape `batch`, event shape (Z,)."""
        return dist.Normal(y @ self.loc, y @ self.scale).to_event(1)


class VampPrior(Prior):
    """The guide averaged over learned pseudo-inputs u_c: (1/C) sum_c q(z | u_c).

    The guide is the pair's own, shared and not copied, so its parameters belong to the pair and not to this module.

    Args:
        guide: The guide q(z|x) of the pair.
        event_shape: Event shape of x.
        components: Number of pseudo-inputs, C.

    References:
        Tomczak and Welling 2018, VAE with a VampPrior, https://arxiv.org/abs/1705.07120
    """

    short = ("vamp",)
    latents = "those of its guide"

    @checked
    def __init__(self, guide: Guide, event_shape: int | tuple[int, ...], components: Count = 500) -> None:
        super().__init__(guide.latent_dim)
        check_component(guide, "a VampPrior, which is made of it")
        self.components, self.latents = components, guide.latents
        # In a tuple, so that torch does not register it: each parameter has one name in the pair.
        self._guide = (guide,)
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.pseudo_inputs = nn.Parameter(0.5 + 0.1 * torch.randn(components, *shape))

    def forward(self) -> dist.Distribution:
        components = self._guide[0](self.pseudo_inputs)
        weights = dist.Categorical(logits=self.pseudo_inputs.new_zeros(self.components))
        return SharedComponents(weights, components)

    def initialise(self, x: Tensor) -> None:
        """Start the pseudo-inputs at rows of x (N, *event) drawn without replacement while they last."""
        start_at_rows(self.pseudo_inputs, x)


def start_at_rows(pseudo_inputs: nn.Parameter, x: Tensor) -> None:
    """Start pseudo-inputs (C, *event) at rows of x (N, *event) drawn without replacement while they last."""
    components = len(pseudo_inputs)
    rows = torch.cat([torch.randperm(len(x)) for _ in range(-(-components // len(x)))])
    rows = rows[:components].to(x.device)
    with torch.no_grad():
        pseudo_inputs.copy_(x[rows])
        # A repeated row would stay a copy of itself for ever: break the tie.
        pseudo_inputs.add_(0.01 * torch.randn_like(pseudo_inputs))


class FlowPrior(Prior):
    r"""A RealNVP flow from N(0, I), with its exact density.

    z = f_L ... f_1(u), u ~ N(0, I). Each f is affine in half of the elements, with a shift and a scale that a network
    computes from the other half, so that its inverse and Jacobian are as cheap as f; the order of the elements is
    reversed in between:

        f(u) = [u_1, m(u_1) + exp(s(u_1)) u_2]      log p(z) = log N(u; 0, I) - sum_l sum_d s_l

    m and s are a tenth of what the networks put out, so that the prior starts near the standard normal.

    Args:
        latent_dim: Z, at least 2.
        layers: Number of couplings, L.
        hidden: Width of the two hidden layers of each coupling's network.

    References:
        Dinh, Sohl-Dickstein and Bengio 2017, Density estimation using Real NVP, https://arxiv.org/abs/1605.08803
    """

    short = ("flow", "realnvp")
    loc: Tensor
    backwards: Tensor

    @checked
    def __init__(self, latent_dim: Count, layers: Count = 6, hidden: Count = 64) -> None:
        super().__init__(latent_dim)
        if latent_dim < 2:
            raise UsageError(f"latent_dim: a flow couples at least 2 elements, got {latent_dim}; use another prior")
        self.kept = latent_dim // 2  # how many elements a coupling leaves as they are
        moved = latent_dim - self.kept
        networks = [MLP(self.kept, (2, moved), (hidden, hidden), activation="silu") for _ in range(layers)]
        self.networks: Sequence[Network] = nn.ModuleList(networks)  # type: ignore[assignment]
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("backwards", torch.arange(latent_dim - 1, -1, -1), persistent=False)

    def forward(self) -> dist.Distribution:
        # Made anew at each call: Pyro's transforms keep what they last computed, which a pair must not carry along.
        flow: list[Transform] = []
        for network in self.networks:
            flow += [AffineCoupling(self.kept, partial(shift_and_log_scale, network)), Permute(self.backwards)]
        base = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        return dist.TransformedDistribution(base, flow)


def shift_and_log_scale(network: Network, kept: Tensor) -> tuple[Tensor, Tensor]:
    """m and s of an affine coupling, each (*batch, moved), for the elements that it keeps, (*batch, kept)."""
    shift, log_scale = (0.1 * network(kept)).unbind(-2)
    return shift, log_scale


def inverse_softplus(y: float) -> float:
    """The x with softplus(x) = y, for y > 0."""
    return y + math.log(-math.expm1(-y))
