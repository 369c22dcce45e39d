"""Training: repeatable, resumable and honest, for any pair and any objective."""

import itertools
import json
import math
import os
import random
import runpy
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import free_port
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyrovae import fit as fit_command
from pyrovae.errors import CheckpointError, DataError, NumericalError, UsageError
from pyrovae.inference import ELBO, IWAE, LinearWarmup, Renyi, adam, fit, staged
from pyrovae.inference.batch import Batch
from pyrovae.inference.diagnostics import measure, remarks
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import trainer as svi
from pyrovae.inference.training.checkpoint import load, load_latest, steps
from pyrovae.inference.units import kl_dimensions, marginal_kl
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, VAE, Gaussian, GaussianMixture, MeanFieldNormal, MixtureOfGaussians, StandardNormal

X = torch.randn(23, 3, generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
TIMES = ("seconds", "rows_per_second")


def vae(dropout: float = 0.0, seed: int = 0) -> VAE:
    """A small pair, always the same one."""
    torch.manual_seed(seed)
    guide = MeanFieldNormal(MLP(3, hidden=[6], dropout=dropout), 2)
    return VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[6], dropout=dropout)), guide)


def train(pair: nn.Module, objective=None, **options):
    options = {"epochs": 3, "batch_size": 5, "validation": HELD_OUT, "seed": 7, "optimizer": fast} | options
    return fit(pair.model, pair.guide, options.pop("data", X), objective, **options)


def fast(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return adam(parameters, lr=0.02)


def weights(pair: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pair.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether every bit of every tensor agrees."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name not in TIMES} for epoch in history]


def stop_after(count: int):
    """should_stop that is true at the count-th step it sees."""
    seen = iter(range(1, 10**6))
    return lambda: next(seen) == count


class Affine(nn.Module):
    """A pair whose exact posterior is its guide: its bound is log N(x; m, (1 + s^2) I), whatever the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.log_s.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        s2 = (2 * self.log_s).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((self.loc * s2 + x) / (1 + s2), (s2 / (1 + s2)).sqrt()).to_event(1))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.Normal(self.loc, (1 + (2 * self.log_s).exp()).sqrt()).to_event(1).log_prob(x)


# ------------------------------------------------------------------------------------------------------- determinism


def test_a_seed_is_a_run_bit_for_bit():
    torch.manual_seed(5)
    a, b, other = vae(), vae(), vae()
    first = train(a)
    torch.rand(13)  # whatever the caller draws in between does not matter
    second = train(b)
    third = train(other, seed=8)
    assert same(weights(a), weights(b))
    assert timeless(first.history) == timeless(second.history)
    assert not any(torch.equal(weights(a)[name], weights(other)[name]) for name, _ in a.named_parameters())
    assert third.history[0]["train_bound"] != first.history[0]["train_bound"]


def test_nothing_of_the_callers_changes():
    pyro.get_param_store()["mine"] = torch.tensor([1.0])
    pair = vae()
    torch.manual_seed(3)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(pair, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.get_num_threads() == threads
    with pytest.raises(NumericalError):
        train(pair, data=X * math.nan)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("objective", [ELBO(), Trace_ELBO(max_plate_nesting=1)], ids=["ours", "Pyro's"])
@pytest.mark.parametrize("width", [6, 23])  # as many units as rows are no parameters of the rows
def test_every_epoch_has_every_row_once_and_in_an_order_of_its_own(objective, width):
    seen: list[list[float]] = []

    def note(rows: Tensor) -> Tensor:
        seen.append(rows[:, 0].tolist())
        return rows

    pair = VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[width])), MeanFieldNormal(MLP(3, hidden=[width]), 2))
    train(pair, objective, transform=note, epochs=2)
    first, second = itertools.chain(*seen[1:6]), itertools.chain(*seen[6:])  # after one look at two rows
    first, second = list(first), list(second)
    assert [len(batch) for batch in seen[1:]] == 2 * [5, 5, 5, 5, 3]
    assert sorted(first) == sorted(second) == sorted(X[:, 0].tolist())
    assert first != second
    assert first != X[:, 0].tolist()


# ------------------------------------------------------------------------------------------------ means over the rows


def test_bounds_are_means_over_rows_with_a_ragged_last_batch():
    pair = Affine()
    data = X.double() + 5 * torch.arange(23)[:, None]  # rows that differ by much
    truth, validation = pair.log_prob(data).mean().item(), 3 * torch.arange(103).double()[:, None] * torch.ones(3)
    held_out = pair.log_prob(validation).mean().item()
    result = train(
        pair, IWAE(2), epochs=1, data=data, validation=validation, optimizer=lambda p: torch.optim.SGD(p, lr=1e-30)
    )
    assert result.history[0]["train_bound"] == pytest.approx(truth, rel=1e-10)
    assert result.history[0]["validation_bound"] == pytest.approx(held_out, rel=1e-10)


def test_the_gradient_of_a_batch_is_the_sum_over_its_rows():
    pair = Affine()
    gradients: list[Tensor] = []
    start = pair.loc.detach().clone()

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append(self.param_groups[0]["params"][0].grad.clone())

    train(pair, IWAE(2), epochs=1, data=X.double(), validation=None, optimizer=lambda p: Recorder(p, lr=1.0))
    assert len(gradients) == 5
    (expected,) = torch.autograd.grad(-pair.log_prob(X.double()).sum(), [pair.loc])
    assert torch.equal(pair.loc, start)
    assert_close(torch.stack(gradients).sum(0), expected, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- resume

OBJECTIVES = {
    "elbo": lambda: ELBO(),
    "iwae": lambda: IWAE(3),
    "renyi": lambda: Renyi(0.5, 2, num_averages=2),
    "warmup": lambda: ELBO(beta=LinearWarmup(steps=12)),
    "pyro": lambda: Trace_ELBO(num_particles=2),
}


def assert_resumed_is_never_stopped(directory: Path, stops: list[int], objective=ELBO, dropout=0.0, **options) -> None:
    options |= {"epochs": 4}
    whole = vae(dropout)
    never = train(whole, objective(), directory=directory / "never", **options)
    for count in stops:
        train(vae(dropout), objective(), directory=directory / "stopped", should_stop=stop_after(count), **options)
        options["resume"] = True
    pair = vae(dropout, seed=9)  # other weights: all that counts comes from the checkpoint
    last = train(pair, objective(), directory=directory / "stopped", **options)
    assert never.step == last.step == 20
    assert same(weights(whole), weights(pair))
    assert timeless(never.history) == timeless(last.history)
    assert (never.best_epoch, never.stopped) == (last.best_epoch, last.stopped)
    theirs, ours = load_latest(directory / "never"), load_latest(directory / "stopped")
    assert same(theirs.weights, ours.weights)
    assert_close(theirs.training["optimizer"], ours.training["optimizer"], rtol=0, atol=0)
    assert theirs.training["scheduler"] == ours.training["scheduler"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_equals_never_stopped(tmp_path, objective):
    assert_resumed_is_never_stopped(tmp_path, [3, 6, 1], OBJECTIVES[objective])


@pytest.mark.parametrize("stop", [1, 5, 7, 15, 19])
def test_resumed_after_any_step(tmp_path, stop):
    assert_resumed_is_never_stopped(tmp_path, [stop])


def test_resumed_with_dropout_a_schedule_and_momentum(tmp_path):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    assert_resumed_is_never_stopped(tmp_path, [4, 9], dropout=0.3, schedule=staged, optimizer=optimizer)


def test_resumed_with_rows_drawn_anew(tmp_path):
    assert_resumed_is_never_stopped(tmp_path, [7], transform=lambda rows: rows + torch.randn_like(rows))


def test_more_epochs_afterwards_equal_more_epochs_at_once(tmp_path):
    at_once, later = vae(), vae()
    first = train(at_once, epochs=5)
    train(later, epochs=2, directory=tmp_path)
    second = train(vae(seed=4), epochs=5, directory=tmp_path, resume=True)
    assert timeless(first.history) == timeless(second.history)


def test_resuming_without_the_best_epoch_says_so_and_goes_on(tmp_path):
    """Only the best checkpoint is damaged: the newest one continues, and the best is chosen among what follows."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [0.5, 50.0, 50.0, 50.0][min(epoch, 3)])

    first = train(vae(), epochs=4, directory=tmp_path, schedule=schedule)
    assert first.best_epoch == 1  # the rates of the later ones have made them worse
    best = min((tmp_path / "checkpoints").iterdir())
    (best / "weights.safetensors").write_bytes(b"")
    again = train(vae(seed=3), epochs=5, directory=tmp_path, schedule=schedule, resume=True)
    assert any("best epoch so far is lost" in notice for notice in again.notices)
    assert (again.best_epoch, again.stopped, len(again.history)) == (5, "finished", 5)


def test_the_best_is_chosen_among_bounds_on_the_same_rows(tmp_path):
    """Resumed with other validation rows, or with the first: what came before is on others, and compares with nothing.

    Far rows have a far lower bound: the first epoch, on near ones, would be the best for ever.
    """
    near, far = X[:6], X[:6] + 30
    for name, before, after, said in (
        ("other", near, far, "other"),
        ("first", None, far, "other"),
        ("none", far, None, "no"),
    ):
        train(vae(), epochs=2, directory=tmp_path / name, validation=before)
        again = train(vae(), epochs=4, directory=tmp_path / name, validation=after, patience=2, resume=True)
        expected = f"resumed with {said} validation rows, so that the best epoch is chosen anew from here on"
        assert [notice for notice in again.notices if "resumed" in notice] == [expected]
        if after is not None:
            bounds = [epoch["validation_bound"] for epoch in again.history[2:]]
            assert again.best_epoch == 3 + bounds.index(max(bounds))
        assert again.best_epoch > 2
    for rows in (near, near.clone()):
        train(vae(), epochs=2, directory=tmp_path / "same", validation=rows, resume=(tmp_path / "same").exists())
    assert train(vae(), epochs=2, directory=tmp_path / "same", validation=near, resume=True).notices == []


def test_a_validation_bound_that_is_no_number_is_said(monkeypatch):
    """It is never the best, and not in silence."""
    monkeypatch.setattr(svi.Trainer, "validate", lambda self: {"validation_bound": float("nan")})
    result = train(vae())
    assert sum("cannot be the best" in notice for notice in result.notices) == 3


def test_resuming_something_else_is_refused(tmp_path):
    train(vae(), epochs=1, directory=tmp_path)
    for change, words in (
        ({"seed": 8}, "seed 7 then, 8 now"),
        ({"batch_size": 6}, "batch_size 5 then, 6 now"),
        ({"data": X[:20]}, "rows 23 then, 20 now"),
        ({"data": torch.cat([X[:-1], X[-1:] + 1e-3])}, "data"),
        ({"objective": IWAE(5)}, "IWAE"),
        ({"optimizer": torch.optim.SGD}, "optimizer 'Adam' then, 'SGD' now"),
    ):
        with pytest.raises(CheckpointError, match=words):
            train(vae(), epochs=2, directory=tmp_path, resume=True, **change)
    with pytest.raises(UsageError, match="holds the checkpoints of another run"):
        train(vae(), epochs=2, directory=tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoints"):
        train(vae(), directory=tmp_path / "nowhere", resume=True)
    with pytest.raises(UsageError, match="needs the directory"):
        train(vae(), resume=True)


def test_resuming_falls_back_to_the_state_before_a_damaged_one(tmp_path):
    whole = vae()
    never = train(whole, epochs=6)
    train(vae(), epochs=4, directory=tmp_path)
    newest = tmp_path / "checkpoints" / f"step-{20:09d}" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    pair = vae()
    result = train(pair, epochs=6, directory=tmp_path, resume=True)
    assert "falling back to the previous" in result.notices[0]
    assert same(weights(whole), weights(pair))
    assert timeless(never.history) == timeless(result.history)


def test_the_best_of_the_state_before_is_still_there(tmp_path):
    """Epochs 1 and 4 are the best so far: after epoch 4, falling back to epoch 3 needs the weights of epoch 1."""
    bounds = iter([5.0, 1.0, 2.0, 9.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svi.Trainer, "validate", lambda self: {"validation_bound": next(bounds)})
        train(vae(), epochs=4, directory=tmp_path)
        assert steps(tmp_path) == [20, 15, 5]
        (tmp_path / "checkpoints" / f"step-{20:09d}" / "manifest.json").unlink()
        pair = vae()
        result = train(pair, epochs=4, directory=tmp_path, resume=True, should_stop=stop_after(1))
        assert result.best_epoch == 1
        assert load_latest(tmp_path).step == 16
        train(pair, epochs=4, directory=tmp_path, resume=True)  # epoch 4 now has 3.0, below 5.0
    assert same(weights(pair), {name.removeprefix("vae."): t for name, t in load(tmp_path, 5).weights.items()})


KILLED = """
import sys
import pyrovae.inference.training.trainer as svi
from pyrovae.fit import command

take_step = svi.Trainer.take_step

def note(self, *arguments):
    take_step(self, *arguments)
    print("step", self.progress.step, flush=True)

svi.Trainer.take_step = note
sys.exit(command(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_equals_never_killed(tmp_path):
    options = (
        "--data three-gaussians --network.hidden 8 --latent-dim 2 --batch-size 1000 --epochs 12 --seed 3 --elbo iwae"
    )
    words = [*options.split(), "--eval-K", "5", "--eval-rows", "10", "--no-plots"]
    script = [sys.executable, "-c", KILLED]
    random.seed(0)
    for kill in sorted(random.sample(range(5, 44), 2)):
        start = (
            ["--resume", str(tmp_path / "killed")] if (tmp_path / "killed").exists() else ["--out", "killed", *words]
        )
        with subprocess.Popen([*script, *start], stdout=subprocess.PIPE, cwd=tmp_path, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step") and int(line.split()[1]) >= kill:
                    break
            process.kill()
    for start in (["--resume", str(tmp_path / "killed")], ["--out", str(tmp_path / "never"), *words]):
        assert fit_command.command(start) == 0
    never, killed = load_latest(tmp_path / "never"), load_latest(tmp_path / "killed")
    assert never.step == killed.step == 48
    assert same(never.weights, killed.weights)
    assert_close(never.training["optimizer"], killed.training["optimizer"], rtol=0, atol=0)
    histories = [timeless(saved.training["progress"]["history"]) for saved in (never, killed)]
    assert histories[0] == histories[1]
    reports = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("never", "killed")]
    assert reports[0] == reports[1]


def test_saving_does_not_change_training(tmp_path):
    a, b = vae(0.2), vae(0.2)
    without, with_directory = train(a), train(b, directory=tmp_path)
    assert same(weights(a), weights(b))
    assert timeless(without.history) == timeless(with_directory.history)


# ------------------------------------------------------------------------------------------------- the best, patience


def test_the_pair_ends_with_the_weights_of_the_best_epoch(tmp_path):
    """Training on rows far from the held-out ones makes the bound of those fall after a while."""
    pair = vae()
    result = train(
        pair, data=X + 2, validation=HELD_OUT + 0.5, epochs=12, directory=tmp_path, optimizer=lambda p: adam(p, 0.1)
    )
    bounds = result.metrics["validation_bound"]
    assert result.best_epoch == bounds.idxmax() + 1 < 12
    saved = load(tmp_path, 5 * result.best_epoch)
    assert same({f"vae.{name}": tensor for name, tensor in weights(pair).items()}, saved.weights)
    assert not same(saved.weights, load_latest(tmp_path).weights)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_best_epoch_is_that_of_the_bound_without_beta(beta):
    torch.manual_seed(1)
    rows = 20 * beta * torch.randn(40, 1) + 0.2 * torch.randn(40, 3) if beta else torch.cat([X, HELD_OUT])
    pair, held_out = vae(), rows[23:]
    result = train(pair, ELBO(beta=beta), epochs=15, data=rows[:23], validation=held_out)
    metrics = result.metrics
    scaled = metrics["reconstruction"] - beta * metrics["kl"]
    assert_close(metrics["validation_bound"].tolist(), (metrics["reconstruction"] - metrics["kl"]).tolist())
    assert metrics["validation_bound"].idxmax() != scaled.idxmax(), "the two would agree: no power"
    assert result.best_epoch == metrics["validation_bound"].idxmax() + 1
    torch.manual_seed(0)
    again = measure(pair.model, pair.guide, [held_out.repeat(500, 1)], ELBO())["bound"]
    assert again == pytest.approx(metrics["validation_bound"].max(), abs=1.0)


def test_dropout_is_off_on_the_validation_rows_and_on_again():
    """With an analytic KL that does not depend on the draw, only dropout could make two measurements differ."""
    pair = vae(dropout=0.5)
    modes = []
    forward = type(pair.guides[0]).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(pair.guides[0]),
            "forward",
            lambda self, x: modes.append((torch.is_grad_enabled(), self.encoder.training)) or forward(self, x),
        )
        result = train(pair, epochs=2)
    assert set(modes) == {(True, True), (False, False)}  # in steps, and in measurements
    pair.eval()
    once = measure(pair.model, pair.guide, [HELD_OUT], ELBO())["kl"]
    assert result.history[result.best_epoch - 1]["kl"] == pytest.approx(once, rel=1e-6)


def test_without_validation_the_last_epoch_is_the_best():
    result = train(vae(), validation=None)
    assert result.best_epoch == 3
    assert "validation_bound" not in result.history[-1]


def test_patience():
    bounds = iter([1.0, 3.0, 2.0, 2.5, 2.9, 4.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svi.Trainer, "validate", lambda self: {"validation_bound": next(bounds)})
        result = train(vae(), epochs=6, patience=3)
    assert (result.stopped, result.best_epoch, len(result.history)) == ("early", 2, 5)


# ------------------------------------------------------------------------------------------------------------- faults


def test_nan_in_a_row_names_the_row_and_takes_no_step():
    data = X.clone()
    data[17, 1] = math.nan
    pair = vae()
    taken = []

    def stop() -> bool:
        taken.append(weights(pair))
        return False

    with pytest.raises(NumericalError, match=r"x is not finite in rows \[17\].* last good step is") as caught:
        train(pair, data=data, should_stop=stop)
    assert f"step {len(taken)}:" in str(caught.value)
    assert same(weights(pair), taken[-1])


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("objective", [ELBO, Trace_ELBO])
def test_nan_in_a_parameter_names_it(objective, validate):
    pair = vae()
    with torch.no_grad():
        pair.likelihood.raw_scale.fill_(math.nan)
    with pyro.validation_enabled(validate), pytest.raises(NumericalError, match=r"likelihood\.raw_scale.*no step"):
        train(pair, objective())


def test_a_loss_that_runs_away_leaves_checkpoints_and_best(tmp_path):
    pair = vae()
    at = []

    def corrupt(rows: Tensor) -> Tensor:
        at.append(1)
        return rows * (1e30 if len(at) > 13 else 1.0)  # one look, two epochs, two steps, then this

    with pytest.raises(
        NumericalError, match=r"epoch 3, step 12: .*; the last good step is 11; the checkpoints in .* are"
    ):
        train(pair, transform=corrupt, directory=tmp_path)
    assert steps(tmp_path) == [10, 5]
    saved = load_latest(tmp_path)
    assert saved.training["progress"]["best_epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in saved.weights.values())
    assert all(parameter.isfinite().all() for parameter in pair.parameters())
    never = vae()
    train(never)
    train(pair, directory=tmp_path, resume=True)
    assert same(weights(pair), weights(never))


def test_nan_in_the_validation_rows_is_refused_at_once():
    held_out = HELD_OUT.clone()
    held_out[4] = math.inf
    with pytest.raises(DataError, match=r"validation: 1 rows are not finite, the first being \[4\]"):
        train(vae(), validation=held_out)


def test_a_parameter_without_gradient_is_named():
    pair = vae()
    pair.forgotten = nn.Linear(1, 1, bias=False)
    result = train(pair, epochs=1)
    assert result.notices == ["no gradient reaches vae.forgotten.weight: the loss does not depend on them"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 2.5}, "batch_size: .* got 2.5"),
        ({"batch_size": 24}, "batch_size: 24 is more than the 23 training rows"),
        ({"patience": 0}, "patience"),
        ({"data": X[:0]}, r"data: .* got a tensor of shape \(0, 3\)"),
        ({"data": X.tolist()}, "data: expected a tensor .* got list"),
        ({"validation": HELD_OUT[:0]}, "validation: expected a tensor"),
        ({"validation": HELD_OUT[:, :2]}, r"validation: expected event shape \(3,\).* got \(2,\)"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau"),
        pytest.param(
            {"device": "cuda"},
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_arguments_that_make_no_sense(options, words):
    with pytest.raises(UsageError, match=words):
        train(vae(), **options)


@pytest.mark.parametrize(("fresh", "words"), [(False, "no parameters to train"), (True, "would not be trained")])
def test_nothing_to_train(fresh, words):
    """No parameter at all, or one that is made anew at every call and so could never move."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(0.0, requires_grad=fresh), 1.0))

    with pytest.raises(UsageError, match=words):
        fit(model, guide, X[:, 0], batch_size=5)


# ---------------------------------------------------------------------------------------------- any pair, any objective


def closures():
    loc = nn.Linear(1, 1, bias=False).double()
    decoder = nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc(x), 0.7).to_event(1))

    return model, guide


def params():
    def model(x: Tensor) -> None:
        w, b = pyro.param("w", x.new_full((1,), 0.5)), pyro.param("b", x.new_zeros(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * w + b, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", x.new_tensor(0.9), constraint=constraints.positive)
        slope, shift = pyro.param("slope", x.new_zeros(1)), pyro.param("shift", x.new_zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + shift, scale).to_event(1))

    return model, guide


def pyro_modules():
    decoder, encoder = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        f = pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(f(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        f = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(f(x), 0.7).to_event(1))

    return model, guide


@pytest.mark.parametrize("objective", [ELBO, IWAE, Trace_ELBO])
@pytest.mark.parametrize("pair", [closures, params, pyro_modules])
def test_plain_functions_reach_the_maximum_likelihood(pair, objective):
    """x ~ N(b, 1 + w^2): the bound of the trained pair is close to that of the data's own mean and variance."""
    x = 3 + 1.5 * torch.randn(200, 1, dtype=torch.float64)
    best = -0.5 * (math.log(2 * math.pi) + x.var(correction=0).log().item() + 1)
    model, guide = pair()
    result = fit(model, guide, x, objective(), epochs=60, batch_size=20, optimizer=lambda p: adam(p, 0.05))
    bounds = result.metrics["train_bound"]
    assert bounds.iloc[0] < best - 0.5
    assert best - 0.35 < bounds.iloc[-10:].mean() < best + 0.05


def test_parameters_of_the_store_are_saved_and_resumed(tmp_path):
    x = X[:, :1].double()
    options = {"epochs": 3, "batch_size": 7, "validation": x}
    fit(*params(), x, Trace_ELBO(), **options)
    never = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    fit(*params(), x, Trace_ELBO(), directory=tmp_path, should_stop=stop_after(5), **options)
    pyro.clear_param_store()
    fit(*params(), x, Trace_ELBO(), directory=tmp_path, resume=True, **options)
    assert never["w"] != 0.5
    assert same(never, dict(pyro.get_param_store().items()))


def test_enumeration_trains_a_mixture_towards_the_data():
    x = torch.randn(60, 2) + 4 * torch.randint(2, (60, 1))
    mixture = GaussianMixture(2, 2)
    mixture.initialise(x)
    with torch.no_grad():
        mixture.means += 1.0
        before = mixture.log_prob(x).mean().item()
    result = fit(
        mixture.model, mixture.guide, x, TraceEnum_ELBO(max_plate_nesting=1), epochs=30, batch_size=16, optimizer=fast,
        validation=x,
    )  # fmt: skip
    after = mixture.log_prob(x).mean().item()
    assert after > before + 0.1
    assert result.metrics["validation_bound"].max() == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam"])
def test_optimisers_of_torch_train_and_resume(tmp_path, name):
    def optimizer(parameters):
        return getattr(torch.optim, name)(parameters, lr=1e-3)

    whole, pair = vae(), vae()
    result = train(whole, optimizer=optimizer, epochs=4, data=X + 4)
    assert result.history[-1]["train_bound"] > result.history[0]["train_bound"]
    train(vae(), optimizer=optimizer, epochs=4, data=X + 4, directory=tmp_path, should_stop=stop_after(8))
    train(pair, optimizer=optimizer, epochs=4, data=X + 4, directory=tmp_path, resume=True)
    assert same(weights(whole), weights(pair))


# ---------------------------------------------------------------------------------------------------------- schedules


def test_staged_is_the_schedule_of_the_iwae_paper():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = staged(optimizer)
    rates = []
    for _ in range(3280):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    starts = [0] + [i for i in range(1, 3280) if rates[i] != rates[i - 1]]
    assert [b - a for a, b in zip(starts, [*starts[1:], 3280], strict=True)] == [3**i for i in range(8)]
    paper = [1e-3 * 10 ** (-i / 7) for i in range(8)]
    assert_close([rates[start] for start in starts], paper, rtol=0.04, atol=0)
    assert rates[-1] == pytest.approx(1e-4)


def test_the_rate_of_each_epoch_is_recorded_and_used():
    pair = Affine()
    result = train(
        pair, data=X.double(), validation=None, epochs=5, schedule=staged, optimizer=lambda p: torch.optim.SGD(p, 1e-9)
    )
    assert_close(
        result.metrics["learning_rate"].tolist(), [1e-9, 0.72e-9, 0.72e-9, 0.72e-9, 0.52e-9], rtol=1e-6, atol=0
    )


def test_beta_of_the_schedule_follows_the_step():
    result = train(vae(), ELBO(beta=LinearWarmup(steps=10)), epochs=3)
    assert result.metrics["beta"].tolist() == [0.5, 1.0, 1.0]


def test_each_step_has_the_beta_of_its_number(monkeypatch):
    used = []

    def penalty(self, kl, beta):
        used.append(float(beta))
        return beta * kl

    monkeypatch.setattr(LinearWarmup, "penalty", penalty)
    train(vae(), ELBO(beta=LinearWarmup(steps=20)), epochs=3)
    assert_close(used[1:], [step / 20 for step in range(15)])  # after one look at two rows


def test_the_noise_of_the_transform_is_new_at_every_step(tmp_path):
    drawn = []

    def noisy(rows: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        return rows + drawn[-1]

    train(vae(), transform=noisy, epochs=2, directory=tmp_path / "whole")
    assert len(set(drawn[1:])) == 10  # after one look at two rows
    whole = drawn[1:]
    drawn.clear()
    train(vae(), transform=noisy, epochs=2, directory=tmp_path / "cut", should_stop=stop_after(7))
    cut = drawn[1:]
    drawn.clear()
    train(vae(), transform=noisy, epochs=2, directory=tmp_path / "cut", resume=True)
    assert cut + drawn[1:] == whole


def test_validation_has_the_same_noise_at_every_epoch():
    result = train(vae(), IWAE(2), optimizer=lambda p: torch.optim.SGD(p, 0.0))
    first, *rest = result.metrics["validation_bound"]
    assert rest == [first, first]
    assert result.metrics["train_bound"].nunique() == 3  # where it is new


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path, monkeypatch):
    """Enumeration has no noise; 21 rows in batches of 4 leave a last batch of one row, and a process without any.

    What is given goes with its rows: means by label would differ.
    """
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, pyro, torch
        import pyro.distributions as dist
        from pyro.infer import TraceEnum_ELBO
        from pyrovae.inference import IWAE, adam, fit
        from pyrovae.models import GaussianMixture

        torch.manual_seed(0)
        x = torch.randn(21, 2, dtype=torch.float64) + 3 * torch.randint(2, (21, 1))
        mixture = GaussianMixture(2, 3).double()
        mixture.initialise(x)
        before = {k: v.clone() for k, v in mixture.state_dict().items()}
        result = fit(
            mixture.model, mixture.guide, x, TraceEnum_ELBO(max_plate_nesting=1), epochs=2, batch_size=4,
            device="cpu", progress=False, optimizer=lambda p: adam(p, 0.05),
        )
        means = torch.nn.Linear(3, 2, dtype=torch.float64)
        before |= {k: v.clone() for k, v in means.state_dict().items()}

        def model(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(means(y), 1.0).to_event(1), obs=x)

        def guide(x, y):  # nothing is latent, so that nothing is drawn
            pass

        labels = torch.eye(3, dtype=torch.float64)[torch.arange(21) % 3]
        of_labels = fit(
            model, guide, x + 2 * labels[:, :2], IWAE(2), epochs=2, batch_size=4,
            device="cpu", progress=False, optimizer=lambda p: adam(p, 0.05), given=(labels,), validation=x[:9],
            validation_given=(labels[:9],),
        )
        if os.environ.get("RANK", "0") == "0":
            bounds = [*result.metrics["train_bound"], *of_labels.metrics["train_bound"]]
            bounds += list(of_labels.metrics["validation_bound"])
            torch.save([before, mixture.state_dict() | means.state_dict(), bounds], sys.argv[1])
        """)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    words = [*launch, script, tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, capture_output=True, timeout=300, env=environment, text=True)
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    runpy.run_path(str(script))
    (before, one, bounds), (_, two, bounds_of_two) = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert max((one[name] - before[name]).abs().max() for name in one) > 0.05
    for name in one:
        assert_close(two[name], one[name], rtol=0, atol=1e-9)
    assert_close(bounds_of_two, bounds, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- diagnostics


def test_terms_kl_and_active_units_against_a_hand_computation():
    pair = vae().double()
    x = torch.randn(23, 3, dtype=torch.float64)
    with torch.no_grad():  # one variance of E[z|x] on either side of 0.01, by a factor 2
        wanted, found = torch.tensor([0.02, 0.005], dtype=torch.float64), pair.encode(x).var(0, correction=0)
        pair.guides[0].head.weight[:2] *= (wanted / found).sqrt()[:, None]
    report = measure(pair.model, pair.guide, x.split(9), ELBO(3))
    q = pair.posterior(x).base_dist
    kl = (0.5 * (q.loc**2 + q.scale**2 - 1) - q.scale.log()).mean(0)
    assert report["kl_z[0]"] == pytest.approx(kl[0].item(), abs=1e-10)
    assert report["kl_z[1]"] == pytest.approx(kl[1].item(), abs=1e-10)
    assert report["kl"] == pytest.approx(kl.sum().item(), abs=1e-10)
    assert report["bound"] == pytest.approx(report["reconstruction"] - report["kl"], abs=1e-10)
    assert report["elbo"] == pytest.approx(report["bound"], abs=1e-10)
    variance = q.loc.var(0, correction=0)
    assert_close(variance, wanted)
    assert report["active_units"] == 1
    assert remarks(report) == ["1 of 2 latent dimensions are inactive (variance of E[z|x] at most 0.01)"]


@pytest.mark.parametrize(
    ("kl", "count"),
    [
        ([1.0] * 10, 9),
        ([2.0] * 3, 3),
        ([0.1] * 45 + [20.0] * 5, 5),  # 47 of 50 may be active, and five carry what z says
        ([90.0, 9.0, 1.0], 1),
        ([89.0, 10.0, 1.0], 2),
        ([1.0, -0.2], 1),
        ([0.0, 0.0], 0),
        ([-0.1], 0),
        ([], None),
        ([1.0, math.nan], None),
    ],
)
def test_the_fewest_dimensions_that_carry_nine_tenths_of_the_kl(kl, count):
    assert kl_dimensions(kl) == kl_dimensions(kl[::-1]) == count
    assert kl_dimensions([7 * value for value in kl]) == count


def test_kl_of_a_dimension_against_quadrature():
    torch.manual_seed(0)
    guide = MeanFieldNormal(MLP(3, hidden=[6]), 2)
    pair = VAE(MixtureOfGaussians(2, components=3), Gaussian(MLP(2, 3, hidden=[6])), guide).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    q, prior = pair.posterior(x).base_dist, pair.prior
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None, None]
    parts = dist.Normal(prior.loc, prior.floor + nn.functional.softplus(prior.raw_scale))
    log_p = torch.logsumexp(parts.log_prob(grid[..., None]) - math.log(3), -2)
    log_q = q.log_prob(grid)
    truth = (log_q.exp() * (log_q - log_p)).sum(0) * (16 / 4000)
    with torch.no_grad():
        samples = torch.stack(
            [marginal_kl(draw(Pair(pair.model, pair.guide), Batch(x), 1).latents["z"]) for _ in range(1000)]
        )
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - truth.T).abs() < 5 * error).all()
    assert error.max() < 0.05


def test_remarks_call_a_collapse_by_its_name():
    pair = vae()
    with torch.no_grad():
        pair.guides[0].head.weight.zero_()
        pair.guides[0].head.bias.zero_()
    (words,) = remarks(measure(pair.model, pair.guide, [X], ELBO()))
    assert "posterior collapse: no latent dimension is active" in words
    assert remarks({"kl": 3.0, "kl_z[0]": 3.0, "active_units": 1.0, "latent_dimensions": 1.0}) == []


# ---------------------------------------------------------------------------------------------------------- the record


def test_metrics_csv_has_the_history(tmp_path):
    import pandas as pd

    result = train(vae(), ELBO(beta=2.0), directory=tmp_path)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == [
        "epoch", "step", "train_bound", "validation_bound", "validation_elbo", "reconstruction", "kl", "kl_z[0]",
        "kl_z[1]", "active_units", "latent_dimensions", "beta", "learning_rate", "rows_per_second", "seconds",
    ]  # fmt: skip
    assert_close(table["validation_bound"].tolist(), [epoch["validation_bound"] for epoch in result.history])
    assert table["step"].tolist() == [5, 10, 15]
    assert table["beta"].tolist() == [2.0] * 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_should_stop_at_the_end_of_an_epoch_still_finishes_it():
    result = train(vae(), epochs=1, should_stop=stop_after(5))
    assert (result.stopped, result.step, len(result.history)) == ("finished", 5, 1)


def test_on_epoch_sees_every_epoch_as_it_ends():
    seen: list[tuple[int, float]] = []
    result = train(vae(), on_epoch=lambda metrics: seen.append((int(metrics["epoch"]), time.monotonic())))
    assert [epoch for epoch, _ in seen] == [1, 2, 3] == [int(epoch["epoch"]) for epoch in result.history]
    assert seen[0][1] < seen[1][1] < seen[2][1]


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_what_a_caller_measures_and_draws_shifts_nothing(compile):
    """Weights and measurements are to the bit those of a run that nobody looks into."""
    plain, watched = vae(dropout=0.2), vae(dropout=0.2)
    modes, taken = [], []

    def draws() -> dict[str, float]:
        torch.randn(7)
        modes.append(watched.training)
        return {"drawn": torch.randn(()).item()}

    def on_step(step: int, x: Tensor) -> None:
        torch.randn(step)
        taken.append((step, len(x), x.sum().item()))

    alone = train(plain, compile=compile)
    result = train(watched, compile=compile, extra_metrics=draws, on_step=on_step, transform=lambda x: x)
    assert same(weights(plain), weights(watched))
    extra = [epoch.pop("drawn") for epoch in result.history]
    assert timeless(result.history) == timeless(alone.history)
    assert extra == [extra[0]] * 3  # the same noise at every epoch
    assert modes == [False] * 3
    assert [step for step, _, _ in taken] == list(range(1, 16))
    assert [rows for _, rows, _ in taken[:5]] == [5, 5, 5, 5, 3]
    for epoch in range(3):  # every row once
        total = sum(of_rows for _, _, of_rows in taken[5 * epoch : 5 * epoch + 5])
        assert total == pytest.approx(X.sum().item(), abs=1e-4)


def test_what_a_caller_measures_is_recorded_and_resumed(tmp_path):
    import pandas as pd

    def size(pair: nn.Module):
        return lambda: {"size": sum(p.square().sum().item() for p in pair.parameters())}

    whole, part, other = vae(), vae(), vae()
    expected = train(whole, extra_metrics=size(whole)).metrics["size"].tolist()
    train(part, epochs=1, directory=tmp_path, extra_metrics=size(part))
    train(other, directory=tmp_path, resume=True, extra_metrics=size(other))
    assert pd.read_csv(tmp_path / "metrics.csv")["size"].tolist() == expected
    assert len(set(expected)) == 3


def test_what_a_caller_measures_has_a_name_of_its_own():
    with pytest.raises(UsageError, match="extra_metrics: kl, step: already a measurement of fit's"):
        train(vae(), extra_metrics=lambda: {"step": 1.0, "kl": 2.0, "mine": 3.0})


def test_an_objective_without_a_differentiable_loss_is_refused():
    """Pyro's own RenyiELBO cannot be differentiated from outside; the message names what can."""
    with pytest.raises(UsageError, match=r"RenyiELBO has no differentiable_loss; use .*IWAE"):
        train(vae(), RenyiELBO(num_particles=2))


# ---------------------------------------------------------------------------------------------------------- divergence


def far_data(factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows on a noisy line, and validation rows."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(600, 1, generator=generator)
    x = z * torch.tensor([1.0, -0.5, 2.0]) + 0.1 * torch.randn(600, 3, generator=generator) + 1
    return factor * x[:500], factor * x[500:]


def gaussian(x: Tensor, scale: str = "learned") -> VAE:
    torch.manual_seed(1)
    decoder = MLP(1, (2, 3) if scale == "predicted" else 3, (8,))
    pair = VAE(StandardNormal(1), Gaussian(decoder, scale), MeanFieldNormal(MLP(3, None, (8,)), 1))
    pair.initialise(x)
    return pair


def test_training_that_ends_far_below_its_start_has_diverged() -> None:
    x, validation = far_data()
    pair = gaussian(x)
    with pytest.raises(
        NumericalError, match=r"training diverged: the best validation bound, .* lower the learning rate"
    ):
        fit(
            pair.model,
            pair.guide,
            x,
            epochs=2,
            batch_size=100,
            validation=validation,
            optimizer=lambda parameters: adam(parameters, lr=1e3),
        )


def test_a_late_divergence_is_said_and_the_best_is_kept() -> None:
    """A good epoch, then one at a learning rate a million times as large."""
    x, validation = far_data()
    pair = gaussian(x)

    def jump(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 1e6)

    result = fit(pair.model, pair.guide, x, epochs=3, batch_size=100, validation=validation, schedule=jump)
    assert result.best_epoch == 2
    assert any("training diverged: the best validation bound" in n and "the best is kept" in n for n in result.notices)
    assert all(tensor.isfinite().all() for tensor in pair.state_dict().values())


def test_training_that_only_loses_a_little_is_said() -> None:
    """The bound with beta = 1 may fall where another is trained; that is no divergence."""
    x, validation = far_data()
    pair = gaussian(x)
    adam_up = lambda parameters: torch.optim.SGD(parameters, lr=1e-9, maximize=True)  # noqa: E731
    result = fit(pair.model, pair.guide, x, epochs=1, batch_size=100, validation=validation, optimizer=adam_up)
    assert any("before training: lower the learning rate" in notice for notice in result.notices)
    quiet = fit(pair.model, pair.guide, x, epochs=1, batch_size=100, validation=validation)
    assert not any("training" in notice for notice in quiet.notices)


@pytest.mark.parametrize("scale", ["learned", "predicted"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_data_of_any_scale_are_learned_alike(factor: float, scale: str) -> None:
    """The run on cx is the run on x, its bounds less D log c."""
    runs = []
    for c in (1.0, factor):
        x, validation = far_data(c)
        pair = gaussian(x, scale)
        result = fit(pair.model, pair.guide, x, epochs=4, batch_size=50, validation=validation, optimizer=fast)
        runs.append([metrics["validation_bound"] + 3 * math.log(c) for metrics in result.history])
    assert runs[0][-1] > runs[0][0] + 0.5
    assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=0, atol=2e-2)
