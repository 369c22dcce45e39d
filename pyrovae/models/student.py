r"""Student t over the latent vector: tails heavier than a Gaussian's, by themselves or together.

With e ~ N(0, I), v ~ chi^2_nu and diagonal scales s, both are m + s e sqrt(nu / v):

    marginal       a v for each element: independent t_nu(m_d, s_d)
    multivariate   one v for all: elements are uncorrelated, but far out together

The density of the second, which is elliptical, is that of its distance from m:

    log p(z) = log Gamma((nu + Z)/2) - log Gamma(nu/2) - (Z/2) log(nu pi) - sum_d log s_d
               - (nu + Z)/2 log(1 + (1/nu) sum_d ((z_d - m_d) / s_d)^2)

They are the same for Z = 1, and N(m, diag s^2) as nu grows. There is no mean up to nu = 1, and no variance up to 2.
"""

import math
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.models.priors import Prior, inverse_softplus
from pyrovae.settings import Count, Positive, checked


class EllipticalStudentT(dist.TorchDistribution):
    """Multivariate Student t with a diagonal scale matrix: Pyro's, without a triangular solve for every draw.

    Args:
        df: Degrees of freedom, shape ().
        loc: Location, shape (Z,).
        scale: Scales, shape (Z,).
    """

    arg_constraints = {  # noqa: RUF012 - as torch has it
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """m; NaN up to one degree of freedom."""
        return torch.where(self.df > 1, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """s^2 nu / (nu - 2); infinite up to two degrees of freedom, NaN up to one."""
        finite = self.scale.square() * self.df / (self.df - 2)
        return torch.where(self.df > 2, finite, torch.where(self.df > 1, torch.inf, torch.nan))

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> dist.Distribution:
        """For plates, without a copy of the parameters for each of their elements."""
        return dist.ExpandedDistribution(self, torch.Size(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        noise = torch.randn((*sample_shape, *self.loc.shape), dtype=self.loc.dtype, device=self.loc.device)
        chi2 = dist.Chi2(self.df).rsample(sample_shape)
        return self.loc + self.scale * noise * (self.df / chi2).sqrt().unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        z = self.loc.shape[-1]
        half = 0.5 * (self.df + z)
        constant = half.lgamma() - (0.5 * self.df).lgamma() - 0.5 * z * (self.df * math.pi).log()
        distance = ((value - self.loc) / self.scale).square().sum(-1)
        return constant - self.scale.log().sum(-1) - half * (distance / self.df).log1p()


class StudentTPrior(Prior):
    """Tails heavier than a Gaussian's: Student t with learned location and scales.

    Args:
        latent_dim: Z.
        df: Degrees of freedom, as a number, or learned, from 5 on.
        tails: Whether elements are far out by themselves or together: marginal or multivariate.

    References:
        Kim et al. 2024, t3-Variational Autoencoder, https://arxiv.org/abs/2312.01133
    """

    short = ("student", "student-t")
    log_df: Tensor

    @checked
    def __init__(
        self,
        latent_dim: Count,
        df: Positive | Literal["learned"] = "learned",
        tails: Literal["marginal", "multivariate"] = "marginal",
    ) -> None:
        super().__init__(latent_dim)
        self.tails = tails
        log_df = torch.tensor(math.log(5.0 if df == "learned" else df))
        if df == "learned":
            self.log_df = nn.Parameter(log_df)
        else:
            self.register_buffer("log_df", log_df, persistent=False)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(torch.full((latent_dim,), inverse_softplus(1.0)))

    def forward(self) -> dist.Distribution:
        df, scale = self.log_df.exp(), softplus(self.raw_scale)
        if self.tails == "marginal":
            return dist.StudentT(df, self.loc, scale).to_event(1)
        return EllipticalStudentT(df, self.loc, scale)
