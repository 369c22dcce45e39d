"""What docs/extending.md says is true: every block runs, and what it makes meets the contract of its section."""

import importlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from test_log_marginal import GaussianPair
from torch.testing import assert_close

from pyrovae.inference import ELBO, fit, log_marginal, verdict
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing.draws import Compiled
from pyrovae.inference.weights import log_mean_exp
from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, StandardNormal

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))


def run(section: str) -> dict[str, Any]:
    """The names that the blocks of a section make, each block within the module that it says it belongs to."""
    made: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.M | re.S):
        file = re.match(r"# (pyrovae/\S+)\.py\n", block)
        module = vars(importlib.import_module(file[1].replace("/", "."))) if file else {"__name__": "script"}
        names = {**module, **made}
        exec(compile(block, f"docs/extending.md, {section}", "exec"), names)
        for name, value in names.items():
            if name.isupper() and name in module and value is not module[name]:
                assert value[: len(module[name])] == module[name], f"{name} is not what the library has, and one more"
            if name not in module or value is not module[name]:
                made[name] = value
    return made


def integral(p: Any, reach: float = 30.0) -> float:
    """Of a density in the plane, by the trapezoid rule."""
    axis = torch.linspace(-reach, reach, 601, dtype=torch.float64)
    with torch.no_grad():
        return p.log_prob(torch.cartesian_prod(axis, axis)).exp().sum().item() * (axis[1] - axis[0]).item() ** 2


def trained(
    prior: Any = None, likelihood: Any = None, guide: Any = None, objective: Any = None, corruption: Any = None
) -> list[float]:
    """The bounds of two epochs of a pair with that part."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    pair = VAE(
        prior or StandardNormal(2),
        likelihood or Gaussian(MLP(2, (3,), hidden=(4,))),
        guide or MeanFieldNormal(MLP(3, hidden=(4,)), 2),
        corruption,
    )
    pair.initialise(x)
    kept = fit(pair.model, pair.guide, x, objective or ELBO(), epochs=2, batch_size=30, compile="off", progress=False)
    return kept.metrics["train_bound"].tolist()


def test_every_section_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(SECTIONS) == 13
    assert [name for name in SECTIONS if f'run("{name}")' not in source] == []


def test_a_prior() -> None:
    cls = run("A prior")["LaplacePrior"]
    p = cls(2).double()()
    assert (p.batch_shape, p.event_shape) == ((), (2,))
    assert integral(p) == pytest.approx(1, abs=1e-2)
    assert all(math.isfinite(bound) for bound in trained(prior=cls(2, scale=0.5)))
    with pytest.raises(ValueError, match="scale: expected a number above 0, got -1"):
        cls(2, scale=-1)


def test_a_guide() -> None:
    cls = run("A guide")["StudentT"]
    guide = cls(MLP(3, hidden=(4,)), 2)
    x = torch.randn(5, 3)
    z = guide(x).rsample()
    assert z.shape == (5, 2)
    assert_close(guide(x).log_prob(z)[1], guide(x[1]).log_prob(z[1]))
    assert all(math.isfinite(bound) for bound in trained(guide=guide))


def test_a_likelihood() -> None:
    cls = run("A likelihood")["Gumbel"]
    likelihood = cls(MLP(2, (2,), hidden=(4,))).double()
    assert integral(likelihood(torch.zeros(2, dtype=torch.float64))) == pytest.approx(1, abs=1e-2)
    assert cls.decoder_shape((2,)) == (2,)
    assert all(math.isfinite(bound) for bound in trained(likelihood=cls(MLP(2, (3,), hidden=(4,)))))
    x = torch.tensor([0.5, 3.0]).expand(7, 2).double()
    with torch.no_grad():
        for weight in (p for p in likelihood.decoder.parameters() if p.ndim > 1):
            weight.zero_()
    likelihood.initialise(x)
    assert_close(likelihood(torch.zeros(2, dtype=torch.float64)).mean, x[0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="finite"):
        likelihood.check_support(torch.tensor([[math.nan, 0.0]]))


def test_a_likelihood_on_another_space(tmp_path: Path) -> None:
    """Degrees become radians, which have no bits; the density is 1 over the circles, and the same a turn further."""
    from pyrovae.data import load_data

    made = run("A likelihood on another space")
    degrees = 360 * np.random.default_rng(0).random((60, 2))
    np.save(tmp_path / "angles.npy", degrees)
    rows = load_data(str(tmp_path / "angles.npy")).rows(made["Angles"]())
    assert (rows.measure.kind, rows.measure.bits_per_dimension(-1.0)) == ("angles", None)
    assert 5 < rows.transform(rows.train).max() < 2 * math.pi
    likelihood = made["VonMises"](MLP(2, (2, 2), hidden=(4,))).double()
    likelihood.initialise(rows.test)
    likelihood.check_support(rows.test)
    axis = torch.linspace(-math.pi, math.pi, 201, dtype=torch.float64)[:-1]
    p, grid = likelihood(torch.zeros(2, dtype=torch.float64)), torch.cartesian_prod(axis, axis)
    assert p.log_prob(grid).exp().mean().item() * (2 * math.pi) ** 2 == pytest.approx(1, abs=1e-4)
    assert_close(p.log_prob(grid + 2 * math.pi), p.log_prob(grid))


def test_a_corruption() -> None:
    """The logarithm of what x is multiplied by: mean 0 and the scale, anew at every call; nothing in evaluation."""
    cls = run("A corruption")["Speckle"]
    corruption, x = cls(0.3), torch.rand(2000, 3, dtype=torch.float64) + 1
    noise = (corruption(x) / x).log()
    assert_mean(noise.flatten(), 0.0, least=0.05)
    assert_mean(noise.square().flatten(), 0.09, least=0.02)
    assert not torch.equal(corruption(x), corruption(x))
    assert corruption.eval()(x) is x
    bounds = trained(corruption=cls())
    assert all(math.isfinite(bound) for bound in bounds)
    assert bounds != trained()


def test_an_objective() -> None:
    """The page's importance-weighted bound is the library's, and the other is between the ELBO and that."""
    from pyrovae.inference import objectives

    made = run("An objective")
    shown, kept = made["Importance"], objectives.IWAE
    weights = torch.randn(4, 3, 5)
    assert torch.equal(shown(3, 4).reduce(weights), kept(3, 4).reduce(weights))
    assert repr(shown(3)) == repr(kept(3)).replace("IWAE", "Importance")
    assert trained(objective=shown(3)) == trained(objective=kept(3))

    between = made["Combination"]
    assert between(3, num_averages=4).settings(50) == {"beta": 0.75}
    for beta, end in ((1.0, weights.mean(1).mean(0)), (0.0, kept(3, 4).reduce(weights).mean(0))):
        found = between(3, beta=beta, num_averages=4).combine(weights.flatten(0, 1).unsqueeze(0))
        assert torch.allclose(found, end)
    steps = {"steps": 1, "num_particles": 1}
    assert trained(objective=between(**steps)) == pytest.approx(trained(objective=ELBO(kl="sampled")))
    assert trained(objective=between(3)) != trained(objective=between(3, beta=0.9))


def test_an_estimator_of_gradients() -> None:
    """A number for a baseline changes no expectation: the difference of two is the number times the mean score, 0."""
    from pyrovae.inference import IWAE

    cls = run("An estimator of gradients")["FixedBaseline"]
    loc = torch.full((40_000, 1), 0.3, requires_grad=True)  # a parameter for each row

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    class Wide(IWAE):
        gradients = (*IWAE.gradients, cls.word)

    found = []
    for baseline in (0.0, -4.0):
        torch.manual_seed(0)
        loss = Wide(3, gradient=cls(baseline)).differentiable_loss(model, guide, torch.ones(len(loc), 1))
        found += torch.autograd.grad(loss, loc)
    assert (found[0] - found[1]).abs().max() > 1
    assert_mean(found[0] - found[1], 0.0, least=0.2)


def test_a_proposal() -> None:
    """Its mean weight has expectation p(x); it is checked, and told apart from the guide, like any other."""
    made = run("A proposal")
    cls, pair = made["Scaled"], GaussianPair(1.05)
    assert made["PROPOSALS"][-1] is cls
    with pytest.raises(ValueError, match="factor: expected a number above 0, got 0"):
        cls(0)
    x = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
    every = x.repeat(4000)
    means = log_mean_exp(cls(1.3)(Pair(pair.model, pair.guide), Batch(every))(3)) - pair.log_prob(every)
    assert_mean(means.exp().view(4000, 3), torch.ones(3, dtype=torch.float64))
    result = log_marginal(pair.model, pair.guide, x.repeat(20), 300, proposal=cls(), seed=0)
    assert result.estimator == "importance sampling from the guide, 1.2 times as wide"
    assert (result.of_guide, verdict(result).kind) == (False, "ok")
    Compiled(cls())


def test_a_condition() -> None:
    torch.manual_seed(0)
    made = run("A condition")
    estimate, x, y = made["estimate"], made["x"], made["y"]
    assert estimate.estimate.shape == (60,)
    from pyrovae.inference import log_marginal

    shuffled = log_marginal(made["model"], made["guide"], x, num_particles=500, given=(y.roll(1, 0),))
    assert shuffled.mean != estimate.mean


def test_an_exact_baseline() -> None:
    cls = run("An exact baseline")["IndependentLaplace"]
    torch.manual_seed(0)
    x = torch.randn(51, 2).double() * torch.tensor([1.0, 2.0])
    ((model, iterations),) = cls.fitted(x, x, [1, 2])
    assert iterations == 1
    assert integral(model, 30.0) == pytest.approx(1, abs=1e-2)
    assert_mean(model.sample(20_000), model.loc.detach())
    best = model.log_prob(x).mean()
    seen = torch.tensor([True, False])
    assert_close(model.log_prob_seen(x, seen) + model.log_prob_missing(x, seen), model.log_prob(x))
    for change in (0.9, 1.1):
        with torch.no_grad():
            model.log_scale.add_(math.log(change))
        assert model.log_prob(x).mean() < best
        with torch.no_grad():
            model.log_scale.sub_(math.log(change))


@pytest.mark.slow
def test_a_measure_of_reconstructions() -> None:
    made = run("A measure of reconstructions")["QUALITIES"][-1]
    x, y = torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    assert_close(made.of(x, y, 1.0), (x - y).abs().amax((1, 2)).double())
    assert made.of(x, x, 1.0).tolist() == [0.0] * 4
    assert made.column == "reconstruction_largest"


def test_a_command_that_trains_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("A command that trains many runs")
    assert sorted(made["scores"]) == ["elbo-0", "elbo-1", "iwae-0", "iwae-1"]
    assert all(math.isfinite(score) for score in made["scores"].values())


def test_a_data_set() -> None:
    source = run("A data set")["spiral"]
    first, second = (source.read(Path("nowhere"), False).x["train"] for _ in range(2))
    assert first.shape == (5000, 2)
    assert (first == second).all()
