r"""Discrete latents: vectors of Z bits, and one of Z categories as a one-hot vector.

    IndependentBernoulli   p(z) = prod_d Bernoulli(z_d; sigmoid(b_d))       BernoulliGuide    q(z_d|x) the same, b_d(x)
    CategoricalPrior       p(z = e_c) = exp(b_c) / sum_j exp(b_j)           CategoricalGuide  the same, with b(x)

A VAE of bits is a sigmoid belief net: layers of bits, each given the one above by `BernoulliGuide` as the conditional.
One of Z categories is a mixture of Z likelihoods, whose weights are the prior. Of either, log p(x) is a sum over 2^Z or
Z states, exact where it is affordable (`pyrovae.inference.log_marginal`).

Draws have no reparameterised sampler, so that training asks for an estimator of the gradient that does without.

References:
    Saul, Jaakkola and Jordan 1996, Mean Field Theory for Sigmoid Belief Networks, https://arxiv.org/abs/cs/9603102
    Mnih and Gregor 2014, Neural Variational Inference and Learning in Belief Networks, https://arxiv.org/abs/1402.0030
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.guides import Guide
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior
from pyrovae.settings import Count, checked


class IndependentBernoulli(Prior):
    """Bits, independent, with learned logits.

    Args:
        latent_dim: Z, the number of bits.
    """

    short = ("bernoulli",)
    latents = "bits"

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__(latent_dim)
        self.logits = nn.Parameter(torch.zeros(latent_dim))

    def forward(self) -> dist.Distribution:
        return dist.Bernoulli(logits=self.logits).to_event(1)


class CategoricalPrior(Prior):
    """One of Z categories, as a one-hot vector, with learned logits.

    Args:
        latent_dim: Z, the number of categories.
    """

    short = ("categorical",)
    latents = "one-hot vectors"

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__(latent_dim)
        self.logits = nn.Parameter(torch.zeros(latent_dim))

    def forward(self) -> dist.Distribution:
        return dist.OneHotCategorical(logits=self.logits)


class BernoulliGuide(Guide):
    """Bits, independent given x."""

    short = ("bernoulli",)
    latents = "bits"

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=self.parameters_of(x)).to_event(1)


class CategoricalGuide(Guide):
    """One of Z categories given x, as a one-hot vector."""

    short = ("categorical",)
    latents = "one-hot vectors"

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.OneHotCategorical(logits=self.parameters_of(x))
