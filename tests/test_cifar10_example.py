"""The worked example on CIFAR-10: its recipes, its 3,543,552 parameters, and what is mistaken in it, as identities."""

import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

from pyrovae.data import Measure
from pyrovae.fit import command, read_options
from pyrovae.inference import layers
from pyrovae.models import (
    MLP,
    VAE,
    ConvDecoder,
    ConvEncoder,
    Gaussian,
    IsotropicNormal,
    MeanFieldNormal,
    Network,
    StandardNormal,
    VampPrior,
)
from pyrovae.models.guides import SCALE_FLOOR
from pyrovae.runs.build import build_model
from pyrovae.runs.directory import open_run
from pyrovae.runs.recipe import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("cifar10-*.yaml"))
SHAPE, D, Z = (3, 32, 32), 3072, 256
SD = math.sqrt(0.5)
PARAMETERS = {
    "cifar10-review": 3_543_552,
    "cifar10-learned-scale": 3_543_552 + 1,
    "cifar10-predicted-scale": 3_543_552 + 1_575_936,
    "cifar10-convolutional": 2_246_048,
}


def declared(name: str) -> VAE:
    """The pair of a recipe."""
    path = next(path for path in RECIPES if path.stem == name)
    torch.manual_seed(0)
    vae = build_model(Recipe(**read_options(["--config", str(path)])), SHAPE)
    assert isinstance(vae, VAE)
    return vae


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_declare_what_their_comments_say(path: Path) -> None:
    vae, text = declared(path.stem), path.read_text()
    count = PARAMETERS[path.stem]
    assert sum(p.numel() for p in vae.parameters()) == count
    assert f"{count:,}" in text or path.stem in ("cifar10-learned-scale", "cifar10-convolutional")
    assert 0.6 < PARAMETERS["cifar10-convolutional"] / PARAMETERS["cifar10-review"] < 0.7  # "about two thirds"
    for source in ("--data FILE.npz", "--data-root DIR"):
        assert f"python -m pyrovae.fit --config recipes/{path.name} {source}" in text


def test_the_layers_are_those_of_the_review() -> None:
    """1,573,376 and twice 131,328 in the guide, whose one head is both of the review's; 131,584 and 1,575,936."""
    vae = declared("cifar10-review")
    table = layers(vae.model, vae.guide, torch.rand(2, *SHAPE))
    found = table[table.parameters > 0]
    assert list(found.parameters) == [1_573_376, 2 * 131_328, 131_584, 1_575_936]
    assert list(found["output shape"]) == [(512,), (2 * Z,), (512,), (D,)]
    assert list(table.layer).count("GELU") == 2
    assert table.parameters.sum() == 3_543_552


def test_a_recipe_trains_on_a_file_for_as_many_epochs_as_are_asked_for(tmp_path, capsys) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images[:60], x_test=images[60:])
    words = ["--config", str(next(p for p in RECIPES if p.stem == "cifar10-review")), "--epochs", "1", "--no-plots"]
    words += ["--data", str(tmp_path / "images.npz"), "--eval-K", "2", "--out", str(tmp_path / "run")]
    assert command(words) == 0
    assert "3,543,552 parameters" in capsys.readouterr().out
    run = open_run(str(tmp_path / "run"))
    assert (run.recipe.epochs, run.recipe.batch_size, run.recipe.lr, run.recipe.seed) == (1, 32, 1e-3, 0)
    assert len(run.history) == 1
    assert run.evaluation["bits_per_dimension"] > 8.83


def test_an_option_wins_over_the_recipe_and_leaves_the_rest_of_its_part() -> None:
    path = next(path for path in RECIPES if path.stem == "cifar10-review")
    recipe = Recipe(**read_options(["--config", str(path), "--likelihood.mean", "sigmoid", "--data-root", "elsewhere"]))
    assert (recipe.likelihood.name, recipe.prior.name) == ("Gaussian", "IsotropicNormal")
    assert recipe.likelihood.settings["mean"] == "sigmoid"
    assert recipe.likelihood.settings["scale"] == recipe.prior.settings["scale"] == SD
    assert (recipe.data, recipe.data_root, recipe.epochs) == ("cifar10", "elsewhere", 100)


# ---------------------------------------------------------------------------------------------- what is mistaken in it


def test_the_sum_of_squared_errors_is_a_gaussian_of_variance_a_half() -> None:
    """SSE = -log p(x|z) - (D/2) log(pi), whatever x and z: 1758.31 nats of 3072 elements."""
    constant = D / 2 * math.log(math.pi)
    assert round(constant, 2) == 1758.31
    likelihood = declared("cifar10-review").likelihood.double()
    x, z = torch.rand(5, *SHAPE, dtype=torch.float64), torch.randn(5, Z, dtype=torch.float64)
    likelihood.initialise(x)
    with torch.no_grad():
        sse = (x - likelihood(z).mean).square().flatten(1).sum(1)
        torch.testing.assert_close(sse, -likelihood(z).log_prob(x) - constant, rtol=1e-12, atol=0)


def test_no_reconstruction_gets_a_variance_of_a_half_below_8_83_bits() -> None:
    """The density of dequantised pixels in [0, 1] is at most pi^(-1/2) each: 8 + log2(pi) / 2 bits, for any mean and z.

    A uniform density on [0, 1] has 8, whatever it is shown, and the mixture over z is not above its densest part.
    """
    measure = Measure("density", "pixels in [0, 1]", 256, D)
    floor = 8 + math.log2(math.pi) / 2
    assert round(floor, 2) == 8.83
    perfect = dist.Normal(torch.rand(D, dtype=torch.float64), SD).to_event(1)
    assert measure.bits_per_dimension(perfect.log_prob(perfect.mean).item()) == pytest.approx(floor, abs=1e-12)
    assert measure.bits_per_dimension(0.0) == 8
    # In levels, on [0, 256): x is 256 times as large, its density 1/256 of that of each element, and the bits the same.
    levels = dist.Normal(256 * perfect.mean, 256 * SD).to_event(1)
    bits = -levels.log_prob(256 * perfect.mean).item() / (D * math.log(2))
    assert bits == pytest.approx(floor, abs=1e-12)
    # log p(x) = log E p(x|z) of a pair with that scale, and the best x there can be: what it decodes at some z.
    decoder, encoder = MLP(2, 4, hidden=(8,)), MLP(4, hidden=(8,))
    vae = VAE(IsotropicNormal(2, SD), Gaussian(decoder, SD), MeanFieldNormal(encoder, 2)).double()
    z = vae.prior().sample((1000,))
    with torch.no_grad():
        marginal = vae.likelihood(z).log_prob(vae.decode(z[0])).logsumexp(0) - math.log(1000)
    assert Measure("density", "", 256, 4).bits_per_dimension(marginal.item()) > floor


def test_the_kl_line_is_the_one_to_a_prior_of_sd_0_707() -> None:
    """sum(mu^2 + s^2 - log s - 1/2) = KL(q || N(0, I/2)) + (Z/2) log 2, and not KL(q || N(0, I))."""
    torch.manual_seed(0)
    guide = MeanFieldNormal(MLP(7, hidden=(5,)), 6).double()
    x = 3 * torch.randn(40, 7, dtype=torch.float64)
    with torch.no_grad():
        mu, raw = guide.parameters_of(x).chunk(2, -1)
        sigma = softplus(raw) + SCALE_FLOOR
        line = (mu.square() + sigma.square() - sigma.log() - 0.5).sum(-1)
        kl = {sd: kl_divergence(guide(x), IsotropicNormal(6, sd).double()()) for sd in (SD, 1.0)}
    torch.testing.assert_close(line, kl[SD] + 6 / 2 * math.log(2), rtol=1e-12, atol=1e-12)
    assert (line - kl[1.0]).std() > 0.1  # no constant makes it the other
    grid = torch.linspace(0.5, 1.5, 10_001, dtype=torch.float64)
    least = grid[(grid.square() - grid.log()).argmin()]  # of one element at mu = 0: there q is the prior it is to
    assert least.item() == pytest.approx(SD, abs=1e-4)


def test_a_prior_of_another_scale_is_the_standard_one_in_another_unit() -> None:
    z = torch.randn(9, 3, dtype=torch.float64)
    narrow, standard = IsotropicNormal(3, SD).double()(), StandardNormal(3).double()()
    torch.testing.assert_close(narrow.log_prob(SD * z), standard.log_prob(z) - 3 * math.log(SD), rtol=1e-12, atol=0)
    assert torch.equal(IsotropicNormal(3).double()().log_prob(z), standard.log_prob(z))


# -------------------------------------------------------------------------------------------------------------- layers


def tied() -> VAE:
    """A pair whose decoder is its encoder's head transposed: one parameter in two modules."""
    encoder = Network(torch.nn.Linear(4, 4, bias=False), 4, 4)
    decoder = Network(torch.nn.Linear(4, 4, bias=False), 4, 4)
    decoder.body.weight = encoder.body.weight
    return VAE(StandardNormal(4), Gaussian(decoder), MeanFieldNormal(encoder, 4))


def with_pseudo_inputs() -> VAE:
    guide = MeanFieldNormal(ConvEncoder((1, 8, 8), channels=(2,), hidden=5), 3)
    return VAE(VampPrior(guide, (1, 8, 8), 4), Gaussian(ConvDecoder(3, (1, 8, 8), channels=(2,), hidden=5)), guide)


@pytest.mark.parametrize("make", [tied, with_pseudo_inputs])
def test_the_table_counts_every_parameter_once(make) -> None:
    vae = make()
    x = torch.rand(3, *vae.event_shape)
    table = layers(vae.model, vae.guide, x)
    assert table.parameters.sum() == sum(p.numel() for p in vae.parameters())


def test_the_table_has_shapes_of_one_row_in_the_order_of_the_run() -> None:
    vae, x = with_pseudo_inputs(), torch.rand(3, 1, 8, 8)
    before = torch.get_rng_state()
    table = layers(vae.model, vae.guide, x).set_index("name")
    assert torch.equal(torch.get_rng_state(), before)
    names = list(table.index)
    assert names.index("guides.0.head") < names.index("prior") < names.index("likelihood.decoder")
    shapes = table[table.parameters > 0]["output shape"]
    assert dict(shapes) == {
        "guides.0.encoder.body.2": (2, 4, 4),
        "guides.0.encoder.body.5": (5,),
        "guides.0.head": (6,),
        "prior": (3,),
        "likelihood.decoder.body.1": (5,),
        "likelihood.decoder.body.3": (32,),
        "likelihood.decoder.body.7": (1, 8, 8),
        "likelihood.decoder": (1, 8, 8),
        "likelihood": (1, 8, 8),
    }


def test_the_table_of_plain_functions_and_of_pyro_parameters() -> None:
    import pyro

    encoder, decoder = torch.nn.Linear(3, 2), torch.nn.Linear(1, 3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            scale = pyro.param("scale_of_the_table", torch.ones(3))
            pyro.sample("x", dist.Normal(decoder(z + y), scale).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    table = layers(model, guide, torch.rand(4, 3), given=(torch.rand(4, 1),))
    assert [tuple(row) for row in table.drop(columns="name").to_numpy()] == [
        ("Linear", (2,), 8),
        ("Linear", (3,), 6),
        ("pyro.param", (3,), 3),
    ]
    pyro.get_param_store().clear()
