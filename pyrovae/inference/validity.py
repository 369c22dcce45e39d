r"""Whether the log-weights of a pair are of log p(x): looked at once, on rows as they will be used.

    log w_kn = log p(x_n, z_kn) - log q(z_kn|x_n),        E exp(log w_kn) = p(x_n)

holds for what is a function of z_kn and x_n alone (and of what is given with x_n, which goes wherever x_n goes), with q
the normalised density of the model's latents. So, with the latents of a few draws held fixed,

    rows         other rows of data and z beside it, or fewer, leave a row's log-densities as they are
    particles    so do fewer particles
    noise        so does another random state, once modules are in evaluation mode (no dropout)
    memory       and so does a guide that was run on other rows before the model is
    density      every latent is drawn from a density, and from nothing but what log q is the sum of

and what breaks one of them is refused by name. It costs about 10 draws for each row that is looked at.

A latent that is a `Delta` at a function of auxiliary sites a of the guide has a density where that function is one to
one, and the Deltas say by how much it stretches volume:

    log q(z|x) = log q(a|x) + sum of log_density,        sum of log_density = log |da/dz|

as Pyro's automatic guides write it. That is compared with the Jacobian by autograd.

Training by a pair whose guide has no density goes on (with a Delta it finds the posterior's mode), but what it
maximises is no bound on log p(x), and is not called so.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGaussian, AutoGuide, AutoLaplaceApproximation, AutoStructured
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.checks import check_programs
from pyrovae.errors import PairError
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import evaluating, modules_of
from pyrovae.inference.pair import Pair
from pyrovae.inference.unconstrained import bijection
from pyrovae.inference.weights import At, Particles, draw, run, sample_sites
from pyrovae.seeding import seeded

# Draws whose Jacobian is looked at: a map that folds, such as |a|, shows both of its sides in so many.
DRAWS_OF_MAP = 16
NEWTON_STEPS = 12
WHOLE = "the pair works on all of its rows together only, as a guide does that has parameters for each row"
# Elements of x on which a pair is tried as a whole that fails on parts of it.
MOST_ELEMENTS = 2**22
WRAPPERS = (dist.ExpandedDistribution, torch.distributions.Independent, dist.MaskedDistribution)


@dataclass(frozen=True)
class Findings:
    """What is known of a pair that was not refused.

    Attributes:
        rows: Rows that can be run at once: as many as were asked for, or all of x where the pair works on no fewer.
        whole: The pair works on all rows of x together only, in their order: its parameters are each row's own.
        no_density: Why log q is not the density of the latents; None if it is.
    """

    rows: int
    whole: bool
    no_density: str | None

    def by_parts(self, what: str) -> None:
        """Refuse a pair that works on all of its rows only, for something that runs it on parts of them."""
        if self.whole:
            raise PairError(f"{what}: {WHOLE}; write a guide that is a function of x, or use log_marginal")


def check_pair(pair: Pair, batch: Batch, rows: int | None = None) -> Findings:
    """Refuse a pair whose log-weights are not of log p(x).

    The random state, buffers, modes of modules, and where the pair is refused also what it declared to Pyro, are left
    as they were.

    Args:
        pair: The pair.
        batch: N rows of data.
        rows: How many of them will be run at once; None: all.

    Raises:
        UsageError: model or guide is no program that takes the batch, or x is not of the pair's type of numbers.
        PairError: what is wrong with the pair; the site is named.
    """
    findings = examine(pair, batch, rows)
    if findings.no_density is not None:
        raise PairError(findings.no_density)
    return findings


def examine(pair: Pair, batch: Batch, rows: int | None = None, total: int | None = None) -> Findings:
    """What `check_pair` does, except that a guide without a density is told and not refused.

    Args:
        total: Rows of the training data, if the pair is about to be trained. Parameters for each of them may be alike
            before, so that they have to be moved for their places to be seen.
    """
    check_programs(pair.model, pair.guide, len(batch.given))
    rows = len(batch) if rows is None else min(rows, len(batch))
    with evaluating(pair), torch.no_grad(), undone(pair), seeded("validity", device=batch.x.device):
        check_automatic(pair.guide)
        set_up(pair.guide, batch)
        looked = look(pair, batch, rows)
        rows = len(looked.batch)
        by_place = [] if total is None else [p for p in parameters(pair) if p.shape[:1] in ((rows,), (total,))]
        with stirred(by_place):
            looked = Look(pair, looked.batch) if by_place else looked
            looked.check_numbers()
            looked.check_norms()
            looked.check_neighbours()
            looked.check_memory()
            whole = not looked.works_on_fewer() or bool(automatic(pair.guide))
            if whole and rows < len(batch):
                raise PairError(
                    f"the pair works on {rows} rows together, but on no fewer, so that it cannot be run on all "
                    f"{len(batch)} rows of x by parts; pass x in batches of {rows} rows"
                )
            return Findings(rows, whole, looked.why_no_density())


def parameters(pair: Pair) -> list[Tensor]:
    """Those of the modules behind a pair, and all that Pyro's store has, unconstrained."""
    return [p for _, p in pyro.get_param_store().named_parameters()] + list(pair.parameters())


@contextmanager
def stirred(tensors: list[Tensor]) -> Iterator[None]:
    """Add noise to tensors, for as long as it lasts."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.add_(0.1 * torch.randn_like(tensor))
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


def look(pair: Pair, batch: Batch, rows: int) -> "Look":
    """At as many rows as will be run at once, or at all of them where the pair does not run on fewer."""
    # From all of the batch: the first rows may all be alike, and then nothing in them depends on others.
    count = len(batch)
    places = torch.arange(rows, device=batch.x.device) * (count - 1) // max(1, rows - 1)
    try:
        return Look(pair, batch[places])
    except Exception:
        per_row = any(count in p.shape[:1] for p in parameters(pair))
        if rows < count and (per_row or batch.x.numel() <= MOST_ELEMENTS):
            with suppress(Exception):
                return Look(pair, batch)
        raise


def why_no_density(pair: Pair, batch: Batch) -> str | None:
    """Why log q of a guide is no density, as far as it can be told by drawing from it; for any objective."""
    for auto in automatic(pair.guide):
        if isinstance(auto, AutoLaplaceApproximation):
            return "AutoLaplaceApproximation finds a mode (MAP), where there is no log q(z|x) for a bound or log p(x)"
    with (
        suppress(Exception),
        evaluating(pair),
        torch.no_grad(),
        undone(pair),
        seeded("validity", device=batch.x.device),
    ):
        return Look(pair, batch).why_no_density()
    return None


class Look:
    """A pair at fixed draws for some rows."""

    def __init__(self, pair: Pair, batch: Batch) -> None:
        self.pair, self.batch = pair, batch
        # As many particles as tell their dimension from that of rows.
        self.k = 3 if len(batch) == 2 else 2
        self.wrong_norms: list[str] = []
        with self.watching_norms():
            self.base = draw(pair, batch, self.k)
        self.densities = densities(self.base)
        self.values = {
            name: site["value"]
            for name, site in sample_sites(self.base.guide_trace).items()
            if not site["is_observed"] and not isinstance(plain(site["fn"]), dist.Delta)
        }

    @contextmanager
    def watching_norms(self) -> Iterator[None]:
        """Note batch normalisations that take rows for features."""

        def look(module: nn.Module, inputs: tuple) -> None:
            shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
            if len(self.batch) > 1 and len(shape) > 2 and tuple(shape[:2]) == (self.k, len(self.batch)):
                self.wrong_norms.append(f"{type(module).__name__}({module.num_features})")

        hooks = [m.register_forward_pre_hook(look) for m in self.pair.modules() if isinstance(m, _BatchNorm)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_numbers(self) -> None:
        """Refuse log-densities of numbers too coarse for them: in bfloat16, those near -110 are 0.5 apart."""
        for name, value in self.densities.items():
            if value.dtype.itemsize < 4:
                raise PairError(
                    f"{name}: its log-density is in {value.dtype}, whose digits are too few for nats. Pass x.float(), "
                    "and modules after module.float()"
                )

    def check_norms(self) -> None:
        """Refuse a batch normalisation whose features are the rows, once particles come first."""
        if self.wrong_norms:
            raise PairError(
                f"{self.wrong_norms[0]} was given (K, N, features), where it takes rows for features, since dimension "
                "1 is that of rows once particles come first; flatten the leading dimensions around it, as "
                "pyrovae.models.Network does"
            )

    def at(self, particles: int, rows: Tensor, rows_of_data: Tensor | None = None) -> dict[str, Tensor]:
        """`densities` of some particles and rows of the draws, each of shape (particles, len(rows))."""
        values = {name: taken(value, particles, rows) for name, value in self.values.items()}
        batch = self.batch[rows if rows_of_data is None else rows_of_data]
        return densities(draw(self.pair, batch, particles, values))

    def differing(
        self, got: dict[str, Tensor], rows: Tensor, columns: Tensor | None = None, rough: bool = False
    ) -> str | None:
        """The name of a log-density that is not what it was, by more than rounding.

        Args:
            got: `densities`, whose columns are these rows.
            rows: Which rows they are.
            columns: Those to compare; None: all.
            rough: They were computed in other shapes, which round differently.
        """
        columns = torch.arange(len(rows), device=rows.device) if columns is None else columns

        def other(then: dict[str, Tensor]) -> str | None:
            for name, value in got.items():
                now, before = value[:, columns], then[name][: len(value), rows[columns]]
                epsilon = torch.finfo(before.dtype).eps
                tolerance = (epsilon**0.5 if rough else 100 * epsilon) * (1 + before.abs())
                same = (now == before) | ((now - before).abs() <= tolerance) | (now.isnan() & before.isnan())
                if not same.all():
                    return name
            return None

        return other(self.densities) and other(self.again)

    @cached_property
    def again(self) -> dict[str, Tensor]:
        """`densities` at the values of the draws: a flow may invert them, which it need not for its own draw."""
        return self.at(self.k, torch.arange(len(self.batch), device=self.batch.x.device))

    def check_neighbours(self) -> None:
        """Refuse rows whose log-densities depend on what other rows hold, or on noise that is no site."""
        n = len(self.batch)
        every = torch.arange(n, device=self.batch.x.device)
        if n == 1:
            self.check_noise()
            return
        for kept in (every[: n // 2], every[n // 2 :]):
            # The other rows are replaced by those that are kept: the same batch with other neighbours.
            rows = kept[every % len(kept)]
            rows[kept] = kept
            try:
                beside_others = self.at(self.k, rows)
            except Exception:  # as of a guide that was made for this x and no other: then with latents replaced alone
                beside_others = self.at(self.k, rows, every)
            if name := self.differing(beside_others, rows, kept):
                self.check_noise()
                raise PairError(
                    f"{name}: the log-density of a row depends on the other rows of the batch, so that there is none "
                    "per datum. Particles come first, so count dimensions from the end, as in softmax(dim=-1), "
                    "F.normalize(dim=-1) and mean(-1), and take means and norms over features, never over rows"
                )

    def check_memory(self) -> None:
        """Refuse a model that uses what the guide kept of x when it was run before it."""
        n = len(self.batch)
        every = torch.arange(n, device=self.batch.x.device)

        def ends_elsewhere(*tensors: Tensor) -> None:
            self.pair.guide(*tensors)
            with pyro.poutine.block(), At(self.values), suppress(Exception):  # as of a guide for this x and no other
                self.pair.guide(*self.batch.roll(1).tensors)

        got = densities(draw(Pair(self.pair.model, ends_elsewhere), self.batch, self.k, self.values))
        if name := self.differing(got, every):
            raise PairError(
                f"{name}: the model uses what the guide kept of x, as skip connections from an encoder do, so that it "
                "is no p(x|z); give the decoder nothing but the latents"
            )

    def check_noise(self) -> None:
        """Refuse log-densities that differ between two runs at the same latents."""
        every = torch.arange(len(self.batch), device=self.batch.x.device)
        if name := self.differing(self.at(self.k, every), every):
            raise PairError(
                f"{name}: two runs at the same latents give different log-densities, so the pair draws random numbers "
                "that are no site: noise, or dropout that evaluation mode does not reach. Write F.dropout(h, "
                "training=self.training), make networks attributes of a torch.nn.Module, and noise a pyro.sample site"
            )

    def works_on_fewer(self) -> bool:
        """Whether the pair runs on other numbers of rows than these, once it is known to give the same there."""
        n, device = len(self.batch), self.batch.x.device
        # Not one row where there are others, nor rows at their own places.
        rows = torch.tensor([0, 0] if n == 1 else [1] if n == 2 else [n - 1, 0], device=device)
        every = torch.arange(n, device=device)
        try:
            fewer = self.at(1, rows)
        except Exception:  # as parameters for each row raise
            self.check_particles(self.at(1, every), every)
            return False
        if name := self.differing(fewer, rows, rough=True):
            self.check_particles(self.at(1, every), every)
            raise PairError(
                f"{name}: the log-density of a row depends on its place in the batch, or on how many rows there are: "
                f"{len(rows)} of {n} rows have others by themselves, at the same latents. Make it a function of the "
                "row alone: no parameters by place, and dimensions counted from the end, since particles come first"
            )
        return True

    def check_particles(self, alone: dict[str, Tensor], rows: Tensor) -> None:
        """Refuse a particle whose log-densities depend on the others."""
        if name := self.differing(alone, rows, rough=True):
            raise PairError(
                f"{name}: the log-density of a particle depends on the other particles, which are dimension 0; count "
                "dimensions from the end, as in softmax(dim=-1) and mean(-1)"
            )

    def why_no_density(self) -> str | None:
        """Why log q is not the normalised density of the model's latents; None if it is."""
        p, q = sample_sites(self.base.model_trace), sample_sites(self.base.guide_trace)
        drawn = {name: site for name, site in q.items() if not site["is_observed"]}
        for name, site in q.items():
            if isinstance(plain(site["fn"]), dist.Unit):
                return (
                    f"guide site '{name}' is a pyro.factor, which makes log q(z|x) no density, so that the weights are "
                    "not of log p(x); remove it from the guide"
                )
        deltas = {name for name, site in drawn.items() if isinstance(plain(site["fn"]), dist.Delta)}
        noise = [name for name in drawn if name not in self.base.latents and name not in deltas]
        points = []
        for name, site in drawn.items():
            if name not in self.base.latents:
                if name in deltas and site["fn"].log_prob(site["value"]).any():
                    return f"guide site '{name}' is an auxiliary Delta with a log_density, which belongs to no latent"
                continue
            if fault := self.mismatch(name, p[name], site):
                return fault
            if name not in deltas or isinstance(plain(p[name]["fn"]), dist.Delta):
                continue
            points.append(name)
        if points and not noise:
            return (
                f"guide site '{points[0]}' is a Delta, which gives the latent one value and no density: training by it "
                "finds a mode (MAP), and there is no log q(z|x) for a bound or log p(x). Draw the site from a "
                "distribution with a density, such as a Normal around that value"
            )
        if noise and not points:
            return (
                f"guide site '{noise[0]}' is auxiliary, and nothing integrates it out: log q would be that of it and "
                "of the latents together. Make every latent a one-to-one function of it, pyro.sample(name, Delta(f(a), "
                "log_density)), or put its noise into the latents' own distributions"
            )
        return self.fault_of_map(noise, points) if noise else None

    def mismatch(self, name: str, p: dict, q: dict) -> str | None:
        """Why the two distributions of a latent site cannot be weighed against each other."""
        if isinstance(plain(p["fn"]), dist.ImproperUniform):
            return f"model site '{name}' is ImproperUniform, under which x has no density; give it a proper prior"
        kept = [self.kept(site) for site in (p, q)]
        if not torch.equal(*torch.broadcast_tensors(*kept)):
            return (
                f"site '{name}' is masked differently in the model and in the guide, so that log q(z|x) leaves out "
                "draws that are weighed; mask both alike"
            )
        if not kept[0].all() and self.matters(name, kept[0]):
            return (
                f"site '{name}' is masked, but what is masked still matters to other sites, so that it is a latent "
                "without a density; leave out what it enters as well, or the mask"
            )
        delta = isinstance(plain(q["fn"]), dist.Delta)
        kinds = [kind(site["fn"]) for site in (p, q)]
        if not delta and {"discrete", "continuous"} == set(kinds):
            return (
                f"site '{name}' is {kinds[0]} in the model and {kinds[1]} in the guide, so that a probability is "
                "weighed against a density; take the same kind in both (of relaxed distributions too)"
            )
        if delta and isinstance(plain(p["fn"]), dist.Delta) and q["fn"].log_prob(q["value"]).any():
            return f"guide site '{name}' is a Delta with a log_density, as the model's is without; remove it"
        return None

    def kept(self, site: dict) -> Tensor:
        """What no mask leaves out, of `poutine.mask` or of the distribution itself: shape (K, N, elements or 1)."""
        k, n = self.k, len(self.batch)
        masks = [] if site["mask"] is None else [(site["mask"], (k, n))]
        distribution, event = site["fn"], 0  # dimensions of the event that are still those of a batch inside
        while isinstance(distribution, WRAPPERS):
            if isinstance(distribution, torch.distributions.Independent):
                event += distribution.reinterpreted_batch_ndims
            if isinstance(distribution, dist.MaskedDistribution):
                inner = tuple(distribution.batch_shape)
                masks.append((distribution._mask, (k, n, *inner[len(inner) - event :])))
            distribution = distribution.base_dist
        kept = torch.ones(k, n, 1, dtype=torch.bool, device=self.batch.x.device)
        for mask, shape in masks:
            kept = kept & torch.as_tensor(mask, device=self.batch.x.device).expand(shape).reshape(k, n, -1)
        return kept

    def matters(self, name: str, kept: Tensor) -> bool:
        """Whether any log-density changes when other draws take the place of those that are masked."""
        if name not in self.values:
            return False
        value = self.values[name]
        flat = value.reshape(*kept.shape[:2], -1)
        kept = kept.repeat_interleave(flat.shape[-1] // kept.shape[-1], -1)
        changed = torch.where(kept, flat, flat.roll(1, 0))
        values = {**self.values, name: changed.reshape(value.shape)}
        every = torch.arange(len(self.batch), device=self.batch.x.device)
        return self.differing(densities(draw(self.pair, self.batch, self.k, values)), every) is not None

    def fault_of_map(self, noise: list[str], points: list[str]) -> str | None:
        """Why Deltas are not a one-to-one function of auxiliary sites with its density; None if they are."""
        n, k = len(self.batch), DRAWS_OF_MAP
        trace = run(self.pair.guide, "guide", self.batch, k)
        sites = sample_sites(trace)
        what = f"guide site '{points[0]}' is a Delta at a function of the auxiliary site '{noise[0]}'"
        for name in noise:
            if kind(sites[name]["fn"]) == "discrete":
                return f"guide site '{name}' is auxiliary and discrete: a latent at a function of it has no density"
        values = {
            name: site["value"].detach().clone()
            for name, site in sites.items()
            if not site["is_observed"] and not isinstance(plain(site["fn"]), dist.Delta)
        }
        u, log_volume, log_density = self.image(values, points)
        sizes = sum(values[name][0, 0].numel() for name in noise)
        if sizes != u.shape[-1]:
            return (
                f"{what}, but {u.shape[-1]} numbers at functions of {sizes} have no density; have as many auxiliary "
                "numbers as latent ones"
            )
        start = torch.cat([values[name].reshape(k, n, -1) for name in noise], -1)

        def mapped(a: Tensor) -> tuple[Tensor, Tensor]:
            """u and du/da, of shapes (K, N, U) and (K, N, U, U)."""
            with torch.enable_grad():
                a = a.detach().requires_grad_()
                parts = zip(noise, a.split([values[name][0, 0].numel() for name in noise], -1), strict=True)
                u = self.image(values | {name: part.reshape(values[name].shape) for name, part in parts}, points)[0]
                if not u.requires_grad:
                    return u, torch.zeros(*u.shape, sizes, dtype=u.dtype, device=u.device)
                slopes = [torch.autograd.grad(u[..., j].sum(), a, retain_graph=True)[0] for j in range(sizes)]
            return u.detach(), torch.stack(slopes, -2)

        u, jacobian = mapped(start)
        sign, log_det = torch.linalg.slogdet(jacobian)
        folded = f"{what} that is not one to one, so that the density of the latent is that of several values together"
        if (sign == 0).all():
            return f"{what} that does not depend on it, so that it has no density"
        if (sign == 0).any() or (sign != sign[0]).any():
            return folded
        wrong = log_density + log_volume + log_det
        rounding = torch.finfo(wrong.dtype).eps ** 0.5 * u.shape[-1]
        if not (wrong.abs() <= rounding * (1 + log_det.abs() + log_volume.abs())).all():
            return (
                f"{what}, with a log_density that is not log |da/dz|, by up to {wrong.abs().max().item():.3g} nats. "
                "Write -transform.log_abs_det_jacobian(a, z), as Pyro's automatic guides do"
            )
        # Newton's iterations towards each u from where another draw was: they may not end at another a.
        a = start.roll(1, 0)
        for _ in range(NEWTON_STEPS):
            at, jacobian = mapped(a)
            step, singular = torch.linalg.solve_ex(jacobian, (at - u).unsqueeze(-1))
            a = torch.where((singular == 0)[..., None], a - step.squeeze(-1), a).nan_to_num(0.0, 0.0, 0.0)
        there = ((mapped(a)[0] - u).abs() <= 1e-4 * u.std(0)).all(-1)
        elsewhere = ((a - start).abs() > 0.1 * start.std(0)).any(-1)
        return folded if (there & elsewhere).any() else None

    def image(self, values: dict[str, Tensor], points: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The sites that are Deltas at these values of others.

        Returns:
            Unconstrained, shape (K, N, U); log |dz/du| and the sum of log_density, each of shape (K, N).
        """
        k, n = len(next(iter(values.values()))), len(self.batch)
        with At(values):
            sites = sample_sites(run(self.pair.guide, "guide", self.batch, k))
        parts, log_volume, log_density = [], self.batch.x.new_zeros(()), self.batch.x.new_zeros(())
        for name in points:
            z = sites[name]["value"]
            transform = bijection(name, self.base.latents[name].prior.support)
            u = transform.inv(z)
            parts.append(u.reshape(k, n, -1))
            log_volume = log_volume + transform.log_abs_det_jacobian(u, transform(u)).reshape(k, n, -1).sum(-1)
            log_density = log_density + sites[name]["fn"].log_prob(z)
        return torch.cat(parts, -1), log_volume, log_density


def densities(particles: Particles) -> dict[str, Tensor]:
    """Everything that weights are made of, each of shape (K, N)."""
    return {
        **{f"guide site '{name}'": value for name, value in particles.log_guides.items()},
        **{f"model site '{name}'": latent.log_prior for name, latent in particles.latents.items()},
        "log p(x|z) of the model": particles.log_likelihood,
    }


def plain(distribution: Any) -> Any:
    """A distribution without what was put around it."""
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def kind(distribution: Any) -> str:
    """Whether a distribution is discrete or continuous, as far as it says."""
    try:
        return "discrete" if distribution.support.is_discrete else "continuous"
    except NotImplementedError:
        return "unknown"


def taken(value: Tensor, particles: int, rows: Tensor) -> Tensor:
    """Some particles and rows of values (K, N, *event)."""
    result = value[:particles][:, rows]
    if hasattr(value, "_unquantize"):  # straight-through values carry the relaxed one that their density is of
        result._unquantize = value._unquantize[:particles][:, rows]  # type: ignore[attr-defined]
    return result


def automatic(guide: Callable) -> list[AutoGuide]:
    """Pyro's automatic guides in a guide."""
    found = [m for _, module in modules_of(guide) for m in module.modules() if isinstance(m, AutoGuide)]
    return list(dict.fromkeys(found))


def set_up(guide: Callable, batch: Batch) -> None:
    """Have automatic guides look at their model for data, without the plate of particles that they are run in later."""
    for auto in automatic(guide):
        if auto.prototype_trace is None:
            with pyro.poutine.block():
                auto(*batch.tensors)


def check_automatic(guide: Callable) -> None:
    """Refuse an automatic guide that has no density for each row."""
    for auto in automatic(guide):
        if isinstance(auto, AutoContinuous | AutoGaussian | AutoStructured):
            raise PairError(
                f"{type(auto).__name__} draws the latents of all rows as one, so there is no log q(z|x) of a "
                "row: fit trains it with pyro.infer.Trace_ELBO() alone. Use AutoNormal, or a guide that is a function "
                "of x, such as those of pyrovae.models"
            )


@contextmanager
def undone(pair: Pair) -> Iterator[None]:
    """Restore buffers; after an error, also what was declared to Pyro, and automatic guides."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in pair.buffers()]
    store = pyro.get_param_store()
    declared = set(store.keys())
    inside = {
        m: shallow(vars(m)) for auto in automatic(pair.guide) if auto.prototype_trace is None for m in auto.modules()
    }
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - declared:
            with suppress(KeyError):  # of a parameter with two names, which has been forgotten by the other
                del store[name]
        for module, before in inside.items():
            vars(module).clear()
            vars(module).update(before)
        raise
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes, with copies of its dictionaries."""
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}
