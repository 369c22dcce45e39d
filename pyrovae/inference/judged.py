r"""Objectives by a judge: the ELBO with a likelihood of features of x, or what an adversary is taken in by, in it.

A judge in the model (`pyrovae.models.Judge`) leaves at its sites log N(f(x) | f(m(z)), s^2 I) of features f, with the
mean m(z) of p(x|z), and an adversary's loss and the decoder's reward for taking it in. Per datum what is maximised is

    perceptual    E [weight log p(f(x)|z) + pixels log p(x|z)] - KL
    vae-gan       E [features log p(f(x)|z) + pixels log p(x|z) + weight reward] - KL

With pixels = 0 no density of x is in it, and it is no bound on log p(x): the first, with weight 1, is a lower bound on
log p(f(x)), a density of the features. So no such number is called a bound: what is reported is the ELBO of the pair,
p(z) p(x|z), and so are log p(x), the KL and the rest. The scale of a p(x|z) that nothing trains has to be in closed
form (scale="optimal", `pyrovae.inference.training.closed_form`): the best for the decoder as the judge made it.

With pixels = 1 and features = 0 the weight of `VAEGAN` is what adversarial training costs the bound: 0 is the ELBO.

References:
    Larsen et al. 2016, Autoencoding beyond pixels using a learned similarity metric, https://arxiv.org/abs/1512.09300
    Hou et al. 2017, Deep Feature Consistent Variational Autoencoder, https://arxiv.org/abs/1610.00291
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from pyrovae.errors import PairError
from pyrovae.inference.estimators import USUAL, GradientEstimator
from pyrovae.inference.weighted import Weighted, left_at
from pyrovae.inference.weights import Particles
from pyrovae.settings import NotNegative, Positive, Text


@dataclass(frozen=True)
class Perceptual(Weighted):
    """The ELBO with a likelihood of a frozen network's features in place of that of x (`pyrovae.models.Perception`).

    Args:
        num_particles: Number of draws averaged.
        weight: Of the log-likelihood of the features.
        pixels: Weight of log p(x|z).
        network: What the features are of: classifier, one of the rows' labels that is trained first; the run of an
            autoencoder, whose codes they are; or a file that torch.export.save wrote, of a module of rows.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "perceptual"
    title: ClassVar[str] = "perceptual"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others know nothing of the features
    maximised: ClassVar[str] = "no bound on log p(x): a likelihood of features of x is in it, which is no density of x"
    keeps_last: ClassVar[bool] = True
    train_name: ClassVar[str] = "train_objective"
    judge: ClassVar[str] = "Perception"

    num_particles: int = 1
    weight: NotNegative = 1.0
    pixels: NotNegative = 0.0
    network: Annotated[str, Text()] = "classifier"
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """The log-likelihood of the features, shape (1, K', N)."""
        return judged(particles, "Perceptual", "Perception()", "feature_likelihood")

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        value = settings["weight"] * penalised[0] - kl
        return value + self.pixels * log_likelihood if self.pixels else value

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class VAEGAN(Weighted):
    """The ELBO with a likelihood of an adversary's features, and a decoder that is to take it in: VAE-GAN.

    Args:
        num_particles: Number of draws averaged.
        weight: Of the decoder's reward, the log-probability in nats of what it makes being taken for data.
        features: Weight of the log-likelihood of the adversary's features.
        pixels: Weight of log p(x|z).
        rate: Learning rate of the adversary, as a multiple of the pair's.
        num_averages: M; the same as more particles.
        gradient: How its gradient is estimated.
    """

    word: ClassVar[str] = "vae-gan"
    title: ClassVar[str] = "VAE-GAN"
    usual_particles: ClassVar[int] = 1
    gradients: ClassVar[tuple[str, ...]] = ("reparameterised",)  # others know nothing of the adversary
    maximised: ClassVar[str] = "no bound on log p(x): what an adversary makes of x is in it"
    keeps_last: ClassVar[bool] = True
    train_name: ClassVar[str] = "train_objective"
    judge: ClassVar[str] = "Discriminator"
    others: ClassVar[tuple[str, ...]] = ("adversary_loss",)

    num_particles: int = 1
    weight: NotNegative = 1.0
    features: NotNegative = 1.0
    pixels: NotNegative = 0.0
    rate: Positive = 1.0
    num_averages: int = 1
    gradient: GradientEstimator = USUAL

    def penalised(self, particles: Particles, kls: Mapping[str, Tensor]) -> Tensor:
        """The log-likelihood of the features, the decoder's reward and the adversary's loss, shape (3, K', N)."""
        names = ("feature_likelihood", "decoder_reward", "adversary_loss")
        return judged(particles, "VAEGAN", "Discriminator(body)", *names)

    def maximise(self, log_likelihood: Tensor, kl: Tensor, penalised: Tensor, **settings: Tensor | float) -> Tensor:
        features, reward, loss = penalised
        value = settings["weight"] * reward - kl - (loss - loss.detach())
        value = value + self.features * features if self.features else value
        return value + self.pixels * log_likelihood if self.pixels else value

    def settings(self, step: int) -> dict[str, float]:
        return {"weight": self.weight}


def judged(particles: Particles, objective: str, judge: str, *names: str) -> Tensor:
    """What a judge left at those sites, shape (len(names), K', N).

    Raises:
        PairError: the model has no such judge, or is in evaluation mode.
    """
    found = left_at(particles.model_trace, *names)
    if found is None:
        raise PairError(
            f"objective: {objective} needs a judge in the model that is in training mode; build the pair with "
            f"VAE(..., judge={judge})"
        )
    return torch.stack([value.expand(particles.log_likelihood.shape) for value in found])


# Those that have a name on the command line.
JUDGED = (Perceptual, VAEGAN)
