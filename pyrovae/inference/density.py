r"""Whether log q of a guide is the normalised density of the model's latents.

Every latent is drawn from a density, on the same support and under the same mask as in the model, and log q is the sum
of nothing else. A latent that is a `Delta` at a function of auxiliary sites a of the guide has a density where that
function is one to one, and the Deltas say by how much it stretches volume:

    log q(z|x) = log q(a|x) + sum of log_density,        sum of log_density = log |da/dz|

as Pyro's automatic guides write it. That is compared with the Jacobian by autograd.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.inference.look import WRAPPERS, Look, densities, is_delta, plain
from pyrovae.inference.unconstrained import bijection
from pyrovae.inference.weights import At, draw, run, sample_sites

# Draws whose Jacobian is looked at: a map that folds, such as |a|, shows both of its sides in so many.
DRAWS_OF_MAP = 16
NEWTON_STEPS = 12


class Density:
    """log q of the guide of a pair, at its fixed draws."""

    def __init__(self, look: Look) -> None:
        self.look = look

    def fault(self) -> str | None:
        """Why log q is not the normalised density of the model's latents; None if it is."""
        p, q = sample_sites(self.look.base.model_trace), sample_sites(self.look.base.guide_trace)
        drawn = {name: site for name, site in q.items() if not site["is_observed"]}
        for name, site in q.items():
            if isinstance(plain(site["fn"]), dist.Unit):
                return (
                    f"guide site '{name}' is a pyro.factor, which makes log q(z|x) no density, so that the weights are "
                    "not of log p(x); remove it from the guide"
                )
        deltas = {name for name, site in drawn.items() if is_delta(site)}
        noise = [name for name in drawn if name not in self.look.base.latents and name not in deltas]
        points = []
        for name, site in drawn.items():
            if name not in self.look.base.latents:
                if name in deltas and site["fn"].log_prob(site["value"]).any():
                    return f"guide site '{name}' is an auxiliary Delta with a log_density, which belongs to no latent"
                continue
            if fault := self.mismatch(name, p[name], site):
                return fault
            if name not in deltas or is_delta(p[name]):
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
        return MapOfNoise(self.look, noise, points).fault() if noise else None

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
        delta = is_delta(q)
        kinds = [kind(site["fn"]) for site in (p, q)]
        if not delta and {"discrete", "continuous"} == set(kinds):
            return (
                f"site '{name}' is {kinds[0]} in the model and {kinds[1]} in the guide, so that a probability is "
                "weighed against a density; take the same kind in both (of relaxed distributions too)"
            )
        if delta and is_delta(p) and q["fn"].log_prob(q["value"]).any():
            return f"guide site '{name}' is a Delta with a log_density, as the model's is without; remove it"
        return None

    def kept(self, site: dict) -> Tensor:
        """What no mask leaves out, of `poutine.mask` or of the distribution itself: shape (K, N, elements or 1)."""
        k, n = self.look.k, len(self.look.batch)
        masks = [] if site["mask"] is None else [(site["mask"], (k, n))]
        distribution, event = site["fn"], 0  # dimensions of the event that are still those of a batch inside
        while isinstance(distribution, WRAPPERS):
            if isinstance(distribution, torch.distributions.Independent):
                event += distribution.reinterpreted_batch_ndims
            if isinstance(distribution, dist.MaskedDistribution):
                inner = tuple(distribution.batch_shape)
                masks.append((distribution._mask, (k, n, *inner[len(inner) - event :])))
            distribution = distribution.base_dist
        kept = torch.ones(k, n, 1, dtype=torch.bool, device=self.look.batch.x.device)
        for mask, shape in masks:
            kept = kept & torch.as_tensor(mask, device=self.look.batch.x.device).expand(shape).reshape(k, n, -1)
        return kept

    def matters(self, name: str, kept: Tensor) -> bool:
        """Whether any log-density changes when other draws take the place of those that are masked."""
        if name not in self.look.values:
            return False
        value = self.look.values[name]
        flat = value.reshape(*kept.shape[:2], -1)
        kept = kept.repeat_interleave(flat.shape[-1] // kept.shape[-1], -1)
        changed = torch.where(kept, flat, flat.roll(1, 0))
        values = {**self.look.values, name: changed.reshape(value.shape)}
        look = self.look
        every = torch.arange(len(look.batch), device=look.batch.x.device)
        return look.differing(densities(draw(look.pair, look.batch, look.k, values)), every) is not None


class MapOfNoise:
    """Latents that are Deltas at a function of auxiliary sites a of the guide, at draws of a.

    Args:
        look: The pair.
        noise: The auxiliary sites' names.
        points: The latents' names.
    """

    def __init__(self, look: Look, noise: list[str], points: list[str]) -> None:
        self.look, self.noise, self.points = look, noise, points
        self.sites = sample_sites(run(look.pair.guide, "guide", look.batch, DRAWS_OF_MAP))
        self.values = {
            name: site["value"].detach().clone()
            for name, site in self.sites.items()
            if not site["is_observed"] and not is_delta(site)
        }
        self.sizes = [self.values[name][0, 0].numel() for name in noise]

    def fault(self) -> str | None:
        """Why Deltas are not a one-to-one function of auxiliary sites with its density; None if they are."""
        for name in self.noise:
            if kind(self.sites[name]["fn"]) == "discrete":
                return f"guide site '{name}' is auxiliary and discrete: a latent at a function of it has no density"
        what = f"guide site '{self.points[0]}' is a Delta at a function of the auxiliary site '{self.noise[0]}'"
        u, log_volume, log_density = self.image(self.values)
        if sum(self.sizes) != u.shape[-1]:
            return (
                f"{what}, but {u.shape[-1]} numbers at functions of {sum(self.sizes)} have no density; have as many "
                "auxiliary numbers as latent ones"
            )
        start = torch.cat([self.values[name].reshape(*u.shape[:2], -1) for name in self.noise], -1)
        u, jacobian = self.mapped(start)
        sign, log_det = torch.linalg.slogdet(jacobian)
        if (sign == 0).all():
            return f"{what} that does not depend on it, so that it has no density"
        folded = f"{what} that is not one to one, so that the density of the latent is that of several values together"
        if (sign == 0).any() or (sign != sign[0]).any():
            return folded
        wrong = log_density + log_volume + log_det
        rounding = torch.finfo(wrong.dtype).eps ** 0.5 * u.shape[-1]
        if not (wrong.abs() <= rounding * (1 + log_det.abs() + log_volume.abs())).all():
            return (
                f"{what}, with a log_density that is not log |da/dz|, by up to {wrong.abs().max().item():.3g} nats. "
                "Write -transform.log_abs_det_jacobian(a, z), as Pyro's automatic guides do"
            )
        return folded if self.folds(start, u) else None

    def mapped(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """u and du/da at a (K, N, U), of shapes (K, N, U) and (K, N, U, U)."""
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            parts = zip(self.noise, a.split(self.sizes, -1), strict=True)
            u = self.image(self.values | {name: part.reshape(self.values[name].shape) for name, part in parts})[0]
            if not u.requires_grad:
                return u, torch.zeros(*u.shape, a.shape[-1], dtype=u.dtype, device=u.device)
            slopes = [torch.autograd.grad(u[..., j].sum(), a, retain_graph=True)[0] for j in range(a.shape[-1])]
        return u.detach(), torch.stack(slopes, -2)

    def folds(self, start: Tensor, u: Tensor) -> bool:
        """Whether Newton's iterations towards each u, from where another draw was, end at another a than `start`."""
        a = start.roll(1, 0)
        for _ in range(NEWTON_STEPS):
            at, jacobian = self.mapped(a)
            step, singular = torch.linalg.solve_ex(jacobian, (at - u).unsqueeze(-1))
            a = torch.where((singular == 0)[..., None], a - step.squeeze(-1), a).nan_to_num(0.0, 0.0, 0.0)
        there = ((self.mapped(a)[0] - u).abs() <= 1e-4 * u.std(0)).all(-1)
        elsewhere = ((a - start).abs() > 0.1 * start.std(0)).any(-1)
        return bool((there & elsewhere).any())

    def image(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The sites that are Deltas at these values of others.

        Returns:
            Unconstrained, shape (K, N, U); log |dz/du| and the sum of log_density, each of shape (K, N).
        """
        batch, base = self.look.batch, self.look.base
        k, n = len(next(iter(values.values()))), len(batch)
        with At(values):
            sites = sample_sites(run(self.look.pair.guide, "guide", batch, k))
        parts, log_volume, log_density = [], batch.x.new_zeros(()), batch.x.new_zeros(())
        for name in self.points:
            z = sites[name]["value"]
            transform = bijection(name, base.latents[name].prior.support)
            u = transform.inv(z)
            parts.append(u.reshape(k, n, -1))
            log_volume = log_volume + transform.log_abs_det_jacobian(u, transform(u)).reshape(k, n, -1).sum(-1)
            log_density = log_density + sites[name]["fn"].log_prob(z)
        return torch.cat(parts, -1), log_volume, log_density


def kind(distribution: Any) -> str:
    """Whether a distribution is discrete or continuous, as far as it says."""
    try:
        return "discrete" if distribution.support.is_discrete else "continuous"
    except NotImplementedError:
        return "unknown"
