"""log p(x) per step and per word: totals over rows divided by totals of what they are made of."""

import math

import pytest
import torch

from pyrovae.data import load_data
from pyrovae.inference.batch import Batch
from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, OrnsteinUhlenbeck, PartlySeen, StandardNormal
from pyrovae.runs.units import of_units, ratio, units_in_words


def test_per_step_is_the_total_by_the_true_steps() -> None:
    """Of sequences of 4, 1 and 3 steps, the last with a gap within it."""
    rows = load_data("oscillator", missing=True).rows("density")
    x = torch.randn(3, 4, 2)
    x[1, 1:], x[2, 3:], x[2, 1] = math.nan, math.nan, math.nan
    log_prob = torch.tensor([-8.0, -3.0, -7.0]).double()
    likelihood = PartlySeen(Gaussian(MLP(8, (4, 2), hidden=(3,))))
    guide = MeanFieldNormal(MLP((2, 4, 2), hidden=(3,)).seeing(likelihood.view((4, 2))), 8)
    pair = VAE(OrnsteinUhlenbeck(8, (4, 2)), likelihood, guide)
    found = of_units(pair, Batch(x), rows, log_prob)
    assert (found["noun"], found["count"]) == ("step", 8)
    assert found["log_marginal"] == pytest.approx(-18 / 8)
    away = log_prob + 18 / 8 * torch.tensor([4.0, 1.0, 3.0])
    assert found["error_over_rows"] == pytest.approx(away.std().item() / math.sqrt(3) / (8 / 3))
    plain = VAE(StandardNormal(8), likelihood, guide)
    assert of_units(plain, Batch(x), rows, log_prob) is None


def test_perplexity_of_words_that_are_all_as_likely_is_their_number() -> None:
    rows = load_data("bars").rows("documents")
    x = rows.test[:20]
    log_prob = torch.distributions.Multinomial(100, probs=torch.ones(25).double() / 25).log_prob(x.double())
    found = of_units(None, Batch(x), rows, log_prob)
    assert found["count"] == 2000
    assert math.exp(-found["log_marginal"]) == pytest.approx(25)
    assert found["error_over_rows"] == pytest.approx(0, abs=1e-9)
    ((label, value, note),) = units_in_words(found, lambda value, error: f"{value:.1f}")
    assert (label, value, note[:22]) == ("perplexity per word", "25.0", "of words in their orde")
    assert ratio("word", torch.zeros(2), torch.zeros(2)) is None
