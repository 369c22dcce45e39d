"""Pairs whose rows are seen in part, where the answer is known: the linear Gaussian model is probabilistic PCA."""

import math

import pyro
import pytest
import torch
from conftest import assert_mean
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import (
    IWAE,
    FromGuide,
    Individual,
    fit,
    impute,
    log_marginal,
    log_prob_missing,
    log_weights,
    verdict,
)
from pyrovae.models import (
    MLP,
    PPCA,
    VAE,
    Bernoulli,
    ConditionalVAE,
    FullCovarianceNormal,
    Gaussian,
    HierarchicalVAE,
    Masked,
    MeanFieldNormal,
    Network,
    StandardNormal,
    UnconditionalPrior,
)

D, Q = 5, 2
SEEN = torch.tensor([True, False, True, True, False])


def linear() -> tuple[VAE, PPCA]:
    """A linear Gaussian pair, with the exact guide of whole rows, and the same model with its closed form."""
    ppca = PPCA(D, Q).double()
    with torch.no_grad():
        ppca.weight.copy_(torch.randn(D, Q) + 0.5)
        ppca.loc.copy_(torch.randn(D))
        ppca.log_scale.fill_(math.log(0.6))
        guide = FullCovarianceNormal(Network(nn.Identity(), D, D), Q)
        vae = VAE(StandardNormal(Q), Gaussian(Network(nn.Linear(Q, D), Q, D), scale=0.6), guide).double()
        vae.likelihood.decoder.body.weight.copy_(ppca.weight)
        vae.likelihood.decoder.body.bias.copy_(ppca.loc)
        precision = ppca.weight.T @ ppca.weight / 0.36 + torch.eye(Q)
        gain = torch.linalg.solve(precision, ppca.weight.T) / 0.36
        factor = torch.linalg.cholesky(torch.linalg.inv(precision))
        guide.head.weight.zero_()
        guide.head.weight[:Q] = gain
        guide.head.bias[:Q] = -gain @ ppca.loc
        guide.head.bias[Q : 2 * Q] = factor.diagonal().expm1().log()
        guide.head.bias[2 * Q :] = factor[guide.rows, guide.columns]
    return vae, ppca


def test_the_guide_is_exact_for_whole_rows_and_the_masked_pair_is_the_pair() -> None:
    vae, ppca = linear()
    x = ppca.sample(6)
    masked = Masked(vae, ppca.loc.detach())
    whole = torch.ones(6, D, dtype=torch.bool)
    exact = ppca.log_prob(x).expand(3, 6)
    assert_close(log_weights(vae.model, vae.guide, x, 3), exact, rtol=0, atol=1e-4)
    assert_close(log_weights(masked.model, masked.guide, x, 3, given=(whole,)), exact, rtol=0, atol=1e-4)


def test_log_p_of_the_seen_part_is_the_closed_form() -> None:
    """Within 5 standard errors, row by row; each row has a mask of its own, and what is missing is not looked at."""
    vae, ppca = linear()
    x = ppca.sample(20)
    seen = torch.rand(20, D) < 0.6
    masked = Masked(vae, ppca.loc.detach())
    hidden = x.where(seen, 7.0)
    found = log_marginal(masked.model, masked.guide, hidden, 5000, proposal=Individual(), given=(seen,), seed=0)
    wanted = ppca.log_prob_seen(x, seen)
    assert ((found.estimate - wanted).abs() <= 5 * found.standard_error + 1e-4).all()
    whole = log_marginal(vae.model, vae.guide, x, 10, seed=0)
    missing = log_prob_missing(whole, found)
    assert ((missing.values - ppca.log_prob_missing(x, seen)).abs() <= 5 * missing.errors + 1e-3).all()
    assert verdict(found).kind == "ok"


def test_a_guide_of_whole_rows_is_poor_on_filled_ones_and_a_fitted_gaussian_is_not() -> None:
    """The posterior given two of five elements is wider than that of all five, which the guide goes on to claim.

    Its log p(x_seen) is too low, and its verdict says so.
    """
    vae, ppca = linear()
    x, seen = ppca.sample(40), torch.tensor([True, False, False, True, False])
    masked = Masked(vae, ppca.loc.detach())
    sizes = [impute(masked.model, masked.guide, x, seen, 1, 1000, proposal=p).ess for p in (Individual(), FromGuide())]
    assert sizes[0].min() > 900
    assert sizes[1].median() < 100
    found = log_marginal(masked.model, masked.guide, x, 1000, given=(seen.expand(x.shape),), seed=0)
    assert (found.estimate - ppca.log_prob_seen(x, seen)).mean() < -0.1
    assert verdict(found).kind == "lower bound only"


def test_imputed_elements_are_those_of_the_closed_form() -> None:
    vae, ppca = linear()
    x = ppca.sample(3)
    masked = Masked(vae, ppca.loc.detach())
    found = impute(masked.model, masked.guide, x, SEEN, 5000, 5000)
    assert torch.equal(found.draws[..., SEEN], x[:, SEEN].expand(5000, -1, -1))
    assert_close(found.mean, ppca.impute(x, SEEN, mean=True)[0], rtol=0, atol=0.05)
    given = ppca.conditional(x, SEEN).missing
    assert_mean(found.draws[..., ~SEEN], given.mean.detach())
    assert_close(found.draws[..., ~SEEN].var(0), given.variance.detach(), rtol=0.1, atol=0)


def test_the_mean_is_weighted() -> None:
    """Drawn from the prior, which knows nothing of x, it is by the weights alone that the mean is that given x_seen."""
    vae, ppca = linear()

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.prior())

    x = ppca.sample(3)
    masked = Masked(vae, ppca.loc.detach(), prior)
    found = impute(masked.model, masked.guide, x, SEEN, 1, 20_000, proposal=FromGuide())
    assert_close(found.mean, ppca.impute(x, SEEN, mean=True)[0], rtol=0, atol=0.05)


def test_bernoulli_elements_by_a_sum_over_the_missing() -> None:
    """p(x_seen) is the sum of p(x) over all values of the missing pixels: with common draws of z, to the last digit."""
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 2, 2), (5,))), MeanFieldNormal(MLP((1, 2, 2), hidden=(5,)), 2))
    seen = torch.tensor([[[True, False], [True, False]]])
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    z = torch.randn(50, 2)
    masked = Masked(vae, torch.full((1, 2, 2), 0.5))
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    whole = torch.stack([vae.likelihood(z).log_prob(x.masked_scatter(~seen, v)) for v in values]).logsumexp(0)
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.weights import draw

    pair = Pair(masked.model, masked.guide)
    found = draw(pair, Batch(x[None], (seen[None],)), 50, at={"z": z.unsqueeze(1)})
    assert_close(found.log_likelihood[:, 0], whole)


def test_given_labels_and_layers() -> None:
    """The mask comes last in what is given; of a hierarchy it is the likelihood's alone."""
    x, y, seen = torch.randn(4, 3), torch.eye(2)[[0, 1, 0, 1]], torch.tensor([True, False, True]).expand(4, 3)
    conditional = ConditionalVAE(
        UnconditionalPrior(StandardNormal(2)), Gaussian(MLP(4, (3,), (4,))), MeanFieldNormal(MLP(5, hidden=(4,)), 2)
    )
    guides = [MeanFieldNormal(MLP(size, hidden=(4,)), 2) for size in (3, 2)]
    layers = HierarchicalVAE(
        StandardNormal(2), [MeanFieldNormal(MLP(2, hidden=(4,)), 2)], Gaussian(MLP(2, (3,), (4,))), guides
    )
    for pair, given in ((conditional, (y,)), (layers, ())):
        masked = Masked(pair, torch.zeros(3))
        torch.manual_seed(0)
        alone = log_weights(masked.model, masked.guide, x, 5, given=(*given, seen))
        torch.manual_seed(0)
        other = log_weights(masked.model, masked.guide, x.where(seen, 9.0), 5, given=(*given, seen))
        assert torch.equal(alone, other)
        filled = impute(masked.model, masked.guide, x, seen, 2, 50, proposal=FromGuide(), given=given)
        assert torch.equal(filled.mean[seen], x[seen])
        assert not torch.equal(filled.draws[0], filled.draws[1])


def test_training_on_rows_with_gaps_does_not_look_into_them() -> None:
    """Whatever stands where nothing is seen, the weights come out the same; the bound rises above its start."""
    _, ppca = linear()
    x, seen = ppca.sample(200).float(), torch.rand(200, D) < 0.7
    trained, bounds = [], []
    for hidden in (0.0, 5.0):
        torch.manual_seed(1)
        pair = VAE(StandardNormal(Q), Gaussian(MLP(Q, (D,), (8,))), MeanFieldNormal(MLP(D, hidden=(8,)), Q))
        masked = Masked(pair, torch.zeros(D))
        rows = x.where(seen, hidden)
        settings = {"given": (seen,), "epochs": 5, "batch_size": 20, "compile": "off", "progress": False}
        bounds.append(fit(masked.model, masked.guide, rows, IWAE(5), **settings).metrics["train_bound"].tolist())
        trained.append(torch.cat([parameter.flatten() for parameter in pair.parameters()]))
    assert torch.equal(*trained)
    assert bounds[0] == bounds[1]
    assert bounds[0][-1] > bounds[0][0] + 0.1


class Whole(Gaussian):
    """A likelihood whose elements depend on each other."""

    def forward(self, z: Tensor) -> torch.distributions.Distribution:
        import pyro.distributions as dist

        return dist.MultivariateNormal(self.decoder(z), torch.eye(3))


def test_what_is_refused() -> None:
    vae, ppca = linear()
    with pytest.raises(UsageError, match=r"fill: expected the event shape \(5,\), got \(4,\)"):
        Masked(vae, torch.zeros(4))
    masked = Masked(vae, ppca.loc.detach())
    with pytest.raises(UsageError, match="seen: expected a boolean mask"):
        impute(masked.model, masked.guide, ppca.sample(2), torch.ones(D))
    joint = VAE(StandardNormal(2), Whole(MLP(2, (3,), (4,))), MeanFieldNormal(MLP(3, hidden=(4,)), 2))
    masked = Masked(joint, torch.zeros(3))
    with pytest.raises(PairError, match="elements that are not independent given z"):
        log_weights(masked.model, masked.guide, torch.randn(4, 3), 2, given=(torch.ones(4, 3, dtype=torch.bool),))
    whole = log_marginal(vae.model, vae.guide, ppca.sample(3), 5)
    with pytest.raises(UsageError, match="seen: 2 rows beside the 3"):
        log_prob_missing(whole, log_marginal(vae.model, vae.guide, ppca.sample(2), 5))
