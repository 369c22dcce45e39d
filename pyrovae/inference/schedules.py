"""Schedules: how the weight of the KL changes with the gradient step.

Each says its `settings`, the numbers that are recorded and that compiled steps take as inputs, and the `penalty` that
they make of a KL.

A constraint asks for the greatest E log p(x|z) whose KL is at most C nats. Its Lagrangian,

    E log p(x|z) - beta (KL - C),    beta >= 0,

is, for a beta that is held, the objective of a beta-VAE and a number. The multiplier that solves the problem is found
with the parameters: it rises while the KL of the batch is above C, and falls while that is below,

    beta <- max(least, beta exp(rate (KL - C) / C)),    (KL - C) / C clipped to [-1, 1],

the gradient of the dual problem in log beta, so that a beta of 0.01 and one of 100 are reached alike. Where it comes to
rest, KL = C, or beta is at its least and KL < C: the constraint is not active. A capacity draws the KL to C from both
sides, whatever that costs.

References:
    Higgins et al. 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl
    Burgess et al. 2018, Understanding disentangling in beta-VAE, https://arxiv.org/abs/1804.03599
    Fu et al. 2019, Cyclical Annealing Schedule, https://arxiv.org/abs/1903.10145
    Rezende and Viola 2018, Taming VAEs, https://arxiv.org/abs/1810.00597
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.settings import Positive, check_fields


class Schedule(ABC):
    """What is subtracted from E log p(x|z), as a function of KL(q(z|x) || p(z)) and of the gradient step."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"beta: {name} must be a number of at least 0, got {value!r}")
        check_fields(self)

    @abstractmethod
    def settings(self, step: int) -> dict[str, float]:
        """The numbers that change, after `step` gradient steps: what `penalty` takes, and the record shows."""

    @abstractmethod
    def penalty(self, kl: Tensor, **settings: Tensor | float) -> Tensor:
        """What is subtracted, shape (N,), given KL of shape (N,) and `settings`, as tensor operations."""


class Weight(Schedule):
    """beta KL, with a beta that depends on the step."""

    @abstractmethod
    def beta(self, step: int) -> float:
        """beta after `step` gradient steps."""

    @final
    def settings(self, step: int) -> dict[str, float]:
        return {"beta": self.beta(step)}

    @final
    def penalty(self, kl: Tensor, **settings: Tensor | float) -> Tensor:
        return settings["beta"] * kl


@dataclass(frozen=True)
class Constant(Weight):
    """The same beta at every step."""

    end: float = 1.0

    def beta(self, step: int) -> float:
        return self.end


@dataclass(frozen=True)
class LinearWarmup(Weight):
    """From 0 to `end` in `steps` gradient steps, then constant."""

    end: float = 1.0
    steps: int = 1000

    def beta(self, step: int) -> float:
        return self.end * min(1.0, step / max(1, self.steps))


@dataclass(frozen=True)
class Cyclical(Weight):
    """Every `period` steps from 0 linearly to `end` in the first `rise` of the period, then constant."""

    end: float = 1.0
    period: int = 1000
    rise: float = 0.5

    def beta(self, step: int) -> float:
        phase = (step % max(1, self.period)) / max(1, self.period)
        return self.end * min(1.0, phase / self.rise) if self.rise else self.end


@dataclass(frozen=True)
class Constraint(Weight):
    """A beta that is adapted, so that the mean KL of the training rows is at most `limit` nats.

    `adapted` takes the place of what `beta` says after the first step. No epoch is better than another by its bound
    alone, so the weights of the last one are kept.

    Args:
        limit: C, in nats per datum, above 0.
        rate: How fast log beta moves, per step, where the KL is 0 or at least 2 C.
        least: The least beta. What is near 0 stands for 0, from where a product would never come back; 1 asks for the
            greatest ELBO whose KL is at most C, which is the plain ELBO where that is so anyway.
    """

    limit: Positive
    rate: Positive = 0.05
    least: Positive = 1e-3

    def beta(self, step: int) -> float:
        return max(1.0, self.least)

    def tensor(self, device: torch.device, value: float | None = None) -> Tensor:
        """Where beta stands, as `adapted` takes it: what it had come to, or else its start."""
        return torch.tensor(self.beta(0) if value is None else value, dtype=torch.float64, device=device)

    def observed(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """The KL summed over the rows of a batch, and their number, from the terms of an ELBO, shape (2, K, N)."""
        kl = terms[1].detach().mean(0)
        return kl.sum(), torch.ones_like(kl).sum()

    def adapted(self, beta: Tensor, kl: Tensor, rows: Tensor) -> Tensor:
        """The next beta, from this one and what was observed: shape (), of beta's type."""
        excess = (kl.to(beta) / rows.to(beta) / self.limit - 1).clamp(-1, 1)
        return (beta * (self.rate * excess).exp()).clamp(min=self.least)


@dataclass(frozen=True)
class Capacity(Schedule):
    """Penalty gamma |KL - C|, the mean KL of the batch drawn to a capacity C that grows from 0 to `end` in `steps`.

    It holds the KL at C where gamma is above the multiplier that a `Constraint` of C would find; with less, the KL is
    that of a beta of gamma. Its gamma is recorded as beta, and C as capacity, in nats.
    """

    end: float = 25.0
    steps: int = 1000
    gamma: float = 10.0

    def capacity(self, step: int) -> float:
        """C in nats after `step` gradient steps."""
        return self.end * min(1.0, step / max(1, self.steps))

    def settings(self, step: int) -> dict[str, float]:
        return {"beta": self.gamma, "capacity": self.capacity(step)}

    def penalty(self, kl: Tensor, **settings: Tensor | float) -> Tensor:
        return (settings["beta"] * (kl.mean() - settings["capacity"]).abs()).expand_as(kl)
