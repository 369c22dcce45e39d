"""What a model is given beside x, and conditions everything on: p(x|y), with one y for each row.

The labels of a data set become one-hot vectors y of shape (N, C), one column for each class of the training rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.data.found import SPLITS, require_memory
from pyrovae.errors import DataError

CONDITIONS = ("label",)


@dataclass(frozen=True, eq=False)
class Given:
    """What everything is conditioned on, for the rows of each split.

    Attributes:
        tensors: Under "train", "validation" and "test", a tuple of tensors of shape (N, ...), one row for each of x.
            Pass them on as `given=`.
        name: What it is: "label"; None if nothing is given.
        columns: Names of the columns of y: of the classes, or their numbers.
    """

    tensors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=lambda: dict.fromkeys(SPLITS, ()), repr=False)
    name: str | None = None
    columns: tuple[str, ...] = ()

    def __getitem__(self, split: str) -> tuple[Tensor, ...]:
        return self.tensors[split]


def labels_as_given(labels: Mapping[str, Tensor | None], classes: Sequence[str] | None, where: str) -> Given:
    """One-hot labels, float32, shape (N, C): the columns are the C labels of the training rows, in their order.

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
            "(`y` in a .npz, a column `label` in a .csv, a subfolder for each class of images)"
        )
    present = {split: of_split for split, of_split in labels.items() if of_split is not None}
    known = present["train"].unique()
    require_memory(4 * len(known) * sum(map(len, present.values())), f"{where}, {len(known)} classes")
    tensors: dict[str, tuple[Tensor, ...]] = {}
    for split, of_split in present.items():
        unknown = of_split[~torch.isin(of_split, known)]
        if len(unknown):
            raise DataError(
                f"{where}: {len(unknown)} rows of {split} have labels that no training row has, such as "
                f"{unknown[0].item()}; a model conditioned on labels says nothing of them"
            )
        tensors[split] = (one_hot(torch.searchsorted(known, of_split), len(known)).to(torch.float32),)
    names = tuple(str(label) if classes is None else classes[label] for label in known.tolist())
    return Given(tensors, "label", names)
