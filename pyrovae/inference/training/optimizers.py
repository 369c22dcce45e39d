"""Optimisers and schedules of their rate, whom they update, and the gradients that they can be given.

Some modules of a pair are not the pair's: an adversary minimises a loss of its own. A step takes one gradient, of

    -bound + (adversary's loss - its value),

in which what is held and detached sees to it that the parameters of each get the gradient of its own loss and no other
(`pyrovae.models.judges`, `pyrovae.models.critic`). Their updates are apart as well: the adversary's parameters are a
group of the optimiser with a learning rate of its own. Every optimiser of torch but LBFGS, which is refused, updates
each parameter by its own gradient and moments, so that two groups are two optimisers that step together, to the last
bit; and one schedule, one checkpoint and one captured step hold both.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyrovae.errors import UsageError
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair

Factory = Callable[[list[Tensor]], Optimizer]


def adam(parameters: list[Tensor], lr: float = 1e-3, eps: float = 1e-8) -> Optimizer:
    """Adam in its fused form, the default optimiser."""
    on_gpu = parameters[0].is_cuda
    # There steps are captured as a CUDA graph, which reads a rate that is a tensor anew at every step.
    rate = torch.tensor(lr, device=parameters[0].device) if on_gpu else lr
    return torch.optim.Adam(parameters, lr=rate, eps=eps, fused=True, capturable=on_gpu)


@runtime_checkable
class Other(Protocol):
    """A module in a pair that minimises a loss of its own, at the site of that name, and nothing of the pair's."""

    minimises: str

    def parameters(self) -> Iterator[Tensor]:
        """What it is trained by."""


def grouped(make: Factory, pair: Pair, objective: Objective) -> Optimizer:
    """The optimiser of a pair, with a group for each module in it that minimises a loss of its own.

    Args:
        make: Makes an optimiser of the pair's own parameters.
        pair: The pair.
        objective: Whose `rate` is the others' learning rate, as a multiple of the pair's.
    """
    every = list(pair.trainable().values())
    others = [[*module.parameters()] for module in pair.modules() if isinstance(module, Other)]
    theirs = {id(p) for parameters in others for p in parameters}
    own = [p for p in every if id(p) not in theirs]
    if not own:  # nothing but an adversary is trained
        return make(every)
    optimizer = make(own)
    rate = optimizer.param_groups[0].get("lr")
    for parameters in others:
        group: dict[str, Any] = {"params": [p for p in parameters if p.requires_grad]}
        if rate is not None:
            group["lr"] = rate * objective.rate  # a tensor of its own, where the pair's is one
        if group["params"]:
            optimizer.add_param_group(group)
    return optimizer


def staged(optimizer: Optimizer, stages: int = 8) -> LRScheduler:
    """The IWAE paper's schedule: stage i of 0 .. stages-1 lasts 3^i epochs at lr * round(10^(1 - i/7), 1) / 10.

    Eight stages are 3280 epochs, from lr to lr / 10.
    """
    ends = [(3 ** (i + 1) - 1) // 2 for i in range(stages)]

    def factor(epoch: int) -> float:
        stage = next((i for i, end in enumerate(ends) if epoch < end), stages - 1)
        return round(10 ** (1 - stage / 7), 1) / 10

    return LambdaLR(optimizer, factor)


def as_accumulated(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients as `.backward()` leaves them: laid out in memory like their parameters, and each one's own.

    Optimisers rely on it. Fused ones read both in the order of memory, and would take a transposed gradient's numbers
    for those of other entries; some of the others write into gradients. `torch.autograd.grad` promises neither.
    """
    found: list[Tensor | None] = []
    seen: set[int] = set()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None and gradient.layout is torch.strided:
            memory = gradient.untyped_storage()._cdata  # of several gradients, where one is a view of another
            if gradient.stride() != parameter.stride() or memory in seen:
                gradient = torch.empty_like(parameter).copy_(gradient)
            seen.add(memory)
        found.append(gradient)
    return found


def check_layout(pair: Pair, optimizer: Optimizer) -> None:
    """Refuse parameters whose numbers are apart in memory, or shared by entries, under an optimiser that is fused."""
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, p in pair.trainable().items():
        if id(p) in fused and torch.empty_like(p).stride() != p.stride():
            raise UsageError(
                f"optimizer: {name} has gaps in memory (shape {tuple(p.shape)}, strides {p.stride()}), which a fused "
                "optimiser would write into; make it a parameter of .contiguous(), or pass fused=False"
            )


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimiser, one dictionary for each group of parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
