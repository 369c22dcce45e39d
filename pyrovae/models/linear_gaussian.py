r"""Linear Gaussian models with an exact log p(x): probabilistic PCA and factor analysis.

Both have Q latent dimensions, a linear mean, and noise that is independent by element; probabilistic PCA has one
variance for all of them, factor analysis one for each:

    z ~ N(0, I_Q)      x = W z + mu + e,  e ~ N(0, Psi)      p(x) = N(x; mu, C),  C = W W^T + Psi
    probabilistic PCA  Psi = s^2 I          factor analysis  Psi = diag(psi_1, ..., psi_D)

A VAE with a linear decoder and a Gaussian likelihood of one scale is the first, of a scale per dimension the second.
C^-1 and |C| cost D Q^2, by Woodbury's identity. mu is best at the mean of the rows, and the rest depends on them
through their covariance S (over N, not N - 1) alone:

    mean log p(x) = -1/2 [ D log 2 pi + log |C| + tr(C^-1 S) ]

**Probabilistic PCA in closed form.** With l_1 >= ... >= l_D the eigenvalues of S and U_Q the eigenvectors of the first
Q, which are the same for all Q, so that one decomposition serves all numbers of components,

    s^2 = (l_{Q+1} + ... + l_D) / (D - Q)      W = U_Q diag(l_1 - s^2, ..., l_Q - s^2)^{1/2}

**Factor analysis** has no closed form, but for a given Psi it has: W = Psi^{1/2} U_Q diag(l_1 - 1, ..., l_Q - 1)^{1/2}
of the eigenvalues l_j > 1 and eigenvectors of Psi^{-1/2} S Psi^{-1/2}. What is left is a function of Psi,

    f(Psi) = 1/2 [ D log 2 pi + sum_d log psi_d + sum_{j kept} (1 + log l_j) + sum_{j left} l_j ]
    df / d log psi_d = 1/2 sum_{j left} (1 - l_j) u_dj^2

which L-BFGS minimises over log psi. At a minimum diag(C) = diag(S), but where psi_d is held at its floor. With many
factors there are several minima, with noise of other elements near 0, hundredths of a nat apart.

**EM** climbs the same likelihood for both, without a step size. With B = W^T C^-1, so that E[z | x] = B (x - mu), and
V = I - B W + B S B^T the mean of E[z z^T | x] over the rows, its M step is

    W <- S B^T V^-1      psi <- diag(S - W B S), of which probabilistic PCA takes the mean

Of rows with gaps, p(x_seen) is the Gaussian of what is seen, and EM takes what is missing for latent as well: its E
step puts the mean and the covariance of the rows that are expected, given what is seen of them and the current
parameters (`pyrovae.models.seen.Gaps`), in the place of theirs. Any M step above then goes up in log p(x_seen): `em`
takes one of EM, `fit` the maximum for these moments, in closed form of probabilistic PCA, until an iteration gains no
more.

The noise's variance is at least a millionth of the mean variance of the rows, and in factor analysis, of an element, a
millionth of that element's own, or of the mean where an element is constant, which would drive it to 0.

References:
    Tipping and Bishop 1999, Probabilistic Principal Component Analysis, JRSS B 61
    Rubin and Thayer 1982, EM Algorithms for ML Factor Analysis, Psychometrika 47
    Joreskog 1967, Some Contributions to Maximum Likelihood Factor Analysis, Psychometrika 32
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform

from pyrovae.errors import DataError, UsageError
from pyrovae.models.exact import RELATIVE_FLOOR, Exact, check_real, has_gaps
from pyrovae.models.gaps import completed
from pyrovae.models.seen import Conditional, Gaps, gaussian_parts
from pyrovae.settings import Count, Number, Whole, check, checked

BLOCK = 4096  # rows whose squares are summed at a time, in double precision
ROUNDING = 1e-12  # a standard deviation below this share of an element's mean is rounding: the element is constant
# L-BFGS over the noise ends with a step that gains less of the mean log p(x) than this share, or after so many.
LEAST_GAIN, MOST_STEPS = 1e-12, 2000
GAPS_GAIN, GAPS_STEPS = 1e-6, 1000  # of a fit to rows with gaps: nats per datum, and M steps
MOST_NUMBERS = 2**20  # in covariances of rows with gaps that are looked at together


@dataclass(frozen=True)
class Moments:
    """All that a linear Gaussian model depends on of its rows, in double precision.

    Attributes:
        rows: How many there are, N.
        mean: Their mean, shape (D,).
        covariance: Their covariance over N, shape (D, D).
    """

    rows: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Those of rows x (N, *event).

        Raises:
            DataError: the rows do not differ.
        """
        flat = x.flatten(1)
        mean = sum((rows.double().sum(0) for rows in flat.split(BLOCK)), start=torch.zeros(())) / len(flat)
        centred = (rows.double() - mean for rows in flat.split(BLOCK))
        found = cls(len(flat), mean, sum((rows.T @ rows for rows in centred), start=torch.zeros(())) / len(flat))
        if not found.floor > 0:
            raise DataError("x: expected rows that differ, got variance 0; there is nothing to model")
        return found

    @classmethod
    def expected(cls, x: Tensor, loc: Tensor, covariance: Tensor) -> "tuple[Moments, float]":
        """Those of rows with gaps (N, D) that are expected given what is seen under N(loc, covariance).

        Returns:
            With them the mean log p(x_seen) in nats per row.
        """
        first, second, nats = torch.zeros_like(loc), torch.zeros_like(covariance), 0.0
        for rows in x.double().split(max(1, MOST_NUMBERS // x.shape[1] ** 2)):
            gaps = Gaps(rows)
            one, two = gaps.moments(loc, covariance, torch.ones_like(rows[:, 0]))
            first, second = first + one, second + two
            nats += gaps.log_prob(loc, covariance).sum().item()
        away = first / len(x)
        return cls(len(x), loc + away, second / len(x) - torch.outer(away, away)), nats / len(x)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the covariance, rising, and its eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    @property
    def floor(self) -> float:
        """The least variance of noise that all elements share."""
        return RELATIVE_FLOOR * self.covariance.diagonal().mean().item()

    @property
    def floors(self) -> Tensor:
        """The least variance of the noise of each element, shape (D,)."""
        variances = self.covariance.diagonal()
        varies = variances > (ROUNDING * self.mean).square()
        return (RELATIVE_FLOOR * variances).where(varies, self.floor)


class LinearGaussian(Exact):
    """p(x) = N(mu, W W^T + Psi): what its subclasses have in common, all but the noise.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of latent dimensions, Q, below D.
        per_element: Whether each element has a variance of its own.
    Attributes:
        loc: mu, shape (D,).
        weight: W, shape (D, Q).
        log_scale: log Psi / 2, shape () or (D,).
    """

    def __init__(self, event_shape: int | Sequence[int], components: int, per_element: bool) -> None:
        super().__init__(event_shape)
        if components >= self.event_numel:
            raise UsageError(
                f"components: expected a whole number from 1 to {self.event_numel - 1}, one below the elements of x, "
                f"got {components}"
            )
        self.components = components
        self.loc = nn.Parameter(torch.zeros(self.event_numel))
        self.weight = nn.Parameter(torch.randn(self.event_numel, components) / math.sqrt(components))
        self.log_scale = nn.Parameter(torch.zeros(self.event_numel if per_element else ()))

    @abstractmethod
    def fit_moments(self, moments: Moments) -> int:
        """Maximise log p(x) over rows with these moments, which are more than components; returns the iterations."""

    @classmethod
    def most_components(cls, x: Tensor) -> int:
        """One below the rows, and below the elements of x."""
        return min(len(x), x[0].numel()) - 1

    @classmethod
    def fitted(
        cls, x: Tensor, validation: Tensor, components: Sequence[int], seed: int = 0
    ) -> Iterator[tuple[Self, int]]:
        """One for each number of components, from the same moments."""
        moments = Moments.of(completed(x))
        for count in components:
            if count > cls.most_components(x):
                return
            model = cls(x.shape[1:], components=count).to(x.device).double()  # type: ignore[call-arg]
            yield model, model.fit_moments(moments) + (model._climb(x) if has_gaps(x) else 0)

    def forward(self) -> dist.Distribution:
        """p(x), batch shape (), the event shape of x."""
        variances = (2 * self.log_scale).exp().expand(self.event_numel)
        flat = dist.LowRankMultivariateNormal(self.loc, self.weight, variances)
        return dist.TransformedDistribution(flat, [ReshapeTransform(flat.event_shape, self.event_shape)])

    def model(self, x: Tensor) -> None:
        """Pyro model: the site `x`, observed, in the plate `data`; z is integrated out."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self(), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, shape (N,), differentiable; where elements are missing, NaN, that of what is seen.

        Raises:
            UsageError: x does not have the model's event shape.
            DataError: x is infinite.
        """
        check_real(x, self.event_shape, gaps=True)
        if has_gaps(x):
            blocks = x.to(self.loc).flatten(1).split(max(1, MOST_NUMBERS // self.event_numel**2))
            return torch.cat([Gaps(rows).log_prob(self.loc, self.covariance) for rows in blocks])
        return self().log_prob(x.to(self.loc))

    @property
    def covariance(self) -> Tensor:
        """C = W W^T + Psi, shape (D, D)."""
        return self.weight @ self.weight.T + (2 * self.log_scale).exp().expand(self.event_numel).diag()

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """Of the Gaussian p(x), in double precision."""
        noise = torch.eye(self.event_numel, dtype=torch.float64, device=self.loc.device) * self.log_scale.exp()
        factor = torch.cat([self.weight, noise], 1)
        log_prob, loc, scale_tril = gaussian_parts(self.loc, factor, x.flatten(1), seen.flatten())
        return Conditional(log_prob, dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False))

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        check("num_samples", num_samples, Whole(1))
        z = torch.randn(num_samples, self.components, dtype=self.loc.dtype, device=self.loc.device)
        x = self.loc + z @ self.weight.T
        if not mean:
            x = x + self.log_scale.exp() * torch.randn_like(x)
        return x.unflatten(1, self.event_shape)

    def initialise(self, x: Tensor) -> None:
        """Start where `fit` ends: a gradient has nothing to add but to another part of the data."""
        self.fit(x)

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int = 0, validation: Tensor | None = None) -> int:
        """Maximise log p(x) over x of shape (N, *event); `seed` and `validation` are not used.

        Rows may have gaps, NaN where an element is missing: then it starts with other rows' values in them, and climbs.

        Returns:
            The iterations it took: 1 in closed form.
        Raises:
            UsageError: x does not have the model's event shape, or no more rows than components.
            DataError: x has values that are not finite, or no variance.
        """
        return self.fit_moments(self._moments(x)) + (self._climb(x) if has_gaps(x) else 0)

    @torch.no_grad()
    def _climb(self, x: Tensor) -> int:
        """From the current parameters, EM on rows with gaps until an iteration gains too little; returns how many."""
        exact, best, flat = copy.deepcopy(self).double(), -math.inf, x.flatten(1)
        for iteration in range(GAPS_STEPS):
            moments, nats = Moments.expected(flat, exact.loc, exact.covariance)
            if nats < best:
                return iteration  # the floor of the noise, or another maximum of factor analysis
            self.load_state_dict(exact.state_dict())
            if nats - best < GAPS_GAIN:
                return iteration
            best = nats
            exact.fit_moments(moments)
        return GAPS_STEPS

    @torch.no_grad()
    def em(self, x: Tensor, max_iterations: int = 1000, tolerance: float = 1e-6) -> list[float]:
        """Climb to the maximum by expectation maximisation, from the current W and noise; `fit` is there at once.

        Args:
            x: Data, shape (N, *event), N over the number of components; NaN where an element is missing.
            max_iterations: Most M steps to take.
            tolerance: Least gain in nats per datum that is worth another iteration.
        Returns:
            Mean log p(x) in nats per datum, at the start (with the mean of x as mu) and after each iteration; of rows
            with gaps, of what is seen.
        Raises:
            UsageError: an argument is out of its range, or as for `fit`.
            DataError: as for `fit`.
        """
        check("max_iterations", max_iterations, Whole(1))
        check("tolerance", tolerance, Number(least=0))
        moments, gaps = self._moments(x), has_gaps(x)
        self.loc.copy_(moments.mean)
        mean, weight = moments.mean, self.weight.double()
        noise = (2 * self.log_scale).exp().double().expand(self.event_numel)
        history: list[float] = []
        while True:
            covariance = weight @ weight.T + noise.diag()
            if gaps:
                moments, nats = Moments.expected(x.flatten(1), mean, covariance)
            else:
                nats = _mean_log_prob(moments, weight, noise)
            history.append(nats)
            if len(history) > max_iterations or (len(history) > 1 and history[-1] - history[-2] < tolerance):
                break
            to_codes = torch.linalg.solve(covariance, weight).T  # B
            crossed = moments.covariance @ to_codes.T  # S B^T
            second = torch.eye(self.components).to(noise) - to_codes @ weight + to_codes @ crossed
            mean, weight = moments.mean, torch.linalg.solve(second, crossed.T).T
            left = moments.covariance.diagonal() - (weight * crossed).sum(1)
            shared = left.mean().clamp(min=moments.floor).expand_as(left)
            noise = torch.maximum(left, moments.floors) if self.log_scale.dim() else shared
        self.loc.copy_(mean)
        self._take(weight, noise)
        return history

    def _take(self, weight: Tensor, noise: Tensor) -> None:
        """Take over W and the D variances of the noise."""
        self.weight.copy_(weight)
        self.log_scale.copy_((noise if self.log_scale.dim() else noise[0]).log() / 2)

    def _moments(self, x: Tensor) -> Moments:
        """Those of x, checked."""
        check_real(x, self.event_shape, gaps=True)
        if len(x) <= self.components:
            raise UsageError(f"x: expected more rows than the {self.components} components, got {len(x)}; pass more")
        return Moments.of(completed(x))


class PPCA(LinearGaussian):
    """Probabilistic PCA, an exact baseline for densities.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of latent dimensions, Q, below D.
    Raises:
        UsageError: an argument is out of its range.
    Example:
        >>> x = torch.randn(100, 5) @ torch.randn(5, 5)
        >>> model = PPCA(5, components=2)
        >>> model.fit(x)
        1
        >>> model.log_prob(x).shape
        torch.Size([100])
    """

    word = "ppca"
    measure = "density"

    @checked
    def __init__(self, event_shape: int | Sequence[int], components: Count = 10) -> None:
        super().__init__(event_shape, components, per_element=False)

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"probabilistic PCA, {_counted(self.components)}"

    @torch.no_grad()
    def fit_moments(self, moments: Moments) -> int:
        """In closed form, by the eigenvectors of the covariance."""
        values, vectors = moments.eigen
        floor = RELATIVE_FLOOR * values.mean().item()
        noise = max(values[: -self.components].mean().item(), floor)
        lengths = (values[-self.components :] - noise).clamp(min=0).sqrt()
        self.loc.copy_(moments.mean)
        self.weight.copy_(vectors[:, -self.components :] * lengths)
        self.log_scale.fill_(math.log(noise) / 2)
        return 1


class FactorAnalysis(LinearGaussian):
    """Factor analysis, an exact baseline for densities: noise of a variance for each element.

    Unlike probabilistic PCA it is the same model whatever the units of each element.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of latent dimensions, or factors, Q, below D.
    Raises:
        UsageError: an argument is out of its range.
    """

    word = "factor-analysis"
    measure = "density"
    closed_form = True

    @checked
    def __init__(self, event_shape: int | Sequence[int], components: Count = 10) -> None:
        super().__init__(event_shape, components, per_element=True)

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"factor analysis, {_counted(self.components, 'factor')}"

    @torch.no_grad()
    def fit_moments(self, moments: Moments) -> int:
        """By L-BFGS over the variances of the noise, with W in closed form for each; returns its steps."""
        from scipy.optimize import minimize

        floors = moments.floors
        variances = torch.maximum(moments.covariance.diagonal(), floors)
        # Half of each variance is noise at the start; none of it can be more than all.
        result: Any = minimize(
            lambda log_noise: _profile(moments, torch.from_numpy(log_noise).to(variances), self.components),
            torch.maximum(variances / 2, floors).log().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(floors.log().tolist(), variances.log().tolist(), strict=True)),
            options={"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "ftol": LEAST_GAIN, "gtol": 1e-9},
        )
        noise = torch.from_numpy(result.x).to(variances).exp()
        self.loc.copy_(moments.mean)
        self._take(loadings(moments.covariance, noise, self.components), noise)
        return int(result.nit)


def _profile(moments: Moments, log_noise: Tensor, components: int) -> tuple[float, Any]:
    """-mean log p(x) in nats with the best W for some noise, and its gradient by the log-variances: f and df above."""
    values, vectors = _whitened(moments.covariance, log_noise.exp())
    best = torch.arange(len(values), device=values.device) >= len(values) - components
    kept = best & (values > 1)
    parts = torch.where(kept, 1 + values.clamp(min=1).log(), values)
    value = 0.5 * (len(values) * math.log(2 * math.pi) + log_noise.sum() + parts.sum())
    gradient = 0.5 * vectors.square() @ torch.where(kept, 0.0, 1 - values)
    return value.item(), gradient.cpu().numpy()


def loadings(covariance: Tensor, noise: Tensor, components: int) -> Tensor:
    """The W of so many factors that is best for a noise, of shape (*batch, D), and a covariance, (*batch, D, D)."""
    values, vectors = _whitened(covariance, noise)
    lengths = (values[..., -components:] - 1).clamp(min=0).sqrt()
    return noise.sqrt().unsqueeze(-1) * vectors[..., -components:] * lengths.unsqueeze(-2)


def _whitened(covariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of Psi^{-1/2} S Psi^{-1/2}, of any batch of both."""
    scales = noise.sqrt()
    values, vectors = torch.linalg.eigh(covariance / scales.unsqueeze(-2) / scales.unsqueeze(-1))
    return values, vectors


def _mean_log_prob(moments: Moments, weight: Tensor, noise: Tensor) -> float:
    """Mean log p(x) in nats per datum, over rows with these moments."""
    covariance = weight @ weight.T + noise.diag()
    factor = torch.linalg.cholesky(covariance)
    spread = torch.cholesky_solve(moments.covariance, factor).trace()
    return (-0.5 * (len(noise) * math.log(2 * math.pi) + 2 * factor.diagonal().log().sum() + spread)).item()


def _counted(components: int, noun: str = "component") -> str:
    return f"{components} {noun}{'s' if components > 1 else ''}"
