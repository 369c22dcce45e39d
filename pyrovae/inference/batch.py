"""A batch: what is modelled, and what everything is conditioned on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.checks import check_given, check_rows


@dataclass(frozen=True)
class Batch:
    """Rows of data, and of what model and guide are given beside them: they are called as program(x, *given).

    Attributes:
        x: What is modelled, shape (N, *event).
        given: What everything is conditioned on (labels, covariates, masks), each of shape (N, ...).
    """

    x: Tensor
    given: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, x: Tensor, given: Sequence[Tensor] = (), name: str = "x") -> "Batch":
        """A batch of what a caller passed, looked at.

        Raises:
            UsageError: x is no tensor with rows, or something in `given` has not as many.
        """
        check_rows(name, x)
        check_given(given, len(x), name)
        return cls(x, tuple(given))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments of model and guide."""
        return (self.x, *self.given)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "Batch":
        return Batch(self.x[rows], tuple(value[rows] for value in self.given))

    def roll(self, shift: int) -> "Batch":
        """The same rows, each so many places on."""
        return Batch(self.x.roll(shift, 0), tuple(value.roll(shift, 0) for value in self.given))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same on a device."""
        x, *given = (tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors)
        return Batch(x, tuple(given))

    def pinned(self) -> "Batch":
        """The same in memory that a GPU copies from by itself; what is on one stays there."""
        x, *given = (t.pin_memory() if t.device.type == "cpu" else t for t in self.tensors)
        return Batch(x, tuple(given))

    def split(self, rows: int) -> Iterator["Batch"]:
        """In parts of so many rows, in order; the last may have fewer."""
        for start in range(0, len(self), rows):
            yield self[start : start + rows]

    def shapes(self) -> str:
        """In words, for messages."""
        beside = ", ".join(str(tuple(value.shape)) for value in self.given)
        return f"x of shape {tuple(self.x.shape)}" + (f", given {beside}" if beside else "")
