"""A look at a pair before it is trained: that it can be, and that every parameter gets a gradient."""

from collections.abc import Callable
from dataclasses import dataclass

from pyro import poutine
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyrovae.errors import PairError, UsageError
from pyrovae.inference.automatic import automatic, check_automatic, set_up
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective, OfParticles, check_per_datum
from pyrovae.inference.pair import Pair
from pyrovae.inference.tracing.checked import Before
from pyrovae.inference.validity import WHOLE, examine, why_no_density


@dataclass(frozen=True)
class Trial:
    """What was found of a pair that was not refused.

    Attributes:
        whole: The pair works on all rows together only, in their order.
        no_density: Why what is maximised is no bound; None if it is one.
        flops: Floating-point operations of a step, for each row.
    """

    whole: bool
    no_density: str | None
    flops: float


def tried(
    pair: Pair, objective: Objective, batch: Batch, total: int, divided: bool, notice: Callable[[str], None]
) -> Trial:
    """Look at a pair, and run it once with a gradient.

    Args:
        pair: The pair.
        objective: What is maximised.
        batch: Rows as steps have them.
        total: Of all rows.
        divided: Steps are on fewer rows than all, or on those of one process among several.
        notice: Called with what the user should read.

    Raises:
        PairError: it gives no bound per datum, or works on all of its rows only.
        UsageError: it has nothing to train, or parameters that are not found.
    """
    whole, no_density = examined(pair, objective, batch, total, divided)
    if no_density is not None:
        notice(f"{no_density}. It is trained all the same, and what is recorded is no bound")
    if isinstance(objective, OfParticles) and (why := objective.gradient.bias(objective)):
        notice(f"the {objective.gradient.word} gradient is biased: {why}; the bound that is recorded is not")
    of_particles = objective.of_particles
    # Fewer rows than a step has, for the memory of all particles at once.
    flops = probe(pair, objective, batch[:2] if of_particles and not whole else batch, notice)
    if not of_particles and len(batch) == total:
        # Perhaps parameters of the rows, perhaps a layer as wide; where there are batches, they are the latter.
        whole = whole or any(total in p.shape[:1] for p in pair.trainable().values())
    return Trial(whole, no_density, flops)


def examined(pair: Pair, objective: Objective, batch: Batch, total: int, divided: bool) -> tuple[bool, str | None]:
    """Whether the pair works on all rows only, and why its guide has no density, if it has none."""
    guide, of_particles = pair.guide, objective.of_particles
    whole = per_row = bool(automatic(guide))
    no_density: str | None = None
    declared = poutine.trace(param_only=True)
    try:
        if not per_row or len(batch) == total:
            if of_particles:
                check_automatic(guide)
            set_up(guide, batch)
            with declared:
                findings = examine(pair, batch, total=total) if of_particles else None
            whole = per_row or (findings is not None and findings.whole)
            no_density = findings.no_density if findings else why_no_density(pair, batch)
    except Exception as error:
        stored = [site["value"] for site in declared.trace.nodes.values() if site["type"] == "param"]
        per_row = any(total in p.shape[:1] for p in (*pair.parameters(), *stored))
        if len(batch) == total or not per_row:
            raise
        raise PairError(only_whole(total)) from error
    if (whole or per_row) and divided:
        raise PairError(only_whole(total))
    return whole, no_density


def only_whole(total: int) -> str:
    """What to say of a pair that would be run on parts of its rows, but cannot."""
    return f"batch_size: {WHOLE}; use batch_size={total}, on one process, or a guide that is a function of x"


def probe(pair: Pair, objective: Objective, batch: Batch, notice: Callable[[str], None]) -> float:
    """A gradient of the loss on a batch, for the parameters that it depends on; operations per row."""
    state = Before(pair, batch.x.device)
    with (
        poutine.trace(param_only=True) as declared,
        FlopCounterMode(display=False) as counter,
    ):
        strands = objective.strands(pair, batch, sum(objective.chunks()))
        bound = objective.surrogate(strands, **objective.settings(0))
        check_per_datum(objective, bound, len(batch))
        loss = -bound.sum()
        depends_on = leaves(loss)
        if not depends_on:
            raise UsageError("fit: found no parameters to train in the model and the guide")
        loss.backward()
    state.restore()
    pair.adopt(declared.trace)
    known = {id(p) for p in pair.trainable().values()}
    lost = [tuple(leaf.shape) for leaf in depends_on if id(leaf) not in known]
    if lost:
        raise UsageError(
            f"fit: the loss depends on {len(lost)} parameters, of shapes {', '.join(map(str, lost[:4]))}, that "
            "belong to no module which the model and the guide refer to, so they would not be trained; make both "
            "methods of one torch.nn.Module"
        )
    idle = [name for name, p in pair.trainable().items() if p.grad is None]
    if idle:
        notice(f"no gradient reaches {', '.join(idle)}: the loss does not depend on them")
    for p in pair.trainable().values():
        p.grad = None
    return counter.get_total_flops() / len(batch)


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that would get a gradient from a scalar: the leaves of its graph."""
    found: dict[int, Tensor] = {}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions]
    return list(found.values())
