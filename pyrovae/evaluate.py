"""python -m pyrovae.evaluate RUN: the log p(x) of a trained run, with its error and a verdict.

Prints a report and writes it to RUN/evaluation.json; the rows' own results go to RUN/scores/ as they are made.

    python -m pyrovae.evaluate RUN
    python -m pyrovae.evaluate RUN --K 50000 --repair
    python -m pyrovae.evaluate RUN --split validation --rows 500
    python -m pyrovae.evaluate RUN --proposal annealed --rows 50
    python -m pyrovae.evaluate RUN --netcdf draws.nc
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrovae.command import add_choices, add_option, given, main, parser, say, stop_waiting, whole_option
from pyrovae.errors import Interrupted, UsageError
from pyrovae.runs.build import build_proposal
from pyrovae.runs.options import FRECHET, PROPOSALS, SETTINGS, SWITCH, THREADS
from pyrovae.runs.recipe import refuse
from pyrovae.settings import Whole, Words, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.evaluate."""
    p = parser(
        "evaluate",
        "The log p(x) of a trained run by importance sampling, with its error and a verdict. An evaluation that was "
        "interrupted goes on where it was.",
        "RUN [options]",
        __doc__,
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "particles per datum, drawn exactly (default 5000; 32 chains if annealed)", "INT")
    add_option(p, "--rows", "score only the first rows (default: all)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_choices(p, "proposal", PROPOSALS)
    states = "discrete latents are summed out, and log p(x) is exact, up to so many joint states of a row; 0: drawn"
    add_option(p, "--most-states", f"{states} (default 65536)", "INT")
    add_option(
        p,
        "--repair",
        "score rows that may be missed by any distance (k-hat over 1, or an effective sample size below 10) again, "
        "from a Gaussian fitted to each, and state the mean anew",
        action="store_true",
    )
    add_option(p, "--chunk-size", "particles evaluated at once; bounds memory, changes nothing else", "INT")
    drawn = "draws from guide, widened or prior as compiled code: auto, on or off (default auto: where that is repaid)"
    add_option(p, "--compile", drawn, "WHEN")
    add_option(p, "--precision", "fp32, or bf16: matrix products in bfloat16, its bias measured (default fp32)", "NAME")
    add_option(p, "--netcdf", "save 100 posterior and predictive draws of each row for ArviZ", "FILE")
    add_option(p, "--frechet", FRECHET, action="store_true")
    add_option(p, "--anew", "forget what was scored before with these settings", action="store_true")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    return p


def command(words: Sequence[str]) -> int:
    """Parse the options, evaluate, print."""
    options = given(options_parser().parse_args(words))

    from pyrovae.inference.enumeration import MOST_STATES
    from pyrovae.processors import threads
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.evaluation import evaluate
    from pyrovae.runs.features import classifier_features
    from pyrovae.runs.scoring import SPLITS, Scoring

    proposal = build_proposal(options.get("proposal"))
    k, seed = whole_option(options, "K", proposal.usual_particles or 5000), whole_option(options, "seed", 0)
    limit, chunk_size = whole_option(options, "rows", None), whole_option(options, "chunk_size", None)
    split = str(options.get("split", "test"))
    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    run = open_run(options["run"])
    if run.recipe.is_exact:
        unused = ("K", "chunk_size", "proposal", "most_states", "repair", "compile", "precision", "netcdf", "anew")
        refuse(options, unused, f"the log p(x) of a {run.recipe.model.name} is exact")
    if run.recipe.is_reconstruction:
        unused = ("K", "chunk_size", "proposal", "most_states", "repair", "compile", "precision", "netcdf", "anew")
        refuse(options, unused, f"the model ({run.recipe.model.name}) reconstructs only and has no p(x)")
    most_states = read("most_states", options.get("most_states", MOST_STATES), Whole(0))
    netcdf = Path(str(options["netcdf"])) if "netcdf" in options else None
    device = str(options.get("device", "auto"))
    if "repair" in options and proposal.of_each_row:
        raise UsageError("--repair: is for draws from guide, widened or prior; these are made for each row already")
    mode = read("compile", options.get("compile", "auto"), SWITCH)
    precision = read("precision", options.get("precision", "fp32"), Words(("fp32", "bf16")))
    anew, repair = bool(options.get("anew")), bool(options.get("repair"))
    number = read("threads", options.get("threads", "auto"), THREADS)
    try:
        with threads(number, lambda text: say(f"note: {text}")):
            evaluate(
                run,
                Scoring(k, seed, proposal, chunk_size, repair, most_states),
                limit=limit,
                split=split,
                device=device,
                compile=mode,
                precision=precision,
                anew=anew,
                netcdf=netcdf,
                make_features=classifier_features if "frechet" in options else None,
                say=say,
            )
    except Interrupted as interrupted:
        stop_waiting()  # for whoever reads the output
        say(str(interrupted))
        return 130
    return 0


if __name__ == "__main__":
    main("evaluate", command, sys.argv[1:])
