"""Topic models: multinomials and simplexes by sums, quadrature and closed forms, and topics that are known."""

import itertools
import math

import pytest
import torch
from conftest import EXACT, SOLVED, assert_mean
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.testing import assert_close

from pyrovae.data import load_data
from pyrovae.data.sources import find_source
from pyrovae.errors import DataError, UsageError
from pyrovae.inference import ELBO, adam, fit, log_marginal
from pyrovae.models import (
    MLP,
    VAE,
    DirichletGuide,
    DirichletPrior,
    LogCounts,
    LogisticNormalGuide,
    LogisticNormalPrior,
    MeanFieldNormal,
    Multinomial,
    StandardNormal,
    Topics,
)
from pyrovae.models.simplex import Shares
from pyrovae.models.topics import log_orders

PAIRS = pytest.mark.parametrize(
    ("prior", "guide"), [(LogisticNormalPrior, LogisticNormalGuide), (DirichletPrior, DirichletGuide)]
)


def pair(prior: type, guide: type, topics: int, words: int, **settings) -> VAE:
    view = LogCounts((words,))
    encoder = MLP(words, **{"hidden": (16,), **settings}).seeing(view)
    return VAE(prior(topics), Topics(MLP(topics, words, hidden=())), guide(encoder, topics))


@pytest.mark.parametrize("cls", [Multinomial, Topics])
def test_a_multinomial_sums_to_1_over_all_documents_of_a_length(cls: type) -> None:
    likelihood = cls(MLP(3, 4, hidden=(5,))).double()
    z = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], dtype=torch.float64)
    for total in (0, 1, 5):
        every = [c for c in itertools.product(range(total + 1), repeat=4) if sum(c) == total]
        x = torch.tensor(every).double().unsqueeze(1)
        assert_close(likelihood(z).log_prob(x).logsumexp(0), torch.zeros(2).double(), **EXACT)
        orders = [math.factorial(total) // math.prod(map(math.factorial, c)) for c in every]
        assert_close(log_orders(x[:, 0]).exp(), torch.tensor(orders).double(), **SOLVED)
    likelihood.total.fill_(7)
    draws = likelihood(z).sample((4000,))
    assert (draws.sum(-1) == 7).all()
    assert_mean(draws, likelihood(z).mean, least=0.15)


def test_topics_are_mixed_and_a_multinomial_is_a_product() -> None:
    """p(w) = sum_k z_k b_k, against p(w) proportional to prod_k b_k^z_k."""
    decoder, z = MLP(3, 5, hidden=()).double(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    topics = Topics(decoder)
    assert_close(
        topics(z).log_probs.exp(), sum(share * b for share, b in zip(z, topics.topics(), strict=True)), **EXACT
    )
    linear = decoder.body[1]
    with torch.no_grad():
        linear.bias.zero_()
    product = sum(share * b.log() for share, b in zip(z, topics.topics(), strict=True)).softmax(-1)
    assert_close(Multinomial(decoder)(z).log_probs.exp(), product, **EXACT)


@PAIRS
def test_log_p_is_an_integral_over_the_simplex(prior: type, guide: type) -> None:
    """Two topics: log int p(z) p(x|z) dz by a fine grid in log z_1 / z_2; documents of 0 to 9 words."""
    torch.manual_seed(3)
    model = pair(prior, guide, 2, 3).double()
    with torch.no_grad():  # as wide as the prior, or wider
        model.guides[0].head.weight.mul_(0.1)
        model.guides[0].head.bias[2:].fill_(3.0)
    x = torch.tensor([[0, 0, 0], [1, 0, 0], [4, 3, 2], [0, 9, 0]]).double()
    ratio = torch.linspace(-60, 60, 200_001).double()
    z = torch.stack([ratio.sigmoid(), (-ratio).sigmoid()], -1)
    log_p = model.prior().log_prob(z) + z.log().sum(-1)  # of the ratio
    assert torch.trapezoid(log_p.exp(), ratio).item() == pytest.approx(1, abs=1e-6)
    joint = log_p + torch.stack([model.likelihood(z).log_prob(row) for row in x])
    truth = torch.trapezoid(joint.exp(), ratio).log()
    found = log_marginal(model.model, model.guide, x, 20_000, seed=1)
    assert found.estimate[0].abs() < 5 * found.standard_error[0] + 1e-9
    assert ((found.estimate - truth).abs() < 5 * found.standard_error + 1e-9).all()
    assert (found.standard_error < 0.05).all()


def test_the_logistic_normal_is_the_softmax_of_independent_gaussians() -> None:
    """Its density is that of its draws, and the Jacobian of shares by log-ratios is autograd's."""
    v = torch.randn(3, 4).double()
    shares = Shares()
    for row in v:
        jacobian = torch.autograd.functional.jacobian(shares, row)[:-1]
        wanted = torch.linalg.slogdet(jacobian).logabsdet
        assert_close(shares.log_abs_det_jacobian(row, shares(row)), wanted, **SOLVED)
    assert_close(shares.inv(shares(v)), v, **SOLVED)
    prior = LogisticNormalPrior(3, scale=0.8).double()
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([0.5, -0.2, 0.1]))
    u = prior.loc.detach() + 0.8 * torch.randn(40_000, 3).double()
    assert_mean(prior().sample((40_000,)) - u.softmax(-1), 0.0, least=0.02)


@pytest.mark.parametrize("guide", [LogisticNormalGuide, DirichletGuide])
def test_shares_are_reparameterised(guide: type) -> None:
    """d E z / d parameters by draws is that of the exact mean, of a Dirichlet, and of differences of means else."""
    torch.manual_seed(5)
    q_of = guide(MLP(2, hidden=(3,)), 3).double()
    x = torch.randn(2).double()
    bias = q_of.head.bias
    draws = q_of(x.expand(20_000, 2)).rsample()
    (slope,) = torch.autograd.grad(draws[:, 0].mean(), bias)
    step = 0.05 * torch.eye(len(bias)).double()
    for i, move in enumerate(step):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                bias.add_(sign * move)
                torch.manual_seed(7)
                ends.append(q_of(x.expand(200_000, 2)).sample()[:, 0].mean())
                bias.sub_(sign * move)
        assert slope[i] == pytest.approx(((ends[0] - ends[1]) / 0.1).item(), abs=0.03)


def test_shares_that_underflow_are_none_that_are_zero() -> None:
    prior = DirichletPrior(4, concentration=0.005)
    z = prior().sample((500,))
    assert (z > 0).all()
    assert prior().log_prob(z).isfinite().all()


def recovered(topics: Tensor, truth: Tensor) -> Tensor:
    """Total variation between each true topic and the one that is matched with it."""
    apart = (topics.unsqueeze(1) - truth).abs().sum(-1) / 2
    return apart[linear_sum_assignment(apart.detach().numpy())].detach()


@PAIRS
def test_known_topics_are_recovered(prior: type, guide: type) -> None:
    """Four topics of three words each, of twelve: each learned topic is one of them."""
    torch.manual_seed(0)
    truth = torch.eye(4).repeat_interleave(3, 1) / 3
    shares = torch.distributions.Dirichlet(torch.full((4,), 0.4)).sample((600,))
    x = torch.distributions.Multinomial(60, probs=shares @ truth).sample()
    model = pair(prior, guide, 4, 12)
    model.initialise(x)
    settings = {"epochs": 25, "batch_size": 50, "progress": False, "compile": "off"}
    fit(model.model, model.guide, x, ELBO(), optimizer=lambda p: adam(p, lr=0.02), **settings)
    assert (recovered(model.likelihood.topics(), truth) < 0.1).all()


def test_what_does_not_go_together_is_refused() -> None:
    topics, encoder = Topics(MLP(3, 5, hidden=())), MLP(5, hidden=(4,))
    with pytest.raises(UsageError, match="Topics takes points of a simplex, MeanFieldNormal is a distribution of real"):
        VAE(StandardNormal(3), topics, MeanFieldNormal(encoder, 3))
    with pytest.raises(UsageError, match="a distribution of points of a simplex, MeanFieldNormal one of real numbers"):
        VAE(LogisticNormalPrior(3), topics, MeanFieldNormal(encoder, 3))
    with pytest.raises(UsageError, match="expected at least 2 shares, got 1"):
        DirichletPrior(1)
    with pytest.raises(DataError, match="likelihood of counts"):
        topics.check_support(torch.tensor([[0.5, 1, 1, 1, 1]]))
    with pytest.raises(DataError, match="documents are rows of counts of words"):
        load_data("digits").rows("documents")


def test_bars_are_documents_of_ten_topics() -> None:
    data = load_data("bars")
    assert data.columns[:6] == ("r1c1", "r1c2", "r1c3", "r1c4", "r1c5", "r2c1")
    x = data.rows("documents").test
    assert (x.sum(1) == 100).all()
    topics = torch.from_numpy(find_source("bars").topics())
    assert_close(topics.sum(1), torch.ones(10).double())
    assert_mean(data.train, torch.full((25,), 4.0), least=0.6)
