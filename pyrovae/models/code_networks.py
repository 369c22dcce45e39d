r"""Networks over grids of codes: logits of each code, from the codes before it alone.

Places of a grid are in raster order, row by row. Two kinds of network read all of a grid at once, and give at each
place logits that depend on the places before it:

    GatedConvolutions    two stacks of convolutions (a gated PixelCNN). The vertical one is given the rows above a
                         place, as its input is moved down by a row and its kernels reach upwards; the horizontal one
                         what is to the left of it in its row, as its input is moved to the right and its kernels reach
                         to the left, and at each layer what the vertical one has there. Both together see all places
                         before it that are within reach, and none after: the zeros of a masked kernel are not there.
    CausalAttention      a transformer: each place attends to the places before it, however far.

What a grid is given, as features at each place, is added at every layer.

References:
    van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, https://arxiv.org/abs/1606.05328
    Salimans et al. 2017, PixelCNN++ (inputs that are moved), https://arxiv.org/abs/1701.05517
    Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu

from pyrovae.errors import UsageError


class GatedConvolutions(nn.Module):
    """Logits of codes by a gated PixelCNN.

    Args:
        codes: C.
        grid: Height and width, H and W.
        layers: Layers of each stack.
        hidden: Channels.
        reach: Places that a convolution reaches upwards, and to the left or either side.
        given: Channels of what a grid is given; 0: nothing.
    """

    def __init__(self, codes: int, grid: tuple[int, int], layers: int, hidden: int, reach: int, given: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = nn.Embedding(codes, hidden)
        rows = grid[0] > 1  # of a single row there is nothing above
        self.layers = nn.ModuleList(GatedLayer(hidden, reach, rows, given) for _ in range(layers))
        self.first, self.last = nn.Conv2d(hidden, hidden, 1), nn.Conv2d(hidden, codes, 1)

    def forward(self, codes: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits (N, M, C) of codes (N, M), given features (N, G, H, W)."""
        h = self.embedding(codes.unflatten(-1, self.grid)).movedim(-1, 1)
        above, left = pad(h, (0, 0, 1, 0))[:, :, :-1], pad(h, (1, 0))[..., :-1]
        for layer in self.layers:
            above, left = layer(above, left, given)
        logits: Tensor = self.last(silu(self.first(silu(left))))
        return logits.flatten(2).transpose(1, 2)


class GatedLayer(nn.Module):
    """A layer of both stacks.

    Args:
        hidden: Channels.
        reach: Places that a convolution reaches.
        rows: Whether there are rows above.
        given: Channels of what a grid is given; 0: nothing.
    """

    def __init__(self, hidden: int, reach: int, rows: bool, given: int) -> None:
        super().__init__()
        self.reach = reach
        self.vertical = nn.Conv2d(hidden, 2 * hidden, (reach + 1, 2 * reach + 1)) if rows else None
        self.down = nn.Conv2d(2 * hidden, 2 * hidden, 1) if rows else None
        self.horizontal = nn.Conv2d(hidden, 2 * hidden, (1, reach + 1))
        self.out = nn.Conv2d(hidden, hidden, 1)
        self.given = nn.Conv2d(given, 2 * hidden, 1) if given else None

    def forward(self, above: Tensor, left: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks one layer on, each (N, hidden, H, W)."""
        h = self.horizontal(pad(left, (self.reach, 0)))
        if self.given is not None:
            h = h + self.given(given)
        if self.vertical is not None and self.down is not None:
            v = self.vertical(pad(above, (self.reach, self.reach, self.reach, 0)))
            h, above = h + self.down(v), gated(v)
        return above, left + self.out(gated(h))


def gated(h: Tensor) -> Tensor:
    """tanh of the one half of the channels, times the logistic function of the other."""
    a, b = h.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class CausalAttention(nn.Module):
    """Logits of codes by a transformer.

    Args:
        codes: C.
        grid: Height and width, H and W.
        layers: Blocks of attention and a dense layer.
        hidden: Width.
        heads: Heads of each attention.
        given: Channels of what a grid is given; 0: nothing.

    Raises:
        UsageError: the width cannot be shared out among the heads.
    """

    before: Tensor

    def __init__(self, codes: int, grid: tuple[int, int], layers: int, hidden: int, heads: int, given: int = 0) -> None:
        super().__init__()
        if hidden % heads:
            raise UsageError(f"hidden: expected a multiple of the {heads} heads, got {hidden}")
        places = math.prod(grid)
        # One more than there are codes: what stands before the first place.
        self.embedding = nn.Embedding(codes + 1, hidden)
        self.position = nn.Parameter(0.02 * torch.randn(places, hidden))
        self.given = nn.Linear(given, hidden) if given else None
        self.layers = nn.ModuleList(Attention(hidden, heads) for _ in range(layers))
        self.last = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, codes))
        self.register_buffer("before", torch.ones(places, places, dtype=torch.bool).tril(), persistent=False)

    def forward(self, codes: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits (N, M, C) of codes (N, M), given features (N, G, H, W)."""
        start = torch.full_like(codes[:, :1], self.embedding.num_embeddings - 1)
        h = self.embedding(torch.cat([start, codes[:, :-1]], 1)) + self.position
        if self.given is not None and given is not None:
            h = h + self.given(given.flatten(2).transpose(1, 2))
        for layer in self.layers:
            h = layer(h, self.before)
        logits: Tensor = self.last(h)
        return logits


class Attention(nn.Module):
    """Attention to the places before, and a dense layer, each added to what it is given, normalised.

    Args:
        hidden: Width.
        heads: Heads.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.of_all, self.out = (
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 3 * hidden),
            nn.Linear(hidden, hidden),
        )
        self.dense_norm, self.wide, self.narrow = (
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.Linear(4 * hidden, hidden),
        )

    def forward(self, h: Tensor, before: Tensor) -> Tensor:
        """h (N, M, hidden) one block on, where `before` (M, M) says which places a place attends to."""
        q, k, v = self.of_all(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~before, -math.inf).softmax(-1)
        h = h + self.out((weights @ v).transpose(1, 2).flatten(2))
        added: Tensor = self.narrow(gelu(self.wide(self.dense_norm(h))))
        return h + added
