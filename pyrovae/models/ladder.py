r"""A ladder: a hierarchy whose guide is drawn from the top down, as its model is.

    p(x, z) = p(zL) p(zL-1|zL) ... p(z1|z2) p(x|z1)
    q(z|x)  = q(zL|x) q(zL-1|zL, x) ... q(z1|z2, x)

The posterior of such a model has the factors p(z_i|z_{i+1}, x). One from the data upwards, p(z1|x) p(z2|z1) ..., is the
same, but its p(z1|x) has all correlations that z1 owes to the layers above, of which p(z1|z2, x) is free: with factors
that are Gaussians of diagonal covariance, a guide in this order may be the posterior where one in the other cannot.
Its KL is the sum over layers of

    E KL(q(z_i|above, x) || p(z_i|above)),

each in closed form given the draws above.

What q(z_i|above, x) has of x are features d_i of a pass from the data upwards, d_1 = f_1(x), d_i = f_i(d_{i-1}), which
is run once for each datum (`Features`). They meet what comes from above in one of three ways:

    precision   q proportional to N(z_i; m(d_i), s(d_i)^2) p(z_i|above): a message from below times the model's own
                conditional. Precisions add, and means are averaged by precision. Under a linear Gaussian model whose
                p(x|z1) has no correlations between the elements of z1, that is p(z1|z2, x) itself.
    relative    q = N(m + s a, s^2 b^2) for p(z_i|above) = N(m, s^2) and a, b functions of (above, d_i): what x changes
                of the model's own conditional, in its units. Its KL is that of N(a, b^2) from N(0, 1), whatever p is,
                and none where x says nothing.
    learned     q = any guide of (above, d_i), through a network.

What is above z_i is handed down by model and guide alike: the next layer, z_{i+1}; all layers above, as skip
connections do; or a state to which all of them were added (`pyrovae.models.states`), that both p and q are read from.
With a state hierarchies of five layers and more are trained, since each reaches x past all others, at a cost that grows
as L. Residual blocks between layers are a matter of the networks (`ResidualMLP`, and on grids `GridEncoder`).

References:
    Sonderby et al. 2016, Ladder Variational Autoencoders, https://arxiv.org/abs/1602.02282
    Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow (its bidirectional hierarchy),
        https://arxiv.org/abs/1606.04934
    Vahdat and Kautz 2020, NVAE: A Deep Hierarchical Variational Autoencoder (the relative posterior),
        https://arxiv.org/abs/2007.03898
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Corruption
from pyrovae.models.descent import Descent, Given, beside, descend
from pyrovae.models.features import Features, start_with_features
from pyrovae.models.guides import Guide, MeanFieldNormal, check_by_itself
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior
from pyrovae.models.states import State
from pyrovae.models.vae import LatentLayers, Layer, Shape, check_arrows
from pyrovae.settings import checked


class LadderVAE(LatentLayers):
    """Several latent layers, with a guide from the top down.

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards: each a module that maps what is above to a
            distribution, such as any guide class over a network. What is above are the elements of the next layer;
            those of all layers above, the next one first; or those of the state.
        likelihood: p(x|z1); of all layers or of the state, where these are handed down, p(x|z1, ..., zL).
        features: f_1, ..., f_L, from the data upwards: networks to vectors of features of x.
        guides: What q(z_i|above, x) is made of, from the data upwards: over (above, d_i), or with the merge
            "precision" over d_i; at the top, over d_L.
        corruption: What the features are of while they are trained; None: x.
        merge: How features of x meet what comes from above: learned, any guide of both; precision, a Gaussian from
            below times the model's own one; or relative, the model's own Gaussian shifted and rescaled.
        above: What every layer, and x, is given of the layers above it: next, the next one; all; or state, a vector or
            grid that all of them were added to.
        states: How each layer changes the state, from the data upwards; none, unless there is one.

    Raises:
        UsageError: neighbouring parts disagree on the number of dimensions, both sides are named; or a merge but
            "learned" is given what is no Gaussian of diagonal covariance.
    """

    word = "ladder"
    layers = (2, None)
    code_note = ", each layer with those above it at their means"

    @checked
    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Layer],
        likelihood: Likelihood,
        features: Sequence[Network],
        guides: Sequence[Guide],
        corruption: Corruption | None = None,
        merge: Literal["learned", "precision", "relative"] = "learned",
        above: Literal["next", "all", "state"] = "all",
        states: Sequence[State] = (),
    ) -> None:
        super().__init__(prior, conditionals, likelihood, corruption, above, states)
        self.features = Features(features)
        self.guides: Sequence[Guide] = nn.ModuleList(guides)  # type: ignore[assignment]
        self.merge = merge
        self.check_shapes()
        for guide in guides:
            check_by_itself(guide, "a ladder")

    def check_shapes(self) -> None:
        """Compare the shapes on both sides of every arrow."""
        sizes, found, states = self.sizes, self.features.sizes, list(self.states)
        if not len(sizes) == len(self.guides) == len(found):
            raise UsageError(
                f"guides, features: {len(self.conditionals)} conditionals need {len(sizes)} of each, "
                f"got {len(self.guides)} and {len(found)}"
            )
        if len(states) != (len(sizes) if self.above == "state" else 0):
            raise UsageError(f"states: of {len(sizes)} layers, above={self.above!r} does not go with {len(states)}")
        # What is handed down past each layer, from the data upwards: x is given the first.
        handed = {
            "next": sizes,
            "all": [sum(sizes[i:]) for i in range(len(sizes))],
            "state": [state.out_size for state in states],
        }[self.above]
        arrows: list[tuple[str, Shape, str, Shape, str]] = [
            ("x", self.event_shape, "the likelihood's output", self.features.event_shape, "the features' input"),
            ("z", handed[:1], "what is handed down", self.likelihood.latent_shape, "the decoder's input"),
        ]
        for i, (size, guide) in enumerate(zip(sizes, self.guides, strict=True)):
            above = handed[i + 1 : i + 2]
            inputs = [found[i] + (sum(above) if self.merge != "precision" else 0)]
            arrows.append(("z", [size], "a layer of the model", [guide.latent_dim], "the guide's latent_dim"))
            arrows.append(("(above, features)", inputs, "what there is of both", guide.event_shape, "a guide's input"))
            if above:
                arrows.append(("z", above, "what is above", self.conditionals[i].event_shape, "a conditional's input"))
            if states:
                inside = [states[i].in_size]
                arrows.append(("z", [size], "a layer of the model", [states[i].latent_dim], "that of its state"))
                arrows.append(("state", above or inside, "what is above", inside, "a state's input"))
        check_arrows(arrows)
        for part in (*self.conditionals, *self.guides[:-1]) if self.merge != "learned" else ():
            if not isinstance(part, MeanFieldNormal):
                what = "multiplies" if self.merge == "precision" else "shifts and rescales"
                raise UsageError(
                    f"merge: {self.merge} {what} Gaussians of diagonal covariance, got {type(part).__name__}; choose "
                    "learned, which takes any guide"
                )

    def downwards(self, x: Tensor) -> tuple[dist.Distribution, list[Given]]:
        """q(zL|x), and q(z_i|above, x) of the layers below it from the top down, for x of shape (*batch, *event)."""
        *below, top = self.features(x)
        levels = reversed(list(enumerate(below)))
        return self.guides[-1](top), [partial(self.merged, i, features) for i, features in levels]

    def merged(self, level: int, features: Tensor, above: Tensor) -> dist.Distribution:
        """q(z_i|above, x) for features (N, F_i) and what is above, (*batch, N, A)."""
        if self.merge == "precision":
            return product(self.guides[level](features), self.conditionals[level](above))
        found = self.guides[level](beside(above, features))
        return found if self.merge == "learned" else within(found, self.conditionals[level](above))

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            top, below = self.downwards(self.corruption(x))
            (*sites, first), (*onwards, start) = self.latent_sites, self.onwards
            above = start(pyro.sample(first, top), None)
            return descend(zip(reversed(sites), below, reversed(onwards), strict=True), above)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q of the code for x of shape (*batch, *event), never corrupted; `mean` with the layers above at theirs."""
        return Descent(*self.downwards(x), self.onwards[:0:-1], list(self.code.values()))

    def initialise(self, x: Tensor) -> None:
        start_with_features(self, x)


def product(a: dist.Distribution, b: dist.Distribution) -> dist.Distribution:
    """The Gaussian that is proportional to the product of two of diagonal covariance, event shape (Z,)."""
    in_a, in_b = 1 / a.variance, 1 / b.variance
    precision = in_a + in_b
    return dist.Normal((in_a * a.mean + in_b * b.mean) / precision, precision.rsqrt()).to_event(1)


def within(a: dist.Distribution, b: dist.Distribution) -> dist.Distribution:
    """The Gaussian a of diagonal covariance in the units of another, b, event shape (Z,): a itself for b = N(0, 1)."""
    return dist.Normal(b.mean + b.stddev * a.mean, b.stddev * a.stddev).to_event(1)
