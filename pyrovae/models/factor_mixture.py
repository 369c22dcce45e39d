r"""A mixture of factor analysers, whose log p(x) is exact: linear models of their own in different parts of the data.

Each of C components is a factor analysis of its own, with Q factors:

    c ~ w      z ~ N(0, I_Q)      x = mu_c + W_c z + e,  e ~ N(0, Psi_c)
    p(x) = sum_c w_c N(x; mu_c, C_c),    C_c = W_c W_c^T + Psi_c,    Psi_c = diag(psi_c1, ..., psi_cD)

so that covariances cost D (Q + 1) numbers where those of a mixture of Gaussians cost D (D + 1) / 2. With M = I + W^T
Psi^-1 W, of Q by Q, Woodbury's identity and the determinant lemma have all of the density at D Q^2:

    C^-1 = Psi^-1 - Psi^-1 W M^-1 W^T Psi^-1        log |C| = log |M| + sum_d log psi_d

The noise is of each component its own, or shared by all, as Ghahramani and Hinton have it, which is not drawn to few
rows that agree in an element, but blurs what some components know well: digits lose 8 nats by it.

**EM.** Given the responsibilities r_nc = p(c | x_n), mu_c is the weighted mean, and the rest is a function of the
weighted covariance S_c about it, as in factor analysis (`linear_gaussian`): for a given Psi_c the best W_c is, of the
eigenvalues l_j > 1 and eigenvectors u_j of Psi_c^{-1/2} S_c Psi_c^{-1/2}, the largest Q of them,

    W_c = Psi_c^{1/2} [u_1, ..., u_Q] diag(l_1 - 1, ..., l_Q - 1)^{1/2}

and from there the EM step of factor analysis leaves W_c where it is and moves the noise alone,

    Psi_c <- diag(S_c - W_c W_c^T)          shared:  Psi <- sum_c (N_c / N) diag(S_c - W_c W_c^T)

Each of the two raises the expected log-likelihood. A few of both are made between two passes over the rows, which cost
far more. The noise's floor is that of factor analysis, a millionth of the variance of an element over all rows.

References:
    Ghahramani and Hinton 1996, The EM Algorithm for Mixtures of Factor Analyzers, CRG-TR-96-1
    McLachlan, Peel and Bean 2003, Modelling High-Dimensional Data by Mixtures of Factor Analyzers, Computational
        Statistics & Data Analysis 41
"""

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ReshapeTransform

from pyrovae.errors import UsageError
from pyrovae.models.exact import has_gaps
from pyrovae.models.linear_gaussian import Moments, loadings
from pyrovae.models.mixture import EMPTY, Mixture, Weights, overwrite, seen_under
from pyrovae.models.seen import Conditional, gaussian_parts, mixture_given
from pyrovae.settings import Count, checked

FACTORS = 5  # unless it is said, or there are not more elements
STEPS = 5  # of loadings and noise between two passes over the rows


class MixtureOfFactorAnalysers(Mixture):
    """A mixture of factor analysers, an exact baseline for densities.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of components, C.
        factors: Number of factors of each component, Q, below D (default 5, or D - 1 where that is less).
        noise: Variances of the noise of the elements: "per-component", of each its own, or "shared" by all.
        weights: Mixing weights: "trainable", or "uniform" to hold each at 1/C.
    Raises:
        UsageError: An argument outside its range or choices; the message names them.
    Example:
        >>> model = MixtureOfFactorAnalysers(5, components=2, factors=1)
        >>> x = torch.randn(100, 5)
        >>> model.fit(x) >= 1
        True
        >>> model.log_prob(x).shape
        torch.Size([100])
    """

    word = "mfa"
    measure = "density"
    closed_form = True
    tolerance = 1e-5
    support = constraints.real

    @checked
    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: Count = 10,
        factors: Count | None = None,
        noise: Literal["per-component", "shared"] = "per-component",
        weights: Weights = "trainable",
    ) -> None:
        super().__init__(event_shape, components, weights)
        C, D = components, self.event_numel
        self.factors = min(FACTORS, D - 1) if factors is None else factors
        self.noise = noise
        if not 1 <= self.factors < D:
            raise UsageError(
                f"factors: expected a whole number from 1 to {D - 1}, one below the elements of x, got {self.factors}"
            )
        self.means = nn.Parameter(torch.randn(C, *self.event_shape))
        self.weight = nn.Parameter(torch.randn(C, D, self.factors) / math.sqrt(self.factors))
        self.log_scale = nn.Parameter(torch.zeros(C if noise == "per-component" else 1, D))

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"mixture of {self.components} factor analysers, {self.factors} factor{'s' * (self.factors > 1)} each"

    @property
    def covariances(self) -> Tensor:  # type: ignore[override]
        """C_c of each flattened component, shape (C, D, D)."""
        return self.weight @ self.weight.mT + torch.diag_embed((2 * self.log_scale).exp())

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """N(mu_c, C_c) for integer c of any shape: batch shape that of c, event shape that of x."""
        log_scale = self.log_scale.expand(self.components, -1)[c]
        flat = dist.LowRankMultivariateNormal(self.means.flatten(1)[c], self.weight[c], (2 * log_scale).exp())
        return dist.TransformedDistribution(flat, [ReshapeTransform(torch.Size([self.event_numel]), self.event_shape)])

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mu_c, C_c) in nats for every row and component, shape (N, C)."""
        # One component at a time: (N, D) numbers each, where broadcasting would hold (N, C, D).
        if has_gaps(x):
            return seen_under(self.means, self.covariances, x)
        every = torch.arange(self.components, device=self.means.device)
        return torch.stack([self.component(c).log_prob(x) for c in every], -1)

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """A mixture of the components' Gaussians, in double precision."""
        factors = torch.cat([self.weight, torch.diag_embed(self.log_scale.exp()).expand(self.components, -1, -1)], -1)
        flat, mask = x.flatten(1), seen.flatten()
        each = [gaussian_parts(*part, flat, mask) for part in zip(self.means.flatten(1), factors, strict=True)]
        log_probs, locs, lower = (torch.stack(parts, -1) for parts in zip(*each, strict=True))
        loc, scale_tril = locs.movedim(-1, 1), lower.movedim(-1, 0)
        components = dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
        return mixture_given(self.mixing_logits.double().log_softmax(-1) + log_probs, components)

    def _fit_components(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        counts, scatter = self._center(x, responsibilities, chunk, dense=True)
        live, shares = counts > EMPTY, counts.squeeze(1) / counts.sum()
        covariances = scatter / counts.clamp_min(EMPTY).unsqueeze(-1)
        covariances[~live.squeeze(1)] = torch.eye(self.event_numel).to(covariances)  # not used, but it has to factorise
        floors = self._overall(shares, covariances).floors
        variances = covariances.diagonal(dim1=-2, dim2=-1)
        noise = torch.maximum((2 * self.log_scale).exp(), floors).expand_as(variances)
        for _ in range(STEPS):
            weight = loadings(covariances, noise, self.factors)
            left = variances - weight.square().sum(-1)
            if self.noise == "shared":
                left = (shares @ left).expand_as(left)
            noise = torch.maximum(left, floors)
        overwrite(self.weight, loadings(covariances, noise, self.factors), live)
        at = live if self.noise == "per-component" else live[:1] | True
        overwrite(self.log_scale, noise[: len(at)].log() / 2, at)

    def _forget(self, x: Tensor) -> None:
        """Every component has the means of the elements, and independent noise of their variances."""
        wide = x.double().flatten(1)
        variances = (wide - wide.nanmean(0)).square().nanmean(0).nan_to_num(0.0)
        self.means.copy_(wide.nanmean(0).nan_to_num(0.0).view(self.event_shape).expand_as(self.means))
        self.weight.zero_()
        self.log_scale.copy_((variances.clamp_min(EMPTY).log() / 2).expand_as(self.log_scale))

    def _overall(self, shares: Tensor, covariances: Tensor) -> Moments:
        """Mean and covariance of all rows, from those of the components."""
        means = self.means.flatten(1)
        mean = shares @ means
        away = means - mean
        covariance = (shares[:, None, None] * covariances).sum(0) + (shares * away.T) @ away
        return Moments(0, mean, covariance)
