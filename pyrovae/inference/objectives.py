r"""Objectives: lower bounds on log p(x), per datum, in nats.

With log-weights log w_k = log p(x, z_k) - log q(z_k|x), z_k ~ q(z|x):

    ELBO            E log w  =  E log p(x|z) - KL(q(z|x) || p(z))
    beta-ELBO       E log p(x|z) - beta KL(q(z|x) || p(z))  =  ELBO - (beta - 1) KL(q(z|x) || p(z))
    IWAE            E log (1/K) sum_k w_k
    Renyi(alpha)    E 1/(1-alpha) log (1/K) sum_k w_k^(1-alpha)
    thermodynamic   E sum_j (b_j+1 - b_j) sum_k v_jk log w_k,  v_jk = w_k^b_j / sum_l w_l^b_j,  0 = b_0 < ... < b_J = 1

A KL is never negative: with beta > 1 the beta-ELBO is a lower bound still, looser than the ELBO by (beta - 1) KL; with
beta < 1 it may exceed log p(x). Renyi(0) is the IWAE bound, alpha -> 1 is the ELBO.

An objective is a value: two that print alike are alike, and what prints is what a resumed run compares. It makes
`terms` of draws, (T, K, N) numbers of single particles and data, and `combine`s them to the bound; what depends on the
gradient step (beta) are its `settings`, which are recorded, and are inputs of compiled steps. Each is a
`pyro.infer.ELBO` besides: it plugs into `pyro.infer.SVI`, and `objective(model, guide)` is a torch module whose
forward(x) is the loss, -bound summed over the batch. How its gradient is estimated is its `gradient`
(`pyrovae.inference.estimators`): the value reported is the bound itself, never a surrogate for its gradient.

The thermodynamic bound follows the path from q(z|x) at b = 0 to p(x, z) at b = 1, log p(x) being the integral of a
function that does not fall,

    log p(x) = int_0^1 E_b log w db,        E_b the expectation under q(z|x)^(1 - b) p(x, z)^b, normalised,

so that its left Riemann sum is below it and its right one above. With K draws of q(z|x), weighted by w_k^b, E_b log w
is the derivative by b of a convex function, c(b) = log (1/K) sum_k w_k^b, from c(0) = 0 to c(1), IWAE's bound: for the
same draws the left sum is never above that, nor the right one below, whatever K and the grid.

References:
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Li and Turner 2016, Renyi Divergence Variational Inference, https://arxiv.org/abs/1602.02311
    Higgins et al. 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl
    Masrani, Le and Wood 2019, The Thermodynamic Variational Objective, https://arxiv.org/abs/1907.00031
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimators import USUAL, GradientEstimator
from pyrovae.inference.kl import kl_terms
from pyrovae.inference.pair import Pair
from pyrovae.inference.schedules import Capacity, Constant, Constraint, Schedule
from pyrovae.inference.weights import Particles, draw, log_mean_exp

# Closer to 1 than this, Renyi's bound differs from the ELBO by less than its rounding error.
ALPHA_TOLERANCE = 1e-4


@dataclass
class Taken:
    """How many losses were differentiated, for loops that keep no count of steps: SVI's, and one in torch.

    Attributes:
        steps: How many.
        beta: What a constraint has adapted it to.
    """

    steps: int = 0
    beta: Tensor | None = None


class Objective(PyroELBO, ABC):
    """What is maximised, of a pair and a batch.

    To write a new bound, derive a frozen dataclass from `ImportanceWeighted` or, for what is more than log-weights,
    from `OfParticles`; fields are its identity.

    Attributes:
        num_particles: K.
        num_averages: M; M * K particles are drawn at once.
        of_particles: It is made of terms of single particles, which may be drawn in chunks.
        word: What the command line calls it, for one of `OBJECTIVES`.
        title: What tables call it.
        usual_particles: K there, unless given.
        keeps_last: Whether the last epoch is kept and not the best by the bound, which is not what it asks for.
        train_name: What the mean of what is maximised over training rows is recorded as: a bound, unless it is none.
        others: Names, in the record, of the losses that others than the pair minimise, such as an adversary's: those of
            the last of the terms.
        rate: The learning rate of these others, as a multiple of the pair's.
    """

    num_particles: int
    num_averages: int
    of_particles: ClassVar[bool]
    keeps_last: ClassVar[bool] = False
    train_name: ClassVar[str] = "train_bound"
    others: ClassVar[tuple[str, ...]] = ()
    rate: float = 1.0

    def __init_subclass__(cls) -> None:
        """Refuse a subclass that writes anew what nothing would ask it for."""
        super().__init_subclass__()
        for name in ("bound", "bound_of", "loss_of", "differentiable_loss", "loss", "loss_and_grads", "chunks"):
            if name in vars(cls):
                raise UsageError(
                    f"{cls.__name__}: overrides {name}, which training does not ask for; write what the bound is in "
                    "`reduce`, or in `terms` and `combine`"
                )

    def __post_init__(self) -> None:
        for name, value in (("num_particles (K)", self.num_particles), ("num_averages (M)", self.num_averages)):
            check_count(name, value)

    @abstractmethod
    def draw(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        """Terms of that many draws, shape (T, num_particles, N); no gradient is asked of them."""

    @abstractmethod
    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        """From terms of all draws, the bound on log p(x), shape (N,); with `settings`, what is maximised."""

    @abstractmethod
    def strands(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        """What has the gradient of that many draws, the terms among them or not: shape (S, num_particles, N)."""

    @abstractmethod
    def surrogate(self, strands: Tensor, **settings: Tensor | float) -> Tensor:
        """From strands of all draws, what `combine` gives, with the estimate of its gradient; shape (N,)."""

    @abstractmethod
    def settings(self, step: int) -> dict[str, float]:
        """The numbers that depend on the gradient step, such as beta: recorded, and inputs of compiled steps."""

    @property
    def evaluated(self) -> "Objective":
        """The bound that is reported of a pair trained by it: itself, but for one with a penalty."""
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What adapts the beta of `settings` to what steps find; None: it depends on their number alone."""
        return None

    @final
    def losses_of_others(self, terms: Tensor) -> tuple[Tensor, ...]:
        """What others than the pair minimise, the last of the terms, each averaged over draws and summed over rows."""
        return tuple(loss.detach().mean(0).sum() for loss in terms[len(terms) - len(self.others) :])

    @property
    @final
    def taken(self) -> Taken:
        """The count of steps of loops that do not count by themselves; no part of the value.

        It goes on from one such loop to the next: where settings depend on the step, give each loop, as each `SVI`, an
        objective of its own. `fit` counts by itself.
        """
        return self.__dict__.setdefault("_taken", Taken())

    @final
    def chunks(self, most: int | None = None) -> list[int]:
        """The M * K particles in parts of at most `most`, as even as can be; None: in one."""
        total = self.num_averages * self.num_particles
        parts = math.ceil(total / (most or total))
        return [total // parts + (i < total % parts) for i in range(parts)]

    @final
    def bound(self, model: Callable, guide: Callable, x: Tensor, given: Sequence[Tensor] = ()) -> Tensor:
        """An estimate of what is maximised, per datum.

        Args:
            model: Pyro model, called as model(x, *given).
            guide: Pyro guide, called as guide(x, *given).
            x: Data, shape (N, *event).
            given: What everything is conditioned on, each of shape (N, ...).

        Returns:
            Bound in nats, shape (N,).

        Raises:
            PairError: the bound would not be per datum, or a gradient is asked for through a latent site that has no
                reparameterised sampler.
        """
        return self.bound_of(Pair(model, guide), Batch.of(x, given))

    @final
    def bound_of(self, pair: Pair, batch: Batch) -> Tensor:
        """`bound` of a pair whose modules are known: to look for them takes a third of a millisecond."""
        return self.bound_and_terms(pair, batch)[0]

    @final
    def bound_and_terms(self, pair: Pair, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is maximised after the steps taken, shape (N,), and the terms that it is made of, (T, M * K, N)."""
        draws, total = (self.strands, self.surrogate) if torch.is_grad_enabled() else (self.draw, self.combine)
        terms = draws(pair, batch, sum(self.chunks()))
        adapted = {} if self.taken.beta is None else {"beta": self.taken.beta}
        bound = total(terms, **self.settings(self.taken.steps) | adapted)
        check_per_datum(self, bound, len(batch))
        return bound, terms

    @final
    def loss_of(self, pair: Pair, batch: Batch) -> Tensor:
        """-bound summed over the batch, a differentiable scalar in nats; a step, if it is differentiated."""
        bound, terms = self.bound_and_terms(pair, batch)
        if torch.is_grad_enabled():
            if self.constraint is not None:
                beta = self.constraint.tensor(terms.device) if self.taken.beta is None else self.taken.beta
                self.taken.beta = self.constraint.adapted(beta, *self.constraint.observed(terms))
            self.taken.steps += 1
        return -bound.sum()

    @final
    def differentiable_loss(self, model: Callable, guide: Callable, x: Tensor, *given: Tensor) -> Tensor:
        """-bound summed over the batch, a differentiable scalar in nats."""
        return self.loss_of(Pair(model, guide), Batch.of(x, given))

    @final
    def loss(self, model: Callable, guide: Callable, x: Tensor, *given: Tensor) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, x, *given).item()

    @final
    def loss_and_grads(self, model: Callable, guide: Callable, x: Tensor, *given: Tensor) -> float:
        """The loss as a number; its gradient is added to the parameters. For `pyro.infer.SVI`."""
        pair = Pair(model, guide)
        pair.announce()
        loss = self.loss_of(pair, Batch.of(x, given))
        loss.backward()
        return loss.item()

    @final
    def __call__(self, model: Callable, guide: Callable) -> "Loss":
        """This objective of a pair, as a torch module."""
        return Loss(self, Pair(model, guide))

    @final
    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        """Pyro's own entry for traces; everything here goes through `draw`."""
        particles = draw(Pair(model, guide), Batch.of(args[0], args[1:]), sum(self.chunks()))
        return particles.model_trace, particles.guide_trace


class Loss(nn.Module):
    """An objective applied to a pair: `forward(x, *given)` is the loss, and `parameters()` what can be trained."""

    def __init__(self, objective: Objective, pair: Pair) -> None:
        super().__init__()
        self.objective, self.pair = objective, pair

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        """The loss of x (N, *event): -bound summed over the batch, in nats."""
        return self.objective.loss_of(self.pair, Batch.of(x, given))


class OfParticles(Objective):
    """A bound that averages M independent K-sample bounds, made of terms of each particle by itself.

    Attributes:
        gradient: How its gradient is estimated.
        gradients: The words of the estimators that are of it.
        order: alpha of the Renyi bound that it is; None: it is none.
    """

    of_particles = True
    gradient: GradientEstimator = USUAL
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised", "score-function", "leave-one-out", "relaxed")

    def __post_init__(self) -> None:
        super().__post_init__()
        word = getattr(self.gradient, "word", None)
        if word not in self.gradients:
            raise UsageError(
                f"gradient={word or repr(self.gradient)}: is none of {type(self).__name__}, which has "
                f"{', '.join(self.gradients)}",
                settings=(f"gradient={word}",),
            )
        self.gradient.check(self)

    @property
    def order(self) -> float | None:
        return None

    @abstractmethod
    def terms(self, particles: Particles) -> Tensor:
        """What the bound is made of, for each of K' particles by itself: shape (T, K', N)."""

    @final
    def draw(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        return self.terms_of(draw(pair, batch, num_particles))

    @final
    def strands(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        return self.gradient.strands(self, pair, batch, num_particles)

    @final
    def surrogate(self, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return self.gradient.surrogate(self, strands, **settings)

    @final
    def terms_of(self, particles: Particles) -> Tensor:
        """`terms`, looked at."""
        terms, shape = self.terms(particles), particles.log_weights.shape
        if terms.ndim != 3 or terms.shape[1:] != shape:
            raise UsageError(
                f"objective: the terms of {type(self).__name__} have shape {tuple(terms.shape)}, expected "
                f"(T, {shape[0]}, {shape[1]}) for {shape[0]} particles of {shape[1]} data; stack them along dimension 0"
            )
        return terms

    @final
    def of(self, particles: Particles) -> Tensor:
        """The bound on log p(x) from M * K particles, shape (N,); no beta in it."""
        return self.combine(self.terms(particles))


class ImportanceWeighted(OfParticles):
    """A bound that is a function of log-weights alone, the same at every step."""

    @abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The bound of K log-weights along dimension 1 of (M, K, N), shape (M, N)."""

    @final
    def terms(self, particles: Particles) -> Tensor:
        """The log-weights, shape (1, K', N)."""
        return particles.log_weights.unsqueeze(0)

    @final
    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        (log_weights,) = terms
        return self.reduce(log_weights.unflatten(0, (self.num_averages, self.num_particles))).mean(0)

    @final
    def settings(self, step: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Renyi(ImportanceWeighted):
    """The variational Renyi bound.

    Args:
        alpha: Order. 0 is IWAE, 1 the ELBO; below 0 it is an upper bound in expectation as K grows.
        num_particles: K.
        num_averages: M.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "renyi"
    title: ClassVar[str] = "Renyi"
    usual_particles: ClassVar[int] = 5

    gradients: ClassVar[tuple[str, ...]] = (
        "reparameterised",
        "score-function",
        "leave-one-out",
        "doubly-reparameterised",
        "vr-max",
        "relaxed",
    )

    alpha: float
    num_particles: int = 1
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise UsageError(f"alpha: expected a finite number, got {self.alpha!r}")

    @property
    def order(self) -> float:
        return self.alpha

    def reduce(self, log_weights: Tensor) -> Tensor:
        power = 1 - self.alpha
        if abs(power) < ALPHA_TOLERANCE:
            return log_weights.mean(1)
        return log_mean_exp(power * log_weights, 1) / power


@dataclass(frozen=True)
class IWAE(ImportanceWeighted):
    """The importance-weighted bound, Renyi's with alpha = 0.

    Args:
        num_particles: K.
        num_averages: M.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "iwae"
    title: ClassVar[str] = "IWAE"
    usual_particles: ClassVar[int] = 5
    gradients: ClassVar[tuple[str, ...]] = (
        "reparameterised",
        "score-function",
        "leave-one-out",
        "sticking-the-landing",
        "doubly-reparameterised",
        "vr-max",
        "wake-sleep",
        "relaxed",
    )

    num_particles: int = 1
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    @property
    def order(self) -> float:
        return 0.0

    def reduce(self, log_weights: Tensor) -> Tensor:
        return log_mean_exp(log_weights, 1)


@dataclass(frozen=True)
class Thermodynamic(ImportanceWeighted):
    """The thermodynamic bound (TVO): a left Riemann sum of log p(x), below IWAE's bound of the same draws.

    Args:
        num_particles: K.
        partitions: J, the terms of the sum; with 1 it is the ELBO.
        first: b_1, from where the grid goes to 1 in equal steps of log b.
        num_averages: M.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "thermodynamic"
    title: ClassVar[str] = "thermodynamic bound"
    usual_particles: ClassVar[int] = 5
    gradients: ClassVar[tuple[str, ...]] = (
        "reparameterised",
        "score-function",
        "leave-one-out",
        "relaxed",
        "covariance",
    )

    num_particles: int = 1
    partitions: int = 10
    first: float = 0.03
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("partitions", self.partitions)
        if not 0 < self.first < 1:
            raise UsageError(f"first: expected a number between 0 and 1, got {self.first!r}")

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """b_0 to b_J."""
        steps = self.partitions - 1
        return (0.0, *(self.first ** (1 - j / steps) for j in range(steps)), 1.0)

    def reduce(self, log_weights: Tensor) -> Tensor:
        return self.riemann(log_weights, self.grid[:-1])

    def upper(self, log_weights: Tensor) -> Tensor:
        """The right Riemann sum of K log-weights along dimension 1 of (M, K, N), shape (M, N): at least IWAE's."""
        return self.riemann(log_weights, self.grid[1:])

    def riemann(self, log_weights: Tensor, at: Sequence[float]) -> Tensor:
        """The sum with the integrand at one point of each interval."""
        pairs = zip(at, self.widths, strict=True)
        return sum(
            (width * ((b * log_weights).softmax(1) * log_weights).sum(1) for b, width in pairs),
            torch.zeros_like(log_weights[:, 0]),
        )

    def deviations(self, log_weights: Tensor) -> Tensor:
        """sum_j (b_j+1 - b_j) v_jk (log w_k - E_b_j log w), what weighs the score in the covariances; (M, K, N)."""
        total = torch.zeros_like(log_weights)
        for b, width in zip(self.grid[:-1], self.widths, strict=True):
            v = (b * log_weights).softmax(1)
            total = total + width * v * (log_weights - (v * log_weights).sum(1, keepdim=True))
        return total

    @property
    def widths(self) -> list[float]:
        """b_j+1 - b_j."""
        return [b - a for a, b in pairwise(self.grid)]


@dataclass(frozen=True)
class ELBO(OfParticles):
    """The evidence lower bound E log p(x|z) - beta KL(q(z|x) || p(z)).

    The KL of a site is analytic where it exists (see `analytic_kl`), else log q - log p at the draw; `kl_forms` tells
    which. With beta > 1 the value is a looser lower bound on log p(x); with beta < 1 it may exceed log p(x), as it may
    under a `Constraint` that is not tight, and under a `Capacity` while the KL is near C. `of` is the ELBO, whatever
    beta is.

    Args:
        num_particles: Number of draws averaged.
        beta: Weight of the KL: a number or a `Schedule`.
        num_averages: M; the same as more particles.
        kl: "auto", or "sampled" never to use the analytic form.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "elbo"
    title: ClassVar[str] = "ELBO"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = (
        "reparameterised",
        "score-function",
        "leave-one-out",
        "sticking-the-landing",
        "enumerated",
        "relaxed",
    )

    num_particles: int = 1
    beta: float | Schedule = 1.0
    num_averages: int = 1
    kl: str = "auto"
    gradient: GradientEstimator = USUAL

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl not in ("auto", "sampled"):
            raise UsageError(f"kl: expected auto or sampled, got {self.kl!r}")
        if isinstance(self.schedule, Capacity) and self.gradient.word in ("score-function", "leave-one-out"):
            raise UsageError(
                f"gradient={self.gradient.word}: is for a bound of each row by itself, and a capacity is of the "
                "batch's mean KL; use another beta",
                settings=(f"gradient={self.gradient.word}", "beta"),
            )

    @property
    def analytic(self) -> bool:
        """KLs are taken in closed form where there is one."""
        return self.kl == "auto" and self.gradient.analytic

    @cached_property
    def schedule(self) -> Schedule:
        """How beta depends on the step."""
        return self.beta if isinstance(self.beta, Schedule) else Constant(float(self.beta))

    @property
    def constraint(self) -> Constraint | None:
        return self.beta if isinstance(self.beta, Constraint) else None

    def terms(self, particles: Particles) -> Tensor:
        """log p(x|z) and KL(q(z|x) || p(z)) of all sites, shape (2, K', N)."""
        values, _ = kl_terms(particles, self.analytic)
        return torch.stack([particles.log_likelihood, sum(values.values(), torch.zeros_like(particles.log_likelihood))])

    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        log_likelihood, kl = terms.mean(1)
        return log_likelihood - (self.schedule.penalty(kl, **settings) if settings else kl)

    def settings(self, step: int) -> dict[str, float]:
        return self.schedule.settings(step)

    def kl_forms(self, particles: Particles) -> dict[str, str]:
        """By site, whether its KL is "analytic" or "sampled"."""
        return kl_terms(particles, self.analytic)[1]


# Those that have a name on the command line.
OBJECTIVES = (ELBO, IWAE, Renyi, Thermodynamic)


@dataclass(frozen=True, repr=False)
class FromPyro(Objective):
    """An objective of Pyro's own, which gives one number for a batch.

    Its bound is that of the whole batch: `combine` has shape (1,).

    Args:
        elbo: With a differentiable loss, such as `pyro.infer.Trace_ELBO()`.
    """

    elbo: PyroELBO
    num_particles: int = 1
    num_averages: int = 1
    of_particles: ClassVar[bool] = False

    def __repr__(self) -> str:
        plain = {k: v for k, v in vars(self.elbo).items() if v is None or isinstance(v, bool | int | float | str)}
        return f"{type(self.elbo).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(plain.items()))})"

    def draw(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        if torch.is_grad_enabled():
            loss = self.elbo.differentiable_loss(pair.model, pair.guide, *batch.tensors)
        else:
            loss = torch.tensor(float(self.elbo.loss(pair.model, pair.guide, *batch.tensors)), dtype=torch.float64)
        return -loss.reshape(1, 1, 1)

    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        return terms.reshape(1)

    def strands(self, pair: Pair, batch: Batch, num_particles: int) -> Tensor:
        return self.draw(pair, batch, num_particles)

    def surrogate(self, strands: Tensor, **settings: Tensor | float) -> Tensor:
        return self.combine(strands, **settings)

    def settings(self, step: int) -> dict[str, float]:
        return {}


def as_objective(objective: object) -> Objective:
    """An objective as it is, or one of Pyro's own by its adapter.

    Raises:
        UsageError: it is none, or has no differentiable loss.
    """
    if isinstance(objective, Objective):
        if not is_dataclass(type(objective)):
            raise UsageError(
                f"objective: {type(objective).__name__} is no value; write @dataclass(frozen=True) above it, with "
                "fields num_particles, num_averages and what else it depends on"
            )
        return objective
    if isinstance(objective, type):
        raise UsageError(f"objective: expected an object such as ELBO(), got the class {objective.__name__}")
    if not isinstance(objective, PyroELBO) or not hasattr(objective, "differentiable_loss"):
        raise UsageError(
            f"objective: {type(objective).__name__} has no differentiable_loss; use an objective of pyrovae.inference "
            "(Renyi and IWAE for RenyiELBO), or Pyro's Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO"
        )
    return FromPyro(objective)


def check_per_datum(objective: Objective, bound: Tensor, rows: int) -> None:
    """Refuse a bound that is not one number for each datum: its sum would be no sum over data."""
    if objective.of_particles and bound.shape != (rows,):
        raise UsageError(
            f"objective: the bound of {type(objective).__name__} has shape {tuple(bound.shape)} for {rows} data, "
            f"expected ({rows},), one number for each; reduce the dimension of particles alone"
        )
