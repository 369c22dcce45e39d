r"""What the latents of a pair do, as each epoch reports it: the terms of the bound, and posterior collapse.

    reconstruction     E log p(x|z)
    kl                 KL(q(z|x) || p(z)), all sites together
    kl_z1, kl_z2       of several sites, the KL of each, given the draws that its distributions depend on; sum: kl
    kl_z[d]            KL of the d-th marginals, and active units: see `pyrovae.inference.units`

All are means over data in nats.
"""

from collections.abc import Callable, Iterable

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.kl import kl_terms
from pyrovae.inference.objectives import ELBO, OfParticles, as_objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.units import ACTIVE_VARIANCE, marginal_kl, posterior_mean
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import Latent, draw
from pyrovae.seeding import same_noise


@torch.no_grad()
@in_single_precision
def measure(
    model: Callable,
    guide: Callable,
    batches: Iterable[Tensor | Batch],
    objective: PyroELBO,
    particle_chunk: int | None = None,
) -> dict[str, float]:
    """Means over the rows of all batches, in nats per datum.

    Args:
        model: Pyro model, called as model(x, *given).
        guide: Pyro guide, called as guide(x, *given).
        batches: Tensors x of shape (n, *event), or batches of x and what is given beside it.
        objective: Its own bound is measured unscaled, whatever its beta. Of an objective of Pyro's own it is -loss/n,
            and the rest is measured where the pair has log-weights per datum.
        particle_chunk: Draw so many particles at a time, for memory. The bound is that of all of them, the rest is
            measured on the first chunk.

    Returns:
        "bound", and for a pair with latent sites "elbo", "reconstruction", "kl", "kl_SITE[d]", "active_units" and
        "latent_dimensions", the number that could be active; where there are several sites, "kl_SITE" and
        "active_units_SITE" of each too.

    Raises:
        UsageError: there are no batches.
    """
    pair, objective, rows = Pair(model, guide), as_objective(objective).evaluated, 0
    totals: dict[str, float] = {}
    moments: dict[str, list[Tensor]] = {}
    beside: bool | None = None  # whether a pair has log-weights for an objective that needs none; known from one batch
    for part in batches:
        batch = part if isinstance(part, Batch) else Batch(part)
        rows += len(batch)
        if isinstance(objective, OfParticles):
            latents, values = terms_of(pair, batch, objective, particle_chunk)
        else:
            latents, values = {}, {"bound": objective.combine(objective.draw(pair, batch, 1))}
            beside = has_log_weights(pair, batch) if beside is None else beside
            if beside:
                with same_noise(batch.x.device):
                    latents, terms = terms_of(pair, batch, ELBO(), None)
                values = terms | values
        for site, latent in latents.items():
            center, noise = posterior_mean(latent)
            first, second = moments.setdefault(site, [torch.zeros_like(center[0]), torch.zeros_like(center[0])])
            first += center.sum(0)
            second += (center.square() - noise).sum(0)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value.double().sum().item()
    if not rows:
        raise UsageError("batches: expected at least one batch with rows, got none")
    report = {name: total / rows for name, total in totals.items()}
    active = {s: int((b / rows - (a / rows).square() > ACTIVE_VARIANCE).sum()) for s, (a, b) in moments.items()}
    if active:
        report["active_units"] = float(sum(active.values()))
        report["latent_dimensions"] = float(sum(first.numel() for first, _ in moments.values()))
    if any(name.startswith("kl_") and "[" not in name for name in report):  # several sites
        report |= {f"active_units_{site}": float(count) for site, count in active.items()}
    return report


def terms_of(
    pair: Pair, batch: Batch, objective: OfParticles, particle_chunk: int | None
) -> tuple[dict[str, Latent], dict[str, Tensor]]:
    """The latents of the first chunk of draws but for auxiliary ones, and the bound and its terms, each (N,)."""
    size, *sizes = objective.chunks(particle_chunk)
    particles = draw(pair, batch, size)
    terms = [objective.terms(particles), *(objective.draw(pair, batch, k) for k in sizes)]
    kls = {site: value.mean(0) for site, value in kl_terms(particles)[0].items()}
    kl = torch.stack(list(kls.values()) or [torch.zeros_like(particles.log_likelihood[0])]).sum(0)  # 0 without latents
    reconstruction = particles.log_likelihood.mean(0)
    latents = {site: latent for site, latent in particles.latents.items() if not latent.auxiliary}
    return latents, {
        "bound": objective.combine(torch.cat(terms, 1)),
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        **({f"kl_{site}": value for site, value in kls.items()} if len(kls) > 1 else {}),
        **{f"kl_{site}[{d}]": v for site, z in latents.items() for d, v in enumerate(marginal_kl(z))},
    }


def has_log_weights(pair: Pair, batch: Batch) -> bool:
    """Whether a pair's weights are of log p(x), and not of latents that are summed out, of which there are no draws."""
    try:
        check_pair(pair, batch)
    except ValueError:
        return False
    return True


def remarks(metrics: dict[str, float]) -> list[str]:
    """What one epoch's measurements say about posterior collapse, in words."""
    active, total = metrics.get("active_units"), int(metrics.get("latent_dimensions", 0))
    if active is None or not total:
        return []
    if active == 0:
        return [
            f"posterior collapse: no latent dimension is active (KL {metrics['kl']:.3g} nats); the decoder ignores z. "
            "A weaker decoder or more epochs help, and with the ELBO a beta that is lower or warmed up from 0"
        ]
    if active < total:
        return [f"{total - int(active)} of {total} latent dimensions are inactive (variance of E[z|x] at most 0.01)"]
    return []
