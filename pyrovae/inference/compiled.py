r"""Compiled: a pair's draws as one graph of tensor operations, compiled once and run for every block of data.

A Pyro program is Python that issues tensor operations, the same ones each time. `trace` records them in one run:

    graph(parameters and buffers, x)  ->  log w, shape (k, n)

Random operations stay random operations of the graph, and what the modules hold are its inputs, so that fresh noise
is drawn at every call and a later change of the parameters is seen. For log p(x) the graph is made faster before it is
compiled, by identities:

    split             what does not depend on the particles (the encoder, a prior's components) is computed once for
                      each block of rows, not for each chunk of particles
    log_of_products   sum_d log Bernoulli(x_d; l_d) = sum_d x_d l_d - relu(l_d) - log(1 + exp(-|l_d|)), where
                      sum_d log(1 + exp(-|l_d|)) is the log of a product of numbers from 1 to 2: one exponential per
                      element, one logarithm per group of elements, one pass
    fast_tanh         tanh(a) = 2 sigmoid(2a) - 1, within rounding of 1 where a processor has no tanh of its own
    half_products     where asked for, matrix products of particles in bfloat16; all else stays in single precision

and it is run on tiles, of as many rows and particles as stay in the processor's cache. Tiles at the edges are filled
up with copies of a row, or with draws that are thrown away, so that one shape serves all.

A graph would freeze whatever Python decides from the numbers. Branches on a tensor's values are refused when tracing;
for the rest, the first tile of *every* block is computed by the pair itself as well, with the same noise. Where that
cannot be traced or does not agree, the pair itself is run, and one warning says why.

References:
    Reed et al. 2022, torch.fx, https://arxiv.org/abs/2112.08429
    Ansel et al. 2024, PyTorch 2, https://docs.pytorch.org/assets/pytorch2-2.pdf
"""

import math
import operator
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import pyro
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pyrovae.errors import UsageError
from pyrovae.inference.log_weights import draw
from pyrovae.inference.pair import Pair
from pyrovae.inference.proposals import FromGuide, FromPrior, Proposal, Sampler, Widened

aten = torch.ops.aten

# The largest tensor of a tile: a few threads' second-level caches. Not by the number of threads, on which no draw
# should depend.
BYTES_ON_CPU = 10 * 2**20
# On a GPU, a tile that occupies all of it.
ELEMENTS_ON_GPU = 2**24
# Floating-point operations from which compiling (5 to 20 s) is repaid: about a minute of the eager pair.
WORTH_ON_CPU, WORTH_ON_GPU = 5e12, 1e15
FROM_GUIDE = FromGuide()
# Products of this many numbers from 1 to 2 cannot overflow in single precision.
MOST_FACTORS = 100
# By how much log-weights of the compiled graph may differ from the pair's own, relative to the largest, plus nats.
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.float64: (1e-9, 1e-9)}
# bfloat16 has 8 bits: its log-weights differ by tenths of a nat, those of a wrong graph by many.
TOLERANCE_BF16 = (1e-2, 1.0)


class CompileWarning(UserWarning):
    """The pair could not be compiled, and is run as it is: same numbers, more time."""


class Disagreement(RuntimeError):
    """A compiled graph does not give the pair's own log-weights."""


# -- From a module to a graph ------------------------------------------------------------------------------------------


def state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name: what its graph takes as inputs."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def trace(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The tensor operations of `module(*inputs)`, as graph(*state(module).values(), *inputs).

    It holds for the shapes of these inputs. Distributions do not validate their arguments in it.

    Raises:
        RuntimeError: Python asks for a tensor's values, so that the operations depend on them.
    """
    names = list(state(module))

    def run(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors, strict=False))
        return functional_call(module, values, tensors[len(names) :])

    # Fake tensors have no values that Python could look at.
    with pyro.validation_enabled(False):
        traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
        graph = traced(*(t.detach() for t in state(module).values()), *inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def compile_graph(graph: fx.GraphModule) -> Callable[..., Tensor]:
    """A graph as compiled code that draws the very random numbers of eager torch. Compiled at the first call."""
    # Inductor's own generator is no faster on a GPU, and 15 times slower on a CPU.
    return torch.compile(graph, dynamic=False, options={"fallback_random": True})


# -- Making a graph faster ---------------------------------------------------------------------------------------------


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_view(node: fx.Node) -> bool:
    """Whether a node is its first argument's memory, seen differently."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def of_particles(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on random numbers. All, if some operation other than a random one works in place."""
    if any(n.op == "call_function" and changes(n) and not is_random(n) for n in graph.nodes):
        return {node for node in graph.nodes if node.op != "placeholder"}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_random(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def changes(node: fx.Node) -> bool:
    """Whether an operation works in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


Rule = Callable[..., fx.Proxy | None]


def rewrite(graph: fx.GraphModule, *rules: Rule) -> None:
    """Put rule(node, *arguments), where that is not None, in the place of nodes that depend on random numbers."""
    for rule in rules:
        found = of_particles(graph.graph)
        for node in list(graph.graph.nodes):
            if node not in found or node.op != "call_function":
                continue
            with graph.graph.inserting_before(node):
                tracer = fx.proxy.GraphAppendingTracer(graph.graph)
                new = rule(node, *proxies(node.args, tracer))
            if new is not None:
                node.replace_all_uses_with(new.node)
                graph.graph.erase_node(node)
        graph.graph.eliminate_dead_code()


def proxies(args: Any, tracer: Any) -> Any:
    """Arguments of a node, with proxies for the nodes in them."""
    return fx.node.map_arg(args, lambda node: cast(Any, fx.Proxy(node, tracer)))


def split(graph: fx.GraphModule, shape: tuple[int, int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph in two: what is the same for all particles, and from its results, what is drawn.

    Args:
        graph: Takes any inputs, and draws particles of that shape.
        shape: (k, n).

    Returns:
        `before(*inputs)`, a tuple, and `after(*before(*inputs))`, which is graph(*inputs).
    """
    drawn = of_particles(graph.graph)
    given: dict[fx.Node, None] = {}  # what `after` takes, in order
    inside: set[fx.Node] = set()

    def again(node: fx.Node) -> bool:
        # Views cost nothing, and expanded to all particles a tensor is cheaper computed again than read.
        value = node.meta.get("val")
        return node.op == "call_function" and (
            is_view(node) or (isinstance(value, Tensor) and tuple(value.shape[:2]) == shape)
        )

    def need(node: fx.Node) -> None:
        if node in drawn or again(node):
            if node not in inside:
                inside.add(node)
                for source in node.all_input_nodes:
                    need(source)
        else:
            given[node] = None

    (output,) = graph.graph.find_nodes(op="output")
    inside.add(output)
    for node in output.all_input_nodes:
        need(node)
    for node in drawn:  # draws that nothing uses, but that move the generator on
        need(node)

    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node not in drawn and node is not output:
            copies[node] = before.node_copy(node, lambda n: copies[n])
    before.output(tuple(copies[node] for node in given))
    before.eliminate_dead_code()
    own = {node: after.placeholder(node.name) for node in given}
    for node in graph.graph.nodes:
        if node in inside:
            own[node] = after.node_copy(node, lambda n: own[n])
    return fx.GraphModule(graph, before), fx.GraphModule(graph, after)


def log_of_products(node: fx.Node, *args: Any) -> fx.Proxy | None:
    """Bernoulli log-probabilities summed over an event: one pass, and one logarithm per group of elements."""
    if node.target is not aten.sum.dim_IntList or node.args[1:] != ([-1],):
        return None
    minus = source = cast(fx.Node, node.args[0])
    while minus.target in (aten.view.default, aten._unsafe_view.default):
        minus = cast(fx.Node, minus.args[0])
    entropy = minus.args[0] if minus.target is aten.neg.default else None
    if not isinstance(entropy, fx.Node) or entropy.target is not aten.binary_cross_entropy_with_logits.default:
        return None
    logits, x, *options = entropy.args
    shape = tuple(source.meta["val"].shape)
    whole_event = entropy.meta["val"].shape[:2] == shape[:2] and len(shape) == 3
    if not whole_event or any(o not in (None, 0) for o in options):  # weights, or another reduction
        return None
    # A group runs across memory, so that a vector of the processor holds one element of each of its lanes.
    lanes = lanes_of(shape[-1])
    groups = [*shape[:-1], shape[-1] // lanes, lanes]
    l, value = (aten.reshape.default(n, groups) for n in proxies((logits, x), args[0].tracer))
    linear = aten.sum.dim_IntList(aten.relu.default(l) - l * value, [-2])
    factors = aten.prod.dim_int(aten.exp.default(-aten.abs.default(l)) + 1, -2)
    return -aten.sum.dim_IntList(linear + aten.log.default(factors), [-1])


def lanes_of(size: int) -> int:
    """Into how many groups to multiply this many factors: few, and best a multiple of a vector's 16 numbers."""
    lanes = [n for n in range(1, size + 1) if size % n == 0 and size // n <= MOST_FACTORS]
    return min(lanes, key=lambda n: (n % 16 != 0, n))


def fast_tanh(node: fx.Node, *args: Any) -> fx.Proxy | None:
    """tanh by the logistic function, which compiles to a vectorised exponential."""
    if node.target is not aten.tanh.default or node.meta["val"].dtype != torch.float32:
        return None
    return aten.sigmoid.default(args[0] * 2) * 2 - 1


def half_products(node: fx.Node, *args: Any) -> fx.Proxy | None:
    """A matrix product or convolution of single-precision numbers rounded to bfloat16; what is added is not rounded."""
    if node.target not in PRODUCTS or node.meta["val"].dtype != torch.float32 or node.kwargs:
        return None
    if node.target is aten.convolution.default:
        a, b, bias, *rest = args
        bias = None if bias is None else aten.reshape.default(bias, [-1] + [1] * (node.meta["val"].ndim - 2))
        product = aten.convolution.default(half(a), half(b), None, *rest)
    else:
        *first, a, b = args
        bias = first[0] if first else None
        product = (aten.bmm if node.target in (aten.bmm.default, aten.baddbmm.default) else aten.mm).default(
            half(a), half(b)
        )
    product = aten._to_copy.default(product, dtype=torch.float32)
    return product if bias is None else product + bias


PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default)


def half(a: fx.Proxy) -> fx.Proxy:
    """A tensor in bfloat16."""
    return aten._to_copy.default(a, dtype=torch.bfloat16)


# -- Log-weights -------------------------------------------------------------------------------------------------------


class Draws(nn.Module):
    """Log-weights of a fixed number of draws, as a torch module of x."""

    def __init__(self, proposal: Proposal, pair: Pair, num_particles: int) -> None:
        super().__init__()
        self.proposal, self.pair, self.num_particles = proposal, pair, num_particles

    def forward(self, x: Tensor) -> Tensor:
        """Log-weights (k, n) in nats of draws for x (n, *event)."""
        return self.proposal(self.pair.model, self.pair.guide, x)(self.num_particles)


class Program:
    """The compiled log-weights of a pair for tiles of one shape.

    Args:
        draws: The pair.
        x: n rows of data, of which only the shape matters.
        half: Whether matrix products of particles are in bfloat16.
    """

    def __init__(self, draws: Draws, x: Tensor, half: bool) -> None:
        self.draws, self.rows, self.half = draws, len(x), half
        graph = trace(draws, x)
        # Checked as it was traced too where its products are rounded, which would hide a difference.
        self.traced = trace(draws, x) if half else None
        rewrite(graph, log_of_products, *[fast_tanh] * (x.device.type == "cpu"), *[half_products] * half)
        self.before, after = split(graph, (draws.num_particles, self.rows))
        self.after = compile_graph(after)

    def prepare(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """What the draws for x (N, *event) start from, for each tile of rows."""
        tensors = [t.detach() for t in state(self.draws).values()]
        return [self.before(*tensors, self.filled(rows)) for rows in x.split(self.rows)]

    def filled(self, x: Tensor) -> Tensor:
        """x with its first row repeated until it fills a tile."""
        return torch.cat([x, x[:1].expand(self.rows - len(x), *x.shape[1:])]) if len(x) < self.rows else x

    def check(self, x: Tensor, start: tuple[Tensor, ...]) -> Tensor:
        """Compare a tile with the pair's own on the same noise; the difference of their estimates, shape (n,).

        Raises:
            Disagreement: they differ by more than rounding.
        """
        x = self.filled(x[: self.rows])
        with same_noise(x):
            wanted = self.draws(x)
        if self.traced is not None:
            with same_noise(x):
                compare(self.traced(*(t.detach() for t in state(self.draws).values()), x), wanted)
        with same_noise(x):
            got = self.after(*start)
        compare(got, wanted, TOLERANCE_BF16 if self.half else None)
        return torch.logsumexp(got.double(), 0) - torch.logsumexp(wanted.double(), 0)


def same_noise(x: Tensor) -> AbstractContextManager[None]:
    """Leave the random state behind as it was found."""
    return torch.random.fork_rng(devices=[x.device.index or 0] if x.device.type == "cuda" else [])


def compare(got: Tensor, wanted: Tensor, tolerance: tuple[float, float] | None = None) -> None:
    """Refuse log-weights that differ by more than rounding; NaNs and infinities must be the same."""
    relative, absolute = tolerance or TOLERANCE.get(wanted.dtype, TOLERANCE_BF16)
    finite = wanted[wanted.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if not torch.allclose(got, wanted, rtol=0.0, atol=absolute + relative * largest, equal_nan=True):
        difference = (got - wanted).abs().nan_to_num(math.inf).max().item()
        raise Disagreement(
            f"compiled log-weights differ by up to {difference:.2g} nats from the pair's own on the same noise, so the "
            "pair depends on something that is no tensor operation (numpy, Python's random, a changed global)"
        )


@dataclass(frozen=True)
class Compiled:
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
        if not isinstance(self.proposal, FromGuide | FromPrior | Widened):
            raise UsageError(
                f"proposal: expected FromGuide, FromPrior or Widened, got {type(self.proposal).__name__}, which is "
                "more than tensor operations; use it without Compiled"
            )

    @property
    def name(self) -> str:
        """What estimates call it."""
        return self.proposal.name + (", matrix products in bfloat16" if self.precision == "bf16" else "")

    @property
    def bias(self) -> tuple[float, float]:
        """Mean and standard error over rows of what compiling, bf16 above all, added to estimates, in nats.

        From a tile of every block, by the same draws: their log-mean-weight, compiled less eager.
        """
        all_of_them = torch.cat([torch.zeros(0), *self.differences])
        return all_of_them.mean().item(), (all_of_them.std() / math.sqrt(max(1, len(all_of_them)))).item()

    def __call__(self, model: Callable, guide: Callable, x: Tensor) -> Sampler:
        if self.precision == "bf16" and x.dtype != torch.float32:
            raise UsageError(f"precision: bf16 is for data and models in single precision, got x of {x.dtype}")
        plain = self.proposal(model, guide, x)
        starts: list[tuple[Tensor, ...]] = []

        @torch.no_grad()
        def sample(k: int) -> Tensor:
            key = (model, guide, x.shape[1:], x.dtype, x.device)
            given_up = key in self.programs and self.programs[key] is None
            if not starts and not given_up:  # the first draws of this block
                # The graph validates nothing: whatever the pair has to say about these rows, it says here.
                with same_noise(x):
                    plain(1)
                self.start(key, starts, x, k)
            program = self.programs[key]
            return plain(k) if program is None else run(program, starts, k, len(x))

        return sample

    def start(self, key: tuple, starts: list[tuple[Tensor, ...]], x: Tensor, k: int) -> None:
        """Prepare a block, after compiling if it is the first, and check its first tile."""
        try:
            if key not in self.programs:
                rows, particles = tile(x, k)
                draws = Draws(self.proposal, Pair(*key[:2]), particles)
                self.programs[key] = Program(draws, x[:rows], self.precision == "bf16")
            program = self.programs[key]
            assert program is not None
            starts.extend(program.prepare(x))
            difference = program.check(x, starts[0])
            self.differences.append(difference[: len(x)].cpu())
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


def tile(x: Tensor, k: int) -> tuple[int, int]:
    """How many of the rows and of k particles to compute at once."""
    size = x[0].numel()
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


def reason(error: Exception) -> str:
    """The first line of what went wrong, with the remedy for the usual cause."""
    text = str(error).strip() or type(error).__name__
    if "DataDependent" in type(error).__name__ or "tracing tensor" in text:
        return "the pair branches on values of tensors; use torch.where"
    return text.splitlines()[0]


def worth_compiling(model: Callable, guide: Callable, x: Tensor, num_particles: int) -> bool:
    """Whether an evaluation is long enough to repay compiling, by its floating-point operations."""
    few = x[:100]
    counts = []
    with torch.no_grad(), same_noise(x):
        for k in (1, 2):
            with FlopCounterMode(display=False) as counter:
                draw(model, guide, few, k)
            counts.append(counter.get_total_flops())
    work = (counts[1] - counts[0]) * num_particles * len(x) / len(few)
    return work >= (WORTH_ON_CPU if x.device.type == "cpu" else WORTH_ON_GPU)
