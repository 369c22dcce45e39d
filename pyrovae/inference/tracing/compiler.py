"""From a module to its graph, and from there to compiled code, by torch's compiler.

References:
    Ansel et al. 2024, PyTorch 2, https://docs.pytorch.org/assets/pytorch2-2.pdf
"""

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrovae.inference.tracing import code_cache
from pyrovae.inference.tracing.bfloat16 import half_products
from pyrovae.inference.tracing.recording import trace
from pyrovae.inference.tracing.rules import fast_tanh, log_of_products, rewrite
from pyrovae.seeding import same_noise


def recorded(module: nn.Module, *inputs: Tensor, half: bool = False) -> fx.GraphModule:
    """The graph of a module, with faster operations in the place of some.

    Args:
        module: What to record, see `trace`.
        inputs: Of which shape, type and device matter.
        half: Matrix products of particles are in bfloat16.

    Raises:
        Refused: the module is more than tensor operations.
    """
    graph = trace(module, *inputs)
    rewrite(graph, log_of_products, *[fast_tanh] * (inputs[0].device.type == "cpu"), *[half_products] * half)
    return graph


def compile_graph(graph: fx.GraphModule) -> Callable[..., Any]:
    """A graph as compiled code that draws the very random numbers of eager torch. Compiled at the first call."""
    compiled: list[Callable[..., Any]] = []
    constants = lifted(graph)

    @torch.no_grad()
    def call(*inputs: Tensor) -> Any:
        if not compiled:
            with quiet("torch.utils.cpp_extension"), same_noise(inputs[0].device), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch, for its own code
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
