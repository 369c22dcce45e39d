r"""Models on the same rows, the best first, and how certain that order is.

One table per measure: a mass and a density never meet. Unless told not to, each table has the exact baselines of the
same measure, fit to the same training rows with their number of components chosen on the validation rows.

Three uncertainties, and where each is told:

    over rows           95 % bootstrap intervals of the mean, of the difference to the best, and of the rank; the same
                        resampled rows for every model, so that what all models find hard cancels in differences
    over seeds          runs that differ in nothing but their seed are one line, the mean over seeds of log p(x) per
                        row; the standard deviation of the runs' own means stands in a column of its own
    of the estimate     log p(x) of a run is a lower bound in expectation, and its verdict says how tight; a mixture's
                        is exact. Monte Carlo noise is part of what differs from row to row, so the intervals hold it

What is only a lower bound may be of a better model than its number says, and ranks leave that open: a model whose
verdict is "lower bound only" may deserve rank 1, and every other may have it above; one that is "ok" may be better by
the bias that its verdict states. They are ranks of these runs: a single seed says nothing of another.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap
    Goldstein and Spiegelhalter 1996, League Tables and Their Limitations, JRSS A 159
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pyrovae.runs.directory import Run
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.scoring import Scoring, check_of, compile_draws, open_scores, score

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.simulation import Simulated
    from pyrovae.inference.verdicts import Verdict

COLUMNS = (
    *("name", "log_marginal", "error", "low", "high"),
    *("difference", "difference_error", "difference_low", "difference_high", "difference_bound"),
    *("rank_low", "rank_high"),
    *("seeds", "spread", "seed_means"),
    *("verdict", "reason", "exact", "K", "monte_carlo_error", "elbo"),
)


@dataclass
class Scored:
    """A model's log p(x) on the rows of a table: a result for each of its seeds."""

    name: str
    results: "Sequence[LogMarginal]"
    checks: "Sequence[Sandwich | Simulated | None]" = ()  # on simulated data, one for each result

    @property
    def estimate(self) -> "Tensor":
        """Mean over the seeds of log p(x), shape (N,)."""
        import torch

        return torch.stack([result.estimate for result in self.results]).mean(0)

    @property
    def means(self) -> list[float]:
        """The mean over the rows for each seed."""
        return [result.mean for result in self.results]

    @property
    def spread(self) -> float | None:
        """Standard deviation of `means`; None for a single seed."""
        import torch

        return torch.tensor(self.means, dtype=torch.float64).std().item() if len(self.results) > 1 else None

    @cached_property
    def judgements(self) -> "list[Verdict]":
        """What is said of each seed's estimate."""
        from pyrovae.inference.verdicts import verdict

        checks = self.checks or [None] * len(self.results)
        return [verdict(result, check) for result, check in zip(self.results, checks, strict=True)]

    @property
    def verdict(self) -> "Verdict":
        """The least of them."""
        from pyrovae.inference.verdicts import Kind

        return max(self.judgements, key=lambda judgement: list(Kind).index(judgement.kind))

    @property
    def slack(self) -> float:
        """How far its log p(x) may be above `estimate`, in nats: by the bias that is stated, or by anything."""
        return sum(math.inf if v.bias is None else v.bias for v in self.judgements) / len(self.judgements)

    @property
    def monte_carlo_error(self) -> float:
        """Of the mean over rows and seeds. Seeds are scored with the same noise, so that averaging reduces nothing."""
        return sum(result.monte_carlo_error for result in self.results) / len(self.results)

    @property
    def elbo(self) -> float | None:
        """The pair's ELBO; None for draws from another proposal, whose mean log-weight is something else."""
        if not all(result.of_guide for result in self.results):
            return None
        return sum(result.elbo.mean().item() for result in self.results) / len(self.results)

    @property
    def num_particles(self) -> int:
        """K; 0 where log p(x) is in closed form."""
        return self.results[0].num_particles


def table(scored: Sequence[Scored], seed: int = 0) -> "pd.DataFrame":
    """One row per model, the best first: means over rows in nats per datum.

    Intervals are of 95 %, by a bootstrap over rows with this seed. `difference` is to the highest number, paired row by
    row; its error is that of the mean of the differences, and `difference_bound` says what it is of log p(x): itself
    (empty), "at least" or "at most" where one of the two is a lower bound only, "open" where both are. `rank_low` to
    `rank_high` holds the model's rank in 95 % of the resamples, whatever log p(x) is between a model's number and its
    `slack` above. `spread` is over seeds, and in no other number. A model without a finite mean is last, unranked.
    """
    import pandas as pd
    import torch

    from pyrovae.inference.bootstrap import ends, means
    from pyrovae.inference.estimate import standard_error
    from pyrovae.inference.verdicts import Kind

    ranked = sorted(
        scored, key=lambda s: s.estimate.mean().nan_to_num(nan=-math.inf, posinf=-math.inf).item(), reverse=True
    )
    estimates = torch.stack([entry.estimate for entry in ranked])
    estimates[~estimates.isfinite().all(1)] = math.nan  # else resamples without the bad rows would count
    resampled = means(estimates, seed=seed)
    lows, highs = ends(resampled)
    difference_lows, difference_highs = ends(resampled - resampled[:, :1])
    rank_lows, rank_highs = ranks(resampled, [entry.slack for entry in ranked])
    records = []
    for i, entry in enumerate(ranked):
        difference, finite = estimates[i] - estimates[0], bool(estimates[i].isfinite().all())
        records.append(
            {
                "name": entry.name,
                "log_marginal": estimates[i].mean().item(),
                "error": standard_error(estimates[i]),
                "low": lows[i],
                "high": highs[i],
                "difference": difference.mean().item(),
                "difference_error": standard_error(difference),
                "difference_low": difference_lows[i],
                "difference_high": difference_highs[i],
                "difference_bound": "" if i == 0 else bound_of(entry.slack, ranked[0].slack),
                "rank_low": int(rank_lows[i]) if finite else None,
                "rank_high": int(rank_highs[i]) if finite else None,
                "seeds": len(entry.results),
                "spread": entry.spread,
                "seed_means": entry.means,
                "verdict": entry.verdict.kind.value,
                "reason": entry.verdict.reason,
                "exact": entry.verdict.kind == Kind.EXACT,
                "K": entry.num_particles or None,
                "monte_carlo_error": entry.monte_carlo_error,
                "elbo": entry.elbo,
            }
        )
    whole = {"rank_low": "Int64", "rank_high": "Int64", "K": "Int64"}
    return pd.DataFrame(records, columns=list(COLUMNS)).astype(whole | {"spread": float, "elbo": float})


def ranks(resampled: "Tensor", slack: Sequence[float]) -> "tuple[list[float], list[float]]":
    """The lowest and highest rank of each model in 95 % of the resamples, from means of shape (resamples, models)."""
    import torch

    from pyrovae.inference.bootstrap import ends

    # Of each model i (dimension 1) the others j (dimension 2) that are better even where i is as good as it may be, and
    # those that are better where they are as good as they may be. NaN is neither.
    best = resampled + torch.tensor(slack, dtype=torch.float64)
    surely = resampled[:, None] > best[:, :, None]
    perhaps = (best[:, None] > resampled[:, :, None]) & ~torch.eye(len(slack), dtype=torch.bool)
    # Ranks are whole numbers: no interpolation between two.
    lows, _ = ends(1.0 + surely.sum(-1, dtype=torch.float64), interpolation="nearest")
    _, highs = ends(1.0 + perhaps.sum(-1, dtype=torch.float64), interpolation="nearest")
    return lows, highs


def bound_of(slack: float, slack_of_best: float) -> str:
    """What the difference of two numbers is of the difference of their log p(x)."""
    if math.isinf(slack):
        return "open" if math.isinf(slack_of_best) else "at least"
    return "at most" if math.isinf(slack_of_best) else ""


def score_run(
    run: Run, rows: "Rows", batch: "Batch", how: Scoring, say: Say = silent
) -> "tuple[LogMarginal, Sandwich | Simulated | None]":
    """The log p(x) of a trained run, after saying what was found in its directory; kept there as it is made.

    With it, the check on simulated data.
    """
    model = run.model(batch.x.device)
    for notice in run.notices:
        say(f"note: {notice}")
    how = compile_draws(model, batch, how)
    say(f"scoring {run.name}")
    if not run.writable:
        say(f"note: {run.directory} cannot be written to, so that its scores are not kept")
    store = open_scores(run, model, rows, batch, how)
    result = score(model, batch, how, store, say)
    return result, check_of(model, batch, how, store)
