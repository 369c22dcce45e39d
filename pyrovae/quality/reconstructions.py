r"""How near reconstructions are to their rows: squared error, signal to noise, and structural similarity.

For a row x and its reconstruction y of D elements, and a data range R, the greatest less the least value that an
element can have:

    SSE(x, y)  = sum_d (x_d - y_d)^2               from 0; in squared units of x, summed over the elements
    PSNR(x, y) = 10 log10(R^2 D / SSE)             in decibels; infinite where y = x
    SSIM(x, y) = mean over windows of
                 (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

with m, s^2 and s_xy the means, variances and covariance in a window of 7 x 7 pixels, c_1 = (0.01 R)^2 and c_2 =
(0.03 R)^2: from -1, not from 0, to 1 where y = x. SSIM is scikit-image's `structural_similarity` with its own settings;
that of a colour image is the mean of its channels'. R is never left to a library: scikit-image takes 2 for floats, from
-1 to 1, and for pixels in [0, 1] that makes c_1 and c_2 four times as large, which flatters every reconstruction.

None of them is a likelihood: they look at one reconstruction, and not at what the model gives to all other data. Only
for a Gaussian of one fixed variance v is there a relation, between SSE and the expectation under q(z|x):

    E_q[log p(x|z)] = -E_q[SSE(x, mean of p(x|z))] / (2 v) - (D / 2) log(2 pi v)

References:
    Wang, Bovik, Sheikh and Simoncelli 2004, Image Quality Assessment: From Error Visibility to Structural Similarity,
    https://doi.org/10.1109/TIP.2003.819861
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.settings import Number, check

WINDOW = 7  # pixels a side, of SSIM


def sse(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Sum of squared errors of each row, over all its elements, in squared units of x.

    Args:
        x: Data, shape (N, *event).
        reconstruction: Of each row, same shape.

    Returns:
        Shape (N,), in double precision on the CPU.

    Raises:
        UsageError: the shapes differ.

    Example:
        >>> sse(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([25.], dtype=torch.float64)
    """
    _check(x, reconstruction)
    return (x.double() - reconstruction.double()).square().flatten(1).sum(1).cpu()


def psnr(x: Tensor, reconstruction: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each row, in decibels: infinite for a perfect reconstruction, larger is better.

    Args:
        x: Data, shape (N, *event).
        reconstruction: Of each row, same shape.
        data_range: R, the greatest less the least value that an element can have: 1 for pixels in [0, 1].

    Returns:
        Shape (N,), in double precision on the CPU.

    Raises:
        UsageError: the shapes differ, or the data range is not above 0.

    Example:
        >>> psnr(torch.zeros(1, 4), torch.full((1, 4), 0.1), data_range=1.0).round(decimals=4)
        tensor([20.], dtype=torch.float64)
    """
    check("data_range", data_range, Number(above=0))
    return 10 * (data_range**2 * x[0].numel() / sse(x, reconstruction)).log10()


def ssim(x: Tensor, reconstruction: Tensor, data_range: float) -> Tensor:
    """Structural similarity of each row, from -1 to 1: 1 for a perfect reconstruction.

    Args:
        x: Images, shape (N, H, W), (N, 1, H, W) or (N, 3, H, W), of at least 7 x 7 pixels.
        reconstruction: Of each row, same shape.
        data_range: R, the greatest less the least value that a pixel can have: 1 for pixels in [0, 1].

    Returns:
        Shape (N,), in double precision on the CPU; about a tenth of a millisecond for each 28 x 28 pixels.

    Raises:
        UsageError: the shapes differ, rows are no images or too small for the window, or the data range is not above 0.
    """
    from skimage.metrics import structural_similarity

    _check(x, reconstruction)
    check("data_range", data_range, Number(above=0))
    if not is_image(x.shape[1:]):
        raise UsageError(
            f"x: expected images of shape (N, H, W), (N, 1, H, W) or (N, 3, H, W) with H and W of at least {WINDOW}, "
            f"the window of SSIM, got {tuple(x.shape)}; reshape flat rows, for example x.unflatten(1, (28, 28))"
        )
    height, width = x.shape[-2:]
    pairs = (t.detach().double().cpu().reshape(len(x), -1, height, width).numpy() for t in (x, reconstruction))
    values = [
        structural_similarity(image, copy, win_size=WINDOW, data_range=data_range, channel_axis=0)
        for image, copy in zip(*pairs, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether rows of that shape are images that SSIM's window fits: (H, W), (1, H, W) or (3, H, W), at least 7 x 7.

    >>> is_image((3, 32, 32)), is_image((784,)), is_image((1, 6, 6)), is_image((2, 32, 32))
    (True, False, False, False)
    """
    grey_or_colour = len(event_shape) == 2 or (len(event_shape) == 3 and event_shape[0] in (1, 3))
    return grey_or_colour and min(event_shape[-2:]) >= WINDOW


@dataclass(frozen=True)
class Quality:
    """A measure of reconstructions, and what a table or a figure says of it.

    Attributes:
        word: In names of keys.
        title: In tables and figures.
        unit: In words; of a number without one, its range.
        better: "smaller" or "larger".
        of: (x, reconstruction, data_range) -> values of the rows, shape (N,).
        images: Whether it is of images alone.
    """

    word: str
    title: str
    unit: str
    better: str
    of: Callable[[Tensor, Tensor, float], Tensor]
    images: bool

    @property
    def column(self) -> str:
        """Its name in metrics.csv."""
        return f"reconstruction_{self.word}"


QUALITIES = (
    Quality("sse", "SSE", "squared units of x", "smaller", lambda x, y, _: sse(x, y), False),
    Quality("psnr", "PSNR", "dB", "larger", psnr, True),
    Quality("ssim", "SSIM", "from -1 to 1", "larger", ssim, True),
)


def reconstruction_quality(x: Tensor, reconstruction: Tensor, data_range: float) -> dict[str, Tensor]:
    """All of `QUALITIES` that suit the rows: SSE of any, PSNR and SSIM of images, where data have a range.

    Args:
        x: Data, shape (N, *event).
        reconstruction: Of each row, same shape.
        data_range: R, the greatest less the least value that an element can have: 1 for pixels in [0, 1], 0 where all
            data are one number.

    Returns:
        By `word`, the values of the rows, shape (N,), in double precision on the CPU.

    Raises:
        UsageError: the shapes differ, or the data range is below 0.

    Example:
        >>> x = torch.rand(5, 1, 28, 28)
        >>> {word: values.mean().item() for word, values in reconstruction_quality(x, x, data_range=1.0).items()}
        {'sse': 0.0, 'psnr': inf, 'ssim': 1.0}
    """
    check("data_range", data_range, Number(least=0))
    image = is_image(x.shape[1:]) and data_range > 0
    return {q.word: q.of(x, reconstruction, data_range) for q in QUALITIES if image or not q.images}


def _check(x: Tensor, reconstruction: Tensor) -> None:
    """Refuse reconstructions of another shape than their rows, which would be broadcast."""
    if x.shape != reconstruction.shape or x.ndim < 2:
        raise UsageError(
            f"reconstruction: expected the shape of x, (N, *event), {tuple(x.shape)}, got "
            f"{tuple(reconstruction.shape)}; pass one reconstruction for each row"
        )
