r"""A product of likelihoods over the columns of a table, each of its own kind.

    p(x|z) = prod_d p_d(x_d|z)      continuous: a density      binary, count, categorical: a mass

so that log p(x) is one of a density of some columns times a mass of the others. One decoder has an output for all of
them; columns of one kind make one likelihood, any of this library's, which reads its part of that output (`Head`).

A continuous column is standardised by the training rows, and its log p is in its own units all the same: with
u = (x - m) / s, log p(x) = log p(u) - log s. A categorical column is one number from 0 to L - 1, which the decoder has
L logits of, and the encoder sees as a one-hot vector (`OfTable`); there is no mean of it, which is NaN.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.columns import BINARY, CATEGORICAL, CONTINUOUS, COUNT, Column
from pyrovae.errors import DataError, UsageError
from pyrovae.models.counts import NegativeBinomial, Poisson
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.likelihoods import Bernoulli, Gaussian
from pyrovae.models.networks import Biased, Network
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
        scale: Of the Gaussians of continuous columns: "per-column", or "predicted", by the decoder.
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
    made: list[tuple[type[Likelihood], dict[str, Any], list[int]]] = [
        (Gaussian, {"scale": "predicted" if scale == "predicted" else "per-dimension"}, at_kind(columns, CONTINUOUS)),
        (Bernoulli, {}, at_kind(columns, BINARY)),
        (NegativeBinomial if counts == "negative-binomial" else Poisson, {}, at_kind(columns, COUNT)),
    ]
    for levels in sorted({column.levels for column in columns if column.kind == CATEGORICAL}):
        at = [i for i in at_kind(columns, CATEGORICAL) if columns[i].levels == levels]
        made.append((Categories, {"levels": levels}, at))
    return [Group(at, cls, settings, cls.decoder_shape((len(at),), **settings)) for cls, settings, at in made if at]


def at_kind(columns: Sequence[Column], kind: str) -> list[int]:
    """The places of the columns of a kind."""
    return [i for i, column in enumerate(columns) if column.kind == kind]


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


class OfTable(View):
    """A row of a table as an encoder sees it.

    Continuous columns are standardised, and so are the logarithms of counts; classes become one-hot vectors.

    Args:
        event_shape: (D,), or (D + C,) with something beside x, which is seen as it is.
        columns: The D columns.
    """

    counts: Tensor
    shift: Tensor
    spread: Tensor

    def __init__(self, event_shape: tuple[int, ...], columns: Sequence[Column]) -> None:
        self.numbers = [i for i in range(event_shape[0]) if i >= len(columns) or columns[i].kind != CATEGORICAL]
        self.classes = {i: column.levels for i, column in enumerate(columns) if column.kind == CATEGORICAL}
        super().__init__(event_shape, (len(self.numbers) + sum(self.classes.values()),))
        of = [columns[i].kind if i < len(columns) else "" for i in self.numbers]
        self.scaled = [i for i, kind in enumerate(of) if kind in (CONTINUOUS, COUNT)]
        self.register_buffer("counts", torch.tensor([kind == COUNT for kind in of]), persistent=False)
        self.register_buffer("shift", torch.zeros(len(of)))
        self.register_buffer("spread", torch.ones(len(of)))

    def forward(self, x: Tensor) -> Tensor:
        seen = [(self.plain(x) - self.shift) / self.spread]
        for i, levels in self.classes.items():
            seen.append((x[..., i : i + 1] == torch.arange(levels, device=x.device)).to(x.dtype))
        return torch.cat(seen, -1)

    def plain(self, x: Tensor) -> Tensor:
        """All columns but the categorical ones, counts by log(1 + x)."""
        numbers = x[..., self.numbers]
        return torch.where(self.counts, numbers.sign() * numbers.abs().log1p(), numbers)

    def initialise(self, x: Tensor) -> None:
        """Take means and standard deviations from training data x (N, *event_shape)."""
        numbers = self.plain(x).double()[:, self.scaled]
        spread = numbers.std(0, correction=0)
        self.shift[self.scaled] = numbers.mean(0).to(self.shift)
        self.spread[self.scaled] = torch.where(spread > 0, spread, 1.0).to(self.spread)
