r"""Guides of sequences, step by step: q(z|x) = prod_t q(z_t | z_{t-1}, x_t, ..., x_T).

The posterior of a Markov latent has these factors: given z_{t-1}, what came before says nothing more of z_t. What is
still to come is summed up by a recurrent network that runs backwards, h_t = GRU(h_{t+1}, features of x_t). It meets the
model's own step N(m_t, s_t^2), of z_{t-1}, in one of three ways:

    precision   q proportional to N(m_t, s_t^2) N(z_t; n_t, 1/l_t), with n_t and l_t >= 0 linear in h_t: precisions add.
                p(x_t, ..., x_T | z_t) of a linear-Gaussian model is such a factor, diagonal where z_t has one element
    learned     q = N(n, d^2) of (tanh(W z_{t-1} + b) + h_t) / 2, the combiner of Krishnan et al.
    none        q = N(n, d^2) of h_t alone, a mean-field guide

**Unequal lengths.** Where NaN stands for what is missing, a sequence ends with the last step of which something is
seen. After that the guide is the model's own step, which is what the posterior is there: log p(z_t|z_{t-1}) and log q
are the same number, and cancel. So padding adds nothing to log p(x), the KL or a gradient, and draws go on as
forecasts. The network starts at the last step seen, with h = 0, and what stands in the padding is never looked at. A
gap within a sequence is a step that is not seen, but has a future.

Draws take T steps. A draw comes with its log-density; that of any other z needs no loop, since all of z is there.

References:
    Krishnan, Shalit and Sontag 2017, Structured Inference Networks for Nonlinear State Space Models,
    https://arxiv.org/abs/1609.09869
    Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder, https://arxiv.org/abs/1406.1078
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.errors import UsageError
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior
from pyrovae.models.sequences import Sequential
from pyrovae.settings import Count, checked

# Mean and log standard deviation of steps from `start` on, (*batch, S, Z), given the steps before them.
Given = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class StepByStep(dist.TorchDistribution):
    """z_1, ..., z_T as one vector, each a Gaussian given the one before: event shape (T Z,).

    Args:
        given: Of values (*batch, S, Z) and t, mean and log standard deviation of the S steps from t on, counted from 0,
            for those as the steps before them; before the first one stands 0.
        steps: T.
        loc: Anything of the type, the batch shape and the event shape of z.
        batch_shape: To which the batch is expanded; None: that of `loc`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, given: Given, steps: int, loc: Tensor, batch_shape: torch.Size | None = None) -> None:
        self.given, self.steps, self.loc = given, steps, loc
        # The last draw, its version in memory, whether its density has a gradient, and its density.
        self._drawn: tuple[Tensor, int, bool, Tensor] | None = None
        super().__init__(loc.shape[:-1] if batch_shape is None else batch_shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "StepByStep":
        return StepByStep(self.given, self.steps, self.loc, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device).unflatten(-1, (self.steps, -1))
        z, log_scales = [torch.zeros_like(noise[..., :1, :])], []
        for t in range(self.steps):
            mean, log_scale = self.given(z[-1], t)
            z.append(mean + log_scale.exp() * noise[..., t : t + 1, :])
            log_scales.append(log_scale)
        value = torch.cat(z[1:], -2).flatten(-2)
        log_q = self.log_density(noise, torch.cat(log_scales, -2))
        self._drawn = (value, value._version, torch.is_grad_enabled(), log_q)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z) of z (*batch, T Z), in nats; of the last draw as a function of its noise, not of z."""
        if self._drawn is not None:
            z, version, differentiable, log_q = self._drawn
            if value is z and value._version == version and differentiable >= torch.is_grad_enabled():
                return log_q
        z = value.unflatten(-1, (self.steps, -1))
        before = torch.cat([torch.zeros_like(z[..., :1, :]), z[..., :-1, :]], -2)
        mean, log_scale = self.given(before, 0)
        log_q = self.log_density((z - mean) * (-log_scale).exp(), log_scale)
        return log_q.expand(torch.broadcast_shapes(log_q.shape, self.batch_shape))

    def log_density(self, noise: Tensor, log_scale: Tensor) -> Tensor:
        """sum_t sum_d log N(e; 0, 1) - log s, shape `batch`."""
        return -(0.5 * (noise.square() + math.log(2 * math.pi)) + log_scale).sum((-2, -1))

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError("the mean of steps, each given the one before, has no closed form; average draws")


class MarkovGuide(Guide):
    """A sequence step by step: each step given the one before, and what is still to come of x, by a recurrent network.

    Args:
        encoder: Maps a sequence to features, of each step F, those of one number side by side, as `StepEncoder` does.
        latent_dim: T Z.
        prior: p(z), of steps: its parameters belong to the pair.
        hidden: Width of the recurrent network.
        merge: How what is to come meets the prior's step: precision, times a Gaussian; learned, by a network of
            both; or none, which leaves z_{t-1} out, a mean-field guide.

    Raises:
        UsageError: the prior is not of steps, or the features cannot be shared out among them.
    """

    short = ("deep-markov",)
    later: Tensor

    @checked
    def __init__(
        self,
        encoder: Network,
        latent_dim: Count,
        prior: Prior,
        hidden: Count = 64,
        merge: Literal["precision", "learned", "none"] = "precision",
    ) -> None:
        if not isinstance(prior, Sequential):
            raise UsageError(
                f"guide: MarkovGuide goes by the steps of a prior over sequences, and {type(prior).__name__} is none; "
                "use Markov, GatedMarkov or OrnsteinUhlenbeck"
            )
        super().__init__(encoder, latent_dim, 2 * prior.width, hidden)
        features, left = divmod(encoder.out_shape[0], prior.steps)
        if left:
            raise UsageError(
                f"encoder: expected a multiple of the {prior.steps} steps of the prior as number of features, got "
                f"{encoder.out_shape[0]}"
            )
        self.merge = merge
        # In a tuple, so that torch does not register it: each parameter has one name in the pair.
        self._prior = (prior,)
        self.inputs, self.recurrent = nn.Linear(features, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        if merge == "learned":
            self.above = nn.Linear(prior.width, hidden)
        self.register_buffer("later", torch.ones(prior.steps, 1), persistent=False)
        self.later[0] = 0  # of the first step, which the prior has as N(0, I)

    @property
    def prior(self) -> Sequential:
        """p(z)."""
        return self._prior[0]

    def forward(self, x: Tensor) -> dist.Distribution:
        reached = self.reached(x).unsqueeze(-1)
        to_come = self.to_come(x, reached)
        message = to_come if self.merge == "learned" else self.head(to_come)
        loc = message.new_zeros(()).expand(*message.shape[:-2], self.latent_dim)
        return StepByStep(partial(self.given, message, reached), self.prior.steps, loc)

    def reached(self, x: Tensor) -> Tensor:
        """Which steps of x (*batch, *event) are not after the last one of which something is seen: (*batch, T).

        All, where z has another number of steps than x.
        """
        there = x == x
        if len(self.event_shape) > 1:
            there = there.flatten(1 - len(self.event_shape)).any(-1)
        if self.event_shape[0] != self.prior.steps:
            return there[..., :1].new_ones(()).expand(*there.shape[:-1], self.prior.steps)
        return there.to(x.dtype).flip(-1).cumsum(-1).flip(-1) > 0

    def to_come(self, x: Tensor, reached: Tensor) -> Tensor:
        """h_t, of x_t, ..., x_T, shape (*batch, T, H); 0 after the last step seen."""
        features = self.features_of(x).unflatten(-1, (-1, self.prior.steps)).mT
        inputs = self.inputs(features)
        h = torch.zeros_like(inputs[..., 0, : self.head.in_features])
        found = []
        for t in reversed(range(self.prior.steps)):
            now, then = inputs[..., t, :].chunk(3, -1), self.recurrent(h).chunk(3, -1)
            reset, keep = (now[0] + then[0]).sigmoid(), (now[1] + then[1]).sigmoid()
            new = (now[2] + reset * then[2]).tanh()
            h = torch.where(reached[..., t, :], new.lerp(h, keep), h)
            found.append(h)
        return torch.stack(found[::-1], -2)

    def given(self, message: Tensor, reached: Tensor, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the steps from `start` on, given those before them (*batch, S, Z)."""
        at = slice(start, start + before.shape[-2])
        mean, log_scale = (part.expand_as(before) * self.later[at] for part in self.prior.step(before))
        there, own = reached[..., at, :], message[..., at, :]
        if self.merge == "learned":
            own = self.head((self.above(before).tanh() + own) / 2)
        loc, raw = own.chunk(2, -1)
        if self.merge == "precision":
            added = softplus(raw) * there
            ratio = (2 * log_scale).exp() * added  # of the precision added to the prior's
            return mean + ratio / (1 + ratio) * (loc - mean), log_scale - 0.5 * ratio.log1p()
        scale = softplus(raw) + SCALE_FLOOR
        return torch.where(there, loc, mean), torch.where(there, scale.log(), log_scale)
