r"""Ordered classes: cumulative logits, of which a number moves all at once.

Of L classes in an order only which is above which is known, as of grades and of answers from "never" to "always". With
thresholds t_1 < ... < t_{L-1} of each element, learned, the decoder's output eta moves the mass up or down:

    P(x <= l) = s(t_{l+1} - eta)      P(x = l) = s(t_{l+1} - eta) - s(t_l - eta),   s the logistic function

as if a logistic number of location eta were seen by the interval that it falls into. The logarithm of a difference is
log s(b) + log s(-a) + log(1 - exp(a - b)), each term of which is exact in single precision (`pyrovae.models.levels`).

References:
    McCullagh 1980, Regression Models for Ordinal Data, JRSS B 42
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot, pad, softplus

from pyrovae.errors import DataError
from pyrovae.models.likelihood import Likelihood, set_output_bias
from pyrovae.models.networks import Network

LEAST_GAP = 1e-3  # between thresholds, so that no class has a mass of 0


class Ordinal(Likelihood):
    """A mass on {0, ..., L - 1}^D, ordered: cumulative logits, with the decoder's output of D numbers as location.

    There is no mean, which is NaN: how far classes are apart is not known.

    Args:
        decoder: Maps z to (D,).
        levels: L.
    """

    measure = "categories"

    def __init__(self, decoder: Network, levels: int) -> None:
        super().__init__(decoder, decoder.out_shape)
        self.levels = levels
        self.first = nn.Parameter(torch.zeros(self.event_shape))
        self.raw_gaps = nn.Parameter(torch.zeros(*self.event_shape, levels - 2))

    @classmethod
    def decoder_shape(cls, event_shape: tuple[int, ...], **settings: Any) -> tuple[int, ...]:
        return event_shape

    def forward(self, z: Tensor) -> dist.Distribution:
        gaps = LEAST_GAP + softplus(self.raw_gaps)
        thresholds = torch.cat([self.first.unsqueeze(-1), gaps], -1).cumsum(-1)
        away = thresholds - self.decoder(z).unsqueeze(-1)
        width = pad(torch.log(-torch.expm1(-gaps)), (1, 1))
        log_p = pad(logsigmoid(away), (0, 1)) + pad(logsigmoid(-away), (1, 0)) + width
        return dist.Categorical(logits=log_p, validate_args=False).to_event(len(self.event_shape))

    def initialise(self, x: Tensor) -> None:
        """Start at the frequencies of the classes, one more counted of each, with outputs around 0."""
        counts = one_hot(x.long(), self.levels).double().sum(0) + 1
        below = (counts.cumsum(-1) / counts.sum(-1, keepdim=True))[..., :-1]
        thresholds = below.logit()
        excess = (thresholds.diff(dim=-1) - LEAST_GAP).clamp(min=1e-3)
        with torch.no_grad():
            self.first.copy_(thresholds[..., 0])
            self.raw_gaps.copy_(excess + torch.log(-torch.expm1(-excess)))  # inverse softplus
        set_output_bias(self.decoder, torch.zeros(self.event_shape).to(x))

    def check_support(self, x: Tensor) -> None:
        wrong = ~((x >= 0) & (x < self.levels) & (x == x.round()))
        if wrong.any():
            raise DataError(
                f"x: classes from 0 to {self.levels - 1}, got {int(wrong.sum())} other values, such as {x[wrong][0]:g}"
            )
