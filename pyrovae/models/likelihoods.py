"""Likelihoods p(x|z).

A likelihood is a module whose `forward(z)` maps (*batch, Z) to a distribution of batch shape `batch` and the event
shape of x. It says its `measure`, the name of the space that x is in: "mass", for one on {0,1}^D, or "density"; numbers
of two measures never share a column of a table. To write a new one, subclass `Likelihood`, return the distribution, say
what the decoder has to put out (`decoder_shape`), and name the class in `LIKELIHOODS` of `pyrovae.models.choices`.
Parameters with a default are its settings, on the command line too.

The distributions do not validate their arguments, which would read (K, N, *event) numbers once more at every step;
the pair checks x, which is K times smaller, by `check_support`.
"""

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.errors import DataError, UsageError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.networks import Network
from pyrovae.models.priors import inverse_softplus
from pyrovae.models.tilted_uniform import TiltedUniform, eta_of
from pyrovae.settings import NotNegative, Positive, checked

RELATIVE_FLOOR = 1e-3  # of a Gaussian's scale that is not fixed


class Bernoulli(Likelihood):
    """A mass on {0,1}^D: independent pixels, with the decoder's output as logits."""

    measure = "mass"

    def __init__(self, decoder: Network) -> None:
        super().__init__(decoder, decoder.out_shape)

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return event_shape

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start the output bias at the logit of the mean of x, clipped to [0.001, 0.999]."""
        set_output_bias(self.decoder, torch.logit(x.mean(0).clamp(1e-3, 1 - 1e-3)))

    def check_support(self, x: Tensor) -> None:
        wrong = (x != 0) & (x != 1)
        if wrong.any():
            low, high = x.min().item(), x.max().item()
            raise DataError(
                f"x: a Bernoulli likelihood has support {{0, 1}}, got values from {low:g} to {high:g} with "
                f"{int(wrong.sum())} elements neither 0 nor 1; binarise them or use a Gaussian likelihood",
                settings=("binarize", "likelihood=gaussian"),
            )


class Gaussian(Likelihood):
    """A density: independent Gaussian elements, with the decoder's output as mean.

    The decoder speaks in `unit`, the standard deviation of the training data (over all elements; 1 until `initialise`),
    so that a pair learns data of any scale alike: mean = unit * output, scale = unit * (floor + softplus(parameter)).
    The floor keeps any element from driving the density to infinity; `scale_at_floor` tells how much of it has been
    driven there.

    With mean="sigmoid" the mean is in the data's own units, and between 0 and 1 whatever the output; the scale is as
    before. It is for data in [0, 1], such as dequantised grey levels, and others are refused by `initialise`. It bounds
    the mean and no more: p(x|z) is a density on R^D still, so draws of x, and later rows, may lie outside.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): mean and scale.
        scale: A number, fixed, in the data's own units; "learned", one for all elements; "per-dimension", one for each
            element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given. A fixed
            scale has none.
        mean: "identity", the decoder's output in standard deviations of the data; or "sigmoid", its logistic function,
            for data in [0, 1].
    """

    measure = "density"
    unit: Tensor

    @checked
    def __init__(
        self,
        decoder: Network,
        scale: Positive | Literal["learned", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
        mean: Literal["identity", "sigmoid"] = "identity",
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
        if scale in ("learned", "per-dimension"):
            shape = out_shape if scale == "per-dimension" else ()
            self.raw_scale = nn.Parameter(torch.full(shape, inverse_softplus(1.0)))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (2, *event_shape) if settings.get("scale") == "predicted" else event_shape

    def loc_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of p(x|z), both of shape (*batch, *event)."""
        out = self.decoder(z)
        if self.scale == "predicted":
            loc, raw_scale = out.unbind(-1 - len(self.event_shape))
            return self.mean_of(loc), self.unit * (self.floor + softplus(raw_scale))
        if isinstance(self.scale, str):
            return self.mean_of(out), (self.unit * (self.floor + softplus(self.raw_scale))).expand_as(out)
        return self.mean_of(out), torch.full_like(out, self.scale)

    def mean_of(self, out: Tensor) -> Tensor:
        """The mean of p(x|z), of the same shape as the decoder's output for it."""
        return out.sigmoid() if self.mean == "sigmoid" else self.unit * out

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(*self.loc_and_scale(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start the mean at the mean of x, and a scale that is not fixed at half the standard deviation of x.

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
        relative = (overall if self.scale == "learned" else spread) / unit
        excess = (0.5 * relative - self.floor).clamp(min=0.1 * self.floor + 1e-6).to(x)
        raw_scale = excess + torch.log(-torch.expm1(-excess))  # inverse softplus
        if self.scale == "predicted":
            set_output_bias(self.decoder, torch.stack([loc, raw_scale]))
            return
        set_output_bias(self.decoder, loc)
        if isinstance(self.scale, str):
            with torch.no_grad():
                self.raw_scale.copy_(raw_scale)

    def check_support(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise DataError(
                f"x: a Gaussian likelihood needs finite values, got {int((~x.isfinite()).sum())} that are not"
            )

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
        """That the scale is at its floor, where it is."""
        share = self.scale_at_floor(z)
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


class ContinuousBernoulli(Likelihood):
    """A density on [0,1]^D: independent pixels with p(x) proportional to exp(output * x).

    For grey levels, which are dequantised as for a Gaussian: its log p(x) is of the same rows and the same measure, and
    may share a column with a Gaussian's.

    References:
        Loaiza-Ganem and Cunningham 2019, The continuous Bernoulli, https://arxiv.org/abs/1907.06845
    """

    measure = "density"
    short = ("continuous-bernoulli",)

    def __init__(self, decoder: Network) -> None:
        super().__init__(decoder, decoder.out_shape)

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return event_shape

    def forward(self, z: Tensor) -> dist.Distribution:
        return TiltedUniform(self.decoder(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start each pixel at the mean of x, clipped to [0.001, 0.999]."""
        set_output_bias(self.decoder, eta_of(x.mean(0).clamp(1e-3, 1 - 1e-3)))

    def check_support(self, x: Tensor) -> None:
        wrong = ~((x >= 0) & (x <= 1))  # NaN too
        if wrong.any():
            low, high = x.min().item(), x.max().item()
            raise DataError(
                f"x: a continuous Bernoulli likelihood has support [0, 1], got values from {low:g} to {high:g} with "
                f"{int(wrong.sum())} elements outside; rescale them or use a Gaussian likelihood"
            )
