"""pyrovae: every command by its name, as `pyrovae fit` or `python -m pyrovae fit`; `python -m pyrovae.fit` is the same.

    pyrovae fit --elbo iwae --K 5
    pyrovae evaluate runs/mnist-iwae
    pyrovae fit --help
    eval "$(pyrovae completion bash)"

A command is the module of its name in this package, or a package of that name, whose docstring begins with what it
does. None of them is imported but the one that is asked for.
"""

import ast
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from pyrovae.command import ending, main
from pyrovae.errors import UsageError
from pyrovae.version import __version__

COMMANDS = (
    "fit", "evaluate", "gaps", "gradients", "compare", "sample", "encode", "classify", "disentangle", "runs",
)  # fmt: skip
SHELLS = ("bash", "zsh", "fish")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the first word names, with the words after it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        complete()
    name = words[0] if words else ""
    if name in COMMANDS:
        main(name, module(name).command, words[1:])
    main("", about, words)


def about(words: Sequence[str]) -> None:
    """Answer what is no command.

    Raises:
        UsageError: neither a command nor anything else that is known.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(f"pyrovae {__version__}")
    elif name == "completion":
        print(completion(words[1:]))
    else:
        near = difflib.get_close_matches(name, (*COMMANDS, "completion", "--help", "--version"), 1)
        meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UsageError(f"{name}: no such command; {meant} (see --help)")


def overview() -> str:
    """What --help prints."""
    told = {command: sentence(command) for command in COMMANDS}
    told["completion SHELL"] = f"what makes a shell complete these commands: {', '.join(SHELLS)}."
    options = {"-h, --help": "show this; after a command, what it takes", "--version": "show the version"}
    return "\n".join(
        [
            "usage: pyrovae COMMAND [options]",
            *("", "Deep latent variable models in Pyro: declared pairs, bounds, and log p(x) that can be believed."),
            *("", "commands:", *(f"  {name:<22}{text}" for name, text in told.items())),
            *("", "options:", *(f"  {name:<22}{text}" for name, text in options.items())),
            ending(__doc__),
        ]
    )


def sentence(command: str) -> str:
    """What a command does: the first line of its module's docstring, after its name."""
    text = ast.get_docstring(ast.parse(file_of(command).read_text())) or ""
    return text.partition("\n")[0].partition(": ")[2]


def file_of(command: str) -> Path:
    """Where a command is: in COMMAND.py, or in COMMAND/__main__.py beside what it is about."""
    file = Path(__file__).with_name(f"{command}.py")
    return file if file.exists() else file.with_suffix("") / "__main__.py"


def module(command: str) -> Any:
    """The module of a command."""
    inside = "" if file_of(command).name != "__main__.py" else ".__main__"
    return import_module(f"pyrovae.{command}{inside}")


def completion(words: Sequence[str]) -> str:
    """What a shell runs to complete words of this command.

    Raises:
        UsageError: for another shell.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        raise UsageError(f"completion: expected one of {', '.join(SHELLS)}, got {' '.join(words) or 'nothing'}")
    import argcomplete

    code: str = argcomplete.shellcode(["pyrovae"], shell=words[0])
    return code


def complete() -> NoReturn:
    """Tell a shell, which asks by variables of the environment, how the word at the cursor may go on; then exit."""
    import argparse

    import argcomplete

    typed = argcomplete.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    parser = argparse.ArgumentParser("pyrovae")
    if len(typed) > 1 and typed[1] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"  # words of the command begin at the second
        for known in module(typed[1]).options_parser()._actions[1:]:
            flags = [flag.removesuffix(".name") for flag in known.option_strings]
            kind: dict[str, Any] = {"action": "store_true"} if known.nargs == 0 else {"nargs": known.nargs}
            added = parser.add_argument(*flags or [known.dest], **kind)
            added.completer = getattr(known, "completer", None)  # type: ignore[attr-defined]
    else:
        parser.add_argument("command", choices=(*COMMANDS, "completion"))
        parser.add_argument("--version", action="store_true")
    argcomplete.autocomplete(parser)
    sys.exit()


if __name__ == "__main__":
    run()
