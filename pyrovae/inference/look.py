"""A pair at fixed draws for some rows: whether its log-densities are of each row and particle alone.

The latents are held, and something else is changed: other rows beside them, fewer rows, fewer particles, another random
state, another run of the guide before the model. Log-densities that then differ are refused, by the name of the site.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.errors import PairError
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import At, Particles, draw, sample_sites

# What is put around a distribution.
WRAPPERS = (dist.ExpandedDistribution, torch.distributions.Independent, dist.MaskedDistribution)


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
            if not site["is_observed"] and not is_delta(site)
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


def is_delta(site: dict) -> bool:
    """Whether a site's distribution is a Delta, whatever was put around it."""
    return isinstance(plain(site["fn"]), dist.Delta)


def taken(value: Tensor, particles: int, rows: Tensor) -> Tensor:
    """Some particles and rows of values (K, N, *event)."""
    result = value[:particles][:, rows]
    if hasattr(value, "_unquantize"):  # straight-through values carry the relaxed one that their density is of
        result._unquantize = value._unquantize[:particles][:, rows]  # type: ignore[attr-defined]
    return result
