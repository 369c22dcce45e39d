r"""Enumeration: discrete latents summed out of a density, so that what is left of log p(x) has no error, or less.

With s the joint states of a pair's discrete latents and z the others, which are given,

    p(x, z) = sum_s p(x, s, z)                 q(z|x) = sum_s q(s, z|x)

Without a z the first sum is p(x). With one, z_k drawn from the guide has the weight p(x, z_k) / q(z_k|x), which is the
mean of the weights of all states that z_k may have been drawn with (Rao-Blackwell): it varies less, and has the same
expectation. A guide that leaves the discrete latents out, as Pyro's users write for `TraceEnum_ELBO`, has q(z|x) as it
is.

Two ways to a sum give the same numbers. The `Product` evaluates the program at each joint state, as if states were
particles, in chunks of memory: that works for every program, and costs as many evaluations as there are joint states,
S_1 S_2 ... of all sites. `Factors` run the program once with a dimension for the states of each site (Pyro's parallel
enumeration), and sum them out of its log-densities one site at a time: a site on which few others depend costs no more
than their states together, so that a Markov chain of T steps costs T S^2 and not S^T. That a program is right in these
dimensions is seen at some joint states, where it must give what the product gives; if not, and where nothing
factorises, the product is taken.

Sums are in double precision. A site of independent numbers, such as `Bernoulli(...).to_event(1)` of D, has S^D states.

References:
    Casella and Robert 1996, Rao-Blackwellisation of sampling schemes, Biometrika 83
    Obermeyer et al. 2019, Tensor Variable Elimination for Plated Factor Graphs, https://arxiv.org/abs/1902.03210
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae.errors import PairError
from pyrovae.inference.automatic import automatic, untouched
from pyrovae.inference.batch import Batch
from pyrovae.inference.look import plain
from pyrovae.inference.modules import modules_of
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import PARTICLES, At, check_plates, drawn_sites, log_prob, run, sample_sites
from pyrovae.seeding import seeded

# Joint states that a row's discrete latents may have to be summed out, times K where other latents are drawn.
MOST_STATES = 2**16
# Elements of the largest tensor at once, and how many a single row may need.
ELEMENTS_AT_ONCE = 2**22
MOST_ELEMENTS_OF_A_ROW = 2**24
# Joint states at which the two ways are compared.
COMPARED = 32


class Unsummable(PairError):
    """Why a sum is not taken in this way."""


@dataclass(frozen=True)
class States:
    """What a discrete site can be: every vector of D independent numbers, each of a support.

    Attributes:
        support: The values of one number, shape (S, *event) of the distribution without `to_event`.
        numbers: How many there are and in which shape, () where `to_event` was not used.
    """

    support: Tensor
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, distribution: Any) -> "States | None":
        """Of a distribution of batch shape (K, N); None if it has no finite support, the same for all, or is masked."""
        declared = 0  # dimensions of the event that are independent numbers
        while isinstance(distribution, torch.distributions.Independent | dist.ExpandedDistribution):
            if isinstance(distribution, torch.distributions.Independent):
                declared += distribution.reinterpreted_batch_ndims
            distribution = distribution.base_dist
        if isinstance(distribution, dist.MaskedDistribution) or not getattr(
            distribution, "has_enumerate_support", False
        ):
            return None
        try:
            values = distribution.enumerate_support(expand=False)
        except NotImplementedError:  # of distributions whose support differs from row to row
            return None
        batch = tuple(distribution.batch_shape)
        return cls(values.reshape(-1, *distribution.event_shape), batch[len(batch) - declared :])

    @property
    def count(self) -> int:
        """S^D."""
        return len(self.support) ** math.prod(self.numbers)

    def at(self, index: Tensor) -> Tensor:
        """The states of these numbers from 0 to `count` - 1, shape (*index, *event)."""
        size, total = len(self.support), math.prod(self.numbers)
        powers = torch.tensor([size**j for j in range(total)], device=index.device)
        digits = (index.unsqueeze(-1) // powers) % size
        return self.support[digits.reshape(*index.shape, *self.numbers)]

    def same(self, other: "States | None") -> bool:
        """Whether another site has the same states, in the same order."""
        return other is not None and self.numbers == other.numbers and torch.equal(self.support, other.support)


class Joint(dict[str, States]):
    """The states of some sites together."""

    @property
    def count(self) -> int:
        """How many joint states there are."""
        return math.prod(states.count for states in self.values())

    def at(self, index: Tensor) -> dict[str, Tensor]:
        """The joint states of these numbers, by site: each of shape (*index, *event)."""
        values = {}
        for name, states in self.items():
            values[name] = states.at(index % states.count)
            index = index // states.count
        return values

    def some(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """So many joint states at random, by the number of each site's state."""
        return {name: torch.randint(states.count, (number,), device=device) for name, states in self.items()}

    def values_at(self, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """The joint states with these numbers of each site's state, each of shape (*index, *event)."""
        return {name: states.at(index[name]) for name, states in self.items()}

    def within(self, sites: Collection[str]) -> "Joint":
        """Those of the sites of one program."""
        return Joint({name: states for name, states in self.items() if name in sites})

    def check(self, sites: dict[str, dict]) -> None:
        """Refuse sites whose states differ from what they were, as where they depend on other sites."""
        for name, states in self.items():
            if not states.same(States.of(sites[name]["fn"])):
                raise dependent(name)


def dependent(name: str) -> Unsummable:
    """What to say of a site whose states are not always the same."""
    return Unsummable(
        f"the states of site '{name}' depend on other sites, so that it cannot be summed out; pass most_states=0"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What there is to be summed


@dataclass(frozen=True)
class Discrete:
    """The discrete latents of a pair.

    Attributes:
        pair: The pair, with a guide that has every latent.
        joint: The states of those that can be summed out.
        drawn: The other latents, which are drawn.
    """

    pair: Pair
    joint: Joint
    drawn: tuple[str, ...]


class Completed:
    """A guide, and the discrete latents that it leaves to enumeration, drawn from their prior.

    Args:
        pair: The model, and the guide as it was written.
        omitted: The names of those latents.
    """

    def __init__(self, pair: Pair, omitted: tuple[str, ...]) -> None:
        self.model, self.written, self.omitted = pair.model, pair.guide, omitted

    def __call__(self, *tensors: Tensor) -> None:
        with poutine.trace() as drawn:
            self.written(*tensors)
        with poutine.block(expose=list(self.omitted)), poutine.replay(trace=drawn.trace):
            self.model(*tensors)


def discrete(pair: Pair, batch: Batch) -> Discrete | None:
    """The discrete latents of a pair, or None where it does not run on these rows, which is explained elsewhere.

    To be called in evaluation mode, without gradients, and with a random state of its own.
    """
    try:
        guide_trace = run(pair.guide, "guide", batch, 2)
        p = sample_sites(run(poutine.replay(pair.model, trace=guide_trace), "model", batch, 2))
    except Exception:
        return None
    q = sample_sites(guide_trace)
    latents = {name: site for name, site in p.items() if not site["is_observed"]}
    joint = Joint({name: states for name, site in latents.items() if (states := States.of(site["fn"]))})
    # What the guide draws is drawn by it, if it is not the same sum.
    by_guide = {name: site for name, site in q.items() if name in joint}
    odd = [n for n, site in by_guide.items() if site["is_observed"] or not joint[n].same(States.of(site["fn"]))]
    points = any(isinstance(plain(site["fn"]), dist.Delta) for site in q.values() if not site["is_observed"])
    for name in [*odd, *(by_guide if points else ())]:
        joint.pop(name, None)
    omitted = tuple(name for name in joint if name not in q)
    whole = Pair(pair.model, Completed(pair, omitted)) if omitted else pair
    return Discrete(whole, joint, tuple(name for name in latents if name not in joint))


def of_program(sites: dict[str, dict], role: str) -> dict[str, dict]:
    """The sites that a program's log-density is the sum of."""
    return drawn_sites(sites) if role == "guide" else sites


# ---------------------------------------------------------------------------------------------------------------------
# Sums


@dataclass(frozen=True)
class Sum:
    """The log-density of a program with its discrete sites summed out, where its other sites are given.

    Attributes:
        program: A model, whose observed sites count, or a guide.
        role: "model" or "guide".
        joint: The states of the sites that are summed out; with none of them, the density is the program's own.
        factorised: Whether states have dimensions of their own, one for each site.
        width: How many joint states are evaluated for a row, or if factorised, held at once.
        elements: Of the largest tensor that this takes for a row and a particle.
    """

    program: Callable
    role: str
    joint: Joint
    factorised: bool
    width: int
    elements: int

    @classmethod
    def of(cls, program: Callable, role: str, joint: Joint, batch: Batch, z: dict[str, Tensor], most: int) -> "Sum":
        """The cheaper of the two ways, as a few rows show it.

        Args:
            program: The program.
            role: "model" or "guide".
            joint: The sites to be summed out.
            batch: Rows to try it on.
            z: Values of other sites there, each of shape (1, N, *event).
            most: Joint states that are affordable.

        Raises:
            Unsummable: neither is.
        """
        if not joint:
            return cls(program, role, joint, False, 1, 1)
        some = joint.some(COMPARED, batch.x.device)
        with Widest(program, None) as narrow:
            wanted = log_joint(program, role, joint, batch, joint.values_at(some), z)
        base = max(1, narrow.elements // (COMPARED * len(batch)))
        product = cls(program, role, joint, False, joint.count, base)
        if len(joint) > 1:
            with suppress(Exception):  # of a program that is not written for more dimensions than particles and rows
                limit = min(most * base, MOST_ELEMENTS_OF_A_ROW)
                with Widest(program, limit * len(batch)) as wide:
                    found = enumerated(program, role, joint, batch, z, 1)
                    width = found.width(most)
                    eliminated(found.factors)
                if width < joint.count and torch.allclose(found.at(some), wanted, rtol=1e-4, atol=1e-4, equal_nan=True):
                    return cls(program, role, joint, True, width, max(1, wide.elements // len(batch)))
        if joint.count > most:
            raise Unsummable("too many")
        return product

    @property
    def rows_at_once(self) -> int:
        """For how many rows the sum fits in memory."""
        return max(1, ELEMENTS_AT_ONCE // self.elements)

    def __call__(self, batch: Batch, z: dict[str, Tensor], k: int) -> Tensor:
        """log of the sum, for z of shape (K, N, *event) by site: shape (K, N), in double precision."""
        if self.factorised:
            most = max(1, ELEMENTS_AT_ONCE // (self.elements * len(batch)))
            parts = []
            for start in range(0, k, most):
                size = min(most, k - start)
                some = {name: value[start : start + size] for name, value in z.items()}
                found = enumerated(self.program, self.role, self.joint, batch, some, size)
                parts.append(eliminated(found.factors).expand(size, len(batch)))
            return torch.cat(parts)
        chunk = max(1, ELEMENTS_AT_ONCE // (self.elements * len(batch) * k))
        total = batch.x.new_full((k, len(batch)), -math.inf, dtype=torch.float64)
        for index in torch.arange(self.joint.count, device=batch.x.device).split(chunk):
            of_states = log_joint(self.program, self.role, self.joint, batch, self.joint.at(index), z, k)
            total = torch.logaddexp(total, torch.logsumexp(of_states, 0))
        return total


def log_joint(
    program: Callable,
    role: str,
    joint: Joint,
    batch: Batch,
    states: dict[str, Tensor],
    z: dict[str, Tensor],
    k: int = 1,
) -> Tensor:
    """The log-density of a program at joint states (C, *event) and z (K, N, *event): shape (C, K, N), double."""
    n, count = len(batch), len(next(iter(states.values()))) if states else 1
    values = {s: v[:, None, None].expand(-1, k, n, *v.shape[1:]).flatten(0, 1) for s, v in states.items()}
    values |= {s: v.expand(count, *v.shape).flatten(0, 1) for s, v in z.items()}
    with At(values):
        sites = of_program(sample_sites(run(program, role, batch, count * k)), role)
    if type(batch.x) is Tensor:  # in a graph it has no values
        joint.check(sites)
    total = batch.x.new_zeros((count * k, n), dtype=torch.float64)
    for name, site in sites.items():
        log_p = log_prob(site, f"{role} site '{name}'", (count * k, n)).double()
        total = total + (unmasked(log_p, site, joint[name]) if name in joint else log_p)
    return total.unflatten(0, (count, k))


def unmasked(log_p: Tensor, site: dict, states: States) -> Tensor:
    """A site's log-probabilities, where those that are masked make a sum of 1: nothing depends on such a state."""
    return log_p if site["mask"] is None else torch.where(site["mask"], log_p, -math.log(states.count))


# ---------------------------------------------------------------------------------------------------------------------
# Factors


@dataclass(frozen=True)
class Factor:
    """Log-densities of one site, by the states of those that it depends on.

    Attributes:
        dims: Names of its dimensions but for the last two.
        values: Shape (*sizes of dims, K or 1, N or 1), in double precision.
    """

    dims: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Enumerated:
    """The factors of a program, and which site's states each of their dimensions is of."""

    factors: list[Factor]
    site_of: dict[str, str]

    def width(self, most: int) -> int:
        """How many joint states are held at once by a factor, or by those that are multiplied to sum out a site.

        Raises:
            Unsummable: they are more than `most`.
        """
        sizes, scopes = sizes_of(self.factors), [f.dims for f in self.factors]
        largest = max(math.prod(sizes[d] for d in dims) for dims in [*scopes, *(d for _, d in order_of(scopes, sizes))])
        if largest > most:
            raise Unsummable(f"{largest:,} joint states at once")
        return largest

    def at(self, index: dict[str, Tensor]) -> Tensor:
        """The log-density at some joint states, by the number of each site's: shape (C, K, N)."""
        count = len(next(iter(index.values())))
        values = [f.values[tuple(index[self.site_of[d]] for d in f.dims)] for f in self.factors]
        shape = torch.broadcast_shapes(*(value.shape[-2:] for value in values))
        return torch.stack([value.expand(count, *shape) for value in values]).sum(0)


class Parallel(Messenger):
    """Have discrete sites enumerated in parallel, those of several numbers too, which Pyro does not enumerate."""

    def __init__(self, joint: Joint, looking: bool) -> None:
        super().__init__()
        self.joint, self.looking = joint, looking

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.joint and not msg["done"]:
            states = self.joint[msg["name"]]
            if self.looking and not states.same(States.of(msg["fn"])):
                raise dependent(msg["name"])
            msg["infer"]["enumerate"] = "parallel"
            msg["fn"] = Enumerable(msg["fn"], states)
        else:
            msg["infer"].pop("enumerate", None)


class Enumerable(dist.TorchDistribution):
    """A distribution whose `enumerate_support` is all joint states of its independent numbers."""

    has_enumerate_support = True

    def __init__(self, base: Any, states: States) -> None:
        self.base, self.states = base, states
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Enumerable":
        return Enumerable(self.base.expand(batch_shape), self.states)

    def enumerate_support(self, expand: bool = False) -> Tensor:
        values = self.states.at(torch.arange(self.states.count, device=self.states.support.device))
        return values.reshape(len(values), *(1,) * len(self.batch_shape), *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


def enumerated(program: Callable, role: str, joint: Joint, batch: Batch, z: dict[str, Tensor], k: int) -> Enumerated:
    """The log-densities of a program's sites, with a dimension for the states of each that is to be summed out.

    Raises:
        Unsummable: one of them is not of each row and particle by itself.
    """
    traced, looking = poutine.trace(program), type(batch.x) is Tensor  # which has no values in a graph
    with At(z), poutine.enum(first_available_dim=-3), Parallel(joint, looking), pyro.plate(PARTICLES, k, dim=-2):
        trace = traced.get_trace(*batch.tensors)
    trace.symbolize_dims()
    factors, site_of = [], {}
    for name, site in of_program(sample_sites(trace), role).items():
        check_plates(site, f"{role} site '{name}'", len(batch))
        log_p = site["fn"].log_prob(site["value"]).double()
        if site["mask"] is not None:
            nothing = -math.log(joint[name].count) if name in joint else 0.0
            log_p = torch.where(site["mask"], log_p, nothing)
        log_p = log_p.reshape((1,) * (2 - log_p.ndim) + log_p.shape)
        if any(size not in (1, wanted) for size, wanted in zip(log_p.shape[-2:], (k, len(batch)), strict=True)):
            raise Unsummable(f"site '{name}' has log-densities of shape {tuple(log_p.shape)}")
        named = site["infer"]["_dim_to_symbol"]
        kept = [d for d in range(-log_p.ndim, -2) if log_p.shape[d] > 1]
        if any(d not in named for d in kept):
            raise Unsummable(f"site '{name}' has a dimension that is of no site's states")
        sizes = [log_p.shape[d] for d in kept]
        factors.append(Factor(tuple(named[d] for d in kept), log_p.reshape(*sizes, *log_p.shape[-2:])))
        if name in joint:
            site_of[site["infer"]["_enumerate_symbol"]] = name
    return Enumerated(factors, site_of)


def eliminated(factors: list[Factor]) -> Tensor:
    """log of the sum over all states of the product of factors, shape (K or 1, N or 1)."""
    left = list(factors)
    for dim, dims in order_of([f.dims for f in factors], sizes_of(factors)):
        total = torch.logsumexp(sum(aligned(f, dims) for f in left if dim in f.dims), dims.index(dim))  # type: ignore
        left = [f for f in left if dim not in f.dims] + [Factor(tuple(d for d in dims if d != dim), total)]
    return torch.stack(torch.broadcast_tensors(*(f.values for f in left))).sum(0)


def sizes_of(factors: list[Factor]) -> dict[str, int]:
    """How many states each dimension has."""
    return {d: size for f in factors for d, size in zip(f.dims, f.values.shape, strict=False)}


def order_of(scopes: list[tuple[str, ...]], sizes: dict[str, int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Variable elimination: each dimension, the one whose factors together are smallest first, and all of theirs."""
    left, waiting = [set(scope) for scope in scopes], set(sizes)

    def around(dim: str) -> set[str]:
        return set().union(*(scope for scope in left if dim in scope))

    while waiting:
        dim = min(sorted(waiting), key=lambda d: math.prod(sizes[other] for other in around(d)))
        dims = around(dim)
        yield dim, tuple(sorted(dims))
        left = [scope for scope in left if dim not in scope] + [dims - {dim}]
        waiting.remove(dim)


def aligned(factor: Factor, dims: tuple[str, ...]) -> Tensor:
    """The values of a factor with these dimensions in this order, of size 1 where it has them not."""
    order = [factor.dims.index(d) for d in dims if d in factor.dims]
    values = factor.values.permute(*order, -2, -1)
    return values[(*(slice(None) if d in factor.dims else None for d in dims), ...)]


class Widest(TorchDispatchMode):
    """Note the elements of the largest tensor that is made, and stop before one of more than `most`.

    Parameters count for nothing, however large.
    """

    def __init__(self, program: Callable, most: int | None) -> None:
        super().__init__()
        self.most, self.elements = most, 1
        held = [tensor for _, m in modules_of(program) for tensor in (*m.parameters(), *m.buffers())]
        self.held = {tensor.untyped_storage().data_ptr() for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look(math.prod(broadcast([tensor.shape for tensor in self.made(args, kwargs)])))
        result = function(*args, **(kwargs or {}))
        for tensor in self.made(result):
            self.elements = max(self.elements, tensor.numel())
            self.look(tensor.numel())
        return result

    def made(self, *values: Any) -> list[Tensor]:
        """The tensors among these that are no parameters."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in self.held]

    def look(self, elements: int) -> None:
        """Refuse a tensor of so many elements, if they are too many."""
        if self.most is not None and elements > self.most:
            raise Unsummable(f"a tensor of {elements:,} elements for a row")


def broadcast(shapes: list[torch.Size]) -> torch.Size:
    """What shapes are broadcast to; nothing of those that are not."""
    with suppress(RuntimeError):
        return torch.broadcast_shapes(*shapes)
    return torch.Size()


# ---------------------------------------------------------------------------------------------------------------------
# What is affordable


@dataclass(frozen=True, eq=False)
class Summation:
    """What is summed out of a pair.

    Attributes:
        pair: The pair, with a guide that has every latent.
        joint: The discrete latents that could be summed out; none for most pairs.
        model: p(x, z) without them; None where they are drawn.
        guide: q(z|x) without them; None where they are drawn, or nothing is left to draw.
        words: What was done, and why: empty where there are none.
    """

    pair: Pair
    joint: Joint
    model: Sum | None
    guide: Sum | None
    words: str

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left to be drawn."""
        return self.model is not None and self.guide is None

    def __call__(self, batch: Batch) -> Tensor:
        """log p(x) of some rows, in double precision on the CPU, where nothing is left to be drawn: shape (N,)."""
        assert self.model is not None
        # A product takes its states in parts, and factors their rows.
        rows = self.model.rows_at_once if self.model.factorised else len(batch)
        return torch.cat([self.model(block, {}, 1)[0].cpu() for block in batch.split(rows)])


def summation(pair: Pair, batch: Batch, num_particles: int, most_states: int) -> Summation:
    """Find out what of a pair's latents can be summed out at no more than so many joint states.

    The random state and buffers are left as they were.

    Args:
        pair: The pair, whose guide may leave discrete latents out.
        batch: N rows of data.
        num_particles: K, of the latents that are drawn.
        most_states: Joint states of a row, times K if other latents are drawn; 0 sums nothing out.
    """
    if any(auto.prototype_trace is None for auto in automatic(pair.guide)):
        return Summation(pair, Joint(), None, None, "")  # it has yet to be made, which others do
    found = None
    with untouched(pair), seeded("enumeration", device=batch.x.device):
        # On all rows if on no fewer, as a pair that has parameters for each.
        for some in (batch[:2], *([batch] if batch.x.numel() <= MOST_ELEMENTS_OF_A_ROW else [])):
            found = discrete(pair, some)
            if found is not None:
                break
        if found is None or not found.joint:
            return Summation(pair, Joint(), None, None, "")
        names, count = ", ".join(found.joint), found.joint.count
        what = (
            f"{names}: {count:,} joint states"
            if math.log10(count) < 9
            else f"{names}: 1e{math.log10(count):.0f} states"
        )
        times = num_particles if found.drawn else 1
        try:
            return affordable(found, some, most_states // times)
        except Exception as error:  # what is wrong with a pair is explained elsewhere
            why = str(error).split("\n")[0]
            limit = f"most_states = {most_states:,}" + (f", K = {times:,}" if times > 1 else "")
            words = f"drawn, not summed out: {what} ({why}; {limit})"
            return Summation(found.pair, found.joint, None, None, words)


def affordable(found: Discrete, batch: Batch, most: int) -> Summation:
    """The sums of a pair.

    Raises:
        Unsummable: one of them takes too many states, or the pair does not run as it should for it.
    """
    pair, joint = found.pair, found.joint
    names, guide = ", ".join(joint), None
    drawn = drawn_values(pair.guide, batch, 1)
    z = {name: value for name, value in drawn.items() if name not in joint}
    model = Sum.of(pair.model, "model", joint, batch, z, most)
    if found.drawn:
        program = pair.guide.written if isinstance(pair.guide, Completed) else pair.guide
        guide = Sum.of(program, "guide", joint.within(drawn_values(program, batch, 1)), batch, z, most)
    how = f", factorised: at most {model.width:,} at once" if model.factorised else ""
    words = f"a sum over {joint.count:,} joint states of {names}{how}"
    return Summation(pair, joint, model, guide, words)


def drawn_values(guide: Callable, batch: Batch, k: int) -> dict[str, Tensor]:
    """What a guide draws, by site: each of shape (K, N, *event)."""
    sites = sample_sites(run(guide, "guide", batch, k))
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}
