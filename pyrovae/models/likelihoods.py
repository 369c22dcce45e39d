"""Likelihoods p(x|z).

A likelihood is a module whose `forward(z)` maps (*batch, Z) to a distribution of batch shape `batch` and the event
shape of x. It says its `measure`, the name of the space that x is in: "mass", for one on {0,1}^D, or "density"; numbers
of two measures never share a column of a table. To write a new one, subclass `Likelihood`, return the distribution, say
what the decoder has to put out (`decoder_shape`), and name the class in `LIKELIHOODS` of `pyrovae.models.choices`.
Parameters with a default are its settings, on the command line too.

The distributions do not validate their arguments, which would read (K, N, *event) numbers once more at every step;
the pair checks x, which is K times smaller, by `check_support`.
"""

import math
from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.errors import DataError, UsageError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.location_scale import LocationScale
from pyrovae.models.networks import Network
from pyrovae.models.priors import inverse_softplus
from pyrovae.models.scaled_t import ScaledT
from pyrovae.models.tilted_uniform import TiltedUniform, eta_of
from pyrovae.settings import NotNegative, Number, Positive, checked

MOST_AT_ENDS = 1e-3  # of elements, at an end of an open interval: by rounding
LEAST_CONCENTRATION = 0.01  # of a Beta element, whose density at an end rises without bound below 1


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


class Gaussian(LocationScale):
    """A density: independent Gaussian elements, with the decoder's output as mean.

    The optimal scale is the root mean square error of training rows.

    With mean="sigmoid" the mean is in the data's own units, and between 0 and 1 whatever the output; the scale is as
    before. It is for data in [0, 1], such as dequantised grey levels, and others are refused by `initialise`. It bounds
    the mean and no more: p(x|z) is a density on R^D still, so draws of x, and later rows, may lie outside.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): mean and scale.
        scale: A number, fixed, in units of x, of a LogNormal in those of log x; "learned", one for all elements;
            "optimal", of a Gaussian or Laplace alone, one for all elements, set in closed form after each epoch of
            training; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given.
        mean: "identity", the decoder's output in standard deviations of the data; or "sigmoid", its logistic function,
            for data in [0, 1].
    """

    measure = "density"
    power = 2

    @checked
    def __init__(
        self,
        decoder: Network,
        scale: Positive | Literal["learned", "optimal", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
        mean: Literal["identity", "sigmoid"] = "identity",
    ) -> None:
        super().__init__(decoder, scale, floor, mean)

    @property
    def deviation(self) -> float:
        return 1.0

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(*self.loc_and_scale(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        self.start(x)

    def check_support(self, x: Tensor) -> None:
        self.check_finite(x, "a Gaussian")


class Laplace(LocationScale):
    """A density: independent Laplace elements, with the decoder's output as mean, which is their median too.

    The optimal scale is the mean absolute error of training rows; the standard deviation is sqrt(2) times a scale.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): mean and scale.
        scale: A number, fixed, in units of x, of a LogNormal in those of log x; "learned", one for all elements;
            "optimal", of a Gaussian or Laplace alone, one for all elements, set in closed form after each epoch of
            training; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given.
        mean: "identity", the decoder's output in standard deviations of the data; or "sigmoid", its logistic function,
            for data in [0, 1].
    """

    measure = "density"
    power = 1

    @checked
    def __init__(
        self,
        decoder: Network,
        scale: Positive | Literal["learned", "optimal", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
        mean: Literal["identity", "sigmoid"] = "identity",
    ) -> None:
        super().__init__(decoder, scale, floor, mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(2)

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Laplace(*self.loc_and_scale(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        self.start(x)

    def check_support(self, x: Tensor) -> None:
        self.check_finite(x, "a Laplace")


class StudentT(LocationScale):
    """A density: independent Student-t elements, with the decoder's output as mean, for data with outliers.

    The standard deviation is sqrt(df / (df - 2)) times the scale.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): mean and scale.
        df: Degrees of freedom: a number above 2, fixed, so that there are a mean and a variance; or "learned", one for
            all elements, that starts at 5. More are nearer to a Gaussian.
        scale: A number, fixed, in units of x, of a LogNormal in those of log x; "learned", one for all elements;
            "optimal", of a Gaussian or Laplace alone, one for all elements, set in closed form after each epoch of
            training; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given.
        mean: "identity", the decoder's output in standard deviations of the data; or "sigmoid", its logistic function,
            for data in [0, 1].

    References:
        Takahashi et al. 2018, Student-t Variational Autoencoder for Robust Density Estimation,
            https://www.ijcai.org/proceedings/2018/374
    """

    measure = "density"

    @checked
    def __init__(
        self,
        decoder: Network,
        df: Annotated[float, Number(above=2)] | Literal["learned"] = 5.0,
        scale: Positive | Literal["learned", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
        mean: Literal["identity", "sigmoid"] = "identity",
    ) -> None:
        super().__init__(decoder, scale, floor, mean)
        self.df = df
        if df == "learned":
            self.raw_df = nn.Parameter(torch.tensor(inverse_softplus(3.0)))

    @property
    def deviation(self) -> float:
        df = 5.0 if isinstance(self.df, str) else self.df
        return math.sqrt(df / (df - 2))

    def forward(self, z: Tensor) -> dist.Distribution:
        loc, scale = self.loc_and_scale(z)
        df = 2 + softplus(self.raw_df) if isinstance(self.df, str) else torch.full_like(self.unit, self.df)
        return ScaledT(df, loc, scale).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        self.start(x)

    def check_support(self, x: Tensor) -> None:
        self.check_finite(x, "a Student-t")


class LogNormal(LocationScale):
    """A density on (0, inf)^D: independent log-normal elements, with the decoder's output as mean of the logarithm.

    For amounts, durations and sizes, whose errors are a share of their value. Of x that becomes c x, log p(x) falls by
    D log c, and nothing else changes.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): mean and scale of log x.
        scale: A number, fixed, in units of x, of a LogNormal in those of log x; "learned", one for all elements;
            "optimal", of a Gaussian or Laplace alone, one for all elements, set in closed form after each epoch of
            training; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given.
    """

    measure = "density"
    short = ("log-normal",)

    @checked
    def __init__(
        self,
        decoder: Network,
        scale: Positive | Literal["learned", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
    ) -> None:
        super().__init__(decoder, scale, floor, "identity")

    @property
    def deviation(self) -> float:
        return 1.0

    def forward(self, z: Tensor) -> dist.Distribution:
        return OpenLogNormal(*self.loc_and_scale(z), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start the mean of log x at that of training data, and its scale at half their standard deviation."""
        self.start(x.clamp(min=torch.finfo(x.dtype).tiny).log())

    def check_support(self, x: Tensor) -> None:
        check_inside(x, 0.0, math.inf, "a log-normal")


class Beta(Likelihood):
    """A density on (0,1)^D: independent Beta elements, with both concentrations put out by the decoder.

    For shares and probabilities. At 0 and 1 the density is 0 or infinite, so that data with such elements are refused,
    but for the few that rounding has made.

    Args:
        decoder: Maps z to (2, *event): a and b are 0.01 + softplus of it, and the mean is a / (a + b).
    """

    measure = "density"

    def __init__(self, decoder: Network) -> None:
        if decoder.out_shape[:1] != (2,) or len(decoder.out_shape) < 2:
            raise UsageError(
                f"decoder: a Beta likelihood expects an output of shape (2, *event), got {decoder.out_shape}"
            )
        super().__init__(decoder, decoder.out_shape[1:])

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (2, *event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        a, b = (LEAST_CONCENTRATION + softplus(self.decoder(z))).unbind(-1 - len(self.event_shape))
        return OpenBeta(a, b).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start the mean at that of x, clipped to [0.001, 0.999], and a + b where half its standard deviation is."""
        mean = x.double().mean(0).clamp(1e-3, 1 - 1e-3)
        variance = (x.double().std(0, correction=0) / 2).square().clamp(min=1e-6)
        total = (mean * (1 - mean) / variance - 1).clamp(0.5, 1e4)
        excess = (total * torch.stack([mean, 1 - mean]) - LEAST_CONCENTRATION).clamp(min=1e-3)
        set_output_bias(self.decoder, (excess + torch.log(-torch.expm1(-excess))).to(x))

    def check_support(self, x: Tensor) -> None:
        check_inside(x, 0.0, 1.0, "a Beta")


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


class OpenBeta(dist.TorchDistribution):
    """A Beta distribution that reads 0 and 1 as numbers next to them.

    Dequantised levels are 0 once in 2^24 dark pixels; the density may be infinite there, and no step is to fail by it.
    torch's is a Dirichlet, which puts both concentrations and both logarithms side by side in memory first.

    Args:
        a: Concentration at 1, above 0; the batch shape is its.
        b: Concentration at 0, of the same shape.
    """

    arg_constraints = {"a": constraints.positive, "b": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        super().__init__(a.shape, validate_args=False)

    @property
    def closed(self) -> dist.TorchDistribution:
        """The same by torch's class."""
        return dist.Beta(self.a, self.b, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OpenBeta":
        return OpenBeta(self.a.expand(batch_shape), self.b.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, for value in [0, 1] of a shape that broadcasts with the batch's."""
        x = value.clamp(torch.finfo(value.dtype).eps ** 2, 1 - torch.finfo(value.dtype).eps / 2)
        powers = (self.a - 1) * x.log() + (self.b - 1) * (1 - x).log()
        return powers + torch.lgamma(self.a + self.b) - (torch.lgamma(self.a) + torch.lgamma(self.b))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.closed.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self.closed.mean

    @property
    def variance(self) -> Tensor:
        return self.closed.variance


class OpenLogNormal(dist.LogNormal):
    """A log-normal distribution that reads 0 as the least number of full precision; see `OpenBeta`."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.clamp(min=torch.finfo(value.dtype).tiny))


def check_inside(x: Tensor, low: float, high: float, name: str) -> None:
    """Refuse elements outside (low, high), and such at its ends as are more than rounding makes.

    Raises:
        DataError: there are elements outside, or more than one in 1000 at an end.
    """
    inside, at_end = (x > low) & (x < high), ((x == low) | (x == high)) & x.isfinite()
    if not (inside | at_end).all() or at_end.double().mean() > MOST_AT_ENDS:
        raise DataError(
            f"x: {name} likelihood has support ({low:g}, {high:g}), got values from {x.min():g} to {x.max():g} with "
            f"{int((~inside).sum())} elements at an end or outside; bring them inside or use a Gaussian likelihood",
            settings=("likelihood=gaussian",),
        )
