"""Discrete latents summed out: what is exact equals brute force, whatever way it is written and summed."""

import itertools
import math
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import (
    Compiled,
    FromGuide,
    FromPrior,
    LogMarginal,
    log_marginal,
    sandwich,
    simulated,
    to_inference_data,
    verdict,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import Summation, summation
from pyrovae.inference.pair import Pair
from pyrovae.models import MLP, VAE, Bernoulli, BernoulliGuide, GaussianMixture, IndependentBernoulli
from pyrovae.runs.scoring import Scoring, score

ROUNDING = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def no_guide(x: Tensor) -> None:
    """As Pyro's users write it for `TraceEnum_ELBO`, where all latents are enumerated."""


def of(model: Callable, x: Tensor, guide: Callable = no_guide, k: int = 5000, most: int = 2**16) -> Summation:
    """How a pair is summed."""
    return summation(Pair(model, guide), Batch.of(x), k, most)


# ---------------------------------------------------------------------------------------------------------------------
# Everything is discrete: exact


def test_a_mixture_as_a_pyro_program_equals_the_exact_baseline() -> None:
    x = torch.randn(50, 3)
    mixture = GaussianMixture(3, components=4).double()
    mixture.initialise(x)
    result = log_marginal(mixture.model, no_guide, x)
    assert_close(result.estimate, mixture.log_prob(x).detach(), **ROUNDING)
    assert_is_exact(result, "as a sum over 4 joint states of c")


def assert_is_exact(result: LogMarginal, how: str) -> None:
    """It is exact, and says how."""
    assert str(verdict(result)) == f"exact: log p(x) {how}"
    assert result.monte_carlo_error == 0
    assert result.excess() == 0


LOGITS = torch.linspace(-1, 1, 8, dtype=torch.float64)
WEIGHTS = 3 * torch.sin(torch.arange(40, dtype=torch.float64)).reshape(8, 5)


def belief_net(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=LOGITS).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ WEIGHTS).to_event(1), obs=x)


def bernoulli_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=x @ WEIGHTS.T / 3).to_event(1))


def belief_net_by_brute_force(x: Tensor) -> Tensor:
    """log p(x) by a loop over all states."""
    terms = []
    for state in itertools.product([0.0, 1.0], repeat=8):
        z = torch.tensor(state)
        prior = dist.Bernoulli(logits=LOGITS).log_prob(z).sum()
        terms.append(prior + dist.Bernoulli(logits=z @ WEIGHTS).log_prob(x).sum(-1))
    return torch.logsumexp(torch.stack(terms), 0)


@pytest.mark.parametrize("guide", [no_guide, bernoulli_guide, config_enumerate(bernoulli_guide)])
def test_eight_bernoulli_latents_equal_brute_force(guide, monkeypatch) -> None:
    """With a guide or without, in chunks of memory too; drawn where that is asked for, in agreement with the sum."""
    x = (torch.rand(30, 5) < 0.5).double()
    truth = belief_net_by_brute_force(x)
    result = log_marginal(belief_net, guide, x)
    assert_close(result.estimate, truth, **ROUNDING)
    assert_is_exact(result, "as a sum over 256 joint states of z")
    monkeypatch.setattr("pyrovae.inference.enumeration.ELEMENTS_AT_ONCE", 5 * 30 * 7)
    assert_close(log_marginal(belief_net, guide, x).estimate, truth, **ROUNDING)
    drawn = log_marginal(belief_net, guide, x, 500, most_states=255, seed=0)
    assert "drawn, not summed out: z: 256 joint states" in drawn.estimator
    assert "most_states = 255" in drawn.estimator
    assert_mean((drawn.estimate - truth).exp(), 1.0)
    assert log_marginal(belief_net, guide, x, 500, proposal=FromPrior()).num_particles == 500


STEPS, HIDDEN = 15, 3
START = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
CHANGE = torch.tensor([[0.8, 0.2, 0], [0.1, 0.6, 0.3], [0.3, 0, 0.7]], dtype=torch.float64)
MEANS = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)


def chain(steps: Callable = pyro.markov, lengths: bool = False) -> Callable:
    """A hidden Markov model whose sites are in one plate over the rows; with masks after the end of a sequence."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = None
            for t in steps(range(STEPS)):
                ends = x[..., -1] if lengths else x.new_full((len(x),), STEPS)
                with poutine.mask(mask=t < ends):
                    z = pyro.sample(f"z{t}", dist.Categorical(START if z is None else CHANGE[z]))
                    pyro.sample(f"x{t}", dist.Normal(MEANS[z], 1.0), obs=x[..., t])

    return model


def forwards(x: Tensor, ends: Tensor) -> Tensor:
    """log p(x) of the hidden Markov model by the forward algorithm."""
    log_alpha = START.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, :1])
    for t in range(1, STEPS):
        after = torch.logsumexp(log_alpha[:, :, None] + CHANGE.log(), 1)
        after = after + dist.Normal(MEANS, 1.0).log_prob(x[:, t : t + 1])
        log_alpha = torch.where((t < ends)[:, None], after, log_alpha)
    return torch.logsumexp(log_alpha, -1)


@pytest.mark.parametrize("steps", [pyro.markov, list], ids=["pyro.markov", "a plain loop"])
def test_a_hidden_markov_model_equals_the_forward_algorithm_at_its_price(steps) -> None:
    """Of 3^15 joint states no more than those of two sites are ever held at once."""
    x = 2 * torch.randn(20, STEPS)
    sums = of(chain(steps), x)
    assert sums.joint.count == 3**15
    assert sums.model is not None
    assert sums.model.factorised
    assert sums.model.width == 9
    result = log_marginal(chain(steps), no_guide, x, most_states=9)
    assert_close(result.estimate, forwards(x, torch.full((20,), STEPS)), **ROUNDING)
    assert result.exact_as.endswith("factorised: at most 9 at once")


def test_sequences_of_different_lengths_end_where_their_mask_does() -> None:
    """A masked state is no latent of its row: summed out, it leaves a factor of 1 and not of 3."""
    x = torch.cat([2 * torch.randn(20, STEPS), torch.randint(1, STEPS + 1, (20, 1)).double()], 1)
    result = log_marginal(chain(lengths=True), no_guide, x)
    assert_close(result.estimate, forwards(x, x[:, -1]), **ROUNDING)


def two_sites(front: bool) -> Callable:
    """Two categorical sites, one of which a program uses in a way that is right for particles alone."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.ones(4)))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.8])))
            if front:  # the states of another site take the first dimension, where this looks for particles
                a = a.reshape(a.shape[0], *b.shape[1:]) if a.ndim == b.ndim else a.sum(0) * torch.ones_like(b)
            pyro.sample("x", dist.Normal(MEANS[a.long() % 3] + b, 1.0), obs=x)

    return model


@pytest.mark.parametrize("front", [False, True])
def test_the_product_takes_over_where_a_program_is_not_for_more_dimensions(front) -> None:
    x = torch.randn(10)
    sums = of(two_sites(front), x)
    assert sums.model is not None
    assert sums.model.factorised is not front or sums.model.width == 8
    terms = [
        math.log(p / 4) + dist.Normal(MEANS[a % 3] + b, 1.0).log_prob(x)
        for a in range(4)
        for b, p in ((0, 0.2), (1, 0.8))
    ]
    truth = torch.logsumexp(torch.stack(terms), 0)
    assert_close(log_marginal(two_sites(front), no_guide, x).estimate, truth, **ROUNDING)


def test_impossible_rows_stay_impossible() -> None:
    """A sum of zeros is zero: -inf, an invalid estimate, and not a very small number."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.5, 0.5])))
            b = pyro.sample("b", dist.Categorical(logits=torch.eye(2)[a].log()))
            pyro.sample("x", dist.Categorical(logits=torch.eye(3)[a + b].log()), obs=x)

    result = log_marginal(model, no_guide, torch.tensor([0, 1, 2]))
    assert_close(result.estimate, torch.tensor([math.log(0.5), -math.inf, math.log(0.5)]), **ROUNDING)
    assert verdict(result).kind == "invalid"


@pytest.mark.parametrize(
    "prior",
    [
        dist.OneHotCategorical(START),
        dist.Categorical(CHANGE[:, :2]).to_event(1),
        dist.Binomial(4, START[0]),
        dist.OneHotCategorical(CHANGE[:2]).to_event(1),
        dist.Bernoulli(CHANGE[:2]).to_event(2),
    ],
    ids=["one-hot", "categories", "binomial", "matrix", "Bernoulli matrix"],
)
def test_states_of_any_shape(prior) -> None:
    """p(x) of x ~ N(sum of z, 1) integrates to 1: every state once, with its probability."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            steps = torch.arange(1.0, 1 + prior.event_shape.numel()).reshape(prior.event_shape)
            inner = (steps * z).flatten(z.ndim - len(prior.event_shape)).sum(-1) if prior.event_shape else z
            pyro.sample("x", dist.Normal(inner.double(), 1.0), obs=x)

    x = torch.linspace(-10, 40, 500)
    assert_close(torch.trapezoid(log_marginal(model, no_guide, x).estimate.exp(), x).item(), 1.0, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Some latents are drawn


def labelled(x: Tensor) -> None:
    """y ~ Cat, z|y ~ N, x|y, z ~ N: p(x) is a mixture of three Gaussians."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.Normal(MEANS[y], 0.5))
        pyro.sample("x", dist.Normal(z + y, 0.7), obs=x)


def log_p_labelled(x: Tensor) -> Tensor:
    centre, sd = MEANS + torch.arange(3), math.hypot(0.5, 0.7)
    return torch.logsumexp(torch.tensor([0.2, 0.5, 0.3]).log() + dist.Normal(centre, sd).log_prob(x[:, None]), -1)


def of_both(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=torch.stack([-x, 0 * x, x], -1)))
        pyro.sample("z", dist.Normal((x + MEANS[y]) / 2, 1.5))


def of_z(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.5))


@pytest.mark.parametrize("guide", [of_both, of_z])
def test_other_latents_are_drawn_and_their_weights_summed(guide) -> None:
    """E w = p(x) still, and no weight of the drawn label is left in their variance."""
    x = torch.linspace(-3, 5, 200)
    result = log_marginal(labelled, guide, x, 500, seed=1)
    assert result.estimator.endswith("each weight a sum over 3 joint states of y")
    assert result.num_particles == 500
    assert_mean((result.estimate - log_p_labelled(x)).exp(), 1.0)
    drawn = log_marginal(labelled, guide, x, 500, seed=1, most_states=0)
    assert_mean((drawn.estimate - log_p_labelled(x)).exp(), 1.0)
    assert result.standard_error.mean() < 0.7 * drawn.standard_error.mean()
    assert verdict(result).kind == "ok"


def test_a_weight_is_the_mean_of_those_of_all_states() -> None:
    """w(z) = E [w(y, z) | z] under the guide, by a loop over y."""
    x, z = torch.randn(4), torch.randn(1, 4)
    sums = of(labelled, x, of_both)
    assert sums.model is not None
    assert sums.guide is not None
    p, q = [], []
    for y in range(3):
        at = {"y": torch.full((1, 4), y), "z": z}
        for program, terms in ((labelled, p), (of_both, q)):
            trace = poutine.trace(poutine.condition(program, at)).get_trace(x)
            trace.compute_log_prob()
            terms.append(sum(s["log_prob"] for s in trace.nodes.values() if "log_prob" in s and s["name"] != "data"))
    wanted = torch.logsumexp(torch.stack(p), 0) - torch.logsumexp(torch.stack(q), 0)
    got = sums.model(Batch.of(x), {"z": z}, 1) - sums.guide(Batch.of(x), {"z": z}, 1)
    assert_close(got, wanted.reshape(1, 4), **ROUNDING)


def test_the_check_on_simulated_data_is_of_the_summed_weights() -> None:
    """A guide that forgets states of y, but not of z, has them back by the sum; one that forgets z's has not."""

    def forgets(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor([1 - 2e-6, 1e-6, 1e-6])))
            pyro.sample("z", dist.Normal(x / 2, 1.5))

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(-2 + 0 * x, 0.5))

    x = torch.linspace(-3, 5, 100)
    assert verdict(log_marginal(labelled, forgets, x, 500)).kind == "ok"
    assert verdict(log_marginal(labelled, forgets, x, 500, most_states=0)).kind == "lower bound only"
    assert verdict(log_marginal(labelled, narrow, x, 500)).kind == "lower bound only"
    assert simulated(labelled, forgets, x, 100).width > 0.1


@pytest.mark.slow
def test_summed_weights_are_compiled_like_others() -> None:
    """Compiled, they are those of the pair on the same noise."""
    x = torch.linspace(-3, 5, 50)
    compiled = Compiled(FromGuide())
    fast, plain = (log_marginal(labelled, of_both, x, 300, proposal=p, seed=1) for p in (compiled, FromGuide()))
    assert compiled.computation()["compiled"]
    assert fast.estimator == plain.estimator
    assert_close(fast.estimate, plain.estimate, rtol=0, atol=1e-8)


def test_what_is_drawn_counts_against_the_limit() -> None:
    x = torch.randn(5)
    assert of(labelled, x, of_z, k=100, most=300).model is not None
    words = of(labelled, x, of_z, k=101, most=300).words
    assert words == "drawn, not summed out: y: 3 joint states (too many; most_states = 300, K = 101)"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_states_that_depend_on_other_sites_are_drawn() -> None:
    """The support of a second binomial ends at the first: no sum over the states of one draw would be right."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(3, torch.tensor(0.5)))
            m = pyro.sample("m", dist.Binomial(n, torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(3, torch.tensor(0.5)))
            pyro.sample("m", dist.Binomial(n, torch.tensor(0.5)))

    x = torch.randn(20)
    truth = torch.logsumexp(
        dist.Binomial(3, torch.tensor(0.25)).log_prob(torch.arange(4.0))
        + dist.Normal(torch.arange(4.0), 1.0).log_prob(x[:, None]),
        -1,
    )
    result = log_marginal(model, guide, x, 2000)
    assert result.num_particles == 2000
    assert_mean((result.estimate - truth).exp(), 1.0)
    with pytest.raises(PairError, match="model site 'm' is latent but not in the guide"):
        log_marginal(model, no_guide, x)


def test_rules_of_log_weights_hold_for_what_is_summed() -> None:
    def outside(x: Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    def scaled(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    def of_others(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(MEANS[c] + x.mean(), 1.0), obs=x)

    for model, message in (
        (outside, "site 'c' must be inside exactly one plate"),
        (scaled, "scaled by 2.0"),
        (of_others, "depends on the other rows"),
    ):
        with pytest.raises(PairError, match=message):
            log_marginal(model, no_guide, torch.randn(6))
    with pytest.raises(UsageError, match="most_states: expected"):
        log_marginal(belief_net, no_guide, torch.ones(2, 5), most_states=-1)


def test_a_model_without_discrete_latents_is_as_it_was() -> None:
    """Looking for them draws nothing from the caller's random state, and declares nothing."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    before = torch.get_rng_state()
    assert not of(model, torch.zeros(3), guide).joint
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store().keys())


# ---------------------------------------------------------------------------------------------------------------------
# What else is said of discrete latents


def test_probabilities_of_states_reach_arviz() -> None:
    """Exact where all states are particles: Bayes' rule by a loop; rows sum to 1, drawn ones agree, and it is saved."""
    x = (torch.rand(12, 5) < 0.5).double()
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    prior = dist.Bernoulli(logits=LOGITS).log_prob(states).sum(-1)
    likelihood = dist.Bernoulli(logits=states @ WEIGHTS).log_prob(x[:, None]).sum(-1)
    posterior = (prior + likelihood).softmax(-1) @ states
    exact = to_inference_data(belief_net, no_guide, x, 50, predictive=False)
    found = exact["state_probability"]["z"]
    assert found.dims == ("datum", "z_dim_0", "z_state")
    assert found.coords["z_state"].values.tolist() == [0, 1]
    assert_close(torch.from_numpy(found.values[..., 1].copy()), posterior, **ROUNDING)
    assert_close(torch.from_numpy(found.values.sum(-1)), torch.ones(12, 8), **ROUNDING)
    truth = belief_net_by_brute_force(x)
    assert_close(torch.from_numpy(exact["importance"]["log_marginal"].values), truth, **ROUNDING)
    assert exact.attrs["estimator"] == "exact: a sum over 256 joint states of z"
    drawn = to_inference_data(belief_net, bernoulli_guide, x, 50, 20_000, predictive=False, most_states=0)
    assert abs(drawn["state_probability"]["z"].values[..., 1] - posterior.numpy()).max() < 0.1
    assert "importance sampling" in drawn.attrs["estimator"]


def test_both_sides_of_a_sandwich_are_the_sum() -> None:
    """On data of the model, for the states that a guide forgets as for others, and without a guide."""
    check = sandwich(belief_net, no_guide, torch.zeros(40, 5), seed=0)
    assert_close(check.forward, belief_net_by_brute_force(check.x), **ROUNDING)
    assert (check.width, check.validated) == (0, True)
    assert check.x.std() > 0.3
    drawn = simulated(belief_net, no_guide, torch.zeros(40, 5), 200)  # from the prior
    assert drawn.most > 0
    assert (drawn.upper - drawn.lower).mean() > -5 * drawn.error


def test_a_mixed_pair_s_states_are_those_of_its_draws() -> None:
    """p(y | x) of the labelled pair in closed form, from weighted draws of y and z."""
    x = torch.linspace(-3, 5, 9)
    found = to_inference_data(labelled, of_both, x, 10, 20_000, predictive=False)["state_probability"]["y"]
    assert found.dims == ("datum", "y_state")
    log_p = torch.tensor([0.2, 0.5, 0.3]).log()
    log_p = log_p + dist.Normal(MEANS + torch.arange(3), math.hypot(0.5, 0.7)).log_prob(x[:, None])
    assert abs(found.values - log_p.softmax(-1).numpy()).max() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# What a command says


def test_a_run_s_scores_say_what_is_done_before_it_is_done() -> None:
    """An exact sum is called one, and no other proposal than the guide is ignored in silence."""
    vae = VAE(IndependentBernoulli(4), Bernoulli(MLP(4, 3)), BernoulliGuide(MLP(3), 4))
    batch, said = Batch.of(torch.eye(3)), []
    result = score(vae, batch, Scoring(50), say=said.append)
    assert said == ["log p(x) as a sum over 16 joint states of z, exact: 3 rows"]
    assert_is_exact(result, "as a sum over 16 joint states of z")
    with pytest.raises(
        UsageError, match=r"^proposal: naive .* is not used, since .* an exact sum over z; .*most_states=0"
    ):
        score(vae, batch, Scoring(50, proposal=FromPrior()))
    drawn = score(vae, batch, Scoring(5000, proposal=FromPrior(), most_states=0), say=said.append)
    assert said[1].startswith("log p(x) by naive sampling from the prior, K = 5000")
    assert ((drawn.estimate - result.estimate).abs() < 5 * drawn.standard_error).all()
    score(vae, batch, Scoring(50, most_states=5), say=said.append)
    assert said[2].startswith("log p(x) by importance sampling from the guide, K = 50")
