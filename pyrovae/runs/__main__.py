"""python -m pyrovae.runs [FOLDER ...]: what was trained: data, parts, seed, log p(x), verdict, when, how long, on what.

python -m pyrovae.runs
python -m pyrovae.runs runs/mnist --where verdict=ok --where prior=Vamp --sort "log p(x)"
python -m pyrovae.runs --csv runs.csv
python -m pyrovae.runs --where epochs=0/ --delete
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrovae.command import add_option, given, main, parser, say
from pyrovae.errors import CheckpointError, UsageError


def options_parser() -> Any:
    """The parser of python -m pyrovae.runs."""
    p = parser(
        "runs",
        "List what was trained below some folders: data, measure, parts, seed, bound, log p(x) with its verdict, when, "
        "how long and on what. What all runs have in common is said once.",
        "[FOLDER ...] [options]",
        __doc__,
    )
    p.add_argument("folders", nargs="*", metavar="FOLDER", default=None, help="where runs are (default: runs)")
    add_option(
        p,
        "--where",
        "only those of which a column has this in it: COLUMN=VALUE; may be given again",
        "CONDITION",
        action="append",
    )
    add_option(p, "--sort", "by this column, the largest number first (default: run)", "COLUMN")
    add_option(p, "--csv", "save the table, all columns and digits", "FILE")
    add_option(p, "--delete", "remove the runs that are listed, after asking", action="store_true")
    add_option(p, "--yes", "do not ask", action="store_true")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, list, and remove if asked to."""
    options = given(options_parser().parse_args(words))

    from pyrovae.files import write_atomically
    from pyrovae.runs import listing

    folders = [Path(folder) for folder in options.get("folders") or ["runs"]]
    if options.get("yes") and not options.get("delete"):
        raise UsageError("--yes: is for --delete")
    lines = []
    for directory in listing.found_in(folders):
        try:
            lines.append(listing.line(directory))
        except CheckpointError as error:
            say(f"note: left out: {error}")
    lines = listing.chosen(lines, options.get("where", ()))
    if "sort" in options:
        lines = listing.sorted_by(lines, options["sort"])
    if not lines:
        say(f"no runs in {', '.join(map(str, folders))}{' of which that holds' if 'where' in options else ''}")
        return 0
    say(listing.table(lines))
    if "csv" in options:
        write_atomically(Path(options["csv"]), listing.as_csv(lines))
        say(f"table in {options['csv']}")
    if options.get("delete") and (options.get("yes") or agreed(len(lines))):
        for entry in lines:
            listing.remove(Path(entry["run"]))
            say(f"removed {entry['run']}")
    return 0


def agreed(number: int) -> bool:
    """Whether whoever is at the terminal agrees to remove so many runs.

    Raises:
        UsageError: nobody is there to be asked.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("--delete: there is no terminal to ask at; add --yes to remove these runs")
    return input(f"Remove {number} run{'s' * (number != 1)}? Type yes: ").strip().lower() == "yes"


if __name__ == "__main__":
    main("runs", command, sys.argv[1:])
