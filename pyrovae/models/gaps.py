r"""Rows with gaps: NaN stands where a value is missing, and log p is that of what is seen.

    log p(x_seen, z) = log p(z) + sum_{i seen} log p(x_i | z)              q(z | x_seen, which are seen)

Where a likelihood makes the elements of x independent given z, the missing ones are integrated out by leaving them out
(`PartlySeen`), and the guide sees the median of the column in their place, beside the mask that says so (`WithMask`).
With these two a VAE, or any other pair, is one of rows with gaps, and everything that is said of x is said of what is
seen of it: bounds, log p(x), its error and verdict. With IWAE(K) as objective this is MIWAE.

That values are missing is taken to say nothing of what they would be, given what is seen (missing at random).
`pyrovae.models.Masked` is the other way round: of whole rows, which elements are seen is given from without.

References:
    Mattei and Frellsen 2019, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets,
        https://arxiv.org/abs/1812.02633
"""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.errors import PairError
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.views import View


class OfSeen(dist.TorchDistribution):
    """Elements, each by itself, of which those that are NaN are not seen and have log p = 0; draws are whole.

    Args:
        base_dist: Of the elements: event shape ().
        fill: What is in the support, and stands where nothing is seen; of a shape that the elements' can be made from.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: dist.TorchDistribution, fill: Tensor) -> None:
        self.base_dist, self.fill = base_dist, fill
        super().__init__(base_dist.batch_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def has_rsample(self) -> bool:
        return bool(self.base_dist.has_rsample)

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OfSeen":
        return OfSeen(self.base_dist.expand(batch_shape), self.fill)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of each element, 0 where it is NaN. The value is filled first, so that no gradient is NaN."""
        seen = value == value  # as `isnan`, which has no kernel of its own in compiled code
        return self.base_dist.log_prob(torch.where(seen, value, self.fill)).masked_fill(~seen, 0.0)


class PartlySeen(Likelihood):
    """p(x_seen|z) of rows with gaps, by a likelihood of whole ones whose elements are independent given z.

    Its space is that of the likelihood, with NaN for what is missing. Draws and means are of whole rows.

    Args:
        likelihood: p(x|z).

    Example:
        >>> import math
        >>> from pyrovae.models import MLP, Gaussian
        >>> part = PartlySeen(Gaussian(MLP(2, 3), scale=1.0))
        >>> z, x = torch.zeros(1, 2), torch.tensor([[0.0, math.nan, math.nan]])
        >>> mean = part(z).mean[0, 0]
        >>> torch.allclose(part(z).log_prob(x), -0.5 * mean**2 - 0.5 * math.log(2 * math.pi) * torch.ones(1))
        True
    """

    measure = "what is seen"
    fill: Tensor

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__(likelihood.decoder, likelihood.event_shape)
        self.whole = likelihood
        # A plain attribute: torch would register the decoder, which is the likelihood's, a second time.
        self.__dict__["decoder"] = self._modules.pop("decoder")
        self.register_buffer("fill", torch.zeros(likelihood.event_shape))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        """That of the class of the likelihood of whole rows, given as `of`."""
        of: type[Likelihood] = settings.pop("of")
        return of.decoder_shape(event_shape, **settings)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x_seen|z).

        Raises:
            PairError: the likelihood's elements are not independent given z.
        """
        p = self.whole(z)
        if not isinstance(p, dist.Independent) or p.reinterpreted_batch_ndims != p.event_dim:
            raise PairError(
                f"likelihood: {type(self.whole).__name__} has elements that are not independent given z, so that the "
                "missing ones cannot be left out; use one that ends in .to_event()"
            )
        return OfSeen(p.base_dist, self.fill).to_event(p.event_dim)

    def initialise(self, x: Tensor) -> None:
        """Start at what is seen of training data x (N, *event), which have NaN where a value is missing."""
        self.fill.copy_(medians(x))
        self.whole.initialise(completed(x))

    def check_support(self, x: Tensor) -> None:
        self.whole.check_support(completed(x, self.fill))

    def remarks(self, z: Tensor) -> list[str]:
        return self.whole.remarks(z)

    def view(self, event_shape: tuple[int, ...]) -> View:
        return WithMask(event_shape, self.whole.view(event_shape))


class WithMask(View):
    """Rows with gaps as an encoder sees them: medians in the gaps, and beside them which elements are seen.

    Args:
        event_shape: Of x.
        of: A view of whole rows to look through; None: x itself. Of images it has to keep their shape.
    """

    fill: Tensor
    unit: Tensor

    def __init__(self, event_shape: tuple[int, ...], of: View | None = None) -> None:
        shape = event_shape if of is None else of.out_shape
        of_images = len(event_shape) > 1
        first, *rest = shape if not of_images or len(shape) > 2 else (1, *shape)
        beside = (1 if len(event_shape) == 2 else event_shape[0],)
        super().__init__(event_shape, (first + beside[0], *rest))
        self.of, self.dims = of, len(rest) + 1
        self.register_buffer("fill", torch.zeros(event_shape))
        self.register_buffer("unit", torch.ones(()))  # by which the mask varies as much as what is seen

    def forward(self, x: Tensor) -> Tensor:
        """Of x of shape (*batch, *event), NaN where it is missing: channels, or elements, of x and then of the mask."""
        seen = x == x
        filled = torch.where(seen, x, self.fill)
        both = (filled if self.of is None else self.of(filled), seen.to(x.dtype) * self.unit)
        lead = x.shape[: x.ndim - len(self.event_shape)]
        return torch.cat([part.reshape(*lead, -1, *self.out_shape[1:]) for part in both], -self.dims)

    def initialise(self, x: Tensor) -> None:
        """Take medians, and the scale of what is seen, from training data x (N, *event)."""
        self.fill.copy_(medians(x))
        filled = torch.where(x.isnan(), self.fill, x)
        if self.of is not None:
            self.of.initialise(completed(x))
            filled = self.of(filled)
        spread = (filled - filled.mean(0)).double().square().mean().sqrt()
        self.unit.copy_(spread if spread > 0 else torch.ones(()))


def medians(x: Tensor) -> Tensor:
    """Of what is seen of each element of x (N, *event), shape (*event,): values that rows have, or 0 of none."""
    return x.nanmedian(0).values.nan_to_num(0.0)


def completed(x: Tensor, fill: Tensor | None = None) -> Tensor:
    """Rows (N, *event) with something in the place of NaN; without NaN, x itself.

    Args:
        x: Rows.
        fill: What is put there, of the event's shape; None: the values that other rows have in that column, one after
            the other, so that each column keeps its moments.
    """
    gone = x.isnan()
    if not gone.any():
        return x
    if fill is not None:
        return torch.where(gone, fill, x)
    flat, missing = x.flatten(1).clone(), gone.flatten(1)
    for column in missing.any(0).nonzero().flatten().tolist():
        there = ~missing[:, column]
        values = flat[there, column] if there.any() else flat.new_zeros(1)
        count = int(missing[:, column].sum())
        flat[missing[:, column], column] = values[torch.arange(count, device=x.device) % len(values)]
    return flat.view_as(x)
