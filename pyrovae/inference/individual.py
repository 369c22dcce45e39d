r"""Individual inference: a Gaussian fitted to each datum by itself, without a network in between.

For one datum x and its latents as an unconstrained vector u = m + L e, e ~ N(0, I) (`Unconstrained`), fit

    q(u) = N(m, L L')        L lower triangular ("full") or diagonal ("diagonal")

to the datum's ELBO(m, L) = E log p(x, u) - log q(u). With r = L' d/du log p(x, u) + e, the gradient in coordinates
where q is N(0, I) is

    g_m = E r        g_L = E tril(r e')        (for "diagonal" only the diagonal of g_L)

In those coordinates the Fisher information is the identity (twice it, on the diagonal of L), so that following them,

    m <- m + rate L g_m        L <- L T,  T = rate g_L below the diagonal and exp(rate g_L) on it,

is a natural-gradient ascent, the same whatever the units of u. "+ e" is the path derivative of -log q: where q is the
posterior r = 0 for every draw, and the noise of the gradient vanishes with the error. Draws come in pairs e, -e, and
the rate falls to 0 along a cosine.

All data of a block are fitted at once. The pair's own parameters get no gradient.

References:
    Cremer, Li and Duvenaud 2018, Inference Suboptimality in Variational Autoencoders, https://arxiv.org/abs/1801.03558
    Roeder, Wu and Duvenaud 2017, Sticking the Landing, https://arxiv.org/abs/1703.09194
    Lin, Nielsen, Khan and Schmidt 2021, Structured Natural-Gradient Descent Using Local Parameterizations,
        https://arxiv.org/abs/2102.07405
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.gaussians import Family
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import Proposal, Sampler, particles_in
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.weights import draw
from pyrovae.settings import Count, Positive, check_fields

RATE = 0.3
# For "full", RATE is at most this times sqrt(draws / U): each step multiplies L by a noise of relative variance
# rate^2 U / draws, and a walk of several hundred steps diverges when that is above about 0.15.
MATRIX_RATE = 0.25
# Draws on which the start and the end of a fit are compared.
COMPARED = 200


@dataclass(frozen=True)
class FittedGaussian:
    """N(loc, L L') over the unconstrained latents u of each datum.

    Attributes:
        loc: m, shape (N, U).
        scale: L: standard deviations of shape (N, U), or lower triangular of shape (N, U, U).
        space: The pair at these data, as functions of u.
    """

    loc: Tensor
    scale: Tensor
    space: Unconstrained = field(repr=False)

    @property
    def scale_tril(self) -> Tensor:
        """L as a matrix, shape (N, U, U)."""
        return torch.diag_embed(self.scale) if self.scale.ndim == 2 else self.scale

    @property
    def log_det(self) -> Tensor:
        """log det L, shape (N,)."""
        diagonal = self.scale if self.scale.ndim == 2 else self.scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def at(self, noise: Tensor) -> Tensor:
        """u = m + L e for e of shape (K, N, U)."""
        if self.scale.ndim == 2:
            return self.loc + self.scale * noise
        return self.loc + (self.scale @ noise.permute(1, 2, 0)).permute(2, 0, 1)

    def density_at(self, noise: Tensor) -> Tensor:
        """log q(m + L e), shape (K, N)."""
        return -0.5 * noise.square().sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1] - self.log_det

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u) in nats for u of shape (K, N, U), shape (K, N)."""
        away = u - self.loc
        if self.scale.ndim == 2:
            return self.density_at(away / self.scale)
        solved = torch.linalg.solve_triangular(self.scale, away.permute(1, 2, 0), upper=False)
        return self.density_at(solved.permute(2, 0, 1))

    def widened(self, factor: float) -> "FittedGaussian":
        """N(m, factor^2 L L')."""
        return FittedGaussian(self.loc, self.scale * factor, self.space)

    def draw(self, num_particles: int) -> Tensor:
        """Draws of u, shape (K, N, U)."""
        return self.at(torch.randn(num_particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_weights(self, num_particles: int) -> Tensor:
        """log p(x, u) - log q(u) of fresh draws in nats, shape (K, N)."""
        noise = torch.randn(num_particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.log_weights_at(noise)

    def log_weights_at(self, noise: Tensor) -> Tensor:
        """log p(x, u) - log q(u) at u = m + L e, shape (K, N)."""
        with torch.no_grad():
            return self.space.log_joint(self.at(noise)) - self.density_at(noise)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        """The same as a Pyro guide of the pair, for these data and no others."""
        fitted_to = self.space.batch.tensors
        if len(fitted_to) != 1 + len(given) or not all(map(alike, (x, *given), fitted_to)):
            raise UsageError("x: expected the data that the Gaussian was fitted to; fit it to these")
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)
            u = pyro.sample("u", q, infer={"is_auxiliary": True})
            values, log_det = self.space.split(u.reshape(-1, *self.loc.shape))
            batch = u.shape[:-1]
            # The density of z is that of u over |dz/du|: all of it is told at the first site.
            log_density = -log_det.reshape(batch)
            for name, value in values.items():
                event_shape = value.shape[2:]
                z = value.reshape(batch + event_shape)
                pyro.sample(name, dist.Delta(z, log_density, event_dim=len(event_shape)))
                log_density = torch.zeros_like(log_density)

    def elbo(self, num_particles: int = 1000, chunk_size: int = 100) -> tuple[Tensor, Tensor]:
        """The ELBO of each datum from fresh draws, and its standard error, in nats, both of shape (N,)."""
        sizes = [min(chunk_size, num_particles - done) for done in range(0, num_particles, chunk_size)]
        log_w = torch.cat([self.log_weights(size).double() for size in sizes])
        return log_w.mean(0), log_w.std(0) / math.sqrt(num_particles)


@dataclass(frozen=True)
class Individual(Proposal):
    """A Gaussian fitted to each datum, over its unconstrained latents.

    Args:
        family: Covariance of the Gaussian: "full" or "diagonal".
        steps: Steps of the fit. Each takes `draws` evaluations of the gradient of log p(x, z) for each datum.
        draws: Draws at each step, an even number. More make a step less noisy, and for "full" longer.
        widen: Factor of the Gaussian's standard deviations when it is weighted. Gaussians fitted by the ELBO are a
            little too narrow, and their weights' tails a little too heavy.
    """

    word = "individual"
    of_each_row = True
    has_guide = True

    family: Family = "full"
    steps: Count = 200
    draws: Count = 16
    widen: Positive = 1.05

    def __post_init__(self) -> None:
        check_fields(self)
        if self.draws % 2:
            raise UsageError(f"draws: expected an even number, since they come in pairs, got {self.draws}")

    @property
    def name(self) -> str:
        """What estimates call it."""
        return f"importance sampling from a {self.family} Gaussian fitted to each datum (widened by {self.widen:g})"

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        # The draws of the fit are not those that are weighted.
        q = self.fit(pair, batch).widened(self.widen)

        def at(values: dict[str, Tensor]) -> Tensor:
            u = q.space.join(draw(pair, batch, particles_in(values), values))
            return q.space.log_joint(u) - q.log_prob(u)

        return Sampler(q.log_weights, at)

    def as_guide(self, pair: Pair, batch: Batch) -> Callable:
        return self.fit(pair, batch).widened(self.widen).guide

    def fit(self, pair: Pair, batch: Batch) -> FittedGaussian:
        """Fit a Gaussian to each datum's ELBO, starting from the guide's moments.

        For each datum the better of start and end is returned, as compared on draws of their own.

        Args:
            pair: The pair.
            batch: N rows of data, fitted all at once.

        Raises:
            PairError: a latent site is discrete, or the guide has auxiliary sites.
        """
        with evaluating(pair):
            start = moments(Unconstrained(pair, batch), self.family)
            end, size = start, start.loc.shape[1]
            matrix_rate = min(RATE, MATRIX_RATE * math.sqrt(self.draws / size)) if self.family == "full" else RATE
            for step in range(self.steps):
                decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
                g_m, g_L = gradient(end, self.draws)
                end = moved(end, RATE * decay * bounded(g_m), matrix_rate * decay * bounded(g_L))
            return better(start, end)


@torch.no_grad()
def moments(space: Unconstrained, family: str) -> FittedGaussian:
    """The Gaussian with the moments of the guide's draws."""
    probe = space.draw(2)
    size = probe.shape[-1]
    count = 500 if family == "diagonal" else max(500, 40 * size)
    # Sums in double precision, around a draw, in chunks: as many draws as a covariance needs are many.
    centre = probe[0].double()
    first = torch.zeros_like(centre)
    second = torch.zeros_like(centre if family == "diagonal" else centre[..., None] * centre[..., None, :])
    for done in range(0, count, 250):
        away = space.draw(min(250, count - done)).double() - centre
        first = first + away.sum(0)
        second = second + (torch.einsum("kni,knj->nij", away, away) if family == "full" else away.square().sum(0))
    mean = first / count
    if family == "diagonal":
        scale = (second / count - mean.square()).clamp(min=1e-12).sqrt()
    else:
        covariance = second / count - mean[:, :, None] * mean[:, None, :]
        # A little more variance, so that draws that leave out a direction have a Cholesky factor too.
        covariance.diagonal(dim1=-2, dim2=-1).clamp_(min=1e-12).mul_(1 + 1e-6)
        scale = torch.linalg.cholesky_ex(covariance).L
    return FittedGaussian((centre + mean).to(probe.dtype), scale.to(probe.dtype), space)


def gradient(q: FittedGaussian, draws: int) -> tuple[Tensor, Tensor]:
    """g_m of shape (N, U), and g_L of the shape of L, from that many draws for each datum."""
    half = torch.randn(draws // 2, *q.loc.shape, dtype=q.loc.dtype, device=q.loc.device)
    noise = torch.cat([half, -half])
    with torch.enable_grad():
        u = q.at(noise).requires_grad_()
        (slope,) = torch.autograd.grad(q.space.log_joint(u).sum(), u)
    if q.scale.ndim == 2:
        r = q.scale * slope + noise
        return r.mean(0), (r * noise).mean(0)
    r = (q.scale.mT @ slope.permute(1, 2, 0)).permute(2, 0, 1) + noise
    return r.mean(0), torch.einsum("kni,knj->nij", r, noise).tril() / draws


def bounded(step: Tensor) -> Tensor:
    """A step of shape (N, U) or (N, U, U), at most sqrt(U) long for each datum; none where it is not finite.

    That is a standard deviation, or a factor of e, in each coordinate: far from the posterior the gradient is no guide
    to how far to go.
    """
    length = step.flatten(1).norm(dim=1)
    factor = (math.sqrt(step.shape[1]) / length).clamp(max=1).reshape(-1, *[1] * (step.ndim - 1))
    return (step * factor).nan_to_num(0.0, 0.0, 0.0)


def moved(q: FittedGaussian, in_m: Tensor, in_L: Tensor) -> FittedGaussian:
    """q after a step in its own coordinates."""
    loc = q.at(in_m[None])[0]
    if q.scale.ndim == 2:
        return FittedGaussian(loc, q.scale * in_L.exp(), q.space)
    T = in_L.tril(-1) + torch.diag_embed(in_L.diagonal(dim1=-2, dim2=-1).exp())
    return FittedGaussian(loc, q.scale @ T, q.space)


def better(a: FittedGaussian, b: FittedGaussian) -> FittedGaussian:
    """For each datum the one with the higher ELBO, on common draws; a where neither is, or b's is not finite."""
    of_a = of_b = torch.zeros_like(a.loc[:, 0], dtype=torch.float64)
    for _ in range(COMPARED // 20):
        noise = torch.randn(20, *a.loc.shape, dtype=a.loc.dtype, device=a.loc.device)
        of_a = of_a + a.log_weights_at(noise).double().sum(0)
        of_b = of_b + b.log_weights_at(noise).double().sum(0)
    take_b = of_b.isfinite() & ~(of_a >= of_b)
    wide = take_b.reshape(-1, *[1] * (a.scale.ndim - 1))
    return FittedGaussian(torch.where(take_b[:, None], b.loc, a.loc), torch.where(wide, b.scale, a.scale), a.space)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, with NaN, as what is missing of rows, in the same places."""
    if torch.equal(one, other):
        return True
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
