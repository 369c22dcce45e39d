"""What a model is given beside x, and conditions everything on: p(x|y), with one y for each row.

A condition names what y is made of: `label`, or columns of a table, or both (`age,label`). Labels become one-hot
vectors, one column for each class of the training rows. Columns are taken out of x; one of zeros and ones stays as it
is, any other is standardised by the training rows, (y - mean) / sd, so that all are of one size. `total`, the sum of a
row of counts, becomes its logarithm, for a likelihood whose means are shares of it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.columns import CATEGORICAL
from pyrovae.data.found import SPLITS, require_memory
from pyrovae.data.raw import Raw
from pyrovae.errors import DataError, UsageError

LABEL, TOTAL = "label", "total"


@dataclass(frozen=True, eq=False)
class Given:
    """What everything is conditioned on, for the rows of each split.

    Attributes:
        tensors: Under "train", "validation" and "test", a tuple of tensors of shape (N, ...), one row for each of x.
            Pass them on as `given=`.
        name: What it is: "label", "age,label"; None if nothing is given.
        columns: Names of the columns of y: of the table's columns, and of the classes, or their numbers.
        examples: Some y of shape (C,) by name, to draw samples for: each class, other columns at their mean; without
            labels, each column alone at one standard deviation below and above its mean, or at 0 and 1.
    """

    tensors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=lambda: dict.fromkeys(SPLITS, ()), repr=False)
    name: str | None = None
    columns: tuple[str, ...] = ()
    examples: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, split: str) -> tuple[Tensor, ...]:
        return self.tensors[split]

    @property
    def words(self) -> str:
        """It in a sentence: "the label", "age, label"."""
        return "the label" if self.name == LABEL else ", ".join((self.name or "nothing").split(","))


def conditioned(data: Raw, condition: str) -> tuple[Raw, Given]:
    """What is left of the data as x, and what a condition takes of it as y, float32, shape (N, C).

    Raises:
        UsageError: the condition names something that the data do not have, or twice, or all columns.
        DataError: rows without labels, or with labels that no training row has; or too many classes for the memory.
    """
    names = [name.strip() for name in condition.split(",")]
    columns = named_columns(data)
    known = [LABEL, *(name for name in columns if name != LABEL), *([] if TOTAL in columns else [TOTAL])]
    for i, name in enumerate(names):
        if name not in known or name in names[:i]:
            near = difflib.get_close_matches(name, known, 1)
            what = "is named twice" if name in known else f"is none of {', '.join(known[:20])}"
            hint = f"; did you mean {near[0]}?" if near and name not in known else ""
            raise UsageError(f"condition: {name!r} {what}{hint}", settings=("condition",))
    taken = [name for name in names if name != LABEL and name in columns]
    if TOTAL in names[:-1] and TOTAL not in columns:
        raise UsageError(f"condition: name {TOTAL} last, where a likelihood looks for it", settings=("condition",))
    rest = without(data, taken) if taken else data
    parts = [
        labels_as_given(data.labels, data.classes, data.name)
        if name == LABEL
        else covariate(data, name)
        if name in columns
        else total_of(data)
        for name in names
    ]
    together = {split: (torch.cat([part.y[split] for part in parts], 1),) for split in SPLITS}
    alone = names == [LABEL]
    of_y = (c if alone or part.of != LABEL else f"label {c}" for part in parts for c in part.columns)
    return rest, Given(together, ",".join(names), tuple(of_y), dict(examples(parts)))


def named_columns(data: Raw) -> list[str]:
    """The columns of a table by their names, without blanks around them."""
    return [column.strip() for column in data.columns or ()]


@dataclass(frozen=True)
class _Part:
    """What one name of a condition makes of y: its columns for each split, and some values of them by name."""

    of: str
    y: Mapping[str, Tensor] = field(repr=False)
    columns: tuple[str, ...]
    values: Mapping[str, Tensor]


def examples(parts: Sequence[_Part]) -> Iterator[tuple[str, Tensor]]:
    """Some y to draw samples for, see `Given`."""
    middle = [part.y["train"].mean(0) for part in parts]
    labels = [i for i, part in enumerate(parts) if part.of == LABEL]
    for i in labels or range(len(parts)):
        for name, value in parts[i].values.items():
            yield name, torch.cat([value if i == j else at for j, at in enumerate(middle)])


def covariate(data: Raw, name: str) -> _Part:
    """A column of a table as y, shape (N, 1).

    Raises:
        DataError: it is constant, categorical, or has values that are missing.
    """
    at = named_columns(data).index(name)
    if data.table is not None and data.table[at].kind == CATEGORICAL:
        raise DataError(f"{data.name}: column {name!r} is categorical; name it `label` in the file to condition on it")
    if any(getattr(data, split)[:, at].isnan().any() for split in SPLITS):
        raise DataError(f"{data.name}: column {name!r} has values that are missing, and so nothing to condition on")
    raw = {split: getattr(data, split)[:, at : at + 1].float() for split in SPLITS}
    if all(((column == 0) | (column == 1)).all() for column in raw.values()):
        return _Part(name, raw, (name,), {f"{name} = {i}": torch.tensor([float(i)]) for i in (0, 1)})
    mean, sd = raw["train"].double().mean(), raw["train"].double().std(correction=0)
    if not sd > 0:
        raise DataError(f"{data.name}: column {name!r} is the same in all training rows, so it tells nothing; leave it")
    y = {split: ((column.double() - mean) / sd).float() for split, column in raw.items()}
    ends = {f"{name} = {(mean + i * sd).item():.3g}": torch.tensor([float(i)]) for i in (-1, 1)}
    return _Part(name, y, (name,), ends)


def total_of(data: Raw) -> _Part:
    """The logarithm of each row's sum, at least 1, shape (N, 1), of rows of whole numbers.

    Raises:
        DataError: rows have other values, or some are missing.
    """
    if data.missing or (data.moments is not None and (data.moments.low < 0 or not data.moments.whole.all())):
        raise DataError(f"{data.name}: rows are no counts, so that they have no total; condition on something else")
    y = {split: getattr(data, split)[:].flatten(1).float().sum(1, keepdim=True).clamp(min=1).log() for split in SPLITS}
    mean, sd = y["train"].mean(), y["train"].std(correction=0)
    ends = {f"total = {(mean + i * sd).exp().item():.3g}": (mean + i * sd).reshape(1) for i in (-1, 1)}
    return _Part(TOTAL, y, (f"log {TOTAL}",), ends)


def without(data: Raw, names: Sequence[str]) -> Raw:
    """The data without some columns of their table; zeros and ones, if no others are left, are binary.

    Raises:
        UsageError: none would be left.
    """
    columns = named_columns(data)
    keep = [i for i, name in enumerate(columns) if name not in names]
    if not keep:
        raise UsageError("condition: takes all columns, so that no x is left; leave one out", settings=("condition",))
    rows = {split: getattr(data, split)[:, keep] for split in SPLITS}
    moments = data.moments
    if moments is not None:
        every = torch.cat(list(rows.values()))
        per_column = {name: getattr(moments, name)[keep] for name in ("mean", "sd", "constant", "whole")}
        seen = every[~every.isnan()]
        moments = replace(moments, low=seen.min().item(), high=seen.max().item(), **per_column)
        if ((every == 0) | (every == 1)).all():
            rows, moments = {split: x.to(torch.uint8) for split, x in rows.items()}, None
    table = None if data.table is None else tuple(data.table[i] for i in keep)
    return replace(data, **rows, moments=moments, columns=tuple(columns[i] for i in keep), table=table)


def labels_as_given(labels: Mapping[str, Tensor | None], classes: Sequence[str] | None, where: str) -> _Part:
    """One-hot labels, shape (N, C): the columns are the C labels of the training rows, in their order.

    Args:
        labels: int64 labels of each split; None where there are none.
        classes: Names of the labels 0, 1, ...
        where: The data set in words, for messages.

    Raises:
        DataError: rows without labels, or with labels that no training row has; or too many classes for the memory.
    """
    missing = [split for split in SPLITS if labels[split] is None]
    if missing:
        raise DataError(
            f"{where}: no labels for the rows of {', '.join(missing)}, and so nothing to condition on; give labels "
            "(`y` in a .npz, NAME.labels.npy beside NAME.npy, a column `label` in a .csv, a subfolder for each class "
            "of images)"
        )
    present = {split: of_split for split, of_split in labels.items() if of_split is not None}
    known = present["train"].unique()
    require_memory(4 * len(known) * sum(map(len, present.values())), f"{where}, {len(known)} classes")
    y: dict[str, Tensor] = {}
    for split, of_split in present.items():
        unknown = of_split[~torch.isin(of_split, known)]
        if len(unknown):
            raise DataError(
                f"{where}: {len(unknown)} rows of {split} have labels that no training row has, such as "
                f"{unknown[0].item()}; a model conditioned on labels says nothing of them"
            )
        y[split] = one_hot(torch.searchsorted(known, of_split), len(known)).to(torch.float32)
    names = tuple(str(label) if classes is None else classes[label] for label in known.tolist())
    return _Part(LABEL, y, names, dict(zip(names, torch.eye(len(names)), strict=True)))
