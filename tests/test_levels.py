"""Masses on grey levels: normalised whatever their parameters, in bits that a density's can be held against."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import EXACT
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

import pyrovae
from pyrovae.data import load_data
from pyrovae.data.measure import Measure
from pyrovae.data.others import other_rows
from pyrovae.errors import CheckpointError, DataError, PairError, UsageError
from pyrovae.inference import IWAE, fit
from pyrovae.models import (
    MLP,
    VAE,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    MeanFieldNormal,
    PartlySeen,
    StandardNormal,
)
from pyrovae.models.levels import CategoricalLevels, ColourMixture, LogisticLevels, LogisticMixture
from pyrovae.runs.directory import open_run

L = 256
LEVELS = torch.arange(float(L))
# Locations within, at the ends and far outside; scales from a hundredth of a level to forty times the range.
LOCATIONS = (-1e5, -300.0, -0.5, 0.0, 0.5, 3.2, 100.0, 100.3, 100.5, 127.5, 254.6, 255.0, 600.0, 1e6)
SCALES = (0.01, 0.1, 0.5, 1.0, 7.0, 60.0, 1e4)


def parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All pairs of these, each of shape (P, 1), with gradients."""
    pairs = torch.tensor(list(itertools.product(LOCATIONS, SCALES)), dtype=dtype)
    return pairs[:, :1].clone().requires_grad_(), pairs[:, 1:].clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discretised_logistic_sums_to_1_whatever_its_parameters(dtype: torch.dtype) -> None:
    """To 1e-6 in single precision, with every log mass and its gradients finite, a mass of e^-10,000,000 too."""
    loc, scale = parameters(dtype)
    log_mass = LogisticLevels(loc, scale, L).log_prob(LEVELS.to(dtype))
    total = log_mass.double().exp().sum(1)
    assert (total - 1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-11)
    gradients = torch.autograd.grad(log_mass.sum(), (loc, scale))
    for value in (log_mass, *gradients):
        assert value.isfinite().all()
    assert log_mass.min() < -1e7


def test_a_discretised_logistic_is_the_difference_of_the_logistic_function() -> None:
    """In double precision, where that difference has digits; the same in single precision, relative to log P."""
    loc, scale = (value.detach() for value in parameters(torch.float64))
    edges = torch.cat([torch.tensor([-math.inf]), LEVELS[1:] - 0.5, torch.tensor([math.inf])]).double()
    upper = ((edges - loc) / scale).sigmoid()
    difference = upper[:, 1:] - upper[:, :-1]
    found = LogisticLevels(loc, scale, L).log_prob(LEVELS.double())
    seen = (difference > 1e-6) & (upper[:, :-1] < 0.99)
    assert seen.double().mean() > 0.2
    assert_close(found[seen].exp(), difference[seen], rtol=1e-9, atol=0)
    single = LogisticLevels(loc.float(), scale.float(), L).log_prob(LEVELS)
    likely = seen & (scale > 0.3).expand_as(seen)  # where a level's edge is well told from the location
    assert_close(single.double()[likely], found[likely], rtol=1e-5, atol=1e-5)


def test_draws_are_those_of_the_mass() -> None:
    """Frequencies of 17 levels by a chi-squared test, for a logistic, a mixture of them and a softmax."""
    torch.manual_seed(3)
    logistic = LogisticLevels(torch.tensor(15.2), torch.tensor(2.0), 17)
    pair = LogisticLevels(torch.tensor([3.1, 11.7]), torch.tensor([0.4, 2.0]), 17)
    mixture = LogisticMixture(torch.tensor([0.3, 1.0]), pair)
    softmax = CategoricalLevels(2 * torch.randn(17))
    for p in (logistic, mixture, softmax):
        counts = p.sample((50_000,)).long().bincount(minlength=17)
        wanted = 50_000 * p.log_prob(torch.arange(17.0)).double().exp()
        often = wanted > 5
        observed, expected = counts[often].double(), wanted[often]
        assert counts[~often].sum() < 100
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
        assert_close(p.mean, (torch.arange(17.0) * p.log_prob(torch.arange(17.0)).exp()).sum(), rtol=1e-5, atol=1e-5)


def test_a_mixture_is_the_sum_of_its_components() -> None:
    torch.manual_seed(0)
    part = DiscretizedLogisticMixture(MLP(2, (3, 4, 1, 2), hidden=(5,)), L, components=4).double()
    part.initialise(torch.randint(0, L, (60, 1, 2)).double())
    z, x = torch.randn(7, 2, dtype=torch.float64), torch.randint(0, L, (7, 1, 2)).double()
    logits, loc, raw = part.decoder(z).unbind(1)
    total = torch.zeros(7, 1, 2, dtype=torch.float64)
    for c in range(4):
        scale = part.unit * (1e-3 + torch.nn.functional.softplus(raw[:, c]))
        total += logits.softmax(1)[:, c] * LogisticLevels(part.unit * loc[:, c], scale, L).log_prob(x).exp()
    assert_close(part(z).log_prob(x), total.log().sum((1, 2)), **EXACT)


def test_a_density_has_more_bits_than_the_mass_that_it_gives_to_levels() -> None:
    """E_u -log2 p((l + u)/L) + log2 L >= -log2 int p, by quadrature, and equal where p is flat within levels."""
    points, weights = np.polynomial.legendre.leggauss(200)
    u, w = torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
    density, mass = Measure("density", "", 16, 1), Measure("levels", "", 16, 1)
    for loc, scale, excess in ((0.4, 0.05, 1e-3), (0.4, 0.01, 1.0), (0.4, 10.0, 0.0)):
        p = torch.distributions.Normal(torch.tensor(loc).double(), scale)
        for level in (5, 6, 7):
            log_p = p.log_prob((level + u) / 16)
            bits = density.bits_per_dimension((w * log_p).sum().item())
            least = mass.bits_per_dimension((w * log_p.exp()).sum().log().item() - math.log(16))
            assert bits >= least - 1e-12
            assert (bits - least > excess) if excess else bits == pytest.approx(least, abs=1e-6)


def test_levels_are_read_as_they_are() -> None:
    """x is the level; rows, scores and bits are of L levels; binarised and dequantised rows stay what they are."""
    data = load_data("digits")
    rows = data.rows("levels")
    assert rows.measure == Measure("levels", "mass on {0,...,16}^64", 17, 64)
    assert torch.equal(rows.transform(rows.train), data.train.float())
    assert torch.equal(rows.test, data.test.float())
    assert (rows.binarize, rows.data_range) == (None, 16.0)
    assert len({rows.hash, data.rows("mass").hash, data.rows("density").hash}) == 3
    uniform = -64 * math.log(17)
    assert rows.measure.bits_per_dimension(uniform) == pytest.approx(math.log2(17))
    assert data.rows("density").measure.bits_per_dimension(0.0) == pytest.approx(math.log2(17))
    with pytest.raises(UsageError, match="binarize is not used by a mass on grey levels; leave it out"):
        data.rows("levels", "dynamic")


def test_what_has_no_levels_is_refused(tmp_path) -> None:
    np.save(tmp_path / "heights.npy", np.random.default_rng(0).normal(size=(60, 3)))
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 3)).astype(np.uint8))
    for name, found, remedy in (
        ("heights", "continuous values", "Gaussian"),
        ("bits", "zeros and ones", "Bernoulli"),
    ):
        with pytest.raises(DataError, match=f"holds {found} and no grey levels.* or choose a {remedy} likelihood"):
            load_data(str(tmp_path / f"{name}.npy")).rows("levels")


LIKELIHOODS = {
    "a discretised logistic": lambda: DiscretizedLogistic(MLP(2, 3), 17),
    "a mixture of discretised logistics": lambda: DiscretizedLogisticMixture(MLP(2, (3, 5, 3)), 17),
    "a categorical": lambda: Categorical(MLP(2, (17, 3)), 17),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_support_is_whole_numbers_below_the_number_of_levels(name: str) -> None:
    part = LIKELIHOODS[name]()
    part.check_support(torch.tensor([[0.0, 16.0, 3.0]]))
    for wrong in (17.0, -1.0, 0.5, math.nan):
        with pytest.raises(DataError, match=rf"^x: {name} likelihood has support {{0, ..., 16}}, got .* 1 elements"):
            part.check_support(torch.tensor([[0.0, wrong, 3.0]]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_they_start_near_what_they_are_to_learn(name: str) -> None:
    """Without weights, each pixel's mean is that of x to 0.7 levels, and a constant pixel's mass is where it is."""
    x = load_data("digits").rows("levels").validation.flatten(1)[:, 16:19].contiguous()
    x[:, 2] = 4.0
    part = LIKELIHOODS[name]()
    with torch.no_grad():
        for parameter in part.decoder.parameters():
            parameter.zero_()
    part.initialise(x)
    p = part(torch.zeros(2))
    assert_close(p.mean, x.mean(0), rtol=0, atol=0.7)
    bits = -p.log_prob(x).mean().item() / 3 / math.log(2)
    assert 0 < bits < 3 < math.log2(17)
    assert p.base_dist.log_prob(x)[:, 2].exp().mean() > 0.2


def test_a_softmax_starts_at_the_shares_of_levels() -> None:
    x = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    part = Categorical(MLP(2, (4, 2), hidden=(3,)).double(), 4)
    with torch.no_grad():
        for parameter in part.decoder.parameters():
            parameter.zero_()
    part.initialise(x)
    mass = part.decoder(torch.zeros(2, dtype=torch.float64)).softmax(0)
    overall = torch.tensor([3 + 1, 1 + 1, 3 + 1, 1 + 1]).double() / 12
    counts = torch.tensor([[3, 0], [0, 1], [0, 3], [1, 0]]).double()
    assert_close(mass, (counts + overall[:, None]) / 5, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_run_on_levels_is_trained_resumed_loaded_and_drawn_from(tmp_path) -> None:
    """Its number of levels is that of its data, its bits are those of its log p(x), and its draws are levels."""
    small = {"latent_dim": [3], "network": {"name": "mlp", "hidden": [20]}, "compile": "off", "threads": 1}
    options = {"data": "digits", "likelihood": "logistic-mixture", "seed": 0, "eval_rows": 40, "eval_K": 30, **small}
    whole = pyrovae.train({**options, "epochs": 2}, tmp_path / "whole", plots=False)
    pyrovae.train({**options, "epochs": 1}, tmp_path / "parts", plots=False)
    parts = pyrovae.train({"epochs": 2}, tmp_path / "parts", plots=False, resume=True)
    assert whole.evaluation["log_marginal"] == parts.evaluation["log_marginal"]
    found = open_run(tmp_path / "whole")
    assert (found.recipe.levels, found.evaluation["measure"]) == (17, "mass on {0,...,16}^64")
    bits = -found.evaluation["log_marginal"] / 64 / math.log(2)
    assert found.evaluation["bits_per_dimension"] == pytest.approx(bits)
    assert 0 < bits < math.log2(17)
    assert found.evaluation["reconstruction_quality"]["data_range"] == 16
    draws = pyrovae.load(tmp_path / "whole").sample(50)
    assert set(draws.unique().tolist()) <= set(map(float, range(17)))
    np.savez(tmp_path / "others.npz", x=draws.numpy().astype(np.uint8))
    assert torch.equal(other_rows(found.rows(), tmp_path / "others.npz").x, draws)
    config = tmp_path / "whole" / "config.yaml"
    config.write_text(config.read_text().replace("levels: 17", "levels: 99999999"))
    with pytest.raises(CheckpointError, match="levels: expected a whole number up to 65536, got 99999999"):
        open_run(tmp_path / "whole")


def colours(levels: int, seed: int = 0, shape: tuple[int, ...] = ()) -> ColourMixture:
    """Two components for each of two pixels, with strong and different coefficients."""
    torch.manual_seed(seed)
    event = (*shape, 3, 1, 2, 2)
    loc, scale = (levels - 1) * torch.rand(event).double(), 0.3 + torch.rand(event).double()
    return ColourMixture(torch.randn(*shape, 1, 2, 2).double(), loc, scale, torch.randn(event).double().tanh(), levels)


def test_channels_that_depend_on_one_another_are_as_they_are_written() -> None:
    """By hand, pixel by pixel; over all levels of two pixels, of which each is by itself, they sum to 1."""
    p, levels = colours(4), 4
    pixels = torch.tensor(list(itertools.product(range(levels), repeat=3))).double()
    wanted = torch.zeros(2, levels**3).double()
    for pixel in range(2):
        weights = p.logits[0, pixel].softmax(0)
        for c in range(2):
            for i, (r, g, b) in enumerate(pixels - 1.5):
                alpha, beta, gamma = p.coefficients[:, 0, pixel, c]
                moved = torch.stack([torch.zeros(()).double(), alpha * r, beta * r + gamma * g])
                part = LogisticLevels(p.loc[:, 0, pixel, c] + moved, p.scale[:, 0, pixel, c], levels)
                wanted[pixel, i] += weights[c] * part.log_prob(torch.stack([r, g, b]) + 1.5).sum().exp()
    both = torch.tensor(list(itertools.product(range(len(pixels)), repeat=2)))
    images = pixels[both].movedim(1, 2).unsqueeze(2)  # (P, 3, 1, 2)
    mass = p.log_prob(images).exp()
    assert_close(mass, wanted[0][both[:, 0]] * wanted[1][both[:, 1]], **EXACT)
    assert mass.sum().item() == pytest.approx(1, abs=1e-10)


def test_draws_of_dependent_channels_are_those_of_the_mass() -> None:
    """A chi-squared test over all levels of a pixel; green follows red, which channels by themselves do not."""
    p = colours(4)
    drawn = p.sample((40_000,))[..., 0, 0]
    pixels = torch.tensor(list(itertools.product(range(4), repeat=3))).double()
    other = torch.zeros(64, 3, 1, 2).double()
    other[..., 0, 0] = pixels
    mass = p.log_prob(other).exp()
    wanted = 40_000 * mass / mass.sum()
    counts = (drawn.long() * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64)
    often = wanted > 5
    expected = wanted[often] * counts[often].sum() / wanted[often].sum()
    assert stats.chisquare(counts[often].double(), expected).pvalue > 1e-4
    assert p.expand((5,)).sample((2,)).shape == (2, 5, 3, 1, 2)


def test_the_mean_of_dependent_channels_is_near_what_draws_have() -> None:
    """Exact of red; of green and blue to the levels that are cut off: little, where few are."""
    p = colours(64, shape=(3,))
    p = ColourMixture(p.logits, 20 + p.loc / 3, p.scale, p.coefficients, 64)
    draws = p.sample((20_000,))
    error = draws.std(0) / math.sqrt(20_000)
    assert ((draws.mean(0) - p.mean).abs() < 5 * error + 0.02).all()


def test_green_that_follows_red_is_learned() -> None:
    """Of pixels whose channels differ by noise alone: half a bit less for each than with channels by themselves."""
    torch.manual_seed(0)
    red = torch.randint(2, 14, (400, 1, 1, 1)).float()
    x = (red + torch.randint(-1, 2, (400, 3, 1, 1))).clamp(0, 15)
    bits = []
    for channels in ("independent", "autoregressive"):
        shape = DiscretizedLogisticMixture.decoder_shape((3, 1, 1), components=2, channels=channels)
        part = DiscretizedLogisticMixture(MLP(1, shape, hidden=(2,)), 16, 2, channels)
        part.initialise(x)
        optimiser, z = torch.optim.Adam(part.parameters(), 0.05), torch.zeros(1, 1)
        for _ in range(150):
            optimiser.zero_grad()
            loss = -part(z).log_prob(x).mean()
            loss.backward()
            optimiser.step()
        bits.append(loss.item() / 3 / math.log(2))
    assert bits[0] - bits[1] > 0.5


def test_only_images_of_three_channels_have_channels_that_depend_on_one_another() -> None:
    for shape in ((64,), (1, 8, 8), (3,), (2, 4, 4)):
        with pytest.raises(UsageError, match=r"is of images of 3 channels, \(3, H, W\), got rows of shape"):
            DiscretizedLogisticMixture.decoder_shape(shape, channels="autoregressive")
    with pytest.raises(UsageError, match=r"expect an output of shape \(10, 5, H, W\), got \(3, 5, 3, 2, 2\)"):
        DiscretizedLogisticMixture(MLP(2, (3, 5, 3, 2, 2)), 16, 5, "autoregressive")
    shape = DiscretizedLogisticMixture.decoder_shape((3, 2, 2), channels="autoregressive")
    part = PartlySeen(DiscretizedLogisticMixture(MLP(2, shape), 16, 5, "autoregressive"))
    with pytest.raises(PairError, match="elements that are not independent given z"):
        part(torch.zeros(1, 2))


@pytest.mark.slow
def test_compiled_steps_of_dependent_channels_are_those_of_the_pair() -> None:
    x, weights = torch.randint(0, 16, (40, 3, 2, 2)).float(), []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        shape = DiscretizedLogisticMixture.decoder_shape((3, 2, 2), components=2, channels="autoregressive")
        part = DiscretizedLogisticMixture(MLP(2, shape, hidden=(8,)), 16, 2, "autoregressive")
        vae = VAE(StandardNormal(2), part, MeanFieldNormal(MLP((3, 2, 2), hidden=(8,)), 2))
        vae.initialise(x)
        fit(vae.model, vae.guide, x, IWAE(3), epochs=2, batch_size=20, seed=0, compile=mode, progress=False)
        weights.append(torch.nn.utils.parameters_to_vector(vae.parameters()).detach())
    assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
