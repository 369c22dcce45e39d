r"""Annealed importance sampling: log p(x) by chains that walk from a start r(z) to p(x, z).

In the unconstrained space of a pair (`pyrovae.inference.unconstrained`), with 0 = b_0 < b_1 < ... < b_T = 1 and
w(u) = p(x, u) / r(u), the path is

    log pi_t(u) = (1 - b_t) log r(u) + b_t log p(x, u) = log r(u) + b_t log w(u)

where r is the guide q(u|x), or the prior, whose w(u) is p(x|u). A chain draws u_0 ~ r, moves by kernels that leave
pi_1, ..., pi_{T-1} invariant, and weighs

    log w = sum_t (b_t - b_{t-1}) log w(u_{t-1}),    t = 1 .. T,        E w = p(x).

T = 1 is importance sampling from r. The kernels are Hamiltonian Monte Carlo with velocities v in units of scales s,

    v += (e/2) s grad log pi_t(u),    u += e s v,    v += (e/2) s grad log pi_t(u),    L times, v ~ N(0, I) before,

accepted with probability min(1, exp(-dH)), H = |v|^2 / 2 - log pi_t(u); a proposal that is no finite number is refused.
E w = p(x) holds for any e and s that do not depend on the chain that they move. They come, for each datum and
temperature, from a pilot run of chains of its own, and are frozen before any weighted chain starts: s are the standard
deviations of the pilot's chains on their way, e aims at an acceptance, but turns no further than a quarter of the
period of a Gaussian with these scales, e L <= pi/2, where a draw is independent of the last one. All chains of all
data move at once, as one tensor (C, N, U).

The bidirectional check. In data simulated from the model, (z*, x*) ~ p(z) p(x|z), z* is an exact draw of p(z|x*). A
chain that starts there and takes the same kernels in reverse order has E 1/w = 1/p(x*), so that with Jensen's
inequality, for C chains each way,

    E log (1/C) sum_c w_c  <=  E log p(x*)  <=  E -log (1/C) sum_c 1/w_c.

The C reverse chains share z*. The mean of 1/w needs no independence to have expectation 1/p(x*), so the right side is
an upper bound all the same, and never looser than the mean of log w_c; only its approach to log p(x*) as C grows ends
at what one z* allows. A longer path tightens both sides. The width bounds how far too low the left side is on average,
for data like those that the model itself makes: then use the setting forward on real data.

References:
    Neal 2001, Annealed Importance Sampling, https://arxiv.org/abs/physics/9803008
    Grosse, Ghahramani and Adams 2015, Sandwiching the Marginal Likelihood, https://arxiv.org/abs/1511.02543
    Wu et al. 2017, On the Quantitative Analysis of Decoder-Based Generative Models, https://arxiv.org/abs/1611.04273
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyrovae.checks import check_count
from pyrovae.errors import PairError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import MOST_STATES, summation
from pyrovae.inference.estimate import standard_error
from pyrovae.inference.marginal import ELEMENTS_AT_ONCE
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import Proposal, density, draw_prior
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import At, draw, log_mean_exp, log_prob, run, sample_sites
from pyrovae.seeding import keyed
from pyrovae.settings import Count, Number, check_fields

# Of the sigmoid schedule, as in Wu et al. 2017.
SIGMOID_WIDTH = 4.0
# The longest trajectory e L, in scales.
QUARTER_PERIOD = math.pi / 2
# The pilot: chains per datum, temperatures, and transitions at the first of them, where the step size is found; draws
# of r for the first scales, and the weight that the variance of the chains has in the next, for 16 are few.
PILOT_CHAINS = 16
PILOT_DRAWS = 256
PILOT_RATE = 0.3
PILOT_TEMPERATURES = 50
PILOT_WARMUP = 20
# Rows annealed at once.
ROWS_AT_ONCE = 100
# A setting is validated by a mean sandwich narrower than this, in nats.
VALIDATED_WIDTH = 0.1


@dataclass(frozen=True)
class Annealed(Proposal):
    """Chains of Hamiltonian Monte Carlo to p(z|x): annealed importance sampling.

    Args:
        temperatures: Steps of the path from the start to p(x, z), T.
        leapfrog: Leapfrog steps of each transition, L. A chain takes (T - 1) L gradients.
        start: Where chains start: "guide", or "prior", which asks nothing of the guide but its sites, and takes longer
            paths.
        schedule: Temperatures: "sigmoid", fine at both ends of the path, or "linear", even.
        acceptance: Acceptance that step sizes aim at.

    Raises:
        UsageError: an argument out of range; named.
    """

    word = "annealed"
    usual_particles = 32  # each takes thousands of gradients
    of_each_row = True
    of_chains = True

    temperatures: Count = 200
    leapfrog: Count = 5
    start: Literal["guide", "prior"] = "guide"
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    acceptance: Annotated[float, Number(above=0, below=1)] = 0.7

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """What estimates call it."""
        return (
            f"annealed importance sampling from the {self.start} ({self.temperatures} temperatures, {self.schedule}; "
            f"{self.leapfrog} leapfrog steps, acceptance {self.acceptance:g})"
        )

    def __call__(self, pair: Pair, batch: Batch) -> "Chains":
        """Tune the transitions to N rows of data in a pilot run."""
        return Chains(self, Unconstrained(pair, batch))

    def ladder(self, temperatures: int) -> list[float]:
        """b_0 = 0, ..., b_T = 1."""
        t = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            t = torch.sigmoid(SIGMOID_WIDTH * (2 * t - 1))
            t = (t - t[0]) / (t[-1] - t[0])
        return t.tolist()


@dataclass
class State:
    """Chains at u of shape (C, N, U): log r and log w there, each of shape (C, N), and their gradients."""

    u: Tensor
    log_r: Tensor
    log_w: Tensor
    grad_r: Tensor
    grad_w: Tensor

    def log_density(self, b: float) -> Tensor:
        """log pi at temperature b."""
        return self.log_r + b * self.log_w

    def gradient(self, b: float) -> Tensor:
        """Its gradient."""
        return self.grad_r + b * self.grad_w

    def where(self, accept: Tensor, other: "State") -> "State":
        """The other state where accepted (C, N), else this one."""
        chosen = {
            name: torch.where(accept.reshape(accept.shape + (1,) * (old.ndim - 2)), getattr(other, name), old)
            for name, old in vars(self).items()
        }
        return State(**chosen)


class Path:
    """log r and log w of a pair as functions of u, for C chains.

    Args:
        space: The pair at its data.
        start: r, "guide" or "prior".
        num_chains: C.

    Attributes:
        u: Draws of r, shape (C, N, U).
    """

    @torch.no_grad()
    def __init__(self, space: Unconstrained, start: str, num_chains: int) -> None:
        self.space, self.start, self.shape = space, start, (num_chains, len(space.batch))
        with unvalidated():  # distributions keep what they are made under
            at = draw_prior(space.pair, space.batch, num_chains) if start == "prior" else None
            particles = draw(space.pair, space.batch, num_chains, at)
        self.u = space.join(particles)
        # The guide of a single site does not depend on u: it need not be run again.
        self.guide_sites = sample_sites(particles.guide_trace) if len(space.transforms) == 1 else None

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(x, u), log q(u|x)), or (log p(x|u), log p(u)) where the prior is the start: each of shape (C, N)."""
        space, shape = self.space, self.shape
        values, log_det = space.split(u)
        log_likelihood, log_prior = space.of_model(values, log_det)
        if self.start == "prior":
            return log_likelihood, log_prior
        if self.guide_sites is None:
            log_guide = density(space.pair, space.batch, values)
        else:
            ((name, site),) = self.guide_sites.items()
            log_guide = log_prob({**site, "value": values[name]}, f"guide site '{name}'", shape)
        return log_likelihood + log_prior, log_guide + log_det

    def at(self, u: Tensor) -> State:
        """The state of chains at u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            a, r = self.parts(u)
            grad_a, grad_r = gradient(a, u), gradient(r, u)
        a, r, u = a.detach(), r.detach(), u.detach()
        if self.start == "prior":
            return State(u, r, a, grad_r, grad_a)
        return State(u, r, a - r, grad_r, grad_a - grad_r)


def gradient(log_density: Tensor, u: Tensor) -> Tensor:
    """Of each chain's log-density (C, N) in its own u: shape (C, N, U). That of no parameter is computed."""
    if not log_density.requires_grad:
        return torch.zeros_like(u)
    # Graphs of the two parts may share the transforms of u.
    (result,) = torch.autograd.grad(log_density.sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if result is None else result


def transition(path: Path, old: State, b: float, step: Tensor, leapfrog: int) -> tuple[State, Tensor]:
    """One step of Hamiltonian Monte Carlo, which leaves pi at temperature b invariant.

    Args:
        path: The densities.
        old: Where the chains are.
        b: Temperature.
        step: e s, shape (N, U).
        leapfrog: L.

    Returns:
        Where the chains are then, and the probability that they had to move, shape (C, N).
    """
    new, start = old, torch.randn_like(old.u)
    v = start + step / 2 * old.gradient(b)
    for i in range(leapfrog):
        u = new.u + step * v
        # Where u is no finite number neither is v, so that the proposal will be refused: spare the pair the sight.
        new = path.at(torch.where(u.isfinite(), u, old.u))
        v = v + (step if i < leapfrog - 1 else step / 2) * new.gradient(b)
    log_new = new.log_density(b)
    log_ratio = log_new - old.log_density(b) + (start.square() - v.square()).sum(-1) / 2
    probability = torch.where(log_new.isfinite(), log_ratio.clamp(max=0).exp().nan_to_num(0.0), 0.0)
    return old.where(torch.rand_like(probability) < probability, new), probability


class Chains:
    """A sampler of annealed log-weights for N rows of data, its transitions tuned and frozen.

    Args:
        annealed: The setting.
        space: The pair at these data.

    Attributes:
        step_sizes: e, shape (T - 1, N).
        scales: s, shape (T - 1, N, U).
    """

    def __init__(self, annealed: Annealed, space: Unconstrained) -> None:
        self.annealed, self.space = annealed, space
        self.betas = annealed.ladder(annealed.temperatures)
        self.step_sizes, self.scales = self.tune()
        self.accepted: list[Tensor] = []

    @property
    def acceptance(self) -> Tensor:
        """Mean acceptance of all chains run so far, shape (N,); NaN where there were no transitions."""
        if not self.accepted:
            return torch.full((len(self.space.batch),), math.nan)
        return torch.stack(self.accepted).mean(0)

    def __call__(self, num_chains: int) -> Tensor:
        """Log-weights of chains from the start to p(x, z), shape (C, N), in nats."""
        path = Path(self.space, self.annealed.start, num_chains)
        return self.run(path, path.u, range(self.annealed.temperatures))

    def reverse(self, u: Tensor) -> Tensor:
        """Log-weights of chains from exact draws u (C, N, U) of p(u|x) to the start, shape (C, N), in nats."""
        path = Path(self.space, self.annealed.start, len(u))
        return self.run(path, u, range(self.annealed.temperatures - 1, -1, -1))

    @torch.no_grad()
    def run(self, path: Path, u: Tensor, intervals: range) -> Tensor:
        """Weigh the intervals (b_t, b_{t+1}) of the path in this order, with transitions at the b between them."""
        accepted = []
        with unvalidated():
            state = path.at(u)
            log_w = torch.zeros_like(state.log_w, dtype=torch.float64)
            for t in intervals:
                log_w += (self.betas[t + 1] - self.betas[t]) * state.log_w.double()
                if t != intervals[-1]:
                    between = t if intervals.step > 0 else t - 1
                    step = self.step_sizes[between, :, None] * self.scales[between]
                    state, p = transition(path, state, self.betas[between + 1], step, self.annealed.leapfrog)
                    accepted.append(p.mean(0))
        self.accepted += accepted and [torch.stack(accepted).mean(0)]
        return log_w

    @torch.no_grad()
    def tune(self) -> tuple[Tensor, Tensor]:
        """Step sizes and scales at b_1, ..., b_{T-1}, from the chains of a pilot run on a path of its own length."""
        T, L = self.annealed.temperatures, self.annealed.leapfrog
        path = Path(self.space, self.annealed.start, PILOT_CHAINS)
        if T == 1:
            return path.u.new_zeros(0, path.u.shape[1]), path.u.new_zeros(0, *path.u.shape[1:])
        betas = self.annealed.ladder(PILOT_TEMPERATURES)[1:]
        log_most = math.log(QUARTER_PERIOD / L)
        draws = [Path(self.space, self.annealed.start, PILOT_CHAINS).u for _ in range(PILOT_DRAWS // PILOT_CHAINS)]
        variance = torch.cat(draws).var(0)
        scale = variance.sqrt()
        log_step = torch.full_like(scale[:, 0], min(log_most, -math.log(scale.shape[-1]) / 4))
        steps, scales = [], []
        with unvalidated():
            state = path.at(path.u)
            for i in range(1 - PILOT_WARMUP, PILOT_TEMPERATURES):
                state, p = transition(path, state, betas[max(i, 0)], log_step.exp()[:, None] * scale, L)
                log_step = (log_step + (p.mean(0) - self.annealed.acceptance) / 2).clamp(max=log_most)
                if i >= 0:
                    steps.append(log_step)
                    scales.append(scale)
                    variance = variance + PILOT_RATE * (state.u.var(0) - variance)
                    scale = variance.sqrt()
        nearest = [max(1, round(t * PILOT_TEMPERATURES / T)) - 1 for t in range(1, T)]
        return torch.stack(steps)[nearest].exp(), torch.stack(scales)[nearest]


@contextmanager
def unvalidated() -> Iterator[None]:
    """Let distributions of diverged proposals have any parameters: such proposals are refused, one by one."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@dataclass(frozen=True)
class Sandwich:
    """log p(x) of simulated data from both sides, in nats; all but `x` in double precision on the CPU.

    Attributes:
        x: The data, shape (N, *event).
        forward: log (1/C) sum_c w_c, not above log p(x) in expectation, shape (N,).
        reverse: -log (1/C) sum_c 1/w_c of reverse chains, not below log p(x) in expectation, shape (N,).
        acceptance: Of the transitions both ways, shape (N,); NaN where there are none.
        num_particles: C, each way.
        annealed: The setting.
        word: What a report calls it.
    """

    word: ClassVar[str] = "sandwich"

    x: Tensor
    forward: Tensor
    reverse: Tensor
    acceptance: Tensor
    num_particles: int
    annealed: Annealed

    @property
    def width(self) -> float:
        """Mean of reverse - forward over data: on average, `forward` is at most so much too low."""
        return (self.reverse - self.forward).mean().item()

    @property
    def error(self) -> float:
        """Standard error of `width` over data; NaN for a single one."""
        return standard_error(self.reverse - self.forward)

    @property
    def validated(self) -> bool:
        """Whether the width is below 0.1 nat even if it is two standard errors wider than seen."""
        return self.width + 2 * self.error < VALIDATED_WIDTH

    def summary(self) -> dict[str, Any]:
        """It as plain values: means over data."""
        return {
            "forward": self.forward.mean().item(),
            "reverse": self.reverse.mean().item(),
            "width": self.width,
            "width_error": self.error,
            "validated": self.validated,
            "simulated_data": len(self.forward),
            "acceptance": self.acceptance.mean().item(),
        }


@in_single_precision
def sandwich(
    model: Callable,
    guide: Callable,
    x_like: Tensor,
    num_particles: int = 16,
    annealed: Annealed | None = None,
    seed: int | None = None,
    given: Sequence[Tensor] = (),
) -> Sandwich:
    """Bound log p(x) of data simulated from the model from both sides: the bidirectional check.

    Chains move continuous latents. Where all are discrete and can be summed out, both sides are that sum.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        x_like: Says how many data of which shape, (N, *event); its values are only looked at by the model itself.
        num_particles: C chains for each datum each way. The verdict is on estimates of so many chains.
        annealed: The setting to be checked.
        seed: If given, the caller's random state is left as it was.
        given: What everything is conditioned on, tensors of shape (N, ...): row n is simulated given theirs.

    Raises:
        UsageError: num_particles < 1, or x_like is not a tensor with rows, or something in `given` has not as many.
        PairError: x cannot be simulated from the model, or the pair cannot be annealed, or its log-weights are not of
            log p(x), see `pyrovae.inference.validity`; the site is named.

    References:
        Grosse, Ghahramani and Adams 2015, Sandwiching the Marginal Likelihood, https://arxiv.org/abs/1511.02543
    """
    check_count("num_particles", num_particles)
    pair, like, annealed = Pair(model, guide), Batch.of(x_like, given, "x_like"), annealed or Annealed()
    sums = summation(pair, like, 1, MOST_STATES)
    check_pair(sums.pair, like, ROWS_AT_ONCE).by_parts("sandwich")
    if sums.is_exact:
        with evaluating(pair), torch.no_grad(), keyed(seed, "sandwich", device=x_like.device):
            batch = simulate(sums.pair, like)[0]
            known = sums(batch)
        return Sandwich(batch.x, known, known, torch.full_like(known, math.nan), num_particles, annealed)
    chunk = max(1, ELEMENTS_AT_ONCE // (x_like[0].numel() * min(len(like), ROWS_AT_ONCE) * 4))
    sizes = [min(chunk, num_particles - done) for done in range(0, num_particles, chunk)]
    forward, reverse, acceptance = [], [], []
    with (
        evaluating(pair),
        torch.no_grad(),
        keyed(seed, "sandwich", device=x_like.device),
    ):
        batch, z = simulate(pair, like)
        for rows in torch.arange(len(batch), device=x_like.device).split(ROWS_AT_ONCE):
            chains = annealed(pair, batch[rows])
            exact = {name: value[:, rows] for name, value in z.items()}
            u = chains.space.join(draw(pair, batch[rows], 1, exact))
            forward.append(log_mean_exp(torch.cat([chains(c) for c in sizes])))
            reverse.append(-log_mean_exp(-torch.cat([chains.reverse(u.expand(c, -1, -1)) for c in sizes])))
            acceptance.append(chains.acceptance.double())
    lower, upper, accepted = (torch.cat(part).cpu() for part in (forward, reverse, acceptance))
    return Sandwich(batch.x, lower, upper, accepted, num_particles, annealed)


def simulate(pair: Pair, like: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Data x (N, *event) of the model itself, given what `like` has, and the latents (1, N, *event) that made them.

    Where `like` has NaN, for what is missing of a row, x has NaN too.

    Raises:
        PairError: a site whose observation is not (a view of) x, or no distribution of x at all; it is named.
    """
    # A copy without gaps or overlaps, so that each observation is a view of elements of it.
    x_like = like.x.detach().clone(memory_format=torch.contiguous_format)
    with Simulate() as simulation:
        trace = run(pair.model, "model", Batch(x_like, like.given), 1)
    sites = sample_sites(trace)
    x, made = x_like.clone(), torch.zeros_like(x_like, dtype=torch.bool)
    for name, obs in simulation.observed.items():
        if isinstance(trace.nodes[name]["fn"], dist.Unit):
            raise PairError(
                f"model site '{name}' is a pyro.factor, from which no x can be drawn; declare the likelihood as a "
                "distribution, pyro.sample(..., obs=x), or anneal without the check on simulated data"
            )
        if not isinstance(obs, Tensor) or obs.untyped_storage().data_ptr() != x_like.untyped_storage().data_ptr():
            raise PairError(
                f"model site '{name}' observes no part of x as it came, but something computed from it, so that no x "
                "can be drawn from it; pass x as it is observed"
            )
        if obs.is_floating_point() and obs.isnan().any():  # what is missing of x is missing of the data like it
            sites[name]["value"] = sites[name]["value"].masked_fill(obs.isnan(), math.nan)
        where = (obs.shape, obs.stride(), obs.storage_offset())
        x.as_strided(*where).copy_(sites[name]["value"].reshape(obs.shape))
        made.as_strided(*where).fill_(True)
    if not made.all():
        raise PairError(
            f"x: the model observes {int(made.sum())} of its {made.numel()} numbers (sites: "
            f"{', '.join(simulation.observed) or 'none'}), so that the others cannot be drawn from it; pass as x what "
            "the model observes"
        )
    z = {name: site["value"] for name, site in sites.items() if name not in simulation.observed}
    # Run at the x that was drawn, the model must observe it under the very distribution that it was drawn from.
    batch = Batch(x, like.given)
    with At(z):
        again = sample_sites(run(pair.model, "model", batch, 1))
    for name in simulation.observed:
        drawn, seen = (log_prob(s[name], f"model site '{name}'", (1, len(batch))).double() for s in (sites, again))
        if not torch.allclose(drawn, seen, rtol=1e-4, atol=1e-4):
            raise PairError(
                f"model site '{name}': the model uses x elsewhere than as an observation, so that x cannot be drawn "
                "from it; anneal without the check on simulated data"
            )
    return batch, z


class Simulate(Messenger):
    """Draw observed sites like latent ones, and keep what they observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic", False):
            self.observed[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"] = False, None
