r"""Steps: the loss of a pair on a batch, its gradient, and the update of the parameters.

The loss is -sum_n L_n, with the bound L_n of an objective. Its gradient is taken by autograd in a run of the pair, or
by the same operations as one compiled graph (see `graphs`):

    graph(parameters and buffers, x, *given, beta, ...)  ->  loss, gradients

What changes between steps is an input of the graph (the parameters, the batch, the objective's `settings`) or a random
operation in it (noise, dropout). On a CUDA device the whole step, update included, is then captured as one CUDA graph.

In chunks of particles, with t_kn the `terms` of particle k and datum n, of which L_n is a function,

    1. t_kn chunk by chunk, keeping nothing else;
    2. s_kn = -dL_n / dt_kn;
    3. chunk by chunk again, on the same noise, the gradient of sum_kn s_kn t_kn, and the sum of these gradients.

By the chain rule that is the gradient of the loss, in the memory of one chunk, for one more evaluation of the terms.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from pyrovae.checks import check_count
from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing.graphs import (
    HalfProducts,
    Refused,
    Stored,
    compile_graph,
    fast_tanh,
    log_of_products,
    reason,
    rewrite,
    state,
    trace,
    waits,
)
from pyrovae.seeding import reseed, same_noise

PRECISIONS = ("fp32", "tf32", "bf16-mixed")
# By how much the loss, and the gradient as a whole, of compiled code may differ from autograd's, as a share.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.float64: (1e-9, 1e-6)}
ROUGH = (1e-2, 0.2)  # for products with factors of 8 or 10 bits
# Steps of a shape after which, in another epoch, its code is compared with the pair again.
RECHECK = 100
# Steps on a CUDA device before one is captured, in which libraries allocate what they keep.
WARM_UP = 3


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; no update was made from it on.

    Attributes:
        taken: On a GPU, steps taken since `Step.settle` was last asked, before this one.
    """

    def __init__(self, what: str, taken: int = 0) -> None:
        super().__init__(what)
        self.taken = taken


# -- Parts of a step ---------------------------------------------------------------------------------------------------


class Part(nn.Module):
    """Something computed of a pair and a batch, as a module whose parameters and buffers are all that it depends on.

    Args:
        objective: The objective.
        pair: The pair.
        precision: One of `PRECISIONS`.
    """

    def __init__(self, objective: Objective, pair: Pair, precision: str = "fp32") -> None:
        super().__init__()
        self.objective, self.pair, self.precision = objective, pair, precision
        self.names = [name for name, p in pair.parts.named_parameters() if p.requires_grad]
        self.settings = list(objective.settings(0))
        for i, value in enumerate(pair.stored.values()):
            self.register_buffer(f"stored{i}", value)

    @property
    def trainable(self) -> list[Tensor]:
        """What gradients are taken of, in the order of `Pair.trainable`."""
        named = dict(self.pair.parts.named_parameters())
        stored = [getattr(self, f"stored{i}") for i in range(len(self.pair.stored))]
        return [named[name] for name in self.names] + stored

    def forward(self, *inputs: Tensor) -> Any:
        """What `compute` returns, with gradients where it takes them."""
        leaves = self.trainable
        for tensor in leaves:
            if isinstance(tensor, FakeTensor):  # in a trace, where tensors do not ask for gradients by themselves
                tensor.requires_grad_()
        with ExitStack() as context:
            if self.pair.stored:
                known = map(id, self.pair.stored.values())
                context.enter_context(Stored(dict(zip(known, leaves[len(self.names) :], strict=True))))
            if self.precision == "bf16-mixed":
                context.enter_context(HalfProducts())
            return self.compute(leaves, *inputs)

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        """The computation itself."""
        raise NotImplementedError

    def gradients(self, value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of a scalar by what asks for one; None for what does not, or is not used."""
        asking = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, asking, allow_unused=True))
        # Here too, so that in a graph it is compiled with the rest.
        return as_accumulated([next(found) if leaf.requires_grad else None for leaf in leaves], leaves)

    def draw(self, tensors: Sequence[Tensor], num_particles: int) -> Tensor:
        """The objective's terms of draws for a batch of these tensors, shape (T, num_particles, N)."""
        x, *given = tensors
        return self.objective.draw(self.pair, Batch(x, tuple(given)), num_particles)


class Gradient(Part):
    """(x, *given, *settings) -> loss, gradients; None for parameters on which the loss does not depend."""

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        tensors = len(inputs) - len(self.settings)
        with torch.enable_grad():
            terms = self.draw(inputs[:tensors], sum(self.objective.chunks()))
            settings = dict(zip(self.settings, inputs[tensors:], strict=True))
            loss = -self.objective.combine(terms, **settings).sum()
            gradients = self.gradients(loss, leaves)
        return loss.detach(), *gradients


class Terms(Part):
    """(x, *given) -> the terms of K' particles, shape (T, K', N)."""

    def __init__(self, objective: Objective, pair: Pair, precision: str, num_particles: int) -> None:
        super().__init__(objective, pair, precision)
        self.num_particles = num_particles

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        with torch.no_grad():
            return self.draw(inputs, self.num_particles)


class Pullback(Terms):
    """(x, *given, s) -> the gradients of sum s t, with t the terms of K' particles and s of their shape."""

    def compute(self, leaves: Sequence[Tensor], *inputs: Any) -> Any:
        *tensors, slope = inputs
        with torch.enable_grad():
            return self.gradients((self.draw(tensors, self.num_particles) * slope).sum(), leaves)


class Code:
    """A part compiled for inputs of one shape.

    Args:
        part: What to compile.
        inputs: Of which shape, type and device matter.

    Raises:
        Refused: the part is more than tensor operations.
    """

    def __init__(self, part: Part, *inputs: Tensor) -> None:
        self.part = part
        self.state = [t.detach() for t in state(part).values()]
        with same_noise(inputs[0].device):
            graph = trace(part, *inputs)
        self.waits = waits(graph)  # for the device, which a CUDA graph must not
        rewrite(graph, log_of_products, *[fast_tanh] * (inputs[0].device.type == "cpu"))
        self.code = compile_graph(graph)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the part returns."""
        return self.code(*self.state, *inputs)


class Before:
    """The random state and the buffers of a pair (such as moments of batch normalisation), to go back to."""

    def __init__(self, pair: nn.Module, device: torch.device) -> None:
        self.device = device
        self.noise = torch.get_rng_state()
        self.noise_on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in pair.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        torch.set_rng_state(self.noise)
        if self.noise_on_gpu is not None:
            torch.cuda.set_rng_state(self.noise_on_gpu, self.device)
        for buffer, value in self.buffers:
            buffer.copy_(value)


def compare(got: Sequence[Tensor], wanted: Sequence[Tensor], precision: str, numbers: int) -> None:
    """Refuse a loss and gradients that differ from the pair's own by more than rounding.

    Where the pair's own are not finite, that is left to others.

    Args:
        got: Loss and gradients by compiled code.
        wanted: Those of the pair.
        precision: One of `PRECISIONS`.
        numbers: How many are added up to the loss, each with a rounding error.
    """
    if not all(value.isfinite().all() for value in wanted):
        return
    if len(got) != len(wanted):
        raise Refused(f"the compiled code gives {len(got) - 1} gradients, the pair itself {len(wanted) - 1}")
    exact = TOLERANCE.get(wanted[0].dtype, ROUGH)
    tolerances = exact if precision == "fp32" else ROUGH
    slack = numbers * torch.finfo(wanted[0].dtype).eps * 10
    for name, tolerance, part in zip(("loss", "gradient"), tolerances, (slice(1), slice(1, None)), strict=True):
        difference = get_total_norm([p.double() - q.double() for p, q in zip(got[part], wanted[part], strict=True)])
        size = get_total_norm([q.double() for q in wanted[part]])
        if not difference <= tolerance * size + slack:
            raise Refused(
                f"the compiled {name} differs by {difference.item():.2g} from the pair's own of {size.item():.2g} on "
                "the same noise, so the pair depends on something that is no tensor operation (numpy, Python's "
                "random), or the compiler is wrong about one"
            )


def held_by(pair: Pair) -> dict[str, Any]:
    """What a pair's modules and objects hold besides the values of parameters and buffers: a graph freezes it."""
    owners: dict[str, Any] = dict(pair.parts.named_modules())
    for program in (pair.model, pair.guide):
        owner = getattr(program, "__self__", None)
        if owner is not None and not isinstance(owner, nn.Module):
            owners[type(owner).__name__] = owner
    found: dict[str, Any] = {}
    for where, owner in owners.items():
        of_torch = isinstance(owner, nn.Module)
        values = {k: v for k, v in getattr(owner, "__dict__", {}).items() if not (of_torch and k.startswith("_"))}
        if of_torch:
            values |= owner._buffers
            found |= {
                f"{where}.{k}.requires_grad": p.requires_grad for k, p in owner._parameters.items() if p is not None
            }
        for name, value in values.items():
            if value is None or isinstance(value, bool | int | float | str):
                found[f"{where}.{name}"] = value
            elif isinstance(value, Tensor):
                found[f"{where}.{name}"] = value
                if name not in getattr(owner, "_buffers", {}):
                    found[f"{where}.{name} in place"] = value._version
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of something that two answers of `held_by` differ in."""
    for name in {**before, **after}:
        a, b = before.get(name), after.get(name)
        same = a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b or (a != a and b != b)
        if not same:
            return name.strip(".").replace("..", ".")
    return None


# -- Whole steps -------------------------------------------------------------------------------------------------------


Shapes = tuple[torch.Size, ...]


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
        on_notice: Called with a sentence when something was compiled, or could not be.

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
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        check_chunk(objective, particle_chunk)
        check_precision(precision, next(iter(pair.trainable().values())).device)
        self.objective, self.pair, self.optimizer = objective, pair, optimizer
        self.compiled, self.precision, self.together = compiled, precision, together
        self.on_notice = on_notice or (lambda text: None)
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
        # On a GPU nothing is read back within an epoch: the optimiser itself leaves out what is not finite.
        self.deferred = device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        capturable = all(group.get("capturable", False) for group in optimizer.param_groups)
        self.capturing = self.deferred and capturable and together is None and len(self.sizes) == 1
        self.total = torch.zeros((), dtype=torch.float64, device=device)
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
        loss, gradients = self.checked_gradient(batch, number) if due else self.gradient(batch, number)
        if absent:
            loss, gradients = loss * 0, [None if g is None else g * 0 for g in gradients]
        if self.together is not None:
            loss, gradients = self.summed(loss, gradients, due)
        return self.update(loss, gradients)

    def is_due(self, batch: Batch) -> bool:
        """Whether compiled code for the shapes of a batch has to be compared with the pair, or made."""
        shapes = shapes_of(batch)
        count = self.steps_since[shapes] = self.steps_since.get(shapes, -1) + 1
        return count == 0 or (shapes in self.stale and count >= RECHECK)

    def settings(self, batch: Batch, number: int) -> list[Tensor]:
        """The numbers of the objective that change from step to step, in the precision of x."""
        x = batch.x
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        values = self.objective.settings(number).values()
        return [torch.full((), value, dtype=dtype, device=x.device) for value in values]  # a GPU is not waited for

    def is_compiled(self, batch: Batch) -> bool:
        """Whether steps on as many rows are compiled."""
        wanted = self.compiled if isinstance(self.compiled, bool) else len(batch) in self.compiled
        return wanted and self.refused is None

    def checked_gradient(self, batch: Batch, number: int) -> tuple[Tensor, list[Tensor | None]]:
        """`gradient` by compiled code, compiled if it is new, and compared with the pair itself on the same noise.

        Where that cannot be had, from here on everything is computed by the pair itself, on the same noise as well.
        """
        before, held, started = Before(self.pair, batch.x.device), held_by(self.pair), time.perf_counter()
        new, known = self.held is None, len(self.codes)
        loss, gradients = self.gradient(batch, number, compiled=False)
        wanted = [loss, *(g for g in gradients if g is not None)]
        try:
            if name := changed(held, held_by(self.pair)):
                raise Refused(f"running the pair changes {name}, which a graph would not")
            before.restore()
            loss, gradients = self.gradient(batch, number)
            compare(
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
        return loss, gradients

    def refuse(self, why: str) -> None:
        """Compute everything by the pair itself from here on."""
        self.refused = why
        self.codes.clear()
        self.captured.clear()
        self.on_notice(f"not compiled, so slower: {why}")

    def gradient(self, batch: Batch, number: int, compiled: bool = True) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of a batch and the gradients of `parameters`; of all particles in one, or in chunks.

        Args:
            batch: N rows of data.
            number: How many steps were taken before.
            compiled: By compiled code, for as many rows as are compiled; False: by the pair itself.
        """
        make = self.code if compiled and self.is_compiled(batch) else self.part
        tensors, settings = batch.tensors, self.settings(batch, number)
        if len(self.sizes) == 1:
            loss, *gradients = make(Gradient, *tensors, *settings)(*tensors, *settings)
            return loss, gradients
        device = batch.x.device
        # From torch's generator on the CPU, which waits for no device.
        seed = int(torch.randint(2**62, ()).item())
        terms = self.terms(batch, seed, make).requires_grad_()
        with torch.enable_grad():
            named = dict(zip(self.objective.settings(number), settings, strict=True))
            loss = -self.objective.combine(terms, **named).sum()
            (slope,) = torch.autograd.grad(loss, terms)
        sums: list[Tensor | None] = []
        for i, (k, piece) in enumerate(zip(self.sizes, slope.split(self.sizes, 1), strict=True)):
            reseed(seed + i, device)
            inputs = (*tensors, piece.contiguous())
            gradients = list(make(Pullback, *inputs, num_particles=k)(*inputs))
            sums = gradients if i == 0 else [a if b is None else a + b for a, b in zip(sums, gradients, strict=True)]
        return loss.detach(), sums

    def terms(self, batch: Batch, seed: int, make: Callable[..., Callable[..., Tensor]]) -> Tensor:
        """The terms of all particles, chunk by chunk, each chunk on noise of its own seed."""
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
            why = self.code(Gradient, *batch.tensors, *self.settings(batch, number)).waits
            try:
                if why is None:
                    self.captured[shapes] = Captured(self, batch, number)
            except RuntimeError as error:
                why = reason(error.__context__ or error)  # the first is what went wrong, the second that it did
            if why is not None:
                self.capturing = False
                self.on_notice(f"not captured as a CUDA graph, so slower: {why}")
                return False
        self.captured[shapes](batch, number)
        return True

    def summed(self, loss: Tensor, gradients: Sequence[Tensor | None], due: bool) -> tuple[Tensor, list[Tensor | None]]:
        """The sums over processes; a gradient is None if it is None in all of them."""
        assert self.together is not None
        have = torch.tensor([float(self.refused is not None), *(g is not None for g in gradients)])
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        own = [loss.reshape(1), have.to(loss), *(g.flatten() for g in filled)]
        total, had, *pieces = self.together(torch.cat(own)).split([len(piece) for piece in own])
        if self.refused is None and (due or not self.deferred) and had[0] > 0:
            self.refuse("another process could not compile it")
        sums: list[Tensor | None] = [
            piece.reshape(p.shape).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)
        ]
        if any(g is None for g in gradients):
            sums = [g if count else None for g, count in zip(sums, had[1:].tolist(), strict=True)]
        return total[0], sums

    def update(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> float | None:
        """Let the optimiser take a step, unless a number is not finite; the loss, where it can be read."""
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


class Captured:
    """A step on batches of one shape, gradient and update, as one CUDA graph.

    Random operations in it draw from torch's generator as it is when the graph is replayed.
    """

    def __init__(self, step: Step, batch: Batch, number: int) -> None:
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


# -- What steps run in -------------------------------------------------------------------------------------------------


def check_chunk(objective: Objective, particle_chunk: int | None) -> None:
    """Refuse chunks of an objective that is not made of particles."""
    if particle_chunk is None:
        return
    check_count("particle_chunk", particle_chunk)
    if not objective.of_particles:
        raise UsageError(
            f"particle_chunk: {objective!r} is not made of terms of single particles; use an objective of "
            "pyrovae.inference, or leave it out"
        )


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"precision: tf32 is for CUDA devices, got {device}; use fp32 or bf16-mixed")
    if precision == "bf16-mixed" and not has_bfloat16(device):
        raise UsageError(f"precision: this {device.type} does not compute in bfloat16; use fp32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 numbers by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def flushing(wanted: bool) -> Iterator[None]:
    """Where wanted, take denormal numbers for zero in this thread, and as before at the end.

    Normalised importance weights underflow, and processors take many times longer over denormal numbers. Threads that
    torch has started before are not reached, which is why `log_mean_exp` gives negligible weights no gradient at all.
    """
    before = bool(torch.tensor(1e-40, dtype=torch.float32) == 0)
    if wanted:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
