"""Compiled log-weights are the pair's own, and what cannot be compiled is run as it is, after one warning."""

import random
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyrovae.errors import DataError, UsageError
from pyrovae.inference import log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import FromGuide, FromPrior, Widened
from pyrovae.inference.tracing.bfloat16 import half_products
from pyrovae.inference.tracing.draws import Compiled, CompileWarning, Program, even, worth_compiling
from pyrovae.inference.tracing.recording import trace
from pyrovae.inference.tracing.rules import lanes_of, log_of_products, rewrite, split
from pyrovae.models import (
    MLP,
    VAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    Gaussian,
    HierarchicalVAE,
    MeanFieldNormal,
    StandardNormal,
    VampPrior,
)

# Single precision, sums of tens of terms.
ROUNDING = {"rtol": 1e-5, "atol": 1e-4}


def binary(n: int, *shape: int) -> Tensor:
    return (torch.rand(n, *shape) < 0.4).float()


def vae(d: int = 32) -> VAE:
    return VAE(StandardNormal(3), Bernoulli(MLP(3, d, hidden=(16,))), MeanFieldNormal(MLP(d, hidden=(16,)), 3))


def convolutional() -> VAE:
    guide = MeanFieldNormal(ConvEncoder((1, 6, 6), (4,), 8), 2)
    return VAE(VampPrior(guide, (1, 6, 6), 3), Bernoulli(ConvDecoder(2, (1, 6, 6), (4,), 8)), guide)


def hierarchical() -> HierarchicalVAE:
    return HierarchicalVAE(
        StandardNormal(2),
        [MeanFieldNormal(MLP(2, hidden=(8,)), 3)],
        Gaussian(MLP(3, 5, hidden=(8,))),
        [MeanFieldNormal(MLP(5, hidden=(8,)), 3), MeanFieldNormal(MLP(3, hidden=(8,)), 2)],
    )


class Plain:
    """A user's functions over two modules, in double precision; `look` sees x and z on the way."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor | float] = lambda x, z: 0.0) -> None:
        self.encoder, self.decoder, self.look = nn.Linear(4, 4).double(), nn.Linear(2, 4).double(), look

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.look(x, z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they are: everything but the compiler."""
    monkeypatch.setattr("pyrovae.inference.tracing.draws.compile_graph", lambda graph: graph)


def on_the_same_noise(proposal: Compiled, model: Callable, guide: Callable, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-weights by `proposal` and by what it compiles, of a block that is one tile."""
    pair, batch = Pair(model, guide), Batch(x)
    sample = proposal(pair, batch)
    with torch.no_grad():
        torch.manual_seed(7)
        first = sample(k)
        torch.manual_seed(7)
        got = sample(k)
        torch.manual_seed(7)
        wanted = proposal.proposal(pair, batch)(k)
    assert_close(first, got, rtol=0.0, atol=0.0)  # compiling and checking draw nothing
    return got, wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "x"),
    [(vae, (32,)), (hierarchical, (5,)), (convolutional, (1, 6, 6)), (Plain, (4,))],
    ids=["vae", "hierarchical", "convolutional", "plain functions"],
)
def test_compiled_log_weights_are_the_pairs_own(make: Callable, x: tuple[int, ...]) -> None:
    pair = make()
    rows = binary(6, *x).to(torch.float64 if make is Plain else torch.float32)
    got, wanted = on_the_same_noise(Compiled(), pair.model, pair.guide, rows, 9)
    assert_close(got, wanted, **ROUNDING)
    assert got.std() > 0.1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("proposal", [FromGuide(), FromPrior(), Widened(), Widened(share=0.0)], ids=repr)
@pytest.mark.parametrize("make", [vae, convolutional])
def test_every_proposal_that_is_tensor_operations(make: Callable, proposal) -> None:
    pair = make()
    x = binary(6, *pair.event_shape)
    got, wanted = on_the_same_noise(Compiled(proposal), pair.model, pair.guide, x, 12)
    assert_close(got, wanted, **ROUNDING)


@pytest.mark.usefixtures("uncompiled")
def test_rows_and_particles_that_fill_no_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 3 rows and 4 particles, for blocks of 7 and 2 rows and 10 particles.
    monkeypatch.setattr("pyrovae.inference.tracing.draws.tile", lambda x, k: (3, 4))
    pair = vae()
    naive, guided = Compiled(FromPrior()), Compiled()
    with torch.no_grad():
        next(pair.likelihood.parameters()).zero_()  # z says nothing: p(x|z) is p(x), for every draw
        for rows in (7, 2):
            x = binary(rows, 32)
            wanted = pair.likelihood(torch.zeros(rows, 3)).log_prob(x).expand(10, rows)
            assert wanted.std() > 0.1
            assert_close(naive(Pair(pair.model, pair.guide), Batch(x))(10), wanted, **ROUNDING)
            drawn = guided(Pair(pair.model, pair.guide), Batch(x))(10)
            assert len(drawn.unique()) == 10 * rows  # tiles repeat no draw


@pytest.mark.usefixtures("uncompiled")
def test_changed_parameters_are_seen() -> None:
    pair, x, proposal = Plain(), torch.randn(5, 4, dtype=torch.float64), Compiled()
    before, _ = on_the_same_noise(proposal, pair.model, pair.guide, x, 4)
    with torch.no_grad():
        pair.decoder.weight.add_(1.0)
        pair.encoder.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    got, wanted = on_the_same_noise(proposal, pair.model, pair.guide, x, 4)
    assert_close(got, wanted)
    assert (got - before).abs().min() > 1e-3
    assert len(proposal.programs) == 1


@pytest.mark.slow
def test_parameters_of_the_pyro_store_are_seen_when_they_change() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x, proposal = torch.randn(5), Compiled()
    on_the_same_noise(proposal, model, guide, x, 4)
    with torch.no_grad():
        pyro.param("scale").unconstrained().add_(1.0)
    assert_close(*on_the_same_noise(proposal, model, guide, x, 4), **ROUNDING)


def constant_branch(x: Tensor, z: Tensor) -> Tensor:
    return z.sum(-1, keepdim=True) if (x > 0).any() else torch.zeros_like(x)


CALLS = iter(range(1000))
VALUES = r"values of tensors decide what is computed in <lambda>, line \d+ of test_compiled"


@pytest.mark.usefixtures("uncompiled", "unexamined")
@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda x, z: z.sum(-1, keepdim=True) if z.sum() > 0 else -x, VALUES),
        (lambda x, z: 1.0 if x.mean() > 0 else 0.0, VALUES),
        (lambda x, z: torch.from_numpy(z.detach().numpy()).mean(-1, keepdim=True), "numpy"),
        (lambda x, z: random.random(), "differ"),
        (lambda x, z: float(next(CALLS)), "differ"),
    ],
    ids=["branch on z", "branch on x", "numpy", "python's random", "a global"],
)
def test_what_a_graph_would_freeze_is_not_compiled(look: Callable, why: str) -> None:
    pair, x = Plain(look), torch.randn(5, 4, dtype=torch.float64)
    proposal = Compiled()
    with pytest.warns(CompileWarning, match=why) as caught:
        log_marginal(pair.model, pair.guide, torch.cat([x] * 50), 4, proposal=proposal)
    assert len(caught) == 1  # of three blocks


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "look",
    [
        lambda x, z: z.mean().item(),
        lambda x, z: torch.where(z.sum() > 0, 1.0, x),
        lambda x, z: nn.functional.dropout(x),
    ],
    ids=["item", "where", "dropout"],
)
def test_what_a_graph_does_not_freeze(look: Callable) -> None:
    pair, x = Plain(look), torch.randn(5, 4, dtype=torch.float64)
    assert_close(*on_the_same_noise(Compiled(), pair.model, pair.guide, x, 4))


class Wasteful(Plain):
    """Draws numbers that nothing uses, before those that count."""

    def guide(self, x: Tensor) -> None:
        torch.randn(3)
        super().guide(x)


@pytest.mark.usefixtures("uncompiled")
def test_draws_that_nothing_uses_move_the_noise_on() -> None:
    pair, x = Wasteful(), torch.randn(5, 4, dtype=torch.float64)
    assert_close(*on_the_same_noise(Compiled(), pair.model, pair.guide, x, 4))


@pytest.mark.usefixtures("uncompiled")
def test_a_pair_that_is_not_compiled_gives_its_own_numbers() -> None:
    pair, x = Plain(constant_branch), torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(CompileWarning):
        got = log_marginal(pair.model, pair.guide, x, 40, proposal=Compiled(), seed=1)
    assert_close(got.estimate, log_marginal(pair.model, pair.guide, x, 40, seed=1).estimate, rtol=0.0, atol=1e-12)


@pytest.mark.usefixtures("uncompiled")
def test_a_pair_that_changes_after_compiling_is_noticed() -> None:
    shift = [0.0]
    pair = Plain(lambda x, z: shift[0])
    x, proposal = torch.randn(5, 4, dtype=torch.float64), Compiled()
    on_the_same_noise(proposal, pair.model, pair.guide, x, 4)
    shift[0] = 3.0
    with pytest.warns(CompileWarning, match="differ"):
        got, wanted = on_the_same_noise(proposal, pair.model, pair.guide, x, 4)
    assert_close(got, wanted, rtol=0.0, atol=1e-12)


@pytest.mark.usefixtures("uncompiled")
def test_every_row_is_still_checked_against_the_support() -> None:
    pair, x = vae(), binary(90, 32)
    x[80, 3] = 0.5
    with pytest.raises(DataError, match="support"):
        Compiled()(Pair(pair.model, pair.guide), Batch(x))(5)


@pytest.mark.slow
def test_bfloat16_changes_estimates_little_and_says_by_how_much() -> None:
    pair, x = vae(), binary(200, 32)
    half, whole = Compiled(precision="bf16"), Compiled()
    got = log_marginal(pair.model, pair.guide, x, 200, proposal=half, seed=1)
    wanted = log_marginal(pair.model, pair.guide, x, 200, proposal=whole, seed=1)
    difference = got.estimate - wanted.estimate
    assert 1e-6 < difference.abs().mean() < 0.05
    bias, error = half.bias
    assert abs(bias - difference.mean().item()) <= 5 * error + 1e-3
    assert abs(whole.bias[0]) < 1e-4
    assert "bfloat16" in got.estimator
    assert "bfloat16" not in wanted.estimator


@pytest.mark.usefixtures("uncompiled")
def test_bias_is_compiled_less_eager() -> None:
    pair, x = vae(), binary(20, 32)
    proposal = Compiled(precision="bf16")
    proposal(Pair(pair.model, pair.guide), Batch(x))(50)
    (program,) = proposal.programs.values()
    assert isinstance(program, Program)
    after, unshifted = program.after, proposal.bias[0]
    program.after = lambda *start: after(*start) + 0.25
    proposal.differences.clear()
    proposal(Pair(pair.model, pair.guide), Batch(x))(50)
    assert abs(proposal.bias[0] - unshifted - 0.25) < 0.01


@pytest.mark.usefixtures("uncompiled")
def test_bfloat16_is_for_products_of_particles_only() -> None:
    pair, x = vae(), binary(5, 32)
    proposal = Compiled(precision="bf16")
    on_the_same_noise(proposal, pair.model, pair.guide, x, 4)
    (program,) = proposal.programs.values()
    assert isinstance(program, Program)
    rounded = [n for n in program.after.graph.nodes if n.target is torch.ops.aten.mm.default]
    assert len(rounded) == 2  # the decoder's
    assert not any(n.target is torch.ops.aten.addmm.default for n in program.after.graph.nodes)
    (before,) = program.prepare(Batch(x))
    loc, raw = pair.guides[0].head(pair.guides[0].encoder(x)).chunk(2, -1)
    assert any(t.shape == (5, 6) and torch.allclose(t, torch.cat([loc, raw], -1)) for t in before)


@pytest.mark.parametrize("size", [1, 7, 10, 64, 97, 101, 784, 3072, 4096])
def test_a_bernoulli_sum_by_products_is_the_sum_of_logarithms(size: int) -> None:
    class Sum(nn.Module):
        def forward(self, l: Tensor) -> Tensor:
            l = l + torch.zeros_like(l).normal_(0.0, 1e-9)  # rewriting is for what depends on noise
            return dist.Bernoulli(logits=l, validate_args=False).to_event(1).log_prob(x)

    x = binary(3, size).double()
    l = 8 * torch.randn(2, 3, size, dtype=torch.float64)
    l[0, 0, 0], l[1, 1, 0] = 80.0, -80.0
    graph = trace(Sum(), l)
    rewrite(graph, log_of_products)
    assert any(node.target is torch.ops.aten.prod.dim_int for node in graph.graph.nodes)
    graph.recompile()
    wanted = -torch.nn.functional.binary_cross_entropy_with_logits(l, x.expand_as(l), reduction="none").sum(-1)
    assert_close(graph(l), wanted, rtol=0.0, atol=1e-6)
    assert size // lanes_of(size) <= 100


def test_splitting_a_graph_computes_the_encoder_once() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            loc = self.encoder(x).expand(3, len(x), 2)
            return self.decoder(loc + torch.randn_like(loc)).sum(-1)

    module, x = Noisy(), torch.randn(5, 4)
    graph = trace(module, x)
    before, after = split(graph, (3, 5))
    inputs = [t.detach() for t in module.parameters()]
    torch.manual_seed(1)
    got = after(*before(*inputs, x))
    torch.manual_seed(1)
    assert_close(got, module(x).detach())
    products = [sum(n.target is torch.ops.aten.addmm.default for n in g.graph.nodes) for g in (before, after)]
    assert products == [1, 1]


def test_a_graph_that_works_in_place_is_not_split() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x * 2
            total.add_(torch.randn(3, len(x), 4).sum(0))
            return (total + x).sum(-1)

    x = torch.randn(5, 4)
    before, after = split(trace(InPlace(), x), (3, 5))
    start = before(x)
    torch.manual_seed(1)
    first = after(*start)
    torch.manual_seed(1)
    assert_close(after(*start), first, rtol=0.0, atol=0.0)


def test_half_products_leave_double_precision_alone() -> None:
    pair, x = Plain(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(UsageError, match="single precision"):
        Compiled(precision="bf16")(Pair(pair.model, pair.guide), Batch(x))

    class Product(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return torch.randn_like(a) @ a

    graph = trace(Product(), torch.randn(3, 3, dtype=torch.float64))
    rewrite(graph, half_products)
    assert not any("_to_copy" in str(node.target) for node in graph.graph.nodes)


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="precision: expected fp32 or bf16, got 'fp16'"):
        Compiled(precision="fp16")
    with pytest.raises(UsageError, match="proposal: expected"):
        Compiled(Compiled())  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "most", "wanted"), [(100, 12, 10), (5, 12, 5), (5000, 334, 250), (7, 1, 1)])
def test_parts_that_fill_least_more(total: int, most: int, wanted: int) -> None:
    assert even(total, most) == wanted


def test_work_decides_whether_to_compile() -> None:
    pair, x = vae(), binary(20, 32)
    flops = 2 * (3 * 16 + 16 * 32)  # per draw, of the decoder's products
    enough = int(5e12 / (flops * len(x)))
    state = torch.get_rng_state()
    assert not worth_compiling(pair.model, pair.guide, x, int(0.99 * enough))
    assert worth_compiling(pair.model, pair.guide, x, int(1.01 * enough))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_global_state_changes() -> None:
    pair, x = vae(), binary(5, 32)
    validation = dist.is_validation_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        Compiled()(Pair(pair.model, pair.guide), Batch(x))
        trace(nn.Linear(32, 2), x)
    assert dist.is_validation_enabled() == validation
