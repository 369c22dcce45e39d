"""Labels that are seen for some training rows: which rows keep theirs, as many of each class, and how often they come.

Rows with a label come again and again, so that they make a tenth of all training rows: of 100 labels among 55,000 rows
a batch of 100 would have one every fifth time. Validation and test rows are scored without their labels, as rows of
p(x).
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.found import SPLITS
from pyrovae.data.given import Given, labels_as_given
from pyrovae.data.raw import Raw
from pyrovae.errors import DataError, UsageError

SHARE = 0.1  # of training rows with a label
SEED = 20140620  # of the draws of labels, with a run's own


def partly_labelled(data: Raw, count: int, seed: int) -> tuple[Raw, Given]:
    """The data with their training rows repeated, and the labels that are seen of them.

    Args:
        data: With labels.
        count: How many training rows keep theirs.
        seed: Of the draw, which is the same on every machine.

    Returns:
        The data; and for training rows one-hot labels, shape (N, C), zeros where none is seen. The other splits are
        given nothing.

    Raises:
        DataError: there are no labels, or not so many of some class.
        UsageError: fewer labels than classes, or rows that stay in their file.
    """
    if not isinstance(data.train, Tensor):
        raise UsageError("labels: rows with labels are repeated, which those of a file cannot be; use `stream=off`")
    part = labels_as_given(data.labels, data.classes, data.name)
    of_rows = data.labels["train"]
    assert of_rows is not None
    y = part.y["train"]
    seen = drawn_labels(y.argmax(1), y.shape[1], count, seed, data.name)
    others = torch.ones(len(y), dtype=torch.bool).index_fill(0, seen, False).nonzero().flatten()
    times = max(1, round(SHARE / (1 - SHARE) * len(others) / count))
    order = torch.cat([others, seen.repeat(times)])
    partly = torch.zeros_like(y)
    partly[seen] = y[seen]
    told = f"labels: {count} of {len(y):,} training rows keep theirs" + (
        f", and come {times} times in every epoch" if times > 1 else ""
    )
    rows = replace(
        data, train=data.train[order], labels={**data.labels, "train": of_rows[order]}, notices=(*data.notices, told)
    )
    tensors: dict[str, tuple[Tensor, ...]] = dict.fromkeys(SPLITS, ())
    return rows, Given({**tensors, "train": (partly[order],)}, None, part.columns, part.values)


def drawn_labels(labels: Tensor, classes: int, count: int, seed: int, where: str) -> Tensor:
    """Numbers of the rows that keep their labels, as many of each class; of a remainder the first classes have more.

    Args:
        labels: Whole numbers from 0 to classes - 1, shape (N,).
        classes: C.
        count: How many in all.
        seed: Of the draw.
        where: The data set in words, for messages.

    Raises:
        UsageError: fewer than one of each class.
        DataError: a class has too few rows.
    """
    if count < classes:
        raise UsageError(
            f"labels: expected at least one of each of {classes} classes, got {count}", settings=("labels",)
        )
    order = torch.from_numpy(np.random.default_rng((SEED, seed)).permutation(len(labels)))
    of_order, found = labels[order], []
    for c in range(classes):
        wanted = count // classes + (c < count % classes)
        rows = order[of_order == c][:wanted]
        if len(rows) < wanted:
            raise DataError(
                f"{where}: {len(rows)} training rows are of class {c}, and {wanted} labels of each are asked for; give "
                "fewer labels"
            )
        found.append(rows)
    return torch.cat(found)
