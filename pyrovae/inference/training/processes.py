"""The processes of a run, one or several, and the device of this one."""

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from pyrovae.processes import several


class Processes:
    """This process among those of a run.

    Attributes:
        device: Where it computes.
        rank: Its number.
        world: How many there are.
    """

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    def total(self, vector: Tensor) -> Tensor:
        """The sum of a vector over all processes."""
        return self.accelerator.reduce(vector, "sum")

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the tensors of the first one."""
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().clone()))

    def agreed(self, stop: bool, step: int) -> bool:
        """Whether to stop: all processes, each of which may have been asked to, hear of it at the same step."""
        if self.alone:
            return stop
        if self.device.type == "cuda" and step % 16:
            return False  # the answer has to be waited for, so it is not asked for at every step
        return bool(self.total(torch.tensor([float(stop)], device=self.device)).item())


@contextmanager
def accelerated(requested: torch.device | None, here: torch.device) -> Iterator[Processes]:
    """Set up Accelerate, which keeps its state in a singleton; a single process gives it back afterwards.

    Args:
        requested: The device that was asked for, if any.
        here: The device of a single process.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    alone = not several()
    if alone:
        AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = here.type == "cpu" if alone or requested else not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    if not alone:
        atexit.unregister(leave)
        atexit.register(leave)
    try:
        yield Processes(accelerator, here if alone else accelerator.device)
    finally:
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)


def leave() -> None:
    """Leave the group of processes: threads of Gloo that outlive Python's end would abort a process that is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_of_the_network(error: RuntimeError) -> bool:
    """Whether torch could not reach another process; Gloo says so in words alone."""
    known = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in known)


def describe_device(device: torch.device) -> str:
    """What the last bits depend on: "cpu", or of a GPU its name, its driver and the versions of its libraries."""
    if device.type != "cuda":
        return device.type
    driver, cudnn = cast(Any, torch._C)._cuda_getDriverVersion(), torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
