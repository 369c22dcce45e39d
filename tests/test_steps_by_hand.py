"""The benchmark of each part's step: it has a row of every part, and times the same thing by hand."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# What is written by hand otherwise than here: sliced couplings, no dimension for a particle, parameters not expanded.
SAMPLE = (
    "SplineFlow", "FullCovarianceNormal", "MixtureOfNormals", "SemiAmortised", "NeuralSplinePrior", "ladder",
    "auxiliary", "ConditionalVampPrior", "NegativeBinomial", "Columns", "DiscretizedLogisticMixture",
    "CategoricalPrior", "leave-one-out", "doubly-reparameterised", "covariance", "beta-tc", "factor",
)  # fmt: skip


@pytest.fixture(scope="module")
def steps() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("steps", BENCHMARKS / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    yield module
    for name in ("steps", "pairs_by_hand", "parts_by_hand"):
        del sys.modules[name]


def small(row: object) -> dict[str, object]:
    """Options with which a row's pair is small."""
    options = getattr(row, "options", {})
    return {} if "network" in options else {"network": {"name": "mlp", "hidden": [8]}}


def test_every_part_has_a_row(steps: ModuleType) -> None:
    """But for the plain pair's own, and what has no step."""
    rows = steps.rows()
    assert len({(row.part, row.name) for row in rows}) == len(rows)
    found = {f"{row.part} {row.name}" for row in rows} | {also for row in rows for also in row.also}
    plain = {f"{part} {next(iter(choices))}" for part, choices in steps.CHOICES.items()}
    every = {
        f"{part} {name}" for part, choices in steps.CHOICES.items() for name in choices if name not in steps.NO_STEP
    }
    assert every - found == plain


@pytest.mark.parametrize("name", SAMPLE)
def test_by_hand_has_the_loss_and_the_gradient_of_the_pair(steps: ModuleType, name: str) -> None:
    (row,) = (row for row in steps.rows() if row.name == name)
    assert steps.written_by_hand(row)
    assert steps.disagreement(row, small(row)) == ""


def test_a_loss_or_a_gradient_that_differs_is_found_out(steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one number in a million; and a gradient, where the loss is the same."""
    right = steps.by_hand

    def wrong(model: torch.nn.Module, objective: object, factor: float, more: float) -> object:
        bias = model.likelihood.decoder.output_bias
        loss = right(model, objective)

        def changed(x: Tensor) -> Tensor:
            return factor * loss(x) + more * (bias - bias.detach()).sum()

        return changed

    for factor, more, said in ((1 + 1e-5, 0.0, "the loss is"), (1.0, 1e-2, "the gradient of likelihood")):
        monkeypatch.setattr(steps, "by_hand", lambda m, o, f=factor, a=more: wrong(m, o, f, a))
        assert said in steps.disagreement(steps.PLAIN, small(steps.PLAIN))


def test_the_interval_of_a_ratio_is_that_of_order_statistics(steps: ModuleType) -> None:
    """Of 20 rounds the 6th and the 15th: fewer than 6 of 20 are below the median with a chance of 2.1 %."""
    over = [float(i) for i in range(1, 21)]
    assert steps.ratio(over[::-1], [1.0] * 20) == (10.5, 6.0, 15.0)
    assert sum(math.comb(20, k) for k in range(6)) / 2**20 <= 0.025 < sum(math.comb(20, k) for k in range(7)) / 2**20
    assert steps.ratio([3.0, 1.0], [1.0, 1.0]) == (2.0, 1.0, 3.0)
