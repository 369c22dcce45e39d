r"""p(y|x) by Bayes from a conditional pair, and what it is worth, where both are known.

`linear_pair` has log p(x|y) in closed form, so that p(y|x) and p(x) are exact.
"""

import itertools
import math

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss
from test_conditional import C, Closed, Z, linear_pair
from torch import Tensor
from torch.nn.functional import one_hot
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import calibration, classify, clustering_accuracy
from pyrovae.models import ConditionalVAE

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
CLASSES = torch.eye(C, dtype=torch.float64)


def known(closed: Closed, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the model, their labels, and their exact log p(x|y), (N, C)."""
    labels = torch.multinomial(PRIOR.exp(), rows, replacement=True)
    y = one_hot(labels, C).double()
    x = (
        closed.mean(y)
        + torch.randn(rows, len(closed.b), dtype=torch.float64) @ torch.linalg.cholesky(closed.covariance).T
    )
    each = torch.stack([closed.log_marginal(x, c.expand(rows, C)) for c in CLASSES], 1)
    return x, labels, each


def overlapping() -> ConditionalVAE:
    """A pair whose classes are not far apart."""
    pair = linear_pair()
    with torch.no_grad():
        pair.likelihood.decoder.body[1].weight[:, Z:] *= 0.3
        pair.prior.conditional.head.weight[:Z] *= 0.3
    return pair


def nearly_exact(pair: ConditionalVAE, closed: Closed) -> None:
    """A guide wider than the posterior, whose draws have an error."""
    closed.make_exact(pair)
    with torch.no_grad():
        pair.encoder.head.bias[Z : 2 * Z] += 0.7


def test_with_the_posterior_as_guide_p_of_y_given_x_is_exact():
    pair = linear_pair()
    closed = Closed(pair)
    closed.make_exact(pair)
    x, _, each = known(closed, 20)
    found = classify(pair.model, pair.guide, x, CLASSES, PRIOR, 30, seed=0)
    assert_close(found.log_probability, (PRIOR + each).log_softmax(1), rtol=0.0, atol=1e-8)
    assert_close(found.log_marginal, torch.logsumexp(PRIOR + each, 1), rtol=0.0, atol=1e-8)
    assert found.probability_error.max() < 1e-7
    assert found.log_marginal_error.max() < 1e-7
    alike = classify(pair.model, pair.guide, x, CLASSES, num_particles=30, seed=0)
    assert_close(alike.log_probability, each.log_softmax(1), rtol=0.0, atol=1e-8)


def test_the_error_of_p_of_y_given_x_is_the_spread_over_draws():
    """Over 20 seeds the errors of p(y|x) and log p(x) have the sizes that are stated."""
    pair = overlapping()
    closed = Closed(pair)
    nearly_exact(pair, closed)
    x, _, each = known(closed, 30)
    wanted, total = (PRIOR + each).softmax(1), torch.logsumexp(PRIOR + each, 1)
    away, of_total = [], []
    for seed in range(20):
        found = classify(pair.model, pair.guide, x, CLASSES, PRIOR, 200, seed=seed)
        away.append((found.probability - wanted) / found.probability_error.clamp(min=1e-12))
        of_total.append((found.log_marginal - total) / found.log_marginal_error)
    open_rows = wanted.max(1).values < 0.99  # elsewhere p(y|x) is 1 to the last digit
    assert open_rows.sum() >= 10, "no power"
    spread = torch.stack(away)[:, open_rows].square().mean().sqrt()
    assert 0.7 < spread < 1.5, spread
    assert 0.7 < torch.stack(of_total).square().mean().sqrt() < 1.5


def test_rows_that_cannot_be_decided_and_classes_that_are_missed_are_said():
    pair = linear_pair()
    closed = Closed(pair)
    closed.make_exact(pair)
    x, _, _ = known(closed, 12)
    exact = classify(pair.model, pair.guide, x, CLASSES, PRIOR, 100, seed=0)
    assert not exact.undecided.any()
    assert not exact.unreliable.any()
    assert {v.kind for v in exact.verdicts() if v is not None} == {"ok"}
    with torch.no_grad():  # of the last class the guide is far away, and narrow
        pair.encoder.head.weight[:2, -1] += 8.0
    missed = classify(pair.model, pair.guide, x, CLASSES, PRIOR, 100, seed=0)
    assert missed.unreliable[:, -1].all()
    assert not missed.unreliable[:, 0].any()


def test_arguments_that_make_no_sense_are_refused():
    pair = linear_pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    for prior in (torch.zeros(C + 1), torch.full((C,), -math.inf)):
        with pytest.raises(UsageError, match="log_prior: expected 3 numbers"):
            classify(pair.model, pair.guide, x, CLASSES, prior, 5)
    log_p = torch.zeros(4, 3).log_softmax(1)
    with pytest.raises(UsageError, match="labels: expected one for each row"):
        calibration(log_p, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UsageError, match="labels: expected numbers from 0 to 2, got 3"):
        calibration(log_p, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(UsageError, match="do not sum to 1"):
        calibration(log_p + 1, torch.zeros(4, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# What it is worth


def probabilities(rows: int, sure: float = 1.0) -> Tensor:
    """log p(y|x) of 4 classes, more or less sure."""
    return (sure * 2 * torch.randn(rows, 4, dtype=torch.float64)).log_softmax(1)


def test_what_is_calibrated_is_found_to_be_and_what_is_too_sure_is_not():
    """Labels drawn from p: ECE as of calibrated ones. The same labels under sharpened p, and under flattened: above."""
    log_p = probabilities(4000)
    labels = torch.multinomial(log_p.exp(), 1).squeeze(1)
    right = calibration(log_p, labels)
    assert right.ece.value < right.calibrated_ece
    for each in right.bins:
        if each.rows > 20:
            assert abs(each.accuracy.value - each.confidence) < 4 * math.sqrt(0.25 / each.rows)
    for power in (2.0, 0.5):
        wrong = calibration((power * log_p).log_softmax(1), labels)
        assert wrong.ece.low > wrong.calibrated_ece
        assert wrong.accuracy == right.accuracy
        assert wrong.log_loss.value > right.log_loss.value
        assert wrong.brier.value > right.brier.value
    too_sure = calibration((2 * log_p).log_softmax(1), labels)
    full = [each for each in too_sure.bins if each.rows > 200]
    assert len(full) >= 3
    assert all(each.accuracy.high < each.confidence for each in full)


def test_calibrated_probabilities_are_rarely_said_to_be_none():
    """The stated limit of ECE is passed by about 5 of 100 calibrated constructions."""
    log_p = probabilities(150)
    above = 0
    for _ in range(60):
        found = calibration(log_p, torch.multinomial(log_p.exp(), 1).squeeze(1))
        above += found.ece.value > found.calibrated_ece
    assert above <= 9  # of a binomial with p = 0.05: with probability 1 - 1e-3


def test_scores_are_those_of_a_library_and_of_a_loop():
    log_p = probabilities(300, 0.7)
    labels = torch.multinomial(log_p.exp(), 1).squeeze(1)
    found = calibration(log_p, labels, bins=7)
    assert found.log_loss.value == pytest.approx(log_loss(labels, log_p.exp(), labels=range(4)))
    of_each = [brier_score_loss(labels == c, log_p.exp()[:, c]) for c in range(4)]
    assert found.brier.value == pytest.approx(sum(of_each))
    right = (log_p.argmax(1) == labels).sum().item()
    interval = binomtest(right, 300).proportion_ci(method="wilson")
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    total = 0.0
    for i in range(7):
        rows = [n for n in range(300) if i / 7 <= log_p[n].exp().max() < (i + 1) / 7]
        if rows:
            confidence = sum(log_p[n].exp().max().item() for n in rows)
            total += abs(sum(int(log_p[n].argmax() == labels[n]) for n in rows) - confidence) / 300
    assert found.ece.value == pytest.approx(total)


def test_clusters_are_named_for_the_labels_that_they_are_best_at():
    labels = torch.randint(4, (200,))
    clusters = (labels + 1) % 4
    assert clustering_accuracy(clusters, labels).value == 1.0
    clusters = torch.where(torch.rand(200) < 0.4, torch.randint(4, (200,)), clusters)
    best = max(
        (torch.tensor(order)[clusters] == labels).double().mean().item() for order in itertools.permutations(range(4))
    )
    assert clustering_accuracy(clusters, labels).value == best
    halves = labels * 2 + torch.arange(200) % 2  # two clusters of each label: one of them stands for it
    larger = sum(max((halves == 2 * c).sum().item(), (halves == 2 * c + 1).sum().item()) for c in range(4))
    assert clustering_accuracy(halves, labels).value == larger / 200
