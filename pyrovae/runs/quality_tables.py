"""Reconstructions and draws side by side: a table below those of log p(x), with which it is never sorted."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.runs.progress import Say, silent
from pyrovae.runs.tables import aligned, number

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.quality import Frechet
    from pyrovae.runs.features import Features

QUALITY_HEAD = b"name,seeds,"  # what our file of the table begins with


@dataclass(frozen=True)
class Seen:
    """What is seen of a model: its reconstructions of the rows of a table, its draws, or both.

    Attributes:
        name: As the tables call the model.
        values: For each of its seeds, the quality by word of each row, shape (N,): `reconstruction_values`.
        distances: For each of its seeds, that of its draws to the rows: `frechet_of`.
    """

    name: str
    values: "Sequence[Mapping[str, Tensor]]" = ()
    distances: "Sequence[Frechet]" = ()

    @property
    def record(self) -> dict[str, Any]:
        """Means over rows and seeds with their standard errors over rows, which seeds do not reduce."""
        import torch

        from pyrovae.inference.estimate import standard_error

        found: dict[str, Any] = {"name": self.name, "seeds": len(self.values or self.distances)}
        for word in self.values[0] if self.values else ():
            rows = torch.stack([values[word] for values in self.values]).mean(0)
            found |= {word: rows.mean().item(), f"{word}_error": standard_error(rows)}
        if self.distances:
            count = len(self.distances)
            found["frechet"] = sum(distance.extrapolated for distance in self.distances) / count
            found["frechet_error"] = sum(distance.error for distance in self.distances) / count
            found["frechet_plain"] = sum(distance.plain for distance in self.distances) / count
        return found


def quality_table(models: Sequence[Seen]) -> "pd.DataFrame":
    """One row per model, the smallest squared error first; what a model has not is NaN."""
    import pandas as pd

    frame = pd.DataFrame([model.record for model in models])
    by = [column for column in ("sse", "frechet") if column in frame]
    return frame.sort_values(by, kind="stable", ignore_index=True)


def present_quality(
    models: Sequence[Seen],
    rows: "Rows",
    kind: str,
    count: int,
    out: Path,
    features: "Features | None" = None,
    say: Say = silent,
) -> None:
    """Say the table and write it as CSV; nothing where there is nothing to see of any model."""
    import pandas as pd

    from pyrovae.files import write_atomically
    from pyrovae.quality import QUALITIES

    if not models:
        return
    frame = quality_table(models)
    shown = [q for q in QUALITIES if q.word in frame]
    notes = [
        f"{q.title}: {q.unit}, {q.better} is better" + (f"; data range {rows.data_range:g}" if q.images else "")
        for q in shown
    ]
    columns = {q.word: q.title for q in shown}
    if features is not None and "frechet" in frame:
        columns["frechet"] = "Frechet"
        notes.append(
            "Frechet: squared distance of as many draws of x to the rows, extrapolated to infinitely many, smaller is "
            f"better; on {features.description}: distances of other features do not compare"
        )
    strings = {"model": frame["name"]}
    for word, title in columns.items():
        pairs = zip(frame[word], frame[f"{word}_error"], strict=True)
        strings[title] = pd.Series([number(value, error) for value, error in pairs])
    which = "all" if count == len(rows.test) else "the first"
    say(f"{which} {count} test rows beside each model's reconstructions and draws: no likelihoods")
    if shown:
        say("smallest SSE first; a pair's reconstruction is the mean of p(x|z) at the mean of q(z|x); ± standard error")
    say("\n" + aligned(pd.DataFrame(strings)) + "\n")
    for note in notes:
        say(textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="    "))
    say("")
    described = "" if features is None else features.description
    values = frame.assign(data_range=rows.data_range, rows=count, features=described)
    write_atomically(quality_file(out, kind), values.to_csv(index=False))


def quality_file(out: Path, kind: str) -> Path:
    """Where the table of the rows of a measure is written."""
    return out / f"{kind}-quality.csv"
