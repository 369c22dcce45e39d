"""What to say of a loss or a gradient that is not finite: which rows, sites and parameters make it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyro
import torch
from torch import Tensor

from pyrovae.errors import NumericalError, PyrovaeError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.schedules import Constraint
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.batches import Source
from pyrovae.inference.training.record import Metrics, Progress
from pyrovae.inference.training.settings import Settings
from pyrovae.inference.training.step import Step
from pyrovae.inference.weights import draw, sample_sites
from pyrovae.seeding import derive_seed, reseed


class Diagnosis:
    """A run, looked at where a number is not finite.

    Args:
        pair: The pair.
        objective: What is maximised.
        source: Of its rows.
        settings: Of the run.
        progress: Where training stands, now and later.
        directory: Of its checkpoints.
        rank: The number of this process.

    Attributes:
        step: What takes its steps, once there is one.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        source: Source,
        settings: Settings,
        progress: Progress,
        directory: Path | None,
        rank: int,
    ) -> None:
        self.pair, self.objective, self.source, self.settings = pair, objective, source, settings
        self.progress, self.directory, self.rank = progress, directory, rank
        self.step: Step | None = None

    @contextmanager
    def diagnosing(self, batch: Batch, rows: Tensor) -> Iterator[None]:
        """Tell a distribution that was given NaN or infinite numbers, which Pyro refuses, from other faults."""
        try:
            yield
        except ValueError as error:
            if not batch.x.isfinite().all():
                raise NumericalError(self.diagnose(batch, rows, "x is not finite")) from error
            broken = any(not p.isfinite().all() for p in self.pair.trainable().values())
            if isinstance(error, PyrovaeError) or not (broken or "Expected parameter" in str(error)):
                raise
            reason = str(error).split("\n")[0].removesuffix(", but found invalid values:")
            raise NumericalError(self.diagnose(batch, rows, f"a distribution was refused ({reason})")) from error

    def diagnose(self, batch: Batch, rows: Tensor, what: str) -> str:
        """Say which rows, sites and parameters make a loss or gradient that is not finite."""
        state = self.progress
        wrong, sites = self.at_fault(batch, rows)
        named = self.pair.trainable()
        parameters = [name for name, p in named.items() if not p.isfinite().all()]
        gradients: list[str] = []
        if self.step is not None:
            self.repeat_noise(rows)
            with suppress(ValueError):
                found = zip(named, self.step.gradient(batch, state.step, compiled=False)[1], strict=True)
                gradients = [name for name, g in found if g is not None and not g.isfinite().all()]
        where = f" in rows {rows[wrong][:5].tolist()}" if wrong.any() else ""
        for kind, names in (("site", sites), ("parameter", parameters), ("gradient of", gradients)):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            where += f", {kind} {shown}" if names else ""
        last = f"the last good step is {state.step - 1}" if state.step else "no step has been taken"
        kept = f"; the checkpoints in {self.directory} are intact" if checkpoints.kept_in(self.directory) else ""
        return (
            f"epoch {state.epoch + 1}, step {state.step}: {what}{where}; {last}{kept}. "
            "Lower the learning rate, or look at these rows"
        )

    def at_fault(self, batch: Batch, rows: Tensor) -> tuple[Tensor, list[str]]:
        """Which rows of the batch are not finite, or else give a log-weight that is not, and at which sites."""
        wrong = (~batch.x.isfinite()).reshape(len(batch), -1).any(1)
        sites: list[str] = []
        if not self.objective.of_particles:
            return wrong, sites
        self.repeat_noise(rows)
        k = sum(self.objective.chunks())
        with torch.no_grad(), suppress(ValueError), pyro.validation_enabled(False):
            particles = draw(self.pair, batch, min(k, self.settings.particle_chunk or k))
            bad = (~particles.log_weights.isfinite()).any(0)
            wrong = wrong if wrong.any() else bad
            latents = particles.latents
            terms = {name: latent.log_prior + latent.log_guide for name, latent in latents.items()}
            observed = [name for name in sample_sites(particles.model_trace) if name not in latents]
            terms[", ".join(observed)] = particles.log_likelihood
            sites = [name for name, term in terms.items() if not term.isfinite().all()]
        return wrong, sites

    def repeat_noise(self, rows: Tensor) -> None:
        """Bring the random state to where it was when the current step began on these rows."""
        reseed(derive_seed(self.settings.seed, "step", self.progress.step, self.rank), self.source.device)
        self.source.batch(rows)


def look_for_divergence(state: Progress, notice: Callable[[str], None]) -> None:
    """Say that training has made the pair worse.

    Raises:
        NumericalError: the best epoch is far worse than the pair was before training.
    """
    first, best = state.untrained_bound, state.best_bound
    if first is None or not math.isfinite(best):  # no epoch is the best: said already
        return
    found = f"the best validation bound, {best:.6g} nats in epoch {state.best_epoch}, is "
    if best < first - abs(first) - 10:
        raise NumericalError(
            f"training diverged: {found}far below the {first:.6g} before training; lower the learning rate"
        )
    last = state.history[-1].get("validation_bound", best)
    if best < first:
        notice(f"{found}below the {first:.6g} before training: lower the learning rate, or train for longer")
    elif not last > best - abs(best) - 10:
        notice(
            f"training diverged: {found}followed by {last:.6g} in the last one; the best is kept, and a lower "
            "learning rate may find a better one"
        )


def look_at_constraint(constraint: Constraint, metrics: Metrics, notice: Callable[[str], None]) -> None:
    """Say that a constraint is not met, or that it has no effect, as far as the validation rows show it."""
    kl, beta, limit = metrics.get("kl"), metrics["beta"], constraint.limit
    if kl is not None and kl > 1.1 * limit:
        notice(
            f"the KL of the validation rows, {kl:.4g} nats, is above the {limit:g} that the constraint allows on the "
            "training rows: train for longer, or at a lower learning rate"
        )
    elif beta <= constraint.least:
        notice(f"the constraint KL <= {limit:g} nats is not active: beta is at its least, {constraint.least:g}")
