r"""Log-weights: the only Monte Carlo in the library.

For a Pyro model p(x, z), a guide q(z|x) and data x_1 .. x_N, draw z_kn ~ q(z|x_n) for k = 1 .. K and form

    log w_kn = log p(x_n | z_kn) + log p(z_kn) - log q(z_kn | x_n),        shape (K, N).

Every training bound, log p(x), effective sample size, Pareto k-hat, KL and gap is a reduction of this array. It is a
bound *per datum* only if every site of the pair is inside one plate over the data, and no site is scaled; whatever
breaks that is refused by name.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import DataError, PairError, PyrovaeError, UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import modules_of
from pyrovae.inference.pair import Pair

PARTICLES = "_particles"
# exp(-60) is 1e-26, far below the rounding of double precision.
NEGLIGIBLE = 60.0
NO_LATENTS = "the model has no latent site, so that its log p(x) is that of what it observes, without error"


@dataclass
class Latent:
    """One latent site: its values and the two distributions that meet there.

    Attributes:
        value: z, shape (K, N, *event).
        prior: p of this site, given the sites above it.
        guide: q of this site.
        log_prior: log p(z), shape (K, N).
        log_guide: log q(z), shape (K, N).
        ancestral: The model's sites before this one also come before it in the guide, so that neither distribution
            depends on z, and their KL may be taken analytically.
        masked: The site is under `poutine.mask` on either side, which a KL of the distributions would not see.
        auxiliary: The model samples it after all that it observes, so that nothing observed depends on it: it extends
            the model by a density that integrates to 1.
    """

    value: Tensor
    prior: Any
    guide: Any
    log_prior: Tensor
    log_guide: Tensor
    ancestral: bool
    masked: bool
    auxiliary: bool = False


@dataclass
class Particles:
    """K draws of a pair for each of N data, and their log-probabilities in nats.

    Attributes:
        log_likelihood: log p(x|z): every observed site and factor of the model, shape (K, N).
        log_prior: log p(z), shape (K, N).
        log_guide: log q(z|x), shape (K, N).
        latents: The latent sites by name, in the model's order.
        log_guides: log q of every site that the guide draws, auxiliary ones included, each of shape (K, N). What it
            observes changes no draw, and is no part of log q.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    latents: dict[str, Latent]
    log_guides: dict[str, Tensor]
    model_trace: Trace = field(repr=False)
    guide_trace: Trace = field(repr=False)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z|x), shape (K, N)."""
        return self.log_likelihood + self.log_prior - self.log_guide


def log_weights(
    model: Callable, guide: Callable, x: Tensor, num_particles: int = 1, given: Sequence[Tensor] = ()
) -> Tensor:
    """Log importance weights log p(x, z) - log q(z|x) of draws from the guide.

    Args:
        model: Pyro model, called as model(x, *given), with all its sites inside one `pyro.plate("data", len(x))`.
        guide: Pyro guide of the same latent sites, called as guide(x, *given).
        x: Data, shape (N, *event).
        num_particles: K.
        given: What everything is conditioned on, such as labels: tensors of shape (N, ...).

    Returns:
        Log-weights in nats, shape (K, N), unscaled.

    Raises:
        UsageError: num_particles < 1, or tensors without a row for each datum.
        PairError: the pair's log-weights would not be per datum; the site is named.
    """
    return draw(Pair(model, guide), Batch.of(x, given), num_particles).log_weights


def draw(
    pair: Pair,
    batch: Batch,
    num_particles: int = 1,
    at: dict[str, Tensor] | None = None,
    held: Collection[str] = (),
    drawing: Messenger | None = None,
    entering: Callable[[Tensor], Tensor] | None = None,
) -> Particles:
    """Run the pair under a plate of particles; errors as for `log_weights`.

    Args:
        pair: The pair.
        batch: N rows of data.
        num_particles: K.
        at: Values of latent sites by name, each of shape (K, N, *event), where the pair is evaluated in place of draws
            from the guide.
        held: Of "model" and "guide" those whose log-densities have no gradient by parameters, but by the draws alone.
            The draws keep theirs.
        drawing: What the guide is run under, which may draw in its own way.
        entering: Applied to every draw where it leaves the guide, for all log-densities.

    Raises:
        PairError: a guide that is held gives other densities when it is run again, as with dropout.
    """
    check_count("num_particles (K)", num_particles)
    shape = (num_particles, len(batch))
    with At(at or {}), drawing or nullcontext():
        guide_trace = run(pair.guide, "guide", batch, num_particles)
    q = sample_sites(guide_trace)
    if entering is not None:
        for site in q.values():
            site["value"] = site["value"] if site["is_observed"] else entering(site["value"])
    for name, site in q.items():
        check_plates(site, f"guide site '{name}'", len(batch))
    with pair.held() if "model" in held else nullcontext():
        model_trace = run(poutine.replay(pair.model, trace=guide_trace), "model", batch, num_particles)
        p = sample_sites(model_trace)
        check_agreement(p, q)
        # Here, since some distributions run networks of their own when they are asked.
        log_p = {name: log_prob(site, f"model site '{name}'", shape) for name, site in p.items()}
    log_q = {name: log_prob(site, f"guide site '{name}'", shape) for name, site in drawn_sites(q).items()}
    if "guide" in held:
        log_q = held_densities(pair, batch, q, log_q)

    latents = latents_of(p, q, log_p, log_q)
    zero = batch.x.new_zeros(shape, dtype=next((v.dtype for v in log_p.values()), None))
    return Particles(
        log_likelihood=sum((log_p[name] for name in p if name not in latents), zero),
        log_prior=sum((log_p[name] for name in latents), zero),
        log_guide=sum(log_q.values(), zero),
        latents=latents,
        log_guides=log_q,
        model_trace=model_trace,
        guide_trace=guide_trace,
    )


def latents_of(
    p: dict[str, dict], q: dict[str, dict], log_p: dict[str, Tensor], log_q: dict[str, Tensor]
) -> dict[str, Latent]:
    """The latent sites of a model and a guide, and their log-densities, in the model's order."""
    names = [name for name, site in p.items() if not site["is_observed"]]
    order = [name for name in q if name in p]
    observed = [i for i, site in enumerate(p.values()) if site["is_observed"]]
    after = set(list(p)[observed[-1] + 1 :] if observed else ())
    return {
        name: Latent(
            value=q[name]["value"],
            prior=p[name]["fn"],
            guide=q[name]["fn"],
            log_prior=log_p[name],
            log_guide=log_q[name],
            ancestral=set(names[:i]) <= set(order[: order.index(name)]),
            masked=p[name]["mask"] is not None or q[name]["mask"] is not None,
            auxiliary=name in after,
        )
        for i, name in enumerate(names)
    }


def held_densities(pair: Pair, batch: Batch, q: dict[str, dict], log_q: dict[str, Tensor]) -> dict[str, Tensor]:
    """log q of every site at its draws, with the guide's parameters held: gradients go through the draws alone."""
    k, n = next(iter(log_q.values())).shape
    with pair.held(), At({name: site["value"] for name, site in q.items() if not site["is_observed"]}):
        sites = drawn_sites(sample_sites(run(pair.guide, "guide", batch, k)))
        again = {name: log_prob(site, f"guide site '{name}'", (k, n)) for name, site in sites.items()}
    if type(batch.x) is Tensor:  # in a graph it has no values
        check_held(again, [site["value"] for site in q.values()], batch)
        for name, value in again.items():
            if not torch.allclose(value, log_q[name], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise PairError(
                    f"guide site '{name}': the guide gives another density when it is run again at the same draws, as "
                    "with dropout or corruption, so that its parameters cannot be held; remove it, or hold nothing"
                )
    return again


def check_held(log_q: dict[str, Tensor], draws: list[Tensor], batch: Batch) -> None:
    """Refuse a guide whose densities have a gradient beside that by its draws: its parameters are not held.

    Raises:
        PairError: it has tensors that are trained, and are in no module that it refers to.
    """
    ends = {tensor.grad_fn for tensor in (*draws, *batch.tensors)}
    given = {id(tensor) for tensor in batch.tensors}
    seen = set()
    for name, value in log_q.items():
        nodes = [value.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in ends or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in given:
                raise PairError(
                    f"guide site '{name}': a tensor of shape {tuple(leaf.shape)} that is trained is in no module that "
                    "the guide refers to, so that it cannot be held; make it a parameter of a torch module, or declare "
                    "it by pyro.param"
                )
            nodes += [after for after, _ in node.next_functions]


class At(Messenger):
    """Give sites these values; unlike those of `poutine.condition`, they stay latent."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def run(program: Callable, role: str, batch: Batch, num_particles: int) -> Trace:
    """Trace a model or guide under the particle plate."""
    traced = poutine.trace(program)
    try:
        with pyro.plate(PARTICLES, num_particles, dim=-2):
            return traced.get_trace(*batch.tensors)
    except Exception as error:
        if isinstance(error, PyrovaeError) and isinstance(error.__cause__, type(error)):
            error = error.__cause__  # without the shapes that Pyro adds to a message, line by line
        elif type(batch.x) is Tensor and not isinstance(error, PyrovaeError):  # in a graph it has no values
            explain(error, traced.trace, program, role, batch)
        error.add_note(
            f"raised by the {role} for {batch.shapes()}, run for {num_particles} particles: sites inside the data "
            f"plate have batch shape ({num_particles}, {len(batch)})"
        )
        raise error


def explain(error: Exception, trace: Trace, program: Callable, role: str, batch: Batch) -> None:
    """Raise in place of an error of torch or Pyro what it comes from, if that is how the program was written.

    Args:
        error: What the program raised under the particle plate.
        trace: Of the sites that came before.
    """
    what, x = str(error).split("\n")[0], batch.x
    for name, site in sample_sites(trace).items():
        try:
            check_plates(site, f"{role} site '{name}'", len(x))
        except PairError as fault:
            raise fault from error
    if found := re.search(r"at plates? (.*), collide at dim=(-?\d+)", what):
        raise PairError(
            f"{role}: plates {found[1].replace(PARTICLES, 'over particles')} collide at dim {found[2]}; have one plate "
            "over the data, at dim -1, and declare other dimensions (pixels, time) as an event with .to_event()"
        ) from error
    if found := re.match(r"site (.*) must be sampled in trace", what):
        raise PairError(
            f"site '{found[1]}' is latent in the model, but observed or deterministic in the guide; draw it there with "
            "pyro.sample"
        ) from error
    if "to satisfy the constraint" in what and not x.isfinite().all():
        bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
        raise DataError(f"x: {len(bad)} rows are not finite, the first being {bad[:5]}; repair or drop them") from error
    if "dtype" in what or "scalar type" in what or "data type" in what:
        floating = [p.dtype for _, m in modules_of(program) for p in m.parameters() if p.is_floating_point()]
        if floating and x.dtype not in floating:
            raise UsageError(
                f"x: expected {floating[0]}, that of the {role}'s parameters, got {x.dtype}; pass x.to({floating[0]})"
            ) from error
    mismatch = re.match(r"Shape mismatch inside plate\('(.*)'\) at site (.*) dim (-?\d+), (\d+) vs (\d+)", what)
    of_shapes = mismatch or (type(error) in (RuntimeError, IndexError) and "memory" not in what)
    if of_shapes and runs_by_itself(program, batch):
        raise PairError(
            f"{role}: it runs by itself, but not for several particles at once, where a latent has shape (K, N, "
            f"*event) while x has (N, *event): {what}. Count dimensions from the end, as in z[..., 0], "
            "softmax(dim=-1) and x.expand(*z.shape[:-1], -1), or wrap a network of one batch dimension in "
            "pyrovae.models.Network"
        ) from error
    if mismatch:
        plate, name, dim, size, got = mismatch.groups()
        over = "particles" if plate == PARTICLES else f"'{plate}'"
        raise PairError(
            f"{role} site '{name}': its batch shape has {got} at dim {dim}, where the plate over {over} has {size}; "
            "declare the dimensions of an event with .to_event()"
        ) from error


def runs_by_itself(program: Callable, batch: Batch) -> bool:
    """Whether a program can be run without the particle plate, on draws of its own."""
    with torch.random.fork_rng(devices=[batch.x.device] if batch.x.is_cuda else []), pyro.poutine.block():
        try:
            poutine.trace(getattr(program, "__wrapped__", program)).get_trace(*batch.tensors)
        except Exception:
            return False
    return True


def sample_sites(trace: Trace) -> dict[str, dict]:
    """The sites that carry probability: no plates' own sites, no `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not site["infer"].get("_deterministic", False)
    }


def drawn_sites(sites: dict[str, dict]) -> dict[str, dict]:
    """The sites of a guide that log q is the sum of: what it draws, and its `pyro.factor`s."""
    return {name: s for name, s in sites.items() if not s["is_observed"] or isinstance(s["fn"], dist.Unit)}


def check_agreement(p: dict[str, dict], q: dict[str, dict]) -> None:
    """Refuse a model and a guide that do not have the same latent sites of the same event shapes."""
    if any(site["is_observed"] for site in q.values()) and not any(site["is_observed"] for site in p.values()):
        raise UsageError("model, guide: the guide observes x and the model does not; pass the model first")
    for name, site in p.items():
        if not site["is_observed"] and name not in q:
            raise PairError(
                f"model site '{name}' is latent but not in the guide (its sites: {', '.join(q) or 'none'}); "
                "sample it there, or give it obs="
            )
    for name, site in q.items():
        auxiliary = site["is_observed"] or site["infer"].get("is_auxiliary", False)
        if name not in p and not auxiliary:
            raise PairError(f"guide site '{name}' is not in the model (its sites: {', '.join(p) or 'none'})")
        if name in p and not auxiliary and p[name]["is_observed"]:
            raise PairError(f"site '{name}' is latent in the guide but observed in the model")
        if name in p and p[name]["fn"].event_shape != site["fn"].event_shape:
            raise PairError(
                f"site '{name}': event shape {tuple(p[name]['fn'].event_shape)} in the model, "
                f"{tuple(site['fn'].event_shape)} in the guide; make them equal"
            )


def check_plates(site: dict, where: str, rows: int) -> None:
    """Refuse a site that is not in one plate over the data alone, or is scaled."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]
    plates = ", ".join(f"'{f.name}' (dim {f.dim}, size {f.size})" for f in frames) or "none"
    if any(frame.full_size not in (None, frame.size) for frame in frames):
        raise PairError(
            f"{where} is in a subsampling plate ({plates}), which scales log-probabilities inside the bound; "
            "use pyro.plate('data', len(x)) and pass minibatches as x"
        )
    if len(frames) != 1 or frames[0].dim != -1 or frames[0].size != rows:
        raise PairError(
            f"{where} must be inside exactly one plate over the data (dim -1, size {rows}); its plates: {plates}. "
            "Use `with pyro.plate('data', len(x)):` around every site, .to_event() for dimensions of an event, and a "
            "parameter in place of a latent that all data share (weights, topics)"
        )
    scale = site["scale"]
    if isinstance(scale, Tensor) or scale != 1:
        raise PairError(
            f"{where} is scaled by {scale} (poutine.scale); a bound on log p(x) takes unscaled log-probabilities. "
            "Remove the scale; for a weighted KL use ELBO(beta=...)"
        )


def log_prob(site: dict, where: str, shape: tuple[int, int]) -> Tensor:
    """The unscaled log-probability of one site, shape (K, N), after checking that it is one per particle and datum."""
    check_plates(site, where, shape[1])
    fn, value = site["fn"], site["value"]
    event_dim = len(fn.event_shape)
    if event_dim and value.shape[value.ndim - event_dim :] != fn.event_shape:
        raise PairError(
            f"{where}: the distribution has event shape {tuple(fn.event_shape)}, its value has shape "
            f"{tuple(value.shape)}; they would be broadcast against each other. Make them equal"
        )
    batch = value.shape[: value.ndim - event_dim]
    if site["is_observed"] and batch and batch[-1] != shape[1] and not isinstance(fn, dist.Unit):
        raise PairError(f"{where}: {batch[-1]} rows are observed in a plate over {shape[1]} data; pass x whole as obs")
    try:
        log_p = fn.log_prob(value)
    except ValueError as error:
        if "within the support" not in str(error):
            raise
        # A guide is asked for its density at latents of others, too, as of the prior: it may have none there.
        if not where.startswith("guide site") or value.isnan().any():
            raise outside(site, where) from error
        log_p = log_prob_or_none(fn, value)
    result = scale_and_mask(log_p, 1.0, site["mask"])
    if result.shape != shape:
        raise PairError(
            f"{where}: expected one log-probability per particle and datum, shape {shape}, got {tuple(result.shape)}; "
            "declare the dimensions of an event with .to_event()"
        )
    return result


def log_prob_or_none(fn: Any, value: Tensor) -> Tensor:
    """log p of values some of which are outside the support, where the density is 0 and its logarithm -inf."""
    inside = fn.support.check(value)
    of_event = inside.reshape(inside.shape + (1,) * len(fn.event_shape))
    return fn.log_prob(torch.where(of_event, value, fn.sample())).masked_fill(~inside, -math.inf)


def outside(site: dict, where: str) -> PyrovaeError:
    """What to say of a value outside the support of its distribution."""
    fn, value = site["fn"], site["value"]
    support = str(fn.support).replace("\n", " ")
    if not site["is_observed"]:
        return PairError(
            f"{where}: the guide draws values outside its support, {support} of {type(fn).__name__}; give the guide's "
            "site a distribution on it, such as one transformed by torch.distributions.biject_to"
        )
    some = value[~fn.support.check(value).expand(value.shape)] if value.ndim else value.reshape(1)
    example = f", such as {some.flatten()[0].item():g}," if some.numel() else ""
    return DataError(
        f"{where}: x has values{example} outside the support, {support} of {type(fn).__name__}; repair them, also "
        "where they are masked (torch.nan_to_num)"
    )


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(values) along one dimension.

    A term less than exp(-`NEGLIGIBLE`) times the largest gets a gradient of exactly 0. It is far below the rounding
    error of the others, but as a denormal number it makes processors several times slower.
    """
    largest = values.detach().amax(dim, keepdim=True)
    kept = values.masked_fill(values < largest - NEGLIGIBLE, -math.inf)
    return torch.logsumexp(kept, dim) - math.log(values.shape[dim])
