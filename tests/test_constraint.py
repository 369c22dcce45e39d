r"""The weight of the KL: what it does beside a scale, and a constraint on the KL that finds it.

With x|z ~ N(Wz, s^2 I) and z ~ N(0, I), E log p(x|z) - beta KL is greatest at

    q(z|x) = N(V W'x / (beta s^2), V),  V = (I + W'W / (beta s^2))^-1,

the posterior of the model whose scale is s sqrt(beta), so that the KL of every beta is in closed form.
"""

import math

import pytest
import torch
from conftest import EXACT
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from pyrovae import Recipe
from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, Constraint, fit
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.schedules import Constant
from pyrovae.inference.tracing.recording import trace, waits
from pyrovae.inference.training import gradients as parts
from pyrovae.inference.training.step import Step
from pyrovae.models import MLP, VAE, FullCovarianceNormal, Gaussian, MeanFieldNormal, Network, StandardNormal
from pyrovae.runs.build import build_objective

D, Z, SCALE = 4, 2, 0.5


def pair(scale: float = SCALE, trained: bool = True) -> VAE:
    """A linear decoder that is held, and a guide that has every q of the form above; always the same."""
    torch.manual_seed(0)
    decoder = Network(nn.Linear(Z, D), Z, D)
    vae = VAE(StandardNormal(Z), Gaussian(decoder, scale), FullCovarianceNormal(Network(nn.Identity(), D, D), Z))
    with torch.no_grad():
        decoder.body.bias.zero_()
        vae.guides[0].head.weight *= 0.1
    return vae.double().requires_grad_(trained)


def rows(n: int = 60) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kl_of(beta: float, x: Tensor) -> float:
    """The mean KL of the best q under a beta."""
    W, ratio = pair().likelihood.decoder.body.weight.detach(), 1 / (beta * SCALE**2)
    covariance = torch.linalg.inv(torch.eye(Z, dtype=torch.float64) + ratio * W.T @ W)
    q = MultivariateNormal(ratio * x @ W @ covariance, covariance)
    prior = MultivariateNormal(torch.zeros(Z, dtype=torch.float64), torch.eye(Z, dtype=torch.float64))
    return kl_divergence(q, prior).mean().item()


def trained(beta: object, **options) -> tuple[VAE, dict[str, list[float]]]:
    """The guide alone, on all rows at once; the decoder is held."""
    vae, x = pair(), rows()
    vae.likelihood.requires_grad_(False)
    settings = {"epochs": 500, "batch_size": len(x), "validation": x, "seed": 3, "compile": "off", "progress": False}

    def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.02)

    history = fit(vae.model, vae.guide, x, ELBO(50, beta=beta), optimizer=adam, **(settings | options)).history
    return vae, {name: [epoch[name] for epoch in history] for name in history[-1]}


# ------------------------------------------------------------------------------------------------------ beta and scale


@pytest.mark.parametrize("beta", [0.2, 1.0, 7.0])
def test_beta_and_a_fixed_scale_act_by_beta_s_squared_alone(beta: float) -> None:
    """ELBO_beta at scale s is beta ELBO_1 at scale s sqrt(beta), and a number of beta, s and D alone.

    The number is (D/2) (beta log(2 pi beta s^2) - log(2 pi s^2)). So both have their greatest value at the same decoder
    mean and guide, and gradients that are parallel.
    """
    x, values, slopes = rows(), [], []
    for scale, weight in ((SCALE, beta), (SCALE * math.sqrt(beta), 1.0)):
        vae = pair(scale)
        torch.manual_seed(2)
        bound = ELBO(3, beta=weight).bound(vae.model, vae.guide, x)
        values.append(bound.detach())
        slopes.append(torch.autograd.grad(bound.sum(), list(vae.parameters())))
    number = D / 2 * (beta * math.log(2 * math.pi * beta * SCALE**2) - math.log(2 * math.pi * SCALE**2))
    assert_close(values[0], beta * values[1] + number, **EXACT)
    for one, other in zip(*slopes, strict=True):
        assert_close(one, beta * other, rtol=1e-10, atol=1e-10)
    assert max(slope.abs().max() for slope in slopes[0]) > 1


# ---------------------------------------------------------------------------------------------------------- constraint


def test_the_multiplier_moves_by_the_excess_and_never_below_its_least() -> None:
    """log beta by rate * clip(KL / C - 1, -1, 1), from sums over rows; its penalty is beta KL."""
    constraint = Constraint(4.0, rate=0.1, least=0.5)
    start = constraint.tensor(torch.device("cpu"))
    assert start.item() == 1.0
    assert start.dtype == torch.float64
    for kl, factor in (
        (4.0, 1.0),
        (6.0, math.exp(0.05)),
        (2.0, math.exp(-0.05)),
        (400.0, math.exp(0.1)),
        (0.0, math.exp(-0.1)),
    ):
        terms = torch.stack([torch.full((3, 5), 9.0), torch.full((3, 5), kl)])
        observed = constraint.observed(terms)
        assert [value.item() for value in observed] == [5 * kl, 5]
        assert constraint.adapted(start, *observed).item() == pytest.approx(factor, rel=1e-12)
    low = constraint.tensor(torch.device("cpu"), 0.51)
    assert constraint.adapted(low, torch.tensor(0.0), torch.tensor(5.0)).item() == 0.5
    assert Constraint(4.0, least=3.0).beta(0) == 3.0
    kl = torch.tensor([1.0, 4.0])
    assert torch.equal(constraint.penalty(kl, beta=2.0), 2 * kl)
    for wrong in ({"limit": 0.0}, {"limit": math.inf}, {"limit": 1.0, "rate": 0.0}, {"limit": 1.0, "least": 0.0}):
        with pytest.raises(UsageError, match=r"limit|rate|least"):
            Constraint(**wrong)


@pytest.mark.parametrize("beta", [4.0, 0.3])
def test_a_constraint_finds_the_beta_that_it_stands_for(beta: float) -> None:
    """The KL of a known beta as constraint: that beta is found from 1, and the KL is met to 2 %; both are recorded."""
    limit = kl_of(beta, rows())
    assert abs(limit / kl_of(1.0, rows()) - 1) > 0.2
    _, metrics = trained(Constraint(limit))
    assert metrics["kl"][-1] == pytest.approx(limit, rel=0.02)
    assert metrics["beta"][-1] == pytest.approx(beta, rel=0.1)
    assert metrics["validation_bound"][-1] == pytest.approx(metrics["reconstruction"][-1] - metrics["kl"][-1], abs=1e-9)


def test_a_constraint_that_is_not_active() -> None:
    """beta goes to its least, and the KL to that of it; with 1 as the least, training is the ELBO's to the last bit."""
    limit = 3 * kl_of(1e-3, rows())
    _, metrics = trained(Constraint(limit, rate=0.2), epochs=60)
    assert metrics["beta"][-1] == 1e-3
    assert max(metrics["kl"]) < limit
    (one, bounded), (other, plain) = (
        trained(beta, epochs=5, batch_size=7) for beta in (Constraint(limit, least=1.0), 1.0)
    )
    assert bounded["train_bound"] == plain["train_bound"]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    _, active = trained(Constraint(1e-3, least=1.0), epochs=5, batch_size=7)
    assert active["train_bound"] != plain["train_bound"]


def test_a_run_under_a_constraint_goes_on_to_the_same_bits(tmp_path) -> None:
    """Stopped within an epoch and resumed: weights, and beta of every epoch."""
    options = {"epochs": 4, "batch_size": 7}
    whole, wanted = trained(Constraint(0.5), **options)
    seen = iter(range(1, 100))
    trained(Constraint(0.5), directory=tmp_path, should_stop=lambda: next(seen) == 13, **options)
    again, metrics = trained(Constraint(0.5), directory=tmp_path, resume=True, **options)
    assert metrics["beta"] == wanted["beta"]
    assert len(set(metrics["beta"])) == 4
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(UsageError, match="patience: not used, since under a constraint the last epoch is kept"):
        trained(Constraint(0.5), patience=2)


def test_the_last_epoch_is_kept_though_the_bound_of_an_earlier_one_is_greater() -> None:
    """From the greatest ELBO on, a tight constraint can only lower it; what is kept meets the constraint."""
    vae, _ = trained(1.0, epochs=100)
    result = fit(
        vae.model, vae.guide, rows(), ELBO(beta=Constraint(1e-3, rate=1.0)), validation=rows(), epochs=20,
        batch_size=60, compile="off", progress=False, optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )  # fmt: skip
    assert result.metrics["validation_bound"].idxmax() < 10
    assert result.best_epoch == 20
    prior = MultivariateNormal(torch.zeros(Z, dtype=torch.float64), torch.eye(Z, dtype=torch.float64))
    assert kl_divergence(vae.posterior(rows()), prior).mean().item() == pytest.approx(
        result.metrics["kl"].iloc[-1], rel=1e-9
    )


@pytest.mark.parametrize("how", [{"compiled": True}, {"particle_chunk": 2}, {"compiled": True, "particle_chunk": 2}])
def test_steps_compiled_and_in_chunks_adapt_alike(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an analytic KL, which no noise enters: the same beta after each of three steps, whatever takes them."""
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    betas = []
    for options in ({}, how):
        vae = pair()
        whole = Pair(vae.model, vae.guide)
        step = Step(
            ELBO(6, beta=Constraint(0.5)), whole, torch.optim.SGD(whole.trainable().values(), lr=0.0), **options
        )
        betas.append([step.beta.item() for number in range(3) if step(Batch(rows()), number) is not None])
        assert step.refused is None
        assert bool(step.codes) == ("compiled" in options)
    assert betas[0] == pytest.approx(betas[1], rel=1e-12)
    assert len({*betas[0], 1.0}) == 4


def test_processes_adapt_to_the_rows_of_all_of_them() -> None:
    """Two that have 40 and 20 rows, and one that has none, come to the beta of one that has all."""
    x, parted = rows(), []

    def step_of(together=None) -> Step:
        vae = pair()
        whole = Pair(vae.model, vae.guide)
        return Step(ELBO(beta=Constraint(0.5)), whole, torch.optim.SGD(whole.trainable().values()), together=together)

    def hear(vector: Tensor) -> Tensor:
        parted.append(vector.clone())
        return vector

    alone = step_of()
    alone(Batch(x), 0)
    step_of(hear)(Batch(x[40:]), 0)
    step_of(hear)(Batch(x[:1]), 0, absent=True)
    one = step_of(lambda vector: vector + sum(parted))
    one(Batch(x[:40]), 0)
    assert one.beta.item() == pytest.approx(alone.beta.item(), rel=1e-12)
    assert one.beta.item() != 1.0
    for p, q in zip(one.parameters, alone.parameters, strict=True):
        assert p.shape == q.shape


def test_a_step_on_a_device_that_is_not_waited_for() -> None:
    """What adapts beta waits for nothing, is in place, and leaves it alone once a number was not finite."""
    vae, x = pair(), rows()
    whole = Pair(vae.model, vae.guide)
    step = Step(ELBO(beta=Constraint(0.5)), whole, torch.optim.Adam(whole.trainable().values(), fused=True))
    step.deferred, step.optimizer.grad_scale, step.optimizer.found_inf = True, None, step.failed
    assert waits(trace(step.part(parts.Gradient), x, *step.settings(Batch(x), 0))) is None
    held = step.beta
    step(Batch(x), 0)
    before = held.item()
    assert before != 1.0
    step(Batch(x + 1e200), 0)
    step(Batch(x), 0)
    assert step.beta is held
    assert held.item() == before


def test_loops_of_ones_own_adapt_as_fit_does() -> None:
    """A torch loop over `objective(model, guide)`, for an analytic KL: beta after each step is that of `Step`."""
    x, objective, first, second = rows(), ELBO(beta=Constraint(0.5)), pair(), pair()
    loss = objective(first.model, first.guide)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    whole = Pair(second.model, second.guide)
    step = Step(ELBO(beta=Constraint(0.5)), whole, torch.optim.SGD(whole.trainable().values(), lr=0.0))
    for number in range(3):
        torch.manual_seed(number)
        value = loss(x)
        value.backward()
        optimizer.step()
        torch.manual_seed(number)
        assert step(Batch(x), number) == pytest.approx(value.item(), rel=1e-12)
        assert objective.taken.beta.item() == step.beta.item()
    assert objective.taken.beta.item() > 1
    assert objective == ELBO(beta=Constraint(0.5))


def test_the_command_line_has_it() -> None:
    recipe = Recipe(beta="constraint:12.50")
    assert recipe.beta == "constraint:12.5"
    assert build_objective(recipe) == ELBO(beta=Constraint(12.5))
    assert Recipe(**recipe.plain()) == recipe
    for wrong in ("constraint:0", "constraint:-1", "constraint:x", "constraint", "constraint:1:2"):
        with pytest.raises(UsageError, match=r"beta: expected a number of at least 0, .* or constraint:NATS, got"):
            Recipe(beta=wrong)
    with pytest.raises(UsageError, match="patience: not used, since under a constraint the last epoch is kept"):
        Recipe(beta="constraint:3", patience=5)
    with pytest.raises(UsageError, match="beta: not used"):
        Recipe(beta="constraint:3", elbo="iwae")
    assert IWAE(2).constraint is None
    assert ELBO(beta=Constant(2.0)).constraint is None


def test_what_a_run_says_of_its_constraint() -> None:
    """Not met on the validation rows by far; not active; and nothing where it is met."""
    vae, x = VAE(StandardNormal(2), Gaussian(MLP(2, D)), MeanFieldNormal(MLP(D), 2)).double(), rows()

    def notices(constraint: Constraint, epochs: int) -> str:
        options = {"validation": x, "batch_size": 20, "epochs": epochs, "progress": False}
        result = fit(vae.model, vae.guide, x, ELBO(beta=constraint), **options)
        return " ".join(result.notices)

    assert "is above the 0.001 that the constraint allows" in notices(Constraint(1e-3, rate=1e-6), 1)
    assert "KL <= 1e+06 nats is not active: beta is at its least, 0.5" in notices(Constraint(1e6, 1.0, least=0.5), 2)
    assert "constraint" not in notices(Constraint(1e6, rate=1e-6), 1)
