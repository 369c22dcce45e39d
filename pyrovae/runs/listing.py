"""What was trained: the runs below some folders as a table, chosen by what they say, and removed."""

import csv
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pyrovae.errors import CheckpointError, OutputError, UsageError
from pyrovae.files import inside, read_bytes, read_json
from pyrovae.runs.directory import clear, open_run, written
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.starts import starts_of

DEPTH = 3  # of folders in folders that are looked into
COLUMNS = (
    "run", "data", "measure", "model", "prior", "guide", "likelihood", "network", "bound", "seed", "epochs", "ELBO",
    "log p(x)", "error", "K", "rows", "verdict", "started", "minutes", "on",
)  # fmt: skip
ALWAYS = ("run", "epochs", "ELBO", "log p(x)", "verdict", "started", "minutes")  # in the table, though all are alike
UNIT = "ELBO, log p(x) and its error over rows in nats per datum of so many test rows; larger is better"
Line = dict[str, Any]


def found_in(folders: Sequence[Path]) -> list[Path]:
    """The directories below some folders, or these themselves, that have a configuration.

    Raises:
        UsageError: one of them is not there.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name one that holds runs")
        for place, below, files in os.walk(folder):
            here = Path(place)
            if "config.yaml" in files:
                found.append(here)
            if "config.yaml" in files or len(here.relative_to(folder).parts) >= DEPTH:
                below.clear()
            below.sort()
    return list(dict.fromkeys(found))


def line(directory: Path) -> Line:
    """What is known of a run, by `COLUMNS`; a value that it does not have is None.

    Raises:
        CheckpointError: it is none, or its configuration is damaged.
    """
    run = open_run(directory)
    recipe, starts = run.recipe, starts_of(directory)
    scored, history = evaluation_of(directory), history_of(directory)
    began = datetime.fromisoformat(starts[0]["time"]) if starts and "time" in starts[0] else None
    seconds = [float(epoch["seconds"]) for epoch in history if epoch.get("seconds")]
    return {
        "run": str(directory),
        "data": recipe.data,
        "measure": scored.get("measure") or recipe.measure,
        "model": recipe.model.name,
        "prior": recipe.prior.name or None,
        "guide": recipe.guide.name or None,
        "likelihood": recipe.likelihood.name,
        "network": recipe.network.name or None,
        "bound": bound_of(recipe),
        "seed": recipe.seed,
        "epochs": f"{len(history)}/{recipe.epochs}",
        "ELBO": scored.get("elbo"),
        "log p(x)": scored.get("log_marginal"),
        "error": scored.get("error_over_rows"),
        "K": scored.get("K"),
        "rows": scored.get("rows"),
        "verdict": scored.get("verdict"),
        "started": began and began.astimezone().strftime("%Y-%m-%d %H:%M"),
        "minutes": round(sum(seconds) / 60, 1) if seconds else None,
        "on": starts[-1].get("host") if starts else None,
    }


def bound_of(recipe: Recipe) -> str | None:
    """The bound and its numbers, in short: iwae, K = 5."""
    if not recipe.elbo:
        return None
    told = {"K": recipe.K, "M": recipe.M, "alpha": recipe.alpha, "beta": recipe.beta}
    usual = {"K": (1, None), "M": (1, None), "alpha": (None,), "beta": (1.0, None)}
    return ", ".join([recipe.elbo.name, *(f"{k} = {v}" for k, v in told.items() if v not in usual[k])])


def evaluation_of(directory: Path) -> Line:
    """What evaluation.json says; nothing where it is not there, or damaged."""
    with suppress(OSError, ValueError, CheckpointError):
        values = read_json(inside(directory, "evaluation.json"))
        return values if isinstance(values, dict) else {}
    return {}


def history_of(directory: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv; none where it is not there, or damaged."""
    with suppress(OSError, ValueError, CheckpointError, csv.Error):
        return [*csv.DictReader(io.StringIO(read_bytes(inside(directory, "metrics.csv")).decode()))]
    return []


def chosen(lines: Sequence[Line], conditions: Sequence[str]) -> list[Line]:
    """The lines of which all conditions hold, each COLUMN=VALUE, the value a part of what the column says.

    Raises:
        UsageError: a condition is written otherwise, or of no column.
    """
    left = list(lines)
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or name not in COLUMNS:
            raise UsageError(f"--where {condition}: expected COLUMN=VALUE, with a column of {', '.join(COLUMNS)}")
        left = [entry for entry in left if value.lower() in in_words(name, entry[name]).lower()]
    return left


def sorted_by(lines: Sequence[Line], column: str) -> list[Line]:
    """The lines by a column, the largest number first, words by their letters, and what has no value last.

    Raises:
        UsageError: there is no such column.
    """
    if column not in COLUMNS:
        raise UsageError(f"--sort {column}: expected one of {', '.join(COLUMNS)}")
    valued = [entry for entry in lines if entry[column] is not None]
    numbers = all(isinstance(entry[column], int | float) for entry in valued)
    valued.sort(key=lambda entry: -entry[column] if numbers else str(entry[column]))
    return valued + [entry for entry in lines if entry[column] is None]


def in_words(column: str, value: Any) -> str:
    """A value as the table has it."""
    if value is None:
        return "-"
    return f"{value:.2f}" if column in ("ELBO", "log p(x)", "error") and isinstance(value, float) else str(value)


def table(lines: Sequence[Line]) -> str:
    """The lines to read: what all have in common once, above what differs."""
    told = [{name: in_words(name, entry[name]) for name in COLUMNS} for entry in lines]
    common = {} if len(told) < 2 else {n: told[0][n] for n in COLUMNS if n not in ALWAYS and alike(told, n)}
    shown = [name for name in COLUMNS if name not in common and any(entry[name] != "-" for entry in told)]
    widths = {name: max(len(name), *(len(entry[name]) for entry in told)) for name in shown}
    right = ("seed", "epochs", "ELBO", "log p(x)", "error", "K", "rows", "minutes")

    def row(values: dict[str, str]) -> str:
        return "  ".join(
            f"{values[n]:>{widths[n]}}" if n in right else f"{values[n]:<{widths[n]}}" for n in shown
        ).rstrip()

    said = ", ".join(f"{name} {value}" for name, value in common.items() if value != "-")
    return "\n".join(
        [*([f"all: {said}", ""] if said else []), row(dict(zip(shown, shown, strict=True))), *map(row, told), "", UNIT]
    )


def alike(told: Sequence[dict[str, str]], name: str) -> bool:
    """Whether all say the same of a column."""
    return len({entry[name] for entry in told}) == 1


def as_csv(lines: Sequence[Line]) -> str:
    """The lines as a table for programs, with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def remove(directory: Path) -> None:
    """Remove what commands wrote for a run, and its directory if nothing else is in it.

    Raises:
        UsageError: a file in it has a name that they use, and is none of theirs.
        OutputError: something cannot be removed, or a process is writing there.
    """
    from pyrovae.inference.training.checkpoint import lock

    [*written(directory)]
    with lock(directory):
        clear(directory)
        try:
            (directory / "config.yaml").unlink()
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be removed ({error.strerror})") from error
    with suppress(OSError):
        (directory / "lock").unlink(missing_ok=True)
        directory.rmdir()  # unless something else is in it
