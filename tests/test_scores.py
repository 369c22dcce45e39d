"""Scores on disk: an evaluation that was interrupted goes on where it was, and gives the same answer."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import OutputError
from pyrovae.inference import log_marginal
from pyrovae.inference.log_marginal import PER_ROW, LogMarginal
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal
from pyrovae.scores import Scores, closing

SETTINGS = {"estimator": "importance sampling from the guide", "K": 50, "seed": 3}


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(StandardNormal(2), Bernoulli(MLP(2, (4,), hidden=[5])), MeanFieldNormal(MLP((4,), hidden=[5]), 2))


X = torch.bernoulli(torch.full((250, 4), 0.4), generator=torch.Generator().manual_seed(1))


def score(vae: VAE, store: Scores | None, stop_after: int | None = None, x: Tensor = X) -> LogMarginal:
    """Score in blocks of 100 rows; perhaps be interrupted."""

    def progress(done: int) -> None:
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    return log_marginal(vae.model, vae.guide, x, 50, seed=3, store=store, progress=progress)


def assert_equal(a: LogMarginal, b: LogMarginal) -> None:
    for name in PER_ROW:
        assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)
    assert a.curve.keys() == b.curve.keys()
    assert all(torch.equal(a.curve[k], b.curve[k]) for k in a.curve)
    assert (a.num_particles, a.estimator) == (b.num_particles, b.estimator)


def test_interrupted_and_continued_is_never_interrupted(vae: VAE, tmp_path: Path) -> None:
    whole = score(vae, None)
    with pytest.raises(KeyboardInterrupt):
        score(vae, Scores(tmp_path, SETTINGS), stop_after=200)
    drawn: list[int] = []
    again = Scores(tmp_path, SETTINGS)
    assert again.found == 200
    put = again.put
    again.put = lambda start, result: drawn.append(start) or put(start, result)  # type: ignore[method-assign]
    assert_equal(score(vae, again), whole)
    assert drawn == [200]
    assert_equal(score(vae, Scores(tmp_path, SETTINGS)), whole)


def test_what_is_damaged_or_cut_off_is_scored_again(vae: VAE, tmp_path: Path) -> None:
    whole = score(vae, Scores(tmp_path, SETTINGS))
    path = Scores(tmp_path, SETTINGS).path
    content = path.read_bytes()
    place = content.index(b"\n120,") + 8
    digit = content[place : place + 1]
    path.write_bytes(content[:place] + (b"1" if digit != b"1" else b"2") + content[place + 1 :])
    flipped = Scores(tmp_path, SETTINGS)
    assert flipped.found == 150
    assert_equal(score(vae, flipped), whole)
    path.write_bytes(content[: content.index(b"\n230,") + 9])
    cut = Scores(tmp_path, SETTINGS)
    assert cut.found == 200
    assert_equal(score(vae, cut), whole)
    assert Scores(tmp_path, SETTINGS).found == 250
    for garbage in (b"", b"\x00\xff" * 50, b"# rows 5 to 2, sha256 x\n"):
        path.write_bytes(garbage)
        assert Scores(tmp_path, SETTINGS).found == 0
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="cannot be read"):
        Scores(tmp_path, SETTINGS)


def test_other_settings_are_another_file(vae: VAE, tmp_path: Path) -> None:
    score(vae, Scores(tmp_path, SETTINGS))
    for key, value in (("K", 60), ("seed", 4), ("estimator", "another")):
        other = Scores(tmp_path, SETTINGS | {key: value})
        assert other.found == 0
        assert other.path != Scores(tmp_path, SETTINGS).path


def test_fewer_or_more_rows_share_the_blocks_that_are_the_same(vae: VAE, tmp_path: Path) -> None:
    """The block of rows 100 to 149 is not that of 100 to 199: its draws differ."""
    few = score(vae, Scores(tmp_path, SETTINGS), x=X[:150])
    more = score(vae, Scores(tmp_path, SETTINGS))
    assert torch.equal(few.estimate[:100], more.estimate[:100])
    assert_equal(more, score(vae, None))
    assert_equal(few, score(vae, None, x=X[:150]))


def test_the_file_is_a_table(vae: VAE, tmp_path: Path) -> None:
    result = score(vae, Scores(tmp_path, SETTINGS))
    table = pd.read_csv(Scores(tmp_path, SETTINGS).path, comment="#")
    assert table["row"].tolist() == list(range(250))
    assert table["log_marginal"].mean() == pytest.approx(result.mean, abs=1e-12)
    assert {"standard_error", "ess", "pareto_k", "elbo", "L_10"} <= set(table.columns)


def test_what_crashes_and_neighbours_left_is_tidied(vae: VAE, tmp_path: Path) -> None:
    """Two processes at once write every row twice, and a crash half a line: in the end each row is there once."""
    first, second = Scores(tmp_path, SETTINGS), Scores(tmp_path, SETTINGS)
    whole = score(vae, first)
    with first.path.open("ab") as file:
        file.write(b"\xff garbage, 1,")
    score(vae, second)
    done = Scores(tmp_path, SETTINGS)
    assert done.found == 250
    done.tidy(300)  # not all are there: nothing is done
    assert done.path.stat().st_size > 2 * len(first.header)
    done.tidy(250)
    assert pd.read_csv(done.path, comment="#")["row"].tolist() == list(range(250))
    assert_equal(score(vae, Scores(tmp_path, SETTINGS)), whole)


def test_a_block_of_other_columns_is_scored_again(vae: VAE, tmp_path: Path) -> None:
    scores = Scores(tmp_path, SETTINGS)
    score(vae, scores)
    lines = [f"{i},1.0,2.0\n" for i in range(3)]
    scores.path.write_text(scores.header + "".join(lines) + closing(lines))
    assert Scores(tmp_path, SETTINGS).found == 0


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    scores = Scores(tmp_path, SETTINGS | {"K": 1})
    values = torch.tensor([math.nan, -math.inf, -1.25], dtype=torch.float64)
    columns = dict.fromkeys(PER_ROW, values) | {"zero_weights": torch.tensor([1, 0, 0])}
    scores.put(0, LogMarginal(**columns, curve={1: values}, num_particles=1, estimator=SETTINGS["estimator"]))
    back = Scores(tmp_path, SETTINGS | {"K": 1}).get(0, 3)
    assert back is not None
    assert_close(back.estimate, values, rtol=0, atol=0, equal_nan=True)
    assert back.zero_weights.tolist() == [1, 0, 0]


def test_a_full_disk_is_an_error_in_one_line(vae: VAE, tmp_path: Path, monkeypatch) -> None:
    scores = Scores(tmp_path, SETTINGS)
    score(vae, scores, x=X[:100])
    monkeypatch.setattr("os.write", lambda descriptor, data: 10)
    with pytest.raises(OutputError, match="could not be written"):
        score(vae, Scores(tmp_path, SETTINGS))
    assert Scores(tmp_path, SETTINGS).found == 100
