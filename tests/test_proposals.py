"""Other proposals than the guide: whatever is drawn from, the weights have the expectation p(x)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from test_log_marginal import GaussianPair
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import PROPOSALS as NAMED
from pyrovae.inference import log_marginal, to_inference_data, verdict
from pyrovae.inference.batch import Batch
from pyrovae.inference.gaussians import inflated
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import (
    FromGuide,
    FromPrior,
    Proposal,
    Sampler,
    Widened,
    density,
    draw_guide,
    pick,
    systematic,
)
from pyrovae.inference.tracing.draws import Compiled
from pyrovae.inference.weights import draw, log_mean_exp
from pyrovae.models import MLP, FullCovarianceNormal, HierarchicalVAE, LowRankNormal, MeanFieldNormal, StandardNormal
from pyrovae.models import Gaussian as GaussianLikelihood
from pyrovae.runs.comparison import Scored

X = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
PROPOSALS = [
    FromGuide(), FromPrior(), Widened(), Widened((1.0,), 0.3), Widened((2.0, 0.7), 0.0), Widened((1.5,), 0.01),
]  # fmt: skip


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_weights_have_the_expectation_p_of_x(proposal, k) -> None:
    """E mean w = p(x), for any number of draws at once; the guide is wider than the posterior, so errors are finite."""
    pair = GaussianPair(1.3)
    x = X.repeat(4000, 1).flatten()
    means = log_mean_exp(proposal(Pair(pair.model, pair.guide), Batch(x))(k)) - pair.log_prob(x)
    assert_mean(means.exp().view(4000, 3), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_every_draw_alone_is_one_of_the_mixture(share) -> None:
    """The draws are in random order: the expectation of the first weight is p(x), as is that of the last."""
    pair = GaussianPair(1.3)
    sample = Widened((1.0,), share)(Pair(pair.model, pair.guide), Batch(X))
    drawn = torch.stack([sample(5) for _ in range(2000)]) - pair.log_prob(X)
    for position in (0, 4):
        assert_mean(drawn[:, position].exp(), torch.ones(3, dtype=torch.float64))


def test_naive_sampling_is_the_mean_likelihood() -> None:
    """From the prior the weight is p(x|z), and worse than the guide's: the standard error says so."""
    pair = GaussianPair()
    torch.manual_seed(5)
    naive = FromPrior()(Pair(pair.model, pair.guide), Batch(X))(4)
    torch.manual_seed(5)
    z = torch.randn(4, 3, dtype=torch.float64)
    assert_close(naive, Normal(z, 1.0).log_prob(X), rtol=0, atol=1e-12)
    from_prior = log_marginal(pair.model, pair.guide, X, 1000, proposal=FromPrior(), seed=0)
    from_guide = log_marginal(pair.model, GaussianPair(1.2).guide, X, 1000, seed=0)
    assert (from_prior.standard_error > 1.5 * from_guide.standard_error).all()
    assert from_prior.estimator == "naive sampling from the prior"


def test_a_defensive_mixture_bounds_the_weights() -> None:
    """w <= p(x|z) / share <= max_z p(x|z) / share, however narrow the guide; without it the weights have no bound."""
    narrow = GaussianPair(0.3)
    most = math.log(1 / 0.25) + Normal(0.0, 1.0).log_prob(torch.zeros(())).item()
    torch.manual_seed(0)
    assert Widened((1.0,), 0.25)(Pair(narrow.model, narrow.guide), Batch(X))(4000).max() <= most + 1e-9
    assert FromGuide()(Pair(narrow.model, narrow.guide), Batch(X))(4000).max() > most
    for k in (1, 2, 3, 13):  # whatever number is drawn at once
        assert Widened((1.0,), 0.25)(Pair(narrow.model, narrow.guide), Batch(X.repeat(500)))(k).max() <= most + 1e-9


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_components_are_drawn_at_their_shares(k: int) -> None:
    """Each at k times its share, rounded up or down, on average exactly; rounded for each datum by itself."""
    shares = [0.45, 0.45, 0.1]
    counts = torch.stack([(systematic(shares, k, torch.zeros(5000)) == j).sum(0) for j in range(3)]).double()
    expected = k * torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
    assert ((counts - expected).abs() < 1).all()
    assert_mean(counts.T, expected.flatten())
    most = [min(k, math.floor(k * share) + 1) for share in shares]
    parts = [{"z": 100.0 * j + torch.arange(n).expand(5000, n).T} for j, n in enumerate(most)]
    values = pick(parts, systematic(shares, k, torch.zeros(5000)))["z"]
    assert all(len(set(row.tolist())) == k for row in values.T[:50]), "a draw was used twice"


def test_widths_that_are_the_same_are_one_after_the_other() -> None:
    pair = GaussianPair(1.3)
    assert_close(
        log_marginal(pair.model, pair.guide, X, 4000, proposal=Widened((1.0, 1.0)), seed=0).mean,
        pair.log_prob(X).mean().item(),
        rtol=0,
        atol=0.05,
    )


def test_widening_repairs_a_narrow_guide() -> None:
    """Half as wide as the posterior: k-hat is over the threshold with the guide, and under it with the mixture."""
    narrow, x = GaussianPair(0.5), torch.linspace(-3, 3, 60, dtype=torch.float64)
    before = log_marginal(narrow.model, narrow.guide, x, 2000, seed=1)
    after = log_marginal(narrow.model, narrow.guide, x, 2000, seed=1, proposal=Widened())
    assert before.over_threshold.double().mean() > 0.4
    assert after.over_threshold.double().mean() < 0.1
    assert ((after.estimate - narrow.log_prob(x)).abs() < 5 * after.standard_error).all()


def test_the_estimator_says_what_it_drew_from() -> None:
    pair = GaussianPair()
    assert log_marginal(pair.model, pair.guide, X, 40).estimator == "importance sampling from the guide"
    widened = log_marginal(pair.model, pair.guide, X, 40, proposal=Widened((1.0, 2.0), 0.2))
    assert widened.estimator == "importance sampling from the widened guide (scales 1, 2; 0.2 from the prior)"


@pytest.mark.parametrize(
    "q",
    [
        dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1),
        dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.7], [0.7, 1.0]])),
        dist.LowRankMultivariateNormal(torch.ones(2), torch.tensor([[0.5], [1.0]]), torch.tensor([0.3, 0.4])),
        dist.Normal(torch.zeros(()), 1.0).expand([2]).to_event(1),
    ],
    ids=lambda q: type(q).__name__,
)
def test_inflated_gaussians_have_the_mean_and_c_squared_times_the_covariance(q) -> None:
    wide = inflated(q, 1.5)
    assert_close(wide.mean, q.mean)
    assert_close(wide.variance, 2.25 * q.variance)
    if hasattr(q, "covariance_matrix"):
        assert_close(wide.covariance_matrix, 2.25 * q.covariance_matrix)


def test_a_transformed_gaussian_is_widened_before_its_transform() -> None:
    wide = inflated(dist.LogNormal(torch.tensor(1.0), torch.tensor(0.5)), 2.0)
    assert_close(wide.log_prob(torch.tensor(3.0)), dist.LogNormal(1.0, 1.0).log_prob(torch.tensor(3.0)))


@pytest.mark.parametrize("guide", [MeanFieldNormal, FullCovarianceNormal, LowRankNormal])
def test_shipped_guides_of_two_layers(guide) -> None:
    """Every latent site is widened, given the widened one above; the weights stay unbiased against the guide's own."""
    torch.manual_seed(0)
    guides = [guide(MLP((3,), hidden=[4]), 2), guide(MLP(2, hidden=[4]), 2)]
    likelihood = GaussianLikelihood(MLP(2, (3,), hidden=[4]), scale=1.0)
    vae = HierarchicalVAE(StandardNormal(2), [MeanFieldNormal(MLP(2, hidden=[4]), 2)], likelihood, guides).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    pair = Pair(vae.model, vae.guide)
    values = draw_guide(pair, Batch(x), 6)
    assert_close(density(pair, Batch(x), values), draw(pair, Batch(x), 6, values).log_guide)
    estimates = [log_marginal(vae.model, vae.guide, x, 20_000, proposal=p, seed=3) for p in (FromGuide(), Widened())]
    error = torch.hypot(*(e.standard_error for e in estimates))
    assert ((estimates[0].estimate - estimates[1].estimate).abs() < 5 * error).all()


def test_a_latent_that_is_no_gaussian_is_named() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.sigmoid(x)))

    with pytest.raises(PairError, match=r"'z': Bernoulli cannot be widened.*Widened\(scales=\(1,\)\)"):
        log_marginal(model, guide, X, 40, proposal=Widened())
    truth = torch.logaddexp(Normal(0.0, 1.0).log_prob(X) + math.log(0.7), Normal(1.0, 1.0).log_prob(X) + math.log(0.3))
    for proposal in (Widened((1.0,)), FromPrior()):
        result = log_marginal(model, guide, X, 4000, proposal=proposal, seed=0)
        assert ((result.estimate - truth).abs() < 5 * result.standard_error).all()


def test_an_auxiliary_site_is_named() -> None:
    pair = GaussianPair()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a, 1.0))

    with pytest.raises(PairError, match=r"site 'a' is auxiliary.*Widened\(share=0\)"):
        Widened((1.0,))(Pair(pair.model, guide), Batch(X))(40)


@pytest.mark.parametrize(
    "bad",
    [{"scales": ()}, {"scales": (0.0,)}, {"scales": (math.nan,)}, {"scales": 1.5}, {"share": 1.0}, {"share": "a"}],
)
def test_bad_settings_are_refused_by_name(bad) -> None:
    with pytest.raises(UsageError, match=rf"^{next(iter(bad))}: expected"):
        Widened(**bad)


@pytest.mark.parametrize("bad", ["guide", Widened, None])
def test_what_is_no_proposal_is_refused(bad) -> None:
    with pytest.raises(UsageError, match=r"^proposal: expected an object such as Widened\(\)"):
        log_marginal(GaussianPair().model, GaussianPair().guide, X, 10, proposal=bad)


class Lookalike(Proposal):
    """A stranger's proposal, called as the guide is, that draws from something wider."""

    name = FromGuide.name + ", nearly"

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        return Widened((2.0,), 0.0)(pair, batch)


def test_the_mean_log_weight_is_an_elbo_where_the_draws_are_the_guides() -> None:
    """By what a proposal says of itself, not by what it is called: of other draws the mean is lower or higher."""
    pair = GaussianPair(1.2)
    proposals = [FromGuide(), Compiled(), Widened(), Compiled(Widened()), FromPrior(), Lookalike()]
    results = [log_marginal(pair.model, pair.guide, X, 40, proposal=p, seed=0) for p in proposals]
    assert [result.of_guide for result in results] == [True, True, False, False, False, False]
    told = [Scored("a run", [result]).elbo for result in results]
    assert told == [results[0].elbo.mean(), pytest.approx(results[1].elbo.mean().item()), None, None, None, None]


def test_latents_are_drawn_from_what_is_a_guide() -> None:
    pair = GaussianPair(1.2)
    assert [p.word for p in NAMED if p.has_guide] == ["guide", "individual"]
    for proposal in (Widened(), FromPrior(), Lookalike()):
        with pytest.raises(
            UsageError, match=r"^proposal: expected FromGuide or Individual, whose latents can be drawn"
        ):
            to_inference_data(pair.model, pair.guide, X, 5, 10, proposal=proposal)


def test_what_a_proposal_says_of_itself_decides_what_is_done_with_it() -> None:
    """Chains are not tried on simulated data, as other draws are; what is more than tensors is not compiled."""

    class Chains(Lookalike):
        of_chains = True

    pair = GaussianPair(1.05)
    checked, unchecked = (log_marginal(pair.model, pair.guide, X, 200, proposal=p) for p in (Lookalike(), Chains()))
    assert "simulated data the sandwich is" in verdict(checked).reason
    assert "nothing was tried on simulated data" in verdict(unchecked).reason
    with pytest.raises(UsageError, match=r"Lookalike.*more than tensor operations"):
        Compiled(Lookalike())
