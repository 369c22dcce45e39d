"""Residual convolutions: by the formula of their blocks, near the identity at the start, on grids of any size."""

import itertools
import math

import pytest
import torch
from conftest import EXACT
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.models import GridDecoder, GridEncoder, ResidualConvDecoder, ResidualConvEncoder
from pyrovae.models.grids import residual_blocks
from pyrovae.models.networks import Network

SHAPES = [(1, 28, 28), (3, 7, 5), (1, 1, 3), (6, 9), (2, 3, 5, 4)]


def networks(shape: tuple[int, ...], **settings: object) -> list[Network]:
    """From an image to a grid and to a vector, and back."""
    small = {"channels": (3, 4), "blocks": 1, **settings}
    encoder = GridEncoder(shape, **small)
    vectors = [ResidualConvEncoder(shape, hidden=6, **small), ResidualConvDecoder(2, shape, hidden=6, **small)]
    return [network.double() for network in (encoder, GridDecoder(encoder.out_shape, shape, **small), *vectors)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", ["plain", "bottleneck"])
def test_particles_are_rows_to_every_convolution(shape: tuple[int, ...], block: str) -> None:
    """Leading dimensions are flattened into one, values are those of the loop, and the way back ends at any size."""
    for network in networks(shape, block=block):
        ranks: list[int] = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, args, ranks=ranks: ranks.append(args[0].ndim))
        x = torch.randn(2, 3, *network.in_shape, dtype=torch.float64)
        out = network(x)
        assert set(ranks) == {4}
        for index in itertools.product(range(2), range(3)):
            assert_close(out[index], network(x[index]), **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_grid_is_the_image_divided_by_the_downsampling(shape: tuple[int, ...], stride: int) -> None:
    """As is said, rounded up: what a place of the grid sees is around its own place of the image."""
    encoder = GridEncoder(shape, (3, 4, 5), blocks=1, stride=stride)
    assert encoder.downsampling == stride**3
    assert encoder.out_shape == (5, *(math.ceil(n / encoder.downsampling) for n in shape[-2:]))
    assert GridDecoder(encoder.out_shape, shape, (3, 4, 5), blocks=1, stride=stride).out_shape == shape
    with pytest.raises(UsageError, match=rf"make {shape[-2]} x {shape[-1]} of a grid \(C, .*, got \(5, 9, 1\)"):
        GridDecoder((5, 9, 1), shape, (3, 4, 5), stride=stride)


def by_hand(h: Tensor, layers: list[nn.Conv2d]) -> Tensor:
    """h + W2 * act(W1 * act(h)), or with a third convolution."""
    f = h
    for layer in layers:
        f = conv2d(silu(f), layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)
    return h + f


@pytest.mark.parametrize("block", ["plain", "bottleneck"])
def test_a_block_adds_its_convolutions_to_what_it_is_given(block: str) -> None:
    (found,) = residual_blocks((8, 5, 4), 1, "silu", block)
    layers = [module for module in found.double().modules() if isinstance(module, nn.Conv2d)]
    shapes = {"plain": [(8, 8, 3), (8, 8, 3)], "bottleneck": [(2, 8, 1), (2, 2, 3), (8, 2, 1)]}
    assert [layer.weight.shape[:3] for layer in layers] == shapes[block]
    h = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    assert_close(found(h), by_hand(h, layers), **EXACT)


@pytest.mark.parametrize("block", ["plain", "bottleneck"])
@pytest.mark.parametrize("shape", [(16, 6, 6), (16,)], ids=str)
def test_deep_stacks_start_near_the_identity(shape: tuple[int, ...], block: str) -> None:
    """However many blocks: all of them together change h by less than half of its size, as one does."""
    torch.manual_seed(0)
    h = torch.randn(20, *shape)
    for blocks in (1, 8, 64):
        with torch.no_grad():
            added = nn.Sequential(*residual_blocks(shape, blocks, block=block))(h) - h
        assert 0.01 < (added.square().mean() / h.square().mean()).sqrt() < 0.5


def test_a_likelihood_starts_the_last_bias_of_a_decoder() -> None:
    """Of both decoders it is added to every element of the output, and to nothing else."""
    for network in networks((2, 3, 5, 4))[1::2]:
        x = torch.randn(4, *network.in_shape, dtype=torch.float64)
        before, bias = network(x), torch.randn(2, 3, 5, 4, dtype=torch.float64)
        with torch.no_grad():
            network.output_bias.add_(bias)
        assert_close(network(x), before + bias, **EXACT)
        names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
        assert len(names) == len(list(network.parameters()))
