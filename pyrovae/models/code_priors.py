r"""Priors over codes: masses on the grids that a `VectorQuantiser` makes.

    UniformCodes        p(k) = C^-M                                   as a VQ-VAE is trained with
    UnigramCodes        p(k) = prod_m pi(k_m), or prod_m pi_m(k_m)    how often each code comes
    MaskedConvolutions  p(k) = prod_m p(k_m | k_1, ..., k_m-1)        by a gated PixelCNN
    TransformerCodes    the same                                      by a transformer

All have the quantiser's codebook, which they share and do not train. Nothing of log p(k) has a gradient by the vectors
of a code, so that a prior that is trained beside a VQ-VAE at a temperature 0 leaves its networks as they would be under
a uniform one, and one that is fitted afterwards, on frozen networks (`ExPostVAE`), maximises E log p(k(x)): maximum
likelihood on the codes of the rows.

Their log p(k) is exact, and -log p(k) / log 2 what the codes of a row cost in bits.
"""

from abc import ABC, abstractmethod
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.code_networks import CausalAttention, GatedConvolutions
from pyrovae.models.codes import AutoregressiveCodes, IndependentCodes
from pyrovae.models.priors import Prior
from pyrovae.models.quantiser import VectorQuantiser
from pyrovae.settings import Count, checked


class CodePrior(Prior, ABC):
    """p(z) over grids of codes.

    Args:
        quantiser: The guide whose codes they are. Its parameters belong to the pair and not to this module.
    """

    @abstractmethod
    def __init__(self, quantiser: VectorQuantiser) -> None:
        super().__init__(quantiser.latent_dim)
        # In a tuple, so that torch does not register it.
        self._quantiser = (quantiser,)

    @property
    def codebook(self) -> Tensor:
        """The quantiser's, shape (C, D)."""
        return self._quantiser[0].codebook

    @property
    def places(self) -> int:
        """M."""
        return self._quantiser[0].places


class UniformCodes(CodePrior):
    """All codes alike, at every place: -M log C nats, whatever they are.

    Args:
        quantiser: The guide whose codes they are.
    """

    short = ("uniform",)
    latents = "codes"

    def __init__(self, quantiser: VectorQuantiser) -> None:
        super().__init__(quantiser)

    def forward(self) -> dist.Distribution:
        return IndependentCodes(self.codebook.new_zeros(1, len(self.codebook)), self.codebook, self.places)


class UnigramCodes(CodePrior):
    """Independent codes, with learned logits.

    Args:
        quantiser: The guide whose codes they are.
        logits: shared, the same at all places; or by-place.
    """

    short = ("unigram",)
    latents = "codes"

    @checked
    def __init__(self, quantiser: VectorQuantiser, logits: Literal["shared", "by-place"] = "shared") -> None:
        super().__init__(quantiser)
        places = 1 if logits == "shared" else self.places
        self.logits = nn.Parameter(torch.zeros(places, len(self.codebook)))

    def forward(self) -> dist.Distribution:
        return IndependentCodes(self.logits, self.codebook, self.places)


class MaskedConvolutions(CodePrior):
    """Each code given those before it on the grid, by a gated PixelCNN.

    Args:
        quantiser: The guide whose codes they are.
        layers: Layers of its two stacks.
        hidden: Channels of its layers.
        reach: Places that a convolution reaches upwards, and to the left or either side.
    """

    short = ("pixelcnn", "masked-convolutions")
    latents = "codes"

    @checked
    def __init__(self, quantiser: VectorQuantiser, layers: Count = 4, hidden: Count = 64, reach: Count = 2) -> None:
        super().__init__(quantiser)
        self.network = GatedConvolutions(len(self.codebook), quantiser.grid, layers, hidden, reach)

    def forward(self) -> dist.Distribution:
        return AutoregressiveCodes(self.network, self.codebook, self.places)


class TransformerCodes(CodePrior):
    """Each code given those before it on the grid, by a transformer.

    Args:
        quantiser: The guide whose codes they are.
        layers: Blocks of attention and a dense layer.
        hidden: Width of its layers, a multiple of the heads.
        heads: Heads of each attention.
    """

    short = ("transformer",)
    latents = "codes"

    @checked
    def __init__(self, quantiser: VectorQuantiser, layers: Count = 2, hidden: Count = 64, heads: Count = 4) -> None:
        super().__init__(quantiser)
        self.network = CausalAttention(len(self.codebook), quantiser.grid, layers, hidden, heads)

    def forward(self) -> dist.Distribution:
        return AutoregressiveCodes(self.network, self.codebook, self.places)
