r"""p(y|x) by Bayes: which of C classes a row is of, from the log p(x|y) of each.

    p(y|x) = p(y) p(x|y) / p(x),        p(x) = sum_y p(y) p(x|y)

Each log p(x|y) is an estimate with an error s_y of its own draws. To first order in these, with p_y for p(y|x),

    error of log p(x)     sqrt(sum_y p_y^2 s_y^2)
    error of p_y          p_y sqrt((1 - p_y)^2 s_y^2 + sum_{c != y} p_c^2 s_c^2)

so that an error counts as much as its class does. What the draws do not show is no part of it: of a class that a row is
not of, the posterior p(z|x, y) is one that the guide was never trained for, and its log p(x|y) may be too low by any
distance. That makes p(y|x) of the other classes too large. So every row says for which classes its draws are too few
to be believed, and every class has a verdict on the rows that it counts for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyrovae.checks import check_rows
from pyrovae.errors import UsageError
from pyrovae.inference.marginal import LogMarginal, log_marginal
from pyrovae.inference.proposals import FROM_GUIDE, Proposal
from pyrovae.inference.verdicts import Verdict, verdict

# p(y|x) from which on a class counts for a row.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Classification:
    """p(y|x) of N rows and C classes; every tensor is in double precision on the CPU.

    Attributes:
        log_prior: log p(y) in nats, shape (C,), normalised.
        classes: The estimate of log p(x|y) of each class, for all rows.
    """

    log_prior: Tensor
    classes: tuple[LogMarginal, ...] = field(repr=False)

    @property
    def log_likelihood(self) -> Tensor:
        """log p(x|y) in nats, shape (N, C)."""
        return torch.stack([result.estimate for result in self.classes], 1)

    @property
    def log_marginal(self) -> Tensor:
        """log p(x) = log sum_y p(y) p(x|y) in nats, shape (N,)."""
        return torch.logsumexp(self.log_prior + self.log_likelihood, 1)

    @property
    def log_probability(self) -> Tensor:
        """log p(y|x) in nats, shape (N, C)."""
        return (self.log_prior + self.log_likelihood).log_softmax(1)

    @property
    def probability(self) -> Tensor:
        """p(y|x), shape (N, C)."""
        return self.log_probability.exp()

    @property
    def errors(self) -> Tensor:
        """Monte Carlo error of each log p(x|y) in nats, shape (N, C); 0 where exact."""
        return torch.stack([result.standard_error for result in self.classes], 1)

    @property
    def log_marginal_error(self) -> Tensor:
        """Monte Carlo error of `log_marginal`, shape (N,)."""
        return (self.probability * self.errors).square().sum(1).sqrt()

    @property
    def probability_error(self) -> Tensor:
        """Monte Carlo error of `probability`, shape (N, C)."""
        p, of_each = self.probability, (self.probability * self.errors).square()
        own = (1 - p).square() * self.errors.square()
        return p * (own + of_each.sum(1, keepdim=True) - of_each).sqrt()

    @property
    def unreliable(self) -> Tensor:
        """For which classes a row's draws may miss all that counts, see `LogMarginal.unreliable`: shape (N, C)."""
        return torch.stack([result.unreliable for result in self.classes], 1)

    def verdicts(self, least: float = LEAST_SHARE) -> tuple[Verdict | None, ...]:
        """Of each class the verdict on log p(x|y) of the rows with p(y|x) of at least so much; None: there are none."""
        return tuple(
            verdict(rows_of(result, counts)) if counts.any() else None
            for result, counts in zip(self.classes, (self.probability >= least).T, strict=True)
        )

    @property
    def undecided(self) -> Tensor:
        """Rows whose most probable class another may overtake within two Monte Carlo errors, shape (N,)."""
        if len(self.classes) == 1:
            return torch.zeros(len(self.log_marginal), dtype=torch.bool)
        (first, second), at = self.log_probability.topk(2, 1).values.T, self.log_probability.topk(2, 1).indices
        return first - second < 2 * self.errors.gather(1, at).square().sum(1).sqrt()


def rows_of(result: LogMarginal, rows: Tensor) -> LogMarginal:
    """The estimate of some rows, by a mask of shape (N,)."""
    some = LogMarginal.from_columns(result.columns()[:, rows], result.num_particles, result.estimator)
    return replace(some, of_guide=result.of_guide, exact_as=result.exact_as, origin=result.origin)


def classify(
    model: Callable,
    guide: Callable,
    x: Tensor,
    classes: Tensor,
    log_prior: Tensor | None = None,
    num_particles: int = 1000,
    proposal: Proposal = FROM_GUIDE,
    seed: int | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Classification:
    """p(y|x) by Bayes from a conditional pair, one estimate of log p(x|y) for each row and class.

    Args:
        model: Pyro model p(x, z | y), called as model(x, y).
        guide: Pyro guide q(z | x, y), called as guide(x, y).
        x: Data, shape (N, *event).
        classes: The y of each class, shape (C, *given): of one-hot labels, the unit matrix.
        log_prior: log p(y) in nats, shape (C,), up to a constant; None: all classes alike.
        num_particles: K, for each row and class.
        proposal: Where the draws come from.
        seed: If given, the draws have a random state of their own, another one for each class.
        chunk_size: Particles evaluated at once; bounds memory.
        progress: Called with the number of classes done.

    Raises:
        UsageError: a tensor has another shape, or log_prior gives no class any weight.
    """
    check_rows("x", x)
    check_rows("classes", classes)
    count = len(classes)
    given_prior = torch.zeros(count) if log_prior is None else log_prior
    if given_prior.shape != (count,) or not torch.isfinite(torch.logsumexp(given_prior.double(), 0)):
        raise UsageError(
            f"log_prior: expected {count} numbers, one for each class, with a finite sum of p(y), got shape "
            f"{tuple(given_prior.shape)}"
        )
    results = []
    for i, y in enumerate(classes):
        given = (y.expand(len(x), *y.shape),)
        own = None if seed is None else seed * count + i
        results.append(
            log_marginal(
                model, guide, x, num_particles, chunk_size, proposal=proposal, seed=own, given=given, most_states=0
            )
        )
        if progress is not None:
            progress(i + 1)
    return Classification(given_prior.detach().double().cpu().log_softmax(0), tuple(results))
