"""Pictures that move: frames along a path, as a GIF."""

from __future__ import annotations

import io

import numpy as np
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.plots.style import PLAIN, Style, as_array

SIDE = 112  # pixels of a picture on the screen, at least
PAUSE = 90  # milliseconds of a frame
EDGE = 4  # pixels between pictures


def film(frames: Tensor, style: Style = PLAIN, across: int = 8) -> bytes:
    """Draw frames one after the other, and back, without end.

    Args:
        frames: Shape (frames, pictures, *event), with event (H, W), (1, H, W) or (3, H, W); the pictures of a frame
            stand in rows of `across`.
        style: How data are drawn.
        across: How many stand in a row.

    Returns:
        The content of a GIF.

    Raises:
        UsageError: the event is no picture.
    """
    from PIL import Image

    event = tuple(frames.shape[2:])
    if len(event) not in (2, 3) or (len(event) == 3 and event[0] not in (1, 3)) or 0 in frames.shape:
        raise UsageError(f"frames: expected shape (frames, pictures, *event) of images, got {tuple(frames.shape)}")
    low, high = style.limits
    values = ((as_array(frames) - low) / (high - low)).clip(0, 1)
    if len(event) == 2:
        values = values[:, :, None]
    if style.ink and values.shape[2] == 1:
        values = 1 - values
    times = max(1, -(-SIDE // max(event[-2:])))
    levels = np.kron((255 * values).round().astype(np.uint8), np.ones((times, times), np.uint8))
    pictures = [Image.fromarray(_mosaic(frame, min(across, len(frame)))) for frame in levels]
    made = io.BytesIO()
    turns = pictures + pictures[-2:0:-1]
    turns[0].save(made, format="GIF", save_all=True, append_images=turns[1:], duration=PAUSE, loop=0)
    return made.getvalue()


def _mosaic(pictures: np.ndarray, across: int) -> np.ndarray:
    """Pictures, shape (P, C, H, W), in rows of `across`, as one (H', W', C) or (H', W')."""
    down = -(-len(pictures) // across)
    channels, height, width = pictures.shape[1:]
    sheet = np.full((down * (height + EDGE) + EDGE, across * (width + EDGE) + EDGE, channels), 200, np.uint8)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, across)
        top, left = EDGE + row * (height + EDGE), EDGE + column * (width + EDGE)
        sheet[top : top + height, left : left + width] = np.moveaxis(picture, 0, -1)
    return sheet[..., 0] if channels == 1 else sheet
