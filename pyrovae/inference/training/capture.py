"""A whole step, gradient and update, as one CUDA graph."""

from typing import TYPE_CHECKING

import torch

from pyrovae.inference.batch import Batch
from pyrovae.inference.training.gradients import Gradient
from pyrovae.inference.training.optimizers import hyperparameters

if TYPE_CHECKING:
    from pyrovae.inference.training.step import Step

# Steps on a CUDA device before one is captured, in which libraries allocate what they keep.
WARM_UP = 3


class Captured:
    """A step on batches of one shape, gradient and update, as one CUDA graph.

    Random operations in it draw from torch's generator as it is when the graph is replayed.
    """

    def __init__(self, step: "Step", batch: Batch, number: int) -> None:
        self.objective, self.optimizer = step.objective, step.optimizer
        self.hyperparameters = hyperparameters(step.optimizer)
        self.tensors, self.settings = [t.clone() for t in batch.tensors], step.settings(batch, number)
        code, device = step.code(Gradient, *self.tensors, *self.settings), batch.x.device
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        # Other threads, which read rows ahead, may use the device meanwhile.
        whole = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), whole:
            loss, *gradients = code(*self.tensors, *self.settings)
            step.update(loss, gradients)

    @property
    def outdated(self) -> bool:
        """Whether the optimiser has other settings, such as a learning rate, than those in the graph."""
        return self.hyperparameters != hyperparameters(self.optimizer)

    def __call__(self, batch: Batch, number: int) -> None:
        for tensor, value in zip(self.tensors, batch.tensors, strict=True):
            tensor.copy_(value)
        for tensor, setting in zip(self.settings, self.objective.settings(number).values(), strict=True):
            tensor.fill_(setting)
        self.graph.replay()
