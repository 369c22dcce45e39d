r"""Whether the log-weights of a pair are of log p(x): looked at once, on rows as they will be used.

    log w_kn = log p(x_n, z_kn) - log q(z_kn|x_n),        E exp(log w_kn) = p(x_n)

holds for what is a function of z_kn and x_n alone (and of what is given with x_n, which goes wherever x_n goes), with q
the normalised density of the model's latents. So, with the latents of a few draws held fixed,

    rows         other rows of data and z beside it, or fewer, leave a row's log-densities as they are
    particles    so do fewer particles
    noise        so does another random state, once modules are in evaluation mode (no dropout)
    memory       and so does a guide that was run on other rows before the model is
    density      every latent is drawn from a density, and from nothing but what log q is the sum of

and what breaks one of them is refused by name (`pyrovae.inference.look`, `pyrovae.inference.density`). It costs about
10 draws for each row that is looked at.

Training by a pair whose guide has no density goes on (with a Delta it finds the posterior's mode), but what it
maximises is no bound on log p(x), and is not called so.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyro
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor

from pyrovae.checks import check_programs
from pyrovae.errors import PairError
from pyrovae.inference.automatic import automatic, check_automatic, set_up, undone
from pyrovae.inference.batch import Batch
from pyrovae.inference.density import Density
from pyrovae.inference.look import Look
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.seeding import seeded

WHOLE = "the pair works on all of its rows together only, as a guide does that has parameters for each row"
# Elements of x on which a pair is tried as a whole that fails on parts of it.
MOST_ELEMENTS = 2**22


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
        looked = looked_at(pair, batch, rows)
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
            return Findings(rows, whole, Density(looked).fault())


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


def looked_at(pair: Pair, batch: Batch, rows: int) -> Look:
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
        return Density(Look(pair, batch)).fault()
    return None
