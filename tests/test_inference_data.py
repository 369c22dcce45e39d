"""ArviZ data: draws from the posterior, what was drawn with what weight, predictive draws, and the ELPD."""

import math
import sys
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrovae.errors import NumericalError, UsageError
from pyrovae.inference import log_marginal
from pyrovae.inference.inference_data import elpd, to_inference_data
from pyrovae.inference.marginal import exact, summarise
from tests.conftest import assert_mean

LOADING = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 1.0]], dtype=torch.float64)
NOISE = 0.7
OLD = hasattr(az, "waic")


def model(x):
    """Linear-Gaussian: z ~ N(0, I), x ~ N(W z, s2 I)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADING.T, NOISE).to_event(1), obs=x)


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + LOADING.T @ LOADING / NOISE**2)
    return x @ LOADING @ covariance / NOISE**2, covariance


def guide(x):
    """Wider than the posterior, and off by a half."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(posterior(x)[0] + 0.5, 0.8).to_event(1))


def layered(x):
    """Two latent sites, two observed ones of several shapes, and a factor."""
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x.new_zeros(()), 1.0))
        low = pyro.sample("low", dist.Normal(top[..., None, None].expand(*top.shape, 2, 3), 1.0).to_event(2))
        pyro.deterministic("total", low.sum((-1, -2)))
        pyro.factor("tilt", -top.square())
        pyro.sample("x", dist.Normal(low.sum(-1), 1.0).to_event(1), obs=x)
        pyro.sample("sign", dist.Bernoulli(logits=top), obs=(x[:, 0] > 0).to(x))


def layered_guide(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x[:, 0], 1.0))
        pyro.sample("low", dist.Normal((top + x[:, 1])[..., None, None].expand(*top.shape, 2, 3), 1.0).to_event(2))


def data(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


def values(result, group: str, name: str) -> Tensor:
    """A variable without the dimension of chains."""
    array = torch.as_tensor(np.array(result[group][name].values))
    return array[0] if "chain" in result[group][name].dims else array


# ----------------------------------------------------------------------------------------------------------- the draws


def test_draws_have_the_mean_and_covariance_of_the_posterior():
    """One draw of each of many equal rows: independent draws, from a guide that is wide of the mark."""
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).expand(3000, 3)
    mean, covariance = (part[0] if part.shape[0] == len(x) else part for part in posterior(x))
    z = values(to_inference_data(model, guide, x, 1, 1000, predictive=False), "posterior", "z")[0]
    assert_mean(z, mean, least=0.25)  # the guide is off by a half
    centered = z - mean
    assert_mean(centered[:, :, None] * centered[:, None], covariance, least=0.3)


def test_a_draw_is_one_of_the_particles_with_its_weight_and_likelihood():
    x = data(130)  # of several blocks of rows
    result = to_inference_data(model, guide, x, num_draws=7, num_particles=40, seed=3)
    z, particle = values(result, "posterior", "z"), values(result, "sample_stats", "particle")
    log_w = values(result, "importance", "log_weight")
    torch.testing.assert_close(values(result, "sample_stats", "log_weight"), log_w.gather(0, particle))
    likelihood = dist.Normal(z @ LOADING.T, NOISE).log_prob(x).sum(-1)
    torch.testing.assert_close(values(result, "log_likelihood", "x"), likelihood)
    log_joint = likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_q = dist.Normal(posterior(x)[0] + 0.5, 0.8).log_prob(z).sum(-1)
    torch.testing.assert_close(values(result, "sample_stats", "log_weight"), log_joint - log_q)
    assert particle.unique().numel() > 20


def test_weights_have_the_diagnostics_of_the_log_marginal():
    result = to_inference_data(model, guide, data(5), num_draws=1, num_particles=200, predictive=False)
    expected = summarise(values(result, "importance", "log_weight"))
    for name, theirs in (
        ("log_marginal", expected.estimate),
        ("standard_error", expected.standard_error),
        ("ess", expected.ess),
        ("pareto_k", expected.pareto_k),
    ):
        torch.testing.assert_close(values(result, "importance", name), theirs)


def test_predictive_draws_are_from_the_likelihood_at_the_draws(monkeypatch):
    monkeypatch.setattr(
        sys.modules["pyrovae.inference.marginal"], "ELEMENTS_AT_ONCE", 64 * 4 * 50 * 3
    )  # 64 draws at once
    x = data(50)
    result = to_inference_data(model, guide, x, num_draws=200, num_particles=50)
    for latents, generated in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        z, theirs = values(result, latents, "z"), values(result, generated, "x")
        noise = (theirs - z @ LOADING.T).flatten(0, 1)
        assert_mean(noise, 0.0, least=0.05)
        assert_mean(noise[:, :, None] * noise[:, None], NOISE**2 * torch.eye(3, dtype=torch.float64), least=0.05)
    drawn = values(result, "prior_predictive", "x").flatten(0, 1)
    marginal = LOADING @ LOADING.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
    assert_mean(drawn[:, :, None] * drawn[:, None], marginal, least=0.5)


def test_any_pair_with_its_sites_and_shapes(monkeypatch):
    """Several latent and observed sites; drawn in chunks that divide neither draws nor particles."""
    x = data(6, 2)
    monkeypatch.setattr(sys.modules["pyrovae.inference.marginal"], "ELEMENTS_AT_ONCE", 7 * 4 * 2 * 6)
    result = to_inference_data(layered, layered_guide, x, num_draws=9, num_particles=17)
    leading = ("chain", "draw", "datum")
    for group, dims in {
        "posterior": {"top": leading, "low": (*leading, "low_dim_0", "low_dim_1")},
        "prior": {"top": leading, "low": (*leading, "low_dim_0", "low_dim_1")},
        "log_likelihood": {"x": leading, "sign": leading},
        "posterior_predictive": {"x": (*leading, "x_dim_0"), "sign": leading},
        "prior_predictive": {"x": (*leading, "x_dim_0"), "sign": leading},
        "observed_data": {"x": ("datum", "x_dim_0"), "sign": ("datum",)},
    }.items():
        assert {name: array.dims for name, array in result[group].data_vars.items()} == dims
    assert dict(result["posterior"].sizes) == {"chain": 1, "draw": 9, "datum": 6, "low_dim_0": 2, "low_dim_1": 3}
    assert result["importance"]["log_weight"].shape == (17, 6)
    torch.testing.assert_close(values(result, "observed_data", "x"), x)
    torch.testing.assert_close(values(result, "observed_data", "sign"), (x[:, 0] > 0).double())
    top, low = values(result, "posterior", "top"), values(result, "posterior", "low")
    sign = dist.Bernoulli(logits=top).log_prob((x[:, 0] > 0).double())
    torch.testing.assert_close(values(result, "log_likelihood", "sign"), sign)
    both = sign + values(result, "log_likelihood", "x") - top.square()
    prior = dist.Normal(0.0, 1.0).log_prob(top) + dist.Normal(top[..., None, None], 1.0).log_prob(low).sum((-1, -2))
    log_q = dist.Normal(x[:, 0], 1.0).log_prob(top)
    log_q = log_q + dist.Normal((top + x[:, 1])[..., None, None], 1.0).log_prob(low).sum((-1, -2))
    torch.testing.assert_close(values(result, "sample_stats", "log_weight"), both + prior - log_q)


def test_predictive_draws_are_left_out_when_not_wanted():
    result = to_inference_data(model, guide, data(4), 3, 5, predictive=False)
    names = set(result.groups() if OLD else result.children)
    assert names == {"posterior", "prior", "log_likelihood", "sample_stats", "observed_data", "importance"}


def test_the_seed_is_all_the_randomness():
    x, state = data(4), torch.get_rng_state()
    first, same, other = (to_inference_data(model, guide, x, 3, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for group in ("posterior", "importance", "prior", "prior_predictive", "posterior_predictive"):
        name = next(iter(first[group].data_vars))
        assert np.array_equal(first[group][name], same[group][name])
        assert not np.array_equal(first[group][name], other[group][name])


def test_saved_and_read_back_it_is_the_same(tmp_path):
    pytest.importorskip("h5netcdf")
    result = to_inference_data(layered, layered_guide, data(4, 2).float(), 3, 5, measure="density", seed=9)
    result.to_netcdf(str(tmp_path / "data.nc"))
    back = az.from_netcdf(str(tmp_path / "data.nc"))
    names = list(result.groups() if OLD else result.children)
    assert len(names) == 8
    for group in names:
        assert result[group].identical(back[group])
        assert {k: v.dtype for k, v in result[group].items()} == {k: v.dtype for k, v in back[group].items()}
    assert dict(back.attrs) == dict(result.attrs)
    wanted = {"num_particles": 5, "num_draws": 3, "seed": 9, "unit": "nats", "measure": "density", "dtype": "float32"}
    assert wanted.items() <= dict(back.attrs).items()
    assert {"estimator", "inference_library_version", "torch_version", "pyro_version"} <= set(back.attrs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_draws": 0}, "num_draws: expected a whole number of at least 1, got 0"),
        ({"num_particles": 2.5}, r"num_particles \(K\): expected a whole number"),
        ({"x": torch.zeros(0, 3)}, "x: expected a tensor of shape"),
    ],
)
def test_arguments_that_make_no_sense(change, message):
    with pytest.raises(UsageError, match=message):
        to_inference_data(model, guide, **{"x": data(2), **change})


def test_a_row_without_weights_is_named():
    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
            pyro.factor("wall", torch.where(x[:, 0] > 50, -math.inf, 0.0).expand(z.shape[:-1]))

    x = data(120)
    x[103] = 99.0
    with pytest.raises(NumericalError, match="row 103: its importance weights are all zero"):
        to_inference_data(impossible, guide, x, 2, 5)


# ------------------------------------------------------------------------------------------------------------ the ELPD


def truth(x: Tensor) -> Tensor:
    covariance = LOADING @ LOADING.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
    return dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)


def test_the_elpd_is_the_sum_of_log_p_and_compares_row_by_row():
    x = data(150)
    estimate, exactly = log_marginal(model, guide, x, 400, seed=0), exact(truth(x) - 1 + 0.01 * data(150)[:, 0])
    a, b = elpd(estimate), elpd(exactly)
    assert a["elpd_loo" if OLD else "elpd"] == pytest.approx(estimate.estimate.sum().item())
    assert a["se"] == pytest.approx(math.sqrt(150) * estimate.estimate.std(correction=0).item())
    assert (a["n_samples"], a["n_data_points"]) == (400, 150)
    frame = az.compare({"a": a, "b": b}, **({} if OLD else {"round_to": "none"}))
    difference = estimate.estimate - exactly.estimate
    assert list(frame.index) == ["a", "b"]
    assert abs(frame["elpd_diff"]["b"]) == pytest.approx(difference.sum().item(), rel=1e-6)
    assert frame["dse"]["b"] == pytest.approx(math.sqrt(150) * difference.std(correction=0).item(), rel=1e-6)
    for each in (a, b):
        assert "150" in str(each)


def test_the_khat_plot_shows_every_row():
    import matplotlib.pyplot as plt

    estimate = log_marginal(model, guide, data(40), 300, seed=0)
    drawn = az.plot_khat(elpd(estimate))
    figure = plt.gcf() if OLD else drawn.viz["figure"].item()
    points = [np.asarray(c.get_offsets()) for axes in figure.axes for c in axes.collections]
    heights = np.concatenate([p[:, 1] for p in points if len(p)])
    np.testing.assert_allclose(np.sort(heights), np.sort(estimate.pareto_k.numpy()))
    plt.close(figure)


def test_rows_over_the_threshold_are_warned_of():
    log_w = 10 * torch.randn(200, 30, dtype=torch.float64)
    result = summarise(log_w)
    assert (result.pareto_k > result.k_threshold).any()
    assert elpd(result)["warning"]
    assert elpd(result)["good_k"] == result.k_threshold
    assert not elpd(exact(log_w[0]))["warning"]


def test_without_a_tail_diagnostic_there_is_no_khat():
    result = elpd(summarise(data(5, 30)))
    assert ("pareto_k" not in result) if OLD else (result.pareto_k is None)
    assert "30" in str(result)


def test_an_elpd_needs_every_row():
    values = torch.zeros(4, dtype=torch.float64)
    values[2] = -math.inf
    with pytest.raises(NumericalError, match="row 2"):
        elpd(exact(values))


def test_loo_of_the_conditional_likelihood_is_no_log_marginal():
    """The harmonic mean estimator: it runs, but what it says is far above the truth."""
    x = data(60)
    result = to_inference_data(model, guide, x, 200, 500, predictive=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = az.loo(result, pointwise=True)
    theirs = torch.as_tensor(np.array((found["loo_i"] if OLD else found["elpd_i"]).values))
    excess = theirs - truth(x)
    assert excess.mean() > 5 * excess.std() / math.sqrt(len(x))
    estimate = values(result, "importance", "log_marginal")
    assert (estimate.mean() - truth(x).mean()).abs() < excess.mean() / 10
