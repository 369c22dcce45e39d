r"""Objectives: lower bounds on log p(x), per datum, in nats.

With log-weights log w_k = log p(x, z_k) - log q(z_k|x), z_k ~ q(z|x):

    ELBO            E log w  =  E log p(x|z) - KL(q(z|x) || p(z))
    beta-ELBO       E log p(x|z) - beta KL(q(z|x) || p(z))  =  ELBO - (beta - 1) KL(q(z|x) || p(z))
    IWAE            E log (1/K) sum_k w_k
    Renyi(alpha)    E 1/(1-alpha) log (1/K) sum_k w_k^(1-alpha)

A KL is never negative: with beta > 1 the beta-ELBO is a lower bound still, looser than the ELBO by (beta - 1) KL; with
beta < 1 it may exceed log p(x). Renyi(0) is the IWAE bound, alpha -> 1 is the ELBO. Each is a `pyro.infer.ELBO`: it
plugs into `pyro.infer.SVI`, and `objective(model, guide)` is a torch module whose forward(x) is the loss, -bound summed
over the batch. The value reported is the bound itself, never a surrogate for its gradient.

References:
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Li and Turner 2016, Renyi Divergence Variational Inference, https://arxiv.org/abs/1602.02311
    Higgins et al. 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl
    Burgess et al. 2018, Understanding disentangling in beta-VAE, https://arxiv.org/abs/1804.03599
    Fu et al. 2019, Cyclical Annealing Schedule, https://arxiv.org/abs/1903.10145
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrovae.checks import check_count
from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import Latent, Particles, draw, log_mean_exp

# Closer to 1 than this, Renyi's bound differs from the ELBO by less than its rounding error.
ALPHA_TOLERANCE = 1e-4


class Bound(nn.Module):
    """An objective applied to a pair: `forward(x)` is the loss, and `parameters()` what can be trained."""

    def __init__(self, objective: PyroELBO, pair: Pair) -> None:
        super().__init__()
        self.objective, self.pair = objective, pair

    def forward(self, x: Tensor) -> Tensor:
        """The loss of x (N, *event): -bound summed over the batch, in nats."""
        return self.objective.differentiable_loss(self.pair.model, self.pair.guide, x)


class Objective(PyroELBO):
    """A bound that averages M independent K-sample bounds.

    To write a new one, subclass and return the (N,) bound of an array of log-weights from `reduce`; if it depends on
    the gradient step, return the numbers that change from `schedule` and take them from `combine`.

    Args:
        num_particles: K.
        num_averages: M; M * K particles are drawn at once.

    Attributes:
        step: Number of gradient steps taken, on which schedules depend. It advances with every loss that is
            differentiated; a training loop that keeps count of its own sets it.
    """

    def __init__(self, num_particles: int = 1, num_averages: int = 1) -> None:
        for name, value in (("num_particles (K)", num_particles), ("num_averages (M)", num_averages)):
            check_count(name, value)
        super().__init__(num_particles=num_particles, max_plate_nesting=1)
        self.num_averages = num_averages
        self.step = 0

    @abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The bound of K log-weights along dimension 1 of (M, K, N), shape (M, N)."""

    def schedule(self) -> dict[str, float]:
        """The numbers that depend on `step`, such as beta: a compiled training step takes them as inputs."""
        return {}

    def terms(self, particles: Particles) -> Tensor:
        """What the bound is made of, for each particle by itself: shape (T, M * K, N). Here the log-weights, T = 1."""
        return particles.log_weights.unsqueeze(0)

    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        """From `terms`, the bound on log p(x), shape (N,); with the settings of `schedule`, what is maximised."""
        (log_weights,) = terms
        return self.reduce(log_weights.unflatten(0, (self.num_averages, self.num_particles))).mean(0)

    def of(self, particles: Particles) -> Tensor:
        """The bound on log p(x) from M * K particles, shape (N,); no beta in it."""
        return self.combine(self.terms(particles))

    def bound(self, model: Callable, guide: Callable, x: Tensor) -> Tensor:
        """An estimate of what is maximised, per datum.

        Args:
            model: Pyro model, called as model(x).
            guide: Pyro guide, called as guide(x).
            x: Data, shape (N, *event).

        Returns:
            Bound in nats, shape (N,).

        Raises:
            PairError: the bound would not be per datum, or a gradient is asked for through a latent site that has no
                reparameterised sampler.
        """
        return self.combine(self.draw(model, guide, x, self.num_averages * self.num_particles), **self.schedule())

    def draw(self, model: Callable, guide: Callable, x: Tensor, num_particles: int) -> Tensor:
        """`terms` of that many draws, shape (T, num_particles, N); arguments and errors as for `bound`."""
        particles = draw(Pair(model, guide), Batch(x), num_particles)
        if torch.is_grad_enabled():
            check_reparameterised(particles)
        return self.terms(particles)

    def chunks(self, most: int | None = None) -> list[int]:
        """The M * K particles in parts of at most `most`, as even as can be; None: in one."""
        total = self.num_averages * self.num_particles
        parts = math.ceil(total / (most or total))
        return [total // parts + (i < total % parts) for i in range(parts)]

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Tensor) -> Tensor:
        """-bound summed over the batch, a differentiable scalar in nats."""
        loss = -self.bound(model, guide, *args).sum()
        if torch.is_grad_enabled():
            self.step += 1
        return loss

    def loss(self, model: Callable, guide: Callable, *args: Tensor) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Tensor) -> float:
        """The loss as a number; its gradient is added to the parameters. For `pyro.infer.SVI`."""
        Pair(model, guide).announce()
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return loss.item()

    def __call__(self, model: Callable, guide: Callable) -> Bound:
        """This objective of a pair, as a torch module."""
        return Bound(self, Pair(model, guide))

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        """Pyro's own entry for traces; everything here goes through `draw`."""
        particles = draw(Pair(model, guide), Batch(args[0]), self.num_averages * self.num_particles)
        return particles.model_trace, particles.guide_trace


class Renyi(Objective):
    """The variational Renyi bound.

    Args:
        alpha: Order. 0 is IWAE, 1 the ELBO; below 0 it is an upper bound in expectation as K grows.
        num_particles: K.
        num_averages: M.
    """

    def __init__(self, alpha: float, num_particles: int = 1, num_averages: int = 1) -> None:
        super().__init__(num_particles, num_averages)
        if not math.isfinite(alpha):
            raise UsageError(f"alpha: expected a finite number, got {alpha!r}")
        self.alpha = alpha

    def reduce(self, log_weights: Tensor) -> Tensor:
        power = 1 - self.alpha
        if abs(power) < ALPHA_TOLERANCE:
            return log_weights.mean(1)
        return log_mean_exp(power * log_weights, 1) / power


class IWAE(Renyi):
    """The importance-weighted bound, Renyi's with alpha = 0.

    Args:
        num_particles: K.
        num_averages: M.
    """

    def __init__(self, num_particles: int = 1, num_averages: int = 1) -> None:
        super().__init__(0.0, num_particles, num_averages)


@dataclass(frozen=True)
class Schedule:
    """The weight beta of the KL as a function of the gradient step; here a constant."""

    end: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"beta: {name} must be a number of at least 0, got {value!r}")

    def beta(self, step: int) -> float:
        """beta after `step` gradient steps."""
        return self.end

    def values(self, step: int) -> dict[str, float]:
        """The numbers that change, after `step` gradient steps: what `penalty` takes, and the record shows."""
        return {"beta": self.beta(step)}

    def penalty(self, kl: Tensor, beta: Tensor | float) -> Tensor:
        """What is subtracted from E log p(x|z), given KL of shape (N,) and `values`, as tensor operations."""
        return beta * kl


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """From 0 to `end` in `steps` gradient steps, then constant."""

    steps: int = 1000

    def beta(self, step: int) -> float:
        return self.end * min(1.0, step / max(1, self.steps))


@dataclass(frozen=True)
class Cyclical(Schedule):
    """Every `period` steps from 0 linearly to `end` in the first `rise` of the period, then constant."""

    period: int = 1000
    rise: float = 0.5

    def beta(self, step: int) -> float:
        phase = (step % max(1, self.period)) / max(1, self.period)
        return self.end * min(1.0, phase / self.rise) if self.rise else self.end


@dataclass(frozen=True)
class Capacity(Schedule):
    """Penalty gamma |KL - C|, the mean KL of the batch drawn to a capacity C that grows from 0 to `end` in `steps`."""

    end: float = 25.0
    steps: int = 1000
    gamma: float = 10.0

    def beta(self, step: int) -> float:
        return self.gamma

    def capacity(self, step: int) -> float:
        """C in nats after `step` gradient steps."""
        return self.end * min(1.0, step / max(1, self.steps))

    def values(self, step: int) -> dict[str, float]:
        return {"beta": self.gamma, "capacity": self.capacity(step)}

    def penalty(self, kl: Tensor, beta: Tensor | float, capacity: Tensor | float = 0.0) -> Tensor:
        return (beta * (kl.mean() - capacity).abs()).expand_as(kl)


class ELBO(Objective):
    """The evidence lower bound E log p(x|z) - beta KL(q(z|x) || p(z)).

    The KL of a site is analytic where it exists (see `analytic_kl`), else log q - log p at the draw; `kl_forms` tells
    which, once a loss has been computed. With beta > 1 the value is a looser lower bound on log p(x); with beta < 1 it
    may exceed log p(x), as it may under a `Capacity` while the KL is near C. `of` is the ELBO, whatever beta is.

    Args:
        num_particles: Number of draws averaged.
        beta: Weight of the KL: a number or a `Schedule`.
        num_averages: M; the same as more particles.
        kl: "auto", or "sampled" never to use the analytic form.
    """

    def __init__(
        self, num_particles: int = 1, beta: float | Schedule = 1.0, num_averages: int = 1, kl: str = "auto"
    ) -> None:
        super().__init__(num_particles, num_averages)
        if kl not in ("auto", "sampled"):
            raise UsageError(f"kl: expected auto or sampled, got {kl!r}")
        self.beta = beta if isinstance(beta, Schedule) else Schedule(float(beta))
        self.kl = kl
        self.kl_forms: dict[str, str] = {}

    def reduce(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(1)

    def schedule(self) -> dict[str, float]:
        return self.beta.values(self.step)

    def terms(self, particles: Particles) -> Tensor:
        """log p(x|z) and KL(q(z|x) || p(z)) of all sites, shape (2, K, N)."""
        values, self.kl_forms = kl_terms(particles, self.kl == "auto")
        return torch.stack([particles.log_likelihood, sum(values.values(), torch.zeros_like(particles.log_likelihood))])

    def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
        log_likelihood, kl = terms.mean(1)
        return log_likelihood - (self.beta.penalty(kl, **settings) if settings else kl)


def kl_terms(particles: Particles, analytic: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """KL(q || p) of each latent site, and the form it was taken in.

    Returns:
        {site: KL or log q - log p in nats, shape (K, N)} and {site: "analytic" or "sampled"}. Auxiliary sites of the
        guide are in the entry "auxiliary".
    """
    values: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, latent in particles.latents.items():
        kl = analytic_kl(latent) if analytic else None
        values[name] = latent.log_guide - latent.log_prior if kl is None else kl
        forms[name] = "sampled" if kl is None else "analytic"
    auxiliary = [name for name in particles.log_guides if name not in particles.latents]
    if auxiliary:
        values["auxiliary"] = torch.stack([particles.log_guides[name] for name in auxiliary]).sum(0)
        forms["auxiliary"] = "sampled"
    return values, forms


def analytic_kl(latent: Latent) -> Tensor | None:
    """KL(q || p) of a site in closed form, shape (K, N), or None.

    It exists where torch registers one, and between a full- or low-rank-covariance Gaussian and a factorised one. It
    may be used where neither distribution depends on the site's own value: in q(z1|x) q(z2|z1) against p(z2) p(z1|z2),
    p(z1|z2) depends on z1 through z2, and the closed form would be the KL of something else.
    """
    if latent.masked or not latent.ancestral:
        return None
    q = latent.guide
    if isinstance(q, dist.LowRankMultivariateNormal):  # torch's form takes each parameter to be of the batch's shape
        q = dist.LowRankMultivariateNormal(q.loc, q.cov_factor, q.cov_diag)
    try:
        return kl_divergence(q, with_covariance(latent.prior, q))
    except NotImplementedError:
        return None


def with_covariance(p: Any, q: Any) -> Any:
    """A factorised Gaussian p as a multivariate one when q is, since torch has no KL between the two classes."""
    correlated = isinstance(q, dist.MultivariateNormal | dist.LowRankMultivariateNormal)
    factorised = isinstance(p, dist.Independent) and isinstance(p.base_dist, dist.Normal)
    if correlated and factorised and p.event_dim == 1:
        return dist.MultivariateNormal(p.mean, scale_tril=torch.diag_embed(p.stddev))
    return p


def check_reparameterised(particles: Particles) -> None:
    """Refuse a gradient that would silently be zero."""
    for name, site in particles.guide_trace.nodes.items():
        if site["type"] != "sample" or name not in particles.latents:
            continue
        if not site["fn"].has_rsample and particles.latents[name].log_guide.requires_grad:
            raise PairError(
                f"guide site '{name}' ({type(site['fn']).__name__}) has no reparameterised sampler, so this objective "
                "would give its parameters a gradient without the score; use pyro.infer.Trace_ELBO (score function), "
                "or pyro.infer.TraceEnum_ELBO to sum a discrete site out"
            )
