"""python -m pyrovae.disentangle RUN ...: how far codes tell the known factors of their rows apart, beside log p(x).

python -m pyrovae.fit --config recipes/sprites.yaml --beta 4 --seed 1 --out runs/beta4-1
python -m pyrovae.disentangle runs/beta4-1
python -m pyrovae.disentangle runs/beta* --codes sample --factors scale,x,y --bins 30
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.errors import UsageError
from pyrovae.runs.options import SETTINGS, THREADS
from pyrovae.settings import Whole, Words, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.disentangle."""
    p = parser(
        "disentangle",
        "Score the codes of trained runs by the factors that their rows were made from (MIG, SAP, DCI, beta-VAE, "
        "FactorVAE, modularity) and without them (total correlation, mutual information, UDR), beside log p(x), with "
        "the standard deviation over seeds.",
        "RUN [RUN ...] [options]",
        __doc__,
    )
    p.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directories written by python -m pyrovae.fit on rows of known factors, such as --data sprites; those "
        "that differ only in --seed become one line; what is no run, damaged or unfinished is named and left out",
    )
    add_option(p, "--codes", "of each row: mean of q(z|x), or one sample of it (default mean)", "NAME")
    add_option(p, "--factors", "those that count, by comma (default: all)", "NAME,NAME")
    add_option(p, "--bins", "of each dimension over its range, for mutual information (default 20)", "INT")
    add_option(p, "--rows", "whose codes are scored, from all splits (default 10000)", "INT")
    add_option(p, "--test-rows", "whose log p(x) is estimated, the first (default: all)", "INT")
    add_option(p, "--K", "particles per datum of log p(x), drawn exactly (default 1000)", "INT")
    add_option(p, "--seed", "of draws and votes (default 0)", "INT")
    add_option(p, "--out", "where to write the table and the figure (default: disentanglement)", "DIR")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, score every run, print and write the table."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import pick_device, threads
    from pyrovae.runs.disentangling import Asked, check_out, score_runs
    from pyrovae.runs.grouping import run_around, usable
    from pyrovae.runs.scoring import Scoring

    number = read("threads", options.get("threads", "auto"), THREADS)
    codes = read("codes", options.get("codes", "mean"), Words(("mean", "sample")))
    bins = read("bins", options.get("bins", 20), Whole(2))
    named = options.get("factors")
    factors = None if named is None else tuple(word.strip() for word in str(named).split(","))
    seed = whole_option(options, "seed", 0)
    asked = Asked(codes, factors, bins, whole_option(options, "rows", 10_000), seed)
    how, limit = Scoring(whole_option(options, "K", 1000), seed), whole_option(options, "test_rows", None)
    directories = [Path(name) for name in options["runs"]]
    out = Path(str(options.get("out", "disentanglement")))
    if holder := run_around(out, directories):
        raise UsageError(f"--out {out}: would write into the run {holder}; choose a directory outside of it")
    check_out(out)
    device = pick_device(str(options.get("device", "auto")))
    runs = usable(directories, say)
    with threads(number, lambda text: say(f"note: {text}")):
        score_runs(runs, asked, how, out, limit=limit, device=device, say=say)
    return 0


if __name__ == "__main__":
    main("disentangle", command, sys.argv[1:])
