"""Optimisers and schedules of their rate, and the gradients that they can be given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyrovae.errors import UsageError
from pyrovae.inference.pair import Pair

Factory = Callable[[list[Tensor]], Optimizer]


def adam(parameters: list[Tensor], lr: float = 1e-3, eps: float = 1e-8) -> Optimizer:
    """Adam in its fused form, the default optimiser."""
    on_gpu = parameters[0].is_cuda
    # There steps are captured as a CUDA graph, which reads a rate that is a tensor anew at every step.
    rate = torch.tensor(lr, device=parameters[0].device) if on_gpu else lr
    return torch.optim.Adam(parameters, lr=rate, eps=eps, fused=True, capturable=on_gpu)


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
