"""What can go wrong, and the exit code that each kind of fault ends a command with.

Every message is one line that says what was wanted, what came, and the remedy. From Python the classes behave as
the built-in exceptions they derive from; a command prints the message, without a traceback, and exits with `code`.
"""

import re
from pathlib import Path

# Of a command.
EXIT_CODES = {
    0: "done",
    1: "a defect of pyrovae",
    2: "options that make no sense",
    3: "data that cannot be used",
    4: "no memory, or numbers that are not finite",
    5: "a run or a checkpoint that cannot be used",
    6: "results that cannot be written",
    130: "interrupted (SIGINT); what was done is kept",
    143: "asked to end (SIGTERM); what was done is kept",
}
# Characters of a message: names and values in it may come from a file, and be of any length.
LONGEST = 1500


def one_line(text: str) -> str:
    r"""Text as one line of at most `LONGEST` characters, without any that a terminal would act on.

    >>> one_line("\x1b[31mred\n  and bell\a")
    '\\x1b[31mred and bell\\x07'
    """
    if len(text) > LONGEST:  # what to do about it comes last
        text = f"{text[: LONGEST - 505]} ... {text[-500:]}"
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[: 2 * LONGEST]


class PyrovaeError(Exception):
    """Base of the library's own errors; `code` is the exit code of a command that ends with it.

    Args:
        message: What was wanted, what came, and the remedy.
        settings: What it is of, or its remedy sets, as a configuration names it: "binarize", or with its value
            "stream=on". A message has them at its beginning, in backticks or not at all; a command writes options.
    """

    code = 1

    def __init__(self, message: str = "", *, settings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.settings = settings

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(PyrovaeError, ValueError):
    """An option or argument that makes no sense, alone or beside the others."""

    code = 2


class DataError(PyrovaeError, ValueError):
    """Data that is missing, damaged, or outside the support of the likelihood."""

    code = 3


class PairError(PyrovaeError, ValueError):
    """A model and a guide that do not fit together, or break the per-datum bound."""

    code = 2


class NumericalError(PyrovaeError, ArithmeticError):
    """A NaN or an infinity where a number is needed."""

    code = 4


class CheckpointError(PyrovaeError, RuntimeError):
    """A run directory or checkpoint that is missing, damaged, or of another configuration."""

    code = 5


class OutputError(PyrovaeError, OSError):
    """An output that cannot be written."""

    code = 6


class Interrupted(KeyboardInterrupt):
    """Training or its final evaluation was stopped; what was done is saved in `directory`, and resuming goes on.

    Attributes:
        directory: The run's.
        trained: Whether the training has ended, so that only evaluation and figures are missing.
    """

    def __init__(self, message: str, directory: Path, trained: bool) -> None:
        super().__init__(message)
        self.directory, self.trained = directory, trained
