r"""Pairs with a class y beside z, which is seen for some rows, for all or for none.

    SemiSupervisedVAE (M2)   p(y) p(z) p(x|z, y)          q(y|x) q(z|x, y)
    GaussianMixtureVAE       p(y) p(z|y) p(x|z)           the same; p(z|y) = N(m_y, diag s_y^2)

y is a one-hot vector of C elements, a latent site "y" like z. Without a label the bound is one of log p(x), and y,
which has no reparameterised sampler, is summed out of it (`gradient=enumerated`):

    U(x) = sum_y q(y|x) [L(x, y) - log q(y|x)],     L(x, y) = E_q(z|x, y) log p(x, y, z) / q(z|x, y)

Of a row whose label l is seen the bound is to be one of log p(x, y = l), which is L(x, l). Both are one program: the
model observes the label, p(l|y) = 1 if l is y and else 0, and the guide of a row with a label puts all of q(y|x, l) on
it. Its y has one state then, with log q = 0.

Nothing of L(x, l) trains the classifier q(y|x). So the guide observes the label as well, under q(y|x): what a guide
observes is no part of log q, and an objective may ask for its log-probability, alpha log q(y = l|x)
(`pyrovae.inference.SemiSupervised`). Without it the sum over y may find classes of its own.

Of a GaussianMixtureVAE no label is seen. Its p(x) is that of a VAE whose prior is the same mixture with the component
summed out, sum_y p(y) N(z; m_y, s_y); what differs is that the guide may say which component a row is of.

References:
    Kingma et al. 2014, Semi-Supervised Learning with Deep Generative Models, https://arxiv.org/abs/1406.5298
    Dilokthanakul et al. 2016, Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders,
        https://arxiv.org/abs/1611.02648
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.conditional import ConditionalPrior
from pyrovae.models.corruptions import Clean, Corruption
from pyrovae.models.descent import Descent, alone, beside
from pyrovae.models.discrete import CategoricalGuide, CategoricalPrior
from pyrovae.models.features import Features
from pyrovae.models.gaps import completed
from pyrovae.models.guides import Guide, check_by_itself
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.moments import moments_of
from pyrovae.models.networks import Network
from pyrovae.models.priors import MixtureOfGaussians
from pyrovae.models.temperature import tempered
from pyrovae.models.vae import Shape, check_arrows
from pyrovae.settings import Number, Whole, check

# Log-odds of what is certain: e^-10000 is 0 in any precision, and no infinity gets into a gradient.
CERTAIN = 1e4


class LabelledVAE(nn.Module, ABC):
    """A pair with latent sites "y", a class, and "z".

    Args:
        likelihood: p(x|z, y) or p(x|z).
        features: A network from x to a vector d of features, for both guides.
        classifier: q(y|x), a guide of d.
        guide: q(z|x, y), a guide of (d, y).
        corruption: What the features are of while they are trained; None: x.

    Attributes:
        word: What it is called where it is chosen by name.
        usual: What a run of it is trained by, and its prior, unless it is said.
        of_labels: Whether labels are seen in a run of it.
        code_note: What has to be said where mean and standard deviation of `posterior` are shown.
    """

    word: ClassVar[str]
    usual: ClassVar[Mapping[str, str]] = {"gradient": "enumerated"}
    of_labels: ClassVar[bool] = False
    latent_sites: ClassVar[tuple[str, ...]] = ("z", "y")
    code_note: ClassVar[str] = ", z with y at its mean"

    @abstractmethod
    def __init__(
        self,
        likelihood: Likelihood,
        features: Network,
        classifier: CategoricalGuide,
        guide: Guide,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__()
        self.likelihood, self.features = likelihood, Features([features])
        self.classifier, self.given_class = classifier, guide
        self.corruption = Clean() if corruption is None else corruption

    def check_shapes(self, latent_dim: int, num_classes: int) -> None:
        """Compare the shapes on both sides of every arrow, for a prior of so many classes and elements of z."""
        check_by_itself(self.given_class, "a pair with classes")
        (size,) = self.features.sizes
        classes, code = (num_classes,), (sum(self.code.values()),)
        arrows: list[tuple[str, Shape, str, Shape, str]] = [
            ("x", self.event_shape, "the likelihood's output", self.features.event_shape, "the features' input"),
            ("y", classes, "the number of classes", (self.classifier.latent_dim,), "the classifier's"),
            ("features", (size,), "what there is of x", self.classifier.event_shape, "the classifier's input"),
            ("z", (latent_dim,), "the prior's latent_dim", (self.given_class.latent_dim,), "the guide's"),
            ("(features, y)", (size + classes[0],), "what there is", self.given_class.event_shape, "the guide's input"),
            ("code", code, "what the likelihood is given", self.likelihood.latent_shape, "the decoder's input"),
        ]
        check_arrows(arrows)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return self.likelihood.event_shape

    @property
    def num_classes(self) -> int:
        """C."""
        return self.classifier.latent_dim

    @property
    @abstractmethod
    def code(self) -> dict[str, int]:
        """The latent sites that the likelihood sees, in order, and the number of elements of each."""

    @abstractmethod
    def class_prior(self) -> dist.Distribution:
        """p(y), batch shape (), event shape (C,)."""

    @abstractmethod
    def latent_prior(self, y: Tensor) -> dist.Distribution:
        """p(z|y) for y (*batch, C): batch shape `batch` or (), event shape (Z,)."""

    @abstractmethod
    def code_of(self, z: Tensor, y: Tensor) -> Tensor:
        """What the likelihood is given of z (*batch, Z) and y, (*batch, C) or (N, C): shape (*batch, code)."""

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z, y), of rows with a label p(x, z, y, label), as a Pyro model.

        Args:
            x: Shape (N, *event).
            y: The labels that are seen, one-hot, shape (N, C); zeros for rows without. None: no row has one.

        Raises:
            DataError: x has values outside the support of the likelihood.
            UsageError: y has another shape.
        """
        if dist.is_validation_enabled():  # as it is not in a trace, where x has no values
            self.likelihood.check_support(x)
        with pyro.plate("data", len(x)):
            of_row = pyro.sample("y", self.class_prior())
            if y is not None:
                observe_label(dist.OneHotCategorical(logits=CERTAIN * of_row, validate_args=False), self.checked(y))
            return self.below(x, of_row)

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """q(y|x) q(z|x, y) as a Pyro guide; of rows with a label y is that. In training mode of x as corrupted."""
        with pyro.plate("data", len(x)):
            (d,) = self.features(self.corruption(x))
            q = self.classifier(d)
            if y is not None:
                observe_label(q, self.checked(y))
                seen = y.sum(-1, keepdim=True) > 0
                q = dist.OneHotCategorical(logits=torch.where(seen, CERTAIN * y, q.logits))
            return pyro.sample("z", self.given_class(beside(pyro.sample("y", q), d)))

    def model_of_class(self, x: Tensor, y: Tensor) -> Tensor:
        """p(x, z | y) as a Pyro model, for x (N, *event) and one-hot y (N, C)."""
        with pyro.plate("data", len(x)):
            return self.below(x, self.checked(y))

    def guide_of_class(self, x: Tensor, y: Tensor) -> Tensor:
        """q(z|x, y) as a Pyro guide, for x (N, *event) and one-hot y (N, C)."""
        with pyro.plate("data", len(x)):
            (d,) = self.features(self.corruption(x))
            return pyro.sample("z", self.given_class(beside(self.checked(y), d)))

    def below(self, x: Tensor, y: Tensor) -> Tensor:
        """Sample z and x given y, within the plate."""
        z = pyro.sample("z", self.latent_prior(y))
        return pyro.sample("x", self.likelihood(self.code_of(z, y)), obs=x)

    def checked(self, y: Tensor) -> Tensor:
        """Labels, looked at.

        Raises:
            UsageError: they have not C elements in the last dimension.
        """
        if y.shape[-1:] != (self.num_classes,):
            raise UsageError(f"y: expected shape (N, {self.num_classes}), got {tuple(y.shape)}; give one-hot labels")
        return y

    def initialise(self, x: Tensor, y: Tensor | None = None) -> None:
        """Start what depends on the data at training data x (N, *event): output bias, input centring."""
        whole = completed(x)  # x itself, unless it has gaps
        self.corruption.initialise(whole)
        self.features.initialise(x)
        self.likelihood.initialise(x)

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """log q(y|x) of the guide in nats, for x (N, *event) never corrupted: shape (N, C)."""
        (d,) = self.features(x)
        return self.classifier(d).logits.log_softmax(-1)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.Distribution:
        """q of the code for x (N, *event), never corrupted, and labels (N, C) if they are seen: event shape (code,)."""
        (d,) = self.features(x)
        q = self.classifier(d)
        if y is not None:
            seen = self.checked(y).sum(-1, keepdim=True) > 0
            q = dist.OneHotCategorical(logits=torch.where(seen, CERTAIN * y, q.logits))
        return Descent(q, [partial(self.given_features, d)], [alone], list(self.code.values()))

    def given_features(self, d: Tensor, y: Tensor) -> dist.Distribution:
        """q(z|x, y) for features d (N, F) and y (*batch, C)."""
        return self.given_class(beside(y, d))

    @torch.no_grad()
    def sample(self, num_samples: int, y: Tensor | None = None, mean: bool = False, temperature: float = 1.0) -> Tensor:
        """Draws of x: y from p(y), z from p(z|y), then x from p(x|z, y), with torch's random state.

        Args:
            num_samples: How many, at least 1.
            y: The class of all of them, one-hot (C,), or of each (num_samples, C); None: drawn.
            mean: The mean of p(x|z, y) at each z in place of a draw: without the noise of x, as pictures are shown.
            temperature: Above 0; the noise of z is times this. With any but 1 these are no draws of p(x).

        Returns:
            Shape (num_samples, *event).
        """
        check("num_samples", num_samples, Whole(1))
        check("temperature", temperature, Number(above=0))
        with pyro.poutine.block(), pyro.plate("samples", num_samples):
            y = pyro.sample("y", self.class_prior()) if y is None else self.checked(y).expand(num_samples, -1)
            z = pyro.sample("z", tempered(self.latent_prior(y), temperature))
            likelihood = self.likelihood(self.code_of(z, y))
            return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean of `posterior`, shape (N, code)."""
        return moments_of(self.posterior(x, y), x.device).mean

    @torch.no_grad()
    def decode(self, code: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean of p(x|z, y) for codes of shape (*batch, code), with a class in place of theirs: (*batch, *event)."""
        if y is not None:
            latent = self.code["z"]
            code = self.code_of(code[..., :latent], self.checked(y))
        return self.likelihood(code).mean

    @torch.no_grad()
    def remarks(self, x: Tensor, y: Tensor | None = None) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event), in sentences."""
        return self.likelihood.remarks(self.encode(x, y))

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean of p(x|z, y) at the code of x, shape (N, *event)."""
        return self.decode(self.encode(x, y))


class SemiSupervisedVAE(LabelledVAE):
    """M2, labels that are seen for some rows: latent sites "y" and "z", and p(x|z, y).

    Args:
        classes: p(y).
        prior: p(z|y), as `UnconditionalPrior(StandardNormal(Z))`.
        likelihood: p(x|z, y), its decoder over vectors (z, y) of Z + C elements.
        features: A network from x to a vector d of features, for both guides.
        classifier: q(y|x), a guide of d.
        guide: q(z|x, y), a guide of vectors (y, d) of C + F elements.
        corruption: What the features are of while they are trained; None: x.

    Raises:
        UsageError: neighbouring parts disagree on the number of dimensions; both sides are named.

    References:
        Kingma et al. 2014, Semi-Supervised Learning with Deep Generative Models, https://arxiv.org/abs/1406.5298
    """

    word = "m2"
    usual: ClassVar[Mapping[str, str]] = {"elbo": "semi-supervised", "gradient": "enumerated"}
    of_labels = True

    def __init__(
        self,
        classes: CategoricalPrior,
        prior: ConditionalPrior,
        likelihood: Likelihood,
        features: Network,
        classifier: CategoricalGuide,
        guide: Guide,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__(likelihood, features, classifier, guide, corruption)
        self.classes, self.prior = classes, prior
        self.check_shapes(prior.latent_dim, classes.latent_dim)

    @property
    def code(self) -> dict[str, int]:
        return {"z": self.prior.latent_dim, "y": self.num_classes}

    def class_prior(self) -> dist.Distribution:
        return self.classes()

    def latent_prior(self, y: Tensor) -> dist.Distribution:
        return self.prior(y)

    def code_of(self, z: Tensor, y: Tensor) -> Tensor:
        return beside(z, y)


class GaussianMixtureVAE(LabelledVAE):
    """Clusters that nobody names: latent sites "y" and "z", p(z|y) a component of a mixture, and p(x|z).

    Args:
        prior: The mixture: p(y) are its weights, p(z|y) its components. A VAE of the same prior has the same p(x).
        likelihood: p(x|z).
        features: A network from x to a vector d of features, for both guides.
        classifier: q(y|x), a guide of d.
        guide: q(z|x, y), a guide of vectors (y, d) of C + F elements.
        corruption: What the features are of while they are trained; None: x.

    Raises:
        UsageError: neighbouring parts disagree on the number of dimensions; both sides are named.

    References:
        Dilokthanakul et al. 2016, Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders,
            https://arxiv.org/abs/1611.02648
    """

    word = "gmvae"
    usual: ClassVar[Mapping[str, str]] = {"prior": "MixtureOfGaussians", "gradient": "enumerated"}

    def __init__(
        self,
        prior: MixtureOfGaussians,
        likelihood: Likelihood,
        features: Network,
        classifier: CategoricalGuide,
        guide: Guide,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__(likelihood, features, classifier, guide, corruption)
        self.prior = prior
        self.check_shapes(prior.latent_dim, prior.components)

    @property
    def code(self) -> dict[str, int]:
        return {"z": self.prior.latent_dim}

    def class_prior(self) -> dist.Distribution:
        return dist.OneHotCategorical(logits=self.prior.logits)

    def latent_prior(self, y: Tensor) -> dist.Distribution:
        return self.prior.component(y)

    def code_of(self, z: Tensor, y: Tensor) -> Tensor:
        return z


def observe_label(p: dist.Distribution, y: Tensor) -> None:
    """Observe, within the plate, the labels of rows that have one, one-hot (N, C); of the others nothing."""
    seen = y.sum(-1) > 0
    first = torch.zeros_like(y).index_fill(-1, torch.zeros(1, dtype=torch.long, device=y.device), 1.0)
    pyro.sample("label", p.mask(seen), obs=torch.where(seen.unsqueeze(-1), y, first))


# Pairs with a class.
LABELLED = (SemiSupervisedVAE, GaussianMixtureVAE)
