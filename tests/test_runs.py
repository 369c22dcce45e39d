"""Runs from Python: `pyrovae.train` is what the command does, quietly; what a run says of itself; what is refused."""

import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pyrovae
from pyrovae import Recipe, compare, evaluate, fit
from pyrovae.command import main
from pyrovae.errors import CheckpointError, Interrupted, NumericalError, UsageError
from pyrovae.inference.training.checkpoint import load_latest
from pyrovae.runs import report, training
from pyrovae.runs.directory import Run, differences, open_run

SMALL = {
    "data": "three-gaussians",
    "latent_dim": 2,
    "network": {"hidden": 8},
    "batch_size": 1000,
    "epochs": 2,
    "eval_K": 20,
    "eval_rows": 50,
    "seed": 3,
    "device": "cpu",
}
WORDS = shlex.split(
    "--data three-gaussians --latent-dim 2 --network.hidden 8 --batch-size 1000 --epochs 2 --eval-K 20 --eval-rows 50 "
    "--seed 3 --device cpu --no-plots"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs are relative to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that no test may change."""
    return pyrovae.train(Recipe(**SMALL), tmp_path_factory.mktemp("runs") / "run", plots=False)


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_latest(one).weights, load_latest(other).weights
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------------------------- from Python


def test_the_function_does_what_the_command_does_and_prints_nothing(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same seed: the same weights bit for bit, scores and configuration."""
    capfd.readouterr()
    quiet = pyrovae.train(Recipe(**SMALL), "quiet", plots=False)
    assert capfd.readouterr() == ("", "")
    assert fit.command([*WORDS, "--out", "typed"]) == 0
    typed = open_run("typed")
    for other in (quiet, run):
        assert same_weights(other.directory, typed.directory)
        assert other.recipe == typed.recipe
        assert other.evaluation == typed.evaluation
    assert Path("quiet/config.yaml").read_bytes() == Path("typed/config.yaml").read_bytes()


def test_a_run_tells_its_evaluation_history_rows_and_model(run: Run) -> None:
    assert run.evaluation is not None
    assert run.history is not None
    assert run.evaluation["rows"] == 50
    assert list(run.history["epoch"]) == [1, 2]
    assert run.recipe.likelihood.name == "Gaussian"
    assert run.recipe.event_shape == (2,)
    x = run.rows().test[:5]
    assert run.model().encode(x).shape == (5, 2)
    unscored = Run(Path("nothing"), run.recipe)
    assert (unscored.evaluation, unscored.history) == (None, None)


def test_what_is_said_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    pyrovae.train(SMALL, "said", plots=False, say=said.append)
    assert capsys.readouterr().out == ""
    lines = "\n".join(said)
    assert lines.startswith("data   three-gaussians: ")
    assert "epoch    1  train" in lines
    assert "log p(x), K = 20" in lines


def test_a_run_is_continued_from_python_with_what_may_differ(run: Run) -> None:
    """Stopped after a step and resumed, it is the run that was never stopped."""
    asked: list[int] = []

    @contextmanager
    def after_five_steps():
        yield lambda: asked.append(1) or len(asked) == 5

    with pytest.raises(Interrupted, match="stopped at epoch 2, step 5; the state is saved") as caught:
        pyrovae.train(SMALL, "run", plots=False, stopping=after_five_steps())
    assert (caught.value.directory, caught.value.trained) == (Path("run"), False)
    assert open_run("run").evaluation is None
    again = pyrovae.train({}, "run", resume=True, plots=False)
    assert same_weights(again.directory, run.directory)
    assert again.evaluation == run.evaluation
    longer = pyrovae.train(again.recipe.replace(epochs=3), "run", resume=True, plots=False)
    assert longer.recipe.epochs == 3
    assert longer.history is not None
    assert len(longer.history) == 3


def test_errors_are_the_library_s_own(run: Run) -> None:
    with pytest.raises(UsageError, match=r"'epoch' is none of .* did you mean epochs"):
        pyrovae.train({"epoch": 3})
    with pytest.raises(CheckpointError, match="nowhere: no such run directory"):
        pyrovae.train({}, "nowhere", resume=True)
    with pytest.raises(UsageError, match="resume: name the directory"):
        pyrovae.train({}, resume=True)
    with pytest.raises(CheckpointError, match=r"another configuration \(network.hidden: \[8\] then, \[9\] now\)"):
        pyrovae.train({"network": {"hidden": 9}}, run.directory, resume=True)
    with pytest.raises(UsageError, match=r"^directory .*run: holds a run of this.*`resume=True`, .* directory$"):
        pyrovae.train(SMALL, run.directory)
    with pytest.raises(UsageError, match=r"^device nowhere: not available here; use cpu or auto$"):
        pyrovae.train({**SMALL, "device": "nowhere"}, "new")
    with pytest.raises(CheckpointError, match=r"; only `epochs`, .* may differ. Start a new run in another directory$"):
        pyrovae.train({"lr": 0.5}, run.directory, resume=True)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("recipe", ["digits", None, Path("recipe.yaml"), [("data", "digits")], {1: 2}, Recipe])
def test_what_is_no_recipe_is_refused(recipe: object) -> None:
    for resume in (False, True):
        with pytest.raises(UsageError, match=r'^recipe: expected a Recipe, or options such as {"data": "digits"}, got'):
            pyrovae.train(recipe, "new", resume=resume)
    assert list(Path().iterdir()) == []


def test_a_stopped_evaluation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "report_on", stopped)
        with pytest.raises(Interrupted, match="stopped while evaluating; the training is saved") as caught:
            pyrovae.train(SMALL, "run", plots=False)
    assert caught.value.trained
    assert pyrovae.train({}, "run", resume=True, plots=False).evaluation is not None


# ------------------------------------------------------------------------------------------------------------ remedies


def test_what_differs_is_named_as_it_is_given() -> None:
    """Settings by their names, not whole dictionaries; of another choice, the choice alone."""
    old = Recipe(prior={"name": "VampPrior", "components": 4}, seed=1)
    keys = old.plain()
    assert differences(old, Recipe(prior="VampPrior", seed=1), keys) == ["prior.components: 4 there, 500 here"]
    assert differences(old, Recipe(seed=1), keys) == ["prior: VampPrior there, StandardNormal here"]
    assert differences(old, Recipe(prior="VampPrior", seed=2), ["seed"], "then", "now") == ["seed: 1 then, 2 now"]


def test_a_drawn_seed_is_no_other_configuration(run: Run) -> None:
    unseeded = {key: value for key, value in SMALL.items() if key != "seed"}
    with pytest.raises(UsageError, match="holds a run of this configuration"):
        pyrovae.train(unseeded, run.directory)
    with pytest.raises(UsageError, match=r"another configuration \(network.hidden: \[8\] there, \[7\] here\); con"):
        pyrovae.train({**unseeded, "network": {"hidden": 7}}, run.directory)
    with pytest.raises(UsageError, match=r"another configuration \(seed: 3 there, 4 here\)"):
        pyrovae.train({**SMALL, "seed": 4}, run.directory)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_training(name: str) -> None:
    pyrovae.train({**SMALL, "epochs": 1}, "run", plots=False)
    for path in sorted(Path("run", name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path("run", name).rmdir()
    Path("run", name).touch()
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=f"run/{name}: is a file, and runs have a folder of that name; move it"):
            pyrovae.train({} if "resume" in options else SMALL, "run", **options)


def test_an_interrupted_evaluation_says_that_it_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = [str(run.directory), "--K", "30", "--rows", "120", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(report, "check_of", stopped)
        with pytest.raises(SystemExit) as caught:
            main("evaluate", evaluate.command, words)
    assert caught.value.code == 130
    out = capsys.readouterr().out
    assert "stopped; the scores of 120 of 120 rows are kept, and the same command goes on from there" in out
    assert evaluate.command(words) == 0
    assert "120 rows were scored before" in capsys.readouterr().out


def test_a_comparison_replaces_only_what_it_wrote(run: Run) -> None:
    words = [str(run.directory), "--K", "5", "--rows", "9", "--no-baseline", "--device", "cpu", "--out", "out"]
    assert compare.command(words) == 0
    assert compare.command(words) == 0
    for name, theirs in (
        ("density.csv", "height,weight\n1,2\n"),
        ("density.tex", "\\documentclass"),
        ("density.png", "?"),
    ):
        ours = Path("out", name).read_bytes()
        Path("out", name).write_text(theirs)
        with pytest.raises(
            UsageError, match=f"^out/{name}: was not written by pyrovae.compare; choose another directory"
        ):
            compare.command(words)
        assert Path("out", name).read_text() == theirs
        Path("out", name).write_bytes(ours)


STOPPED = """
import os, sys, fcntl
from contextlib import suppress
from pyrovae import fit
from pyrovae.command import main
from pyrovae.runs import training

def conclude(*_):
    # Nobody reads any more: the pipe is full, and whoever prints waits.
    filler = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(filler, bytes(1))
    raise KeyboardInterrupt

training.conclude = conclude
main("fit", fit.command, sys.argv[1:])
"""


@pytest.mark.slow
def test_interrupted_in_the_evaluation_while_the_output_waits() -> None:
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", STOPPED, *WORDS, "--epochs", "1", "--out", "run"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 130, done.stderr
    assert "stopped while evaluating; the training is saved. Evaluate and plot with\n" in done.stderr
    assert "--resume run\n" in done.stderr


def test_no_checkpoint_is_called_intact_before_there_is_one() -> None:
    with pytest.raises(NumericalError, match="the last good step is") as caught:
        pyrovae.train({**SMALL, "lr": 1e36, "optimizer": "SGD"}, "run", plots=False)
    assert "intact" not in str(caught.value)
