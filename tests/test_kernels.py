"""Kernel density estimates: log p(x) is exact, and the width is the best one on the validation rows."""

import math
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KernelDensity as Oracle
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

import pyrovae
from pyrovae.errors import DataError, UsageError
from pyrovae.inference import fit
from pyrovae.models import BernoulliKernelDensity, KernelDensity
from pyrovae.models import kernels as module
from pyrovae.models.kernels import Kernels


def rows(count: int = 120, columns: int = 2, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, columns, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0]) + shift


def bits(count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.rand(count, 2, 4, generator=generator, dtype=torch.float64) < 0.3).double()


def fitted(x: Tensor, validation: Tensor | None = None, cls: type[Kernels] = KernelDensity) -> Kernels:
    model = cls(x.shape[1:], components=len(x)).double()  # type: ignore[call-arg]
    model.fit(x, validation=validation)
    return model


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_it_is_the_estimate_of_scikit_learn(shift: float) -> None:
    """Row by row, also far from the origin, and in blocks of rows."""
    x, validation = rows(shift=shift), rows(40, shift=shift)
    model = fitted(x, validation)
    oracle = Oracle(bandwidth=model.log_width.exp().item(), rtol=0, atol=0).fit(x.numpy())
    wanted = torch.from_numpy(oracle.score_samples(validation.numpy()))
    assert_close(model.log_prob(validation), wanted, rtol=1e-8, atol=1e-8 if shift == 0 else 1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows()
    model = fitted(x)
    whole = model.log_prob(x)
    monkeypatch.setattr(module, "CHUNK", 7 * len(x))
    assert_close(model.log_prob(x), whole, rtol=1e-14, atol=1e-14)


def test_a_kernel_on_one_row_is_its_gaussian() -> None:
    model = KernelDensity(2, components=1).double()
    with torch.no_grad():
        model.rows.copy_(torch.tensor([[1.0, -2.0]]))
        model.log_width.fill_(math.log(0.7))
    x = rows()
    assert_close(model.log_prob(x), Normal(model.rows[0], 0.7).log_prob(x).sum(1))


def test_kernels_on_bits_are_their_products_written_out() -> None:
    x, other = bits(), bits(10)
    model = fitted(x, bits(30), BernoulliKernelDensity)
    h = model.log_width.exp().item()
    each = torch.tensor(
        [
            [math.prod(h if a != b else 1 - h for a, b in zip(r, row, strict=True)) for r in x.flatten(1)]
            for row in other.flatten(1)
        ]
    )
    assert_close(model.log_prob(other), each.mean(1).log().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "x", "validation"), [(KernelDensity, rows(), rows(40)), (BernoulliKernelDensity, bits(), bits(40))]
)
def test_the_width_is_the_best_on_the_validation_rows(cls: type[Kernels], x: Tensor, validation: Tensor) -> None:
    """Log p(x) of the validation rows has no slope there, and is lower on both sides, however far."""
    model = fitted(x, validation, cls)
    best = model.log_prob(validation).mean().item()
    log_width = model.log_width.clone().requires_grad_()
    model.log_width = torch.nn.Parameter(log_width.detach())
    (slope,) = torch.autograd.grad(model.log_prob(validation).mean(), model.log_width)
    assert abs(slope.item()) < 1e-5
    for factor in (0.2, 0.5, 0.99, 1.01, 1.5, 1.9):
        with torch.no_grad():
            model.log_width.copy_(log_width + math.log(factor))
        assert model.log_prob(validation).mean().item() < best


def test_without_validation_rows_each_is_left_out_of_its_own() -> None:
    """The width of a loop over rows, scored by kernels on the others; with its own it would fall to the least."""
    x = rows(30)
    model = fitted(x)

    def left_out(log_width: float) -> float:
        values = []
        for i in range(len(x)):
            other = KernelDensity(2, components=len(x) - 1).double()
            with torch.no_grad():
                other.rows.copy_(torch.cat([x[:i], x[i + 1 :]]))
                other.log_width.fill_(log_width)
            values.append(other.log_prob(x[i : i + 1]).item())
        return sum(values) / len(values)

    found = model.log_width.item()
    assert left_out(found) > max(left_out(found - 0.05), left_out(found + 0.05))
    assert fitted(x, x).log_width.item() == pytest.approx(model.widths(x)[0], abs=0.1)


def test_kernels_stand_evenly_on_rows_and_few_validation_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows()
    model = KernelDensity(2, components=40).double()
    model.fit(x, validation=rows(50))
    assert_close(model.rows.detach()[[0, -1]], x[[0, -1]])
    assert (model.rows.unsqueeze(1) == x).all(-1).any(1).all()
    monkeypatch.setattr(module, "MOST_DISTANCES", 10 * 40)
    few = KernelDensity(2, components=40).double()
    few.fit(x, validation=rows(50))
    wanted = KernelDensity(2, components=40).double()
    wanted.fit(x, validation=rows(50)[torch.linspace(0, 49, 10, dtype=torch.float64).round().long()])
    assert few.log_width == wanted.log_width != model.log_width


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="expected at least 10 rows for 10 kernels, got 5; pass components=5"):
        KernelDensity(2, components=10).fit(rows(5))
    with pytest.raises(DataError, match="variance 0"):
        KernelDensity(2, components=10).fit(torch.ones(10, 2))
    with pytest.raises(DataError, match="expected values in"):
        BernoulliKernelDensity(2, components=10).fit(rows(10))
    model = fitted(rows())
    with pytest.raises(UsageError, match="fit: found no parameters to train"):
        fit(model.model, model.guide, rows(), progress=False)


def test_a_run_of_it_is_its_fit(tmp_path: Path) -> None:
    """No step is taken; the run holds the rows, and is resumed and loaded as any other."""
    options = {"data": "three-gaussians", "model": {"name": "kde", "components": 300}, "device": "cpu", "seed": 0}
    run = pyrovae.train(options, tmp_path / "run", plots=False)
    rows = run.rows()
    wanted = KernelDensity(2, components=300)
    wanted.fit(rows.train, validation=rows.validation)
    loaded = pyrovae.load(tmp_path / "run")
    assert torch.equal(loaded.rows, wanted.rows)
    assert loaded.log_width == wanted.log_width
    found = run.evaluation["log_marginal"]
    assert found == pytest.approx(wanted.double().log_prob(rows.test.double()).mean().item(), abs=1e-9)
    again = pyrovae.train({}, tmp_path / "run", resume=True, plots=False)
    assert again.evaluation["log_marginal"] == found
    assert list(run.history["epoch"]) == [1]
    with pytest.raises(UsageError, match="epochs, lr: not used, since a kde is fit in closed form"):
        pyrovae.Recipe(**options, epochs=3, lr=0.1)


def test_a_run_has_no_more_kernels_than_rows(tmp_path: Path) -> None:
    run = pyrovae.train({"model": "kde", "device": "cpu", "seed": 0}, tmp_path / "run", plots=False)
    assert run.recipe.model.settings["components"] == len(run.rows().train)
    assert run.evaluation["verdict"] == "exact"
