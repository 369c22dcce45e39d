r"""Where the bound is lost: log p(x) - ELBO, split by what would win it back.

Let ELBO*_F be the ELBO of the distribution of family F that is best for a datum by itself: a Gaussian (`Individual`),
or one of low rank or a mixture where the guide is one (`pyrovae.inference.own_family`). Then

    log p(x) - ELBO = (log p(x) - ELBO*_F) + (ELBO*_F - ELBO)
                       approximation gap       amortisation gap

with F the guide's own family. The first is what that family cannot express, the second what the guide's network loses
by serving every datum. The same with the best full-covariance Gaussian says what a richer family wins. A guide that
refines its answer for each datum is of the family of its answer, and its amortisation gap what refining leaves. Of a
flow whose weights all data share, F has those weights, and what else it is made from free for each datum; where that
cannot be told from its weights, F is that of full Gaussians, and so it is said.

K draws z_ck of each of C proposals r_c, the guide and what was fitted, give everything. The ELBO of each is its
own mean log-weight, and all C K draws together, weighted as the mixture that they are (the balance heuristic), give

    log p(x) ~ log (1/CK) sum_ck w_ck        w_ck = p(x, z_ck) / ((1/C) sum_c' r_c'(z_ck|x)),

so that a proposal that is good for a datum cannot be spoilt by one that is not, and nothing is chosen after the fact.
Errors are of first order, stratum by stratum: log p(x) moves by w_ck / (C p(x)) per draw and the ELBO by its
log-weight, so that differences of the two profit from common draws.

Fits are not perfect and log p(x) is a lower bound: the approximation gap has both errors against each other, and the
amortisation gap is, if anything, too small. A guide that was trained for another bound than the ELBO loses part of
its amortisation gap on purpose: IWAE's is wide rather than close.

References:
    Cremer, Li and Duvenaud 2018, Inference Suboptimality in Variational Autoencoders, https://arxiv.org/abs/1801.03558
    Veach and Guibas 1995, Optimally Combining Sampling Techniques, SIGGRAPH
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimate import Estimate, joined
from pyrovae.inference.gaussians import GAUSSIAN, Family, family, freed
from pyrovae.inference.individual import FittedGaussian, Individual
from pyrovae.inference.information import Information, split_kl
from pyrovae.inference.marginal import ORIGINAL_ROWS, LogMarginal, Origin, block_of, join, summarise
from pyrovae.inference.modules import evaluating
from pyrovae.inference.own_family import Fitted, fit_own
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import Proposal, Sampler, particles_in
from pyrovae.inference.unconstrained import Unconstrained
from pyrovae.inference.units import Units, use_of_units
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import draw
from pyrovae.seeding import keyed

# Families of guides whose own best is fitted to each datum, beside Gaussians.
OF_ITS_OWN = ("low-rank", "mixture", "flow")
# Each quantity as a sum of log p(x), taken so many times, and of the ELBOs of proposals, taken so many times.
QUANTITIES: dict[str, tuple[float, dict[str, float]]] = {
    "gap": (1, {"guide": -1}),
    "approximation": (1, {"own": -1}),
    "amortisation": (0, {"own": 1, "guide": -1}),
    "full_approximation": (1, {"full": -1}),
    "full_gain": (0, {"full": 1, "own": -1}),
    "elbo": (0, {"guide": 1}),
    "best_elbo": (0, {"own": 1}),
    "full_elbo": (0, {"full": 1}),
}


@dataclass(frozen=True)
class Gaps:
    """log p(x) - ELBO and its parts, with values, Monte Carlo errors and errors over rows in nats.

    Attributes:
        log_marginal: log p(x) from the draws of all proposals.
        gap: log p(x) - ELBO.
        approximation: log p(x) - ELBO of the best of the guide's family for each datum.
        amortisation: That ELBO - ELBO of the guide.
        full_approximation: log p(x) - ELBO of the best full-covariance Gaussian for each datum.
        full_gain: ELBO of the best full-covariance Gaussian - ELBO of the best of the guide's family; below 0 where a
            mixture is better.
        elbo: Of the guide.
        best_elbo: Of the best of the guide's family.
        full_elbo: Of the best full-covariance Gaussian.
        family: Of what the guide is compared with: "diagonal", "full", "low-rank", "mixture" or "flow".
        guide_family: Of the guide itself: "diagonal", "full", "low-rank", "mixture", "flow", or "other" where that is
            not known, as of a hierarchy. Where its own family is not fitted, as of this last, it is compared with
            full-covariance Gaussians, and may be better than the best of them, with an amortisation gap below 0.
        num_particles: K, of each proposal.
        units: KL and variance of each latent dimension.
        information: I(x; z), and the distance of the aggregate posterior from the prior.
    """

    log_marginal: LogMarginal
    gap: Estimate
    approximation: Estimate
    amortisation: Estimate
    full_approximation: Estimate
    full_gain: Estimate
    elbo: Estimate
    best_elbo: Estimate
    full_elbo: Estimate
    family: str
    guide_family: str
    num_particles: int
    units: Units
    information: Information


@in_single_precision
def gaps(
    model: Callable,
    guide: Callable,
    x: Tensor,
    num_particles: int = 2000,
    family: Family | None = None,
    individual: Individual | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    seed: int | None = None,
    given: Sequence[Tensor] = (),
) -> Gaps:
    """Split log p(x) - ELBO into approximation and amortisation gap, datum by datum.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        x: Data, shape (N, *event).
        num_particles: K, drawn from the guide and from each fitted Gaussian.
        family: Of the Gaussians that the guide is compared with, "diagonal" or "full"; None: the guide's own family,
            or full Gaussians where it has none, see `family_of`.
        individual: How Gaussians are fitted; its family and widening are not used.
        chunk_size: Particles evaluated at once, for a block of rows. None: as many as fit in a fixed memory.
        progress: Called with the number of rows done after each block of rows.
        seed: If given, each block of rows has a random state of its own, and the caller's is left as it was.
        given: What everything is conditioned on, tensors of shape (N, ...).

    Raises:
        UsageError: num_particles < 2, no such family, x is no tensor with rows, or one in `given` has not as many.
        PairError: a latent site is discrete, or the guide has auxiliary sites, or the log-weights of the pair are not
            of log p(x), see `pyrovae.inference.validity`.
    """
    check_count("num_particles (K)", num_particles, 2)
    pair, batch = Pair(model, guide), Batch.of(x, given)
    rows, chunk = block_of(batch, num_particles, chunk_size)
    check_pair(pair, batch, rows).by_parts("gaps")
    blocks: list[tuple[LogMarginal, dict[str, Estimate]]] = []
    with evaluating(pair):
        # Naming the guide's family takes draws; they move the caller's random state only where they decide something.
        with keyed(seed if family is None else 0, "gaps", "family", device=x.device):
            guide_family = family_of(pair, batch[:1])
            own = family is None and guide_family in OF_ITS_OWN and is_freed(pair, batch[:1])
        method = replace(individual or Individual(), family=family or closest(guide_family))
        for start, block in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            with keyed(seed, "gaps", "rows", start, device=x.device):
                blocks.append(of_block(pair, block, num_particles, method, chunk, own))
            if progress is not None:
                progress(start + len(block))
        with keyed(seed, "gaps", "units", device=x.device):
            about_units, about_x = use_of_units(pair, batch), split_kl(pair, batch)
    origin = Origin(pair, batch[:ORIGINAL_ROWS], GuideAndFitted(method, own), seed or 0, chunk_size, whole=False)
    return Gaps(
        replace(join([marginal for marginal, _ in blocks]), origin=origin),
        **{name: joined([parts[name] for _, parts in blocks]) for name in QUANTITIES},
        family=guide_family if own else method.family,
        guide_family=guide_family,
        num_particles=num_particles,
        units=about_units,
        information=about_x,
    )


@torch.no_grad()
def of_block(
    pair: Pair, batch: Batch, num_particles: int, method: Individual, chunk: int, own: bool
) -> tuple[LogMarginal, dict[str, Estimate]]:
    """log p(x) and every quantity of some rows."""
    space, fitted = Unconstrained(pair, batch), fits(pair, batch, method, own)
    proposals = ["guide", *fitted]
    log_w: dict[str, Tensor] = {}  # of each proposal's draws, by itself and in the mixture
    log_mixed: dict[str, Tensor] = {}
    for name in proposals:
        alone, mixed = [], []
        for done in range(0, num_particles, chunk):
            k = min(chunk, num_particles - done)
            u = space.draw(k) if name == "guide" else fitted[name].draw(k)
            at = space(u)
            log_r = {"guide": at.log_guide.double()} | {n: q.log_prob(u).double() for n, q in fitted.items()}
            log_joint = at.log_joint.double()
            alone.append((log_joint - log_r[name]).cpu())
            mixture = torch.logsumexp(torch.stack(list(log_r.values())), 0) - math.log(len(log_r))
            mixed.append((log_joint - mixture).cpu())
        log_w[name], log_mixed[name] = torch.cat(alone), torch.cat(mixed)
    everything = torch.cat(list(log_mixed.values()))
    marginal = summarise(everything[torch.randperm(len(everything))], GuideAndFitted(method, own))
    influence = {name: (log_mixed[name] - marginal.estimate).exp() / len(proposals) for name in proposals}

    def quantity(times: float, elbos: dict[str, float]) -> Estimate:
        # Without a family of its own in between, the full-covariance Gaussian is the guide's.
        weights = dict.fromkeys(proposals, 0.0)
        for name, weight in elbos.items():
            weights[name if name in weights else "own"] += weight
        values = times * marginal.estimate
        variances = torch.zeros_like(values)
        for name, weight in weights.items():
            if weight:
                values = values + weight * log_w[name].mean(0)
            if times or weight:
                moves = times * influence[name] + (weight * log_w[name] if weight else 0)
                variances = variances + moves.var(0) / num_particles
        return Estimate(values, variances.sqrt())

    return marginal, {name: quantity(*parts) for name, parts in QUANTITIES.items()}


def fits(pair: Pair, batch: Batch, method: Individual, own: bool) -> dict[str, FittedGaussian | Fitted]:
    """The best of the guide's family, or else of the method's, for each datum, and the best full Gaussian."""
    if own:
        return {"own": fit_own(pair, batch, method.steps, method.draws), "full": method.fit(pair, batch)}
    fitted: dict[str, FittedGaussian | Fitted] = {"own": method.fit(pair, batch)}
    return fitted if method.family == "full" else fitted | {"full": replace(method, family="full").fit(pair, batch)}


@dataclass(frozen=True)
class GuideAndFitted(Proposal):
    """What all draws together are from: a proposal, so that their log p(x) is tried on simulated data as others are.

    Args:
        method: How Gaussians are fitted.
        own: Whether the best of the guide's own family is fitted too.
    """

    method: Individual
    own: bool = False

    @property
    def name(self) -> str:
        """What estimates call it."""
        what = "its own family and Gaussians" if self.own else "Gaussians"
        return f"importance sampling from a mixture of the guide and of {what} fitted to each datum"

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        space, fitted = Unconstrained(pair, batch), fits(pair, batch, self.method, self.own).values()

        def weigh(u: Tensor) -> Tensor:
            at = space(u)
            log_r = torch.stack([at.log_guide.double(), *(q.log_prob(u).double() for q in fitted)])
            return at.log_joint.double() - (torch.logsumexp(log_r, 0) - math.log(len(log_r)))

        def sample(k: int) -> Tensor:
            # An equal share of each; what cannot be shared equally is left to chance, so that none has more on average.
            order = torch.randperm(1 + len(fitted))
            shares = [k // len(order) + (int(place) < k % len(order)) for place in order]
            parts = [space.draw(shares[0])] if shares[0] else []
            parts += [q.draw(n) for q, n in zip(fitted, shares[1:], strict=True)]
            return weigh(torch.cat(parts)[torch.randperm(k)])

        def at(values: dict[str, Tensor]) -> Tensor:
            return weigh(space.join(draw(pair, batch, particles_in(values), values)))

        return Sampler(sample, at)


def closest(guide_family: str) -> Family:
    """The family of Gaussians that a guide of one of the names of `family_of` is compared with."""
    return "diagonal" if guide_family == "diagonal" else "full"


@torch.no_grad()
def is_freed(pair: Pair, batch: Batch) -> bool:
    """Whether the parameters of the guide's distribution can be freed for each datum."""
    (latent,) = draw(pair, batch).latents.values()
    try:
        freed(latent.guide)
    except NotImplementedError:
        return False
    return True


@torch.no_grad()
def family_of(pair: Pair, batch: Batch) -> str:
    """The family of a guide over all its latents together, see `family`; "other" where that is not known.

    It is a Gaussian where every site is one (or a transformed one) that depends on no other site, and diagonal where
    every site is. Another family is that of a guide of one site.
    """
    latents = draw(pair, batch, 2).latents.values()
    for latent in latents:
        # A site that depends on others has another density for each particle.
        log_q = latent.guide.log_prob(latent.value[:1].expand_as(latent.value))
        if not torch.allclose(log_q[0], log_q[1]):
            return "other"
    families = {family(latent.guide) for latent in latents}
    if len(latents) == 1:
        return families.pop()
    if not families <= set(GAUSSIAN):
        return "other"
    return "diagonal" if families == {"diagonal"} else "full"
