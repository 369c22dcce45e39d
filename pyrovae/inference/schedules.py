"""Schedules: how the weight of the KL changes with the gradient step.

Each says its `settings`, the numbers that are recorded and that compiled steps take as inputs, and the `penalty` that
they make of a KL.

References:
    Burgess et al. 2018, Understanding disentangling in beta-VAE, https://arxiv.org/abs/1804.03599
    Fu et al. 2019, Cyclical Annealing Schedule, https://arxiv.org/abs/1903.10145
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

from pyrovae.errors import UsageError


class Schedule(ABC):
    """What is subtracted from E log p(x|z), as a function of KL(q(z|x) || p(z)) and of the gradient step."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"beta: {name} must be a number of at least 0, got {value!r}")

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
class Capacity(Schedule):
    """Penalty gamma |KL - C|, the mean KL of the batch drawn to a capacity C that grows from 0 to `end` in `steps`.

    Its gamma is recorded as beta, and C as capacity, in nats.
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
