"""python -m pyrovae.compare RUN RUN ...: trained runs on the same rows, beside exact baselines.

One table per measure: a mass and a density never meet. Unless told not to, each table has the baselines of its
measure, fit to the same training rows with their number of components chosen on the validation rows, their log p(x)
exact: a mixture, and for densities probabilistic PCA. What the intervals and ranks are of: `pyrovae.runs.comparison`.

    python -m pyrovae.compare runs/*
    python -m pyrovae.compare RUN RUN --K 5000 --rows 1000 --out comparison
    python -m pyrovae.compare RUN RUN --components 20
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrovae.command import add_choices, add_option, given, main, parser, say, whole_option
from pyrovae.errors import NumericalError, UsageError
from pyrovae.runs.build import build_proposal
from pyrovae.runs.options import FRECHET, PROPOSALS, SETTINGS, THREADS
from pyrovae.settings import read


def options_parser() -> Any:
    """The parser of python -m pyrovae.compare."""
    p = parser(
        "compare",
        "Score trained runs on the same rows, one table per measure, beside exact baselines: 95 % bootstrap "
        "intervals of log p(x), of paired differences and of ranks, and a verdict on each estimate.",
        "RUN [RUN ...] [options]",
        __doc__,
    )
    p.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directories written by python -m pyrovae.fit, such as runs/*; those that differ only in --seed become "
        "one line; what is no run, damaged or unfinished is named and left out",
    )
    add_option(p, "--K", "particles per datum, drawn exactly (default 1000; 32 chains if annealed)", "INT")
    add_choices(p, "proposal", PROPOSALS)
    add_option(p, "--rows", "score only the first test rows (default: all)", "INT")
    add_option(p, "--seed", "of the draws, the bootstrap and the baselines (default 0)", "INT")
    add_option(p, "--no-pool", "a line for every run, also for those that differ only in --seed", action="store_true")
    add_option(p, "--no-baseline", "add no baseline", action="store_true")
    add_option(p, "--components", "components of the baselines (default: chosen on the validation rows)", "INT")
    add_option(p, "--frechet", FRECHET, action="store_true")
    add_option(p, "--out", "where to write the tables and figures (default: comparison)", "DIR")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, score every run, print and write the tables."""
    options = given(options_parser().parse_args(words))

    from pyrovae.inference.verdicts import Kind
    from pyrovae.processors import pick_device, threads
    from pyrovae.runs.baseline import COMPONENTS
    from pyrovae.runs.comparing import compare_runs
    from pyrovae.runs.features import classifier_features
    from pyrovae.runs.grouping import run_around, usable
    from pyrovae.runs.scoring import Scoring

    number = read("threads", options.get("threads", "auto"), THREADS)
    proposal = build_proposal(options.get("proposal"))
    k, seed = whole_option(options, "K", proposal.usual_particles or 1000), whole_option(options, "seed", 0)
    limit, components = whole_option(options, "rows", None), whole_option(options, "components", None)
    if options.get("no_baseline") and components:
        raise UsageError("--components: not used, since --no-baseline adds none")
    directories = [Path(name) for name in options["runs"]]
    for i, directory in enumerate(directories):
        if directory.resolve() in [other.resolve() for other in directories[:i]]:
            raise UsageError(f"RUN: the same directory is named twice, {directory}; leave one out")

    out = Path(str(options.get("out", "comparison")))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; choose a directory")
    if holder := run_around(out, directories):
        raise UsageError(f"--out {out}: would write into the run {holder}; choose a directory outside of it")

    device = pick_device(str(options.get("device", "auto")))
    runs = usable(directories, say)
    tried = () if options.get("no_baseline") else (components,) if components else COMPONENTS
    how, pool = Scoring(k, seed, proposal), not options.get("no_pool")
    asked: dict[str, Any] = {"limit": limit, "device": device, "pool": pool, "components": tried}
    if options.get("frechet"):
        asked["make_features"] = classifier_features
    with threads(number, lambda text: say(f"note: {text}")):
        scored = compare_runs(runs, how, out, say=say, **asked)
    invalid = [f"{entry.name}: {entry.verdict.reason}" for entry in scored if entry.verdict.kind == Kind.INVALID]
    if invalid:
        raise NumericalError("invalid: " + "; ".join(invalid))
    return 0


if __name__ == "__main__":
    main("compare", command, sys.argv[1:])
