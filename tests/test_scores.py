"""Scores on disk: an evaluation that was interrupted goes on where it was, and gives the same answer."""

import math
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import CheckpointError, OutputError
from pyrovae.inference import log_marginal
from pyrovae.inference.marginal import PER_ROW, LogMarginal
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal
from pyrovae.runs.scores import Scores, closing, heading, own_key

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


def forged(lines: list[str], scores: Scores) -> str:
    """Rows with a right checksum, as anybody can make them."""
    return scores.header + heading(SETTINGS["K"]) + "".join(lines) + closing(lines)


def test_scores_that_another_made_up_are_not_believed(vae: VAE, tmp_path: Path, monkeypatch) -> None:
    """Their checksum is right; but they bear no seal, that of another user, or that of other settings."""
    scores = Scores(tmp_path, SETTINGS)
    whole = score(vae, scores)
    lines = [line + "\n" for line in scores.path.read_text().splitlines() if line[:1].isdigit()][:100]
    better = [",".join([line.split(",")[0], "99.0", *line.split(",")[2:]]) for line in lines]
    other = Scores(tmp_path, SETTINGS | {"model": "another"})
    with monkeypatch.context() as patch:
        patch.setattr("pyrovae.runs.scores.own_key", lambda: b"another user's")
        of_another_user = scores.seal(better)
    for seal in ("", "# sealed \n", of_another_user, other.seal(better), scores.seal(lines)):
        scores.path.write_text(forged(better, scores) + seal)
        found = Scores(tmp_path, SETTINGS)
        assert (found.found, found.strange) == (0, 1)
        assert_equal(score(vae, found), whole)
    scores.path.write_text(forged(better, scores) + scores.seal(better))
    assert Scores(tmp_path, SETTINGS).get(0, 100).estimate.eq(99).all()  # type: ignore[union-attr]


def test_rows_that_are_none_are_scored_again(vae: VAE, tmp_path: Path) -> None:
    """Whatever bears seal and checksum: words, other columns, other rows, counts that are none, digits without end."""
    scores = Scores(tmp_path, SETTINGS)
    whole = score(vae, scores)
    rows = [line for line in scores.path.read_text().splitlines() if line[:1].isdigit()][:100]
    place = heading(SETTINGS["K"]).split(",").index("zero_weights")

    def changed(column: int, value: str) -> list[str]:
        return [",".join(value if i == column else v for i, v in enumerate(row.split(","))) + "\n" for row in rows]

    cases = [changed(1, "much"), changed(1, ""), changed(0, "7"), changed(0, "²")]
    cases += [changed(0, "9" * 400), changed(0, "9" * 5000), [row + ",1.0\n" for row in rows], [rows[0] + "\n"] * 100]
    cases += [changed(place, value) for value in ("nan", "inf", "-1.0", "0.5", "51", "1e300")]
    for lines in cases:
        scores.path.write_text(forged(lines, scores) + scores.seal(lines))
        found = Scores(tmp_path, SETTINGS)
        assert found.found == 0
        assert_equal(score(vae, found), whole)


def test_a_file_without_an_end_is_left_where_a_line_has_none(tmp_path: Path) -> None:
    path = Scores(tmp_path, SETTINGS).path
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(10**12)
    assert Scores(tmp_path, SETTINGS).found == 0
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OutputError, match="not an ordinary file"):
        Scores(tmp_path, SETTINGS)


@pytest.mark.parametrize("kind", ["file", "hard link", "folder"])
def test_nothing_is_written_through_a_link(vae: VAE, tmp_path: Path, kind: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "scores").mkdir(parents=True)
    outside.mkdir()
    scores = Scores(run, SETTINGS)
    mine = outside / scores.path.name
    mine.write_text("1,2,3\n")
    if kind == "folder":
        scores.path.parent.rmdir()
        scores.path.parent.symlink_to(outside)
    elif kind == "file":
        scores.path.symlink_to(mine)
    else:
        scores.path.hardlink_to(mine)
    with pytest.raises(CheckpointError, match="link"):
        score(vae, scores)
    assert mine.read_text() == "1,2,3\n"
    assert [*outside.iterdir()] == [mine]


def test_the_key_is_made_once_and_is_the_users_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make = own_key.__wrapped__
    first = make()
    path = tmp_path / "pyrovae" / "key"
    assert path.read_bytes() == first == make()
    assert len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*path.parent.iterdir()] == [path]
    for damaged in (b"", first[:10], first * 2):  # a key that can be guessed is none
        path.write_bytes(damaged)
        assert len(make()) == 32
        assert make() != make()


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
    scores.path.write_text(scores.header + "".join(lines) + closing(lines) + scores.seal(lines))
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
