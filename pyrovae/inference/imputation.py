r"""Imputation: what is missing of a row, drawn and averaged given what is seen of it.

For a pair of p(x_seen) (`pyrovae.models.Masked` makes one), K draws z_k with weights w_k = p(x_seen, z_k) / r(z_k) give

    E[x_missing | x_seen] ~ sum_k v_k E[x_missing | z_k],     v_k = w_k / sum_j w_j

and S draws of x_missing: z by its weight among the K, then x_missing from p(x | z). They are no better than the
weights: with an effective sample size near 1 all S draws come from one z, and look far more certain than the model is.

References:
    Mattei and Frellsen 2019, MIWAE, https://arxiv.org/abs/1812.02633, who ask for K of a thousand and more
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.estimate import Estimate
from pyrovae.inference.individual import Individual
from pyrovae.inference.inference_data import Block
from pyrovae.inference.marginal import LogMarginal, block_of
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import Proposal
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import At, run
from pyrovae.seeding import seeded


@dataclass(frozen=True)
class Imputed:
    """Rows whose missing elements are filled in; what is seen is as it was.

    Attributes:
        draws: With draws from p(x_missing | x_seen), shape (S, N, *event).
        mean: With the mean of p(x_missing | x_seen), shape (N, *event).
        ess: Effective sample size of the weights behind a row, from 1 to K, shape (N,).
        num_particles: K.
    """

    draws: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    ess: Tensor
    num_particles: int


@in_single_precision
def impute(
    model: Callable,
    guide: Callable,
    x: Tensor,
    seen: Tensor,
    num_draws: int = 100,
    num_particles: int = 1000,
    *,
    proposal: Proposal | None = None,
    seed: int = 0,
    given: Sequence[Tensor] = (),
) -> Imputed:
    """Draw what is missing of rows by importance-weighted draws of their latents.

    Args:
        model: Pyro model of p(x_seen, z), called as model(x, *given, seen), with one observed site `x`.
        guide: Pyro guide, called alike.
        x: Rows, shape (N, *event); missing elements may be anything in the support of the likelihood, such as 0.
        seen: Boolean, shape (N, *event) or that of the event: True where x is seen.
        num_draws: S.
        num_particles: K, the draws of z that are weighted; a thousand or more.
        proposal: Where those come from; None: a Gaussian fitted to each row, since a guide that was trained on whole
            rows misses the posterior of a part of one.
        seed: Of all draws; the caller's random state is left as it was.
        given: What everything else is conditioned on, tensors of shape (N, ...).

    Raises:
        UsageError: num_draws or num_particles < 1, `seen` is of another type or shape, or the proposal's latents cannot
            be drawn.
        PairError: the log-weights of the pair are not of log p(x_seen).
        NumericalError: a row has a weight that is not a number, or all its weights are zero.
    """
    for name, value in (("num_draws", num_draws), ("num_particles (K)", num_particles)):
        check_count(name, value)
    if seen.dtype != torch.bool or seen.shape not in (x.shape, x.shape[1:]):
        raise UsageError(
            f"seen: expected a boolean mask of shape {tuple(x.shape)} or that of one row, got {seen.shape}"
        )
    seen = seen.expand(x.shape)
    proposal = Individual() if proposal is None else proposal
    pair, batch = Pair(model, guide), Batch.of(x, (*given, seen))
    rows, chunk = block_of(batch, num_particles)
    check_pair(pair, batch, rows).by_parts("impute")
    draws, means, sizes = [], [], []
    with evaluating(pair), torch.no_grad():
        for start, data in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            with seeded(seed, "imputation", start, device=x.device):
                block = Block(Pair(model, proposal.as_guide(pair, data)), data, start, num_particles, chunk)
                weights = torch.softmax(block.log_weights, 0)
                chosen = torch.multinomial(weights.T, num_draws, replacement=True).T
                latents = {
                    name: z[chosen, torch.arange(len(data), device=chosen.device)] for name, z in block.latents.items()
                }
                draws.append(block.generate(latents, num_draws, ["x"])["x"])
                means.append(_mean(block, weights))
                sizes.append(1 / weights.square().sum(0).cpu())
    drawn, mean = torch.cat(draws, 1), torch.cat(means)
    return Imputed(x.where(seen, drawn), x.where(seen, mean), torch.cat(sizes), num_particles)


def _mean(block: Block, weights: Tensor) -> Tensor:
    """The weighted mean of E[x | z], shape (N, *event), for weights of shape (K, N)."""
    total, done = torch.zeros_like(block.batch.x), 0
    for size in block.sizes(len(weights)):
        of = slice(done, done + size)
        with At({name: z[of] for name, z in block.latents.items()}):
            mean = run(block.pair.model, "model", block.batch, size).nodes["x"]["fn"].mean
        total += torch.einsum("kn,kn...->n...", weights[of].to(mean), mean.expand(size, *total.shape))
        done += size
    return total


def log_prob_missing(whole: LogMarginal, seen: LogMarginal) -> Estimate:
    """log p(x_missing | x_seen) = log p(x) - log p(x_seen) of each row, in nats.

    Each is too low on average, so that their difference is no bound: where the estimate of log p(x_seen) is loose, this
    is too high. It is worth as much as the worse of the two verdicts.

    Args:
        whole: log p(x) of N rows.
        seen: log p(x_seen) of the same rows.

    Raises:
        UsageError: they are not of as many rows.
    """
    if len(whole.estimate) != len(seen.estimate):
        raise UsageError(f"seen: {len(seen.estimate)} rows beside the {len(whole.estimate)} of whole; score the same")
    errors = [torch.nan_to_num(part.standard_error, nan=math.inf) for part in (whole, seen)]
    return Estimate(whole.estimate - seen.estimate, torch.hypot(*errors))
