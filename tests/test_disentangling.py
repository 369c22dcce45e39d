"""Scores of disentangling on codes whose score is known."""

import math

import numpy as np
import pytest
from scipy.linalg import hadamard

from pyrovae.errors import DataError, UsageError
from pyrovae.quality import disentangling
from pyrovae.quality.disentangling import (
    entropies,
    factor_vae_score,
    gaps,
    information,
    modularity,
    separate_predictions,
    supervised,
    udr,
    unsupervised,
)

SIZES = (3, 4, 5, 6)
FACTORS = np.stack(np.unravel_index(np.arange(math.prod(SIZES)), SIZES), 1)  # each combination once: independent
ORDERED = (False, True, True, True)
CENTRED = (FACTORS - FACTORS.mean(0)) / FACTORS.std(0)
MEANS = ("mig", "sap", "informativeness")


@pytest.fixture(autouse=True)
def _few_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentangling, "VOTES", 800)
    monkeypatch.setattr(disentangling, "TESTS", 400)
    monkeypatch.setattr(disentangling, "TREES", 10)


def scores(codes: np.ndarray, **settings) -> dict[str, float]:
    found = supervised(codes, FACTORS, ORDERED, **settings)
    names = (*MEANS, "disentanglement", "completeness", "modularity", "beta_vae", "factor_vae")
    return {name: float(np.mean(getattr(found, name))) for name in names}


@pytest.mark.parametrize(
    "codes", [FACTORS, FACTORS[:, [2, 0, 3, 1]] * [-0.1, 3, 700, 1] + 5], ids=["factors", "permuted and scaled"]
)
def test_codes_that_are_the_factors_have_the_best_score(codes: np.ndarray) -> None:
    found = scores(codes)
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-9)
    assert unsupervised(codes).total_correlation == pytest.approx(0, abs=1e-12)
    assert unsupervised(codes).mutual_information == pytest.approx(0, abs=1e-12)


def test_a_rotation_of_the_factors_takes_the_scores_of_single_dimensions() -> None:
    """The rotation that spreads each factor over all dimensions alike: what a linear classifier sees stays."""
    found = scores(CENTRED @ hadamard(4) / 2)
    assert found["mig"] < 0.1 > found["sap"]
    assert found["disentanglement"] < 0.2 > found["completeness"]
    assert found["modularity"] < 0.6


def test_noise_tells_nothing() -> None:
    random = np.random.default_rng(1)
    found = scores(random.standard_normal((len(FACTORS), 5)))
    for name in ("mig", "sap", "disentanglement", "completeness", "informativeness"):
        assert abs(found[name]) < 0.1, name
    for name in ("beta_vae", "factor_vae"):  # chance is 1/4, of 400 votes
        assert abs(found[name] - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400) + 0.05, name


def test_codes_that_repeat_themselves_lose_what_asks_for_one_dimension_of_each_factor() -> None:
    found = scores(np.hstack([FACTORS, FACTORS]))
    assert found["mig"] == pytest.approx(0, abs=1e-9) == found["sap"]
    assert found["completeness"] < 0.9
    for name in ("disentanglement", "informativeness", "modularity", "beta_vae", "factor_vae"):
        assert found[name] == pytest.approx(1, abs=1e-9), name
    assert unsupervised(np.hstack([FACTORS, FACTORS])).total_correlation == math.inf


def test_codes_that_lack_a_factor() -> None:
    """They lose its share of MIG and SAP, and its votes; the beta-VAE score does not see it."""
    found = scores(FACTORS[:, 1:])
    assert found["mig"] == pytest.approx(0.75, abs=1e-9)
    assert found["sap"] == pytest.approx(0.75, abs=1e-9)
    assert abs(found["factor_vae"] - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 400)
    assert found["beta_vae"] > 0.99
    assert found["modularity"] == pytest.approx(1, abs=1e-9)


def test_dimensions_that_are_never_used_do_not_vote() -> None:
    """Given which are, a dimension without a meaning changes neither votes nor modularity."""
    random = np.random.default_rng(2)
    with_noise = np.hstack([FACTORS, 1e-3 * random.standard_normal((len(FACTORS), 2))])
    used = np.array([True] * 4 + [False] * 2)
    assert scores(with_noise, active=used)["factor_vae"] == 1 == scores(with_noise, active=used)["modularity"]
    assert scores(with_noise)["modularity"] < 0.95
    assert factor_vae_score(FACTORS[:, :0], FACTORS, random) == 0.25  # none is used: chance


def test_the_vote_does_not_depend_on_the_scale_of_a_dimension() -> None:
    noisy = CENTRED + np.random.default_rng(5).standard_normal(CENTRED.shape) / 2
    scaled = noisy * [1, 100, 0.01, 4]  # the same draws of rows: the same votes
    got = [factor_vae_score(codes, FACTORS, np.random.default_rng(6)) for codes in (noisy, scaled)]
    assert 0.4 < got[0] == got[1]


def test_the_matrix_of_information_is_that_of_its_definition() -> None:
    """By the joint distribution, written out; in bins no code tells more than the logarithm of their number."""
    random = np.random.default_rng(3)
    v = random.integers(3, size=(500, 1))
    z = v + random.standard_normal((500, 1))
    got = information(z, v, 7)[0, 0]
    edges = np.linspace(z.min(), z.max(), 8)
    joint = np.histogram2d(z[:, 0], v[:, 0], [edges, [-0.5, 0.5, 1.5, 2.5]])[0] / 500
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert got == pytest.approx((joint * np.log(np.where(joint > 0, joint / product, 1))).sum(), abs=1e-10)
    assert entropies(FACTORS) == pytest.approx(np.log(SIZES), abs=1e-12)
    many = np.arange(600)[:, None] // 10  # 60 values, 20 bins
    told = information(many, many, 20)[0, 0]
    assert told == pytest.approx(np.log(20), abs=1e-9) != entropies(many)[0]


def test_gaps_and_modularity_of_a_matrix() -> None:
    told = np.array([[0.9, 0.0], [0.4, 0.2], [0.0, 0.0]])
    assert gaps(told) == pytest.approx([0.5, 0.2])
    assert gaps(told[:1]) == pytest.approx([0.9, 0.0])  # there is no second dimension
    assert modularity(told) == pytest.approx((1 + 1 - 0.25) / 2)


def test_separate_predictions_of_ordered_factors_and_of_others() -> None:
    """A line cannot tell values in no order apart which thresholds can."""
    z = np.array([1, 0, 2])[FACTORS[:, 0]][:, None].astype(float)
    assert separate_predictions(z, FACTORS[:, :1], [False]) == pytest.approx(1)
    assert separate_predictions(z, FACTORS[:, :1], [True]) == pytest.approx(
        np.corrcoef([1, 0, 2], [0, 1, 2])[0, 1] ** 2
    )


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_total_correlation_of_a_gaussian_is_known(rho: float) -> None:
    """-1/2 log(1 - rho^2) for a pair, to 2 % or the error of 100,000 rows; never below 0."""
    random = np.random.default_rng(4)
    z = random.standard_normal((100_000, 3))
    z[:, 1] = rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]
    exact = -0.5 * math.log(1 - rho**2)
    found = unsupervised(z * [1, -20, 0.3] + 4)
    assert 0 <= found.total_correlation == pytest.approx(exact, rel=0.02, abs=2e-4)
    few = unsupervised(random.standard_normal((40, 8)))
    assert few.total_correlation > 0
    assert unsupervised(np.hstack([z, np.ones((100_000, 1))])).dimensions == 3


def test_udr_is_one_for_the_same_dimensions_in_another_order() -> None:
    z = CENTRED
    other = -np.exp(z[:, [1, 3, 0, 2]])  # monotone: ranks are the same, or turned round
    every = np.ones(4, bool)
    assert udr([z, other], [every, every]) == pytest.approx([1, 1])
    mixed = z @ hadamard(4) / 2
    assert udr([z, mixed], [every, every])[0] < 0.4
    assert udr([z, other, mixed], [every] * 3)[0] == pytest.approx((1 + udr([z, mixed], [every, every])[0]) / 2)
    assert udr([z, other], [every, ~every]) == [0, 0]
    by_hand = (0.25 / 0.5 + 1 / 1.5 + 0.25 / 1 + 1 / 1) / 4  # columns, then rows
    assert disentangling._alike(np.array([[0.5, 0.5], [0.0, 1.0]])) == pytest.approx(by_hand)


def test_what_has_no_score_is_refused_in_a_line() -> None:
    for codes, factors, error, message in (
        (FACTORS, FACTORS[:, :1], UsageError, "factors: expected at least two, to be told apart, got 1"),
        (FACTORS, np.hstack([FACTORS, 0 * FACTORS[:, :1]]), UsageError, "factor 4 has one value in all rows"),
        (FACTORS[:19], FACTORS[:19], UsageError, "19 rows are fewer than 20 bins"),
        (0 * FACTORS + 1, FACTORS, DataError, "the same in all rows, a collapsed posterior"),
        (np.where(FACTORS == 5, np.inf, FACTORS), FACTORS, DataError, "rows are not finite"),
        (FACTORS[:50], FACTORS, UsageError, r"got \(50, 4\) and \(360, 4\)"),
    ):
        with pytest.raises(error, match=message):
            supervised(codes, factors)
    with pytest.raises(UsageError, match="at least two runs, got 1"):
        udr([FACTORS], [np.ones(4, bool)])
