r"""Disentangling: how far each dimension of a code tells one factor of the data, and no other. Arrays in, scores out.

Codes z of N rows have Z dimensions, and the rows were made from F factors v of known values. Two matrices say most:

    I(z_d; v_f)    mutual information in nats, of z_d cut into bins of equal width over its range; at most H(v_f)
    R_df           importance of z_d to predict v_f, by a forest of trees that sees all of z

    MIG            mean over f of [largest over d of I(z_d; v_f) - second largest] / H(v_f)
    modularity     mean over d of 1 - sum_{f != f*} I(z_d; v_f)^2 / [(F - 1) I(z_d; v_f*)^2], f* the factor that z_d
                   tells most of
    SAP            mean over f of the gap between the two dimensions that predict v_f best by themselves: by a line,
                   R^2, where its values are in order, else by thresholds, balanced accuracy from chance (0) to 1
    DCI            disentanglement, mean over d of 1 - the entropy of R_d. over factors, by log F, weighted by its sum;
                   completeness, mean over f of 1 - the entropy of R_.f over dimensions, by log Z;
                   informativeness, mean over f of the forest's accuracy on other rows, 0 where it is that of guessing
                   the commonest value and 1 where it is perfect
    beta-VAE       accuracy of a linear classifier that names f from the mean of |z - z'| over pairs of rows with the
                   same v_f
    FactorVAE      accuracy of a majority vote which names f from the dimension whose variance is least, of that over
                   all rows, among rows with the same v_f

For codes that know nothing MIG, SAP and DCI are 0 and the last two 1/F, the chance to name f; modularity, of what
little bins find by chance, says nothing then. All are 1 for codes that are the factors themselves, in any order and at
any scale. What follows from the definitions, besides:

- A factor with more values than there are bins has an I(z; v) of at most log(bins), and a MIG below 1.
- Factors turned into one another by a rotation lose MIG, SAP and DCI, and may keep a beta-VAE and a FactorVAE score
  of 1.
- Codes that repeat a dimension have a MIG and SAP of 0 and an incomplete DCI, and lose nothing in the others.
- Codes that lack one factor of F have a FactorVAE score of about (F - 1)/F, and a beta-VAE score of 1: the missing
  factor is the one that is fixed when no dimension is.

Scores are of the codes that are given. Means of q(z|x) and draws from it, other factors, other bins are other scores.

`unsupervised` needs no factors. Of a Gaussian with the codes' covariance it has the total correlation,
TC = KL(N(m, S) || prod_d N(m_d, S_dd)) = -1/2 log det of the correlations, never below 0, and the mean mutual
information of pairs of dimensions; `udr` asks whether trainings from other seeds found the same dimensions.

References:
    Chen, Li, Grosse and Duvenaud 2018, Isolating Sources of Disentanglement (MIG), https://arxiv.org/abs/1802.04942
    Eastwood and Williams 2018, A Framework for the Quantitative Evaluation of Disentangled Representations (DCI)
    Kumar, Sattigeri and Balakrishnan 2018, Variational Inference of Disentangled Latent Concepts (SAP),
        https://arxiv.org/abs/1711.00848
    Higgins et al. 2017, beta-VAE
    Kim and Mnih 2018, Disentangling by Factorising, https://arxiv.org/abs/1802.05983
    Ridgeway and Mozer 2018, Learning Deep Disentangled Embeddings with the F-Statistic Loss (modularity),
        https://arxiv.org/abs/1802.05312
    Duan et al. 2020, Unsupervised Model Selection for Variational Disentangled Representation Learning (UDR),
        https://arxiv.org/abs/1905.12614
    Locatello et al. 2019, Challenging Common Assumptions, https://arxiv.org/abs/1811.12359
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pyrovae.errors import DataError, UsageError

BINS = 20
VOTES, TESTS = 10_000, 5_000  # that classifiers of the beta-VAE and FactorVAE scores are trained on, and tested on
ROWS_OF_A_VOTE = 64
TREES = 50


@dataclass(frozen=True)
class Supervised:
    """Scores of codes by known factors, each from 0 to 1; larger is better.

    Attributes:
        mig: The gap of each factor as a share of its entropy, shape (F,).
        modularity: Of active dimensions that tell anything.
        sap: The gap of each factor, shape (F,).
        disentanglement: Of DCI.
        completeness: Of DCI.
        informativeness: Of DCI, for each factor, shape (F,).
        beta_vae: An accuracy; chance is 1/F.
        factor_vae: Likewise.
        information: I(z_d; v_f) in nats, shape (Z, F).
        entropies: H(v_f) in nats, shape (F,).
    """

    mig: np.ndarray
    modularity: float
    sap: np.ndarray
    disentanglement: float
    completeness: float
    informativeness: np.ndarray
    beta_vae: float
    factor_vae: float
    information: np.ndarray
    entropies: np.ndarray


def supervised(
    codes: np.ndarray,
    factors: np.ndarray,
    ordered: Sequence[bool] | None = None,
    active: np.ndarray | None = None,
    bins: int = BINS,
    seed: int = 0,
) -> Supervised:
    """All scores by known factors.

    Args:
        codes: Shape (N, Z).
        factors: Whole numbers, shape (N, F), each factor of at least two values.
        ordered: Whether the values of each factor are in order; None: all are.
        active: Which dimensions take part in modularity and in the FactorVAE score, where one that is never used would
            count as much as any other, shape (Z,); None: all that vary.
        bins: Of each dimension, over its range.
        seed: Of the forest, of which rows it is tested on, and of votes.

    Raises:
        UsageError: fewer than two factors, one of a single value, or fewer rows than bins.
        DataError: codes that are not finite, or the same in all rows.
    """
    codes, factors = checked(codes, factors, bins)
    random = np.random.default_rng(seed)
    told = information(codes, factors, bins)
    h = entropies(factors)
    importance, informativeness = importances(codes, factors, random)
    varying = codes.std(0) > 0
    used = varying if active is None else varying & active
    ordered = [True] * factors.shape[1] if ordered is None else ordered
    return Supervised(
        mig=gaps(told) / h,
        modularity=modularity(told[used]),
        sap=gaps(separate_predictions(codes, factors, ordered)),
        disentanglement=disentanglement(importance),
        completeness=float(np.mean(1 - _entropy_shares(importance, 0))),
        informativeness=informativeness,
        beta_vae=beta_vae_score(codes, factors, random),
        factor_vae=factor_vae_score(codes[:, used], factors, random),
        information=told,
        entropies=h,
    )


def checked(codes: np.ndarray, factors: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Codes in double precision and factors as the numbers 0, 1, ... of values that occur.

    Raises:
        UsageError: fewer than two factors, one of a single value, or fewer rows than bins.
        DataError: codes that are not finite, or the same in all rows.
    """
    codes, factors = np.asarray(codes, float), np.asarray(factors)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise UsageError(
            f"codes, factors: expected shapes (N, Z) and (N, F), got {codes.shape} and {factors.shape}; give a row each"
        )
    if factors.shape[1] < 2:
        raise UsageError(f"factors: expected at least two, to be told apart, got {factors.shape[1]}; give more")
    if len(codes) < bins:
        raise UsageError(f"codes: {len(codes)} rows are fewer than {bins} bins; give more rows, or fewer bins")
    check_codes(codes)
    values = [np.unique(column, return_inverse=True) for column in factors.T]
    if (alone := [f for f, (found, _) in enumerate(values) if len(found) < 2]) != []:
        raise UsageError(f"factors: factor {alone[0]} has one value in all rows, so that nothing tells of it; leave it")
    return codes, np.stack([number for _, number in values], 1)


def check_codes(codes: np.ndarray) -> None:
    """Refuse codes that have no score.

    Raises:
        DataError: they are not finite, or the same in all rows.
    """
    if not np.isfinite(codes).all():
        raise DataError(f"codes: {int((~np.isfinite(codes)).any(1).sum())} rows are not finite; train anew")
    if not (np.ptp(codes, axis=0) > 0).any():
        raise DataError("codes: the same in all rows, a collapsed posterior, so that there is nothing to score")


def binned(codes: np.ndarray, bins: int) -> np.ndarray:
    """The number of each code's bin, of equal width over the range of its dimension; a constant one is in one bin."""
    low, width = codes.min(0), np.ptp(codes, axis=0)
    return np.minimum((bins * ((codes - low) / np.where(width > 0, width, 1))).astype(int), bins - 1)


def information(codes: np.ndarray, factors: np.ndarray, bins: int = BINS) -> np.ndarray:
    """I(z_d; v_f) in nats, shape (Z, F), of codes in bins.

    It is too high by about (bins - 1) (values - 1) / 2N in dimensions that tell nothing, alike in all of them.
    """
    from sklearn.metrics import mutual_info_score

    of_codes = binned(codes, bins).T
    return np.array([[mutual_info_score(f, z) for f in factors.T] for z in of_codes]).clip(min=0)


def entropies(factors: np.ndarray) -> np.ndarray:
    """H(v_f) in nats, shape (F,)."""
    shares = [np.unique(f, return_counts=True)[1] / len(f) for f in factors.T]
    return np.array([-(p * np.log(p)).sum() for p in shares])


def gaps(scores: np.ndarray) -> np.ndarray:
    """What the best dimension has more than the second best, from shape (Z, F) to (F,)."""
    best = np.sort(np.vstack([scores, np.zeros_like(scores[:1])]), axis=0)  # the second of a single dimension has 0
    return best[-1] - best[-2]


def modularity(told: np.ndarray) -> float:
    """Mean over the dimensions that tell anything, from I(z_d; v_f) of shape (Z, F)."""
    told = told[told.max(1, initial=0) > 0]
    most = told.max(1)
    others = (told**2).sum(1) - most**2
    return float(np.mean(1 - others / (most**2 * (told.shape[1] - 1)))) if len(told) else 0.0


def separate_predictions(codes: np.ndarray, factors: np.ndarray, ordered: Sequence[bool]) -> np.ndarray:
    """How well each dimension alone predicts each factor, shape (Z, F): see SAP in the module's docstring."""
    from sklearn.tree import DecisionTreeClassifier

    found = np.zeros((codes.shape[1], factors.shape[1]))
    for d, z in enumerate(codes.T):
        for f, v in enumerate(factors.T):
            if z.std() == 0:
                continue
            if ordered[f]:
                found[d, f] = np.corrcoef(z, v)[0, 1] ** 2
                continue
            values = v.max() + 1
            tree = DecisionTreeClassifier(max_leaf_nodes=values, class_weight="balanced", random_state=0)
            right = tree.fit(z[:, None], v).predict(z[:, None]) == v
            accuracy = np.mean([right[v == value].mean() for value in range(values)])
            found[d, f] = (accuracy - 1 / values) / (1 - 1 / values)
    return found


def importances(codes: np.ndarray, factors: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """R_df, shape (Z, F), from half of the rows, and informativeness on the others, shape (F,)."""
    from sklearn.ensemble import RandomForestClassifier

    order = random.permutation(len(codes))
    train, test = np.array_split(order, 2)
    importance, informativeness = np.zeros((codes.shape[1], factors.shape[1])), np.zeros(factors.shape[1])
    for f, v in enumerate(factors.T):
        # Each split may take any dimension, so that one which tells nothing is never taken for want of another.
        forest = RandomForestClassifier(TREES, max_features=None, random_state=int(random.integers(2**31)))
        forest.fit(codes[train], v[train])
        importance[:, f] = forest.feature_importances_
        guessed = (v[test] == np.bincount(v[train]).argmax()).mean()
        accuracy = forest.score(codes[test], v[test])
        informativeness[f] = max(0.0, (accuracy - guessed) / (1 - guessed)) if guessed < 1 else 0.0
    return importance, informativeness


def disentanglement(importance: np.ndarray) -> float:
    """Of DCI, from R of shape (Z, F)."""
    weights = importance.sum(1)
    return float(((1 - _entropy_shares(importance, 1)) * weights).sum() / weights.sum())


def _entropy_shares(importance: np.ndarray, axis: int) -> np.ndarray:
    """The entropy of shares along an axis, divided by its largest value; 1 where there is nothing to share."""
    total, count = importance.sum(axis, keepdims=True), importance.shape[axis]
    shares = np.where(total > 0, importance / np.where(total > 0, total, 1), 1 / count)
    logs = np.log(np.where(shares > 0, shares, 1))
    entropy = -(shares * logs).sum(axis)
    return entropy / math.log(count) if count > 1 else np.zeros_like(entropy)


class _Alike:
    """Draws of rows that have the same value of a factor."""

    def __init__(self, factor: np.ndarray, random: np.random.Generator) -> None:
        self.factor, self.random = factor, random
        self.order = np.argsort(factor, kind="stable")
        self.count = np.bincount(factor)
        self.start = np.cumsum(self.count) - self.count

    def draw(self, values: np.ndarray) -> np.ndarray:
        """A row for each value, uniformly among those that have it."""
        return self.order[self.start[values] + self.random.integers(self.count[values])]

    def value(self, shape: tuple[int, ...]) -> np.ndarray:
        """Values, as often as rows have them."""
        return self.factor[self.random.integers(len(self.factor), size=shape)]


def beta_vae_score(codes: np.ndarray, factors: np.ndarray, random: np.random.Generator) -> float:
    """The accuracy of a linear classifier that names the factor which pairs of rows have in common.

    Codes are divided by their standard deviations, so that the score does not depend on their scale.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    z = codes / np.where(codes.std(0) > 0, codes.std(0), 1)
    asked = random.integers(factors.shape[1], size=VOTES + TESTS)
    differences = np.empty((len(asked), z.shape[1]))
    for f, factor in enumerate(factors.T):
        alike, of_f = _Alike(factor, random), np.flatnonzero(asked == f)
        for part in np.array_split(of_f, 10):
            values = alike.value((len(part), ROWS_OF_A_VOTE))
            differences[part] = abs(z[alike.draw(values)] - z[alike.draw(values)]).mean(1)
    scaled = StandardScaler().fit_transform(differences)
    classifier = LogisticRegression(max_iter=500).fit(scaled[:VOTES], asked[:VOTES])
    return float(classifier.score(scaled[VOTES:], asked[VOTES:]))


def factor_vae_score(codes: np.ndarray, factors: np.ndarray, random: np.random.Generator) -> float:
    """The accuracy of a majority vote that names the factor which some rows have in common.

    Args:
        codes: Shape (N, Z), of dimensions that vary; without any the score is chance.
        factors: Shape (N, F).
        random: Of the draws.
    """
    number = factors.shape[1]
    if not codes.shape[1]:
        return 1 / number
    z = codes / codes.std(0)
    asked = random.integers(number, size=VOTES + TESTS)
    least = np.empty(len(asked), int)
    for f, factor in enumerate(factors.T):
        alike, of_f = _Alike(factor, random), np.flatnonzero(asked == f)
        for part in np.array_split(of_f, 10):
            values = np.repeat(alike.value((len(part), 1)), ROWS_OF_A_VOTE, 1)
            least[part] = z[alike.draw(values)].var(1).argmin(1)
    votes = np.zeros((z.shape[1], number))
    np.add.at(votes, (least[:VOTES], asked[:VOTES]), 1)
    return float((votes.argmax(1)[least[VOTES:]] == asked[VOTES:]).mean())


@dataclass(frozen=True)
class Unsupervised:
    """Scores of codes by themselves, in nats; smaller is nearer to independent.

    Attributes:
        total_correlation: Of a Gaussian with the codes' covariance; infinite where a dimension is a sum of others.
        mutual_information: The mean over pairs of dimensions, both in bins; 0 for a single dimension.
        dimensions: How many take part: those that vary.
    """

    total_correlation: float
    mutual_information: float
    dimensions: int


def unsupervised(codes: np.ndarray, bins: int = BINS) -> Unsupervised:
    """Total correlation and mutual information of dimensions.

    Args:
        codes: Shape (N, Z); dimensions that are the same in all rows take no part.
        bins: Of each dimension, over its range.

    Raises:
        DataError: codes that are not finite, or the same in all rows.
    """
    from sklearn.metrics import mutual_info_score

    codes = np.asarray(codes, float)
    check_codes(codes)
    codes = codes[:, codes.std(0) > 0]
    correlations = np.atleast_2d(np.corrcoef(codes, rowvar=False))
    logarithm = np.linalg.slogdet(correlations)[1]
    pairs = [mutual_info_score(a, b) for a, b in combinations(binned(codes, bins).T, 2)]
    tc = max(0.0, -float(logarithm) / 2)  # below 0 by rounding alone
    return Unsupervised(tc, float(np.mean(pairs)) if pairs else 0.0, codes.shape[1])


def udr(codes: Sequence[np.ndarray], active: Sequence[np.ndarray]) -> list[float]:
    r"""How far trainings from other seeds found the same dimensions: the median over the other runs of

        1 / (Z_i + Z_j) [sum_b max_a R_ab^2 / sum_a R_ab + sum_a max_b R_ab^2 / sum_b R_ab]

    with R_ab the absolute rank correlation (Spearman's) of dimension a of one run and b of the other, over the same
    rows. It is 1 where each has exactly one partner, in any order and sign. Sums are over active dimensions, Z_i and
    Z_j of them; where there are none, the pair has 0.

    Args:
        codes: Of each run, shape (N, Z), of the same rows.
        active: Which dimensions of each run are used, shape (Z,).

    Raises:
        UsageError: fewer than two runs, or of other numbers of rows.
    """
    from scipy.stats import rankdata

    if len(codes) < 2 or len({len(z) for z in codes}) > 1:
        raise UsageError(f"codes: expected those of the same rows under at least two runs, got {len(codes)}")
    ranks = [rankdata(z[:, used], axis=0) for z, used in zip(codes, active, strict=True)]
    normal = [(r - r.mean(0)) / np.where(r.std(0) > 0, r.std(0), 1) for r in ranks]
    pairs = np.full((len(codes), len(codes)), np.nan)
    for i, j in combinations(range(len(codes)), 2):
        pairs[i, j] = pairs[j, i] = _alike(abs(normal[i].T @ normal[j]) / len(normal[i]))
    return [float(value) for value in np.nanmedian(pairs, axis=1)]


def _alike(correlations: np.ndarray) -> float:
    """`udr` of a pair of runs, from R of their active dimensions."""
    if 0 in correlations.shape:
        return 0.0
    total = 0.0
    for axis in (0, 1):
        sums = correlations.sum(axis)
        total += float((correlations.max(axis) ** 2 / np.where(sums > 0, sums, 1)).sum())
    return total / sum(correlations.shape)
