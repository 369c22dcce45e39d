"""Resuming: a saved state that is not of the form of a fresh one is refused by name, before any of it is taken over."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from pyrovae.errors import CheckpointError
from pyrovae.inference import ELBO, Fit, fit
from pyrovae.inference.training.checkpoint import Checkpoint, load_latest, save
from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, StandardNormal

X = torch.randn(23, 3, generator=torch.Generator().manual_seed(1))
STEP = 7  # the second of five batches in the second epoch


class Pair(VAE):
    """A small pair with a parameter that no gradient reaches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        guide = MeanFieldNormal(MLP(3, hidden=[4]), 2)
        super().__init__(StandardNormal(2), Gaussian(MLP(2, 3, hidden=[4])), guide)
        self.idle = nn.Parameter(torch.zeros(2))


def train(pair: Pair, directory: Path, **options: Any) -> Fit:
    options = {"epochs": 3, "validation": X[:5], "schedule": lambda optimizer: StepLR(optimizer, 1, 0.5)} | options
    return fit(
        pair.model, pair.guide, X, ELBO(), batch_size=5, directory=directory, progress=False, on_notice=str, **options
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A run that was stopped after a few steps."""
    directory, stops = tmp_path_factory.mktemp("run"), iter(range(1, 100))
    train(Pair(), directory, should_stop=lambda: next(stops) == STEP)
    return load_latest(directory)


def forged(stopped: Checkpoint, directory: Path, change: Callable[[dict], Any]) -> None:
    """Write the checkpoint with something else in it, and the right checksums."""
    other = copy.deepcopy(stopped)
    change(other.training)
    save(directory, other)


def moments(training: dict) -> dict[str, Tensor]:
    return training["optimizer"]["state"][3]


def group(training: dict) -> dict[str, Any]:
    return training["optimizer"]["param_groups"][0]


FORGERIES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "shape": (lambda t: moments(t).update(exp_avg=torch.zeros(1)), r"exp_avg has shape \(1,\), expected \(\d"),
    "type": (lambda t: moments(t).update(exp_avg=moments(t)["exp_avg"].double()), "exp_avg has type torch.float64"),
    "nan": (lambda t: moments(t)["exp_avg_sq"].fill_(math.nan), r"exp_avg_sq has \d+ elements that are not finite"),
    "entry missing": (lambda t: moments(t).pop("exp_avg"), "lacks exp_avg"),
    "entry extra": (lambda t: moments(t).update(x=torch.zeros(1)), "has an unknown x"),
    "entry no tensor": (lambda t: moments(t).update(exp_avg="x" * 10**6), "exp_avg is a word, expected a tensor"),
    "parameter missing": (lambda t: t["optimizer"]["state"].pop(3), r"state of \S+ is missing"),
    "parameter missing from a list": (lambda t: t.pop("untouched"), "list of parameters .* is of another form"),
    "parameter extra": (lambda t: t["optimizer"]["state"].update({99: moments(t)}), "states of 1 unknown"),
    "parameter a list": (lambda t: t["optimizer"]["state"].update({3: [1]}), "is a list, expected a dictionary"),
    "count ahead": (lambda t: moments(t)["step"].fill_(8), "is of step 8, the run of step 7"),
    "count behind": (lambda t: moments(t)["step"].fill_(-1), "is of step -1"),
    "no state": (lambda t: t["optimizer"].update(state=[1]), "state is of another form"),
    "no optimiser": (lambda t: t.update(optimizer=None), "record is of another form"),
    "something beside": (lambda t: t["optimizer"].update(x=1), "has an unknown x"),
    "groups": (lambda t: t["optimizer"]["param_groups"].append(group(t)), "has 2 elements, expected 1"),
    "group of words": (lambda t: t["optimizer"].update(param_groups=["x"]), "of another form"),
    "order": (lambda t: group(t)["params"].reverse(), "groups have other parameters"),
    "rate nan": (lambda t: group(t).update(lr=math.nan), "lr is nan, expected 0.001"),
    "rate infinite": (lambda t: group(t).update(lr=torch.tensor(math.inf)), "lr is inf"),
    "rate word": (lambda t: group(t).update(lr="fast"), "lr is a word"),
    "rate negative": (lambda t: group(t).update(lr=-1.0), "lr is negative"),
    "rate without end": (lambda t: group(t).update(lr=10**400), "lr is a number"),
    "rate a truth": (lambda t: group(t).update(lr=True), "lr is True"),
    "betas": (lambda t: group(t).update(betas=[0.9]), "betas has 1 elements, expected 2"),
    "setting missing": (lambda t: group(t).pop("weight_decay"), "lacks weight_decay"),
    "setting extra": (lambda t: group(t).update(k=1), "has an unknown k"),
    "no schedule": (lambda t: t.update(scheduler=None), "schedule's is None"),
    "schedule counts": (lambda t: t["scheduler"].update(last_epoch="x"), "schedule's last_epoch is a word"),
    "schedule nan": (lambda t: t["scheduler"].update(gamma=math.nan), "schedule's gamma is nan"),
    "schedule lacks": (lambda t: t["scheduler"].pop("last_epoch"), "schedule's lacks last_epoch"),
    "no counters": (lambda t: t["progress"].pop("batch"), "counters are of another form"),
    "epoch": (lambda t: t["progress"].update(epoch=2), "its epoch is 2"),
    "epoch negative": (lambda t: t["progress"].update(epoch=-1), "its epoch is -1"),
    "epoch a truth": (lambda t: t["progress"].update(epoch=True), "its epoch is True"),
    "step": (lambda t: t["progress"].update(step=6), "its step is 6, which does not go with step 7"),
    "batch": (lambda t: t["progress"].update(batch=4), "its batch is 4"),
    "rows": (lambda t: t["progress"].update(rows=3), "its rows is 3"),
    "total": (lambda t: t["progress"].update(total=math.nan), "its total is nan"),
    "seconds": (lambda t: t["progress"].update(seconds=-1.0), "its seconds is -1.0"),
    "best": (lambda t: t["progress"].update(best_epoch=9), "its best_epoch is 9"),
    "best step": (lambda t: t["progress"].update(best_step="../x"), "its best_step is a word"),
    "best bound": (lambda t: t["progress"].update(best_bound=math.nan), "its best_bound is nan"),
    "untrained bound": (lambda t: t["progress"].update(untrained_bound=[1.0]), "its untrained_bound is a list"),
    "compiled": (lambda t: t["progress"].update(compiled=[10**6]), "its compiled is a list"),
    "refused": (lambda t: t["progress"].update(refused=3), "its refused is 3"),
    "history shorter": (lambda t: t["progress"].update(history=[]), "its history is a list"),
    "history of words": (lambda t: t["progress"]["history"][0].update(x="y"), "its history is a list"),
    "identity a tensor": (lambda t: t["run"].update(seed=torch.zeros(3)), "seed tensor"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_state_of_another_form_is_refused_in_one_line_and_nothing_is_taken_over(
    name: str, stopped: Checkpoint, tmp_path: Path
) -> None:
    change, words = FORGERIES[name]
    forged(stopped, tmp_path, change)
    pair = Pair()
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as error:
        train(pair, tmp_path, resume=True)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())


def test_what_may_differ_does(stopped: Checkpoint, tmp_path: Path) -> None:
    """A rate kept as a tensor, as on a GPU; settings that another torch has or has not; epochs and a note."""

    def harmless(training: dict) -> None:
        group(training)["lr"] = torch.tensor(group(training)["lr"], dtype=torch.float64)
        training["environment"]["torch"] = "2.0"
        group(training)["a setting of later"] = 1
        del (
            group(training)["amsgrad"],
            training["scheduler"]["verbose" if "verbose" in training["scheduler"] else "gamma"],
        )

    whole, again = Pair(), Pair()
    train(whole, tmp_path / "whole")

    def here(training: dict) -> None:  # the checkpoint was made before this test, with torch's own number of threads
        training["environment"]["threads"] = torch.get_num_threads()

    forged(stopped, tmp_path / "same", here)
    notices = train(Pair(), tmp_path / "same", resume=True).notices
    assert not any("environment" in notice for notice in notices), notices
    forged(stopped, tmp_path / "forged", harmless)
    resumed = train(again, tmp_path / "forged", resume=True)
    assert any("torch '2.0' then" in notice for notice in resumed.notices)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_parameter_that_waits_for_its_first_gradient_goes_on_waiting(tmp_path: Path) -> None:
    """The probe has one, of the first row, and training had none of it before the stop: there is no state of it."""
    x = X.clone()
    x[0] = 9.0

    class Late(Pair):
        def model(self, x: Tensor) -> None:
            super().model(x + self.idle.sum() if bool((x == 9.0).any()) else x)

    def train_late(pair: Pair, directory: Path, **options: Any) -> Fit:
        options |= {"epochs": 2, "seed": 1, "compile": "off", "directory": directory, "on_notice": str}
        return fit(pair.model, pair.guide, x, ELBO(), batch_size=5, progress=False, **options)

    whole, stopped, again = Late(), Late(), Late()
    train_late(whole, tmp_path / "whole")
    train_late(stopped, tmp_path / "run", should_stop=lambda: True)
    assert load_latest(tmp_path / "run").training["untouched"] == ["late.idle"]
    train_late(again, tmp_path / "run", resume=True)
    assert again.idle.abs().min() > 0
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_best_epoch_of_another_shape_is_given_up_and_said(stopped: Checkpoint, tmp_path: Path) -> None:
    forged(stopped, tmp_path, lambda training: None)
    assert stopped.training["progress"]["best_step"] == 5
    best = Checkpoint(5, {"x": torch.zeros(1)}, stopped.training)
    save(tmp_path, best, [5])
    save(tmp_path, stopped, [5])
    notices = train(Pair(), tmp_path, resume=True).notices
    assert any("lacks" in notice and "the best epoch so far is lost" in notice for notice in notices)


def test_a_setting_that_a_record_lacks_is_no_fault_where_it_is_none() -> None:
    from pyrovae.inference.training.resuming import differences

    assert differences({"seed": 1}, {"seed": 1, "particle_chunk": None}) == []
    assert differences({"seed": 1}, {"seed": 1, "particle_chunk": 5}) == ["particle_chunk None then, 5 now"]
