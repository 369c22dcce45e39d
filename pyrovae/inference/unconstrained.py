"""A pair's latents as one unconstrained vector per datum.

Gradient-based transitions and Gaussians fitted to a single datum move in R^U: every latent site z of the pair is
z = t(u) with torch's bijection onto its support (the identity where that is all of R^d), and the sites' vectors are
concatenated to u of shape (K, N, U). Densities of u include log |dz/du|, which cancels in weights.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.errors import PairError
from pyrovae.inference.batch import Batch
from pyrovae.inference.look import plain
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import NO_LATENTS, At, Particles, draw, log_prob, run, sample_sites


@dataclass(frozen=True)
class Densities:
    """Log-densities of u in nats, each of shape (K, N)."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u)."""
        return self.log_likelihood + self.log_prior


def bijection(name: str, support: Any) -> Any:
    """torch's bijection from R^U onto the support of a latent site, for a mixture that of its components.

    Raises:
        PairError: there is none.
    """
    for constraint in (support, getattr(support, "base_constraint", None)):
        with suppress(NotImplementedError):
            return biject_to(constraint)
    raise PairError(
        f"model site '{name}': torch knows no bijection from unconstrained numbers onto {str(support)[:200]}, its "
        "support; draw from the guide itself, or register one with torch.distributions.biject_to"
    )


class Unconstrained:
    """A pair at fixed data, as functions of u.

    Args:
        pair: The pair.
        batch: N rows of data.

    Raises:
        PairError: a latent site is discrete, or the guide has auxiliary sites, so that q(z|x) is not known.
    """

    def __init__(self, pair: Pair, batch: Batch) -> None:
        self.pair, self.batch = pair, batch
        probe, other = draw(pair, batch), draw(pair, batch)
        if auxiliary := set(probe.log_guides) - set(probe.latents):
            raise PairError(
                f"guide site '{min(auxiliary)}' is auxiliary, so that q(z|x) alone is not known; draw from the guide "
                "itself"
            )
        if not probe.latents:
            raise PairError(NO_LATENTS)
        self.transforms: dict[str, Any] = {}
        for name, latent in probe.latents.items():
            if not latent.guide.has_rsample and latent.guide.support.is_discrete:
                raise PairError(
                    f"guide site '{name}': {type(plain(latent.guide)).__name__} is discrete; this takes continuous "
                    "latents. Draw from the guide itself, or sum the site out of the model"
                )
            self.transforms[name] = bijection(name, latent.prior.support)
            u = self.transforms[name].inv(latent.value)
            if not torch.equal(self.transforms[name](u), bijection(name, other.latents[name].prior.support)(u)):
                raise PairError(
                    f"model site '{name}': its support depends on other latents; draw from the guide itself, or write "
                    "the site as a transform of one with a fixed support"
                )
        first = {name: self.transforms[name].inv(latent.value) for name, latent in probe.latents.items()}
        self.shapes = {name: u.shape[2:] for name, u in first.items()}

    def draw(self, num_particles: int) -> Tensor:
        """u from the guide, shape (K, N, U)."""
        return self.join(draw(self.pair, self.batch, num_particles))

    def join(self, particles: Particles) -> Tensor:
        """u of latents that were drawn, shape (K, N, U)."""
        parts = [self.transforms[name].inv(latent.value) for name, latent in particles.latents.items()]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def unconstrained(self, z: Tensor) -> Tensor:
        """u of values (K, N, *event) of the one latent site, shape (K, N, U)."""
        (transform,) = self.transforms.values()
        u: Tensor = transform.inv(z)
        return u.reshape(*u.shape[:2], -1)

    def log_joint_at(self, z: Tensor) -> Tensor:
        """log p(x, z) at values (K, N, *event) of the one latent site, shape (K, N); the guide is not run."""
        (name,) = self.transforms
        return sum(self.of_model({name: z}, z.new_zeros(z.shape[:2])), z.new_zeros(z.shape[:2]))

    def split(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents at u (K, N, U) by name, and log |dz/du| of shape (K, N)."""
        values, log_det = {}, u.new_zeros(u.shape[:2])
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            own, transform = part.reshape(*u.shape[:2], *shape), self.transforms[name]
            values[name] = transform(own)
            log_det = log_det + transform.log_abs_det_jacobian(own, values[name]).reshape(*u.shape[:2], -1).sum(-1)
        return values, log_det

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u) at u (K, N, U), shape (K, N); the guide is not run."""
        return sum(self.of_model(*self.split(u)), u.new_zeros(u.shape[:2]))

    def of_model(self, values: dict[str, Tensor], log_det: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|u) and log p(u) at what `split` gave for u, each of shape (K, N); the guide is not run."""
        k, n = log_det.shape
        with At(values):
            sites = sample_sites(run(self.pair.model, "model", self.batch, k))
        log_p = {name: log_prob(site, f"model site '{name}'", (k, n)) for name, site in sites.items()}
        log_likelihood = sum((v for name, v in log_p.items() if name not in values), torch.zeros_like(log_det))
        return log_likelihood, sum((log_p[name] for name in values), log_det)

    def __call__(self, u: Tensor) -> Densities:
        """The log-densities at u, shape (K, N, U)."""
        values, log_det = self.split(u)
        particles = draw(self.pair, self.batch, len(u), values)
        return Densities(particles.log_likelihood, particles.log_prior + log_det, particles.log_guide + log_det)
