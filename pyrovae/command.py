"""What the commands have in common: reading options, and how they end.

Options are read by jsonargparse. A word stays the word that was typed, whatever YAML would make of `007`, `yes` or
`[a]`: it gets its meaning in `pyrovae.runs.options`, as do the values of a YAML file. A part and its own settings are
written `--prior VampPrior --prior.components 500`, and in YAML

    prior:
      name: VampPrior
      components: 500

A command ends with one line on the error output and the exit code of `pyrovae.errors`; `--debug` shows the traceback.
"""

import argparse
import difflib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pyrovae.errors import EXIT_CODES, OutputError, PyrovaeError, UsageError, one_line
from pyrovae.processes import leading, several
from pyrovae.runs.parts import option, shown
from pyrovae.settings import Whole, read

if TYPE_CHECKING:
    from pyrovae.runs.parts import Choice


def called(command: str) -> str:
    """How a command is called: `pyrovae fit` where this process was started so, else `python -m pyrovae.fit`."""
    program = Path(sys.argv[0] if sys.argv else "")
    by_name = program.stem == "pyrovae" or (program.parent.name, program.name) == ("pyrovae", "__main__.py")
    return f"pyrovae {command}" if by_name else f"python -m pyrovae.{command}"


def as_called(text: str) -> str:
    """A text with its commands written as they are called."""
    return re.sub(r"python -m pyrovae\.(\w+)", lambda m: called(m[1]), text)


def ending(doc: str | None) -> str:
    """What --help ends with: the commands that a module's docstring shows below its first line, and exit codes."""
    lines = [line.strip() for line in (doc or "").splitlines()[1:]]
    examples = [f"  {line}" for line in lines if re.match("python -m|pyrovae |eval ", line)]
    codes = [f"  {code:<22}{meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["", "examples:", *examples, "", "exit codes:", *codes])


def parser(command: str, description: str, usage: str = "[options]", doc: str | None = None) -> Any:
    """A parser of that command's options; every option defaults to None, which says that it was not given.

    The commands that a module's docstring `doc` shows below its first line are examples in --help.
    """
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        """One-line errors, the nearest option for a misspelt one, and `--PART` for `--PART.name`."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = re.sub(r"\s*\n\s*", " ", re.sub(r"(--\w+)\.name\b", r"\1", message))
            raise UsageError(self.explain(line if len(line) < 300 else line[:300] + " ..."))

        def explain(self, message: str) -> str:
            """The parser's message in terms of what was typed."""
            message = re.sub(r'^Parser key "(.+?)":', lambda m: f"--{m[1].replace('_', '-')}:", message)
            missing = re.search(r"the following arguments are required: (\w+)", message)
            if missing:  # the one that each command but fit has
                message = "RUN: name the directory of a run"
            unknown = re.match(r"unrecognized arguments: (\S+)|Option '(\S+)' is not accepted", message, re.I)
            if unknown:
                word = unknown[1] or unknown[2]
                shown = [o.removesuffix(".name") for a in self._actions for o in a.option_strings]
                wanted = word.split("=")[0] if unknown[1] else f"--{word.replace('_', '-')}"
                near = difflib.get_close_matches(wanted, shown, 1)
                if unknown[1] and not word.startswith("-"):
                    return f"{word}: a word too many; options begin with -- (see --help)"
                message = f"{word}: no such option{f'; did you mean {near[0]}?' if near else ''}"
            return f"{message} (see --help)" if "--help" not in message else message

        def format_help(self, *formatter: Any) -> str:
            text = re.sub(r"\s*\((type:\s+[^)]*?,\s+)?default:\s+null\)", "", super().format_help(*formatter))
            # As wide as before, so that the columns stay where they are.
            text = re.sub(r"(--\w+)\.name( \S+)", r"\1\2     ", text).replace(" \n", "\n")
            return as_called(f"{text}{ending(doc)}\n")

        def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            parts = {o.removesuffix(".name") for a in self._actions for o in a.option_strings if o.endswith(".name")}
            words = [
                re.sub(r"^(--\w+)(?==|$)", lambda m: m[1] + ".name" if m[1] in parts else m[1], w) for w in args or ()
            ]
            return super().parse_args(words, *rest, **kwargs)

    made = Parser(
        prog=called(command),
        usage=f"{called(command)} {usage}",
        description=description,
        default_env=False,
        print_config=None,
        allow_abbrev=False,
    )
    # `main` acts on it, before any other option is read.
    made.add_argument("--debug", action="store_true", default=None, help="show the traceback of an error")
    return made


def word(value: str) -> str:
    """What was typed, as it was typed: jsonargparse reads as YAML what has no type of its own."""
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got an empty word")
    return value


def add_option(group: Any, flag: str, text: str, metavar: str | None = None, **settings: Any) -> Any:
    """Add an option whose value is checked later, and return it."""
    if settings.get("action") == "store_true":
        return group.add_argument(flag, help=text, default=None, **settings)
    return group.add_argument(flag, help=text, default=None, type=word, metavar=metavar, **settings)


def add_choices(group: Any, part: str, choices: "Mapping[str, Choice]") -> None:
    """Add the options of a part: which choice it is, and the choices' own settings."""
    names = "; ".join(
        f"{name}{' (' + ', '.join(c.short) + ')' if c.short else ''}: {c.help}" for name, c in choices.items()
    )
    words = [*choices, *(short for choice in choices.values() for short in choice.short)]
    add_option(group, f"--{part}.name", names, "NAME").completer = lambda **_: words  # of one that is begun in a shell
    for key in dict.fromkeys(key for choice in choices.values() for key in choice.settings):
        having = [found for name, choice in choices.items() for found in choice.having(key, name)]
        told: dict[str, list[str]] = {}
        for name, setting in having:
            default = "" if setting.default is None else f"{shown(setting.default)} "
            told.setdefault(setting.help, []).append(f"{default}for {name}")
        sentences = "; ".join(f"{words} (default: {', '.join(names)})" for words, names in told.items())
        add_option(group, f"--{part}.{option(key)}", sentences.replace("(default: for", "(for"), having[0][1].metavar)


def given(namespace: Any) -> dict[str, Any]:
    """The options that were given, nested as a configuration is, without those left at None."""

    def prune(values: dict[str, Any]) -> dict[str, Any]:
        nested = {k: prune(v) if isinstance(v, dict) else v for k, v in values.items()}
        return {k: v for k, v in nested.items() if v is not None and v != {}}

    return prune(namespace.as_dict())


def whole_option(options: dict[str, Any], key: str, default: int | None) -> Any:
    """An option that is a whole number: at least 0 for the seed, 1 for all others."""
    kind = Whole(0 if key == "seed" else 1)
    return default if key not in options else read(key, options[key], kind)


def main(command: str, run: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = called(command).removeprefix("python -m ").strip()
    try:
        code = run([word for word in words if word != "--debug"]) or 0
        if sys.stdout is not None:  # None where it was closed before the start
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OutputError.code)
    except KeyboardInterrupt:
        stop_waiting()
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in words:
            raise
        code, text = explain(error)
        print(f"{name}: error: {as_called(text)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(code)


def say(text: str) -> None:
    """Print a line at once; of several processes one speaks."""
    if leading():
        print(as_called(text), flush=True)


LESS_MEMORY = (
    "Draw fewer of the K particles at a time (fit --particle-chunk, evaluate --chunk-size) or lower --batch-size"
)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for an error."""
    line = one_line(str(error)) or type(error).__name__
    if isinstance(error, PyrovaeError):
        return error.code, in_options(line, error.settings)
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(m in line for m in memory)
    ):
        line = re.sub(r"^\[.*?\] .*?: (?=can't|not)", "", line)
        return 4, f"out of memory: {line.split('.')[0]}. {LESS_MEMORY}"
    if isinstance(error, MemoryError):
        return 4, f"out of memory. {LESS_MEMORY}"
    if isinstance(error, OSError):
        return OutputError.code, line
    return 1, f"{type(error).__name__}: {line} (a defect; --debug shows where)"


def in_options(message: str, settings: Sequence[str]) -> str:
    """A message in the words of the command line: its settings as options, added at its end where it names none.

    >>> in_options("alpha=1: that is the ELBO; use `elbo=elbo`", ["alpha=1", "elbo=elbo"])
    '--alpha 1: that is the ELBO; use --elbo elbo'
    >>> in_options("x: outside [0, 1]", ["binarize"])
    'x: outside [0, 1] (--binarize)'
    """
    unnamed = []
    for setting in settings:
        typed = f"--{option(setting).replace('=True', '').replace('=', ' ')}"
        quoted = message.replace(f"`{setting}`", typed)
        head, colon, rest = quoted.partition(": ")
        head = re.sub(rf"(?:^|(?<=, )){re.escape(setting)}(?=[, ]|$)", typed.replace("\\", r"\\"), head)
        if (named := head + colon + rest) == message:
            unnamed.append(typed)
        message = named
    return f"{message} ({', '.join(unnamed)})" if unnamed else message


def warn(text: str) -> None:
    """Write a line to the error output from a signal handler, where nothing that buffers or waits may be used.

    Not print(): the handler may have interrupted a print, and Python refuses the second (a "reentrant call").
    """
    with suppress(OSError, ValueError, AttributeError):  # the last two: closed, or none
        descriptor = sys.stderr.fileno()
        if writable(descriptor):
            os.write(descriptor, f"\n{text}\n".encode())


def stop_waiting() -> None:
    """Give up an output that nobody reads, such as a pipe to a pager, so that a print which waits for it goes on.

    That line and what follows go to the error output instead, or nowhere, if that waits as well.
    """
    with suppress(OSError, ValueError, AttributeError):
        descriptor = sys.stdout.fileno()
        if not writable(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            errors = sys.stderr.fileno()
            if writable(errors):
                os.dup2(errors, descriptor)


def writable(descriptor: int) -> bool:
    """Whether a line can be written without waiting."""
    return bool(select.select([], [descriptor], [], 0)[1])


class Stop:
    """While it is entered, SIGINT and SIGTERM are a wish to stop, which it tells when called. Twice: out now.

    Of several processes each may hear of one wish twice, from its launcher and from whoever asked that.

    Attributes:
        signal: The number of the signal received, or 0.
    """

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0
        self.echo = 5.0 if several() else 0.0  # seconds

    def __call__(self) -> bool:
        """Whether to stop."""
        return bool(self.signal)

    def __enter__(self) -> "Stop":
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        """Take note of a signal."""
        if self.signal:
            if time.monotonic() - self.since >= self.echo:
                os._exit(128 + number)
            return
        self.signal, self.since = number, time.monotonic()
        stop_waiting()
        if leading():
            warn("stopping after this step and saving the state; once more stops at once")
