r"""Residual convolutions, on grids of features: from images to grids, from grids to images, and to and from vectors.

A grid is of shape (C, h, w): C channels at each of h w places. A stage from the data inwards is a convolution that
divides height and width by its stride, rounded up, and then residual blocks,

    h -> h + f(h),      plain       f = W2 * act(W1 * act(h))
                        bottleneck  f = W3 * act(W2 * act(W1 * act(h))),  W1 and W3 of one place, between C/4 channels

with no normalisation, which would tie rows to one another. Nothing but f has an activation before it, so that h passes
unchanged through any number of blocks. So that deep stacks start near the identity, the last convolution of each of n
blocks starts 1/sqrt(n) times as large as others, and without bias: what all of them add to h is then no larger than
what one would.

References:
    He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027
    Child 2021, Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images (the scale at the
        start), https://arxiv.org/abs/2011.10650
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.networks import ACTIVATIONS, Activation, Biased, Network, Residual, Shape, as_shape, image_shape
from pyrovae.settings import Count, Whole, checked

Block = Literal["plain", "bottleneck"]
Stride = Annotated[int, Whole(1, 2)]


class GridEncoder(Network):
    """From an image, or a grid, to a grid of features: for each stage a convolution and residual blocks.

    Its output is h of the last block, not yet through an activation, of shape (channels[-1], h, w): each stage divides
    height and width by `stride`, rounded up, so that they are those of the input divided by `downsampling`.

    Args:
        in_shape: (C, H, W), or (H, W) for a single channel.
        channels: Channels of the stages, from the image inwards.
        blocks: Number of residual blocks of each stage.
        activation: Activation in the blocks.
        block: What the blocks are.
        stride: Of the convolution of each stage.

    Attributes:
        downsampling: By what height and width are divided: stride to the power of the number of stages.
    """

    of_images = True

    @checked
    def __init__(
        self,
        in_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        blocks: Count = 2,
        activation: Activation = "silu",
        block: Block = "plain",
        stride: Stride = 2,
    ) -> None:
        in_shape, channels = as_shape(in_shape), tuple(channels)
        depth, height, width = image_shape(in_shape)
        sizes = passed_through((height, width), len(channels), stride)
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (depth, height, width))]
        for before, after, size in zip((depth, *channels[:-1]), channels, sizes[1:], strict=True):
            layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
            layers += residual_blocks((after, *size), blocks, activation, block, blocks * len(channels))
        super().__init__(nn.Sequential(*layers), in_shape, (channels[-1], *sizes[-1]))
        self.downsampling = stride ** len(channels)


class GridDecoder(Biased):
    """From a grid of features to an image: the stages of `GridEncoder` the other way round.

    Each stage has its residual blocks, and then nearest-neighbour upsampling to the exact size that the encoder passed
    through and a convolution.

    Args:
        in_shape: (C, h, w) with any number of channels, h and w those of the image divided by `stride` for each stage,
            rounded up.
        out_shape: (..., H, W); all dimensions before the last two are channels.
        channels: Channels of the stages, from the image inwards, as for `GridEncoder`.
        blocks: Number of residual blocks of each stage.
        activation: Activation in the blocks, and before the last convolution.
        block: What the blocks are.
        stride: By what each stage multiplies height and width.

    Raises:
        UsageError: height and width of the grid are not those that the stages make an image of `out_shape` of.
    """

    of_images = True

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        blocks: Count = 2,
        activation: Activation = "silu",
        block: Block = "plain",
        stride: Stride = 2,
    ) -> None:
        in_shape, out_shape, channels = as_shape(in_shape), as_shape(out_shape), tuple(channels)
        depth, height, width = image_shape(out_shape)
        sizes = passed_through((height, width), len(channels), stride)
        if len(in_shape) != 3 or in_shape[1:] != sizes[-1]:
            raise UsageError(
                f"in_shape: {len(channels)} stages of stride {stride} make {height} x {width} of a grid (C, "
                f"{sizes[-1][0]}, {sizes[-1][1]}), got {in_shape}; make them equal"
            )
        layers: list[nn.Module] = [nn.Conv2d(in_shape[0], channels[-1], kernel_of(sizes[-1]), padding="same")]
        stages = zip(channels[::-1], (*channels[-2::-1], depth), sizes[:0:-1], sizes[-2::-1], strict=True)
        for i, (before, after, size, larger) in enumerate(stages):
            last = i == len(channels) - 1
            layers += residual_blocks((before, *size), blocks, activation, block, blocks * len(channels))
            layers += [ACTIVATIONS[activation]()] if last else []
            layers += [nn.Upsample(size=larger), nn.Conv2d(before, after, 3, padding=1, bias=not last)]
        super().__init__(nn.Sequential(*layers, nn.Flatten(), nn.Unflatten(1, out_shape)), in_shape, out_shape)


class Flat(Network):
    """A network of grids whose input, output or both travel as vectors, a channel after another.

    Args:
        network: From (C, h, w), or to it.
        ends: Which side is flat, from or to a vector, or both.
    """

    @checked
    def __init__(self, network: Network, ends: Literal["in", "out", "both"] = "both") -> None:
        in_shape, out_shape = network.in_shape, network.out_shape
        flat_in, flat_out = ends != "out", ends != "in"
        before, after = [nn.Unflatten(1, in_shape)] * flat_in, [nn.Flatten()] * flat_out
        super().__init__(
            nn.Sequential(*before, network, *after),
            math.prod(in_shape) if flat_in else in_shape,
            math.prod(out_shape) if flat_out else out_shape,
        )
        self.places = math.prod(out_shape[1:]) if flat_out else 1

    @property
    def output_bias(self) -> nn.Parameter | None:
        (network,) = (module for module in self.body.children() if isinstance(module, Network))
        return network.output_bias


class OfPlaces(nn.Module):
    """A linear map of the channels of a grid, the same at every place, from and to vectors.

    Args:
        places: h w, how many there are.
        inputs: Number of elements of the input, a multiple of it.
        outputs: Number of elements of the output, a multiple of it.

    Raises:
        UsageError: the places cannot be given as many outputs each.
    """

    def __init__(self, places: int, inputs: int, outputs: int) -> None:
        super().__init__()
        if outputs % places:
            raise UsageError(
                f"guide: makes {outputs} numbers, which {places} places of a grid cannot make alike; use one of "
                "independent elements, as MeanFieldNormal"
            )
        self.map = nn.Conv1d(inputs // places, outputs // places, 1)
        self.places = places

    @property
    def bias(self) -> Tensor:
        """What is added at each place."""
        return self.map.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """From (*batch, inputs) to (*batch, outputs)."""
        grid = x.reshape(-1, self.map.in_channels, self.places)
        return self.map(grid).reshape(*x.shape[:-1], self.map.out_channels * self.places)


class ResidualConvEncoder(Network):
    """Residual convolutions, for images: from any shape (C, H, W) through a grid to a vector of features.

    Args:
        in_shape: (C, H, W), or (H, W) for a single channel.
        channels: Channels of the stages, from the image inwards; each halves height and width (rounded up).
        blocks: Number of residual blocks of each stage.
        hidden: Width of the dense layer, the number of features.
        activation: Activation of the hidden layers.
        block: What the blocks are.
    """

    word = "residual-conv"
    of_images = True
    of_grids = True  # layers of a hierarchy with a state are on its grids

    @checked
    def __init__(
        self,
        in_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        blocks: Count = 2,
        hidden: Count = 256,
        activation: Activation = "silu",
        block: Block = "plain",
    ) -> None:
        act, grid = ACTIVATIONS[activation], GridEncoder(in_shape, channels, blocks, activation, block)
        body = nn.Sequential(grid, act(), nn.Flatten(), nn.Linear(math.prod(grid.out_shape), hidden), act())
        super().__init__(body, in_shape, hidden)


class ResidualConvDecoder(Network):
    """Residual convolutions from a vector through a grid to an image of any shape.

    Args:
        in_shape: Event shape of the input, e.g. the number of latent dimensions; flattened.
        out_shape: (..., H, W); all dimensions before the last two are channels.
        channels: Channels of the stages, from the image inwards, as for `ResidualConvEncoder`.
        blocks: Number of residual blocks of each stage.
        hidden: Width of the dense layer.
        activation: Activation of the hidden layers.
        block: What the blocks are.
    """

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        blocks: Count = 2,
        hidden: Count = 256,
        activation: Activation = "silu",
        block: Block = "plain",
    ) -> None:
        in_shape, out_shape = as_shape(in_shape), as_shape(out_shape)
        _, height, width = image_shape(out_shape)
        small = (channels[-1], *passed_through((height, width), len(channels))[-1])
        grid = GridDecoder(small, out_shape, channels, blocks, activation, block)
        dense = [nn.Linear(math.prod(in_shape), hidden), ACTIVATIONS[activation](), nn.Linear(hidden, math.prod(small))]
        super().__init__(nn.Sequential(nn.Flatten(), *dense, nn.Unflatten(1, small), grid), in_shape, out_shape)

    @property
    def output_bias(self) -> nn.Parameter | None:
        *_, grid = (module for module in self.body.children() if isinstance(module, GridDecoder))
        return grid.output_bias


def residual_blocks(
    shape: tuple[int, ...], blocks: int, activation: Activation = "silu", block: Block = "plain", among: int = 0
) -> list[nn.Module]:
    """So many residual blocks of vectors (C,), or of grids (C, h, w).

    Args:
        shape: Of what passes through them: of their input and output.
        blocks: How many.
        activation: Activation in the blocks.
        block: What they are.
        among: How many one state passes through in all, these among them, which decides how they start; 0: these.
    """
    return [residual_block(shape, activation, block, 1 / math.sqrt(among or blocks)) for _ in range(blocks)]


def residual_block(shape: tuple[int, ...], activation: Activation, block: Block, scale: float) -> Residual:
    """h + f(h) for h of a shape (C,) or (C, h, w), the last layer of f so many times as large as usual at the start."""
    act, channels = ACTIVATIONS[activation], shape[0]
    inner = channels if block == "plain" else max(1, channels // 4)
    if block == "plain":
        layers = [mixing(shape, channels), mixing(shape, channels)]
    else:
        narrow = (inner, *shape[1:])
        layers = [mixing(shape, inner, 1), mixing(narrow, inner), mixing(narrow, channels, 1)]
    with torch.no_grad():
        layers[-1].weight.mul_(scale)
        layers[-1].bias.zero_()  # type: ignore[union-attr]
    return Residual(nn.Sequential(*(module for layer in layers for module in (act(), layer))))


def mixing(shape: tuple[int, ...], outputs: int, kernel: int = 3) -> nn.Linear | nn.Conv2d:
    """A linear map to so many channels: of all elements of a vector (C,); of a place of a grid and those around it."""
    if len(shape) == 1:
        return nn.Linear(shape[0], outputs)
    return nn.Conv2d(shape[0], outputs, min(kernel, kernel_of(shape[1:])), padding="same")


def kernel_of(size: tuple[int, ...]) -> int:
    """Width of a convolution on a grid of a height and width: of a single place, 1, since there is nothing around."""
    return 3 if max(size) > 1 else 1


def passed_through(size: tuple[int, int], stages: int, stride: int = 2) -> list[tuple[int, int]]:
    """Heights and widths before and after each of some stages that divide them by a stride, rounded up."""
    sizes = [size]
    for _ in range(stages):
        sizes.append((math.ceil(sizes[-1][0] / stride), math.ceil(sizes[-1][1] / stride)))
    return sizes
