"""log p(x) by what a row is made of: the steps of a sequence, the words of a document.

Rows differ in length, so that what is told is the total over rows divided by the total of their units, R = sum_n log
p(x_n) / sum_n u_n; its error over rows is that of a ratio, the standard error of log p(x_n) - R u_n over the mean of u.
"""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch
    from pyrovae.runs.build import Model


def of_units(model: "Model", batch: "Batch", rows: "Rows", log_prob: "Tensor") -> dict[str, Any] | None:
    """log p(x), shape (N,), by units of the rows, in nats: its noun, their number, the ratio and its error.

    Of documents the words in their order are scored, so that perplexity is exp(-ratio). None for rows without units.
    """
    from pyrovae.models import LatentLayers
    from pyrovae.models.sequences import Sequential
    from pyrovae.models.topics import log_orders

    x = batch.x
    if rows.measure.kind == "documents":
        return ratio("word", log_prob - log_orders(x.double()).cpu(), x.sum(-1).double().cpu())
    if isinstance(model, LatentLayers) and isinstance(model.prior, Sequential):
        there = (x == x).flatten(2).any(-1) if x.ndim > 2 else x == x
        return ratio("step", log_prob, (there.flip(1).double().cumsum(1) > 0).sum(1).double().cpu())
    return None


def ratio(noun: str, log_prob: "Tensor", units: "Tensor") -> dict[str, Any] | None:
    """The ratio of two totals over rows, each of shape (N,), with its error; None of rows without a unit."""
    from pyrovae.inference.estimate import standard_error

    if not units.sum() > 0:
        return None
    value = (log_prob.sum() / units.sum()).item()
    error = standard_error(log_prob - value * units) / units.mean().item()
    return {"noun": noun, "count": int(units.sum()), "log_marginal": value, "error_over_rows": error}


def units_in_words(found: dict[str, Any] | None, number: Any) -> list[tuple[str, str, str]]:
    """It as a line of a report: label, number and note; none where there is nothing to say."""
    if found is None:
        return []
    value, error, noun = found["log_marginal"], found["error_over_rows"], found["noun"]
    count = f"{found['count']:,} {noun}s; ± error over rows"
    if noun == "word":
        perplexity = math.exp(-value)
        return [("perplexity per word", number(perplexity, perplexity * error), f"of words in their order; {count}")]
    return [(f"log p(x) per {noun}", number(value, error), f"nats; the total over {count}")]
