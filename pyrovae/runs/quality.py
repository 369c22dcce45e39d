"""Quality of a model's reconstructions, as runs report it: on the same rows for every model, and never a likelihood."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch

BLOCK = 500  # rows at once
EPOCH_ROWS = 500  # validation rows looked at after each epoch, the first: for SSIM, 0.05 s of 28 x 28 pixels
ABOUT = "rows beside their reconstructions, of a pair the mean of p(x|z) at the mean of q(z|x); no likelihoods"


@runtime_checkable
class Reconstructs(Protocol):
    """What makes one reconstruction of each row, with a density or without one.

    Any module with this method has its reconstructions scored: after each epoch, in its report, and as a row of the
    table of reconstructions that `compare` says below those of log p(x). A baseline that has nothing else to compare,
    such as PCA, is a row of that table alone: fitted, and with a `description`, it is one of `others` of
    `pyrovae.runs.comparing.of_quality`.
    """

    @property
    def reconstruct(self) -> "Callable[..., Tensor]":
        """(x, *given) -> one reconstruction of each row, in the shape of x, (N, *event)."""


@runtime_checkable
class Draws(Protocol):
    """What draws of x can be had from, for a Frechet distance, with a density or without one."""

    @property
    def sample(self) -> "Callable[..., Tensor]":
        """(num_samples, *given) -> so many draws of x, shape (num_samples, *event), by torch's random state."""


def reconstruction_values(model: Reconstructs, batch: "Batch", data_range: float) -> "dict[str, Tensor]":
    """The quality of a model's reconstruction of each row.

    Args:
        model: In evaluation mode, on the batch's device.
        batch: Rows, and what they are given.
        data_range: The greatest less the least value that an element can have.

    Returns:
        By word ("sse"; of images "psnr" and "ssim" as well), shape (N,).
    """
    import torch

    from pyrovae.quality import reconstruction_quality

    with torch.no_grad():
        found = [
            reconstruction_quality(block.x, model.reconstruct(*block.tensors), data_range)
            for block in batch.split(BLOCK)
        ]
    return {word: torch.cat([values[word] for values in found]) for word in found[0]}


def epoch_metrics(model: "nn.Module", rows: "Rows") -> Callable[[], dict[str, float]] | None:
    """What a run records of reconstructions after each epoch: means over the first validation rows.

    None for a model that makes no reconstruction, and for rows whose errors have no one unit.
    """
    from pyrovae.quality import QUALITIES
    from pyrovae.runs.scoring import rows_of

    if not isinstance(model, Reconstructs) or not rows.of_one_unit:
        return None
    batch = rows_of(rows, "validation", EPOCH_ROWS)

    def measured() -> dict[str, float]:
        here = next(model.parameters()).device  # where its process has put it meanwhile
        values = reconstruction_values(model, batch.to(here), rows.data_range)
        return {q.column: values[q.word].mean().item() for q in QUALITIES if q.word in values}

    return measured


def of_reconstructions(model: Any, batch: "Batch", rows: "Rows") -> dict[str, Any] | None:
    """Means over rows with their standard errors, and what they are of; None for what `epoch_metrics` has none of."""
    from pyrovae.inference.estimate import standard_error
    from pyrovae.quality import QUALITIES

    if not isinstance(model, Reconstructs) or not rows.of_one_unit:
        return None
    values = reconstruction_values(model, batch, rows.data_range)
    return {
        "about": ABOUT,
        "rows": len(batch),
        "data_range": rows.data_range,
        **{
            q.word: {
                "mean": values[q.word].mean().item(),
                "error_over_rows": standard_error(values[q.word]),
                "unit": q.unit,
            }
            for q in QUALITIES
            if q.word in values
        },
    }
