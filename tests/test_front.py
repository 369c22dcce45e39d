"""One command for all: what it lists, what it runs, and how words are completed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pyrovae
from pyrovae import __main__ as front
from pyrovae import command
from pyrovae.errors import EXIT_CODES, PyrovaeError
from pyrovae.version import __version__

PACKAGE = Path(pyrovae.__file__).parent


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and error output of the front command."""
    with pytest.raises(SystemExit) as stopped:
        front.run(words)
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_every_command_of_the_package_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    """A command is a module of the package that ends by running `main`."""
    found = [
        path
        for path in PACKAGE.rglob("*.py")
        if '\n    main("' in path.read_text() and path.parent != PACKAGE / "command"
    ]
    assert {front.file_of(name) for name in front.COMMANDS} == {
        path for path in found if path != PACKAGE / "__main__.py"
    }
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    for name in front.COMMANDS:
        assert f"  {name} " in out
        assert front.sentence(name).endswith(".")
        assert front.sentence(name) in out
    assert ended(capsys)[1] == out  # without a word too


@pytest.mark.parametrize("name", front.COMMANDS)
def test_every_command_ends_its_help_with_examples_that_it_reads(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option of an example is one of the command's: a parser reads the words."""
    code, out, _ = ended(capsys, name, "--help")
    assert code == 0
    shown = [line.strip() for line in out.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()]
    assert sum(f"pyrovae.{name} " in f"{line} " for line in shown) > 1
    monkeypatch.chdir(tmp_path)
    for line in shown:
        start, words = line.split()[:3], shlex.split(line)[3:]
        assert start[:2] == ["python", "-m"]
        front.module(start[2].removeprefix("pyrovae.")).options_parser().parse_args(words)
    assert all(f"  {number} " in out and meaning in out for number, meaning in EXIT_CODES.items())


def test_every_error_has_an_exit_code_that_help_tells() -> None:
    kinds = [PyrovaeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.code for kind in kinds} <= set(EXIT_CODES)


def test_the_version_and_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, "--version")[:2] == (0, f"pyrovae {__version__}\n")
    code, _, err = ended(capsys, "evalute", "runs/x")
    assert code == 2
    assert "evalute: no such command; did you mean evaluate? (see --help)" in err
    assert ended(capsys, "completion", "tcsh")[0] == 2


@pytest.mark.parametrize(
    ("program", "typed"),
    [
        ("/usr/local/bin/pyrovae", "pyrovae fit"),
        ("/somewhere/pyrovae/__main__.py", "pyrovae fit"),
        ("/somewhere/pyrovae/fit.py", "python -m pyrovae.fit"),
        ("/somewhere/pytest/__main__.py", "python -m pyrovae.fit"),
    ],
)
def test_commands_are_written_as_they_are_called(
    program: str, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In usage, in help and in what is said."""
    monkeypatch.setattr(sys, "argv", [program])
    assert command.called("fit") == typed
    command.say("go on with python -m pyrovae.fit --resume x")
    assert capsys.readouterr().out == f"go on with {typed} --resume x\n"
    _, out, _ = ended(capsys, "gaps", "--help")
    assert f"a directory written by {typed}" in " ".join(out.split())
    assert ended(capsys, "fit", "--KK", "3")[2].partition(": error: ")[0] == typed.removeprefix("python -m ")


def completed(line: str, tmp_path: Path) -> set[str]:
    """What a shell is told for a line with the cursor at its end."""
    told = tmp_path / "words"
    asking = {
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(told), "_ARGCOMPLETE_IFS": "\n",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "pyrovae"], env={**os.environ, **asking}, capture_output=True, check=True)
    return set(told.read_text().split())


def test_a_shell_completes_commands_options_and_names_of_parts(tmp_path: Path) -> None:
    assert completed("pyrovae comp", tmp_path) == {"compare", "completion"}
    assert {"--prior", "--prior.components"} <= completed("pyrovae fit --pri", tmp_path)
    assert completed("pyrovae fit --prior vam", tmp_path) == {"vamp"}
    assert completed("pyrovae gaps runs/x --fam", tmp_path) == {"--family"}


@pytest.mark.parametrize("shell", front.SHELLS)
def test_each_shell_gets_code_that_names_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(capsys, "completion", shell)
    assert code == 0
    assert "_ARGCOMPLETE" in out
    assert "pyrovae" in out
