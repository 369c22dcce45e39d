r"""Corruptions: what a guide sees in place of x while it is trained; what it is to explain stays x.

    x~ = c(x, e),  e independent of z,      L(x, e) = E_q(z|x~) [log p(x, z) - log q(z|x~)]

Once e is drawn, q(z|x~) is a density of z like any other, and so

    L(x, e) = log p(x) - KL(q(z|x~) || p(z|x))

is a lower bound on log p(x) of the clean x for every e, and its mean over e is one, which is what training maximises;
the same holds of K draws of z under one e, and the IWAE bound. As a guide that does not see all of x it is seldom
tight; what is gained are codes that noise does not throw off.

A corruption is a module: `forward(x)` draws x~ in training mode and is x in evaluation mode, as dropout is, so that
whatever is reported is of clean rows, but for the bound of the training rows, which is what was maximised;
`corrupt(x)` draws in any mode, as to show what denoising does. A corruption belongs in a guide and never in a model:
`VAE(prior, likelihood, guide, Masking(0.3))`, or `self.masking(x)` in a guide of your own. Before a plain autoencoder
it makes a denoising one: the squared error of decoder(encoder(masking(x))) to x.

To write a new one, subclass `Corruption`, say what a draw is in `corrupt`, with torch's random state, and name the
class in `CORRUPTIONS`. Parameters with a default are its settings, on the command line too.

References:
    Vincent, Larochelle, Bengio and Manzagol 2008, Extracting and Composing Robust Features with Denoising
    Autoencoders, https://doi.org/10.1145/1390156.1390294
    Im, Ahn, Memisevic and Bengio 2017, Denoising Criterion for Variational Auto-Encoding Framework,
    https://arxiv.org/abs/1511.06406
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyrovae.settings import Positive, Share, checked


class Corruption(nn.Module, ABC):
    """x as a guide sees it while it is trained.

    Attributes:
        word: What it is called where it is chosen by name.
    """

    word: ClassVar[str]

    def __init__(self) -> None:  # without settings, unless a class says otherwise: torch's own takes anything
        super().__init__()

    @abstractmethod
    def corrupt(self, x: Tensor) -> Tensor:
        """A draw of x~ for x of shape (*batch, *event), of that shape and type, from torch's random state."""

    def forward(self, x: Tensor) -> Tensor:
        """A draw of x~ in training mode; x itself in evaluation mode. Shape (*batch, *event)."""
        return self.corrupt(x) if self.training else x

    def initialise(self, x: Tensor) -> None:
        """Start whatever depends on the data at training data x of shape (N, *event). Here: nothing."""


class Clean(Corruption):
    """The guide's input is x as it is."""

    word = "none"

    def corrupt(self, x: Tensor) -> Tensor:
        return x


class Masking(Corruption):
    """Elements of the guide's input are set to 0 while training.

    Args:
        share: Probability of an element to be corrupted.
    """

    word = "masking"

    @checked
    def __init__(self, share: Share = 0.3) -> None:
        super().__init__()
        self.share = share

    def corrupt(self, x: Tensor) -> Tensor:
        return x.masked_fill(drawn(x, self.share), 0)


class SaltAndPepper(Corruption):
    """Elements of the guide's input are set to the data's least or greatest value while training.

    One as often as the other; they are those of the training data, 0 and 1 until `initialise`.

    Args:
        share: Probability of an element to be corrupted.
    """

    word = "salt-and-pepper"
    least: Tensor
    greatest: Tensor

    @checked
    def __init__(self, share: Share = 0.3) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("least", torch.zeros(()))
        self.register_buffer("greatest", torch.ones(()))

    def corrupt(self, x: Tensor) -> Tensor:
        value = torch.where(drawn(x, 0.5), self.greatest, self.least)
        return torch.where(drawn(x, self.share), value.to(x.dtype), x)

    def initialise(self, x: Tensor) -> None:
        """Take the least and the greatest value of x."""
        self.least.copy_(x.min())
        self.greatest.copy_(x.max())


class Noise(Corruption):
    """The guide's input has Gaussian noise added while training.

    Args:
        scale: Standard deviation of the noise, as a share of the data's. The data's is over all elements, and 1 until
            `initialise`.
    """

    word = "noise"
    unit: Tensor

    @checked
    def __init__(self, scale: Positive = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("unit", torch.ones(()))

    def corrupt(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, dtype=self.unit.dtype, device=x.device)
        return x + (self.scale * self.unit * noise).to(x.dtype)

    def initialise(self, x: Tensor) -> None:
        """Take the standard deviation of x about the mean of each element."""
        wide = x.double()  # squares of small numbers vanish in single precision
        spread = (wide - wide.mean(0)).square().mean().sqrt()
        self.unit.copy_(spread if spread > 0 else torch.ones(()))


def drawn(x: Tensor, probability: float) -> Tensor:
    """Which elements of x are drawn, each with that probability and by itself."""
    return torch.rand(x.shape, device=x.device) < probability


CORRUPTIONS = (Clean, Masking, SaltAndPepper, Noise)
