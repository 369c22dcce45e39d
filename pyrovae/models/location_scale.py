r"""Location-scale families: what Gaussian, Laplace, Student-t, log-normal and logistic elements have in common.

p(x|z) is that of x = location + scale e, with independent e of one law. The decoder speaks in `unit`, the standard
deviation of the training data over all elements (1 until `initialise`), so that a pair learns data of any scale alike:

    location = unit * output        scale = unit * (floor + softplus(parameter))

A density of narrow scale has no upper bound; the floor keeps any element from driving it to infinity, and
`scale_at_floor` tells how much of it has been driven there.

The optimal scale. For one scale s of all elements and a law exp(-|e|^p / p), given everything else,

    d/ds E log p(x|z) = 0   where   s^p = E |x - location|^p / D,

the mean square error of a Gaussian (p = 2), the mean absolute one of a Laplace (p = 1); E is over rows and draws of the
guide, weighted as the bound weights them. With scale="optimal" training sets s to it after each epoch, on training rows
(`pyrovae.inference.training.closed_form`), in place of gradients: a step of EM, which lowers no bound on those rows.
Within a step, and ever after, s is a number like any other parameter, so that no row depends on another.

Rybkin et al. take s^p of the batch at hand, inside the bound. Then log p(x_i|z_i) depends on the other rows, and there
is no p(x_i) that the bound is one of. That of each row by itself is no density either: with s^2 = |x - location|^2 / D
it would be proportional to |x - location|^-D, whose integral around the location is infinite. So neither is here.

References:
    Rybkin, Daniilidis and Levine 2021, Simple and Effective VAE Training with Calibrated Decoders (sigma-VAE),
        https://arxiv.org/abs/2006.13202
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.errors import DataError, UsageError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.networks import Network
from pyrovae.models.priors import inverse_softplus

RELATIVE_FLOOR = 1e-3  # of a scale that is not fixed, in standard deviations of the data


class LocationScale(Likelihood, ABC):
    """Independent elements of a location and a scale.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): location and scale.
        scale: A number, fixed, in the data's own units; "learned", one for all elements; "optimal", one for all
            elements in closed form; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; None: 0.001. A fixed scale
            has none.
        mean: "identity", the decoder's output in standard deviations of the data; or "sigmoid", its logistic function,
            for data in [0, 1].

    Attributes:
        power: p, where the law is exp(-|e|^p / p) and an optimal scale has a closed form.
    """

    power: ClassVar[int]
    unit: Tensor
    optimal: Tensor

    def __init__(
        self, decoder: Network, scale: float | str, floor: float | None, mean: Literal["identity", "sigmoid"]
    ) -> None:
        out_shape = decoder.out_shape
        if scale == "predicted":
            if out_shape[:1] != (2,) or len(out_shape) < 2:
                raise UsageError(
                    f"decoder: scale='predicted' expects an output of shape (2, *event), got {out_shape}; "
                    f"build the decoder with out_shape=(2, *event)"
                )
            out_shape = out_shape[1:]
        super().__init__(decoder, out_shape)
        if floor is not None and not isinstance(scale, str):
            raise UsageError(f"floor: not used, since the scale is fixed to {scale}; leave it out")
        self.floor = RELATIVE_FLOOR if floor is None else float(floor)
        self.scale, self.mean = scale, mean
        self.register_buffer("unit", torch.ones(()))
        if scale == "optimal":
            self.register_buffer("optimal", torch.ones(()))
        if scale in ("learned", "per-dimension"):
            shape = out_shape if scale == "per-dimension" else ()
            self.raw_scale = nn.Parameter(torch.full(shape, inverse_softplus(1.0)))

    @classmethod
    @final
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (2, *event_shape) if settings.get("scale") == "predicted" else event_shape

    @property
    @abstractmethod
    def deviation(self) -> float:
        """The standard deviation of the law, that of an element of scale 1."""

    def loc_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of p(x|z), both of shape (*batch, *event)."""
        out = self.decoder(z)
        if self.scale == "predicted":
            loc, raw_scale = out.unbind(-1 - len(self.event_shape))
            return self.mean_of(loc), self.unit * (self.floor + softplus(raw_scale))
        if self.scale == "optimal":
            return self.mean_of(out), torch.maximum(self.optimal, self.floor * self.unit).expand_as(out)
        if isinstance(self.scale, str):
            return self.mean_of(out), (self.unit * (self.floor + softplus(self.raw_scale))).expand_as(out)
        return self.mean_of(out), torch.full_like(out, self.scale)

    def mean_of(self, out: Tensor) -> Tensor:
        """The location of p(x|z), of the same shape as the decoder's output for it."""
        return out.sigmoid() if self.mean == "sigmoid" else self.unit * out

    def start(self, x: Tensor) -> None:
        """Start the location at the mean of x, and a scale that is not fixed at half the standard deviation of x.

        At the whole of it, noise would explain the data as they are, and training begins by collapsing the posterior.
        A sigmoid starts at the mean of x clipped to [0.001, 0.999].

        Raises:
            DataError: the mean is a sigmoid, and x has values outside [0, 1].
        """
        wide = x.double()  # squares of small numbers vanish in single precision
        spread = (wide - wide.mean(0)).square().mean(0).sqrt()
        overall = spread.square().mean().sqrt()
        self.unit.copy_(overall if overall > 0 else torch.ones(()))
        unit = overall if overall > 0 else 1.0
        if self.mean == "sigmoid":
            self.check_unit_interval(x)
            loc = torch.logit(wide.mean(0).clamp(1e-3, 1 - 1e-3)).to(x)
        else:
            loc = (wide.mean(0) / unit).to(x)
        relative = (overall if self.scale in ("learned", "optimal") else spread) / unit
        least = 0.1 * self.floor + 1e-6
        excess = (0.5 * relative / self.deviation - self.floor).clamp(min=least).to(x)
        raw_scale = excess + torch.log(-torch.expm1(-excess))  # inverse softplus
        if self.scale == "predicted":
            set_output_bias(self.decoder, torch.stack([loc, raw_scale]))
            return
        set_output_bias(self.decoder, loc)
        if self.scale == "optimal":
            self.optimal.copy_(unit * (self.floor + excess))
        elif isinstance(self.scale, str):
            with torch.no_grad():
                self.raw_scale.copy_(raw_scale)

    @property
    def in_closed_form(self) -> bool:
        """Whether the scale is set by `maximise` in place of gradients."""
        return self.scale == "optimal"

    def statistics(self, p: Any, x: Tensor) -> Tensor:
        """What an optimal scale is a function of: |x - location|^p summed over seen elements, and their number.

        Args:
            p: p(x|z) at the site of x, batch shape (K, N); elements that a mask leaves out count nothing.
            x: Shape (N, *event); NaN, where a value is missing, counts nothing.

        Returns:
            Shape (2, K, N).
        """
        of_element = p.base_dist
        distance = (x - of_element.mean).abs() ** self.power
        mask = of_element._mask if isinstance(of_element, dist.MaskedDistribution) else True
        seen = (torch.as_tensor(mask, device=x.device) & (x == x)).expand_as(distance)
        return torch.stack([distance.where(seen, 0.0), seen.to(distance)]).flatten(3).sum(-1)

    def maximise(self, totals: Tensor) -> dict[str, float]:
        """Set an optimal scale from `statistics` summed over rows, shape (2,); what is recorded of it, by name."""
        total, count = totals
        self.optimal.copy_((total / count) ** (1 / self.power))
        return {"likelihood_scale": self.optimal.item()}

    def check_finite(self, x: Tensor, name: str) -> None:
        """Refuse what is not finite, for a family of that name on all real numbers."""
        if not x.isfinite().all():
            raise DataError(f"x: {name} likelihood needs finite values, got {int((~x.isfinite()).sum())} that are not")

    def check_unit_interval(self, x: Tensor) -> None:
        """Refuse training data that a mean between 0 and 1 cannot follow."""
        outside = int(((x < 0) | (x > 1)).sum())
        if outside:
            raise DataError(
                f"x: mean='sigmoid' is for data in [0, 1], got values from {x.min():g} to {x.max():g} with {outside} "
                "elements outside; rescale them or use mean='identity'",
                settings=("likelihood.mean=identity",),
            )

    @torch.no_grad()
    def remarks(self, z: Tensor) -> list[str]:
        """That the scale of a density is at its floor, where it is; a mass is at most 1 whatever its scale."""
        share = self.scale_at_floor(z) if self.measure == "density" else 0.0
        if share == 0:
            return []
        return [
            f"the likelihood's scale is at its floor, {self.floor:g} standard deviations of the data, for "
            f"{100 * share:.2g} % of the elements: the density there is set by the floor (likelihood.floor), not by "
            "the data"
        ]

    def scale_at_floor(self, z: Tensor) -> float:
        """Share of elements whose scale is within 1 % of the floor, for z of shape (*batch, Z)."""
        if not isinstance(self.scale, str) or self.floor == 0:
            return 0.0
        return (self.loc_and_scale(z)[1] < 1.01 * self.floor * self.unit).double().mean().item()
