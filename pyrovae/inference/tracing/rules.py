r"""Rules that put faster operations of a recorded graph in the place of others, by identities.

    log_of_products   sum_d log Bernoulli(x_d; l_d) = sum_d x_d l_d - relu(l_d) - log(1 + exp(-|l_d|)), where
                      sum_d log(1 + exp(-|l_d|)) is the log of a product of numbers from 1 to 2: one exponential per
                      element, one logarithm per group of elements, one pass; x is not expanded to all particles
    fast_tanh         tanh(a) = 2 sigmoid(2a) - 1, within rounding of 1 where a processor has no tanh of its own

and `split` takes what does not depend on the particles out of a graph. `bfloat16` has a rule for products.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Products of this many numbers from 1 to 2 cannot overflow in single precision.
MOST_FACTORS = 100


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
