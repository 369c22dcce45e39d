r"""Simulated data: what a proposal misses, seen where the answer is known.

Draws from a proposal r(z|x) show nothing of what r never visits. In data simulated from the model,
(z*, x*) ~ p(z) p(x|z), z* is an exact draw of the posterior p(z|x*), which goes wherever the posterior has mass. With
w(z) = p(x*, z) / r(z|x*) and z_k ~ r, on average over such data

    L_K = log (1/K) (w(z_1) + ... + w(z_K))              E L_K <= E log p(x*)
    U_K = log (1/K) (w(z*) + w(z_2) + ... + w(z_K))      E U_K >= E log p(x*)

The first is the estimate of log p(x). For the second, put z* at a random place among the others: such K latents have
the density (1/K) sum_j p(z_j|x*) prod_{k != j} r(z_k|x*), which is prod_k r(z_k|x*) times the mean weight over p(x*).
So U_K - log p(x*) is the log of the ratio of two densities at a draw from the upper one, and its mean is a
Kullback-Leibler divergence.

The width, the mean of U_K - L_K, is then at least the bias of L_K, for data like those that the model makes. Both share
z_2 .. z_K, whose noise cancels. A guide on one of two modes, a state that it never draws, a collapsed guide and tails
too light for the posterior make it wide; a good guide makes it 0.

A state of a discrete latent that is rare would rarely be simulated, though rows that it makes may be missed by far. So
each such site is drawn from its prior p and from the uniform distribution over its S states, half and half, and the row
counts with the weight p / (p/2 + 1/2S), at most 2. Of a vector of independent numbers, one at random is drawn so.

References:
    Grosse, Ghahramani and Adams 2015, Sandwiching the Marginal Likelihood, https://arxiv.org/abs/1511.02543
    Sobolev and Vetrov 2019, Importance Weighted Hierarchical Variational Inference, https://arxiv.org/abs/1905.03290
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import PairError
from pyrovae.inference.annealed import simulate
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import summation
from pyrovae.inference.estimate import standard_error
from pyrovae.inference.marginal import block_of, jackknife, summarise
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import FROM_GUIDE, Proposal, Sampler, check_proposal
from pyrovae.inference.weights import NO_LATENTS, draw, log_mean_exp
from pyrovae.seeding import seeded

# Data that are simulated: a state of the latents that makes one row in a hundred is missed by as many once in twenty.
SIMULATED_ROWS = 300
# A proposal is good enough where the sandwich is narrower than this, in nats, two standard errors added.
MOST_WIDTH = 0.1
# Discrete sites of which rare states are simulated more often than they come.
MOST_SPREAD = 2


@dataclass(frozen=True)
class Simulated:
    """log p(x) of simulated data from both sides, in nats; tensors of shape (N,) in double precision on the CPU.

    Attributes:
        lower: L_K, not above log p(x) on average.
        upper: U_K, not below log p(x) on average.
        jackknife: L_K without its bias of order 1/K, as the draws alone tell it.
        num_particles: K. The width is that of estimates from so many draws.
        estimator: What was drawn from, in words.
        weight: For how many data of the model's a row counts; None: each for one.
        word: What a report calls it.
    """

    word: ClassVar[str] = "simulated"

    lower: Tensor
    upper: Tensor
    jackknife: Tensor
    num_particles: int
    estimator: str
    weight: Tensor | None = None

    def weighted(self, values: Tensor) -> Tensor:
        """Values of the rows, of which the plain mean is that over data of the model's."""
        return values if self.weight is None else self.weight * values

    @property
    def width(self) -> float:
        """Mean of upper - lower over data: on average, an estimate is at most so much too low."""
        return self.weighted(self.upper - self.lower).mean().item()

    @property
    def error(self) -> float:
        """Standard error of `width` over data; NaN for a single one."""
        return standard_error(self.weighted(self.upper - self.lower))

    @property
    def jackknifed(self) -> float:
        """The mean bias of `lower` that the jackknife finds."""
        return self.weighted(self.jackknife - self.lower).mean().item()

    @property
    def most(self) -> float:
        """`width` and two of its errors, at least 0: how far an estimate may be too low on average.

        Infinite where that cannot be told: for a single row, or where a draw of the posterior has no density.
        """
        most = self.width + 2 * self.error
        return max(0.0, most) if math.isfinite(most) else math.inf

    @property
    def validated(self) -> bool:
        """Whether `most` is below 0.1 nat."""
        return self.most < MOST_WIDTH

    def summary(self) -> dict[str, Any]:
        """It as plain values: means over data."""
        return {
            "lower": self.weighted(self.lower).mean().item(),
            "upper": self.weighted(self.upper).mean().item(),
            "width": self.width,
            "width_error": self.error,
            "validated": self.validated,
            "rows": len(self.lower),
        }


@in_single_precision
def simulated(
    model: Callable,
    guide: Callable,
    x_like: Tensor,
    num_particles: int = 5000,
    proposal: Proposal = FROM_GUIDE,
    seed: int = 0,
    chunk_size: int | None = None,
    repair: Proposal | None = None,
    given: Sequence[Tensor] = (),
) -> Simulated:
    """Bound log p(x) of data simulated from the model from both sides, by draws from a proposal.

    Args:
        model: Pyro model, called as model(x, *given), that can be simulated: it observes x, all of it, as it is.
        guide: Pyro guide, called as guide(x, *given).
        x_like: Says how many data of which shape, (N, *event); its values are only looked at by the model itself.
        num_particles: K, as for the estimate that is to be checked.
        proposal: Where its draws come from.
        seed: Of all draws; the caller's random state is left as it was.
        chunk_size: Particles evaluated at once. None: as many as fit in a fixed memory.
        repair: Where the draws come from for rows that turn out unreliable, as in `pyrovae.inference.repair`.
        given: What everything is conditioned on, tensors of shape (N, ...): row n is simulated given theirs.

    Raises:
        UsageError: num_particles < 1, or x_like is not a tensor with rows, or something in `given` has not as many.
        PairError: x cannot be simulated from the model, or the proposal's density at given latents is not known.
    """
    check_count("num_particles (K)", num_particles)
    check_proposal(proposal)
    batch_like = Batch.of(x_like, given, "x_like")
    pair = summation(Pair(model, guide), batch_like, num_particles, 0).pair  # with a guide of every latent
    rows, chunk = block_of(batch_like, num_particles, chunk_size)
    sizes = [min(chunk, num_particles - done) for done in range(0, num_particles, chunk)]
    lower, upper, corrected = [], [], []
    with evaluating(pair), torch.no_grad(), seeded(seed, "simulated", device=x_like.device):
        latents = known_latents(pair, batch_like)
        with Spread(latents) as spread:
            batch, z = simulate(pair, batch_like)

        def weigh(wanted: Proposal, block: Tensor) -> tuple[Tensor, Tensor]:
            """Log-weights of K draws (K, n) for some rows, and of z* (1, n)."""
            sampler = wanted(pair, batch[block])
            if not isinstance(sampler, Sampler):
                raise PairError(f"proposal: {type(wanted).__name__} does not weigh given latents; return a Sampler")
            log_w = torch.cat([sampler(size) for size in sizes])
            return log_w.double(), sampler.at({name: value[:, block] for name, value in z.items()}).double()

        for block in torch.arange(len(batch), device=x_like.device).split(rows):
            log_w, exact = weigh(proposal, block)
            if repair is not None:
                bad = summarise(log_w.cpu()).unreliable.nonzero().flatten().to(x_like.device)
                if len(bad):
                    log_w[:, bad], exact[:, bad] = weigh(repair, block[bad])
            lower.append(log_mean_exp(log_w))
            upper.append(log_mean_exp(torch.cat([exact, log_w[1:]])))
            corrected.append(jackknife(log_w))
    below, above, without_bias = (torch.cat(part).cpu() for part in (lower, upper, corrected))
    weight = spread.log_weight.exp().double().cpu().expand(len(batch)) if spread.sites else None
    return Simulated(below, above, without_bias, num_particles, proposal.name, weight)


def known_latents(pair: Pair, batch: Batch) -> set[str]:
    """The names of a pair's latent sites.

    Raises:
        PairError: there are none, or log q at given latents is not known.
    """
    probe = draw(pair, batch)
    if not probe.latents:
        raise PairError(NO_LATENTS)
    if auxiliary := set(probe.log_guides) - set(probe.latents):
        raise PairError(f"guide site '{min(auxiliary)}' is auxiliary, so that q(z|x) at a given z is not known")
    return set(probe.latents)


class Spread(Messenger):
    """Draw latent sites of few states from their prior and uniformly, half and half.

    Of a vector of independent numbers, as `Bernoulli(...).to_event(1)` has them, one at random is drawn so.

    Args:
        latents: The sites' names.

    Attributes:
        sites: Those that were drawn so, at most `MOST_SPREAD`: each may double a row's weight.
        log_weight: Of the prior to what was drawn from, shape (N,) if any were.
    """

    def __init__(self, latents: set[str]) -> None:
        super().__init__()
        self.latents = latents
        self.sites: list[str] = []
        self.log_weight = torch.zeros(())

    def _pyro_sample(self, msg: dict) -> None:
        p, vectors = msg["fn"], 0  # dimensions of numbers that are drawn independently
        if msg["name"] not in self.latents or msg["done"] or len(self.sites) >= MOST_SPREAD:
            return
        drawn = p.sample()
        while isinstance(p, torch.distributions.Independent):
            p, vectors = p.base_dist, vectors + p.reinterpreted_batch_ndims
        if not getattr(p, "has_enumerate_support", False) or isinstance(p, dist.MaskedDistribution):
            return
        event = len(p.event_shape)  # 1 for a state that is a vector itself, as of OneHotCategorical
        batch = drawn.shape[: drawn.ndim - event - vectors]
        states = p.enumerate_support(expand=False).reshape(-1, *p.event_shape)
        numbers = drawn.clone().reshape(batch.numel(), -1, *p.event_shape)
        rows = torch.arange(len(numbers), device=drawn.device)
        rows = rows[torch.rand(len(rows), device=drawn.device) < 0.5]
        at = torch.randint(numbers.shape[1], rows.shape, device=drawn.device)
        numbers[rows, at] = states[torch.randint(len(states), rows.shape, device=drawn.device)]
        z = numbers.reshape(drawn.shape)
        # Of all ways to z, the share that changed number j has the density p(z) / (S p_j(z_j)).
        ratio = -p.log_prob(z).reshape(*numbers.shape[:2]) - math.log(len(states))
        changed = torch.logsumexp(ratio, 1) - math.log(numbers.shape[1])
        self.log_weight = self.log_weight + math.log(2) - torch.logaddexp(torch.zeros_like(changed), changed)
        self.sites.append(msg["name"])
        msg["value"], msg["done"] = z, True


def like(batch: Batch, rows: int = SIMULATED_ROWS) -> Batch:
    """So many rows of the shapes and types of a batch, to simulate data like, given what its rows are given."""
    return batch[torch.arange(rows, device=batch.x.device) % len(batch)]
