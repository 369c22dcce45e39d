r"""log p(x) by importance sampling from the guide, with its diagnostics.

From log-weights log w_k = log p(x, z_k) - log q(z_k|x), k = 1 .. K, per datum:

    estimate         L_K = log (1/K) sum_k w_k                     E L_K <= log p(x), and tight as K grows
    ess              (sum_k w_k)^2 / sum_k w_k^2
    standard error   sqrt(1/ess - 1/K)                             delta method: sd(mean w) / mean w
    pareto k-hat     shape of the weights' tail; above min(1 - 1/log10 K, 0.7) read L_K as a lower bound only
    curve            L_k for k < K, averaged over the K // k disjoint groups of the same draws
    elbo             L_1 of that curve, the mean log-weight
    jackknife        K L_K - (K - 1) mean_i L_{K-1} without draw i: free of the bias of order 1/K, but no bound
    excess           P(mean L_K >= mean log p(x) + b/N) <= exp(-b): Markov's inequality on prod_n exp(L_K - log p(x_n)),
                     whose expectation is 1

Reductions are in double precision whatever the pair computes in, and K is exactly the number of draws, however they
are cut into chunks.

References:
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Vehtari et al. 2024, Pareto Smoothed Importance Sampling, https://arxiv.org/abs/1507.02646
    Nowozin 2018, Debiasing Evidence Approximations, https://openreview.net/forum?id=HyZoi-WRb
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_count, describe
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import MOST_STATES, Summation, summation
from pyrovae.inference.estimate import standard_error
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import FROM_GUIDE, Proposal, check_proposal
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import log_mean_exp
from pyrovae.seeding import keyed

# Elements of x decoded at once when `chunk_size` is not given: 64 MiB in single precision for each activation.
ELEMENTS_AT_ONCE = 2**24
# ArviZ fits no tail to fewer draws.
LEAST_DRAWS_FOR_TAIL = 30
# A row of which all weight is on fewer draws than this, or whose k-hat is over this, may be missed by any distance.
LEAST_ESS = 10.0
MOST_K_HAT = 1.0
# The tensors of a LogMarginal with one value per row.
PER_ROW = ("estimate", "standard_error", "ess", "pareto_k", "elbo", "jackknife", "zero_weights")
# Data that an estimate keeps, to simulate others like them.
ORIGINAL_ROWS = 300


@dataclass(frozen=True)
class Origin:
    """What an estimate is of, so that it can be checked (`pyrovae.inference.verdict`).

    Attributes:
        pair: The pair.
        batch: Some of the data.
        proposal: Where the draws came from.
        seed: Of the draws, or 0.
        chunk_size: Particles evaluated at once.
        whole: The pair works on all of its rows together only, so that it cannot be tried on others.
        repair: Where the draws of rows that were scored again came from (`pyrovae.inference.repair`).
    """

    pair: Pair
    batch: Batch
    proposal: Proposal
    seed: int
    chunk_size: int | None
    whole: bool
    repair: Proposal | None = None


@dataclass(frozen=True)
class LogMarginal:
    """Estimates of log p(x) in nats, one per datum; every tensor is in double precision on the CPU.

    Attributes:
        estimate: log p(x), shape (N,). For K draws from a guide, a lower bound in expectation.
        standard_error: Monte Carlo error of `estimate`, shape (N,); 0 where exact, NaN for K = 1.
        ess: Effective sample size of the weights, from 1 to K, shape (N,).
        pareto_k: k-hat, shape (N,); 0 where all weights are equal, -1 where the largest are, NaN where K is too small
            to tell, or almost all weight is on too few draws.
        elbo: Mean log-weight, shape (N,): the ELBO of the guide where `of_guide`.
        jackknife: `estimate` less its bias of order 1/K, shape (N,); no bound, and NaN for K = 1.
        zero_weights: How many of the K weights are 0, shape (N,).
        curve: {k: L_k of shape (N,)}, from the same draws.
        num_particles: K; 0 says that `estimate` is exact.
        estimator: In words.
        of_guide: Whether the draws are the guide's.
        repaired: Which rows were scored again by a better proposal; None where no row was to be.
        exact_as: How log p(x) is exact, where it is.
        origin: The pair that was estimated, which is not saved with the numbers; None where it is not known.
    """

    estimate: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    elbo: Tensor
    jackknife: Tensor
    zero_weights: Tensor
    curve: dict[int, Tensor]
    num_particles: int
    estimator: str
    of_guide: bool = False
    repaired: tuple[int, ...] | None = None
    exact_as: str = "in closed form"
    origin: Origin | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "origin": None}

    def columns(self) -> Tensor:
        """All numbers of each row: those of `PER_ROW`, then the curve; shape (columns, N)."""
        return torch.stack([*(getattr(self, name).double() for name in PER_ROW), *self.curve.values()])

    @classmethod
    def from_columns(cls, columns: Tensor, num_particles: int, estimator: str) -> "LogMarginal":
        """The inverse of `columns`, for estimates by draws."""
        values: dict[str, Any] = dict(zip(PER_ROW, columns, strict=False))
        values["zero_weights"] = values["zero_weights"].long()
        curve = dict(zip(curve_sizes(num_particles), columns[len(PER_ROW) :], strict=True))
        return cls(**values, curve=curve, num_particles=num_particles, estimator=estimator)

    @property
    def invalid(self) -> list[int]:
        """Rows whose estimate is not a finite number."""
        return (~self.estimate.isfinite()).nonzero().flatten().tolist()

    @property
    def mean(self) -> float:
        """Mean of log p(x) over the rows, in nats per datum."""
        return self.estimate.mean().item()

    @property
    def error_over_rows(self) -> float:
        """Standard error of `mean` as an estimate for all data of the kind: sd / sqrt(N)."""
        return standard_error(self.estimate)

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of `mean` for these rows: sqrt(sum of squared errors) / N."""
        return self.standard_error.square().sum().sqrt().item() / len(self.estimate)

    def excess(self, probability: float = 1e-6) -> float:
        """How far `mean` may be above the mean of log p(x), in nats, except with that probability.

        -log(probability) / N. It holds whatever the guide, for draws that are independent between rows; 0 where exact.
        Rows that were scored again add to it, see `pyrovae.inference.repair`.
        """
        if self.num_particles == 0:
            return 0.0
        if self.repaired is None:
            return -math.log(probability) / len(self.estimate)
        from scipy.stats import chi2

        expected = min(chi2.isf(probability / 2, 2 * len(self.repaired) + 2) / 2, len(self.estimate) * math.log(2))
        return (expected - math.log(probability / 2)) / len(self.estimate)

    @property
    def k_threshold(self) -> float:
        """The k-hat above which an estimate is a lower bound only: min(1 - 1/log10 K, 0.7)."""
        return min(1 - 1 / math.log10(max(self.num_particles, 11)), 0.7)  # above 0, also where there is no k-hat

    @property
    def over_threshold(self) -> Tensor:
        """Which rows have a k-hat over the threshold, or none at all, shape (N,)."""
        return ~(self.pareto_k <= self.k_threshold)

    @property
    def unreliable(self) -> Tensor:
        """Which rows may be missed by any distance, shape (N,); `pyrovae.inference.repair` scores them again.

        Those with an effective sample size below 10, or below K / 2 and a k-hat over 1: a heavy tail of weights that
        hardly vary is that of a few values, as discrete latents have them.
        """
        heavy = ~(self.pareto_k <= MOST_K_HAT) & (self.ess < self.num_particles / 2)
        drawn = self.num_particles > 0  # what is exact has no draws to be few
        return (heavy | (self.ess < LEAST_ESS)) & drawn


class Store(Protocol):
    """Where results of blocks of rows are kept, by the number of the first row."""

    def get(self, start: int, rows: int) -> LogMarginal | None:
        """The result of so many rows that was put there, if any."""

    def put(self, start: int, result: LogMarginal) -> None:
        """Keep a result."""


def check_result(result: object) -> None:
    """Refuse what is no estimate of log p(x)."""
    if not isinstance(result, LogMarginal):
        raise UsageError(f"result: expected what log_marginal returned, got {describe(result)}")


@in_single_precision
def log_marginal(
    model: Callable,
    guide: Callable,
    x: Tensor,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    proposal: Proposal = FROM_GUIDE,
    seed: int | None = None,
    store: Store | None = None,
    given: Sequence[Tensor] = (),
    most_states: int = MOST_STATES,
) -> LogMarginal:
    r"""Estimate log p(x) by importance sampling from the guide, with discrete latents summed out where that can be had.

    log (1/K) sum_k p(x, z_k) / q(z_k | x): never too high on average, tight as K grows. Exact, without a draw, where
    all latents are discrete and their joint states no more than `most_states`; where others are drawn, each weight is
    a sum over the states if that takes no more of them for all K draws of a row (`pyrovae.inference.enumeration`).
    `estimator` says what was done. The guide may leave out what is discrete.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        x: Data, shape (N, *event), in the support of the likelihood.
        num_particles: K, drawn exactly; `chunk_size` only bounds memory.
        chunk_size: Particles evaluated at once, for a block of rows. None: as many as fit in a fixed memory.
        progress: Called with the number of rows done after each block of rows.
        proposal: Where the draws come from, see `pyrovae.inference.proposals`.
        seed: If given, each block of rows has a random state of its own, and the caller's is left as it was.
        store: Keeps the results of blocks, so that an interrupted evaluation with the same seed goes on where it was.
        given: What everything is conditioned on, tensors of shape (N, ...): the estimate is of log p(x | given).
        most_states: Joint states of a row's discrete latents, times K where other latents are drawn, that may be
            summed out. 0: all are drawn. With another proposal than the guide they are drawn as well.

    Returns:
        `estimate` and `standard_error` in nats, `ess`, `pareto_k`, each of shape (N,), and more.

    Raises:
        UsageError: num_particles or chunk_size < 1, x is no tensor with rows, or something in `given` has not as many.
        PairError: the log-weights of the pair are not of log p(x), see `pyrovae.inference.validity`.
    """
    check_count("num_particles (K)", num_particles)
    check_count("most_states", most_states, 0)
    pair, batch = Pair(model, guide), Batch.of(x, given)
    check_proposal(proposal)
    if store is not None and seed is None:
        raise UsageError("store: needs a seed, so that an evaluation that goes on draws what it would have drawn")
    rows, chunk = block_of(batch, num_particles, chunk_size)
    sums = summation(pair, batch, num_particles, most_states)
    pair, without = sums.pair, proposal.summing(sums)
    findings = check_pair(pair, batch, rows)
    if sums.is_exact and without is not None:
        return summed(sums, batch, findings.rows, progress)
    if sums.model is not None and without is not None:
        proposal = without
    rows, chunk = findings.rows, max(1, chunk * rows // findings.rows)
    # Allocated first: the results of blocks kept one by one would sit where the next large tensor might have been.
    columns = torch.empty(len(PER_ROW) + len(curve_sizes(num_particles)), len(batch), dtype=torch.float64)
    with evaluating(pair), torch.no_grad():
        for start, block in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            result = store.get(start, len(block)) if store is not None else None
            if result is None:
                with keyed(seed, "log_marginal", start, device=x.device):
                    result = of_block(pair, block, proposal, num_particles, chunk)
                if store is not None:
                    store.put(start, result)
            columns[:, start : start + rows] = result.columns()
            if progress is not None:
                progress(start + len(block))
    origin = Origin(pair, batch[:ORIGINAL_ROWS], proposal, seed or 0, chunk_size, findings.whole)
    estimator = "; ".join(filter(None, (proposal.name, sums.words if sums.model is None else "")))
    result = LogMarginal.from_columns(columns, num_particles, estimator)
    return replace(result, of_guide=proposal.of_guide, origin=origin)


def summed(sums: Summation, batch: Batch, rows: int, progress: Callable[[int], object] | None) -> LogMarginal:
    """log p(x) as a sum over all states of the latents, in blocks of rows."""
    parts, done = [], 0
    with evaluating(sums.pair), torch.no_grad():
        for block in batch.split(rows):
            parts.append(sums(block))
            done += len(block)
            if progress is not None:
                progress(done)
    return replace(exact(torch.cat(parts)), estimator=f"exact: {sums.words}", exact_as=f"as {sums.words}")


def of_block(pair: Pair, block: Batch, proposal: Proposal, num_particles: int, chunk: int) -> LogMarginal:
    """The estimate of some rows, from K draws in chunks."""
    sample = proposal(pair, block)
    log_w = torch.cat([sample(min(chunk, num_particles - done)) for done in range(0, num_particles, chunk)])
    # Coarser numbers than these would pass any weights as equal.
    rounding = 20 * torch.finfo(log_w.dtype).eps if log_w.dtype.itemsize >= 4 else 0.0
    return summarise(log_w.double().cpu(), proposal, rounding)


def block_of(batch: Batch, num_particles: int, chunk_size: int | None = None) -> tuple[int, int]:
    """How many rows make a block, and how many of its K particles are decoded at once.

    Raises:
        UsageError: chunk_size < 1.
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    size = max(1, sum(tensor[0].numel() for tensor in batch.tensors))
    rows = max(1, min(len(batch), 100, ELEMENTS_AT_ONCE // size))
    return rows, min(num_particles, chunk_size or max(1, ELEMENTS_AT_ONCE // (size * rows * 4)))


def join(blocks: Sequence[LogMarginal]) -> LogMarginal:
    """Results of several blocks of rows as one."""
    values: dict[str, Any] = {name: torch.cat([getattr(block, name) for block in blocks]) for name in PER_ROW}
    return LogMarginal(
        **values,
        curve={k: torch.cat([block.curve[k] for block in blocks]) for k in blocks[0].curve},
        num_particles=blocks[0].num_particles,
        estimator=blocks[0].estimator,
    )


def summarise(log_w: Tensor, proposal: Proposal = FROM_GUIDE, rounding: float = 0.0) -> LogMarginal:
    """The report of log-weights of shape (K, N) in double precision; `rounding` is their relative error."""
    k = len(log_w)
    estimate = log_mean_exp(log_w)
    ess = torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0)).clamp(1, k)
    return LogMarginal(
        estimate=estimate,
        standard_error=(1 / ess - 1 / k).clamp(min=0).sqrt() if k > 1 else torch.full_like(ess, math.nan),
        ess=ess,
        pareto_k=pareto_k(log_w, rounding),
        elbo=log_w.mean(0),
        jackknife=jackknife(log_w),
        zero_weights=(log_w == -math.inf).sum(0),
        curve={size: grouped_bound(log_w, size) for size in curve_sizes(k)},
        num_particles=k,
        estimator=proposal.name,
        of_guide=proposal.of_guide,
    )


def jackknife(log_w: Tensor) -> Tensor:
    """K L_K - (K - 1) mean_i L_{K-1} without draw i, for log-weights (K, N), shape (N,)."""
    k = len(log_w)
    if k == 1:
        return torch.full_like(log_w[0], math.nan)
    total = torch.logsumexp(log_w, 0)
    rest = total + torch.log1p(-torch.exp(log_w - total))
    # The largest weight may be all of the sum in double precision: sum the others.
    top = log_w.argmax(0, keepdim=True)
    rest.scatter_(0, top, torch.logsumexp(log_w.scatter(0, top, -math.inf), 0, keepdim=True))
    result = k * (total - math.log(k)) - (k - 1) * (rest.mean(0) - math.log(k - 1))
    return torch.where(result.isfinite(), result, math.nan)


def curve_sizes(num_particles: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... below K, and K."""
    sizes = [m * 10**e for e in range(len(str(num_particles))) for m in (1, 2, 5)]
    return [size for size in sizes if size < num_particles] + [num_particles]


def grouped_bound(log_w: Tensor, size: int) -> Tensor:
    """L_size averaged over disjoint groups of the draws (K, N), shape (N,); a remainder of draws is left out."""
    groups = len(log_w) // size
    return log_mean_exp(log_w[: groups * size].unflatten(0, (groups, size)), 1).mean(0)


def pareto_k(log_w: Tensor, rounding: float = 0.0) -> Tensor:
    """Pareto k-hat of the weights' upper tail, for log-weights (K, N), shape (N,); see `LogMarginal.pareto_k`."""
    result = torch.full((log_w.shape[1],), math.nan, dtype=torch.float64)
    spread = log_w.max(0).values - log_w.min(0).values
    # Weights that differ by no more than rounding have no tail; a single one is equal to itself, and says nothing.
    constant = (spread <= max(1e-8, rounding) * (1 + log_w[0].abs())) & spread.isfinite() & (len(log_w) > 1)
    result[constant] = 0.0
    # A tail of equal weights, as discrete latents give, ends where it begins; ArviZ has no answer, or an error, to it.
    tail = log_w.topk(math.ceil(min(0.2 * len(log_w), 3 * math.sqrt(len(log_w)))), 0).values
    flat = ~constant & (tail[0] - tail[-1] <= max(1e-8, rounding) * (1 + tail[0].abs())) & tail[0].isfinite()
    if len(log_w) >= LEAST_DRAWS_FOR_TAIL:
        result[flat] = -1.0
    varying = ~constant & ~flat & log_w.max(0).values.isfinite()
    if len(log_w) >= LEAST_DRAWS_FOR_TAIL and varying.any():
        khat = psis_khat(log_w[:, varying].T.contiguous().numpy())
        result[varying] = torch.where(torch.from_numpy(khat).isfinite(), torch.from_numpy(khat), math.nan)
    return result


def psis_khat(log_w: np.ndarray) -> np.ndarray:
    """ArviZ's Pareto k-hat of log-weights (N, K), shape (N,), under ArviZ 0.2x and 1.x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its own refactoring at import
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz.stats.stats import psislw

            return np.asarray(psislw(log_w)[1], dtype=float).reshape(-1)
        # From 1.0 on it takes log-likelihoods, the negative of leave-one-out log-weights.
        return np.asarray(array_stats.psislw(-log_w)[1], dtype=float).reshape(-1)


def exact(log_prob: Tensor) -> LogMarginal:
    """An exact log p(x) of shape (N,) in the form of an estimate without error."""
    values = log_prob.detach().double().cpu()
    zero = torch.zeros_like(values)
    return LogMarginal(
        estimate=values,
        standard_error=zero,
        ess=zero,
        pareto_k=zero,
        elbo=values,
        jackknife=values,
        zero_weights=torch.zeros(len(values), dtype=torch.int64),
        curve={},
        num_particles=0,
        estimator="exact",
    )
