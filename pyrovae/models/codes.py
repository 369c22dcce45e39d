r"""Grids of codes: distributions over vectors that are made of the rows of a codebook.

A codebook has C vectors c_1, ..., c_C of D elements. A grid has M places, each with a code k_m, and is passed on as the
vectors that its codes stand for, channel by channel:

    z = (c_k1, ..., c_kM), of D M elements: element d M + m of z is element d of the code at place m

so that a decoder takes it as it takes any other z, on a grid of height H and width W with M = H W as an image of D
channels. As distributions of z these are masses on C^M points. Since no two rows of a codebook are alike, the codes of
a z are known, by its nearest rows, whose distance is 0: `Codes.log_prob` finds them, and has log p of the codes.

    KnownCodes           one grid has mass 1: of a guide that takes the nearest code
    IndependentCodes     places are independent: of a guide with a temperature, of priors without a network
    AutoregressiveCodes  p(k) = prod_m p(k_m | k_1, ..., k_m-1): of priors with one
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

# Points of a distribution that can be listed; beyond, nothing is summed over them.
MOST_POINTS = 2**16
EXACTLY = "donot_use_mm_for_euclid_dist"  # by differences, so that the distance of a vector to itself is 0


class Grids(constraints.Constraint):
    """Vectors z whose every place has a row of the codebook.

    Args:
        codebook: Shape (C, D).
    """

    is_discrete = True
    event_dim = 1

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook

    def check(self, value: Tensor) -> Tensor:
        distance, _ = nearest(value, self.codebook)
        return (distance == 0).all(-1)


def nearest(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The distance to the nearest row of the codebook (C, D), and which that is, at each place of z (*batch, D M).

    Returns:
        Both of shape (*batch, M).
    """
    cells = z.detach().unflatten(-1, (codebook.shape[1], -1)).transpose(-1, -2)
    distances = torch.cdist(cells.flatten(0, -2), codebook.to(cells.dtype), compute_mode=EXACTLY)
    distance, codes = distances.min(-1)
    return distance.view(cells.shape[:-1]), codes.view(cells.shape[:-1])


def vectors(codes: Tensor, codebook: Tensor) -> Tensor:
    """z (*batch, D M) of codes (*batch, M)."""
    return codebook[codes].transpose(-1, -2).flatten(-2)


class Codes(dist.TorchDistribution, ABC):
    """A mass on grids of codes, event shape (D M,).

    Args:
        codebook: Shape (C, D), no two rows of which are alike.
        places: M.
        batch_shape: Of the grids.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, codebook: Tensor, places: int, batch_shape: torch.Size) -> None:
        self.codebook, self.places = codebook, places
        self.drawn: tuple[Tensor, Tensor] | None = None  # what was drawn last and its codes, which need no search
        super().__init__(batch_shape, torch.Size([codebook.shape[1] * places]), validate_args=False)

    @property
    def support(self) -> Grids:
        return Grids(self.codebook)

    @abstractmethod
    def log_mass(self, codes: Tensor) -> Tensor:
        """log p of codes (*shape, *batch, M), shape (*shape, *batch)."""

    @abstractmethod
    def draw(self, shape: torch.Size) -> Tensor:
        """Codes of shape (*shape, *batch, M)."""

    @final
    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the codes of z, which must be in the support."""
        own = self.drawn is not None and value is self.drawn[0]
        return self.log_mass(self.drawn[1] if own and self.drawn else nearest(value, self.codebook)[1])

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return vectors(self.draw(torch.Size(sample_shape)), self.codebook)

    @property
    def has_enumerate_support(self) -> bool:
        """Whether its points are so few that they can be listed."""
        return len(self.codebook) ** self.places <= MOST_POINTS

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All C^M grids, shape (C^M, *batch, D M), with `batch` all 1 unless it is to be expanded."""
        if not self.has_enumerate_support:
            raise NotImplementedError(f"{len(self.codebook)}^{self.places} grids are too many to list")
        every = torch.arange(len(self.codebook), device=self.codebook.device)
        codes = torch.cartesian_prod(*[every] * self.places).view(-1, self.places)
        z = vectors(codes, self.codebook)
        z = z.view(len(z), *[1] * len(self.batch_shape), *self.event_shape)
        return z.expand(len(z), *self.batch_shape, *self.event_shape) if expand else z


class KnownCodes(Codes):
    """All mass on one grid, of the codes nearest to e, with a straight-through gradient.

    A draw is z = c_k, and its derivative by e is taken to be that of e itself: where k changes it has none of its own.
    What draws e to its code is the commitment, -beta |e - c_k|^2 summed over places. It is no part of log q, which is
    0, but has its gradient there: whatever is maximised is maximised with it, and is reported without.

    Args:
        e: What the encoder found, shape (*batch, M, D).
        codes: The nearest codes, shape (*batch, M).
        codebook: Shape (C, D).
        commitment: beta, in nats per squared unit of e; 0: there is none.

    References:
        van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning,
        https://arxiv.org/abs/1711.00937
    """

    has_rsample = True

    def __init__(self, e: Tensor, codes: Tensor, codebook: Tensor, commitment: float = 0.0) -> None:
        self.e, self.codes, self.commitment = e, codes, commitment
        super().__init__(codebook, codes.shape[-1], codes.shape[:-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "KnownCodes":
        shape = (*batch_shape, *self.codes.shape[-1:])
        return KnownCodes(self.e.expand(*shape, -1), self.codes.expand(shape), self.codebook, self.commitment)

    @property
    def mean(self) -> Tensor:
        return vectors(self.codes, self.codebook)

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def draw(self, shape: torch.Size) -> Tensor:
        return self.codes.expand(*shape, *self.codes.shape)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        e = self.e.transpose(-1, -2).flatten(-2)
        z = self.mean + (e - e.detach())  # c_k to the last bit
        self.drawn = z.expand(*sample_shape, *z.shape), self.draw(torch.Size(sample_shape))
        return self.drawn[0]

    def log_mass(self, codes: Tensor) -> Tensor:
        """0 for its own grid, minus infinity for others."""
        impossible = (codes != self.codes).any(-1)
        log_q = self.e.new_zeros(impossible.shape).masked_fill(impossible, -torch.inf)
        if self.commitment:
            away = self.commitment * (self.e - self.codebook[self.codes]).square().sum((-1, -2))
            log_q = log_q + (away - away.detach())
        return log_q


class IndependentCodes(Codes):
    """Independent categorical codes at each place.

    Args:
        logits: Shape (*batch, M, C), or (*batch, 1, C) for the same at all places.
        codebook: Shape (C, D).
        places: M.
    """

    def __init__(self, logits: Tensor, codebook: Tensor, places: int) -> None:
        self.log_p = logits.log_softmax(-1)
        super().__init__(codebook, places, logits.shape[:-2])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "IndependentCodes":
        return IndependentCodes(self.log_p.expand(*batch_shape, *self.log_p.shape[-2:]), self.codebook, self.places)

    def at_places(self) -> Tensor:
        """log p of each code at each place, shape (*batch, M, C)."""
        return self.log_p.expand(*self.batch_shape, self.places, len(self.codebook))

    @property
    def mean(self) -> Tensor:
        return (self.at_places().exp() @ self.codebook).transpose(-1, -2).flatten(-2)

    @property
    def variance(self) -> Tensor:
        squares = (self.at_places().exp() @ self.codebook.square()).transpose(-1, -2).flatten(-2)
        return (squares - self.mean.square()).clamp(min=0)

    def draw(self, shape: torch.Size) -> Tensor:
        return torch.distributions.Categorical(logits=self.at_places()).sample(shape)

    def log_mass(self, codes: Tensor) -> Tensor:
        log_p = self.at_places().expand(*codes.shape, len(self.codebook))
        return log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1).sum(-1)


class AutoregressiveCodes(Codes):
    """Codes one after another, each given those before it.

    Args:
        logits: Maps codes (N, M) to logits (N, M, C), those of a place a function of the codes before it alone; what it
            knows of a batch of grids it takes as a second argument.
        codebook: Shape (C, D).
        places: M.
        given: What each grid of the batch is conditioned on, shape (*batch, ...); None: on nothing.
    """

    def __init__(
        self,
        logits: Callable[..., Tensor],
        codebook: Tensor,
        places: int,
        given: Tensor | None = None,
        batch_shape: torch.Size | tuple[int, ...] = (),
    ) -> None:
        self.logits, self.given = logits, given
        super().__init__(codebook, places, torch.Size(batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressiveCodes":
        given = self.given
        if given is not None:
            given = given.expand(*batch_shape, *given.shape[len(self.batch_shape) :])
        return AutoregressiveCodes(self.logits, self.codebook, self.places, given, batch_shape)

    def log_p(self, codes: Tensor) -> Tensor:
        """log p of each code given those before it, shape (*shape, *batch, M, C) for codes (*shape, *batch, M)."""
        logits = self.logits(codes.reshape(-1, self.places), *self.conditions(codes.shape[:-1]))
        return logits.log_softmax(-1).view(*codes.shape, len(self.codebook))

    def conditions(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """What so many grids are given, one after another; nothing, or one tensor."""
        if self.given is None:
            return ()
        event = self.given.shape[len(self.batch_shape) :]
        return (self.given.expand(*shape, *event).reshape(-1, *event),)

    def log_mass(self, codes: Tensor) -> Tensor:
        return self.log_p(codes).gather(-1, codes.unsqueeze(-1)).squeeze(-1).sum(-1)

    @torch.no_grad()
    def draw(self, shape: torch.Size) -> Tensor:
        codes = torch.zeros(*shape, *self.batch_shape, self.places, dtype=torch.long, device=self.codebook.device)
        for place in range(self.places):
            codes[..., place] = torch.distributions.Categorical(logits=self.log_p(codes)[..., place, :]).sample()
        return codes
