"""Comparisons: paired, in one table per measure, beside an exact mixture."""

import dataclasses
import math
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyrovae import compare, fit, load_data
from pyrovae.command import main
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.marginal import LogMarginal, exact, summarise
from pyrovae.inference.simulation import Simulated
from pyrovae.models import BernoulliKernelDensity, BernoulliMixture, GaussianMixture
from pyrovae.runs import baseline, comparison
from pyrovae.runs.baseline import fit_baselines
from pyrovae.runs.comparison import COLUMNS, Scored, table
from pyrovae.runs.comparison_tables import interval, latex, legend, readable
from pyrovae.runs.directory import open_run
from pyrovae.runs.grouping import check_same_rows, common_name, name_pools, pools, run_around, unique_names
from pyrovae.runs.scoring import Scoring, score
from pyrovae.runs.tables import aligned, number

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
        ("a-2", f"{plane.replace('--seed 0', '--seed 1')} {network}"),
        ("a-3", f"{plane.replace('--seed 0', '--seed 2')} {network}"),
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


def shifted(count: int = 400, offset: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    return offset + spread * torch.randn(count, dtype=torch.float64)


def test_differences_are_paired():
    """Two models that differ by a tenth on rows that vary by ten: the difference is known a hundred times better."""
    rows, offset = shifted(50, spread=10), shifted(50, 0.1, 0.01)
    frame = table([Scored("worse", [exact(rows - offset)]), Scored("best", [exact(rows)])])
    assert list(frame["name"]) == ["best", "worse"]
    assert list(frame.columns) == list(COLUMNS)
    worse = frame.iloc[1]
    assert worse["difference"] == pytest.approx(-offset.mean().item(), abs=1e-12)
    assert worse["difference_error"] == pytest.approx(offset.std().item() / math.sqrt(50), rel=1e-9)
    assert worse["error"] == pytest.approx((rows - offset).std().item() / math.sqrt(50), rel=1e-9)
    assert worse["error"] > 100 * worse["difference_error"]
    assert worse["high"] - worse["low"] > 100 * (worse["difference_high"] - worse["difference_low"])
    best = frame.iloc[0]
    assert [best[f"difference{end}"] for end in ("", "_error", "_low", "_high")] == [0, 0, 0, 0]


def test_intervals_are_those_of_the_normal_approximation():
    """For the mean of many Gaussian rows the bootstrap's interval is 1.96 standard errors to each side."""
    rows = shifted(2000)
    frame = table([Scored("a", [exact(rows)]), Scored("b", [exact(rows + shifted(2000, -0.5, 0.3))])])
    for column, error in (("", "error"), ("difference_", "difference_error")):
        entry = frame.iloc[1]
        middle = entry["difference" if column else "log_marginal"]
        half = 1.96 * entry[error]
        assert entry[f"{column}low"] == pytest.approx(middle - half, abs=0.06 * half)
        assert entry[f"{column}high"] == pytest.approx(middle + half, abs=0.06 * half)


def test_the_seed_is_that_of_the_bootstrap():
    entries = [Scored(name, [exact(shifted())]) for name in "ab"]
    first, same, other = (table(entries, seed) for seed in (0, 0, 1))
    assert first.equals(same)
    assert not np.array_equal(first["low"], other["low"])
    np.testing.assert_array_equal(first["log_marginal"], other["log_marginal"])


def test_ranks_say_what_the_rows_can_tell():
    """Two models a hair apart on noisy rows share ranks 1 and 2; one that is far below is third for certain."""
    rows = shifted()
    near = exact(rows + shifted(spread=1) - 0.01)
    frame = table([Scored("far", [exact(rows - 2)]), Scored("near", [near]), Scored("best", [exact(rows)])])
    assert frame["rank_low"].tolist() == [1, 1, 3]
    assert frame["rank_high"].tolist() == [2, 2, 3]
    assert readable(frame)["rank"].tolist() == ["1-2", "1-2", "3"]
    clear = table([Scored("a", [exact(rows)]), Scored("b", [exact(rows - 0.01)])])
    assert readable(clear)["rank"].tolist() == ["1", "2"]
    tied = table([Scored("a", [exact(rows)]), Scored("b", [exact(rows)])])
    assert readable(tied)["rank"].tolist() == ["1", "1"]


def bound(values: torch.Tensor) -> LogMarginal:
    """An estimate that is a lower bound only: of K draws too few to tell their tail."""
    k = 20
    log_w = values + 0.01 * torch.randn(k, len(values), dtype=torch.float64)
    return summarise(log_w - torch.logsumexp(log_w, 0) + math.log(k) + values)


def estimate(values: torch.Tensor, bias: float) -> LogMarginal:
    """An estimate whose draws are good, and that is so much too low by its jackknife."""
    log_w = values + 0.1 * torch.randn(400, len(values), dtype=torch.float64)
    return dataclasses.replace(summarise(log_w), estimate=values, jackknife=values + bias)


def checked(name: str, *results: LogMarginal) -> Scored:
    """A model whose estimates are as good on simulated data."""
    nothing = torch.zeros(300, dtype=torch.float64)
    return Scored(name, results, [Simulated(nothing, nothing, nothing + 1, r.num_particles, "") for r in results])


def test_ranks_leave_open_what_a_lower_bound_may_be():
    """A bound far below may be of the best model, so that no other is first for certain; one on top is first."""
    rows = shifted()
    frame = table([Scored("a", [exact(rows)]), Scored("b", [exact(rows - 1)]), Scored("bound", [bound(rows - 50)])])
    assert frame["verdict"].tolist() == ["exact", "exact", "lower bound only"]
    assert frame["rank_low"].tolist() == [1, 2, 1]  # b is below a, whatever the bound is
    assert frame["rank_high"].tolist() == [2, 3, 3]
    strings = readable(frame)
    assert strings["rank"].tolist() == ["1-2", "2-3", "1-3"]
    assert strings["to the best [95 %]"][0] == "highest"
    assert frame["difference_bound"].tolist() == ["", "", "at least"]
    assert [cell[:2] for cell in strings["to the best [95 %]"][1:]] == ["-1", "≥ "]
    assert any(note.startswith("rank: ") and "lower bound" in note for note in legend(frame))

    first = table([Scored("bound", [bound(rows)]), Scored("a", [exact(rows - 1)]), Scored("low", [bound(rows - 2)])])
    assert first["name"].tolist() == ["bound", "a", "low"]
    assert first["rank_low"].tolist() == [1, 2, 1]  # log p(x) of the first is at least its number, which is over a
    assert first["rank_high"].tolist() == [2, 3, 3]
    assert first["difference_bound"].tolist() == ["", "at most", "open"]
    assert [cell[:2] for cell in readable(first)["to the best [95 %]"][1:]] == ["≤ ", "? "]
    certain = table([Scored("bound", [bound(rows)]), Scored("a", [exact(rows - 1)])])
    assert readable(certain)["rank"].tolist() == ["1", "2"]
    assert readable(certain)["to the best [95 %]"][0] == "best"


def test_an_estimate_may_be_better_by_the_bias_that_is_stated():
    """Two estimates 0.02 nat apart: ranked where their biases are smaller, tied where the lower one's is larger."""
    rows = shifted()
    for bias, ranks in ((0.01, ["1", "2"]), (0.03, ["1-2", "1-2"])):
        frame = table([checked("a", estimate(rows, 0.0)), checked("b", estimate(rows - 0.02, bias))])
        assert frame["verdict"].tolist() == ["ok", "ok"]
        assert readable(frame)["rank"].tolist() == ranks
    frame = table([checked("a", estimate(rows, 0.03)), checked("b", estimate(rows - 0.02, 0.0))])
    assert readable(frame)["rank"].tolist() == ["1", "2"]  # the better one's bias opens nothing


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_model_without_a_number_leaves_the_ranks_of_others_alone(value):
    """Though it would be the best in every resample that leaves its bad row out."""
    rows = shifted()
    broken = rows + 5
    broken[3] = value
    frame = table([Scored("broken", [exact(broken)]), Scored("a", [exact(rows)]), Scored("b", [exact(rows - 1)])])
    assert readable(frame)["rank"].tolist() == ["1", "2", "-"]


def test_single_seeds_are_said():
    rows = shifted()
    pair = [Scored("a", [exact(rows)]), Scored("b", [exact(rows - 1)])]
    (note,) = legend(table(pair))
    assert note.startswith("one seed: the spread over seeds is unknown of every model")
    pooled = Scored("c (2 seeds)", [exact(rows - 2), exact(rows - 2.5)])
    spread, single = legend(table([*pair, pooled]))
    assert "no interval and no rank holds it" in spread
    assert single.startswith("one seed: the spread over seeds is unknown of a, b;")
    assert not [note for note in legend(table([pooled])) if "one seed" in note]


def test_seeds_are_averaged_row_by_row_and_their_spread_is_apart():
    rows = shifted(spread=5)
    seeds = [exact(rows + offset + shifted(spread=0.1)) for offset in (-1.0, 0.0, 4.0)]
    frame = table([Scored("pooled (3 seeds)", seeds), Scored("single", [exact(rows - 9)])])
    pooled, single = frame.iloc[0], frame.iloc[1]
    together = torch.stack([s.estimate for s in seeds]).mean(0)
    assert pooled["log_marginal"] == pytest.approx(together.mean().item(), abs=1e-12)
    assert pooled["error"] == pytest.approx(together.std().item() / 20, rel=1e-9)
    assert pooled["high"] - pooled["low"] < 5 * pooled["error"]  # however far apart the seeds are
    assert pooled["seed_means"] == [s.mean for s in seeds]
    assert pooled["spread"] == pytest.approx(np.std([s.mean for s in seeds], ddof=1))
    assert (pooled["seeds"], single["seeds"]) == (3, 1)
    assert math.isnan(single["spread"])
    strings = readable(frame)
    assert strings["seeds' sd"].tolist() == [f"{pooled['spread']:.2g}", "-"]
    assert "seeds' sd" not in readable(table([Scored("single", [exact(rows)])])).columns


def test_the_monte_carlo_error_of_seeds_is_no_smaller_than_theirs():
    """They are scored with the same noise."""
    results = [bound(shifted()), bound(shifted())]
    errors = [result.monte_carlo_error for result in results]
    frame = table([Scored("a (2 seeds)", results)])
    assert min(errors) > 0
    assert frame["monte_carlo_error"][0] == pytest.approx(sum(errors) / 2)


def test_the_best_comes_first_and_estimates_are_marked():
    log_w = 0.1 * shifted(400 * 20).reshape(400, 20)
    entries = [
        Scored("c", [exact(torch.full((20,), -9.0))]),
        checked("b", summarise(log_w)),
        Scored("a", [exact(torch.ones(20))]),
    ]
    frame = table(entries)
    assert list(frame["name"]) == ["a", "b", "c"]
    assert list(frame["exact"]) == [True, False, True]
    assert list(frame["verdict"]) == ["exact", "ok", "exact"]
    estimate = frame.iloc[1]
    assert estimate["K"] == 400
    assert estimate["log_marginal"] == pytest.approx((torch.logsumexp(log_w, 0) - math.log(400)).mean().item())
    assert estimate["elbo"] == pytest.approx(log_w.mean().item())
    assert frame["K"].isna().tolist() == [True, False, True]
    strings = readable(frame)
    assert strings["to the best [95 %]"][0] == "best"
    assert [cell.startswith("≥ ") for cell in strings["log p(x) [95 %]"]] == [False, True, False]
    assert strings["verdict"].tolist() == ["exact", "ok", "exact"]
    assert any("from K = 400 draws" in note for note in legend(frame))
    assert [note.split(":")[0] for note in legend(frame.iloc[[0, 2]])] == ["one seed"]


def test_the_verdict_of_a_pool_is_its_worst_and_its_reason_is_told():
    good, bad = summarise(0.1 * shifted(8000).reshape(400, 20)), summarise(20 * shifted(8000).reshape(400, 20))
    frame = table([checked("doubtful", good, bad, good), checked("fine", good, good)]).set_index("name")
    assert frame["verdict"].to_dict() == {"doubtful": "lower bound only", "fine": "ok"}
    (note,) = [note for note in legend(frame.reset_index()) if note.startswith("doubtful")]
    assert note == f"doubtful: lower bound only, {frame['reason']['doubtful']}"


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_model_without_a_mean_is_last_and_has_no_rank(value):
    broken = shifted()
    broken[7] = value
    frame = table([Scored("broken", [exact(broken)]), Scored("low", [exact(shifted() - 99)])])
    assert list(frame["name"]) == ["low", "broken"]
    assert frame["rank_high"].tolist()[0] == 1
    assert frame["rank_high"].isna().tolist() == [False, True]
    assert frame["verdict"][1] == "invalid"
    assert readable(frame).iloc[1].tolist() == ["broken", "-", "-", "-", "invalid"]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (-86.75432, -87.2, -86.31, "-86.75 [-87.20, -86.31]"),
        (-86.75432, -96.0, -77.0, "-86.8 [-96.0, -77.0]"),
        (2484.2, 2461.0, 2507.0, "2484 [2461, 2507]"),
        (-1.00049, -1.00051, -1.00047, "-1.000 [-1.001, -1.000]"),
        (-5000.99, -5000.998, -5000.988, "-5001.0 [-5001.0, -5001.0]"),
        (1.5, 1.5, 1.5, "1.50 [1.50, 1.50]"),
        (1.5, math.nan, math.nan, "1.50"),
    ],
)
def test_intervals_have_the_digits_that_their_width_allows(value, low, high, text):
    assert interval(value, low, high) == text


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
        (1.0, 1e-9, "1.0000 ± 0.0000"),
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
    assert "a\\_b \\& 50 \\% & $-$1.0 $\\pm$ 0.1 \\\\" in text
    assert "mass on $\\{0,1\\}^{64}$, 100 \\% of rows" in text
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert re.search(r"\\begin\{tabular\}\{lr\}", text)
    assert "$\\ge$ $-$1" in latex(pd.DataFrame({"model": ["a"], "log p(x)": ["≥ -1"]}), "")


def test_latex_has_a_label_units_true_minus_signs_and_the_certain_best_in_bold():
    rows = shifted()
    frame = table([Scored("vae-2", [exact(rows - 94.2)]), Scored("b", [exact(rows - 95.2)])])
    strings = readable(frame)
    text = latex(strings, "digits", "My data/mass", [True, False])
    assert "\\label{tab:my-data-mass}" in text
    assert "$\\log p(x)$ in nats per datum" in text
    number = strings["log p(x) [95 %]"][0].replace("-", "$-$")
    assert f"vae-2 & 1 & \\textbf{{{number}}} & best & exact \\\\" in text
    assert text.count("\\textbf") == 1
    assert "-9" not in text.replace("$-$", "")
    assert "\\textbf" not in latex(strings, "digits")
    assert "1--2" in latex(strings.assign(rank="1-2"), "")
    assert "below it" in latex(strings, "", notes=["below it"]).split("\\end{tabular}")[1]


def test_nothing_in_a_name_is_a_command_to_latex():
    name = "\\a~b^c$d<e>f|g&h%i#j_k{l}"
    (line,) = [line for line in latex(pd.DataFrame({"model": [name], "n": ["1"]}), "").splitlines() if "& 1" in line]
    assert line == (
        "\\textbackslash{}a\\textasciitilde{}b\\textasciicircum{}c\\$d$<$e$>$f$|$g\\&h\\%i\\#j\\_k\\{l\\} & 1 \\\\"
    )


def test_long_names_are_wrapped_so_that_a_table_of_seeds_has_120_columns():
    rows = shifted(spread=20) - 90
    name = "a run in a directory whose name is very long and goes on/and/on/without/any/blank/in/it"
    entries = [
        Scored(name, [exact(rows - 30), exact(rows - 31)]),
        Scored("b", [summarise(shifted(400 * 400).reshape(400, 400) - 80)]),
    ]
    text = aligned(readable(table(entries)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "".join(line[2:].split("  ")[0].strip() for line in lines[3:]).replace(" ", "") == name.replace(" ", "")


# -------------------------------------------------------------------------------------------------------- the baseline


@pytest.mark.parametrize("count", [1, 3])
def test_the_baseline_has_the_log_p_of_scikit_learn(count):
    from sklearn.mixture import GaussianMixture as Oracle

    rows = load_data("three-gaussians").rows("density")
    mixture = fit_baselines(rows, [count])[0]
    assert isinstance(mixture, GaussianMixture)
    oracle = Oracle(count, covariance_type="full")
    oracle.weights_ = mixture.weights.detach().numpy()
    oracle.means_ = mixture.means.detach().numpy()
    oracle.covariances_ = mixture.covariances.detach().numpy()
    oracle.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(oracle.covariances_))
    expected = oracle.score_samples(rows.test.double().numpy())
    ours = score(mixture, Batch(rows.test), Scoring(1))
    np.testing.assert_allclose(ours.estimate.numpy(), expected, rtol=0, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Oracle(count, tol=1e-6, max_iter=500, reg_covar=1e-9, random_state=0).fit(rows.train.double().numpy())
    theirs = fitted.score(rows.test.double().numpy())
    assert ours.mean == pytest.approx(theirs, abs=0.01)


def test_the_baseline_is_chosen_on_the_validation_rows():
    rows = load_data("three-gaussians").rows("density")
    lines: list[str] = []
    mixture, pca, factors, analysers, kernels = fit_baselines(rows, (1, 2, 3, 6, 50), say=lines.append)
    assert pca.description == "probabilistic PCA, 1 component"  # of two elements
    assert factors.description == "factor analysis, 1 factor"
    assert analysers.description == "mixture of 3 factor analysers, 1 factor each"
    assert kernels.description.startswith("kernel density, 4000 rows, width 0.")
    lines = [line for line in lines if "Gaussians" in line]
    bounds = [float(re.search(r"validation log p\(x\) (\S+) nats", line)[1]) for line in lines]
    best = bounds.index(max(bounds))
    assert len(bounds) == min(best + 2, 5)  # the search ends at the first that is worse
    assert (1, 2, 3, 6, 50)[best] == mixture.means.shape[0]
    assert mixture.description == f"mixture of {mixture.means.shape[0]} Gaussians, full covariance"
    assert mixture.log_prob(rows.validation.double()).mean().item() == pytest.approx(max(bounds), abs=0.006)


def test_the_baseline_is_fitted_to_rows_that_fit_in_memory(monkeypatch):
    """Evenly from all of them."""
    rows, seen = load_data("three-gaussians").rows("density"), []
    monkeypatch.setattr(baseline, "MOST_ROWS", 100)
    initialise = GaussianMixture.initialise
    monkeypatch.setattr(GaussianMixture, "initialise", lambda m, x, seed: (seen.append(x), initialise(m, x, seed=seed)))
    fit_baselines(rows, (2,))
    (used,) = seen
    assert 50 <= len(used) <= 100
    step = len(rows.train) // len(used) + (len(rows.train) % len(used) > 0)
    assert torch.equal(used, rows.train[::step].to(used.dtype))


def test_the_baseline_of_a_mass_is_of_bernoullis():
    rows = load_data("digits").rows("mass")
    mixture, kernels = fit_baselines(rows, (5,))
    assert isinstance(mixture, BernoulliMixture)
    assert isinstance(kernels, BernoulliKernelDensity)
    assert mixture.description == "mixture of 5 Bernoullis"
    weights, means, x = mixture.weights.detach(), mixture.means.detach(), rows.test.double()
    flat, p = x.flatten(1), means.flatten(1)
    log_p = flat @ p.log().T + (1 - flat) @ (1 - p).log().T
    torch.testing.assert_close(
        score(mixture, Batch(rows.test), Scoring(1)).estimate,
        torch.logsumexp(weights.log() + log_p, 1),
        rtol=0,
        atol=1e-10,
    )


def test_a_family_without_such_a_number_of_components_is_left_out():
    rows = load_data("three-gaussians").rows("density")
    lines: list[str] = []
    mixture, _analysers, _kernels = fit_baselines(rows, (2,), say=lines.append)
    assert mixture.description == "mixture of 2 Gaussians, full covariance"
    assert "baseline: left out ppca, of which at most 1 can be fit here" in lines
    assert "baseline: left out factor-analysis, of which at most 1 can be fit here" in lines
    with pytest.raises(UsageError, match=r"baseline: none of \[100000\] components can be fit"):
        fit_baselines(rows, (100_000,))


def test_the_same_seed_gives_the_same_baseline():
    rows = load_data("digits").rows("mass")
    first, second, other = (fit_baselines(rows, (3,), seed)[0].log_prob(rows.test.double()) for seed in (0, 0, 1))
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
        "mixture of 2 factor analysers, 1 factor each",
        "kernel density, 4000 rows, width 0.22",
    }
    assert set(mass["name"]) == {
        "bits",
        "mixture of 2 Bernoullis",
        "kernel mass, 1439 rows, bits change with 0.106",
    }
    for frame, measure in ((density, "density of the data in its own units, 2 dimensions"), (mass, "mass on {0,1}^64")):
        assert set(frame["measure"]) == {measure}
        assert set(frame["rows"]) == {40}
        assert frame["log_marginal"].is_monotonic_decreasing
        assert frame["difference"].tolist() == pytest.approx(
            (frame["log_marginal"] - frame["log_marginal"][0]).tolist()
        )
        assert f"first 40 test rows; {measure}" in out
        assert (frame["low"] < frame["log_marginal"]).all()
        assert (frame["high"] > frame["log_marginal"]).all()
        estimated = ~frame["name"].str.match("mixture|kernel")
        assert frame["exact"].tolist() == (~estimated).tolist()
        assert set(frame["verdict"][estimated]) <= {"ok", "lower bound only"}
    for kind in ("density", "mass"):
        assert Path(f"comparison/{kind}.png").stat().st_size > 5000
        assert "\\toprule" in Path(f"comparison/{kind}.tex").read_text()
        assert set(pd.read_csv(f"comparison/{kind}-quality.csv")["rows"]) == {40}
    assert sorted(path.suffix for path in Path("comparison").iterdir()) == [".csv"] * 4 + [".png"] * 2 + [".tex"] * 2


def test_numbers_of_the_table_are_those_of_the_runs(runs):
    run(f"{runs}/a {runs}/mixture --K 30 --no-baseline --out tables --device cpu")
    frame = pd.read_csv("tables/density.csv").set_index("name")
    assert set(frame.index) == {"a", "mixture"}
    a, b = open_run(runs / "a"), open_run(runs / "mixture")
    x = a.rows().test
    theirs, exactly = score(a.model(), Batch(x), Scoring(30)), score(b.model(), Batch(x), Scoring(30))
    assert frame["log_marginal"]["a"] == pytest.approx(theirs.mean, abs=1e-12)
    assert frame["log_marginal"]["mixture"] == pytest.approx(exactly.mean, abs=1e-12)
    difference = theirs.estimate - exactly.estimate
    worse = frame["difference"].idxmin()
    assert abs(frame["difference"][worse]) == pytest.approx(abs(difference.mean().item()), abs=1e-12)
    assert frame["difference_error"][worse] == pytest.approx((difference.std() / math.sqrt(len(x))).item(), rel=1e-9)


def test_seeds_of_a_configuration_are_one_line_unless_told_not_to(runs, capsys):
    run(f"{runs}/a {runs}/mixture {runs}/a-2 {runs}/a-3 --K 30 --no-baseline --out pooled --device cpu")
    out = capsys.readouterr().out
    run(f"{runs}/a {runs}/mixture {runs}/a-2 {runs}/a-3 --K 30 --no-baseline --out singly --device cpu --no-pool")
    pooled, singly = (pd.read_csv(f"{out}/density.csv").set_index("name") for out in ("pooled", "singly"))
    assert set(pooled.index) == {"a (3 seeds)", "mixture"}
    assert set(singly.index) == {"a", "a-2", "a-3", "mixture"}
    means = singly["log_marginal"][["a", "a-2", "a-3"]]
    together = pooled.loc["a (3 seeds)"]
    assert together["log_marginal"] == pytest.approx(means.mean(), abs=1e-12)
    assert together["spread"] == pytest.approx(means.std(), rel=1e-9)
    assert [float(mean) for mean in together["seed_means"].split()] == pytest.approx(means.tolist())
    assert "seeds' sd" in out
    assert "seeds' sd" not in capsys.readouterr().out


def test_rows_are_loaded_once_for_all_runs_of_the_same_data(runs, monkeypatch):
    from pyrovae.runs import build

    loaded = []
    build_rows = build.build_rows
    monkeypatch.setattr(build, "build_rows", lambda c: loaded.append(c.data) or build_rows(c))
    run(f"{runs}/a {runs}/other/a {runs}/mixture {runs}/bits --K 2 --rows 9 --no-baseline")
    assert sorted(loaded) == ["digits", "three-gaussians"]


def test_repetitions_of_one_seed_are_not_pooled(runs):
    a, b, c, other = (open_run(runs / name) for name in ("a", "a-2", "a-3", "other/a"))
    assert pools([a, other, b, c]) == [[a, b, c], [other]]
    assert pools([a, b], pool=False) == [[a], [b]]
    b.recipe = b.recipe.settled(seed=a.recipe.seed)
    assert pools([a, b]) == [[a], [b]]
    # Where it ran, and how often it was measured.
    b.recipe = b.recipe.settled(seed=7, device="cuda", threads=1, eval_rows=3)
    assert pools([a, b]) == [[a, b]]
    b.recipe = b.recipe.settled(lr=0.5)
    assert pools([a, b]) == [[a], [b]]


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("iwae-s1", "iwae-s2"), "iwae"),
        (("digits", "digits-2", "digits-3"), "digits"),
        (("vae seed=10", "vae seed=11"), "vae"),
        (("iwae_K50_seed1", "iwae_K50_seed12"), "iwae_K50"),
        (("iwae-K51", "iwae-K52"), "iwae-K"),
        (("losses", "losses-2"), "losses"),
        (("x", "y"), ""),
    ],
)
def test_a_pool_is_called_what_its_names_begin_with(names, name):
    assert common_name(names) == name


def test_pools_have_names_of_their_own(runs):
    a, b, c, other = (open_run(runs / name) for name in ("a", "a-2", "a-3", "other/a"))
    assert name_pools([[a, b], [c]]) == ["a (2 seeds)", "a-3"]
    assert name_pools([[b, c], [a]]) == ["a (2 seeds)", "a"]
    assert name_pools([[a, b], [other, c]]) == [f"{runs}/a (2 seeds)", f"{runs}/other/a (2 seeds)"]


def test_an_invalid_model_is_shown_and_the_command_says_so(runs, capsys, monkeypatch):
    def broken(model, x, *_, **__):
        values = torch.zeros(len(x))
        values[4] = math.nan
        return exact(values)

    monkeypatch.setattr(comparison, "score", broken)
    code, message = fails(capsys, f"{runs}/a --K 5 --rows 9 --no-baseline")
    assert code == 4
    assert "invalid: a: log p(x) is not a finite number for 1 of 9 rows, the first being 4" in message
    assert pd.read_csv("comparison/density.csv")["verdict"].tolist() == ["invalid"]


def test_changed_data_is_refused(runs, capsys, tmp_path):
    """The same words for two contents: their hashes are named."""
    first, second = (open_run(runs / name) for name in ("a", "a-2"))
    second.recipe = second.recipe.settled(data_hash="f" * 64)
    with pytest.raises(UsageError, match=f"three-gaussians, hash {first.recipe.data_hash[:12]}.*hash ffffffffffff"):
        check_same_rows([first, second])


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
        ("", 2, "RUN: name the directory of a run"),
        ("{runs}/a {runs}/a", 2, "/a; leave one out"),
        ("{runs}/a {runs}/other/../a", 2, "the same directory is named twice"),
        ("{runs}/a {runs}/nowhere", 5, "no such run directory"),
        ("{runs}/a --K 0", 2, "--K"),
        ("{runs}/a --components 2 --no-baseline", 2, "--components: not used, since --no-baseline adds none"),
        ("{runs}/a --components 99999", 2, "none of [99999] components can be fit to 4000 rows"),
        ("{runs}/a --out {runs}/a/config.yaml", 2, "is a file; choose a directory"),
        ("{runs}/a --out {runs}/a", 2, "would write into the run"),
        ("{runs}/a --out {runs}/mixture/tables/new", 2, "would write into the run"),
        ("{runs}/other", 5, "not a run directory"),
        ("{runs}/other {runs}/a/config.yaml", 5, "none of the 2 named is a finished run; "),
    ],
)
def test_comparisons_that_make_no_sense(runs, capsys, words, code, message):
    found, text = fails(capsys, words.format(runs=runs))
    assert found == code
    assert message in text


def test_what_is_no_finished_run_is_named_and_left_out(runs, capsys, tmp_path):
    """Files, foreign folders, damaged and unfinished runs among runs/*: the rest is compared as if alone."""
    for name in ("damaged", "unfinished", "started"):
        shutil.copytree(runs / "a", tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoints").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("[")
    code, message = fails(capsys, f"{runs}/a --out broken/tables")
    assert (code, "would write into the run" in message) == (2, True)
    for path in (tmp_path / "damaged" / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    shutil.rmtree(tmp_path / "started" / "checkpoints")
    config = tmp_path / "unfinished" / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 9\n"))
    (tmp_path / "notes.txt").write_text("not a run")
    (tmp_path / "folder").mkdir()
    names = ["damaged", "folder", "notes.txt", "started", "unfinished"]
    run(f"{' '.join(names)} {runs}/a --K 5 --rows 9 --no-baseline --out tables")
    out = capsys.readouterr().out
    left_out = [line for line in out.splitlines() if line.startswith("note: left out: ")]
    assert [name for name, line in zip(names, left_out, strict=True) if name in line] == names
    assert "notes.txt: is a file" in left_out[2]
    assert "trained for 1 of 9 epochs so far; finish it with python -m pyrovae.fit --resume unfinished" in left_out[4]
    assert pd.read_csv("tables/density.csv")["name"].tolist() == ["a"]
    code, message = fails(capsys, "unfinished --K 5")
    assert code == 5
    assert "error: unfinished: trained for 1 of 9 epochs" in message
    code, message = fails(capsys, f"{runs}/a typo")
    assert code == 5
    assert "typo: no such run directory" in message


def test_tables_are_not_written_into_what_is_named_as_a_run(tmp_path):
    """Damaged as it may be: tables between its files would keep it from being replaced."""
    damaged = tmp_path / "run"
    damaged.mkdir()
    for out in (damaged, damaged / "deep" / "er"):
        assert run_around(out, [damaged]) == damaged.resolve()
    assert run_around(tmp_path / "beside", [damaged]) is None


def test_names_are_unique(runs):
    names = unique_names([open_run(runs / name) for name in ("a", "other/a", "mixture")])
    assert sorted(names.values()) == sorted([str(runs / "a"), str(runs / "other/a"), "mixture"])
