r"""Repair: the rows that a proposal misses, scored again by a better one.

Where all weight of a row is on a handful of draws, or its k-hat is over 1, its estimate may be missed by any distance
(`LogMarginal.unreliable`), and with it the mean over the rows, whatever the other rows are like. Such rows are drawn
again from a proposal of their own, and only they; the estimate that was bad is not looked at, so that nothing is chosen
by its value.

That a row is drawn again depends on its first draws, which moves the certificate of `LogMarginal.excess`: for a row
that is drawn again with probability P_n, E exp(estimate - log p(x_n)) <= 1 + P_n, so that over all rows

    E exp sum_n (estimate_n - log p(x_n)) <= prod_n (1 + P_n) <= exp(sum_n P_n).

Sum_n P_n is the expected number of such rows. Seeing m of them bounds it from above: it is no more than the mean of the
Poisson distribution under which m or fewer have a given small probability.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyrovae.errors import PairError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.individual import Individual
from pyrovae.inference.marginal import PER_ROW, LogMarginal, check_result, log_marginal
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import Proposal, Widened
from pyrovae.inference.unconstrained import Unconstrained

# Steps of a fit move by at most a standard deviation, and rows that were missed may be a hundred of them away.
FITTED = Individual(steps=1000)
# Where latents are discrete, and no Gaussian can be fitted: half of the draws from the prior, which forgets no state.
FROM_BOTH = Widened(scales=(1.0,), share=0.5)


@in_single_precision
def repair(
    model: Callable,
    guide: Callable,
    x: Tensor,
    result: LogMarginal,
    proposal: Proposal | None = None,
    progress: Callable[[int], object] | None = None,
    given: Sequence[Tensor] = (),
) -> LogMarginal:
    """Score the unreliable rows of an estimate again, from a better proposal and with as many draws.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        x: The data that were scored, shape (N, *event).
        result: Their `log_marginal`.
        proposal: Where the new draws come from; None: `better_than_guide`.
        progress: Called with the number of rows done.
        given: What their estimate was given, tensors of shape (N, ...).

    Returns:
        The estimate with those rows replaced, all but their `elbo`, which stays that of the first proposal; `repaired`
        says which they are.

    Raises:
        UsageError: the estimate is not one of x by `log_marginal`.
        PairError: the proposal cannot be made for this pair.
    """
    check_result(result)
    pair, batch, origin = Pair(model, guide), Batch.of(x, given), result.origin
    if result.num_particles == 0:  # exact
        return replace(result, repaired=())
    if origin is None or len(result.estimate) != len(batch):
        raise UsageError("result: expected what log_marginal returned for x; score x again")
    bad = result.unreliable.nonzero().flatten()
    proposal = proposal or better_than_guide(pair, batch)
    origin = replace(origin, repair=proposal)
    if not len(bad):
        return replace(result, repaired=(), origin=origin)
    rows = batch[bad.to(x.device)]
    again = log_marginal(
        *(model, guide, rows.x, result.num_particles),
        chunk_size=origin.chunk_size,
        progress=progress,
        proposal=proposal,
        seed=origin.seed,
        given=rows.given,
    )
    columns = {name: getattr(result, name).index_put((bad,), getattr(again, name)) for name in PER_ROW}
    return replace(
        result,
        **columns | {"elbo": result.elbo},
        curve={k: bound.index_put((bad,), again.curve[k]) for k, bound in result.curve.items()},
        estimator=f"{result.estimator}; {len(bad)} of {len(batch)} rows again by {again.estimator}",
        origin=origin,
        repaired=tuple(bad.tolist()),
    )


def better_than_guide(pair: Pair, batch: Batch) -> Proposal:
    """A Gaussian fitted to each row; where latents are discrete, the guide mixed with the prior half and half."""
    try:
        with torch.no_grad(), evaluating(pair), torch.random.fork_rng(devices=[]):
            Unconstrained(pair, batch[:1])
    except PairError:
        return FROM_BOTH
    return FITTED
