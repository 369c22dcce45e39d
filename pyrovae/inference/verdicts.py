r"""What an estimate of log p(x) may be quoted as: a word, and the reason for it.

    exact               log p(x) in closed form, or an exact sum
    ok                  besides its Monte Carlo error, too low by at most the bias that is stated, of 0.1 nat
    unchecked           nothing is wrong with the draws, but what the proposal never visits they do not show, and the
                        pair could not be tried on simulated data
    lower bound only    not above log p(x) beyond the stated excess, but it may be far below: quote it as a bound
    invalid             some row has no estimate: a weight is NaN or infinite, or all are zero

An estimate is `ok` if nothing speaks against it in three places:

    single rows         no row has a k-hat over 1 or an effective sample size below 10. Such a row may be missed by any
                        distance, whatever the others are like: `pyrovae.inference.repair` scores it again
    all rows            at most a tenth has a k-hat over min(1 - 1/log10 K, 0.7), and the jackknife finds a bias of the
                        mean of at most 0.05 nat
    simulated data      an exact draw of the posterior is known there, which bounds log p(x) from above
                        (`pyrovae.inference.simulated`): the sandwich is narrower than 0.1 nat, two errors added

The stated bias is the width of that sandwich with two of its errors, or as many times that as the jackknife of the
data is that of the simulated ones. Both limits and the bias were found on thousands of pairs whose log p(x) is known,
and whose rows differ: outliers, heavy tails, rare states, two modes, test scores (benchmarks/calibration.py, and the
tables in docs/evaluation.md).

For annealed importance sampling its own check takes the place of all three, since k-hat asks for more draws than there
are chains: `ok` where that sandwich is narrower than 0.1 nat (`pyrovae.inference.annealed`).
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from pyrovae.checks import describe
from pyrovae.errors import PairError, PyrovaeError, UsageError
from pyrovae.inference.annealed import Sandwich
from pyrovae.inference.marginal import LEAST_DRAWS_FOR_TAIL, LEAST_ESS, MOST_K_HAT, LogMarginal, check_result
from pyrovae.inference.simulation import Simulated, like, simulated
from pyrovae.inference.validity import WHOLE

MOST_ROWS_OVER = 0.1
MOST_BIAS = 0.05
MOST_STATED_BIAS = 0.1
# A bias that is stated is at least this, in nats: below it the jackknife's own rounding decides.
LEAST_BIAS = 1e-4
# Rows that are named in a message.
MOST_NAMED = 5


class Kind(StrEnum):
    """What may be said of an estimate, from the most to the least."""

    EXACT = "exact"
    OK = "ok"
    UNCHECKED = "unchecked"
    LOWER_BOUND = "lower bound only"
    INVALID = "invalid"

    @property
    def is_firm(self) -> bool:
        """Whether the number may be quoted as log p(x), within what the verdict states."""
        return self in (Kind.EXACT, Kind.OK)


@dataclass(frozen=True)
class Verdict:
    """A judgement of an estimate.

    Attributes:
        kind: "exact", "ok", "unchecked", "lower bound only" or "invalid", see `Kind`.
        reason: Why, in words.
        bias: How far the mean may be too low besides its Monte Carlo error, in nats: 0 where exact, None unless ok.
    """

    kind: Kind
    reason: str
    bias: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def verdict(result: LogMarginal, check: Sandwich | Simulated | None = None) -> Verdict:
    """Judge an estimate.

    Args:
        result: The estimate.
        check: `simulated` data of the same pair, proposal and K; for annealed importance sampling, its `sandwich`.
            None: made here for an estimate that `log_marginal` returned, where it is needed, with the pair as it is
            now. It costs as much as an estimate of 300 rows.

    Raises:
        UsageError: an argument is of another type.
    """
    check_result(result)
    if not isinstance(check, Sandwich | Simulated | None):
        raise UsageError(f"check: expected what simulated or sandwich returned, got {describe(check)}")
    rows = len(result.estimate)
    if result.invalid:
        named = ", ".join(f"{i} ({result.estimate[i].item():g})" for i in result.invalid[:MOST_NAMED])
        return Verdict(
            Kind.INVALID,
            f"log p(x) is not a finite number for {len(result.invalid)} of {rows} rows, the first being {named}; their "
            "weights are all zero, NaN or infinite under this model",
        )
    if result.num_particles == 0:
        return Verdict(Kind.EXACT, f"log p(x) {result.exact_as}", 0.0)
    if isinstance(check, Sandwich):
        return by_sandwich(result, check)
    return by_draws(result) or by_simulation(result, check)


def by_sandwich(result: LogMarginal, check: Sandwich) -> Verdict:
    """The verdict of annealed importance sampling."""
    tail = f"on {len(check.forward)} simulated data the sandwich is {short(check.width, check.error)} nats wide"
    if not check.validated:
        return Verdict(Kind.LOWER_BOUND, f"{tail}, not narrower than 0.1; more temperatures narrow it")
    bias = jackknifed(result)
    if not bias <= MOST_BIAS:
        return by_jackknife(bias)
    return Verdict(Kind.OK, f"{tail}, and the jackknife finds a bias of {max(bias, 0.0):.1g} nats", check.width)


def by_draws(result: LogMarginal) -> Verdict | None:
    """What the draws themselves have to say against an estimate."""
    rows = len(result.estimate)
    if result.num_particles < LEAST_DRAWS_FOR_TAIL:
        why = f"K = {result.num_particles} is too small for k-hat"
        return Verdict(Kind.LOWER_BOUND, f"no tail diagnostic: {why}")
    over, single = int(result.over_threshold.sum()), int(result.unreliable.sum())
    if over > MOST_ROWS_OVER * rows:
        return Verdict(
            Kind.LOWER_BOUND,
            f"{over} of {rows} rows have a k-hat over {result.k_threshold:.2f}, more than {100 * MOST_ROWS_OVER:g} % "
            f"(the largest in rows {named(result)}); a larger K or a better proposal raises it",
        )
    if single:
        return Verdict(
            Kind.LOWER_BOUND,
            f"{single} of {rows} rows may be missed by any distance, with a k-hat over {MOST_K_HAT:g} or an effective "
            f"sample size below {LEAST_ESS:g} (the worst: {named(result, single)}); they ask for a better proposal",
        )
    bias = jackknifed(result)
    return None if bias <= MOST_BIAS else by_jackknife(bias)


def by_simulation(result: LogMarginal, check: Simulated | None) -> Verdict:
    """The verdict of an estimate whose draws say nothing against it."""
    rows = len(result.estimate)
    if bool((result.pareto_k == 0).all()):
        draws = f"the {result.num_particles} weights of every row are equal, as those of the posterior itself are"
    else:
        over = int(result.over_threshold.sum())
        draws = f"{over} of {rows} rows have a k-hat over {result.k_threshold:.2f}"
    if check is None:
        origin = result.origin
        if origin is None or origin.proposal.of_chains:
            why = "what is never drawn they do not show, and nothing was tried on simulated data"
            return Verdict(Kind.UNCHECKED, f"{draws}, but {why}")
        try:
            if origin.whole:
                raise PairError(WHOLE)
            others = like(origin.batch)
            check = simulated(
                *(origin.pair.model, origin.pair.guide, others.x, result.num_particles),
                *(origin.proposal, origin.seed, origin.chunk_size, origin.repair),
                given=others.given,
            )
        except (PyrovaeError, ValueError, RuntimeError) as error:
            why = str(error).strip().split("\n")[0]
            return Verdict(Kind.UNCHECKED, f"{draws}, but the pair cannot be tried on simulated data: {why}")
    if missed := int(check.upper.isposinf().sum()):
        return Verdict(
            Kind.LOWER_BOUND,
            f"of {missed} of {len(check.lower)} simulated data the latents are where the proposal has no density: its "
            "support misses part of the prior's",
        )
    tail = f"on {len(check.lower)} simulated data the sandwich is {short(check.width, check.error)} nats wide"
    if not check.validated:
        return Verdict(Kind.LOWER_BOUND, f"{tail}, not narrower than 0.1: the proposal misses part of the posterior")
    bias = stated_bias(result, check)
    if not bias <= MOST_STATED_BIAS:
        return Verdict(
            Kind.LOWER_BOUND,
            f"{tail}, but by the jackknife these rows are worse than those, and may be {bias:.2g} nats too low",
        )
    return Verdict(Kind.OK, f"{draws}; {tail}; too low by at most {bias:.1g} nats on average", bias)


def short(value: float, error: float) -> str:
    """A value of two digits and its error of one, large ones as whole numbers."""
    return f"{value:.0f} ± {error:.0f}" if abs(value) >= 10 else f"{value:.2g} ± {error:.1g}"


def stated_bias(result: LogMarginal, check: Simulated) -> float:
    """How far the mean may be too low: as on simulated data, or worse where the jackknife of these rows is worse."""
    here, there = jackknifed(result), check.jackknifed
    worse = max(1.0, (max(here, 0.0) + LEAST_BIAS) / (max(there, 0.0) + LEAST_BIAS))
    return max(check.most * worse, here, LEAST_BIAS)


def jackknifed(result: LogMarginal) -> float:
    """The bias of the mean that the jackknife finds, in nats; NaN where it cannot be told."""
    return (result.jackknife - result.estimate).mean().item()


def by_jackknife(bias: float) -> Verdict:
    """The verdict of an estimate whose own draws show a bias."""
    if math.isnan(bias):  # of a single draw, or where one weight is all of a row's
        return Verdict(Kind.LOWER_BOUND, "a bias cannot be told: for some row all weight is on one draw")
    return Verdict(
        Kind.LOWER_BOUND,
        f"the jackknife finds it {bias:.2g} nats too low, more than {MOST_BIAS:g}; a larger K raises it",
    )


def named(result: LogMarginal, most: int = MOST_NAMED) -> str:
    """The worst rows, for a message."""
    return ", ".join(map(str, worst_rows(result)[:most]))


def worst_rows(result: LogMarginal) -> list[int]:
    """The rows with the largest k-hat, or where there is none, with the largest standard error; the worst first."""
    known = bool((~result.pareto_k.isnan()).any())
    by = result.pareto_k.nan_to_num(nan=math.inf) if known else result.standard_error
    return by.argsort(descending=True)[:MOST_NAMED].tolist()
