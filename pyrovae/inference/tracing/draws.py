r"""Compiled: a pair's draws for log p(x) as one graph of tensor operations, run for every block of data.

The graph (see `recording`) is (parameters and buffers, x, *given) -> log w of shape (k, n). What does not depend on the
particles (the encoder, a prior's components) is computed once for each block of rows; the rest is compiled and run on
tiles, of as many rows and particles as stay in the processor's cache. Tiles at the edges are filled up with copies of a
row, or with draws that are thrown away, so that one shape serves all.

A graph would freeze whatever Python decides from numbers other than tensors (Python's random, a changed global). So
the first tile of *every* block is computed by the pair itself as well, with the same noise. Where that does not agree,
or the pair cannot be traced, the pair itself is run, and one warning says why.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import Summation
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import FROM_GUIDE, Proposal, Sampler
from pyrovae.inference.tracing.checked import compare_weights
from pyrovae.inference.tracing.compiler import compile_graph, recorded
from pyrovae.inference.tracing.recording import CompileWarning, reason, state, trace
from pyrovae.inference.tracing.rules import split
from pyrovae.inference.weights import draw
from pyrovae.seeding import same_noise

# The largest tensor of a tile: a few threads' second-level caches. Not by the number of threads, on which no draw
# should depend.
BYTES_ON_CPU = 10 * 2**20
# On a GPU, a tile that occupies all of it.
ELEMENTS_ON_GPU = 2**24
# Floating-point operations from which compiling (5 to 20 s) is repaid: about a minute of the eager pair.
WORTH_ON_CPU, WORTH_ON_GPU = 5e12, 1e15


class Draws(nn.Module):
    """Log-weights of a fixed number of draws, as a torch module of x and what is given."""

    def __init__(self, proposal: Proposal, pair: Pair, num_particles: int) -> None:
        super().__init__()
        self.proposal, self.pair, self.num_particles = proposal, pair, num_particles

    def forward(self, *tensors: Tensor) -> Tensor:
        """Log-weights (k, n) in nats of draws for n rows of data."""
        return self.proposal(self.pair, Batch(tensors[0], tensors[1:]))(self.num_particles)


class Program:
    """The compiled log-weights of a pair for tiles of one shape.

    Args:
        draws: The pair.
        batch: n rows of data, of which only the shapes matter.
        half: Whether matrix products of particles are in bfloat16.
    """

    def __init__(self, draws: Draws, batch: Batch, half: bool) -> None:
        self.draws, self.rows, self.half = draws, len(batch), half
        graph = recorded(draws, *batch.tensors, half=half)
        # Checked as it was traced too where its products are rounded, which would hide a difference.
        self.traced = trace(draws, *batch.tensors) if half else None
        self.before, after = split(graph, (draws.num_particles, self.rows))
        self.after = compile_graph(after)

    def prepare(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """What the draws for N rows of data start from, for each tile of them."""
        values = [t.detach() for t in state(self.draws).values()]
        return [self.before(*values, *self.filled(rows)) for rows in batch.split(self.rows)]

    def filled(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tensors of a batch with its first row repeated until it fills a tile."""
        missing = self.rows - len(batch)
        return tuple(torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) if missing else t for t in batch.tensors)

    def check(self, batch: Batch, start: tuple[Tensor, ...]) -> Tensor:
        """Compare a tile with the pair's own on the same noise; the difference of their estimates, shape (n,).

        Raises:
            Refused: they differ by more than rounding.
        """
        tensors, device = self.filled(batch[: self.rows]), batch.x.device
        with same_noise(device):
            wanted = self.draws(*tensors)
        if self.traced is not None:
            with same_noise(device):
                compare_weights(self.traced(*(t.detach() for t in state(self.draws).values()), *tensors), wanted)
        with same_noise(device):
            got = self.after(*start)
        compare_weights(got, wanted, rough=self.half)
        return torch.logsumexp(got.double(), 0) - torch.logsumexp(wanted.double(), 0)


@dataclass(frozen=True)
class Compiled(Proposal):
    """A proposal whose draws are traced and compiled, for evaluations long enough to repay 5 to 20 s of compiling.

    The same draws to rounding, for any pair; where that cannot be had, the pair itself is run and one `CompileWarning`
    says why. Keep the object to use the compiled code again; it serves one shape of data.

    Args:
        proposal: Where the draws come from: `FromGuide`, `FromPrior` or `Widened`.
        precision: "fp32", or "bf16" for matrix products of particles in bfloat16, with everything else in single
            precision. What that does to the estimate is measured as it goes, see `bias`.

    Raises:
        UsageError: another proposal or precision.
    """

    proposal: Proposal = FROM_GUIDE
    precision: str = "fp32"
    programs: dict[tuple, "Program | None"] = field(default_factory=dict, init=False, repr=False, compare=False)
    differences: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision: expected fp32 or bf16, got {self.precision!r}")
        if not self.proposal.traceable:
            raise UsageError(
                f"proposal: expected FromGuide, FromPrior or Widened, got {type(self.proposal).__name__}, which is "
                "more than tensor operations; use it without Compiled"
            )

    @property
    def name(self) -> str:
        """What estimates call it."""
        return self.proposal.name + (", matrix products in bfloat16" if self.precision == "bf16" else "")

    @property
    def of_guide(self) -> bool:
        return self.proposal.of_guide

    def summing(self, sums: Summation) -> Proposal | None:
        inner = self.proposal.summing(sums)
        if inner is None:
            return None
        made = Compiled(inner, self.precision)
        # Its code and what is found of it are this one's.
        object.__setattr__(made, "programs", self.programs)
        object.__setattr__(made, "differences", self.differences)
        return made

    @property
    def bias(self) -> tuple[float, float]:
        """Mean and standard error over rows of what compiling, bf16 above all, added to estimates, in nats.

        From a tile of every block, by the same draws: their log-mean-weight, compiled less eager.
        """
        all_of_them = torch.cat([torch.zeros(0), *self.differences])
        return all_of_them.mean().item(), (all_of_them.std() / math.sqrt(max(1, len(all_of_them)))).item()

    def computation(self) -> dict[str, Any]:
        bias = dict(zip(("nats", "error"), self.bias, strict=True)) if self.precision == "bf16" else None
        return {"compiled": any(self.programs.values()), "precision": self.precision, "precision_bias": bias}

    def __call__(self, pair: Pair, batch: Batch) -> Sampler:
        if self.precision == "bf16" and batch.x.dtype != torch.float32:
            raise UsageError(f"precision: bf16 is for data and models in single precision, got x of {batch.x.dtype}")
        plain = cast(Sampler, self.proposal(pair, batch))
        starts: list[tuple[Tensor, ...]] = []

        @torch.no_grad()
        def sample(k: int) -> Tensor:
            key = (self.proposal, pair.model, pair.guide, *((t.shape[1:], t.dtype, t.device) for t in batch.tensors))
            given_up = key in self.programs and self.programs[key] is None
            if not starts and not given_up:  # the first draws of this block
                # The graph validates nothing: whatever the pair has to say about these rows, it says here.
                with same_noise(batch.x.device):
                    plain(1)
                self.start(key, starts, pair, batch, k)
            program = self.programs[key]
            return plain(k) if program is None else run(program, starts, k, len(batch))

        return Sampler(sample, plain.at)

    def start(self, key: tuple, starts: list[tuple[Tensor, ...]], pair: Pair, batch: Batch, k: int) -> None:
        """Prepare a block, after compiling if it is the first, and check its first tile."""
        try:
            if key not in self.programs:
                rows, particles = tile(batch, k)
                draws = Draws(self.proposal, pair, particles)
                self.programs[key] = Program(draws, batch[:rows], self.precision == "bf16")
            program = self.programs[key]
            assert program is not None
            starts.extend(program.prepare(batch))
            difference = program.check(batch, starts[0])
            self.differences.append(difference[: len(batch)].cpu())
        except Exception as error:
            self.programs[key] = None
            starts.clear()
            warnings.warn(f"not compiled, so slower: {reason(error)}", CompileWarning, stacklevel=4)


def run(program: Program, starts: list[tuple[Tensor, ...]], k: int, rows: int) -> Tensor:
    """k log-weights for each of the rows, tile by tile, shape (k, N)."""
    columns = []
    for start in starts:
        tiles = [program.after(*start) for _ in range(0, k, program.draws.num_particles)]
        columns.append(torch.cat(tiles)[:k])
    return torch.cat(columns, 1)[:, :rows]


def tile(batch: Batch, k: int) -> tuple[int, int]:
    """How many of the rows and of k particles to compute at once."""
    x, size = batch.x, sum(tensor[0].numel() for tensor in batch.tensors)
    if x.device.type == "cpu":
        most = max(1, BYTES_ON_CPU // (size * x.element_size()))
    else:
        most = max(1, ELEMENTS_ON_GPU // size)
    # Some rows in every tile, so that a block does not take many.
    particles = even(k, max(1, most // min(len(x), 8)))
    return even(len(x), max(1, most // particles)), particles


def even(total: int, most: int) -> int:
    """The size of parts of at most `most` that fill the least more than the total, and the larger of two such."""
    sizes = range(most // 2 + 1, most + 1)
    return total if total <= most else min(sizes, key=lambda size: (math.ceil(total / size) * size, -size))


def worth_compiling(
    model: Callable, guide: Callable, x: Tensor, num_particles: int, given: Sequence[Tensor] = ()
) -> bool:
    """Whether an evaluation is long enough to repay compiling, by its floating-point operations."""
    pair, few = Pair(model, guide), Batch.of(x, given)[:100]
    counts = []
    with torch.no_grad(), same_noise(x.device):
        for k in (1, 2):
            with FlopCounterMode(display=False) as counter:
                draw(pair, few, k)
            counts.append(counter.get_total_flops())
    work = (counts[1] - counts[0]) * num_particles * len(x) / len(few)
    return work >= (WORTH_ON_CPU if x.device.type == "cpu" else WORTH_ON_GPU)
