"""Runs of several processes are stopped, broken and resumed; threads of one process take their turns."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port

from pyrovae import fit as fit_command
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, fit, log_marginal
from pyrovae.inference.training.checkpoint import Checkpoint, load_latest, save
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal
from pyrovae.seeding import seeded

WORDS = "--data three-gaussians --latent-dim 2 --network.hidden 4 --batch-size 1000 --seed 1 --eval-K 5 --no-plots"


def start(folder: Path, words: str) -> list[subprocess.Popen[str]]:
    """Two processes of a run, as a launcher starts them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pyrovae.fit", *WORDS.split(), *words.split()],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_checkpoint(run: Path) -> None:
    end = time.monotonic() + 300
    while not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_processes_stop_together_and_one_goes_on_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two is asked; both stop at the same step, one of them says so and saves. One process may continue."""
    processes = start(tmp_path, "--epochs 100000 --out run")
    try:
        wait_for_checkpoint(tmp_path / "run")
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "the state is saved" in outputs[0][0]
    assert outputs[1] == ("", "")
    assert outputs[0][1] == ""
    saved = load_latest(tmp_path / "run")
    done = saved.training["progress"]["epoch"]
    words = ["--resume", str(tmp_path / "run"), "--epochs", str(done + 2), "--no-plots"]
    assert fit_command.command(words) == 0
    assert "not bit-exact: processes 2 then, 1 now" in capsys.readouterr().out
    assert load_latest(tmp_path / "run").training["progress"]["epoch"] == done + 2


@pytest.mark.slow
def test_a_process_that_is_killed_is_missed_in_a_line(tmp_path: Path) -> None:
    processes = start(tmp_path, "--epochs 100000 --out run")
    try:
        wait_for_checkpoint(tmp_path / "run")
        processes[1].kill()
        err = processes[0].communicate(timeout=300)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()
    assert processes[0].returncode == 6, err
    assert "another process of this run cannot be reached; the checkpoints in run are intact" in err
    assert "Traceback" not in err
    assert load_latest(tmp_path / "run").step > 0


# ------------------------------------------------------------------------------------------------------------- threads


def pair() -> VAE:
    with seeded("pair"):
        return VAE(StandardNormal(2), Bernoulli(MLP(2, 4, (3,))), MeanFieldNormal(MLP(4, None, (3,)), 2))


def test_a_second_thread_is_refused_and_the_first_is_not_disturbed() -> None:
    """While one thread trains, another neither trains nor estimates; afterwards it does."""
    x = (torch.rand(20, 4) < 0.5).float()
    alone, beside = pair(), pair()
    fit(alone.model, alone.guide, x, ELBO(), epochs=2, batch_size=10, seed=5)
    begun, go_on = threading.Event(), threading.Event()

    def train() -> None:
        def on_epoch(metrics: dict[str, float]) -> None:
            begun.set()
            assert go_on.wait(30)

        fit(beside.model, beside.guide, x, ELBO(), epochs=2, batch_size=10, seed=5, on_epoch=on_epoch)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert begun.wait(30)
        other = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, (3,))), MeanFieldNormal(MLP(4, None, (3,)), 2))
        with pytest.raises(UsageError, match="another thread of this process is training or estimating"):
            fit(other.model, other.guide, x, ELBO(), epochs=1, batch_size=10)
        with pytest.raises(UsageError, match="another thread"):
            log_marginal(other.model, other.guide, x, 5, seed=1)
    finally:
        go_on.set()
        thread.join()
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), beside.state_dict().values(), strict=True)
    )
    assert log_marginal(other.model, other.guide, x, 5, seed=1).estimate.shape == (20,)


def test_contexts_of_one_thread_are_nested() -> None:
    with seeded(1), seeded(2):
        first = torch.rand(1)
    with seeded(2):
        assert torch.equal(torch.rand(1), first)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_another_number_of_processes_is_said_not_refused(tmp_path: Path) -> None:
    x = (torch.rand(20, 4) < 0.5).float()
    vae = pair()
    fit(vae.model, vae.guide, x, ELBO(), epochs=1, batch_size=10, directory=tmp_path)
    saved = load_latest(tmp_path)
    saved.training["environment"]["processes"] = 3
    save(tmp_path, Checkpoint(saved.step, saved.weights, saved.training))
    resumed = fit(vae.model, vae.guide, x, ELBO(), epochs=2, batch_size=10, directory=tmp_path, resume=True)
    assert any("not bit-exact: processes 3 then, 1 now" in notice for notice in resumed.notices)
    assert len(resumed.history) == 2
