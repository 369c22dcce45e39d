r"""Models with an exact log p(x), the baselines of those whose log p(x) is estimated; probabilistic PCA is one.

Probabilistic PCA is the linear Gaussian model of Q latent dimensions,

    z ~ N(0, I_Q)      x = W z + mu + s e,  e ~ N(0, I_D)      p(x) = N(x; mu, W W^T + s^2 I)

With l_1 >= ... >= l_D the eigenvalues of the rows' covariance (over N, not N - 1) and U_Q the eigenvectors of the first
Q, its likelihood is highest at

    mu = mean of x      s^2 = (l_{Q+1} + ... + l_D) / (D - Q)      W = U_Q diag(l_1 - s^2, ..., l_Q - s^2)^{1/2}

which needs no iteration. A VAE with a linear decoder and a Gaussian likelihood of one scale is this model.

References:
    Tipping and Bishop 1999, Probabilistic Principal Component Analysis, JRSS B 61
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform

from pyrovae.errors import DataError, UsageError
from pyrovae.models.seen import Conditional, gaussian_parts, patterns
from pyrovae.settings import Count, Whole, check, checked

RELATIVE_FLOOR = 1e-6  # of the mean variance of the rows
BLOCK = 4096  # rows whose squares are summed at a time, in double precision


class Exact(nn.Module, ABC):
    """A model of rows x of shape (N, *event) whose log p(x) is in closed form.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
    Attributes:
        word: What it is called where it is chosen by name; of two of one word the measure of the data decides.
        measure: Of p(x), "density" or "mass".
    Raises:
        UsageError: a size of the event shape is below 1.
    """

    word: ClassVar[str]
    measure: ClassVar[str]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
        self.event_numel = self.event_shape.numel()
        if not self.event_shape or min(self.event_shape) < 1:
            raise UsageError(f"event_shape: expected positive sizes, got {tuple(self.event_shape)}; pass D for vectors")

    @property
    @abstractmethod
    def description(self) -> str:
        """What a table of models calls it."""

    @classmethod
    @abstractmethod
    def most_components(cls, x: Tensor) -> int:
        """The largest number of components that can be fit to x of shape (N, *event)."""

    @abstractmethod
    def model(self, x: Tensor) -> None:
        """p(x) as a Pyro model: the site `x`, observed, in the plate `data`; its latents are summed out."""

    def guide(self, x: Tensor) -> None:
        """Pyro guide: empty, because there is nothing to infer."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, shape (N,); differentiable.

        Raises:
            UsageError: x does not have the model's event shape.
            DataError: x is outside the support.
        """

    @abstractmethod
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        """Draws of x from p(x), or of the means of p(x | z), shape (num_samples, *event)."""

    @abstractmethod
    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """log p(x_seen) and p(x_missing | x_seen), both in closed form: see `pyrovae.models.seen`.

        `gaussian_parts` has it for a Gaussian, `mixture_given` for a mixture. All else of the seen and the missing
        follows from it: `log_prob_seen`, `log_prob_missing`, `impute`.

        Args:
            x: Rows, shape (N, *event); missing elements may be anything.
            seen: Boolean, of the event's shape: True where x is seen, alike for all rows.
        """

    def log_prob_seen(self, x: Tensor, seen: Tensor) -> Tensor:
        """Exact log p(x_seen) in nats, the missing elements summed or integrated out, shape (N,).

        Args:
            x: Rows, shape (N, *event); missing elements may be anything.
            seen: Boolean, of the event's shape, or (N, *event): True where x is seen.
        Raises:
            UsageError: `seen` is of another type or shape.
        """
        return self._by_pattern(x, seen, lambda some, mask: self.conditional(some, mask).log_prob_seen)

    def log_prob_missing(self, x: Tensor, seen: Tensor) -> Tensor:
        """Exact log p(x_missing | x_seen) in nats, shape (N,); arguments and errors as for `log_prob_seen`."""

        def of(some: Tensor, mask: Tensor) -> Tensor:
            given = self.conditional(some, mask)
            if mask.all():  # nothing has probability 1; torch has no distributions of no elements
                return torch.zeros_like(given.log_prob_seen)
            return given.missing.log_prob(some.flatten(1)[:, ~mask.flatten()].to(given.log_prob_seen))

        return self._by_pattern(x, seen, of)

    @torch.no_grad()
    def impute(self, x: Tensor, seen: Tensor, num_draws: int = 1, mean: bool = False) -> Tensor:
        """Rows with draws from p(x_missing | x_seen) in the place of what is missing, with torch's random state.

        Args:
            x: Rows, shape (N, *event); missing elements may be anything.
            seen: Boolean, of the event's shape, or (N, *event): True where x is seen.
            num_draws: S, draws of each row.
            mean: The mean of p(x_missing | x_seen) in place of draws, the same S times.
        Returns:
            Shape (S, N, *event); its seen elements are those of x.
        Raises:
            UsageError: num_draws is no whole number of at least 1, or `seen` is of another type or shape.
        """
        check("num_draws", num_draws, Whole(1))
        filled = x.flatten(1).repeat(num_draws, 1, 1)
        for mask, rows in patterns(seen, len(x), self.event_shape):
            if mask.all():
                continue
            gone = (~mask.flatten()).nonzero().flatten()
            # A mixture draws from all its components at once: in blocks of rows, to bound memory.
            for block in rows.split(max(1, 2**22 // (num_draws * len(gone)))):
                missing = self.conditional(x[block], mask).missing
                values = missing.mean.expand(num_draws, -1, -1) if mean else missing.sample((num_draws,))
                filled[:, block.unsqueeze(-1), gone] = values.to(filled)
        return filled.unflatten(2, self.event_shape)

    def _by_pattern(self, x: Tensor, seen: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A number for each row, shape (N,), by a function of the rows that have one mask, and that mask."""
        parts = [(rows, of(x[rows], mask)) for mask, rows in patterns(seen, len(x), self.event_shape)]
        return torch.cat([values for _, values in parts])[torch.cat([rows for rows, _ in parts]).argsort()]

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start at training data x of shape (N, *event), for training by gradient."""

    @abstractmethod
    def fit(self, x: Tensor, seed: int = 0) -> int:
        """Maximise log p(x) over x of shape (N, *event) without a gradient; returns the iterations it took."""


class PPCA(Exact):
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
        super().__init__(event_shape)
        if components >= self.event_numel:
            raise UsageError(
                f"components: expected a whole number from 1 to {self.event_numel - 1}, one below the elements of x, "
                f"got {components}"
            )
        self.components = components
        self.loc = nn.Parameter(torch.zeros(self.event_numel))
        self.weight = nn.Parameter(torch.randn(self.event_numel, components) / math.sqrt(components))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"probabilistic PCA, {self.components} component{'s' if self.components > 1 else ''}"

    @classmethod
    def most_components(cls, x: Tensor) -> int:
        """One below the rows, and below the elements of x."""
        return min(len(x), x[0].numel()) - 1

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
        self._check(x)
        return self().log_prob(x.to(self.loc))

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
    def fit(self, x: Tensor, seed: int = 0) -> int:
        """Maximise log p(x) over x of shape (N, *event), in closed form; `seed` is not used.

        s^2 is at least a millionth of the mean variance of the rows: constant elements would drive it to 0.

        Returns:
            1, for the one step that it takes.
        Raises:
            UsageError: x does not have the model's event shape, or no more rows than components.
            DataError: x has values that are not finite, or no variance.
        """
        self._check(x)
        if len(x) <= self.components:
            raise UsageError(f"x: expected more rows than the {self.components} components, got {len(x)}; pass more")
        mean, covariance = _moments(x.flatten(1))
        values, vectors = torch.linalg.eigh(covariance)  # rising
        floor = RELATIVE_FLOOR * values.mean().item()
        if not floor > 0:
            raise DataError("x: expected rows that differ, got variance 0; there is nothing to model")
        noise = max(values[: -self.components].mean().item(), floor)
        lengths = (values[-self.components :] - noise).clamp(min=0).sqrt()
        self.loc.copy_(mean)
        self.weight.copy_(vectors[:, -self.components :] * lengths)
        self.log_scale.fill_(math.log(noise) / 2)
        return 1

    def _check(self, x: Tensor) -> None:
        """Refuse x of another event shape, or that is not finite."""
        if x.shape[1:] != self.event_shape or x.dim() == 0:
            raise UsageError(f"x: expected event shape {tuple(self.event_shape)}, got a tensor of {tuple(x.shape)}")
        if not x.isfinite().all():
            raise DataError(f"x: expected finite values, got {int((~x.isfinite()).sum())} that are not")

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, components={self.components}"


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and covariance (D, D) of rows x (N, D), in double precision."""
    mean = sum((rows.double().sum(0) for rows in x.split(BLOCK)), start=torch.zeros(())) / len(x)
    centred = (rows.double() - mean for rows in x.split(BLOCK))
    return mean, sum((rows.T @ rows for rows in centred), start=torch.zeros(())) / len(x)
