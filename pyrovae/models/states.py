r"""States: what a deep hierarchy hands down, a vector or a grid to which the draw of each layer is added.

    h_{L-1} = b_L(W_L z_L)        h_{i-1} = b_i(h_i + W_i z_i),   i = L-1, ..., 1

with residual blocks b_i (`pyrovae.models.grids`), so that what a layer says reaches x past all layers below it. All of
the model reads this one path, and so does a guide that is drawn from the top down,

    p(z_i|h_i)        q(z_i|h_i, d_i(x))        p(x|h_0),

and its cost grows as L, not as L^2 as where every layer is given all values above it.

A grid (C, h, w) travels flat, a channel after another: then two of them side by side are the grid with the channels of
both, and whatever joins vectors joins grids.

References:
    Child 2021, Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images,
        https://arxiv.org/abs/2011.10650
    Vahdat and Kautz 2020, NVAE: A Deep Hierarchical Variational Autoencoder, https://arxiv.org/abs/2007.03898
    Maaloe et al. 2019, BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling,
        https://arxiv.org/abs/1902.02102
"""

import math

from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.grids import Block, mixing, residual_blocks
from pyrovae.models.networks import Activation
from pyrovae.settings import Count, checked


class State(nn.Module):
    """How the draw of one layer changes the state: b(h + W z).

    Args:
        latent_shape: Shape of the layer's z: (Z,), or (Z, h, w) on a grid.
        shape: Shape of the state that it is added to: (C,), or (C, h, w) with the same h and w.
        below: Shape of the state that it makes; None: the same. Another grid is reached by nearest-neighbour
            upsampling to its exact size and a convolution, after the blocks.
        blocks: Number of residual blocks.
        activation: Activation in the blocks.
        block: What the blocks are, on a grid.
        layers: L, the number of layers whose blocks the state passes through, which decides how they start.

    Attributes:
        latent_dim: Number of elements of z.
        in_size: Number of elements of the state that z is added to.
        out_size: Number of elements of the state that is handed down.

    Raises:
        UsageError: z and the state are not on the same grid.
    """

    @checked
    def __init__(
        self,
        latent_shape: tuple[int, ...],
        shape: tuple[int, ...],
        below: tuple[int, ...] | None = None,
        blocks: Count = 1,
        activation: Activation = "silu",
        block: Block = "plain",
        layers: Count = 1,
    ) -> None:
        super().__init__()
        below = shape if below is None else below
        if latent_shape[1:] != shape[1:] or len(below) != len(shape):
            raise UsageError(f"state: z of {latent_shape} is not on the grid of {shape}, or {below} is none below it")
        self.latent_shape, self.shape = latent_shape, shape
        self.latent_dim, self.in_size, self.out_size = (math.prod(s) for s in (latent_shape, shape, below))
        self.added = mixing(latent_shape, shape[0], 1)
        modules: list[nn.Module] = [*residual_blocks(shape, blocks, activation, block, blocks * layers)]
        if below != shape:
            modules += [nn.Upsample(size=below[1:])] if below[1:] != shape[1:] else []
            modules.append(mixing((shape[0], *below[1:]), below[0]))
        self.blocks = nn.Sequential(*modules, nn.Flatten())

    def forward(self, z: Tensor, above: Tensor | None) -> Tensor:
        """The state that is handed down, for z (*batch, Z) and the state above, of `in_size` elements, or None."""
        h = self.added(z.reshape(-1, *self.latent_shape))
        if above is not None:
            h = h + above.expand(*z.shape[:-1], self.in_size).reshape(-1, *self.shape)
        return self.blocks(h).reshape(*z.shape[:-1], self.out_size)
