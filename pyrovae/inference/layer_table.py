"""The layers of a pair: what its networks are made of, in the order in which the guide and then the model run them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.inference.modules import Program, evaluating
from pyrovae.inference.pair import Pair
from pyrovae.seeding import same_noise

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("name", "layer", "output shape", "parameters")


@torch.no_grad()
def layers(model: Program, guide: Program, x: Tensor, given: Sequence[Tensor] = ()) -> "pd.DataFrame":
    """A table of the layers of a pair, which is run once on the first row of x.

    A layer is a module without modules in it, or with parameters of its own beside them (as a scale, or a bias for each
    pixel); one that both programs share is listed where it is run first. Each parameter is counted once, so that the
    sum of the last column is that of the pair.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        x: Data, shape (N, *event), in the support of the likelihood.
        given: What the pair is conditioned on, each of shape (N, ...).

    Returns:
        Columns "name", as `named_parameters` has it; "layer", its class; "output shape", of one row, or the event shape
        where the layer returns a distribution, None where it was not run or returns
        neither; and "parameters", how many numbers.

    Example:
        >>> from pyrovae.models import MLP, VAE, Gaussian, MeanFieldNormal, StandardNormal
        >>> vae = VAE(StandardNormal(2), Gaussian(MLP(2, 3, hidden=())), MeanFieldNormal(MLP(3, hidden=()), 2))
        >>> table = layers(vae.model, vae.guide, torch.zeros(1, 3))
        >>> table[table.parameters > 0].to_string(index=False, header=False).split()  # doctest: +NORMALIZE_WHITESPACE
        ['guides.0.head', 'Linear', '(4,)', '16', 'likelihood.decoder.body.1', 'Linear', '(3,)', '9',
         'likelihood', 'Gaussian', '(3,)', '1']
    """
    import pandas as pd

    pair = Pair(model, guide)
    named = {module: name for name, module in pair.parts.named_modules() if is_layer(module)}
    shapes: dict[nn.Module, tuple[int, ...] | None] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shapes.setdefault(module, shape_of(output))

    handles = [module.register_forward_hook(note) for module in named]
    try:
        with same_noise(x.device), evaluating(model, guide), pyro.poutine.block():
            row = [tensor[:1] for tensor in (x, *given)]
            guided = pyro.poutine.trace(guide).get_trace(*row)
            modelled = pyro.poutine.trace(pyro.poutine.replay(model, trace=guided)).get_trace(*row)
    finally:
        for handle in handles:
            handle.remove()
    whole = f"{next(iter(pair.parts))}." if len(pair.parts) == 1 else ""  # the name of the pair itself says nothing
    counted: set[nn.Parameter] = set()
    rows = []
    for module in [*shapes, *(m for m in named if m not in shapes and own_parameters(m))]:
        own = own_parameters(module) - counted
        counted |= own
        count = sum(parameter.numel() for parameter in own)
        rows.append((named[module].removeprefix(whole), type(module).__name__, shapes.get(module), count))
    for trace in (guided, modelled):
        pair.adopt(trace)
    rows += [(name, "pyro.param", tuple(value.shape), value.numel()) for name, value in pair.stored.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def is_layer(module: nn.Module) -> bool:
    """Whether a module has no modules in it, or parameters beside them."""
    return bool(own_parameters(module)) or next(module.children(), None) is None


def own_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of a module itself, not those of modules in it."""
    return set(module.parameters(recurse=False))


def shape_of(output: Any) -> tuple[int, ...] | None:
    """Of what a layer returns for one row; None where that is neither a tensor nor a distribution."""
    if isinstance(output, Tensor):
        return tuple(output.shape[1:])
    return tuple(output.event_shape) if isinstance(output, Distribution) else None
