"""What is done for a CUDA device, as far as a CPU can show it: nothing that waits, the precision asked for, and the
caller's settings and random states as they were.
"""

from collections.abc import Callable
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.lr_scheduler import StepLR

from pyrovae.errors import NumericalError
from pyrovae.inference import (
    ELBO,
    IWAE,
    adam,
    fit,
    log_marginal,
    measure,
    precision,
    sandwich,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.information import split_kl
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import arithmetic
from pyrovae.inference.suboptimality import gaps
from pyrovae.inference.tracing.recording import trace, waits
from pyrovae.inference.training import gradients as parts
from pyrovae.inference.training import step as steps
from pyrovae.inference.training.batches import fits
from pyrovae.inference.training.gradients import Gradient
from pyrovae.inference.training.optimizers import hyperparameters
from pyrovae.inference.training.step import Step
from pyrovae.inference.units import use_of_units
from pyrovae.models import MLP, VAE, Gaussian, LowRankNormal, MeanFieldNormal, StandardNormal
from pyrovae.seeding import derive_seed, index_of, seeded

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
CUDA = torch.device("cuda")


def vae(guide: type = MeanFieldNormal) -> VAE:
    torch.manual_seed(0)
    return VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[4])), guide(MLP(3, hidden=[4]), 2))


# ------------------------------------------------------------------------------------------------ what makes a GPU wait


class Factors(nn.Module):
    """A Cholesky factor, an inverse and a solution of each of a batch of matrices."""

    def forward(self, a: Tensor) -> tuple[Tensor, ...]:
        return torch.linalg.cholesky(a), torch.linalg.inv(a), torch.linalg.solve(a, a), torch.linalg.solve(a, a[..., 0])


def test_a_graph_does_not_ask_whether_a_factorisation_failed_but_gives_nan() -> None:
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    graph = trace(Factors(), torch.stack([good] * 3))
    assert waits(graph) is None
    found = graph(torch.stack([good, -good, torch.zeros(2, 2)]))  # not positive; singular
    for result, whole in zip(found, ([1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]), strict=True):
        assert result.isfinite().flatten(1).all(1).tolist() == [bool(w) for w in whole]
        assert result.isnan().flatten(1).all(1).tolist() == [not w for w in whole]
    for result, wanted in zip(found, Factors()(good[None]), strict=True):
        torch.testing.assert_close(result[:1], wanted)


def test_a_step_of_a_low_rank_guide_waits_for_nothing() -> None:
    pair = vae(LowRankNormal)
    whole = Pair(pair.model, pair.guide)
    step = Step(ELBO(), whole, adam(list(whole.trainable().values())))
    assert waits(trace(step.part(Gradient), X, *step.settings(Batch(X), 0))) is None


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (lambda a: a[a > 0], "aten.nonzero.default waits|aten.index.Tensor waits"),
        (lambda a: a.masked_select(a > 0), "aten.masked_select.default waits"),
        (lambda a: torch.unique(a), "unique"),
    ],
)
def test_operations_that_ask_the_device_are_found(operation: Callable, words: str) -> None:
    graph = make_fx(operation, tracing_mode="real")(torch.rand(3))
    found = waits(graph)
    assert found is not None
    assert any(word in found for word in words.split("|"))


def test_a_number_that_is_read_is_found() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten._local_scalar_dense.default, (graph.placeholder("x"),)))
    assert waits(torch.fx.GraphModule(nn.Module(), graph)) == "aten._local_scalar_dense.default waits for the device"


@pytest.mark.parametrize(
    ("operation", "found"),
    [
        (lambda a, i: a + 1, None),
        (lambda a, i: a[i.to("cuda")].sum(), "aten._to_copy.default copies between cpu and cuda"),
        (lambda a, i: a[torch.zeros(2, dtype=torch.long, device="cuda")], None),
        (lambda a, i: a[i], "aten.index.Tensor copies between cpu and cuda"),
        (lambda a, i: a.cpu().sum(), "aten._to_copy.default copies between cpu and cuda"),
        (lambda a, i: a + torch.ones(()), None),
    ],
)
def test_copies_between_host_and_device_are_found(operation: Callable, found: str | None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(operation)(torch.empty(3, device="cuda"), torch.zeros(2, dtype=torch.long))
    assert waits(graph) == found


def captured_step(monkeypatch: pytest.MonkeyPatch, notices: list[str]) -> Step:
    """A step that would be captured, on the CPU."""
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    pair = vae()
    whole = Pair(pair.model, pair.guide)
    step = Step(ELBO(), whole, adam(list(whole.trainable().values())), compiled=True, on_notice=notices.append)
    step.capturing = True
    return step


def test_a_graph_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    monkeypatch.setattr(steps, "Captured", lambda *_: pytest.fail("it would leave torch unusable"))
    monkeypatch.setattr(parts, "waits", lambda graph: "aten.x waits for the device")
    step = captured_step(monkeypatch, notices)
    for _ in range(6):
        step(Batch(X), 0)
    assert [text for text in notices if "captured" in text] == [
        "not captured as a CUDA graph, so slower: aten.x waits for the device"
    ]


def test_the_reason_of_a_failed_capture_is_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, *_: object) -> None:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            finally:
                raise RuntimeError("the capture was invalidated")

    notices: list[str] = []
    monkeypatch.setattr(steps, "Captured", Failing)
    step = captured_step(monkeypatch, notices)
    for _ in range(6):
        step(Batch(X), 0)
    assert notices[-1].endswith("slower: operation not permitted when stream is capturing")


def test_the_default_optimiser_leaves_out_steps_by_itself() -> None:
    """The private protocol of torch's gradient scaler, on which nothing being read within an epoch rests."""
    assert adam([nn.Parameter(torch.zeros(1))])._step_supports_amp_scaling  # type: ignore[attr-defined]


def test_a_rate_that_is_a_tensor_follows_its_schedule_without_a_new_capture() -> None:
    def train(rate: float | Tensor) -> tuple[list[float], list[Tensor]]:
        pair, seen = vae(), []

        def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
            seen.append(torch.optim.Adam(parameters, lr=rate, fused=True))
            return seen[0]

        def schedule(optimizer: torch.optim.Optimizer) -> StepLR:
            seen.append(hyperparameters(optimizer))
            return StepLR(optimizer, 1, 0.5)

        history = fit(
            pair.model,
            pair.guide,
            X,
            ELBO(),
            epochs=4,
            batch_size=10,
            optimizer=make,
            schedule=schedule,
            progress=False,
        ).history
        if isinstance(rate, Tensor):
            assert seen[1][0]["lr"] is hyperparameters(seen[0])[0]["lr"]
        return [epoch["learning_rate"] for epoch in history], list(pair.parameters())

    (got, ours), (wanted, theirs) = train(torch.tensor(0.02)), train(0.02)
    assert got == pytest.approx(wanted)
    assert got == pytest.approx([0.02, 0.01, 0.005, 0.0025])
    assert all(isinstance(rate, float) for rate in got)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------- precision of the products


def settings() -> dict[str, object]:
    """Everything in torch that says how products are computed, where it can be read."""
    cudnn, found = torch.backends.cudnn, {}
    readings: dict[str, Callable[[], object]] = {
        "products": lambda: torch.backends.cuda.matmul.fp32_precision,
        "on the cpu": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "convolutions": lambda: cudnn.conv.fp32_precision,
        "recurrences": lambda: cudnn.rnn.fp32_precision,
        "older name": torch.get_float32_matmul_precision,
        "older name of convolutions": lambda: cudnn.allow_tf32,
        "deterministic": lambda: cudnn.deterministic,
    }
    for name, read in readings.items():
        found[name] = None
        with suppress(RuntimeError):
            found[name] = read()
    return found


STARTS: dict[str, Callable[[], object]] = {
    "as torch comes": lambda: None,
    "older names": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(torch.backends.cudnn, "allow_tf32", False),
    ),
    "newer names": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer names of convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("asked", ["fp32", "tf32", "bf16-mixed"])
def test_precision_is_set_and_put_back(asked: str, start: str) -> None:
    with arithmetic("fp32", CUDA):  # puts back what this test sets
        STARTS[start]()
        before = settings()

        def fail() -> None:
            with arithmetic(asked, CUDA):
                inside = settings()
                rounded = asked == "tf32"
                assert (
                    inside["products"]
                    == inside["convolutions"]
                    == inside["recurrences"]
                    == ("tf32" if rounded else "ieee")
                )
                assert inside["older name"] == ("high" if rounded else "highest")
                assert inside["older name of convolutions"] is rounded
                assert inside["deterministic"] is True
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert settings() == before
        with arithmetic(asked, torch.device("cpu")):
            assert settings() == before


class Watched(nn.Module):
    """A linear pair that notes the precision in which it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.5], [0.2, -1.0]]))
        self.seen: set[object] = set()

    def model(self, x: Tensor) -> None:
        self.seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.weight.T, 0.5).to_event(1))


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda model, guide, x: log_marginal(model, guide, x, 10),
        lambda model, guide, x: measure(model, guide, [x], IWAE(2)),
        lambda model, guide, x: gaps(model, guide, x, 10),
        lambda model, guide, x: use_of_units(Pair(model, guide), Batch(x)),
        lambda model, guide, x: split_kl(Pair(model, guide), Batch(x)),
        lambda model, guide, x: sandwich(model, guide, x[:2], 2),
    ],
)
def test_evaluation_is_in_single_precision(evaluate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, before = Watched(), settings()
    monkeypatch.setattr(precision, "device_of", lambda *_: CUDA)
    evaluate(pair.model, pair.guide, X[:, :2])
    assert pair.seen == {("ieee", "ieee")}
    assert settings() == before


def test_the_device_is_that_of_tensors_or_of_a_program() -> None:
    assert precision.device_of(vae().model, [X], X) == torch.device("cpu")
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
        module = nn.Linear(1, 1, device="cuda")
    assert precision.device_of(vae().model, X, there) == there.device
    assert precision.device_of(vae().model, [there]) == there.device
    assert precision.device_of(module.forward) == there.device


# ----------------------------------------------------------------------------------------------- random states, rows


def test_seeding_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(derive_seed("a", 1))
    wanted = torch.rand(3)
    for name in ("manual_seed", "cuda.manual_seed", "cuda.manual_seed_all"):
        monkeypatch.setattr(f"torch.{name}", lambda *_: pytest.fail("seeds every device"))
    before = torch.get_rng_state()
    with seeded("a", 1):
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [index_of(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:2")] == [3, 0, 2]


def test_rows_that_would_fill_a_device_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * X.nbytes, 10**9))
    assert fits(X, CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * X.nbytes - 1, 10**9))
    assert not fits(X, CUDA)
    assert fits(X, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["off", "on"])
def test_moments_of_batch_normalisation_stay_finite_after_a_bad_row(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the epoch's start; nothing that is infinite has reached them."""
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    torch.manual_seed(0)
    encoder = MLP(3, hidden=[4])
    encoder.body.append(nn.BatchNorm1d(4))
    pair = VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[4])), MeanFieldNormal(encoder, 2))
    kept: list[Tensor] = []
    bad = False

    def at_epoch(metrics: dict[str, float]) -> None:
        nonlocal bad
        bad = True
        kept.extend(buffer.clone() for buffer in pair.buffers())

    def transform(rows: Tensor) -> Tensor:
        return torch.where(bad & (rows[:, :1] == X[7, 0]), 1e30, rows)

    with pytest.raises(NumericalError, match=r"rows \[7\]"):
        fit(
            pair.model, pair.guide, X, ELBO(), epochs=3, batch_size=5, transform=transform, on_epoch=at_epoch,
            compile=mode, progress=False,
        )  # fmt: skip
    assert all(torch.equal(buffer, value) for buffer, value in zip(pair.buffers(), kept, strict=True))
    assert any(value.is_floating_point() and value.abs().sum() > 0 for value in kept)
