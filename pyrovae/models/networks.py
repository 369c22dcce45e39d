"""Networks: tensors to tensors, with no Pyro in them.

Every network maps one event to one event, and carries any number of leading (batch, particle) dimensions along:
they are flattened into one before the layers and restored after them, so that a convolution never sees a particle
dimension. Wrap a module of your own in `Network` to give it the same manners. Residual convolutions are in `grids`; the
architectures that go by a name, each an encoder and a decoder with the same settings, in `NETWORKS` of `choices`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.views import View
from pyrovae.settings import Count, Share, Whole, checked

Activation = Literal["tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus"]
MODULES = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)
ACTIVATIONS: dict[str, type[nn.Module]] = dict(zip(get_args(Activation), MODULES, strict=True))

Shape = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """A shape given as a whole number or a sequence, as a tuple."""
    return (shape,) if isinstance(shape, int) else tuple(shape)


class Network(nn.Module):
    """A module of one batch dimension, extended to any leading dimensions.

    Args:
        body: Maps (B, *in_shape) to (B, *out_shape).
        in_shape: Event shape of the input.
        out_shape: Event shape of the output.

    Attributes:
        word: What the architecture is called where it is chosen by name.
        of_images: Whether its input is an image, so that what goes beside x goes into more channels.
        centred: Whether its input is x less its mean, in units of its deviation, as a guide gives it to an encoder.
        by_rows: Whether its output for a row is a function of that row alone, without noise: what is one row, repeated
            by `expand`, is then computed once, as where discrete latents are summed over the same states for all data.
        view: Of an encoder, what it sees of x; None: x.
        places: Of an output that is a grid (C, h, w) as a vector, a channel after another, h w; else 1. What a guide
            makes of such features, it makes of those of each place alike.
        grid: Height and width of the grid that an encoder's features are channels of; None: they have no places.
    """

    word: ClassVar[str]
    of_images: ClassVar[bool] = False
    centred: ClassVar[bool] = True
    by_rows: bool = False
    view: View | None
    places: int = 1
    grid: tuple[int, int] | None

    def __init__(self, body: nn.Module, in_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        self.in_shape, self.out_shape = as_shape(in_shape), as_shape(out_shape)
        if not self.in_shape or not self.out_shape:
            raise UsageError("network: the event shape () has no elements to flatten; use (1,) and x.unsqueeze(-1)")
        self.body: nn.Module = body
        self.view = None
        self.grid = None

    def seeing(self, view: View) -> Self:
        """This network as an encoder that looks at x through a view, which the guide then applies.

        Raises:
            UsageError: what is seen has not the shape of the network's input.
        """
        if view.out_shape != self.in_shape:
            raise UsageError(f"view: shows shape {view.out_shape}, the network takes {self.in_shape}; make them equal")
        self.view = view
        return self

    @property
    def output_bias(self) -> nn.Parameter | None:
        """The parameter added last to the output, of prod(out_shape) elements, or None: a likelihood starts it."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Map (*batch, *in_shape) to (*batch, *out_shape).

        Raises:
            UsageError: x does not end in `in_shape` or is not of the network's type of numbers, or the body does not
                return `out_shape`.
        """
        check_event(x, self.in_shape)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        x = once(x, len(batch)) if self.by_rows else x
        try:
            out = self.body(x.reshape(-1, *self.in_shape))
        except RuntimeError as error:
            wanted = next((p.dtype for p in self.parameters()), x.dtype)
            if "dtype" in str(error) and x.dtype != wanted:
                raise UsageError(
                    f"x: expected {wanted}, that of the network, got {x.dtype}; pass x.to({wanted})"
                ) from error
            raise
        if out.shape[1:] != self.out_shape:
            raise UsageError(f"network: expected output shape {self.out_shape}, got {tuple(out.shape[1:])}")
        return out.reshape(*x.shape[: len(batch)], *self.out_shape).expand(*batch, *self.out_shape)


def once(x: Tensor, dims: int) -> Tensor:
    """x with one of each of its first dimensions along which it repeats itself, as a view made by `expand` does."""
    for dim in range(dims):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


class Biased(Network):
    """A network and a bias for each element of its output, so that a likelihood can start it at the mean of the data.

    Args:
        body: Maps (B, *in_shape) to (B, *out_shape).
        in_shape: Event shape of the input.
        out_shape: Event shape of the output.
    """

    def __init__(self, body: nn.Module, in_shape: Shape, out_shape: Shape) -> None:
        super().__init__(body, in_shape, out_shape)
        self.bias = nn.Parameter(torch.zeros(self.out_shape))

    @property
    def output_bias(self) -> nn.Parameter:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class MLP(Network):
    """Dense layers: a multilayer perceptron between any two event shapes.

    Args:
        in_shape: Event shape of the input; flattened.
        out_shape: Event shape of the output. None: the last hidden layer is the output, as an encoder's features.
        hidden: Widths of the hidden layers.
        activation: Activation of the hidden layers.
        dropout: Probability of dropping a hidden unit while training.
    """

    word = "mlp"

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape | None = None,
        hidden: Sequence[Count] = (200, 200),
        activation: Activation = "tanh",
        dropout: Share = 0.0,
    ) -> None:
        in_shape = as_shape(in_shape)
        widths = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        if out_shape is None:
            super().__init__(nn.Sequential(*layers), in_shape, widths[-1])
        else:
            out_shape = as_shape(out_shape)
            last = nn.Linear(widths[-1], math.prod(out_shape))
            super().__init__(nn.Sequential(*layers, last, nn.Unflatten(1, out_shape)), in_shape, out_shape)
        self.by_rows = not dropout

    @property
    def output_bias(self) -> nn.Parameter | None:
        return bias_of_output(self.body)


class Residual(nn.Module):
    """A residual block: h + f(h).

    Args:
        body: f, which maps h to its own shape.

    References:
        He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, h: Tensor) -> Tensor:
        return h + self.body(h)


class ResidualMLP(Network):
    """Dense residual blocks: h + W act(V act(h)), between a linear map from the input and one to the output.

    Args:
        in_shape: Event shape of the input; flattened.
        out_shape: Event shape of the output. None: the activation of the last block is the output, as an encoder's
            features.
        width: Width of the blocks.
        blocks: Number of residual blocks.
        activation: Activation in the blocks.
        dropout: Probability of dropping a hidden unit of a block while training.
    """

    word = "residual"

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape | None = None,
        width: Count = 200,
        blocks: Count = 2,
        activation: Activation = "silu",
        dropout: Share = 0.0,
    ) -> None:
        in_shape, act = as_shape(in_shape), ACTIVATIONS[activation]
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(math.prod(in_shape), width)]
        for _ in range(blocks):
            dropped = [nn.Dropout(dropout)] if dropout else []
            block = [act(), nn.Linear(width, width), act(), *dropped, nn.Linear(width, width)]
            layers.append(Residual(nn.Sequential(*block)))
        layers.append(act())
        if out_shape is None:
            super().__init__(nn.Sequential(*layers), in_shape, width)
        else:
            out_shape = as_shape(out_shape)
            last = nn.Linear(width, math.prod(out_shape))
            super().__init__(nn.Sequential(*layers, last, nn.Unflatten(1, out_shape)), in_shape, out_shape)
        self.by_rows = not dropout

    @property
    def output_bias(self) -> nn.Parameter | None:
        return bias_of_output(self.body)


class ConvEncoder(Network):
    """Strided convolutions, for images: from any shape (C, H, W) to a vector of features.

    Args:
        in_shape: (C, H, W), or (H, W) for a single channel.
        channels: Channels of the convolutions, from the image inwards; each halves height and width (rounded up).
        hidden: Width of the dense layer, the number of features; 0: none, and the features are the last channels,
            C H W numbers that keep their places.
        activation: Activation of the hidden layers.
    """

    word = "conv"
    of_images = True

    @checked
    def __init__(
        self,
        in_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        hidden: Annotated[int, Whole(0)] = 256,
        activation: Activation = "relu",
    ) -> None:
        in_shape, channels = as_shape(in_shape), tuple(channels)
        depth, height, width = image_shape(in_shape)
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (depth, height, width))]
        for before, after in zip((depth, *channels[:-1]), channels, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
            height, width = (height + 1) // 2, (width + 1) // 2
        features = channels[-1] * height * width
        layers.append(nn.Flatten())
        if hidden:
            layers += [nn.Linear(features, hidden), ACTIVATIONS[activation]()]
        super().__init__(nn.Sequential(*layers), in_shape, hidden or features)
        self.grid = None if hidden else (height, width)


class ConvDecoder(Biased):
    """Nearest-neighbour upsampling and convolutions from a vector to an image of any shape.

    Upsampling to the exact sizes that the encoder passed through serves odd sizes and leaves no checkerboard.

    Args:
        in_shape: Event shape of the input, e.g. the number of latent dimensions; flattened.
        out_shape: (..., H, W); all dimensions before the last two are channels.
        channels: Channels of the convolutions, from the image inwards, as for `ConvEncoder`.
        hidden: Width of the dense layer; 0: there is none, and the input are channels of the smallest grid.
        activation: Activation of the hidden layers.

    Raises:
        UsageError: the input cannot be shared out among the places of that grid.
    """

    by_rows = True

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[Count] = (32, 64),
        hidden: Annotated[int, Whole(0)] = 256,
        activation: Activation = "relu",
    ) -> None:
        in_shape, out_shape, channels = as_shape(in_shape), as_shape(out_shape), tuple(channels)
        depth, height, width = image_shape(out_shape)
        sizes = [(height, width)]
        for _ in channels:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        small = (channels[-1], *sizes[-1])
        act = ACTIVATIONS[activation]
        layers: list[nn.Module] = [nn.Flatten()]
        if hidden:
            layers += [nn.Linear(math.prod(in_shape), hidden), act(), nn.Linear(hidden, math.prod(small)), act()]
            layers.append(nn.Unflatten(1, small))
        else:
            depth_in = channels_of(math.prod(in_shape), sizes[-1])
            layers += [nn.Unflatten(1, (depth_in, *sizes[-1])), nn.Conv2d(depth_in, channels[-1], 3, padding=1), act()]
        stages = zip(channels[::-1], (*channels[-2::-1], depth), sizes[-2::-1], strict=True)
        for i, (before, after, size) in enumerate(stages):
            last = i == len(channels) - 1
            layers += [nn.Upsample(size=size), nn.Conv2d(before, after, 3, padding=1, bias=not last)]
            if not last:
                layers.append(ACTIVATIONS[activation]())
        super().__init__(nn.Sequential(*layers, nn.Flatten(), nn.Unflatten(1, out_shape)), in_shape, out_shape)


class Channels(nn.Module):
    """Sequences (B, T, D) as convolutions take them, (B, D, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class TimeAt(nn.Module):
    """Sequences (B, T, ...) with time after so many dimensions of an event, of `shape`.

    Args:
        before: So many.
        shape: Of the event then.
        now: Which dimension of x is time.
    """

    def __init__(self, before: int, shape: tuple[int, ...], now: int = 1) -> None:
        super().__init__()
        self.before, self.shape, self.now = before, shape, now

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.now, 1 + self.before).reshape(-1, *self.shape)


class SequenceEncoder(Network):
    """Convolutions over time, for sequences: from (T, ...) to a vector of features, so many for each step.

    Each hidden layer sees two steps to either side.

    Args:
        in_shape: (T, ...): the first dimension is time, all others are elements of a step.
        hidden: Widths of the hidden layers, at every step.
        activation: Activation of the hidden layers.
    """

    word = "sequence"
    of_steps = True  # each has codes of its own, so that nothing else goes beside them to its decoder

    @checked
    def __init__(self, in_shape: Shape, hidden: Sequence[Count] = (32, 32), activation: Activation = "tanh") -> None:
        in_shape = as_shape(in_shape)
        steps, width = in_shape[0], math.prod(in_shape[1:])
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (steps, width)), Channels()]
        for before, after in pairwise([width, *hidden]):
            layers += [nn.Conv1d(before, after, 5, padding=2), ACTIVATIONS[activation]()]
        super().__init__(nn.Sequential(*layers, nn.Flatten()), in_shape, steps * [width, *hidden][-1])


class StepEncoder(Network):
    """One dense network for all steps of a sequence: of each step features that depend on it alone.

    Args:
        in_shape: (T, ...), time first; or with dimensions before that, as where a mask of what is seen is beside x.
        hidden: Widths of the hidden layers.
        activation: Activation of the hidden layers.
        event_shape: Event shape of x, which says where in `in_shape` time is; None: `in_shape`.
    """

    word = "steps"

    @checked
    def __init__(
        self,
        in_shape: Shape,
        hidden: Sequence[Count] = (32, 32),
        activation: Activation = "tanh",
        event_shape: Shape | None = None,
    ) -> None:
        in_shape = as_shape(in_shape)
        steps, *rest = in_shape if event_shape is None else as_shape(event_shape)
        parts, left = divmod(math.prod(in_shape), steps * math.prod(rest))
        if left:
            raise UsageError(f"network: expected parts of {steps} steps each, got an input of shape {in_shape}")
        each = MLP(parts * math.prod(rest), None, hidden, activation)
        # Of the parts of the input each step has its own, side by side; features come by their number, then by step.
        apart = [nn.Flatten(), nn.Unflatten(1, (parts, steps, math.prod(rest))), TimeAt(0, (steps, *each.in_shape), 2)]
        super().__init__(nn.Sequential(*apart, each, Channels(), nn.Flatten()), in_shape, steps * each.out_shape[0])


class SequenceDecoder(Biased):
    """One dense network for all steps of a sequence: x_t depends on z_t alone.

    Args:
        in_shape: T Z, the number of latent dimensions: Z for each step of the output.
        out_shape: (T, ...), time first; or with dimensions before that, where x has several parameters.
        hidden: Widths of the hidden layers.
        activation: Activation of the hidden layers.
        event_shape: Event shape of x, which says where in `out_shape` time is; None: `out_shape`.

    Raises:
        UsageError: the latent dimensions cannot be shared out among the steps.
    """

    @checked
    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[Count] = (32, 32),
        activation: Activation = "tanh",
        event_shape: Shape | None = None,
    ) -> None:
        in_shape, out_shape = as_shape(in_shape), as_shape(out_shape)
        event = out_shape if event_shape is None else as_shape(event_shape)
        before = 0 if out_shape[: len(event)] == event else len(out_shape) - len(event)
        steps, latent = out_shape[before], math.prod(in_shape)
        if latent % steps:
            raise UsageError(
                f"latent_dim: expected a multiple of the {steps} steps of x, each of which has its own, got {latent}"
            )
        of_a_step = (*out_shape[:before], *out_shape[before + 1 :])
        each = MLP(latent // steps, of_a_step or (1,), hidden, activation)
        body = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (steps, latent // steps)), each, TimeAt(before, out_shape))
        super().__init__(body, in_shape, out_shape)


def channels_of(size: int, grid: tuple[int, int]) -> int:
    """How many channels so many numbers are on a grid.

    Raises:
        UsageError: they cannot be shared out among its places.
    """
    places = math.prod(grid)
    if size % places:
        raise UsageError(
            f"latent_dim: expected a multiple of the {places} places of a grid of {grid[0]} x {grid[1]}, got {size}"
        )
    return size // places


def bias_of_output(body: nn.Module) -> nn.Parameter | None:
    """The bias of the linear layer before the last, which gives an output its shape; None if it is no such layer."""
    layers = list(body.children())
    last = layers[-2] if isinstance(layers[-1], nn.Unflatten) else None
    return last.bias if isinstance(last, nn.Linear) else None


def check_event(x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse x (*batch, *event) of another event shape than `shape`, before anything broadcasts it, and integers."""
    if not isinstance(x, Tensor):
        raise UsageError(
            f"x: expected a tensor of event shape {shape}, got {type(x).__name__}; pass torch.as_tensor(x)"
        )
    if x.ndim < len(shape) or x.shape[x.ndim - len(shape) :] != shape:
        raise UsageError(
            f"x: expected event shape {shape}, got a tensor of shape {tuple(x.shape)}; "
            "reshape x or build the network for its shape"
        )
    if not x.is_floating_point():
        raise UsageError(f"x: expected floating-point numbers, got {x.dtype}; pass x.float(), or fit(transform=...)")


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of an event shape (..., H, W).

    Raises:
        UsageError: the shape has fewer than two dimensions.
    """
    if len(shape) < 2:
        raise UsageError(f"convolutional network: expected an image shape (C, H, W), got {shape}; use an MLP")
    return math.prod(shape[:-2]), shape[-2], shape[-1]
