"""python -m pyrovae.sample RUN: draws of a trained run, and what is decoded, imputed and denoised, as a file.

python -m pyrovae.sample RUN --n 1000 --out draws.csv
python -m pyrovae.sample RUN --mean --out samples.png
python -m pyrovae.sample RUN --mean --temperature 0.7 --out sharper.png
python -m pyrovae.sample RUN --class 7 --out sevens.png
python -m pyrovae.sample RUN --near 0,3,5 --radius 0.1 --out near.png
python -m pyrovae.sample RUN --between 0,3 --out between.gif
python -m pyrovae.sample RUN --traverse 0 --out traversal.png
python -m pyrovae.sample RUN --impute lower --out imputed.png
python -m pyrovae.sample RUN --denoise noise:0.5 --out denoised.png
"""

import sys
from collections.abc import Sequence
from typing import Any

from pyrovae.command import add_option, given, main, parser, say, whole_option
from pyrovae.runs.options import PARTS, SETTINGS, THREADS
from pyrovae.settings import read

CORRUPTIONS = PARTS["corruption"]


def options_parser() -> Any:
    """The parser of python -m pyrovae.sample."""
    p = parser(
        "sample",
        "Draw x from a trained run; or decode near, between and along the codes of rows, impute what is missing of "
        "them, and denoise them.",
        "RUN --out FILE [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--out", "where to save: .npz, .csv, .nc (netCDF), .png or .gif", "FILE")
    add_option(p, "--overwrite", "replace a file of that name and kind", action="store_true")
    add_option(p, "--n", "draws (default 100); of each row, neighbours and imputations (default 8)", "INT")
    add_option(
        p,
        "--mean",
        "means of p(x|z) in place of draws of x: no draws, but pictures without noise of pixels",
        action="store_true",
    )
    add_option(
        p,
        "--temperature",
        "the noise of z times this, for draws of x: below 1 they vary less, and are no draws of p(x) (default 1)",
        "NUMBER",
    )
    add_option(
        p, "--class", "of a run given labels: the class of all that is drawn or decoded, whatever the rows are", "NAME"
    )
    add_option(p, "--near", "neighbours of the codes of these rows", "ROW,...")
    add_option(p, "--radius", "of neighbours: z + radius eps, eps ~ N(0, I) (default 0.1)", "NUMBER")
    add_option(p, "--between", "on the way from the code of one row to that of another", "ROW,ROW")
    add_option(p, "--path", "on the straight line, on the great circle, or both (default both)", "line|circle|both")
    add_option(p, "--traverse", "along one latent dimension at a time, from the code of a row", "ROW")
    add_option(p, "--dims", "latent dimensions of a traversal (default: the ten that vary most)", "INT,...")
    add_option(p, "--steps", "of a way or a traversal (default 11)", "INT")
    add_option(
        p,
        "--impute",
        "hide a half of pictures (lower, upper, left or right), a share of the elements at random, or what a .npy file "
        "of a boolean mask says is not seen, or nothing but what is missing already (missing); and draw it given the "
        "rest",
        "WHAT",
    )
    add_option(p, "--K", "weighted draws of z behind imputations of a row (default 1000)", "INT")
    add_option(
        p,
        "--proposal",
        "where those come from: individual, a Gaussian fitted to each row, or guide, which was "
        "trained on whole rows (default individual)",
        "NAME",
    )
    add_option(p, "--denoise", f"corrupt rows and reconstruct them: {', '.join(corruptions())}", "NAME:AMOUNT")
    add_option(p, "--rows", "impute or denoise the first rows (default 8)", "INT")
    add_option(p, "--split", "rows of test, validation or train (default test)", "NAME")
    add_option(p, "--data", "rows of a file or folder instead, read as the run's own are", "FILE")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def corruptions() -> list[str]:
    """How each corruption is typed, with its usual amount: noise:0.5."""
    settings = {name: list(choice.classes[0].settings.values()) for name, choice in CORRUPTIONS.items()}
    return [f"{name}:{amount[0].default:g}" for name, amount in settings.items() if amount]


def command(words: Sequence[str]) -> int:
    """Parse the options, make, save, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.processors import threads
    from pyrovae.runs.looking import look
    from pyrovae.runs.made import make
    from pyrovae.runs.ways import way_of

    way, seed = way_of(options), whole_option(options, "seed", 0)
    looked = look(options["run"], options)
    with threads(read("threads", options.get("threads", "auto"), THREADS), lambda text: say(f"note: {text}")):
        make(looked, way, options.get("out"), bool(options.get("overwrite")), seed, say)
    return 0


if __name__ == "__main__":
    main("sample", command, sys.argv[1:])
