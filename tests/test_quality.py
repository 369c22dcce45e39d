"""Quality of reconstructions and samples: exact answers, and the libraries' own."""

import math
import re

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.quality import QUALITIES, is_image, psnr, reconstruction_quality, sse, ssim


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
    for quality in (psnr, ssim):
        assert quality(255 * x, 255 * y, 255.0).tolist() == pytest.approx(quality(x, y, 1.0).tolist(), abs=1e-5)


def test_ssim_of_channels_is_the_mean_of_theirs_and_a_grey_axis_changes_nothing(colour: tuple[Tensor, Tensor]) -> None:
    x, y = colour
    channels = torch.stack([ssim(x[:, i], y[:, i], 1.0) for i in range(3)])
    assert ssim(x, y, 1.0).tolist() == pytest.approx(channels.mean(0).tolist())
    assert torch.equal(ssim(x[:, :1], y[:, :1], 1.0), channels[0])


def test_rows_that_are_no_images_have_only_their_squared_error() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    values = reconstruction_quality(x, torch.zeros(2, 2), data_range=1.0)
    assert {word: value.tolist() for word, value in values.items()} == {"sse": [5.0, 0.0]}
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
    for quality in QUALITIES[1:]:
        with pytest.raises(UsageError, match="data_range: expected a number above 0, got 0"):
            quality.of(x, y, 0)
