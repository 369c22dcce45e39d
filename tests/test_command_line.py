"""What is typed is what is meant, and how a command is stopped."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pyrovae import compare, evaluate, fit, gaps
from pyrovae.command import Stop
from pyrovae.errors import CheckpointError, UsageError
from pyrovae.fit import read_config, read_options
from pyrovae.inference.training.checkpoint import load_latest
from pyrovae.runs.directory import write_recipe
from pyrovae.runs.recipe import Recipe

# What YAML makes numbers, times, dates, truths, nothing, lists and dictionaries of.
WORDS = (
    *("007", "1e3", "0x10", "1_000", "12:30:45", "2024-01-01", "yes", "no", "on", "true", "null", "~", "None"),
    *(
        "[a]",
        "{x: 1}",
        "a: b",
        "- x",
        "123.npy",
        "1.",
        ".5",
        "-.inf",
        "&a",
        "*a",
        "!x",
        "@x",
        "%x",
        "'x'",
        '"x"',
        "a #b",
    ),
)


@pytest.mark.parametrize("word", WORDS)
def test_words_stay_words(word: str, tmp_path: Path) -> None:
    """Directories, data and names are taken as they were typed, and as they were stored."""
    for option in ("--out", "--data", "--data-root", "--resume", "--optimizer"):
        assert read_options([f"{option}={word}"]) == {option[2:].replace("-", "_"): word}
    write_recipe(tmp_path, Recipe(data=word, seed=0).settled(data_hash="x", event_shape=(2,)))
    assert read_config(tmp_path / "config.yaml")["data"] == word


@pytest.mark.parametrize("word", ["007", "1e3", "yes", "12:30", "[a]", "~"])
def test_runs_are_named_by_words(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positional arguments too: what is missing is the directory of that very name."""
    monkeypatch.chdir(tmp_path)
    commands = [(evaluate.command, [word]), (gaps.command, [word]), (fit.command, ["--resume", word])]
    for command, words in commands:
        with pytest.raises(CheckpointError, match="no such run directory") as caught:
            command(words)
        assert str(caught.value).startswith(f"{word}: ")
    with pytest.raises(CheckpointError) as caught:
        compare.command([word])
    assert word in str(caught.value)


def test_a_run_is_written_where_it_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "--data three-gaussians --latent-dim 2 --network.hidden 4 --batch-size 2000 --epochs 1 --eval-K 5 --no-plots"
    )
    assert fit.command([*small.split(), "--out", "1e3", "--seed", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["1e3"]


def test_numbers_and_lists_keep_their_meaning() -> None:
    words = "--K 5 --elbo iwae --lr 1e-2 --latent-dim [7] --network.hidden 20,30 --seed 007 --patience 1e1"
    recipe = Recipe(**read_options(words.split()))
    expected = {"K": 5, "lr": 0.01, "latent_dim": (7,), "seed": 7, "patience": 10}
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.network.settings["hidden"] == [20, 30]


@pytest.mark.parametrize("line", ["data: 007", "data: 12:30", "data: yes", "optimizer: 3", "data: [a]"])
def test_a_number_in_yaml_is_no_word(line: str, tmp_path: Path) -> None:
    """What YAML has turned into something else cannot be told any more, so it is asked for in quotes."""
    (tmp_path / "config.yaml").write_text(line)
    with pytest.raises(UsageError, match=r"^(data|optimizer): expected a word, got .*; put it in quotes in YAML"):
        Recipe(**read_config(tmp_path / "config.yaml"))
    key, value = line.split(": ", 1)
    (tmp_path / "config.yaml").write_text(f"{key}: '{value}'")
    assert read_config(tmp_path / "config.yaml") == {key: value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected lines such as"),
        ("1: 2\n", "names that are no words"),
        ("a: [", "cannot be read"),
        ("a: &x [1, 2]\nb: *x\n", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_of_options_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_options(["--config", str(tmp_path / "config.yaml")])


def test_the_command_line_lies_over_the_file(tmp_path: Path) -> None:
    """A setting of a part is changed in the part that the file names; another part has none of its settings."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"prior": {"name": "VampPrior", "components": 7}, "guide": "low-rank", "K": 3}))
    words = ["--config", str(file)]
    assert read_options([*words, "--prior.components", "2"])["prior"] == {"name": "VampPrior", "components": "2"}
    assert read_options([*words, "--guide.rank", "1"])["guide"] == {"name": "low-rank", "rank": "1"}
    assert read_options([*words, "--prior", "mixture"])["prior"] == {"name": "mixture"}
    assert "K" not in read_options([*words, "--elbo", "elbo"])
    assert read_options(words)["K"] == 3


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(UsageError, match="--out: expected a value, got an empty word"):
        read_options(["--out", ""])


# ------------------------------------------------------------------------------------------------------------ stopping


def test_a_signal_within_a_print_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    """The handler prints nothing through Python, which refuses a print within a print."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "\nstopping after this step and saving the state; once more stops at once\n"


def test_a_wish_that_is_heard_twice_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of several processes, at once; a second one later, or of a process alone, ends it."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for processes, later, wanted in (("1", 0.0, [143]), ("2", 0.0, []), ("2", 6.0, [143])):
        monkeypatch.setenv("WORLD_SIZE", processes)
        ended.clear()
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.since -= later
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
        assert ended == wanted


@pytest.mark.slow
def test_interrupted_while_the_output_waits(tmp_path: Path) -> None:
    """`fit | less`: nobody reads, a print waits, and Ctrl-C still ends the run with its state saved."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    words = "--data three-gaussians --latent-dim 2 --network.hidden 4 --batch-size 2000 --epochs 300 --seed 1 --out run"
    run = subprocess.Popen(
        [sys.executable, "-m", "pyrovae.fit", *words.split(), "--compile", "off"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = b""
        while b"epoch    1" not in said or not said.endswith(b"\n"):  # which may be written by itself
            said += os.read(reader, 4096)
        # A file of its own, since what is set for a descriptor holds for its copy in the run as well.
        filler = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):  # the pipe is full, so the next line of the run has to wait
            while True:
                os.write(filler, bytes(1))
        # Lines are printed after epochs 1 and 15, of two steps each: from then on it waits.
        seen = -1
        while (now := load_latest(tmp_path / "run").step) != seen or now < 30:
            seen = now
            time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=60)[1]
    finally:
        run.kill()
        os.close(filler)
        os.close(reader)
        os.close(writer)
    assert run.returncode == 130, err
    assert "stopping after this step" in err
    assert "\nepoch " in err  # the line that waited
    assert "--resume run\n" in err
    assert "Traceback" not in err
    assert load_latest(tmp_path / "run").step >= seen > 0
