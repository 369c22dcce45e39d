r"""A critic of codes, which tells draws of q(z) from draws of prod_d q(z_d): the density ratio of FactorVAE.

Draws of q(z) are those of a batch, one of each row; draws of the product of its marginals are the same with each
element of z permuted over the rows by itself. A network D with one output, trained by the logistic loss

    log(1 + exp(-D(z))) + log(1 + exp(D(z~))),        z ~ q(z),  z~ ~ prod_d q(z_d),

is at its best where D(z) = log q(z) - log prod_d q(z_d), whose mean over q(z) is the total correlation. The pair's
gradient is by that mean with D's parameters held, and D's by its loss with the draws held; the two are trained
together, each with an optimiser's state and a rate of its own (`pyrovae.inference.training.optimizers`).

References:
    Kim and Mnih 2018, Disentangling by Factorising, https://arxiv.org/abs/1802.05983
"""

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyrovae.models.networks import MLP
from pyrovae.settings import Count, checked


class Critic(nn.Module):
    """D, in a guide: `self.critic(z)` after z is drawn, inside the plate over the data.

    Args:
        latent_dim: Z.
        hidden: Widths of the hidden layers.

    Attributes:
        minimises: The site of the loss that its parameters minimise, and nothing else of the pair.
    """

    minimises = "critic_loss"

    @checked
    def __init__(self, latent_dim: Count, hidden: tuple[Count, ...] = (256, 256)) -> None:
        super().__init__()
        self.network = MLP(latent_dim, 1, hidden, activation="leaky_relu")

    def forward(self, z: Tensor) -> None:
        """Leave two sites for z of shape (*batch, N, Z): "critic_ratio" and "critic_loss", both (*batch, N)."""
        held = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        ratio = functional_call(self.network, held, (z,)).squeeze(-1)
        apart = torch.rand_like(z).argsort(-2)
        fake = z.detach().gather(-2, apart)
        loss = softplus(-self.network(z.detach())) + softplus(self.network(fake))
        pyro.deterministic("critic_ratio", ratio)
        pyro.deterministic("critic_loss", loss.squeeze(-1))
