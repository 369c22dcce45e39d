r"""A guide with auxiliary latents: q(z|x) is a mixture of infinitely many, with a model of what it was drawn by.

    q(z|x) = E q(a|x) [ q(z|a, x) ]

may have correlations, several modes and heavy tails although both factors are Gaussians, but it has no density that
could be computed. So the model is extended by a density r of what drew z, given what it is drawn for,

    p(x, z, a) = p(z) p(x|z) r(a|x, z)
    log w      = log p(z) + log p(x|z) + log r(a|x, z) - log q(a|x) - log q(z|a, x)

Whatever r is, it integrates to 1 over a, so that the extended model has the p(x) of the model: E w = p(x), every bound
is a bound on log p(x), and importance sampling over (a, z) estimates it. The ELBO is that of q(z|x), less what r misses
of q(a|x, z), the way back from z to a,

    E log w = log p(x) - KL(q(z|x) || p(z|x)) - E KL(q(a|x, z) || r(a|x, z)).

To Pyro, a is a latent of the extended model that is sampled after x: nothing depends on it, and x is drawn without it.

References:
    Maaloe et al. 2016, Auxiliary Deep Generative Models, https://arxiv.org/abs/1602.05473
    Ranganath, Tran and Blei 2016, Hierarchical Variational Models, https://arxiv.org/abs/1511.02386
    Agakov and Barber 2004, An Auxiliary Variational Method, ICONIP
"""

from functools import partial

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrovae.models.corruptions import Corruption
from pyrovae.models.descent import Descent, Given, alone, beside, descend
from pyrovae.models.features import Features, start_with_features
from pyrovae.models.guides import Guide, check_by_itself
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior
from pyrovae.models.vae import LatentLayers, Layer, Shape, check_arrows


class AuxiliaryVAE(LatentLayers):
    """One latent layer z, whose guide draws an auxiliary a first: latent sites "z" and "a".

    Args:
        prior: p(z).
        likelihood: p(x|z).
        features: A network from x to a vector d of features, for guide and r.
        auxiliary: q(a|x), a guide of d.
        guide: q(z|a, x), a guide of (a, d).
        reverse: r(a|x, z), of (z, d): a module that maps both to a distribution, such as any guide class.
        corruption: What the guide's features are of while it is trained; None: x. Those of r are of x.

    Raises:
        UsageError: neighbouring parts disagree on the number of dimensions; both sides are named.
    """

    word = "auxiliary"
    layers = (2, 2)  # sizes of z and of a
    code_note = ", with the auxiliary a at its mean"

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood,
        features: Network,
        auxiliary: Guide,
        guide: Guide,
        reverse: Layer,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__(prior, [], likelihood, corruption)
        self.features = Features([features])
        self.auxiliary, self.given_auxiliary, self.reverse = auxiliary, guide, reverse
        (size,) = self.features.sizes
        z, a = prior.latent_dim, auxiliary.latent_dim
        arrows: list[tuple[str, Shape, str, Shape, str]] = [
            ("x", self.event_shape, "the likelihood's output", self.features.event_shape, "the features' input"),
            ("z", (z,), "the prior's latent_dim", likelihood.latent_shape, "the decoder's input"),
            ("z", (z,), "the prior's latent_dim", (guide.latent_dim,), "the guide's"),
            ("features", (size,), "what there is of x", auxiliary.event_shape, "the input of q(a|x)"),
            ("(a, features)", (a + size,), "what there is of both", guide.event_shape, "the guide's input"),
            ("(z, features)", (z + size,), "what there is of both", reverse.event_shape, "the input of r(a|x, z)"),
            ("a", (a,), "the latent_dim of q(a|x)", (reverse.latent_dim,), "that of r(a|x, z)"),
        ]
        check_arrows(arrows)
        for part in (auxiliary, guide):
            check_by_itself(part, "a pair with auxiliary latents")

    def extend(self, x: Tensor, z: Tensor) -> None:
        """Sample a ~ r(a|x, z), with x as the model has it: what it observes, or what was drawn in its place."""
        (d,) = self.features(x)
        pyro.sample("a", self.reverse(beside(z, d)))

    def downwards(self, x: Tensor) -> tuple[dist.Distribution, Given]:
        """q(a|x), and q(z|a, x) as a function of a."""
        (d,) = self.features(x)
        return self.auxiliary(d), partial(self.drawn_by, d)

    def drawn_by(self, features: Tensor, a: Tensor) -> dist.Distribution:
        """q(z|a, x) for features (N, F) and a (*batch, N, A)."""
        return self.given_auxiliary(beside(a, features))

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            top, below = self.downwards(self.corruption(x))
            return descend([("z", below, alone)], pyro.sample("a", top))

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z|x) for x of shape (*batch, *event), never corrupted; its `mean` is that of q(z|a, x) at the mean of a."""
        top, below = self.downwards(x)
        return Descent(top, [below], [alone], [self.prior.latent_dim])

    def initialise(self, x: Tensor) -> None:
        start_with_features(self, x)
