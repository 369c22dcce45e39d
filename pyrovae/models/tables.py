r"""A product of likelihoods over the columns of a table, each of its own kind.

    p(x|z) = prod_d p_d(x_d|z)

    a density: Gaussian if continuous, log-normal if positive, Student-t if heavy, Beta if a fraction
    a mass: Bernoulli if binary, Poisson or negative binomial if a count, a softmax if categorical, and if ordinal the
    cumulative logits of `pyrovae.models.ordinal`

so that log p(x) is one of a density of some columns times a mass of the others. One decoder has an output for all of
them; columns of one kind make one likelihood, any of this library's, which reads its part of that output (`Head`).

A continuous column is standardised by the training rows (a heavy one by median and quartiles), and its log p is in its
own units all the same: with u = (x - m) / s, log p(x) = log p(u) - log s. A categorical column is one number from 0 to
L - 1, which the decoder has L logits of, and the encoder sees as a one-hot vector (`OfTable`); there is no mean of it,
which is NaN.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.columns import (
    BINARY,
    CATEGORICAL,
    CONTINUOUS,
    COUNT,
    DENSITIES,
    FRACTION,
    HEAVY,
    ORDINAL,
    POSITIVE,
    Column,
)
from pyrovae.errors import DataError, UsageError
from pyrovae.models.counts import NegativeBinomial, Poisson
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.likelihoods import Bernoulli, Beta, Gaussian, LogNormal, StudentT
from pyrovae.models.networks import Biased, Network
from pyrovae.models.ordinal import Ordinal
from pyrovae.models.views import View
from pyrovae.settings import checked


class Categories(Likelihood):
    """A mass on {0, ..., L - 1}^D: a softmax for each element, with the decoder's output (D, L) as logits.

    Args:
        decoder: Maps z to (D, L).
        levels: L.
    """

    measure = "categories"

    def __init__(self, decoder: Network, levels: int) -> None:
        super().__init__(decoder, decoder.out_shape[:-1])
        self.levels = levels

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (*event_shape, settings["levels"])

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Categorical(logits=self.decoder(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start at the frequencies of the classes, one more counted of each."""
        counts = nn.functional.one_hot(x.long(), self.levels).to(x.dtype).sum(0) + 1
        set_output_bias(self.decoder, counts.log() - counts.sum(-1, keepdim=True).log())

    def check_support(self, x: Tensor) -> None:
        wrong = ~((x >= 0) & (x < self.levels) & (x == x.round()))
        if wrong.any():
            raise DataError(
                f"x: classes from 0 to {self.levels - 1}, got {int(wrong.sum())} other values, such as {x[wrong][0]:g}"
            )


class Group(NamedTuple):
    """Columns of one kind, and the likelihood of them."""

    at: list[int]
    of: type[Likelihood]
    settings: dict[str, Any]
    shape: tuple[int, ...]  # of the decoder's output for them


class Columns(Likelihood):
    """A product over the columns of a table: a density of the continuous ones times a mass of all others.

    Args:
        decoder: Maps z to a vector of the outputs for all columns; see `decoder_shape`.
        columns: Of x, in their order.
        scale: Of continuous, positive and heavy columns: "per-column", or "predicted", by the decoder.
        counts: The likelihood of counts: "negative-binomial" or "poisson".
    """

    measure = "columns"
    short = ("table",)
    loc: Tensor
    unit: Tensor
    order: Tensor

    @checked
    def __init__(
        self,
        decoder: Network,
        columns: Sequence[Column],
        scale: Literal["per-column", "predicted"] = "per-column",
        counts: Literal["negative-binomial", "poisson"] = "negative-binomial",
    ) -> None:
        super().__init__(decoder, (len(columns),))
        self.columns, self.groups = tuple(columns), groups_of(columns, scale, counts)
        wanted = self.decoder_shape(self.event_shape, columns=columns, scale=scale, counts=counts)
        if decoder.out_shape != wanted:
            raise UsageError(f"decoder: expected an output of shape {wanted}, got {decoder.out_shape}; build it so")
        self.sizes = [math.prod(group.shape) for group in self.groups]
        made = [group.of(Head(group.shape), **group.settings) for group in self.groups]
        self.parts: Sequence[Likelihood] = nn.ModuleList(made)  # type: ignore[assignment]
        places = torch.tensor([i for group in self.groups for i in group.at])
        self.register_buffer("order", places.argsort(), persistent=False)
        self.register_buffer("loc", torch.zeros(len(columns)))
        self.register_buffer("unit", torch.ones(len(columns)))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        """A vector: for a continuous column one number or two, for a categorical one as many as it has classes, ..."""
        of = {key: settings[key] for key in ("columns", "scale", "counts") if key in settings}
        return (sum(math.prod(group.shape) for group in groups_of(**of)),)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z), its elements independent; means of categorical columns are NaN."""
        outputs = self.decoder(z).split(self.sizes, -1)
        parts = [part(out).base_dist for part, out in zip(self.parts, outputs, strict=True)]
        return OfColumns(parts, [group.at for group in self.groups], self.order, self.loc, self.unit).to_event(1)

    def initialise(self, x: Tensor) -> None:
        """Start each column at training data x of shape (N, D), and standardise the continuous ones by it."""
        wide = x.double()
        for i, column in enumerate(self.columns):
            if column.kind == CONTINUOUS:
                spread = wide[:, i].std(correction=0)
                self.loc[i], self.unit[i] = wide[:, i].mean(), spread if spread > 0 else 1.0
            elif column.kind == HEAVY:  # of which a mean and a variance follow the outliers
                low, middle, high = quartiles(wide[:, i])
                self.loc[i], self.unit[i] = middle, (high - low) / 1.349 if high > low else 1.0
        standard = (x - self.loc) / self.unit
        for part, group in zip(self.parts, self.groups, strict=True):
            part.initialise(standard[:, group.at])

    def check_support(self, x: Tensor) -> None:
        for part, group in zip(self.parts, self.groups, strict=True):
            try:
                part.check_support(x[..., group.at])
            except DataError as error:
                names = ", ".join(self.columns[i].name for i in group.at[:5])
                raise DataError(f"{self.columns[group.at[0]].kind} columns ({names}): {error}") from None

    def view(self, event_shape: tuple[int, ...]) -> View:
        return OfTable(event_shape, self.columns)


def groups_of(columns: Sequence[Column], scale: str = "per-column", counts: str = "negative-binomial") -> list[Group]:
    """The columns of each kind together, with the likelihood that they have."""
    of_scale = {"scale": "predicted" if scale == "predicted" else "per-dimension"}
    made: list[tuple[type[Likelihood], dict[str, Any], list[int]]] = [
        (Gaussian, of_scale, at_kind(columns, CONTINUOUS)),
        (LogNormal, of_scale, at_kind(columns, POSITIVE)),
        (StudentT, {"df": "learned", **of_scale}, at_kind(columns, HEAVY)),
        (Beta, {}, at_kind(columns, FRACTION)),
        (Bernoulli, {}, at_kind(columns, BINARY)),
        (NegativeBinomial if counts == "negative-binomial" else Poisson, {}, at_kind(columns, COUNT)),
    ]
    for kind, likelihood in ((CATEGORICAL, Categories), (ORDINAL, Ordinal)):
        for levels in sorted({columns[i].levels for i in at_kind(columns, kind)}):
            at = [i for i in at_kind(columns, kind) if columns[i].levels == levels]
            made.append((likelihood, {"levels": levels}, at))
    return [Group(at, cls, settings, cls.decoder_shape((len(at),), **settings)) for cls, settings, at in made if at]


def at_kind(columns: Sequence[Column], *kinds: str) -> list[int]:
    """The places of the columns of some kinds."""
    return [i for i, column in enumerate(columns) if column.kind in kinds]


class Head(Biased):
    """A part of a vector as the output of a decoder of its own, with a bias that a likelihood starts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(nn.Unflatten(1, shape), math.prod(shape), shape)


class OfColumns(dist.TorchDistribution):
    """Independent columns, event shape (): of batch shape (*batch, D), each from the part that has it.

    Args:
        parts: Distributions of batch shape (*batch, D_i) and event shape ().
        at: The D_i columns of each.
        order: Where the columns 0, ..., D - 1 stand among those of all parts.
        loc: Of a column, of which u = (x - loc) / unit is what the part is of, shape (D,).
        unit: Likewise.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(
        self, parts: Sequence[Any], at: Sequence[Sequence[int]], order: Tensor, loc: Tensor, unit: Tensor
    ) -> None:
        self.parts, self.at, self.order, self.loc, self.unit = parts, at, order, loc, unit
        super().__init__(torch.Size((*parts[0].batch_shape[:-1], len(order))), validate_args=False)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the parts' columns, in the order of the columns."""
        return torch.cat(list(values), -1).index_select(-1, self.order)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.unit * self.joined([part.mean.to(self.loc) for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return self.unit.square() * self.joined([part.variance.to(self.loc) for part in self.parts])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OfColumns":
        parts = [part.expand((*batch_shape[:-1], len(at))) for part, at in zip(self.parts, self.at, strict=True)]
        return OfColumns(parts, self.at, self.order, self.loc, self.unit)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.unit * self.joined([part.sample(sample_shape).to(self.loc) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        u = (value - self.loc) / self.unit
        each = [part.log_prob(u[..., at]) for part, at in zip(self.parts, self.at, strict=True)]
        return self.joined(each) - self.unit.log()


def quartiles(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of x (N, ...): the values a quarter, half and three quarters of the way up, of shape (...)."""
    rows = x.sort(0).values
    low, middle, high = (rows[len(x) * quarter // 4] for quarter in (1, 2, 3))
    return low, middle, high


class OfTable(View):
    """A row of a table as an encoder sees it.

    Numbers are standardised: continuous and ordinal ones as they are, of counts and positive ones the logarithms, of
    heavy ones inverse hyperbolic sines about their median, of fractions the logits. Classes become one-hot vectors.

    Args:
        event_shape: (D,), or (D + C,) with something beside x, which is seen as it is.
        columns: The D columns.
    """

    counts: Tensor
    positive: Tensor
    heavy: Tensor
    fractions: Tensor
    centre: Tensor
    width: Tensor
    shift: Tensor
    spread: Tensor

    def __init__(self, event_shape: tuple[int, ...], columns: Sequence[Column]) -> None:
        self.numbers = [i for i in range(event_shape[0]) if i >= len(columns) or columns[i].kind != CATEGORICAL]
        self.classes = {i: column.levels for i, column in enumerate(columns) if column.kind == CATEGORICAL}
        super().__init__(event_shape, (len(self.numbers) + sum(self.classes.values()),))
        of = [columns[i].kind if i < len(columns) else "" for i in self.numbers]
        self.scaled = [i for i, kind in enumerate(of) if kind in (*DENSITIES, COUNT, ORDINAL)]
        self.kinds = set(of)
        for name, wanted in (("counts", COUNT), ("positive", POSITIVE), ("heavy", HEAVY), ("fractions", FRACTION)):
            self.register_buffer(name, torch.tensor([kind == wanted for kind in of]), persistent=False)
        if HEAVY in self.kinds:
            self.register_buffer("centre", torch.zeros(len(of)))
            self.register_buffer("width", torch.ones(len(of)))
        self.register_buffer("shift", torch.zeros(len(of)))
        self.register_buffer("spread", torch.ones(len(of)))

    def forward(self, x: Tensor) -> Tensor:
        seen = [(self.plain(x) - self.shift) / self.spread]
        for i, levels in self.classes.items():
            seen.append((x[..., i : i + 1] == torch.arange(levels, device=x.device)).to(x.dtype))
        return torch.cat(seen, -1)

    def plain(self, x: Tensor) -> Tensor:
        """All columns but the categorical ones, each on a scale of which an encoder sees much."""
        numbers = x[..., self.numbers]
        seen = torch.where(self.counts, numbers.sign() * numbers.abs().log1p(), numbers)
        if POSITIVE in self.kinds:
            seen = torch.where(self.positive, numbers.clamp(min=torch.finfo(x.dtype).tiny).log(), seen)
        if HEAVY in self.kinds:
            seen = torch.where(self.heavy, ((numbers - self.centre) / self.width).asinh(), seen)
        if FRACTION in self.kinds:
            seen = torch.where(self.fractions, numbers.logit(torch.finfo(x.dtype).eps), seen)
        return seen

    def initialise(self, x: Tensor) -> None:
        """Take means and standard deviations from training data x (N, *event_shape)."""
        if HEAVY in self.kinds:
            low, middle, high = quartiles(x[..., self.numbers])
            self.centre.copy_(middle)
            self.width.copy_(torch.where(high > low, high - low, 1.0))
        numbers = self.plain(x).double()[:, self.scaled]
        spread = numbers.std(0, correction=0)
        self.shift[self.scaled] = numbers.mean(0).to(self.shift)
        self.spread[self.scaled] = torch.where(spread > 0, spread, 1.0).to(self.spread)
