"""Guides with parameters for each training row: trained by batches to the best of each row, and of no other row."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import DataError, UsageError
from pyrovae.inference import ELBO, fit, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.individual import Individual
from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing import compiler
from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, RowParameters, StandardNormal

Z, D = 2, 4


def decoder() -> Gaussian:
    """A linear one, so that there is one best Gaussian."""
    torch.manual_seed(0)
    likelihood = Gaussian(MLP(Z, D, hidden=()), 0.7).double()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.mul_(2)
    return likelihood.requires_grad_(False)


def rows(count: int) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return decoder()(torch.randn(count, Z).double()).sample()


def individual(x: Tensor) -> VAE:
    vae = VAE(StandardNormal(Z).double(), decoder(), MeanFieldNormal(RowParameters(x, 16), Z).double())
    vae.guides[0].initialise(x)  # which leaves rows as they are, or none would be found
    return vae


def test_batches_train_each_row_to_its_own_best() -> None:
    """The ELBO of every row nears that of the best mean-field Gaussian, and leaves a small network behind."""
    x = rows(40)
    vae = individual(x)
    amortised = VAE(StandardNormal(Z).double(), decoder(), MeanFieldNormal(MLP(D, hidden=(2,)), Z).double())
    best = Individual("diagonal").fit(Pair(vae.model, vae.guide), Batch(x)).elbo(1000)[0].mean().item()

    def gap(pair: VAE, epochs: int) -> float:
        options = {"epochs": epochs, "batch_size": 10, "seed": 0, "progress": False, "compile": "off"}
        options["schedule"] = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        fit(pair.model, pair.guide, x, ELBO(4), optimizer=lambda p: torch.optim.Adam(p, lr=0.05), **options)
        with torch.no_grad():
            return best - log_weights(pair.model, pair.guide, x, 500).mean().item()

    of_network = gap(amortised, 50)
    assert gap(vae, 1) > 0.3
    assert gap(vae, 50) < 0.05 < 0.08 < of_network


def test_it_is_a_function_of_the_row() -> None:
    """Other orders, other batches and copies change nothing; a row's answer depends on all of its numbers."""
    x = rows(6)
    vae = individual(torch.cat([x, x[:2]]))
    q = vae.posterior(x).mean
    assert vae.guides[0].encoder.body.features.shape == (6, 16)
    order = torch.tensor([5, 0, 0, 3])
    assert torch.equal(vae.posterior(x[order]).mean, q[order])
    assert torch.equal(vae.posterior(x.expand(3, 6, D)).mean, q.expand(3, 6, Z))
    assert len(q.detach()[:, 0].unique()) == 6
    result = log_marginal(vae.model, vae.guide, x, 50, seed=0)
    assert result.estimate.shape == (6,)


def test_other_rows_have_no_parameters() -> None:
    x = rows(6)
    vae = individual(x)
    near = x.clone()
    near[2, 1] += 1e-9
    with pytest.raises(DataError, match=r"x: 1 of 6 rows are none of the 6 that this guide has parameters for. Make"):
        vae.posterior(near)
    with pytest.raises(DataError, match="5 of 5 rows are none of the 6"):
        log_marginal(vae.model, vae.guide, rows(11)[6:], 10)
    with pytest.raises(UsageError, match=r"x: expected rows of shape \(N, \*event\), got \(3,\)"):
        RowParameters(torch.zeros(3))


def test_traced_training_is_that_of_the_pair() -> None:
    x, trained = rows(20), []
    for how in ("on", "off"):
        vae = individual(x)
        with patch.object(compiler, "inductor", lambda graph, inputs: graph):
            options = {"batch_size": 10, "epochs": 2, "seed": 0, "progress": False, "compile": how}
            result = fit(vae.model, vae.guide, x, ELBO(2), **options)
        assert result.compiled == (how == "on"), result.notices
        trained.append(vae.guides[0].encoder.body.features.detach())
    assert_close(*trained, rtol=1e-9, atol=1e-9)
    assert (trained[0] - individual(x).guides[0].encoder.body.features).abs().max() > 1e-4
