"""python -m pyrovae.classify RUN: p(y|x) of a run with labels or classes, by Bayes, with its accuracy and calibration.

python -m pyrovae.classify runs/given-label --rows 200
python -m pyrovae.classify runs/m2 --K 1000
python -m pyrovae.classify runs/gmvae --split validation
"""

import sys
from collections.abc import Sequence
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.runs.options import SETTINGS, THREADS
from pyrovae.settings import Words, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.classify."""
    p = parser(
        "classify",
        "Which class each row is of: p(y|x) = p(y) p(x|y) / p(x) from log p(x|y) of each class, with its Monte Carlo "
        "error, accuracy and calibration. Of an m2 and a gmvae also what its guide q(y|x) says; of a gmvae how well "
        "clusters match labels. Writes RUN/classification.json and RUN/plots/reliability.png.",
        "RUN [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "particles for each row and class (default 500)", "INT")
    add_option(p, "--rows", "by Bayes only the first rows (default 500)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--chunk-size", "particles evaluated at once; bounds memory", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, classify, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import threads
    from pyrovae.runs.classifying import classify, describe
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.scoring import SPLITS

    k, limit = whole_option(options, "K", 500), whole_option(options, "rows", 500)
    seed, chunk_size = whole_option(options, "seed", 0), whole_option(options, "chunk_size", None)
    split = read("split", options.get("split", "test"), Words(SPLITS))
    run = open_run(options["run"])
    with threads(read("threads", options.get("threads", "auto"), THREADS), lambda text: say(f"note: {text}")):
        values = classify(run, k, limit, split, seed, chunk_size, str(options.get("device", "auto")), say)
    say(describe(run.name, values))
    return 0


if __name__ == "__main__":
    main("classify", command, sys.argv[1:])
