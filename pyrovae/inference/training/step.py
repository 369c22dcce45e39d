r"""Steps: the loss of a pair on a batch, its gradient, and the update of the parameters.

The loss is -sum_n L_n, with the bound L_n of an objective. Its gradient is taken by autograd in a run of the pair, or
by the same operations as one compiled graph (see `tracing`):

    graph(parameters and buffers, x, *given, beta, ...)  ->  loss, gradients

What changes between steps is an input of the graph (the parameters, the batch, the objective's `settings`) or a random
operation in it (noise, dropout). On a CUDA device the whole step, update included, is then captured as one CUDA graph.
A constraint on the KL adapts its beta to the KL of the batch, which such a graph gives beside the gradients.

In chunks of particles, with t_kn the `strands` of particle k and datum n, of which L_n is a function,

    1. t_kn chunk by chunk, keeping nothing else;
    2. s_kn = -dL_n / dt_kn;
    3. chunk by chunk again, on the same noise, the gradient of sum_kn s_kn t_kn, and the sum of these gradients.

By the chain rule that is the gradient of the loss, in the memory of one chunk, for one more evaluation of the terms.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import check_precision
from pyrovae.inference.tracing.checked import Before, changed, compare_gradients, held_by
from pyrovae.inference.tracing.recording import Refused, reason
from pyrovae.inference.training.capture import WARM_UP, Captured
from pyrovae.inference.training.gradients import Code, Gradient, Part, Pullback, Terms, check_chunk, observed
from pyrovae.inference.training.optimizers import as_accumulated
from pyrovae.seeding import reseed

# Steps of a shape after which, in another epoch, its code is compared with the pair again.
RECHECK = 100


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; no update was made from it on.

    Attributes:
        taken: On a GPU, steps taken since `Step.settle` was last asked, before this one.
    """

    def __init__(self, what: str, taken: int = 0) -> None:
        super().__init__(what)
        self.taken = taken


Shapes = tuple[torch.Size, ...]
# The loss of a batch, its gradients, and what else is observed of it, see `observed`.
Found = tuple[Tensor, list[Tensor | None], list[Tensor]]


def shapes_of(batch: Batch) -> Shapes:
    """The shapes of all tensors of a batch, for each of which there is code."""
    return tuple(tensor.shape for tensor in batch.tensors)


class Step:
    """Gradient steps on a pair.

    Args:
        objective: The objective.
        pair: The pair, on its device, with the parameters to train.
        optimizer: Of the pair's trainable parameters.
        compiled: For which numbers of rows the step is compiled; True: for all.
        particle_chunk: Particles at a time, for memory; None: all.
        precision: "fp32"; "tf32", which the caller sets in torch; "bf16-mixed", with matrix products in bfloat16.
        together: Sums a vector over processes, each of which steps on rows of its own.
        beta: To what the objective's constraint had adapted its beta; None: to nothing yet.
        losses: What the losses of others than the pair had come to in this epoch; nothing yet, if empty.
        on_notice: Called with a sentence when something was compiled.
        on_refusal: Called with one when it could not be.

    Attributes:
        compile_seconds: Time spent on tracing, compiling and checking.
        refused: Why nothing is compiled, once that was tried in vain.
    """

    def __init__(
        self,
        objective: Objective,
        pair: Pair,
        optimizer: Optimizer,
        *,
        compiled: bool | set[int] = False,
        particle_chunk: int | None = None,
        precision: str = "fp32",
        together: Callable[[Tensor], Tensor] | None = None,
        beta: float | None = None,
        losses: Sequence[float] = (),
        on_notice: Callable[[str], None] | None = None,
        on_refusal: Callable[[str], None] | None = None,
    ) -> None:
        check_chunk(objective, particle_chunk)
        check_precision(precision, next(iter(pair.trainable().values())).device)
        self.objective, self.pair, self.optimizer = objective, pair, optimizer
        self.compiled, self.precision, self.together = compiled, precision, together
        self.on_notice = on_notice or (lambda text: None)
        self.on_refusal = on_refusal or self.on_notice
        self.parameters = list(pair.trainable().values())
        self.sizes = objective.chunks(particle_chunk)
        self.particles = sum(self.sizes)
        if precision == "bf16-mixed" and any(p.dtype != torch.float32 for p in self.parameters):
            raise UsageError("precision: bf16-mixed is for pairs in single precision; use fp32")
        self.compile_seconds = 0.0
        self.refused: str | None = None
        self.parts: dict[tuple, Part] = {}
        self.codes: dict[tuple, Code] = {}
        self.steps_since: dict[Shapes, int] = {}  # by shape, since its code was compared with the pair
        self.stale: set[Shapes] = set()
        self.held: dict[str, Any] | None = None  # by the pair, when it was compiled
        self.taken_on: dict[Shapes, int] = {}
        self.captured: dict[Shapes, Captured] = {}
        device = self.parameters[0].device
        self.constraint = objective.constraint
        self.beta = None if self.constraint is None else self.constraint.tensor(device, beta)
        # On a GPU nothing is read back within an epoch: the optimiser itself leaves out what is not finite.
        self.deferred = device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        capturable = all(group.get("capturable", False) for group in optimizer.param_groups)
        self.capturing = self.deferred and capturable and together is None and len(self.sizes) == 1
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.losses = torch.tensor([*losses] or [0.0] * len(objective.others), dtype=torch.float64, device=device)
        self.failed = torch.zeros((), dtype=torch.float32, device=device)  # 1 after a step that was not finite, else 0
        self.taken = torch.zeros((), device=device)
        if self.deferred:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, self.failed  # type: ignore[attr-defined]

    def __call__(self, batch: Batch, number: int, absent: bool = False) -> float | None:
        """Take a step.

        Args:
            batch: N rows of data.
            number: How many steps were taken before, on which the objective's settings depend.
            absent: This process has no rows in this step; the batch only shows their shape.

        Returns:
            The loss in nats, over the rows of all processes; None on a GPU, see `settle`.

        Raises:
            NotFinite: the loss or a gradient is not; no update was made. On a GPU `settle` raises it.
        """
        due = self.is_compiled(batch) and self.is_due(batch)
        if self.capturing and not due and self.replay(batch, number):
            return None
        found = self.checked_gradient(batch, number) if due else self.gradient(batch, number)
        if absent:
            loss, gradients, seen = found
            found = loss * 0, [None if g is None else g * 0 for g in gradients], [value * 0 for value in seen]
        if self.together is not None:
            found = self.summed(*found, due)
        return self.update(*found)

    def is_due(self, batch: Batch) -> bool:
        """Whether compiled code for the shapes of a batch has to be compared with the pair, or made."""
        shapes = shapes_of(batch)
        count = self.steps_since[shapes] = self.steps_since.get(shapes, -1) + 1
        return count == 0 or (shapes in self.stale and count >= RECHECK)

    def values(self, number: int) -> dict[str, float | Tensor]:
        """The numbers of the objective that change from step to step, by name."""
        adapted = {} if self.beta is None else {"beta": self.beta}
        return {**self.objective.settings(number), **adapted}

    def settings(self, batch: Batch, number: int) -> list[Tensor]:
        """`values` in the precision of x; a GPU is not waited for."""
        x = batch.x
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return [torch.empty((), dtype=dtype, device=x.device).fill_(value) for value in self.values(number).values()]

    def is_compiled(self, batch: Batch) -> bool:
        """Whether steps on as many rows are compiled."""
        wanted = self.compiled if isinstance(self.compiled, bool) else len(batch) in self.compiled
        return wanted and self.refused is None

    def checked_gradient(self, batch: Batch, number: int) -> Found:
        """`gradient` by compiled code, compiled if it is new, and compared with the pair itself on the same noise.

        Where that cannot be had, from here on everything is computed by the pair itself, on the same noise as well.
        """
        before, held, started = Before(self.pair, batch.x.device), held_by(self.pair), time.perf_counter()
        new, known = self.held is None, len(self.codes)
        loss, gradients, _ = self.gradient(batch, number, compiled=False)
        wanted = [loss, *(g for g in gradients if g is not None)]
        try:
            if name := changed(held, held_by(self.pair)):
                raise Refused(f"running the pair changes {name}, which a graph would not")
            before.restore()
            loss, gradients, seen = self.gradient(batch, number)
            compare_gradients(
                [loss, *(g for g in gradients if g is not None)],
                wanted,
                self.precision,
                batch.x.numel() * self.particles,
            )
        except Exception as error:
            before.restore()
            self.refuse(reason(error))
            return self.gradient(batch, number)
        finally:
            seconds = time.perf_counter() - started
            if new or len(self.codes) > known:
                self.compile_seconds += seconds
        if len(self.codes) > known:
            self.on_notice(f"compiled the training step for {len(batch)} rows in {seconds:.1f} s")
        self.held = held if self.held is None else self.held
        self.steps_since[shapes_of(batch)] = 0
        self.stale.discard(shapes_of(batch))
        return loss, gradients, seen

    def refuse(self, why: str) -> None:
        """Compute everything by the pair itself from here on."""
        self.refused = why
        self.codes.clear()
        self.captured.clear()
        self.on_refusal(f"not compiled, so slower: {why}")

    def gradient(self, batch: Batch, number: int, compiled: bool = True) -> Found:
        """The loss of a batch, the gradients of `parameters`, and what is observed; of all particles, or in chunks.

        Args:
            batch: N rows of data.
            number: How many steps were taken before.
            compiled: By compiled code, for as many rows as are compiled; False: by the pair itself.
        """
        make = self.code if compiled and self.is_compiled(batch) else self.part
        tensors, settings = batch.tensors, self.settings(batch, number)
        if len(self.sizes) == 1:
            return self.parted(make(Gradient, *tensors, *settings)(*tensors, *settings))
        device = batch.x.device
        # From torch's generator on the CPU, which waits for no device.
        seed = int(torch.randint(2**62, ()).item())
        terms = self.terms(batch, seed, make).requires_grad_()
        with torch.enable_grad():
            named = dict(zip(self.objective.settings(number), settings, strict=True))
            loss = -self.objective.surrogate(terms, **named).sum()
            (slope,) = torch.autograd.grad(loss, terms)
        seen = [*observed(self.objective, terms)]
        sums: list[Tensor | None] = []
        for i, (k, piece) in enumerate(zip(self.sizes, slope.split(self.sizes, 1), strict=True)):
            reseed(seed + i, device)
            inputs = (*tensors, piece.contiguous())
            gradients = list(make(Pullback, *inputs, num_particles=k)(*inputs))
            sums = gradients if i == 0 else [a if b is None else a + b for a, b in zip(sums, gradients, strict=True)]
        return loss.detach(), sums, seen

    def parted(self, outputs: Sequence[Any]) -> Found:
        """What a `Gradient` gives, in its three parts."""
        loss, *rest = outputs
        count = len(self.parameters)
        return loss, rest[:count], rest[count:]

    def terms(self, batch: Batch, seed: int, make: Callable[..., Callable[..., Tensor]]) -> Tensor:
        """The strands of all particles, chunk by chunk, each chunk on noise of its own seed."""
        pieces = []
        for i, k in enumerate(self.sizes):
            reseed(seed + i, batch.x.device)
            pieces.append(make(Terms, *batch.tensors, num_particles=k)(*batch.tensors))
        return torch.cat(pieces, 1)

    def part(self, kind: type[Part], *inputs: Tensor, **arguments: Any) -> Part:
        """A part, to be run as it is."""
        key = (kind, *arguments.values())
        if key not in self.parts:
            self.parts[key] = kind(self.objective, self.pair, self.precision, **arguments)
        return self.parts[key]

    def code(self, kind: type[Part], *inputs: Tensor, **arguments: Any) -> "Code":
        """A part as compiled code, for the shapes of these inputs."""
        key = (kind, *(t.shape for t in inputs), *arguments.values())
        if key not in self.codes:
            self.codes[key] = Code(self.part(kind, **arguments), *inputs)
        return self.codes[key]

    def recheck(self) -> None:
        """Look whether the pair holds what it held when it was compiled, and compare codes with it again soon."""
        if self.held is not None and self.refused is None and (name := changed(self.held, held_by(self.pair))):
            self.refuse(f"{name} has changed since")
        self.stale.update(self.steps_since)

    def replay(self, batch: Batch, number: int) -> bool:
        """Take the step as one CUDA graph, capturing it first if it is time to; whether it was taken."""
        shapes = shapes_of(batch)
        self.taken_on[shapes] = self.taken_on.get(shapes, 0) + 1
        if not self.is_compiled(batch) or self.taken_on[shapes] <= WARM_UP:
            return False
        if shapes not in self.captured or self.captured[shapes].outdated:
            self.captured.pop(shapes, None)  # its memory first
            # A capture that fails may leave torch's generator unusable: what waits is not tried.
            settings = self.settings(batch, number)
            code = self.code(Gradient, *batch.tensors, *settings)
            why = code.waits
            try:
                if why is None:
                    self.captured[shapes] = Captured(self.taking(code), batch, settings, self.optimizer)
            except RuntimeError as error:
                why = reason(error.__context__ or error)  # the first is what went wrong, the second that it did
            if why is not None:
                self.capturing = False
                self.on_notice(f"not captured as a CUDA graph, so slower: {why}")
                return False
        self.captured[shapes](batch, self.values(number).values())
        return True

    def taking(self, code: Code) -> Callable[..., None]:
        """A step by compiled code, as a function of its inputs."""

        def take(*inputs: Tensor) -> None:
            self.update(*self.parted(code(*inputs)))

        return take

    def summed(self, loss: Tensor, gradients: Sequence[Tensor | None], seen: Sequence[Tensor], due: bool) -> Found:
        """The sums over processes; a gradient is None if it is None in all of them."""
        assert self.together is not None
        have = torch.tensor([float(self.refused is not None), *(g is not None for g in gradients)])
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        own = [
            loss.reshape(1),
            have.to(loss),
            *(g.flatten() for g in filled),
            *(value.reshape(1) for value in seen),
        ]
        total, had, *pieces = self.together(torch.cat(own)).split([len(piece) for piece in own])
        count = len(self.parameters)
        if self.refused is None and (due or not self.deferred) and had[0] > 0:
            self.refuse("another process could not compile it")
        sums: list[Tensor | None] = [
            piece.reshape(p.shape).to(p.dtype) for piece, p in zip(pieces[:count], self.parameters, strict=True)
        ]
        if any(g is None for g in gradients):
            sums = [g if having else None for g, having in zip(sums, had[1:].tolist(), strict=True)]
        return total[0], sums, [piece[0] for piece in pieces[count:]]

    def update(self, loss: Tensor, gradients: Sequence[Tensor | None], seen: Sequence[Tensor]) -> float | None:
        """Let optimiser and constraint take a step, unless a number is not finite; the loss, where it can be read."""
        value, size = None, get_total_norm([g for g in gradients if g is not None])
        if self.deferred:
            # Once 1 it stays 1, so that nothing is updated any more.
            self.failed.copy_(torch.maximum(self.failed, (~(loss.isfinite() & size.isfinite())).float()))
            self.total += torch.where(self.failed > 0, 0.0, loss.double())
            self.taken += 1 - self.failed
        else:
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(size.item())):
                raise NotFinite("a gradient is not finite" if math.isfinite(value) else f"the loss is {value}")
        for parameter, gradient in zip(self.parameters, as_accumulated(gradients, self.parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        for_beta = seen[: len(seen) - len(self.losses)]
        if len(self.losses):
            losses = torch.stack([*seen[len(for_beta) :]]).double()
            self.losses += torch.where(self.failed > 0, 0.0, losses)
        if self.constraint is not None and self.beta is not None:
            beta = self.constraint.adapted(self.beta, *for_beta)
            self.beta.copy_(torch.where(self.failed > 0, self.beta, beta))
        return value

    def settle(self) -> float:
        """On a GPU, the sum of losses since this was last asked, for which it waits; elsewhere 0.

        Raises:
            NotFinite: a loss or a gradient was not, and nothing was updated from then on.
        """
        if not self.deferred:
            return 0.0
        total, taken, failed = torch.stack([self.total, self.taken.double(), self.failed.double()]).tolist()
        for tensor in (self.total, self.taken, self.failed):
            tensor.zero_()
        if failed:
            raise NotFinite("the loss or a gradient is not finite", int(taken))
        return total
