"""python -m pyrovae.disentangle: scores of trained runs, beside log p(x), over seeds."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pyrovae
from pyrovae import disentangle
from pyrovae.command import main
from pyrovae.quality import disentangling
from pyrovae.runs.directory import open_run
from pyrovae.runs.disentangling import Asked, codes_of, factors_of

DATA = "sprites:side=8,scales=2,angles=1,positions=3"
SMALL = {
    "network": {"name": "mlp", "hidden": [8]}, "latent_dim": [3], "batch_size": 20, "epochs": 1, "compile": "off",
    "device": "cpu", "threads": 1, "eval_K": 5, "eval_rows": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        pyrovae.train(
            {**SMALL, "data": DATA, "likelihood": "bernoulli", "seed": seed}, folder / f"a-{seed}", plots=False
        )
    return folder


def of_command(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main("disentangle", disentangle.command, shlex.split(words))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_scores_of_two_seeds_beside_log_p(runs, tmp_path, capsys, monkeypatch) -> None:
    """The table has the means over seeds of what the CSV has of each; both say what the scores are of."""
    monkeypatch.setattr(disentangling, "VOTES", 200)
    monkeypatch.setattr(disentangling, "TESTS", 100)
    monkeypatch.setattr(disentangling, "TREES", 3)
    out = tmp_path / "out"
    words = f"{runs}/a-1 {runs}/a-2 --K 20 --out {out} --bins 5 --threads 1"
    code, text, error = of_command(words, capsys)
    assert (code, error) == (0, "")
    table = pd.read_csv(out / "disentanglement.csv")
    assert table["run"].tolist() == ["a-1", "a-2"]
    assert set(table["model"]) == {"a (2 seeds)"}
    assert (table[["codes", "bins", "factors", "rows"]].iloc[0] == ["mean", 5, "shape scale x y", 54]).all()
    line = next(line for line in text.splitlines() if "a (2 seeds)" in line)
    mig = table["mig"]
    assert f"{mig.mean():.2f} ± {mig.std():.2f}" in line
    assert re.search(rf"≥ {table['log_marginal'].mean():.1f}", line)
    assert table["udr"].notna().all()
    assert (out / "disentanglement.png").read_bytes().startswith(b"\x89PNG")
    run = open_run(runs / "a-1")
    rows = run.rows()
    asked = Asked(bins=5)
    names, factors, ordered = factors_of(run, rows, asked)
    codes = codes_of(run, rows, asked, "cpu")
    again = disentangling.supervised(codes.values, factors, ordered, codes.active, 5)
    assert table.loc[0, [f"mig_{name}" for name in names]].tolist() == pytest.approx(again.mig.tolist(), abs=1e-9)
    for split, part in (("test", slice(0, 5)), ("validation", slice(5, 10)), ("train", slice(10, 54))):
        x = getattr(rows, split).float() if split != "train" else rows.transform(rows.train)
        np.testing.assert_allclose(codes.values[part], run.model().posterior(x).mean.detach().numpy(), atol=1e-5)
        np.testing.assert_array_equal(factors[part], rows.factors.values[split].numpy())
    sampled = codes_of(run, rows, Asked("sample"), "cpu")
    assert np.abs(sampled.values - codes.values).max() > 0.1
    np.testing.assert_array_equal(sampled.values, codes_of(run, rows, Asked("sample"), "cpu").values)


def test_what_cannot_be_scored_is_refused_in_a_line(runs, tmp_path, capsys) -> None:
    pyrovae.train({**SMALL, "data": "ring", "likelihood": "gaussian", "seed": 1}, tmp_path / "ring", plots=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "disentanglement.csv").write_text("mine,1\n")
    run, out = runs / "a-1", tmp_path / "new"
    for words, code, message in (
        (f"{tmp_path}/ring --out {out}", 2, r"its rows \(ring\) have no known factors .* train with --data sprites"),
        (f"{run} --out {out} --factors x", 2, "--factors: expected at least two, to be told apart, got x"),
        (f"{run} --out {out} --factors x,angle", 2, "--factors: 'angle' is none of shape, scale, x, y"),
        (f"{run} --out {out} --factors x,x", 2, "--factors: 'x' is named twice"),
        (f"{run} --out {out} --bins 60", 2, "--bins: 60 are more than the 54 rows"),
        (f"{run} --out {out} --codes median", 2, "--codes: expected mean or sample"),
        (f"{run} --out {run}/plots", 2, "would write into the run"),
        (f"{run} --out {tmp_path}/theirs", 2, "was not written by pyrovae.disentangle"),
        (f"{tmp_path}/none --out {out}", 5, "no such run directory"),
        ("", 2, "name the directory of a run"),
    ):
        got, _, error = of_command(words, capsys)
        assert got == code, words
        assert re.search(message, error), error
        assert error.count("\n") == 1
    assert not out.exists()
