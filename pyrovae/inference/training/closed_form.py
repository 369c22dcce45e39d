"""Closed forms: what of a model is set to the maximum of the bound, given all else, in place of gradients.

After each epoch the statistics that a part asks for are averaged over training rows x and draws z of the guide,

    sum_n sum_k r_nk statistics(p(x|z_nk), x_n),

with the weights r of the draws in the gradient of the bound: 1/K each for the ELBO, the normalised importance weights
for IWAE, those to the power 1 - alpha for Renyi. Setting the part to the maximum for these averages is a step of EM on
these rows. What is set is a buffer: a number like any parameter within each step, in checkpoints, and input of compiled
steps. Its draws are seeded by the epoch, so that a resumed run sets it alike, and all processes of a run do.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.inference.modules import evaluating
from pyrovae.inference.objectives import ImportanceWeighted, Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.training.batches import Source
from pyrovae.inference.training.settings import Settings
from pyrovae.inference.weights import Particles, draw
from pyrovae.seeding import derive_seed, reseed

MOST_ROWS = 10_000  # training rows that are averaged over, evenly from all
SITE = "x"  # where the distribution is, whose parameters are set


@runtime_checkable
class ClosedForm(Protocol):
    """A module that makes the distribution at the site x, with parameters that have a closed form."""

    @property
    def in_closed_form(self) -> bool:
        """Whether they are to be set; a module may have them trained by gradients instead."""

    def statistics(self, p: "torch.distributions.Distribution", x: Tensor) -> Tensor:
        """What the maximum is a function of, in sums: shape (S, K, N), for p of batch shape (K, N)."""

    def maximise(self, totals: Tensor) -> dict[str, float]:
        """Set the parameters from weighted sums of the statistics, shape (S,); what to record of them, by name."""


@torch.no_grad()
@in_single_precision
def set_closed_forms(
    pair: Pair, objective: Objective, source: Source, settings: Settings, epoch: int
) -> dict[str, float]:
    """Set what has a closed form, in the modules of a pair that are trained.

    Args:
        pair: The pair.
        objective: What it is trained with.
        source: The training rows.
        settings: Of the run, for its batch size, seed and chunk of particles.
        epoch: That has ended, which seeds the draws.

    Returns:
        What to record; nothing of a pair that has none.

    Raises:
        UsageError: the model has no site "x".
    """
    parts = [part for part in pair.modules() if isinstance(part, ClosedForm) and part.in_closed_form]
    parts = [part for part in parts if is_trained(part)]
    if not parts:
        return {}
    rows = torch.arange(0, len(source), -(-len(source) // MOST_ROWS))
    reseed(derive_seed(settings.seed, "closed form", epoch), source.device)
    totals = [torch.zeros(()) for _ in parts]
    with evaluating(pair.model, pair.guide):
        for chosen in rows.split(settings.batch_size):
            particles = draw(pair, source.batch(chosen), sum(objective.chunks()))
            site = particles.model_trace.nodes.get(SITE)
            if site is None or not site["is_observed"]:
                raise UsageError(f"model: {type(parts[0]).__name__} has a closed form, of an observed site {SITE!r}")
            weights = weights_of(objective, particles).double()
            for i, part in enumerate(parts):
                found = part.statistics(site["fn"], site["value"]).double()
                totals[i] = totals[i].to(found) + (weights * found).sum((1, 2))
    recorded: dict[str, float] = {}
    for part, total in zip(parts, totals, strict=True):
        recorded |= part.maximise(total)
    return recorded


def is_trained(part: object) -> bool:
    """Whether any of a module's parameters asks for a gradient; the first stage of a run of two is held as it is."""
    return isinstance(part, nn.Module) and any(p.requires_grad for p in part.parameters())


def weights_of(objective: Objective, particles: Particles) -> Tensor:
    """The weight of each draw in the gradient of the bound, which sum to 1 for each datum: shape (K, N)."""
    log_weights = particles.log_weights.detach()
    if not isinstance(objective, ImportanceWeighted):
        return torch.full_like(log_weights, 1 / len(log_weights))
    with torch.enable_grad():
        log_weights.requires_grad_()
        (weights,) = torch.autograd.grad(objective.combine(log_weights.unsqueeze(0)).sum(), log_weights)
    return weights
