r"""Two stages: a trained VAE, and a model of its codes in the place of its prior.

The ELBO of a VAE, averaged over N rows with aggregate posterior q(z) = (1/N) sum_n q(z|x_n), is

    E_n ELBO  =  E log p(x|z)  -  I(x; z)  -  KL(q(z) || p(z))

and of its three terms the prior enters the last alone. A first stage may leave that one large, above all where a
likelihood's scale was learned: as the scale falls, the first two outweigh it. So p(x|z) and q(z|x) are then frozen, and
p(z) is replaced by what is fitted to draws of q(z|x):

    TwoStageVAE    p(z) = E_u p(z|u), a second VAE:    p(u) p(z|u) p(x|z)        q(z|x) q(u|z)
    ExPostVAE      p(z) any prior, fitted afterwards:  p(z) p(x|z)               q(z|x)

Both are ordinary pairs, and are trained by any bound on log p(x). For the ELBO that is the second stage's own training
on draws of q(z|x), new ones at each step: with log p(x|z) and log q(z|x) frozen,

    ELBO of the whole at x  =  E_q(z|x) [ ELBO of the second stage at z ]  +  E_q(z|x) [log p(x|z) - log q(z|x)]

where the last term has no parameter. The gradients are the same, draw by draw, and what is recorded is of x, in nats
that stand beside those of the first stage. Of a prior, whose ELBO at z is log p(z) itself, that is maximum likelihood
on the aggregate posterior: over all densities, E_n E_q(z|x_n) log p(z) = -H(q(z)) - KL(q(z) || p(z)) is the largest at
p(z) = q(z). For N(m, diag s^2) the maximum has a closed form, the moments of q(z):

    m = E_n E[z|x_n]        s^2 = E_n Var[z|x_n] + Var_n E[z|x_n]

After that q(z|x) is the guide of another posterior, p(z|x) under the new prior, than the one it was trained for. It may
be `adapted`: trained on, by the same bound, together with the prior, while p(x|z) stays.

A bound of several draws (IWAE) is closer to log p(x), and better where the codes lie in patches: the u of a z at an
edge are not spread as a Gaussian q(u|z) is, and the ELBO keeps p(z) near those that are.

A KL weight of the whole, beta, would only scale these gradients: everything of a second stage is in its KL.

References:
    Dai and Wipf 2019, Diagnosing and Enhancing VAE Models, https://arxiv.org/abs/1903.05789
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders (ex-post densities), https://arxiv.org/abs/1903.12436
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.guides import Guide
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.priors import Prior
from pyrovae.models.vae import VAE, BottomUp, Layer, check_latents
from pyrovae.settings import checked


class Decoded(nn.Module):
    """A likelihood of vectors z as the conditional p(z|u) of a hierarchy.

    Args:
        likelihood: p(z|u).
    """

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self.likelihood = likelihood

    @property
    def latent_dim(self) -> int:
        """Number of elements of z."""
        return math.prod(self.likelihood.event_shape)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of u."""
        return self.likelihood.latent_shape

    def forward(self, u: Tensor) -> dist.Distribution:
        """p(z|u) for u of shape (*batch, U): batch shape `batch`, event shape (Z,)."""
        return self.likelihood(u)


class SecondStage(BottomUp, ABC):
    """A trained VAE's p(x|z) and q(z|x), frozen, under another p(z).

    Frozen parameters get no gradient, and their modules stay in evaluation mode (no dropout; batch normalisation with
    the moments that it has found), whatever `train` asks for.

    Args:
        first: The trained VAE.
        prior: p of the top layer.
        conditionals: p(z|u), if there is a layer above z.
        guides: q(u|z), if there is.
        adapted: Whether q(z|x) is trained on, and only p(x|z) is frozen.

    Attributes:
        first_prior: The p(z) of the first stage, which is no part of this model.
        adapted: Whether q(z|x) is no longer that of the first stage.
    """

    @abstractmethod
    def __init__(
        self,
        first: VAE,
        prior: Prior,
        conditionals: Sequence[Layer] = (),
        guides: Sequence[Guide] = (),
        adapted: bool = False,
    ) -> None:
        super().__init__(prior, conditionals, first.likelihood, [*first.guides, *guides])
        self.first_prior, self.adapted = first.prior, adapted
        first.requires_grad_(False)
        first.guides[0].requires_grad_(adapted)
        self.train(self.training)

    @property
    def first(self) -> VAE:
        """The first stage: as it was trained, but for a q(z|x) that is `adapted`."""
        return VAE(self.first_prior, self.likelihood, self.guides[0])

    @torch.no_grad()
    def draw_codes(self, num_samples: int) -> Tensor:
        """Draws of z from this model's p(z), with torch's random state: shape (num_samples, Z)."""
        with pyro.poutine.block(), pyro.plate("samples", num_samples):
            return self.latent()

    def train(self, mode: bool = True) -> Self:
        """Put what is trained into training mode (or, with False, evaluation mode), and the first stage never."""
        super().train(mode)
        for part in (self.first_prior, self.likelihood, *([] if self.adapted else [self.guides[0]])):
            part.eval()
        return self


class TwoStageVAE(SecondStage):
    """A trained VAE with a second one for its prior: a hierarchy with latent sites "z1" (z) and "z2" (u).

    Args:
        first: A trained VAE of x, whose parts become this model's, frozen.
        second: A VAE of z: its data are vectors of the first's `latent_dim`. Its likelihood is of all real numbers, as
            a `Gaussian` with a learned scale: one for each element, since latents that the first stage does not use
            are noise of sd 1, and the others have finer structure.

    Raises:
        UsageError: the second is of vectors of another size than the first's latents; both are named.
    """

    word = "two-stage"

    def __init__(self, first: VAE, second: VAE) -> None:
        super().__init__(first, second.prior, [Decoded(second.likelihood)], second.guides)

    @property
    def second(self) -> VAE:
        """The second stage, whose data are draws of q(z|x)."""
        (decoded,) = self.conditionals
        assert isinstance(decoded, Decoded)
        return VAE(self.prior, decoded.likelihood, self.guides[1])

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Start the second stage at a draw of q(z|x) for each of the training data x (N, *event)."""
        self.second.initialise(self.posterior(x).sample())


class ExPostVAE(SecondStage):
    """A trained VAE with its prior replaced by one that is fitted afterwards: one latent site "z".

    Trained by the ELBO, the new prior is fitted by maximum likelihood to draws of q(z|x).

    Args:
        first: A trained VAE of x, whose parts become this model's, frozen.
        prior: The new p(z): any prior, of the first stage's guide too.
        guide: What becomes of the first stage's q(z|x) under the fitted prior: held or adapted, which is trained on
            beside the prior.

    Raises:
        UsageError: they disagree on the number of latent dimensions; both are named.
    """

    word = "ex-post"

    @checked
    def __init__(self, first: VAE, prior: Prior, guide: Literal["held", "adapted"] = "held") -> None:
        check_latents([(prior, first.guides[0])])
        super().__init__(first, prior, adapted=guide == "adapted")

    def initialise(self, x: Tensor) -> None:
        """Start the new prior at training data x (N, *event), where it depends on them."""
        self.prior.initialise(x)


# Pairs that are made of a trained one.
STAGED = (TwoStageVAE, ExPostVAE)
