r"""Likelihoods of documents as counts of words: a multinomial, its words from one distribution or from several topics.

A document of n words of V kinds has counts x_1 + ... + x_V = n. Given their total, which no model here is of,

    log p(x | z, n) = log n! - sum_v log x_v! + sum_v x_v log p_v(z)

is a mass on the counts of that total. The first two terms are the number of orders that the words may have come in: a
log p without them is one of the words in their order, of which perplexity, exp(-log p / n), is a function.

    Multinomial   p(z) = softmax of the decoder's output. With a decoder without hidden layers a product of experts,
                  p_v proportional to prod_k b_kv^{z_k} (ProdLDA)
    Topics        p(z) = sum_k z_k b_k, a mixture, with z the shares of the topics, on a simplex, and b_k the softmax of
                  the decoder's output at the corner e_k: latent Dirichlet allocation, its words' topics summed out

A decoder of topics is run at Z corners, however many documents and particles there are.

References:
    Blei, Ng and Jordan 2003, Latent Dirichlet Allocation, JMLR 3
    Srivastava and Sutton 2017, Autoencoding Variational Inference for Topic Models, https://arxiv.org/abs/1703.01488
    Miao, Yu and Blunsom 2016, Neural Variational Inference for Text Processing, https://arxiv.org/abs/1511.06038
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae.errors import UsageError
from pyrovae.models.counts import OfCounts
from pyrovae.models.likelihood import set_output_bias
from pyrovae.models.networks import Network
from pyrovae.models.simplex import held

LEAST_COUNT = 0.1  # of a word, at which frequencies start that no document may have


class WordCounts(dist.TorchDistribution):
    """Counts of words given their total: event shape (V,); draws are of documents of a usual length.

    Args:
        log_probs: log p_v, shape (*batch, V).
        total: Words of a draw.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, log_probs: Tensor, total: Tensor) -> None:
        self.log_probs, self.total = log_probs, total
        super().__init__(log_probs.shape[:-1], log_probs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "WordCounts":
        return WordCounts(self.log_probs.expand(*batch_shape, *self.event_shape), self.total)

    @property
    def mean(self) -> Tensor:
        return self.total * self.log_probs.exp()

    @property
    def variance(self) -> Tensor:
        return self.total * self.log_probs.exp() * -self.log_probs.expm1()

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        words = dist.Multinomial(int(self.total), logits=self.log_probs, validate_args=False)
        return words.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | z, n) in nats, shape `batch`: see above."""
        return log_orders(value) + (value * self.log_probs).sum(-1)


def log_orders(x: Tensor) -> Tensor:
    """log n! - sum_v log x_v!, of counts x (*batch, V): how many orders their words may have come in."""
    return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)


class OfDocuments(OfCounts, ABC):
    """A mass on the counts of words of documents given their totals.

    Args:
        decoder: Maps z to (V,).

    Raises:
        UsageError: the decoder's output is no vector.
    """

    total: Tensor

    @abstractmethod
    def __init__(self, decoder: Network) -> None:
        if len(decoder.out_shape) != 1:
            raise UsageError(
                f"likelihood: documents are vectors of counts, one for each word, and these rows are of shape "
                f"{decoder.out_shape}; use a likelihood of counts or of levels",
                settings=("likelihood",),
            )
        super().__init__(decoder, decoder.out_shape)
        self.register_buffer("total", torch.tensor(100.0))  # words of a draw

    @classmethod
    @final
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return event_shape

    @final
    def initialise(self, x: Tensor) -> None:
        """Start at the frequency of each word, and draw documents of the mean length."""
        self.total.copy_(x.flatten(1).sum(1).mean().round().clamp(min=1))
        set_output_bias(self.decoder, x.mean(0).clamp(min=LEAST_COUNT / len(x)).log())


class Multinomial(OfDocuments):
    """A mass on the counts of a document's words given their total: the softmax of the decoder's output.

    Args:
        decoder: Maps z to (V,).
    """

    measure = "documents"

    def __init__(self, decoder: Network) -> None:
        super().__init__(decoder)

    def forward(self, z: Tensor) -> dist.Distribution:
        return WordCounts(self.decoder(z).log_softmax(-1), self.total)


class Topics(OfDocuments):
    """A mass on the counts of a document's words given their total: a mixture of topics by their shares z.

    Args:
        decoder: Maps the corners of the simplex, (Z, Z), to topics, (Z, V).
    """

    measure = "documents"
    latents = "points of a simplex"

    def __init__(self, decoder: Network) -> None:
        super().__init__(decoder)

    def forward(self, z: Tensor) -> dist.Distribution:
        return WordCounts(held(z @ self.topics()).log(), self.total)

    def topics(self) -> Tensor:
        """The distribution of each topic over words, shape (Z, V), rows summing to 1."""
        corners = torch.eye(self.latent_shape[0]).to(next(self.decoder.parameters()))
        return self.decoder(corners).softmax(-1)
