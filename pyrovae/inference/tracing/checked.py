"""Whether compiled code is the pair: on the same noise, and by what the pair holds that a graph would freeze."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing.recording import Refused

# By how much the loss, and the gradient as a whole, of compiled code may differ from autograd's, as a share.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.float64: (1e-9, 1e-6)}
ROUGH = (1e-2, 0.2)  # for products with factors of 8 or 10 bits
# By how much log-weights may, relative to the largest, plus nats.
TOLERANCE_OF_WEIGHTS = {torch.float32: (1e-5, 1e-3), torch.float64: (1e-9, 1e-9)}
# bfloat16 has 8 bits: its log-weights differ by tenths of a nat, those of a wrong graph by many.
ROUGH_WEIGHTS = (1e-2, 1.0)
ELSEWHERE = (
    "the pair's own on the same noise, so the pair depends on something that is no tensor operation (numpy, Python's "
    "random, a changed global), or the compiler is wrong about one"
)


class Before:
    """The random state and the buffers of a pair (such as moments of batch normalisation), to go back to."""

    def __init__(self, pair: nn.Module, device: torch.device) -> None:
        self.device = device
        self.noise = torch.get_rng_state()
        self.noise_on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in pair.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        torch.set_rng_state(self.noise)
        if self.noise_on_gpu is not None:
            torch.cuda.set_rng_state(self.noise_on_gpu, self.device)
        for buffer, value in self.buffers:
            buffer.copy_(value)


def compare_gradients(got: Sequence[Tensor], wanted: Sequence[Tensor], precision: str, numbers: int) -> None:
    """Refuse a loss and gradients that differ from the pair's own by more than rounding.

    Where the pair's own are not finite, that is left to others.

    Args:
        got: Loss and gradients by compiled code.
        wanted: Those of the pair.
        precision: One of `PRECISIONS`.
        numbers: How many are added up to the loss, each with a rounding error.
    """
    if not all(value.isfinite().all() for value in wanted):
        return
    if len(got) != len(wanted):
        raise Refused(f"the compiled code gives {len(got) - 1} gradients, the pair itself {len(wanted) - 1}")
    exact = TOLERANCE.get(wanted[0].dtype, ROUGH)
    tolerances = exact if precision == "fp32" else ROUGH
    slack = numbers * torch.finfo(wanted[0].dtype).eps * 10
    for name, tolerance, part in zip(("loss", "gradient"), tolerances, (slice(1), slice(1, None)), strict=True):
        difference = get_total_norm([p.double() - q.double() for p, q in zip(got[part], wanted[part], strict=True)])
        size = get_total_norm([q.double() for q in wanted[part]])
        if not difference <= tolerance * size + slack:
            raise Refused(
                f"the compiled {name} differs by {difference.item():.2g}, of {size.item():.2g}, from {ELSEWHERE}"
            )


def compare_weights(got: Tensor, wanted: Tensor, rough: bool = False) -> None:
    """Refuse log-weights that differ by more than rounding; NaNs and infinities must be the same.

    Args:
        got: By compiled code.
        wanted: Those of the pair.
        rough: Products are in bfloat16.
    """
    relative, absolute = ROUGH_WEIGHTS if rough else TOLERANCE_OF_WEIGHTS.get(wanted.dtype, ROUGH_WEIGHTS)
    finite = wanted[wanted.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if not torch.allclose(got, wanted, rtol=0.0, atol=absolute + relative * largest, equal_nan=True):
        difference = (got - wanted).abs().nan_to_num(math.inf).max().item()
        raise Refused(f"compiled log-weights differ by up to {difference:.2g} nats from {ELSEWHERE}")


def held_by(pair: Pair) -> dict[str, Any]:
    """What a pair's modules and objects hold besides the values of parameters and buffers: a graph freezes it."""
    owners: dict[str, Any] = dict(pair.parts.named_modules())
    for program in (pair.model, pair.guide):
        owner = getattr(program, "__self__", None)
        if owner is not None and not isinstance(owner, nn.Module):
            owners[type(owner).__name__] = owner
    found: dict[str, Any] = {}
    for where, owner in owners.items():
        of_torch = isinstance(owner, nn.Module)
        values = {k: v for k, v in getattr(owner, "__dict__", {}).items() if not (of_torch and k.startswith("_"))}
        if of_torch:
            values |= owner._buffers
            found |= {
                f"{where}.{k}.requires_grad": p.requires_grad for k, p in owner._parameters.items() if p is not None
            }
        for name, value in values.items():
            if value is None or isinstance(value, bool | int | float | str):
                found[f"{where}.{name}"] = value
            elif isinstance(value, Tensor):
                found[f"{where}.{name}"] = value
                if name not in getattr(owner, "_buffers", {}):
                    found[f"{where}.{name} in place"] = value._version
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of something that two answers of `held_by` differ in."""
    for name in {**before, **after}:
        a, b = before.get(name), after.get(name)
        same = a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b or (a != a and b != b)
        if not same:
            return name.strip(".").replace("..", ".")
    return None
