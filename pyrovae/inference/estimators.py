r"""Estimators: how the gradient of a bound is estimated from draws.

A bound L of P particles is a function of `terms` t_k of each, drawn from q(z_k|x). The guide's parameters act on it in
two ways: through the terms, and through the draws. An estimator makes numbers of each particle by itself, its
`strands`, and a `surrogate` of them, whose value is the bound and whose gradient is the estimate. By the chain rule it
is a sum over particles, so that they may be drawn in chunks; and all of it is tensor operations, which are compiled as
they are. With s_k = dL/dt_k, and v_k the w_k^(1 - alpha) divided by their sum:

    reparameterised    z_k = g(e_k, phi), and the derivative of L as it stands
    score function     grad L at fixed draws + (L - b) sum_k grad log q(z_k). A b that does not depend on the draws
                       changes the variance alone: it is the mean bound of the other rows of the batch, which needs no
                       memory of earlier steps
    leave one out      grad L at fixed draws + sum_k (L - L_-k) grad log q(z_k), where L_-k has in the place of t_k the
                       mean of the others' terms. Of the ELBO that is each particle against the mean of the others; of
                       IWAE's bound, VIMCO
    sticking the landing
                       reparameterised, without its part sum_k s_k grad log q(z_k) at fixed draws. Of a mean of terms
                       that has expectation 0; of IWAE's bound with K > 1 it has not, and to leave it out is a bias
    doubly reparameterised
                       for that part, its expectation reparameterised once more, - sum_k (ds_k / dlog w_k) grad log w_k
                       through the draws. Together they are sum_k (alpha v_k + (1 - alpha) v_k^2) grad log w_k through
                       the draws: of IWAE's bound, with the squares of the weights
    largest weight     reparameterised, of max_k log w_k: VR-max
    wake-sleep         of the model as IWAE's at fixed draws; of the guide sum_k v_k grad log q(z_k), which draws q(z|x)
                       to the posterior in KL(p || q), and is the gradient of no bound
    enumerated         discrete sites are summed over all their states, each weighted by its q
    relaxed            a discrete draw has the gradient of a continuous one on the same noise, straight through
    covariance         of the thermodynamic bound at fixed draws: see `pyrovae.inference.objectives.Thermodynamic`

References:
    Williams 1992, Simple statistical gradient-following algorithms, https://doi.org/10.1007/BF00992696
    Mnih and Rezende 2016, Variational Inference for Monte Carlo Objectives (VIMCO), https://arxiv.org/abs/1602.06725
    Roeder, Wu and Duvenaud 2017, Sticking the Landing, https://arxiv.org/abs/1703.09194
    Tucker et al. 2019, Doubly Reparameterized Gradient Estimators, https://arxiv.org/abs/1810.04152
    Li and Turner 2016, Renyi Divergence Variational Inference (VR-max), https://arxiv.org/abs/1602.02311
    Bornschein and Bengio 2015, Reweighted Wake-Sleep, https://arxiv.org/abs/1406.2751
    Jang, Gu and Poole 2017, Categorical Reparameterization with Gumbel-Softmax, https://arxiv.org/abs/1611.01144
    Masrani, Le and Wood 2019, The Thermodynamic Variational Objective, https://arxiv.org/abs/1907.00031
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import Joint, States
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import Particles, draw, drawn_sites, run, sample_sites
from pyrovae.settings import Positive, check_fields

# States of all discrete sites of a datum together, above which they are not summed.
MOST_STATES = 4096
# Distributions with relaxed draws.
RELAXED = (dist.Bernoulli, dist.OneHotCategorical)


class Bound(Protocol):
    """What an estimator knows of a bound.

    Attributes:
        order: alpha of the Renyi bound that it is, or None.
        gradients: The words of the estimators that are of it.
        gradient: The one that is used.
    """

    gradients: ClassVar[tuple[str, ...]]

    @property
    def gradient(self) -> "GradientEstimator": ...

    @property
    def num_particles(self) -> int: ...

    @property
    def num_averages(self) -> int: ...

    @property
    def order(self) -> float | None: ...

    def terms_of(self, particles: Particles) -> Tensor: ...

    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor: ...


class GradientEstimator(ABC):
    """How the gradient of a bound is estimated: a frozen value, part of an objective's identity.

    To write a new one, derive a frozen dataclass, and name its `word` in the `gradients` of the bounds that it is of.

    Attributes:
        word: What the command line calls it.
        least_particles: The fewest that it can be had of.
        analytic: KLs may be taken in closed form where the bound takes them so.
        reparameterises: It needs a reparameterised sampler at every site of the guide.
    """

    word: ClassVar[str]
    least_particles: ClassVar[int] = 1
    analytic: ClassVar[bool] = True
    reparameterises: ClassVar[bool] = True

    @final
    def check(self, bound: Bound) -> None:
        """Refuse settings that make no sense, and too few particles.

        Raises:
            UsageError: either.
        """
        check_fields(self)
        if bound.num_particles * bound.num_averages < self.least_particles:
            raise UsageError(few(self.word), settings=(f"gradient={self.word}", "K", "gradient=score-function"))

    def bias(self, bound: Bound) -> str:
        """Why its expectation is not the gradient of the bound; "" if it is."""
        return ""

    @abstractmethod
    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        """What the surrogate is made of, for each of K' particles by itself: shape (S, K', N)."""

    @abstractmethod
    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        """From strands of all draws, shape (N,): the value of the bound, and the gradient of the estimate."""


# ---------------------------------------------------------------------------------------------------- through the draws


class ThroughDraws(GradientEstimator):
    """The derivative of the bound as it stands, with draws that are functions of the guide's parameters."""

    held: ClassVar[tuple[str, ...]] = ()

    @final
    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        particles = draw(pair, batch, num_particles, held=self.held)
        check_reparameterised(particles, bound)
        return bound.terms_of(particles)


@dataclass(frozen=True)
class Reparameterised(ThroughDraws):
    """Through the draws; the guide's sites need reparameterised samplers."""

    word: ClassVar[str] = "reparameterised"

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return bound.combine(strands, **settings)


@dataclass(frozen=True)
class StickingTheLanding(ThroughDraws):
    """Through the draws alone, 0 where q is the posterior; biased with iwae and K > 1.

    The guide is run a second time, with its parameters held; KLs are taken at the draws.
    """

    word: ClassVar[str] = "sticking-the-landing"
    analytic: ClassVar[bool] = False
    held: ClassVar[tuple[str, ...]] = ("guide",)

    def bias(self, bound: Bound) -> str:
        if bound.order is None or bound.num_particles == 1:
            return ""
        return "what it leaves out has expectation 0 for K = 1 alone"

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return bound.combine(strands, **settings)


@dataclass(frozen=True)
class LargestWeight(ThroughDraws):
    """Through the draw of the largest weight alone, VR-max; biased."""

    word: ClassVar[str] = "vr-max"

    def bias(self, bound: Bound) -> str:
        return "" if bound.num_particles == 1 else "it is the gradient of the largest log-weight"

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        largest = in_groups(strands[0], bound).amax(1).mean(0)
        return bound.combine(strands, **settings).detach() + (largest - largest.detach())


@dataclass(frozen=True)
class DoublyReparameterised(GradientEstimator):
    """Through the draws, the guide's part weighted by squares of weights; unbiased, and less noisy as K grows.

    The guide is run a second time, with its parameters held.
    """

    word: ClassVar[str] = "doubly-reparameterised"

    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        """log w, whose gradient is by the model's parameters, and 0 with its gradient through the draws."""
        ratio: list[Tensor] = []

        def weigh(gradient: Tensor) -> Tensor:
            return gradient * ratio[0].reshape(*ratio[0].shape, *[1] * (gradient.ndim - 2))

        def weighed(value: Tensor) -> Tensor:
            if value.requires_grad:
                value = value.view_as(value)  # what the guide itself makes of the draw is not weighed
                value.register_hook(weigh)
            return value

        particles = draw(pair, batch, num_particles, held=("guide",), entering=weighed)
        check_reparameterised(particles, bound)
        return torch.stack(Parted.apply(particles.log_weights, ratio))

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        assert bound.order is not None
        log_weights, path = strands
        v = normalised(log_weights.detach(), bound)
        slope = bound.order * v + (1 - bound.order) * v.square()
        through = in_groups(path, bound)
        return bound.combine(log_weights.unsqueeze(0)) + (slope * through).sum(1).mean(0)


class Parted(torch.autograd.Function):
    """A value, and 0: what reaches the second backwards goes through draws, in its ratio to what reaches the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ratio: list[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.ratio = ratio
        return value.view_as(value), torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, whole: Tensor, path: Tensor) -> tuple[Tensor, None]:
        # Where a weight is negligible its square is.
        ctx.ratio[:] = [torch.where(whole == 0, 0.0, path / whole)]
        return whole, None


# ------------------------------------------------------------------------------------------------------ at fixed draws


class Scored(GradientEstimator):
    """At fixed draws, and of log q at these draws, weighted: of sites of any kind."""

    reparameterises = False

    @final
    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        """The bound's terms at fixed draws, and 0 with the gradient of log q."""
        particles = draw(pair, batch, num_particles, drawing=Fixed())
        score = particles.log_guide - particles.log_guide.detach()
        return torch.cat([bound.terms_of(particles), score.unsqueeze(0)])

    @final
    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        terms, score = strands[:-1], strands[-1]
        value = bound.combine(terms, **settings)
        with torch.no_grad():
            weights = self.weights(bound, terms.detach(), value.detach(), **settings)
        return value + (weights * score).sum(0)

    @abstractmethod
    def weights(self, bound: Bound, terms: Tensor, value: Tensor, **settings: Tensor | float) -> Tensor:
        """Those of grad log q(z_k), shape (P, N), given the bound's terms (T, P, N) and its value (N,)."""


@dataclass(frozen=True)
class ScoreFunction(Scored):
    """At fixed draws, and the bound times the score (REINFORCE), less the mean bound of the batch's other rows."""

    word: ClassVar[str] = "score-function"
    short: ClassVar[tuple[str, ...]] = ("reinforce",)

    def weights(self, bound: Bound, terms: Tensor, value: Tensor, **settings: Tensor | float) -> Tensor:
        others = (value.sum() - value) / max(1, len(value) - 1)
        return (value - others).expand(terms.shape[1:])


@dataclass(frozen=True)
class LeaveOneOut(Scored):
    """At fixed draws, and each particle's score times what the bound owes to it: of iwae, VIMCO; for K > 1."""

    word: ClassVar[str] = "leave-one-out"
    least_particles: ClassVar[int] = 2
    short: ClassVar[tuple[str, ...]] = ("vimco",)

    def weights(self, bound: Bound, terms: Tensor, value: Tensor, **settings: Tensor | float) -> Tensor:
        _, particles, rows = terms.shape
        others = (terms.sum(1, keepdim=True) - terms) / (particles - 1)
        left_out = torch.eye(particles, dtype=torch.bool, device=terms.device)[..., None]
        without = torch.where(left_out, others.unsqueeze(2), terms.unsqueeze(1))  # (T, which is left out, P, N)
        without = without.transpose(1, 2).flatten(2)
        return value - bound.combine(without, **settings).view(particles, rows)


@dataclass(frozen=True)
class WakeSleep(Scored):
    """The guide's part is of KL(p || q), of no bound, the model's that of iwae; for K > 1 (reweighted wake-sleep)."""

    word: ClassVar[str] = "wake-sleep"
    least_particles: ClassVar[int] = 2

    def bias(self, bound: Bound) -> str:
        return "the guide's part is of KL(p || q)"

    def weights(self, bound: Bound, terms: Tensor, value: Tensor, **settings: Tensor | float) -> Tensor:
        v = normalised(terms[0], bound).flatten(0, 1) / bound.num_averages
        return 2 * v  # log w has -log q in it once


@dataclass(frozen=True)
class Covariance(Scored):
    """Of the thermodynamic bound at fixed draws, by covariances of log w and the score; its bias falls as 1/K."""

    word: ClassVar[str] = "covariance"
    least_particles: ClassVar[int] = 2

    def bias(self, bound: Bound) -> str:
        return "it is the gradient of the bound in the limit of many particles"

    def weights(self, bound: Any, terms: Tensor, value: Tensor, **settings: Tensor | float) -> Tensor:
        found: Tensor = bound.deviations(in_groups(terms[0], bound)).flatten(0, 1)
        return found / bound.num_averages


class Fixed(Messenger):
    """Draws have no gradient."""

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


# ------------------------------------------------------------------------------------------------------- discrete sites


@dataclass(frozen=True)
class Enumerated(GradientEstimator):
    """Discrete sites summed over all of their states, without noise; other sites are reparameterised."""

    word: ClassVar[str] = "enumerated"
    reparameterises: ClassVar[bool] = False

    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        states = states_of(pair, batch)
        count, rows = len(next(iter(states.values()))), len(batch)
        # Views, in which a network sees that a state is the same for all data.
        at = {
            name: each[:, None].expand(num_particles, count, rows, *each.shape[1:]).flatten(0, 1)
            for name, each in states.items()
        }
        particles = draw(pair, batch, num_particles * count, at=at)
        check_reparameterised(particles, bound, besides=tuple(states))
        log_q = torch.stack([particles.log_guides[name] for name in states]).sum(0)
        q = log_q.exp()
        terms = bound.terms_of(particles).masked_fill(q == 0, 0.0)  # and not 0 times infinity
        return (q * terms).unflatten(1, (num_particles, count)).sum(2)

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return bound.combine(strands, **settings)


@dataclass(frozen=True)
class Relaxed(GradientEstimator):
    """Discrete draws with the gradient of relaxed ones (Gumbel-softmax, straight through); biased.

    Of sites that are Bernoulli or one-hot categorical; those with a reparameterised sampler are as they are.

    Args:
        temperature: Of the relaxed draws; less bias and more variance near 0.
    """

    word: ClassVar[str] = "relaxed"
    short: ClassVar[tuple[str, ...]] = ("gumbel-softmax",)
    reparameterises: ClassVar[bool] = False

    temperature: Positive = 0.5

    def bias(self, bound: Bound) -> str:
        return "the gradient of a discrete draw is that of a relaxed one"

    def strands(self, bound: Bound, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        relaxing = StraightThrough(self.temperature)
        particles = draw(pair, batch, num_particles, drawing=relaxing)
        if not relaxing.sites:
            raise PairError(
                "gradient=relaxed: the guide has no site that is Bernoulli or one-hot categorical; use "
                "`gradient=reparameterised`, or `gradient=leave-one-out` for other discrete sites",
                settings=("gradient=relaxed", "gradient=reparameterised", "gradient=leave-one-out"),
            )
        check_reparameterised(particles, bound, besides=tuple(relaxing.sites))
        return bound.terms_of(particles)

    def surrogate(self, bound: Bound, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return bound.combine(strands, **settings)


class StraightThrough(Messenger):
    """Draw from discrete sites with the gradient of a relaxed draw, on the same noise.

    Attributes:
        sites: Where it did.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.sites = temperature, list[str]()

    def _pyro_sample(self, msg: dict) -> None:
        fn = innermost(msg["fn"])
        if msg["is_observed"] or msg["done"] or not isinstance(fn, RELAXED):
            return
        u = torch.rand(fn.batch_shape + fn.event_shape, dtype=fn.logits.dtype, device=fn.logits.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2)
        if isinstance(fn, dist.Bernoulli):
            logits = fn.logits + u.log() - (-u).log1p()
            soft, hard = (logits / self.temperature).sigmoid(), (logits > 0).to(u.dtype)
        else:
            logits = fn.logits - (-u.log()).log()
            soft = (logits / self.temperature).softmax(-1)
            hard = one_hot(logits.argmax(-1), logits.shape[-1]).to(u.dtype)
        msg["value"], msg["done"] = hard + (soft - soft.detach()), True
        self.sites.append(msg["name"])


def innermost(fn: Any) -> Any:
    """A distribution without the `to_event` around it."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def states_of(pair: Pair, batch: Batch) -> dict[str, Tensor]:
    """The states of the guide's discrete sites, all combinations: by site, each of shape (states, *event).

    Raises:
        PairError: it has no discrete site of finitely many states, or they are too many.
    """
    with torch.no_grad():
        sites = drawn_sites(sample_sites(run(pair.guide, "guide", batch, 1)))
    joint = Joint({name: states for name, site in sites.items() if (states := States.of(site["fn"]))})
    if not joint:
        raise PairError(
            "gradient=enumerated: the guide has no discrete site of finitely many states to sum over; use "
            "`gradient=reparameterised`",
            settings=("gradient=enumerated", "gradient=reparameterised"),
        )
    if joint.count > MOST_STATES:
        raise PairError(
            f"guide site '{', '.join(joint)}': has {joint.count:.6g} states, and at most {MOST_STATES} are summed; use "
            "`gradient=leave-one-out` with several particles, or `gradient=score-function`",
            settings=("gradient=leave-one-out", "gradient=score-function"),
        )
    return joint.at(torch.arange(joint.count, device=batch.x.device))


# --------------------------------------------------------------------------------------------------------------- shared


def in_groups(values: Tensor, bound: Bound) -> Tensor:
    """Values of M * K particles, shape (M * K, N), as (M, K, N)."""
    return values.unflatten(0, (bound.num_averages, bound.num_particles))


def normalised(log_weights: Tensor, bound: Bound) -> Tensor:
    """w_k^(1 - alpha) divided by their sum over k, shape (M, K, N)."""
    assert bound.order is not None
    return ((1 - bound.order) * in_groups(log_weights, bound)).softmax(1)


def few(word: str) -> str:
    """What to say of too few particles."""
    return f"gradient={word}: needs several particles, got one; raise `K`, or use `gradient=score-function`"


def check_reparameterised(particles: Particles, bound: Bound, besides: tuple[str, ...] = ()) -> None:
    """Refuse a gradient that would silently be zero.

    Args:
        particles: Draws.
        bound: Whose gradient is estimated.
        besides: Sites that the estimator gives a gradient by other means.

    Raises:
        PairError: another site has no reparameterised sampler, and parameters that ask for a gradient.
    """
    for name in (name for name in particles.latents if name not in besides):
        site = particles.guide_trace.nodes[name]
        # Of the site itself: a guide that is held has no gradient by its densities.
        if site["fn"].has_rsample or not site["fn"].log_prob(site["value"]).requires_grad:
            continue
        fn = innermost(site["fn"])
        fitting = {"enumerated": fn.has_enumerate_support, "relaxed": isinstance(fn, RELAXED)}
        able = (e.word for e in GRADIENTS if not e.reparameterises and e.word in bound.gradients)
        words = [word for word in able if fitting.get(word, True) and word != bound.gradient.word]
        remedies = tuple(f"gradient={word}" for word in words)
        raise PairError(
            f"guide site '{name}' ({type(fn).__name__}) has no reparameterised sampler, so that its parameters would "
            f"get a gradient without the score; use {' or '.join(f'`{remedy}`' for remedy in remedies)}",
            settings=remedies,
        )


USUAL = Reparameterised()
# Those that have a name on the command line; the first is the default.
GRADIENTS = (
    Reparameterised,
    ScoreFunction,
    LeaveOneOut,
    StickingTheLanding,
    DoublyReparameterised,
    LargestWeight,
    WakeSleep,
    Enumerated,
    Relaxed,
    Covariance,
)
