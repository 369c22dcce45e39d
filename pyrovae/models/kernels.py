r"""Kernel density estimation: a kernel of one width on each of C training rows r_c.

    p(x) = (1/C) sum_c k_h(x, r_c)          log p(x) = logsumexp_c log k_h(x, r_c) - log C

    density  k_h = N(x; r_c, h^2 I)                            log k_h = -d/2h^2 - D log(h sqrt(2 pi))
    mass     k_h = prod_i h^[x_i != r_ci] (1 - h)^[x_i = r_ci]   log k_h = d log h + (D - d) log(1 - h)

with d = |x - r_c|^2, which of bits is the number that differ; h of a mass is the probability of a bit to be another,
below 1/2. It is a mixture with nothing to train but h, and that not on the training rows: each lies on a kernel of its
own, whose density there has no bound as h falls. So h is the one of the highest mean log p(x) of validation rows, found
on a grid of log h and then by Brent's search about the best of it; where there are none, of the training rows
themselves, each without its own kernel (leave one out).

log p(x) is exact, and a poor model in many dimensions: kernels of one width are balls, and rows lie along directions.
`docs/baselines.md` shows what that does, and why an estimate from a model's *samples* (a "Parzen window") ranks models
neither by their log p(x) nor by their samples.

References:
    Parzen 1962, On Estimation of a Probability Density Function and Mode, Annals of Mathematical Statistics 33
    Aitchison and Aitken 1976, Multivariate Binary Discrimination by the Kernel Method, Biometrika 63
    Theis, van den Oord and Bethge 2016, A Note on the Evaluation of Generative Models, https://arxiv.org/abs/1511.01844
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.errors import DataError, UsageError
from pyrovae.models.exact import RELATIVE_FLOOR, Exact, check_real
from pyrovae.models.seen import Conditional
from pyrovae.settings import Count, Whole, check, checked

MOST_KERNELS = 10_000  # of a baseline in a comparison
CHUNK = 2**22  # distances held at a time: 32 MiB of float64
MOST_DISTANCES = 2**24  # of validation rows to kernels, held while the width is searched: 128 MiB
GRID = 25  # widths tried before the search about the best of them
TOLERANCE = 1e-7  # of log h


class Kernels(Exact):
    """What kernel density estimates have in common: all but the kernel.

    Attributes:
        rows: The training rows that have a kernel, shape (C, *event): part of the model, and of its size on disk.
        log_width: log h.
    """

    def __init__(self, event_shape: int | Sequence[int], components: int) -> None:
        super().__init__(event_shape)
        self.components = components
        self.rows = nn.Parameter(torch.zeros(components, *self.event_shape), requires_grad=False)
        self.log_width = nn.Parameter(torch.tensor(math.log(0.25)), requires_grad=False)

    @abstractmethod
    def log_kernel(self, squares: Tensor, log_width: Tensor, elements: int) -> Tensor:
        """log k_h in nats at squared distances d, of any shape, of so many elements of x."""

    @abstractmethod
    def draw(self, rows: Tensor, mean: bool = False) -> Tensor:
        """A draw from the kernel on each of some rows, or its mean; of all elements or some."""

    @abstractmethod
    def widths(self, x: Tensor) -> tuple[float, float]:
        """The least and the largest log h that are tried for training rows x."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Refuse x of another event shape, or outside the support."""

    @classmethod
    def most_components(cls, x: Tensor) -> int:
        """As many as rows."""
        return len(x)

    @classmethod
    def fitted(
        cls, x: Tensor, validation: Tensor, components: Sequence[int], seed: int = 0
    ) -> Iterator[tuple[Self, int]]:
        """One, whatever numbers of components others have: the more kernels the better."""
        if components:
            model = cls(x.shape[1:], min(len(x), MOST_KERNELS)).to(x.device).double()
            yield model, model.fit(x, seed, validation)

    def forward(self) -> "OnRows":
        """p(x), batch shape (), the event shape of x."""
        return OnRows(self, self.rows, self._weights())

    def model(self, x: Tensor) -> None:
        """Pyro model: the site `x`, observed, in the plate `data`; which kernel it is of is summed out."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self(), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        self.check(x)
        return self().log_prob(x.to(self.rows))

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        """Draws of x from p(x), or the means of its kernels; shape (num_samples, *event)."""
        check("num_samples", num_samples, Whole(1))
        chosen = torch.randint(self.components, (num_samples,), device=self.rows.device)
        return self.draw(self.rows[chosen], mean)

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """Kernels on what is missing of the rows, weighed by those on what is seen."""
        mask, rows = seen.flatten(), self.rows.flatten(1)
        squares = _squares(x.to(rows).flatten(1)[:, mask], rows[:, mask])
        joint = self._weights() + self.log_kernel(squares, self.log_width, int(mask.sum()))
        return Conditional(joint.logsumexp(-1), OnRows(self, rows[:, ~mask], joint.log_softmax(-1)))

    def initialise(self, x: Tensor) -> None:
        """Start where `fit` ends, which is all: there is nothing that a gradient could train."""
        self.fit(x)

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int = 0, validation: Tensor | None = None) -> int:
        """Put kernels on rows spread evenly over x, of the width that is best on the validation rows.

        Of them only so many are looked at, evenly from all, that their distances fit in 128 MiB.

        Args:
            x: Training rows, shape (N, *event), N at least C.
            seed: Not used.
            validation: Rows (V, *event) that decide the width; None: the kernels' own, each without its kernel.
        Returns:
            How many widths were tried.
        Raises:
            UsageError: x or the validation rows do not have the model's event shape, or are too few.
            DataError: they are outside the support, or the rows do not differ.
        """
        self.check(x)
        if len(x) < max(2, self.components):
            raise UsageError(
                f"x: expected at least {max(2, self.components)} rows for {self.components} kernels, got {len(x)}; "
                f"pass components={max(1, len(x))}"
            )
        least, largest = self.widths(x)
        self.rows.copy_(_evenly(x, self.components))
        looked = max(2, MOST_DISTANCES // self.components)
        log_weights = self._weights().double()
        if validation is None:
            own = _evenly(torch.arange(self.components, device=self.rows.device), min(looked, self.components))
            rows = self.rows[own]
            log_weights = log_weights.repeat(len(own), 1)
            log_weights[torch.arange(len(own)), own] = -math.inf
            log_weights = log_weights.log_softmax(-1)
        else:
            self.check(validation)
            rows = _evenly(validation, min(looked, len(validation))).to(self.rows)
        squares = _squares(rows.flatten(1).double(), self.rows.flatten(1).double())
        log_width, tried = self._best(squares, log_weights, least, largest)
        self.log_width.fill_(log_width)
        return tried

    def _best(self, squares: Tensor, log_weights: Tensor, least: float, largest: float) -> tuple[float, int]:
        """The log h of the highest mean log p(x) of rows at these distances, and how many were tried."""
        from scipy.optimize import minimize_scalar

        def loss(log_width: float) -> float:
            kernels = self.log_kernel(squares, torch.tensor(log_width).to(squares), self.event_numel)
            return -(log_weights + kernels).logsumexp(-1).mean().item()

        grid = [least + (largest - least) * i / (GRID - 1) for i in range(GRID)]
        best = min(range(GRID), key=[loss(point) for point in grid].__getitem__)
        ends = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
        found: Any = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": TOLERANCE})
        return float(found.x), GRID + int(found.nfev)

    def _weights(self) -> Tensor:
        """Log-weights of the kernels, which are equal, shape (C,)."""
        return self.rows.new_full((self.components,), -math.log(self.components))


class KernelDensity(Kernels):
    """Kernel density estimate, an exact baseline for densities: a Gaussian of one width on each training row.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: At most so many training rows have a kernel, evenly from all of them.
    Raises:
        UsageError: an argument is out of its range.
    Example:
        >>> x = torch.randn(200, 2)
        >>> model = KernelDensity(2, components=100)
        >>> tried = model.fit(x[:100], validation=x[100:])
        >>> model.log_prob(x).shape
        torch.Size([200])
    """

    word = "kde"
    measure = "density"
    closed_form = True
    of_rows = True

    @checked
    def __init__(self, event_shape: int | Sequence[int], components: Count = 10000) -> None:
        super().__init__(event_shape, components)

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"kernel density, {self.components} rows, width {self.log_width.exp().item():.3g}"

    def log_kernel(self, squares: Tensor, log_width: Tensor, elements: int) -> Tensor:
        constant = elements * (log_width + math.log(2 * math.pi) / 2)
        return -0.5 * squares * (-2 * log_width).exp() - constant

    def draw(self, rows: Tensor, mean: bool = False) -> Tensor:
        return rows if mean else rows + self.log_width.exp() * torch.randn_like(rows)

    def widths(self, x: Tensor) -> tuple[float, float]:
        """From a thousandth of the standard deviation of x, over all elements, to all of it."""
        variance = x.flatten(1).double().var(0, correction=0).mean().item()
        if not variance > 0:
            raise DataError("x: expected rows that differ, got variance 0; there is nothing to model")
        return math.log(RELATIVE_FLOOR * variance) / 2, math.log(variance) / 2

    def check(self, x: Tensor) -> None:
        check_real(x, self.event_shape)


class BernoulliKernelDensity(Kernels):
    """Kernel density estimate, an exact baseline for masses: each bit as in a training row, or else with probability h.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: At most so many training rows have a kernel, evenly from all of them.
    Raises:
        UsageError: an argument is out of its range.
    """

    word = "kde"
    measure = "mass"
    closed_form = True
    of_rows = True

    @checked
    def __init__(self, event_shape: int | Sequence[int], components: Count = 10000) -> None:
        super().__init__(event_shape, components)

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"kernel mass, {self.components} rows, bits change with {self.log_width.exp().item():.3g}"

    def log_kernel(self, squares: Tensor, log_width: Tensor, elements: int) -> Tensor:
        return squares * log_width + (elements - squares) * torch.log1p(-log_width.exp())

    def draw(self, rows: Tensor, mean: bool = False) -> Tensor:
        ones = torch.lerp(rows, 1 - rows, self.log_width.exp())
        return ones if mean else ones.bernoulli()

    def widths(self, x: Tensor) -> tuple[float, float]:
        """From a millionth to a half, where nothing is left of the rows."""
        return math.log(RELATIVE_FLOOR), math.log(0.5)

    def check(self, x: Tensor) -> None:
        check_real(x, self.event_shape)
        if bool(((x != 0) & (x != 1)).any()):
            raise DataError("x: expected values in {0, 1}, got others; binarise the data, or use KernelDensity")


class OnRows(dist.TorchDistribution):
    """Kernels on rows, as a distribution; it never holds an element of each row for each kernel.

    Args:
        kernels: Whose kernels they are.
        rows: Where they are, shape (C, *event).
        log_weights: Of each, shape (*batch, C), their exponentials summing to 1.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, kernels: Kernels, rows: Tensor, log_weights: Tensor) -> None:
        self.kernels, self.rows, self.log_weights = kernels, rows, log_weights
        super().__init__(log_weights.shape[:-1], rows.shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All real numbers: what else a model refuses, it refuses by `check`."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """Shape (*batch, *event)."""
        means = self.log_weights.exp() @ self.kernels.draw(self.rows, mean=True).flatten(1)
        return means.reshape(self.batch_shape + self.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "OnRows":
        """The same, for more rows of a batch."""
        return OnRows(self.kernels, self.rows, self.log_weights.expand(*batch_shape, len(self.rows)))

    def log_prob(self, x: Tensor) -> Tensor:
        """In nats, for x of shape (*sample, *batch, *event), so many rows at a time."""
        shape = torch.broadcast_shapes(x.shape[: x.dim() - len(self.event_shape)], self.batch_shape)
        elements, rows, log_width = self.event_shape.numel(), self.rows.flatten(1), self.kernels.log_width
        flat = x.expand(shape + self.event_shape).reshape(-1, elements)
        weights = self.log_weights.expand(*shape, len(rows)).reshape(-1, len(rows))
        size = max(1, CHUNK // len(rows))
        parts = [
            (weight + self.kernels.log_kernel(_squares(some, rows), log_width, elements)).logsumexp(-1)
            for some, weight in zip(flat.split(size), weights.split(size), strict=True)
        ]
        return torch.cat(parts).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Shape (*sample_shape, *batch, *event)."""
        chosen = dist.Categorical(logits=self.log_weights).sample(torch.Size(sample_shape))
        return self.kernels.draw(self.rows[chosen])


def _squares(x: Tensor, rows: Tensor) -> Tensor:
    """Squared distances of x (N, M) to rows (C, M), shape (N, C)."""
    centre = rows.mean(0)  # squares of numbers that are far from 0 would cancel
    x, rows = x - centre, rows - centre
    return (x.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * x @ rows.T).clamp(min=0)


def _evenly(x: Tensor, count: int) -> Tensor:
    """So many rows of x, spread evenly over all."""
    return x[torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long()]
