"""Whether compiling repays itself, by counts alone, so that it comes out the same when a run is repeated or resumed."""

import torch

from pyrovae.inference.training.settings import Settings

# Compiling takes 5 to 20 s: less than this is not worth it.
COMPILING_SECONDS = 20.0


def worth_compiling(
    mode: str, total: int, settings: Settings, world: int, flops: float, device: torch.device
) -> list[int]:
    """The numbers of rows for which steps are to be compiled.

    Args:
        mode: "auto", "on" or "off".
        total: Rows of the data.
        settings: Of the run.
        world: Number of processes, to which the rows of a step are dealt.
        flops: Floating-point operations of a step, for each row.
        device: Where steps are taken.
    """
    if mode == "off":
        return []
    whole, rest = divmod(total, settings.batch_size)
    counts = {settings.batch_size: whole, rest: 1} if rest else {settings.batch_size: whole}
    found: dict[int, float] = {}
    for rows, steps in counts.items():
        for mine in {max(1, len(range(rank, rows, world))) for rank in range(world)}:
            seconds = settings.epochs * steps * saved_seconds(flops * mine, device)
            found[mine] = found.get(mine, 0.0) + seconds
    return [rows for rows, seconds in found.items() if mode == "on" or seconds > COMPILING_SECONDS]


def saved_seconds(flops: float, device: torch.device) -> float:
    """What compiling saves of a step of so many floating-point operations, roughly.

    Measured on two CPU cores: the Python of a pair, and its passes over memory, which grow with its products. On a GPU
    it is nearly all Python.
    """
    return 4e-3 if device.type == "cuda" else 1e-3 + 5e-12 * flops
