"""Reconstructions side by side: a table of its own, below those of log p(x), with which it is never sorted."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.errors import UsageError
from pyrovae.runs.directory import begins
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.tables import number

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pyrovae.data import Rows

HEAD = b"name,seeds,sse,"  # what our file of the table begins with


@dataclass(frozen=True)
class Reconstructed:
    """A model's reconstructions of the rows of a table.

    Attributes:
        name: As the tables call the model.
        values: For each of its seeds, the quality by word of each row, shape (N,): `reconstruction_values`.
    """

    name: str
    values: "Sequence[Mapping[str, Tensor]]"

    def of(self, word: str) -> "Tensor":
        """One quality of the rows, shape (N,): the mean over seeds."""
        import torch

        return torch.stack([values[word] for values in self.values]).mean(0)


def quality_table(models: Sequence[Reconstructed]) -> "pd.DataFrame":
    """One row per model, the smallest squared error first: means over the same rows, with their standard errors."""
    import pandas as pd

    from pyrovae.inference.estimate import standard_error

    records = [
        {"name": model.name, "seeds": len(model.values)}
        | {
            key: value
            for word in model.values[0]
            for key, value in (
                (word, model.of(word).mean().item()),
                (f"{word}_error", standard_error(model.of(word))),
            )
        }
        for model in models
    ]
    return pd.DataFrame(records).sort_values("sse", kind="stable", ignore_index=True)


def present_quality(frame: "pd.DataFrame", rows: "Rows", kind: str, count: int, out: Path, say: Say = silent) -> None:
    """Say the table and write it as CSV."""
    import pandas as pd

    from pyrovae.files import write_atomically
    from pyrovae.quality import QUALITIES
    from pyrovae.runs.comparison_tables import aligned

    shown = [q for q in QUALITIES if q.word in frame]
    which = "all" if count == len(rows.test) else "the first"
    say(f"{which} {count} test rows beside their reconstructions: no likelihoods; the smallest SSE first")
    say("a pair's reconstruction is the mean of p(x|z) at the mean of q(z|x); mean over rows ± standard error")
    strings = {"model": frame["name"]}
    for q in shown:
        errors = zip(frame[q.word], frame[f"{q.word}_error"], strict=True)
        strings[q.title] = pd.Series([number(value, error) for value, error in errors])
    say("\n" + aligned(pd.DataFrame(strings)) + "\n")
    for q in shown:
        of_range = f"; data range {rows.data_range:g}" if q.images else ""
        say(f"  {q.title}: {q.unit}, {q.better} is better{of_range}")
    say("")
    values = frame.assign(data_range=rows.data_range, rows=count)
    write_atomically(file_of(out, kind), values.to_csv(index=False))


def file_of(out: Path, kind: str) -> Path:
    """Where the table of the rows of a measure is written."""
    return out / f"{kind}-reconstructions.csv"


def check_quality_replaced(out: Path, kind: str) -> None:
    """Refuse a directory in which a file has the name of the table, and is none of ours.

    Raises:
        UsageError: there is one.
    """
    path = file_of(out, kind)
    if os.path.lexists(path) and not (path.is_file() and begins(path, HEAD)):
        raise UsageError(f"--out {out}: {path} was not written by pyrovae.compare; choose another")
