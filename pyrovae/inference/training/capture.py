"""A whole step, gradient and update, as one CUDA graph."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.inference.batch import Batch
from pyrovae.inference.training.optimizers import hyperparameters

# Steps on a CUDA device before one is captured, in which libraries allocate what they keep.
WARM_UP = 3


class Captured:
    """A step on batches of one shape as one CUDA graph.

    Random operations in it draw from torch's generator as it is when the graph is replayed.

    Args:
        take: Takes a step, given the tensors of a batch and the objective's settings.
        batch: The batch, of which the shapes matter.
        settings: The settings, as tensors.
        optimizer: What `take` lets update parameters.
    """

    def __init__(
        self, take: Callable[..., object], batch: Batch, settings: Sequence[Tensor], optimizer: Optimizer
    ) -> None:
        self.optimizer, self.hyperparameters = optimizer, hyperparameters(optimizer)
        self.tensors, self.settings = [t.clone() for t in batch.tensors], settings
        device = batch.x.device
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        # Other threads, which read rows ahead, may use the device meanwhile.
        whole = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), whole:
            take(*self.tensors, *self.settings)

    @property
    def outdated(self) -> bool:
        """Whether the optimiser has other settings, such as a learning rate, than those in the graph."""
        return self.hyperparameters != hyperparameters(self.optimizer)

    def __call__(self, batch: Batch, settings: Iterable[float | Tensor]) -> None:
        for tensor, value in zip(self.tensors, batch.tensors, strict=True):
            tensor.copy_(value)
        for tensor, setting in zip(self.settings, settings, strict=True):
            tensor.fill_(setting)
        self.graph.replay()
