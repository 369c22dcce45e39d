"""Optimisers: each trains as a loop of `.backward()` does, however parameters and gradients lie in memory."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, adam, fit
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import gradients as parts
from pyrovae.inference.training.step import Step
from pyrovae.seeding import derive_seed, reseed

X = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEED, EPOCHS, BATCH = 7, 3, 5


class Awkward(nn.Module):
    """A linear pair in whose decoder gradients come transposed, expanded, from rows, shared or through views."""

    def __init__(self) -> None:
        super().__init__()

        def weight(seed: int, *shape: int) -> Tensor:
            return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        self.einsum = nn.Parameter(weight(1, 6, 2))
        self.rows = nn.Parameter(weight(2, 6, 2))
        self.softmax = nn.Parameter(weight(3, 6, 2))
        self.reshape = nn.Parameter(weight(4, 6, 2))
        self.expanded = nn.Parameter(weight(5, 3, 4))
        self.transposed = nn.Parameter(weight(6, 2, 6).t())
        self.kernel = nn.Parameter(weight(7, 3, 2, 2, 2).to(memory_format=torch.channels_last))
        self.plus, self.minus = nn.Parameter(weight(8, 2, 6)), nn.Parameter(weight(9, 2, 6))
        self.flat = nn.Parameter(weight(10, 12))
        self.first = nn.Linear(6, 2).double()
        self.tied = nn.Linear(2, 6, bias=False).double()
        self.tied.weight = self.einsum

    def mean(self, z: Tensor) -> Tensor:
        image = torch.stack([z, z.roll(1, -1)], -1)[..., None, :].expand(*z.shape, 2, 2)
        features = nn.functional.conv2d(image.reshape(-1, 2, 2, 2), self.kernel).reshape(*z.shape[:-1], 3)
        return (
            torch.einsum("...i,oi->...o", z, self.einsum)
            + z[..., :1] * self.rows.T[0]
            + z[..., 1:] * self.rows.T[1]
            + z @ self.softmax.T.softmax(-1)
            + z @ self.reshape.T.reshape(2, 6)
            + self.expanded.sum()
            + z @ self.transposed.T
            + features.repeat_interleave(2, -1)
            + z @ (self.plus + self.minus + self.flat.view(2, 6))
            + self.tied(z)
        )

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.first(x), 0.4).to_event(1))


def awkward() -> Awkward:
    torch.manual_seed(0)
    return Awkward()


def by_hand(make: Callable[[list[Tensor]], Optimizer]) -> dict[str, Tensor]:
    """The parameters after a loop as people write it, on the rows and the noise of `fit`."""
    pair, objective = awkward(), ELBO()
    optimizer, step = make(list(pair.parameters())), 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(derive_seed(SEED, "order", epoch)))
        for rows in order.split(BATCH):
            reseed(derive_seed(SEED, "step", step, 0), torch.device("cpu"))
            optimizer.zero_grad()
            objective.differentiable_loss(pair.model, pair.guide, X[rows]).backward()
            optimizer.step()
            step += 1
    return named(pair)


def by_fit(make: Callable[[list[Tensor]], Optimizer], **options) -> dict[str, Tensor]:
    pair = awkward()
    fit(pair.model, pair.guide, X, ELBO(), epochs=EPOCHS, batch_size=BATCH, seed=SEED, optimizer=make, **options)
    return named(pair)


def named(pair: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pair.named_parameters()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def forms() -> list:
    """Every optimiser of torch that `fit` takes, in every form: (class, settings)."""
    found: list = [(torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True})]
    for name, kind in vars(torch.optim).items():
        if name in ("Optimizer", "LBFGS", "SparseAdam", "Muon") or not inspect.isclass(kind):
            continue  # Muon is for matrices alone, SparseAdam for sparse gradients
        known = inspect.signature(kind).parameters
        found += [(kind, {form: True}) for form in ("fused", "foreach") if form in known] + [(kind, {})]
    return found


@pytest.mark.parametrize(
    ("kind", "form"), forms(), ids=lambda v: getattr(v, "__name__", None) or "-".join(v) or "plain"
)
def test_every_optimiser_trains_as_a_loop_of_backward_does(kind: type[Optimizer], form: dict) -> None:
    known = inspect.signature(kind).parameters
    plain = form | {name: False for name in ("fused", "foreach") if name in known}

    rate = 1e-3 if kind.__name__ in ("SGD", "ASGD", "RAdam") else 0.02  # some start with steps as long as the gradient

    def make(settings: dict) -> Callable[[list[Tensor]], Optimizer]:
        return lambda parameters: kind(parameters, lr=rate, **settings)  # type: ignore[call-arg]

    wanted = by_hand(make(plain))
    assert all(not torch.equal(wanted[name], p) for name, p in named(awkward()).items())
    assert_same(by_fit(make(form)), wanted)


def fused(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.02, fused=True)


def unfused(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def test_the_default_optimiser_is_adam_through_the_compiler_too() -> None:
    wanted = by_hand(unfused)
    assert_same(by_fit(lambda parameters: adam(parameters, lr=0.02), compile="on"), wanted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"particle_chunk": 2}, {"together": lambda vector: vector.clone()}, {}])
def test_chunks_and_sums_over_processes_are_laid_out_as_well(
    options: dict, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    found = []
    for make in (fused, unfused):
        pair = awkward()
        whole = Pair(pair.model, pair.guide)
        step = Step(IWAE(5), whole, make(list(whole.trainable().values())), compiled=compiled, **options)
        for number in range(5):
            torch.manual_seed(number)
            step(Batch(X), 0)
        assert bool(step.codes) == compiled
        found.append(named(pair))
    assert_same(*found)


def test_a_parameter_with_gaps_in_memory_is_refused_by_what_would_write_into_them() -> None:
    def spread() -> Awkward:
        pair = awkward()
        pair.rows = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)[:, ::2])
        return pair

    pair = spread()
    with pytest.raises(UsageError, match=r"optimizer: .*rows has gaps in memory \(shape \(6, 2\), strides \(4, 2\)\)"):
        fit(pair.model, pair.guide, X, ELBO(), epochs=1, optimizer=fused, batch_size=BATCH)
    fit(pair.model, pair.guide, X, ELBO(), epochs=1, optimizer=unfused, batch_size=BATCH)


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _ in forms()), ids=lambda kind: kind.__name__)
def test_every_optimiser_is_resumed_as_if_never_stopped(kind: type[Optimizer], tmp_path: Path) -> None:
    """Its state lies in memory as the parameters do, which a file does not know."""
    rate = 1e-3 if kind.__name__ in ("SGD", "ASGD", "RAdam") else 0.02
    settings: dict = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    settings |= {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def make(parameters: list[Tensor]) -> Optimizer:
        return kind(parameters, lr=rate, **settings)  # type: ignore[call-arg]

    whole, stops = by_fit(make), iter(range(100))
    by_fit(make, directory=tmp_path, should_stop=lambda: next(stops) == 7)
    again = by_fit(make, directory=tmp_path, resume=True)
    assert all(torch.equal(again[name], p) for name, p in whole.items())
