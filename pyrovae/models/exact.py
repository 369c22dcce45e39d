"""Models with an exact log p(x), the baselines of those whose log p(x) is estimated: what they have in common.

A model's latents are summed or integrated out, so that its Pyro pair has an observed site alone and an empty guide, and
nothing is estimated. To write a new one, subclass `Exact` and name the class in `pyrovae.models.baselines.BASELINES`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from pyrovae.errors import DataError, UsageError
from pyrovae.models.seen import Conditional, patterns
from pyrovae.settings import Whole, check

BLOCK = 1000  # rows scored at a time
RELATIVE_FLOOR = 1e-6  # least variance of a model that is fit, as a share of the mean variance of the rows


class Exact(nn.Module, ABC):
    """A model of rows x of shape (N, *event) whose log p(x) is in closed form.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
    Attributes:
        word: What it is called where it is chosen by name; of two of one word the measure of the data decides.
        measure: Of p(x), "density" or "mass".
        closed_form: Whether a run of it is `fit` and nothing more; else gradients go on from where `initialise` starts.
        of_rows: Whether components are training rows, so that there are no more of them.
        components: Number of its parts: components of a mixture, latent dimensions, kernels.
    Raises:
        UsageError: a size of the event shape is below 1.
    """

    word: ClassVar[str]
    measure: ClassVar[str]
    closed_form: ClassVar[bool] = False
    of_rows: ClassVar[bool] = False
    components: int

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

    @classmethod
    @abstractmethod
    def fitted(
        cls, x: Tensor, validation: Tensor, components: Sequence[int], seed: int = 0
    ) -> Iterator[tuple[Self, int]]:
        """Models fit to x (N, *event) in double precision, each with the iterations that it took.

        One for each number of components, as far as there can be so many; they are fit when they are asked for.
        `each_of` makes them one by one; what all of them share (a decomposition of the covariance) is computed once.
        """

    @abstractmethod
    def model(self, x: Tensor) -> None:
        """p(x) as a Pyro model: the site `x`, observed, in the plate `data`; its latents are summed out."""

    def guide(self, x: Tensor) -> None:
        """Pyro guide: empty, because there is nothing to infer."""

    def remarks(self, x: Tensor) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event): nothing."""
        return []

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
    def fit(self, x: Tensor, seed: int = 0, validation: Tensor | None = None) -> int:
        """Maximise log p(x) over x of shape (N, *event) without a gradient; returns the iterations it took.

        `validation` are rows for what x cannot decide, such as the width of kernels that stand on x.
        """

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, components={self.components}"


Model = TypeVar("Model", bound=Exact)


def each_of(cls: type[Model], x: Tensor, components: Sequence[int], seed: int = 0) -> Iterator[tuple[Model, int]]:
    """A model of each number of components, fit to x by itself: `Exact.fitted` of those that share nothing."""
    for count in components:
        if count > cls.most_components(x):
            return
        model = cls(x.shape[1:], components=count).to(x.device).double()  # type: ignore[call-arg]
        yield model, model.fit(x, seed)


def best_on(
    models: Iterable[tuple[Model, int]], validation: Tensor, tried: Callable[[Model, int, float], object] | None = None
) -> Model | None:
    """Of models with the iterations that each took, the first that the next one is no better than; None of none.

    Args:
        models: As `Exact.fitted` makes them, which are fit as they are asked for.
        validation: Rows (V, *event) whose mean log p(x) decides.
        tried: Called with each model, its iterations, and the mean log p(x) of the validation rows, in nats.
    """
    best: Model | None = None
    best_bound = -math.inf
    for model, iterations in models:
        with torch.no_grad():
            bound = torch.cat([model.log_prob(block) for block in validation.split(BLOCK)]).mean().item()
        if tried is not None:
            tried(model, iterations, bound)
        if bound <= best_bound:
            break
        best, best_bound = model, bound
    return best


def has_gaps(x: Tensor) -> bool:
    """Whether an element of rows is missing, which NaN stands for."""
    return bool(x.isnan().any())


def check_real(x: Tensor, event_shape: torch.Size, gaps: bool = False) -> None:
    """Refuse x of another event shape, or that is not finite, for a density on all real numbers.

    Args:
        x: Rows.
        event_shape: Of one row.
        gaps: Whether elements may be missing, NaN.

    Raises:
        UsageError: x does not have the event shape.
        DataError: x has values that are not finite.
    """
    if x.shape[1:] != event_shape or x.dim() == 0:
        raise UsageError(f"x: expected event shape {tuple(event_shape)}, got a tensor of {tuple(x.shape)}")
    wrong = ~x.isfinite() & ~x.isnan() if gaps else ~x.isfinite()
    if wrong.any():
        raise DataError(f"x: expected finite values, got {int(wrong.sum())} that are not")
