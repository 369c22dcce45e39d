"""Rows of which some elements are seen: what exact models say of the others is p(x) / p(x_seen), drawn and averaged."""

import itertools
import math

import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.models import PPCA, BernoulliMixture, Exact, GaussianMixture

BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).reshape(-1, 2, 3)
SEEN = torch.tensor([[True, False, True], [False, True, True]])


def rows(count: int = 60, dim: int = 4) -> Tensor:
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    return torch.randn(count, dim, dtype=torch.float64) @ mixing.T + torch.arange(dim)


def fitted(model: Exact, x: Tensor) -> Exact:
    model = model.double()
    model.fit(x)
    return model


def densities() -> list[Exact]:
    x = rows()
    mixtures = [GaussianMixture(4, 3, kind) for kind in ("full", "diagonal", "tied", "spherical")]
    return [fitted(model, x) for model in (*mixtures, PPCA(4, 2))]


def bernoullis() -> Exact:
    return fitted(BernoulliMixture((2, 3), 3), (torch.randn(80, 2, 3) + torch.randn(80, 1, 1) > 0).double())


@pytest.mark.parametrize("index", range(5))
def test_seen_and_missing_make_up_the_whole(index: int) -> None:
    """log p(x) = log p(x_seen) + log p(x_missing | x_seen), for every mask, each row having its own."""
    model, x = densities()[index], rows(16)
    seen = torch.tensor(list(itertools.product([True, False], repeat=4)))
    with torch.no_grad():
        assert_close(model.log_prob_seen(x, seen) + model.log_prob_missing(x, seen), model.log_prob(x))
        assert_close(model.log_prob_seen(x, seen)[-1], torch.zeros((), dtype=torch.float64), **EXACT)
        assert_close(model.log_prob_seen(x, seen)[0], model.log_prob(x)[0])
        # What is missing is not looked at.
        assert_close(model.log_prob_seen(x.where(seen, math.nan), seen), model.log_prob_seen(x, seen), **EXACT)


def test_the_seen_part_of_a_gaussian_is_its_block() -> None:
    """By brute force: the mean and covariance of the seen elements."""
    x, seen = rows(), torch.tensor([False, True, True, False])
    with torch.no_grad():
        ppca = fitted(PPCA(4, 2), x)
        covariance = ppca.weight @ ppca.weight.T + (2 * ppca.log_scale).exp() * torch.eye(4, dtype=torch.float64)
        wanted = MultivariateNormal(ppca.loc[seen], covariance[seen][:, seen]).log_prob(x[:, seen])
        assert_close(ppca.log_prob_seen(x, seen), wanted)
        mixture = fitted(GaussianMixture(4, 2), x)
        parts = MultivariateNormal(mixture.means[:, seen], mixture.covariances[:, seen][:, :, seen])
        wanted = (mixture.weights.log() + parts.log_prob(x[:, None, seen])).logsumexp(1)
        assert_close(mixture.log_prob_seen(x, seen), wanted)


def test_the_seen_part_of_a_mass_is_a_sum_over_the_missing() -> None:
    """Sums of p(x) over all values of the missing elements; and given the seen part, these are of mass 1."""
    model = bernoullis()
    with torch.no_grad():
        joint, alone = model.log_prob(BITS), model.log_prob_seen(BITS, SEEN)
        alike = (BITS[:, None] == BITS)[..., SEEN].all(-1)
        assert_close(alone.exp(), (alike * joint.exp()).sum(1))
        assert_close((alike * model.log_prob_missing(BITS, SEEN).exp()).sum(1), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("index", range(6))
def test_imputed_elements_are_of_the_conditional(index: int) -> None:
    """Draws have its mean, and the mean of each draw's square; what is seen stays as it was."""
    model = [*densities(), bernoullis()][index]
    x = BITS[[5, 40]] if index == 5 else rows(2)
    seen = SEEN if index == 5 else torch.tensor([True, False, False, True])
    torch.manual_seed(1)
    drawn = model.impute(x, seen, 20_000)
    mean = model.impute(x, seen, mean=True)[0]
    assert torch.equal(drawn[..., seen], x[:, seen].expand(20_000, -1, -1))
    assert_mean(drawn, mean)
    # E[-log p(x_missing | x_seen)] is the entropy of its own draws: another 20,000 have the same.
    with torch.no_grad():
        nats = [model.log_prob_missing(part.flatten(0, 1), seen).mean() for part in drawn.chunk(2)]
    assert nats[0] == pytest.approx(nats[1].item(), abs=0.1)


def test_by_joint_draws_the_conditional_mean_is_the_best_guess() -> None:
    """x_missing - E[x_missing | x_seen] has mean 0, and is uncorrelated with what is seen, on draws of the model."""
    seen = torch.tensor([True, False, False, True])
    for model in densities():
        x = model.sample(20_000)
        residual = (x - model.impute(x, seen, mean=True)[0])[:, ~seen]
        assert_mean(residual, 0.0)
        centred = x[:, seen] - x[:, seen].mean(0)
        assert_mean((residual.unsqueeze(2) * centred.unsqueeze(1)).flatten(1), 0.0)


def test_what_is_no_mask_is_refused() -> None:
    model = densities()[0]
    for wrong in (torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(5, 4, dtype=torch.bool)):
        with pytest.raises(UsageError, match="seen: expected a boolean mask of shape"):
            model.log_prob_seen(rows(6), wrong)
