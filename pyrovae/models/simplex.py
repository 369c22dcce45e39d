r"""Latents on a simplex: shares z_1 + ... + z_Z = 1, such as those of the topics of a document.

    LogisticNormalPrior   z = softmax(u),  u_k ~ N(m_k, s_k^2) independent         LogisticNormalGuide   m(x), s(x)
    DirichletPrior        p(z) proportional to prod_k z_k^(a_k - 1)                DirichletGuide        a(x)

A density of z is one of its first Z - 1 elements. Softmax forgets a constant that is added to all of u, so that the
logistic normal is that of the log-ratios v_k = u_k - u_Z, a Gaussian of Z - 1 elements with the covariance
diag(s_1^2, ..., s_{Z-1}^2) + s_Z^2 1 1', which treats all topics alike; from there to z it is one to one,

    v = log z_k - log z_Z        log |det dz/dv| = sum_{k=1}^Z log z_k.

The bound is that of z itself, which is above the one of u that is often used: of u the guide has to match what softmax
forgets, too. Draws of a Dirichlet are reparameterised implicitly, by the derivative of its distribution function.
Shares too small for the type of numbers are held at its least positive one.

References:
    Aitchison and Shen 1980, Logistic-Normal Distributions, Biometrika 67
    Srivastava and Sutton 2017, Autoencoding Variational Inference for Topic Models, https://arxiv.org/abs/1703.01488
    Figurnov, Mohamed and Mnih 2018, Implicit Reparameterization Gradients, https://arxiv.org/abs/1805.08498
"""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform
from torch.nn.functional import pad, softplus

from pyrovae.errors import UsageError
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior
from pyrovae.settings import Count, Positive, checked

LEAST_CONCENTRATION = 0.1  # of a guide: below, shares underflow once in thousands of draws


class Shares(Transform):
    """Log-ratios v to shares: z = softmax([v, 0])."""

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return held(pad(x, (0, 1)).softmax(-1))

    def _inverse(self, y: Tensor) -> Tensor:
        logs = y.log()
        return logs[..., :-1] - logs[..., -1:]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_k log z_k, shape `batch`."""
        return y.log().sum(-1)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


def held(z: Tensor) -> Tensor:
    """Shares, none of them 0."""
    return z.clamp(min=torch.finfo(z.dtype).tiny)


def logistic_normal(loc: Tensor, scale: Tensor) -> dist.Distribution:
    """Of softmax(u), u ~ N(loc, diag scale^2), each (*batch, Z)."""
    ratios = dist.LowRankMultivariateNormal(
        loc[..., :-1] - loc[..., -1:],
        scale[..., -1:, None].expand(*scale.shape[:-1], scale.shape[-1] - 1, 1),
        scale[..., :-1].square(),
    )
    return dist.TransformedDistribution(ratios, [Shares()])


class Dirichlet(dist.Dirichlet):
    """Pyro's, with draws none of whose shares is 0."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return held(super().rsample(torch.Size(sample_shape)))


def check_several(latent_dim: int) -> None:
    """Refuse a simplex of one point."""
    if latent_dim < 2:
        raise UsageError(f"latent_dim: expected at least 2 shares, got {latent_dim}; a single one is 1 always")


class LogisticNormalPrior(Prior):
    """Shares that are the softmax of independent Gaussians, with learned means and scales.

    Args:
        latent_dim: Z, the number of shares.
        scale: Standard deviations at the start: the larger, the fewer shares are large at a time.
    """

    short = ("logistic-normal",)
    latents = "points of a simplex"

    @checked
    def __init__(self, latent_dim: Count, scale: Positive = 2.0) -> None:
        super().__init__(latent_dim)
        check_several(latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.full((latent_dim,), math.log(scale)))

    def forward(self) -> dist.Distribution:
        return logistic_normal(self.loc, self.log_scale.exp())


class DirichletPrior(Prior):
    """Shares with a Dirichlet distribution, with learned concentrations.

    Args:
        latent_dim: Z, the number of shares.
        concentration: Of each share at the start: below 1, few shares are large at a time.
    """

    short = ("dirichlet",)
    latents = "points of a simplex"

    @checked
    def __init__(self, latent_dim: Count, concentration: Positive = 0.5) -> None:
        super().__init__(latent_dim)
        check_several(latent_dim)
        self.log_concentration = nn.Parameter(torch.full((latent_dim,), math.log(concentration)))

    def forward(self) -> dist.Distribution:
        return Dirichlet(self.log_concentration.exp(), validate_args=False)


class LogisticNormalGuide(Guide):
    """Shares that are the softmax of independent Gaussians given x."""

    short = ("logistic-normal",)
    latents = "points of a simplex"

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim)
        check_several(latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, raw_scale = self.parameters_of(x).chunk(2, -1)
        return logistic_normal(loc, softplus(raw_scale) + SCALE_FLOOR)


class DirichletGuide(Guide):
    """Shares with a Dirichlet distribution given x."""

    short = ("dirichlet",)
    latents = "points of a simplex"

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, latent_dim)
        check_several(latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        concentration = softplus(self.parameters_of(x)) + LEAST_CONCENTRATION
        return Dirichlet(concentration, validate_args=False)
