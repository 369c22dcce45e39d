"""Where to compute: the device, and how many processor threads where other programs run beside.

The threads of an operation wait for the slowest. Where one of them has to share its core with another program, all wait
for it, at every operation: on two busy cores two threads are several times slower than one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pyrovae.checks import check_count
from pyrovae.errors import UsageError

LOOK = 0.1  # seconds for which the machine is looked at
BUSY = 0.5  # of a core, from which on it counts


@contextmanager
def threads(wanted: int | str | None, on_notice: Callable[[str], object] = lambda text: None) -> Iterator[None]:
    """Compute with so many threads, and as before at the end.

    Args:
        wanted: A number; "auto", as many as torch has by itself, less those whose cores others keep busy; None: as many
            as torch has.
        on_notice: Called with a sentence if the machine is busy.

    Raises:
        UsageError: it is none of these.
    """
    before = most = torch.get_num_threads()
    if wanted not in (None, "auto"):
        check_count("threads", wanted)
        most = int(wanted or 1)
    # One thread has nobody to wait for.
    cores, busy = look() if wanted is not None and most > 1 else (most, 0.0)
    free = max(1, round(cores - busy))
    chosen = min(most, free) if wanted == "auto" else most
    if busy >= BUSY and most > free:
        done = f"so {chosen} of {most} threads {'is' if chosen == 1 else 'are'} used; threads={most} uses all"
        wait = f"for which {most} threads will wait; threads=auto would take {free}"
        what = done if wanted == "auto" else wait
        on_notice(f"the machine is busy: other programs take {busy:.1f} of its {cores} cores, {what}")
    torch.set_num_threads(chosen)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def look() -> tuple[int, float]:
    """How many cores this process may use, and how many of them others keep busy."""
    import psutil  # type: ignore[import-untyped]

    shares = psutil.cpu_percent(LOOK, percpu=True)
    if hasattr(os, "sched_getaffinity"):
        shares = [share for core, share in enumerate(shares) if core in os.sched_getaffinity(0)]
    return len(shares), sum(shares) / 100


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        UsageError: there is no such device. Never a silent CPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"device {name}: not available here; use cpu or auto", settings=("device",)) from None
    return device
