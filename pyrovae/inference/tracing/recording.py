r"""Recording: the tensor operations of a pair, in one run of its Python, as a graph.

A Pyro program is Python that issues tensor operations, the same ones each time. `trace` records them:

    graph(parameters and buffers, inputs)  ->  outputs

Random operations stay random operations of the graph, and what the modules hold are its inputs, so that fresh noise is
drawn at every call and a later change of the parameters is seen. Whatever Python decides from the values of tensors
would be frozen into it, and is refused.

References:
    Reed et al. 2022, torch.fx, https://arxiv.org/abs/2112.08429
"""

import math
import operator
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx, nn
from torch.distributions import constraints, transform_to
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


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
