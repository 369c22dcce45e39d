r"""A pair whose rows are seen in part: of each row the likelihood counts the seen elements alone.

    p(x_seen, z) = p(z) prod_{i seen} p(x_i | z)        q(z | x with the missing elements filled in)

Where a likelihood makes the elements of x independent given z, the missing ones are integrated out by leaving them out,
so that the same Monte Carlo that estimates log p(x) estimates log p(x_seen), and

    log p(x_missing | x_seen) = log p(x) - log p(x_seen).

The mask is one more thing that is given: `log_marginal(masked.model, masked.guide, x, given=(seen,))`. A guide that has
only ever met whole rows is a poor proposal for filled ones, and its estimate of log p(x_seen) is too low, which makes
the difference too high. `Individual` does not depend on it. Training the masked pair by `fit(..., IWAE(K),
given=(seen,))` is the way of Mattei and Frellsen to learn from rows that have gaps.

References:
    Rezende, Mohamed and Wierstra 2014, Stochastic Backpropagation, appendix F, https://arxiv.org/abs/1401.4082
    Mattei and Frellsen 2018, Leveraging the Exact Likelihood of Deep Latent Variable Models,
        https://arxiv.org/abs/1802.04826
    Mattei and Frellsen 2019, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets,
        https://arxiv.org/abs/1812.02633
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae.errors import PairError, UsageError
from pyrovae.models.conditional import ConditionalVAE
from pyrovae.models.labelled import LabelledVAE
from pyrovae.models.vae import LatentLayers


class Masked(nn.Module):
    """A pair of p(x_seen) made of a pair of p(x).

    Args:
        pair: Any whose likelihood has independent elements.
        fill: What the guide sees in the place of missing elements, of the event's shape: the mean of the training rows.
        guide: Pyro guide to use instead of the pair's own; called alike, as guide(x filled, *given).

    Raises:
        UsageError: `fill` is not of the event's shape.

    Example:
        >>> import torch
        >>> from pyrovae.inference import impute
        >>> from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal
        >>> vae = VAE(StandardNormal(2), Bernoulli(MLP(2, 3)), MeanFieldNormal(MLP(3), 2))
        >>> masked = Masked(vae, fill=torch.full((3,), 0.5))
        >>> x, seen = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([True, True, False])
        >>> impute(masked.model, masked.guide, x, seen, num_draws=2).draws[..., :2].tolist()
        [[[1.0, 0.0]], [[1.0, 0.0]]]
    """

    fill: Tensor

    def __init__(
        self,
        pair: LatentLayers | ConditionalVAE | LabelledVAE,
        fill: Tensor,
        guide: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.pair = pair
        self.filled_guide = pair.guide if guide is None else guide
        if fill.shape != pair.event_shape:
            raise UsageError(f"fill: expected the event shape {tuple(pair.event_shape)}, got {tuple(fill.shape)}")
        self.register_buffer("fill", fill)

    def model(self, x: Tensor, *given: Tensor) -> None:
        """p(x_seen, z) as a Pyro model.

        Args:
            x: Shape (N, *event); missing elements may be anything in the support of the likelihood, such as 0.
            *given: What the pair is given, and last which elements are seen: boolean, shape (N, *event).

        Raises:
            PairError: the likelihood's elements are not independent given z.
        """
        *rest, seen = given
        with SeenAlone(seen):
            self.pair.model(x, *rest)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        """q(z | filled x) as a Pyro guide; arguments as those of `model`."""
        *rest, seen = given
        self.filled_guide(x.where(seen, self.fill), *rest)


class SeenAlone(Messenger):
    """Leave the elements of the site `x` that are not seen out of its log-probability.

    Args:
        seen: Boolean, shape (N, *event).
    """

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] != "x":
            return
        fn = msg["fn"]
        if not isinstance(fn, dist.Independent) or fn.reinterpreted_batch_ndims != fn.event_dim:
            raise PairError(
                f"model site 'x': {type(fn).__name__} has elements that are not independent given z, so that the "
                "missing ones cannot be left out; use a likelihood that ends in .to_event()"
            )
        msg["fn"] = fn.base_dist.mask(self.seen).to_event(fn.event_dim)
