"""python -m pyrovae.fit: train a pair on data, score it, and keep all of it in a run directory.

python -m pyrovae.fit --elbo iwae --K 5
python -m pyrovae.fit --data mnist --prior vamp --prior.components 500 --guide iaf
python -m pyrovae.fit --data table.csv --likelihood columns --latent-dim 5
python -m pyrovae.fit --model mixture --model.components 20
python -m pyrovae.fit --config recipes/two-stage.yaml --out runs/two
python -m pyrovae.fit --resume runs/two --epochs 200
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM
from typing import Any

from pyrovae.command import Stop, add_choices, add_option, given, main, parser, say, stop_waiting
from pyrovae.data import SOURCES
from pyrovae.errors import Interrupted, UsageError
from pyrovae.processes import check_processes
from pyrovae.runs.options import DERIVED, GRADIENTS, OBJECTIVES, OPTIONS, PARTS
from pyrovae.runs.parts import option
from pyrovae.runs.recipe import Options, overlaid
from pyrovae.settings import Text, read


def options_parser() -> Any:
    """The parser of python -m pyrovae.fit."""
    p = parser(
        "fit",
        "Train a deep latent variable model, score its test log p(x), and save it all in a run directory.",
        doc=__doc__,
    )
    add_option(p, "--config", "options from a file, such as a run's config.yaml", "FILE.yaml")
    for heading, options in OPTIONS.items():
        group = p.add_argument_group(heading, DATA_HELP if heading == "Data" else None)
        if heading == "Bound":
            add_choices(group, "elbo", OBJECTIVES)
        for name, setting in options.items():
            if setting.default is False:
                add_option(group, f"--{option(name)}", setting.help, action="store_true")
            else:
                add_option(group, f"--{option(name)}", setting.help, setting.metavar)
        if heading == "Bound":
            add_choices(group, "gradient", GRADIENTS)
        if heading != "Model":
            continue
        for part, choices in PARTS.items():
            add_choices(group, part, choices)
    group = p.add_argument_group("Output")
    add_option(group, "--out", "run directory (default: a new one, runs/NAME)", "DIR")
    add_option(group, "--resume", "continue a run: its directory, here or as --out", "DIR", nargs="?", const=True)
    add_option(group, "--overwrite", "replace the run that --out holds", action="store_true")
    add_option(group, "--no-plots", "write no plots", action="store_true")
    return p


DATA_HELP = "names: " + "; ".join(
    f"{', '.join(source.typed for source in SOURCES if source.kind == kind)} ({kind})"
    for kind in dict.fromkeys(source.kind for source in SOURCES)
)


def command(words: Sequence[str]) -> int:
    """Parse the options, train, evaluate, plot."""
    check_processes()
    options = read_options(words)
    output = {key: options.pop(key, None) for key in ("out", "resume", "overwrite", "no_plots", "debug")}
    for derived in DERIVED:
        options.pop(derived, None)
    out = None if output["out"] is None else read("out", output["out"], Text())
    directory = resumed_directory(output) if output["resume"] else out

    from pyrovae.runs.training import train

    stop = Stop()
    try:
        train(
            options,
            directory,
            resume=bool(output["resume"]),
            overwrite=bool(output["overwrite"]),
            plots=not output["no_plots"],
            say=say,
            stopping=stop,
        )
    except Interrupted as interrupted:
        stop_waiting()  # for whoever reads the output
        say(f"{interrupted}. {'Evaluate and plot' if interrupted.trained else 'Continue'} with")
        say(f"  python -m pyrovae.fit --resume {interrupted.directory}")
        return 130 if interrupted.trained else 128 + (stop.signal or SIGTERM)  # none, if another process was asked
    return 0


def resumed_directory(output: dict[str, Any]) -> str:
    """The directory of the run to continue, as it was named."""
    if output["overwrite"]:
        raise UsageError("--resume and --overwrite: continue the run or replace it, not both")
    directory = output["out"] if output["resume"] is True else output["resume"]
    if directory is None:
        raise UsageError("--resume: name the run directory, as --resume DIR")
    if output["resume"] is not True and output["out"] not in (None, output["resume"]):
        raise UsageError(f"--resume {directory}: continues in its own directory; leave out --out {output['out']}")
    return str(directory)


def read_options(words: Sequence[str]) -> Options:
    """The options of --config and of the command line, which wins.

    What a choice on the command line makes meaningless in the file is dropped: the settings of another prior, or the
    beta of another bound.
    """
    typed = given(options_parser().parse_args(words))
    stored = read_config(Path(typed.pop("config"))) if "config" in typed else {}
    if "elbo" in typed:
        for key in ("K", "alpha", "beta", "partitions", "gradient"):
            stored.pop(key, None)
    return overlaid(stored, typed)


def read_config(file: Path) -> Options:
    """The options in a YAML file.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    from pyrovae.files import read_yaml

    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"--config {file}: expected lines such as `elbo: iwae`, as in a run's config.yaml")
    return {key: value for key, value in content.items() if value is not None}


if __name__ == "__main__":
    main("fit", command, sys.argv[1:])
