r"""What an estimate of log p(x) may be quoted as: a word, and the reason for it.

    exact               log p(x) in closed form, or all K weights of every row equal: the guide is the posterior,
                        wherever it draws
    ok                  besides its Monte Carlo error, too low by at most the bias that is stated, of 0.05 nat
    lower bound only    not above log p(x) beyond the stated excess, but it may be far below: quote it as a bound
    invalid             some row has no estimate: a weight is NaN or infinite, or all are zero

`ok` asks that at most `MOST_ROWS_OVER` of the rows have a k-hat over min(1 - 1/log10 K, 0.7), and that the jackknife
finds a bias of the mean of no more than `MOST_BIAS`. Both were set on linear-Gaussian pairs, whose log p(x) is known,
with 2 to 50 latent dimensions and guides of 0.5 to 3 times the posterior's width (benchmarks/calibration.py): what they
pass is at most 0.003 nat too low, for 1000 draws. Monte Carlo errors fall with the number of rows, the bias does not:
for 100 rows intervals of these errors cover, for many thousands the bias may be the larger of the two, and is stated.
k-hat is the sharper of the two limits: weights of a guide that is too narrow have a tail that most sets of K draws do
not show, and the jackknife sees only what was drawn.

For annealed importance sampling the check on simulated data takes the place of k-hat, which asks for more draws than
there are chains: `ok` where the sandwich is narrower than 0.1 nat (`pyrovae.inference.annealed`).

No diagnostic of draws can see a mode of the posterior that the guide never visits; annealed importance sampling from
the prior can.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyrovae.inference.log_marginal import LEAST_DRAWS_FOR_TAIL, LogMarginal

if TYPE_CHECKING:
    from pyrovae.inference.annealed import Sandwich

MOST_ROWS_OVER = 0.1
MOST_BIAS = 0.05
# Rows that are named in a message.
MOST_NAMED = 5


@dataclass(frozen=True)
class Verdict:
    """A judgement of an estimate.

    Attributes:
        kind: "exact", "ok", "lower bound only" or "invalid".
        reason: Why, in words.
    """

    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def verdict(result: LogMarginal, check: "Sandwich | None" = None) -> Verdict:
    """Judge an estimate by its diagnostics.

    Args:
        result: The estimate.
        check: For annealed importance sampling, the sandwich of the same setting on simulated data.
    """
    rows = len(result.estimate)
    if result.invalid:
        named = ", ".join(f"{i} ({result.estimate[i].item():g})" for i in result.invalid[:MOST_NAMED])
        return Verdict(
            "invalid",
            f"log p(x) is not a finite number for {len(result.invalid)} of {rows} rows, the first being {named}; their "
            "weights are all zero, NaN or infinite under this model",
        )
    if result.num_particles == 0:
        return Verdict("exact", "log p(x) in closed form")
    if bool((result.pareto_k == 0).all()):
        equal = f"the {result.num_particles} weights of every row are equal"
        return Verdict("exact", f"{equal}: what is drawn from is the posterior, wherever it draws")
    bias = (result.jackknife - result.estimate).mean().item()
    if check is not None:
        width = f"{check.width:.2g} ± {check.error:.1g} nats wide"
        tail = f"on {len(check.forward)} simulated data the sandwich is {width}"
        if not check.validated:
            return Verdict("lower bound only", f"{tail}, not narrower than 0.1; more temperatures narrow it")
        return by_bias(bias, tail)
    if result.num_particles < LEAST_DRAWS_FOR_TAIL:
        why = f"K = {result.num_particles} is too small for k-hat"
        return Verdict("lower bound only", f"no tail diagnostic: {why}")
    over = int(result.over_threshold.sum())
    tail = f"{over} of {rows} rows have a k-hat over {result.k_threshold:.2f}"
    if over > MOST_ROWS_OVER * rows:
        worst = ", ".join(map(str, worst_rows(result)))
        return Verdict(
            "lower bound only",
            f"{tail}, more than {100 * MOST_ROWS_OVER:g} % (the largest in rows {worst}); a larger K or a better "
            "proposal raises it",
        )
    return by_bias(bias, tail)


def by_bias(bias: float, tail: str) -> Verdict:
    """The verdict of an estimate whose tail is good enough."""
    if math.isnan(bias):  # of a single draw, or where one weight is all of a row's
        return Verdict("lower bound only", "a bias cannot be told: for some row all weight is on one draw")
    if bias > MOST_BIAS:
        return Verdict(
            "lower bound only",
            f"the jackknife finds it {bias:.2g} nats too low, more than {MOST_BIAS:g}; a larger K raises it",
        )
    return Verdict("ok", f"{tail}, and the jackknife finds a bias of {max(bias, 0.0):.1g} nats")


def worst_rows(result: LogMarginal) -> list[int]:
    """The rows with the largest k-hat, or where there is none, with the largest standard error; the worst first."""
    known = bool((~result.pareto_k.isnan()).any())
    by = result.pareto_k.nan_to_num(nan=-1.0) if known else result.standard_error
    return by.argsort(descending=True)[:MOST_NAMED].tolist()
