"""python -m pyrovae.gaps RUN: where a trained run's bound is lost, and what its latents are used for.

Prints a table and writes it to RUN/gaps.json, with the rows' own values, and to RUN/plots/gaps.png.

    python -m pyrovae.gaps RUN
    python -m pyrovae.gaps RUN --rows 500 --K 5000
"""

import sys
from collections.abc import Sequence
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.errors import UsageError
from pyrovae.runs.options import SETTINGS, THREADS
from pyrovae.settings import Words, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.gaps."""
    p = parser(
        "gaps",
        "Where the bound of a trained run is lost: log p(x) - ELBO split into what the guide's family of Gaussians "
        "cannot express and what its network loses; and what each latent dimension is used for.",
        "RUN [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "particles per datum from the guide and from each fitted Gaussian (default 2000)", "INT")
    add_option(p, "--rows", "only the first rows (default 200)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--family", "of the Gaussians fitted: diagonal or full (default: the guide's own)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--chunk-size", "particles evaluated at once; bounds memory", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, analyse, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import threads
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.figures import save_gaps
    from pyrovae.runs.scoring import SPLITS
    from pyrovae.runs.suboptimality import analyse, describe

    k, limit = whole_option(options, "K", 2000), whole_option(options, "rows", 200)
    seed, chunk_size = whole_option(options, "seed", 0), whole_option(options, "chunk_size", None)
    if k < 2:
        raise UsageError(f"--K: expected a whole number of at least 2, for an error, got {k}")
    split, family = str(options.get("split", "test")), options.get("family")
    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    if family is not None:
        family = read("family", family, Words(("diagonal", "full")))
    run = open_run(options["run"])
    if run.recipe.is_exact:
        name = run.recipe.model.name
        raise UsageError(f"{run.directory}: holds a {name}, whose log p(x) is exact: there is no gap to split")
    if run.recipe.is_reconstruction:
        raise UsageError(
            f"{run.directory}: holds a model ({run.recipe.model.name}) that reconstructs only: its guide is a point, "
            "which has no density, and there is no bound to lose; train a vae"
        )
    with threads(read("threads", options.get("threads", "auto"), THREADS), lambda text: say(f"note: {text}")):
        values = analyse(run, k, limit, split, seed, chunk_size, str(options.get("device", "auto")), family, say)
    say(describe(run.name, values))
    if run.writable:
        save_gaps(run, values)
    return 0


if __name__ == "__main__":
    main("gaps", command, sys.argv[1:])
