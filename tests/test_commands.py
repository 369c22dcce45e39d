"""The commands, from the words typed to the files written and the exit code."""

import errno
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
import yaml

import pyrovae
from pyrovae import evaluate, fit
from pyrovae.command import explain, main
from pyrovae.errors import CheckpointError, DataError, NumericalError, OutputError, UsageError
from pyrovae.files import write_json
from pyrovae.inference.marginal import log_marginal
from pyrovae.inference.training.checkpoint import load, load_latest, steps
from pyrovae.models import BernoulliMixture, MeanFieldNormal
from pyrovae.plots import Style
from pyrovae.runs import evaluation, figures, training
from pyrovae.runs.directory import open_run
from pyrovae.runs.progress import rows_done
from pyrovae.runs.recipe import Part, Recipe

SMALL = (
    "--data three-gaussians --latent-dim 2 --network.hidden 8 --batch-size 1000 --epochs 2 --eval-K 50 --seed 3 "
    "--device cpu"
)
RUN = [sys.executable, "-m", "pyrovae.fit"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs are relative to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that no test may change."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert fit.command([*SMALL.split(), "--out", str(directory)]) == 0
    return directory


def train(words: str = "", out: str = "run") -> Path:
    assert fit.command([*SMALL.split(), "--out", out, "--no-plots", *words.split()]) == 0
    return Path(out)


def fails(capsys, words: str, command=fit.command, name: str = "fit") -> tuple[int, str]:
    """Exit code and message of a command that ends with an error: one line, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(name, command, shlex.split(words))
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith(f"pyrovae.{name}: error: ")
    assert "Traceback" not in out + err
    return caught.value.code, err


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_latest(run).weights


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---------------------------------------------------------------------------------------------------------- end to end


def test_a_run_holds_all_it_promises(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*")}
    assert {"config.yaml", "metrics.csv", "evaluation.json", "checkpoints", "tensorboard", "plots"} <= names
    pictures = {Path(name).stem for name in names if name.endswith(".png")}
    assert pictures == {
        "training_curves", "samples", "reconstructions", "neighbourhood", "latent_map", "traversals", "k_curve",
        "density",
    }  # fmt: skip
    assert all((trained / "plots" / f"{name}.png").stat().st_size > 5000 for name in pictures)
    assert steps(trained) == [8, 4]
    assert "lock" not in names
    assert not [name for name in names if Path(name).name.startswith(".")]


def test_the_evaluation_says_what_its_numbers_are(trained):
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["unit"] == "nats per datum"
    assert report["measure"] == "density of the data in its own units, 2 dimensions"
    assert report["estimator"] == "importance sampling from the guide"
    assert (report["K"], report["split"], report["rows"], report["rows_in_split"]) == (50, "test", 500, 500)
    assert (report["binarize"], report["bits_per_dimension"], report["latent_dimensions"]) == (None, None, 2)
    assert report["gap"] == pytest.approx(report["log_marginal"] - report["elbo"], abs=1e-9)
    assert report["gap"] > 0
    assert 0 < report["monte_carlo_error"] < report["error_over_rows"] < 0.1
    assert [point["K"] for point in report["curve"]] == [1, 2, 5, 10, 20, 50]
    assert report["curve"][-1]["log_marginal"] == pytest.approx(report["log_marginal"])
    for point in report["curve"]:
        assert point["to_last"] == pytest.approx(point["log_marginal"] - report["log_marginal"], abs=1e-9)
        assert point["to_last_error"] < point["error_over_rows"] / 3  # the rows move together
    assert report["curve"][-1]["to_last_error"] == 0
    bounds = [point["log_marginal"] for point in report["curve"]]
    assert bounds == sorted(bounds)
    assert report["versions"]["torch"] == torch.__version__
    each = report["kl_per_dimension"]
    assert set(each) == {"z[0]", "z[1]"}
    assert sum(each.values()) == pytest.approx(report["kl"], rel=1e-4)
    enough = max(each.values()) >= 0.9 * sum(each.values())
    assert report["kl_dimensions"] == {"share": 0.9, "count": 1 if enough else 2}
    assert {"ess", "pareto_k", "seed", "dtype", "device", "data_hash", "kl", "active_units"} <= report.keys()


def test_rows_are_drawn_as_what_they_are(tmp_path):
    """Handwriting as ink, all else as photographs, other units between their ends, tables by their columns."""
    rows = pyrovae.load_data("digits").rows("mass")
    assert (
        figures.style_of(Recipe(data="Digits"), rows) == figures.style_of(Recipe(data="mnist"), rows) == Style(ink=True)
    )
    assert figures.style_of(Recipe(data="photographs.npz"), rows) == Style()
    assert figures.style_of(Recipe(data="fashion_mnist"), rows) == Style()
    assert figures.named_labels(rows, 3) is not None
    own = Recipe(data="own.npz")
    images = np.linspace(-3, 5, 40 * 12, dtype=np.float32).reshape(40, 1, 4, 3)
    np.savez(tmp_path / "wide.npz", x=images, y=np.array(["cat", "dog"] * 20))
    wide = pyrovae.load_data(tmp_path / "wide.npz").rows("density")
    assert figures.style_of(own, wide).limits == (wide.test.min().item(), wide.test.max().item())
    assert figures.named_labels(wide, 3) == [["cat", "dog"][label] for label in wide.labels["test"][:3].tolist()]
    (tmp_path / "table.csv").write_text("height,weight\n" + "".join(f"{i},{i * i}\n" for i in range(30)))
    table = pyrovae.load_data(tmp_path / "table.csv")
    assert figures.style_of(own, table.rows("density", standardize=True)).unit == "standardised"
    assert figures.style_of(own, table.rows("density")).columns == ("height", "weight")
    assert figures.style_of(own, table.rows("density")).unit == ""
    assert figures.named_labels(table.rows("density"), 3) is None


def test_an_evaluation_says_how_far_it_is_in_a_few_plain_lines(capsys):
    with rows_done(10_000, "log p(x) by drawing", print) as done:
        for block in range(100):
            done(100 * (block + 1))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "log p(x) by drawing: 10000 rows"
    assert [line.split(" in ")[0] for line in lines] == [f"  {n}000 of 10000 rows" for n in range(1, 10)]
    with rows_done(250, "log p(x)", print) as done:
        for count in (100, 200, 250):
            done(count)
    assert len(capsys.readouterr().out.splitlines()) == 3
    with rows_done(250, "log p(x)", None) as done:
        done(100)
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_shows_a_bar_on_a_terminal_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with rows_done(300, "log p(x)", print) as done:
        for count in (100, 200, 300):
            done(count)
    out, err = capsys.readouterr()
    assert out == ""
    assert "300" in err


def test_time_is_told_stage_by_stage_and_adds_up(trained, capsys, monkeypatch):
    """Training and evaluation apart, each rounded before they are summed; `evaluate` tells its own."""
    report = training.report_on
    monkeypatch.setattr(training, "report_on", lambda *args, **options: time.sleep(0.4) or report(*args, **options))
    train()
    out = capsys.readouterr().out
    assert "log p(x) by importance sampling from the guide, K = 50: 500 rows" in out
    total, parts = re.search(r"^  time +(\S+) s   (start .*)$", out, re.M).groups()
    stages = {name: float(value) for name, value in (part.split() for part in parts.split(", "))}
    assert list(stages) == ["start", "training", "evaluation"]
    assert stages["evaluation"] >= 0.4
    assert float(total) == pytest.approx(sum(stages.values()), abs=1e-9)
    assert re.search(r"^  epochs +2   the best \d; .* rows/s$", out, re.M)
    shutil.copytree(trained, "copy")
    assert evaluate.command(["copy", "--K", "40", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "log p(x) by importance sampling from the guide, K = 40: 500 rows" in out
    assert re.search(r"^  time +\d+\.\d s$", out, re.M)


def test_the_loaded_pair_has_the_reported_log_p(trained):
    pair = pyrovae.load(trained)
    assert not pair.training
    report = json.loads((trained / "evaluation.json").read_text())
    x = pyrovae.load_data("three-gaussians").rows("density").test
    result = log_marginal(pair.model, pair.guide, x, 50, seed=0)
    assert result.mean == pytest.approx(report["log_marginal"], abs=1e-12)


def test_a_stored_config_repeats_the_run_bit_for_bit(trained):
    assert fit.command(["--config", str(trained / "config.yaml"), "--out", "again", "--no-plots"]) == 0
    assert equal(trained, Path("again"))
    reports = [json.loads((run / "evaluation.json").read_text()) for run in (trained, Path("again"))]
    assert reports[0] == reports[1]
    other = train("--seed 4")
    assert not equal(trained, other)


def test_a_config_gives_way_to_the_command_line(trained):
    run = train(f"--config {trained / 'config.yaml'} --epochs 1")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["epochs"], stored["seed"], stored["latent_dim"]) == (1, 3, [2])


def test_a_seed_is_drawn_printed_and_stored(capsys):
    words = [word for word in SMALL.split() if word not in ("--seed", "3")]
    fit.command([*words, "--out", "run", "--no-plots"])
    seed = yaml.safe_load(Path("run/config.yaml").read_text())["seed"]
    assert f"seed {seed}" in capsys.readouterr().out
    fit.command([*words, "--out", "again", "--no-plots", "--seed", str(seed)])
    assert equal(Path("run"), Path("again"))


def test_without_out_every_run_gets_a_directory():
    for _ in range(2):
        assert fit.command([*SMALL.split(), "--no-plots", "--eval-K", "5", "--epochs", "1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "three-gaussians-elbo-K1-Gaussian",
        "three-gaussians-elbo-K1-Gaussian-2",
    ]


def test_digits_and_a_mixture(capsys):
    """The default data, and an exact baseline on it."""
    common = ["--epochs", "1", "--eval-rows", "20", "--no-plots", "--seed", "0"]
    assert fit.command([*common, "--eval-K", "50", "--out", "vae"]) == 0
    report = json.loads(Path("vae/evaluation.json").read_text())
    assert (report["measure"], report["binarize"], report["rows"]) == ("mass on {0,1}^64", "dynamic", 20)
    assert report["bits_per_dimension"] == pytest.approx(-report["log_marginal"] / 64 / np.log(2))
    common.remove("--no-plots")
    capsys.readouterr()
    assert fit.command([*common, "--model", "mixture", "--model.components", "3", "--out", "mixture"]) == 0
    report = json.loads(Path("mixture/evaluation.json").read_text())
    assert (report["estimator"], report["K"], report["monte_carlo_error"]) == ("exact", None, 0.0)
    mixture = pyrovae.load("mixture")
    assert isinstance(mixture, BernoulliMixture)
    x = pyrovae.load_data("digits").rows("mass").test[:20].double()
    assert mixture.double().log_prob(x).mean().item() == pytest.approx(report["log_marginal"], abs=1e-9)
    out = capsys.readouterr().out
    assert "nats per datum, exact" in out
    assert "\nplots in mixture/plots\n" in out  # and no word of more draws, which would raise nothing
    assert "larger K" not in out


def test_the_table_at_the_end_agrees_with_the_file(capsys):
    run = train()
    out = capsys.readouterr().out
    report = json.loads((run / "evaluation.json").read_text())
    (line,) = [line for line in out.splitlines() if "log p(x), K = 50" in line]
    assert f"{report['log_marginal']:.3f} ± {report['error_over_rows']:.3f}" in line
    assert "nats per datum" in line
    assert f"Monte Carlo error {report['monte_carlo_error']:.2g}" in line


# ---------------------------------------------------------------------------------------------- resume and overwrite


def test_resume_to_more_epochs_equals_a_longer_run():
    whole, part = train("--epochs 4", "whole"), train("--epochs 2", "part")
    assert fit.command(["--resume", "part", "--epochs", "4", "--no-plots"]) == 0
    assert equal(whole, part)
    tables = [pd.read_csv(run / "metrics.csv").drop(columns=["seconds", "rows_per_second"]) for run in (whole, part)]
    pd.testing.assert_frame_equal(*tables)
    assert yaml.safe_load((part / "config.yaml").read_text())["epochs"] == 4


def test_resume_of_a_finished_run_changes_nothing(trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file() and "checkpoints" in str(p)}
    report = (trained / "evaluation.json").read_text()
    assert fit.command(["--resume", "--out", str(trained), "--no-plots"]) == 0
    assert all(p.read_bytes() == content for p, content in before.items())
    assert (trained / "evaluation.json").read_text() == report


def test_resume_with_another_configuration(capsys, trained):
    code, message = fails(capsys, f"--resume {trained} --lr 0.1 --network.hidden 9 --epochs 5")
    assert code == CheckpointError.code == 5
    assert "lr: 0.001 then, 0.1 now" in message
    assert "network" in message
    assert "epochs" not in message.split("only")[0]
    assert "--eval-rows, --device, --compile, --particle-chunk, --threads, --stream may differ" in message


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--resume", 2, "name the run directory"),
        ("--resume {run} --overwrite", 2, "continue the run or replace it"),
        ("--resume {run} --out elsewhere", 2, "leave out --out elsewhere"),
        ("--resume {run} --epochs 1", 2, "has been trained for 2 already"),
        ("--resume nowhere", 5, "nowhere: no such run directory (/"),
        ("--resume .", 5, "not a run directory, it has no config.yaml"),
    ],
)
def test_resume_that_makes_no_sense(capsys, trained, words, code, message):
    assert_in = fails(capsys, words.format(run=trained))
    assert assert_in[0] == code
    assert message in assert_in[1]


def test_a_cosine_schedule_cannot_be_prolonged(capsys):
    train("--schedule cosine")
    code, message = fails(capsys, "--resume run --epochs 3")
    assert (code, "ends at epoch 2" in message) == (2, True)


def test_a_directory_of_another_run(capsys):
    run = train()
    before = weights(run)
    code, message = fails(capsys, f"{SMALL} --out run --elbo iwae --lr 0.5")
    assert code == UsageError.code == 2
    for words in (
        "elbo: elbo there, iwae here",
        "lr: 0.001 there, 0.5 here",
        "with --resume, replace it with --overwrite",
        "(--out)",
    ):
        assert words in message
    assert "epochs" not in message
    assert "a run of this configuration" in fails(capsys, f"{SMALL} --out run --no-plots")[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    (run / "mine.txt").write_text("kept")
    (run / "evaluation-train.json").write_text("stale")
    train("--elbo iwae --overwrite")
    assert yaml.safe_load((run / "config.yaml").read_text())["elbo"] == "iwae"
    assert (run / "mine.txt").read_text() == "kept"
    assert not (run / "evaluation-train.json").exists()
    assert steps(run) == [8, 4]


def test_a_directory_in_use_is_not_overwritten(capsys):
    run = train()
    (run / "lock").write_text(str(os.getppid()))
    for words in (f"{SMALL} --out run --overwrite", "--resume run --epochs 3"):
        code, message = fails(capsys, words)
        assert code == OutputError.code == 6
        assert f"process {os.getppid()} is writing there" in message
    assert steps(run) == [8, 4]
    (run / "lock").unlink()


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda: Path("out").write_text(""), 2, "directory out: is a file; choose another (--out)"),
        (lambda: Path("out").mkdir() or Path("out/thesis.tex").write_text(""), 2, "is not empty and holds no run"),
        (lambda: Path("out").symlink_to("/proc/nowhere"), 6, "out: cannot be written"),
    ],
)
def test_directories_that_cannot_be_used(capsys, make, code, message):
    make()
    before = sorted(Path().rglob("*"))
    assert fails(capsys, f"{SMALL} --out out --overwrite")[0] == code
    assert message in fails(capsys, f"{SMALL} --out out")[1]
    assert sorted(Path().rglob("*")) == before


def test_data_that_changed_in_between(capsys):
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    np.save("x.npy", x)
    words = "--latent-dim 2 --batch-size 20 --epochs 1 --eval-K 5 --no-plots --out run --data x.npy"
    assert fit.command(words.split()) == 0
    x[0] += 1
    np.save("x.npy", x)
    for command, name, words in (
        (fit.command, "fit", "--resume run --epochs 2"),
        (evaluate.command, "evaluate", "run"),
    ):
        code, message = fails(capsys, words, command, name)
        assert code == DataError.code == 3
        assert "data has changed since the" in message
    Path("x.npy").unlink()
    code, message = fails(capsys, "run", evaluate.command, "evaluate")
    assert (code, "no such file" in message) == (3, True)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--K 0", 2, "--K: expected a whole number of at least 1, got 0"),
        ("--K -1", 2, "got -1"),
        ("--K=2.5", 2, "got 2.5"),
        ("--elbow iwae", 2, "--elbow: no such option; did you mean --elbo?"),
        ("--prior.componets 3", 2, "did you mean --prior.components?"),
        ("--priro vamp", 2, "did you mean --prior?"),
        ("stray", 2, "stray: a word too many; options begin with --"),
        ("--elbo", 2, "--elbo: expected one argument"),
        ("--prior", 2, "argument --prior: expected one argument"),
        ("--config nowhere.yaml", 2, "--config nowhere.yaml: cannot be read (No such file or directory)"),
        ("--data minst", 2, "did you mean 'mnist'"),
        ("--data nowhere.npz", 3, "nowhere.npz (/"),
        ("--data three-gaussians --likelihood bernoulli", 3, "have no mass on {0,1}"),
        ("--standardize", 2, "standardize is not used by a mass"),
        ("--batch-size 100000", 2, "--batch-size: 100000 is more than the 1439 training rows"),
        ("--data ring --network conv", 2, "expected an image shape"),
        ("--device gpu", 2, "--device gpu: not available here"),
        ("--device meta", 2, "--device meta: not available here"),
        ("--lr 1e30 --data ring --latent-dim 2 --epochs 3 --elbo iwae --optimizer SGD", 4, "epoch 1, step 1: "),
    ],
)
def test_errors_are_one_line_with_their_code(capsys, words, code, message):
    found, text = fails(capsys, f"{words} --out never")
    assert found == code
    assert message in text
    assert code == NumericalError.code or not Path("never").exists()


def test_a_diverged_run_can_be_looked_at(capsys):
    fails(capsys, f"{SMALL} --out run --lr 1e30 --optimizer SGD --epochs 3")
    with pytest.raises(SystemExit) as caught:
        main("fit", fit.command, ["--resume", "run"])
    said = capsys.readouterr()
    assert caught.value.code == NumericalError.code
    assert "stopped before its first checkpoint, so it starts from the beginning" in said.out
    assert not (Path("run") / "lock").exists()


def test_stopped_before_the_first_checkpoint_starts_from_the_beginning():
    """What a kill within the first epoch leaves can be resumed, and gives the run that was never killed."""
    assert fit.command([*SMALL.split(), "--out", "whole"]) == 0
    assert fit.command([*SMALL.split(), "--out", "killed"]) == 0
    shutil.rmtree("killed/checkpoints")
    assert fit.command(["--resume", "killed"]) == 0
    whole, killed = (pyrovae.load(name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_command_line_wins_over_the_file():
    """What another choice makes meaningless in the file is dropped, not held against the user."""
    prior = "--prior mixture --prior.components 3"
    assert fit.command([*SMALL.split(), *prior.split(), "--out", "first"]) == 0
    words = "--config first/config.yaml --elbo iwae --K 3 --prior standard --out second"
    assert fit.command(words.split()) == 0
    recipe = open_run("second").recipe
    assert (recipe.elbo.name, recipe.K, recipe.beta) == ("iwae", 3, None)
    assert recipe.prior == Part("StandardNormal")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mixture --model.covariance diagonal", "--model.covariance: not used by BernoulliMixture"),
        ("--model mixture --eval-K 7", "--eval-K: not used, since the log p(x) of a mixture is exact"),
        ("--likelihood gaussian --likelihood.scale 0.1 --likelihood.floor 0.5", "--likelihood.floor: not used"),
        ("--data-root here", "--data-root: not used by --data digits"),
        ("--elb iwae", "--elb: no such option; did you mean --elbo?"),
        ("--optimizer Muon", "--optimizer Muon: "),
    ],
)
def test_options_without_a_use_are_refused(capsys, words, message):
    """Before the output directory is touched."""
    code, text = fails(capsys, f"{words} --out never")
    assert (code, message in text) == (2, True), text
    assert not Path("never").exists()


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, -math.inf], "c": {"d": None}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, None], "c": {"d": None}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_without_one_is_never_a_silent_cpu(capsys):
    for words, command, name in (("--device cuda", fit.command, "fit"),):
        code, message = fails(capsys, words, command, name)
        assert (code, "--device cuda: not available here" in message) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_precision_that_the_device_does_not_have_leaves_nothing_behind(capsys, tmp_path):
    out = tmp_path / "run"
    code, message = fails(capsys, f"--precision tf32 --out {out}", fit.command, "fit")
    assert (code, out.exists()) == (2, False)
    assert "precision: tf32 is for CUDA devices, got cpu; use fp32 or bf16-mixed" in message


def test_debug_shows_the_traceback():
    with pytest.raises(UsageError):
        main("fit", fit.command, ["--K", "0", "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 4, "fit --particle-chunk"),
        (RuntimeError("CUDA out of memory. Tried to"), 4, "fit --particle-chunk"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            4,
            "out of memory: can't allocate memory: you tried to allocate 4000000000000 bytes. Draw fewer",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 6, "No space left"),
        (KeyError("x"), 1, "KeyError: 'x' (a defect; --debug shows where)"),
        (UsageError("two\n  lines"), 2, "two lines"),
        (DataError(), 3, "DataError"),
    ],
)
def test_what_is_said_of_an_error(error, code, words):
    found, line = explain(error)
    assert found == code
    assert words in line
    assert "\n" not in line


def test_damaged_checkpoints_are_said(capsys):
    run = train()
    newest = run / "checkpoints" / "step-000000008" / "weights.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for command, words in (
        (evaluate.command, ["run", "--K", "30", "--rows", "20"]),
        (fit.command, ["--resume", "run"]),
    ):
        capsys.readouterr()
        assert command(words) == 0
        assert "weights.safetensors: checksum mismatch; falling back to the previous" in capsys.readouterr().out
    assert evaluate.command(["run", "--K", "30", "--rows", "20"]) == 0
    assert "falling back" not in capsys.readouterr().out  # resuming has written it anew
    newest.write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="falling back|trained for") as caught:
        pyrovae.load(run)
    assert "falling back" in str(caught[0].message)
    assert "trained for 1 of 2 epochs" in str(caught[1].message)
    (run / "checkpoints" / "step-000000004" / "manifest.json").unlink()
    for words, command, name in (
        ("run", evaluate.command, "evaluate"),
        ("--resume run --epochs 3", fit.command, "fit"),
    ):
        code, message = fails(capsys, words, command, name)
        assert (code, "no usable checkpoint" in message) == (5, True)


def test_a_run_that_is_not_finished_is_labelled(capsys):
    run = train()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epochs: 2", "epochs: 7"))
    capsys.readouterr()
    assert evaluate.command(["run", "--K", "5", "--rows", "9"]) == 0
    assert "note: run: trained for 2 of 7 epochs so far" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="trained for 2 of 7 epochs"):
        pyrovae.load(run)


def test_a_run_that_stopped_early_is_finished_and_loads_its_best_epoch(capsys):
    run = train("--epochs 60 --lr 0.5 --patience 2")
    assert "stopped early" in capsys.readouterr().out
    pair = pyrovae.load(run)  # a warning would be an error
    latest = load_latest(run)
    best = load(run, latest.training["progress"]["best_step"])
    assert best.step < latest.step
    for name, tensor in pair.state_dict().items():
        assert torch.equal(tensor, best.weights[f"vae.{name}"])
    raw_scale = "vae.likelihood.raw_scale"
    assert not torch.equal(best.weights[raw_scale], latest.weights[raw_scale])
    report = json.loads((run / "evaluation.json").read_text())
    assert scored(run, "--K 50") == report


@pytest.mark.parametrize(
    "content", ["{", "- 1", "", "\x00", "data_hash: 1\nevent_shape: x", '!!python/object/apply:os.mkdir ["executed"]']
)
def test_a_config_that_is_none(capsys, trained, content):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(content)
    assert fails(capsys, "run", evaluate.command, "evaluate")[0] == 5
    assert fails(capsys, "--resume run")[0] == 5
    assert not Path("executed").exists()


def test_a_full_disk_stops_with_the_state_before_intact(capsys, monkeypatch):
    run = train()
    replace = os.replace

    def full(source: str, target: str) -> None:
        if "step-" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, message = fails(capsys, "--resume run --epochs 3 --no-plots")
    assert code == 6
    assert "No space left on device" in message
    assert steps(run) == [8, 4]
    never = train("--epochs 3", "never")
    assert fit.command(["--resume", "run", "--epochs", "3", "--no-plots"]) == 0
    assert equal(run, never)


# ----------------------------------------------------------------------------------------------------------- evaluate


def scored(run: Path, words: str = "", name: str = "evaluation.json") -> dict:
    assert evaluate.command([str(run), *words.split(), "--device", "cpu"]) == 0
    return json.loads((run / name).read_text())


def test_evaluate_reports_the_same_as_fit():
    run = train()
    before = json.loads((run / "evaluation.json").read_text())
    assert scored(run, "--K 50") == before
    assert scored(run, "--K 50 --seed 1")["log_marginal"] != before["log_marginal"]


def test_a_larger_k_is_not_lower():
    run = train()
    few, many = scored(run, "--K 2"), scored(run, "--K 500")
    assert many["log_marginal"] > few["log_marginal"] + 5 * few["monte_carlo_error"]
    assert many["monte_carlo_error"] < few["monte_carlo_error"]


def test_chunks_bound_memory_and_change_nothing_else(monkeypatch):
    run = train()
    sizes: list[int] = []
    module = sys.modules["pyrovae.inference.proposals"]
    draw = module.draw

    def watched(pair, batch, k, *at):
        sizes.extend([k] * (not at))  # what is drawn, not what is scored where it is
        return draw(pair, batch, k, *at)

    monkeypatch.setattr(module, "draw", watched)
    whole = scored(run, "--K 100 --rows 90")
    assert set(sizes) == {100}
    sizes.clear()
    chunked = scored(run, "--K 100 --rows 90 --chunk-size 33")
    assert sizes[:4] == [33, 33, 33, 1]  # then those of simulated data
    assert set(sizes) == {33, 1}
    assert chunked["K"] == whole["K"] == 100
    difference = abs(chunked["log_marginal"] - whole["log_marginal"])
    assert difference < 5 * np.hypot(chunked["monte_carlo_error"], whole["monte_carlo_error"])


def test_other_splits_are_labelled(capsys):
    run = train()
    before = (run / "evaluation.json").read_text()
    capsys.readouterr()
    report = scored(run, "--K 30 --split train --rows 40", "evaluation-train.json")
    assert "the first 40 train rows (the rows it was trained on)" in capsys.readouterr().out
    assert (report["split"], report["rows"], report["rows_in_split"]) == ("train", 40, 4000)
    assert "train_bound" in report
    assert "test_bound" not in report
    validation = scored(run, "--K 30 --split validation", "evaluation-validation.json")
    assert (run / "evaluation.json").read_text() == before
    test = scored(run, "--K 30")
    assert validation["split"] == "validation"
    assert validation["rows"] == test["rows"]
    assert validation["log_marginal"] != test["log_marginal"]  # the scores kept of one are not those of the other


def test_too_few_draws_have_no_tail_diagnostic(capsys):
    run = train()
    report = scored(run, "--K 10 --rows 30")
    assert report["verdict"] == "lower bound only"
    assert report["reason"] == "no tail diagnostic: K = 10 is too small for k-hat"
    assert report["pareto_k"]["median"] is None
    assert report["pareto_k"]["rows_without_tail_diagnostic"] == 30
    assert "no tail diagnostic" in capsys.readouterr().out
    assert "no tail diagnostic" not in scored(run, "--K 100 --rows 30")["reason"]


def test_an_evaluation_is_kept_row_by_row_and_not_repeated(capsys, monkeypatch):
    run = train()
    first = scored(run, "--K 40 --rows 250")
    (path,) = (run / "scores").glob("*.csv")
    table = pd.read_csv(path, comment="#")
    assert len(table) == 250
    assert table["log_marginal"].mean() == pytest.approx(first["log_marginal"], abs=1e-12)
    capsys.readouterr()
    module = sys.modules["pyrovae.inference.proposals"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", None)  # a draw would be an error
        assert scored(run, "--K 40 --rows 250") == first
    assert "note: 250 rows were scored before with these settings" in capsys.readouterr().out
    assert scored(run, "--K 40 --rows 250 --anew") == first
    assert "scored before" not in capsys.readouterr().out
    assert scored(run, "--K 40 --rows 250 --seed 1") != first
    assert len(list((run / "scores").glob("*.csv"))) == 2


def test_scores_of_an_older_checkpoint_are_not_used(capsys):
    run = train()
    first = scored(run, "--K 40 --rows 250")
    assert fit.command(["--resume", str(run), "--epochs", "4", "--no-plots"]) == 0
    capsys.readouterr()
    second = scored(run, "--K 40 --rows 250")
    assert "scored before" not in capsys.readouterr().out
    assert second["log_marginal"] != first["log_marginal"]


def test_the_check_of_a_setting_is_kept_with_the_scores(capsys, trained, monkeypatch):
    run = Path("copy")
    shutil.copytree(trained, run)
    words = "--K 8 --rows 10 --proposal annealed --proposal.temperatures 10 --proposal.leapfrog 2"
    first = scored(run, words)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pyrovae.inference.annealed"], "simulate", None)  # to run it would be an error
        assert scored(run, words) == first
    assert scored(run, words + " --anew") == first
    assert first["sandwich"]["simulated_data"] == 50


def test_the_sandwich_of_simulated_data_is_reported_and_kept(capsys, trained, monkeypatch):
    """Its width stands in the report, the verdict rests on it, and the same evaluation again does not make it anew."""
    run = Path("copy")
    shutil.copytree(trained, run)
    first = scored(run, "--K 200 --rows 20")
    check = first["simulated"]
    assert check["rows"] == 300
    assert check["width"] == pytest.approx(check["upper"] - check["lower"], abs=1e-9)
    assert f"on 300 simulated data the sandwich is {check['width']:.2g}" in first["reason"] or first["verdict"] != "ok"
    assert "sandwich's width" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pyrovae.inference.simulation"], "simulate", None)  # to run it would be an error
        assert scored(run, "--K 200 --rows 20") == first


def test_rows_that_are_missed_are_named_and_repaired(capsys, trained, monkeypatch):
    """A guide that is far off where x is large: `evaluate` names those rows, and --repair scores just those again."""
    run = Path("copy")
    shutil.copytree(trained, run)
    true = scored(run, "--K 400 --rows 30 --proposal individual")
    original = MeanFieldNormal.forward

    def far_off(self, x):
        q = original(self, x).base_dist
        return dist.Normal(q.loc + 15 * (x[..., :1] > 1.8).to(q.loc), q.scale).to_event(1)

    monkeypatch.setattr(MeanFieldNormal, "forward", far_off)
    x = open_run(run).rows().test[:30]
    missed = (x[:, 0] > 1.8).nonzero().flatten().tolist()
    assert 0 < len(missed) < 5
    capsys.readouterr()
    plain = scored(run, "--K 400 --rows 30")
    assert set(missed) <= set(plain["unreliable_rows"])
    assert plain["log_marginal"] < true["log_marginal"] - 1
    out = capsys.readouterr().out
    assert "--repair scores them again" in out
    repaired = scored(run, "--K 400 --rows 30 --repair")
    assert repaired["repaired_rows"] == plain["unreliable_rows"]
    error = np.hypot(true["monte_carlo_error"], repaired["monte_carlo_error"])
    assert abs(repaired["log_marginal"] - true["log_marginal"]) < 5 * error + 0.1
    assert repaired["excess"]["nats"] > plain["excess"]["nats"]
    assert f"{len(missed)}   " in capsys.readouterr().out
    with pytest.raises(UsageError, match="--repair: is for draws from guide, widened or prior"):
        evaluate.command([str(run), "--repair", "--proposal", "individual"])


def test_one_draw_is_a_bound_without_an_error(capsys, trained):
    run = Path("copy")
    shutil.copytree(trained, run)
    report = scored(run, "--K 1 --rows 10")
    assert (report["verdict"], report["monte_carlo_error"]) == ("lower bound only", None)
    out = capsys.readouterr().out
    assert "nan" not in out
    report = scored(run, "--rows 1 --K 100")
    assert report["bootstrap_interval"] == [None, None]
    assert "nan" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(trained):
    run = Path("copy")
    shutil.copytree(trained, run)
    words = [
        sys.executable,
        "-m",
        "pyrovae.evaluate",
        "copy",
        "--K",
        "20000",
        "--chunk-size",
        "2000",
        "--device",
        "cpu",
    ]
    process = start(words)
    deadline = time.monotonic() + 60
    while not (files := list((run / "scores").glob("*.csv"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert files, process.communicate()
    process.kill()
    process.communicate()
    kept = len(pd.read_csv(files[0], comment="#"))
    assert 100 <= kept < 500
    out, err = start(words).communicate(timeout=120)
    assert f"note: {kept} rows were scored before" in out, err
    killed = json.loads((run / "evaluation.json").read_text())
    assert killed == scored(trained, "--K 20000 --chunk-size 2000 --anew")


def test_a_row_without_a_number_is_named_and_nothing_is_averaged(capsys, monkeypatch):
    run = train()
    rows_of = evaluation.rows_of

    def far(*arguments):
        batch = rows_of(*arguments)
        x = batch.x.clone()
        x[7] = 1e30
        return replace(batch, x=x)

    monkeypatch.setattr(evaluation, "rows_of", far)
    code, message = fails(capsys, "run --K 40 --rows 20", evaluate.command, "evaluate")
    assert code == 4
    assert "invalid: log p(x) is not a finite number for 1 of 20 rows, the first being 7 (-inf)" in message
    report = json.loads((run / "evaluation.json").read_text())
    assert (report["verdict"], report["log_marginal"], report["rows_without_finite_estimate"]) == ("invalid", None, 1)
    assert report["zero_weights"] == 40


@pytest.mark.parametrize(
    ("words", "estimator"),
    [
        ("widened --proposal.scales 1,2 --proposal.share 0.2", "the widened guide (scales 1, 2; 0.2 from the prior)"),
        ("individual --proposal.steps 20", "a full Gaussian fitted to each datum"),
        ("prior", "naive sampling from the prior"),
        (
            "annealed --proposal.temperatures 30 --proposal.leapfrog 2",
            "annealed importance sampling from the guide (30",
        ),
    ],
)
def test_other_proposals_from_the_command_line(capsys, trained, words, estimator):
    """They agree with the guide within their errors, and the report says which it was."""
    run = Path("copy")
    shutil.copytree(trained, run)
    k = 40 if "annealed" in words else 2000
    report = scored(run, f"--rows 20 --K {k} --proposal {words}")
    assert estimator in report["estimator"]
    assert estimator.split("(")[0].split()[-1] in capsys.readouterr().out
    guide = scored(run, "--rows 20 --K 4000")
    error = np.hypot(report["monte_carlo_error"], guide["monte_carlo_error"])
    assert abs(report["log_marginal"] - guide["log_marginal"]) < 5 * error
    if "annealed" in words:
        check = report["sandwich"]
        assert check["validated"] == (check["width"] + 2 * check["width_error"] < 0.1)
        assert check["simulated_data"] == 50
        assert report["verdict"] == ("ok" if check["validated"] else "lower bound only")


def test_draws_are_saved_for_arviz_on_request(trained):
    import xarray

    run = Path("copy")
    shutil.copytree(trained, run)
    scored(run, "--rows 20 --K 200 --proposal individual --netcdf draws.nc")
    posterior = xarray.open_dataset("draws.nc", group="posterior")
    assert posterior["z"].shape[:3] == (1, evaluation.SAVED_DRAWS, 20)
    assert f"save {evaluation.SAVED_DRAWS} posterior and" in " ".join(evaluate.options_parser().format_help().split())
    importance = xarray.open_dataset("draws.nc", group="importance")
    assert importance["log_weight"].shape == (200, 20)
    report = json.loads((run / "evaluation.json").read_text())
    error = np.hypot(report["monte_carlo_error"], (importance["standard_error"] ** 2).sum() ** 0.5 / 20)
    assert abs(importance["log_marginal"].mean() - report["log_marginal"]) < 5 * error + 1e-9


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("{run} --netcdf nowhere/x.nc", 2, "--netcdf nowhere/x.nc: expected a file in a directory that exists"),
        ("{run} --netcdf {run}/config.yaml", 2, "config.yaml: is there already and holds no saved draws; choose"),
        ("{run} --netcdf x.nc --proposal prior", 2, "--netcdf: draws are saved from --proposal guide or individual"),
        ("{run} --proposal wide", 2, "--proposal: 'wide' is none of guide, widened"),
        ("{run} --proposal.share 0.2", 2, "--proposal.share: not used by guide"),
        ("{run} --proposal widened --proposal.share 1", 2, "--proposal.share: expected a number of at least 0"),
        ("{run} --proposal annealed --proposal.start x", 2, "--proposal.start: expected guide or prior, got x"),
        ("", 2, "RUN: name the directory of a run"),
        ("{run} nowhere", 2, "nowhere: a word too many"),
        ("{run} --threads many", 2, "--threads: expected auto or a whole number from 1 to 4096, got many"),
        ("nowhere", 5, "nowhere: no such run directory"),
        ("{run} --K 0", 2, "--K: expected a whole number of at least 1"),
        ("{run} --rows 0", 2, "--rows"),
        ("{run} --chunk-size 0", 2, "--chunk-size"),
        ("{run} --seed -1", 2, "--seed"),
        ("{run} --split tset", 2, "--split: expected one of test, validation, train, got tset"),
        ("{run} --device gpu", 2, "--device gpu: not available here"),
        ("{run} --kay 3", 2, "--kay: no such option"),
    ],
)
def test_evaluations_that_make_no_sense(capsys, trained, words, code, message):
    found, text = fails(capsys, words.format(run=trained), evaluate.command, "evaluate")
    assert found == code
    assert message in text


# ---------------------------------------------------------------------------------------------------------- processes


def start(words: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(number, code):
    process = start([*RUN, *SMALL.split(), "--epochs", "100000", "--batch-size", "7", "--out", "run", "--no-plots"])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("run "):
            break
    while not steps(Path("run")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "--resume run" in out
    epoch, step = map(int, re.search(r"stopped at epoch (\d+), step (\d+); the state is saved", out).groups())
    assert steps(Path("run"))[0] == step
    assert load_latest(Path("run")).training["progress"]["epoch"] == epoch - 1
    assert not Path("run/lock").exists()
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_broken_pipe_is_no_traceback():
    with start([*RUN, *SMALL.split(), "--out", "run", "--no-plots", "--epochs", "20"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 6
    assert err == ""


@pytest.mark.slow
def test_optimised_python_still_checks():
    np.save("x.npy", np.full((30, 2), 0.5, np.float32))
    script = """
import sys
from pyrovae.command import main
from pyrovae.fit import command
assert False, "not optimised"
for words in ("--K 0", "--data x.npy --likelihood bernoulli"):
    try:
        main("fit", command, words.split())
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True)
    first, code, second, last = done.stderr.splitlines()
    assert (done.returncode, code, last) == (0, "2", "3")
    assert "--K: expected" in first
    assert "have no mass on" in second


@pytest.mark.slow
def test_help_is_fast_and_lists_every_option():
    def seconds(words: list[str]) -> float:
        """Of the processor, whatever else it has to do meanwhile."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    floor = min(seconds(["-c", "import torch, pyro"]) for _ in range(2))
    assert min(seconds(["-m", "pyrovae.fit", "--help"]) for _ in range(2)) < 1.3 * floor
    script = (
        "import sys\nfrom pyrovae.fit import options_parser\nprint(options_parser().format_help())\n"
        "heavy = {'torchvision', 'sklearn', 'arviz', 'matplotlib', 'pandas', 'accelerate', 'tensorboard'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    for word in (
        "--elbo",
        "--K ",
        "--beta",
        "--prior ",
        "--prior.components",
        "--network.hidden",
        "--resume",
        "VampPrior",
    ):
        assert word in done.stdout
    assert "null" not in done.stdout
    assert "SUPPRESS" not in done.stdout
