r"""VampPriors of more than one layer, and given a condition: guides averaged over learned pseudo-inputs u_c.

    VampPrior               p(z)    = (1/C) sum_c q(z | u_c)
    HierarchicalVampPrior   p(zL)   = (1/C) sum_c q(zL | mL-1(u_c)),    m1(u) = E[z1|u],  ml(u) = E[zl | ml-1(u)]
    ConditionalVampPrior    p(z|y)  = (1/C) sum_c q(z | u_c, y)

The top layer of a hierarchy sees x through the layers below it, q(z1|x) q(z2|z1) ..., and what it makes of a
pseudo-input would be an integral over those. Each layer passes on its mean in place of draws: that is a mixture with a
density in closed form, and as the lower guides narrow it becomes the integral. (Tomczak and Welling's own hierarchy has
a q(z2|x) that sees x itself, so that nothing is passed on there.)

A conditional pair's guide q(z|x, y) sees y beside x, so that pseudo-inputs are of x alone, and every y of a batch is
put beside each of them: the C components are computed anew for each row. Each row of a batch costs C passes through the
encoder more; few pseudo-inputs are usual.

References:
    Tomczak and Welling 2018, VAE with a VampPrior, https://arxiv.org/abs/1705.07120
"""

from collections.abc import Sequence
from functools import reduce

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.conditional import ConditionalPrior, join
from pyrovae.models.flows import Flowed
from pyrovae.models.guides import Guide, check_component
from pyrovae.models.priors import Prior, SharedComponents, start_at_rows
from pyrovae.settings import Count, checked


class HierarchicalVampPrior(Prior):
    """The guides of a hierarchy averaged over learned pseudo-inputs, from the data up: each passes on its mean.

    The guides are the pair's own, shared and not copied, so their parameters belong to the pair and not to this module.

    Args:
        guides: q(z1|x), ..., q(zL|zL-1) of the pair; those below the top have a mean.
        event_shape: Event shape of x.
        components: Number of pseudo-inputs, C.
    """

    short = ("hierarchical-vamp",)
    latents = "those of its guide"

    @checked
    def __init__(self, guides: Sequence[Guide], event_shape: int | tuple[int, ...], components: Count = 500) -> None:
        super().__init__(guides[-1].latent_dim)
        for guide in guides:
            check_component(guide, "a VampPrior, which is made of it")
        self.components, self.latents = components, guides[-1].latents
        # In a tuple, so that torch does not register them: each parameter has one name in the pair.
        self._guides = tuple(guides)
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.pseudo_inputs = nn.Parameter(0.5 + 0.1 * torch.randn(components, *shape))

    def forward(self) -> dist.Distribution:
        below: Tensor = self.pseudo_inputs
        for guide in self._guides[:-1]:
            below = centre(guide(below))
        weights = dist.Categorical(logits=self.pseudo_inputs.new_zeros(self.components))
        return SharedComponents(weights, self._guides[-1](below))

    def initialise(self, x: Tensor) -> None:
        """Start the pseudo-inputs at rows of x (N, *event) drawn without replacement while they last."""
        start_at_rows(self.pseudo_inputs, x)


def centre(q: dist.Distribution) -> Tensor:
    """The mean of a distribution, or of one that has none in closed form what it makes of its noise's mean."""
    if isinstance(q, dist.TransformedDistribution):
        return reduce(lambda value, transform: transform(value), q.transforms, q.base_dist.mean)
    if not isinstance(q, Flowed):
        return q.mean
    return q.loc + q.scale * q.flow(torch.zeros_like(q.loc), q.features)[0]


class ConditionalVampPrior(ConditionalPrior):
    """p(z|y), where there is a condition: the guide at learned pseudo-inputs, each beside the y of the row.

    Args:
        guide: q(z|x, y) of the pair, shared and not copied.
        event_shape: Event shape of (x, y), as the guide takes them.
        condition_dim: Number of elements of y.
        components: Number of pseudo-inputs, C: each row of a batch has so many components of its own.
    """

    short = ("conditional-vamp",)
    unit: Tensor

    @checked
    def __init__(
        self, guide: Guide, event_shape: int | tuple[int, ...], condition_dim: int, components: Count = 20
    ) -> None:
        super().__init__(guide.latent_dim)
        self.components, self.condition_dim = components, condition_dim
        self._guide = (guide,)
        first, *self.rest = (event_shape,) if isinstance(event_shape, int) else event_shape
        self.pseudo_inputs = nn.Parameter(0.5 + 0.1 * torch.randn(components, first - condition_dim, *self.rest))
        # The guide sees unit * y; 1 until `initialise`.
        self.register_buffer("unit", torch.ones(()))

    def forward(self, y: Tensor) -> dist.Distribution:
        batch, event = y.shape[:-1], self.pseudo_inputs.shape[1:]
        inputs = self.pseudo_inputs.expand(*batch, self.components, *event)
        components = self._guide[0](join(inputs, self.unit * y.unsqueeze(-2), 1 + len(self.rest)))
        weights = dist.Categorical(logits=y.new_zeros(*batch, self.components))
        return SharedComponents(weights, components)

    def initialise(self, xy: Tensor, unit: Tensor) -> None:
        """Start the pseudo-inputs at rows of x, the part of (x, y) that comes first."""
        self.unit.copy_(unit)
        start_at_rows(self.pseudo_inputs, xy.narrow(1, 0, self.pseudo_inputs.shape[1]))
