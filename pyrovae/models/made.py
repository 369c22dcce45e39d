r"""MADE: a network whose output for an element is a function of the elements before it.

The elements u_1, ..., u_Z are in G groups, in order, and the parameters r_g of a group are a function of the groups
before it, and of features h where there are any:

    r_g = r_g(u_1, ..., u_{g-1}; h)                 G = Z: autoregressive        G = 2: a coupling

A hidden unit has a degree m, sees groups 1 .. m and units of degree m or less, and is seen by r_{m+1} and all after:
masks on the weights, by which one pass gives the parameters of all groups (`forward`). Where u itself is to be found
from the parameters, group by group, there is no such pass. But a unit of degree m depends on m groups alone, so that it
need be computed only once, when they are known: units stand in the order of their degrees, and `unrolled` takes them
slice by slice. All groups together then cost the arithmetic of one pass, in G parts, where Z passes are the usual way.

Features enter the first hidden layer by a product of their own. They are one vector per datum, whatever the number of
particles.

References:
    Germain, Gregor, Murray and Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation,
    https://arxiv.org/abs/1502.03509
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class MADE(nn.Module):
    """Parameters of each element, from the groups of elements before it.

    Args:
        size: Number of elements, Z.
        outputs: Number of parameters for each element.
        hidden: Widths of the hidden layers.
        groups: G, from 2 to Z, or 1 where there are features; None: Z.
        features: Width of the features; 0: there are none.
    """

    def __init__(
        self, size: int, outputs: int, hidden: Sequence[int], groups: int | None = None, features: int = 0
    ) -> None:
        super().__init__()
        groups = size if groups is None else groups
        self.size, self.outputs, self.groups = size, outputs, groups
        # Without features a unit of degree 0 would see nothing.
        lowest = 0 if features else 1
        of_inputs = [d * groups // size + 1 for d in range(size)]
        spread = [[i * (groups - lowest) // h + lowest for i in range(h)] for h in hidden]
        of_outputs = [degree - 1 for degree in of_inputs for _ in range(outputs)]
        degrees = [of_inputs, *spread, of_outputs]
        self.layers: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            nn.Linear(len(a), len(b)) for a, b in pairwise(degrees)
        )
        self.features = nn.Linear(features, hidden[0], bias=False) if features else None
        # Entry (i, j): unit i may see unit j of the layer before.
        for i, (a, b) in enumerate(pairwise(degrees)):
            seen = torch.tensor(b).unsqueeze(1) >= torch.tensor(a)
            self.register_buffer(f"mask{i}", seen.float(), persistent=False)
        # Where the units of degree g, and the elements of group g, end in each layer.
        self.ends = [[bisect_right(d, g) for g in range(groups)] for d in degrees]

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        """The parameters of all elements of u (*batch, Z), shape (*batch, Z, outputs)."""
        h = u
        for i, layer in enumerate(self.layers):
            h = linear(h, layer.weight * self.get_buffer(f"mask{i}"), layer.bias)
            if i == 0 and self.features is not None:
                h = h + self.features(features)
            if i < len(self.layers) - 1:
                h = silu(h)
        return h.unflatten(-1, (self.size, self.outputs))

    def unrolled(self, group: Callable[[slice, Tensor], Tensor], features: Tensor | None = None) -> Tensor:
        """u, from the first group to the last.

        Args:
            group: The elements of a group, as a slice of Z, and their parameters (*batch, n, outputs), to u of the
                group, shape (*batch, n). Of the first group the parameters may have no batch.
            features: h, shape (*batch, features).
        """
        beside = None if self.features is None else self.features(features)
        known: list[Tensor] = []  # u of the groups so far
        layers: list[list[Tensor]] = [[] for _ in self.layers[1:]]  # units so far
        for g in range(self.groups):
            below = known
            for i, layer in enumerate(self.layers):
                last = i == len(self.layers) - 1
                start, end = (self.ends[i + 1][g - 1] if g else 0), self.ends[i + 1][g]
                if start < end:
                    out = layer.bias[start:end]
                    if below:
                        seen = joined(below)
                        out = linear(seen, layer.weight[start:end, : seen.shape[-1]], out)
                    if i == 0 and beside is not None:
                        out = out + beside[..., start:end]
                    if last:
                        elements = slice(start // self.outputs, end // self.outputs)
                        known.append(group(elements, out.unflatten(-1, (-1, self.outputs))))
                    else:
                        layers[i].append(silu(out))
                if not last:
                    below = layers[i]
        return joined(known)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Vectors (*batch, n) of different n one after the other, whose batches are broadcast."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
