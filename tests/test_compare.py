"""Comparisons: paired, in one table per measure, beside an exact mixture."""

import math
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyrovae import compare, fit, load_data
from pyrovae.command import main
from pyrovae.compare import COLUMNS, Scored, aligned, fit_baseline, latex, readable, table, unique_names
from pyrovae.evaluate import number, score
from pyrovae.inference.log_marginal import exact, summarise
from pyrovae.models import BernoulliMixture, GaussianMixture
from pyrovae.run import open_run

TINY = "--epochs 1 --eval-K 5 --eval-rows 10 --no-plots --seed 0 --device cpu"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of two measures: two densities, one of them twice by name, a mixture and a mass."""
    root = tmp_path_factory.mktemp("runs")
    plane = f"{TINY} --data three-gaussians --batch-size 1000"
    network = "--latent-dim 2 --network.hidden 8"
    for out, words in (
        ("a", f"{plane} {network}"),
        ("other/a", f"{plane} {network} --epochs 4 --lr 0.02"),
        ("mixture", f"{plane.replace('--eval-K 5', '')} --model mixture --model.components 2"),
        ("bits", f"{TINY} --latent-dim 3 --network.hidden 9 --eval-rows 5"),
        ("threshold", f"{TINY} --latent-dim 3 --network.hidden 9 --binarize threshold"),
        ("ring", f"{plane.replace('three-gaussians', 'ring')} {network}"),
    ):
        assert fit.command([*words.split(), "--out", str(root / out)]) == 0
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(words: str) -> None:
    assert compare.command(shlex.split(words)) == 0


def fails(capsys, words: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main("compare", compare.command, shlex.split(words))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return caught.value.code, err


# --------------------------------------------------------------------------------------------------------- the numbers


def test_differences_are_paired():
    """Two models that differ by a tenth on rows that vary by ten: the difference is known a hundred times better."""
    rows = 10 * torch.randn(50, dtype=torch.float64)
    offset = 0.1 + 0.01 * torch.randn(50, dtype=torch.float64)
    frame = table([Scored("worse", exact(rows - offset)), Scored("best", exact(rows))])
    assert list(frame["name"]) == ["best", "worse"]
    assert list(frame.columns) == list(COLUMNS)
    worse = frame.iloc[1]
    assert worse["difference"] == pytest.approx(-offset.mean().item(), abs=1e-12)
    assert worse["difference_error"] == pytest.approx(offset.std().item() / math.sqrt(50), rel=1e-9)
    assert worse["error"] == pytest.approx((rows - offset).std().item() / math.sqrt(50), rel=1e-9)
    assert worse["error"] > 100 * worse["difference_error"]
    assert (frame.iloc[0]["difference"], frame.iloc[0]["difference_error"]) == (0, 0)


def test_the_best_comes_first_and_estimates_are_marked():
    torch.manual_seed(0)
    log_w = torch.randn(40, 20, dtype=torch.float64)
    entries = [
        Scored("c", exact(torch.full((20,), -9.0))),
        Scored("b", summarise(log_w)),
        Scored("a", exact(torch.ones(20))),
    ]
    frame = table(entries)
    assert list(frame["name"]) == ["a", "b", "c"]
    assert list(frame["exact"]) == [True, False, True]
    estimate = frame.iloc[1]
    assert estimate["K"] == 40
    assert estimate["log_marginal"] == pytest.approx((torch.logsumexp(log_w, 0) - math.log(40)).mean().item())
    assert estimate["elbo"] == pytest.approx(log_w.mean().item())
    assert frame["K"].isna().tolist() == [True, False, True]
    strings = readable(frame, load_data("three-gaussians").rows("density"))
    assert strings["to the best"][0] == "best"
    assert strings["how"][0] == "exact"
    assert strings["how"][1].startswith("K = 40 (± ")
    assert "bits/dim" not in strings.columns
    assert "bits/dim" in readable(frame, load_data("digits").rows("mass")).columns


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-86.75432, 0.0432, "-86.754 ± 0.043"),
        (-86.75432, 4.32, "-86.8 ± 4.3"),
        (-86.75432, 43.2, "-87 ± 43"),
        (1.5, None, "1.50"),
        (1.5, math.nan, "1.50"),
        (math.nan, 1.0, "-"),
        (None, None, "-"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (1.0, 1e-9, "1.000000 ± 0.000000"),
    ],
)
def test_numbers_have_the_digits_that_their_error_allows(value, error, text):
    assert number(value, error) == text


def test_tables_are_aligned_and_latex_is_escaped():
    frame = pd.DataFrame({"model": ["a_b & 50 %", "c"], "log p(x)": ["-1.0 ± 0.1", "-20"]})
    lines = aligned(frame).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].index("a_b") == lines[3].index("c")
    text = latex(frame, "mass on {0,1}^64, 100 % of rows")
    assert "a\\_b \\& 50 \\% & -1.0 $\\pm$ 0.1 \\\\" in text
    assert "mass on \\{0,1\\}\\^{}64, 100 \\% of rows" in text
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert re.search(r"\\begin\{tabular\}\{lr\}", text)


# -------------------------------------------------------------------------------------------------------- the baseline


@pytest.mark.parametrize("count", [1, 3])
def test_the_baseline_has_the_log_p_of_scikit_learn(count):
    from sklearn.mixture import GaussianMixture as Oracle

    rows = load_data("three-gaussians").rows("density")
    _, mixture = fit_baseline(rows, [count], say=lambda line: None)
    assert isinstance(mixture, GaussianMixture)
    oracle = Oracle(count, covariance_type="full")
    oracle.weights_ = mixture.weights.detach().numpy()
    oracle.means_ = mixture.means.detach().numpy()
    oracle.covariances_ = mixture.covariances.detach().numpy()
    oracle.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(oracle.covariances_))
    expected = oracle.score_samples(rows.test.double().numpy())
    np.testing.assert_allclose(score(mixture, rows.test, 1).estimate.numpy(), expected, rtol=0, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Oracle(count, tol=1e-6, max_iter=500, reg_covar=1e-9, random_state=0).fit(rows.train.double().numpy())
    theirs = fitted.score(rows.test.double().numpy())
    assert score(mixture, rows.test, 1).mean == pytest.approx(theirs, abs=0.01)


def test_the_baseline_is_chosen_on_the_validation_rows():
    rows = load_data("three-gaussians").rows("density")
    lines: list[str] = []
    name, mixture = fit_baseline(rows, (1, 2, 3, 6, 50), say=lines.append)
    bounds = [float(re.search(r"validation log p\(x\) (\S+) nats", line)[1]) for line in lines]
    best = bounds.index(max(bounds))
    assert best == len(bounds) - 2 or len(bounds) == 5
    assert (1, 2, 3, 6, 50)[best] == mixture.means.shape[0]
    assert name == f"mixture of {mixture.means.shape[0]} Gaussians, full covariance"
    assert mixture.log_prob(rows.validation.double()).mean().item() == pytest.approx(max(bounds), abs=0.006)


def test_the_baseline_of_a_mass_is_of_bernoullis():
    rows = load_data("digits").rows("mass")
    name, mixture = fit_baseline(rows, (5,), say=lambda line: None)
    assert isinstance(mixture, BernoulliMixture)
    assert name == "mixture of 5 Bernoullis"
    weights, means, x = mixture.weights.detach(), mixture.means.detach(), rows.test.double()
    flat, p = x.flatten(1), means.flatten(1)
    log_p = flat @ p.log().T + (1 - flat) @ (1 - p).log().T
    assert score(mixture, rows.test, 1).mean == pytest.approx(
        torch.logsumexp(weights.log() + log_p, 1).mean().item(), abs=1e-8
    )


def test_the_same_seed_gives_the_same_baseline():
    rows = load_data("digits").rows("mass")
    first, second, other = (
        fit_baseline(rows, (3,), seed, say=lambda line: None)[1].log_prob(rows.test.double()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------------------------------------- the command


def test_one_table_per_measure(runs, capsys):
    run(f"{runs}/a {runs}/other/a {runs}/mixture {runs}/bits --K 20 --rows 40 --components 2")
    out = capsys.readouterr().out
    density, mass = pd.read_csv("comparison/density.csv"), pd.read_csv("comparison/mass.csv")
    assert set(density["name"]) == {
        f"{runs}/a",
        f"{runs}/other/a",
        "mixture",
        "mixture of 2 Gaussians, full covariance",
    }
    assert set(mass["name"]) == {"bits", "mixture of 2 Bernoullis"}
    for frame, measure in ((density, "density of the data in its own units, 2 dimensions"), (mass, "mass on {0,1}^64")):
        assert set(frame["measure"]) == {measure}
        assert set(frame["rows"]) == {40}
        assert frame["log_marginal"].is_monotonic_decreasing
        assert frame["difference"].tolist() == pytest.approx(
            (frame["log_marginal"] - frame["log_marginal"][0]).tolist()
        )
        assert f"first 40 test rows; {measure}" in out
    for kind in ("density", "mass"):
        assert Path(f"comparison/{kind}.png").stat().st_size > 5000
        assert "\\toprule" in Path(f"comparison/{kind}.tex").read_text()
    assert sorted(path.suffix for path in Path("comparison").iterdir()) == [".csv"] * 2 + [".png"] * 2 + [".tex"] * 2


def test_numbers_of_the_table_are_those_of_the_runs(runs):
    run(f"{runs}/a {runs}/mixture --K 30 --no-baseline --out tables --device cpu")
    frame = pd.read_csv("tables/density.csv").set_index("name")
    assert set(frame.index) == {"a", "mixture"}
    a, b = open_run(runs / "a"), open_run(runs / "mixture")
    x = a.rows().test
    theirs, exactly = score(a.model(), x, 30), score(b.model(), x, 30)
    assert frame["log_marginal"]["a"] == pytest.approx(theirs.mean, abs=1e-12)
    assert frame["log_marginal"]["mixture"] == pytest.approx(exactly.mean, abs=1e-12)
    difference = theirs.estimate - exactly.estimate
    worse = frame["difference"].idxmin()
    assert abs(frame["difference"][worse]) == pytest.approx(abs(difference.mean().item()), abs=1e-12)
    assert frame["difference_error"][worse] == pytest.approx((difference.std() / math.sqrt(len(x))).item(), rel=1e-9)


def test_different_rows_are_refused(runs, capsys):
    for pair, words in (
        (f"{runs}/a {runs}/ring", ("three-gaussians", "ring")),
        (f"{runs}/bits {runs}/threshold", ("binarised dynamic", "binarised threshold")),
    ):
        code, message = fails(capsys, f"{pair} --K 5")
        assert code == 2
        assert "cannot compare runs on different rows" in message
        assert all(word in message for word in words)
    assert not Path("comparison").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "required: runs"),
        ("{runs}/a {runs}/a", 2, "the same directory is named twice"),
        ("{runs}/a {runs}/other/../a", 2, "the same directory is named twice"),
        ("{runs}/a {runs}/nowhere", 5, "no such run directory"),
        ("{runs}/a --K 0", 2, "--K"),
        ("{runs}/a --components 2 --no-baseline", 2, "--components: not used, since --no-baseline adds none"),
        ("{runs}/a --components 99999", 2, "none of [99999] components can be fit to 4000 rows"),
        ("{runs}/a --out {runs}/a/config.yaml", 2, "is a file; choose a directory"),
    ],
)
def test_comparisons_that_make_no_sense(runs, capsys, words, code, message):
    found, text = fails(capsys, words.format(runs=runs))
    assert found == code
    assert message in text


def test_names_are_unique(runs):
    names = unique_names([open_run(runs / name) for name in ("a", "other/a", "mixture")])
    assert sorted(names.values()) == sorted([str(runs / "a"), str(runs / "other/a"), "mixture"])
