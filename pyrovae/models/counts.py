r"""Likelihoods of counts, masses on {0, 1, 2, ...}^D: Poisson, negative binomial, and zero-inflated negative binomial.

Each has independent elements with a mean mu_d(z). A Poisson's variance is its mean; counts of most things vary more:

    Poisson             log p(x) = x log mu - mu - log x!                                                Var x = mu
    negative binomial   a Poisson whose mean is drawn from a Gamma of shape theta            Var x = mu + mu^2 / theta
        log p(x) = log G(x + theta) - log G(theta) - log x! + theta log theta + x log mu - (x + theta) log (mu + theta)
    zero-inflated       0 with probability pi, whatever mu: p(x) = pi [x = 0] + (1 - pi) NB(x)

with G the Gamma function and theta the inverse dispersion: infinite, it is the Poisson again.

Rows are often large or small as a whole, for reasons that say nothing of their composition: how deeply a cell was
sequenced, how long a text is. With library="given" the mean is a share of a total l that is known of each row,

    mu_d = l rho_d(z),   rho = softmax of the decoder's output

so that the latents have the composition to explain alone. The total is an input as a label is, the last element of
what the pair is given, by its logarithm: `ConditionalVAE` hands (z, log l) to the likelihood, and every log p is one of
p(x | l). Where l is the sum of the row itself, that is easier to predict than x without it, so that the two never
stand in one table.

References:
    Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics (scVI),
        https://doi.org/10.1038/s41592-018-0229-2
"""

from abc import ABC
from typing import Any, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyrovae.errors import DataError, UsageError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.networks import Network
from pyrovae.models.views import LogCounts, View
from pyrovae.settings import checked

Library = Literal["none", "given"]
Dispersion = Literal["per-column", "predicted"]
LEAST_MEAN = 1e-2  # that a column starts at, whose training rows may all be zero
THETA = (1e-2, 1e4)  # inverse dispersions to start from: beyond, a negative binomial is a Poisson to four digits


class OfCounts(Likelihood, ABC):
    """A mass on counts, of which encoders see the logarithms."""

    @final
    def check_support(self, x: Tensor) -> None:
        check_counts(x)

    @final
    def view(self, event_shape: tuple[int, ...]) -> View:
        return LogCounts(event_shape)


class Poisson(OfCounts):
    """A mass on counts: independent Poisson elements, with the decoder's output as logarithm of the mean.

    Args:
        decoder: Maps z to the event of x.
        library: "none", the mean is the exponential of the decoder's output; "given", it is the softmax of that output
            times a total that each row is given, whose logarithm is the last element of the input.
    """

    measure = "counts"

    @checked
    def __init__(self, decoder: Network, library: Library = "none") -> None:
        super().__init__(decoder, decoder.out_shape)
        self.library = library

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return event_shape

    def forward(self, z: Tensor) -> dist.Distribution:
        log_mean = log_mean_of(self.decoder(z), z, self.library, self.event_shape)
        return dist.Poisson(log_mean.exp(), validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start at the mean of each column, at least 0.01."""
        set_output_bias(self.decoder, x.mean(0).clamp(min=LEAST_MEAN).log())


class NegativeBinomial(OfCounts):
    """A mass on counts that vary more than a Poisson's: independent negative binomial elements.

    Their variance is mu + mu^2 / theta, with the decoder's output as log mu.

    Args:
        decoder: Maps z to the event of x; with dispersion="predicted", to (2, *event): log mean and log theta.
        dispersion: Of theta, the inverse dispersion: "per-column", one for each column and all rows; or "predicted", by
            the decoder.
        library: "none", the mean is the exponential of the decoder's output; "given", it is the softmax of that output
            times a total that each row is given, whose logarithm is the last element of the input.
    """

    measure = "counts"
    short = ("negative-binomial",)

    @checked
    def __init__(self, decoder: Network, dispersion: Dispersion = "per-column", library: Library = "none") -> None:
        super().__init__(decoder, event_of(decoder, 2 if dispersion == "predicted" else 1))
        self.dispersion, self.library = dispersion, library
        if dispersion == "per-column":
            self.log_theta = nn.Parameter(torch.zeros(self.event_shape))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (2, *event_shape) if settings.get("dispersion") == "predicted" else event_shape

    def forward(self, z: Tensor) -> dist.Distribution:
        out = self.decoder(z)
        log_theta = None
        if self.dispersion == "predicted":
            out, log_theta = out.unbind(-1 - len(self.event_shape))
        log_mean = log_mean_of(out, z, self.library, self.event_shape)
        log_theta = self.log_theta if log_theta is None else log_theta
        return DispersedCounts(log_mean, log_theta).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start at the mean of each column, and at theta by its variance, at least 0.01 and at most 10,000."""
        log_mean, log_theta = moments(x)
        if self.dispersion == "predicted":
            set_output_bias(self.decoder, torch.stack([log_mean, log_theta]))
            return
        set_output_bias(self.decoder, log_mean)
        with torch.no_grad():
            self.log_theta.copy_(log_theta)


class ZeroInflatedNegativeBinomial(OfCounts):
    """A mass on counts with more zeros than their mean explains: a negative binomial, or 0 with a probability pi.

    Args:
        decoder: Maps z to (2, *event): log mean and the logit of pi; with dispersion="predicted", to (3, *event), with
            log theta between them.
        dispersion: Of theta, the inverse dispersion: "per-column", one for each column and all rows; or "predicted", by
            the decoder.
        library: "none", the mean is the exponential of the decoder's output; "given", it is the softmax of that output
            times a total that each row is given, whose logarithm is the last element of the input.
    """

    measure = "counts"
    short = ("zinb", "zero-inflated-negative-binomial")

    @checked
    def __init__(self, decoder: Network, dispersion: Dispersion = "per-column", library: Library = "none") -> None:
        super().__init__(decoder, event_of(decoder, 3 if dispersion == "predicted" else 2))
        self.dispersion, self.library = dispersion, library
        if dispersion == "per-column":
            self.log_theta = nn.Parameter(torch.zeros(self.event_shape))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return (3 if settings.get("dispersion") == "predicted" else 2, *event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        out, *rest, gate = self.decoder(z).unbind(-1 - len(self.event_shape))
        log_mean = log_mean_of(out, z, self.library, self.event_shape)
        counts = DispersedCounts(log_mean, rest[0] if rest else self.log_theta)
        return dist.ZeroInflatedDistribution(counts, gate_logits=gate, validate_args=False).to_event(
            len(self.event_shape)
        )

    def initialise(self, x: Tensor) -> None:
        """Start at the mean and variance of each column, and at pi = 1/20."""
        log_mean, log_theta = moments(x)
        gate = torch.full_like(log_mean, -3.0)
        if self.dispersion == "predicted":
            set_output_bias(self.decoder, torch.stack([log_mean, log_theta, gate]))
            return
        set_output_bias(self.decoder, torch.stack([log_mean, gate]))
        with torch.no_grad():
            self.log_theta.copy_(log_theta)


class DispersedCounts(dist.TorchDistribution):
    """Negative binomial counts, by their means and inverse dispersions, of which one may be for many counts.

    torch's has as many of both, and would compute log G(theta) anew for each count of a column.

    Args:
        log_mean: log mu; the batch shape is its.
        log_theta: log theta, of a shape that is expanded to it.
    """

    arg_constraints = {"log_mean": constraints.real, "log_theta": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, log_theta: Tensor) -> None:
        self.log_mean, self.log_theta = log_mean, log_theta
        super().__init__(log_mean.shape, validate_args=False)

    @property
    def each(self) -> dist.TorchDistribution:
        """The same by torch's class."""
        log_theta = self.log_theta.expand_as(self.log_mean)
        return dist.NegativeBinomial(log_theta.exp(), logits=self.log_mean - log_theta, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DispersedCounts":
        return DispersedCounts(self.log_mean.expand(batch_shape), self.log_theta)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats of counts, of the shape that value and the batch broadcast to."""
        theta, logits = self.log_theta.exp(), self.log_mean - self.log_theta
        ways = torch.lgamma(theta + value) - torch.lgamma(1 + value) - torch.lgamma(theta)
        # Where theta has become 0, so have all counts.
        ways = ways.masked_fill(theta + value == 0, 0.0)
        return theta * logsigmoid(-logits) + value * logsigmoid(logits) + ways

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.each.sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self.each.mean

    @property
    def variance(self) -> Tensor:
        return self.each.variance


def log_mean_of(out: Tensor, z: Tensor, library: Library, event_shape: tuple[int, ...]) -> Tensor:
    """log mu, shape (*batch, *event), of the decoder's output for it and the input of the likelihood (*batch, Z)."""
    if library == "none":
        return out
    dims = tuple(range(-len(event_shape), 0))
    log_total = z[..., -1].reshape(*z.shape[:-1], *(1 for _ in event_shape))
    return log_total + out - out.logsumexp(dims, keepdim=True)


def event_of(decoder: Network, numbers: int) -> tuple[int, ...]:
    """The event shape of x, for a decoder that puts out so many numbers of each element.

    Raises:
        UsageError: it has another shape.
    """
    if numbers == 1:
        return decoder.out_shape
    if decoder.out_shape[0] != numbers or len(decoder.out_shape) < 2:
        raise UsageError(
            f"decoder: expected an output of shape ({numbers}, *event), got {decoder.out_shape}; build it with the "
            "shape that `decoder_shape` says"
        )
    return decoder.out_shape[1:]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """log mu and log theta of each column of x (N, *event), by its mean and variance: theta = mu^2 / (Var - mu)."""
    mean = x.mean(0).clamp(min=LEAST_MEAN)
    excess = x.var(0, correction=0) - mean
    theta = torch.where(excess > 0, mean.square() / excess.clamp(min=1e-12), THETA[1]).clamp(*THETA)
    return mean.log(), theta.log()


def check_counts(x: Tensor) -> None:
    """Refuse what is no count.

    Raises:
        DataError: a value is negative, no whole number, or not finite.
    """
    wrong = ~((x >= 0) & (x == x.round()) & x.isfinite())
    if wrong.any():
        raise DataError(
            f"x: a likelihood of counts has support {{0, 1, 2, ...}}, got values from {x.min().item():g} to "
            f"{x.max().item():g} with {int(wrong.sum())} elements that are no such number; use a Gaussian likelihood "
            "for continuous values",
            settings=("likelihood=gaussian",),
        )
