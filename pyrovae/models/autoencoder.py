r"""Models that reconstruct and have no p(x): the autoencoder, plain or denoising, and principal component analysis.

An autoencoder is what is left of a VAE without its prior and the width of its guide: a code z = f(x), which is a point,
and a likelihood that is to explain x by it,

    maximise E log p(x | f(x))        or, with corruption, E log p(x | f(c(x, e)))  of the clean x: a denoising one

which for a Gaussian of fixed scale s is the least squared error, in units of 2 s^2. As a Pyro pair the code has a flat
prior, which is no density, and the guide is a Delta, which has none: so training goes as for any pair, what it
maximises is recorded as an objective and not as a bound, and `log_marginal`, `gaps` and whatever else is of p(x)
refuses it. Nothing asks the codes to be anywhere in particular, so that there is nothing to draw new ones from.

PCA is the linear autoencoder of least squared error, in closed form: with U_Q the eigenvectors of the rows' covariance
that have the Q largest eigenvalues, z = U_Q^T (x - mean) and its reconstruction mean + U_Q z. A trained linear
autoencoder spans the same subspace, with axes of its own.

**Draws.** After training, `fit_codes` fits a mixture of Gaussians to the codes of the training rows, with the number of
components that is best on those of validation rows, and `sample` decodes draws from it. That is an ex-post density of
codes, and none of x: rows that no code decodes to have none.

References:
    Baldi and Hornik 1989, Neural Networks and Principal Component Analysis, Neural Networks 2
    Vincent et al. 2008, Extracting and Composing Robust Features with Denoising Autoencoders, ICML
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, https://arxiv.org/abs/1903.12436
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Clean, Corruption
from pyrovae.models.exact import best_on, check_real
from pyrovae.models.guides import Guide
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.linear_gaussian import Moments
from pyrovae.models.mixture import GaussianMixture
from pyrovae.models.networks import Network
from pyrovae.settings import Whole, check

BLOCK = 1000  # rows encoded at a time
COMPONENTS = (1, 2, 5, 10, 20, 50, 100)  # of the codes' density, tried until one is worse on the validation rows


class Reconstruction(nn.Module, ABC):
    """A code for each row and a reconstruction from it; no p(x).

    Args:
        latent_dim: Z, elements of a code.
    Attributes:
        word: What it is called where it is chosen by name.
        closed_form: Whether it is `fit` at once; else it is trained as a pair.
        codes: The ex-post density of codes, once `fit_codes` has made it.
    """

    word: ClassVar[str]
    closed_form: ClassVar[bool] = False
    codes: GaussianMixture | None

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check("latent_dim", latent_dim, Whole(1))
        self.latent_dim = latent_dim
        self.codes = None

    @abstractmethod
    def model(self, x: Tensor) -> None:
        """x given its code, as a Pyro model with a flat prior of codes: sites `z` and `x`, in the plate `data`."""

    @abstractmethod
    def guide(self, x: Tensor) -> None:
        """The code of x, as a Pyro guide: a Delta at the site `z`."""

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start at training data x of shape (N, *event); in closed form, end there."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes of rows x (N, *event), shape (N, Z)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """What codes of shape (*batch, Z) are decoded to, shape (*batch, *event)."""

    @abstractmethod
    def check_support(self, x: Tensor) -> None:
        """Refuse rows x (N, *event) that have no reconstruction.

        Raises:
            DataError: some value is outside the support.
        """

    @abstractmethod
    def remarks(self, x: Tensor) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event), in sentences."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction of rows x, shape (N, *event)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fit_codes(
        self, x: Tensor, validation: Tensor, components: Sequence[int] = COMPONENTS, seed: int = 0
    ) -> GaussianMixture:
        """Fit a mixture of Gaussians of full covariance to codes, as `sample` needs it.

        Args:
            x: Training rows, shape (N, *event).
            validation: Rows whose codes choose the number of components.
            components: Numbers to try, increasing, until one is worse than the one before.
            seed: Of k-means, where EM starts.
        Returns:
            The density of codes, which the model keeps as `codes`.
        Raises:
            UsageError: there are fewer rows than the least number of components.
        """
        train, held_out = (
            torch.cat([self.encode(block) for block in rows.split(BLOCK)]).double() for rows in (x, validation)
        )
        found = best_on(GaussianMixture.fitted(train, held_out, components, seed), held_out)
        if found is None:
            raise UsageError(f"x: expected at least {min(components)} rows, one for each component, got {len(x)}")
        self.codes = found.requires_grad_(False)
        return self.codes

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        """Draws of codes from their ex-post density, decoded; `mean` changes nothing, since there is no p(x|z) to draw.

        Raises:
            UsageError: `fit_codes` has not been called, or num_samples is no whole number of at least 1.
        """
        if self.codes is None:
            raise UsageError(
                "sample: there is no prior to draw codes from; fit a density to those of the training rows first, "
                "fit_codes(train, validation)"
            )
        z = self.codes.sample(num_samples)
        return self.decode(z.to(next(self.parameters())))


class Point(Guide):
    """A code that is a point: the guide of an autoencoder, without a density."""

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Delta(self.parameters_of(x), event_dim=1)


class Autoencoder(Reconstruction):
    """Reconstruction only and no p(x), with networks: a code that is a point; with corruption, a denoising autoencoder.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        likelihood: p(x|z), which says what an error costs: a Gaussian of fixed scale the squared error, a Bernoulli the
            cross-entropy.
        corruption: What the encoder sees of x while it is trained; None: x.
    Raises:
        UsageError: the likelihood's decoder takes another number of latent dimensions, or rows of another shape.
    """

    word = "autoencoder"

    def __init__(
        self, encoder: Network, latent_dim: int, likelihood: Likelihood, corruption: Corruption | None = None
    ) -> None:
        super().__init__(latent_dim)
        if tuple(likelihood.latent_shape) != (latent_dim,) or tuple(likelihood.event_shape) != encoder.in_shape:
            raise UsageError(
                f"likelihood: expected one of x of shape {encoder.in_shape} given {latent_dim} latent dimensions, got "
                f"{tuple(likelihood.event_shape)} given {tuple(likelihood.latent_shape)}; make them equal"
            )
        self.point = Point(encoder, latent_dim)
        self.likelihood = likelihood
        self.corruption = Clean() if corruption is None else corruption

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return self.likelihood.event_shape

    def model(self, x: Tensor) -> None:
        if dist.is_validation_enabled():  # as it is not in a trace, where x has no values
            self.likelihood.check_support(x)
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(constraints.real_vector, (), (self.latent_dim,))
            pyro.sample("x", self.likelihood(pyro.sample("z", flat)), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.point(self.corruption(x)))

    def initialise(self, x: Tensor) -> None:
        """Start the output bias, input centring and corruption at training data x of shape (N, *event)."""
        for part in (self.corruption, self.point, self.likelihood):
            part.initialise(x)

    def check_support(self, x: Tensor) -> None:
        self.likelihood.check_support(x)

    @torch.no_grad()
    def remarks(self, x: Tensor) -> list[str]:
        return self.likelihood.remarks(self.encode(x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.point.parameters_of(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z) for codes of shape (*batch, Z), shape (*batch, *event)."""
        return self.likelihood(z).mean


class PCA(Reconstruction):
    """Reconstruction only and no p(x), by principal components: in closed form; `PPCA` is its model with a p(x).

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        latent_dim: Number of principal components, Q, at most D.
    Attributes:
        loc: Mean of the rows, shape (D,).
        axes: The components as orthonormal columns, that of the largest variance first, shape (D, Q).
    Raises:
        UsageError: latent_dim is over D.
    """

    word = "pca"
    closed_form = True

    def __init__(self, event_shape: int | Sequence[int], latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.event_shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
        elements = self.event_shape.numel()
        if latent_dim > elements:
            raise UsageError(f"latent_dim: expected at most {elements}, the elements of x, got {latent_dim}")
        self.loc = nn.Parameter(torch.zeros(elements), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(elements, latent_dim), requires_grad=False)

    def model(self, x: Tensor) -> None:
        """With noise of sd 1, which has nothing to do with the fit: the squared error, halved."""
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(constraints.real_vector, (), (self.latent_dim,))
            loc = self.decode(pyro.sample("z", flat))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(len(self.event_shape)), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encode(x), event_dim=1))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Fit to x of shape (N, *event), in closed form.

        Raises:
            UsageError: x does not have the model's event shape.
            DataError: x has values that are not finite, or no variance.
        """
        check_real(x, self.event_shape)
        moments = Moments.of(x)
        self.loc.copy_(moments.mean)
        self.axes.copy_(moments.eigen[1].flip(1)[:, : self.latent_dim])

    def check_support(self, x: Tensor) -> None:
        check_real(x, self.event_shape)

    def remarks(self, x: Tensor) -> list[str]:
        return []

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.loc) @ self.axes

    def decode(self, z: Tensor) -> Tensor:
        return (self.loc + z @ self.axes.T).unflatten(-1, self.event_shape)


RECONSTRUCTIONS = (Autoencoder, PCA)
