"""Which runs can stand in one table, which are seeds of one model, and what they are called."""

import itertools
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.errors import CheckpointError, UsageError
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.options import DERIVED
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.recipe import as_word

if TYPE_CHECKING:
    from pyrovae.data import Rows

# What two runs of different seeds may differ in and still be the same model: nothing that changes their training.
NOT_THE_MODEL = ("seed", "device", "compile", "particle_chunk", "threads", "stream", "eval_K", "eval_rows", *DERIVED)


def usable(directories: Sequence[Path], say: Say = silent) -> list[Run]:
    """The finished runs among some directories, as runs/* gives them; what is left out is said, and why.

    Raises:
        CheckpointError: there is none, or a name is not there at all, as one that was mistyped.
    """
    runs: list[Run] = []
    others: list[CheckpointError] = []
    for directory in directories:
        if not os.path.lexists(directory):
            open_run(directory)  # says so
        try:
            runs.append(finished(directory))
        except CheckpointError as error:
            others.append(error)
    if not runs:
        several = f"none of the {len(directories)} named is a finished run; " if len(directories) > 1 else ""
        raise CheckpointError(f"{several}{others[0]}")
    for other in others:
        say(f"note: left out: {other}")
    return runs


def finished(directory: Path) -> Run:
    """The run of a directory, whose weights can be read and whose training has ended.

    Raises:
        CheckpointError: it is not that.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file, no run directory")
    run = open_run(directory)
    run.model()
    if run.unfinished:
        raise CheckpointError(f"{run.unfinished}; finish it with python -m pyrovae.fit --resume {directory}")
    return run


def run_around(out: Path, named: Sequence[Path]) -> Path | None:
    """The run that a directory is, or lies in; a damaged one, too."""
    runs = [directory.resolve() for directory in named if directory.is_dir()]
    for place in (out.resolve(), *out.resolve().parents):
        if place in runs or ((place / "config.yaml").is_file() and (place / "checkpoints").is_dir()):
            return place
        with suppress(CheckpointError):
            return open_run(place).directory
    return None


def load_rows(runs: Sequence[Run]) -> "dict[Path, Rows]":
    """The rows of each run, by its directory; the same rows are loaded once."""
    loaded: dict[tuple, Rows] = {}
    result = {}
    for run in runs:
        key = (*data_of(run), measure_of(run))
        if key not in loaded or loaded[key].hash != run.recipe.data_hash:
            loaded[key] = run.rows()
        result[run.directory] = loaded[key]
    return result


def data_of(run: Run) -> tuple[object, ...]:
    """What decides, with the measure, which rows a run is scored on."""
    return (
        run.recipe.data,
        run.recipe.data_root,
        run.recipe.binarize,
        run.recipe.standardize,
        run.recipe.columns,
        run.recipe.missing,
    )


def measure_of(run: Run) -> str:
    """What a run's log p is of: "mass" or "density", or "density-given-label"; the three never meet in a table."""
    condition = run.recipe.condition
    return str(run.recipe.measure) + ("" if condition is None else f"-given-{as_word(condition)}")


def check_same_rows(runs: Sequence[Run]) -> None:
    """Refuse to put different rows in one table.

    Raises:
        UsageError: two runs of one measure have different data, binarisation or split.
    """
    first, *others = runs
    for run in others:
        if run.recipe.data_hash == first.recipe.data_hash:
            continue
        same = data_of(run) == data_of(first)
        raise UsageError(
            f"cannot compare runs on different rows: {described(first, same)}; {described(run, same)}. Compare runs of "
            "the same data, binarisation and split"
        )


def described(run: Run, with_hash: bool) -> str:
    """Which rows a run is of, in words."""
    recipe = run.recipe
    words = [f"{run.directory}: {recipe.data}"]
    words += [f"binarised {recipe.binarize}"] if recipe.binarize else []
    words += ["standardised"] if recipe.standardize else []
    words += [f"hash {recipe.data_hash[:12]}"] if with_hash else []
    return ", ".join(words)


def pools(runs: Sequence[Run], pool: bool = True) -> list[list[Run]]:
    """Runs that differ in nothing but their seed, together; in the order in which they were named.

    Runs of one configuration and one seed are repetitions, not seeds: such a group stays apart.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        model = {key: value for key, value in run.recipe.plain().items() if key not in NOT_THE_MODEL}
        groups.setdefault(repr(sorted(model.items())) if pool else str(run.directory), []).append(run)
    together = []
    for members in groups.values():
        distinct = len({run.recipe.seed for run in members}) == len(members)
        together += [members] if distinct else [[run] for run in members]
    return together


def name_pools(together: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each pool: what its directories' names begin with, or that of the first, and how many seeds."""
    unique = unique_names([run for members in together for run in members])
    names = [common_name([run.name for run in members]) if len(members) > 1 else "" for members in together]
    return [
        unique[members[0].directory]
        if len(members) == 1
        else f"{name if name and names.count(name) == 1 else unique[members[0].directory]} ({len(members)} seeds)"
        for name, members in zip(names, together, strict=True)
    ]


def common_name(names: Sequence[str]) -> str:
    """What names begin with: "iwae" of iwae-s1, iwae-s2, or of iwae, iwae-2; empty where that is nothing."""
    letters = zip(*names, strict=False)  # up to the end of the shortest
    prefix = "".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, letters))
    if any(name[len(prefix) :][:1].isdigit() for name in names):
        prefix = re.sub(r"\d+$", "", prefix)  # cut within a number
    return re.sub(r"[-_. ]+(seed|s)?[-_. =]*$", "", prefix)


def unique_names(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for each run: its directory's, or the whole path where two agree."""
    names = [run.name for run in runs]
    return {run.directory: run.name if names.count(run.name) == 1 else str(run.directory) for run in runs}
