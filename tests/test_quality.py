"""Quality of reconstructions and samples: exact answers, and the libraries' own."""

import doctest
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from conftest import assert_mean
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

import pyrovae
from pyrovae import compare, evaluate, fit
from pyrovae.data.spaces import Continuous
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.models import BernoulliMixture
from pyrovae.plots import training_curves
from pyrovae.quality import (
    QUALITIES,
    frechet_distance,
    gaussian_distance,
    is_image,
    psnr,
    reconstruction_quality,
    sse,
    ssim,
)
from pyrovae.runs import features, quality
from pyrovae.runs.comparing import of_quality
from pyrovae.runs.quality import Reconstructs, epoch_metrics, of_reconstructions
from pyrovae.runs.quality_tables import quality_table


@pytest.fixture
def colour() -> tuple[Tensor, Tensor]:
    """Colour images in [0, 1], and noisy copies."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 16, 12, generator=generator)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator)


def test_a_perfect_reconstruction(colour: tuple[Tensor, Tensor]) -> None:
    x, _ = colour
    values = reconstruction_quality(x, x, data_range=1.0)
    assert list(values) == ["sse", "psnr", "ssim"]
    assert values["sse"].tolist() == [0.0] * 6
    assert values["psnr"].tolist() == [math.inf] * 6
    assert values["ssim"].tolist() == [1.0] * 6


def test_the_negative_of_an_image_is_below_zero(colour: tuple[Tensor, Tensor]) -> None:
    """SSIM is from -1, not from 0."""
    x, _ = colour
    assert (ssim(x, 1 - x, data_range=1.0) < -0.8).all()
    checked = (torch.arange(16)[:, None] + torch.arange(16)) % 2.0  # means of 1/2 nearly: all is in the covariance
    assert ssim(checked[None], 1 - checked[None], data_range=1.0).item() == pytest.approx(-1, abs=0.02)


def test_each_row_is_the_libraries_own(colour: tuple[Tensor, Tensor]) -> None:
    x, y = colour
    pairs = list(zip(x.double().numpy(), y.double().numpy(), strict=True))
    # Its channels last and in another precision, as its documentation has them.
    similar = [
        structural_similarity(np.moveaxis(a, 0, -1), np.moveaxis(b, 0, -1), channel_axis=-1, data_range=1.0)
        for a, b in pairs
    ]
    noise = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs]
    assert ssim(x, y, 1.0).tolist() == pytest.approx(similar, abs=1e-12)
    assert psnr(x, y, 1.0).tolist() == pytest.approx(noise, abs=1e-10)
    assert sse(x, y).tolist() == pytest.approx([((a - b) ** 2).sum() for a, b in pairs])


def test_ssim_of_two_constant_images_in_closed_form() -> None:
    """Without variance only the means are left: (2 a b + c) / (a^2 + b^2 + c), c = (0.01 R)^2."""
    a, b, constant = 0.2, 0.6, (0.01 * 3) ** 2
    images = [torch.full((1, 8, 8), value, dtype=torch.float64) for value in (a, b)]
    expected = (2 * a * b + constant) / (a**2 + b**2 + constant)
    assert ssim(*images, data_range=3.0).item() == pytest.approx(expected, abs=1e-12)


def test_what_the_data_range_does(colour: tuple[Tensor, Tensor]) -> None:
    """Twice the range is 6.02 dB more, and flatters SSIM; data and range in other units change neither."""
    x, y = colour
    assert (psnr(x, y, 2.0) - psnr(x, y, 1.0)).tolist() == pytest.approx([20 * math.log10(2)] * 6)
    assert (ssim(x, y, 2.0) > ssim(x, y, 1.0)).all()
    left_out = structural_similarity(x[0].numpy(), y[0].clamp(0, 1).numpy(), channel_axis=0, data_range=2)
    assert ssim(x[:1], y[:1].clamp(0, 1), 2.0).item() == pytest.approx(float(left_out), abs=1e-4)
    for of in (psnr, ssim):
        assert of(255 * x, 255 * y, 255.0).tolist() == pytest.approx(of(x, y, 1.0).tolist(), abs=1e-5)


def test_ssim_of_channels_is_the_mean_of_theirs_and_a_grey_axis_changes_nothing(colour: tuple[Tensor, Tensor]) -> None:
    x, y = colour
    channels = torch.stack([ssim(x[:, i], y[:, i], 1.0) for i in range(3)])
    assert ssim(x, y, 1.0).tolist() == pytest.approx(channels.mean(0).tolist())
    assert torch.equal(ssim(x[:, :1], y[:, :1], 1.0), channels[0])


def test_rows_that_are_no_images_have_only_their_squared_error() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    values = reconstruction_quality(x, torch.zeros(2, 2), data_range=1.0)
    assert {word: value.tolist() for word, value in values.items()} == {"sse": [5.0, 0.0]}
    images = torch.ones(2, 8, 8)  # all data one number: of range 0
    assert list(reconstruction_quality(images, images, data_range=0.0)) == ["sse"]
    assert is_image((8, 8))
    assert not any(map(is_image, [(6, 8), (64,), (4, 8, 8), (1, 1, 8, 8)]))


def test_the_squared_error_is_the_gaussian_likelihood_up_to_a_constant() -> None:
    """-log N(x; y, v) = SSE / (2 v) + (D / 2) log(2 pi v): for 3072 elements of variance 1/2, 1758.31 nats."""
    x, y, v = torch.rand(2, 3072), torch.rand(2, 3072), 0.5
    log_density = torch.distributions.Normal(y.double(), math.sqrt(v)).log_prob(x.double()).sum(1)
    constant = 3072 / 2 * math.log(2 * math.pi * v)
    assert constant == pytest.approx(1758.31, abs=0.005)
    assert (-log_density - sse(x, y) / (2 * v)).tolist() == pytest.approx([constant] * 2)


def test_what_makes_no_sense_is_refused(colour: tuple[Tensor, Tensor]) -> None:
    x, y = colour
    with pytest.raises(UsageError, match=re.escape("reconstruction: expected the shape of x, (N, *event), (6, 3")):
        sse(x, y[:1])
    with pytest.raises(UsageError, match="at least 7, the window of SSIM"):
        ssim(x[..., :6], y[..., :6], 1.0)
    for measure in QUALITIES[1:]:
        with pytest.raises(UsageError, match="data_range: expected a number above 0, got 0"):
            measure.of(x, y, 0)


# --------------------------------------------------------------------------------------------------- Frechet distance


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    """Commuting covariances: the sum of (s_i - t_i)^2; others: by scipy's square root of a matrix."""
    s, t, shift = torch.rand(6) + 0.5, torch.rand(6) + 0.5, torch.randn(6)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    first, second = q @ torch.diag(s.double() ** 2) @ q.T, q @ torch.diag(t.double() ** 2) @ q.T
    expected = (shift.double().square().sum() + (s.double() - t.double()).square().sum()).item()
    assert gaussian_distance(torch.zeros(6), first, shift, second) == pytest.approx(expected, abs=1e-10)
    other = torch.cov(torch.randn(6, 40, dtype=torch.float64))
    root = scipy.linalg.sqrtm((first @ other).numpy()).real.trace()
    expected = (first.trace() + other.trace()).item() - 2 * root
    assert gaussian_distance(torch.zeros(6), first, torch.zeros(6), other) == pytest.approx(expected, abs=1e-8)
    assert gaussian_distance(torch.zeros(6), other, torch.zeros(6), first) == pytest.approx(expected, abs=1e-8)


def test_a_set_is_at_no_distance_from_itself_nor_constant_features_from_theirs() -> None:
    x = torch.randn(100, 4) @ torch.randn(4, 4)
    mean, covariance = x.mean(0), torch.cov(x.T)
    assert gaussian_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-5)
    points = torch.ones(80, 2)
    found = frechet_distance(points, 3 * points)
    assert (found.extrapolated, found.plain, found.error) == pytest.approx((8.0, 8.0, 0.0), abs=1e-9)


def pairs_of_gaussians(count: int, rows: int, dimensions: int, shift: float, scale: float) -> list[Any]:
    """Distances between N(0, I) and N(shift, scale^2 I), each from rows of its own."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, rows, dimensions, generator=generator)
    return [frechet_distance(draw(), shift + scale * draw()) for _ in range(count)]


def test_the_plain_distance_is_too_high_by_what_theory_says_and_the_extrapolated_is_not() -> None:
    """Of equal Gaussians: (2 F + F (F + 1) / 2) / n to first order, 0.0625 for F = 5 and n = 400."""
    found = pairs_of_gaussians(60, rows=400, dimensions=5, shift=0.0, scale=1.0)
    plain = torch.tensor([f.plain for f in found])
    bias = (2 * 5 + 5 * 6 / 2) / 400
    error = plain.std().item() / math.sqrt(60)
    assert plain.mean().item() == pytest.approx(bias, abs=4 * error)
    assert bias > 10 * error
    halves = torch.tensor([f.by_rows[200] for f in found]).mean().item()
    assert halves == pytest.approx(2 * bias, rel=0.15)
    assert_mean(torch.tensor([f.extrapolated for f in found]), 0.0, least=bias / 2)


def test_the_extrapolated_distance_is_the_true_one_with_its_error() -> None:
    truth = 4 * 0.5**2 + 4 * 0.3**2
    found = pairs_of_gaussians(60, rows=200, dimensions=4, shift=0.5, scale=1.3)
    extrapolated = torch.tensor([f.extrapolated for f in found])
    assert_mean(extrapolated, truth)
    assert torch.tensor([f.plain for f in found]).mean() > truth + 0.05
    errors = torch.tensor([f.error for f in found])
    assert errors.mean().item() == pytest.approx(extrapolated.std().item(), rel=0.3)
    assert list(found[0].by_rows) == [200, 100, 50]
    for f in found:  # the line through the first two, at 1/n = 0
        slope = (f.by_rows[100] - f.by_rows[200]) / (1 / 100 - 1 / 200)
        assert f.extrapolated == pytest.approx(f.by_rows[200] - slope / 200, abs=1e-9)


def test_rows_sorted_by_class_are_dealt_to_parts() -> None:
    """Else a part would have a class alone, and a distance within the data itself."""
    y = torch.arange(400)[:, None] // 100 * 5.0
    x = y + torch.randn(400, 2)
    found = frechet_distance(x, y[torch.randperm(400)] + torch.randn(400, 2))
    assert abs(found.extrapolated) < 5 * found.error
    assert found.by_rows[100] < 5


def test_features_that_make_no_sense_are_refused() -> None:
    x = torch.randn(100, 4)
    for other, words in (
        (x[:50], "draw as many samples as there are rows"),
        (x[:, :3], "two matrices of one shape"),
        (x * math.nan, "finite"),
    ):
        with pytest.raises(UsageError, match=words):
            frechet_distance(x, other)
    with pytest.raises(UsageError, match=r"100 rows are too few for 20 dimensions.*at least 160 rows"):
        frechet_distance(x.repeat(1, 5), x.repeat(1, 5))


# ------------------------------------------------------------------------------------------------------------- in runs


SMALL = "--data digits --latent-dim 2 --network.hidden 16 --epochs 2 --eval-K 10 --device cpu --no-plots"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one pair, and a conditional pair, that no test may change."""
    folder = tmp_path_factory.mktemp("quality")
    for words in ("--seed 1 --out {}/a-s1", "--seed 2 --out {}/a-s2", "--seed 1 --condition label --out {}/given"):
        assert fit.command([*SMALL.split(), *words.format(folder).split()]) == 0
    return folder


def by_hand(run: Path, split: str) -> dict[str, Tensor]:
    """The quality of a run's reconstructions of all rows of a split, decoded from the means of its guide."""
    model, rows = pyrovae.load(run), pyrovae.load_data("digits").rows("mass")
    x = getattr(rows, split)
    with torch.no_grad():
        y = model.likelihood(model.guides[0](x).mean).mean
    pairs = list(zip(x[:, 0].double().numpy(), y[:, 0].double().numpy(), strict=True))
    return {
        "sse": (x.double() - y.double()).square().sum((1, 2, 3)),
        "psnr": torch.tensor([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]),
        "ssim": torch.tensor([structural_similarity(a, b, data_range=1) for a, b in pairs]),
    }


def test_each_epoch_and_the_report_have_those_of_held_out_rows(trained: Path) -> None:
    metrics, report = (
        pd.read_csv(trained / "a-s1" / "metrics.csv"),
        json.loads((trained / "a-s1" / "evaluation.json").read_text())["reconstruction_quality"],
    )
    last, test = by_hand(trained / "a-s1", "validation"), by_hand(trained / "a-s1", "test")
    assert int(metrics["validation_bound"].argmax()) == 1  # so that the weights are those of the last epoch
    for word in ("sse", "psnr", "ssim"):
        assert metrics[f"reconstruction_{word}"].iloc[-1] == pytest.approx(last[word].mean().item(), abs=1e-6)
        assert report[word]["mean"] == pytest.approx(test[word].mean().item(), abs=1e-6)
        error = test[word].double().std().item() / math.sqrt(len(test[word]))
        assert report[word]["error_over_rows"] == pytest.approx(error, abs=1e-6)
    assert (report["rows"], report["data_range"]) == (179, 1.0)
    assert report["about"].endswith("no likelihoods")


def test_a_conditional_pair_reconstructs_given_its_label(trained: Path) -> None:
    model, rows = pyrovae.load(trained / "given"), pyrovae.load_data("digits").rows("mass", condition="label")
    report = json.loads((trained / "given" / "evaluation.json").read_text())["reconstruction_quality"]
    (y,) = rows.given["test"]
    assert report["sse"]["mean"] == pytest.approx(sse(rows.test, model.reconstruct(rows.test, y)).mean().item())
    wrong = sse(rows.test, model.reconstruct(rows.test, y.roll(1, 0))).mean().item()
    assert abs(report["sse"]["mean"] - wrong) > 0.01


def test_the_report_says_that_they_are_no_likelihoods(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.command([str(trained / "a-s1"), "--K", "5", "--rows", "50"])
    lines = capsys.readouterr().out.splitlines()
    (about,) = [i for i, line in enumerate(lines) if "no likelihoods" in line]
    expected = by_hand(trained / "a-s1", "test")["ssim"][:50].mean().item()
    assert f"{expected:.3f}" in lines[about + 3]
    assert [line.split()[0] for line in lines[about + 1 : about + 4]] == ["SSE", "PSNR", "SSIM"]
    assert "from -1 to 1; data range 1; larger is better" in lines[about + 3]


class Halves:
    """A baseline that reconstructs and has no density."""

    description = "1/2 everywhere"

    def reconstruct(self, x: Tensor) -> Tensor:
        """1/2 everywhere."""
        return torch.full_like(x, 0.5)


def test_compare_has_a_table_of_their_own(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(trained / name) for name in ("a-s1", "a-s2")]
    compare.command([*runs, "--K", "5", "--rows", "60", "--components", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    below = out[out.index("no likelihoods") :]
    assert out.index("log p(x) [95 %]") < out.index("no likelihoods")
    assert "mixture" not in below  # which reconstructs nothing
    assert "data range 1" in below
    table = pd.read_csv(tmp_path / "mass-quality.csv")
    assert table["name"].tolist() == ["a (2 seeds)"]
    both = [by_hand(Path(run), "test") for run in runs]
    for word in ("sse", "psnr", "ssim"):
        values = (both[0][word][:60] + both[1][word][:60]) / 2
        assert table[word].item() == pytest.approx(values.mean().item(), abs=1e-6)
        assert table[f"{word}_error"].item() == pytest.approx(values.double().std().item() / math.sqrt(60), abs=1e-6)
    assert not {"sse", "psnr", "ssim"} & set(pd.read_csv(tmp_path / "mass.csv").columns)


def test_what_has_no_density_is_a_row_of_that_table(trained: Path) -> None:
    x = pyrovae.load_data("digits").rows("mass").test[:20]
    mixture: Any = BernoulliMixture((1, 8, 8), components=2)
    models = [("a", [pyrovae.load(trained / "a-s1")]), ("mixture", [mixture])]
    table = quality_table(of_quality(models, Batch(x), 1.0, others=[Halves()]))
    assert table["name"].tolist() == ["a", "1/2 everywhere"]  # the smallest squared error first
    assert table["sse"].tolist()[1] == 64 / 4
    assert table["sse_error"].tolist()[1] == 0


def test_a_table_of_somebody_elses_is_not_replaced(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mass-quality.csv").write_text("mine\n")
    with pytest.raises(UsageError, match=r"mass-quality.csv: was not written by pyrovae.compare"):
        compare.command([str(trained / "a-s1"), "--K", "5", "--out", str(tmp_path)])


def test_the_data_range_is_that_of_the_data() -> None:
    """1 for binary pixels and dequantised levels, whatever their number; else what validation rows span."""
    digits, points = pyrovae.load_data("digits"), pyrovae.load_data("three-gaussians")
    assert digits.rows("mass").data_range == digits.rows("density").data_range == 1.0
    plain = points.rows("density")
    assert plain.data_range == (plain.validation.max() - plain.validation.min()).item()
    standardised = points.rows(Continuous(standardize=True))
    assert standardised.data_range == pytest.approx(standardised.validation.max() - standardised.validation.min())
    assert standardised.data_range != plain.data_range


def test_points_of_the_plane_have_only_a_squared_error_and_few_rows_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "EPOCH_ROWS", 100)
    rows = pyrovae.load_data("three-gaussians").rows("density")
    seen = []

    class Zero(torch.nn.Linear):
        def reconstruct(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return 0 * x

    measured = epoch_metrics(Zero(2, 2), rows)
    assert measured is not None
    expected = rows.validation[:100].square().sum(1).mean().item()
    assert measured() == {"reconstruction_sse": pytest.approx(expected)}
    assert sum(seen) == 100
    assert epoch_metrics(BernoulliMixture((8,), components=2), rows) is None
    assert of_reconstructions(BernoulliMixture((8,), components=2), Batch(rows.test), rows) is None
    assert isinstance(Halves(), Reconstructs)


def test_curves_of_reconstructions_have_panels_of_their_own() -> None:
    metrics = pd.DataFrame(
        {"epoch": [1, 2], "reconstruction": [-3.0, -2.0], "reconstruction_sse": [9, 8], "reconstruction_ssim": [0, 0.5]}
    )
    panels = {axes.get_title(): axes for axes in training_curves(metrics).axes}
    assert set(panels) == {"E log p(x|z)", "SSE of reconstructions", "SSIM of reconstructions"}
    assert panels["SSE of reconstructions"].get_ylabel() == "squared units of x"
    assert panels["SSIM of reconstructions"].lines[0].get_ydata().tolist() == [0, 0.5]


def test_the_classifier_is_the_same_for_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn before: else the distances of two commands would not compare."""
    monkeypatch.setattr(features, "STEPS", 100)
    rows, said = pyrovae.load_data("digits").rows("mass"), []
    first = features.classifier_features(rows, say=said.append)
    torch.randn(7)
    again = features.classifier_features(rows)
    assert torch.equal(first(rows.test), again(rows.test))
    assert first.description == again.description
    assert first.description in said[0]
    assert first(rows.test).shape == (179, features.WIDTH)
    x, labels = first(rows.test), rows.labels["test"]
    assert labels is not None
    centres = torch.stack([x[labels == k].mean(0) for k in range(10)])
    assert (torch.cdist(x, centres).argmin(1) == labels).double().mean() > 0.5  # they tell classes apart


class Copies:
    """What "draws" given rows, of which it has as many as are asked for."""

    def __init__(self, *rows: Tensor) -> None:
        self.rows = iter(rows)

    def sample(self, num_samples: int, *given: Tensor) -> Tensor:
        """The next rows, which must be as many."""
        drawn = next(self.rows)
        assert len(drawn) == num_samples
        return drawn


def test_draws_are_compared_with_rows_in_blocks_on_features_of_both() -> None:
    x = torch.rand(700, 1, 8, 8)
    means = features.Features(lambda x: x.flatten(1)[:, ::16], "means")
    near = features.frechet_of(Copies(x[:500], x[500:]), Batch(x), means)
    assert near.plain == pytest.approx(0, abs=1e-9)
    far = features.frechet_of(Copies(x[:500] + 1, x[500:] + 1), Batch(x), means)
    assert far.plain == pytest.approx(4, abs=1e-5)  # 4 features moved by 1
    assert far.extrapolated == pytest.approx(4, abs=5 * far.error + 0.01)


def test_draws_of_a_conditional_pair_are_given_what_the_rows_are() -> None:
    seen = []

    class Given:
        def sample(self, num_samples: int, y: Tensor) -> Tensor:
            seen.append(y)
            return torch.randn(num_samples, 2)

    y = torch.arange(600.0)[:, None]
    found = features.of_frechet(Given(), Batch(torch.randn(600, 2), (y,)), features.Features(lambda x: x, "x"))
    assert torch.equal(torch.cat(seen), y)
    assert found is not None
    assert (found["dimensions"], [point["rows"] for point in found["by_rows"]]) == (2, [600, 300, 150])
    assert features.of_frechet(Halves(), Batch(y), features.Features(lambda x: x, "x")) is None


def test_evaluate_and_compare_have_the_same_distance(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "STEPS", 30)
    run = shutil.copytree(trained / "a-s1", tmp_path / "a-s1")
    evaluate.command([str(run), "--K", "5", "--frechet"])
    report = json.loads((run / "evaluation.json").read_text())["frechet"]
    out = capsys.readouterr().out
    assert "squared Frechet distance of rows and as many draws of x; no likelihood" in out
    assert f"{report['by_rows'][0]['distance']:.2f}" in out
    compare.command([str(run), "--K", "5", "--frechet", "--components", "2", "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "mass-quality.csv").set_index("name")
    assert table.loc["a-s1", "frechet"] == pytest.approx(report["extrapolated"])
    assert table.loc["a-s1", "frechet_plain"] == pytest.approx(report["by_rows"][0]["distance"])
    assert table.loc["a-s1", "features"] == report["features"]
    # A mixture draws, and reconstructs nothing.
    assert table.loc["mixture of 2 Bernoullis", ["frechet_plain", "frechet_error"]].gt(0).all()
    assert math.isnan(table.loc["mixture of 2 Bernoullis", "sse"])
    assert report["features"] in " ".join(capsys.readouterr().out.split())


def test_too_few_rows_are_refused_before_anything_is_scored(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "STEPS", 1)
    with pytest.raises(UsageError, match="50 rows are too few for 16 dimensions"):
        evaluate.command([str(trained / "a-s1"), "--K", "5", "--rows", "50", "--frechet"])


def test_rows_without_labels_need_features_of_ones_own() -> None:
    rows = replace(pyrovae.load_data("digits").rows("mass"), labels={"train": None, "validation": None, "test": None})
    with pytest.raises(UsageError, match="no labels to train a classifier on; from Python, give features"):
        features.classifier_features(rows)


def test_every_block_of_the_page_is_true() -> None:
    page = Path(__file__).parents[1] / "docs" / "quality.md"
    found = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert found.attempted > 25
    assert found.failed == 0
