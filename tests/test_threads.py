"""Threads: as many as were asked for, fewer where other programs keep the machine busy, and as before at the end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrovae import evaluate as evaluate_command
from pyrovae import fit as fit_command
from pyrovae import processors as module
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, fit
from pyrovae.inference.training.checkpoint import load_latest
from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, StandardNormal
from pyrovae.processors import look, threads

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four cores with a thread on each."""
    torch.set_num_threads(4)
    return monkeypatch


def load(patch: pytest.MonkeyPatch, busy: float, cores: int = 4) -> None:
    patch.setattr(module, "look", lambda: (cores, busy))


@pytest.mark.parametrize(
    ("wanted", "busy", "used", "said"),
    [
        ("auto", 0.0, 4, None),
        ("auto", 0.4, 4, None),
        ("auto", 0.9, 3, "take 0.9 of its 4 cores, so 3 of 4 threads are used; threads=4 uses all"),
        ("auto", 3.9, 1, "so 1 of 4 threads is used"),
        ("auto", 4.0, 1, "take 4.0 of its 4 cores"),
        (3, 0.0, 3, None),
        (3, 1.0, 3, None),
        (3, 4.0, 3, "3 threads will wait; threads=auto would take 1"),
        (1, 4.0, 1, None),
        (None, 4.0, 4, None),
    ],
)
def test_threads_are_those_asked_for_less_the_busy_cores(
    four, wanted, busy: float, used: int, said: str | None
) -> None:
    load(four, busy)
    heard: list[str] = []
    with threads(wanted, heard.append):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == 4
    assert len(heard) == (said is not None)
    assert said is None or said in heard[0]


def test_many_cores_and_few_threads_are_not_touched(four) -> None:
    load(four, busy=10.0, cores=16)
    with threads("auto", pytest.fail):
        assert torch.get_num_threads() == 4


def test_they_are_as_before_after_an_error(four) -> None:
    load(four, 4.0)

    def fail() -> None:
        with threads("auto"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("wanted", [0, -1, 2.5, "many", True])
def test_what_is_no_number_of_threads(wanted) -> None:
    with pytest.raises(UsageError, match="threads: expected a whole number of at least 1"):
        fit(*pair(), X, ELBO(), batch_size=10, threads=wanted)


def test_a_program_beside_is_seen() -> None:
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        seen = [look() for _ in range(20)]
    finally:
        loop.kill()
        loop.wait()
    assert all(cores >= 1 for cores, _ in seen)
    assert max(busy for _, busy in seen) > 0.5
    assert all(0 <= busy <= cores for cores, busy in seen)


def pair() -> tuple:
    torch.manual_seed(0)
    vae = VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[4])), MeanFieldNormal(MLP(3, hidden=[4]), 2))
    return vae.model, vae.guide


def test_a_run_that_is_resumed_keeps_its_number_where_the_machine_has_it(four, tmp_path: Path) -> None:
    """For the same bits; on a machine that is busier than then it takes fewer, and says so."""

    def train(busy: float, epochs: int, **options) -> tuple[int, list[str]]:
        load(four, busy)
        options = {"threads": "auto", "directory": tmp_path, "batch_size": 10, "progress": False} | options
        notices = fit(*pair(), X, ELBO(), epochs=epochs, on_notice=str, **options).notices
        assert torch.get_num_threads() == 4
        return load_latest(tmp_path).training["environment"]["threads"], notices

    assert train(2.0, 1)[0] == 2
    number, notices = train(0.0, 2, resume=True)
    assert (number, notices) == (2, [])
    number, notices = train(4.0, 3, resume=True)
    assert number == 1
    assert any("not bit-exact: threads 2 then, 1 now" in notice for notice in notices)
    number, notices = train(0.0, 4, resume=True, threads=3)
    assert number == 3
    assert any("not bit-exact: threads 1 then, 3 now" in notice for notice in notices)


def test_the_setting_is_kept_with_the_run_and_may_change(four, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load(four, 3.0)
    out = str(tmp_path / "run")
    words = ["--data=three-gaussians", "--epochs=1", "--network.hidden=4", "--latent-dim=2", "--eval-K=50", "--seed=1"]
    fit_command.command([*words, "--out", out, "--threads", "2", "--no-plots"])
    assert "auto would take 1" in capsys.readouterr().out
    assert "threads: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert load_latest(tmp_path / "run").training["environment"]["threads"] == 2
    fit_command.command(["--resume", out, "--threads", "auto", "--epochs", "2", "--no-plots"])
    assert "so 1 of 4 threads is used" in capsys.readouterr().out
    assert "threads: auto" in (tmp_path / "run" / "config.yaml").read_text()
    evaluate_command.command([out, "--K", "50", "--rows", "10"])
    assert "so 1 of 4 threads is used" in capsys.readouterr().out
    assert torch.get_num_threads() == 4
