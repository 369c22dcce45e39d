"""python -m pyrovae.gradients RUN: how biased and how noisy the gradients of a trained run are, by estimator and K.

Prints a table and writes it to RUN/gradients.csv and gradients.json, and its figure to RUN/plots/gradients.png.

    python -m pyrovae.gradients RUN
    python -m pyrovae.gradients RUN --K 1,8,64 --draws 1000
"""

import sys
from collections.abc import Sequence
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.errors import UsageError
from pyrovae.runs.options import BOUNDS, SETTINGS, THREADS
from pyrovae.settings import Several, Whole, Words, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.gradients."""
    p = parser(
        "gradients",
        "Bias, variance and signal to noise of the estimators of a bound's gradient (--gradient of pyrovae.fit) at a "
        "trained run, by the number of particles, for the model's and the guide's parameters.",
        "RUN [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "numbers of particles (default 1,5,25)", "INT")
    add_option(p, "--elbo", f"of which bound: {', '.join(BOUNDS)} (default: the run's), with beta = 1", "NAME")
    add_option(
        p, "--gradients", "which estimators, as reparameterised,vr-max (default: all of the bound)", "NAME[,NAME]"
    )
    add_option(p, "--draws", "gradients drawn of each (default 200)", "INT")
    add_option(p, "--rows", "the first rows, whose mean bound it is (default 20)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, draw gradients, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import threads
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.gradient_noise import analyse, describe, save
    from pyrovae.runs.scoring import SPLITS

    ks = read("K", options.get("K", "1,5,25"), Several(Whole()))
    elbo = options.get("elbo")
    elbo = None if elbo is None else read("elbo", elbo, Words(tuple(BOUNDS)))
    chosen = str(options["gradients"]).split(",") if "gradients" in options else None
    split, draws = str(options.get("split", "test")), whole_option(options, "draws", 200)
    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    if draws < 10:
        raise UsageError(f"--draws: expected a whole number of at least 10, for intervals, got {draws}")
    limit, seed = whole_option(options, "rows", 20), whole_option(options, "seed", 0)
    run = open_run(options["run"])
    with threads(read("threads", options.get("threads", "auto"), THREADS), lambda text: say(f"note: {text}")):
        values = analyse(run, ks, elbo, chosen, limit, draws, split, seed, str(options.get("device", "auto")), say)
    say(describe(run.name, values))
    if run.writable:
        save(run, values)
    return 0


if __name__ == "__main__":
    main("gradients", command, sys.argv[1:])
