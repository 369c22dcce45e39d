r"""Judges: what looks at x and at what a pair makes of its codes, while it is trained, and at no other time.

A judge has features f(x), and says how near those of the mean m(z) of p(x|z) are, in place of its elements,

    log N(f(x) | f(m(z)), s^2 I),        one scale s for all features, learned: a density of f(x), and none of x.

The pair stays p(z) p(x|z) with its own density of x, by which it is scored; only what it is trained by is the judge's
(`pyrovae.inference.judged`). In a `Perception` f is a network that is frozen. In a `Discriminator` f is the last hidden
layer of a network D with one output, which tells data from what the decoder makes of codes, of q(z|x) and of p(z):

    adversary's loss       log(1 + exp(-D(x))) + mean of log(1 + exp(D(m(z))))        z ~ q(z|x) or p(z), half of each
    decoder's reward      -mean of log(1 + exp(-D(m(z))))                             the log-probability of being data

D at its best is log p_data - log p_made, the densities of the one and the other as D sees them: with noise that is
added to both, without which D would know data by the noise of dequantisation that means do not have.

Who gets which gradient is decided here, by what is held (its parameters) and what is detached (its inputs):

    features            encoder and decoder, the scale s; never D
    decoder's reward    decoder; never D, nor the encoder and the prior: codes are detached
    adversary's loss    D alone: what is decoded is detached

References:
    Larsen et al. 2016, Autoencoding beyond pixels using a learned similarity metric, https://arxiv.org/abs/1512.09300
    Higgins et al. 2017, DARLA, https://arxiv.org/abs/1707.08475
    Hou et al. 2017, Deep Feature Consistent Variational Autoencoder, https://arxiv.org/abs/1610.00291
    Sonderby et al. 2017, Amortised MAP Inference for Image Super-resolution (noise for both), https://arxiv.org/abs/1610.04490
"""

import hashlib
from abc import ABC, abstractmethod
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid, softplus

from pyrovae.errors import UsageError
from pyrovae.models.guides import centre
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.location_scale import RELATIVE_FLOOR
from pyrovae.models.networks import Network
from pyrovae.models.priors import Prior, inverse_softplus
from pyrovae.settings import NotNegative, checked


class FeatureScale(nn.Module):
    """N(f | m, s^2 I) with one learned scale s for all features: unit * (0.001 + softplus(parameter)).

    The scale is that of a Gaussian likelihood with scale="learned": features that are x itself have its density.
    """

    unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(()))
        self.raw_scale = nn.Parameter(torch.full((), inverse_softplus(1.0)))

    def forward(self, features: Tensor, means: Tensor) -> Tensor:
        """log N(f | m, s^2 I) in nats, shape (*batch), of f and m that expand to (*batch, F)."""
        scale = (self.unit * (RELATIVE_FLOOR + softplus(self.raw_scale))).expand_as(means)
        return dist.Normal(means, scale, validate_args=False).to_event(1).log_prob(features)

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        """Start the scale at half the standard deviation of the features of training data, shape (N, F)."""
        wide = features.double()
        overall = (wide - wide.mean(0)).square().mean().sqrt()
        self.unit.copy_(overall if overall > 0 else torch.ones(()))
        self.raw_scale.fill_(inverse_softplus(0.5 - RELATIVE_FLOOR))


class Judge(nn.Module, ABC):
    """What a pair in training mode calls inside the plate over the data, after x; an objective reads its sites."""

    @abstractmethod
    def forward(self, x: Tensor, p: dist.Distribution, z: Tensor, prior: Prior, likelihood: Likelihood) -> None:
        """Leave deterministic sites of shape (*batch, N), "feature_likelihood" among them.

        Args:
            x: Data, shape (N, *event).
            p: p(x|z), batch shape (*batch, N).
            z: The code, shape (*batch, N, Z).
            prior: p(z), for codes of the judge's own.
            likelihood: p(x|z) of these.
        """

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start what depends on the data at training data x of shape (N, *event)."""


class Perception(Judge):
    """Features of a frozen network, f(x): no gradient reaches it, and no step changes it.

    It is no part of checkpoints, which hold the SHA-256 of its tensors in its place; a pair that is loaded to be scored
    has none, and needs none.
    """

    fingerprint: Tensor
    network: Network | None

    def __init__(self) -> None:
        super().__init__()
        self.scale = FeatureScale()
        self.register_buffer("fingerprint", torch.zeros(32, dtype=torch.uint8))
        self.network = None

    def through(self, network: Network) -> Self:
        """This judge with f, frozen from here on: as it is in evaluation mode, with buffers in place of parameters."""
        self.network = frozen(network)
        self.fingerprint.copy_(fingerprint(network))
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the scale alone: f stays in evaluation mode."""
        super().train(mode)
        if self.network is not None:
            self.network.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """f of x (*batch, *event), shape (*batch, F)."""
        if self.network is None:
            raise UsageError("perception: has no network to look through; give it one by `through`")
        found: Tensor = self.network(x)
        return found

    def forward(self, x: Tensor, p: dist.Distribution, z: Tensor, prior: Prior, likelihood: Likelihood) -> None:
        pyro.deterministic("feature_likelihood", self.scale(self.features(x), self.features(p.mean)))

    def initialise(self, x: Tensor) -> None:
        self.scale.initialise(self.features(x))

    def check_resumed(self) -> None:
        """Refuse to go on with another network than the one that training began with.

        Raises:
            UsageError: the fingerprint that a checkpoint holds is another.
        """
        if self.network is not None and not torch.equal(self.fingerprint.cpu(), fingerprint(self.network)):
            raise UsageError(
                "perception: the frozen network is not the one that the run began with (its SHA-256 is another); "
                "restore its file, or start a new run"
            )


class Adversary(nn.Module):
    """D, and the features before its output: a network that minimises a loss of its own.

    Args:
        body: Maps an event to a vector of features.

    Attributes:
        minimises: The site of the loss that its parameters minimise, and nothing else of the pair.
    """

    minimises = "adversary_loss"

    def __init__(self, body: Network) -> None:
        super().__init__()
        if len(body.out_shape) != 1:
            raise UsageError(f"discriminator: expected a network to a vector, got an output of shape {body.out_shape}")
        self.body = body
        self.output = nn.Linear(*body.out_shape, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of x (*batch, *event), shape (*batch, F), and D(x), shape (*batch)."""
        features = self.body(x)
        return features, self.output(features).squeeze(-1)

    def held(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same with its parameters held: a gradient goes through to x, and reaches none of them."""
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        found: tuple[Tensor, Tensor] = functional_call(self, fixed, (x,))
        return found


class Discriminator(Judge):
    """A network that is trained beside the pair to tell its pictures from data.

    Args:
        body: Maps an event to a vector of features: of the architecture of an encoder.
        noise: Standard deviation of what is added to whatever it sees, in standard deviations of the data.
    """

    shift: Tensor
    rescale: Tensor

    @checked
    def __init__(self, body: Network, noise: NotNegative = 0.1) -> None:
        super().__init__()
        self.adversary = Adversary(body)
        self.scale = FeatureScale()
        self.noise = noise
        # It sees (x - shift) * rescale: the identity until `initialise`.
        self.register_buffer("shift", torch.zeros(body.in_shape))
        self.register_buffer("rescale", torch.ones(()))

    def seen(self, x: Tensor) -> Tensor:
        """What is seen of x (*batch, *event): centred, in standard deviations of the data, and with noise."""
        centred = (x - self.shift) * self.rescale
        return centred + self.noise * torch.randn_like(centred)

    def forward(self, x: Tensor, p: dist.Distribution, z: Tensor, prior: Prior, likelihood: Likelihood) -> None:
        with torch.no_grad():
            own = prior().sample(z.shape[:-1])
        made = likelihood(torch.stack([z.detach(), own])).mean  # of codes: a gradient stops there
        means = self.seen(torch.cat([p.mean.unsqueeze(0), made]))
        wanted, of_data = self.adversary(self.seen(x))
        features, logits = self.adversary.held(means)
        _, of_made = self.adversary(means[1:].detach())
        loss = softplus(-of_data) + softplus(of_made).mean(0)
        pyro.deterministic("feature_likelihood", self.scale(wanted.detach(), features[0]))
        pyro.deterministic("decoder_reward", logsigmoid(logits[1:]).mean(0))
        pyro.deterministic("adversary_loss", loss)

    def initialise(self, x: Tensor) -> None:
        centre(self.adversary.body, x, self.shift, self.rescale)
        with torch.no_grad():
            self.scale.initialise(self.adversary(self.seen(x))[0])


def frozen(network: Network) -> Network:
    """A network without parameters: they become buffers, and no part of checkpoints, and it stays as in evaluation."""
    network.eval()
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            if parameter is not None:
                module.register_buffer(name, parameter.detach(), persistent=False)
            else:
                module.register_parameter(name, None)
        module._non_persistent_buffers_set.update(module._buffers)
    return network


def fingerprint(network: nn.Module) -> Tensor:
    """The SHA-256 of a network's parameters and buffers with their names, as 32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(network.named_parameters()), **dict(network.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
