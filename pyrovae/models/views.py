"""Views: what an encoder sees of x, where that is not x itself.

A guide's encoder looks through the view that its network has, `MLP(view.out_shape).seeing(view)`; the guide then takes
x of the view's event shape, and centres what is seen. What is modelled stays x.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class View(nn.Module, ABC):
    """A function of one event of x.

    Args:
        event_shape: Of x.
        out_shape: Of what is seen of it.
    """

    def __init__(self, event_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape, self.out_shape = tuple(event_shape), tuple(out_shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Of x of shape (*batch, *event_shape), shape (*batch, *out_shape)."""

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start what depends on the data at training data x of shape (N, *event_shape)."""


class LogCounts(View):
    """log(1 + x) of counts, which range over orders of magnitude.

    Of a negative number, as a free pseudo-input may be, the mirror image: -log(1 - x).
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, event_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().log1p()

    def initialise(self, x: Tensor) -> None:
        """Nothing depends on the data."""
