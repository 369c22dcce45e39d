"""Random numbers that are a function of a key, and leave the caller's random state as it was.

A training step draws its noise from a generator seeded with (seed, purpose, step, process). Resuming then needs no
saved random state, and what one step consumes cannot shift what the next one draws.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from pyrovae.errors import UsageError

# Held by the thread that draws. torch's generators belong to the process, as do Pyro's handlers: two threads would take
# each other's numbers, and neither would be what its seed says.
_DRAWING = threading.RLock()


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed, the same for the same key on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def reseed(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of one device.

    What `torch.manual_seed` does for all devices, in a seventieth of its time: it is done at every training step.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.default_generators[index_of(device)].manual_seed(seed)


def index_of(device: torch.device) -> int:
    """The number of a CUDA device; of the current one, if it is given without."""
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def same_noise(device: torch.device) -> Iterator[None]:
    """Leave the random states of the CPU and of one device behind as they were found."""
    with torch.random.fork_rng(devices=[index_of(device)] if device.type == "cuda" else []):
        yield


def keyed(seed: int | None, *key: int | str, device: torch.device | str = "cpu") -> AbstractContextManager[None]:
    """`seeded` with a seed and a key; without a seed, the caller's own random state, which goes on."""
    return nullcontext() if seed is None else seeded(seed, *key, device=device)


@contextmanager
def seeded(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators of the CPU and of one device with a key, and restore their states at the end.

    Raises:
        UsageError: another thread is within such a context.
    """
    if not _DRAWING.acquire(blocking=False):
        raise UsageError(
            "another thread of this process is training or estimating, and random numbers belong to the process: do "
            "one after the other, or each in a process of its own"
        )
    try:
        device = torch.device(device)
        with same_noise(device):
            reseed(derive_seed(*key), device)
            yield
    finally:
        _DRAWING.release()
