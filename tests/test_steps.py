"""The training step: compiled code gives the pair's own loss and gradient, or is not used and says why; chunks of
particles give the gradient of all; numbers that are not finite update nothing.
"""

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.errors import DataError, NumericalError, UsageError
from pyrovae.inference import (
    ELBO,
    IWAE,
    Capacity,
    Constraint,
    LinearWarmup,
    Renyi,
    StickingTheLanding,
    adam,
    fit,
    measure,
)
from pyrovae.inference import precision as rounding
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import ImportanceWeighted, OfParticles, as_objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import flushing
from pyrovae.inference.tracing.bfloat16 import HalfProducts
from pyrovae.inference.tracing.checked import compare_gradients
from pyrovae.inference.tracing.compiler import lifted
from pyrovae.inference.tracing.recording import Refused, trace
from pyrovae.inference.tracing.rules import is_view, log_of_products, of_particles, rewrite
from pyrovae.inference.training import gradients as parts
from pyrovae.inference.training import step as steps
from pyrovae.inference.training.counts import worth_compiling
from pyrovae.inference.training.gradients import Gradient
from pyrovae.inference.training.step import NotFinite, Step
from pyrovae.inference.weights import NEGLIGIBLE, Particles, log_mean_exp
from pyrovae.models import (
    MLP,
    VAE,
    AuxiliaryVAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    FullCovarianceNormal,
    Gaussian,
    GaussianMixture,
    HierarchicalVAE,
    LadderVAE,
    LowRankNormal,
    MeanFieldNormal,
    MixtureOfGaussians,
    ResidualConvDecoder,
    ResidualConvEncoder,
    ResidualMLP,
    StandardNormal,
    VampPrior,
)
from pyrovae.runs.build import build_model
from pyrovae.runs.recipe import Recipe
from pyrovae.seeding import same_noise

EXACT = {"rtol": 1e-9, "atol": 1e-9}
D = 6


def vae(dropout: float = 0.0, guide: type = MeanFieldNormal, prior: str = "standard") -> VAE:
    """A small pair in double precision, always the same one."""
    torch.manual_seed(0)
    q = guide(MLP(D, hidden=[5], dropout=dropout), 2)
    priors = {"standard": lambda: StandardNormal(2), "mixture": lambda: MixtureOfGaussians(2, 3)}
    p = VampPrior(q, (D,), 3) if prior == "vamp" else priors[prior]()
    return VAE(p, Bernoulli(MLP(2, D, hidden=[5], dropout=dropout)), q).double()


def hierarchical() -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(
        StandardNormal(2),
        [MeanFieldNormal(MLP(2, hidden=(4,)), 3)],
        Gaussian(MLP(3, D, hidden=(4,)), scale="learned"),
        [MeanFieldNormal(MLP(D, hidden=(4,)), 3), MeanFieldNormal(MLP(3, hidden=(4,)), 2)],
    ).double()


def ladder(merge: str = "learned") -> LadderVAE:
    """Three layers, with skip connections."""
    torch.manual_seed(0)
    sizes, small = [3, 2, 1], {"width": 4, "blocks": 1}
    above = [sum(sizes[i + 1 :]) for i in range(3)]
    found = [4 + a * (merge == "learned") for a in above]
    return LadderVAE(
        StandardNormal(1),
        [MeanFieldNormal(ResidualMLP(a, **small), z) for a, z in zip(above[:2], sizes[:2], strict=True)],
        Bernoulli(MLP(6, D, hidden=(4,))),
        [MLP(D, hidden=(4,)), ResidualMLP(4, **small), MLP(4, hidden=(4,))],
        [MeanFieldNormal(MLP(f, hidden=(4,)), z) for f, z in zip(found, sizes, strict=True)],
        merge=merge,
    ).double()


def state(grids: bool = False) -> LadderVAE:
    """Three layers that hand down a state, a vector or a grid, with the guide in units of the model."""
    torch.manual_seed(0)
    network = {"name": "residual-conv", "channels": "3,4"} if grids else {"name": "residual", "width": 4}
    model = {"name": "ladder", "above": "state", "merge": "relative"}
    given = {"model": model, "latent_dim": "2,1,1", "likelihood": "bernoulli", "network": {**network, "blocks": 1}}
    return build_model(Recipe(**given), (1, 4, 4)).double()


def auxiliary() -> AuxiliaryVAE:
    torch.manual_seed(0)
    guides = [MeanFieldNormal(MLP(n, hidden=(4,)), z) for n, z in ((4, 2), (6, 3), (7, 2))]
    return AuxiliaryVAE(StandardNormal(3), Bernoulli(MLP(3, D, hidden=(4,))), MLP(D, hidden=(4,)), *guides).double()


def convolutional() -> VAE:
    torch.manual_seed(0)
    guide = MeanFieldNormal(ConvEncoder((1, 4, 4), (3,), 6), 2)
    return VAE(StandardNormal(2), Bernoulli(ConvDecoder(2, (1, 4, 4), (3,), 6)), guide).double()


def residual() -> VAE:
    """Residual convolutions."""
    torch.manual_seed(0)
    guide = MeanFieldNormal(ResidualConvEncoder((1, 4, 4), (3,), 1, 6), 2)
    return VAE(StandardNormal(2), Bernoulli(ResidualConvDecoder(2, (1, 4, 4), (3,), 1, 6)), guide).double()


def bits(n: int, *shape: int) -> Tensor:
    return (torch.rand(n, *(shape or (D,)), generator=torch.Generator().manual_seed(3)) < 0.4).double()


def step_of(pair: nn.Module, objective, **options) -> Step:
    whole = Pair(pair.model, pair.guide)
    return Step(as_objective(objective), whole, adam(list(whole.trainable().values()), lr=0.02), **options)


def gradients(step: Step, x: Tensor, seed: int = 5, number: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients that reach anything, on noise of a seed, after a number of steps."""
    batch = Batch(x)
    if step.is_compiled(batch):
        step.checked_gradient(batch, number)
    torch.manual_seed(seed)
    loss, found, _ = step.gradient(batch, number)
    return loss, [g for g in found if g is not None]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and rewritten, and run as they are: everything but the compiler, which takes seconds."""
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))


# ----------------------------------------------------------------------------------------------- compiled equals eager


OBJECTIVES: dict[str, Callable] = {
    "elbo": lambda: ELBO(2),
    "sampled": lambda: ELBO(kl="sampled"),
    "warmup": lambda: ELBO(beta=LinearWarmup(steps=9)),
    "capacity": lambda: ELBO(2, beta=Capacity(3.0, steps=9)),
    "constraint": lambda: ELBO(2, beta=Constraint(3.0)),
    "iwae": lambda: IWAE(5, 2),
    "renyi": lambda: Renyi(0.5, 4),
    "sticking": lambda: IWAE(3, 2, gradient=StickingTheLanding()),
    "Trace_ELBO": lambda: Trace_ELBO(2, max_plate_nesting=1, vectorize_particles=True),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(max_plate_nesting=1),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_graph_has_the_loss_and_gradient_of_every_objective(name: str) -> None:
    pair, x = vae(dropout=0.0 if name == "sticking" else 0.3), bits(7)  # a guide that is held must have none
    eager, graph = (step_of(pair, OBJECTIVES[name](), compiled=on) for on in (False, True))
    for number in (0, 4):
        for got, wanted in zip(gradients(graph, x, 5, number), gradients(eager, x, 5, number), strict=True):
            assert_close(got, wanted, **EXACT)
    assert graph.refused is None
    assert graph.codes


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: vae(guide=FullCovarianceNormal), bits(7)),
        (lambda: vae(guide=LowRankNormal), bits(7)),
        (lambda: vae(prior="mixture"), bits(7)),
        (lambda: vae(prior="vamp"), bits(7)),
        (hierarchical, bits(7) + 0.1),
        (ladder, bits(7)),
        (lambda: ladder("precision"), bits(7)),
        (state, bits(7, 1, 4, 4)),
        (lambda: state(grids=True), bits(7, 1, 4, 4)),
        (auxiliary, bits(7)),
        (convolutional, bits(7, 1, 4, 4)),
        (residual, bits(7, 1, 4, 4)),
    ],
    ids=[
        "full covariance",
        "low rank",
        "mixture prior",
        "vamp prior",
        "hierarchical",
        "ladder",
        "precision",
        "state",
        "state on grids",
        "auxiliary",
        "convolutional",
        "residual convolutions",
    ],
)
def test_a_graph_has_the_loss_and_gradient_of_every_kind_of_pair(make: Callable, x: Tensor) -> None:
    pair = make()
    eager, graph = (step_of(pair, IWAE(4), compiled=on) for on in (False, True))
    for got, wanted in zip(gradients(graph, x), gradients(eager, x), strict=True):
        assert_close(got, wanted, **EXACT)
    assert graph.refused is None


@pytest.mark.usefixtures("uncompiled")
def test_an_enumerated_mixture_is_trained_eagerly() -> None:
    """Pyro's TraceEnum_ELBO looks at probabilities that are 0; the notice says who decides, the numbers are eager."""
    torch.manual_seed(0)
    pair, x = GaussianMixture((3,), 4).double(), torch.randn(9, 3, dtype=torch.float64)
    heard: list[str] = []
    eager, graph = (
        step_of(pair, TraceEnum_ELBO(max_plate_nesting=1), compiled=on, on_notice=heard.append) for on in (False, True)
    )
    for got, wanted in zip(gradients(graph, x), gradients(eager, x), strict=True):
        assert torch.equal(got, wanted) if isinstance(got, Tensor) else all(map(torch.equal, got, wanted))
    assert heard == ["not compiled, so slower: values of tensors decide what is computed in Pyro's compute_expectation"]


class Stored:
    """Plain functions whose parameters, one of them constrained, live in Pyro's parameter store."""

    def model(self, x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.full((3,), 0.5).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, scale).to_event(1))


@pytest.mark.usefixtures("uncompiled")
def test_parameters_of_the_store_are_inputs_of_the_graph() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)

    def train(mode: str) -> tuple[Tensor, Tensor]:
        pyro.clear_param_store()
        result = fit(Stored().model, Stored().guide, x, IWAE(3), epochs=4, batch_size=4, compile=mode, seed=1)
        assert result.compiled == (mode == "on")
        return pyro.param("loc").detach().clone(), pyro.param("scale").detach().clone()

    for got, wanted in zip(train("on"), train("off"), strict=True):
        assert_close(got, wanted, **EXACT)


@pytest.mark.usefixtures("uncompiled")
def test_moments_of_batch_normalisation_move_once_a_step() -> None:
    def moments(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        pair = vae()
        pair.guides[0].encoder.body = nn.Sequential(nn.BatchNorm1d(D).double(), pair.guides[0].encoder.body)
        step = step_of(pair, IWAE(3), compiled=compiled)
        for seed in range(3):
            torch.manual_seed(seed)
            step(Batch(bits(7)), 0)
        return [buffer.clone() for buffer in pair.buffers()]

    got, wanted = moments(True), moments(False)
    assert wanted[-1].item() == 3
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, **EXACT)


X = bits(23)


def trained(pair: nn.Module, objective, **options) -> tuple[list[float], list[Tensor]]:
    history = fit(
        pair.model, pair.guide, X, objective, **{"epochs": 3, "batch_size": 5, "seed": 7, "optimizer": fast} | options
    ).history
    return [epoch["train_bound"] for epoch in history], [p.detach().clone() for p in pair.parameters()]


def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return adam(parameters, lr=0.02)


def test_training_compiled_is_training_eager_with_dropout_a_schedule_and_a_ragged_last_batch() -> None:
    """Through the compiler itself. 23 rows in batches of 5: what changes is drawn or handed in at every step."""
    runs = [trained(vae(0.3), ELBO(beta=LinearWarmup(steps=12)), compile=mode) for mode in ("on", "off")]
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-9)
    for got, wanted in zip(runs[0][1], runs[1][1], strict=True):
        assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    still = trained(vae(0.3), ELBO(beta=LinearWarmup(steps=10**9)), compile="off")
    assert abs(still[0][2] - runs[1][0][2]) > 0.01  # the schedule matters in this test


def test_single_precision_is_equal_to_rounding_through_the_compiler() -> None:
    pair, x = vae().float(), bits(20).float()
    eager, code = (step_of(pair, IWAE(5), compiled=on) for on in (False, True))
    (loss, found), (wanted, own) = gradients(code, x), gradients(eager, x)
    assert code.refused is None
    assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    for a, b in zip(found, own, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("stop", [3, 7])
def test_compiled_and_resumed_equals_never_stopped(tmp_path, stop: int) -> None:
    seen = iter(range(1, 100))
    never = trained(vae(0.3), IWAE(4), compile="on")
    trained(vae(0.3), IWAE(4), compile="on", directory=tmp_path, should_stop=lambda: next(seen) == stop)
    # The decision to compile is the run's own.
    again = trained(vae(0.3), IWAE(4), compile="auto", directory=tmp_path, resume=True)
    assert again[0] == never[0]
    assert all(torch.equal(a, b) for a, b in zip(again[1], never[1], strict=True))


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.usefixtures("uncompiled")
def test_rows_streamed_from_a_file_train_as_rows_in_memory(tmp_path, mode: str) -> None:
    levels = torch.randint(0, 256, (60, D), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    np.save(tmp_path / "levels.npy", levels.numpy())
    runs = []
    for stream in ("on", "off"):
        rows = load_data(tmp_path / "levels.npy", stream=stream).rows("mass")
        assert isinstance(rows.train, Tensor) == (stream == "off")
        pair = vae().float()
        fit(pair.model, pair.guide, rows.train, IWAE(3), epochs=2, batch_size=7, transform=rows.transform,
            validation=rows.validation, compile=mode, seed=2)  # fmt: skip
        runs.append([p.detach().clone() for p in pair.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ------------------------------------------------------------------------------------------------- what is not compiled


class Looking(nn.Module):
    """A pair that looks at what it should not: `look` sees x and z on the way."""

    def __init__(self, look: Callable[["Looking", Tensor, Tensor], Tensor | float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.look = nn.Linear(D, 2), nn.Linear(2, D), look
        self.temperature = 1.0
        self.double()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            shift = self.look(self, x, z)
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def branch(pair: Looking, x: Tensor, z: Tensor) -> float:
    return 1.0 if z.isfinite().all() else -1.0


@pytest.mark.usefixtures("uncompiled", "unexamined")
@pytest.mark.parametrize(
    ("look", "why"),
    [
        (branch, r"decide what is computed in branch, line \d+ of test_steps.py; use torch.where"),
        (lambda pair, x, z: random.random(), "differs by"),
        (lambda pair, x, z: torch.from_numpy(z.detach().numpy()).mean(-1, keepdim=True), "numpy"),
    ],
    ids=["branch", "python's random", "numpy"],
)
def test_what_a_graph_would_freeze_is_trained_eagerly_with_one_notice(look: Callable, why: str) -> None:
    heard: list[str] = []
    random.seed(1)
    refused = trained(Looking(look), IWAE(3), compile="on", on_notice=heard.append)
    assert len(heard) == 1
    assert heard[0].startswith("not compiled, so slower: ")
    assert re.search(why, heard[0])
    if look is branch:  # the very numbers of the eager path
        eager = trained(Looking(look), IWAE(3), compile="off")
        assert refused[0] == eager[0]
        assert all(torch.equal(a, b) for a, b in zip(refused[1], eager[1], strict=True))


@pytest.mark.usefixtures("uncompiled")
def test_an_attribute_changed_between_epochs_is_seen() -> None:
    """It is no input of the graph: the next epoch finds out, and goes on eagerly."""

    def train(mode: str) -> tuple[list[float], list[str]]:
        pair, heard = Looking(lambda pair, x, z: z[..., :1] * pair.temperature), []

        def cool(metrics: dict[str, float]) -> None:
            pair.temperature = 1 / (1 + metrics["epoch"])

        return trained(pair, IWAE(3), compile=mode, on_epoch=cool, on_notice=heard.append)[0], heard

    (got, heard), (wanted, _) = train("on"), train("off")
    assert got == pytest.approx(wanted, rel=1e-9)
    assert heard[-1] == "not compiled, so slower: looking.temperature has changed since"
    assert len(heard) == 3  # two shapes were compiled


OUTSIDE = {"shift": 0.0}


@pytest.mark.usefixtures("uncompiled")
def test_what_no_attribute_shows_is_found_in_a_later_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "RECHECK", 3)
    step, x = step_of(Looking(lambda pair, x, z: OUTSIDE["shift"]), IWAE(3), compiled=True), bits(7)
    step(Batch(x), 0)
    monkeypatch.setitem(OUTSIDE, "shift", 1.0)
    step.recheck()
    refused = []
    for _ in range(4):
        step(Batch(x), 0)
        refused.append(step.refused is not None)
    assert refused == [False, False, True, True]
    assert "differs by" in step.refused
    assert "or the compiler is wrong about one" in step.refused


@pytest.mark.usefixtures("uncompiled")
def test_a_pair_that_is_given_up_goes_on_with_the_noise_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise Refused("said the test")

    monkeypatch.setattr(steps, "compare_gradients", never)
    runs = [trained(vae(0.3), IWAE(3), compile=mode, on_notice=lambda text: None) for mode in ("on", "off")]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def counted(pair: Looking, x: Tensor, z: Tensor) -> float:
    pair.calls = getattr(pair, "calls", 0) + 1
    return 1e-7 * pair.calls  # far below what a loss could tell


@pytest.mark.usefixtures("uncompiled")
def test_a_pair_that_counts_is_named() -> None:
    step = step_of(Looking(counted), IWAE(3), compiled=True)
    step(Batch(bits(7)), 0)
    assert step.refused == "running the pair changes looking.calls, which a graph would not"


@pytest.mark.usefixtures("uncompiled")
def test_a_tensor_held_by_the_pair_is_seen_when_it_is_changed_in_place() -> None:
    pair = Looking(lambda pair, x, z: pair.shift)
    pair.shift = torch.tensor([0.5], dtype=torch.float64)
    eager, graph = (step_of(pair, IWAE(3), compiled=on) for on in (False, True))
    gradients(graph, bits(7))
    pair.shift.add_(1.0)
    torch.manual_seed(3)
    got = graph.gradient(Batch(bits(7)), 0)[0]
    torch.manual_seed(3)
    assert_close(got, eager.gradient(Batch(bits(7)), 0)[0], **EXACT)
    graph.recheck()
    assert graph.refused == "looking.shift in place has changed since"


def test_tensors_that_a_graph_holds_become_its_inputs() -> None:
    """Compiled code takes small ones for constants."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.shift[0]) * self.shift[1]

    module, x = Shifted(), torch.tensor([5.0, 6.0])
    graph = trace(module, x)
    held = lifted(graph)
    assert not graph.graph.find_nodes(op="get_attr")
    assert_close(graph(*held, x), module(x))
    module.shift[0].add_(1.0)
    assert_close(graph(*held, x), module(x))


@pytest.mark.usefixtures("uncompiled")
def test_a_run_that_was_given_up_is_resumed_without_trying_again(tmp_path) -> None:
    heard: list[str] = []
    options = {"directory": tmp_path, "compile": "on", "on_notice": heard.append}
    trained(Looking(branch), IWAE(3), **options, epochs=1)
    assert len(heard) == 1
    trained(Looking(branch), IWAE(3), **options, resume=True)
    assert len(heard) == 1


@pytest.mark.usefixtures("uncompiled")
def test_parameters_that_are_frozen_between_epochs_stay_as_they_are() -> None:
    pair, kept = vae(), []

    def freeze(metrics: dict[str, float]) -> None:
        for p in pair.guides[0].parameters():
            p.requires_grad = False
        kept.append([p.detach().clone() for p in pair.guides[0].parameters()])

    for mode in ("on", "off"):
        kept.clear()
        trained(pair, IWAE(3), compile=mode, on_epoch=freeze, on_notice=lambda text: None)
        assert all(torch.equal(a, b) for a, b in zip(kept[0], pair.guides[0].parameters(), strict=True))
        pair = vae()


def test_an_objective_may_not_override_what_training_does_not_ask_for() -> None:
    with pytest.raises(UsageError, match="Doubled: overrides bound"):

        class Doubled(IWAE):
            def bound(self, *args: Tensor) -> Tensor:
                return 2 * super().bound(*args)


def test_a_bound_of_ones_own_is_one_number_for_each_datum() -> None:
    """A mean over data would be taken for their sum, and terms without their dimension be chunked along the data."""

    @dataclass(frozen=True)
    class OfAll(ImportanceWeighted):
        num_particles: int = 1
        num_averages: int = 1

        def reduce(self, log_weights: Tensor) -> Tensor:
            return log_weights.mean()

    @dataclass(frozen=True)
    class Flat(OfParticles):
        num_particles: int = 3
        num_averages: int = 1

        def terms(self, particles: Particles) -> Tensor:
            return particles.log_weights

        def combine(self, terms: Tensor, **settings: Tensor | float) -> Tensor:
            return terms.mean(0)

        def settings(self, step: int) -> dict[str, float]:
            return {}

    for objective, wrong in (
        (OfAll(), r"the bound of OfAll has shape \(\) for \d+ data, expected \(\d+,\)"),
        (Flat(), r"the terms of Flat have shape \(3, \d+\), expected \(T, 3, \d+\)"),
    ):
        pair = vae()
        with pytest.raises(UsageError, match=wrong):
            objective.bound(pair.model, pair.guide, X[:7])
        with pytest.raises(UsageError, match=wrong):
            trained(pair, objective, compile="off")


def test_what_differs_by_rounding_and_what_does_not() -> None:
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])

    def compared(got: list[Tensor], wanted: list[Tensor], numbers: int = 1000) -> bool:
        try:
            compare_gradients(got, wanted, "fp32", numbers)
        except Refused:
            return False
        return True

    assert compared([one * 1.00001, one], [one, one])
    assert not compared([one * 1.01, one], [one, one])
    assert not compared([one, one * 1.1], [one, one])
    assert not compared([one * math.nan, one], [one, one])
    assert not compared([one, one * math.nan], [one, one])
    assert compared([one, one], [one * math.nan, one])  # the pair's own fault
    assert compared([zero + 1e-4, one], [zero, one])  # what is left of a sum of a thousand numbers
    assert not compared([zero + 1e-2, one], [zero, one])
    assert not compared([one, one], [one])


@pytest.mark.usefixtures("uncompiled")
def test_data_outside_the_support_is_refused_before_compiled_steps() -> None:
    """Compiled code validates nothing; the row is beyond those that the pair is tried on."""
    pair, grey = vae(), X.clone()
    grey[17, 2] = 0.5
    with pytest.raises(DataError, match=r"support \{0, 1\}"):
        fit(pair.model, pair.guide, grey, IWAE(2), epochs=1, batch_size=5, compile="on")


def test_auto_compiles_where_the_steps_repay_it() -> None:
    """By counts alone: 3 epochs of digits are not compiled, the 20 epochs of MNIST are."""
    pair = VAE(StandardNormal(50), Bernoulli(MLP(50, 784)), MeanFieldNormal(MLP(784), 50))

    def decision(rows: int, batch_size: int, epochs: int, mode: str = "auto") -> list[int]:
        data = torch.zeros(1, 784).expand(rows, 784)
        trainer = steps_of_trainer(pair, data, IWAE(5), epochs, batch_size)
        return worth_compiling(mode, rows, trainer.settings, 1, trainer.trial.flops, torch.device("cpu"))

    assert decision(1439, 100, 3) == []
    assert decision(1439, 100, 3, "on") == [100, 39]
    assert decision(55_000, 100, 20) == [100]
    assert decision(55_000, 100, 20, "off") == []
    assert decision(55_020, 100, 40_000) == [100, 20]  # the ragged batch as well, once there are enough of it


def steps_of_trainer(pair: nn.Module, data: Tensor, objective, epochs: int, batch_size: int):
    from pyrovae.inference.training.trainer import Callbacks, Data, Notices, Processes, Settings, Trainer, unchanged

    alone = Processes(SimpleNamespace(process_index=0, num_processes=1), torch.device("cpu"))
    whole, rows = Pair(pair.model, pair.guide), Data(data, (), unchanged, None)
    settings = Settings(epochs, batch_size, 0, "fp32", None)
    trainer = Trainer(whole, rows, objective, settings, alone, None, Notices(None), Callbacks())
    trainer.discover()
    return trainer


def test_x_is_not_expanded_to_all_particles() -> None:
    """Whatever has the size of all particles' pixels is made of the particles, or a view."""
    pair, x, k = VAE(StandardNormal(2), Bernoulli(MLP(2, 200)), MeanFieldNormal(MLP(200), 2)), torch.zeros(3, 200), 7
    graph = trace(Gradient(IWAE(k), Pair(pair.model, pair.guide)), x)
    whole = [n for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].numel() == 4200]
    before = [node for node in whole if node not in of_particles(graph.graph) and not is_view(node)]
    rewrite(graph, log_of_products)
    assert len(whole) > 3
    assert not before
    assert not graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.binary_cross_entropy_with_logits.default
    )


# ------------------------------------------------------------------------------------------------- chunks of particles


@pytest.mark.parametrize(
    "make",
    [lambda: IWAE(7), lambda: Renyi(-0.5, 3, 2), lambda: ELBO(5, beta=0.3), lambda: ELBO(7, beta=Capacity(3.0))],
    ids=["iwae", "renyi", "elbo", "capacity"],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_chunks_give_the_loss_and_gradient_of_all_particles(make: Callable, compiled: bool) -> None:
    """Against autograd through the terms of all chunks at once, on their noise; K is not a multiple of the chunk."""
    pair, x, objective = vae(), bits(7), make()
    step = step_of(pair, objective, particle_chunk=3, compiled=compiled)
    assert len(step.sizes) > 1
    loss, found = gradients(step, x)
    assert step.refused is None

    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    terms = []
    for i, k in enumerate(step.sizes):
        torch.manual_seed(seed + i)
        terms.append(objective.draw(Pair(pair.model, pair.guide), Batch(x), k))
    wanted = -objective.combine(torch.cat(terms, 1), **objective.settings(0)).sum()
    own = torch.autograd.grad(wanted, list(pair.parameters()))
    assert_close(loss, wanted.detach(), **EXACT)
    for a, b in zip(found, own, strict=True):
        assert_close(a, b, **EXACT)


def test_particles_are_split_evenly() -> None:
    assert IWAE(5000).chunks(50) == [50] * 100
    assert IWAE(7).chunks(3) == [3, 2, 2]
    assert IWAE(10).chunks(6) == [5, 5]
    assert IWAE(4, 2).chunks() == [8]
    assert IWAE(3).chunks(10) == [3]


MEMORY = """
import resource, sys, torch
from pyrovae.inference import IWAE, fit
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal
k, chunk = int(sys.argv[1]), int(sys.argv[2]) or None
vae = VAE(StandardNormal(20), Bernoulli(MLP(20, 784)), MeanFieldNormal(MLP(784), 20))
x = (torch.rand(40, 784) < 0.3).float()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(vae.model, vae.guide, x, IWAE(k), epochs=1, batch_size=20, particle_chunk=chunk, validation=x, compile="off")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_many_particles_train_in_the_memory_of_a_chunk() -> None:
    def peak(k: int, chunk: int) -> float:
        words = [sys.executable, "-c", MEMORY, str(k), str(chunk)]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) / 1024

    few, many = peak(50, 0), peak(2000, 50)
    assert many < 1.3 * few + 50  # MiB; without chunks 2000 particles take more than 1000


def test_the_validation_bound_of_chunks_is_that_of_all_particles() -> None:
    """Every log-weight of a pair with its exact posterior is log p(x): no chunk may weigh more than another."""
    pair, x = vae(), bits(9)
    torch.manual_seed(1)
    whole = measure(pair.model, pair.guide, [x] * 300, IWAE(7))["bound"]
    chunked = measure(pair.model, pair.guide, [x] * 300, IWAE(7), particle_chunk=3)["bound"]
    single = measure(pair.model, pair.guide, [x] * 300, IWAE(3))["bound"]
    assert abs(whole - chunked) < 0.3 * (whole - single)


# --------------------------------------------------------------------------------------------------- what is not finite


def test_on_a_device_that_is_not_read_nothing_is_updated_from_the_first_bad_step_on() -> None:
    """As on a GPU, through the optimiser's own leaving out: `settle` tells how many steps were good."""
    pair = hierarchical()
    step, x = step_of(pair, IWAE(3)), bits(7)
    step.deferred, step.optimizer.grad_scale, step.optimizer.found_inf = True, None, step.failed
    step(Batch(x), 0)
    step(Batch(x), 0)
    before = [p.detach().clone() for p in pair.parameters()]
    moments = [value.clone() for state in step.optimizer.state.values() for value in state.values()]
    step(Batch(x + 1e200), 0)
    step(Batch(x), 0)
    after = [value for state in step.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    with pytest.raises(NotFinite) as error:
        step.settle()
    assert error.value.taken == 2
    step(Batch(x), 0)
    assert not torch.equal(before[0], next(pair.parameters()))
    assert math.isfinite(step.settle())


def test_the_sum_of_losses_is_settled() -> None:
    pair, x = vae(), bits(7)
    step = step_of(pair, IWAE(3))
    torch.manual_seed(1)
    wanted = step(Batch(x), 0)
    again = step_of(vae(), IWAE(3))
    again.deferred, again.optimizer.grad_scale, again.optimizer.found_inf = True, None, again.failed
    torch.manual_seed(1)
    assert again(Batch(x), 0) is None
    assert again.settle() == pytest.approx(wanted, rel=1e-12)
    assert again.settle() == 0.0


@pytest.mark.usefixtures("uncompiled")
def test_nan_in_a_compiled_step_names_the_row_and_takes_no_step() -> None:
    pair = hierarchical()
    data = X.clone() + 0.1

    def transform(rows: Tensor) -> Tensor:
        return torch.where(rows == data[11, 3], torch.tensor(1e200, dtype=rows.dtype), rows) if poisoned else rows

    poisoned = False
    before: list[Tensor] = []

    def poison(metrics: dict[str, float]) -> None:
        nonlocal poisoned
        poisoned = True
        before.extend(p.detach().clone() for p in pair.parameters())

    data[11, 3] = 0.12345
    with pytest.raises(NumericalError, match=r"epoch 2, step 1: .*rows \[11\]"):
        fit(pair.model, pair.guide, data, IWAE(2), epochs=2, batch_size=23, transform=transform, compile="on",
            on_epoch=poison)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_denormal_numbers_are_flushed_and_left_as_they_were() -> None:
    def flushed() -> bool:
        return (torch.tensor([2e-38]) * 0.25).item() == 0

    assert not flushed()
    with flushing(True):
        assert flushed()
        with flushing(False):
            assert flushed()
        assert flushed()
    assert not flushed()
    seen = []

    def watch(rows: Tensor) -> Tensor:
        seen.append(flushed())
        return rows

    for objective in (IWAE(3), ELBO()):
        pair = vae()
        fit(pair.model, pair.guide, X, objective, epochs=1, batch_size=23, transform=watch)
        assert not flushed()
    assert seen == [True, True, False, False]  # once to try the pair, once to train it


def test_negligible_weights_have_no_gradient_and_the_rest_is_unchanged() -> None:
    values = torch.tensor([0.0, -1.0, -NEGLIGIBLE + 1, -NEGLIGIBLE - 1, -95.0], dtype=torch.float64)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    bound, wanted = log_mean_exp(ours), torch.logsumexp(theirs, 0) - math.log(5)
    bound.backward()
    wanted.backward()
    assert_close(bound, wanted, rtol=1e-15, atol=0)
    assert_close(ours.grad, theirs.grad, rtol=1e-15, atol=math.exp(-NEGLIGIBLE))
    assert (ours.grad == 0).tolist() == [False, False, False, True, True]
    for broken in (math.inf, -math.inf, math.nan):
        same = torch.tensor([broken, broken, 0.0 if broken != -math.inf else broken])
        assert_close(log_mean_exp(same), torch.logsumexp(same, 0) - math.log(3), equal_nan=True)


def rounded(a: Tensor) -> Tensor:
    return a.bfloat16().float()


def test_products_of_bf16_mixed_are_rounded_and_nothing_else() -> None:
    """The value, and both gradients, of a dense layer and of a convolution, against products of rounded factors."""
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.randn(3)
    b = (b + 100.0).requires_grad_()  # far from what bfloat16 holds
    with HalfProducts():
        y = nn.functional.linear(x, w, b)
        y.square().sum().backward()
    assert_close(y, rounded(rounded(x) @ rounded(w).T) + b, rtol=1e-6, atol=1e-5)
    slope = 2 * y.detach()
    assert_close(x.grad, rounded(rounded(slope) @ rounded(w)), rtol=1e-2, atol=1e-2)
    assert_close(b.grad, slope.sum(0), rtol=1e-6, atol=1e-4)
    image, kernel, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4, requires_grad=True)
    with HalfProducts():
        out = nn.functional.conv2d(image, kernel.requires_grad_(), bias, padding=1)
        out.square().sum().backward()
    wanted = nn.functional.conv2d(rounded(image), rounded(kernel), padding=1)
    assert_close(out - bias[:, None, None], rounded(wanted), rtol=1e-2, atol=1e-2)
    assert_close(bias.grad, 2 * out.detach().sum((0, 2, 3)), rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("uncompiled")
def test_the_bound_of_bf16_mixed_is_accumulated_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant logits: every product is exact in bfloat16, so the bound must be what it is in single precision."""
    monkeypatch.setattr(rounding, "has_bfloat16", lambda device: True)
    pair = VAE(StandardNormal(2), Bernoulli(MLP(2, 3001, hidden=[4])), MeanFieldNormal(MLP(3001, hidden=[4]), 2))
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.fill_(0.37 if name.endswith("4.bias") or "bias" in name else 0.0)
    x = (torch.rand(6, 3001) < 0.3).float()
    losses = []
    for precision in ("fp32", "bf16-mixed"):
        for compiled in (False, True):
            losses.append(gradients(step_of(pair, IWAE(3), precision=precision, compiled=compiled), x)[0].item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_bf16_mixed_trains_to_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "has_bfloat16", lambda device: True)
    bounds = {}
    for precision in ("fp32", "bf16-mixed"):
        pair = vae().float()
        result = fit(pair.model, pair.guide, X.float(), ELBO(20), epochs=60, batch_size=23, optimizer=fast,
                     precision=precision, validation=X.float(), compile="off")  # fmt: skip
        bounds[precision] = [result.history[0]["validation_bound"], result.history[-1]["validation_bound"]]
    first, last = bounds["fp32"]
    assert last - first > 0.1
    assert abs(bounds["bf16-mixed"][1] - last) < 0.1 * (last - first)
    assert bounds["bf16-mixed"][1] != last


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp16"}, "precision: expected one of fp32, tf32, bf16-mixed"),
        ({"precision": "tf32"}, "precision: tf32 is for CUDA devices, got cpu"),
        ({"particle_chunk": 0}, "particle_chunk"),
        ({"particle_chunk": 2, "objective": Trace_ELBO()}, "particle_chunk: Trace_ELBO.* is not made of"),
        ({"compile": "always"}, "compile: expected auto, on or off"),
    ],
)
def test_options_that_make_no_sense(options: dict, words: str) -> None:
    pair = vae()
    with pytest.raises(UsageError, match=words):
        fit(pair.model, pair.guide, X, options.pop("objective", IWAE(3)), batch_size=5, **options)


def test_bf16_is_refused_where_the_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "has_bfloat16", lambda device: False)
    pair = vae()
    with pytest.raises(UsageError, match="precision: this cpu does not compute in bfloat16; use fp32"):
        fit(pair.model, pair.guide, X, IWAE(3), batch_size=5, precision="bf16-mixed")


def test_a_step_looks_for_nothing_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """To walk through all modules takes as long as to run small ones. A parameter of two modules has one gradient."""
    pair = vae()
    pair.twin = nn.Module()
    pair.twin.weight = pair.guides[0].head.weight
    pair.likelihood.decoder.body[1].bias.requires_grad_(False)
    objective, x = ELBO(), torch.rand(6, D, dtype=torch.float64).round()
    part = Gradient(objective, Pair(pair.model, pair.guide))
    trained = [p for p in pair.parameters() if p.requires_grad]
    assert list(map(id, part.trainable)) == list(map(id, trained))
    with monkeypatch.context() as patch, same_noise(x.device):
        patch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("a search through all modules"))
        _, *gradients = part(x, *(torch.tensor(value) for value in objective.settings(0).values()))
    with same_noise(x.device):
        objective.differentiable_loss(pair.model, pair.guide, x).backward()
    assert all(torch.equal(gradient, p.grad) for gradient, p in zip(gradients, trained, strict=True))
