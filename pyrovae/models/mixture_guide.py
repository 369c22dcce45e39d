r"""A guide of several Gaussians, and the gradient of its draws: by weights, means and scales.

    q(z|x) = sum_c pi_c(x) N(m_c(x), diag s_c(x)^2)

A draw picks a component, which no gradient goes through, so that z = m_c + s_c e would leave out how the weights pi
move the density. Implicit reparameterisation asks instead how z moves when the density does, with its quantiles held.
One element after the other, with F_d(z_d; z_<d) the distribution function of z_d given those before it,

    F_d = sum_c w_cd Phi((z_d - m_cd) / s_cd)        w_cd ~ pi_c prod_(j<d) N(z_j; m_cj, s_cj^2),  sum_c w_cd = 1

F(z; phi) = u is uniform noise, whatever the parameters phi. Differentiating this for a fixed u,

    dz/dphi = -J^-1 dF/dphi        J = dF/dz, lower triangular, with the densities f_d of z_d given z_<d on its diagonal

    J_dj = sum_c w_cd (Phi_cd - F_d) d log N(z_j; m_cj, s_cj^2) / dz_j        for j < d

so that z - J^-1 (F(z; phi) - stop(F)), with z and J held, has the value of z and this gradient: in weights, means and
scales. K draws are K draws of q, and every objective that takes a reparameterised guide takes this one. Where density
has to go from one mode to another, the gradient passes through the points in between, where f is small: its variance
grows as exp(gap^2 / 8), with the gap in standard deviations, and modes more than about 8 apart exchange no weight.

References:
    Figurnov, Mohamed and Mnih 2018, Implicit Reparameterization Gradients, https://arxiv.org/abs/1805.08498
    Graves 2016, Stochastic Backpropagation through Mixture Density Distributions, https://arxiv.org/abs/1607.05690
"""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network
from pyrovae.settings import Count, checked


class ReparameterisedMixture(dist.MixtureSameFamily):
    """A mixture of Gaussians of independent elements, `Normal(m, s).to_event(1)`, with a gradient of its draws."""

    has_rsample = True
    support = constraints.real_vector

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws (*sample_shape, *batch, Z), which have a gradient by the parameters of all components."""
        normals = self.component_distribution.base_dist
        with torch.no_grad():
            chosen = self.mixture_distribution.sample(sample_shape)[..., None, None]
            shape = (*sample_shape, *normals.batch_shape)
            index = chosen.expand(*chosen.shape[:-1], shape[-1])
            loc, scale = (p.expand(shape).gather(-2, index).squeeze(-2) for p in (normals.loc, normals.scale))
            z = loc + scale * torch.randn_like(loc)
        moving = (normals.loc, normals.scale, self.mixture_distribution.logits)
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in moving)):
            return z
        return z - implicit(z, *moving)


def implicit(z: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    """Zero, with the gradient of -z by a mixture's parameters, its quantiles held: J^-1 (F - stop(F)).

    Args:
        z: Draws, shape (*batch, Z).
        loc: m, shape (*batch, C, Z).
        scale: s, shape (*batch, C, Z).
        logits: log pi, shape (*batch, C).
    """
    e = (z.unsqueeze(-2) - loc) / scale
    log_n = -0.5 * e.square() - scale.log()
    before = log_n.cumsum(-1) - log_n  # of the elements before each
    w = (logits.unsqueeze(-1) + before).softmax(-2)
    phi = torch.special.ndtr(e)
    F = (w * phi).sum(-2)
    with torch.no_grad():
        f = (w * dist.Normal(loc, scale, validate_args=False).log_prob(z.unsqueeze(-2)).exp()).sum(-2)
        f = f.clamp(min=torch.finfo(f.dtype).tiny)
        # Row by row over f_d, so that the diagonal is 1.
        J = torch.einsum("...cd,...cj->...dj", w * (phi - F.unsqueeze(-2)), -e / scale) / f.unsqueeze(-1)
    moved = ((F - F.detach()) / f).unsqueeze(-1)
    return torch.linalg.solve_triangular(J, moved, upper=False, unitriangular=True).squeeze(-1)


class MixtureOfNormals(Guide):
    """Several Gaussians of diagonal covariance: sum_c pi_c(x) N(m_c(x), diag s_c(x)^2).

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        components: Number of Gaussians, C.
    """

    short = ("mixture-of-normals",)

    @checked
    def __init__(self, encoder: Network, latent_dim: Count, components: Count = 4) -> None:
        super().__init__(encoder, latent_dim, components * (2 * latent_dim + 1))
        self.components = components
        with torch.no_grad():  # means apart, or the components would have to be told from one another first
            self.head.bias[: components * latent_dim].normal_()

    def forward(self, x: Tensor) -> dist.Distribution:
        size = self.components * self.latent_dim
        loc, raw_scale, logits = self.parameters_of(x).split([size, size, self.components], -1)
        shape = (self.components, self.latent_dim)
        scale = softplus(raw_scale.unflatten(-1, shape)) + SCALE_FLOOR
        normals = dist.Normal(loc.unflatten(-1, shape), scale).to_event(1)
        return ReparameterisedMixture(dist.Categorical(logits=logits), normals)
