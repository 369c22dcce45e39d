r"""How good probabilities p(y|x) of classes are, against the labels of rows: right or wrong, and how surely.

    accuracy      share of rows whose most probable class is their label; its interval is Wilson's
    log loss      mean of -log p(label|x), in nats: 0 is best
    Brier         mean of sum_c (p_c - [c is the label])^2, from 0 to 2: 0 is best
    ECE           expected calibration error, sum_b (n_b / N) |accuracy_b - confidence_b|, over bins b of the confidence
                  max_c p_c in equal steps; from 0 to 1

Where the classes said to have probability p are right in a share p of rows, the probabilities are calibrated. The ECE
of finitely many rows is above 0 all the same, as a mean of absolute values: so the one that calibrated probabilities of
the same confidences would have is said beside it, by labels drawn from them.

References:
    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
    Broecker and Smith 2007, Increasing the Reliability of Reliability Diagrams, https://doi.org/10.1175/WAF993.1
    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.inference.bootstrap import MOST_AT_ONCE, ends, means
from pyrovae.seeding import seeded

Z95 = 1.959964
# Sets of labels drawn of calibrated probabilities, and of rows by the bootstrap.
DRAWN, RESAMPLES = 1000, 2000


@dataclass(frozen=True)
class Measured:
    """A mean over rows.

    Attributes:
        value: It.
        low, high: Its 95% interval, for other rows of the kind.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Rows of about one confidence.

    Attributes:
        low, high: The confidences it has.
        rows: How many.
        confidence: Their mean max_c p_c.
        accuracy: The share that is right, with its interval; NaN without rows.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: Measured


@dataclass(frozen=True)
class Calibration:
    """What p(y|x) is worth.

    Attributes:
        accuracy, log_loss, brier, ece: See the module; of `ece` the interval is the bootstrap's, which is above 0.
        calibrated_ece: What ECE calibrated probabilities of the same confidences stay below, in 95 of 100 cases.
        bins: The reliability table.
        rows: N.
    """

    accuracy: Measured
    log_loss: Measured
    brier: Measured
    ece: Measured
    calibrated_ece: float
    bins: tuple[Bin, ...]
    rows: int


def calibration(log_probability: Tensor, labels: Tensor, bins: int = 10, seed: int = 0) -> Calibration:
    """Measure probabilities of classes against labels.

    Args:
        log_probability: log p(y|x) in nats, shape (N, C), normalised.
        labels: The class of each row, whole numbers from 0 to C - 1, shape (N,).
        bins: Of the confidence, in equal steps from 0 to 1.
        seed: Of the bootstrap.

    Raises:
        UsageError: the shapes differ, a label is none of the classes, or a row's probabilities do not sum to 1.
    """
    check_count("bins", bins)
    log_p, labels = log_probability.detach().double().cpu(), labels.cpu()
    if log_p.ndim != 2 or labels.shape != log_p.shape[:1] or not len(labels):
        raise UsageError(
            f"labels: expected one for each row of log_probability, shape (N, C), got {tuple(labels.shape)} and "
            f"{tuple(log_p.shape)}"
        )
    if labels.min() < 0 or labels.max() >= log_p.shape[1]:
        raise UsageError(f"labels: expected numbers from 0 to {log_p.shape[1] - 1}, got {labels.max().item()}")
    if not torch.allclose(log_p.logsumexp(1), torch.zeros(len(log_p), dtype=log_p.dtype), atol=1e-4):
        raise UsageError("log_probability: the probabilities of some row do not sum to 1; pass log_softmax(1)")
    p, hits = log_p.exp(), torch.nn.functional.one_hot(labels, log_p.shape[1]).double()
    confidence, chosen = p.max(1)
    right = (chosen == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    members = torch.nn.functional.one_hot(which, bins).double().T  # (bins, N)
    ece = (members * (right - confidence)).mean(1).abs().sum().item()
    of_rows = torch.stack([-log_p.gather(1, labels.unsqueeze(1)).squeeze(1), (p - hits).square().sum(1)])
    drawn = means(torch.cat([of_rows, members * (right - confidence)]), RESAMPLES, seed)
    scores = torch.cat([drawn[:, :2], drawn[:, 2:].abs().sum(1, keepdim=True)], 1)
    values = [*of_rows.mean(1).tolist(), ece]
    log_loss, brier, error = (Measured(*each) for each in zip(values, *ends(scores), strict=True))
    return Calibration(
        share(right),
        log_loss,
        brier,
        error,
        ece_if_calibrated(confidence, members, seed),
        tuple(bin_of(i, bins, confidence[which == i], right[which == i]) for i in range(bins)),
        len(labels),
    )


def share(right: Tensor) -> Measured:
    """The mean of zeros and ones (N,) with Wilson's interval; NaN without any."""
    n = len(right)
    if not n:
        return Measured(math.nan, math.nan, math.nan)
    p, z = right.double().mean().item(), Z95**2 / n
    centre, half = (p + z / 2) / (1 + z), math.sqrt(z * (p * (1 - p) + z / 4)) / (1 + z)
    return Measured(p, max(0.0, centre - half), min(1.0, centre + half))


def bin_of(i: int, bins: int, confidence: Tensor, right: Tensor) -> Bin:
    """One line of the reliability table."""
    mean = confidence.mean().item() if len(confidence) else math.nan
    return Bin(i / bins, (i + 1) / bins, len(confidence), mean, share(right))


def ece_if_calibrated(confidence: Tensor, members: Tensor, seed: int) -> float:
    """The 95% quantile of the ECE where each row's most probable class is right with probability `confidence`."""
    found = torch.empty(DRAWN, dtype=torch.float64)
    with seeded(seed, "calibrated"):
        for block in found.split(max(1, MOST_AT_ONCE // len(confidence))):
            right = torch.rand(len(block), len(confidence), dtype=torch.float64) < confidence
            block.copy_(((right.double() - confidence) @ members.T).abs().sum(1) / len(confidence))
    return found.quantile(0.95).item()


def matching(clusters: Tensor, labels: Tensor) -> dict[int, int]:
    """Which label each cluster stands for: one for one, so that most rows are right (the Hungarian method).

    Args:
        clusters: The cluster of each row, whole numbers, shape (N,).
        labels: Their labels, whole numbers, shape (N,).

    Returns:
        {cluster: label}; of more clusters than labels those that are left out stand for none.
    """
    from scipy.optimize import linear_sum_assignment

    found, of_rows = clusters.unique(return_inverse=True)
    known, of_labels = labels.unique(return_inverse=True)
    counts = torch.zeros(len(found), len(known), dtype=torch.long)
    counts.index_put_((of_rows.cpu(), of_labels.cpu()), torch.ones(len(labels), dtype=torch.long), accumulate=True)
    at, to = linear_sum_assignment(counts.numpy(), maximize=True)
    return {int(found[i]): int(known[j]) for i, j in zip(at, to, strict=True)}


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> Measured:
    """The share of rows whose cluster stands for their label, by the best `matching` to these same labels."""
    stands_for = matching(clusters, labels)
    named = torch.tensor([stands_for.get(int(cluster), -1) for cluster in clusters.tolist()])
    return share((named == labels.cpu()).double())
