r"""A mixture of products over the columns of a table, whose log p of what is seen of a row is exact.

    p(x_seen) = sum_c w_c prod_{d seen} p_d(x_d | c)

with a Gaussian for a continuous column, also for a heavy one or a fraction, a log-normal for a positive one, a
Bernoulli for a binary one, a Poisson for counts and a categorical for classes, ordered or not. Columns are independent
given c, so that missing ones are left out, in the E step of EM too; the M step takes each column's moments over the
rows in which it is seen, weighted by the responsibilities:

    N_cd = sum_n r_nc [x_nd seen]       mean_cd = sum_n r_nc x_nd [seen] / N_cd
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.columns import BINARY, CONTINUOUS, COUNT, DENSITIES, OF_CLASSES, POSITIVE, Column
from pyrovae.models.gaps import OfSeen
from pyrovae.models.mixture import EMPTY, Mixture, Weights
from pyrovae.models.seen import Conditional, mixture_given
from pyrovae.models.tables import OfColumns, OfTable, at_kind
from pyrovae.settings import Count, Number, checked

LEAST_VARIANCE = 1e-4  # of a component, as a share of the column's
LEAST_RATE = 1e-3  # of counts


class OfKinds(constraints.Constraint):
    """Numbers that columns of some kinds can have, and NaN, which is missing."""

    event_dim = 0

    def __init__(self, columns: Sequence[Column]) -> None:
        highest = {BINARY: 1.0, COUNT: torch.inf}
        self.whole = torch.tensor([column.kind not in DENSITIES for column in columns])
        self.positive = torch.tensor([column.kind == POSITIVE for column in columns])
        self.most = torch.tensor([highest.get(column.kind, column.levels - 1.0) for column in columns])

    def check(self, value: Tensor) -> Tensor:
        whole = (value == value.round()) & (value >= 0) & (value <= self.most.to(value.device))
        above = (value > 0) | ~self.positive.to(value.device)
        return value.isnan() | (value.isfinite() & above & (whole | ~self.whole.to(value.device)))

    def __str__(self) -> str:
        return "the numbers of these columns, or NaN"


class MixtureOfProducts(Mixture):
    """A mixture of products over columns, an exact baseline for tables and for rows with gaps.

    Args:
        event_shape: (D,), or D.
        components: Number of components, C.
        weights: Mixing weights: "trainable", or "uniform" to hold each at 1/C.
        floor: The M step keeps probabilities of classes above it, and 1 less it below.
        columns: Of what kind each is; None: all continuous.
    """

    word = "mixture"
    measure = "columns"
    tolerance = 1e-5

    @checked
    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: Count = 10,
        weights: Weights = "trainable",
        floor: Annotated[float, Number(above=0, below=0.5)] = 1e-3,
        columns: Sequence[Column] | None = None,
    ) -> None:
        super().__init__(event_shape, components, weights)
        kinds = columns or [Column(f"x{i}", CONTINUOUS) for i in range(self.event_numel)]
        self.columns, self.floor = tuple(kinds), floor
        self.support = OfKinds(self.columns)  # type: ignore[misc]
        self.at = {CONTINUOUS: at_kind(self.columns, *DENSITIES)}
        self.at |= {kind: at_kind(self.columns, kind) for kind in (BINARY, COUNT)}
        self.logged = [self.columns[i].kind == POSITIVE for i in self.at[CONTINUOUS]]
        noise = {kind: 0.1 * torch.randn(components, len(at)) for kind, at in self.at.items()}
        self.loc, self.log_scale = nn.Parameter(noise[CONTINUOUS]), nn.Parameter(torch.zeros_like(noise[CONTINUOUS]))
        self.logits, self.log_rate = nn.Parameter(noise[BINARY]), nn.Parameter(noise[COUNT])
        self.classes = nn.ParameterList(
            0.1 * torch.randn(components, column.levels) for column in self.columns if column.kind in OF_CLASSES
        )

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"mixture of {self.components} products over columns"

    @property
    def means(self) -> Tensor:  # type: ignore[override]
        """Of each component, shape (C, D); NaN for a column of classes."""
        return self.elements(torch.arange(self.components), range(self.event_numel)).mean

    def elements(self, c: Tensor, at: Sequence[int]) -> OfColumns:
        """p(x_d | c) of some columns, as independent elements: batch shape (*c.shape, len(at))."""
        place = {column: i for i, column in enumerate(at)}
        parts: list[dist.Distribution] = []
        of: list[list[int]] = []

        def log_scaled(family: Any, i: list[int]) -> dist.Distribution:
            return family(self.loc[c][..., i], self.log_scale[c][..., i].exp(), validate_args=False)

        made: tuple[tuple[str, bool, Callable[[list[int]], dist.Distribution]], ...] = (
            (CONTINUOUS, False, lambda i: log_scaled(dist.Normal, i)),
            (CONTINUOUS, True, lambda i: log_scaled(dist.LogNormal, i)),
            (BINARY, False, lambda i: dist.Bernoulli(logits=self.logits[c][..., i], validate_args=False)),
            (COUNT, False, lambda i: dist.Poisson(self.log_rate[c][..., i].exp(), validate_args=False)),
        )
        for kind, logged, make in made:
            of_kind = self.logged if kind == CONTINUOUS else [False] * len(self.at[kind])
            chosen = [i for i, column in enumerate(self.at[kind]) if column in place and of_kind[i] == logged]
            if chosen:
                parts.append(make(chosen))
                of.append([place[self.at[kind][i]] for i in chosen])
        for classes, column in zip(self.classes, at_kind(self.columns, *OF_CLASSES), strict=True):
            if column in place:
                parts.append(dist.Categorical(logits=classes[c].unsqueeze(-2), validate_args=False))
                of.append([place[column]])
        order = torch.tensor([i for group in of for i in group], device=self.loc.device).argsort()
        return OfColumns(parts, of, order, self.loc.new_zeros(len(at)), self.loc.new_ones(len(at)))

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """p(x_seen | c) for integer c of any shape: batch shape that of c, event shape (D,), log p of all but NaN."""
        elements = self.elements(c, range(self.event_numel))
        return OfSeen(elements, self.loc.new_zeros(())).to_event(1)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log p(x_seen | c) in nats for every row and component, shape (N, C)."""
        every = torch.arange(self.components, device=x.device)
        return self.component(every).log_prob(x.unsqueeze(1))

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """A mixture of what is missing of each component, whose columns are independent."""
        every = torch.arange(self.components, device=self.loc.device)
        log_probs = self.component_log_prob(x.to(self.loc).where(seen, torch.nan))
        gone = (~seen).nonzero().flatten().tolist()
        if not gone:
            return Conditional(self.log_prob(x), self.component(every[0]))
        components = self.elements(every, gone).expand((len(x), self.components, len(gone))).to_event(1)
        return mixture_given(self.mixing_logits.log_softmax(-1) + log_probs, components)

    def points(self, x: Tensor) -> Tensor:
        """Rows as k-means starts from: standardised, classes one-hot, medians in the gaps."""
        view = OfTable((self.event_numel,), self.columns).to(x)
        filled = x.where(~x.isnan(), x.nanmedian(0).values.nan_to_num(0.0))
        view.initialise(filled)
        return view(filled)

    def _fit_components(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        r, there = responsibilities, ~x.isnan()
        values = x.to(r).nan_to_num(0.0)
        positive = [column for column, logged in zip(self.at[CONTINUOUS], self.logged, strict=True) if logged]
        values[:, positive] = values[:, positive].where(there[:, positive], 1.0).log()
        overall = values.sum(0) / there.sum(0).clamp(min=1)
        counts = r.T @ there.to(r)  # (C, D)
        live = counts > EMPTY
        means = torch.where(live, r.T @ values / counts.clamp(min=EMPTY), overall)
        at = self.at[CONTINUOUS]
        away = (values[:, at].unsqueeze(1) - means[:, at]).square() * there[:, at].unsqueeze(1)  # (N, C, continuous)
        variances = (r.unsqueeze(-1) * away).sum(0) / counts[:, at].clamp(min=EMPTY)
        spread = ((values[:, at] - overall[at]).square() * there[:, at]).sum(0) / there[:, at].sum(0).clamp(min=1)
        floor = LEAST_VARIANCE * spread.clamp(min=EMPTY)
        self.loc.copy_(means[:, at])
        self.log_scale.copy_(torch.maximum(variances, floor).log() / 2)
        self.logits.copy_(means[:, self.at[BINARY]].clamp(self.floor, 1 - self.floor).logit())
        self.log_rate.copy_(means[:, self.at[COUNT]].clamp(min=LEAST_RATE).log())
        for logits, column in zip(self.classes, at_kind(self.columns, *OF_CLASSES), strict=True):
            hot = nn.functional.one_hot(values[:, column].long(), logits.shape[-1]).to(r) * there[:, column, None]
            shares = (r.T @ hot / counts[:, column, None].clamp(min=EMPTY)).clamp(min=self.floor)
            logits.copy_((shares / shares.sum(-1, keepdim=True)).log())
