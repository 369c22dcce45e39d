"""The two pairs of networks that are timed, in plain torch, layer for layer those of `pyrovae.models.networks`.

"dense" is 784-200-200-100 and 50-200-200-784 with tanh, for binary pixels; "convolutional" is for colours, 3x32x32:
channels 32 and 64 and 256 features with ReLU, and back by upsampling.
"""

import torch
from torch import Tensor, nn

Z = 50
SCALE = 0.1  # of the Gaussian likelihood of colours
EVENT = {"dense": (784,), "convolutional": (3, 32, 32)}


class PixelBias(nn.Module):
    """Adds one bias per pixel and channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def layers(before: int, after: int, hidden: int = 200) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(before, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, after)
    )


def make_encoder(model: str) -> nn.Sequential:
    """x (N, *event) to location and raw scale (N, 2 Z)."""
    if model == "dense":
        return layers(784, 2 * Z)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 256),
        nn.ReLU(),
        nn.Linear(256, 2 * Z),
    )


def make_decoder(model: str) -> nn.Sequential:
    """z (N, Z) to logits or means (N, *event)."""
    if model == "dense":
        return layers(Z, 784)
    return nn.Sequential(
        nn.Linear(Z, 256),
        nn.ReLU(),
        nn.Linear(256, 64 * 8 * 8),
        nn.ReLU(),
        nn.Unflatten(1, (64, 8, 8)),
        nn.Upsample(size=(16, 16)),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(size=(32, 32)),
        nn.Conv2d(32, 3, 3, padding=1, bias=False),
        PixelBias(3, 32, 32),
    )


def count_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
