"""python -m pyrovae.encode RUN: the codes of rows under a trained run, as a file.

python -m pyrovae.encode RUN --out codes.csv
python -m pyrovae.encode RUN --split train --rows 5000 --out codes.npz
python -m pyrovae.encode RUN --data mine.csv --draws 10 --out codes.nc
python -m pyrovae.encode RUN --out codes.png
"""

import sys
from collections.abc import Sequence
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.runs.options import SETTINGS, THREADS
from pyrovae.settings import read


def options_parser() -> Any:
    """The parser of python -m pyrovae.encode."""
    p = parser(
        "encode",
        "The code of each row: mean and standard deviation of q(z|x), with its label; and draws of z with their "
        "log-weights log p(x, z) - log q(z|x). A .png shows the means in the plane.",
        "RUN --out FILE [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--out", "where to save: .npz, .csv, .nc (netCDF) or .png", "FILE")
    add_option(p, "--overwrite", "replace a file of that name and kind", action="store_true")
    add_option(p, "--split", "rows of test, validation or train (default test)", "NAME")
    add_option(p, "--data", "rows of a file or folder instead, read as the run's own are", "FILE")
    add_option(p, "--rows", "only the first rows (default: all)", "INT")
    add_option(p, "--draws", "of z from the guide for each row, of all layers, with log-weights (default: none)", "INT")
    add_option(p, "--class", "of a run given labels: this class in place of each row's own", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, encode, save, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import threads
    from pyrovae.runs.encoding import Encode
    from pyrovae.runs.looking import look
    from pyrovae.runs.made import make

    way = Encode(whole_option(options, "rows", None), whole_option(options, "draws", 0))
    seed, overwrite = whole_option(options, "seed", 0), bool(options.get("overwrite"))
    looked = look(options["run"], options)
    with threads(read("threads", options.get("threads", "auto"), THREADS), lambda text: say(f"note: {text}")):
        make(looked, way, options.get("out"), overwrite, seed, say)
    return 0


if __name__ == "__main__":
    main("encode", command, sys.argv[1:])
