r"""Proposals: where the draws of an estimate of log p(x) come from.

A proposal r(z|x) gives, for a pair and a batch of data, a function that draws k log-weights log p(x, z) - log r(z|x)
per datum. Whatever r is, the mean weight has expectation p(x), so the estimate is never too high on average; the closer
r is to p(z|x), the tighter.

    FromGuide     q(z|x) itself
    Widened       a mixture of q(z|x) at several widths and of p(z): weights are at most p(x|z) / share
    Individual    a Gaussian fitted to each datum (`pyrovae.inference.individual`)
    Annealed      annealed importance sampling (`pyrovae.inference.annealed`)
    FromPrior     p(z): naive, and shown for that

A mixture is sampled systematically, each component at its share of the draws, and weighted as a mixture (the balance
heuristic).

Each also weighs latents that are given to it, log p(x, z) - log r(z|x), which is what the check on simulated data asks
for (`pyrovae.inference.simulated`).

To write a new one, subclass `Proposal` with a `name` that completes "importance sampling from", and a `__call__` that
returns a function of k; a `Sampler` if it is to be checked.

References:
    Hesterberg 1995, Weighted Average Importance Sampling and Defensive Mixture Distributions, Technometrics 37
    Veach and Guibas 1995, Optimally Combining Sampling Techniques, SIGGRAPH
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import Summation
from pyrovae.inference.gaussians import inflated
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import NO_LATENTS, At, draw, drawn_sites, log_prob, run, sample_sites
from pyrovae.settings import Positive, Share, check_fields


@dataclass(frozen=True)
class Sampler:
    """A proposal for N rows of data, called with k for log-weights of k draws, shape (k, N), in nats.

    Attributes:
        draw: That function of k.
        at: Log-weights of latents that are given by name, each of shape (k, N, *event): shape (k, N).
    """

    draw: Callable[[int], Tensor]
    at: Callable[[dict[str, Tensor]], Tensor]

    def __call__(self, k: int) -> Tensor:
        return self.draw(k)


class Proposal(ABC):
    """What `log_marginal` draws from.

    Attributes:
        word: What the command line calls it, for one of `PROPOSALS`.
        usual_particles: K there, unless given; None: that of the command.
        of_each_row: It is fitted to each row by itself, so that there is nothing better to `repair` a row with.
        of_chains: Its draws are chains, which a `sandwich` checks; others are checked by `simulated`.
        traceable: Its draws are tensor operations, which `Compiled` compiles.
        has_guide: It has `as_guide`.
    """

    word: ClassVar[str]
    usual_particles: ClassVar[int | None] = None
    of_each_row: ClassVar[bool] = False
    of_chains: ClassVar[bool] = False
    traceable: ClassVar[bool] = False
    has_guide: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What estimates call it."""

    @abstractmethod
    def __call__(self, pair: Pair, batch: Batch) -> Callable[[int], Tensor]:
        """For N rows of data, a function of k that draws log-weights of shape (k, N), in nats."""

    @property
    def of_guide(self) -> bool:
        """Whether draws are the pair's guide's, so that the mean log-weight is its ELBO. Here: no."""
        return False

    def summing(self, sums: Summation) -> "Proposal | None":
        """The same with discrete latents summed out inside each draw. Here: there is none, and they are drawn."""
        return None

    def as_guide(self, pair: Pair, batch: Batch) -> Callable:
        """The same for these rows as a Pyro guide of the pair, where latents are wanted. Here: there is none.

        Raises:
            UsageError: it has none.
        """
        raise UsageError(f"proposal: expected FromGuide or Individual, whose latents can be drawn, got {self!r}")

    def computation(self) -> dict[str, Any]:
        """How its draws were computed, as plain values. Here: by the pair itself."""
        return {"compiled": False, "precision": "fp32", "precision_bias": None}


def check_proposal(proposal: object) -> None:
    """Refuse what is no proposal, such as a class of them."""
    if not isinstance(proposal, Proposal):
        raise UsageError(f"proposal: expected an object such as Widened(), got {proposal!r}")


@dataclass(frozen=True)
class FromGuide(Proposal):
    """The guide itself."""

    word = "guide"
    name = "importance sampling from the guide"
    of_guide = True
    traceable = True
    has_guide = True

    def as_guide(self, pair: Pair, batch: Batch) -> Callable:
        return pair.guide

    def summing(self, sums: Summation) -> "Proposal | None":
        return Summed(sums)

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        def at(values: dict[str, Tensor]) -> Tensor:
            return draw(pair, batch, particles_in(values), values).log_weights

        return Sampler(lambda k: draw(pair, batch, k).log_weights, at)


@dataclass(frozen=True)
class Summed(Proposal):
    """The guide, with discrete latents s summed out inside each draw z_k: weights p(x, z_k) / q(z_k|x).

    Their mean log is the ELBO of q(z|x), which is not below that of q(s, z|x).

    Args:
        summation: Of a pair of which other latents are left to be drawn.
    """

    traceable = True

    summation: Summation = field(repr=False)

    @property
    def name(self) -> str:
        """What estimates call it."""
        return f"importance sampling from the guide, each weight {self.summation.words}"

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        model, guide = self.summation.model, self.summation.guide
        assert model is not None
        assert guide is not None

        def at(values: dict[str, Tensor]) -> Tensor:
            k = particles_in(values)
            z = {name: value for name, value in values.items() if name not in self.summation.joint}
            # In the numbers of the pair, as other weights are: no more of their digits are right.
            return (model(batch, z, k) - guide(batch, z, k)).to(next(iter(z.values())).dtype)

        return Sampler(lambda k: at(draw_guide(pair, batch, k)), at)


@dataclass(frozen=True)
class FromPrior(Proposal):
    """The prior, naively: log p(x) as the log of the mean likelihood.

    Its K must grow like exp KL(p(z|x) || p(z)), so that it fails on all but the smallest models.
    """

    word = "prior"
    name = "naive sampling from the prior"
    traceable = True

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        def at(values: dict[str, Tensor]) -> Tensor:
            return draw(pair, batch, particles_in(values), values).log_likelihood

        return Sampler(lambda k: at(draw_prior(pair, batch, k)), at)


@dataclass(frozen=True)
class Widened(Proposal):
    """The guide at several widths, mixed with the prior: a defensive mixture.

    Args:
        scales: Factors of the guide's standard deviations, with equal shares. Factors other than 1 take a guide of
            Gaussian sites (or transformed Gaussians).
        share: Share of draws from the prior, from 0 to less than 1.
    """

    word = "widened"
    traceable = True

    scales: tuple[Positive, ...] = (1.0, 1.25, 1.5, 2.0)
    share: Share = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """What estimates call it."""
        widths = ", ".join(f"{c:g}" for c in self.scales)
        return f"importance sampling from the widened guide (scales {widths}; {self.share:g} from the prior)"

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        shares = [(1 - self.share) / len(self.scales)] * len(self.scales) + [self.share] * bool(self.share)

        def part(j: int, n: int) -> dict[str, Tensor]:
            return draw_guide(pair, batch, n, self.scales[j]) if j < len(self.scales) else draw_prior(pair, batch, n)

        def sample(k: int) -> Tensor:
            # As many draws of each component as systematic sampling may ask for in a row.
            parts = [part(j, min(k, math.floor(k * share) + 1)) for j, share in enumerate(shares)]
            if auxiliary := set(parts[0]) - set(parts[-1]):
                raise PairError(
                    f"guide site '{min(auxiliary)}' is auxiliary, so that the density of the guide alone is not known; "
                    "use Widened(share=0)"
                )
            log_w = at(pick(parts, systematic(shares, k, batch.x)))
            # In random order, so that every subset of the draws is one of the mixture's.
            return log_w.gather(0, torch.rand_like(log_w).argsort(0))

        def at(values: dict[str, Tensor]) -> Tensor:
            particles = draw(pair, batch, particles_in(values), values)
            log_r = [density(pair, batch, values, c) + math.log(a) for c, a in zip(self.scales, shares, strict=False)]
            log_r += [particles.log_prior + math.log(self.share)] if self.share else []
            return particles.log_likelihood + particles.log_prior - torch.logsumexp(torch.stack(log_r), 0)

        return Sampler(sample, at)


FROM_GUIDE = FromGuide()


def systematic(shares: list[float], k: int, x: Tensor) -> Tensor:
    """Components of k draws for each datum, in order, shape (k, N): each at its share of k, rounded up or down.

    Data are rounded independently, so that their estimates are independent.
    """
    ends = torch.tensor(shares, device=x.device).cumsum(0)[:-1]
    points = (torch.arange(k, device=x.device).unsqueeze(1) + torch.rand(len(x), device=x.device)) / k
    return torch.bucketize(points, ends)


def pick(parts: list[dict[str, Tensor]], component: Tensor) -> dict[str, Tensor]:
    """Latents of shape (k, N, *event): for each datum the next unused draw of the component (k, N)."""
    values = {}
    for name in parts[0]:
        candidates = []
        for j, part in enumerate(parts):
            place = ((component == j).cumsum(0) - 1).clamp(0, len(part[name]) - 1)
            candidates.append(part[name][place, torch.arange(place.shape[1], device=place.device)])
        result = candidates[0]
        for j, candidate in enumerate(candidates[1:], 1):
            chosen = (component == j).reshape(component.shape + (1,) * (candidate.ndim - 2))
            result = torch.where(chosen, candidate, result)
        values[name] = result
    return values


class Inflate(Messenger):
    """Multiply the standard deviations of Gaussian latent sites by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: dict) -> None:
        if self.factor != 1 and not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample":
            try:
                msg["fn"] = inflated(msg["fn"], self.factor)
            except NotImplementedError as error:
                raise PairError(
                    f"guide site '{msg['name']}': {error} cannot be widened, since it is no Gaussian; use "
                    "Widened(scales=(1,)), which mixes the guide as it is with the prior"
                ) from None


def particles_in(values: dict[str, Tensor]) -> int:
    """K of latents by name, each of shape (K, N, *event).

    Raises:
        PairError: there are none.
    """
    if not values:
        raise PairError(NO_LATENTS)
    return len(next(iter(values.values())))


def draw_guide(pair: Pair, batch: Batch, num_particles: int, factor: float = 1.0) -> dict[str, Tensor]:
    """Latents of shape (K, N, *event) by name, from the guide widened by a factor."""
    with Inflate(factor):
        sites = sample_sites(run(pair.guide, "guide", batch, num_particles))
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}


def draw_prior(pair: Pair, batch: Batch, num_particles: int) -> dict[str, Tensor]:
    """Latents of shape (K, N, *event) by name, from the prior."""
    prior = poutine.block(pair.model, hide_fn=lambda site: site["is_observed"])
    return {name: site["value"] for name, site in sample_sites(run(prior, "model", batch, num_particles)).items()}


def density(pair: Pair, batch: Batch, values: dict[str, Tensor], factor: float = 1.0) -> Tensor:
    """log q of the guide widened by a factor, at given latents: shape (K, N)."""
    shape = (particles_in(values), len(batch))
    with At(values), Inflate(factor):
        sites = drawn_sites(sample_sites(run(pair.guide, "guide", batch, shape[0])))
    return torch.stack([log_prob(site, f"guide site '{name}'", shape) for name, site in sites.items()]).sum(0)
