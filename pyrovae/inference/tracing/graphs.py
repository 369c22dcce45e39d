r"""Graphs: the tensor operations of a pair, recorded in one run of its Python, rewritten, and compiled.

A Pyro program is Python that issues tensor operations, the same ones each time. `trace` records them:

    graph(parameters and buffers, inputs)  ->  outputs

Random operations stay random operations of the graph, and what the modules hold are its inputs, so that fresh noise is
drawn at every call and a later change of the parameters is seen. Whatever Python decides from the values of tensors
would be frozen into it, and is refused. Rules then put faster operations in the place of some, by identities:

    log_of_products   sum_d log Bernoulli(x_d; l_d) = sum_d x_d l_d - relu(l_d) - log(1 + exp(-|l_d|)), where
                      sum_d log(1 + exp(-|l_d|)) is the log of a product of numbers from 1 to 2: one exponential per
                      element, one logarithm per group of elements, one pass; x is not expanded to all particles
    fast_tanh         tanh(a) = 2 sigmoid(2a) - 1, within rounding of 1 where a processor has no tanh of its own
    half_products     where asked for, matrix products in bfloat16; all else stays in single precision

and `split` takes what does not depend on the particles out of a graph.

References:
    Reed et al. 2022, torch.fx, https://arxiv.org/abs/2112.08429
    Ansel et al. 2024, PyTorch 2, https://docs.pytorch.org/assets/pytorch2-2.pdf
"""

import copy
import logging
import math
import operator
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx, nn
from torch.distributions import constraints, transform_to
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.inference.tracing import code_cache
from pyrovae.seeding import same_noise as same_noise

aten = torch.ops.aten

# Products of this many numbers from 1 to 2 cannot overflow in single precision.
MOST_FACTORS = 100


# -- From a module to a graph ------------------------------------------------------------------------------------------


class CompileWarning(UserWarning):
    """The pair could not be compiled, and is run as it is: same numbers, more time."""


class Refused(RuntimeError):
    """A module is more than tensor operations, so that no graph of them is the module."""


def state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name: what its graph takes as inputs."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def trace(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The tensor operations of `module(*inputs)`, as graph(*state(module).values(), *inputs).

    It holds for the shapes of these inputs. Distributions do not validate their arguments in it.

    Args:
        module: Anything whose operations do not depend on the values of tensors.
        inputs: Of which shape, type and device matter.

    Raises:
        Refused: Python asks for a tensor's values, so that the operations depend on them.
    """
    names = list(state(module))

    def run(*tensors: Tensor) -> Any:
        return functional_call(module, dict(zip(names, tensors, strict=False)), tensors[len(names) :])

    values = [t.detach().clone() for t in (*state(module).values(), *inputs)]
    # Fake tensors have no values that Python could look at.
    tracer = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
    with pyro.validation_enabled(False), unwatched():
        try:
            graph = tracer(*values)
        except Exception as error:
            if "DataDependent" not in type(error).__name__ and "tracing tensor" not in str(error):
                raise
            raise Refused(f"values of tensors decide what is computed{place_of(error)}") from error
    poison(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def poison(graph: fx.Graph) -> None:
    """Have NaNs where a factorisation, an inverse or a solution failed, in the place of asking whether it did.

    To ask makes a GPU wait, at every step, and cannot be captured. NaNs are found with those of other origin.
    """
    for check in graph.find_nodes(op="call_function", target=aten._linalg_check_errors.default):
        info = check.args[0]
        batch = tuple(info.meta["val"].shape)
        results = [n for n in info.args[0].users if n is not info and n.meta["val"].is_floating_point()]
        if info.target is not operator.getitem or any(
            tuple(r.meta["val"].shape[: len(batch)]) != batch for r in results
        ):
            continue
        order = {node: i for i, node in enumerate(graph.nodes)}
        last = max((info, *results), key=lambda node: order[node])
        later = {node for node in order if order[node] > order[last]}
        with graph.inserting_before(last.next):
            good = graph.call_function(aten.eq.Scalar, (info, 0))
            for result in results:
                value = result.meta["val"]
                each = [*batch, *[1] * (value.ndim - len(batch))]
                whole = graph.call_function(aten.reshape.default, (good, each))
                options = {"dtype": value.dtype, "device": value.device}
                nan = graph.call_function(aten.full.default, ([], math.nan), options)
                new = graph.call_function(aten.where.self, (whole, result, nan))
                new.meta["val"] = value
                result.replace_all_uses_with(new, delete_user_cb=later.__contains__)
        graph.erase_node(check)


def waits(graph: fx.GraphModule) -> str | None:
    """Which operation of a graph makes the host wait for its device, or copies between them; None if none does."""
    copies = (aten._to_copy.default, aten.copy_.default, aten.copy.default)
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        tags = getattr(node.target, "tags", ())
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        asks = torch.Tag.data_dependent_output in tags or node.target is aten._linalg_check_errors.default
        if torch.Tag.dynamic_output_shape in tags:  # of indexing, only by truth values
            asks |= node.target is not aten.index.Tensor or any(v.dtype == torch.bool for v in tensors[1:])
        if asks:
            return f"{node.target} waits for the device"
        devices = {v.device.type for v in tensors if v.ndim or node.target in copies}
        if len(devices) > 1:
            return f"{node.target} copies between {' and '.join(sorted(devices))}"
    return None


class Stored(Messenger):
    """Give `pyro.param` statements traced tensors in the place of those in Pyro's parameter store.

    Args:
        traced: Unconstrained values by the id of the unconstrained parameter that they stand for.
    """

    def __init__(self, traced: dict[int, Tensor]) -> None:
        super().__init__()
        self.traced = traced

    def _pyro_param(self, msg: dict) -> None:
        known = dict(pyro.get_param_store().named_parameters()).get(msg["name"])
        if id(known) in self.traced:
            constraint = msg["kwargs"].get("constraint", constraints.real)
            msg["value"], msg["done"] = transform_to(constraint)(self.traced[id(known)]), True


@contextmanager
def unwatched() -> Iterator[None]:
    """Keep Pyro's objectives from looking at the loss: for NaNs, or for its value, which they only report."""
    from pyro.infer import trace_elbo, trace_mean_field_elbo, traceenum_elbo

    blind = {
        "warn_if_nan": lambda value, *_, **__: value,
        "torch_item": lambda value: value.detach() if isinstance(value, Tensor) else value,
    }
    with ExitStack() as patches:
        for module in (trace_elbo, trace_mean_field_elbo, traceenum_elbo):
            for name, function in blind.items():
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, function))
        yield


def place_of(error: BaseException) -> str:
    """Where an error comes from: " in guide, line 12 of pair.py; use torch.where", or Pyro's own function."""
    here = os.path.dirname(__file__)
    torch_, pyro_, inference = (os.path.dirname(file) + os.sep for file in (torch.__file__, pyro.__file__, here))
    libraries = (torch_, pyro_, inference, sysconfig.get_path("stdlib"), "<")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if own:
        return f" in {own[-1].name}, line {own[-1].lineno} of {os.path.basename(own[-1].filename)}; use torch.where"
    in_pyro = [frame for frame in frames if frame.filename.startswith(pyro_)]
    return f" in Pyro's {in_pyro[-1].name}" if in_pyro else ""


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def compile_graph(graph: fx.GraphModule) -> Callable[..., Any]:
    """A graph as compiled code that draws the very random numbers of eager torch. Compiled at the first call."""
    compiled: list[Callable[..., Any]] = []
    constants = lifted(graph)

    @torch.no_grad()
    def call(*inputs: Tensor) -> Any:
        if not compiled:
            with quiet("torch.utils.cpp_extension"), same_noise(inputs[0].device):
                compiled.append(inductor(graph, [*constants, *inputs]))
        return compiled[0](*constants, *inputs)

    return call


def lifted(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs, the first ones, of the tensors that a graph holds, which compiled code would take for constants."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).append(node)
    values = {name: operator.attrgetter(name)(graph) for name in found}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for number, name in reversed(list(enumerate(tensors))):
        with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
            given = graph.graph.placeholder(f"held{number}")
        for node in found[name]:
            node.replace_all_uses_with(given)
            graph.graph.erase_node(node)
    graph.recompile()
    return [tensor.detach() for tensor in tensors.values()]


def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A graph compiled by torch's compiler."""
    import torch._inductor  # takes a second
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    # Inductor's own generator is no faster on a GPU, and 15 times slower on a CPU.
    options = {"fallback_random": True}
    if any(isinstance(t, Tensor) and t.is_cuda for t in inputs) and hasattr(torch._inductor.config, "deterministic"):
        options["deterministic"] = True  # nothing is chosen by a clock
    try:
        # Takes the processor's word for what it can do: trying all of it takes 8 s, the first time on a machine.
        with code_cache.verified():
            return torch._inductor.compile(copy.deepcopy(graph), inputs, {**options, "cpp.vec_isa_ok": True})
    except Exception:
        # Damaged files that look whole, or a C++ compiler that is too old for the processor.
        valid_vec_isa_list.cache_clear()
        with code_cache.fresh():
            return torch._inductor.compile(graph, inputs, options)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keep a logger from remarks such as that there is a CUDA compiler but no device."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    graph.recompile()


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
    if node.target not in PRODUCTS or first(node.meta["val"]).dtype != torch.float32 or node.kwargs:
        return None
    return half_product(node.target, *args)


class HalfProducts(TorchDispatchMode):
    """The same for every product in eager code and its gradient, in the context of this mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or kwargs or any(isinstance(a, Tensor) and a.dtype != torch.float32 for a in args):
            return func(*args, **(kwargs or {}))
        return half_product(func, *args)


def half_product(product: Any, *args: Any) -> Any:
    """A product of tensors, or of proxies for them, with its factors rounded to bfloat16."""
    if product is aten.convolution_backward.default:
        slope, x, weight, _, *rest, (of_x, of_weight, of_bias) = args
        mask = [of_x, of_weight, False]
        grads = product(half(slope), half(x), half(weight), None, *rest, mask)
        over = [0, *range(2, ndim(slope))]
        return (
            single(grads[0]) if of_x else None,
            single(grads[1]) if of_weight else None,
            aten.sum.dim_IntList(slope, over) if of_bias else None,
        )
    if product is aten.convolution.default:
        a, b, bias, *rest = args
        result = single(product(half(a), half(b), None, *rest))
        return result if bias is None else result + aten.reshape.default(bias, [1, -1] + [1] * (ndim(a) - 2))
    *added, a, b = args
    plain = aten.bmm.default if product in (aten.bmm.default, aten.baddbmm.default) else aten.mm.default
    result = single(plain(half(a), half(b)))
    return result + added[0] if added else result


PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


def first(value: Any) -> Tensor:
    """A tensor, or the first one of several."""
    return next(v for v in value if v is not None) if isinstance(value, tuple | list) else value


def ndim(a: Any) -> int:
    """The number of dimensions of a tensor, or of the one a proxy stands for."""
    return a.ndim if isinstance(a, Tensor) else a.node.meta["val"].ndim


def half(a: Any) -> Any:
    """A tensor in bfloat16."""
    return aten._to_copy.default(a, dtype=torch.bfloat16)


def single(a: Any) -> Any:
    """A tensor in single precision."""
    return aten._to_copy.default(a, dtype=torch.float32)
