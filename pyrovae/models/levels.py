r"""Likelihoods of grey levels: masses on {0, ..., L - 1}^D, with independent elements or pixels given z.

A discretised logistic gives a level the mass of a logistic density between l - 1/2 and l + 1/2, and to the ends what is
beyond them as well. With b = (l + 1/2 - loc) / scale and a = b - 1/scale, and s the logistic function,

    log [s(b) - s(a)] = log s(b) + log s(-a) + log(1 - exp(-1/scale)),

of which each term is exact in single precision, where the difference of two numbers near 0 or 1 has no digit left. At
l = 0 the first term alone is left, at l = L - 1 the second, so that all levels sum to 1 whatever loc and scale are.

Channels of a colour image are alike, and what z leaves of one tells of the others. In a mixture of discretised
logistics of which each pixel, of three channels together, has one component c, the location of green can depend on the
level of red, and that of blue on both (Salimans et al. 2017), linearly, with coefficients of the decoder's that are
within -1 and 1:

    p(r, g, b) = sum_c w_c P(r; m_r) P(g; m_g + alpha_c r') P(b; m_b + beta_c r' + gamma_c g'),   r' = r - (L - 1) / 2

which sums to 1 since each factor does, whatever the levels before it, and is drawn from channel by channel.

Their log p(x) is that of the levels, and -log2 p(x) / D the bits of coding a pixel by the model. A density of
dequantised levels gives an image of levels l the mass P(l) = int p((l + u) / L) du / L^D over u in [0, 1]^D. By
Jensen's inequality the density's own bits per dimension are at least those of P: an upper bound of what a mass on
levels says exactly, so that the two stand in tables of their own.

References:
    Salimans et al. 2017, PixelCNN++, https://arxiv.org/abs/1701.05517
    Theis, van den Oord and Bethge 2016, A Note on the Evaluation of Generative Models, https://arxiv.org/abs/1511.01844
    van den Oord et al. 2016, Pixel Recurrent Neural Networks (the softmax), https://arxiv.org/abs/1601.06759
"""

import math
from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from pyrovae.errors import DataError, UsageError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.location_scale import RELATIVE_FLOOR, LocationScale
from pyrovae.models.networks import Network
from pyrovae.settings import Count, NotNegative, Positive, Whole, checked

Levels = Annotated[int, Whole(2)]
SINGLE = torch.Size()
COLOUR_OUTPUTS = 10  # of a decoder for each component of a pixel: a logit, and 3 locations, scales and coefficients
DEVIATION = math.pi / math.sqrt(3)  # standard deviation of a logistic distribution of scale 1


class LogisticLevels(dist.TorchDistribution):
    """The mass of a logistic density at levels 0, ..., L - 1, with its tails at the ends.

    Args:
        loc: Location in levels, any real numbers; the batch shape is theirs.
        scale: Scale in levels, of the same shape.
        levels: L.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(loc.shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogisticLevels":
        return LogisticLevels(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats of whole numbers from 0 to L - 1, of the shape that value and the batch broadcast to."""
        rate = 1 / self.scale
        above = (value + 0.5 - self.loc) * rate
        first, last = value <= 0, value >= self.levels - 1
        below_top = torch.where(last, 0.0, logsigmoid(above))
        above_bottom = torch.where(first, 0.0, logsigmoid(rate - above))
        width = torch.where(first | last, 0.0, torch.log(-torch.expm1(-rate)))
        return below_top + above_bottom + width

    def sample(self, sample_shape: Any = SINGLE) -> Tensor:
        """Logistic draws, rounded, those beyond the ends at them."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            return (self.loc + self.scale * torch.logit(u)).round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The sum over l > 0 of the mass from l on; level by level, since all at once would take L times the memory."""
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            total = total + torch.sigmoid((self.loc + 0.5 - level) / self.scale)
        return total


class LogisticMixture(dist.TorchDistribution):
    """Mixtures of discretised logistics, one for each element.

    Args:
        logits: Log weights of C components, up to a constant, shape (*batch, C).
        components: Of batch shape (*batch, C).
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor, components: LogisticLevels) -> None:
        self.logits, self.components = logits, components
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogisticMixture":
        shape = (*batch_shape, self.logits.shape[-1])
        return LogisticMixture(self.logits.expand(shape), self.components.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats of whole numbers from 0 to L - 1, of the shape that value and the batch broadcast to."""
        joint = self.logits + self.components.log_prob(value.unsqueeze(-1))
        return joint.logsumexp(-1) - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Any = SINGLE) -> Tensor:
        with torch.no_grad():
            component = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape).unsqueeze(-1)
            loc, scale = (
                value.expand(*component.shape[:-1], -1).gather(-1, component).squeeze(-1)
                for value in (self.components.loc, self.components.scale)
            )
            return LogisticLevels(loc, scale, self.components.levels).sample()

    @property
    def mean(self) -> Tensor:
        return (self.logits.softmax(-1) * self.components.mean).sum(-1)


class ColourMixture(dist.TorchDistribution):
    """Pixels of three channels, each a mixture of discretised logistics of which a channel tells the next: see above.

    Args:
        logits: Log weights of the C components of each pixel, up to a constant, shape (*batch, H, W, C).
        loc: Locations in levels where the channels before are in the middle of the levels, (*batch, 3, H, W, C).
        scale: Scales in levels, of the same shape.
        coefficients: alpha, beta and gamma, of the same shape.
        levels: L.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, coefficients: Tensor, levels: int) -> None:
        self.logits, self.loc, self.scale, self.coefficients, self.levels = logits, loc, scale, coefficients, levels
        super().__init__(loc.shape[:-4], loc.shape[-4:-1], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), 3)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ColourMixture":
        loc, scale, coefficients = (
            part.expand(*batch_shape, *part.shape[-4:]) for part in (self.loc, self.scale, self.coefficients)
        )
        logits = self.logits.expand(*batch_shape, *self.logits.shape[-3:])
        return ColourMixture(logits, loc, scale, coefficients, self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats of images of whole numbers from 0 to L - 1, (..., 3, H, W), summed over pixels."""
        value = value.unsqueeze(-1)
        red, green, _ = (value - (self.levels - 1) / 2).unbind(-4)
        alpha, beta, gamma = self.coefficients.unbind(-4)
        moved = torch.stack([torch.zeros_like(alpha * red), alpha * red, beta * red + gamma * green], -4)
        channels = LogisticLevels(self.loc + moved, self.scale, self.levels).log_prob(value)
        joint = self.logits + channels.sum(-4)
        return (joint.logsumexp(-1) - self.logits.logsumexp(-1)).sum((-1, -2))

    def sample(self, sample_shape: Any = SINGLE) -> Tensor:
        """A component for each pixel, and then red, green and blue by it."""
        with torch.no_grad():
            c = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)[..., None, :, :, None]
            shape = (*c.shape[:-4], *self.loc.shape[-4:-1], 1)
            parts = (self.loc, self.scale, self.coefficients)
            loc, scale, coefficients = (
                part.expand(*shape[:-1], -1).gather(-1, c.expand(shape)).squeeze(-1) for part in parts
            )
            return self.in_turn(loc, scale, coefficients, draw=True)

    @property
    def mean(self) -> Tensor:
        """By each component, red's mean, and that of a channel where those before it are at theirs.

        That is E[x] of red; of green and blue but for what is cut off at the ends of the levels, of which a sum over
        all levels of the channels before would know.
        """
        each = self.in_turn(self.loc, self.scale, self.coefficients, draw=False, dim=-4)
        return (self.logits.softmax(-1).unsqueeze(-4) * each).sum(-1)

    def in_turn(self, loc: Tensor, scale: Tensor, coefficients: Tensor, draw: bool, dim: int = -3) -> Tensor:
        """Red, green by it, blue by both: draws, or means, of the shape of `loc`, whose channels are at `dim`."""
        (red, green, blue), scales = loc.unbind(dim), scale.unbind(dim)
        alpha, beta, gamma = coefficients.unbind(dim)
        middle = (self.levels - 1) / 2

        def one(of: Tensor, channel: int) -> Tensor:
            p = LogisticLevels(of, scales[channel], self.levels)
            return p.sample() if draw else p.mean

        r = one(red, 0)
        g = one(green + alpha * (r - middle), 1)
        b = one(blue + beta * (r - middle) + gamma * (g - middle), 2)
        return torch.stack([r, g, b], dim)


class CategoricalLevels(dist.TorchDistribution):
    """A mass on levels 0, ..., L - 1 by their logits; a level is a number, and so has a mean.

    Args:
        logits: Shape (*batch, L), up to a constant.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CategoricalLevels":
        return CategoricalLevels(self.logits.expand(*batch_shape, -1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats of whole numbers from 0 to L - 1, of the shape that value and the batch broadcast to."""
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])
        chosen = self.logits.expand(*shape, -1).gather(-1, value.long().expand(shape).unsqueeze(-1)).squeeze(-1)
        return chosen - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Any = SINGLE) -> Tensor:
        with torch.no_grad():
            return dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        return self.logits.softmax(-1) @ torch.arange(self.logits.shape[-1]).to(self.logits)


class DiscretizedLogistic(LocationScale):
    """A mass on grey levels: independent discretised logistics, with the decoder's output as location.

    Location and scale are in levels; the standard deviation is 1.81 times the scale.

    Args:
        decoder: Maps z to the event of x; with scale="predicted", to (2, *event): location and scale.
        levels: L: x is in {0, ..., L - 1}.
        scale: A number, fixed, in units of x, of a LogNormal in those of log x; "learned", one for all elements;
            "optimal", of a Gaussian or Laplace alone, one for all elements, set in closed form after each epoch of
            training; "per-dimension", one for each element; or "predicted", by the decoder.
        floor: Least scale that is not fixed, as a share of the data's standard deviation; 0.001 unless given.
    """

    measure = "levels"
    short = ("discretized-logistic", "discretised-logistic")

    @checked
    def __init__(
        self,
        decoder: Network,
        levels: Levels,
        scale: Positive | Literal["learned", "per-dimension", "predicted"] = "learned",
        floor: NotNegative | None = None,
    ) -> None:
        super().__init__(decoder, scale, floor, "identity")
        self.levels = levels

    @property
    def deviation(self) -> float:
        return DEVIATION

    def forward(self, z: Tensor) -> dist.Distribution:
        return LogisticLevels(*self.loc_and_scale(z), self.levels).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        self.start(x)

    def check_support(self, x: Tensor) -> None:
        check_levels(x, self.levels, "a discretised logistic")


class DiscretizedLogisticMixture(Likelihood):
    """A mass on grey levels: a mixture of discretised logistics for each element.

    Weights, locations and scales are the decoder's.

    Args:
        decoder: Maps z to (3, C, *event): logits of the weights, locations and scales, the latter two in standard
            deviations of the data. With channels="autoregressive" to (10, C, H, W): a logit, three locations, three
            scales, and three coefficients by their inverse hyperbolic tangents.
        levels: L: x is in {0, ..., L - 1}.
        components: Number of components C of each element's mixture.
        channels: Given z, each element by itself; or "autoregressive", of images of three channels: a component for
            each pixel, green's location by the level of red, and blue's by both.
    """

    measure = "levels"
    short = ("logistic-mixture", "discretized-logistic-mixture")
    unit: Tensor

    @checked
    def __init__(
        self,
        decoder: Network,
        levels: Levels,
        components: Count = 5,
        channels: Literal["independent", "autoregressive"] = "independent",
    ) -> None:
        coloured = channels == "autoregressive"
        outputs, event = (COLOUR_OUTPUTS, "H, W") if coloured else (3, "*event")
        shape = decoder.out_shape
        if shape[:2] != (outputs, components) or len(shape) < 3 or (coloured and len(shape) != 4):
            raise UsageError(
                f"decoder: {components} components expect an output of shape ({outputs}, {components}, {event}), got "
                f"{shape}"
            )
        super().__init__(decoder, (3, *shape[2:]) if coloured else shape[2:])
        self.levels, self.components, self.channels = levels, components, channels
        self.register_buffer("unit", torch.ones(()))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        components = settings.get("components", 5)
        if settings.get("channels") != "autoregressive":
            return (3, components, *event_shape)
        if len(event_shape) != 3 or event_shape[0] != 3:
            raise UsageError(
                f"likelihood.channels=autoregressive: is of images of 3 channels, (3, H, W), got rows of shape "
                f"{tuple(event_shape)}; use `likelihood.channels=independent`",
                settings=("likelihood.channels=autoregressive", "likelihood.channels=independent"),
            )
        return (COLOUR_OUTPUTS, components, *event_shape[1:])

    def forward(self, z: Tensor) -> dist.Distribution:
        dims = len(self.event_shape)
        if self.channels == "autoregressive":
            out = self.decoder(z).movedim(-3, -1)
            logits, loc, raw_scale, coefficients = out.split((1, 3, 3, 3), -4)
            scale = self.unit * (RELATIVE_FLOOR + softplus(raw_scale))
            return ColourMixture(logits.squeeze(-4), self.unit * loc, scale, coefficients.tanh(), self.levels)
        logits, loc, raw_scale = self.decoder(z).movedim(-1 - dims, -1).unbind(-2 - dims)
        scale = self.unit * (RELATIVE_FLOOR + softplus(raw_scale))
        return LogisticMixture(logits, LogisticLevels(self.unit * loc, scale, self.levels)).to_event(dims)

    def initialise(self, x: Tensor) -> None:
        """Start with equal weights, locations within a standard deviation of the mean of x, and half of it as scale."""
        wide = x.double()
        spread = wide.std(0, correction=0)
        overall = spread.square().mean().sqrt()
        self.unit.copy_(overall if overall > 0 else torch.ones(()))
        apart = torch.linspace(-1, 1, self.components + 2, dtype=torch.float64, device=x.device)[1:-1]
        loc = (wide.mean(0) + apart.reshape(-1, *[1] * spread.ndim) * spread) / self.unit.double()
        excess = (0.5 * spread / self.unit.double() / DEVIATION - RELATIVE_FLOOR).clamp(min=0.01).expand_as(loc)
        raw_scale = excess + torch.log(-torch.expm1(-excess))  # inverse softplus
        if self.channels == "autoregressive":
            parts = [torch.zeros_like(loc[:, :1]), loc, raw_scale, torch.zeros_like(loc)]
            set_output_bias(self.decoder, torch.cat(parts, 1).transpose(0, 1).to(x))
            return
        set_output_bias(self.decoder, torch.stack([torch.zeros_like(loc), loc, raw_scale]).to(x))

    def check_support(self, x: Tensor) -> None:
        check_levels(x, self.levels, "a mixture of discretised logistics")


class Categorical(Likelihood):
    """A mass on grey levels: a softmax over them for each element, with the decoder's output as logits.

    Nothing says that neighbouring levels are alike: it takes more data than a logistic, and has any shape.

    Args:
        decoder: Maps z to (L, *event).
        levels: L: x is in {0, ..., L - 1}.
    """

    measure = "levels"

    @checked
    def __init__(self, decoder: Network, levels: Levels) -> None:
        if decoder.out_shape[:1] != (levels,) or len(decoder.out_shape) < 2:
            raise UsageError(
                f"decoder: {levels} levels expect an output of shape ({levels}, *event), got {decoder.out_shape}"
            )
        super().__init__(decoder, decoder.out_shape[1:])
        self.levels = levels

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (settings["levels"], *event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        dims = len(self.event_shape)
        return CategoricalLevels(self.decoder(z).movedim(-1 - dims, -1)).to_event(dims)

    def initialise(self, x: Tensor) -> None:
        """Start at the share of each level in each element of x, drawn a little to its share in all elements."""
        counts = torch.zeros(self.levels, *x.shape[1:], dtype=torch.float64, device=x.device)
        counts.scatter_add_(0, x.long(), torch.ones((), dtype=torch.float64, device=x.device).expand_as(x))
        overall = counts.flatten(1).sum(1) + 1
        overall = (overall / overall.sum()).reshape(-1, *[1] * (x.ndim - 1))
        set_output_bias(self.decoder, (counts + overall).log().to(x))

    def check_support(self, x: Tensor) -> None:
        check_levels(x, self.levels, "a categorical")


def check_levels(x: Tensor, levels: int, name: str) -> None:
    """Refuse what is no level.

    Raises:
        DataError: some element is none of 0, ..., L - 1.
    """
    wrong = ~((x == x.round()) & (x >= 0) & (x < levels))  # NaN too
    if wrong.any():
        raise DataError(
            f"x: {name} likelihood has support {{0, ..., {levels - 1}}}, got values from {x.min():g} to {x.max():g} "
            f"with {int(wrong.sum())} elements that are no such levels; bring them there or use a Gaussian likelihood",
            settings=("likelihood=gaussian",),
        )
