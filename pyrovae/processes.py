"""Several processes that train one run, as torchrun and Accelerate start them: what they are told of each other."""

import os
import re

from pyrovae.errors import UsageError


def leading() -> bool:
    """Whether this is the only process, or the one of several that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def together() -> int:
    """How many processes train together, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether this is one of several processes."""
    return together() > 1


def check_processes() -> None:
    """Refuse a part of what a launcher of several processes sets: a process that is told so would write nothing."""
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if (value := os.environ.get(name)) is not None:
            if not re.fullmatch(r"\d{1,9}", value, re.A):
                raise UsageError(
                    f"{name}={value} in the environment: expected a whole number; unset it, or use torchrun"
                )
            numbers[name] = int(value)
    world = numbers.get("WORLD_SIZE", 0 if numbers else 1)
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in numbers]
    if missing and (world != 1 or numbers.get("RANK", 0)):
        found = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise UsageError(
            f"{found} in the environment without {' and '.join(missing)}: start several processes with torchrun or "
            f"accelerate launch, or unset {' and '.join(numbers)} for one"
        )
    if numbers.get("RANK", 0) >= world:
        raise UsageError(f"RANK={numbers['RANK']} in the environment, of WORLD_SIZE={world}: expected 0 to {world - 1}")
