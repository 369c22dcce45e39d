"""The campaigns of `benchmarks/`, short: runs that are killed, files that are damaged."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """In a process of its own, which forks."""
    words = ["--kills", "12", "--only", "elbo", "patience", "mixture of Gaussians", "--out", str(tmp_path / "kills.md")]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "kills.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills over 3 configurations: 0 lost, 0 unequal, 0 unusable." in (tmp_path / "kills.md").read_text()


def test_a_lost_checkpoint_and_an_unequal_end_would_be_seen(tmp_path: Path) -> None:
    """Two ends that differ in one bit of one weight are told apart; times are not compared."""
    import torch

    kills = load("kills")
    one = {"weights": torch.ones(3), "history": [{"seconds": 1.0, "bound": float("nan")}], "step": 3}
    other = {"weights": torch.ones(3), "history": [{"seconds": 2.0, "bound": float("nan")}], "step": 3}
    assert kills.unequal(one, other) == []
    other["weights"].view(torch.int32)[1] ^= 1
    assert kills.unequal(one, other) == ["/weights"]
    assert kills.unequal({"a": [1]}, {"a": [1, 2]}) == ["/a"]
    assert kills.unequal({"a": 0.0}, {"b": 0.0}) == ["/a", "/b"]
    assert kills.newest(tmp_path) == -1


@pytest.mark.parametrize("name", ["npy", "npz", "csv", "images", "idx"])
def test_damaged_files_of_rows_are_refused_in_a_line(name: str) -> None:
    outcome = load("fuzz").campaign(name, seed=10**6, seconds=2.0, cases=150)
    assert outcome.faults == []
    assert outcome.refused.total() > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config", "weights", "resumed", "scores"])
def test_damaged_files_of_a_run_are_refused_in_a_line(name: str) -> None:
    """But damaged scores, which are scored again."""
    outcome = load("fuzz").campaign(name, seed=10**6, seconds=4.0, cases=150)
    assert outcome.faults == []
    assert (outcome.read > 5) if name == "scores" else (outcome.refused.total() > 20)


def test_a_fault_would_be_counted(tmp_path: Path) -> None:
    """A reader that raises what is not ours, or says too much, is a fault, with the seed that repeats it."""
    fuzz = load("fuzz")

    def careless(path: Path) -> None:
        raise KeyError(path.name)

    def wordy(path: Path) -> None:
        raise fuzz.DataError("x" * 10**6)

    (tmp_path / "x").write_bytes(bytes(10))
    (tmp_path / "copies").mkdir()
    for read, faults in ((careless, 1), (wordy, 0), (lambda path: None, 0)):
        outcome = fuzz.Outcome()
        target = fuzz.Target(lambda folder: None, fuzz.damage_bytes, read)
        fuzz.case(target, [tmp_path / "x"], tmp_path / "copies", "x 7", outcome)
        assert len(outcome.faults) == faults
        assert all(fault.startswith("x 7: KeyError") for fault in outcome.faults)
    assert fuzz.damaged(b"abc" * 100, random.Random(1)) == fuzz.damaged(b"abc" * 100, random.Random(1)) != b"abc" * 100
