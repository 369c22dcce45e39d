r"""Moving averages: what of a model follows the batches that it is trained on, in place of gradients.

A part notes statistics of each batch in buffers while the loss is computed, in training mode. After the step they are
summed over the processes of the run, and the part moves by their sum: so within a step, and in all processes, it is one
and the same. What moves are buffers: in checkpoints, and inputs of compiled steps, which note as well. What is noted is
of the last run of the part in a step, so that one is moved once by it, however many chunks of particles there are.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyrovae.inference.pair import Pair


@runtime_checkable
class Moving(Protocol):
    """A module with moving averages.

    Attributes:
        training: Whether it is in training mode; it moves in no other.
    """

    training: bool

    def statistics(self, leading: bool) -> Tensor:
        """What was noted of the last batch, as one vector that is summed over processes; `leading` in the first."""

    def move(self, totals: Tensor) -> None:
        """Move by statistics that are summed over processes."""

    def record(self) -> dict[str, float]:
        """What to record of an epoch, by name, which then begins anew."""


class MovingAverages:
    """The parts of a pair that have moving averages.

    Args:
        pair: The pair.
        leading: Whether this is the first process.
        together: Sums a vector over processes; None: there is one.
    """

    def __init__(self, pair: Pair, leading: bool, together: Callable[[Tensor], Tensor] | None) -> None:
        self.parts: list[Moving] = [part for part in pair.modules() if is_moving(part)]  # type: ignore[misc]
        self.leading, self.together = leading, together

    @torch.no_grad()
    def step(self, absent: bool) -> None:
        """Move by the batch of a step.

        Args:
            absent: This process had no rows in it.
        """
        for part in self.parts:
            if part.training:
                found = part.statistics(self.leading) * (not absent)
                part.move(found if self.together is None else self.together(found))

    def record(self) -> dict[str, float]:
        """What to record of an epoch; of several parts, by the number of each from 1."""
        found = [part.record() for part in self.parts if part.training]
        if len(found) < 2:
            return found[0] if found else {}
        return {f"{name}_{i}": value for i, each in enumerate(found, 1) for name, value in each.items()}


def is_moving(part: nn.Module) -> bool:
    """Whether a module has moving averages."""
    return isinstance(part, Moving)
