"""Models that reconstruct and have no p(x): PCA, the autoencoder and the denoising one, and how they are reported."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_mean
from sklearn.decomposition import PCA as Oracle
from torch import Tensor
from torch.testing import assert_close

import pyrovae
from pyrovae.errors import CheckpointError, DataError, PairError, UsageError
from pyrovae.inference import ELBO, fit, gaps, log_marginal
from pyrovae.models import MLP, PCA, Autoencoder, Gaussian, GaussianMixture, Masking, Network, Reconstruction
from pyrovae.runs.scoring import Scoring

D, Z = 6, 2


def rows(count: int = 300, seed: int = 0) -> Tensor:
    """Rows near a plane, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(Z, D, generator=torch.Generator().manual_seed(9))
    codes = torch.randn(count, Z, generator=generator) * torch.tensor([2.0, 1.0])
    return codes @ axes + 0.1 * torch.randn(count, D, generator=generator) + 5


def principal(x: Tensor, latent_dim: int = Z) -> PCA:
    model = PCA(x.shape[1:], latent_dim).to(x.dtype)
    model.initialise(x)
    return model


def linear(x: Tensor, scale: float = 0.5, hidden: tuple[int, ...] = ()) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(
        MLP(D, hidden=hidden or (D,), activation="tanh"), Z, Gaussian(MLP(Z, (D,), hidden=hidden), scale)
    )
    model.initialise(x)
    return model


def trained(model: Autoencoder, x: Tensor, epochs: int = 40) -> Autoencoder:
    fit(
        *(model.model, model.guide, x, ELBO()),
        epochs=epochs,
        batch_size=50,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        compile="off",
        progress=False,
    )
    return model.eval()


@pytest.mark.parametrize("latent_dim", [1, 2, 6])
def test_pca_is_that_of_scikit_learn(latent_dim: int) -> None:
    """Its codes up to their signs, and its reconstructions, also of images."""
    x = rows().double()
    oracle = Oracle(latent_dim, svd_solver="full").fit(x.numpy())
    model = principal(x, latent_dim)
    codes = torch.from_numpy(oracle.transform(x.numpy()))
    signs = (codes * model.encode(x)).sum(0).sign()
    assert_close(signs * model.encode(x), codes, rtol=1e-8, atol=1e-8)
    wanted = torch.from_numpy(oracle.inverse_transform(codes.numpy()))
    assert_close(model.reconstruct(x), wanted, rtol=1e-8, atol=1e-8)
    images = x.unflatten(1, (1, 2, 3))
    assert_close(principal(images, latent_dim).reconstruct(images).flatten(1), wanted, rtol=1e-8, atol=1e-8)


def test_a_linear_autoencoder_spans_the_plane_of_pca() -> None:
    """No linear codes have a smaller squared error; trained ones come near it, in the same plane."""
    x = rows() - 5
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(D, D), torch.nn.Linear(Z, D)
    model = Autoencoder(Network(encoder, (D,), (D,)), Z, Gaussian(Network(decoder, (Z,), (D,)), 1.0))
    model.initialise(x)
    trained(model, x, 130)
    best, found = ((m.reconstruct(x) - x).square().sum(1).mean() for m in (principal(x), model))
    assert best <= found < 1.2 * best
    axes = torch.linalg.qr(decoder.weight.detach()).Q
    angles = torch.linalg.svdvals(axes.T @ principal(x).axes)
    assert angles.min() > 0.999


def test_what_it_maximises_is_the_squared_error_in_units_of_its_scale() -> None:
    """log p(x | f(x)) = -SSE / 2 s^2 - D log(s sqrt(2 pi)): the flat prior and the point add nothing."""
    x, scale = rows(), 0.5
    model = linear(x, scale).eval()
    kept = fit(
        model.model, model.guide, x, ELBO(), epochs=1, batch_size=300, validation=x, progress=False, compile="off"
    )
    model.eval()
    errors = (model.reconstruct(x) - x).square().sum(1).mean().item()
    wanted = -errors / (2 * scale**2) - D * math.log(scale * math.sqrt(2 * math.pi))
    assert kept.history[0]["validation_objective"] == pytest.approx(wanted, rel=1e-5)
    assert not any("bound" in name or name.startswith("kl") for name in kept.history[0])


@pytest.mark.parametrize("model", [linear(rows()), principal(rows())])
def test_nothing_about_p_of_x_is_had_from_it(model: Reconstruction) -> None:
    for ask in (log_marginal, gaps):
        with pytest.raises(PairError, match="under which x has no density; give it a proper prior"):
            ask(model.model, model.guide, rows(20))


def test_a_denoising_one_sees_corrupted_rows_while_it_is_trained_and_mends_them() -> None:
    """Of rows with hidden elements its reconstructions are nearer to the whole rows than a plain one's."""
    x, masking = rows(), Masking(0.3)
    errors = []
    for corruption in (None, masking):
        torch.manual_seed(0)
        likelihood = Gaussian(MLP(Z, (D,), hidden=(20,)), 0.5)
        model = Autoencoder(MLP(D, hidden=(20,)), Z, likelihood, corruption)
        model.initialise(x)
        trained(model, x, 60)
        assert torch.equal(model.encode(x), model.encode(x))  # nothing is corrupted any more
        torch.manual_seed(1)
        errors.append((model.reconstruct(masking.corrupt(x)) - x).square().sum(1).mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_draws_are_decoded_from_a_density_of_codes_that_validation_rows_choose() -> None:
    x, validation = rows().double(), rows(100, seed=1).double()
    model = principal(x)
    with pytest.raises(UsageError, match=r"there is no prior to draw codes from; .* fit_codes\(train, validation\)"):
        model.sample(3)
    found = model.fit_codes(x, validation, components=(1, 2, 5))
    codes, held_out = model.encode(x), model.encode(validation)
    bounds = {}
    for count in (1, 2, 5):
        mixture = GaussianMixture(Z, components=count).double()
        mixture.fit(codes)
        bounds[count] = mixture.log_prob(held_out).mean().item()
    assert found.log_prob(held_out).mean().item() == pytest.approx(bounds[found.components], abs=1e-9)
    assert bounds[1] == max(bounds.values()) or bounds[found.components] > bounds[1]
    torch.manual_seed(0)
    draws = model.sample(20_000)
    assert_mean(draws, model.loc + (found.weights @ found.means) @ model.axes.T)
    assert_close(model.reconstruct(draws), draws)  # in the plane of the codes, and nowhere else


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="latent_dim: expected at most 6, the elements of x, got 7"):
        PCA(D, 7)
    with pytest.raises(UsageError, match=r"likelihood: expected one of x of shape \(6,\) given 3 latent dimensions"):
        Autoencoder(MLP(D), 3, Gaussian(MLP(Z, (D,)), 1.0))
    with pytest.raises(DataError, match="variance 0"):
        principal(torch.ones(10, D))
    with pytest.raises(UsageError, match="event shape"):
        principal(rows()).__class__(5, 2).initialise(rows())


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shared = {"latent_dim": [4], "device": "cpu", "seed": 1, "likelihood": "gaussian"}
    pyrovae.train({**shared, "model": "pca"}, folder / "pca", plots=True)
    options = {"model": "autoencoder", "epochs": 2, "network": {"name": "mlp", "hidden": [20]}, "compile": "off"}
    pyrovae.train({**shared, **options}, folder / "autoencoder", plots=True)
    return folder


@pytest.mark.parametrize("name", ["pca", "autoencoder"])
def test_a_report_has_no_number_that_could_be_a_likelihood(runs: Path, name: str) -> None:
    values = json.loads((runs / name / "evaluation.json").read_text())
    assert values["verdict"] == "reconstruction only"
    assert values["reason"].startswith("no p(x): its guide is a point, without a density")
    assert not {"log_marginal", "elbo", "kl", "K", "bits_per_dimension", "test_bound"} & values.keys()
    run = pyrovae.runs.directory.open_run(runs / name)
    x = run.rows().test
    errors = (run.model().reconstruct(x) - x).square().flatten(1).sum(1)
    assert values["reconstruction_quality"]["sse"]["mean"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert not any("bound" in column for column in run.history)
    drawn = {path.stem for path in (runs / name / "plots").iterdir()} - {"training_curves"}
    assert drawn == {"samples", "reconstructions", "latent_map", "traversals"}


def test_a_run_keeps_the_density_of_its_codes(runs: Path, tmp_path: Path) -> None:
    run = pyrovae.runs.directory.open_run(runs / "pca")
    model, again = pyrovae.load(runs / "pca"), run.model()
    assert model.codes is not None
    for a, b in zip(model.codes.state_dict().values(), again.codes.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    rows = run.rows()
    codes = model.encode(rows.validation).double()
    plain = GaussianMixture(4, components=1).double()
    plain.fit(model.encode(rows.transform(rows.train)).double())
    assert model.codes.log_prob(codes).mean() > plain.log_prob(codes).mean()
    copied = tmp_path / "copy"
    import shutil

    shutil.copytree(runs / "pca", copied)
    (copied / "codes.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"codes\.safetensors: cannot be read"):
        pyrovae.load(copied)


def test_the_run_of_pca_is_pca(runs: Path) -> None:
    run = pyrovae.runs.directory.open_run(runs / "pca")
    rows = run.rows()
    with pyrovae.seeding.seeded(1, "model"):
        pyrovae.runs.build.build_model(run.recipe, rows.event_shape)
        x = rows.transform(rows.train)
    oracle = Oracle(4, svd_solver="full").fit(x.flatten(1).double().numpy())
    wanted = oracle.inverse_transform(oracle.transform(rows.test.flatten(1).double().numpy()))
    np.testing.assert_allclose(run.model().reconstruct(rows.test).flatten(1).numpy(), wanted, atol=1e-5)


def test_commands_say_that_there_is_no_p_of_x(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Evaluation says reconstructions, a comparison has them in that table alone, and gaps refuses."""
    from pyrovae import gaps as command
    from pyrovae.runs.comparing import compare_runs
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.evaluation import evaluate

    both = [open_run(runs / "pca"), open_run(runs / "autoencoder")]
    lines: list[str] = []
    evaluate(both[0], Scoring(10), device="cpu", say=lines.append)
    said = "\n".join(lines)
    assert "reconstruction only, no p(x)" in said
    assert "SSIM" in said
    assert "log p(x)" not in said
    assert "nats" not in said
    with pytest.raises(UsageError, match="its guide is a point, which has no density"):
        command.command([str(runs / "pca")])
    lines.clear()
    scored = compare_runs(both, Scoring(10), tmp_path / "out", components=(2,), say=lines.append)
    assert {"pca", "autoencoder"}.isdisjoint(entry.name for entry in scored)
    assert not {"pca", "autoencoder"} & {*_column(tmp_path / "out" / "density.csv")}
    assert {"pca", "autoencoder"} <= {
        *_column(next(path for path in (tmp_path / "out").glob("*.csv") if path.stem != "density"))
    }


def _column(path: Path) -> list[str]:
    import pandas as pd

    return list(pd.read_csv(path)["name"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"model": "autoencoder", "elbo": "iwae"},
            r"elbo: not used, since the model \(autoencoder\) reconstructs only",
        ),
        ({"model": "pca", "prior": "VampPrior"}, r"prior: not used, since the model \(pca\) reconstructs only"),
        ({"model": "pca", "network": "conv"}, "network: not used, since the model .pca. has no networks"),
        ({"model": "pca", "epochs": 3}, "epochs: not used, since a pca is fit in closed form"),
        ({"model": "autoencoder", "condition": "label"}, "condition: not used, since .* is given nothing"),
        ({"model": "autoencoder", "latent_dim": [3, 2]}, "has one code, got 2 sizes"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pyrovae.Recipe(**options)
