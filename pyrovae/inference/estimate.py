"""Estimates: a value for each datum with its Monte Carlo error, in nats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, shape (N,); NaN for a single one."""
    return (values.double().std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Estimate:
    """A quantity of each datum in nats, estimated from draws.

    Attributes:
        values: Shape (N,), in double precision on the CPU.
        errors: Their Monte Carlo standard errors, shape (N,).
    """

    values: Tensor
    errors: Tensor

    @property
    def mean(self) -> float:
        """Mean over the rows."""
        return self.values.mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of `mean` for these rows: sqrt(sum of squared errors) / N."""
        return self.errors.square().sum().sqrt().item() / len(self.values)

    @property
    def error_over_rows(self) -> float:
        """Standard error of `mean` as an estimate for all data of the kind: sd / sqrt(N)."""
        return standard_error(self.values)


def of_draws(values: Tensor) -> Estimate:
    """The mean of independent draws (K, N), for each datum."""
    values = values.double().cpu()
    return Estimate(values.mean(0), values.std(0) / math.sqrt(len(values)))


def joined(parts: Sequence[Estimate]) -> Estimate:
    """Estimates of several blocks of rows as one."""
    return Estimate(torch.cat([part.values for part in parts]), torch.cat([part.errors for part in parts]))
