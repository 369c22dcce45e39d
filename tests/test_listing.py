"""What was trained, as a table: chosen, sorted, saved and removed; and how each run came about."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

import pyrovae
from pyrovae.errors import UsageError
from pyrovae.runs import __main__ as runs
from pyrovae.runs.listing import COLUMNS, found_in, line, remove, sorted_by, table
from pyrovae.runs.starts import starts_of

SMALL = {"epochs": 2, "latent_dim": [2], "network": {"name": "mlp", "hidden": "4"}, "eval_rows": 3, "eval_K": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, one of them a folder further down, and a baseline."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "a": {"elbo": "iwae", "seed": 1, **SMALL},
        "below/b": {"prior": "mixture", "seed": 2, **SMALL},
        "c": {"model": "mixture", "seed": 3, "epochs": 2, "eval_rows": 3},
    }.items():
        pyrovae.train(options, folder / name, plots=False)
    return folder


def test_a_line_says_what_the_run_s_own_files_say(trained: Path) -> None:
    entry, told = line(trained / "a"), json.loads((trained / "a" / "evaluation.json").read_text())
    assert set(entry) == set(COLUMNS)
    assert (entry["log p(x)"], entry["error"]) == (told["log_marginal"], told["error_over_rows"])
    assert (entry["ELBO"], entry["verdict"], entry["K"], entry["rows"]) == (told["elbo"], told["verdict"], 4, 3)
    assert (entry["bound"], entry["seed"], entry["epochs"]) == ("iwae, K = 5", 1, "2/2")
    with (trained / "a" / "metrics.csv").open() as file:
        minutes = sum(float(epoch["seconds"]) for epoch in csv.DictReader(file)) / 60
    assert entry["minutes"] == pytest.approx(minutes, abs=0.05)
    exact = line(trained / "c")
    assert (exact["verdict"], exact["prior"], exact["bound"]) == ("exact", None, None)


def test_runs_are_found_in_folders_below_but_not_in_runs(trained: Path) -> None:
    assert found_in([trained]) == [trained / "a", trained / "below" / "b", trained / "c"]
    assert found_in([trained / "a", trained / "a"]) == [trained / "a"]
    with pytest.raises(UsageError, match="no such folder"):
        found_in([trained / "nowhere"])


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert runs.command(words) == 0
    return capsys.readouterr().out


def test_runs_are_chosen_by_all_conditions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, str(trained), "--where", "seed=1")
    assert [name for name in "abc" if f"/{name} " in out] == ["a"]
    out = said(capsys, str(trained), "--where", "data=digits", "--where", "prior=mixture")
    assert [name for name in "abc" if f"/{name} " in out] == ["b"]
    assert "no runs in" in said(capsys, str(trained), "--where", "seed=1", "--where", "seed=2")
    with pytest.raises(UsageError, match="expected COLUMN=VALUE"):
        runs.command([str(trained), "--where", "colour=red"])


def test_numbers_are_sorted_from_the_largest_and_what_is_missing_comes_last(trained: Path) -> None:
    lines = [line(path) for path in found_in([trained])]
    by_elbo = sorted_by(lines, "ELBO")
    assert by_elbo[-1]["run"].endswith("/c")
    assert by_elbo[0]["ELBO"] > by_elbo[1]["ELBO"]
    with pytest.raises(UsageError, match="expected one of"):
        sorted_by(lines, "colour")


def test_what_all_have_in_common_is_said_once(trained: Path) -> None:
    text = table([line(path) for path in found_in([trained])])
    head, _, rest = text.partition("\n\n")
    assert "data digits" in head
    assert "digits" not in rest
    assert rest.splitlines()[0].split()[0] == "run"


def test_the_table_for_programs_has_all_columns_and_digits(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, str(trained), "--csv", str(tmp_path / "runs.csv"))
    with (tmp_path / "runs.csv").open() as file:
        read = {Path(entry["run"]).name: entry for entry in csv.DictReader(file)}
    assert float(read["a"]["log p(x)"]) == line(trained / "a")["log p(x)"]
    assert list(read["a"]) == list(COLUMNS)


def test_a_damaged_run_is_left_out_by_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("{")
    out = said(capsys, str(trained), str(tmp_path))
    assert f"note: left out: {tmp_path / 'damaged' / 'config.yaml'}" in out
    assert "/a " in out


def test_removing_takes_what_commands_wrote_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        pyrovae.train({"model": "mixture", "seed": 3, "epochs": 1, "eval_rows": 3}, tmp_path / name, plots=False)
    (tmp_path / "two" / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="add --yes"):
        runs.command([str(tmp_path), "--delete"])
    said(capsys, str(tmp_path), "--delete", "--yes")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["two", "two/notes.txt"]


def test_a_run_with_a_foreign_file_of_a_known_name_is_not_removed(tmp_path: Path) -> None:
    pyrovae.train({"model": "mixture", "seed": 3, "epochs": 1, "eval_rows": 3}, tmp_path / "one", plots=False)
    (tmp_path / "one" / "metrics.csv").write_text("my own numbers")
    with pytest.raises(UsageError, match="was not written by pyrovae"):
        remove(tmp_path / "one")
    assert (tmp_path / "one" / "evaluation.json").exists()


def test_each_start_of_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pyrovae.fit", "--out", "my run"])
    pyrovae.train({"seed": 1, **SMALL}, tmp_path / "run", plots=False)
    (first,) = starts_of(tmp_path / "run")
    assert first["command"] == "python -m pyrovae.fit --out 'my run'"
    assert first["versions"]["pyrovae"] == pyrovae.__version__
    monkeypatch.setattr(sys, "orig_argv", ["python", "again.py"])
    pyrovae.train({"epochs": 3}, tmp_path / "run", resume=True, plots=False)
    assert [start["command"] for start in starts_of(tmp_path / "run")] == [first["command"], "python again.py"]
    pyrovae.train({"seed": 2, **SMALL}, tmp_path / "run", overwrite=True, plots=False)
    assert [start["command"] for start in starts_of(tmp_path / "run")] == ["python again.py"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 2
    (tmp_path / "run" / "starts.json").write_text("{")
    assert starts_of(tmp_path / "run") == []
