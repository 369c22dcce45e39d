r"""Guides q(z|x) that are flows: mean-field Gaussians whose noise is bent, by functions of x.

    z = m(x) + s(x) f(u; h(x)),        u ~ N(0, I)

with m, s and the features h from the encoder, as in `MeanFieldNormal`, and f one of `pyrovae.models.flows`, which
starts near the identity: training starts near the mean-field guide. f bends the noise and not z itself, so that it need
not find out first where the posterior of a datum is, and how wide.

All of them draw z with log q(z|x) in one pass. log q(z|x) of other z, as gaps, sandwiches and given posterior draws ask
for, is exact too: `SplineFlow` has it in two steps, `InverseAutoregressiveFlow` in Z, and `PlanarFlow` and
`SylvesterFlow` by a root of one number for each of their columns.
"""

from typing import Annotated

import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.flows import Affine, Autoregressive, Chain, Flow, Flowed, Planar, Spline, Sylvester
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network
from pyrovae.settings import Count, Positive, Whole, checked

Bins = Annotated[int, Whole(2, 100)]


class FlowGuide(Guide):
    """m(x) + s(x) f(u; h(x)); what inherits from it says what f is.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.

    Attributes:
        flow: f.
    """

    flow: Flow

    def __init__(self, encoder: Network, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        features = self.features_of(x)
        loc, raw_scale = self.head(features).chunk(2, -1)
        return Flowed(self.flow, loc, softplus(raw_scale) + SCALE_FLOOR, features)


class InverseAutoregressiveFlow(FlowGuide):
    """An inverse autoregressive flow of the noise, whose elements are shifted and scaled by those before them.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z, at least 2.
        layers: Number of flows, each in the reversed order of the one before.
        hidden: Width of the two hidden layers of each flow's masked network.

    References:
        Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow,
        https://arxiv.org/abs/1606.04934
    """

    short = ("iaf",)

    @checked
    def __init__(self, encoder: Network, latent_dim: Count, layers: Count = 2, hidden: Count = 200) -> None:
        super().__init__(encoder, latent_dim)
        check_several(latent_dim)
        width, each = encoder.out_shape[0], (hidden, hidden)
        self.flow = Chain([Autoregressive(latent_dim, Affine(), each, None, width) for _ in range(layers)])


class SplineFlow(FlowGuide):
    """A neural spline flow of the noise, half of which is moved by monotone splines, given the other half.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z, at least 2.
        layers: Number of flows; each gives the half that the one before moved last to the next.
        hidden: Width of the two hidden layers of each flow's network.
        bins: Bins of a spline.
        bound: Noise beyond it, on either side, is left as it is.

    References:
        Durkan, Bekasov, Murray and Papamakarios 2019, Neural Spline Flows, https://arxiv.org/abs/1906.04032
    """

    short = ("spline",)

    @checked
    def __init__(
        self,
        encoder: Network,
        latent_dim: Count,
        layers: Count = 4,
        hidden: Count = 100,
        bins: Bins = 8,
        bound: Positive = 5.0,
    ) -> None:
        super().__init__(encoder, latent_dim)
        check_several(latent_dim)
        width, each = encoder.out_shape[0], (hidden, hidden)
        self.flow = Chain([Autoregressive(latent_dim, Spline(bins, bound), each, 2, width) for _ in range(layers)])


class PlanarFlow(FlowGuide):
    """A planar flow of the noise, moved along one direction as far as its place along another one says.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        layers: Number of flows.

    References:
        Rezende and Mohamed 2015, Variational Inference with Normalizing Flows, https://arxiv.org/abs/1505.05770
    """

    short = ("planar",)

    @checked
    def __init__(self, encoder: Network, latent_dim: Count, layers: Count = 8) -> None:
        super().__init__(encoder, latent_dim)
        self.flow = Chain([Planar(latent_dim, encoder.out_shape[0]) for _ in range(layers)])


class SylvesterFlow(FlowGuide):
    """A Sylvester flow of the noise, moved within a subspace as far as its place in it says.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z.
        layers: Number of flows.
        columns: Dimensions of the subspace, M, from 1 to Z; unless given, 8, or Z where that is less.

    References:
        van den Berg, Hasenclever, Tomczak and Welling 2018, Sylvester Normalizing Flows for Variational Inference,
        https://arxiv.org/abs/1803.05649
    """

    short = ("sylvester",)

    @checked
    def __init__(self, encoder: Network, latent_dim: Count, layers: Count = 4, columns: Count | None = None) -> None:
        columns = min(8, latent_dim) if columns is None else columns
        if columns > latent_dim:
            raise UsageError(f"columns: expected a whole number from 1 to latent_dim = {latent_dim}, got {columns}")
        super().__init__(encoder, latent_dim)
        self.flow = Chain([Sylvester(latent_dim, columns, encoder.out_shape[0]) for _ in range(layers)])


def check_several(latent_dim: int) -> None:
    """Refuse a single element, of which no other could be a function."""
    if latent_dim < 2:
        raise UsageError(
            f"latent_dim: this flow moves an element by others, of which it takes at least 2, got {latent_dim}; use "
            "PlanarFlow or SylvesterFlow"
        )
